//! The control socket: how commands talk to the daemon of a mount.
//!
//! One JSON object per line in each direction. A call names the protocol's version, so
//! that a daemon of another program version answers with a clear refusal. A connection
//! may carry any number of calls, one after the other.

mod client;
mod server;

pub use client::Client;
pub use server::{HandOver, Serve, Server};

use serde::{Deserialize, Serialize};

use super::attach::Attachment;
use super::conflicts::{Choice, Detail};
use super::exit::Exit;
use super::failure::Failure;
use super::state::MirrorIdText;
use super::status::Status;
use super::trash::Restored;
use crate::replica::trash::{Kept, Removed};
use crate::tree::RelPath;

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// The socket's name in the mirror's state directory.
pub const SOCKET: &str = "control.sock";

/// How many things in the trash are told in one answer.
pub const TRASH_PAGE: usize = 10_000;

/// Longest line that either side takes, in bytes.
const LINE_MAX: u64 = 64 << 20;

/// A request as it is sent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Call {
    /// [`VERSION`] of the caller.
    pub version: u32,
    /// What it wants.
    #[serde(flatten)]
    pub request: Request,
}

/// What a command may ask of a daemon.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Are you there?
    Ping,
    /// How are things?
    Status,
    /// Make everything durable on the peers.
    Flush {
        /// Only this peer; all if none.
        peer: Option<String>,
        /// How long to try, in milliseconds.
        timeout_ms: u64,
    },
    /// Flush what can be flushed, then unmount and end.
    Unmount {
        /// How long to flush, in milliseconds.
        timeout_ms: u64,
    },
    /// Try unreachable peers at once.
    Retry,
    /// Mirror to a further peer from now on.
    AddPeer {
        /// Where it is.
        url: String,
        /// What to call it.
        name: Option<String>,
    },
    /// Take this connection, after the answer, as the link to a peer whose agent is at its
    /// other end.
    Attach {
        /// The machine that it is on, for people.
        host: String,
        /// Its directory there.
        dir: String,
        /// What to call it.
        name: Option<String>,
        /// Mirror and replica of the directory, if it has been a peer before.
        identity: Option<Identity>,
    },
    /// Of whoever attaches a directory: how is it?
    Attachment,
    /// Of whoever attaches a directory: end.
    Detach,
    /// Mirror to a peer no longer, and forget what was agreed with it.
    RemovePeer {
        /// Its name.
        name: String,
        /// Also while conflicts with it are open: the copies of its versions stay.
        force: bool,
    },
    /// Go on where a brake is engaged.
    Resume {
        /// Only this peer; all if none.
        peer: Option<String>,
        /// What is missing is to be deleted, not brought back.
        allow_deletions: bool,
    },
    /// What is known of the conflicts at a path?
    Conflict {
        /// Where, below the root of the tree.
        path: RelPath,
    },
    /// Settle the conflicts at a path.
    Resolve {
        /// Where, below the root of the tree.
        path: RelPath,
        /// How.
        choice: Choice,
        /// A copy that was edited goes to the trash.
        discard_edits: bool,
    },
    /// What is in the trash? At most [`TRASH_PAGE`] things are told at a time.
    Trash {
        /// How many have been told.
        skip: usize,
    },
    /// Bring things back from the trash.
    Restore {
        /// What: where it was, or where it lies in the trash.
        paths: Vec<RelPath>,
        /// Where to, if not to where it was.
        to: Option<RelPath>,
    },
    /// Remove things from the trash for good.
    Empty {
        /// Only what was put there longer ago than this, in milliseconds.
        older_than_ms: u64,
    },
}

/// Who a directory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The mirror that it belongs to.
    pub mirror: MirrorIdText,
    /// Itself.
    pub replica: MirrorIdText,
}

/// What the daemon answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// To a ping.
    Pong {
        /// The daemon.
        pid: u32,
        /// Its program version.
        version: String,
    },
    /// To a status request.
    Status(Box<Status>),
    /// To a flush.
    Flushed(Flushed),
    /// The tree is plain files again. The daemon lets go of the mirror's lock when it
    /// ends, right after this.
    Unmounted {
        /// What was flushed.
        flushed: Flushed,
        /// What went wrong all the same: nothing could be flushed, or the journal could
        /// not be closed.
        failures: Vec<Failure>,
    },
    /// The mount is in use, and stays.
    Busy {
        /// What was flushed.
        flushed: Flushed,
        /// What the kernel said.
        error: String,
    },
    /// To a retry.
    Retrying {
        /// The peers' names.
        peers: Vec<String>,
    },
    /// To a peer that is to be added.
    PeerAdded {
        /// Its name.
        name: String,
        /// What its user should know.
        warnings: Vec<String>,
    },
    /// To a peer that attaches itself.
    Attached {
        /// Its name.
        name: String,
        /// The tree that it mirrors.
        tree: String,
    },
    /// To a question about an attached directory.
    Attachment(Box<Attachment>),
    /// To whoever ends an attachment: it ends right after this.
    Detaching,
    /// To a peer that is to be removed.
    PeerRemoved {
        /// How many conflicts with it were open.
        conflicts: usize,
    },
    /// To a resume.
    Resumed {
        /// How many peers were told.
        peers: usize,
    },
    /// To a question about conflicts.
    Conflicts {
        /// One for each peer with another version.
        conflicts: Vec<Detail>,
    },
    /// To a resolve.
    Resolved {
        /// Done, or why it has to wait for the peer.
        outcome: Outcome,
        /// The files that the peers' versions have become.
        beside: Vec<RelPath>,
    },
    /// To a question about the trash.
    Trash {
        /// What lies there, the latest first.
        kept: Vec<Kept>,
    },
    /// To a restore.
    Restored {
        /// What became of each thing.
        restored: Vec<Restored>,
    },
    /// To an emptying.
    Emptied(Removed),
    /// The request could not be carried out.
    Failed(Failure),
}

/// What a flush reached.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flushed {
    /// The change up to which everything was to become durable.
    pub seq: u64,
    /// Per peer.
    pub peers: Vec<PeerFlushed>,
    /// Open conflicts.
    pub conflicts: Vec<super::status::Conflict>,
    /// Paths that could not be mirrored.
    pub problems: Vec<super::status::Problem>,
}

/// How far a flush got with one peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerFlushed {
    /// The peer.
    pub name: String,
    /// What was reached.
    pub outcome: Outcome,
    /// Changes that it does not hold durably.
    pub pending_changes: u64,
    /// Their contents, in bytes.
    pub pending_bytes: u64,
    /// Why it was not reached.
    pub error: Option<String>,
}

/// What a flush reached with one peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The peer holds everything that was changed before the flush, and it survives a
    /// power loss there.
    Durable,
    /// The peer cannot be reached.
    Unreachable,
    /// The time was up.
    TimedOut,
    /// A brake is engaged, or somebody must decide.
    Halted,
    /// An error.
    Failed,
}

impl Outcome {
    /// The exit code that says it.
    pub fn exit(self) -> Exit {
        match self {
            Self::Durable => Exit::Done,
            Self::Unreachable => Exit::Unreachable,
            Self::TimedOut => Exit::TimedOut,
            Self::Halted => Exit::Brake,
            Self::Failed => Exit::Error,
        }
    }
}

impl Flushed {
    /// The exit code that says it. Without a peer nothing would survive the loss of this
    /// machine, so that is an error.
    pub fn exit(&self) -> Exit {
        let nobody = self.peers.is_empty().then_some(Exit::Error);
        self.left().and(Exit::from_iter(nobody))
    }

    /// What is left undone with the peers that there are, in one exit code.
    pub fn left(&self) -> Exit {
        let peers = self.peers.iter().map(|peer| peer.outcome.exit());
        let problems = (!self.problems.is_empty()).then_some(Exit::Error);
        let conflicts = (!self.conflicts.is_empty()).then_some(Exit::Conflicts);
        peers.chain(problems).chain(conflicts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::status::tests::example;

    #[test]
    fn calls_and_answers_survive_json() {
        let call = Call {
            version: VERSION,
            request: Request::Flush {
                peer: Some("host".into()),
                timeout_ms: 60_000,
            },
        };
        let text = serde_json::to_string(&call).unwrap();
        assert_eq!(
            text,
            r#"{"version":1,"request":"flush","peer":"host","timeout_ms":60000}"#
        );
        assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
        for response in [
            Response::Pong {
                pid: 7,
                version: "0.1.0".into(),
            },
            Response::Status(Box::new(example())),
            Response::Busy {
                flushed: Flushed::default(),
                error: "busy".into(),
            },
            Response::Unmounted {
                flushed: Flushed::default(),
                failures: vec![Failure::new("the journal could not be closed")],
            },
            Response::Failed(Failure::new("no").hint("yes").exit(Exit::Brake)),
        ] {
            let text = serde_json::to_string(&response).unwrap();
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Response>(&text).unwrap(), response);
        }
    }

    #[test]
    fn a_flush_is_done_only_when_nothing_is_missing() {
        let peer = |outcome| PeerFlushed {
            name: "host".into(),
            outcome,
            pending_changes: 0,
            pending_bytes: 0,
            error: None,
        };
        let of = |outcomes: &[Outcome]| Flushed {
            peers: outcomes.iter().copied().map(peer).collect(),
            ..Flushed::default()
        };
        assert_eq!(of(&[Outcome::Durable]).exit(), Exit::Done);
        assert_eq!(of(&[]).exit(), Exit::Error);
        assert_eq!(of(&[]).left(), Exit::Done);
        assert_eq!(
            of(&[Outcome::TimedOut, Outcome::Unreachable]).exit(),
            Exit::Unreachable
        );
        assert_eq!(
            of(&[Outcome::Unreachable, Outcome::Halted]).exit(),
            Exit::Brake
        );
        assert_eq!(of(&[Outcome::Failed, Outcome::Halted]).exit(), Exit::Error);
        let mut flushed = of(&[Outcome::Durable]);
        flushed.conflicts = example().conflicts;
        assert_eq!(flushed.exit(), Exit::Conflicts);
        flushed.problems = example().problems;
        assert_eq!(flushed.exit(), Exit::Error);
    }
}
