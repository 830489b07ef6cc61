//! A real sshd on a loopback port with its own keys and configuration, behind a link that
//! can be cut.

use std::fs::Permissions;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::process;
use super::program::run;
use super::proxy::Proxy;
use super::sandbox::Sandbox;
use super::wait::{PROMPT, eventually};

/// An sshd of its own, reached through [`Proxy`].
pub struct Server {
    pub link: Proxy,
    sshd: Child,
    port: u16,
    keys: PathBuf,
}

impl Server {
    /// Starts the server and tells the sandbox's commands how to reach it: key, known
    /// host, and an agent with a state directory of its own.
    pub fn start(sandbox: &mut Sandbox) -> Self {
        Self::start_with(sandbox, "", &[])
    }

    /// The same with further lines in sshd's configuration, and with sshd started by a
    /// command that puts it somewhere else (into another network).
    pub fn start_with(sandbox: &mut Sandbox, config: &str, by: &[&str]) -> Self {
        let keys = sandbox.root().join("ssh");
        std::fs::create_dir(&keys).unwrap();
        for name in ["host", "client"] {
            run(
                Command::new("ssh-keygen")
                    .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
                    .arg(keys.join(name)),
                PROMPT,
            )
            .ok();
        }
        std::fs::copy(keys.join("client.pub"), keys.join("authorized")).unwrap();
        let (sshd, port) = start_sshd(&keys, config, by);
        let link = Proxy::to(port);
        let server = Self {
            link,
            sshd,
            port,
            keys,
        };
        server.know_host(true);

        server.set_for_agents(sandbox, &[]);
        std::fs::write(server.keys.join("config"), "").unwrap();
        sandbox.set("MIRRORFS_SSH_CONFIG", server.keys.join("config"));
        sandbox.set("MIRRORFS_KNOWN_HOSTS", server.known_hosts());
        sandbox.set("MIRRORFS_IDENTITY", server.keys.join("client"));
        sandbox.set("MIRRORFS_AGENT", agent_of(sandbox));
        server
    }

    /// Sets variables for the agents behind this server, in place of those set before.
    pub fn set_for_agents(&self, sandbox: &Sandbox, variables: &[(&str, &str)]) {
        let agent = agent_of(sandbox);
        let variables: String = variables
            .iter()
            .map(|(name, value)| format!(" {name}='{value}'"))
            .collect();
        let script = format!(
            "#!/bin/sh\nexport MIRRORFS_STATE='{}'{variables}\nexec '{}' \"$@\"\n",
            sandbox.root().join("agent-state").display(),
            sandbox.program().display()
        );
        let new = agent.with_extension("new");
        std::fs::write(&new, script).unwrap();
        std::fs::set_permissions(&new, Permissions::from_mode(0o755)).unwrap();
        // Not written over: somebody may be about to run an earlier one, and a file that is
        // being run cannot be written.
        std::fs::rename(&new, &agent).unwrap();
    }

    /// The URL of a directory behind this server, for the user the tests run as.
    pub fn url(&self, dir: &Path) -> String {
        self.url_of(&whoami(), dir)
    }

    /// The URL of a directory for who reaches sshd itself, and lists its key for that.
    pub fn direct_url(&self, dir: &Path) -> String {
        let key = std::fs::read_to_string(self.keys.join("host.pub")).unwrap();
        let line = format!("[127.0.0.1]:{} {key}", self.port);
        std::fs::write(self.known_hosts(), line).unwrap();
        format!(
            "ssh://{}@127.0.0.1:{}{}",
            whoami(),
            self.port,
            dir.display()
        )
    }

    /// Stops what serves the connections of now in its tracks: they stay open, and nobody
    /// answers. New ones are served.
    pub fn pause(&self) -> Paused {
        let mut sessions = process::children_of(self.sshd.id());
        let mut at = 0;
        while let Some(session) = sessions.get(at).copied() {
            at += 1;
            // What a session runs with fewer rights is sshd as well; the agent is not.
            let below = process::children_of(session).into_iter();
            sessions.extend(below.filter(|pid| process::name_of(*pid).starts_with("sshd")));
        }
        let pid = |session| Pid::from_raw(i32::try_from(session).unwrap()).unwrap();
        let paused = Paused(sessions.into_iter().map(pid).collect());
        assert!(!paused.0.is_empty(), "nobody is served");
        paused.send(Signal::STOP);
        paused
    }

    /// The URL of a directory behind this server.
    pub fn url_of(&self, user: &str, dir: &Path) -> String {
        format!(
            "ssh://{user}@127.0.0.1:{}{}",
            self.link.port(),
            dir.display()
        )
    }

    /// Whether the server's key is in the sandbox's list of known hosts.
    pub fn know_host(&self, known: bool) {
        let key = std::fs::read_to_string(self.keys.join("host.pub")).unwrap();
        let line = if known {
            format!("[127.0.0.1]:{} {key}", self.link.port())
        } else {
            String::new()
        };
        std::fs::write(self.known_hosts(), line).unwrap();
    }

    /// Lists another key for this server than the one it has.
    pub fn know_another_key(&self) {
        let key = std::fs::read_to_string(self.keys.join("client.pub")).unwrap();
        let line = format!("[127.0.0.1]:{} {key}", self.link.port());
        std::fs::write(self.known_hosts(), line).unwrap();
    }

    /// The sandbox's list of known hosts.
    pub fn known_hosts(&self) -> PathBuf {
        self.keys.join("known_hosts")
    }
}

/// Processes that are stopped. They go on when this is dropped, and find their connections
/// closed by then.
pub struct Paused(Vec<Pid>);

impl Paused {
    fn send(&self, signal: Signal) {
        for pid in &self.0 {
            kill_process(*pid, signal).ok();
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.send(Signal::CONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.sshd.kill().ok();
        self.sshd.wait().ok();
    }
}

/// The command that starts an agent.
fn agent_of(sandbox: &Sandbox) -> PathBuf {
    sandbox.root().join("bin/agent")
}

fn whoami() -> String {
    let name = run(Command::new("id").arg("-un"), PROMPT).ok().stdout;
    name.trim().to_owned()
}

fn start_sshd(keys: &Path, further: &str, by: &[&str]) -> (Child, u16) {
    // Where sshd separates its privileges; the service's start script would make it.
    std::fs::create_dir_all("/run/sshd").ok();
    let log = keys.join("sshd.log");
    eventually("sshd starts", PROMPT, || {
        // The port can be taken by somebody else in between; then it is tried again.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|error| error.to_string())?
            .port();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\n\
             HostKey {keys}/host\n\
             AuthorizedKeysFile {keys}/authorized\n\
             PidFile none\n\
             StrictModes no\n\
             UsePAM no\n\
             PasswordAuthentication no\n\
             KbdInteractiveAuthentication no\n\
             PermitRootLogin prohibit-password\n\
             MaxStartups 100\n\
             LogLevel VERBOSE\n\
             {further}\n",
            keys = keys.display()
        );
        let config_path = keys.join("sshd_config");
        std::fs::write(&config_path, config).map_err(|error| error.to_string())?;
        // sshd insists on an absolute path, because it runs itself again.
        let mut words = by.iter().copied().chain(["/usr/sbin/sshd"]);
        let mut command = Command::new(words.next().unwrap_or_default());
        let mut sshd = command
            .args(words)
            .arg("-f")
            .arg(&config_path)
            .arg("-D")
            .arg("-E")
            .arg(&log)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("/usr/sbin/sshd: {error}"))?;
        for _ in 0..500 {
            let listens = std::fs::read_to_string(&log).is_ok_and(|log| {
                log.contains(&format!("Server listening on 127.0.0.1 port {port}."))
            });
            if listens {
                return Ok((sshd, port));
            }
            if sshd.try_wait().is_ok_and(|ended| ended.is_some()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        sshd.kill().ok();
        sshd.wait().ok();
        Err(std::fs::read_to_string(&log).unwrap_or_default())
    })
}
