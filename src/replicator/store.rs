//! What the replicator writes down, each step one transaction of the journal.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mirrorfs_journal::{BaseChange, ChainLink, Durability, Journal, Update, last_common};

use crate::reconcile::{Decision, Held, Policy};
use crate::replica::{Marks, Reserved};
use crate::seeded::{self, Bug};
use crate::tree::{Agreement, Content, ContentHash, Entry, Ino, PeerId, RelPath, ReplicaId};
use crate::wire::message::{
    AgentHello, BaseFrom, Divergence, MountHello, Observation, Op, PIECE, Revision, ToAgent,
    row_weight,
};

use serde::{Deserialize, Serialize};

use super::Error;
use super::brake::Brakes;
use super::round::{Found, Round, unsettled_key};
use super::scope::Unsettled;

/// What the hello of the mounted side says about the peer.
pub(super) fn hello(
    journal: &Journal,
    peer: PeerId,
    hello: MountHello,
) -> Result<MountHello, Error> {
    let snapshot = journal.snapshot()?;
    let Some(peer) = snapshot.peer(peer)? else {
        return Err(Error::UnknownPeer);
    };
    // A tree that is ahead of its base has to be talked about first.
    let based = !snapshot.lacks_base(peer.id)?;
    let proposed = peer.proposed.map(|proposal| proposal.agreement);
    let mut hello = MountHello {
        agreement: peer.agreement.filter(|_| based),
        proposed: proposed.filter(|_| based),
        seen: peer.seen.map(|(epoch, rev)| Revision { epoch, rev }),
        peer: peer.replica,
        ..hello
    };
    hello.set_life(snapshot.life()?);
    Ok(hello)
}

/// Which replica a peer is known to be, and which other peer `found` is known to be.
pub(super) fn expected(
    journal: &Journal,
    peer: PeerId,
    found: ReplicaId,
) -> Result<(Option<ReplicaId>, Option<String>), Error> {
    let peers = journal.snapshot()?.peers()?;
    let known = peers.iter().find(|known| known.id == peer);
    let other = peers
        .iter()
        .find(|other| other.id != peer && other.replica == Some(found));
    Ok((
        known.and_then(|known| known.replica),
        other.map(|other| other.name.clone()),
    ))
}

/// Where both sides stand once they have met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Standing {
    /// Local changes up to here are in the base.
    pub(super) cursor: u64,
    /// Up to here they are durable on the peer.
    pub(super) durable: u64,
}

/// Takes up what the agent says about agreements. Returns where both sides stand, or none
/// if they have to settle that first, by [`rejoin`].
///
/// Its last agreement is the one that is committed here: all is well, a proposal never
/// got there. It is the proposed one: the proposal was applied, only the answer was
/// lost. Anything else means that one side was rolled back or lost its state.
pub(super) fn meet(
    journal: &Journal,
    peer: PeerId,
    hello: &AgentHello,
) -> Result<Option<Standing>, Error> {
    let hello = hello.clone();
    let met = journal.update(Durability::Normal, move |update| {
        let Some(known) = update.peer(peer)? else {
            return Err(mirrorfs_journal::Error::other(Error::UnknownPeer));
        };
        update.set_peer_replica(peer, hello.replica)?;
        if !hello.settled {
            return Ok(None);
        }
        let proposed = known.proposed.map(|proposal| proposal.agreement);
        if proposed.is_some() && hello.agreement == proposed {
            let ops = hello
                .diverged
                .iter()
                .map(|divergence| divergence.op)
                .collect();
            // The round that proposed it is not there any more to leave this.
            // The report that follows has all that the agent has not told yet, the steps'
            // results with it.
            let mut left = accept_stored(update, peer, &ops, &[])?;
            left.extend(super::round::load_unsettled(update, peer)?);
            store_unsettled(update, peer, &left)?;
        } else if hello.agreement.is_some() && hello.agreement == known.agreement {
            update.withdraw(peer)?;
        } else {
            return Err(mirrorfs_journal::Error::other(Error::Unsettled));
        }
        if hello.whole {
            update.clear_observations(peer)?;
        }
        Ok(update.peer(peer)?.map(|peer| Standing {
            cursor: peer.cursor,
            durable: peer.durable,
        }))
    })?;
    Ok(met)
}

/// Finds the last agreement that both sides have gone through, by the agent's chain, and
/// goes back to it. `mark` is what this side's tree says about the peer. Returns what the
/// agent has to be told. If the base comes from there, [`take_base`] is to follow.
pub(super) fn rejoin(
    journal: &Journal,
    peer: PeerId,
    theirs: Vec<ChainLink>,
    mark: Option<Agreement>,
) -> Result<(Option<Agreement>, BaseFrom), Error> {
    let met = journal.update(Durability::Full, move |update| {
        let Some(known) = update.peer(peer)? else {
            return Err(mirrorfs_journal::Error::other(Error::UnknownPeer));
        };
        let mut ours = update.chain(peer)?;
        if let Some(replica) = known.replica
            && ours.is_empty()
            && update.take_former(peer, replica)?
        {
            // The mounted side that this directory was a peer of has come back. Of which time
            // the tree is now, it says itself.
            update.take_mark(peer, mark.as_ref())?;
            ours = update.chain(peer)?;
        }
        if ours.is_empty() {
            // The journal was lost, and the tree was not.
            ours.extend(mark.map(|agreement| ChainLink {
                agreement,
                based: false,
            }));
        }
        let common = last_common(&ours, &theirs);
        let news = known.agreement.is_some() || !ours.is_empty() || !theirs.is_empty();
        let number = common.map(|common| common.agreement.number);
        if news {
            tracing::warn!(
                peer = known.name,
                agreement = number,
                here = ours.first().map(|link| link.agreement.number),
                there = theirs.first().map(|link| link.agreement.number),
                "one side is of another time than the other: going on from the last agreement that both have gone through"
            );
        }
        let Some(common) = common else {
            update.reset_base(peer)?;
            super::marks::accept_mark(update, peer, None)?;
            return Ok((None, BaseFrom::Both));
        };
        super::marks::accept_mark(update, peer, mark)?;
        let at = common.agreement;
        if common.ours && update.rejoin(peer, &at)? {
            let base = if common.theirs {
                BaseFrom::Both
            } else {
                BaseFrom::Mount
            };
            return Ok((Some(at), base));
        }
        update.begin_base(peer)?;
        Ok((Some(at), BaseFrom::Agent))
    })?;
    Ok(met)
}

/// Stores rows of a base that comes from the agent; at the end of it, `complete` is the
/// agreement that it is the base of.
pub(super) fn take_base(
    journal: &Journal,
    peer: PeerId,
    rows: Vec<(RelPath, Entry)>,
    complete: Option<Agreement>,
) -> Result<(), Error> {
    journal.update(Durability::Full, move |update| {
        update.fill_base(peer, &rows)?;
        match complete {
            Some(at) => update.end_base(peer, &at),
            None => Ok(()),
        }
    })?;
    Ok(())
}

/// How many rows of a base are read at once.
const ROWS: u32 = 512;

/// The base of a peer in pieces, for an agent that lacks it.
pub(super) fn base_pieces(journal: &Journal, peer: PeerId) -> Result<Vec<ToAgent>, Error> {
    let snapshot = journal.snapshot()?;
    let mut pieces = Vec::new();
    let (mut rows, mut bytes, mut after) = (Vec::new(), 0, None);
    loop {
        let page = snapshot.base_page(peer, after.as_ref(), ROWS)?;
        let end = page.len() < ROWS as usize;
        after = page.last().map(|(path, _)| path.clone());
        for (path, entry) in page {
            let weight = row_weight(&path, Some(&entry));
            if bytes + weight > PIECE && !rows.is_empty() {
                let rows = std::mem::take(&mut rows);
                pieces.push(ToAgent::Base { rows, more: true });
                bytes = 0;
            }
            bytes += weight;
            rows.push((path, entry));
        }
        if end {
            pieces.push(ToAgent::Base { rows, more: false });
            return Ok(pieces);
        }
    }
}

/// Stores observations. Returns whether any differs from the base.
///
/// `absent_but` is given when this ends the report of a whole tree: all paths that were
/// reported. Whatever else the base knows is then gone from the peer.
///
/// `in_round` says that a round is under way.
pub(super) fn observe(
    journal: &Journal,
    peer: PeerId,
    observations: Vec<Observation>,
    absent_but: Option<HashSet<RelPath>>,
    upto: Option<Revision>,
    in_round: bool,
) -> Result<bool, Error> {
    let news = journal.update(Durability::Normal, move |update| {
        let mut news = false;
        for observation in &observations {
            if let (Some(Content::File { hash, .. }), Some(meaning)) = (
                observation.entry.as_ref().map(|entry| &entry.content),
                observation.meaning,
            ) {
                update.set_meaning(*hash, meaning)?;
            }
            news |= note(
                update,
                peer,
                &observation.path,
                observation.entry.as_ref(),
                in_round,
            )?;
        }
        if let Some(reported) = &absent_but {
            for (path, _) in update.base_below(peer, &RelPath::ROOT)? {
                if !reported.contains(&path) {
                    news |= note(update, peer, &path, None, in_round)?;
                }
            }
        }
        if let Some(upto) = upto {
            update.set_seen(peer, upto.epoch, upto.rev)?;
        }
        Ok(news)
    })?;
    Ok(news)
}

/// Stores one observation unless it says what the base says: such a one is an echo, or
/// the end of an older one.
///
/// But the older one may be what the round that is under way takes in, and the base with
/// it: then this one is news to the round that follows, and takes the older one's place.
/// What the round changes over there is another matter: a step that finds there what the
/// base says overtakes this, and what is seen after the step is told after the base has
/// changed.
fn note(
    update: &Update<'_>,
    peer: PeerId,
    path: &RelPath,
    entry: Option<&crate::tree::Entry>,
    in_round: bool,
) -> Result<bool, mirrorfs_journal::Error> {
    let base = update.base_at(peer, path)?;
    if base.as_ref().map(|base| &base.entry) == entry {
        if !update.is_observed(peer, path)? {
            return Ok(false);
        }
        if !in_round {
            // What was held because of it need not be any more.
            update.forget_observation(peer, path)?;
            return Ok(true);
        }
    }
    update.observe(peer, path, entry)?;
    Ok(true)
}

/// Writes a round's outcome down as proposed. Returns what the base has been changed to
/// since the last agreement.
pub(super) fn propose(
    journal: &Journal,
    reserved: Arc<Reserved>,
    round: &Round,
) -> Result<Vec<BaseChange>, Error> {
    let peer = round.peer.id;
    // Which steps each change stands on, so that a proposal that turns out to have been
    // applied in part can be accepted in part, also by a later life of the daemon.
    let (changes, standing): (Vec<BaseChange>, Vec<Vec<u32>>) = round.base().cloned().unzip();
    let mut left = round.unsettled.clone();
    left.paths.extend(round.refused.iter().cloned());
    let terms = Terms {
        standing,
        left,
        spent: spent(round),
    };
    let terms = postcard::to_stdvec(&terms).map_err(|_| Error::Unencodable)?;
    let placed = round.placed.clone();
    let brakes = round.brakes.clone();
    let mut proposal = round.proposal(changes);
    let replica = round.peer.replica;
    // Durably, with everything before it, before the peer is told to commit: what it
    // acknowledges is then on record, whatever a power loss takes.
    let advanced = journal.update(Durability::Full, move |update| {
        for change in &mut proposal.changes {
            if let BaseChange::Put { path, node, .. } = change
                && let Some((ino, _)) = placed.get(path)
            {
                *node = update.node_by_ino(*ino)?.map(|node| node.id);
            }
        }
        // With the files that the proposal adds to the base a brake might not engage again.
        brakes.store(update, peer)?;
        let agreed = replica.map(|replica| (replica, proposal.agreement));
        super::marks::advance(update, &reserved, agreed)?;
        update.propose(peer, &proposal)?;
        update.set_setting(&terms_key(peer), &terms)?;
        update.advanced(peer)
    })?;
    Ok(advanced)
}

/// What has to be known of a proposal to accept it without the round that made it.
#[derive(Serialize, Deserialize, Default)]
struct Terms {
    /// For each change of the base the steps that it stands on.
    standing: Vec<Vec<u32>>,
    /// What the round did not settle.
    left: Unsettled,
    /// The observations that it decided on.
    spent: Vec<Spent>,
}

/// An observation that led to a decision. Once what was decided is agreed on, it says how
/// things were before.
#[derive(Serialize, Deserialize)]
struct Spent {
    /// In base coordinates.
    path: RelPath,
    entry: Option<crate::tree::Entry>,
    /// The steps of the batch that it stands on, at the path and above. What a step did not
    /// find is still to be decided on; the agent has said anew what it found instead, and
    /// that may be what was known before.
    standing: Vec<u32>,
}

fn spent(round: &Round) -> Vec<Spent> {
    let mut steps: HashMap<&RelPath, Vec<u32>> = HashMap::new();
    for (step, op) in (0..).zip(&round.batch.ops) {
        let path = crate::replica::apply::path_of(op);
        steps.entry(path).or_default().push(step);
    }
    let mut spent = Vec::new();
    for (origin, entry) in &round.observed {
        let path = round.moves.relocate(origin);
        let decision = round.plan.decisions.get(&path);
        let decided = decision
            .is_some_and(|(_, decision)| matches!(decision, Decision::Agree { .. }))
            && !round.refused.contains(&path);
        if decided {
            let at = std::iter::successors(Some(path), RelPath::parent);
            let standing = at.filter_map(|at| steps.get(&at)).flatten();
            spent.push(Spent {
                path: origin.clone(),
                entry: entry.clone(),
                standing: standing.copied().collect(),
            });
        }
    }
    spent
}

fn terms_key(peer: PeerId) -> String {
    format!("proposal.{}", peer.0)
}

/// Accepts the stored proposal but for what stands on steps that diverged. Gives what has
/// to be looked at again: with the cursor behind it, nothing else would bring it up.
/// `overtaken` are paths of which nothing that was seen before this holds any more.
fn accept_stored(
    update: &Update<'_>,
    peer: PeerId,
    diverged: &BTreeSet<u32>,
    overtaken: &[RelPath],
) -> Result<Unsettled, mirrorfs_journal::Error> {
    let terms: Terms = update
        .setting(&terms_key(peer))?
        .and_then(|bytes| postcard::from_bytes(&bytes).ok())
        .unwrap_or_default();
    // Unless a newer one took its place. What a step has brought in the base says by now, too.
    for spent in &terms.spent {
        let stands = !spent.standing.iter().any(|step| diverged.contains(step));
        if stands && update.observation(peer, &spent.path)?.as_ref() == Some(&spent.entry) {
            update.forget_observation(peer, &spent.path)?;
        }
    }
    let mut left = terms.left;
    // What was taken in and is gone again cannot be found by its identity any more.
    let changes = update.proposal(peer)?.map(|proposal| proposal.changes);
    for change in changes.into_iter().flatten() {
        if let BaseChange::Put {
            path, node: None, ..
        } = change
        {
            left.paths.insert(path);
        }
    }
    if !diverged.is_empty()
        && let Some(mut proposal) = update.proposal(peer)?
    {
        let standing = terms.standing.into_iter();
        let all: Vec<(BaseChange, Vec<u32>)> = proposal
            .changes
            .into_iter()
            .zip(standing.chain(std::iter::repeat_with(Vec::new)))
            .collect();
        proposal.changes = mirrorfs_journal::base_without(&all, diverged);
        for (change, on) in &all {
            if on.iter().any(|op| diverged.contains(op)) {
                leave(update, peer, change, &mut left)?;
            }
        }
        update.propose(peer, &proposal)?;
    }
    move_observations(update, peer)?;
    for path in overtaken {
        update.forget_observation(peer, path)?;
    }
    update.accept(peer)?;
    Ok(left)
}

/// Has a change of the base that was not accepted looked at again.
fn leave(
    update: &Update<'_>,
    peer: PeerId,
    change: &BaseChange,
    left: &mut Unsettled,
) -> Result<(), mirrorfs_journal::Error> {
    match change {
        BaseChange::Put { path, node, .. } => {
            left.paths.insert(path.clone());
            left.nodes.extend(*node);
        }
        BaseChange::Remove { path } => {
            left.paths.insert(path.clone());
        }
        BaseChange::Move { from, to } => {
            left.paths.extend([from.clone(), to.clone()]);
            let base = update.base_at(peer, from)?;
            left.nodes.extend(base.and_then(|base| base.node));
        }
    }
    Ok(())
}

fn store_unsettled(
    update: &Update<'_>,
    peer: PeerId,
    unsettled: &Unsettled,
) -> Result<(), mirrorfs_journal::Error> {
    if unsettled.is_empty() {
        return update.remove_setting(&unsettled_key(peer));
    }
    let unsettled = postcard::to_stdvec(unsettled).map_err(mirrorfs_journal::Error::other)?;
    update.set_setting(&unsettled_key(peer), &unsettled)
}

/// Observations made before a move was applied name the old place.
fn move_observations(update: &Update<'_>, peer: PeerId) -> Result<(), mirrorfs_journal::Error> {
    let Some(proposal) = update.proposal(peer)? else {
        return Ok(());
    };
    let mut moves = super::moves::Moves::default();
    for change in proposal.changes {
        if let BaseChange::Move { from, to } = change {
            moves.add(from, to);
        }
    }
    relocate_observations(update, peer, &moves)
}

/// Brings observations to where the moves have taken what they are about.
pub(super) fn relocate_observations(
    update: &Update<'_>,
    peer: PeerId,
    moves: &super::moves::Moves,
) -> Result<(), mirrorfs_journal::Error> {
    if moves.is_empty() {
        return Ok(());
    }
    // Also what the base says by now: it goes with that, and left behind it would be taken for
    // something that the peer has at the old place.
    let seen = update.observations(peer)?;
    let moved: Vec<_> = seen
        .into_iter()
        .filter(|(path, _)| moves.relocate(path) != *path)
        .collect();
    for (path, _) in &moved {
        update.forget_observation(peer, path)?;
    }
    for (path, entry) in moved {
        update.observe(peer, &moves.relocate(&path), entry.as_ref())?;
    }
    Ok(())
}

/// The agent has applied the round's batch: base, cursor and agreement move on. Returns
/// which artefacts are files like any other from now on.
pub(super) fn accept(
    journal: &Journal,
    round: &mut Round,
    diverged: &[Divergence],
    upto: Revision,
) -> Result<Vec<RelPath>, Error> {
    let peer = round.peer.id;
    let ops: BTreeSet<u32> = diverged.iter().map(|divergence| divergence.op).collect();
    round.leave_unsettled(diverged);
    let notes = Notes::of(round);
    let kept = kept_after(round, &ops)?;
    // Asked here: the switch is this thread's.
    let forgets = seeded::has(Bug::ForgetsTheBase);
    let made = made(round, &ops);
    let overtaken: Vec<RelPath> = made.iter().map(|(path, _)| path.clone()).collect();
    // The peer has its half of these, and this side has not: what the step left over there
    // is news like a change of the peer's. As a file's mode and content may come from
    // different sides, one step can be there without the other.
    let local = |path: &RelPath| {
        let (sides, _) = round.plan.decisions.get(path)?;
        sides.local.clone()
    };
    let half_done: Vec<HalfDone> = made
        .into_iter()
        .filter(|(path, _)| round.refused.contains(path))
        .map(|(path, remote)| HalfDone {
            local: local(&path),
            path,
            remote,
        })
        .collect();
    let released = journal.update(Durability::Normal, move |update| {
        if forgets && let Some(mut proposal) = update.proposal(peer)? {
            proposal.changes.clear();
            update.propose(peer, &proposal)?;
        }
        accept_stored(update, peer, &ops, &overtaken)?;
        for half_done in &half_done {
            half_done.store(update, peer)?;
        }
        let released = notes.store(update, peer)?;
        update.set_setting(&kept_key(peer), &kept)?;
        // What the agent did itself is known; what its user did comes as a report.
        match update.peer(peer)?.and_then(|peer| peer.seen) {
            Some((epoch, rev)) if epoch == upto.epoch && rev >= upto.rev => {}
            _ => update.set_seen(peer, upto.epoch, upto.rev)?,
        }
        Ok(released)
    })?;
    Ok(released)
}

/// A path at which the peer has carried out its step and this side has not.
struct HalfDone {
    path: RelPath,
    /// What was here at the cut.
    local: Option<Entry>,
    /// What the step left over there.
    remote: Option<Entry>,
}

impl HalfDone {
    /// What the step took from this side both have had in common since, and the base moves
    /// on by that: if it is changed here again, or changed back, that is the newer change.
    /// The rest of the base stays, and is still to be brought in.
    fn store(&self, update: &Update<'_>, peer: PeerId) -> Result<(), mirrorfs_journal::Error> {
        update.observe(peer, &self.path, self.remote.as_ref())?;
        let base = update.base_at(peer, &self.path)?;
        let (Some(base), Some(local), Some(remote)) = (base, &self.local, &self.remote) else {
            return Ok(());
        };
        let mut entry = super::scope::in_common(&base.entry, local, remote);
        if local.content == remote.content {
            entry.content.clone_from(&remote.content);
        }
        if entry == base.entry {
            return Ok(());
        }
        let put = BaseChange::Put {
            path: self.path.clone(),
            node: base.node,
            entry,
        };
        update.advance_base(peer, &[put])
    }
}

/// What steps have put, changed or removed. What was seen there while the round was under
/// way is older than the look that each step took before it: had that not found what was
/// expected, the step would have diverged. What the agent sees there afterwards comes after
/// its answer.
fn made(round: &Round, diverged: &BTreeSet<u32>) -> Vec<(RelPath, Option<Entry>)> {
    let steps = (0_u32..).zip(&round.batch.ops);
    let done = steps.filter(|(index, _)| !diverged.contains(index));
    done.filter_map(|(_, op)| match op {
        Op::Put { path, entry, .. }
        | Op::MakeDir { path, entry }
        | Op::SetMeta { path, entry, .. } => Some((path.clone(), Some(entry.clone()))),
        Op::Remove { path, .. } | Op::RemoveDir { path } => Some((path.clone(), None)),
        // What moved was compared by its content alone; the rest follows it.
        Op::Park { .. } | Op::Unpark { .. } | Op::KeepConflict { .. } => None,
    })
    .collect()
}

/// The artefacts of open conflicts that are in the tree. To be called before the scan.
pub fn artefacts(journal: &Journal) -> Result<BTreeSet<RelPath>, Error> {
    let snapshot = journal.snapshot()?;
    let mut artefacts = BTreeSet::new();
    for conflict in snapshot.conflicts()? {
        for path in [conflict.copy, conflict.info].into_iter().flatten() {
            if snapshot.at(&path)?.is_some_and(|node| node.artefact) {
                artefacts.insert(path);
            }
        }
    }
    Ok(artefacts)
}

/// What became of the [`artefacts`] that were there before the scan. One that has another
/// inode, in a tree that was brought back from a copy, is one all the same. Conflicts whose
/// copy is missing are not resolved by that: the next round puts a fresh copy there. To be
/// called after the scan and before the mount.
pub fn renew_artefacts(journal: &Journal, before: BTreeSet<RelPath>) -> Result<(), Error> {
    let snapshot = journal.snapshot()?;
    let mut lost = Vec::new();
    for conflict in snapshot.conflicts()? {
        if let Some(copy) = &conflict.copy
            && snapshot.at(copy)?.is_none()
        {
            lost.push(mirrorfs_journal::Conflict {
                copy: None,
                remote: None,
                ..conflict
            });
        }
    }
    let mut other = Vec::new();
    for path in before {
        if let Some(node) = snapshot.at(&path)?
            && !node.artefact
        {
            other.push(node.id);
        }
    }
    drop(snapshot);
    if lost.is_empty() && other.is_empty() {
        return Ok(());
    }
    journal.update(Durability::Normal, move |update| {
        for node in &other {
            update.set_artefact(*node, true)?;
        }
        for conflict in &lost {
            update.open_conflict(conflict)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// The versions of open conflicts that the peer keeps for this side, by path.
pub(super) type Kept = std::collections::BTreeMap<RelPath, Content>;

/// Removes a peer from the journal with everything that is known of it, and the tree's
/// mark of what was agreed with it.
pub fn forget_peer(journal: &Journal, reserved: &Reserved, peer: PeerId) -> Result<(), Error> {
    let replica = journal.update(Durability::Full, move |update| {
        let replica = update.peer(peer)?.and_then(|peer| peer.replica);
        update.remove_setting(&kept_key(peer))?;
        update.remove_setting(&unsettled_key(peer))?;
        super::doubts::Doubts::forget(update, peer)?;
        super::pulls::forget(update, peer)?;
        super::late::forget(update, peer)?;
        Brakes::forget(update, peer)?;
        super::marks::forget_mark(update, peer)?;
        update.remove_peer(peer)?;
        Ok(replica)
    })?;
    if let Some(replica) = replica {
        Marks::write(reserved, [(replica, None)])?;
    }
    Ok(())
}

fn policy_key(peer: PeerId) -> String {
    format!("policy.{}", peer.0)
}

fn policy_code(policy: Policy) -> [u8; 1] {
    [match policy {
        Policy::TwoWay => 0,
        Policy::PushOnly => 1,
        Policy::PullOnly => 2,
    }]
}

/// Whether the rounds so far have had another policy than this.
pub(super) fn policy_is_news(
    view: &mirrorfs_journal::View,
    peer: PeerId,
    policy: Policy,
) -> Result<bool, Error> {
    let known = view.setting(&policy_key(peer))?;
    Ok(known.is_some_and(|known| known != policy_code(policy)))
}

fn kept_key(peer: PeerId) -> String {
    format!("kept.{}", peer.0)
}

/// What the peer keeps for this side.
pub(super) fn kept(view: &mirrorfs_journal::View, peer: PeerId) -> Result<Kept, Error> {
    let stored = view.setting(&kept_key(peer))?;
    Ok(stored
        .and_then(|bytes| postcard::from_bytes(&bytes).ok())
        .unwrap_or_default())
}

fn kept_after(round: &Round, diverged: &BTreeSet<u32>) -> Result<Vec<u8>, Error> {
    let mut kept = round.kept.clone();
    for (index, op) in (0_u32..).zip(&round.batch.ops) {
        if let Op::KeepConflict { path, entry } = op
            && !diverged.contains(&index)
        {
            kept.insert(path.clone(), entry.content.clone());
        }
    }
    // Of conflicts that are over nothing has to be remembered.
    kept.retain(|path, _| {
        round.plan.decisions.get(path).is_none_or(|(_, decision)| {
            matches!(
                decision,
                Decision::Conflict | Decision::Hold(Held::BelowConflict)
            )
        })
    });
    postcard::to_stdvec(&kept).map_err(|_| Error::Unencodable)
}

const PLACING: &str = "placing";

/// Artefacts that are about to be placed, and may be in the tree without a record.
pub(crate) fn placing(view: &mirrorfs_journal::View) -> Result<BTreeSet<RelPath>, Error> {
    let stored = view.setting(PLACING)?;
    Ok(stored
        .and_then(|bytes| postcard::from_bytes(&bytes).ok())
        .unwrap_or_default())
}

/// Notes the artefacts that a round is about to place, so that one that is placed and
/// not recorded for want of time is never taken for a file of the user's.
pub(super) fn announce_artefacts(journal: &Journal, round: &Round) -> Result<(), Error> {
    let paths: Vec<RelPath> = round
        .found
        .iter()
        .flat_map(|found| [&found.conflict.copy, &found.conflict.info])
        .flatten()
        .cloned()
        .collect();
    if paths.is_empty() {
        return Ok(());
    }
    journal.update(Durability::Normal, move |update| {
        let mut placing = placing(update).map_err(mirrorfs_journal::Error::other)?;
        placing.extend(paths);
        let placing = postcard::to_stdvec(&placing).map_err(mirrorfs_journal::Error::other)?;
        update.set_setting(PLACING, &placing)
    })?;
    Ok(())
}

/// Whether a conflict that was found could be put on record. Without its copy it is not:
/// the next round tries again.
fn is_on_record(found: &Found, round: &Round) -> bool {
    let copy = found.conflict.copy.as_ref();
    copy.is_none_or(|copy| round.placed.contains_key(copy))
}

/// Puts the conflicts on record whose artefacts have been placed.
pub(super) fn open_conflicts(journal: &Journal, round: &Round) -> Result<(), Error> {
    if round.found.is_empty() {
        return Ok(());
    }
    let name = round.peer.name.clone();
    let mut announced = BTreeSet::new();
    let mut opened = Vec::new();
    for found in &round.found {
        let artefacts = [&found.conflict.copy, &found.conflict.info];
        announced.extend(artefacts.into_iter().flatten().cloned());
        if !is_on_record(found, round) {
            continue;
        }
        let mut conflict = found.conflict.clone();
        conflict.info = conflict.info.filter(|path| round.placed.contains_key(path));
        let made = |path: &RelPath| round.placed.get(path).copied();
        let copy = conflict.copy.as_ref().and_then(made);
        let info = conflict.info.as_ref().and_then(made);
        opened.push((conflict, copy, info));
    }
    // What lies in the tree without a record stays known as an artefact.
    announced.retain(|path| !round.placed.contains_key(path));
    journal.update(Durability::Normal, move |update| {
        let mut placing = placing(update).map_err(mirrorfs_journal::Error::other)?;
        placing.retain(|path| !announced.contains(path));
        for (conflict, copy, info) in &opened {
            for (ino, _) in [copy, info].into_iter().flatten() {
                if let Some(node) = update.node_by_ino(*ino)? {
                    update.set_artefact(node.id, true)?;
                }
            }
            // Whatever becomes of the round: by its hash a copy that nobody edited is
            // told from one that somebody did.
            if let (Some((ino, n)), Some(remote)) = (copy, &conflict.remote)
                && let Content::File { hash, .. } = remote.content
                && let Some(node) = update.node_by_ino(*ino)?
                && node.content_n <= *n
            {
                update.set_hash(node.id, node.content_n, hash)?;
            }
            for path in [&conflict.copy, &conflict.info].into_iter().flatten() {
                placing.remove(path);
            }
            update.open_conflict(conflict)?;
            let what = format!("conflict: changed here and on {name}");
            update.note(conflict.peer, &conflict.path, &what)?;
        }
        let placing = postcard::to_stdvec(&placing).map_err(mirrorfs_journal::Error::other)?;
        update.set_setting(PLACING, &placing)
    })?;
    Ok(())
}

/// Nothing had to be agreed: only the cursor moves on. Returns the same as [`accept`].
pub(super) fn advance(journal: &Journal, round: &mut Round) -> Result<Vec<RelPath>, Error> {
    let (peer, cursor) = (round.peer.id, round.cursor);
    round.leave_unsettled(&[]);
    let notes = Notes::of(round);
    let unchanged = cursor == round.peer.cursor && notes.is_empty();
    if unchanged {
        return Ok(Vec::new());
    }
    let released = journal.update(Durability::Normal, move |update| {
        let released = notes.store(update, peer)?;
        update.set_cursor(peer, cursor)?;
        Ok(released)
    })?;
    Ok(released)
}

/// Records the number up to which the peer's copy survives a power loss there.
pub(super) fn durable(journal: &Journal, peer: PeerId, n: u64) -> Result<(), Error> {
    journal.update(Durability::Normal, move |update| {
        // What a brake holds is behind the cursor still.
        let cursor = update.peer(peer)?.map_or(n, |peer| peer.cursor);
        update.set_durable(peer, n.min(cursor))
    })?;
    Ok(())
}

/// What a round has decided that is not plain from what changed.
fn noteworthy(round: &Round) -> Vec<(RelPath, String)> {
    let peer = &round.peer.name;
    let decisions = round.plan.decisions.iter();
    let noted = decisions.filter_map(|(path, (_, decision))| match decision {
        Decision::Agree {
            note: Some(note), ..
        } if !round.refused.contains(path) => Some((path.clone(), note.tell(peer))),
        _ => None,
    });
    noted.collect()
}

/// What a round leaves behind beside the base.
struct Notes {
    placed: Vec<(RelPath, Ino)>,
    /// With the number of the change that put the content there.
    hashes: Vec<(Ino, u64, ContentHash)>,
    closed: Vec<i64>,
    /// Conflicts whose directory was moved.
    moved: Vec<mirrorfs_journal::Conflict>,
    /// Artefacts of versions that are not on record any more, edited by somebody.
    edited: Vec<RelPath>,
    unsettled: Unsettled,
    had_unsettled: Unsettled,
    /// What was decided and a person may want to know.
    decisions: Vec<(RelPath, String)>,
    /// The policy by which everything has been looked at.
    policy: Option<Policy>,
    policy_is_news: bool,
    brakes: Brakes,
    brakes_are_news: bool,
}

impl Notes {
    fn of(round: &Round) -> Self {
        let mut hashes = Vec::new();
        let copies = round.found.iter().filter_map(|found| {
            found
                .conflict
                .copy
                .as_ref()
                .map(|copy| (copy, &found.conflict.remote))
        });
        for (path, after) in round
            .local_steps
            .iter()
            .map(|step| (&step.path, &step.after))
            .chain(copies)
        {
            if let (Some((ino, n)), Some(after)) = (round.placed.get(path), after)
                && let crate::tree::Content::File { hash, .. } = after.content
            {
                hashes.push((*ino, *n, hash));
            }
        }
        Self {
            placed: round
                .placed
                .iter()
                .map(|(path, (ino, _))| (path.clone(), *ino))
                .collect(),
            hashes,
            closed: round.resolved.iter().map(|resolved| resolved.id).collect(),
            moved: round.moved.clone(),
            edited: round
                .found
                .iter()
                .filter(|found| is_on_record(found, round))
                .flat_map(|found| found.edited.clone())
                .collect(),
            unsettled: round.unsettled.clone(),
            had_unsettled: round.had_unsettled.clone(),
            decisions: noteworthy(round),
            // Not before the last part of what there was to look at.
            policy: (!round.more && round.braked().is_none() && round.gathering.is_none())
                .then_some(round.policy),
            policy_is_news: round.policy_is_news,
            brakes: round.brakes.clone(),
            brakes_are_news: round.brakes_are_news,
        }
    }

    fn is_empty(&self) -> bool {
        self.hashes.is_empty()
            && self.closed.is_empty()
            && self.moved.is_empty()
            && self.edited.is_empty()
            && self.unsettled.is_empty()
            && self.had_unsettled.is_empty()
            && self.decisions.is_empty()
            && !self.policy_is_news
            && !self.brakes_are_news
    }

    /// Returns which artefacts are files like any other from now on.
    fn store(
        &self,
        update: &Update<'_>,
        peer: PeerId,
    ) -> Result<Vec<RelPath>, mirrorfs_journal::Error> {
        for (ino, n, hash) in &self.hashes {
            // Only if nobody has written to it since it was put there.
            if let Some(node) = update.node_by_ino(*ino)?
                && node.content_n <= *n
            {
                update.set_hash(node.id, node.content_n, *hash)?;
            }
        }
        // A node that is gone again before its base was written down cannot be found by
        // its identity any more.
        let mut unsettled = self.unsettled.clone();
        for (path, ino) in &self.placed {
            if update.node_by_ino(*ino)?.is_none() {
                unsettled.paths.insert(path.clone());
            }
        }
        if let Some(policy) = self.policy {
            let (key, code) = (policy_key(peer), policy_code(policy));
            if update.setting(&key)?.as_deref() != Some(&code[..]) {
                update.set_setting(&key, &code)?;
            }
        }
        self.brakes.store(update, peer)?;
        for (path, what) in &self.decisions {
            update.note(peer, path, what)?;
        }
        // Before any is closed: the two may be about the same one.
        let mut closed = self.closed.clone();
        for conflict in &self.moved {
            update.close_conflict(conflict.id)?;
            let id = update.open_conflict(conflict)?;
            closed.extend(self.closed.contains(&conflict.id).then_some(id));
        }
        let mut released = self.edited.clone();
        for conflict in update.conflicts()? {
            if closed.contains(&conflict.id) {
                update.note(peer, &conflict.path, "the conflict is over")?;
                released.extend([conflict.copy, conflict.info].into_iter().flatten());
                update.close_conflict(conflict.id)?;
            }
        }
        // What somebody edited, or put in its place, and is not on record any more is a file
        // like any other, to all peers.
        let mut files = Unsettled::default();
        let mut there = Vec::new();
        for path in released {
            if let Some(node) = update.at(&path)? {
                if node.artefact {
                    update.set_artefact(node.id, false)?;
                }
                files.nodes.insert(node.id);
                there.push(path);
            }
        }
        if !files.is_empty() {
            for other in update.peers()? {
                if other.id != peer {
                    let mut left = super::round::load_unsettled(update, other.id)?;
                    left.extend(files.clone());
                    store_unsettled(update, other.id, &left)?;
                }
            }
        }
        unsettled.extend(files);
        // What a round with another peer has left here meanwhile.
        let stored = super::round::load_unsettled(update, peer)?;
        unsettled.extend(stored.beside(&self.had_unsettled));
        store_unsettled(update, peer, &unsettled)?;
        Ok(there)
    }
}

#[cfg(test)]
mod tests;
