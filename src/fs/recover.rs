//! The scan of lower against the recorded tree: after an unclean stop, after work
//! on the plain directory, and on the first adoption of a tree.
//!
//! Two passes, so that the journal's numbers stay unambiguous: what is gone leaves
//! first, then what is new comes, and what is there is compared. Nothing is hashed.

use std::collections::{HashMap, HashSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use mirrorfs_journal::{Change, Journal, Node, NodeId, Origin, View};
use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::attributes::{Attributes, kind_of};
use super::lower::{c_name, open_beneath, stat_name, stat_open};
use super::ops_meta::user_xattrs;
use super::{Error, Filesystem};
use crate::tree::{Attr, Ino, Kind, RESERVED, RelPath, Xattrs};

/// What a scan found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RecoveryReport {
    /// Names looked at.
    pub scanned: u64,
    /// Names that the journal did not know.
    pub created: u64,
    /// Nodes that had changed.
    pub changed: u64,
    /// Names that are gone.
    pub removed: u64,
    /// What could not be looked at. Nothing recorded there was taken for removed.
    pub unreadable: Vec<(RelPath, String)>,
}

/// A directory still to be looked at. Its parent is open, it is not: so only as many
/// descriptors are open as the tree is deep.
struct Pending {
    parent: Arc<OwnedFd>,
    name: Vec<u8>,
    path: RelPath,
    ino: Ino,
    recorded: Option<NodeId>,
}

struct Listing {
    name: Vec<u8>,
    ino: Ino,
    file_type: FileType,
}

struct Scan<'a> {
    filesystem: &'a Filesystem,
    journal: &'a Journal,
    authors: &'a HashMap<Ino, Origin>,
    report: RecoveryReport,
}

impl Filesystem {
    /// Brings the recorded tree up to what lower shows. To be called before anything
    /// is mounted.
    pub fn recover(&self, journal: &Journal) -> Result<RecoveryReport, Error> {
        self.recover_knowing(journal, &HashMap::new())
    }

    /// The same where it is known of some nodes who had them come or go.
    pub fn recover_knowing(
        &self,
        journal: &Journal,
        authors: &HashMap<Ino, Origin>,
    ) -> Result<RecoveryReport, Error> {
        let _namespace = self.namespace.write();
        let mut scan = Scan {
            filesystem: self,
            journal,
            authors,
            report: RecoveryReport::default(),
        };
        scan.root()?;
        scan.remove_missing()?;
        scan.add_and_compare()?;
        for (path, reason) in &scan.report.unreadable {
            self.problems.add(path.clone(), reason.clone());
        }
        Ok(scan.report)
    }
}

impl Scan<'_> {
    fn record(&self, change: Change) -> Result<(), Error> {
        self.filesystem.recorder.record(Origin::Scan, change)?;
        Ok(())
    }

    /// Records that a node came or went.
    fn record_of(&self, ino: Ino, change: Change) -> Result<(), Error> {
        let author = self.authors.get(&ino).copied();
        let origin = author.unwrap_or(Origin::Scan);
        self.filesystem.recorder.record(origin, change)?;
        Ok(())
    }

    fn root(&mut self) -> Result<(), Error> {
        let attributes = stat_open(self.filesystem.lower.root().as_fd())
            .map_err(|source| lower("stat", &RelPath::ROOT, source))?;
        let attr = attributes.recorded();
        let recorded = self.journal.snapshot()?.node(NodeId::ROOT)?;
        let same = recorded.is_some_and(|root| {
            root.ino == attributes.ino && !directory_differs(&root, &attributes)
        });
        if !same {
            self.record(Change::Root {
                ino: attributes.ino,
                attr,
            })?;
        }
        Ok(())
    }

    fn start(&self) -> Result<Pending, Error> {
        Ok(Pending {
            parent: self.filesystem.lower.root().clone(),
            name: b".".to_vec(),
            path: RelPath::ROOT,
            ino: self.filesystem.root(),
            recorded: Some(NodeId::ROOT),
        })
    }

    /// First pass: recorded names that lower does not show any more, or shows for
    /// another node.
    fn remove_missing(&mut self) -> Result<(), Error> {
        let snapshot = self.journal.snapshot()?;
        let mut left: HashMap<NodeId, usize> = HashMap::new();
        let mut pending = vec![self.start()?];
        while let Some(directory) = pending.pop() {
            let Some(id) = directory.recorded else {
                continue;
            };
            let children = snapshot.children(id)?;
            if children.is_empty() {
                continue;
            }
            // Reported by the second pass.
            let Ok((held, listing)) = open_and_list(&directory) else {
                continue;
            };
            let present: HashMap<&[u8], &Listing> = listing
                .iter()
                .map(|listed| (listed.name.as_slice(), listed))
                .collect();
            for (name, node) in children {
                let shown = present
                    .get(name.as_slice())
                    .filter(|_| !(directory.path.is_root() && name == RESERVED));
                let same = match shown {
                    None => false,
                    Some(listed)
                        if listed.ino == node.ino
                            && kind_of(listed.file_type) == node.attr.kind =>
                    {
                        true
                    }
                    // Listings are not always exact about numbers and types.
                    Some(_) => match stat_name(held.as_fd(), &name) {
                        Ok(found) => {
                            found.device != self.filesystem.lower.device()
                                || found.ino == node.ino && found.kind() == node.attr.kind
                        }
                        Err(error) => error != Errno::NOENT,
                    },
                };
                if !same {
                    self.remove(&snapshot, &mut left, directory.ino, name, node)?;
                } else if node.attr.kind == Kind::Directory {
                    let path = directory.path.join(&name)?;
                    pending.push(Pending {
                        parent: held.clone(),
                        name,
                        path,
                        ino: node.ino,
                        recorded: Some(node.id),
                    });
                }
            }
        }
        Ok(())
    }

    /// Records the removal of a name and of everything recorded below it, children
    /// first.
    fn remove(
        &mut self,
        snapshot: &View,
        left: &mut HashMap<NodeId, usize>,
        parent: Ino,
        name: Vec<u8>,
        node: Node,
    ) -> Result<(), Error> {
        let mut found = vec![(parent, name, node)];
        let mut next = 0;
        while let Some((_, _, node)) = found.get(next) {
            if node.attr.kind == Kind::Directory {
                let (id, ino) = (node.id, node.ino);
                let children = snapshot.children(id)?;
                found.extend(children.into_iter().map(|(name, child)| (ino, name, child)));
            }
            next += 1;
        }
        for (parent, name, node) in found.into_iter().rev() {
            let last = if node.attr.kind == Kind::Directory {
                true
            } else {
                let left = match left.entry(node.id) {
                    std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::hash_map::Entry::Vacant(entry) => {
                        entry.insert(snapshot.paths(node.id)?.len())
                    }
                };
                *left = left.saturating_sub(1);
                *left == 0
            };
            self.report.removed += 1;
            let change = Change::Unlink {
                parent,
                name,
                ino: node.ino,
                last,
            };
            self.record_of(node.ino, change)?;
        }
        Ok(())
    }

    /// Second pass: new names, and the attributes of known ones.
    fn add_and_compare(&mut self) -> Result<(), Error> {
        let snapshot = self.journal.snapshot()?;
        // Nodes with several names that this pass created.
        let mut created = HashSet::new();
        let mut pending = vec![self.start()?];
        while let Some(directory) = pending.pop() {
            let (held, listing) = match open_and_list(&directory) {
                Ok(listed) => listed,
                Err(Errno::NOENT) => continue,
                Err(error) => {
                    self.unreadable(&directory.path, error);
                    continue;
                }
            };
            let mut recorded: HashMap<Vec<u8>, Node> = match directory.recorded {
                Some(id) => snapshot.children(id)?.into_iter().collect(),
                None => HashMap::new(),
            };
            for listed in listing {
                if directory.path.is_root() && listed.name == RESERVED {
                    continue;
                }
                let path = directory.path.join(&listed.name)?;
                let found = match stat_name(held.as_fd(), &listed.name) {
                    Ok(found) => found,
                    Err(Errno::NOENT) => continue,
                    Err(error) => {
                        self.unreadable(&path, error);
                        continue;
                    }
                };
                if found.device != self.filesystem.lower.device() {
                    self.report.unreadable.push((
                        path,
                        "another filesystem is mounted here; it is not mirrored".into(),
                    ));
                    continue;
                }
                self.report.scanned += 1;
                let node = recorded.remove(&listed.name);
                let place = Name {
                    directory: &held,
                    parent: directory.ino,
                    name: &listed.name,
                };
                let id = match &node {
                    Some(node) => {
                        self.compare(&place, node, &found, &path)?;
                        Some(node.id)
                    }
                    None => {
                        self.add(&snapshot, &mut created, &place, &found, &path)?;
                        None
                    }
                };
                if found.kind() == Kind::Directory {
                    pending.push(Pending {
                        parent: held.clone(),
                        name: listed.name,
                        path,
                        ino: found.ino,
                        recorded: id,
                    });
                }
            }
        }
        Ok(())
    }

    fn unreadable(&mut self, path: &RelPath, error: Errno) {
        self.report.unreadable.push((
            path.clone(),
            format!("cannot be read: {}", io::Error::from(error)),
        ));
    }

    fn add(
        &mut self,
        snapshot: &View,
        created: &mut HashSet<Ino>,
        place: &Name<'_>,
        found: &Attributes,
        path: &RelPath,
    ) -> Result<(), Error> {
        let linkable = found.kind() != Kind::Directory;
        let known = linkable
            && (created.contains(&found.ino)
                || snapshot
                    .node_by_ino(found.ino)?
                    .is_some_and(|node| node.attr.kind == found.kind()));
        self.report.created += 1;
        if known {
            return self.record(Change::Link {
                parent: place.parent,
                name: place.name.to_vec(),
                ino: found.ino,
            });
        }
        if linkable && found.nlink > 1 {
            created.insert(found.ino);
        }
        let target = match place.target(found) {
            Ok(target) => target,
            Err(error) => return Err(lower("read the link", path, error)),
        };
        let change = Change::Create {
            parent: place.parent,
            name: place.name.to_vec(),
            ino: found.ino,
            attr: found.recorded(),
            target,
        };
        self.record_of(found.ino, change)?;
        let xattrs = self.xattrs(place, found, path);
        if let Some(xattrs) = xattrs.filter(|xattrs| !xattrs.is_empty()) {
            self.record(Change::Xattrs {
                ino: found.ino,
                attr: found.recorded(),
                xattrs,
            })?;
        }
        Ok(())
    }

    fn compare(
        &mut self,
        place: &Name<'_>,
        node: &Node,
        found: &Attributes,
        path: &RelPath,
    ) -> Result<(), Error> {
        let (ino, attr) = (found.ino, found.recorded());
        if node.attr == attr {
            return Ok(());
        }
        let mut changed = false;
        match found.kind() {
            Kind::File => {
                // Whatever changes a file moves its change time, also where size and
                // modification time were put back.
                changed = true;
                self.record(Change::Content { ino, attr })?;
            }
            Kind::Directory => {
                if directory_differs(node, found) {
                    changed = true;
                    self.record(Change::Attr { ino, attr })?;
                }
            }
            Kind::Symlink => {
                let target = place
                    .target(found)
                    .map_err(|error| lower("read the link", path, error))?;
                if target != node.target {
                    // The number went to another link meanwhile.
                    self.record(Change::Unlink {
                        parent: place.parent,
                        name: place.name.to_vec(),
                        ino,
                        last: true,
                    })?;
                    self.record(Change::Create {
                        parent: place.parent,
                        name: place.name.to_vec(),
                        ino,
                        attr,
                        target,
                    })?;
                    changed = true;
                } else if beyond_change_time(node, &attr) {
                    changed = true;
                    self.record(Change::Attr { ino, attr })?;
                }
            }
            Kind::Special => {
                if beyond_change_time(node, &attr) {
                    changed = true;
                    self.record(Change::Attr { ino, attr })?;
                }
            }
        }
        if let Some(xattrs) = self.xattrs(place, found, path)
            && xattrs != node.xattrs
        {
            changed = true;
            self.record(Change::Xattrs { ino, attr, xattrs })?;
        }
        self.report.changed += u64::from(changed);
        Ok(())
    }

    fn xattrs(&mut self, place: &Name<'_>, found: &Attributes, path: &RelPath) -> Option<Xattrs> {
        if !matches!(found.kind(), Kind::File | Kind::Directory) {
            return None;
        }
        match place.xattrs() {
            Ok(xattrs) => Some(xattrs),
            Err(Errno::NOENT) => None,
            Err(error) => {
                self.unreadable(path, error);
                None
            }
        }
    }
}

/// A name in an open directory.
struct Name<'a> {
    directory: &'a OwnedFd,
    parent: Ino,
    name: &'a [u8],
}

impl Name<'_> {
    fn target(&self, found: &Attributes) -> Result<Option<Vec<u8>>, Errno> {
        if found.kind() != Kind::Symlink {
            return Ok(None);
        }
        let target = rustix::fs::readlinkat(self.directory, c_name(self.name)?, Vec::new())?;
        Ok(Some(target.into_bytes()))
    }

    fn xattrs(&self) -> Result<Xattrs, Errno> {
        use std::os::unix::ffi::OsStrExt;
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()));
        path.push(std::ffi::OsStr::from_bytes(self.name));
        user_xattrs(&path)
    }
}

/// Size and times of a directory follow from its names.
fn directory_differs(node: &Node, found: &Attributes) -> bool {
    node.attr.mode != found.mode || node.attr.uid != found.uid || node.attr.gid != found.gid
}

/// Whether more than the change time differs. By itself it says of anything without
/// content only that a name of it came or went, which is not recorded for these.
fn beyond_change_time(node: &Node, found: &Attr) -> bool {
    let recorded = Attr {
        ctime: found.ctime,
        ..node.attr
    };
    recorded != *found
}

fn open_and_list(directory: &Pending) -> Result<(Arc<OwnedFd>, Vec<Listing>), Errno> {
    let held = open_beneath(
        directory.parent.as_fd(),
        &directory.name,
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )?;
    let mut listing = Vec::new();
    let mut buffer: Vec<MaybeUninit<u8>> = vec![MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(&held, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        listing.push(Listing {
            name: name.to_vec(),
            ino: Ino(entry.ino()),
            file_type: entry.file_type(),
        });
    }
    Ok((Arc::new(held), listing))
}

fn lower(operation: &'static str, path: &RelPath, source: Errno) -> Error {
    Error::Lower {
        operation,
        path: path.clone(),
        source: source.into(),
    }
}
