//! Which names a round has to look at, and what the three legs show there.
//!
//! Local comes from the journal's snapshot of the cut, base and remote from what is
//! stored of the peer. Everything is brought into final coordinates (see
//! [`Moves`]) before `reconcile` sees it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mirrorfs_journal::{Base, Error, Node, Peer, Snapshot, View};
use serde::{Deserialize, Serialize};

use crate::reconcile::{Git, Sides};
use crate::tree::scan::MODE_MASK;
use crate::tree::{
    Attr, Content, ContentHash, Entry, Ino, Kind, NodeId, RelPath, Timestamp, Xattrs, git,
};

use super::doubts::Doubts;
use super::moves::Moves;
use super::repositories::Repositories;

/// What an earlier round could not settle and no younger change would bring up again.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Unsettled {
    /// Local nodes to look at again.
    pub nodes: BTreeSet<NodeId>,
    /// Paths to look at again.
    pub paths: BTreeSet<RelPath>,
}

impl Unsettled {
    /// Takes over what another round left.
    pub fn extend(&mut self, other: Self) {
        self.nodes.extend(other.nodes);
        self.paths.extend(other.paths);
    }

    /// What of this is not in `other`.
    pub fn beside(mut self, other: &Self) -> Self {
        self.nodes.retain(|node| !other.nodes.contains(node));
        self.paths.retain(|path| !other.paths.contains(path));
        self
    }

    /// Whether nothing is left over.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.paths.is_empty()
    }
}

/// A local node as a step on the mounted side must find it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalNode {
    /// The node.
    pub node: NodeId,
    /// Its inode number.
    pub ino: Ino,
    /// Its attributes. A replacement takes over owner and group.
    pub attr: Attr,
}

impl LocalNode {
    /// Whether attributes are still those that were decided on.
    pub fn is_unchanged(&self, now: &Attr) -> bool {
        // The times and the size of a directory follow from its names, which the journal
        // has one by one, and which are looked at one by one.
        if self.attr.kind == Kind::Directory {
            return now.kind == Kind::Directory;
        }
        // Renames through the journal move the change time, and are known to it; the
        // content's own marks are what a program behind the mount's back leaves.
        (self.attr.kind, self.attr.size, self.attr.mtime) == (now.kind, now.size, now.mtime)
    }
}

impl From<&Node> for LocalNode {
    fn from(node: &Node) -> Self {
        Self {
            node: node.id,
            ino: node.ino,
            attr: node.attr,
        }
    }
}

/// The names of a round.
#[derive(Debug, Default)]
pub struct Scope {
    /// By final path.
    pub sides: BTreeMap<RelPath, Sides>,
    /// What leads from base coordinates to final ones.
    pub moves: Moves,
    /// The local node at each name in scope.
    pub locals: HashMap<RelPath, LocalNode>,
    /// The observations that were looked at, in base coordinates.
    pub observed: Vec<(RelPath, Option<Entry>)>,
    /// Files that could not be read.
    pub unreadable: Vec<(NodeId, RelPath, String)>,
    /// The Git directories among them, with what is known of their indexes.
    pub git: Git,
    /// Indexes of this side of which it is not known what they stage.
    pub unknown_indexes: Vec<(RelPath, ContentHash)>,
}

/// Hashes a file as it was at the cut.
pub type Hasher<'a> = dyn FnMut(&RelPath, &Node) -> Result<ContentHash, String> + 'a;

/// A base that moves on by what both sides hold of mode, time and attributes.
pub(super) fn in_common(base: &Entry, here: &Entry, there: &Entry) -> Entry {
    let mut entry = base.clone();
    if here.mode == there.mode {
        entry.mode = there.mode;
    }
    if here.mtime == there.mtime {
        entry.mtime = there.mtime;
    }
    if here.xattrs == there.xattrs {
        entry.xattrs.clone_from(&there.xattrs);
    }
    entry
}

/// What of a local node is mirrored; none for what stays local. `hash` is the content's.
pub fn carried(node: &Node, hash: impl FnOnce() -> Option<ContentHash>) -> Option<Entry> {
    if node.artefact {
        return None;
    }
    let mode = node.attr.mode & MODE_MASK;
    Some(match node.attr.kind {
        Kind::Special => return None,
        Kind::Directory => Entry {
            content: Content::Directory,
            mode,
            mtime: Timestamp::default(),
            xattrs: node.xattrs.clone(),
        },
        Kind::Symlink => Entry {
            content: Content::Symlink {
                target: node.target.clone().unwrap_or_default(),
            },
            mode: 0o777,
            mtime: node.attr.mtime,
            xattrs: Xattrs::new(),
        },
        Kind::File => Entry {
            content: Content::File {
                size: node.attr.size,
                hash: hash()?,
            },
            mode,
            mtime: node.attr.mtime,
            xattrs: node.xattrs.clone(),
        },
    })
}

/// Whether a directory holds something, and nothing of it is mirrored.
pub(super) fn only_local(view: &View, directory: NodeId) -> Result<bool, Error> {
    let mut left = vec![directory];
    let mut found = false;
    while let Some(directory) = left.pop() {
        for (_, child) in view.children(directory)? {
            match child.attr.kind {
                _ if child.artefact => found = true,
                Kind::Special => found = true,
                Kind::Directory => left.push(child.id),
                Kind::File | Kind::Symlink => return Ok(false),
            }
        }
    }
    Ok(found)
}

/// Collects the names that may differ between the sides, with their three legs: those that
/// changed, were left over, or are in doubt since a power loss. Of Git
/// directories whose conflict somebody `decided` about, everything is looked at.
pub(super) fn gather(
    snapshot: &Snapshot,
    peer: &Peer,
    (unsettled, doubts): (&Unsettled, &Doubts),
    artefacts: &BTreeSet<RelPath>,
    decided: &dyn Fn(&RelPath) -> bool,
    hash: &mut Hasher<'_>,
) -> Result<Scope, Error> {
    let pending: HashMap<_, _> = snapshot.remote_pending(peer.id)?.into_iter().collect();
    let gathering = Gathering {
        snapshot,
        peer,
        repositories: Repositories::new(snapshot, peer.id, &pending),
        pending: &pending,
    };
    let mut touched = unsettled.nodes.clone();
    touched.extend(doubts.nodes());
    // Without a base, and with one of which it is not known what has changed since.
    let all = peer.cursor == 0;
    if all {
        snapshot.walk(&mut |_: &RelPath, node: &Node| {
            touched.insert(node.id);
            Ok(())
        })?;
    } else {
        touched.extend(snapshot.touched(peer.cursor)?);
    }
    touched.remove(&NodeId::ROOT);

    let (moves, rejected) = gathering.moves(&touched)?;
    let mut names = gathering.names(&touched, &moves)?;
    if all {
        names.extend(gathering.base_subtree(&RelPath::ROOT, &moves)?);
    }
    names.extend(unsettled.paths.iter().cloned());
    names.extend(doubts.paths().map(|path| moves.relocate(path)));
    for (from, to) in rejected {
        names.extend(gathering.base_subtree(&from, &moves)?);
        gathering.local_subtree(&to, &mut names)?;
    }
    for conflict in snapshot
        .conflicts()?
        .into_iter()
        .filter(|conflict| conflict.peer == peer.id)
    {
        names.insert(conflict.path.clone());
        if conflict.unit.is_some() && !decided(&conflict.path) {
            names.extend(gathering.repositories.state(&conflict.path, &moves)?);
            continue;
        }
        names.extend(gathering.base_subtree(&conflict.path, &moves)?);
        gathering.local_subtree(&conflict.path, &mut names)?;
    }
    names.remove(&RelPath::ROOT);

    let mut scope = Scope {
        moves,
        ..Scope::default()
    };
    let mut expanded = BTreeSet::new();
    while let Some(path) = names.pop_first() {
        if scope.sides.contains_key(&path) {
            continue;
        }
        let local = snapshot.at(&path)?.filter(|_| !artefacts.contains(&path));
        let local_entry = match &local {
            None => None,
            Some(node) if node.attr.kind == Kind::File && !node.artefact => {
                match node.hash.map_or_else(|| hash(&path, node), Ok) {
                    Ok(hash) => carried(node, || Some(hash)),
                    Err(reason) => {
                        scope.unreadable.push((node.id, path, reason));
                        continue;
                    }
                }
            }
            Some(node) => carried(node, || None),
        };
        if let Some(node) = &local {
            let local = LocalNode::from(node);
            scope.locals.insert(path.clone(), local);
        }
        let origin = scope.moves.origin(&path);
        let known = match &origin {
            Some(origin) => snapshot.base_at(peer.id, origin)?,
            None => None,
        };
        // A directory that comes from where nothing travelled brings along what was never
        // sent, and what is in it has not changed itself.
        if let Some(node) = &local
            && node.attr.kind == Kind::Directory
            && known.as_ref().and_then(|base| base.node) != Some(node.id)
        {
            for (name, _) in snapshot.children(node.id)? {
                names.extend(path.join(&name).ok());
            }
        }
        let base = known.map(|base| base.entry);
        let observed = origin
            .as_ref()
            .and_then(|origin| gathering.pending.get(origin));
        if let (Some(origin), Some(observed)) = (&origin, observed) {
            scope.observed.push((origin.clone(), observed.clone()));
        }
        if let Some(unit) = gathering.repositories.unit_of(&path, &scope.moves)? {
            if !scope.git.units.contains(&unit) && !scope.sides.contains_key(&unit) {
                names.insert(unit.clone());
            }
            // Whether this side has changed something, too, is not told by what was
            // touched since the cursor alone: changes may be held back.
            if observed.is_some() && expanded.insert(unit.clone()) {
                names.extend(gathering.repositories.state(&unit, &scope.moves)?);
            }
            if git::is_index(&unit, &path) {
                gathering.note_meanings(&mut scope, &path, [&base, &local_entry])?;
                if let Some(observed) = observed {
                    gathering.note_meanings(&mut scope, &path, [observed, &None])?;
                }
            }
            scope.git.units.insert(unit);
        }
        let remote = observed.cloned().unwrap_or_else(|| base.clone());
        // What is new needs its directory on the other side, which may never have had it,
        // or may have something else there by now.
        if base.is_none()
            && (local_entry.is_some() || remote.is_some())
            && let Some(parent) = path.parent()
            && !parent.is_root()
            && !scope.sides.contains_key(&parent)
        {
            names.insert(parent);
        }
        // When a directory is gone on one side, everything known below it is looked at.
        let is_directory = |entry: &Option<Entry>| {
            entry
                .as_ref()
                .is_some_and(|entry| entry.content == Content::Directory)
        };
        if is_directory(&base) && !(is_directory(&local_entry) && is_directory(&remote)) {
            if let Some(origin) = &origin {
                names.extend(gathering.base_subtree(origin, &scope.moves)?);
            }
            gathering.local_subtree(&path, &mut names)?;
        }
        scope.sides.insert(
            path,
            Sides {
                base,
                local: local_entry,
                remote,
            },
        );
    }
    Ok(scope)
}

struct Gathering<'a> {
    snapshot: &'a Snapshot,
    peer: &'a Peer,
    pending: &'a HashMap<RelPath, Option<Entry>>,
    repositories: Repositories<'a>,
}

impl Gathering<'_> {
    /// The moves that can be carried out as such on the peer, and those that have to be
    /// a deletion and a creation.
    fn moves(&self, touched: &BTreeSet<NodeId>) -> Result<(Moves, Vec<(RelPath, RelPath)>), Error> {
        let mut candidates: Vec<(RelPath, RelPath, Base)> = Vec::new();
        let mut within = Vec::new();
        for id in touched {
            let Some(node) = self.snapshot.node(*id)?.filter(|node| !node.artefact) else {
                continue;
            };
            let (paths, bases) = (
                self.snapshot.paths(*id)?,
                self.snapshot.base_of(self.peer.id, *id)?,
            );
            if let ([to], [(from, base)]) = (paths.as_slice(), bases.as_slice())
                && from != to
                && base.entry.content.kind() == node.attr.kind
            {
                // What is decided about a Git directory as a whole must not have happened
                // in part already.
                if self.repositories.is_inside_here(to)?
                    || self.repositories.is_inside_there(from)?
                {
                    within.push((from.clone(), to.clone()));
                    continue;
                }
                candidates.push((from.clone(), to.clone(), base.clone()));
            }
        }
        candidates.sort_by_key(|(from, _, _)| from.depth());
        let mut rejected = within;
        loop {
            let mut moves = Moves::default();
            for (from, to, _) in &candidates {
                moves.add(from.clone(), to.clone());
            }
            let leaving: BTreeSet<&RelPath> = moves.iter().map(|step| &step.from).collect();
            let mut kept = Vec::new();
            let before = candidates.len();
            for (from, to, base) in &candidates {
                let went_along = !leaving.contains(from);
                if went_along || self.can_move(from, to, base, &moves, &leaving)? {
                    kept.push((from.clone(), to.clone(), base.clone()));
                } else {
                    rejected.push((from.clone(), to.clone()));
                }
            }
            if kept.len() == before {
                return Ok((moves, rejected));
            }
            candidates = kept;
        }
    }

    /// Whether the peer still has what moved, and has room for it where it goes.
    fn can_move(
        &self,
        from: &RelPath,
        to: &RelPath,
        base: &Base,
        moves: &Moves,
        leaving: &BTreeSet<&RelPath>,
    ) -> Result<bool, Error> {
        let still_there = match self.pending.get(from) {
            None => true,
            Some(observed) => observed
                .as_ref()
                .is_some_and(|entry| entry.content.kind() == base.entry.content.kind()),
        };
        // A directory that moves below itself, or onto its own parent, cannot.
        if !still_there || to.starts_with(from) || from.starts_with(to) {
            return Ok(false);
        }
        // The place in base coordinates, were it not for this move.
        let place = moves
            .iter()
            .filter(|step| step.from != *from && to.starts_with(&step.to))
            .max_by_key(|step| step.to.depth())
            .and_then(|step| to.rebase(&step.to, &step.from))
            .unwrap_or_else(|| to.clone());
        let taken =
            self.snapshot.base_at(self.peer.id, &place)?.is_some() && !leaving.contains(&place);
        let appeared = matches!(self.pending.get(&place), Some(Some(_)));
        // What the peer has made a file of cannot be moved into.
        let mut above = place.parent();
        while let Some(directory) = above {
            let there = self.pending.get(&directory);
            if let Some(Some(entry)) = there
                && entry.content != Content::Directory
            {
                return Ok(false);
            }
            above = directory.parent();
        }
        Ok(!taken && !appeared)
    }

    /// Takes up what is known of the meaning of indexes.
    fn note_meanings(
        &self,
        scope: &mut Scope,
        path: &RelPath,
        entries: [&Option<Entry>; 2],
    ) -> Result<(), Error> {
        for (position, entry) in entries.into_iter().enumerate() {
            let Some(Content::File { hash, .. }) = entry.as_ref().map(|entry| &entry.content)
            else {
                continue;
            };
            match self.snapshot.meaning(*hash)? {
                Some(meaning) => drop(scope.git.meanings.insert(*hash, meaning)),
                None if position == 1 => scope.unknown_indexes.push((path.clone(), *hash)),
                None => {}
            }
        }
        Ok(())
    }

    /// Every name that a touched node has or had, and every name the peer reported.
    fn names(&self, touched: &BTreeSet<NodeId>, moves: &Moves) -> Result<BTreeSet<RelPath>, Error> {
        let mut names = BTreeSet::new();
        for id in touched {
            names.extend(self.snapshot.paths(*id)?);
            for (path, _) in self.snapshot.base_of(self.peer.id, *id)? {
                names.insert(moves.relocate(&path));
            }
        }
        names.extend(self.pending.keys().map(|path| moves.relocate(path)));
        names.extend(moves.iter().map(|step| step.to.clone()));
        Ok(names)
    }

    /// What the base has at and below a path, in final coordinates.
    fn base_subtree(&self, path: &RelPath, moves: &Moves) -> Result<Vec<RelPath>, Error> {
        let below = self.snapshot.base_below(self.peer.id, path)?;
        let paths = below.into_iter().map(|(path, _)| moves.relocate(&path));
        Ok(paths.chain([moves.relocate(path)]).collect())
    }

    fn local_subtree(&self, path: &RelPath, names: &mut BTreeSet<RelPath>) -> Result<(), Error> {
        let Some(node) = self.snapshot.at(path)? else {
            return Ok(());
        };
        let mut left = vec![(path.clone(), node)];
        while let Some((path, node)) = left.pop() {
            if node.attr.kind == Kind::Directory {
                for (name, child) in self.snapshot.children(node.id)? {
                    if let Ok(path) = path.join(&name) {
                        left.push((path, child));
                    }
                }
            }
            names.insert(path);
        }
        Ok(())
    }
}
