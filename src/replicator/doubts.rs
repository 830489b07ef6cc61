//! What a power loss left in doubt on this side, and what a round does about it.
//!
//! It is neither a deletion nor an edit. Where the peer has what was recorded last, its copy
//! comes back and what is here goes to the trash. Otherwise what is here stands: it stays as
//! it is, and so does the peer's, until somebody changes it. What is missing comes back from
//! the peer that has the newest of it.

use std::collections::{BTreeMap, HashSet};

use mirrorfs_journal::{
    Durability, Journal, Peer, Snapshot, Start, Update, View, boot_id, boot_is_pretended,
};
use serde::{Deserialize, Serialize};

use super::scope::Scope;
use super::setting::PerPeer;
use super::{Error, marks};
use crate::fs::{Filesystem, Recorded, Suspects};
use crate::reconcile::{Decision, Held, Plan};
use crate::tree::{Content, Entry, NodeId, PeerId, RelPath};

/// The setting that names the life of the machine in which lower was last found to hold what
/// is recorded.
const VETTED: &str = "vetted";

/// The setting that says from which change on scans found what a power loss had done, while
/// it is not known yet what that is.
const SCANNED_FROM: &str = "scanned-from";

const TORN: &str = "it may be torn: the machine went down when it had just been written. It stays as it is on either side; save it again, or touch it, if it is right";
const MISSING: &str = "it is missing since the machine went down: it comes back from the peer that has the newest version of it";

/// A machine that went down under the tree: what was on record then.
pub struct PowerLoss {
    before: Snapshot,
    scanned_from: u64,
}

/// Finds out whether the machine went down since the tree was last in order. To be called
/// before the tree is scanned.
pub fn power_loss(journal: &Journal, start: &Start) -> Result<Option<PowerLoss>, Error> {
    let boot = boot_id()?;
    let before = journal.snapshot()?;
    let vetted = before.setting(VETTED)?;
    let another = match &vetted {
        Some(vetted) => vetted != boot.as_bytes(),
        None => !start.same_boot,
    };
    if start.fresh || start.clean || !another {
        if vetted.as_deref() != Some(boot.as_bytes()) {
            drop(before);
            journal.update(Durability::Full, move |update| {
                update.set_setting(VETTED, boot.as_bytes())
            })?;
        }
        return Ok(None);
    }
    // A scan that was cut off has recorded things already.
    let known = before.setting(SCANNED_FROM)?;
    let known = known.and_then(|bytes| bytes.try_into().ok());
    let scanned_from = known.map_or(before.n(), u64::from_le_bytes);
    journal.update(Durability::Full, move |update| {
        update.set_setting(SCANNED_FROM, &scanned_from.to_le_bytes())
    })?;
    Ok(Some(PowerLoss {
        before,
        scanned_from,
    }))
}

impl PowerLoss {
    /// Writes down what is in doubt. To be called after the scan, and before any peer is met.
    /// Returns how many names that are.
    pub fn doubt(self, journal: &Journal, filesystem: &Filesystem) -> Result<usize, Error> {
        let was = Recorded {
            before: &self.before,
            synced: marks::synced(&self.before)?,
            scanned_from: self.scanned_from,
            times_tell: !boot_is_pretended(),
        };
        let suspects = filesystem.suspects(journal, &was)?;
        let boot = boot_id()?;
        let most = journal.update(Durability::Full, move |update| {
            let mut most = 0;
            for peer in update.peers()? {
                let mut doubts = Doubts::load(update, peer.id)?;
                doubts.take(update, peer.id, &suspects)?;
                most = most.max(doubts.present.len() + doubts.missing.len());
                doubts.store(update, peer.id)?;
            }
            update.remove_setting(SCANNED_FROM)?;
            update.set_setting(VETTED, boot.as_bytes())?;
            Ok(most)
        })?;
        Ok(most)
    }
}

/// What is there and may be anything.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Doubt {
    changed_n: u64,
    last: Option<Content>,
    gone: bool,
    torn: bool,
}

/// What is in doubt between this side and one peer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Doubts {
    present: BTreeMap<NodeId, Doubt>,
    /// In base coordinates, with what was there last.
    missing: BTreeMap<RelPath, Option<Content>>,
}

const STORED: PerPeer<Doubts> = PerPeer::new("doubts");

/// What became of a doubt in a round.
enum Weighed {
    /// The peer has what was recorded last.
    Remnant,
    /// Nobody knows better than what is here.
    Stands,
    /// Another peer knows better.
    Waits,
}

/// Names whose local leg is another than what is there while the round is decided.
pub(super) struct Stand(Vec<(RelPath, Option<Entry>, Weighed)>);

impl Doubts {
    pub(super) fn load(view: &View, peer: PeerId) -> Result<Self, mirrorfs_journal::Error> {
        STORED.load(view, peer)
    }

    pub(super) fn store(
        &self,
        update: &Update<'_>,
        peer: PeerId,
    ) -> Result<(), mirrorfs_journal::Error> {
        STORED.store(update, peer, self)
    }

    /// Forgets them, with their peer.
    pub(super) fn forget(update: &Update<'_>, peer: PeerId) -> Result<(), mirrorfs_journal::Error> {
        STORED.forget(update, peer)
    }

    fn take(
        &mut self,
        view: &View,
        peer: PeerId,
        suspects: &Suspects,
    ) -> Result<(), mirrorfs_journal::Error> {
        for suspect in &suspects.present {
            let doubt = Doubt {
                changed_n: suspect.changed_n,
                last: suspect.last.clone(),
                gone: suspect.gone,
                torn: suspect.torn,
            };
            self.present.insert(suspect.node, doubt);
        }
        for missing in &suspects.missing {
            let known = view.base_of(peer, missing.node)?.into_iter();
            let mut paths: Vec<RelPath> = known.map(|(path, _)| path).collect();
            if let Some(path) = &missing.path
                && view.base_at(peer, path)?.is_some()
            {
                paths.push(path.clone());
            }
            for path in paths {
                self.missing.insert(path, missing.last.clone());
            }
        }
        Ok(())
    }

    /// The nodes to look at.
    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.present.keys().copied()
    }

    /// The paths to look at, in base coordinates.
    pub(super) fn paths(&self) -> impl Iterator<Item = &RelPath> {
        self.missing.keys()
    }

    /// Puts what both sides last agreed on in the place of what is in doubt, and forgets
    /// doubts that are none any more.
    pub(super) fn weigh(
        &mut self,
        snapshot: &Snapshot,
        peer: &Peer,
        scope: &mut Scope,
    ) -> Result<Stand, Error> {
        let mut stand = Vec::new();
        for (path, sides) in &mut scope.sides {
            let Some(id) = scope.locals.get(path).map(|local| local.node) else {
                continue;
            };
            let (Some(doubt), Some(local)) = (self.present.get(&id), &sides.local) else {
                continue;
            };
            let shows = |entry: &Option<Entry>| {
                let entry = entry.as_ref();
                entry.is_some_and(|entry| entry.content == local.content)
            };
            let touched = snapshot.node(id)?.map(|node| node.changed_n) != Some(doubt.changed_n);
            let base = sides.base.as_ref().map(|base| &base.content);
            let acknowledged = doubt.last.as_ref() == base && (doubt.gone || doubt.last.is_some());
            // Mode and time may be remnants as well.
            let as_agreed = match acknowledged {
                true => sides.base.as_ref() == Some(local),
                false => shows(&sides.base),
            };
            if touched || as_agreed {
                self.present.remove(&id);
                continue;
            }
            let weighed = if acknowledged {
                Weighed::Remnant
            } else if local.content == Content::Directory || shows(&sides.remote) {
                continue;
            } else if doubt.torn || base.is_some() || sides.remote.is_some() {
                Weighed::Stands
            } else {
                continue;
            };
            let actual = std::mem::replace(&mut sides.local, sides.base.clone());
            stand.push((path.clone(), actual, weighed));
        }
        let mut looked_at = HashSet::new();
        for (origin, last) in self.missing.clone() {
            let path = scope.moves.relocate(&origin);
            let Some(sides) = scope.sides.get_mut(&path) else {
                continue;
            };
            if !looked_at.insert(path.clone()) {
                continue;
            }
            let is_there = scope.locals.contains_key(&path);
            if is_there || sides.base.is_none() {
                self.missing.remove(&origin);
                continue;
            }
            let weighed = match better(snapshot, peer, &origin, last.as_ref())? {
                true => Weighed::Waits,
                false => Weighed::Remnant,
            };
            let actual = std::mem::replace(&mut sides.local, sides.base.clone());
            stand.push((path, actual, weighed));
        }
        self.follow(scope);
        Ok(Stand(stand))
    }

    /// A directory that is moved takes along what is missing in it. Whether the peer follows
    /// is not certain yet.
    fn follow(&mut self, scope: &Scope) {
        let moved: Vec<_> = self
            .missing
            .iter()
            .map(|(path, last)| (scope.moves.relocate(path), last.clone()))
            .filter(|(path, _)| !self.missing.contains_key(path))
            .collect();
        self.missing.extend(moved);
    }
}

/// Whether another peer has a newer version of what is missing here.
fn better(
    snapshot: &Snapshot,
    peer: &Peer,
    path: &RelPath,
    last: Option<&Content>,
) -> Result<bool, Error> {
    let has_last = |id| -> Result<bool, Error> {
        let base = snapshot.base_at(id, path)?;
        Ok(last.is_some() && base.as_ref().map(|base| &base.entry.content) == last)
    };
    if has_last(peer.id)? {
        return Ok(false);
    }
    for other in snapshot.peers()? {
        if other.id != peer.id
            && (has_last(other.id)?
                || other.cursor > peer.cursor && snapshot.base_at(other.id, path)?.is_some())
        {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Stand {
    /// Gives the names their local leg back, and takes back what would have been done to
    /// those that stand. Returns what a person has to know.
    pub(super) fn settle(self, plan: &mut Plan) -> Vec<(RelPath, String)> {
        let mut told = Vec::new();
        for (path, actual, weighed) in self.0 {
            let in_unit = plan.git.unit_of(&path).is_some();
            let Some((sides, decision)) = plan.decisions.get_mut(&path) else {
                continue;
            };
            let agreed = sides.local.take().map(|base| base.content);
            let theirs = sides.remote.as_ref().map(|remote| &remote.content);
            let peer_changed = theirs.is_some() && theirs != agreed.as_ref();
            sides.local = actual;
            if !matches!(decision, Decision::Agree { .. }) {
                continue;
            }
            let why = match weighed {
                Weighed::Remnant => continue,
                // The repository as the peer has it is a sound one.
                Weighed::Stands if peer_changed && in_unit => continue,
                Weighed::Stands if peer_changed => {
                    *decision = Decision::Conflict;
                    continue;
                }
                Weighed::Waits if peer_changed => continue,
                Weighed::Stands => TORN,
                Weighed::Waits => MISSING,
            };
            plan.hold(&path, Held::Doubt);
            told.push((path, why.to_owned()));
        }
        told
    }
}

#[cfg(test)]
mod tests;
