//! The brakes: deletions that were inferred and are suspiciously many, and the emptying of
//! a tree, are held until somebody says what they are.
//!
//! A brake that is engaged is on record in the journal. So it holds across restarts and
//! whatever else changes meanwhile, and is released by an order alone, or when nothing that
//! it holds is missing any more.

use std::collections::{BTreeSet, HashMap, HashSet};

use mirrorfs_journal::{Durability, Journal, Origin, Peer, Snapshot, Update, View};
use serde::{Deserialize, Serialize};

use super::Error;
use super::moves::Moves;
use super::round::{Orders, Resume};
use super::setting::PerPeer;
use crate::reconcile::{Decision, Plan, Sides};
use crate::tree::{Content, ContentHash, Entry, NodeId, PeerId, RelPath};

/// What a person can do about a brake.
const WAY_ON: &str = "mirrorfs resume --refill brings them back, --allow-deletions deletes them \
                      on both sides";

/// So many deletions are carried out as soon as they are reported.
const AT_ONCE: usize = 3;

/// So many files may go at once without anybody being asked.
const FEW: usize = 20;

/// What engaged a brake.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Cause {
    /// The peer has reported the deletions.
    Reported,
    /// A scan found the files missing, or nobody knows how they went.
    Missing,
    /// The tree was emptied through the mount, by changes up to this number.
    Emptied { upto: u64 },
    /// The tree was found on another disk than before.
    Elsewhere,
}

/// A brake that is engaged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Engaged {
    cause: Cause,
    /// How many files are gone.
    gone: usize,
    /// Out of how many.
    had: usize,
    /// Those that went before it was engaged.
    before: Vec<RelPath>,
}

const STORED: PerPeer<Brakes> = PerPeer::new("brake");

/// The brakes of one peer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Brakes {
    /// Of deletions on this side: what is gone from the peer.
    here: Option<Engaged>,
    /// Of deletions on the peer: what is gone from this side.
    there: Option<Engaged>,
}

/// What a round has to judge by.
pub(super) struct Ground<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) peer: &'a Peer,
    pub(super) moves: &'a Moves,
    pub(super) orders: &'a Orders,
}

impl Brakes {
    /// The brakes as they are on record.
    pub(super) fn load(view: &View, peer: PeerId) -> Result<Self, mirrorfs_journal::Error> {
        STORED.load(view, peer)
    }

    /// Puts them on record.
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

    /// Why something is held, and what to do, in a sentence; none if nothing is.
    pub(super) fn reason(&self, peer: &str) -> Option<String> {
        let here = self.here.as_ref().map(|Engaged { gone, had, .. }| {
            format!("{gone} of {had} files are gone from the peer {peer}: their deletion here is held back")
        });
        let there = self.there.as_ref().map(|Engaged { cause, gone, had, .. }| match cause {
            Cause::Emptied { .. } => format!(
                "the tree was emptied: the deletion of {gone} files from the peer {peer} is held back"
            ),
            Cause::Elsewhere => format!(
                "another disk is in the tree's place, and {gone} files are missing on it: their deletion from the peer {peer} is held back"
            ),
            Cause::Missing | Cause::Reported => format!(
                "{gone} of {had} files were found missing here: their deletion from the peer {peer} is held back"
            ),
        });
        let reasons: Vec<String> = here.into_iter().chain(there).collect();
        (!reasons.is_empty()).then(|| format!("{}; {WAY_ON}", reasons.join(", and ")))
    }

    /// The files that a wipe on the peer had taken from this side before it was seen to be
    /// one.
    pub(super) fn wiped(&self) -> &[RelPath] {
        self.here.as_ref().map_or(&[], |here| &here.before)
    }

    /// Takes deletions that are to be held out of a plan, engages and releases. Returns how
    /// many are held for this round only, to see whether more will come.
    pub(super) fn judge(
        &mut self,
        plan: &mut Plan,
        ground: &Ground<'_>,
    ) -> Result<Option<usize>, Error> {
        let gathering = self.judge_here(plan, ground)?;
        self.judge_there(plan, ground)?;
        Ok(gathering)
    }

    /// What is gone from the peer. Each deletion there is inferred.
    fn judge_here(&mut self, plan: &mut Plan, ground: &Ground<'_>) -> Result<Option<usize>, Error> {
        let orders = ground.orders;
        let before = &orders.deleted_lately;
        let missing = pending(plan, |sides| &sides.local, |sides| &sides.remote).len();
        if orders.resume == Some(Resume::AllowDeletions) || missing == 0 {
            self.here = None;
            return Ok(None);
        }
        if let Some(here) = &mut self.here {
            if orders.resume == Some(Resume::Refill) {
                plan.undo_remote_deletions();
                self.here = None;
            } else {
                here.gone = here.gone.max(missing + here.before.len());
                plan.brake_local_deletions();
            }
            return Ok(None);
        }
        let deletions = plan.local_deletions();
        // A tree that is being wiped is reported piece by piece, and no piece may be many. So
        // deletions beyond a few wait until no more of them come, and a wipe that takes its
        // time is one wipe.
        let lost =
            deletions.saturating_sub(moved(plan, |sides| &sides.local, |sides| &sides.remote));
        let settled = orders.resume.is_some() || orders.deletions_before == Some(deletions);
        if lost > AT_ONCE && !settled {
            plan.brake_local_deletions();
            return Ok(Some(deletions));
        }
        let gone = lost + before.len();
        if lost == 0 || gone <= AT_ONCE {
            return Ok(None);
        }
        let known = known_files(ground)? + before.len();
        let many = gone > FEW && gone > known / 2;
        if many || is_emptied(plan, ground)? {
            if orders.resume == Some(Resume::Refill) {
                plan.undo_remote_deletions();
                return Ok(None);
            }
            plan.brake_local_deletions();
            self.here = Some(Engaged {
                cause: Cause::Reported,
                gone,
                had: known,
                before: before.clone(),
            });
        }
        Ok(None)
    }

    /// What is gone from this side. Deletions that the mount saw are meant, but for the
    /// emptying of the tree.
    fn judge_there(&mut self, plan: &mut Plan, ground: &Ground<'_>) -> Result<(), Error> {
        let resume = ground.orders.resume;
        let missing = pending(plan, |sides| &sides.remote, |sides| &sides.local);
        if resume == Some(Resume::AllowDeletions) || missing.is_empty() {
            self.there = None;
            return Ok(());
        }
        let deletions = plan.remote_deletions();
        if self.there.is_none() {
            let bare = deletions > 0 && !ground.snapshot.has_files()?;
            let elsewhere = Elsewhere::load(ground.snapshot)?;
            if elsewhere.is_none() && deletions <= FEW && !bare {
                return Ok(());
            }
            let known = known_files(ground)?;
            // A tree that is emptied bit by bit is emptied all the same. One in which a file
            // or two come and go was never full.
            let had = most_lately(known, &ground.orders.grown_lately);
            let empty = bare && had > AT_ONCE;
            if elsewhere.is_none() && deletions <= known / 2 && !empty {
                return Ok(());
            }
            let gone = Gone::look(plan, ground)?;
            let inferred = missing.iter().filter(|path| gone.inferred(path)).count();
            let lost =
                inferred.saturating_sub(moved(plan, |sides| &sides.remote, |sides| &sides.local));
            let cause = if lost > FEW && lost > known / 2 || empty && inferred == missing.len() {
                Cause::Missing
            } else if empty {
                Cause::Emptied {
                    upto: ground.snapshot.n(),
                }
            } else if elsewhere
                .is_some_and(|found| missing.iter().any(|path| gone.found(path, found)))
            {
                Cause::Elsewhere
            } else {
                return Ok(());
            };
            self.there = Some(Engaged {
                cause,
                gone: 0,
                had,
                before: Vec::new(),
            });
        }
        let Some(there) = &mut self.there else {
            return Ok(());
        };
        let gone = Gone::look(plan, ground)?;
        let held = |path: &RelPath| gone.inferred(path) || gone.upto(path, there.cause);
        let count = missing.iter().filter(|path| held(path)).count();
        if count == 0 {
            self.there = None;
        } else if resume == Some(Resume::Refill) {
            plan.undo_local_deletions(held);
            self.there = None;
        } else {
            plan.brake_remote_deletions(held);
            there.gone = there.gone.max(count);
        }
        Ok(())
    }
}

/// The setting that names the filesystem that the tree was last found on.
const DISK: &str = "disk";

/// The setting that holds [`Elsewhere`].
const ELSEWHERE: &str = "elsewhere";

/// The scan that found the tree on another disk than before, by the numbers of the changes
/// that it recorded.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Elsewhere {
    after: u64,
    upto: u64,
}

impl Elsewhere {
    fn load(view: &View) -> Result<Option<Self>, mirrorfs_journal::Error> {
        let stored = view.setting(ELSEWHERE)?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }

    fn store(self, update: &Update<'_>) -> Result<(), mirrorfs_journal::Error> {
        let found = postcard::to_stdvec(&self).map_err(mirrorfs_journal::Error::other)?;
        update.set_setting(ELSEWHERE, &found)
    }
}

/// Notes on which disk the tree is found, before it is scanned. What the scan finds missing on
/// another one than before is held, however little it is. Returns whether it is another one.
pub fn found_on(journal: &Journal, disk: u64) -> Result<bool, Error> {
    let elsewhere = journal.update(Durability::Full, move |update| {
        let disk = disk.to_le_bytes();
        match update.setting(DISK)? {
            Some(known) if known == disk => return Ok(false),
            Some(_) => {}
            None => return update.set_setting(DISK, &disk).map(|()| false),
        }
        // A scan that was cut off has recorded things already.
        let before = Elsewhere::load(update)?.filter(|found| found.upto == u64::MAX);
        let after = before.map_or(update.n(), |before| before.after);
        let upto = u64::MAX;
        Elsewhere { after, upto }.store(update).map(|()| true)
    })?;
    Ok(elsewhere)
}

/// Notes that the tree has been scanned on the disk that it was [found on](found_on).
pub fn scanned_on(journal: &Journal, disk: u64) -> Result<(), Error> {
    journal.update(Durability::Full, move |update| {
        if let Some(Elsewhere {
            after,
            upto: u64::MAX,
        }) = Elsewhere::load(update)?
        {
            let upto = update.n();
            Elsewhere { after, upto }.store(update)?;
        }
        update.set_setting(DISK, &disk.to_le_bytes())
    })?;
    Ok(())
}

/// Why a brake holds something of a peer back, and what to do; none if none does.
pub fn braked(view: &View, peer: &Peer) -> Result<Option<String>, mirrorfs_journal::Error> {
    Ok(Brakes::load(view, peer.id)?.reason(&peer.name))
}

fn known_files(ground: &Ground<'_>) -> Result<usize, Error> {
    let known = ground.snapshot.base_files(ground.peer.id)?;
    Ok(usize::try_from(known).unwrap_or(usize::MAX))
}

/// How many files the base had when it had the most, from how many it has now and by how
/// many each round made it grow.
fn most_lately(known: usize, grown: &[isize]) -> usize {
    let before = grown.iter().rev().scan(known, |files, growth| {
        *files = files.saturating_add_signed(growth.saturating_neg());
        Some(*files)
    });
    before.max().map_or(known, |most| most.max(known))
}

fn is_file(entry: &Option<Entry>) -> bool {
    let entry = entry.as_ref();
    entry.is_some_and(|entry| entry.content != Content::Directory)
}

/// The files that both had agreed on, that one side has, and the other has not, whether
/// they are to be deleted now or held for whatever reason.
fn pending(
    plan: &Plan,
    keeper: impl Fn(&Sides) -> &Option<Entry>,
    other: impl Fn(&Sides) -> &Option<Entry>,
) -> BTreeSet<RelPath> {
    let pending = plan.decisions.iter().filter(|(_, (sides, decision))| {
        let waits = matches!(
            decision,
            Decision::Agree { result: None, .. } | Decision::Hold(_)
        );
        waits && sides.base.is_some() && is_file(keeper(sides)) && other(sides).is_none()
    });
    pending.map(|(path, _)| path.clone()).collect()
}

/// How many of the files that are to be deleted from one side the other has under a new
/// name.
fn moved(
    plan: &Plan,
    keeper: impl Fn(&Sides) -> &Option<Entry>,
    other: impl Fn(&Sides) -> &Option<Entry>,
) -> usize {
    fn hash(entry: &Option<Entry>) -> Option<ContentHash> {
        match entry.as_ref()?.content {
            Content::File { hash, .. } => Some(hash),
            _ => None,
        }
    }
    let mut new: HashMap<ContentHash, usize> = HashMap::new();
    for (sides, _) in plan.decisions.values() {
        if sides.base.is_none()
            && keeper(sides).is_none()
            && let Some(hash) = hash(other(sides))
        {
            *new.entry(hash).or_default() += 1;
        }
    }
    let mut moved = 0;
    for (sides, decision) in plan.decisions.values() {
        if matches!(decision, Decision::Agree { result: None, .. })
            && let Some(hash) = hash(keeper(sides))
            && let Some(left) = new.get_mut(&hash).filter(|left| **left > 0)
        {
            *left -= 1;
            moved += 1;
        }
    }
    moved
}

/// Whether nothing at all is left on the peer.
fn is_emptied(plan: &Plan, ground: &Ground<'_>) -> Result<bool, Error> {
    let mut gone = 0;
    for (sides, _) in plan.decisions.values() {
        if sides.remote.is_some() {
            return Ok(false);
        }
        gone += u64::from(sides.base.is_some());
    }
    Ok(gone == ground.snapshot.base_count(ground.peer.id)?)
}

/// How what is missing here went.
struct Gone {
    nodes: HashMap<RelPath, NodeId>,
    last: HashMap<NodeId, (u64, Origin)>,
}

impl Gone {
    fn look(plan: &Plan, ground: &Ground<'_>) -> Result<Self, Error> {
        let Ground { snapshot, peer, .. } = ground;
        let mut nodes = HashMap::new();
        for (path, (sides, _)) in &plan.decisions {
            if sides.local.is_none()
                && sides.remote.is_some()
                && let Some(origin) = ground.moves.origin(path)
                && let Some(base) = snapshot.base_at(peer.id, &origin)?
                && let Some(node) = base.node
            {
                nodes.insert(path.clone(), node);
            }
        }
        let wanted: HashSet<NodeId> = nodes.values().copied().collect();
        let mut last = snapshot.last_changes(&wanted, peer.cursor)?;
        if last.len() < wanted.len() {
            // What was left over by an earlier round went before the cursor.
            last = snapshot.last_changes(&wanted, 0)?;
        }
        Ok(Self { nodes, last })
    }

    fn last(&self, path: &RelPath) -> Option<(u64, Origin)> {
        self.last.get(self.nodes.get(path)?).copied()
    }

    /// Whether nobody was seen deleting it.
    fn inferred(&self, path: &RelPath) -> bool {
        matches!(self.last(path), None | Some((_, Origin::Scan)))
    }

    /// Whether it was found missing when the tree was found elsewhere.
    fn found(&self, path: &RelPath, elsewhere: Elsewhere) -> bool {
        let Elsewhere { after, upto } = elsewhere;
        matches!(self.last(path), Some((n, Origin::Scan)) if after < n && n <= upto)
    }

    /// Whether it went when the tree was emptied.
    fn upto(&self, path: &RelPath, cause: Cause) -> bool {
        match (cause, self.last(path)) {
            (Cause::Emptied { upto }, Some((n, _))) => n <= upto,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::most_lately;

    #[test]
    fn what_comes_and_goes_was_never_much() {
        assert_eq!(most_lately(0, &[]), 0);
        assert_eq!(most_lately(1, &[1, -1, 1, -1, 1]), 1);
        assert_eq!(most_lately(0, &[1, -1, 1, -1]), 1);
        assert_eq!(most_lately(1, &[5, -3, -1]), 5);
        assert_eq!(most_lately(40, &[30, 10]), 40);
        // What happened before the window is not known, and nothing underflows.
        assert_eq!(most_lately(1, &[7]), 1);
    }
}
