//! The record of late versions: files that a program went on writing to after a change of
//! the other side had replaced or removed them. Each lies in the tree beside what took its
//! place, as a file like any other that is mirrored like any other, and is an open conflict
//! until somebody removes it or moves it away.
//!
//! The one being brought in is noted before, with its name in the staging directory: if the
//! daemon dies with it there, the next one finds it.

use mirrorfs_journal::{Durability, Journal, Update, View};
use serde::{Deserialize, Serialize};

use crate::fs::{Filesystem, StagedName};
use crate::replica::beneath::Place;
use crate::replica::keep::Shelf;
use crate::replica::{Context, Reserved};
use crate::tree::{Ino, PeerId, RelPath, Timestamp};

use super::Error;

const KEY: &str = "late";
const MOVING: &str = "late.moving";
/// No more are put on record: the files are there all the same.
const MOST: usize = 1000;

/// A late version.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Late {
    /// The peer on which it was written; none for this side.
    pub on: Option<PeerId>,
    /// The path it had.
    pub path: RelPath,
    /// Where it is now.
    pub at: At,
    /// When it was noticed.
    pub since: Timestamp,
}

/// Where a late version is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum At {
    /// In the tree.
    Tree(RelPath),
    /// In `.mirrorfs/conflicts` of the side on which it was written: a Git directory gets no
    /// files that are not its own.
    Kept(RelPath),
}

/// A late version on its way into the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Moving {
    /// Its name in the staging directory.
    pub staged: StagedName,
    /// Its inode number.
    pub ino: Ino,
    /// What it will be.
    pub late: Late,
}

fn load<T: for<'a> Deserialize<'a> + Default>(
    view: &View,
    key: &str,
) -> Result<T, mirrorfs_journal::Error> {
    let stored = view.setting(key)?;
    // What cannot be read is not known: the files are in the tree all the same.
    Ok(stored
        .and_then(|bytes| postcard::from_bytes(&bytes).ok())
        .unwrap_or_default())
}

fn store<T: Serialize>(
    update: &Update<'_>,
    key: &str,
    value: &T,
) -> Result<(), mirrorfs_journal::Error> {
    let bytes = postcard::to_stdvec(value).map_err(mirrorfs_journal::Error::other)?;
    update.set_setting(key, &bytes)
}

/// Whether nobody has decided about it yet.
fn is_open(view: &View, late: &Late) -> Result<bool, mirrorfs_journal::Error> {
    let At::Tree(at) = &late.at else {
        return Ok(true);
    };
    if view.at(at)?.is_some() {
        return Ok(true);
    }
    // It may be on its way here.
    let Some(peer) = late.on else {
        return Ok(false);
    };
    if view.base_at(peer, at)?.is_some() {
        return Ok(false);
    }
    let pending = view.remote_pending(peer)?;
    Ok(pending
        .iter()
        .any(|(path, entry)| path == at && entry.is_some()))
}

/// The late versions that nobody has decided about.
pub fn late(view: &View) -> Result<Vec<Late>, mirrorfs_journal::Error> {
    let mut open = Vec::new();
    for late in load::<Vec<Late>>(view, KEY)? {
        if is_open(view, &late)? {
            open.push(late);
        }
    }
    Ok(open)
}

fn note(update: &Update<'_>, late: &Late) -> Result<(), mirrorfs_journal::Error> {
    let mut known = self::late(update)?;
    if known.len() >= MOST {
        return Ok(());
    }
    if known
        .iter()
        .any(|other| (other.on, &other.at) == (late.on, &late.at))
        || !is_open(update, late)?
    {
        return Ok(());
    }
    if let Some(peer) = late.on {
        let what = "written to there after a change from here had replaced it";
        update.note(peer, &late.path, what)?;
    }
    known.push(late.clone());
    store(update, KEY, &known)
}

/// A peer tells of a late version.
pub(super) fn told(journal: &Journal, late: Late) -> Result<(), Error> {
    journal.update(Durability::Normal, move |update| note(update, &late))?;
    Ok(())
}

/// Notes that a late version is about to be brought into the tree, durably.
pub fn announce(journal: &Journal, moving: Moving) -> Result<(), Error> {
    journal.update(Durability::Full, move |update| {
        store(update, MOVING, &Some(moving))
    })?;
    Ok(())
}

/// The one that was announced has been brought in, or was not: then `late` is none.
pub fn arrived(journal: &Journal, late: Option<Late>) -> Result<(), Error> {
    journal.update(Durability::Normal, move |update| {
        update.remove_setting(MOVING)?;
        match &late {
            Some(late) => note(update, late),
            None => Ok(()),
        }
    })?;
    Ok(())
}

/// Somebody has decided about a late version.
pub fn decided(journal: &Journal, late: &Late) -> Result<(), Error> {
    let over = late.clone();
    journal.update(Durability::Normal, move |update| {
        let mut known = self::late(update)?;
        known.retain(|late| *late != over);
        store(update, KEY, &known)
    })?;
    Ok(())
}

/// Nothing is to be known any more of what was written on a peer.
pub(super) fn forget(update: &Update<'_>, peer: PeerId) -> Result<(), mirrorfs_journal::Error> {
    let mut known = self::late(update)?;
    known.retain(|late| late.on != Some(peer));
    store(update, KEY, &known)
}

/// Finds out what became of the late version that an earlier life of the daemon was bringing
/// in. To be called after the scan, and before the staging directory is cleaned.
pub fn settle_late(
    journal: &Journal,
    filesystem: &Filesystem,
    reserved: &Reserved,
) -> Result<(), Error> {
    let snapshot = journal.snapshot()?;
    let Some(Moving { staged, ino, late }) = load::<Option<Moving>>(&snapshot, MOVING)? else {
        return Ok(());
    };
    if filesystem.staged(&staged)? == Some(ino) {
        put_back(reserved, &staged, &late.path)?;
        return arrived(journal, None);
    }
    let there = match &late.at {
        At::Tree(at) => snapshot.at(at)?.map(|node| node.ino),
        At::Kept(_) => None,
    };
    arrived(journal, (there == Some(ino)).then_some(late))
}

/// Moves a late version from the staging directory back to where it waits.
pub fn put_back(reserved: &Reserved, staged: &StagedName, path: &RelPath) -> Result<(), Error> {
    let staging = reserved.staging();
    let kept = Shelf::new(reserved.late(), staged.as_str())
        .keep(Place::new(&staging, staged.as_str()), path);
    let what = format!("a late version of {path}");
    Ok(kept.map(drop).context("move to .mirrorfs/late", what)?)
}
