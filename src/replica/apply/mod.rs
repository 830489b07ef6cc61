//! Carrying out a batch on a plain directory: as a whole as far as names go, by renames
//! only, and without ever overwriting what nobody has seen.
//!
//! 1. `prepare`: everything new becomes an inode in staging. Until here a full disk or
//!    a wrong content drops the batch and leaves no trace.
//! 2. The inodes are synced, and a redo record of the batch is committed durably.
//! 3. `run`: the steps, one rename each. A step that finds something else than it
//!    expects diverges: nothing is changed by it, and the rest goes on.
//! 4. `rows`: what is now in the tree, the agreement and the answer are committed
//!    together.
//! 5. The names are synced ([`Unsynced::sync`]) and the record is removed.
//!
//! Cut off anywhere after 2, [`Applier::recover`] completes the batch: what a step has
//! done is recognised by inode.

mod prepare;
mod record;
mod rows;
mod run;
#[cfg(test)]
pub(crate) mod tests;

use mirrorfs_journal::index::{Durable, IndexError, PeerIndex};
use serde::{Deserialize, Serialize};

use super::late::Displaced;
use super::{Error, Latest, Marks, Moment, Reserved, Root, Staging, Time};
use crate::seeded::{self, Bug};
use crate::tree::links::Symlinks;
use crate::tree::{Agreement, RelPath, ReplicaId};
use crate::wire::message::{BatchId, Divergence, Op};
pub use prepare::path_of;
use record::Record;

/// The file in `.mirrorfs` that exists while names are being moved.
const MARKER: &str = "applying";
/// How many directories are synced one by one before the whole filesystem is.
const SYNCED_SINGLY: usize = 16;

/// What stops a batch before anything in the tree has changed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The replica's directory failed; a full disk, for the most part.
    #[error("{0}")]
    Replica(#[from] Error),
    /// The index failed.
    #[error("{0}")]
    Index(#[from] IndexError),
    /// The batch makes no sense.
    #[error("the batch cannot be carried out: {0}")]
    Malformed(String),
    /// The redo record of an interrupted batch cannot be read.
    #[error("the record of the interrupted batch is damaged: {0}")]
    Record(postcard::Error),
    /// The batch was begun and could not be ended. [`Applier::recover`] completes it.
    #[error("applying was interrupted, and will be completed by the next session: {0}")]
    Interrupted(Box<ApplyError>),
    /// A test cut the batch off.
    #[cfg(test)]
    #[error("cut off")]
    Cut,
}

/// A batch whose contents are all staged.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Its identity.
    pub id: BatchId,
    /// The mounted side that it comes from.
    pub mount: ReplicaId,
    /// What both sides hold when it has been applied. What that changes in the base has
    /// been written down ([`PeerIndex::propose`]).
    pub agreement: Agreement,
    /// The steps.
    pub ops: Vec<Op>,
}

/// What became of a batch.
#[derive(Debug)]
pub struct Outcome {
    /// The batch.
    pub batch: BatchId,
    /// Steps that were not carried out.
    pub diverged: Vec<Divergence>,
    /// Paths at which something may be that the index does not know.
    pub recheck: Vec<RelPath>,
    /// Directories that were made or moved, whose watches are missing or misplaced.
    pub rewatch: Vec<RelPath>,
    /// What went to the trash and may be written to there, by where it lies.
    pub(crate) displaced: Vec<(RelPath, Displaced)>,
    /// What is not durable yet.
    pub unsynced: Unsynced,
}

/// The answer to a batch, kept until the next one in case the link was cut before it
/// arrived.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The batch.
    pub batch: BatchId,
    /// Steps that were not carried out.
    pub diverged: Vec<Divergence>,
}

/// Names that have been moved and may still be lost to a power loss.
#[derive(Clone)]
pub struct Unsynced {
    root: Root,
    /// The directories concerned; none for the whole filesystem.
    dirs: Option<Vec<RelPath>>,
}

impl std::fmt::Debug for Unsynced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Unsynced").field(&self.dirs).finish()
    }
}

impl Unsynced {
    /// Makes the names durable. Takes as long as the disk takes.
    pub fn sync(&self) -> std::io::Result<()> {
        let Some(dirs) = &self.dirs else {
            return Ok(super::sync::filesystem(self.root.fd())?);
        };
        for dir in dirs {
            let Ok(fd) = self.root.dir(dir) else {
                // Somebody moved it: wherever it is, it is on this filesystem.
                return Ok(super::sync::filesystem(self.root.fd())?);
            };
            super::reserved::sync_dir(std::os::fd::AsFd::as_fd(&fd))?;
        }
        Ok(())
    }
}

/// Applies batches to one directory.
pub struct Applier<'a> {
    /// The directory.
    pub root: &'a Root,
    /// Its `.mirrorfs`.
    pub reserved: &'a Reserved,
    /// The staging directory therein.
    pub staging: &'a Staging,
    /// The index of the directory.
    pub index: &'a mut PeerIndex,
    /// Which symbolic links are made.
    pub symlinks: Symlinks,
    /// Called before each rename. A test changes the tree there, or cuts the batch off
    /// by answering true.
    #[cfg(test)]
    pub hook: Option<Box<dyn FnMut() -> bool>>,
}

impl Applier<'_> {
    /// Applies a batch. An error means that nothing in the tree was changed, unless it is
    /// [`ApplyError::Interrupted`].
    pub fn apply(&mut self, batch: Batch) -> Result<Outcome, ApplyError> {
        let record = self.prepare(batch)?;
        let bytes = match self.announce(&record) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.undo_preparation(&record.steps);
                self.reserved.remove_file(MARKER)?;
                return Err(error);
            }
        };
        let interrupted = |error| ApplyError::Interrupted(Box::new(error));
        if seeded::has(Bug::MarkerLeads) {
            self.mark([(record.mount, record.agreement)])?;
        }
        // A commit that failed may be found to have succeeded once the index is opened
        // again: all that is missing may be the answer of the disk. So nothing is taken
        // back from here on, and whoever opens it next goes by what it holds.
        if !seeded::has(Bug::NoRedoRecord) {
            self.index
                .transaction(Durable::PowerLoss, |index| index.set_redo(&bytes))
                .map_err(|error| interrupted(error.into()))?;
        }
        self.complete(record, false).map_err(interrupted)
    }

    fn announce(&self, record: &Record) -> Result<Vec<u8>, ApplyError> {
        let bytes = record.encode()?;
        self.reserved.replace_file(MARKER, b"")?;
        Ok(bytes)
    }

    /// Completes a batch that was cut off, if there is one, and makes it durable.
    pub fn recover(&mut self) -> Result<Option<Outcome>, ApplyError> {
        let Some(bytes) = self.index.redo()? else {
            self.reserved.remove_file(MARKER)?;
            return Ok(None);
        };
        let (boot, record) = Record::decode(&bytes)?;
        if !self.is_about_this_tree(&record)? {
            tracing::warn!(batch = %record.batch, "the interrupted batch is not about this tree");
            self.index
                .transaction(Durable::PowerLoss, |index| index.clear_redo())?;
            self.reserved.remove_file(MARKER)?;
            return Ok(None);
        }
        // Names that were moved in this life of the machine are where they were moved.
        let here = self.reserved.boot().and_then(record::as_kept);
        let outcome = if boot.is_some() && boot.as_ref() == here {
            Outcome {
                batch: record.batch,
                diverged: Vec::new(),
                recheck: Vec::new(),
                rewatch: Vec::new(),
                displaced: Vec::new(),
                unsynced: Unsynced {
                    root: self.root.clone(),
                    dirs: None,
                },
            }
        } else {
            self.reserved.replace_file(MARKER, b"")?;
            self.complete(record, true)?
        };
        outcome.unsynced.sync().map_err(|source| Error::Io {
            action: "sync",
            path: ".".to_owned(),
            source,
        })?;
        self.synced()?;
        Ok(Some(outcome))
    }

    /// Whether the tree is the one that a batch was being applied to, and not one that was
    /// brought back from a copy. What the batch made an agreement may then be anything.
    fn is_about_this_tree(&self, record: &Record) -> Result<bool, ApplyError> {
        let recorded = Moment::decode(self.index.moment()?);
        let told = Latest::of(self.reserved)?;
        Ok(
            match Latest::time(self.reserved, told.as_ref(), recorded.as_ref()) {
                Time::Same => true,
                Time::Other => false,
                // Of a batch from an earlier life of the machine any step may be lost; the
                // mark is of that batch, or of the one before it.
                Time::Untold => {
                    let mark = Marks::of(self.reserved)?.with(record.mount);
                    let last = self.index.last_agreement(record.mount)?;
                    mark == Some(record.agreement)
                        || mark == last.map(|last| last.agreement)
                        || mark.map(|mark| mark.nonce) == record.agreement.previous
                }
            },
        )
    }

    /// To be called once the outcome of the last batch has been synced: the tree is
    /// marked with the agreement and the redo record goes.
    pub fn synced(&mut self) -> Result<(), ApplyError> {
        self.mark(self.index.last_agreements()?)?;
        self.index
            .transaction(Durable::PowerLoss, |index| index.clear_redo())?;
        Ok(())
    }

    /// Marks the tree with the agreements that it holds.
    fn mark(
        &self,
        last: impl IntoIterator<Item = (ReplicaId, Agreement)>,
    ) -> Result<(), ApplyError> {
        let last = last.into_iter().map(|(mount, last)| (mount, Some(last)));
        Ok(Marks::write(self.reserved, last)?)
    }

    fn complete(&mut self, record: Record, resumed: bool) -> Result<Outcome, ApplyError> {
        let done = self.run(&record, resumed)?;
        let outcome = self.commit(record, done)?;
        self.reserved.remove_file(MARKER)?;
        Ok(outcome)
    }
}
