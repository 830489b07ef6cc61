//! What can go wrong with the journal.

use std::path::PathBuf;

use crate::PeerId;

/// The journal takes no records any more: a commit failed, or it was closed. The
/// mount goes read-only; only a new start, which scans, gets out of this.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the journal takes no more records: {0}")]
pub struct Poisoned(pub String);

/// An error of the journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite reported an error.
    #[error("journal database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A file of the journal could not be read, written or renamed.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The database was written by a newer program.
    #[error(
        "{}: written by a newer mirrorfs (schema {found}, this program knows up to {known}): use that version, or a newer one",
        path.display()
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest schema known here.
        known: i64,
    },
    /// The SQLite library in the program is too old to be used safely.
    #[error(
        "SQLite {found} is linked in, but 3.51.3 or later is needed (older ones can corrupt a database that two connections checkpoint): build with the bundled SQLite"
    )]
    OldSqlite {
        /// Its version.
        found: &'static str,
    },
    /// The journal takes no more records.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// Something in the database cannot be decoded.
    #[error("journal database: {what} cannot be decoded: {cause}")]
    Undecodable {
        /// What.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// Something could not be encoded for the database.
    #[error("{what} cannot be encoded for the journal: {cause}")]
    Unencodable {
        /// What.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// No peer of that key is configured.
    #[error("no peer {} is configured", .0.0)]
    UnknownPeer(PeerId),
    /// A peer of that name exists.
    #[error("a peer named {0:?} exists already: choose another name, or remove that peer")]
    PeerExists(String),
    /// There is no proposal to accept.
    #[error("peer {} has no proposed agreement to accept", .0.0)]
    NothingProposed(PeerId),
    /// A directory cannot be moved into itself.
    #[error("base: {from} cannot be moved to {to}, which lies inside it")]
    MoveIntoItself {
        /// The directory.
        from: crate::RelPath,
        /// Where to.
        to: crate::RelPath,
    },
    /// The snapshot that belongs to a mark was taken already.
    #[error("the snapshot at {n} has been taken already")]
    MarkTaken {
        /// The mark's position.
        n: u64,
    },
    /// An update was asked for from within an update.
    #[error("an update of the journal was asked for on the journal's own thread")]
    Reentrant,
    /// The closure given to `update` panicked; what it wrote was rolled back.
    #[error("an update of the journal panicked and was rolled back")]
    UpdatePanicked,
    /// The kernel's random source failed.
    #[error("no random number for the journal's epoch: {0}")]
    Random(#[from] getrandom::Error),
    /// A thread could not be started.
    #[error("cannot start the journal's {name} thread: {source}")]
    Thread {
        /// Which.
        name: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// An error of the caller, passed through a callback.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps an error of the caller, to be passed through a callback.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }

    /// Whether the database file itself is damaged, as opposed to a disk that does
    /// not answer or a mistake in a query.
    pub(crate) fn is_corruption(&self) -> bool {
        match self {
            Self::Sqlite(error) => matches!(
                error.sqlite_error_code(),
                Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase)
            ),
            Self::Undecodable { .. } => true,
            _ => false,
        }
    }

    /// Whether after this error nothing more can be promised: what was written may
    /// not be on disk, and asking again proves nothing.
    pub(crate) fn is_fatal(&self) -> bool {
        match self {
            Self::Sqlite(error) => matches!(
                error.sqlite_error_code(),
                Some(
                    rusqlite::ErrorCode::DatabaseCorrupt
                        | rusqlite::ErrorCode::NotADatabase
                        | rusqlite::ErrorCode::DiskFull
                        | rusqlite::ErrorCode::SystemIoFailure
                        | rusqlite::ErrorCode::CannotOpen
                        | rusqlite::ErrorCode::ReadOnly
                        | rusqlite::ErrorCode::OutOfMemory
                )
            ),
            _ => false,
        }
    }
}
