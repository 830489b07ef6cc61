//! The messages of the protocol. `docs/protocol.md` tells their order.
//!
//! The side with the mount decides; the agent applies and reports. A session starts
//! with a hello in each direction. After it the agent reports what it sees
//! ([`ToMount::Observed`]) whenever it sees it, and the mounted side sends at most one
//! batch at a time: [`ToAgent::Offer`] (in pieces), then the agent's [`ToMount::Need`],
//! then [`ToAgent::Data`], then [`ToAgent::Commit`], answered by [`ToMount::Applied`] and,
//! once synced, by [`ToMount::Durable`].
//!
//! Fields of many bytes go through `serde_bytes`: postcard writes the same, a length and the
//! bytes, but copies them at once, where serde's sequences take one call for each byte.

use std::time::Duration;

use mirrorfs_journal::{BaseChange, ChainLink};
use serde::{Deserialize, Serialize};

use crate::tree::{
    Agreement, ContentHash, Entry, Epoch, Id, MirrorId, RelPath, ReplicaId, Timestamp,
};

/// Oldest protocol this program speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// Newest protocol this program speaks.
pub const PROTOCOL_MAX: u16 = 1;

/// The feature of telling a content by another one that the receiver has.
pub const DELTAS: &str = "deltas";
/// The feature of telling of late versions.
pub const LATE: &str = "late";

/// The first four bytes of a session in either direction, before any frame, so that
/// an agent of another protocol (or a shell's greeting) is recognised for what it is.
pub const MAGIC: [u8; 4] = *b"mfs\x01";

/// How long a side waits for a sign of life before it gives the link up, unless it is
/// told otherwise (`MIRRORFS_DEADLINE`).
pub const DEADLINE: Duration = Duration::from_secs(15);
/// Neither side is silent for longer than this once the session has begun.
pub const SIGN_OF_LIFE: Duration = Duration::from_millis(3500);

/// What the mounted side says first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountHello {
    /// Lowest and highest protocol it speaks.
    pub protocol: (u16, u16),
    /// Names of optional parts of the protocol it knows.
    pub features: Vec<String>,
    /// Its program version, for messages to people.
    pub version: String,
    /// The mirror. A peer directory belongs to one mirror.
    pub mirror: MirrorId,
    /// The replica that speaks.
    pub replica: ReplicaId,
    /// A newer session fences an older one. The first half is the [life](Self::life) of the
    /// mounted side's journal, the second random for each connection.
    pub session: Id,
    /// The last agreement the mounted side has committed with this peer.
    pub agreement: Option<Agreement>,
    /// The agreement it has proposed and not seen acknowledged.
    pub proposed: Option<Agreement>,
    /// Up to where it has taken in the agent's reports; the agent reports everything
    /// younger, or everything if the epoch is not its own.
    pub seen: Option<Revision>,
    /// What the peer's directory is expected to be, or none on first contact.
    pub peer: Option<ReplicaId>,
}

impl MountHello {
    /// Which life of the mounted side's journal speaks. (A program that is too old to say so
    /// seems to begin one with each connection.)
    pub fn life(&self) -> Epoch {
        let half = self.session.0.first_chunk();
        Epoch(half.map_or(0, |half| u64::from_le_bytes(*half)))
    }

    /// Says which life of the mounted side's journal speaks.
    pub fn set_life(&mut self, life: Epoch) {
        let life = life.0.to_le_bytes();
        self.session.0[..life.len()].copy_from_slice(&life);
    }
}

/// What the agent answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentHello {
    /// Lowest and highest protocol it speaks.
    pub protocol: (u16, u16),
    /// Names of optional parts of the protocol it knows.
    pub features: Vec<String>,
    /// Its program version, for messages to people.
    pub version: String,
    /// The replica it serves.
    pub replica: ReplicaId,
    /// The mirror that the directory belonged to before this session, if any.
    pub mirror: Option<MirrorId>,
    /// The last agreement its directory holds.
    pub agreement: Option<Agreement>,
    /// Steps of the batch that made `agreement` which were not carried out, in case the
    /// mounted side never got the answer.
    pub diverged: Vec<Divergence>,
    /// Epoch of its reports.
    pub epoch: Epoch,
    /// Whether the reports that follow are the whole tree, because the mounted
    /// side's cursor was of no use.
    pub whole: bool,
    /// Whether `agreement` is one of the two that the mounted side named, and the agent
    /// knows its base. If not, [`ToMount::Chain`] follows, and the agent waits for
    /// [`ToAgent::Rejoin`] before it reports anything.
    pub settled: bool,
}

/// From where the base of the agreement comes at which two sides begin again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum BaseFrom {
    /// Both have it, or there is none.
    Both,
    /// The agent sends it before its first report.
    Agent,
    /// It follows from the mounted side.
    Mount,
}

/// A change of the base that an agreement makes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Agreed {
    /// What a step of the batch says about its path once it was carried out.
    Step(u32),
    /// Something else, with the steps it stands on: if one of them is not carried out, it
    /// does not hold.
    Other(BaseChange, Vec<u32>),
}

/// About how many bytes of rows go into one message.
pub const PIECE: usize = 256 * 1024;

/// About how many bytes a row takes in a message.
pub fn row_weight(path: &RelPath, entry: Option<&Entry>) -> usize {
    let entry = entry.map_or(0, |entry| {
        let target = match &entry.content {
            crate::tree::Content::Symlink { target } => target.len(),
            _ => 0,
        };
        let xattrs = entry.xattrs.iter();
        target
            + xattrs
                .map(|(name, value)| name.len() + value.len() + 8)
                .sum::<usize>()
    });
    path.as_bytes().len() + entry + 80
}

/// A position in the agent's reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Revision {
    /// The life of the agent's index that counted it.
    pub epoch: Epoch,
    /// Grows with each observed change.
    pub rev: u64,
}

/// One name on the peer as the agent found it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Observation {
    /// Where.
    pub path: RelPath,
    /// What is there; none if nothing is.
    pub entry: Option<Entry>,
    /// The revision that this observation belongs to.
    pub rev: u64,
    /// Of a Git index: what it stages (see [`crate::tree::git::meaning`]).
    pub meaning: Option<ContentHash>,
}

/// Identifies a batch. Random, so that a repeated offer is recognised.
pub type BatchId = Id;

/// What an operation expects to find. Compared by kind, content and link target, and
/// for [`Op::SetMeta`] by mode and attributes too.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Expect {
    /// Nothing of that name.
    Absent,
    /// Exactly this.
    Entry(Entry),
}

/// One step of a batch. Steps are carried out in order, and each is a rename, a
/// `mkdir`, an `rmdir` or a change of attributes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Takes a name, with everything below it, out of the tree into a slot of the
    /// batch; the first half of a move. All of these come first, the deepest first.
    Park {
        /// Its path before the batch.
        from: RelPath,
        /// Number of the slot, unique in the batch.
        slot: u32,
        /// What is expected there. Of a directory only the kind is compared.
        expect: Entry,
    },
    /// Puts a parked name where it belongs; the second half of a move.
    Unpark {
        /// The slot.
        slot: u32,
        /// The new path, at which nothing is expected.
        to: RelPath,
    },
    /// Makes a directory where nothing is expected.
    MakeDir {
        /// Where.
        path: RelPath,
        /// Its mode and attributes.
        entry: Entry,
    },
    /// Puts a file or symbolic link into place.
    Put {
        /// Where.
        path: RelPath,
        /// What: the staged content with this hash, and its metadata.
        entry: Entry,
        /// What it replaces.
        expect: Expect,
    },
    /// Changes mode, modification time and attributes of what is there.
    SetMeta {
        /// Where.
        path: RelPath,
        /// What shall be there; same content as `expect`.
        entry: Entry,
        /// What is there.
        expect: Entry,
    },
    /// Removes a file or symbolic link (into the trash).
    Remove {
        /// Where.
        path: RelPath,
        /// What is expected there.
        expect: Entry,
    },
    /// Removes a directory. One that still holds a name (of a file that is not
    /// mirrored) stays, and that is no divergence.
    RemoveDir {
        /// Where.
        path: RelPath,
    },
    /// Stores the mounted side's version of a conflict in the peer's
    /// `.mirrorfs/conflicts/`. Changes nothing in the tree.
    KeepConflict {
        /// The path in conflict.
        path: RelPath,
        /// The mounted side's version, a file or a symbolic link.
        entry: Entry,
    },
}

impl Op {
    /// What the base says about the path of this step once it was carried out, if it is a
    /// step that alone tells.
    pub fn agreed(&self) -> Option<BaseChange> {
        match self {
            Self::Put { path, entry, .. }
            | Self::MakeDir { path, entry }
            | Self::SetMeta { path, entry, .. } => Some(BaseChange::Put {
                path: path.clone(),
                node: None,
                entry: entry.clone(),
            }),
            Self::Remove { path, .. } | Self::RemoveDir { path } => {
                Some(BaseChange::Remove { path: path.clone() })
            }
            Self::Park { .. } | Self::Unpark { .. } | Self::KeepConflict { .. } => None,
        }
    }

    /// The content that must be staged before this step, if any.
    pub fn content(&self) -> Option<(ContentHash, u64)> {
        let (Self::Put { entry, .. } | Self::KeepConflict { entry, .. }) = self else {
            return None;
        };
        match entry.content {
            crate::tree::Content::File { size, hash } => Some((hash, size)),
            _ => None,
        }
    }
}

/// A content that the agent lacks, wholly or in part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Want {
    /// The content.
    pub hash: ContentHash,
    /// How many of its first bytes the agent holds durably.
    pub have: u64,
}

/// A step that was not carried out, because something else was there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Divergence {
    /// Index of the step in the batch.
    pub op: u32,
    /// Why, for people. The agent reports what is there as an ordinary observation,
    /// right after [`ToMount::Applied`].
    pub reason: String,
}

/// From the mounted side to the agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Starts the session.
    Hello(MountHello),
    /// Answers the agent's chain: both sides begin again at this agreement, the last one
    /// that both have gone through, or as on first contact if there is none.
    Rejoin {
        /// The agreement.
        at: Option<Agreement>,
        /// From where its base comes.
        base: BaseFrom,
    },
    /// A piece of the base, after a [`ToAgent::Rejoin`] that says so.
    Base {
        /// Rows of the base.
        rows: Vec<(RelPath, Entry)>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// A piece of what the agreement of a batch changes in the base. All pieces come before
    /// [`ToAgent::Commit`], and after the last piece of the offer if there is one.
    Agreed {
        /// The batch.
        batch: BatchId,
        /// The changes, after those of the pieces before.
        changes: Vec<Agreed>,
    },
    /// A piece of a batch's steps; the last has `more` false. Replaces an older offer.
    Offer {
        /// The batch.
        batch: BatchId,
        /// The steps of this piece, after those of the pieces before.
        ops: Vec<Op>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// A stretch of a content the agent asked for. Stretches of one content arrive in
    /// order and without gaps from [`Want::have`] on.
    Data {
        /// The content.
        hash: ContentHash,
        /// Where the stretch starts, in bytes.
        offset: u64,
        /// The stretch.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// A content that was offered cannot be had any more: drop the batch.
    Abandon {
        /// The batch.
        batch: BatchId,
    },
    /// All contents have been sent: apply. With a batch of no steps that was never
    /// offered it only moves the agreement.
    Commit {
        /// The batch.
        batch: BatchId,
        /// The agreement that both sides then hold.
        agreement: Agreement,
        /// Reports up to here have been taken into account.
        seen: Revision,
    },
    /// Asks for a file's content.
    Fetch {
        /// Names the answer.
        request: u64,
        /// Where the file was observed.
        path: RelPath,
        /// The content that was observed.
        hash: ContentHash,
        /// From which byte on.
        offset: u64,
    },
    /// Asks for a report of everything that had happened when this arrived.
    Drain {
        /// Names the answer.
        token: u64,
    },
    /// Are you there?
    Ping {
        /// Names the answer.
        token: u64,
    },
    /// This side is done with so much of what it fetched.
    Taken {
        /// Bytes of content since the beginning of the session.
        bytes: u64,
    },
    /// A stretch of a content the agent asked for, as [`ToAgent::Data`], but taken from
    /// another content that the agent has. With the feature [`DELTAS`] only, as all that
    /// follows.
    Reuse {
        /// The content.
        hash: ContentHash,
        /// Where the stretch starts, in bytes.
        offset: u64,
        /// Its length.
        len: u64,
        /// The content that it is taken from.
        old: ContentHash,
        /// Where it starts there.
        from: u64,
    },
    /// Asks for the sums of the blocks of a content that the agent is believed to have,
    /// to tell another one by it.
    AskSums {
        /// The content that is to be sent.
        hash: ContentHash,
        /// The content that the agent has.
        old: ContentHash,
        /// The size of the blocks, in bytes.
        block: u32,
    },
    /// As [`ToAgent::Fetch`], where this side has a content that is probably like it.
    FetchLike {
        /// Names the answer.
        request: u64,
        /// Where the file was observed.
        path: RelPath,
        /// The content that was observed.
        hash: ContentHash,
        /// From which byte on.
        offset: u64,
        /// The content that this side has.
        old: ContentHash,
        /// Its size.
        size: u64,
    },
    /// The sums that the agent asked for; none if they cannot be had.
    Sums {
        /// The request.
        request: u64,
        /// The size of the blocks, in bytes.
        block: u32,
        /// A sum for each block.
        #[serde(with = "serde_bytes")]
        sums: Vec<u8>,
    },
}

/// From the agent to the mounted side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToMount {
    /// Answers the hello.
    Hello(AgentHello),
    /// The agent refuses the session.
    Refused {
        /// Why.
        refusal: Refusal,
    },
    /// The agreements that the agent has made with the mounted side, the newest first, as
    /// far back as it can go. Follows a hello that is not settled.
    Chain {
        /// The agreements of this piece.
        links: Vec<ChainLink>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// A piece of the base, after a [`ToAgent::Rejoin`] that asks for it.
    Base {
        /// Rows of the base.
        rows: Vec<(RelPath, Entry)>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// What the agent has seen change. The initial report ends with the first one in
    /// which `complete` is true; after that all are complete.
    Observed {
        /// The changes, by path, at most one for each.
        observations: Vec<Observation>,
        /// Whether, with this, everything up to `upto` has been reported.
        complete: bool,
        /// The newest revision covered.
        upto: Revision,
    },
    /// The contents that an offered batch still needs.
    Need {
        /// The batch.
        batch: BatchId,
        /// In the order in which the agent wants them.
        wants: Vec<Want>,
        /// Whether more of them follow.
        more: bool,
    },
    /// The batch has been applied; all readers see it.
    Applied {
        /// The batch.
        batch: BatchId,
        /// Steps that were not carried out.
        diverged: Vec<Divergence>,
        /// Revision of the agent's index after the batch.
        upto: Revision,
    },
    /// The batch survives a power loss of the peer.
    Durable {
        /// The batch.
        batch: BatchId,
    },
    /// The agent dropped the batch before it applied anything of it (a full disk, a
    /// content that did not match its hash).
    Failed {
        /// The batch.
        batch: BatchId,
        /// Why, for people; names the path.
        reason: String,
    },
    /// A stretch of a content that was fetched.
    Fetched {
        /// The request.
        request: u64,
        /// Where the stretch starts, in bytes.
        offset: u64,
        /// The stretch.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
        /// Whether it is the last.
        last: bool,
    },
    /// The content cannot be had: the file is not what was observed. An observation
    /// of what it is now follows or has preceded.
    FetchFailed {
        /// The request.
        request: u64,
        /// Why, for people.
        reason: String,
    },
    /// Everything that had happened when the drain arrived has been reported.
    Drained {
        /// The request.
        token: u64,
    },
    /// Here I am.
    Pong {
        /// The request.
        token: u64,
    },
    /// Paths that the agent cannot report or hold; replaces the former list.
    Problems {
        /// Path and cause.
        problems: Vec<(RelPath, String)>,
    },
    /// The watch could not be kept and the tree is scanned instead, or no longer is.
    Watching {
        /// Why scanning is needed; none while watching works.
        degraded: Option<String>,
    },
    /// The session is over: the root vanished, a newer session took over, or an error.
    Closing {
        /// Why, for people.
        reason: String,
    },
    /// The agent is done with so much of the contents it was sent.
    Taken {
        /// Bytes of content since the beginning of the session.
        bytes: u64,
    },
    /// The sums that were asked for by [`ToAgent::AskSums`]; none if they cannot be had.
    Sums {
        /// The content that is to be sent.
        hash: ContentHash,
        /// A sum for each block.
        #[serde(with = "serde_bytes")]
        sums: Vec<u8>,
    },
    /// Asks for the sums of the blocks of the content that the mounted side has, to tell
    /// by it the one that it fetches.
    AskSums {
        /// The request to fetch.
        request: u64,
        /// The size of the blocks, in bytes.
        block: u32,
    },
    /// A stretch of a content that is fetched, as [`ToMount::Fetched`], but taken from the
    /// content that the mounted side has.
    Reused {
        /// The request.
        request: u64,
        /// Where the stretch starts, in bytes.
        offset: u64,
        /// Its length.
        len: u64,
        /// Where it starts in the content that the mounted side has.
        from: u64,
        /// Whether it is the last.
        last: bool,
    },
    /// A program has gone on writing to a file that a batch had replaced or removed. What it
    /// writes has been put back. With the feature [`LATE`] only.
    Late {
        /// Where the file was.
        path: RelPath,
        /// Where it is now, in the tree; it has been observed there.
        copy: Option<RelPath>,
        /// Or where in `.mirrorfs/conflicts`.
        kept: Option<RelPath>,
        /// When that was noticed.
        since: Timestamp,
    },
}

/// Why an agent refuses a session. Each has its own way on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No protocol in common.
    #[error("the agent speaks protocols {} to {}, this side {} to {}: upgrade mirrorfs on the {} side",
        .agent.0, .agent.1, .mount.0, .mount.1, if .agent.1 < .mount.0 { "peer's" } else { "mounted" })]
    Protocol {
        /// The agent's range.
        agent: (u16, u16),
        /// The mounted side's range.
        mount: (u16, u16),
    },
    /// The directory belongs to another mirror.
    #[error(
        "the peer's directory belongs to mirror {found}: choose another directory, or remove its .mirrorfs if that mirror is gone"
    )]
    OtherMirror {
        /// The mirror it belongs to.
        found: MirrorId,
    },
    /// The peer's directory is the mounted tree itself, or inside it.
    #[error("the peer's directory is the mounted tree itself")]
    SameReplica,
    /// The directory cannot be used.
    #[error("{reason}")]
    Root {
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// Something failed over there that may work the next time: a full disk, for the
    /// most part.
    #[error("the peer's agent cannot begin: {reason}")]
    Failed {
        /// What failed.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What other versions read, whichever way the bytes are copied.
    #[test]
    fn a_stretch_of_content_has_the_recorded_layout() {
        let stretch = ToAgent::Data {
            hash: ContentHash([7; 32]),
            offset: 300,
            bytes: vec![0, 1, 255],
        };
        let mut recorded = vec![7; 33];
        recorded[0] = 5;
        recorded.extend(b"\xac\x02\x03\x00\x01\xff");
        assert_eq!(postcard::to_stdvec(&stretch).unwrap(), recorded);
        assert_eq!(postcard::from_bytes::<ToAgent>(&recorded).unwrap(), stretch);
    }
}
