//! A real sshd on a loopback port, with its own host key, client key, configuration,
//! home directory and known_hosts, all in a temporary directory.
//!
//! The test listens itself and starts one `sshd -i` for each connection, so no port is
//! guessed, and connections can be stopped and cut one by one.

#![allow(dead_code, reason = "each test file uses its part")]

use std::ffi::OsString;
use std::fs;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

const SSHD: &str = "/usr/sbin/sshd";

/// A server, stopped when dropped, with every connection it has.
pub struct Sshd {
    dir: TempDir,
    port: u16,
    user: String,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ended: AtomicBool,
    refusing: AtomicBool,
    /// A file to be used instead of `/etc/shadow`.
    shadow: Mutex<Option<PathBuf>>,
    connections: Mutex<Vec<Connection>>,
}

struct Connection {
    sshd: Child,
    socket: TcpStream,
}

impl Sshd {
    /// Starts a server.
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// Starts a server with further lines in its `sshd_config`.
    pub fn with_config(extra: &str) -> Self {
        assert!(
            Path::new(SSHD).exists(),
            "{SSHD} is missing: install OpenSSH's server (Debian: apt-get install openssh-server; ./test does it)"
        );
        let dir = tempfile::Builder::new()
            .prefix("mirrorfs-sshd-")
            .tempdir()
            .unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["host_key", "client_key"] {
            keygen(&at(name));
        }
        fs::copy(at("client_key.pub"), at("authorized_keys")).unwrap();
        fs::create_dir(at("home")).unwrap();
        if rustix::process::geteuid().is_root() {
            // Compiled into sshd; a package's init script makes it otherwise.
            fs::create_dir_all("/run/sshd").unwrap();
        }
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = format!(
            "{extra}\n\
             HostKey {host_key}\n\
             AuthorizedKeysFile {authorized}\n\
             PidFile none\n\
             StrictModes no\n\
             UsePAM no\n\
             PasswordAuthentication no\n\
             KbdInteractiveAuthentication no\n\
             PermitRootLogin prohibit-password\n\
             PrintMotd no\n\
             PrintLastLog no\n\
             SetEnv HOME={home} PATH=/usr/local/bin:/usr/bin:/bin\n",
            host_key = at("host_key").display(),
            authorized = at("authorized_keys").display(),
            home = at("home").display(),
        );
        fs::write(at("sshd_config"), config).unwrap();
        let user = output(Command::new("id").arg("-un"));
        let mut server = Self {
            shared: Arc::default(),
            acceptor: None,
            port,
            user,
            dir,
        };
        server.record_host_key();
        server.write_client_config("");
        let acceptor = thread::spawn({
            let shared = Arc::clone(&server.shared);
            let config = server.path("sshd_config");
            let log = server.path("log");
            move || accept(&listener, &shared, &config, &log)
        });
        server.acceptor = Some(acceptor);
        server
    }

    /// A file or directory of the server's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The home directory that commands see in `$HOME`. Not their working directory.
    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    /// The URL of a directory on the server.
    pub fn url(&self, path: impl AsRef<Path>) -> String {
        format!(
            "ssh://{}@127.0.0.1:{}{}",
            self.user,
            self.port,
            path.as_ref().display()
        )
    }

    /// What a mirrorfs process needs in its environment to get in.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        vec![
            ("MIRRORFS_SSH_CONFIG", self.path("ssh_config").into()),
            ("MIRRORFS_KNOWN_HOSTS", self.path("known_hosts").into()),
            ("MIRRORFS_IDENTITY", self.path("client_key").into()),
        ]
    }

    /// Writes the client's configuration anew, with further lines before the rest.
    pub fn write_client_config(&self, extra: &str) {
        let config = format!(
            "{extra}\n\
             Host *\n\
             IdentityFile {}\n\
             IdentitiesOnly yes\n\
             UserKnownHostsFile {}\n\
             GlobalKnownHostsFile /dev/null\n",
            self.path("client_key").display(),
            self.path("known_hosts").display(),
        );
        fs::write(self.path("ssh_config"), config).unwrap();
    }

    /// Lets the user in by this password, whatever the machine says: sshd sees a shadow
    /// file of its own, in a mount namespace of its own. Needs root.
    pub fn set_password(&self, password: &str) {
        let crypted = output(Command::new("openssl").args(["passwd", "-6", password]));
        let shadow = self.path("shadow");
        fs::write(&shadow, format!("{}:{crypted}:19000::::::\n", self.user)).unwrap();
        *self.shared.shadow.lock().unwrap() = Some(shadow);
    }

    /// Makes the host key the one on record.
    pub fn record_host_key(&self) {
        let key = fs::read_to_string(self.path("host_key.pub")).unwrap();
        fs::write(
            self.path("known_hosts"),
            format!("[127.0.0.1]:{} {key}", self.port),
        )
        .unwrap();
    }

    /// Puts an executable shell script among the server's files.
    pub fn script(&self, name: &str, body: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path(name);
        let new = self.path(&format!("{name}.new"));
        fs::write(&new, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        // Not written over: an earlier one may be about to be run for a connection that
        // has ended, and a file that is being run cannot be written.
        fs::rename(&new, &path).unwrap();
        path
    }

    /// What sshd has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Stops every sshd in its tracks: connections stay up and nobody answers.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Cuts every connection, as a network does.
    pub fn cut(&self) {
        for mut connection in std::mem::take(&mut *self.shared.connections.lock().unwrap()) {
            connection.end();
        }
    }

    /// From now on hangs up on every new connection, or no longer does.
    pub fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::SeqCst);
    }

    /// How many connections have not ended.
    pub fn connections(&self) -> usize {
        let mut connections = self.shared.connections.lock().unwrap();
        connections.retain_mut(|connection| connection.sshd.try_wait().unwrap().is_none());
        connections.len()
    }

    fn signal(&self, signal: Signal) {
        for connection in &*self.shared.connections.lock().unwrap() {
            let _ = kill_process_group(pid(&connection.sshd), signal);
        }
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.cut();
    }
}

impl Connection {
    fn end(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = kill_process_group(pid(&self.sshd), Signal::KILL);
        let _ = self.sshd.wait();
    }
}

fn accept(listener: &TcpListener, shared: &Shared, config: &Path, log: &Path) {
    while let Ok((socket, _)) = listener.accept() {
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        if shared.refusing.load(Ordering::SeqCst) {
            continue;
        }
        let mut command = match &*shared.shadow.lock().unwrap() {
            None => Command::new(SSHD),
            Some(shadow) => {
                let mut command = Command::new("unshare");
                command
                    .args(["--mount", "sh", "-c"])
                    .arg("mount --bind \"$0\" /etc/shadow && exec \"$@\"")
                    .arg(shadow)
                    .arg(SSHD);
                command
            }
        };
        let sshd = command
            .arg("-i")
            .arg("-f")
            .arg(config)
            .arg("-E")
            .arg(log)
            .stdin(OwnedFd::from(socket.try_clone().unwrap()))
            .stdout(OwnedFd::from(socket.try_clone().unwrap()))
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        shared
            .connections
            .lock()
            .unwrap()
            .push(Connection { sshd, socket });
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
}

/// Makes an ed25519 key pair without a passphrase.
pub fn keygen(path: &Path) {
    output(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "mirrorfs test", "-f"])
            .arg(path),
    );
}

fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
