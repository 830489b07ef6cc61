//! Git directories among the names of a round: found by their shape on either side or in
//! the base, and listed without their objects.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use mirrorfs_journal::{Error, View};

use crate::reconcile::{Git, Sides};
use crate::tree::git::{self, MARKS, Role};
use crate::tree::{Content, ContentHash, Entry, Kind, PeerId, RelPath};

use super::moves::Moves;
use super::scope::carried;

/// What makes a directory of objects much larger than the rest of a repository.
const OBJECTS: &[u8] = b"objects";

/// Finds Git directories, each asked for once.
pub(super) struct Repositories<'a> {
    view: &'a View,
    peer: PeerId,
    pending: &'a HashMap<RelPath, Option<Entry>>,
    here: RefCell<HashMap<RelPath, bool>>,
    there: RefCell<HashMap<RelPath, bool>>,
}

impl<'a> Repositories<'a> {
    pub(super) fn new(
        view: &'a View,
        peer: PeerId,
        pending: &'a HashMap<RelPath, Option<Entry>>,
    ) -> Self {
        Self {
            view,
            peer,
            pending,
            here: RefCell::default(),
            there: RefCell::default(),
        }
    }

    /// Whether this side has a Git directory at a path.
    fn is_here(&self, path: &RelPath) -> Result<bool, Error> {
        if let Some(known) = self.here.borrow().get(path) {
            return Ok(*known);
        }
        let is = match self.view.at(path)? {
            Some(node) if node.attr.kind == Kind::Directory => {
                let mut is = true;
                for (name, kinds) in MARKS {
                    let mark = match self.view.child(node.id, name)? {
                        Some(mark) => self.view.node(mark)?,
                        None => None,
                    };
                    is = mark.is_some_and(|mark| kinds.contains(&mark.attr.kind));
                    if !is {
                        break;
                    }
                }
                is
            }
            _ => false,
        };
        self.here.borrow_mut().insert(path.clone(), is);
        Ok(is)
    }

    /// Whether the base or the peer has one at a path, in base coordinates.
    fn is_there(&self, path: &RelPath) -> Result<bool, Error> {
        if let Some(known) = self.there.borrow().get(path) {
            return Ok(*known);
        }
        let (mut in_base, mut on_peer) = (true, true);
        for (name, kinds) in MARKS {
            let Ok(mark) = path.join(name) else {
                return Ok(false);
            };
            let fits = |entry: Option<&Entry>| {
                entry.is_some_and(|entry| kinds.contains(&entry.content.kind()))
            };
            let base = self.view.base_at(self.peer, &mark)?;
            let base = base.as_ref().map(|base| &base.entry);
            in_base &= fits(base);
            on_peer &= match self.pending.get(&mark) {
                Some(observed) => fits(observed.as_ref()),
                None => fits(base),
            };
            if !in_base && !on_peer {
                break;
            }
        }
        let is = in_base || on_peer;
        self.there.borrow_mut().insert(path.clone(), is);
        Ok(is)
    }

    /// Whether a path of this side lies in a Git directory.
    pub(super) fn is_inside_here(&self, path: &RelPath) -> Result<bool, Error> {
        any_above(path, |above| self.is_here(above))
    }

    /// The same of a path of the base or the peer.
    pub(super) fn is_inside_there(&self, path: &RelPath) -> Result<bool, Error> {
        any_above(path, |above| self.is_there(above))
    }

    /// Whether there is one at a final path, on either side or in the base.
    fn is_unit(&self, path: &RelPath, moves: &Moves) -> Result<bool, Error> {
        if self.is_here(path)? {
            return Ok(true);
        }
        match moves.origin(path) {
            Some(origin) => self.is_there(&origin),
            None => Ok(false),
        }
    }

    /// The innermost one that a final path is in.
    pub(super) fn unit_of(&self, path: &RelPath, moves: &Moves) -> Result<Option<RelPath>, Error> {
        for above in std::iter::successors(path.parent(), RelPath::parent) {
            if !above.is_root() && self.is_unit(&above, moves)? {
                return Ok(Some(above));
            }
        }
        Ok(None)
    }

    /// The final paths of what is in a Git directory on this side and in the base, without
    /// its objects and without what lies in one inside it.
    pub(super) fn state(&self, unit: &RelPath, moves: &Moves) -> Result<BTreeSet<RelPath>, Error> {
        let mut names = BTreeSet::from([unit.clone()]);
        if let Some(origin) = moves.origin(unit) {
            let base = self
                .view
                .base_below_but(self.peer, &origin, OBJECTS)?
                .into_iter()
                .map(|(path, _)| path);
            for path in base.chain(self.derived(&origin)) {
                let path = moves.relocate(&path);
                if self.unit_of(&path, moves)?.as_ref() == Some(unit) {
                    names.insert(path);
                }
            }
        }
        names.extend(self.derived(unit));
        let mut left = Vec::from_iter(self.view.at(unit)?.map(|node| (unit.clone(), node.id)));
        while let Some((directory, id)) = left.pop() {
            for (name, child) in self.view.children(id)? {
                let Ok(path) = directory.join(&name) else {
                    continue;
                };
                let objects = directory == *unit && name == OBJECTS;
                if child.attr.kind == Kind::Directory && !objects && !self.is_here(&path)? {
                    left.push((path.clone(), child.id));
                }
                names.insert(path);
            }
        }
        Ok(names)
    }

    /// What lies among the objects and is none.
    fn derived(&self, unit: &RelPath) -> impl Iterator<Item = RelPath> {
        const DERIVED: [&str; 4] = [
            "objects/info/packs",
            "objects/info/alternates",
            "objects/info/commit-graph",
            "objects/pack/multi-pack-index",
        ];
        let unit = unit.clone();
        DERIVED.into_iter().filter_map(move |name| {
            RelPath::new([unit.as_bytes(), b"/", name.as_bytes()].concat()).ok()
        })
    }
}

fn any_above(
    path: &RelPath,
    mut is: impl FnMut(&RelPath) -> Result<bool, Error>,
) -> Result<bool, Error> {
    for above in std::iter::successors(path.parent(), RelPath::parent) {
        if !above.is_root() && is(&above)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A Git directory that both sides have changed, as it is stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnitState {
    /// The peer's version of it by now.
    pub version: ContentHash,
    /// What this side has changed since the base, apart from objects.
    pub here: Vec<RelPath>,
    /// What the peer has changed.
    pub there: Vec<RelPath>,
}

/// What is stored of a Git directory in conflict.
pub fn unit_state(view: &View, peer: PeerId, unit: &RelPath) -> Result<UnitState, Error> {
    let pending: HashMap<_, _> = view.remote_pending(peer)?.into_iter().collect();
    let repositories = Repositories::new(view, peer, &pending);
    let moves = Moves::default();
    let mut sides = BTreeMap::new();
    let mut git = Git::default();
    let below = pending.keys().filter(|path| path.starts_with(unit));
    for path in below.cloned().chain(repositories.state(unit, &moves)?) {
        if repositories.unit_of(&path, &moves)?.as_ref() != Some(unit)
            || git::role(unit, &path) != Role::State
        {
            continue;
        }
        let base = view.base_at(peer, &path)?.map(|base| base.entry);
        let node = view.at(&path)?;
        // What nobody has hashed since it was written is taken for changed.
        let local = node.and_then(|node| carried(&node, || Some(node.hash.unwrap_or(NO_CONTENT))));
        let remote = pending.get(&path).cloned().unwrap_or_else(|| base.clone());
        if git::is_index(unit, &path) {
            for entry in [&base, &local, &remote].into_iter().flatten() {
                if let Content::File { hash, .. } = entry.content
                    && let Some(meaning) = view.meaning(hash)?
                {
                    git.meanings.insert(hash, meaning);
                }
            }
        }
        sides.insert(
            path,
            Sides {
                base,
                local,
                remote,
            },
        );
    }
    git.units.insert(unit.clone());
    let changed = |side: fn(&Sides) -> &Option<Entry>| -> Vec<RelPath> {
        let names = sides
            .iter()
            .filter(|(path, sides)| git.changed(path, sides.base.as_ref(), side(sides).as_ref()));
        names.map(|(path, _)| path.clone()).collect()
    };
    let names = sides
        .iter()
        .map(|(path, sides)| (path, sides.base.as_ref(), sides.remote.as_ref()));
    Ok(UnitState {
        version: git.version(unit, names),
        here: changed(|sides| &sides.local),
        there: changed(|sides| &sides.remote),
    })
}

/// The hash of nothing that anybody has.
const NO_CONTENT: ContentHash = ContentHash([0; 32]);
