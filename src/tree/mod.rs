//! What a tree consists of: entries and their metadata, scanning, content hashes,
//! and the rules for paths.
//!
//! The vocabulary itself lives in [`mirrorfs_journal::model`], because the journal
//! stores it; everything above the journal names it through this module.

pub mod git;
pub mod hash;
pub mod links;
pub mod reach;
pub mod scan;

pub use mirrorfs_journal::model::{
    Agreement, Attr, BadPath, Content, ContentHash, Entry, Epoch, Id, Ino, Kind, MirrorId,
    NAME_MAX, NodeId, PeerId, RelPath, ReplicaId, Seq, Timestamp, Xattrs,
};

/// The name in a tree's root that holds identity, staging and trash. Reserved: it is
/// not listed and not writable through the mount, and never mirrored.
pub const RESERVED: &[u8] = b".mirrorfs";
