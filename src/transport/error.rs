//! Why a peer could not be reached, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A failed attempt to connect. Each variant says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// An environment variable has a value that means nothing.
    #[error("{name}: {why}")]
    Environment {
        /// The variable.
        name: &'static str,
        /// What is wrong with its value.
        why: String,
    },
    /// The host name means nothing to anybody.
    #[error(
        "the host name {host} cannot be resolved ({detail}): check its spelling, the name server, and Host entries in the ssh configuration"
    )]
    UnknownHost {
        /// The host.
        host: String,
        /// What the resolver said.
        detail: String,
    },
    /// Nobody listens there.
    #[error(
        "{host} port {port} refuses the connection: check that sshd runs there and that the port is right (ssh://user@{host}:PORT/path)"
    )]
    Refused {
        /// The host.
        host: String,
        /// The port.
        port: u16,
    },
    /// The network does not lead there.
    #[error(
        "{host} port {port} cannot be reached ({detail}): check that the machine is up and the network between"
    )]
    Unreachable {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What the system said.
        detail: String,
    },
    /// It took too long.
    #[error(
        "{host} port {port} did not answer within {} s while {doing}: check that the machine is up and not overloaded; the attempt is repeated", .waited.as_secs_f32()
    )]
    Timeout {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What was going on.
        doing: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// Somebody listens there and hangs up before SSH has begun.
    #[error(
        "{host} port {port} hangs up before SSH has begun ({detail}): sshd may be starting or stopping there, or have all the connections it takes; if it stays like that, check that it is sshd that listens on this port"
    )]
    HungUp {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What was seen of it.
        detail: String,
    },
    /// Nobody has ever said that this host key is the right one.
    #[error(
        "the host key of {host} port {port} is not known: {key}. If that is what `ssh-keygen -lf` prints for the key on the machine itself, accept it with `{command}` and try again"
    )]
    HostKeyUnknown {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The key as `ssh-keygen -l` prints it, `SHA256:...`, and its type.
        key: String,
        /// What to run to accept the key.
        command: String,
    },
    /// The host shows another key than the one on record.
    #[error(
        "THE HOST KEY OF {host} port {port} HAS CHANGED: the host key is now {key}, and {recorded} records another. Either the machine was set up anew, or somebody is in between. If you know why it changed, forget the old key with `{command}`, then accept the new one"
    )]
    HostKeyChanged {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The key as `ssh-keygen -l` prints it, `SHA256:...`, and its type.
        key: String,
        /// File and line of the key on record.
        recorded: String,
        /// What to run to forget the old key.
        command: String,
    },
    /// The host shows a key that was declared stolen.
    #[error(
        "the host key of {host} port {port} ({fingerprint}) is marked as revoked in {recorded}: do not connect; have the machine's host key replaced"
    )]
    HostKeyRevoked {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// As `ssh-keygen -l` prints it, `SHA256:...`.
        fingerprint: String,
        /// File and line that revoke it.
        recorded: String,
    },
    /// The host does not let the user in.
    #[error(
        "{host} port {port} does not let {user} in ({tried}): check the user name, and that one of the keys is in ~{user}/.ssh/authorized_keys there; try `{command}`"
    )]
    Auth {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The user.
        user: String,
        /// The keys that were tried and why others were not.
        tried: String,
        /// A command that shows the same in a terminal.
        command: String,
    },
    /// The peer has no mirrorfs and none could be installed.
    #[error(
        "{host} port {port} has no mirrorfs agent ({detail}): install mirrorfs there, or set MIRRORFS_AGENT to the command that starts it"
    )]
    AgentMissing {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What was looked for, and why none was installed.
        detail: String,
    },
    /// Installing the agent did not work.
    #[error(
        "mirrorfs could not be installed on {host} port {port} in ~/.local/share/mirrorfs/agent ({detail}): check space and permissions there, or install it by hand"
    )]
    Install {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What went wrong.
        detail: String,
    },
    /// The login on the peer did not get as far as the agent.
    #[error("{host} port {port} did not start the agent: {detail}")]
    Startup {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What it said instead.
        detail: String,
    },
    /// The two sides of SSH do not get on, or something else failed.
    #[error("the SSH connection to {host} port {port} failed: {detail}")]
    Ssh {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What libssh2 or the ssh program said.
        detail: String,
    },
    /// There is no ssh program, or this program was built without libssh2.
    #[error("{detail}")]
    NoTransport {
        /// What is missing and how to get it.
        detail: String,
    },
    /// The peer comes by itself, and has not come.
    #[error(
        "nobody is attached from {place}: mirrorfs attach, run there, comes back by itself as long as it runs"
    )]
    NotAttached {
        /// Host and directory.
        place: String,
    },
    /// A program of this machine does not start.
    #[error("{} cannot be started: {source}", .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path cannot be handed to a remote shell.
    #[error(
        "the path {path:?} contains a line break, which cannot be passed to the peer's shell: choose another directory"
    )]
    Path {
        /// The path.
        path: String,
    },
    /// Something on this machine failed.
    #[error("connecting failed on this machine: {0}")]
    Io(#[from] io::Error),
}

impl ConnectError {
    /// Whether the peer is away, as a machine is that is off, starting, or in another
    /// network: nothing is known to be wrong with how it is reached. A name that cannot be
    /// resolved is one of these, for that is how a machine without a network sees all others.
    pub fn is_away(&self) -> bool {
        matches!(
            self,
            Self::UnknownHost { .. }
                | Self::Refused { .. }
                | Self::Unreachable { .. }
                | Self::Timeout { .. }
                | Self::HungUp { .. }
                | Self::NotAttached { .. }
        )
    }

    /// Whether trying again can only help after somebody has done something about it.
    pub fn needs_user(&self) -> bool {
        !matches!(
            self,
            Self::UnknownHost { .. }
                | Self::Refused { .. }
                | Self::Unreachable { .. }
                | Self::Timeout { .. }
                | Self::HungUp { .. }
                | Self::Ssh { .. }
                | Self::Startup { .. }
                | Self::NotAttached { .. }
                | Self::Spawn { .. }
                | Self::Io(_)
        )
    }
}
