//! A directory of this machine as a peer of a mount on another: this side makes the
//! connection, and comes back whenever it breaks.
//!
//! The connection leads to `mirrorfs relay` over there, and through it to the control
//! socket of the mount's daemon. After the call [`Request::Attach`] the daemon takes it
//! for a link that it has made itself, and the agent that runs here serves it.

mod place;
mod serve;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::place::{AttachDir, Record, all, find};
pub use self::serve::run;
use super::control::{Client, Identity, Request, Response};
use super::exit::Exit;
use super::failure::{Failure, OrFail};
use super::locate;
use super::state::MirrorIdText;
use crate::transport::{self, ConnectError, ConnectOptions, Link, PeerUrl, Serve};
use crate::tree::links::Symlinks;

/// How long the daemon over there may take to answer when it is called.
const ANSWER: Duration = Duration::from_secs(30);

/// What a user asks for.
#[derive(Clone, Debug)]
pub struct Order {
    /// The mount, as this machine reaches it.
    pub to: String,
    /// The directory of this machine.
    pub dir: PathBuf,
    /// What to call this peer over there.
    pub name: Option<String>,
    /// Which symbolic links of the mount are made in the directory.
    pub symlinks: Symlinks,
}

/// How an attached directory is, as `mirrorfs status --json` prints it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The directory.
    pub dir: String,
    /// The mount that it is a peer of.
    pub to: String,
    /// What it is called over there; none before the first connection.
    pub name: Option<String>,
    /// The state of the connection.
    pub state: AttachState,
    /// How the mount is reached.
    pub transport: Option<String>,
    /// Why it is reached in that way and not in another.
    pub transport_reason: Option<String>,
    /// Why there is no connection, or how the last one ended.
    pub last_error: Option<String>,
    /// The process that keeps it attached.
    pub pid: Option<u32>,
}

/// The state of the connection of an attached directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachState {
    /// In session with the mount.
    Attached,
    /// Trying.
    Connecting,
    /// The last attempt failed; the next one comes by itself.
    Unreachable,
    /// No process keeps it attached.
    Detached,
}

impl AttachState {
    /// The word that scripts see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Connecting => "connecting",
            Self::Unreachable => "unreachable",
            Self::Detached => "detached",
        }
    }

    /// The exit code that says it.
    pub fn exit(self) -> Exit {
        match self {
            Self::Attached | Self::Connecting => Exit::Done,
            Self::Unreachable | Self::Detached => Exit::Unreachable,
        }
    }
}

/// A failed attempt to reach the mount.
struct Refused {
    failure: Failure,
    /// Trying again may help without anybody doing anything.
    passes: bool,
}

impl Refused {
    fn for_good(failure: Failure) -> Self {
        Self {
            failure,
            passes: false,
        }
    }
}

/// A connection to the daemon of the mount at `to`, by this machine's means.
pub fn call(to: &PeerUrl) -> Result<(Client, Link), Failure> {
    dial(to).map_err(|refused| refused.failure)
}

fn dial(to: &PeerUrl) -> Result<(Client, Link), Refused> {
    let message = || format!("cannot reach the mount {to}");
    let options = ConnectOptions::from_env()
        .or_fail(message)
        .map_err(Refused::for_good)?;
    let options = ConnectOptions {
        serve: Serve::Relay,
        ..options
    };
    let link = transport::connect(to, &options).map_err(|error| {
        let passes = !error.needs_user();
        let exit = if passes {
            Exit::Unreachable
        } else {
            Exit::Error
        };
        Refused {
            failure: Failure::new(message()).because(&error).exit(exit),
            passes,
        }
    })?;
    let stream = link.stream.try_clone();
    let stream = stream.or_fail(message).map_err(Refused::for_good)?;
    Ok((Client::over(stream, &to.to_string()), link))
}

/// A link that the daemon of the mount has accepted: its agent may begin.
struct Accepted {
    link: Link,
    name: String,
}

/// Connects to the mount and asks it to take the directory for a peer.
fn offer(order: &Order, to: &PeerUrl) -> Result<Accepted, Refused> {
    let (mut client, link) = dial(to)?;
    let identity = locate::identity(&order.dir).map(|identity| Identity {
        mirror: MirrorIdText(identity.mirror),
        replica: MirrorIdText(identity.replica),
    });
    let request = Request::Attach {
        host: host_name(),
        dir: text_of(&order.dir).map_err(Refused::for_good)?,
        name: order.name.clone(),
        identity,
    };
    let explained = |failure: Failure| {
        let said = link.stderr_tail();
        Failure {
            message: format!("the mount {to} does not take {}", order.dir.display()),
            causes: [failure.message]
                .into_iter()
                .chain(failure.causes)
                .chain((!said.is_empty()).then_some(said))
                .collect(),
            ..failure
        }
    };
    match client.call(request, Some(ANSWER)) {
        Ok(Response::Attached { name, .. }) => {
            // From here on the stream is the agent's, which waits for as long as it takes.
            let whole = client.into_stream().is_some();
            match link.stream.set_read_timeout(None) {
                Ok(()) if whole => Ok(Accepted { link, name }),
                _ => Err(Refused {
                    failure: Failure::new(format!("the mount {to} spoke out of turn")),
                    passes: true,
                }),
            }
        }
        Ok(other) => Err(Refused::for_good(explained(Failure::new(format!(
            "it gave an unexpected answer: {other:?}"
        ))))),
        Err(failure) => Err(Refused {
            passes: failure.exit == Exit::Unreachable,
            failure: explained(failure),
        }),
    }
}

fn text_of(dir: &Path) -> Result<String, Failure> {
    let text = dir.to_str().map(str::to_owned);
    text.ok_or_else(|| {
        Failure::new(format!("the path {} is not valid UTF-8", dir.display()))
            .hint("choose a directory with a plain name")
    })
}

/// What this machine is called.
fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .replace('/', "-");
    if name.is_empty() {
        "host".to_owned()
    } else {
        name
    }
}

/// The mount that a user means, for a process with any working directory.
fn mount_at(text: &str) -> Result<PeerUrl, Failure> {
    let message = || "cannot attach to that".to_owned();
    let here = std::env::current_dir().or_fail(|| "there is no working directory".into())?;
    let url = PeerUrl::parse(text).or_fail(message)?;
    if let transport::Place::Attached(_) = url.place() {
        return Err(Failure::new(message()).because(&ConnectError::NotAttached {
            place: text.to_owned(),
        }));
    }
    url.resolved_against(&here).or_fail(message)
}
