//! What a starting daemon tells whoever started it.

use serde::{Deserialize, Serialize};

use super::attach::{AttachState, Attachment};
use super::failure::Failure;

/// One line of the readiness pipe.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Announcement {
    /// Something worth knowing that needs nothing done about it.
    Note(String),
    /// Something that the user should do something about.
    Warning(String),
    /// A question for something secret. The answer is a line on the daemon's standard
    /// input: a string, or null if there is none.
    Ask(String),
    /// The mount is usable. Nothing follows.
    Ready(Ready),
    /// A directory is attached, or being attached. Nothing follows.
    Attached(Attachment),
    /// There is no mount. Nothing follows.
    Failed(Failure),
}

/// What was mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// The daemon.
    pub pid: u32,
    /// The mirror's name.
    pub name: String,
    /// Where it is mounted.
    pub tree: String,
    /// The peers: name and place.
    pub peers: Vec<(String, String)>,
    /// Where the daemon writes its log.
    pub log: String,
}

impl std::fmt::Display for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is mounted", self.tree)?;
        match self.peers.as_slice() {
            [] => Ok(()),
            peers => {
                write!(f, ", mirrored to ")?;
                for (position, (name, url)) in peers.iter().enumerate() {
                    let comma = if position > 0 { ", " } else { "" };
                    write!(f, "{comma}{name} ({url})")?;
                }
                Ok(())
            }
        }
    }
}

impl std::fmt::Display for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { dir, to, .. } = self;
        match (self.state, &self.name) {
            (AttachState::Attached, Some(name)) => {
                write!(f, "{dir} is attached to {to}, as its peer {name}")
            }
            (AttachState::Detached, _) => write!(f, "{dir} is not attached to {to} any more"),
            _ => write!(f, "{dir} is being attached to {to}"),
        }
    }
}

/// Takes announcements.
pub trait Announce {
    /// Passes one on. That nobody listens is no error: the daemon goes on.
    fn announce(&mut self, announcement: Announcement);
}
