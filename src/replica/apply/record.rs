//! The redo record: everything that is needed to complete a batch that was cut off.

use serde::{Deserialize, Serialize};

use super::ApplyError;
use crate::replica::StagedName;
use crate::tree::{Agreement, ReplicaId, Timestamp};
use crate::wire::message::{BatchId, Op};

/// A batch with the inodes it moves.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) batch: BatchId,
    pub(super) mount: ReplicaId,
    pub(super) agreement: Agreement,
    /// When it was prepared, as the trash names it.
    pub(super) stamp: String,
    pub(super) steps: Vec<Step>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) op: Op,
    /// What the step puts into place.
    pub(super) staged: Option<Staged>,
    /// The inode that the step takes away.
    pub(super) before: Option<u64>,
    /// Why the step cannot be carried out at all.
    pub(super) refused: Option<String>,
}

/// An inode that waits in staging.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Staged {
    pub(super) name: StagedName,
    pub(super) ino: u64,
    /// Whether the filesystem holds all of the entry's attributes.
    pub(super) complete: bool,
    pub(super) size: u64,
    /// As the filesystem keeps it, and the mode with the kind.
    pub(super) mtime: Timestamp,
    pub(super) mode: u32,
    /// Whether the held content itself became this inode.
    pub(super) taken: bool,
}

/// The boot in which a record's names were all moved, then the record.
const BOOT_LEN: usize = 36;

impl Record {
    pub(super) fn encode(&self) -> Result<Vec<u8>, ApplyError> {
        postcard::to_extend(self, vec![0; BOOT_LEN]).map_err(ApplyError::Record)
    }

    /// The record as it is once all names have been moved, in this life of the machine.
    pub(super) fn encode_moved(&self, boot: Option<&str>) -> Result<Vec<u8>, ApplyError> {
        let mut bytes = self.encode()?;
        if let Some(boot) = boot.and_then(as_kept) {
            bytes[..BOOT_LEN].copy_from_slice(boot);
        }
        Ok(bytes)
    }

    /// Takes a record apart: if its names were all moved, in which boot that was.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Option<[u8; BOOT_LEN]>, Self), ApplyError> {
        let damaged = ApplyError::Record(postcard::Error::DeserializeUnexpectedEnd);
        let (boot, record) = bytes.split_first_chunk().ok_or(damaged)?;
        let record = postcard::from_bytes(record).map_err(ApplyError::Record)?;
        Ok(((*boot != [0; BOOT_LEN]).then_some(*boot), record))
    }
}

/// The kernel's name for a life of the machine, as a record keeps it.
pub(super) fn as_kept(boot: &str) -> Option<&[u8; BOOT_LEN]> {
    boot.as_bytes().first_chunk()
}
