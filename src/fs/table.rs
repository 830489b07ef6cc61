//! The node table: the nodes that the kernel, a cut or the door knows at present,
//! where each is to be found in lower, and how many references keep it.

use std::cmp::Ordering as Order;
use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::fs::FileType;

use crate::tree::{Ino, RelPath};

/// The staging directory as a parent. No inode has this number.
pub(super) const STAGING: Ino = Ino(u64::MAX);

/// A node that somebody knows. There is one for every file that the kernel has cached, so
/// what most of them do not need is in [`Rare`].
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: Ino,
    pub(super) file_type: FileType,
    /// Held while the content changes, and while a cut reads it as it was.
    pub(super) content: Mutex<()>,
    /// The kernel has, or had, pages of its content.
    paged: AtomicBool,
    /// Taken with the table's lock held, so nobody ever waits for it.
    links: Mutex<Links>,
}

/// Where a node can be opened.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// The root of the tree.
    Root,
    /// A name in a directory.
    Named(Ino, Box<[u8]>),
    /// No name is left; this descriptor keeps it.
    Kept(Arc<OwnedFd>),
}

#[derive(Debug, PartialEq, Eq)]
struct Name {
    parent: Ino,
    name: Box<[u8]>,
}

impl Name {
    fn new(parent: Ino, name: &[u8]) -> Self {
        let name = name.into();
        Self { parent, name }
    }

    fn is(&self, parent: Ino, name: &[u8]) -> bool {
        self.parent == parent && &*self.name == name
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Order {
        #[cfg(test)]
        tests::COMPARISONS.set(tests::COMPARISONS.get() + 1);
        (self.parent, &self.name).cmp(&(other.parent, &other.name))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

/// How a node is found, and what keeps it in the table.
#[derive(Debug, Default)]
struct Links {
    /// One of its names.
    name: Option<Name>,
    /// References that the kernel holds: it gives them back with FORGET.
    lookups: u64,
    /// Names of other nodes in this directory, and pins.
    holds: u32,
    rare: Option<Box<Rare>>,
}

/// What few nodes have.
#[derive(Debug, Default)]
struct Rare {
    /// All names but the first: a file may have 65,000 of them.
    further: BTreeSet<Name>,
    /// Opens a node without a known name.
    kept: Option<Arc<OwnedFd>>,
    /// The tree has names for it that were never looked up.
    elsewhere: bool,
    /// It was made without a name, and may get its first one.
    awaits_name: bool,
    /// The node was replaced or removed by a peer's change.
    displaced: Option<Arc<Displaced>>,
}

/// What became of a node that a peer's change displaced.
#[derive(Debug)]
pub(super) struct Displaced {
    /// Its name in the tree at that time.
    pub(super) path: RelPath,
    /// Where it lies, from the trash.
    pub(super) kept: RelPath,
    /// Somebody has written to it since.
    pub(super) late: AtomicBool,
}

impl Displaced {
    pub(super) fn new(path: RelPath, kept: RelPath) -> Self {
        Self {
            path,
            kept,
            late: AtomicBool::new(false),
        }
    }
}

impl Node {
    fn new(ino: Ino, file_type: FileType, links: Links) -> Arc<Self> {
        Arc::new(Self {
            ino,
            file_type,
            content: Mutex::new(()),
            paged: AtomicBool::new(false),
            links: Mutex::new(links),
        })
    }

    /// Notes that the kernel has pages of its content: nothing can be stored through a
    /// mapping before some were read or written.
    pub(super) fn note_paged(&self) {
        self.paged.store(true, Ordering::Relaxed);
    }
}

impl Links {
    /// Enters a name. False if it was known.
    fn add(&mut self, parent: Ino, name: &[u8]) -> bool {
        match &self.name {
            None => {
                self.name = Some(Name::new(parent, name));
                true
            }
            Some(first) if first.is(parent, name) => false,
            Some(_) => {
                let further = &mut self.rare.get_or_insert_default().further;
                further.insert(Name::new(parent, name))
            }
        }
    }

    /// Takes a name away. False if it was not known.
    fn remove(&mut self, parent: Ino, name: &[u8]) -> bool {
        let further = self.rare.as_mut().map(|rare| &mut rare.further);
        let is_first = self
            .name
            .as_ref()
            .is_some_and(|first| first.is(parent, name));
        let removed = if is_first {
            self.name = further.and_then(BTreeSet::pop_first);
            true
        } else {
            further.is_some_and(|further| further.remove(&Name::new(parent, name)))
        };
        self.tidy();
        removed
    }

    fn has_name(&self) -> bool {
        let mut names = self.names();
        names.any(|(parent, _)| parent != STAGING)
    }

    fn tidy(&mut self) {
        if self.rare.as_ref().is_some_and(|rare| rare.is_empty()) {
            self.rare = None;
        }
    }

    fn names(&self) -> impl Iterator<Item = (Ino, &[u8])> {
        let further = self.rare.iter().flat_map(|rare| &rare.further);
        let all = self.name.iter().chain(further);
        all.map(|name| (name.parent, &*name.name))
    }
}

impl Rare {
    fn is_empty(&self) -> bool {
        self.further.is_empty()
            && self.kept.is_none()
            && !self.elsewhere
            && !self.awaits_name
            && self.displaced.is_none()
    }
}

type Nodes = HashMap<Ino, Arc<Node>>;

#[derive(Debug)]
pub(super) struct Table {
    root: Ino,
    nodes: Mutex<Nodes>,
}

impl Table {
    pub(super) fn new(root: Ino) -> Self {
        let links = Links {
            holds: 1,
            ..Links::default()
        };
        let node = Node::new(root, FileType::Directory, links);
        Self {
            root,
            nodes: Mutex::new(HashMap::from([(root, node)])),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.lock().len()
    }

    pub(super) fn get(&self, ino: Ino) -> Option<Arc<Node>> {
        self.nodes.lock().get(&ino).cloned()
    }

    /// Enters a name that was seen in lower, with `lookups` references of the kernel
    /// and `holds` of our own.
    pub(super) fn intern(
        &self,
        parent: Ino,
        name: &[u8],
        ino: Ino,
        file_type: FileType,
        lookups: u64,
        holds: u32,
    ) -> Arc<Node> {
        let mut nodes = self.nodes.lock();
        let node = nodes
            .entry(ino)
            .or_insert_with(|| Node::new(ino, file_type, Links::default()));
        if node.file_type != file_type {
            // Somebody replaced it in lower behind the mount.
            let links = std::mem::take(&mut *node.links.lock());
            *node = Node::new(ino, file_type, links);
        }
        let node = node.clone();
        let mut links = node.links.lock();
        links.lookups += lookups;
        links.holds += holds;
        if ino != self.root && links.add(parent, name) {
            if let Some(rare) = &mut links.rare {
                rare.kept = None;
                rare.displaced = None;
                rare.awaits_name = false;
                links.tidy();
            }
            drop(links);
            if let Some(directory) = nodes.get(&parent) {
                directory.links.lock().holds += 1;
            }
        } else {
            drop(links);
        }
        node
    }

    /// Enters a node without a name, which the kernel refers to once and `kept` opens.
    /// `awaits_name` is whether it may get one.
    pub(super) fn intern_nameless(&self, ino: Ino, kept: Arc<OwnedFd>, awaits_name: bool) {
        let links = Links {
            lookups: 1,
            rare: Some(Box::new(Rare {
                kept: Some(kept),
                awaits_name,
                ..Rare::default()
            })),
            ..Links::default()
        };
        let node = Node::new(ino, FileType::RegularFile, links);
        self.nodes.lock().insert(ino, node);
    }

    /// Whether a node was made without a name and may still get its first one.
    pub(super) fn awaits_name(&self, ino: Ino) -> bool {
        self.get(ino).is_some_and(|node| {
            let links = node.links.lock();
            links.rare.as_ref().is_some_and(|rare| rare.awaits_name)
        })
    }

    /// Takes a name from a node. Where it was the last one known, `kept` is what opens
    /// it from now on; where it was the `last` one at all, the tree has lost the node.
    pub(super) fn remove_name(
        &self,
        parent: Ino,
        name: &[u8],
        ino: Ino,
        last: bool,
        kept: Option<Arc<OwnedFd>>,
    ) -> Vec<Ino> {
        let mut nodes = self.nodes.lock();
        let mut gone = Vec::new();
        let Some(node) = nodes.get(&ino) else {
            return gone;
        };
        let removed = {
            let mut links = node.links.lock();
            let removed = links.remove(parent, name);
            if links.name.is_none() {
                let rare = links.rare.get_or_insert_default();
                rare.elsewhere = !last;
                if rare.kept.is_none() {
                    rare.kept = kept;
                }
                links.tidy();
            }
            removed
        };
        if removed {
            release(&mut nodes, parent, &mut gone);
        }
        drop_unused(&mut nodes, ino, &mut gone);
        gone
    }

    /// Marks a node that a peer's change took out of the tree.
    pub(super) fn displace(&self, ino: Ino, displaced: Displaced) {
        if let Some(node) = self.nodes.lock().get(&ino) {
            node.links.lock().rare.get_or_insert_default().displaced = Some(Arc::new(displaced));
        }
    }

    pub(super) fn displaced(&self, ino: Ino) -> Option<Arc<Displaced>> {
        let node = self.get(ino)?;
        let links = node.links.lock();
        links.rare.as_ref()?.displaced.clone()
    }

    /// Gives the kernel's references back. Returns the nodes that nobody knows any
    /// more.
    pub(super) fn forget(&self, ino: Ino, lookups: u64) -> Vec<Ino> {
        let mut nodes = self.nodes.lock();
        let mut gone = Vec::new();
        if let Some(node) = nodes.get(&ino) {
            {
                let mut links = node.links.lock();
                links.lookups = links.lookups.saturating_sub(lookups);
            }
            drop_unused(&mut nodes, ino, &mut gone);
        }
        gone
    }

    /// Keeps a node in the table until [`Table::unpin`].
    pub(super) fn pin(&self, ino: Ino) -> bool {
        match self.nodes.lock().get(&ino) {
            Some(node) => {
                node.links.lock().holds += 1;
                true
            }
            None => false,
        }
    }

    pub(super) fn unpin(&self, ino: Ino) -> Vec<Ino> {
        let mut nodes = self.nodes.lock();
        let mut gone = Vec::new();
        release(&mut nodes, ino, &mut gone);
        gone
    }

    /// Whether the tree has a name for the node. The staging directory is not in it.
    pub(super) fn is_linked(&self, ino: Ino) -> bool {
        ino == self.root
            || self.get(ino).is_some_and(|node| {
                let links = node.links.lock();
                links.has_name() || links.rare.as_ref().is_some_and(|rare| rare.elsewhere)
            })
    }

    pub(super) fn place(&self, ino: Ino) -> Option<Place> {
        if ino == self.root {
            return Some(Place::Root);
        }
        let node = self.get(ino)?;
        let links = node.links.lock();
        match &links.name {
            Some(name) => Some(Place::Named(name.parent, name.name.clone())),
            None => links.rare.as_ref()?.kept.clone().map(Place::Kept),
        }
    }

    /// A directory's path, or one of a file's; none if it has no name any more.
    pub(super) fn path(&self, ino: Ino) -> Option<RelPath> {
        let nodes = self.nodes.lock();
        one_path(&nodes, self.root, ino)
    }

    /// A path of each regular file that a program may have mapped.
    pub(super) fn files(&self) -> Vec<RelPath> {
        let known: Vec<Ino> = {
            let nodes = self.nodes.lock();
            let files = nodes
                .values()
                .filter(|node| node.file_type == FileType::RegularFile);
            files
                .filter(|node| node.paged.load(Ordering::Relaxed))
                .map(|node| node.ino)
                .collect()
        };
        // One at a time: requests need the table meanwhile.
        known.iter().filter_map(|ino| self.path(*ino)).collect()
    }

    /// All known paths of a node.
    pub(super) fn paths(&self, ino: Ino) -> Vec<RelPath> {
        if ino == self.root {
            return vec![RelPath::ROOT];
        }
        let nodes = self.nodes.lock();
        let Some(node) = nodes.get(&ino) else {
            return Vec::new();
        };
        let names: Vec<(Ino, Box<[u8]>)> = {
            let links = node.links.lock();
            links
                .names()
                .map(|(parent, name)| (parent, name.into()))
                .collect()
        };
        names
            .iter()
            .filter_map(|(parent, name)| one_path(&nodes, self.root, *parent)?.join(name).ok())
            .collect()
    }
}

fn one_path(nodes: &Nodes, root: Ino, ino: Ino) -> Option<RelPath> {
    let mut names = Vec::new();
    let mut current = ino;
    while current != root {
        let links = nodes.get(&current)?.links.lock();
        let name = links.name.as_ref()?;
        names.push(name.name.clone());
        if names.len() > nodes.len() {
            return None;
        }
        current = name.parent;
    }
    names.reverse();
    RelPath::new(names.join(&b'/')).ok()
}

fn release(nodes: &mut Nodes, ino: Ino, gone: &mut Vec<Ino>) {
    if let Some(node) = nodes.get(&ino) {
        {
            let mut links = node.links.lock();
            links.holds = links.holds.saturating_sub(1);
        }
        drop_unused(nodes, ino, gone);
    }
}

/// Removes a node without references, and then those directories that only it kept.
fn drop_unused(nodes: &mut Nodes, ino: Ino, gone: &mut Vec<Ino>) {
    let mut unused = vec![ino];
    while let Some(ino) = unused.pop() {
        let keep = nodes.get(&ino).is_none_or(|node| {
            let links = node.links.lock();
            links.lookups > 0 || links.holds > 0
        });
        if keep {
            continue;
        }
        let Some(node) = nodes.remove(&ino) else {
            continue;
        };
        gone.push(ino);
        for (parent, _) in node.links.lock().names() {
            if let Some(parent) = nodes.get(&parent) {
                let mut links = parent.links.lock();
                links.holds = links.holds.saturating_sub(1);
            }
            unused.push(parent);
        }
    }
    // The kernel forgets by the million when memory is short.
    if nodes.capacity() > 8 * nodes.len() + 4096 {
        nodes.shrink_to(2 * nodes.len());
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const ROOT: Ino = Ino(2);

    #[test]
    fn a_directory_stays_while_a_node_in_it_is_known() {
        let table = Table::new(ROOT);
        table.intern(ROOT, b"d", Ino(10), FileType::Directory, 1, 0);
        table.intern(Ino(10), b"f", Ino(11), FileType::RegularFile, 1, 0);
        assert!(table.forget(Ino(10), 1).is_empty());
        assert_eq!(table.paths(Ino(11)), [RelPath::new("d/f").unwrap()]);
        assert_eq!(table.forget(Ino(11), 1), [Ino(11), Ino(10)]);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_rename_moves_everything_below() {
        let table = Table::new(ROOT);
        table.intern(ROOT, b"d", Ino(10), FileType::Directory, 1, 0);
        table.intern(Ino(10), b"f", Ino(11), FileType::RegularFile, 1, 0);
        table.intern(ROOT, b"e", Ino(10), FileType::Directory, 0, 0);
        table.remove_name(ROOT, b"d", Ino(10), false, None);
        assert_eq!(table.paths(Ino(11)), [RelPath::new("e/f").unwrap()]);
    }

    thread_local! {
        /// How often this thread has compared two names.
        pub(super) static COMPARISONS: Cell<u64> = const { Cell::new(0) };
    }

    /// A file may have 65,000 names, in one directory or in as many.
    #[test]
    fn many_names_of_one_file_take_few_comparisons() {
        const NAMES: u64 = 100_000;
        for in_one_directory in [true, false] {
            let table = Table::new(ROOT);
            let directory = |n: u64| {
                if in_one_directory {
                    ROOT
                } else {
                    Ino(1000 + n)
                }
            };
            let names: Vec<String> = (0..NAMES).map(|n| format!("name-{n}")).collect();
            COMPARISONS.set(0);
            for (n, name) in (0..).zip(&names) {
                let parent = directory(n);
                if !in_one_directory {
                    table.intern(ROOT, name.as_bytes(), parent, FileType::Directory, 1, 0);
                }
                let file = FileType::RegularFile;
                table.intern(parent, name.as_bytes(), Ino(11), file, 1, 0);
                table.intern(parent, name.as_bytes(), Ino(11), file, 1, 0);
            }
            assert_eq!(table.paths(Ino(11)).len(), names.len());
            // The first ones first, which is where the table takes its own from.
            for (n, name) in (0..).zip(&names) {
                assert!(table.is_linked(Ino(11)));
                let last = n == NAMES - 1;
                table.remove_name(directory(n), name.as_bytes(), Ino(11), last, None);
            }
            assert!(!table.is_linked(Ino(11)));
            assert_eq!(table.forget(Ino(11), 2 * NAMES), [Ino(11)]);
            // Each name was entered twice and removed once, in a search of few steps.
            let each = COMPARISONS.get() / NAMES;
            assert!((3..200).contains(&each), "{each} comparisons a name");
        }
    }

    /// A name goes, another is known: the node is opened by that one, and what was kept
    /// for it is closed.
    #[test]
    fn a_node_is_found_by_the_names_it_has_left() {
        let table = Table::new(ROOT);
        for name in [b"a", b"b", b"c"] {
            table.intern(ROOT, name, Ino(11), FileType::RegularFile, 1, 0);
        }
        let place = || match table.place(Ino(11)) {
            Some(Place::Named(parent, name)) => (parent, name.to_vec()),
            other => panic!("{other:?}"),
        };
        assert_eq!(place(), (ROOT, b"a".to_vec()));
        table.remove_name(ROOT, b"a", Ino(11), false, None);
        assert_ne!(place().1, b"a");
        table.remove_name(ROOT, b"b", Ino(11), false, None);
        assert_eq!(place(), (ROOT, b"c".to_vec()));
        let kept = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        table.remove_name(ROOT, b"c", Ino(11), true, Some(kept.clone()));
        assert!(matches!(table.place(Ino(11)), Some(Place::Kept(_))));
        assert!(!table.is_linked(Ino(11)));
        assert_eq!(Arc::strong_count(&kept), 2);
        // A number that comes back under a name is a file like any other.
        table.intern(ROOT, b"d", Ino(11), FileType::RegularFile, 1, 0);
        assert_eq!(place(), (ROOT, b"d".to_vec()));
        assert_eq!(Arc::strong_count(&kept), 1);
    }

    /// One is kept for every file that the kernel has cached.
    #[test]
    fn a_node_is_small() {
        assert!(size_of::<Node>() <= 72, "{}", size_of::<Node>());
    }

    #[test]
    fn the_root_is_never_dropped() {
        let table = Table::new(ROOT);
        table.intern(ROOT, b"f", Ino(11), FileType::RegularFile, 2, 0);
        table.forget(Ino(11), 1);
        assert!(table.is_linked(Ino(11)));
        table.forget(Ino(11), 5);
        assert!(table.get(Ino(11)).is_none());
        assert!(table.get(ROOT).is_some());
        table.forget(ROOT, 100);
        assert!(table.get(ROOT).is_some());
    }
}
