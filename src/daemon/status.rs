//! What `mirrorfs status` tells, in the shape that scripts depend on.

use serde::{Deserialize, Serialize};

use super::exit::Exit;
use super::state::Mode;

/// One mirror, as it is now. The names of the fields and the lower-case words are an
/// interface: what is there stays, new fields may be added.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Which mirror.
    pub mirror: Mirror,
    /// Its mount.
    pub mount: Mount,
    /// Its journal.
    pub journal: Journal,
    /// Its peers, in the order in which they were added.
    pub peers: Vec<Peer>,
    /// Paths on which both sides differ, and nobody has decided yet.
    pub conflicts: Vec<Conflict>,
    /// Paths that are not mirrored on purpose.
    pub held_back: Vec<HeldBack>,
    /// Paths that should be mirrored and could not be.
    pub problems: Vec<Problem>,
}

/// Which mirror.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mirror {
    /// 32 hexadecimal digits, the same on every replica.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// Where the tree is on this machine.
    pub tree: String,
    /// Which changes travel.
    pub mode: Mode,
}

/// Whether the tree is mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// The state.
    pub state: MountState,
    /// Why it is not as it should be; none if it is.
    pub reason: Option<String>,
    /// How requests reach the daemon, and what would make that faster; none where
    /// nothing is mounted.
    #[serde(default)]
    pub channel: Option<String>,
}

/// Whether the tree is mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountState {
    /// Changes are being recorded.
    Mounted,
    /// The tree is plain files.
    Unmounted,
}

/// How far the journal is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Journal {
    /// The number of the last change.
    pub seq: u64,
    /// Changes that some peer does not hold durably.
    pub pending_changes: u64,
    /// Their contents, in bytes.
    pub pending_bytes: u64,
    /// That it was lost or damaged and had to begin anew, until every peer agrees again.
    #[serde(default)]
    pub reason: Option<String>,
}

/// One peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// What people call it.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// The state of the connection.
    pub state: PeerState,
    /// How it is reached: local, libssh2 or ssh; none before the first attempt.
    pub transport: Option<String>,
    /// Why it is reached in that way and not in another.
    #[serde(default)]
    pub transport_reason: Option<String>,
    /// The version of mirrorfs over there; none before it was met.
    #[serde(default)]
    pub version: Option<String>,
    /// Why its directory is scanned now and then instead of being watched; none if it is
    /// watched.
    #[serde(default)]
    pub scanned_because: Option<String>,
    /// The peer shows everything up to this change.
    pub applied_seq: u64,
    /// The peer holds everything up to this change durably.
    pub durable_seq: u64,
    /// Changes that it does not hold durably.
    pub pending_changes: u64,
    /// Their contents, in bytes.
    pub pending_bytes: u64,
    /// The last error, until the next success.
    pub last_error: Option<String>,
    /// Why it was halted, and what to do.
    pub halt_reason: Option<String>,
}

/// The state of the connection to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// Talking.
    Connected,
    /// Trying for the first time, or again after an orderly end.
    Connecting,
    /// The last attempt failed; the next one comes by itself.
    Unreachable,
    /// Nobody tries, for instance because the tree is not mounted.
    Paused,
    /// Stopped until somebody decides: a safety brake, another mirror, a protocol.
    Halted,
}

/// A conflict that is open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Conflict {
    /// The path, where the local version stands.
    pub path: String,
    /// Where the peer's version was put; none inside a Git directory.
    pub copy: Option<String>,
}

/// A path that is not mirrored on purpose.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HeldBack {
    /// The path.
    pub path: String,
    /// The rule that holds it back.
    pub rule: String,
}

/// A path that could not be mirrored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// The path.
    pub path: String,
    /// Why.
    pub error: String,
}

impl PeerState {
    /// The word that scripts see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Connecting => "connecting",
            Self::Unreachable => "unreachable",
            Self::Paused => "paused",
            Self::Halted => "halted",
        }
    }
}

impl Status {
    /// What holds now, in one exit code.
    pub fn exit(&self) -> Exit {
        let peers = self.peers.iter().map(|peer| match peer.state {
            PeerState::Halted => Exit::Brake,
            PeerState::Unreachable => Exit::Unreachable,
            PeerState::Connected | PeerState::Connecting | PeerState::Paused => Exit::Done,
        });
        let problems = (!self.problems.is_empty()).then_some(Exit::Error);
        let conflicts = (!self.conflicts.is_empty()).then_some(Exit::Conflicts);
        peers.chain(problems).chain(conflicts).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Status {
        Status {
            mirror: Mirror {
                id: "0123456789abcdef0123456789abcdef".into(),
                name: "web".into(),
                tree: "/home/me/web".into(),
                mode: Mode::TwoWay,
            },
            mount: Mount {
                state: MountState::Mounted,
                reason: None,
                channel: Some("io_uring".into()),
            },
            journal: Journal {
                seq: 4120,
                pending_changes: 3,
                pending_bytes: 8192,
                reason: None,
            },
            peers: vec![Peer {
                name: "host".into(),
                url: "me@host:web".into(),
                state: PeerState::Connected,
                transport: Some("libssh2".into()),
                transport_reason: Some("libssh2 was asked for".into()),
                version: Some("0.1.0".into()),
                scanned_because: None,
                applied_seq: 4118,
                durable_seq: 4117,
                pending_changes: 3,
                pending_bytes: 8192,
                last_error: None,
                halt_reason: None,
            }],
            conflicts: vec![Conflict {
                path: "a.txt".into(),
                copy: Some("a.txt.remote.20260101T000000Z.conflict".into()),
            }],
            held_back: vec![HeldBack {
                path: "run.sock".into(),
                rule: "a socket stays local".into(),
            }],
            problems: vec![Problem {
                path: "b".into(),
                error: "Permission denied (os error 13)".into(),
            }],
        }
    }

    /// Scripts depend on every name in here.
    #[test]
    fn the_json_has_the_promised_shape() {
        let golden = r#"{
  "mirror": {
    "id": "0123456789abcdef0123456789abcdef",
    "name": "web",
    "tree": "/home/me/web",
    "mode": "two-way"
  },
  "mount": {
    "state": "mounted",
    "reason": null,
    "channel": "io_uring"
  },
  "journal": {
    "seq": 4120,
    "pending_changes": 3,
    "pending_bytes": 8192,
    "reason": null
  },
  "peers": [
    {
      "name": "host",
      "url": "me@host:web",
      "state": "connected",
      "transport": "libssh2",
      "transport_reason": "libssh2 was asked for",
      "version": "0.1.0",
      "scanned_because": null,
      "applied_seq": 4118,
      "durable_seq": 4117,
      "pending_changes": 3,
      "pending_bytes": 8192,
      "last_error": null,
      "halt_reason": null
    }
  ],
  "conflicts": [
    {
      "path": "a.txt",
      "copy": "a.txt.remote.20260101T000000Z.conflict"
    }
  ],
  "held_back": [
    {
      "path": "run.sock",
      "rule": "a socket stays local"
    }
  ],
  "problems": [
    {
      "path": "b",
      "error": "Permission denied (os error 13)"
    }
  ]
}"#;
        assert_eq!(serde_json::to_string_pretty(&example()).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Status>(golden).unwrap(), example());
    }

    #[test]
    fn state_words_are_lower_case() {
        for state in [
            PeerState::Connected,
            PeerState::Connecting,
            PeerState::Unreachable,
            PeerState::Paused,
            PeerState::Halted,
        ] {
            assert_eq!(
                serde_json::to_value(state).unwrap(),
                serde_json::Value::from(state.word())
            );
        }
        assert_eq!(
            serde_json::to_value(MountState::Unmounted).unwrap(),
            serde_json::Value::from("unmounted")
        );
    }

    #[test]
    fn the_exit_code_is_the_gravest_thing_that_holds() {
        let mut status = example();
        assert_eq!(status.exit(), Exit::Error);
        status.problems.clear();
        assert_eq!(status.exit(), Exit::Conflicts);
        status.peers[0].state = PeerState::Unreachable;
        assert_eq!(status.exit(), Exit::Unreachable);
        status.peers.push(Peer {
            state: PeerState::Halted,
            ..status.peers[0].clone()
        });
        assert_eq!(status.exit(), Exit::Brake);
        status.peers.clear();
        status.conflicts.clear();
        assert_eq!(status.exit(), Exit::Done);
    }
}
