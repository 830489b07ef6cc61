//! The journal of a mirrorfs tree: every change in order, the recorded tree, and
//! per peer the base that both sides last agreed on.
//!
//! The database holds observations, not work to do: what to do is computed from
//! them. This package is the only one that names SQLite.
//!
//! A [`Recorder`] takes changes and numbers them; one thread writes them, in groups;
//! a [`Snapshot`] shows everything up to a number and nothing after it; an [`Update`]
//! writes everything else, on the same thread and in the same order.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod apply;
mod chain;
mod change;
mod checkpoint;
mod coalesce;
mod codec;
mod contents;
mod error;
mod former;
pub mod index;
mod journal;
mod look;
pub mod model;
mod recorder;
mod room;
mod schema;
mod snapshot;
mod start;
mod update;
mod view;
mod writer;

pub use chain::{ChainLink, Common, LINKS_MAX, Marked, UNDO_MAX, base_without, last_common};
pub use change::{Change, Origin};
pub use contents::{Contents, LARGEST as LARGEST_CONTENT, kept_content};
pub use error::{Error, Poisoned};
pub use former::Former;
pub use journal::{DATABASE, Durability, Journal, JournalStatus};
pub use look::look;
pub use model::*;
pub use recorder::{Barrier, Mark, Recorder};
pub use snapshot::Snapshot;
pub use start::{Start, boot_id, boot_is_pretended};
pub use update::Update;
pub use view::{
    Base, BaseChange, Conflict, Event, EventKind, LostName, Node, Peer, Proposal, View, What,
};
