//! One round: what was decided at a cut, and what it needs to be carried out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use mirrorfs_journal::{BaseChange, Conflict, Durability, Journal, Peer, Proposal, Snapshot, View};

use crate::fs::Cut;
use crate::reconcile::{Decision, Held, Plan, Policy, Sides, reconcile};
use crate::replica::delta::LEAST;
use crate::seeded::{self, Bug};
use crate::tree::git::{LARGEST_INDEX, meaning};
use crate::tree::{
    Agreement, Content, ContentHash, Entry, Id, Ino, NodeId, PeerId, RelPath, Timestamp,
};
use crate::wire::message::{Agreed, Divergence, Op, PIECE, Revision, ToAgent, row_weight};

use super::Error;
use super::batch::{Batch, Step, steps};
use super::brake::{Brakes, Ground};
use super::conflict::{Artefacts, RemoteVersion, kept_name};
use super::deltas::{Old, large_file, olds};
use super::doubts::Doubts;
use super::handle::Preview;
use super::machine::{Fetch, Planned};
use super::moves::Moves;
use super::scope::{LocalNode, Scope, Unsettled, gather};
use super::store;

/// Which side of a conflict a person wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The mounted side's version.
    Local,
    /// The peer's version.
    Remote,
}

/// What a person decided about a conflict.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolution {
    /// Whose version wins.
    pub side: Side,
    /// The peer's version that was decided about. A newer one is not overwritten.
    pub remote: RemoteVersion,
    /// Artefacts go even if they were edited: to the trash, as all of them do.
    pub edited_too: bool,
}

/// What is to become of deletions that a brake holds back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// They are meant: delete on the other side too.
    AllowDeletions,
    /// They are not: bring back what is missing.
    Refill,
}

/// What a round is told beside what is stored.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    /// Which way changes travel.
    pub policy: Policy,
    /// What somebody said about deletions that a brake held back.
    pub resume: Option<Resume>,
    /// How many deletions on this side the round before held back to see whether more
    /// would come.
    pub deletions_before: Option<usize>,
    /// The files that the peer's deletions have taken from this side lately.
    pub deleted_lately: Vec<RelPath>,
    /// By how many files each of the last rounds has made the base grow, the oldest first.
    pub grown_lately: Vec<isize>,
    /// Conflicts that somebody resolved.
    pub resolutions: HashMap<RelPath, Resolution>,
    /// The local steps that were refused in the round before, each by itself.
    pub balked: BTreeSet<RelPath>,
    /// Make an agreement even if nothing has to be done.
    pub agree: bool,
    /// Several peers are configured, so artefacts carry this one's name.
    pub name_artefacts: bool,
    /// Contents may be told by what the other side has, but for these, with which that
    /// failed; none where the other side knows nothing of it.
    pub like: Option<HashSet<ContentHash>>,
    /// After so many things that the peer has to make, the rest is left to another round.
    pub most: Option<usize>,
}

/// A conflict that this round found, or whose remote version is new.
#[derive(Clone, Debug)]
pub struct Found {
    /// The record to be stored.
    pub conflict: Conflict,
    /// The artefacts of an older remote version that nobody edited.
    pub superseded: Vec<(RelPath, LocalNode)>,
    /// Those that somebody edited.
    pub edited: Vec<RelPath>,
    /// Of a Git directory: what the peer has changed in it.
    pub unit: Vec<(RelPath, Entry)>,
    /// What is kept of an older version of the peer's Git directory.
    pub outdated: Option<String>,
}

impl Found {
    /// What of the peer's version is to be kept on this side.
    fn remote_files(&self) -> impl Iterator<Item = (&RelPath, &Entry)> {
        let path = &self.conflict.path;
        let whole = self.conflict.remote.as_ref().map(|entry| (path, entry));
        whole
            .into_iter()
            .chain(self.unit.iter().map(|(path, entry)| (path, entry)))
    }
}

/// A conflict that is over, with the artefacts that nobody edited.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its key.
    pub id: i64,
    /// What can go.
    pub artefacts: Vec<(RelPath, LocalNode)>,
    /// What is kept of the peer's Git directory, and can go too.
    pub kept: Option<String>,
}

/// Where a content can be read as it was at the cut.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file's path at the cut.
    pub path: RelPath,
    /// Its inode.
    pub ino: Ino,
    /// Its size at the cut, in bytes.
    pub size: u64,
}

/// See the module's documentation.
pub struct Round {
    /// The peer as it was stored when the round began.
    pub peer: Peer,
    /// The cut, for as long as contents may have to be read from it.
    pub cut: Cut,
    /// What each name shows, and what becomes of it.
    pub plan: Plan,
    /// From base coordinates to final ones.
    pub moves: Moves,
    /// The local nodes in scope.
    pub locals: HashMap<RelPath, LocalNode>,
    /// Observations that were decided on, in base coordinates.
    pub observed: Vec<(RelPath, Option<Entry>)>,
    /// Steps on the mounted side.
    pub local_steps: Vec<Step>,
    /// Steps on the peer, and the base after them.
    pub batch: Batch,
    /// What the base has been changed to since the last agreement, in base coordinates: by
    /// earlier rounds, and, once they have been taken, by the steps of this one.
    pub advanced: Vec<BaseChange>,
    /// Contents that are to be had on this side, by hash.
    pub sources: HashMap<ContentHash, Source>,
    /// What those that are sent may be told by.
    pub olds: HashMap<ContentHash, Old>,
    /// The content of this side that each may be told by that is fetched.
    pub fetched_like: HashMap<ContentHash, ContentHash>,
    /// Versions of conflicts that the peer keeps already.
    pub kept: store::Kept,
    /// Conflicts to be noted.
    pub found: Vec<Found>,
    /// Conflicts that end.
    pub resolved: Vec<Resolved>,
    /// Conflicts whose directory was moved, under their new paths.
    pub moved: Vec<Conflict>,
    /// What stays to be looked at.
    pub unsettled: Unsettled,
    /// Files that could not be read, and steps that did not take place.
    pub problems: Vec<(RelPath, String)>,
    /// The brakes as the round leaves them.
    pub(super) brakes: Brakes,
    /// Whether it found them in another state.
    pub(super) brakes_are_news: bool,
    /// How many deletions on this side were held back to see whether more will come.
    pub gathering: Option<usize>,
    /// The agreement to be made.
    pub agreement: Agreement,
    /// The batch's identity.
    pub id: Id,
    /// The cursor once the round is over.
    pub cursor: u64,
    /// The last local change that the round has looked at, and left nothing of for another
    /// one but what a brake holds.
    pub covered: u64,
    /// The agent's reports that were taken into account.
    pub seen: Revision,
    /// The size of each content that has to be fetched.
    pub incoming: HashMap<ContentHash, u64>,
    /// Contents that could not be fetched.
    pub missing: HashSet<ContentHash>,
    /// Local steps that were refused.
    pub refused: BTreeSet<RelPath>,
    /// What local steps made, by path, with the number of the change.
    pub placed: HashMap<RelPath, (Ino, u64)>,
    /// What was refused by itself: of the round before, then of this one.
    pub balked: BTreeSet<RelPath>,
    /// Which way changes travel.
    pub policy: Policy,
    /// Whether that is another way than in earlier rounds, so that it looked at everything.
    pub policy_is_news: bool,
    /// What was left over by earlier rounds when it began.
    pub had_unsettled: Unsettled,
    /// Whether it leaves something for another round.
    pub more: bool,
    /// What it was told about deletions that a brake held back.
    pub resume: Option<Resume>,
    /// What it was told about conflicts.
    pub resolutions: HashMap<RelPath, Resolution>,
}

/// Takes a cut, gathers what may differ, and decides.
///
/// `reports` is held while the peer's reports are stored, and here until the snapshot is
/// there. So each report is either seen by this round, or stored by those rules that
/// hold while a round is under way.
pub fn plan(
    journal: &Journal,
    filesystem: &Arc<crate::fs::Filesystem>,
    peer: PeerId,
    orders: &Orders,
    reports: &Mutex<()>,
) -> Result<(Round, Planned), Error> {
    let (cut, snapshot) = {
        let _reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
        // What is left over of a round that failed would turn against what this one does.
        journal.update(Durability::Normal, move |update| {
            update.drop_equal_observations(peer)
        })?;
        let cut = filesystem.open_cut()?;
        let snapshot = journal.snapshot_at(cut.mark())?;
        (cut, snapshot)
    };
    let Some(peer) = snapshot.peer(peer)? else {
        return Err(Error::UnknownPeer);
    };
    let unsettled = load_unsettled(&snapshot, peer.id)?;
    let known_doubts = Doubts::load(&snapshot, peer.id)?;
    // What another policy has held back is looked at again.
    let policy_is_news = store::policy_is_news(&snapshot, peer.id, orders.policy)?;
    let looked_at = Peer {
        cursor: if policy_is_news { 0 } else { peer.cursor },
        ..peer.clone()
    };
    let mut conflicts: Vec<Conflict> = snapshot
        .conflicts()?
        .into_iter()
        .filter(|conflict| conflict.peer == peer.id)
        .collect();
    // Whatever is listed as an artefact stays local, whichever peer it stems from.
    let artefacts: BTreeSet<RelPath> = snapshot
        .conflicts()?
        .into_iter()
        .flat_map(|conflict| [conflict.copy, conflict.info])
        .flatten()
        .chain(store::placing(&snapshot)?)
        .collect();
    let mut hashed: Vec<(NodeId, u64, ContentHash)> = Vec::new();
    let mut scope = gather(
        &snapshot,
        &looked_at,
        (&unsettled, &known_doubts),
        &artefacts,
        &|path| orders.resolutions.contains_key(path),
        &mut |path, node| {
            let hash = hash_at(&cut, path, node.ino, node.attr.size)?;
            hashed.push((node.id, node.content_n, hash));
            Ok(hash)
        },
    )?;
    if cut.abandoned() {
        return Err(Error::Abandoned);
    }
    let mut doubts = known_doubts.clone();
    let stand = doubts.weigh(&snapshot, &peer, &mut scope)?;
    if !hashed.is_empty() || doubts != known_doubts {
        let peer = peer.id;
        journal.update(Durability::Normal, move |update| {
            for (node, content_n, hash) in hashed {
                update.set_hash(node, content_n, hash)?;
            }
            if doubts != known_doubts {
                doubts.store(update, peer)?;
            }
            Ok(())
        })?;
    }
    read_indexes(journal, &cut, &mut scope)?;
    let moved = follow(&mut conflicts, &scope.moves);
    let mut decided = reconcile(
        std::mem::take(&mut scope.sides),
        std::mem::take(&mut scope.git),
        orders.policy,
    );
    let in_doubt = stand.settle(&mut decided);
    if seeded::has(Bug::NewestWins) {
        settle_by_time(&mut decided);
    }
    let mut resolved = resolve(&snapshot, &mut decided, &conflicts, orders)?;
    let known_brakes = Brakes::load(&snapshot, peer.id)?;
    let mut brakes = known_brakes.clone();
    let ground = Ground {
        snapshot: &snapshot,
        peer: &looked_at,
        moves: &scope.moves,
        orders,
    };
    let gathering = brakes.judge(&mut decided, &ground)?;
    let found = find_conflicts(&snapshot, &peer, &decided, &conflicts, orders)?;
    let more = orders
        .most
        .is_some_and(|most| leave_for_later(&mut decided, &scope.moves, most));
    let mut over = Vec::new();
    for conflict in &conflicts {
        let open = match decided.decisions.get(&conflict.path) {
            Some((_, decision)) => *decision == Decision::Conflict,
            None => true,
        };
        if !open && !resolved.iter().any(|resolved| resolved.id == conflict.id) {
            resolved.push(Resolved {
                id: conflict.id,
                artefacts: unedited_artefacts(&snapshot, conflict)?,
                kept: conflict.unit.map(|_| kept_name(conflict)),
            });
            if conflict.unit.is_some() {
                over.push(conflict.path.clone());
            }
        }
    }
    let mut round = assemble(&snapshot, peer, cut, decided, scope, found, resolved)?;
    round.brakes_are_news = brakes != known_brakes;
    round.brakes = brakes;
    for unit in over {
        let removed = removed_objects(&snapshot, &round, &unit)?;
        round.unsettled.paths.extend(removed);
    }
    round.gathering = gathering;
    round.more = more;
    if more {
        // What is left comes up again.
        round.cursor = round.peer.cursor;
        round.covered = round.cursor;
    }
    round.moved = moved;
    round.resume = orders.resume;
    round.resolutions.clone_from(&orders.resolutions);
    round.balked.clone_from(&orders.balked);
    round.policy = orders.policy;
    round.policy_is_news = policy_is_news;
    round.had_unsettled = unsettled;
    if let Some(unlike) = &orders.like {
        round.olds = olds(&snapshot, &round, unlike)?;
    }
    let planned = summarise(&mut round, &snapshot, orders)?;
    round.problems.extend(in_doubt);
    round
        .cut
        .needs(round.sources.values().map(|source| source.ino).collect());
    Ok((round, planned))
}

/// What a program would do that trusts clocks.
fn settle_by_time(plan: &mut Plan) {
    let conflicts: Vec<(RelPath, bool)> = plan
        .decisions
        .iter()
        .filter_map(|(path, (sides, decision))| {
            let (local, remote) = (sides.local.as_ref()?, sides.remote.as_ref()?);
            (*decision == Decision::Conflict).then(|| (path.clone(), local.mtime < remote.mtime))
        })
        .collect();
    for (path, remote) in conflicts {
        if remote {
            plan.settle_for_remote(&path);
        } else {
            plan.settle_for_local(&path);
        }
    }
}

/// Takes what is only to be made on the peer, beyond a number, out of a plan. A batch has
/// to fit into the memory of both sides, and the first part of a large tree shall be there
/// before the last. Only what neither the peer nor the base knows can wait: nothing of it
/// is a moment that was there before. Returns whether anything was taken out.
fn leave_for_later(plan: &mut Plan, moves: &Moves, most: usize) -> bool {
    // Something may move into a directory that is new.
    let needed: HashSet<RelPath> = moves
        .iter()
        .flat_map(|step| std::iter::successors(step.to.parent(), RelPath::parent))
        .collect();
    let mut made = 0;
    let before = plan.decisions.len();
    plan.decisions.retain(|path, (sides, decision)| {
        let makes = sides.base.is_none()
            && sides.remote.is_none()
            && matches!(
                decision,
                Decision::Agree {
                    result: Some(_),
                    ..
                }
            );
        made += usize::from(makes);
        // Parents come before what is in them, so nothing stays without its parent.
        !makes || made <= most || needed.contains(path)
    });
    plan.decisions.len() < before
}

/// Brings conflicts whose artefacts went along with a moved directory to where they are
/// now. Returns those.
fn follow(conflicts: &mut [Conflict], moves: &Moves) -> Vec<Conflict> {
    let mut moved = Vec::new();
    for conflict in conflicts {
        let artefacts = [&conflict.copy, &conflict.info];
        let went_along = artefacts
            .into_iter()
            .flatten()
            .any(|path| moves.relocate(path) != *path);
        if went_along {
            conflict.path = moves.relocate(&conflict.path);
            for path in [&mut conflict.copy, &mut conflict.info] {
                *path = path.as_ref().map(|path| moves.relocate(path));
            }
            moved.push(conflict.clone());
        }
    }
    moved
}

/// Finds out what indexes of this side stage.
fn read_indexes(journal: &Journal, cut: &Cut, scope: &mut Scope) -> Result<(), Error> {
    let mut learned = Vec::new();
    for (path, hash) in std::mem::take(&mut scope.unknown_indexes) {
        let size = match scope.locals.get(&path) {
            Some(local) if local.attr.size <= LARGEST_INDEX => local.attr.size,
            _ => continue,
        };
        let read = scope
            .locals
            .get(&path)
            .map(|local| read_at(cut, &path, local.ino, size));
        if let Some(Ok(bytes)) = read
            && ContentHash::of(&bytes) == hash
            && let Some(meaning) = meaning(&bytes)
        {
            scope.git.meanings.insert(hash, meaning);
            learned.push((hash, meaning));
        }
    }
    if learned.is_empty() {
        return Ok(());
    }
    journal.update(Durability::Normal, move |update| {
        for (hash, meaning) in learned {
            update.set_meaning(hash, meaning)?;
        }
        Ok(())
    })?;
    Ok(())
}

pub(super) fn read_at(cut: &Cut, path: &RelPath, ino: Ino, size: u64) -> Result<Vec<u8>, String> {
    let file = cut.open(ino, path).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; usize::try_from(size).map_err(|error| error.to_string())?];
    let mut filled = 0;
    while filled < bytes.len() {
        let read = file
            .read_at(&mut bytes[filled..], filled as u64)
            .map_err(|error| error.to_string())?;
        if read == 0 {
            return Err(format!("ends at {filled} of {size} bytes"));
        }
        filled += read;
    }
    Ok(bytes)
}

/// The objects that are gone from this side of a Git directory whose conflict is over:
/// their removal was held back while it was open.
fn removed_objects(
    snapshot: &Snapshot,
    round: &Round,
    unit: &RelPath,
) -> Result<Vec<RelPath>, Error> {
    let mut removed = Vec::new();
    if let (Some(origin), Ok(objects)) = (round.moves.origin(unit), RelPath::new("objects")) {
        let below = objects.rebase(&RelPath::ROOT, &origin).unwrap_or(objects);
        for (path, _) in snapshot.base_below(round.peer.id, &below)? {
            let path = round.moves.relocate(&path);
            if snapshot.at(&path)?.is_none() {
                removed.push(path);
            }
        }
    }
    Ok(removed)
}

pub(super) fn load_unsettled(
    view: &View,
    peer: PeerId,
) -> Result<Unsettled, mirrorfs_journal::Error> {
    let stored = view.setting(&unsettled_key(peer))?;
    // What an older program wrote and this one cannot read costs a look at everything,
    // which the caller can ask for; it is no reason to stop.
    Ok(stored
        .and_then(|bytes| postcard::from_bytes(&bytes).ok())
        .unwrap_or_default())
}

/// The setting that holds a peer's [`Unsettled`].
pub fn unsettled_key(peer: PeerId) -> String {
    format!("unsettled.{}", peer.0)
}

fn hash_at(cut: &Cut, path: &RelPath, ino: Ino, size: u64) -> Result<ContentHash, String> {
    let file = cut.open(ino, path).map_err(|error| error.to_string())?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    while offset < size {
        let want = buffer
            .len()
            .min(usize::try_from(size - offset).unwrap_or(usize::MAX));
        let read = file
            .read_at(&mut buffer[..want], offset)
            .map_err(|error| error.to_string())?;
        if read == 0 {
            return Err(format!("ends at {offset} of {size} bytes"));
        }
        hasher.update(&buffer[..read]);
        offset += read as u64;
    }
    Ok(ContentHash(*hasher.finalize().as_bytes()))
}

/// Carries out what people decided: a removed `.conflict` file, or an order, means that
/// one side wins over exactly the version on record.
fn resolve(
    snapshot: &Snapshot,
    plan: &mut Plan,
    conflicts: &[Conflict],
    orders: &Orders,
) -> Result<Vec<Resolved>, Error> {
    let mut resolved = Vec::new();
    for conflict in conflicts {
        let Some((sides, decision)) = plan.decisions.get(&conflict.path) else {
            continue;
        };
        let recorded = RemoteVersion::recorded(conflict);
        if *decision != Decision::Conflict
            || RemoteVersion::planned(plan, &conflict.path, sides) != recorded
        {
            continue;
        }
        let removed = match &conflict.copy {
            Some(copy) => snapshot.at(copy)?.is_none(),
            None => false,
        };
        let order = orders
            .resolutions
            .get(&conflict.path)
            .filter(|order| order.remote == recorded);
        match order.map(|order| order.side) {
            Some(Side::Remote) => plan.settle_for_remote(&conflict.path),
            Some(Side::Local) => plan.settle_for_local(&conflict.path),
            None if removed => plan.settle_for_local(&conflict.path),
            None => continue,
        }
        let edited_too = order.is_some_and(|order| order.edited_too);
        resolved.push(Resolved {
            id: conflict.id,
            artefacts: disposable_artefacts(snapshot, conflict, edited_too)?,
            kept: conflict.unit.map(|_| kept_name(conflict)),
        });
    }
    Ok(resolved)
}

/// The artefacts of a conflict that still say what they said when they were made.
fn unedited_artefacts(
    snapshot: &Snapshot,
    conflict: &Conflict,
) -> Result<Vec<(RelPath, LocalNode)>, Error> {
    disposable_artefacts(snapshot, conflict, false)
}

/// The same, or all of them.
fn disposable_artefacts(
    snapshot: &Snapshot,
    conflict: &Conflict,
    edited_too: bool,
) -> Result<Vec<(RelPath, LocalNode)>, Error> {
    let mut unedited = Vec::new();
    for (path, is_copy) in [(&conflict.copy, true), (&conflict.info, false)] {
        let Some(path) = path else { continue };
        let Some(node) = snapshot.at(path)? else {
            continue;
        };
        if node.artefact && (edited_too || !is_copy || is_unedited_copy(conflict, &node)) {
            unedited.push((path.clone(), LocalNode::from(&node)));
        }
    }
    Ok(unedited)
}

/// Whether what lies at the place of a conflict's copy is the peer's version on record.
pub(crate) fn is_unedited_copy(conflict: &Conflict, node: &mirrorfs_journal::Node) -> bool {
    match conflict.remote.as_ref().map(|entry| &entry.content) {
        Some(Content::File { hash, .. }) => node.hash == Some(*hash),
        Some(Content::Symlink { target }) => node.target.as_ref() == Some(target),
        _ => false,
    }
}

fn find_conflicts(
    snapshot: &Snapshot,
    peer: &Peer,
    plan: &Plan,
    conflicts: &[Conflict],
    orders: &Orders,
) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    let now = crate::clock::wall();
    for (path, (sides, decision)) in &plan.decisions {
        if *decision != Decision::Conflict {
            continue;
        }
        let known = conflicts.iter().find(|conflict| conflict.path == *path);
        let version = RemoteVersion::planned(plan, path, sides);
        if known.is_some_and(|conflict| RemoteVersion::recorded(conflict) == version) {
            continue;
        }
        let superseded = match known {
            Some(conflict) => unedited_artefacts(snapshot, conflict)?,
            None => Vec::new(),
        };
        let mut edited = Vec::new();
        for artefact in known
            .into_iter()
            .flat_map(|conflict| [&conflict.copy, &conflict.info])
            .flatten()
        {
            let goes = superseded.iter().any(|(known, _)| known == artefact);
            // What is not there any more is nobody's file.
            if !goes && snapshot.at(artefact)?.is_some() {
                edited.push(artefact.clone());
            }
        }
        let name = orders.name_artefacts.then_some(peer.name.as_str());
        // Git must not find files there that are not its own, nor a work tree any that
        // come and go.
        let in_git = plan.git.units.contains(path) || plan.git.unit_of(path).is_some();
        let (unit, changed) = match version {
            RemoteVersion::Unit(unit) => (Some(unit), changed_there(plan, path)),
            RemoteVersion::Entry(_) => (None, Vec::new()),
        };
        let outdated = known
            .filter(|conflict| conflict.unit.is_some())
            .map(kept_name);
        let (since, names) = match in_git {
            true => (now, None),
            false => free_names(snapshot, path, name, now)?,
        };
        let is_directory = sides
            .remote
            .as_ref()
            .is_none_or(|entry| entry.content == Content::Directory);
        found.push(Found {
            conflict: Conflict {
                id: 0,
                peer: peer.id,
                path: path.clone(),
                base: sides.base.clone(),
                local: sides.local.clone(),
                remote: sides.remote.clone(),
                copy: names
                    .as_ref()
                    .filter(|_| !is_directory)
                    .map(|names| names.copy.clone()),
                info: names.map(|names| names.info),
                since,
                unit,
            },
            superseded,
            edited,
            unit: changed,
            outdated,
        });
    }
    Ok(found)
}

/// The files that the peer has changed in a Git directory.
fn changed_there(plan: &Plan, unit: &RelPath) -> Vec<(RelPath, Entry)> {
    plan.state_of(unit)
        .filter(|(path, sides)| {
            plan.git
                .changed(path, sides.base.as_ref(), sides.remote.as_ref())
        })
        .filter_map(|(path, sides)| Some((path.clone(), sides.remote.clone()?)))
        .filter(|(_, entry)| entry.content != Content::Directory)
        .collect()
}

/// This side's versions that the peer keeps while they are in conflict.
fn worth_keeping(plan: &Plan) -> Vec<(&RelPath, &Entry)> {
    let mut worth = Vec::new();
    for (path, (sides, decision)) in &plan.decisions {
        if *decision != Decision::Conflict {
            continue;
        }
        if plan.is_unit_in_conflict(path) {
            worth.extend(plan.state_of(path).filter_map(|(path, sides)| {
                let (local, remote) = (sides.local.as_ref(), sides.remote.as_ref());
                Some(path)
                    .zip(local)
                    .filter(|(path, _)| plan.git.changed(path, remote, local))
            }));
        } else {
            worth.extend(sides.local.as_ref().map(|local| (path, local)));
        }
    }
    worth.retain(|(_, entry)| entry.content != Content::Directory);
    worth
}

/// The names of a conflict's artefacts, with the moment that they carry: the first from
/// now on at which both are free. A version that is superseded within a second still has
/// the names of that one.
fn free_names(
    snapshot: &Snapshot,
    path: &RelPath,
    peer: Option<&str>,
    now: Timestamp,
) -> Result<(Timestamp, Option<Artefacts>), Error> {
    let mut at = now;
    loop {
        let Ok(names) = Artefacts::beside(path, peer, at) else {
            return Ok((now, None));
        };
        if snapshot.at(&names.copy)?.is_none() && snapshot.at(&names.info)?.is_none() {
            return Ok((at, Some(names)));
        }
        at.secs += 1;
    }
}

fn assemble(
    snapshot: &Snapshot,
    peer: Peer,
    cut: Cut,
    plan: Plan,
    scope: Scope,
    found: Vec<Found>,
    resolved: Vec<Resolved>,
) -> Result<Round, Error> {
    let nodes = scope
        .locals
        .iter()
        .map(|(path, local)| (path.clone(), local.node))
        .collect();
    let mut batch = Batch::new(&plan, &scope.moves, &nodes);
    // The peer keeps this side's version of every conflict, so that it survives this
    // machine.
    let kept = store::kept(snapshot, peer.id)?;
    for (path, local) in worth_keeping(&plan) {
        if kept.get(path) != Some(&local.content) {
            batch.ops.push(Op::KeepConflict {
                path: path.clone(),
                entry: local.clone(),
            });
        }
    }
    let mut sources = HashMap::new();
    for (path, (sides, _)) in &plan.decisions {
        if let Some(Entry {
            content: Content::File { size, hash },
            ..
        }) = &sides.local
            && let Some(local) = scope.locals.get(path)
        {
            let source = Source {
                path: path.clone(),
                ino: local.ino,
                size: *size,
            };
            sources.entry(*hash).or_insert(source);
        }
    }
    let advanced = snapshot.advanced(peer.id)?;
    let (Ok(nonce), Ok(id)) = (Id::random(), Id::random()) else {
        return Err(Error::Random);
    };
    let agreement = Agreement {
        number: peer.agreement.map_or(0, |last| last.number) + 1,
        nonce,
        previous: peer.agreement.map(|last| last.nonce),
    };
    let seen = match peer.seen {
        Some((epoch, rev)) => Revision { epoch, rev },
        None => return Err(Error::NothingReported),
    };
    let unsettled = Unsettled {
        nodes: scope.unreadable.iter().map(|(node, _, _)| *node).collect(),
        paths: BTreeSet::new(),
    };
    let problems = scope
        .unreadable
        .into_iter()
        .map(|(_, path, reason)| (path, reason))
        .collect();
    // Local deletions that are held back must come up again: they are known from the
    // changes alone.
    let held_here = plan
        .decisions
        .values()
        .any(|(sides, decision)| *decision == Decision::Hold(Held::Brake) && sides.local.is_none());
    let cursor = if held_here { peer.cursor } else { snapshot.n() };
    Ok(Round {
        local_steps: steps(&plan, |sides: &Sides| &sides.local),
        peer,
        cut,
        plan,
        moves: scope.moves,
        locals: scope.locals,
        observed: scope.observed,
        batch,
        advanced,
        sources,
        olds: HashMap::new(),
        fetched_like: HashMap::new(),
        kept,
        found,
        resolved,
        moved: Vec::new(),
        unsettled,
        problems,
        brakes: Brakes::default(),
        brakes_are_news: false,
        gathering: None,
        agreement,
        id,
        cursor,
        covered: snapshot.n(),
        seen,
        incoming: HashMap::new(),
        missing: HashSet::new(),
        refused: BTreeSet::new(),
        balked: BTreeSet::new(),
        placed: HashMap::new(),
        policy: Policy::TwoWay,
        policy_is_news: false,
        had_unsettled: Unsettled::default(),
        more: false,
        resume: None,
        resolutions: HashMap::new(),
    })
}

/// What the state machine has to know, and which contents come from where.
fn summarise(round: &mut Round, snapshot: &Snapshot, orders: &Orders) -> Result<Planned, Error> {
    let mut fetches: BTreeMap<ContentHash, Fetch> = BTreeMap::new();
    let mut incoming: Vec<(RelPath, ContentHash, u64, Option<Entry>)> = Vec::new();
    for step in &round.local_steps {
        if let Some(Entry {
            content: Content::File { size, hash },
            ..
        }) = &step.after
            && step.before.as_ref().map(|before| &before.content)
                != step.after.as_ref().map(|after| &after.content)
        {
            incoming.push((step.path.clone(), *hash, *size, step.before.clone()));
        }
    }
    for found in &round.found {
        for (path, entry) in found.remote_files() {
            if let Content::File { size, hash } = entry.content {
                let sides = round.plan.decisions.get(path).map(|(sides, _)| sides);
                let local = sides.and_then(|sides| sides.local.clone());
                incoming.push((path.clone(), hash, size, local));
            }
        }
    }
    for (path, hash, size, here) in incoming {
        // A content that some file here has (the other half of the peer's rename) is
        // copied, not fetched.
        if !round.sources.contains_key(&hash) {
            // The peer still has it where the base has it.
            let path = round.moves.origin(&path).unwrap_or(path);
            round.incoming.insert(hash, size);
            let unlike = orders.like.as_ref();
            let old = unlike
                .filter(|unlike| size >= LEAST && !unlike.contains(&hash))
                .and_then(|_| large_file(here.as_ref()));
            if let Some((old, _)) = old {
                round.fetched_like.insert(hash, old);
            }
            fetches.entry(hash).or_insert(Fetch {
                path,
                hash,
                have: 0,
                old,
            });
        }
    }
    let changes_base = round.batch.base.iter().any(|(change, _)| match change {
        BaseChange::Put { path, entry, .. } => round
            .plan
            .decisions
            .get(path)
            .is_none_or(|(sides, _)| sides.base.as_ref() != Some(entry)),
        BaseChange::Remove { .. } | BaseChange::Move { .. } => true,
    });
    // The identity of a node may have changed without its content, as in an atomic save
    // of the same bytes.
    let mut identities = false;
    for (change, _) in &round.batch.base {
        if let BaseChange::Put {
            path,
            node: Some(node),
            ..
        } = change
            && let Some(base) = snapshot.base_at(round.peer.id, path)?
        {
            identities |= base.node != Some(*node);
        }
    }
    Ok(Planned {
        n: round.covered,
        fetches: fetches.into_values().collect(),
        local: !round.local_steps.is_empty()
            || !round.found.is_empty()
            || !round.resolved.is_empty(),
        ops: round.batch.ops.clone(),
        agree: changes_base
            || identities
            || !round.advanced.is_empty()
            || orders.agree
            || !round.resolved.is_empty()
            || round.peer.agreement.is_none(),
        batch: round.id,
        agreement: round.agreement,
        seen: round.seen,
        waiting: round.gathering.is_some(),
        unreadable: !round.problems.is_empty(),
        more: round.more,
    })
}

impl Round {
    /// The files that the round has deleted here.
    pub fn deleted(&self) -> impl Iterator<Item = &RelPath> {
        self.files_that(|before, after| before.is_some() && after.is_none())
    }

    /// By how many files the round has made the base grow.
    pub fn growth(&self) -> isize {
        self.plan.growth()
    }

    /// The files that the round has made here.
    pub fn created(&self) -> impl Iterator<Item = &RelPath> {
        self.files_that(|before, after| before.is_none() && after.is_some())
    }

    fn files_that(
        &self,
        changed: impl Fn(Option<&Entry>, Option<&Entry>) -> bool,
    ) -> impl Iterator<Item = &RelPath> {
        fn file(entry: &Option<Entry>) -> Option<&Entry> {
            let entry = entry.as_ref();
            entry.filter(|entry| entry.content != Content::Directory)
        }
        self.local_steps
            .iter()
            .filter(move |step| changed(file(&step.before), file(&step.after)))
            .map(|step| &step.path)
            .filter(|path| !self.refused.contains(*path))
    }

    /// The contents that the mounted side's steps and the copies of conflicts needed.
    pub fn staged_contents(&self) -> Vec<ContentHash> {
        let steps = self.local_steps.iter().filter_map(|step| {
            let changed = step.before.as_ref().map(|entry| &entry.content);
            step.after
                .as_ref()
                .map(|entry| &entry.content)
                .filter(|content| Some(*content) != changed)
        });
        let copies = self
            .found
            .iter()
            .flat_map(Found::remote_files)
            .map(|(_, entry)| &entry.content);
        steps
            .chain(copies)
            .filter_map(|content| match content {
                Content::File { hash, .. } => Some(*hash),
                _ => None,
            })
            .collect()
    }

    /// The base that both sides hold once the agent has applied everything, but for what
    /// this side refused; each change with the steps of the batch that it stands on.
    pub fn base(&self) -> impl Iterator<Item = &(BaseChange, Vec<u32>)> {
        self.batch.base.iter().filter(|(change, _)| match change {
            BaseChange::Put { path, .. } | BaseChange::Remove { path } => {
                !self.refused.contains(path)
            }
            BaseChange::Move { .. } => true,
        })
    }

    /// What the agreement changes in the base, for the agent, in pieces.
    pub fn agreed(&self) -> Vec<ToAgent> {
        let mut pieces = Vec::new();
        let (mut changes, mut bytes) = (Vec::new(), 0);
        let (mut agreed, mut told) = (Vec::new(), HashSet::new());
        for (change, on) in self.base() {
            let (change, weight) = match change {
                BaseChange::Put { path, entry, .. } => {
                    let sides = self.plan.decisions.get(path).map(|(sides, _)| sides);
                    if sides.is_some_and(|sides| sides.base.as_ref() == Some(entry)) {
                        continue;
                    }
                    told.insert(path);
                    let change = BaseChange::Put {
                        path: path.clone(),
                        node: None,
                        entry: entry.clone(),
                    };
                    (change, row_weight(path, Some(entry)))
                }
                BaseChange::Remove { path } => {
                    told.insert(path);
                    (change.clone(), row_weight(path, None))
                }
                BaseChange::Move { from, to } => (
                    change.clone(),
                    row_weight(from, None) + row_weight(to, None),
                ),
            };
            let step = match on.as_slice() {
                [at] => self.batch.ops.get(*at as usize).and_then(Op::agreed),
                _ => None,
            };
            agreed.push(match on.as_slice() {
                [at] if step.as_ref() == Some(&change) => (Agreed::Step(*at), 8),
                on => (Agreed::Other(change, on.to_vec()), weight),
            });
        }
        // What this side's base is ahead with comes first, from where the rest leads on.
        let ahead = self.advanced.iter().filter_map(|change| {
            let (path, entry) = match change {
                BaseChange::Put { path, entry, .. } => (path, Some(entry)),
                BaseChange::Remove { path } => (path, None),
                BaseChange::Move { to, .. } => (to, None),
            };
            let again = self.moves.is_empty() && told.contains(path);
            let agreed = Agreed::Other(change.clone(), Vec::new());
            (!again).then(|| (agreed, row_weight(path, entry)))
        });
        for (change, weight) in ahead.chain(agreed) {
            if bytes + weight > PIECE && !changes.is_empty() {
                pieces.push(ToAgent::Agreed {
                    batch: self.id,
                    changes: std::mem::take(&mut changes),
                });
                bytes = 0;
            }
            bytes += weight;
            changes.push(change);
        }
        if !changes.is_empty() {
            pieces.push(ToAgent::Agreed {
                batch: self.id,
                changes,
            });
        }
        pieces
    }

    /// Why deletions are held back, if they are, and what to do.
    pub fn braked(&self) -> Option<String> {
        self.brakes.reason(&self.peer.name)
    }

    /// What the round would do, for people.
    pub fn preview(&self) -> Vec<Preview> {
        let mut lines: Vec<Preview> = self
            .moves
            .iter()
            .map(|step| Preview {
                action: "push",
                change: format!("move from {}", step.from),
                path: step.to.clone(),
            })
            .collect();
        let verb = |step: &Step| match (&step.before, &step.after) {
            (None, _) => "create",
            (Some(_), None) => "delete",
            (Some(before), Some(after)) if before.content == after.content => "metadata",
            _ => "replace",
        };
        let pushes = steps(&self.plan, |sides: &Sides| &sides.remote);
        for (action, steps) in [("push", &pushes), ("pull", &self.local_steps)] {
            lines.extend(steps.iter().map(|step| Preview {
                action,
                change: verb(step).to_owned(),
                path: step.path.clone(),
            }));
        }
        for (path, (_, decision)) in &self.plan.decisions {
            let (action, change) = match decision {
                Decision::Agree { .. } | Decision::Leave => continue,
                Decision::Conflict => ("conflict", "changed on both sides"),
                Decision::Hold(Held::Policy) => ("held", "the mode does not let it travel"),
                Decision::Hold(Held::Brake) => ("held", "too many deletions at once"),
                Decision::Hold(Held::BelowConflict) => ("held", "below a conflict"),
                Decision::Hold(Held::Doubt) => ("held", "in doubt since the machine went down"),
            };
            lines.push(Preview {
                action,
                change: change.to_owned(),
                path: path.clone(),
            });
        }
        lines
    }

    /// The proposal to be written down before the agent is told to commit.
    pub fn proposal(&self, changes: Vec<BaseChange>) -> Proposal {
        Proposal {
            agreement: self.agreement,
            cursor: self.cursor,
            batch: self.id,
            seen: Some((self.seen.epoch, self.seen.rev)),
            changes,
        }
    }

    /// What is kept of Git directories and not needed any more once the round is over.
    pub fn outdated(&self) -> Vec<String> {
        let resolved = self.resolved.iter().filter_map(|over| over.kept.clone());
        let found = self.found.iter().filter_map(|found| found.outdated.clone());
        resolved.chain(found).collect()
    }

    /// What must be looked at again because a step did not take place.
    pub fn leave_unsettled(&mut self, diverged: &[Divergence]) {
        for divergence in diverged {
            match self.batch.ops.get(divergence.op as usize) {
                Some(Op::Park { .. }) | None => {}
                Some(
                    Op::Unpark { to: path, .. }
                    | Op::MakeDir { path, .. }
                    | Op::Put { path, .. }
                    | Op::SetMeta { path, .. }
                    | Op::Remove { path, .. }
                    | Op::RemoveDir { path }
                    | Op::KeepConflict { path, .. },
                ) => {
                    self.problems
                        .push((path.clone(), divergence.reason.clone()));
                    self.unsettled.paths.insert(path.clone());
                    if let Some(local) = self.locals.get(path) {
                        self.unsettled.nodes.insert(local.node);
                    }
                }
            }
        }
        self.unsettled.paths.extend(self.refused.iter().cloned());
    }
}

#[cfg(test)]
pub(crate) mod tests;
