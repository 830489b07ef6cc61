//! The node table: the nodes that the kernel, a cut or the door knows at present,
//! where each is to be found in lower, and how many references keep it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::FileType;

use crate::tree::{Ino, RelPath};

/// The staging directory as a parent. No inode has this number.
pub(super) const STAGING: Ino = Ino(u64::MAX);

/// A node that somebody knows.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: Ino,
    pub(super) file_type: FileType,
    /// Held while the content changes, and while a cut reads it as it was.
    pub(super) content: Mutex<()>,
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

#[derive(Debug)]
struct Slot {
    node: Arc<Node>,
    names: Vec<Name>,
    /// References that the kernel holds: it gives them back with FORGET.
    lookups: u64,
    /// Names of other nodes in this directory, and pins.
    holds: u64,
    kept: Option<Arc<OwnedFd>>,
    /// The tree has names for it that were never looked up.
    elsewhere: bool,
    /// The node was replaced or removed by a peer's change; its name in the tree
    /// at that time and where it lies in the trash.
    displaced: Option<Arc<Displaced>>,
}

/// What became of a node that a peer's change displaced.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Displaced {
    pub(super) path: RelPath,
    pub(super) trash: String,
}

#[derive(Debug)]
pub(super) struct Table {
    root: Ino,
    slots: Mutex<HashMap<Ino, Slot>>,
}

impl Table {
    pub(super) fn new(root: Ino) -> Self {
        let node = Arc::new(Node {
            ino: root,
            file_type: FileType::Directory,
            content: Mutex::new(()),
        });
        let slot = Slot {
            node,
            names: Vec::new(),
            lookups: 0,
            holds: 1,
            kept: None,
            elsewhere: false,
            displaced: None,
        };
        Self {
            root,
            slots: Mutex::new(HashMap::from([(root, slot)])),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.lock().len()
    }

    pub(super) fn get(&self, ino: Ino) -> Option<Arc<Node>> {
        self.slots.lock().get(&ino).map(|slot| slot.node.clone())
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
        holds: u64,
    ) -> Arc<Node> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(ino).or_insert_with(|| Slot {
            node: Arc::new(Node {
                ino,
                file_type,
                content: Mutex::new(()),
            }),
            names: Vec::new(),
            lookups: 0,
            holds: 0,
            kept: None,
            elsewhere: false,
            displaced: None,
        });
        if slot.node.file_type != file_type {
            // Somebody replaced it in lower behind the mount.
            slot.node = Arc::new(Node {
                ino,
                file_type,
                content: Mutex::new(()),
            });
        }
        slot.lookups += lookups;
        slot.holds += holds;
        let node = slot.node.clone();
        let known = slot
            .names
            .iter()
            .any(|known| known.parent == parent && &*known.name == name);
        if !known && ino != self.root {
            slot.names.push(Name {
                parent,
                name: name.into(),
            });
            slot.kept = None;
            slot.displaced = None;
            if let Some(directory) = slots.get_mut(&parent) {
                directory.holds += 1;
            }
        }
        node
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
        let mut slots = self.slots.lock();
        let mut gone = Vec::new();
        let Some(slot) = slots.get_mut(&ino) else {
            return gone;
        };
        let before = slot.names.len();
        slot.names
            .retain(|known| !(known.parent == parent && &*known.name == name));
        let removed = before - slot.names.len();
        if slot.names.is_empty() {
            slot.elsewhere = !last;
            if slot.kept.is_none() {
                slot.kept = kept;
            }
        }
        if removed > 0 {
            release(&mut slots, parent, &mut gone);
        }
        drop_unused(&mut slots, ino, &mut gone);
        gone
    }

    /// Marks a node that a peer's change took out of the tree.
    pub(super) fn displace(&self, ino: Ino, displaced: Displaced) {
        if let Some(slot) = self.slots.lock().get_mut(&ino) {
            slot.displaced = Some(Arc::new(displaced));
        }
    }

    pub(super) fn displaced(&self, ino: Ino) -> Option<Arc<Displaced>> {
        self.slots.lock().get(&ino)?.displaced.clone()
    }

    /// Gives the kernel's references back. Returns the nodes that nobody knows any
    /// more.
    pub(super) fn forget(&self, ino: Ino, lookups: u64) -> Vec<Ino> {
        let mut slots = self.slots.lock();
        let mut gone = Vec::new();
        if let Some(slot) = slots.get_mut(&ino) {
            slot.lookups = slot.lookups.saturating_sub(lookups);
            drop_unused(&mut slots, ino, &mut gone);
        }
        gone
    }

    /// Keeps a node in the table until [`Table::unpin`].
    pub(super) fn pin(&self, ino: Ino) -> bool {
        match self.slots.lock().get_mut(&ino) {
            Some(slot) => {
                slot.holds += 1;
                true
            }
            None => false,
        }
    }

    pub(super) fn unpin(&self, ino: Ino) -> Vec<Ino> {
        let mut slots = self.slots.lock();
        let mut gone = Vec::new();
        release(&mut slots, ino, &mut gone);
        gone
    }

    /// Whether the tree has a name for the node.
    pub(super) fn is_linked(&self, ino: Ino) -> bool {
        ino == self.root
            || self
                .slots
                .lock()
                .get(&ino)
                .is_some_and(|slot| !slot.names.is_empty() || slot.elsewhere)
    }

    pub(super) fn place(&self, ino: Ino) -> Option<Place> {
        if ino == self.root {
            return Some(Place::Root);
        }
        let slots = self.slots.lock();
        let slot = slots.get(&ino)?;
        match (slot.names.last(), &slot.kept) {
            (Some(name), _) => Some(Place::Named(name.parent, name.name.clone())),
            (None, Some(kept)) => Some(Place::Kept(kept.clone())),
            (None, None) => None,
        }
    }

    /// A directory's path; none if it has no name any more.
    pub(super) fn path(&self, ino: Ino) -> Option<RelPath> {
        let slots = self.slots.lock();
        directory_path(&slots, self.root, ino)
    }

    /// All known paths of a node.
    pub(super) fn paths(&self, ino: Ino) -> Vec<RelPath> {
        if ino == self.root {
            return vec![RelPath::ROOT];
        }
        let slots = self.slots.lock();
        let Some(slot) = slots.get(&ino) else {
            return Vec::new();
        };
        slot.names
            .iter()
            .filter_map(|name| {
                directory_path(&slots, self.root, name.parent)?
                    .join(&name.name)
                    .ok()
            })
            .collect()
    }
}

fn directory_path(slots: &HashMap<Ino, Slot>, root: Ino, ino: Ino) -> Option<RelPath> {
    let mut names = Vec::new();
    let mut current = ino;
    while current != root {
        let name = slots.get(&current)?.names.last()?;
        names.push(&*name.name);
        if names.len() > slots.len() {
            return None;
        }
        current = name.parent;
    }
    names.reverse();
    RelPath::new(names.join(&b'/')).ok()
}

fn release(slots: &mut HashMap<Ino, Slot>, ino: Ino, gone: &mut Vec<Ino>) {
    if let Some(slot) = slots.get_mut(&ino) {
        slot.holds = slot.holds.saturating_sub(1);
        drop_unused(slots, ino, gone);
    }
}

/// Removes a node without references, and then those directories that only it kept.
fn drop_unused(slots: &mut HashMap<Ino, Slot>, ino: Ino, gone: &mut Vec<Ino>) {
    let mut unused = vec![ino];
    while let Some(ino) = unused.pop() {
        let keep = slots
            .get(&ino)
            .is_none_or(|slot| slot.lookups > 0 || slot.holds > 0);
        if keep {
            continue;
        }
        let Some(slot) = slots.remove(&ino) else {
            continue;
        };
        gone.push(ino);
        for name in slot.names {
            if let Some(parent) = slots.get_mut(&name.parent) {
                parent.holds = parent.holds.saturating_sub(1);
                unused.push(name.parent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
