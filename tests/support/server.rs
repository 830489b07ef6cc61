//! A real sshd on a loopback port with its own keys and configuration, behind a link that
//! can be cut.

use std::fs::Permissions;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::program::run;
use super::proxy::Proxy;
use super::sandbox::Sandbox;
use super::wait::{PROMPT, eventually};

/// An sshd of its own, reached through [`Proxy`].
pub struct Server {
    pub link: Proxy,
    sshd: Child,
    keys: PathBuf,
}

impl Server {
    /// Starts the server and tells the sandbox's commands how to reach it: key, known
    /// host, and an agent with a state directory of its own.
    pub fn start(sandbox: &mut Sandbox) -> Self {
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
        let (sshd, port) = start_sshd(&keys);
        let link = Proxy::to(port);
        let server = Self { link, sshd, keys };
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
        std::fs::write(&agent, script).unwrap();
        std::fs::set_permissions(&agent, Permissions::from_mode(0o755)).unwrap();
    }

    /// The URL of a directory behind this server, for the user the tests run as.
    pub fn url(&self, dir: &Path) -> String {
        self.url_of(&whoami(), dir)
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

fn start_sshd(keys: &Path) -> (Child, u16) {
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
             LogLevel VERBOSE\n",
            keys = keys.display()
        );
        let config_path = keys.join("sshd_config");
        std::fs::write(&config_path, config).map_err(|error| error.to_string())?;
        // sshd insists on an absolute path, because it runs itself again.
        let mut sshd = Command::new("/usr/sbin/sshd")
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
            if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
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
