//! Byte streams to an agent: a child process on this machine, libssh2, or the ssh
//! program.
//!
//! Whatever carries the bytes, the caller gets one end of a socket pair. At its other
//! end `mirrorfs agent --stdio ROOT` (or `relay`, see [`Serve`]) is running when [`connect`]
//! returns; what it says first is the caller's business ([`crate::wire::frame`]).

#[cfg(feature = "libssh2")]
mod auto;
mod child;
mod error;
#[cfg(feature = "libssh2")]
mod known_hosts;
#[cfg(feature = "libssh2")]
mod libssh2;
mod secret;
mod ssh_config;
mod ssh_program;
mod startup;
mod url;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::wire::message::DEADLINE;

pub use self::error::ConnectError;
pub use self::secret::{ask, ask_by};
pub use self::url::{PeerUrl, Place, SshPlace, UrlError};

/// What carries the bytes of a [`Link`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TransportKind {
    /// A child process on this machine.
    Local,
    /// SSH spoken in this process.
    Libssh2,
    /// The `ssh` program.
    Ssh,
    /// A connection that the peer has made.
    Attached,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Libssh2 => "libssh2",
            Self::Ssh => "ssh",
            Self::Attached => "attached",
        })
    }
}

/// Which SSH transport to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// libssh2, unless the user's ssh configuration needs the ssh program.
    #[default]
    Auto,
    /// libssh2 and nothing else.
    Libssh2,
    /// The ssh program and nothing else.
    Ssh,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "libssh2" => Ok(Self::Libssh2),
            "ssh" => Ok(Self::Ssh),
            _ => Err(format!(
                "{text:?} is no transport: choose auto, libssh2 or ssh"
            )),
        }
    }
}

/// What is to run at the other end of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Serve {
    /// An agent, which serves the directory as a peer.
    #[default]
    Agent,
    /// An agent that shows the directory and changes nothing in it, for a dry run.
    Look,
    /// A relay, which leads to the daemon of the mount at the directory.
    Relay,
}

impl Serve {
    /// The command of mirrorfs.
    fn command(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Look => "look",
            Self::Relay => "relay",
        }
    }
}

/// How to reach a peer, apart from where it is.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Which SSH transport to use (`MIRRORFS_TRANSPORT`).
    pub choice: Choice,
    /// An ssh configuration file instead of `~/.ssh/config` (`MIRRORFS_SSH_CONFIG`).
    pub ssh_config: Option<PathBuf>,
    /// The only file to look for host keys in (`MIRRORFS_KNOWN_HOSTS`).
    pub known_hosts: Option<PathBuf>,
    /// The only private key to offer (`MIRRORFS_IDENTITY`).
    pub identity: Option<PathBuf>,
    /// What to start there.
    pub serve: Serve,
    /// The command that starts mirrorfs on the peer (`MIRRORFS_AGENT`): words divided
    /// by spaces, without quoting. If there is none it is looked for, and installed
    /// where it is missing.
    pub agent: Option<String>,
    /// The mirrorfs program of this machine: serves local peers, and is what gets
    /// installed on a peer that has none.
    pub program: PathBuf,
    /// How long connecting, authenticating and starting the agent may take altogether.
    pub timeout: Duration,
    /// How long a side of an established link may be silent (`MIRRORFS_DEADLINE`, in
    /// seconds).
    pub deadline: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            ssh_config: None,
            known_hosts: None,
            identity: None,
            agent: None,
            serve: Serve::Agent,
            // Still this very program when the file has been replaced by an upgrade.
            program: PathBuf::from("/proc/self/exe"),
            timeout: Duration::from_secs(30),
            deadline: DEADLINE,
        }
    }
}

impl ConnectOptions {
    /// The defaults, with what the environment variables say.
    pub fn from_env() -> Result<Self, ConnectError> {
        let path = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let choice = match std::env::var("MIRRORFS_TRANSPORT") {
            Ok(text) if !text.is_empty() => {
                text.parse().map_err(|why| ConnectError::Environment {
                    name: "MIRRORFS_TRANSPORT",
                    why,
                })?
            }
            _ => Choice::Auto,
        };
        Ok(Self {
            choice,
            ssh_config: path("MIRRORFS_SSH_CONFIG"),
            known_hosts: path("MIRRORFS_KNOWN_HOSTS"),
            identity: path("MIRRORFS_IDENTITY"),
            agent: std::env::var("MIRRORFS_AGENT")
                .ok()
                .filter(|command| !command.trim().is_empty()),
            deadline: deadline_from_env()?,
            ..Self::default()
        })
    }
}

/// How long a side of a link may be silent, as `MIRRORFS_DEADLINE` says in seconds.
pub fn deadline_from_env() -> Result<Duration, ConnectError> {
    const NAME: &str = "MIRRORFS_DEADLINE";
    let Ok(text) = std::env::var(NAME) else {
        return Ok(DEADLINE);
    };
    text.trim()
        .parse()
        .ok()
        .filter(|seconds| (1.0..=3600.0).contains(seconds))
        .map(Duration::from_secs_f32)
        .ok_or_else(|| ConnectError::Environment {
            name: NAME,
            why: format!("{text:?} is no number of seconds between 1 and 3600"),
        })
}

/// A connection to a running agent. Dropping it ends the connection and whatever
/// carried it, promptly also when the peer hangs.
pub struct Link {
    /// This side's end, in blocking mode. Reads give the end of the stream when the
    /// agent or the connection has ended.
    pub stream: UnixStream,
    /// What carries the bytes.
    pub transport: TransportKind,
    /// Why this transport and not another: a sentence for `status` and `doctor`.
    pub reason: String,
    tail: Tail,
    _guard: Guard,
}

/// Ends what carries a link when dropped.
enum Guard {
    Child(#[expect(dead_code, reason = "held to be dropped")] child::Carrier),
    #[cfg(feature = "libssh2")]
    Libssh2(#[expect(dead_code, reason = "held to be dropped")] libssh2::Carrier),
    /// Nothing: somebody else carries it.
    None,
}

impl Link {
    /// A link that the peer has made, and that was handed to this process.
    pub fn handed_over(stream: UnixStream, reason: String) -> Self {
        Self {
            stream,
            transport: TransportKind::Attached,
            reason,
            tail: Tail::default(),
            _guard: Guard::None,
        }
    }

    /// The last lines that the agent, or ssh on its behalf, has written to standard
    /// error, and how a broken connection ended.
    pub fn stderr_tail(&self) -> String {
        self.tail.text()
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("transport", &self.transport)
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

/// The end of what was written to standard error, bounded.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    const KEPT: usize = 8 << 10;

    fn push(&self, bytes: &[u8]) {
        let mut held = self.0.lock();
        held.extend_from_slice(bytes);
        let excess = held.len().saturating_sub(Self::KEPT);
        held.drain(..excess);
    }

    fn text(&self) -> String {
        let held = self.0.lock();
        String::from_utf8_lossy(&held)
            .replace('\r', "")
            .trim()
            .to_owned()
    }
}

/// The moment at which an attempt to connect has taken too long.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    allowed: Duration,
}

impl Deadline {
    fn after(allowed: Duration) -> Self {
        Self {
            at: Instant::now() + allowed,
            allowed,
        }
    }

    /// What is left, and never zero, which most interfaces take for "no limit".
    fn left(&self) -> Duration {
        self.at
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1))
    }

    fn passed(&self) -> bool {
        Instant::now() >= self.at
    }
}

/// Connects to a peer and starts its agent. Blocks for at most
/// [`ConnectOptions::timeout`].
pub fn connect(url: &PeerUrl, options: &ConnectOptions) -> Result<Link, ConnectError> {
    match url.place() {
        Place::Local(root) => child::local(root, options),
        Place::Ssh(place) => ssh(place, options),
        Place::Attached(place) => Err(ConnectError::NotAttached {
            place: place.clone(),
        }),
    }
}

/// Connects, and asks for what is secret in between: each attempt has its own time, and
/// none waits for a person.
#[cfg(feature = "libssh2")]
fn ssh(place: &SshPlace, options: &ConnectOptions) -> Result<Link, ConnectError> {
    loop {
        let refusal = match attempt(place, options) {
            Ok(link) => return Ok(link),
            Err(refusal) => refusal,
        };
        match &refusal.wants {
            Some(secret) if secret.ask() => {}
            _ => return Err(refusal.error),
        }
    }
}

#[cfg(feature = "libssh2")]
fn attempt(place: &SshPlace, options: &ConnectOptions) -> Result<Link, libssh2::Refusal> {
    use ssh_config::Effective;

    let deadline = Deadline::after(options.timeout);
    let effective = match Effective::query(place, options) {
        Ok(effective) => effective,
        Err(error @ ConnectError::NoTransport { .. }) => {
            if options.choice == Choice::Ssh {
                return Err(error.into());
            }
            let effective = Effective::without_program(place, options);
            let reason = "there is no ssh program, so libssh2 with ssh's default files";
            return libssh2::connect(place, options, &effective, deadline, reason.to_owned());
        }
        Err(error) => return Err(error.into()),
    };
    let program = |reason| ssh_program::connect(place, options, &effective, deadline, reason);
    match options.choice {
        Choice::Ssh => Ok(program("the ssh program was asked for".to_owned())?),
        Choice::Libssh2 => {
            let reason = "libssh2 was asked for".to_owned();
            libssh2::connect(place, options, &effective, deadline, reason)
        }
        Choice::Auto => {
            if let Some(reason) = auto::needs_program(&effective, place) {
                return Ok(program(reason)?);
            }
            let reason = "nothing in the ssh configuration needs the ssh program";
            match libssh2::connect(place, options, &effective, deadline, reason.to_owned()) {
                Err(refusal) if refusal.program_may_do_better && !deadline.passed() => {
                    tracing::debug!(host = %place.host, error = %refusal.error, "libssh2 gave up, trying ssh");
                    // If ssh fares no better, what libssh2 found out says more.
                    program(format!(
                        "the ssh program, because libssh2 did not get through: {}",
                        refusal.error
                    ))
                    .map_err(|_| refusal)
                }
                result => result,
            }
        }
    }
}

#[cfg(not(feature = "libssh2"))]
fn ssh(place: &SshPlace, options: &ConnectOptions) -> Result<Link, ConnectError> {
    if options.choice == Choice::Libssh2 {
        return Err(ConnectError::NoTransport {
            detail: "this mirrorfs was built without libssh2: use MIRRORFS_TRANSPORT=ssh, or build it with --features libssh2".to_owned(),
        });
    }
    let deadline = Deadline::after(options.timeout);
    let effective = ssh_config::Effective::query(place, options)?;
    let reason = "this mirrorfs was built without libssh2".to_owned();
    ssh_program::connect(place, options, &effective, deadline, reason)
}
