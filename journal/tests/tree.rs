//! The recorded tree against a model of a filesystem, under random operations.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use mirrorfs_journal::*;
use proptest::prelude::*;

/// What one operation of the model does; the numbers choose among what exists.
#[derive(Clone, Debug)]
enum Step {
    Create(Kind, usize, u8),
    Link(usize, usize, u8),
    Unlink(usize),
    Rename(usize, usize, u8),
    Exchange(usize, usize),
    Write(usize, u16),
    Chmod(usize, u16),
    Xattr(usize, u8),
    /// Looks at everything through a snapshot, once all is done.
    Mark,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = any::<usize>;
    let name = || 0..6_u8;
    let kind = prop_oneof![
        3 => Just(Kind::File),
        3 => Just(Kind::Directory),
        1 => Just(Kind::Symlink),
        1 => Just(Kind::Special),
    ];
    let step = prop_oneof![
        6 => (kind, index(), name()).prop_map(|(kind, at, name)| Step::Create(kind, at, name)),
        2 => (index(), index(), name()).prop_map(|(of, at, name)| Step::Link(of, at, name)),
        3 => index().prop_map(Step::Unlink),
        5 => (index(), index(), name()).prop_map(|(of, at, name)| Step::Rename(of, at, name)),
        2 => (index(), index()).prop_map(|(one, two)| Step::Exchange(one, two)),
        3 => (index(), any::<u16>()).prop_map(|(of, len)| Step::Write(of, len)),
        1 => (index(), 0..0o1000_u16).prop_map(|(of, mode)| Step::Chmod(of, mode)),
        1 => (index(), any::<u8>()).prop_map(|(of, value)| Step::Xattr(of, value)),
        1 => Just(Step::Mark),
    ];
    prop::collection::vec(step, 1..120)
}

/// A node of the model. `serial` is its identity: inode numbers are used again.
#[derive(Clone, Debug)]
struct Inode {
    serial: u64,
    attr: Attr,
    target: Option<Vec<u8>>,
    xattrs: Xattrs,
    links: usize,
    children: BTreeMap<Vec<u8>, u64>,
}

#[derive(Clone)]
struct Model {
    inodes: BTreeMap<u64, Inode>,
    serial: u64,
}

const ROOT: u64 = 77;

/// Path, serial, inode number, attributes, target, extended attributes.
type Shown = Vec<(RelPath, u64, u64, Attr, Option<Vec<u8>>, Xattrs)>;

impl Model {
    fn new() -> Self {
        let root = Inode {
            serial: 0,
            attr: attr(Kind::Directory, 0),
            target: None,
            xattrs: Xattrs::new(),
            links: 1,
            children: BTreeMap::new(),
        };
        Self {
            inodes: BTreeMap::from([(ROOT, root)]),
            serial: 0,
        }
    }

    /// All names, as (directory, name).
    fn names(&self) -> Vec<(u64, Vec<u8>)> {
        self.inodes
            .iter()
            .flat_map(|(ino, inode)| inode.children.keys().map(|name| (*ino, name.clone())))
            .collect()
    }

    fn pick_name(&self, choice: usize) -> Option<(u64, Vec<u8>)> {
        let names = self.names();
        (!names.is_empty()).then(|| names[choice % names.len()].clone())
    }

    fn pick_directory(&self, choice: usize) -> u64 {
        let all: Vec<u64> = self
            .inodes
            .iter()
            .filter(|(_, inode)| inode.attr.kind == Kind::Directory)
            .map(|(ino, _)| *ino)
            .collect();
        all[choice % all.len()]
    }

    fn get(&self, place: &(u64, Vec<u8>)) -> Option<u64> {
        self.inodes[&place.0].children.get(&place.1).copied()
    }

    fn is_inside(&self, directory: u64, ancestor: u64) -> bool {
        directory == ancestor
            || self.inodes[&ancestor]
                .children
                .values()
                .any(|child| self.is_inside(directory, *child))
    }

    /// Takes a link off a node and says whether it was the last.
    fn unlink(&mut self, ino: u64) -> bool {
        let inode = self.inodes.get_mut(&ino).unwrap();
        inode.links -= 1;
        let last = inode.links == 0;
        if last {
            self.inodes.remove(&ino);
        }
        last
    }

    /// Does a step; gives the change to record and the serials that it touches.
    fn step(&mut self, step: &Step) -> Option<(Change, Vec<u64>)> {
        match *step {
            Step::Mark => None,
            Step::Create(kind, at, name) => {
                let parent = self.pick_directory(at);
                let name = vec![b'a' + name];
                if self.inodes[&parent].children.contains_key(&name) {
                    return None;
                }
                // The lowest free number, so that numbers are used again at once.
                let ino = (100..).find(|ino| !self.inodes.contains_key(ino)).unwrap();
                self.serial += 1;
                let target = (kind == Kind::Symlink).then(|| b"to/there".to_vec());
                let inode = Inode {
                    serial: self.serial,
                    attr: attr(kind, 0),
                    target: target.clone(),
                    xattrs: Xattrs::new(),
                    links: 1,
                    children: BTreeMap::new(),
                };
                let attr = inode.attr;
                self.inodes.insert(ino, inode);
                self.inodes
                    .get_mut(&parent)
                    .unwrap()
                    .children
                    .insert(name.clone(), ino);
                let change = Change::Create {
                    parent: Ino(parent),
                    name,
                    ino: Ino(ino),
                    attr,
                    target,
                };
                Some((change, vec![self.serial]))
            }
            Step::Link(of, at, name) => {
                let ino = self.get(&self.pick_name(of)?)?;
                let parent = self.pick_directory(at);
                let name = vec![b'a' + name];
                if self.inodes[&ino].attr.kind == Kind::Directory
                    || self.inodes[&parent].children.contains_key(&name)
                {
                    return None;
                }
                let children = &mut self.inodes.get_mut(&parent).unwrap().children;
                children.insert(name.clone(), ino);
                let inode = self.inodes.get_mut(&ino).unwrap();
                inode.links += 1;
                let serial = inode.serial;
                let change = Change::Link {
                    parent: Ino(parent),
                    name,
                    ino: Ino(ino),
                };
                Some((change, vec![serial]))
            }
            Step::Unlink(of) => {
                let place = self.pick_name(of)?;
                let ino = self.get(&place)?;
                if !self.inodes[&ino].children.is_empty() {
                    return None;
                }
                let serial = self.inodes[&ino].serial;
                let (parent, name) = place;
                self.inodes.get_mut(&parent).unwrap().children.remove(&name);
                let last = self.unlink(ino);
                let change = Change::Unlink {
                    parent: Ino(parent),
                    name,
                    ino: Ino(ino),
                    last,
                };
                Some((change, vec![serial]))
            }
            Step::Rename(of, at, new_name) => {
                let (parent, name) = self.pick_name(of)?;
                let ino = self.get(&(parent, name.clone()))?;
                let to = (self.pick_directory(at), vec![b'a' + new_name]);
                let is_directory = self.inodes[&ino].attr.kind == Kind::Directory;
                if is_directory && self.is_inside(to.0, ino) {
                    return None;
                }
                let mut touched = vec![self.inodes[&ino].serial];
                let replaced = match self.get(&to) {
                    Some(old) if old == ino => return None,
                    Some(old) => {
                        let there = &self.inodes[&old];
                        if (there.attr.kind == Kind::Directory) != is_directory
                            || !there.children.is_empty()
                        {
                            return None;
                        }
                        touched.push(there.serial);
                        Some((Ino(old), self.unlink(old)))
                    }
                    None => None,
                };
                self.inodes.get_mut(&parent).unwrap().children.remove(&name);
                let children = &mut self.inodes.get_mut(&to.0).unwrap().children;
                children.insert(to.1.clone(), ino);
                let change = Change::Rename {
                    parent: Ino(parent),
                    name,
                    new_parent: Ino(to.0),
                    new_name: to.1,
                    ino: Ino(ino),
                    replaced,
                };
                Some((change, touched))
            }
            Step::Exchange(one, two) => {
                let (one, two) = (self.pick_name(one)?, self.pick_name(two)?);
                let (ino, other) = (self.get(&one)?, self.get(&two)?);
                if ino == other || self.is_inside(two.0, ino) || self.is_inside(one.0, other) {
                    return None;
                }
                let touched = vec![self.inodes[&ino].serial, self.inodes[&other].serial];
                let mut put = |place: &(u64, Vec<u8>), ino| {
                    let children = &mut self.inodes.get_mut(&place.0).unwrap().children;
                    children.insert(place.1.clone(), ino);
                };
                put(&one, other);
                put(&two, ino);
                let change = Change::Exchange {
                    parent: Ino(one.0),
                    name: one.1,
                    ino: Ino(ino),
                    new_parent: Ino(two.0),
                    new_name: two.1,
                    other: Ino(other),
                };
                Some((change, touched))
            }
            Step::Write(of, len) => {
                let ino = self.get(&self.pick_name(of)?)?;
                let inode = self.inodes.get_mut(&ino).unwrap();
                if inode.attr.kind != Kind::File {
                    return None;
                }
                let offset = inode.attr.size;
                inode.attr.size += u64::from(len);
                let change = Change::Write {
                    ino: Ino(ino),
                    offset,
                    len: u64::from(len),
                    attr: inode.attr,
                };
                Some((change, vec![inode.serial]))
            }
            Step::Chmod(of, mode) => {
                let ino = self.get(&self.pick_name(of)?)?;
                let inode = self.inodes.get_mut(&ino).unwrap();
                inode.attr.mode = u32::from(mode);
                let change = Change::Attr {
                    ino: Ino(ino),
                    attr: inode.attr,
                };
                Some((change, vec![inode.serial]))
            }
            Step::Xattr(of, value) => {
                let ino = self.get(&self.pick_name(of)?)?;
                let inode = self.inodes.get_mut(&ino).unwrap();
                if value == 0 {
                    inode.xattrs.clear();
                } else {
                    inode.xattrs.insert(b"user.x".to_vec(), vec![value]);
                }
                let change = Change::Xattrs {
                    ino: Ino(ino),
                    attr: inode.attr,
                    xattrs: inode.xattrs.clone(),
                };
                Some((change, vec![inode.serial]))
            }
        }
    }

    fn show(&self) -> Shown {
        let mut shown = Vec::new();
        self.show_below(ROOT, &RelPath::ROOT, &mut shown);
        shown
    }

    fn show_below(&self, directory: u64, path: &RelPath, shown: &mut Shown) {
        for (name, ino) in &self.inodes[&directory].children {
            let path = path.join(name).unwrap();
            let inode = &self.inodes[ino];
            let (target, xattrs) = (inode.target.clone(), inode.xattrs.clone());
            shown.push((path.clone(), inode.serial, *ino, inode.attr, target, xattrs));
            self.show_below(*ino, &path, shown);
        }
    }
}

fn attr(kind: Kind, size: u64) -> Attr {
    Attr {
        kind,
        mode: 0o644,
        uid: 1,
        gid: 2,
        size,
        mtime: Timestamp {
            secs: -5,
            nanos: 999_999_999,
        },
        ctime: Timestamp { secs: 7, nanos: 1 },
    }
}

/// The snapshot shows what the model showed; gives the id of each serial.
fn check_tree(snapshot: &Snapshot, expected: &Shown) -> BTreeMap<u64, NodeId> {
    let mut ids = BTreeMap::new();
    let mut expected_paths: BTreeMap<NodeId, Vec<RelPath>> = BTreeMap::new();
    let mut expected_now = expected.iter();
    snapshot
        .walk(|path, node| {
            let (at, serial, ino, attr, target, xattrs) =
                expected_now.next().expect("a name too many");
            assert_eq!(path, at);
            assert_eq!(node.ino, Ino(*ino), "{path}");
            assert_eq!(node.attr, *attr, "{path}");
            assert_eq!((&node.target, &node.xattrs), (target, xattrs), "{path}");
            assert!(node.content_n <= node.changed_n && node.changed_n <= snapshot.n());
            assert_eq!(*ids.entry(*serial).or_insert(node.id), node.id, "{path}");
            expected_paths
                .entry(node.id)
                .or_default()
                .push(path.clone());
            assert_eq!(snapshot.at(path)?.as_ref(), Some(node));
            assert_eq!(snapshot.node_by_ino(node.ino)?.as_ref(), Some(node));
            Ok(())
        })
        .unwrap();
    assert!(expected_now.next().is_none(), "a name is missing");
    for (node, mut paths) in expected_paths {
        paths.sort();
        assert_eq!(snapshot.paths(node).unwrap(), paths);
    }
    let distinct: BTreeSet<NodeId> = ids.values().copied().collect();
    assert_eq!(distinct.len(), ids.len(), "two nodes share an id");
    ids
}

fn run(steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.fresh);
    let recorder = journal.recorder();
    let mut model = Model::new();
    let root = Change::Root {
        ino: Ino(ROOT),
        attr: attr(Kind::Directory, 0),
    };
    recorder.record(Origin::Scan, root).unwrap();
    // What each change touched, and what was to be seen at each mark.
    let mut touched: Vec<(u64, Vec<u64>)> = Vec::new();
    let mut marks = vec![(recorder.mark().unwrap(), model.show())];
    for step in steps {
        match model.step(step) {
            Some((change, serials)) => {
                let n = recorder.record(Origin::Local, change).unwrap();
                touched.push((n, serials));
            }
            None => marks.push((recorder.mark().unwrap(), model.show())),
        }
    }
    marks.push((recorder.mark().unwrap(), model.show()));
    // The model's identities and the journal's, one for one, over the whole run.
    let mut ids: BTreeMap<u64, NodeId> = BTreeMap::new();
    let mut snapshots = Vec::new();
    for (mark, expected) in marks {
        let n = mark.n;
        let snapshot = journal.snapshot_at(mark).unwrap();
        assert_eq!(snapshot.n(), n);
        for (serial, id) in check_tree(&snapshot, &expected) {
            assert_eq!(*ids.entry(serial).or_insert(id), id, "identity lost");
        }
        snapshots.push(n);
    }
    let last = journal.snapshot().unwrap();
    for since in snapshots {
        let reported: BTreeSet<NodeId> = last.touched(since).unwrap().into_iter().collect();
        let expected: BTreeSet<u64> = touched
            .iter()
            .filter(|(n, _)| *n > since)
            .flat_map(|(_, serials)| serials.iter().copied())
            .collect();
        for (serial, id) in &ids {
            assert_eq!(
                reported.contains(id),
                expected.contains(serial),
                "{id:?} since {since}"
            );
        }
    }
    drop(last);
    // Nothing that fits was taken for a misfit: the next start is clean.
    journal.close().unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.clean && !start.fresh);
    check_tree(&journal.snapshot().unwrap(), &model.show());
}

/// Records that fit nothing: the record may become wrong, but never unusable.
fn run_wild(changes: Vec<Change>) {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    for change in changes {
        recorder.record(Origin::Local, change).unwrap();
    }
    let snapshot = journal.snapshot().unwrap();
    let mut names = 0;
    snapshot
        .walk(|path, node| {
            names += 1;
            assert_eq!(snapshot.at(path)?.as_ref(), Some(node));
            assert!(snapshot.paths(node.id)?.contains(path));
            Ok(())
        })
        .unwrap();
    // Everything recorded hangs below the root.
    let mut reachable = 0;
    for id in snapshot.touched(0).unwrap() {
        if let Some(node) = snapshot.node(id).unwrap()
            && id != NodeId::ROOT
        {
            let paths = snapshot.paths(id).unwrap();
            assert!(!paths.is_empty(), "{node:?} hangs nowhere");
            reachable += paths.len();
        }
    }
    assert_eq!(reachable, names);
    assert_eq!(journal.status().poisoned, None);
}

fn wild() -> impl Strategy<Value = Vec<Change>> {
    let ino = || (1..9_u64).prop_map(Ino);
    let name = || {
        prop_oneof![
            9 => (0..4_u8).prop_map(|name| vec![b'a' + name]),
            1 => prop::sample::select(vec![b"".to_vec(), b"..".to_vec(), b"x/y".to_vec(), vec![0]]),
        ]
    };
    let some_attr = || {
        prop_oneof![Just(Kind::File), Just(Kind::Directory), Just(Kind::Symlink)]
            .prop_map(|kind| attr(kind, u64::MAX))
    };
    let change = prop_oneof![
        1 => (ino(), some_attr()).prop_map(|(ino, attr)| Change::Root { ino, attr }),
        4 => (ino(), name(), ino(), some_attr()).prop_map(|(parent, name, ino, attr)| {
            Change::Create { parent, name, ino, attr, target: None }
        }),
        2 => (ino(), name(), ino()).prop_map(|(parent, name, ino)| Change::Link { parent, name, ino }),
        2 => (ino(), name(), ino(), any::<bool>()).prop_map(|(parent, name, ino, last)| {
            Change::Unlink { parent, name, ino, last }
        }),
        4 => (ino(), name(), ino(), name(), ino(), prop::option::of((ino(), any::<bool>()))).prop_map(
            |(parent, name, new_parent, new_name, ino, replaced)| Change::Rename {
                parent, name, new_parent, new_name, ino, replaced,
            }
        ),
        2 => (ino(), name(), ino(), ino(), name(), ino()).prop_map(
            |(parent, name, ino, new_parent, new_name, other)| Change::Exchange {
                parent, name, ino, new_parent, new_name, other,
            }
        ),
        1 => (ino(), any::<u64>(), any::<u64>(), some_attr()).prop_map(|(ino, offset, len, attr)| {
            Change::Write { ino, offset, len, attr }
        }),
        1 => ino().prop_map(|ino| Change::Sync { ino }),
    ];
    // Few numbers and names, so that nearly every record runs into another.
    prop::collection::vec(change, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn the_record_is_the_tree(steps in steps()) {
        run(&steps);
    }

    #[test]
    fn records_that_do_not_fit_poison_nothing(changes in wild()) {
        run_wild(changes);
    }
}

#[test]
fn a_misfit_asks_for_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let create = |ino| Change::Create {
        parent: Ino(ROOT),
        name: b"a".to_vec(),
        ino: Ino(ino),
        attr: attr(Kind::File, 0),
        target: None,
    };
    let recorder = journal.recorder();
    let first = recorder.record(Origin::Local, create(5)).unwrap();
    let old = journal
        .snapshot()
        .unwrap()
        .node_by_ino(Ino(5))
        .unwrap()
        .unwrap();
    recorder.record(Origin::Local, create(6)).unwrap();
    let snapshot = journal.snapshot().unwrap();
    let path = RelPath::new("a").unwrap();
    let new = snapshot.at(&path).unwrap().unwrap();
    assert_eq!(new.ino, Ino(6));
    assert_eq!(snapshot.touched(first).unwrap(), [old.id, new.id]);
    assert_eq!(snapshot.node(old.id).unwrap(), None);
    drop(snapshot);
    journal.close().unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(!start.clean);
    journal.close().unwrap();
    assert!(Journal::open(dir.path()).unwrap().1.clean);
}

/// What was written to a file since a change is told if nothing else became of its content.
#[test]
fn what_was_written_to_a_file_is_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    let ino = Ino(5);
    let attr = attr(Kind::File, 100);
    let record = |change| recorder.record(Origin::Local, change).unwrap();
    let write = |offset, len| {
        record(Change::Write {
            ino,
            offset,
            len,
            attr,
        })
    };
    let written = |since| {
        let snapshot = journal.snapshot().unwrap();
        let node = snapshot.node_by_ino(ino).unwrap().unwrap();
        snapshot.written(node.id, since).unwrap()
    };
    let created = record(Change::Create {
        parent: Ino(ROOT),
        name: b"a".to_vec(),
        ino,
        attr,
        target: None,
    });
    write(0, 10);
    record(Change::Attr { ino, attr });
    record(Change::Link {
        parent: Ino(ROOT),
        name: b"b".to_vec(),
        ino,
    });
    let second = write(50, 7);
    assert_eq!(written(created), Some(vec![0..10, 50..57]));
    assert_eq!(written(second), Some(Vec::new()));
    assert_eq!(written(created - 1), None, "all of it is new");
    record(Change::Truncate { ino, attr });
    write(3, 4);
    assert_eq!(written(second), None, "it was cut as well");
    let snapshot = journal.snapshot().unwrap();
    let node = snapshot.node_by_ino(ino).unwrap().unwrap();
    drop(snapshot);
    let everything = recorder.last();
    journal
        .update(Durability::Normal, move |update| {
            update.compact_unseen(0, u64::MAX).map(drop)
        })
        .unwrap();
    let snapshot = journal.snapshot().unwrap();
    assert_eq!(snapshot.written(node.id, created).unwrap(), None);
    assert_eq!(
        snapshot.written(node.id, everything).unwrap(),
        Some(Vec::new())
    );
}
