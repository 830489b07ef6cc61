//! Rounds against a real journal, with both trees as models: every step must find what
//! it expects, and afterwards both sides and the base are the same.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mirrorfs_journal::{BaseChange, Change, Durability, Journal, Origin};
use proptest::prelude::*;

use super::batch::{Batch, Step, steps};
use super::doubts::Doubts;
use super::scope::{Scope, Unsettled, gather};
use crate::reconcile::{Decision, Git, Plan, Policy, Sides, reconcile};
use crate::tree::*;
use crate::wire::message::{Expect, Op};

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn entry(content: Content) -> Entry {
    let (mode, mtime) = match &content {
        Content::Directory => (0o755, Timestamp::default()),
        Content::Symlink { .. } => (0o777, Timestamp::default()),
        Content::File { .. } => (0o644, Timestamp { secs: 7, nanos: 7 }),
    };
    Entry {
        content,
        mode,
        mtime,
        xattrs: Xattrs::new(),
    }
}

fn file(version: u8) -> Entry {
    let content = vec![version; 3];
    entry(Content::File {
        size: 3,
        hash: ContentHash::of(&content),
    })
}

fn is_directory(entry: &Entry) -> bool {
    entry.content == Content::Directory
}

/// One step of the random edits of a side.
#[derive(Clone, Debug)]
enum Edit {
    Write(u8, u8),
    MakeDir(u8),
    Link(u8),
    Delete(u8),
    Move(u8, u8),
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        4 => (any::<u8>(), any::<u8>()).prop_map(|(at, version)| Edit::Write(at, version)),
        2 => any::<u8>().prop_map(Edit::MakeDir),
        1 => any::<u8>().prop_map(Edit::Link),
        2 => any::<u8>().prop_map(Edit::Delete),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(from, to)| Edit::Move(from, to)),
    ];
    prop::collection::vec(edit, 0..most)
}

/// Fourteen places on three levels.
fn place(number: u8) -> RelPath {
    const PLACES: [&str; 14] = [
        "a", "b", "c", "a/x", "a/y", "b/x", "b/y", "c/x", "a/x/p", "a/x/q", "b/x/p", "b/y/q",
        "a/y/p", "c/x/p",
    ];
    path(PLACES[usize::from(number) % PLACES.len()])
}

type Tree = BTreeMap<RelPath, Entry>;

/// A tree whose changes somebody hears of.
trait Side {
    fn tree(&self) -> &Tree;
    fn put(&mut self, path: &RelPath, entry: Entry);
    fn remove(&mut self, path: &RelPath);
    fn rename(&mut self, from: &RelPath, to: &RelPath);

    fn below(&self, path: &RelPath) -> Vec<RelPath> {
        self.tree()
            .keys()
            .filter(|other| *other != path && other.starts_with(path))
            .cloned()
            .collect()
    }

    fn has_parent(&self, path: &RelPath) -> bool {
        let parent = path.parent().unwrap();
        parent.is_root() || self.tree().get(&parent).is_some_and(is_directory)
    }

    fn edit(&mut self, edit: &Edit) {
        match edit {
            Edit::Write(at, version) => {
                let at = place(*at);
                if self.has_parent(&at) && !self.tree().get(&at).is_some_and(is_directory) {
                    self.put(&at, file(*version % 8));
                }
            }
            Edit::MakeDir(at) => {
                let at = place(*at);
                if self.has_parent(&at) && !self.tree().contains_key(&at) {
                    self.put(&at, entry(Content::Directory));
                }
            }
            Edit::Link(at) => {
                let at = place(*at);
                if self.has_parent(&at) && !self.tree().contains_key(&at) {
                    self.put(
                        &at,
                        entry(Content::Symlink {
                            target: b"t".to_vec(),
                        }),
                    );
                }
            }
            Edit::Delete(at) => {
                let at = place(*at);
                if self.tree().contains_key(&at) {
                    for below in self.below(&at).into_iter().rev() {
                        self.remove(&below);
                    }
                    self.remove(&at);
                }
            }
            Edit::Move(from, to) => {
                let (from, to) = (place(*from), place(*to));
                let (Some(moved), replaced) = (self.tree().get(&from), self.tree().get(&to)) else {
                    return;
                };
                let fits = match replaced {
                    None => true,
                    Some(replaced) if is_directory(moved) => {
                        is_directory(replaced) && self.below(&to).is_empty()
                    }
                    Some(replaced) => !is_directory(replaced),
                };
                if fits && self.has_parent(&to) && !to.starts_with(&from) && !from.starts_with(&to)
                {
                    self.rename(&from, &to);
                }
            }
        }
    }
}

fn rename_in(tree: &mut Tree, from: &RelPath, to: &RelPath) {
    tree.remove(to);
    let moved: Vec<_> = tree
        .keys()
        .filter(|path| path.starts_with(from))
        .cloned()
        .collect();
    for old in moved {
        let entry = tree.remove(&old).unwrap();
        tree.insert(old.rebase(from, to).unwrap(), entry);
    }
}

/// The mounted side: a model tree, recorded in a journal as a filesystem would.
struct Local {
    tree: Tree,
    inos: HashMap<RelPath, Ino>,
    next: u64,
    origin: Origin,
    journal: Journal,
    _dir: tempfile::TempDir,
}

impl Local {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let mut local = Self {
            tree: Tree::new(),
            inos: HashMap::from([(RelPath::ROOT, Ino(2))]),
            next: 10,
            origin: Origin::Local,
            journal,
            _dir: dir,
        };
        local.record(Change::Root {
            ino: Ino(2),
            attr: attr(&entry(Content::Directory)),
        });
        local
    }

    fn record(&mut self, change: Change) {
        self.journal.recorder().record(self.origin, change).unwrap();
    }

    fn ino(&self, path: &RelPath) -> Ino {
        self.inos[path]
    }
}

fn attr(entry: &Entry) -> Attr {
    let size = match entry.content {
        Content::File { size, .. } => size,
        _ => 0,
    };
    Attr {
        kind: entry.content.kind(),
        mode: entry.mode,
        uid: 0,
        gid: 0,
        size,
        mtime: entry.mtime,
        ctime: entry.mtime,
    }
}

impl Side for Local {
    fn tree(&self) -> &Tree {
        &self.tree
    }

    fn put(&mut self, path: &RelPath, entry: Entry) {
        let parent = self.ino(&path.parent().unwrap());
        let target = match &entry.content {
            Content::Symlink { target } => Some(target.clone()),
            _ => None,
        };
        let same_kind = self
            .tree
            .get(path)
            .is_some_and(|old| old.content.kind() == entry.content.kind());
        if same_kind && target.is_none() {
            let ino = self.ino(path);
            self.record(Change::Write {
                ino,
                offset: 0,
                len: 3,
                attr: attr(&entry),
            });
        } else {
            if self.tree.contains_key(path) {
                self.remove(path);
            }
            let ino = Ino(self.next);
            self.next += 1;
            self.inos.insert(path.clone(), ino);
            let name = path.name().to_vec();
            self.record(Change::Create {
                parent,
                name,
                ino,
                attr: attr(&entry),
                target,
            });
        }
        self.tree.insert(path.clone(), entry);
    }

    fn remove(&mut self, path: &RelPath) {
        let (parent, ino) = (self.ino(&path.parent().unwrap()), self.ino(path));
        self.tree.remove(path);
        self.inos.remove(path);
        self.record(Change::Unlink {
            parent,
            name: path.name().to_vec(),
            ino,
            last: true,
        });
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath) {
        let replaced = self.tree.contains_key(to).then(|| (self.ino(to), true));
        self.record(Change::Rename {
            parent: self.ino(&from.parent().unwrap()),
            name: from.name().to_vec(),
            new_parent: self.ino(&to.parent().unwrap()),
            new_name: to.name().to_vec(),
            ino: self.ino(from),
            replaced,
        });
        rename_in(&mut self.tree, from, to);
        self.inos.remove(to);
        let moved: Vec<_> = self
            .inos
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for old in moved {
            let ino = self.inos.remove(&old).unwrap();
            self.inos.insert(old.rebase(from, to).unwrap(), ino);
        }
    }
}

/// The peer side: a model tree that carries out batches and is strict about them.
#[derive(Default)]
struct Remote {
    tree: Tree,
    changed: BTreeSet<RelPath>,
}

impl Side for Remote {
    fn tree(&self) -> &Tree {
        &self.tree
    }

    fn put(&mut self, path: &RelPath, entry: Entry) {
        self.tree.insert(path.clone(), entry);
        self.changed.insert(path.clone());
    }

    fn remove(&mut self, path: &RelPath) {
        self.tree.remove(path);
        self.changed.insert(path.clone());
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath) {
        self.changed.extend(
            self.tree
                .keys()
                .filter(|path| path.starts_with(from))
                .cloned(),
        );
        rename_in(&mut self.tree, from, to);
        self.changed.extend(
            self.tree
                .keys()
                .filter(|path| path.starts_with(to))
                .cloned(),
        );
    }
}

impl Remote {
    fn apply(&mut self, ops: &[Op]) {
        let mut slots: HashMap<u32, Vec<(RelPath, RelPath, Entry)>> = HashMap::new();
        for op in ops {
            let absent = |tree: &Tree, path: &RelPath| {
                assert!(!tree.contains_key(path), "{op:?} on {tree:?}");
            };
            let parent = |remote: &Self, path: &RelPath| {
                assert!(remote.has_parent(path), "{op:?} on {:?}", remote.tree);
            };
            match op {
                Op::Park { from, slot, expect } => {
                    assert_eq!(
                        self.tree[from].content.kind(),
                        expect.content.kind(),
                        "{op:?}"
                    );
                    let parked: Vec<_> = self
                        .tree
                        .keys()
                        .filter(|path| path.starts_with(from))
                        .cloned()
                        .collect();
                    for path in parked {
                        let entry = self.tree.remove(&path).unwrap();
                        slots
                            .entry(*slot)
                            .or_default()
                            .push((from.clone(), path, entry));
                    }
                }
                Op::Unpark { slot, to } => {
                    absent(&self.tree, to);
                    parent(self, to);
                    for (from, path, entry) in slots.remove(slot).unwrap() {
                        self.tree.insert(path.rebase(&from, to).unwrap(), entry);
                    }
                }
                Op::MakeDir { path, entry } => {
                    absent(&self.tree, path);
                    parent(self, path);
                    self.tree.insert(path.clone(), entry.clone());
                }
                Op::Put {
                    path,
                    entry,
                    expect,
                } => {
                    match expect {
                        Expect::Absent => absent(&self.tree, path),
                        Expect::Entry(expect) => assert_eq!(&self.tree[path], expect, "{op:?}"),
                    }
                    parent(self, path);
                    self.tree.insert(path.clone(), entry.clone());
                }
                Op::SetMeta {
                    path,
                    entry,
                    expect,
                } => {
                    assert_eq!(&self.tree[path], expect, "{op:?}");
                    self.tree.insert(path.clone(), entry.clone());
                }
                Op::Remove { path, expect } => {
                    assert_eq!(self.tree.remove(path).as_ref(), Some(expect), "{op:?}");
                }
                Op::RemoveDir { path } => {
                    assert!(self.below(path).is_empty(), "{op:?} on {:?}", self.tree);
                    assert!(
                        self.tree.remove(path).as_ref().is_some_and(is_directory),
                        "{op:?}"
                    );
                }
                Op::KeepConflict { .. } => {}
            }
        }
        assert!(slots.is_empty(), "{slots:?}");
    }
}

struct Pair {
    local: Local,
    remote: Remote,
    peer: PeerId,
    agreed: bool,
}

impl Pair {
    fn new() -> Self {
        let local = Local::new();
        let peer = local
            .journal
            .update(Durability::Normal, |update| {
                update.add_peer("peer", "/peer")
            })
            .unwrap();
        Self {
            local,
            remote: Remote::default(),
            peer,
            agreed: false,
        }
    }

    /// What the agent would report.
    fn report(&mut self) {
        let observations: Vec<_> = std::mem::take(&mut self.remote.changed)
            .into_iter()
            .map(|path| {
                let entry = self.remote.tree.get(&path).cloned();
                crate::wire::message::Observation {
                    meaning: None,
                    path,
                    entry,
                    rev: 1,
                }
            })
            .collect();
        super::store::observe(
            &self.local.journal,
            self.peer,
            observations,
            None,
            None,
            false,
        )
        .unwrap();
    }

    fn decide(&self) -> (Plan, Scope) {
        let snapshot = self.local.journal.snapshot().unwrap();
        let mut peer = snapshot.peer(self.peer).unwrap().unwrap();
        if self.agreed {
            // Rounds here move the base without the agreement's own number.
            peer.agreement = Some(Agreement {
                number: 1,
                nonce: Id([0; 16]),
                previous: None,
            });
        }
        let tree = &self.local.tree;
        let mut scope = gather(
            &snapshot,
            &peer,
            (&Unsettled::default(), &Doubts::default()),
            &BTreeSet::new(),
            &|_| false,
            &mut |path, _| match &tree[path].content {
                Content::File { hash, .. } => Ok(*hash),
                other => Err(format!("{other:?}")),
            },
        )
        .unwrap();
        let git = std::mem::take(&mut scope.git);
        let plan = reconcile(std::mem::take(&mut scope.sides), git, Policy::TwoWay);
        (plan, scope)
    }

    /// One round, as the driver would run it.
    fn round(&mut self) -> (Plan, usize) {
        self.report();
        let (plan, scope) = self.decide();
        let cursor = self.local.journal.snapshot().unwrap().n();
        let nodes: HashMap<RelPath, NodeId> = scope
            .locals
            .iter()
            .map(|(path, local)| (path.clone(), local.node))
            .collect();
        let batch = Batch::new(&plan, &scope.moves, &nodes);
        let local_steps = steps(&plan, |sides: &Sides| &sides.local);
        let work = batch.ops.len() + local_steps.len();
        self.local.origin = Origin::Peer(self.peer);
        for Step {
            path,
            before,
            after,
        } in local_steps
        {
            assert_eq!(self.local.tree.get(&path), before.as_ref(), "{path}");
            match after {
                Some(after) => {
                    assert!(self.local.has_parent(&path), "{path}: {plan:?}");
                    self.local.put(&path, after);
                }
                None => {
                    assert!(self.local.below(&path).is_empty(), "{path}: {plan:?}");
                    self.local.remove(&path);
                }
            }
        }
        self.local.origin = Origin::Local;
        self.remote.apply(&batch.ops);
        let mut changes = mirrorfs_journal::base_without(&batch.base, &BTreeSet::new());
        let snapshot = self.local.journal.snapshot().unwrap();
        for change in &mut changes {
            if let BaseChange::Put { path, node, .. } = change {
                *node = snapshot.at(path).unwrap().map(|node| node.id);
            }
        }
        drop(snapshot);
        let (peer, moves) = (self.peer, scope.moves.clone());
        let decided: Vec<RelPath> = scope
            .observed
            .iter()
            .map(|(path, _)| path.clone())
            .filter(|path| {
                let decision = &plan.decisions[&scope.moves.relocate(path)].1;
                matches!(decision, Decision::Agree { .. })
            })
            .collect();
        self.local
            .journal
            .update(Durability::Normal, move |update| {
                for path in &decided {
                    update.forget_observation(peer, path)?;
                }
                super::store::relocate_observations(update, peer, &moves)?;
                update.apply_base(peer, &changes)?;
                update.set_cursor(peer, cursor)
            })
            .unwrap();
        self.agreed = true;
        (plan, work)
    }

    fn base(&self) -> Tree {
        let snapshot = self.local.journal.snapshot().unwrap();
        let base = snapshot.base_below(self.peer, &RelPath::ROOT).unwrap();
        base.into_iter()
            .map(|(path, base)| (path, base.entry))
            .collect()
    }
}

fn conflicts(plan: &Plan) -> usize {
    plan.decisions
        .values()
        .filter(|(_, decision)| !matches!(decision, Decision::Agree { .. }))
        .count()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Edits on both sides, a round, edits, a round: without conflicts both sides and
    /// the base are equal after each, and a further round has nothing to do.
    #[test]
    fn rounds_bring_both_sides_together(
        phases in prop::collection::vec((edits(12), edits(8)), 1..4)
    ) {
        let mut pair = Pair::new();
        let mut clean = true;
        for (local, remote) in &phases {
            local.iter().for_each(|edit| pair.local.edit(edit));
            remote.iter().for_each(|edit| pair.remote.edit(edit));
            let (plan, _) = pair.round();
            clean &= conflicts(&plan) == 0;
            let (echo, work) = pair.round();
            if clean {
                prop_assert_eq!(&pair.local.tree, &pair.remote.tree);
                prop_assert_eq!(&pair.base(), &pair.local.tree);
                prop_assert_eq!(work, 0, "{:?}", echo);
            }
        }
    }

    /// One-sided edits never conflict, however they move things about.
    #[test]
    fn edits_of_one_side_arrive(first in edits(20), second in edits(20)) {
        let mut pair = Pair::new();
        for phase in [&first, &second] {
            phase.iter().for_each(|edit| pair.local.edit(edit));
            let (plan, _) = pair.round();
            prop_assert_eq!(conflicts(&plan), 0, "{:?}", plan);
            prop_assert_eq!(&pair.local.tree, &pair.remote.tree);
        }
    }
}

fn seeded(trees: &[(&str, Entry)]) -> Pair {
    let mut pair = Pair::new();
    for (at, entry) in trees {
        pair.local.put(&path(at), entry.clone());
    }
    pair.round();
    pair.round();
    assert_eq!(pair.local.tree, pair.remote.tree);
    pair
}

#[test]
fn a_moved_directory_is_one_operation() {
    let names: Vec<String> = (0..100).map(|number| format!("d/{number}")).collect();
    let mut trees = vec![("d", entry(Content::Directory))];
    trees.extend(names.iter().map(|name| (name.as_str(), file(1))));
    let mut pair = seeded(&trees);
    pair.local.rename(&path("d"), &path("e"));
    let (_, work) = pair.round();
    assert_eq!(work, 2, "parked and put back");
    assert_eq!(pair.local.tree, pair.remote.tree);
    assert_eq!(pair.base(), pair.local.tree);
}

#[test]
fn an_edit_on_the_peer_follows_a_move() {
    let mut pair = seeded(&[("a", entry(Content::Directory)), ("a/x", file(1))]);
    pair.local.rename(&path("a"), &path("b"));
    pair.remote.put(&path("a/x"), file(2));
    let (plan, _) = pair.round();
    assert_eq!(conflicts(&plan), 0);
    assert_eq!(pair.local.tree[&path("b/x")], file(2));
    assert_eq!(pair.local.tree, pair.remote.tree);
}

#[test]
fn directories_swap_places() {
    let mut pair = seeded(&[
        ("a", entry(Content::Directory)),
        ("a/x", file(1)),
        ("b", entry(Content::Directory)),
        ("b/x", file(2)),
    ]);
    for (from, to) in [("a", "c"), ("b", "a"), ("c", "b")] {
        pair.local.rename(&path(from), &path(to));
    }
    let (_, work) = pair.round();
    assert_eq!(work, 4);
    assert_eq!(pair.remote.tree[&path("a/x")], file(2));
    assert_eq!(pair.local.tree, pair.remote.tree);
}

#[test]
fn what_a_conflict_held_back_travels_once_it_is_moved_out_of_it() {
    // To a place of its own, and to one where another directory was.
    for to in ["b", "a"] {
        let mut pair = seeded(&[("a", entry(Content::Directory))]);
        for (at, entry) in [
            ("c", entry(Content::Directory)),
            ("c/x", entry(Content::Directory)),
            ("c/x/p", file(1)),
        ] {
            pair.local.put(&path(at), entry);
        }
        pair.remote.put(&path("c"), file(2));
        let (plan, _) = pair.round();
        assert!(conflicts(&plan) > 0, "a directory and a file");
        if to == "a" {
            pair.local.remove(&path(to));
        }
        // Of what is in it nothing changes.
        pair.local.rename(&path("c/x"), &path(to));
        pair.round();
        let arrived = pair.remote.tree.get(&path(to).join(b"p").unwrap());
        assert_eq!(arrived, Some(&file(1)), "{to}");
    }
}

#[test]
fn moved_here_and_deleted_there_is_kept() {
    let mut pair = seeded(&[("a", entry(Content::Directory)), ("a/x", file(1))]);
    pair.local.rename(&path("a"), &path("b"));
    pair.remote.edit(&Edit::Delete(0));
    pair.round();
    assert_eq!(pair.local.tree[&path("b/x")], file(1));
    assert_eq!(pair.local.tree, pair.remote.tree);
}

#[test]
fn objects_come_before_refs_and_packs_before_their_index() {
    let names = [
        ".git/refs/heads/main",
        ".git/objects/pack/p.idx",
        ".git/objects/ab/cd",
        ".git/HEAD",
        ".git/objects/pack/p.pack",
    ];
    let mut decisions = BTreeMap::new();
    for name in names {
        let sides = Sides {
            base: None,
            local: Some(file(1)),
            remote: None,
        };
        let result = sides.local.clone();
        decisions.insert(path(name), (sides, Decision::Agree { result, note: None }));
    }
    let git = Git {
        units: [path(".git")].into(),
        ..Git::default()
    };
    let order: Vec<String> = steps(&Plan { decisions, git }, |sides: &Sides| &sides.remote)
        .into_iter()
        .map(|step| step.path.to_string())
        .collect();
    let position = |name: &str| order.iter().position(|other| other == name).unwrap();
    assert!(position(".git/objects/pack/p.pack") < position(".git/objects/pack/p.idx"));
    assert!(position(".git/objects/ab/cd") < position(".git/refs/heads/main"));
    assert!(position(".git/objects/pack/p.idx") < position(".git/HEAD"));
}

/// Found by `rounds_bring_both_sides_together`.
#[test]
fn something_new_in_what_is_a_file_here_by_now_waits() {
    let mut pair = seeded(&[("b", entry(Content::Directory))]);
    pair.local.remove(&path("b"));
    pair.local.put(&path("b"), file(1));
    pair.remote.put(&path("b/x"), file(2));
    for _ in 0..2 {
        let (plan, _) = pair.round();
        assert_eq!(plan.decisions[&path("b")].1, Decision::Conflict);
    }
    assert_eq!(pair.local.tree[&path("b")], file(1));
    assert_eq!(pair.remote.tree[&path("b/x")], file(2));
}

/// Found by `rounds_bring_both_sides_together`.
#[test]
fn nothing_moves_into_what_is_a_file_over_there() {
    let mut pair = seeded(&[("x", file(1))]);
    pair.local.put(&path("a"), entry(Content::Directory));
    pair.local.rename(&path("x"), &path("a/y"));
    pair.remote.put(&path("a"), file(2));
    let (plan, _) = pair.round();
    assert_eq!(plan.decisions[&path("a")].1, Decision::Conflict);
    assert_eq!(pair.local.tree[&path("a/y")], file(1));
    assert_eq!(pair.remote.tree[&path("a")], file(2));
}
