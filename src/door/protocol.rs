//! What goes between the door and its client: length-prefixed postcard, one request
//! and one answer at a time, between two processes of the same program.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::units::Unit;
use crate::fs::{DoorOp, StagedName};
use crate::tree::RelPath;

/// Far more than a batch needs: a peer's extended attributes are the largest part.
const LIMIT: u32 = 256 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Make these changes, in this order.
    Apply {
        dir: Vec<u8>,
        device: u64,
        /// The name by which the filesystem gets to know the door.
        greeting: StagedName,
        /// Each with the unit that it belongs to: from where one is refused on, the rest of
        /// its unit is not carried out.
        operations: Vec<(DoorOp, Option<Unit>)>,
    },
    /// Tell of each file whether somebody has it open for writing.
    Probe {
        dir: Vec<u8>,
        device: u64,
        paths: Vec<RelPath>,
    },
    /// Open and close these files, or all that are mapped.
    Settle {
        dir: Vec<u8>,
        device: u64,
        /// Whether the mount lets other users in than the door's.
        everybody: bool,
        paths: Option<Vec<RelPath>>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Applied(Vec<Outcome>),
    Probed(Vec<bool>),
    Settled(Settled),
    /// The mount cannot be entered.
    Refused(String),
}

/// What a change came to, as far as the calling side can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    Done,
    OpenForWriting,
    Failed(String),
    /// Not tried, because of what became of another of its unit.
    Held(RelPath),
}

/// What settling mapped files came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// Files that were opened and closed.
    pub files: u64,
    /// Files that could not be, with the reason.
    pub failed: Vec<(String, String)>,
    /// Processes that may have mappings, and could not be looked at.
    pub unseen: u64,
}

pub(super) fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let len = u32::try_from(body.len())
        .ok()
        .filter(|len| *len <= LIMIT)
        .ok_or_else(|| io::Error::other("the message is too large"))?;
    stream.write_all(&len.to_le_bytes())?;
    stream.write_all(&body)?;
    stream.flush()
}

pub(super) fn receive<M: DeserializeOwned>(stream: &mut impl Read) -> io::Result<M> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > LIMIT {
        return Err(io::Error::other("the message is too large"));
    }
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body)?;
    postcard::from_bytes(&body).map_err(io::Error::other)
}
