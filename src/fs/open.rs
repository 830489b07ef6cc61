//! How nodes are opened in lower.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::descriptors::Use;
use super::lower::{birth_at, open_beneath, proc_path, reopen, stat_name, stat_open};
use super::table::{Node, Place, STAGING};
use super::{Filesystem, Result};
use crate::tree::{Ino, RESERVED, RelPath, Timestamp};

impl Filesystem {
    pub(super) fn node(&self, ino: Ino) -> Result<Arc<Node>> {
        self.table.get(ino).ok_or(Errno::STALE)
    }

    /// A directory for `*at` calls.
    pub(super) fn directory(&self, ino: Ino) -> Result<Arc<OwnedFd>> {
        if ino == self.root() {
            return Ok(self.lower.root().clone());
        }
        if ino == STAGING {
            return Ok(Arc::new(self.lower.reserved(b"staging")?));
        }
        if let Some(held) = self.descriptors.get(ino, Use::Path) {
            return Ok(held);
        }
        // From the nearest open ancestor downwards.
        let mut down = Vec::new();
        let mut current = ino;
        let mut held = loop {
            if let Some(held) = self.descriptors.get(current, Use::Path) {
                break held;
            }
            match self.table.place(current).ok_or(Errno::STALE)? {
                Place::Root => break self.lower.root().clone(),
                Place::Kept(kept) => break kept,
                Place::Named(parent, name) => {
                    down.push((current, name));
                    current = parent;
                }
            }
            if down.len() > self.table.len() {
                return Err(Errno::STALE);
            }
        };
        while let Some((ino, name)) = down.pop() {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let opened =
                self.with_room(|| open_beneath(held.as_fd(), &name, flags, Mode::empty()))?;
            self.same(stat_open(opened.as_fd())?, ino)?;
            held = self.descriptors.put(ino, Use::Path, opened);
        }
        Ok(held)
    }

    /// Any node, for stat and for calls through its `/proc/self/fd` name.
    pub(super) fn handle(&self, node: &Node) -> Result<Arc<OwnedFd>> {
        if node.file_type == FileType::Directory {
            return self.directory(node.ino);
        }
        for usage in [Use::Write, Use::Read, Use::Path] {
            if let Some(held) = self.descriptors.get(node.ino, usage) {
                return Ok(held);
            }
        }
        match self.table.place(node.ino).ok_or(Errno::STALE)? {
            Place::Root => Ok(self.lower.root().clone()),
            Place::Kept(kept) => Ok(kept),
            Place::Named(parent, name) => {
                let directory = self.directory(parent)?;
                let opened = self.with_room(|| {
                    open_beneath(directory.as_fd(), &name, OFlags::PATH, Mode::empty())
                })?;
                self.same(stat_open(opened.as_fd())?, node.ino)?;
                Ok(self.descriptors.put(node.ino, Use::Path, opened))
            }
        }
    }

    /// A regular file's content. To be called with the node's lock held.
    pub(super) fn file(&self, node: &Node, usage: Use) -> Result<Arc<OwnedFd>> {
        match node.file_type {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if let Some(held) = self.descriptors.get(node.ino, Use::Write) {
            return Ok(held);
        }
        if usage == Use::Read
            && let Some(held) = self.descriptors.get(node.ino, Use::Read)
        {
            return Ok(held);
        }
        // One descriptor serves both where that is possible.
        match self.open_file(node, OFlags::RDWR) {
            Ok(opened) => return Ok(self.descriptors.put(node.ino, Use::Write, opened)),
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY)
                if usage == Use::Read => {}
            Err(Errno::ACCESS) => {
                let opened = self.open_own(node, OFlags::RDWR)?;
                return Ok(self.descriptors.put(node.ino, Use::Write, opened));
            }
            Err(error) => return Err(error),
        }
        let opened = match self.open_file(node, OFlags::RDONLY) {
            Err(Errno::ACCESS) => self.open_own(node, OFlags::RDONLY)?,
            other => other?,
        };
        Ok(self.descriptors.put(node.ino, Use::Read, opened))
    }

    fn open_file(&self, node: &Node, flags: OFlags) -> Result<OwnedFd> {
        // NONBLOCK: should somebody have put a FIFO in its place, nobody waits for it.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = match self.table.place(node.ino).ok_or(Errno::STALE)? {
            Place::Kept(kept) => self.with_room(|| reopen(kept.as_fd(), flags))?,
            Place::Root => return Err(Errno::ISDIR),
            Place::Named(parent, name) => {
                let directory = self.directory(parent)?;
                self.with_room(|| open_beneath(directory.as_fd(), &name, flags, Mode::empty()))?
            }
        };
        self.same(stat_open(opened.as_fd())?, node.ino)?;
        Ok(opened)
    }

    /// Opens a file of ours whose own mode forbids it: somebody may still hold it
    /// open from when he made it (Git's objects have mode 0444).
    fn open_own(&self, node: &Node, flags: OFlags) -> Result<OwnedFd> {
        let handle = self.handle(node)?;
        let before = stat_open(handle.as_fd())?;
        if before.uid != rustix::process::geteuid().as_raw() {
            return Err(Errno::ACCESS);
        }
        let path = proc_path(handle.as_fd());
        rustix::fs::chmod(&path, Mode::from_raw_mode(before.mode | 0o600))?;
        let opened = self.with_room(|| reopen(handle.as_fd(), flags));
        rustix::fs::chmod(&path, Mode::from_raw_mode(before.mode))?;
        // That moved the time of the last change, which is all that is left of it.
        let after = stat_open(handle.as_fd())?;
        self.record_node(Origin::Local, node, || Change::Attr {
            ino: node.ino,
            attr: after.recorded(),
        })?;
        self.make_stale(node.ino);
        opened
    }

    /// A node's attributes as the mount shows them.
    pub(super) fn stat(&self, node: &Node) -> Result<Attributes> {
        if node.ino == self.root() {
            let attributes = stat_open(self.lower.root().as_fd())?;
            return Ok(self.shown(attributes));
        }
        for usage in [Use::Write, Use::Read, Use::Path] {
            if let Some(held) = self.descriptors.get(node.ino, usage) {
                return Ok(self.shown(stat_open(held.as_fd())?));
            }
        }
        let attributes = match self.table.place(node.ino).ok_or(Errno::STALE)? {
            Place::Root => stat_open(self.lower.root().as_fd())?,
            Place::Kept(kept) => stat_open(kept.as_fd())?,
            Place::Named(parent, name) => {
                let directory = self.directory(parent)?;
                let attributes = stat_name(directory.as_fd(), &name)?;
                self.same(attributes, node.ino)?;
                attributes
            }
        };
        Ok(self.shown(attributes))
    }

    /// When a node was made; none where lower does not know.
    pub(super) fn birth(&self, node: &Node) -> Result<Option<Timestamp>> {
        for usage in [Use::Write, Use::Read, Use::Path] {
            if let Some(held) = self.descriptors.get(node.ino, usage) {
                return birth_at(held.as_fd(), b"");
            }
        }
        match self.table.place(node.ino).ok_or(Errno::STALE)? {
            Place::Root => birth_at(self.lower.root().as_fd(), b""),
            Place::Kept(kept) => birth_at(kept.as_fd(), b""),
            Place::Named(parent, name) => birth_at(self.directory(parent)?.as_fd(), &name),
        }
    }

    /// Hides what is ours: a name in the trash is no link, the reserved directory is
    /// no subdirectory.
    pub(super) fn shown(&self, mut attributes: Attributes) -> Attributes {
        if attributes.ino == self.root() {
            let reserved = match stat_name(self.lower.root().as_fd(), RESERVED) {
                Ok(reserved) => reserved.file_type == FileType::Directory,
                // An ordinary user's root that he may not search: nobody can have removed it.
                Err(error) => error == Errno::ACCESS,
            };
            if attributes.nlink > 2 && reserved {
                attributes.nlink -= 1;
            }
        } else if attributes.file_type != FileType::Directory
            && self.table.displaced(attributes.ino).is_some()
        {
            attributes.nlink = 0;
        }
        attributes
    }

    /// What a name shows at present, checked against mounts inside the tree.
    pub(super) fn stat_child(&self, parent: Ino, name: &[u8]) -> Result<Attributes> {
        let directory = self.directory(parent)?;
        let attributes = stat_name(directory.as_fd(), name)?;
        if attributes.device != self.lower.device() {
            if let Some(path) = self.table.path(parent).and_then(|dir| dir.join(name).ok()) {
                self.problems.add(
                    path,
                    "another filesystem is mounted here; it is not mirrored and not shown".into(),
                );
            }
            return Err(Errno::XDEV);
        }
        Ok(attributes)
    }

    pub(super) fn try_stat_child(&self, parent: Ino, name: &[u8]) -> Result<Option<Attributes>> {
        match self.stat_child(parent, name) {
            Ok(attributes) => Ok(Some(attributes)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lower changed behind the mount if a known name shows another inode.
    fn same(&self, found: Attributes, expected: Ino) -> Result<()> {
        if found.ino == expected && found.device == self.lower.device() {
            return Ok(());
        }
        if let Some(path) = self.table.paths(expected).pop() {
            self.problems.add(
                path,
                "it was replaced in the covered directory, not through the mount; mount again"
                    .into(),
            );
        }
        Err(Errno::STALE)
    }

    /// Closes what was kept open for nodes that nobody knows any more.
    pub(super) fn close(&self, gone: Vec<Ino>) {
        for ino in gone {
            self.descriptors.remove(ino);
        }
    }

    /// Walks a path and keeps its last node in the table until it is unpinned.
    pub(super) fn pin_path(&self, path: &RelPath) -> Result<Arc<Node>> {
        let mut current = self.root();
        self.table.pin(current);
        for name in path.components() {
            let next = self.stat_child(current, name).map(|found| {
                self.table
                    .intern(current, name, found.ino, found.file_type, 0, 1)
                    .ino
            });
            self.close(self.table.unpin(current));
            current = next?;
        }
        self.node(current)
    }
}
