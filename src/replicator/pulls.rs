//! The redo record of what a round brings into the mounted side's tree.
//!
//! Before the door gets to work, what it is going to do is written down: which inode goes
//! where, and what is to be gone. Afterwards, or at the next start of the daemon, a look at
//! the tree tells which of the steps have been taken. What a step has brought in is the
//! peer's own version, so that is what both sides have had in common last, and the base
//! moves on to it at once: if the round comes to no agreement, what is different from then
//! on is what somebody has changed since.
//!
//! The base is then ahead of the last agreement; the next one tells the peer of it.

use std::collections::HashMap;
use std::sync::Arc;

use mirrorfs_journal::{BaseChange, Durability, Journal, Origin, Update};
use serde::{Deserialize, Serialize};

use crate::fs::{Filesystem, StagedName};
use crate::replica::beneath::Place;
use crate::replica::keep::{Shelf, stamp};
use crate::replica::{Context, Reserved};
use crate::tree::{Content, Entry, Ino, PeerId, RelPath};

use super::Error;
use super::batch::Step;
use super::round::Round;
use super::scope::carried;
use super::setting::PerPeer;

/// A step that is about to be taken on the mounted side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Pull {
    /// Where the base has it.
    origin: RelPath,
    /// Where it is done.
    path: RelPath,
    /// What the peer shows there.
    remote: Option<Entry>,
    /// What was there before.
    before: Option<Ino>,
    made: Made,
}

/// How a step changes the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Made {
    /// What is there goes, and something staged takes its place.
    Placed {
        /// Its name in the staging directory.
        staged: StagedName,
        /// Its inode number.
        ino: Ino,
    },
    /// What is there goes.
    Gone,
    /// What is there gets the peer's mode, time and attributes.
    Meta,
}

impl Pull {
    /// The record of a step; none if nothing of the peer comes with it.
    pub(super) fn of(round: &Round, step: &Step, made: Made) -> Option<Self> {
        let (sides, _) = round.plan.decisions.get(&step.path)?;
        Some(Self {
            origin: round.moves.origin(&step.path)?,
            path: step.path.clone(),
            remote: sides.remote.clone(),
            before: round.locals.get(&step.path).map(|node| node.ino),
            made,
        })
    }
}

/// What another program wrote and this one cannot read is an edit, as if nothing had been
/// written down.
const ANNOUNCED: PerPeer<Vec<Pull>> = PerPeer::new("pulls");

/// Writes down what is about to be done. It is on disk once this returns, so that no step
/// can be without it.
pub(super) fn announce(
    journal: &Journal,
    reserved: &Arc<Reserved>,
    peer: PeerId,
    pulls: &[Pull],
) -> Result<(), Error> {
    if pulls.is_empty() {
        return Ok(());
    }
    let pulls = pulls.to_vec();
    let reserved = Arc::clone(reserved);
    journal.update(Durability::Full, move |update| {
        super::marks::advance(update, &reserved, None)?;
        ANNOUNCED.store(update, peer, &pulls)
    })?;
    Ok(())
}

/// Nothing is to be known any more of what a peer's rounds did.
pub(super) fn forget(update: &Update<'_>, peer: PeerId) -> Result<(), mirrorfs_journal::Error> {
    ANNOUNCED.forget(update, peer)
}

/// What a look at the staging directory says of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Staged {
    /// Nothing was staged, or it is still there.
    Waits,
    /// It is in the tree, or was.
    Left,
}

fn look(filesystem: &Filesystem, pull: &Pull) -> Result<Staged, Error> {
    Ok(match &pull.made {
        Made::Placed { staged, ino } if filesystem.staged(staged)? != Some(*ino) => Staged::Left,
        _ => Staged::Waits,
    })
}

/// Finds out which steps have been taken, and moves the base on to what they brought in.
/// To be called before anything further is heard from the peer: that is told from the base.
pub(super) fn settle(
    journal: &Journal,
    filesystem: &Filesystem,
    peer: PeerId,
    pulls: Vec<Pull>,
) -> Result<(), Error> {
    let looked = pulls.iter().map(|pull| look(filesystem, pull));
    let looked = looked.collect::<Result<Vec<_>, _>>()?;
    journal.update(Durability::Normal, move |update| {
        let mut changes = Vec::new();
        for (pull, staged) in pulls.iter().zip(looked) {
            changes.extend(outcome(update, peer, pull, staged)?);
        }
        update.advance_base(peer, &changes)?;
        forget(update, peer)
    })?;
    Ok(())
}

/// What a step has changed the base to; none if it has not been taken.
fn outcome(
    update: &Update<'_>,
    peer: PeerId,
    pull: &Pull,
    staged: Staged,
) -> Result<Option<BaseChange>, mirrorfs_journal::Error> {
    let base = update.base_at(peer, &pull.origin)?;
    let here = update.at(&pull.path)?;
    let gone = || {
        let path = pull.origin.clone();
        base.is_some().then_some(BaseChange::Remove { path })
    };
    let put = |node, entry| BaseChange::Put {
        path: pull.origin.clone(),
        node,
        entry,
    };
    Ok(match (&pull.made, &pull.remote) {
        (Made::Placed { ino, .. }, Some(remote)) if staged == Staged::Left => {
            let node = update.node_by_ino(*ino)?;
            let mut entry = remote.clone();
            // A directory gets a mode in which nothing can be put into it once it is
            // filled.
            if let Some(node) = &node
                && entry.content == Content::Directory
                && node.attr.mode & 0o7777 == entry.mode | 0o700
            {
                entry.mode |= 0o700;
            }
            Some(put(node.map(|node| node.id), entry))
        }
        (Made::Placed { .. } | Made::Gone, _) if is_still_there(update, peer, pull)? => None,
        // What was in its way may be gone already.
        (Made::Placed { .. }, _) if pull.before.is_some() && here.is_none() => gone(),
        (Made::Placed { .. }, _) => None,
        (Made::Gone, _) if here.as_ref().map(|node| node.ino) != pull.before => gone(),
        (Made::Gone, _) => None,
        (Made::Meta, Some(remote)) => {
            let here = here.filter(|node| Some(node.ino) == pull.before);
            let found = here.as_ref().and_then(|node| {
                let hash = match remote.content {
                    Content::File { hash, .. } => Some(hash),
                    _ => None,
                };
                carried(node, || hash)
            });
            match (base, found) {
                (Some(base), Some(found)) => {
                    // Its content is not looked at: the hash was taken from over there.
                    let entry = super::scope::in_common(&base.entry, &found, remote);
                    (entry != base.entry).then(|| put(base.node, entry))
                }
                _ => None,
            }
        }
        (Made::Meta, None) => None,
    })
}

/// Whether what a step was to take away is in the tree: where it was, or where somebody has
/// moved it or a directory that it is in. Then it has not been taken away.
fn is_still_there(
    update: &Update<'_>,
    peer: PeerId,
    pull: &Pull,
) -> Result<bool, mirrorfs_journal::Error> {
    let Some(before) = pull.before else {
        return Ok(false);
    };
    let Some(node) = update.node_by_ino(before)? else {
        return Ok(false);
    };
    // Of a file with several names one may be gone.
    let known = update.base_of(peer, node.id)?.len().max(1);
    Ok(update.paths(node.id)?.len() >= known)
}

/// What the daemon of an earlier life was doing in the name of which peer, for the scan of
/// its traces.
pub fn interrupted(
    journal: &Journal,
    filesystem: &Filesystem,
) -> Result<HashMap<Ino, Origin>, Error> {
    let snapshot = journal.snapshot()?;
    let mut authors = HashMap::new();
    for peer in snapshot.peers()? {
        for pull in ANNOUNCED.load(&snapshot, peer.id)? {
            let origin = Origin::Peer(peer.id);
            match &pull.made {
                Made::Placed { ino, .. } if look(filesystem, &pull)? == Staged::Left => {
                    authors.insert(*ino, origin);
                    authors.extend(pull.before.map(|before| (before, origin)));
                }
                Made::Gone => authors.extend(pull.before.map(|before| (before, origin))),
                Made::Placed { .. } | Made::Meta => {}
            }
        }
    }
    Ok(authors)
}

/// Settles what an earlier life of the daemon did not come to agree on. To be called after
/// the scan, and before the staging directory is cleaned: a version that was replaced may
/// still be there, on its way to the trash. After a power loss (not the `same_boot`) what is
/// not in staging may be nowhere: a step has been taken only if what it placed is in the tree.
pub fn settle_pulls(
    journal: &Journal,
    filesystem: &Filesystem,
    reserved: &Reserved,
    same_boot: bool,
) -> Result<(), Error> {
    let snapshot = journal.snapshot()?;
    for peer in snapshot.peers()? {
        let pulls = ANNOUNCED.load(&snapshot, peer.id)?;
        for pull in &pulls {
            if let Made::Placed { staged, ino } = &pull.made
                && filesystem
                    .staged(staged)?
                    .is_some_and(|there| there != *ino)
            {
                discard(reserved, staged, &pull.path)?;
            }
        }
        if pulls.is_empty() {
            continue;
        }
        tracing::info!(
            peer = peer.name,
            steps = pulls.len(),
            "broken off while a peer's changes were brought in"
        );
        let mut known = Vec::new();
        for pull in pulls {
            let lost = match &pull.made {
                Made::Placed { ino, .. } => !same_boot && snapshot.node_by_ino(*ino)?.is_none(),
                Made::Gone | Made::Meta => false,
            };
            known.extend((!lost).then_some(pull));
        }
        settle(journal, filesystem, peer.id, known)?;
    }
    Ok(())
}

/// Moves what was replaced and is still in the staging directory to the trash.
fn discard(reserved: &Reserved, staged: &StagedName, path: &RelPath) -> Result<(), Error> {
    let name = format!("{}-{}", stamp(crate::clock::wall()), staged.as_str());
    let staging = reserved.staging();
    let kept = Shelf::new(reserved.trash(), name).keep(Place::new(&staging, staged.as_str()), path);
    let what = format!("{path}, which is in .mirrorfs/staging");
    Ok(kept.map(drop).context("move to the trash", what)?)
}
