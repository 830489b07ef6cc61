//! A tree, a peer directory and everything else that a test of its own needs.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use super::process::{self, Process, Role};
use super::program::{Outcome, run};
use super::status::Status;
use super::tool;
use super::wait::{PROMPT, eventually, wait_until};

/// Longest that one command of mirrorfs may take in these tests.
const COMMAND: Duration = Duration::from_secs(240);

/// A directory with a tree, a peer, a state directory and a home of its own. Dropping it
/// unmounts, kills the processes that belong to it, and removes it; a failed test prints
/// what the daemon logged. `MIRRORFS_TEST_KEEP=1` keeps it.
pub struct Sandbox {
    root: PathBuf,
    program: PathBuf,
    user: Option<User>,
    variables: Vec<(OsString, OsString)>,
    /// Ends the watchdog when dropped.
    alive: Option<mpsc::Sender<()>>,
}

/// An ordinary user to run as.
#[derive(Clone, Copy)]
struct User {
    uid: u32,
    gid: u32,
}

impl Sandbox {
    /// Makes a sandbox. It belongs to whoever runs the tests.
    pub fn new() -> Self {
        Self::with(None)
    }

    /// Makes a sandbox that belongs to an ordinary user, as whom everything in it is run:
    /// `nobody`, if the tests run as root.
    pub fn of_ordinary_user() -> Self {
        let user = rustix::process::getuid().is_root().then(nobody);
        Self::with(user)
    }

    fn with(user: Option<User>) -> Self {
        // The control socket's path has to fit into 107 bytes, so the name is short.
        let root = tempfile::Builder::new()
            .prefix("mfs-")
            .tempdir()
            .unwrap()
            .keep();
        let root = root.canonicalize().unwrap();
        let mut program = PathBuf::from(env!("CARGO_BIN_EXE_mirrorfs"));
        for name in ["", "tree", "peer", "state", "home", "outside", "bin"] {
            let dir = root.join(name);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
            if let Some(User { uid, gid }) = user {
                std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).unwrap();
            }
        }
        if user.is_some() {
            // The checkout may be closed to others.
            let copy = root.join("bin/mirrorfs");
            install(&program, &copy);
            program = copy;
        }
        let (alive, watch) = mpsc::channel();
        let watched = root.clone();
        std::thread::spawn(move || watchdog(&watched, &watch));
        Self {
            root,
            program,
            user,
            variables: Vec::new(),
            alive: Some(alive),
        }
    }

    /// The sandbox itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The working tree, which gets mounted.
    pub fn tree(&self) -> PathBuf {
        self.root.join("tree")
    }

    /// The peer directory.
    pub fn peer(&self) -> PathBuf {
        self.root.join("peer")
    }

    /// Where the journal lives.
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The user's home.
    pub fn home(&self) -> PathBuf {
        self.root.join("home")
    }

    /// A place that is not mirrored, for a test's own records.
    pub fn outside(&self) -> PathBuf {
        self.root.join("outside")
    }

    /// The built program, where everybody can run it.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// An outside test suite that `./test` has installed, where everybody can run it.
    #[track_caller]
    pub fn tool(&self, name: &str) -> PathBuf {
        let copy = self.root.join("bin").join(name);
        install(&tool::installed(name), &copy);
        copy
    }

    /// Sets a variable for every command from now on.
    pub fn set(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.variables.push((name.into(), value.into()));
    }

    /// A command of any program in the sandbox's environment, as the sandbox's user.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match self.user {
            None => Command::new(program),
            Some(User { uid, gid }) => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={uid}"))
                    .arg(format!("--regid={gid}"))
                    .args(["--clear-groups", "--"])
                    .arg(program);
                command
            }
        };
        command.env_clear().current_dir(&self.root);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut all = path.clone();
        all.push(":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        command
            .env("PATH", all)
            .env("LANG", "C.UTF-8")
            .env("TZ", "UTC")
            .env("HOME", self.home())
            .env("USER", "tester")
            .env("MIRRORFS_STATE", self.state())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_AUTHOR_NAME", "Tester")
            .env("GIT_AUTHOR_EMAIL", "tester@example.org")
            .env("GIT_COMMITTER_NAME", "Tester")
            .env("GIT_COMMITTER_EMAIL", "tester@example.org")
            .env("GIT_TERMINAL_PROMPT", "0");
        for passed in ["MIRRORFS_LOG", "RUST_BACKTRACE", "TMPDIR"] {
            if let Some(value) = std::env::var_os(passed) {
                command.env(passed, value);
            }
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs mirrorfs to its end.
    #[track_caller]
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Outcome {
        run(self.command(&self.program).args(arguments), COMMAND)
    }

    /// Runs a shell command in a directory, and fails unless it succeeds. Gives what it
    /// printed.
    #[track_caller]
    pub fn sh(&self, dir: &Path, script: &str) -> String {
        let outcome = run(
            // The user enters the directory: nobody else may look into a user's mount.
            self.command("env")
                .arg("--chdir")
                .arg(dir)
                .args(["bash", "-euo", "pipefail", "-c", script]),
            COMMAND,
        );
        outcome.ok().stdout
    }

    /// Mounts the tree with the peer directory on this machine.
    #[track_caller]
    pub fn mount(&self) -> Outcome {
        self.mount_with(self.peer())
    }

    /// Mounts the tree with any peer.
    #[track_caller]
    pub fn mount_with(&self, peer: impl AsRef<OsStr>) -> Outcome {
        let outcome = self.try_mount(peer).ok();
        assert!(
            self.is_mounted(),
            "mount has returned without a mount: {outcome}"
        );
        outcome
    }

    /// Tries to mount the tree.
    #[track_caller]
    pub fn try_mount(&self, peer: impl AsRef<OsStr>) -> Outcome {
        self.run([OsStr::new("mount"), self.tree().as_ref(), peer.as_ref()])
    }

    /// Whether the tree is mounted, in the eyes of the kernel.
    pub fn is_mounted(&self) -> bool {
        process::mounts_below(&self.tree())
            .iter()
            .any(|(point, _)| *point == self.tree())
    }

    /// Unmounts the tree, and fails unless that succeeds, takes everything down, and the
    /// journal has the tree as it is: the equation that every test of the filesystem ends
    /// with.
    #[track_caller]
    pub fn umount(&self) -> Outcome {
        let outcome = self.try_umount().ok();
        self.assert_down();
        super::recorded::assert_shown(&self.state(), &self.tree());
        outcome
    }

    /// Fails unless the journal says of every name what the unmounted tree shows.
    #[track_caller]
    pub fn assert_recorded(&self) {
        super::recorded::assert_recorded(&self.state(), &self.tree());
    }

    /// Unmounts the tree.
    #[track_caller]
    pub fn try_umount(&self) -> Outcome {
        self.run([OsStr::new("umount"), self.tree().as_ref()])
    }

    /// Fails unless nothing is mounted and nothing runs any more.
    #[track_caller]
    pub fn assert_down(&self) {
        assert!(!self.is_mounted(), "still mounted");
        eventually("the processes end after umount", PROMPT, || {
            let left = self.processes();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
    }

    /// Flushes, and gives the exit code with what was said.
    #[track_caller]
    pub fn try_flush(&self) -> Outcome {
        self.run([
            OsStr::new("sync"),
            self.tree().as_ref(),
            "--flush".as_ref(),
            "--timeout".as_ref(),
            "180s".as_ref(),
        ])
    }

    /// Flushes, and fails unless everything is durable on the peer.
    #[track_caller]
    pub fn flush(&self) -> Outcome {
        self.try_flush().ok()
    }

    /// The status, as a script reads it.
    #[track_caller]
    pub fn status(&self) -> Status {
        let outcome = self.status_json();
        serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|error| panic!("not the status that was promised: {error}: {outcome}"))
    }

    /// The status command itself.
    #[track_caller]
    pub fn status_json(&self) -> Outcome {
        self.run([
            OsStr::new("status"),
            self.tree().as_ref(),
            "--json".as_ref(),
        ])
    }

    /// Waits until the status is as wanted.
    #[track_caller]
    pub fn status_becomes(&self, what: &str, mut wanted: impl FnMut(&Status) -> bool) -> Status {
        eventually(what, PROMPT, || {
            let status = self.status();
            if wanted(&status) {
                Ok(status)
            } else {
                Err(format!("{status:#?}"))
            }
        })
    }

    /// Waits until the only peer is connected.
    #[track_caller]
    pub fn connected(&self) -> Status {
        self.status_becomes("the peer is connected", |status| {
            status.peers.len() == 1 && status.peer().state == "connected"
        })
    }

    /// Waits until tree and peer show the same.
    #[track_caller]
    pub fn converges(&self) {
        eventually("tree and peer become the same", PROMPT, || {
            super::compare::compare(&self.tree(), &self.peer())
        });
    }

    /// The processes of mirrorfs in this sandbox.
    pub fn processes(&self) -> Vec<Process> {
        process::below(&self.root)
    }

    /// The processes of one kind.
    pub fn processes_of(&self, role: Role) -> Vec<Process> {
        let mut found = self.processes();
        found.retain(|process| process.role == role);
        found
    }

    /// Kills the daemon behind the mount, and its door, as a crash would; agents live on.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let daemons = self.processes_of(Role::Daemon);
        assert!(!daemons.is_empty(), "no daemon in {:?}", self.processes());
        for process in &daemons {
            process.kill();
        }
        wait_until("the killed daemon is gone", PROMPT, || {
            daemons.iter().all(|process| !process.alive())
        });
    }

    /// Kills the agents, as a crash would; waits for one if there is none right now.
    #[track_caller]
    pub fn kill_agents(&self) {
        let agents = eventually("an agent to kill", PROMPT, || {
            let agents = self.processes_of(Role::Agent);
            if agents.is_empty() {
                return Err(format!("{:?}", self.processes()));
            }
            Ok(agents)
        });
        for process in &agents {
            process.kill();
        }
    }

    /// The conflict artefacts in the root of the tree: copies of the remote version.
    pub fn conflict_copies(&self, dir: &Path) -> Vec<PathBuf> {
        self.names_ending(dir, ".conflict")
    }

    /// The names in a directory with an ending.
    pub fn names_ending(&self, dir: &Path, ending: &str) -> Vec<PathBuf> {
        let mut found: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.as_os_str().as_bytes().ends_with(ending.as_bytes()))
            .collect();
        found.sort();
        found
    }

    /// The files in the peer's (or the tree's) reserved directory, with content.
    pub fn reserved_contents(&self, root: &Path, name: &str) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut todo = vec![root.join(".mirrorfs").join(name)];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    todo.push(entry.path());
                } else if let Ok(content) = std::fs::read(entry.path()) {
                    found.push(content);
                }
            }
        }
        found
    }

    fn print_for_the_reader(&self) {
        eprintln!("=== sandbox {}", self.root.display());
        for process in self.processes() {
            eprintln!("=== {process:?}");
        }
        for state in ["state", "agent-state"] {
            let mirrors = self.root.join(state);
            for log in find_logs(&mirrors) {
                let text = std::fs::read(&log).unwrap_or_default();
                let tail = &text[text.len().saturating_sub(6000)..];
                eprintln!("=== {}\n{}", log.display(), String::from_utf8_lossy(tail));
            }
        }
    }
}

fn find_logs(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(find_logs(&entry.path()));
        } else if entry.path().extension() == Some(OsStr::new("log")) {
            found.push(entry.path());
        }
    }
    found
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_for_the_reader();
        }
        drop(self.alive.take());
        if std::env::var_os("MIRRORFS_TEST_KEEP").is_some() {
            eprintln!("=== kept {}", self.root.display());
            return;
        }
        tear_down(&self.root);
        std::fs::remove_dir_all(&self.root).ok();
    }
}

/// Copies a program, in a process of its own: a child that another test starts meanwhile
/// would inherit the descriptor that writes it, and until that is closed nobody can run it
/// (ETXTBSY).
fn install(program: &Path, to: &Path) {
    let mut command = Command::new("cp");
    run(command.arg(program).arg(to), COMMAND).ok();
}

/// Kills what runs in a sandbox and unmounts what is mounted there, by force.
fn tear_down(root: &Path) {
    for process in process::below(root) {
        process.kill();
    }
    for (point, _) in process::mounts_below(root) {
        let mut command = if rustix::process::getuid().is_root() {
            let mut command = Command::new("umount");
            command.arg("-l");
            command
        } else {
            let mut command = Command::new("fusermount3");
            command.args(["-u", "-z"]);
            command
        };
        command
            .arg(point)
            .stderr(std::process::Stdio::null())
            .status()
            .ok();
    }
}

/// A test that hangs in a dead or stuck mount fails instead: after a quarter of an hour
/// the sandbox is torn down under it.
fn watchdog(root: &Path, alive: &mpsc::Receiver<()>) {
    if let Err(mpsc::RecvTimeoutError::Timeout) = alive.recv_timeout(Duration::from_secs(900)) {
        eprintln!("=== a test has hung: tearing down {}", root.display());
        for (_, device) in process::mounts_below(root) {
            let minor = device.split(':').next_back().unwrap_or_default();
            let abort = format!("/sys/fs/fuse/connections/{minor}/abort");
            std::fs::write(abort, "1").ok();
        }
        tear_down(root);
    }
}

fn nobody() -> User {
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = accounts
        .lines()
        .find(|line| line.starts_with("nobody:"))
        .expect("an account called nobody");
    let mut numbers = line.split(':').skip(2).map(|field| field.parse().unwrap());
    User {
        uid: numbers.next().unwrap(),
        gid: numbers.next().unwrap(),
    }
}
