//! Replication of a tree to one peer: the state machine, what it decides with, and the
//! task that carries its commands out.
//!
//! [`Machine`](machine::Machine) holds the order of things and does no I/O;
//! [`round`] takes a cut and decides what it leads to; `store` writes down what holds;
//! [`apply`] carries out what concerns the mounted side; the driver connects them, and
//! [`Handle`] is the daemon's hold on it.

pub mod apply;
pub mod batch;
mod brake;
pub mod conflict;
mod deltas;
mod doubts;
mod driver;
mod expected;
pub mod handle;
pub mod late;
mod link;
pub mod machine;
mod marks;
mod merge;
pub mod moves;
#[cfg(test)]
mod planning;
mod pulls;
mod repositories;
pub mod round;
pub mod scope;
mod setting;
mod store;
#[cfg(test)]
mod tests;
mod units;
mod work;

#[cfg(test)]
pub(crate) use driver::simulated::Stepped;

pub use apply::LocalTree;
pub use brake::{braked, found_on, scanned_on};
pub use conflict::{RemoteVersion, kept_name};
pub use doubts::{PowerLoss, power_loss};
pub use handle::{Connect, Context, FlushOutcome, Handle, PeerState, PeerStatus, Preview};
pub use late::{late, settle_late};
pub use marks::{Secured, check_marks, secure};
pub use pulls::{interrupted, settle_pulls};
pub use repositories::{UnitState, unit_state};
pub use round::{Resolution, Resume, Side};
#[cfg(test)]
pub(crate) use store::placing;
pub use store::{artefacts, forget_peer, renew_artefacts};

/// What went wrong on this side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The journal does not answer.
    #[error("journal: {0}")]
    Journal(#[from] mirrorfs_journal::Error),
    /// The filesystem does not answer.
    #[error("filesystem: {0}")]
    Filesystem(#[from] crate::fs::Error),
    /// The peer is not configured (any more).
    #[error("the peer is not configured any more")]
    UnknownPeer,
    /// The tree's reserved directory failed.
    #[error("{0}")]
    Replica(#[from] crate::replica::Error),
    /// The agent counts on an agreement that this side does not have.
    #[error("the agent counts on an agreement that this side does not have")]
    Unsettled,
    /// The kernel's random source failed.
    #[error("no random numbers from the kernel")]
    Random,
    /// A round was asked for before the peer reported anything.
    #[error("the peer has not reported its tree yet")]
    NothingReported,
    /// More changed while a cut was open than can be kept for it.
    #[error("too much changed while the tree was being looked at; it is looked at anew")]
    Abandoned,
    /// Something of ours could not be encoded.
    #[error("an internal record could not be encoded")]
    Unencodable,
    /// A thread of ours did not finish.
    #[error("a worker thread ended early: {0}")]
    Worker(String),
}
