//! The command line as a user meets it: the built program, real mounts, no peer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// Directories of one test, and a state directory of their own.
struct Sandbox {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let sandbox = Self { dir, path };
        fs::create_dir(sandbox.tree()).unwrap();
        sandbox
    }

    fn tree(&self) -> PathBuf {
        self.path.join("tree")
    }

    fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mirrorfs"));
        command
            .args(arguments)
            .current_dir(&self.path)
            .env("MIRRORFS_STATE", self.state())
            .env_remove("MIRRORFS_DISABLE")
            .stdin(Stdio::null());
        command
    }

    fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Ran {
        Ran::of(self.command(arguments))
    }

    fn mount(&self) {
        self.run(["mount", "tree"]).succeeds();
    }

    /// The daemon of the only mirror.
    fn daemon(&self) -> u32 {
        let lock = fs::read_to_string(self.mirror().join("lock")).unwrap();
        lock.trim().parse().unwrap()
    }

    fn mirror(&self) -> PathBuf {
        let mut all = fs::read_dir(self.state().join("mirrors")).unwrap();
        all.next().unwrap().unwrap().path()
    }

    fn status(&self) -> serde_json::Value {
        let ran = self.run(["status", "tree", "--json"]);
        serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}{}", ran.stdout, ran.stderr))
    }

    fn is_mounted(&self) -> bool {
        is_mount_point(&self.tree())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Only after a failure. Nothing may be in the way of removing the directory.
        for tree in [self.tree(), self.path.join("fresh"), self.path.join("copy")] {
            while is_mount_point(&tree) {
                let _ = Command::new("umount").arg("-l").arg(&tree).status();
            }
        }
        if std::thread::panicking() {
            for mirror in fs::read_dir(self.state().join("mirrors"))
                .into_iter()
                .flatten()
            {
                let log = fs::read_to_string(mirror.unwrap().path().join("daemon.log"));
                eprintln!("a daemon's log:\n{}", log.unwrap_or_default());
            }
        }
        let _ = &self.dir;
    }
}

fn is_mount_point(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == path.to_str())
}

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(mut command: Command) -> Self {
        let output: Output = command.output().unwrap();
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// Fails with an error that says all of `words`, and what to do.
    fn fails(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        let mut lines = self.stderr.lines();
        assert!(
            lines.any(|line| line.starts_with("mirrorfs: ")),
            "{}",
            self.stderr
        );
        for word in words.iter().chain(&["\nhint: "]) {
            assert!(self.stderr.contains(word), "no {word:?} in {}", self.stderr);
        }
        self
    }

    fn says(self, word: &str) -> Self {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert!(all.contains(word), "no {word:?} in {all}");
        self
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(30), "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A program with its working directory in `dir`.
struct Inside(Child);

impl Inside {
    fn new(dir: &Path) -> Self {
        let child = Command::new("cat")
            .current_dir(dir)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_wrong_command_line_is_2() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.run(["mount"]).code, Some(2));
    assert_eq!(
        sandbox.run(["sync", ".", "--timeout", "soon"]).code,
        Some(2)
    );
    sandbox.run(["--help"]).succeeds().says("Exit codes");
}

#[test]
fn disabled_means_plain_files_and_no_error() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(["mount", "tree"]);
    command.env("MIRRORFS_DISABLE", "1");
    Ran::of(command).succeeds().says("is disabled");
    assert!(!sandbox.is_mounted());
    assert!(!sandbox.tree().join(".mirrorfs").exists());
}

#[test]
fn what_is_no_directory_is_refused() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.path.join("file"), "").unwrap();
    sandbox
        .run(["mount", "file"])
        .fails(&["file is not a directory"]);
    sandbox
        .run(["mount", "missing"])
        .fails(&["missing does not exist", "mkdir"]);
}

#[test]
fn a_state_directory_in_the_tree_is_refused() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(["mount", "tree"]);
    command.env("MIRRORFS_STATE", sandbox.tree().join("state"));
    Ran::of(command).fails(&["the state directory", "lies inside", "MIRRORFS_STATE"]);
    assert_eq!(fs::read_dir(sandbox.tree()).unwrap().count(), 0);
}

#[test]
fn a_peer_that_cannot_be_one_is_refused() {
    let sandbox = Sandbox::new();
    let refuse = |peer: &str, words: &[&str]| {
        sandbox.run(["mount", "tree", peer]).fails(words);
    };
    refuse(
        "no/such/peer",
        &["the peer", "cannot be created", "no/such does not exist"],
    );
    refuse("tree", &["the tree", "itself"]);
    refuse("tree/inside", &["lies inside"]);
    refuse(".", &["contains the tree"]);
    assert!(!sandbox.is_mounted());
    assert_eq!(fs::read_dir(sandbox.tree()).unwrap().count(), 0);
}

#[test]
fn a_peer_of_another_mirror_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    sandbox.run(["umount", "tree"]).succeeds();
    fs::create_dir(sandbox.path.join("other")).unwrap();
    sandbox.run(["mount", "other"]).succeeds();
    sandbox.run(["umount", "other"]).succeeds();
    sandbox.run(["mount", "tree", "other"]).fails(&[
        "the peer",
        "other",
        "belongs to another mirror",
    ]);
    assert!(!sandbox.is_mounted());
}

#[test]
fn only_an_empty_tree_joins_the_mirror_of_its_peer() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let mirror = sandbox.status()["mirror"]["id"].clone();
    sandbox.run(["umount", "tree"]).succeeds();
    // A peer is a replica of its own, as an agent would have made it.
    let identity = fs::read_to_string(sandbox.tree().join(".mirrorfs/identity")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&identity).unwrap();
    let peer = sandbox.path.join("peer/.mirrorfs");
    fs::create_dir_all(&peer).unwrap();
    let other = serde_json::json!({"mirror": identity["mirror"], "replica": "0".repeat(32)});
    fs::write(peer.join("identity"), other.to_string()).unwrap();

    let fresh = sandbox.path.join("fresh");
    fs::create_dir(&fresh).unwrap();
    fs::write(fresh.join("file"), "").unwrap();
    sandbox
        .run(["mount", "fresh", "peer"])
        .fails(&["belongs to a mirror already", "files of its own"]);
    assert!(!fresh.join(".mirrorfs").exists());
    fs::remove_file(fresh.join("file")).unwrap();
    sandbox.run(["mount", "fresh", "peer"]).succeeds();
    let ran = sandbox.run(["status", "fresh", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(status["mirror"]["id"], mirror);
    // Its state is its own, because a journal belongs to one tree.
    assert_eq!(
        fs::read_dir(sandbox.state().join("mirrors"))
            .unwrap()
            .count(),
        2
    );
    sandbox.run(["umount", "fresh"]).succeeds();
    assert!(fresh.join(".mirrorfs/identity").exists());

    // Time for nothing is no reason to stay mounted.
    for _ in 0..5 {
        sandbox.run(["mount", "fresh"]).succeeds();
        sandbox
            .run(["umount", "fresh", "--timeout", "0"])
            .says("is unmounted");
    }
}

#[test]
fn without_fuse_the_device_is_named() {
    if !is_root() {
        eprintln!("skipped: needs root to hide /dev/fuse");
        return;
    }
    let sandbox = Sandbox::new();
    let fake = sandbox.path.join("fake");
    fs::write(&fake, "").unwrap();
    let inner = sandbox.command(["mount", "tree"]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount --bind \"$1\" /dev/fuse && shift && exec \"$@\"")
        .arg("sh")
        .arg(&fake)
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(&sandbox.path)
        .env("MIRRORFS_STATE", sandbox.state());
    Ran::of(command).fails(&["cannot open /dev/fuse", "modprobe fuse"]);
}

/// A command that an ordinary user runs.
fn as_ordinary_user(sandbox: &Sandbox, arguments: &[&str]) -> Command {
    let program = sandbox.path.join("mirrorfs");
    if !program.exists() {
        // Where it was built may be closed to others.
        fs::copy(env!("CARGO_BIN_EXE_mirrorfs"), &program).unwrap();
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(&sandbox.path)
        .env("MIRRORFS_STATE", sandbox.state())
        .stdin(Stdio::null());
    if is_root() {
        fs::set_permissions(&sandbox.path, fs::Permissions::from_mode(0o755)).unwrap();
        for dir in [sandbox.tree(), sandbox.state()] {
            fs::create_dir_all(&dir).unwrap();
            std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn an_ordinary_user_needs_fusermount3() {
    let sandbox = Sandbox::new();
    let mut command = as_ordinary_user(&sandbox, &["mount", "tree"]);
    command.env("PATH", "/nonexistent");
    Ran::of(command).fails(&["fusermount3 is not installed", "fuse3"]);
}

#[test]
fn an_ordinary_user_mounts_and_unmounts() {
    let sandbox = Sandbox::new();
    let mut day = as_ordinary_user(&sandbox, &["--version"]);
    let program = day.get_program().to_owned();
    day = Command::new("sh");
    let script = "set -e
        \"$1\" mount tree
        echo text >tree/file
        cat tree/file
        \"$1\" status tree
        \"$1\" umount tree";
    if is_root() {
        // In containers the device is often root's alone; elsewhere everybody's.
        day.args([
            "-c",
            "set -e
            mount -t tmpfs none state
            mknod -m 666 state/fuse c 10 229
            mount --bind state/fuse /dev/fuse
            umount -l state
            exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -c \"$2\" sh \"$1\"",
            "sh",
        ]);
        let inner = day;
        day = Command::new("unshare");
        day.args(["--mount", "--propagation", "private"]);
        day.arg(inner.get_program())
            .args(inner.get_args())
            .arg(program)
            .arg(script);
    } else {
        day.args(["-c", script, "sh"]).arg(program);
    }
    day.current_dir(&sandbox.path)
        .env("MIRRORFS_STATE", sandbox.state());
    Ran::of(day)
        .succeeds()
        .says("is mounted")
        .says("\ntext\n")
        .says("mount    mounted")
        .says("is unmounted");
    assert_eq!(fs::read(sandbox.tree().join("file")).unwrap(), b"text\n");
}

#[test]
fn a_mount_records_and_leaves_plain_files() {
    let sandbox = Sandbox::new();
    let tree = sandbox.tree();
    fs::write(tree.join("before"), "old").unwrap();
    sandbox
        .run(["mount", "tree", "--name", "web"])
        .succeeds()
        .says("is mounted");
    assert!(sandbox.is_mounted());
    assert!(!tree.join(".mirrorfs").exists(), "reserved");
    let before = sandbox.status();
    assert_eq!(before["mirror"]["name"], "web");
    assert_eq!(before["mirror"]["mode"], "two-way");
    assert_eq!(before["mirror"]["tree"], tree.to_str().unwrap());
    assert_eq!(before["mount"]["state"], "mounted");
    assert_eq!(before["peers"], serde_json::json!([]));

    fs::create_dir(tree.join("dir")).unwrap();
    fs::write(tree.join("dir/after"), "new").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, tree.join("pipe"), rustix::fs::Mode::RUSR).unwrap();
    let after = sandbox.status();
    assert!(after["journal"]["seq"].as_u64() > before["journal"]["seq"].as_u64());
    assert_eq!(after["held_back"][0]["path"], "pipe");
    fs::rename(tree.join("pipe"), tree.join("dir/pipe")).unwrap();
    assert_eq!(sandbox.status()["held_back"][0]["path"], "dir/pipe");
    fs::remove_file(tree.join("dir/pipe")).unwrap();
    assert_eq!(sandbox.status()["held_back"], serde_json::json!([]));

    // From inside, without naming it.
    let mut inside = sandbox.command(["status"]);
    inside.current_dir(tree.join("dir"));
    Ran::of(inside).succeeds().says("web");

    sandbox
        .run(["umount", "tree"])
        .succeeds()
        .says("is unmounted");
    assert!(!sandbox.is_mounted());
    assert_eq!(fs::read(tree.join("before")).unwrap(), b"old");
    assert_eq!(fs::read(tree.join("dir/after")).unwrap(), b"new");
    let unmounted = sandbox.status();
    assert_eq!(unmounted["mount"]["state"], "unmounted");
    assert_eq!(unmounted["mirror"]["id"], before["mirror"]["id"]);
    sandbox.run(["umount", "tree"]).fails(&["is not mounted"]);

    // The same mirror, and what happened in between is taken in.
    fs::write(tree.join("between"), "plain").unwrap();
    sandbox.run(["mount", "tree"]).succeeds().says("1 new");
    let again = sandbox.status();
    assert_eq!(again["mirror"], before["mirror"]);
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn the_state_is_for_its_owner_alone() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    for path in [sandbox.state(), sandbox.mirror()] {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o077, 0, "{path:?}");
    }
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_second_mount_names_the_holder_of_the_first() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let pid = sandbox.daemon().to_string();
    sandbox
        .run(["mount", "tree"])
        .fails(&["is already mounted", &pid]);
    // With another state directory the first is not known, but the mount is seen.
    let mut stranger = sandbox.command(["mount", "tree"]);
    stranger.env("MIRRORFS_STATE", sandbox.path.join("other-state"));
    Ran::of(stranger).fails(&["is already mounted by mirrorfs"]);
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn of_many_first_mounts_at_once_one_wins() {
    let sandbox = Sandbox::new();
    let codes: Vec<_> = std::thread::scope(|scope| {
        let mounts: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| sandbox.run(["mount", "tree"]).code))
            .collect();
        mounts
            .into_iter()
            .map(|mount| mount.join().unwrap())
            .collect()
    });
    assert_eq!(
        codes.iter().filter(|code| **code == Some(0)).count(),
        1,
        "{codes:?}"
    );
    assert_eq!(
        fs::read_dir(sandbox.state().join("mirrors"))
            .unwrap()
            .count(),
        1
    );
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_tree_that_an_agent_works_in_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    sandbox.run(["umount", "tree"]).succeeds();
    // Another process holds it, because one of this process might be inherited for a
    // moment by whatever the other tests start.
    let mut holder = Command::new("sh")
        .args(["-c", "exec 9<>.mirrorfs/lock; flock 9; echo held; exec cat"])
        .current_dir(sandbox.tree())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 5];
    holder
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    let mut elsewhere = sandbox.command(["mount", "tree"]);
    elsewhere.env("MIRRORFS_STATE", sandbox.path.join("other-state"));
    Ran::of(elsewhere).fails(&["another mirrorfs", "works in"]);
    holder.kill().unwrap();
    holder.wait().unwrap();
    sandbox.mount();
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_mirror_inside_a_mirror_is_refused() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.tree().join("inner")).unwrap();
    sandbox.mount();
    sandbox
        .run(["mount", "tree/inner"])
        .fails(&["inner lies inside the mirror"]);
    sandbox.run(["umount", "tree"]).succeeds();
    sandbox
        .run(["mount", "tree/inner"])
        .fails(&["inner lies inside the mirror"]);
}

#[test]
fn a_copy_of_a_mirror_is_told_from_it() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    sandbox.run(["umount", "tree"]).succeeds();
    let copied = Command::new("cp")
        .args(["-a", "tree", "copy"])
        .current_dir(&sandbox.path)
        .status();
    assert!(copied.unwrap().success());
    sandbox
        .run(["mount", "copy"])
        .fails(&["is a copy of the mirror"]);
    // Moved is not copied.
    fs::remove_dir_all(sandbox.tree()).unwrap();
    sandbox.run(["mount", "copy"]).succeeds();
    sandbox.run(["umount", "copy"]).succeeds();
    fs::create_dir(sandbox.tree()).unwrap();
}

#[test]
fn warns_of_a_larger_repository_and_of_programs_inside() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path.join(".git")).unwrap();
    let inside = Inside::new(&sandbox.tree());
    let ran = sandbox.run(["mount", "tree"]).succeeds();
    let (pid, repository) = (inside.0.id(), sandbox.path.display());
    assert!(
        ran.stderr.contains(&format!(
            "warning: cat (pid {pid}) has its working directory"
        )),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr
            .contains(&format!("is part of the Git repository {repository}")),
        "{}",
        ran.stderr
    );
    drop(inside);
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_mount_in_use_stays_and_its_users_are_named() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let inside = Inside::new(&sandbox.tree());
    let user = format!("cat (pid {}) has its working directory", inside.0.id());
    sandbox
        .run(["umount", "tree"])
        .fails(&["cannot unmount", &user]);
    fs::write(sandbox.tree().join("file"), "still works").unwrap();
    assert_eq!(sandbox.status()["mount"]["state"], "mounted");
    drop(inside);
    sandbox.run(["umount", "tree"]).succeeds();
    assert_eq!(
        fs::read(sandbox.tree().join("file")).unwrap(),
        b"still works"
    );
}

#[test]
fn a_killed_daemon_is_recovered_from() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let file = sandbox.tree().join("file");
    fs::write(&file, "just before").unwrap();
    kill(sandbox.daemon(), rustix::process::Signal::KILL);
    until("the mount is dead", || {
        fs::read(&file).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
    });
    let status = sandbox.status();
    assert_eq!(status["mount"]["state"], "unmounted");
    assert!(
        status["mount"]["reason"].as_str().unwrap().contains("died"),
        "{status}"
    );
    sandbox
        .run(["mount", "tree"])
        .succeeds()
        .says("cleared the mount of a daemon that had died")
        .says("did not end cleanly");
    assert_eq!(fs::read(&file).unwrap(), b"just before");

    // Unmounting after a kill leaves plain files, and says that nothing was flushed.
    kill(sandbox.daemon(), rustix::process::Signal::KILL);
    until("the daemon is gone", || {
        sandbox.run(["status", "tree"]).stdout.contains("died")
    });
    sandbox
        .run(["umount", "tree"])
        .fails(&["plain files", "nothing was flushed"]);
    assert_eq!(fs::read(&file).unwrap(), b"just before");
}

#[test]
fn a_termination_signal_unmounts_in_order() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    fs::write(sandbox.tree().join("file"), "x").unwrap();
    let pid = sandbox.daemon();
    // The end of a terminal ends nothing.
    kill(pid, rustix::process::Signal::HUP);
    kill(pid, rustix::process::Signal::TERM);
    until("it is unmounted", || !sandbox.is_mounted());
    until("the daemon is gone", || {
        sandbox.run(["status", "tree"]).stdout.contains("unmounted")
    });
    let ran = sandbox.run(["mount", "tree"]).succeeds();
    assert!(!ran.stderr.contains("cleanly"), "{}", ran.stderr);
    sandbox.run(["umount", "tree"]).succeeds();
}

/// As soon as there is a mount, and before anybody was told of it.
#[test]
fn a_termination_signal_during_the_start_leaves_no_mount() {
    let sandbox = Sandbox::new();
    for round in 0..10 {
        let mut daemon = sandbox
            .command(["mount", "tree", "--foreground"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while !sandbox.is_mounted() {
            assert!(begin.elapsed() < Duration::from_secs(60), "no mount");
            std::thread::yield_now();
        }
        kill(daemon.id(), rustix::process::Signal::TERM);
        let ended = daemon.wait().unwrap();
        assert!(ended.code().is_some(), "round {round}: {ended}");
        assert!(!sandbox.is_mounted(), "round {round}: {ended}");
    }
    let ran = sandbox.run(["mount", "tree"]).succeeds();
    assert!(!ran.stderr.contains("cleanly"), "{}", ran.stderr);
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn an_unmount_by_others_ends_the_daemon_in_order() {
    if !is_root() {
        eprintln!("skipped: umount(8) needs root");
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.mount();
    assert!(
        Command::new("umount")
            .arg(sandbox.tree())
            .status()
            .unwrap()
            .success()
    );
    until("the daemon is gone", || {
        sandbox.run(["status", "tree"]).stdout.contains("unmounted")
    });
    let ran = sandbox.run(["mount", "tree"]).succeeds();
    assert!(!ran.stderr.contains("cleanly"), "{}", ran.stderr);
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_unmount() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(["mount", "tree", "--foreground"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it is mounted", || sandbox.is_mounted());
    until("it answers", || {
        sandbox
            .run(["status", "tree"])
            .stdout
            .contains("mount    mounted")
    });
    assert_eq!(sandbox.daemon(), child.id());
    sandbox.run(["umount", "tree"]).succeeds();
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_daemon_keeps_nothing_of_its_callers() {
    let sandbox = Sandbox::new();
    // If the daemon held on to the pipe, reading it to its end would not end.
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec 7>&1; \"$0\" mount tree"])
        .arg(env!("CARGO_BIN_EXE_mirrorfs"))
        .current_dir(&sandbox.path)
        .env("MIRRORFS_STATE", sandbox.state());
    Ran::of(command).succeeds();
    let held = fs::read_link(format!("/proc/{}/cwd", sandbox.daemon())).unwrap();
    assert_eq!(held, Path::new("/"));
    sandbox.run(["umount", "tree"]).succeeds();
}

#[test]
fn a_flush_without_a_peer_is_no_success() {
    let sandbox = Sandbox::new();
    sandbox
        .run(["sync", "tree", "--flush"])
        .fails(&["not in a mirror"]);
    sandbox.mount();
    sandbox
        .run(["sync", "tree", "--flush"])
        .fails(&["has no peer"]);
    sandbox
        .run(["sync", "tree", "--dry-run"])
        .fails(&["not mounted"]);
    sandbox.run(["umount", "tree"]).succeeds();
    sandbox.run(["sync", "tree"]).fails(&["has no peer"]);
    sandbox
        .run(["sync", "tree", "--flush"])
        .fails(&["is not mounted"]);
}

#[test]
fn a_caller_of_another_version_is_told_so() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let mut socket =
        std::os::unix::net::UnixStream::connect(sandbox.mirror().join("control.sock")).unwrap();
    socket
        .write_all(b"{\"version\":99,\"request\":\"status\"}\n")
        .unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let answer = std::io::read_to_string(socket).unwrap();
    assert!(answer.contains("version 99"), "{answer}");
    sandbox.run(["umount", "tree"]).succeeds();
}
