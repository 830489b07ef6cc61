//! `mirrorfs status --json`, read back as a script would.

use serde::Deserialize;
use serde_json::Value;

#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub mirror: Mirror,
    pub mount: Mount,
    pub journal: Journal,
    pub peers: Vec<Peer>,
    pub conflicts: Vec<Conflict>,
    pub held_back: Vec<HeldBack>,
    pub problems: Vec<Problem>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Mirror {
    pub id: String,
    pub name: String,
    pub tree: String,
    pub mode: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Mount {
    pub state: String,
    pub reason: Option<String>,
    pub channel: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Journal {
    pub seq: Value,
    pub pending_changes: u64,
    pub pending_bytes: u64,
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    pub name: String,
    pub url: String,
    pub state: String,
    pub transport: Option<String>,
    pub scanned_because: Option<String>,
    pub applied_seq: Value,
    pub durable_seq: Value,
    pub pending_changes: u64,
    pub pending_bytes: u64,
    pub last_error: Option<String>,
    pub halt_reason: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Conflict {
    pub path: String,
    pub copy: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct HeldBack {
    pub path: String,
    pub rule: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Problem {
    pub path: String,
    pub error: String,
}

impl Status {
    /// The only peer.
    #[track_caller]
    pub fn peer(&self) -> &Peer {
        assert_eq!(self.peers.len(), 1, "peers in {self:?}");
        &self.peers[0]
    }
}
