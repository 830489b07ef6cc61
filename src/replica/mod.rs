//! A replica's own directory, `.mirrorfs`, and what is put into a tree through it:
//! identity, staging, trash, and carrying out a batch on a plain directory.

pub mod apply;
pub(crate) mod beneath;
pub mod delta;
pub(crate) mod keep;
pub(crate) mod late;
mod latest;
pub mod look;
mod marks;
mod meta;
mod reserved;
mod staging;
pub(crate) mod sync;
pub mod trash;

pub use beneath::Root;
pub(crate) use beneath::is_no_directory;
pub use latest::{Latest, Moment, Time};
pub use marks::Marks;
pub use reserved::{Identity, Reserved};
pub use staging::{Incoming, Owner, Partial, Placed, StagedName, Staging};

use crate::tree::{ContentHash, MirrorId};

/// What can go wrong in a replica's directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what; relative to the tree's root.
        path: String,
        /// How it failed.
        source: std::io::Error,
    },
    /// The identity file is not what this program writes.
    #[error(
        "{path} is damaged ({reason}): restore it from a copy of the tree, or remove the .mirrorfs directory to begin anew"
    )]
    Identity {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory belongs to another mirror already.
    #[error(
        "the directory belongs to mirror {found}: remove its .mirrorfs directory if that mirror is gone"
    )]
    OtherMirror {
        /// The mirror it belongs to.
        found: MirrorId,
    },
    /// A content is not the one that was announced.
    #[error("content {expected} arrived as {found}: it was changed under way and was dropped")]
    WrongContent {
        /// The announced content.
        expected: ContentHash,
        /// What came.
        found: ContentHash,
    },
    /// A content was told by another one, and it is not known by which.
    #[error("content {hash} was told by another one that nobody named")]
    NotLike {
        /// The content.
        hash: ContentHash,
    },
    /// Another content was to be made of one that is not here.
    #[error("content {hash} was told by content {old}, which is not here (any more)")]
    NothingToReuse {
        /// The content that was to be made.
        hash: ContentHash,
        /// The content that it was to be made of.
        old: ContentHash,
    },
    /// A stretch of a content does not continue what is held.
    #[error("content {hash}: {len} bytes at {offset} do not continue the {have} held of {size}")]
    Gap {
        /// The content.
        hash: ContentHash,
        /// Where the stretch starts.
        offset: u64,
        /// Its length.
        len: u64,
        /// How much is held.
        have: u64,
        /// The announced size.
        size: u64,
    },
    /// The kernel has no random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
}

impl Error {
    /// Whether the disk or the user's quota is full.
    pub fn is_disk_full(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        matches!(
            source.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        )
    }
}

/// Names the action and the path of an I/O error.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn context(self, action: &'static str, path: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            action,
            path: path.into(),
            source: source.into(),
        })
    }
}
