//! The filesystem: operations on the lower directory, each recorded in the journal
//! in the order in which they took effect. It knows no FUSE and no replicator.
//!
//! Operations answer with an [`Errno`], which is what a caller of the mount sees;
//! what needs an explanation goes to [`Filesystem::problems`] or to the log.

mod attributes;
mod caller;
mod cut;
mod descriptors;
mod direct;
mod door;
mod doubt;
mod late;
mod lower;
mod nameless;
mod open;
mod ops_create;
mod ops_data;
mod ops_list;
mod ops_meta;
mod ops_remove;
mod ops_rename;
mod place;
mod problems;
mod record;
mod recover;
mod spool;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod trash;

use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};

use mirrorfs_journal::{Poisoned, Recorder};
use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

pub use attributes::Attributes;
pub use caller::Caller;
pub use cut::{Cut, CutFile};
pub use descriptors::raise_limit as raise_descriptor_limit;
pub use door::{DoorOp, DoorResult, Expect, GREETED, StagedName, Ticket};
pub use doubt::{Missing, Recorded, Suspect, Suspects};
pub use late::LateHook;
pub use lower::{Lower, LowerError};
pub use ops_list::{Listed, ListedPlus};
pub(crate) use ops_meta::user_xattrs;
pub use ops_meta::{Changes, SetTime};
pub use recover::RecoveryReport;

use crate::tree::{BadPath, Ino, RelPath};
use cut::CutState;
use descriptors::Descriptors;
use door::Registry;
use problems::Problems;
use record::Changed;
use table::Table;

/// Why the filesystem cannot do what its owner asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Lower cannot be read.
    #[error("{operation} {}: {source}", .path)]
    Lower {
        /// What was tried.
        operation: &'static str,
        /// Where, from the root of the tree.
        path: RelPath,
        /// Why it failed.
        source: std::io::Error,
    },
    /// What is staged cannot be looked at.
    #[error("look at .mirrorfs/staging/{name}: {source}")]
    Staging {
        /// Its name.
        name: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The journal refuses records.
    #[error("the journal takes no more records: {0}")]
    Poisoned(#[from] Poisoned),
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] mirrorfs_journal::Error),
    /// Lower holds a name that no tree can have.
    #[error(transparent)]
    Path(#[from] BadPath),
}

/// The result of an operation that a program asked for through the mount.
pub type Result<T> = std::result::Result<T, Errno>;

/// Told of nodes whose cached attributes are wrong.
pub type StaleHook = Box<dyn Fn(Ino) + Send + Sync>;

/// What can be tuned.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// Descriptors that may be open at a time for known nodes.
    pub descriptors: usize,
    /// Bytes that a cut may save before it is abandoned.
    pub spool_limit: u64,
    /// Removed files that a cut may keep before it is abandoned.
    pub kept_limit: usize,
}

impl Default for FsOptions {
    fn default() -> Self {
        Self {
            descriptors: descriptors::share(3, 2048),
            spool_limit: 256 << 20,
            kept_limit: descriptors::share(12, 512),
        }
    }
}

/// A name that was looked up or made.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// What it is.
    pub attributes: Attributes,
    /// The name may be cached for ever. A name of the door may not be cached at all.
    pub cacheable: bool,
}

/// A mirrored tree, as the mount shows it.
///
/// # Locks, in the order in which they are taken
///
/// 1. `namespace`: for writing by whatever changes names, by the taking of a cut and
///    by the door's placing; for reading by every other operation.
/// 2. `Node::content` of one node, or of two in the order of their inode numbers:
///    whatever changes a content or attributes, and reading a cut.
/// 3. One of the leaves: `table`, `descriptors`, `cuts` and then one `CutState`,
///    `changed`, `door`, `problems`. Nothing else is taken while one of these is held.
///
/// A change is sent to the journal while the lock under which it took effect (1 or 2)
/// is held, so the order of the records is the order of the effects.
pub struct Filesystem {
    lower: Lower,
    recorder: Recorder,
    options: FsOptions,
    namespace: RwLock<()>,
    table: Table,
    descriptors: Descriptors,
    cuts: Mutex<Vec<Arc<CutState>>>,
    open_cuts: AtomicUsize,
    /// The number of the last change of a node's content or attributes.
    changed: Mutex<Changed>,
    /// How often a name changed.
    names_changed: AtomicU64,
    poisoned: OnceLock<String>,
    door: Arc<Registry>,
    problems: Problems,
    /// Tells the kernel that what it cached of a node's attributes is wrong.
    stale: RwLock<Option<StaleHook>>,
    /// Told of writes to what a peer's change has replaced.
    late: RwLock<Option<LateHook>>,
}

impl Filesystem {
    /// Puts a filesystem on an open lower directory.
    pub fn new(
        lower: Lower,
        recorder: Recorder,
        options: FsOptions,
    ) -> std::result::Result<Arc<Self>, Error> {
        let table = Table::new(lower.ino());
        Ok(Arc::new(Self {
            descriptors: Descriptors::new(options.descriptors),
            table,
            lower,
            recorder,
            options,
            namespace: RwLock::new(()),
            cuts: Mutex::new(Vec::new()),
            open_cuts: AtomicUsize::new(0),
            changed: Mutex::new(Changed::default()),
            names_changed: AtomicU64::new(0),
            poisoned: OnceLock::new(),
            door: Arc::new(Registry::default()),
            problems: Problems::default(),
            stale: RwLock::new(None),
            late: RwLock::new(None),
        }))
    }

    /// The covered directory.
    pub fn lower(&self) -> &Lower {
        &self.lower
    }

    /// The inode number of the root.
    pub fn root(&self) -> Ino {
        self.lower.ino()
    }

    /// How many nodes are known at present.
    pub fn known_nodes(&self) -> usize {
        self.table.len()
    }

    /// The regular files that a program may have stored to through a mapping, by one path
    /// each: those that the kernel knows and has read or written.
    pub fn paged_files(&self) -> Vec<RelPath> {
        self.table.files()
    }

    /// Sets what is called for a node whose attributes changed as a side effect that
    /// the kernel does not expect: before the request that had it is answered, and
    /// with locks held. It must not wait for any other request.
    pub fn on_stale_attributes(&self, hook: Option<StaleHook>) {
        *self.stale.write() = hook;
    }

    /// What the user should know about, by path.
    pub fn problems(&self) -> Vec<(RelPath, String)> {
        self.problems.list()
    }
}

impl std::fmt::Debug for Filesystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filesystem")
            .field("lower", &self.lower)
            .field("known_nodes", &self.known_nodes())
            .finish_non_exhaustive()
    }
}
