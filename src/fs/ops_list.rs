//! Looking up names and listing directories.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, StatVfs};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::descriptors::Use;
use super::door::{GREETED, is_reserved, placed_token};
use super::lower::{reopen, stat_name};
use super::table::STAGING;
use super::{Caller, Filesystem, Found, Result};
use crate::tree::{Ino, RESERVED, Timestamp};

/// Bytes for at least one name of a directory, however long.
const PRIMING: usize = 512;

/// One name of a listing.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// The node's number.
    pub ino: Ino,
    /// What it is.
    pub file_type: FileType,
    /// The name.
    pub name: &'a [u8],
    /// Where the listing goes on after it.
    pub next: u64,
}

/// One name of a listing with the node's attributes. `.` and `..` come without, and
/// without a reference of the kernel's.
#[derive(Clone, Copy, Debug)]
pub struct ListedPlus<'a> {
    /// The name.
    pub listed: Listed<'a>,
    /// The attributes, unless it is `.` or `..`.
    pub attributes: Option<Attributes>,
}

/// Reads the first name of a directory that was just opened.
///
/// The kernel may ask for what comes after the last name first: the descriptor that had
/// told of the others was closed meanwhile. On ext4 a descriptor whose first read is there
/// shows an empty directory from then on, also from the start: the position of that read
/// is not noted, so going back to 0 is not seen as a change.
fn prime(directory: &OwnedFd) -> Result<()> {
    let mut buffer = [MaybeUninit::uninit(); PRIMING];
    match RawDir::new(directory, &mut buffer).next() {
        Some(Err(error)) => Err(error),
        Some(Ok(_)) | None => Ok(()),
    }
}

impl Filesystem {
    /// Looks a name up and counts a reference of the kernel's.
    pub fn lookup(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<Found> {
        let _namespace = self.namespace.read();
        if parent == self.root() && is_reserved(name) {
            return self.lookup_placed(caller, name);
        }
        let found = self.stat_child(parent, name)?;
        self.table
            .intern(parent, name, found.ino, found.file_type, 1, 0);
        Ok(Found {
            attributes: self.shown(found),
            cacheable: true,
        })
    }

    /// A staged thing answers to its name while an operation for it is registered.
    fn lookup_placed(&self, caller: &Caller, name: &[u8]) -> Result<Found> {
        let token = placed_token(name).ok_or(Errno::NOENT)?;
        if self.door.greeted(caller, token) {
            return Err(GREETED);
        }
        if !self.door.is_placing(token) {
            return Err(Errno::NOENT);
        }
        let staging = self.directory(STAGING)?;
        let attributes = stat_name(staging.as_fd(), token)?;
        self.table
            .intern(STAGING, token, attributes.ino, attributes.file_type, 1, 0);
        Ok(Found {
            attributes,
            cacheable: false,
        })
    }

    /// Whether the absence of a name may be cached.
    pub fn absence_is_cacheable(&self, parent: Ino, name: &[u8]) -> bool {
        !(parent == self.root() && is_reserved(name))
    }

    /// Takes references of the kernel's back.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let gone = self.table.forget(ino, lookups);
        self.close(gone);
    }

    /// A node's attributes.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        self.stat(&node)
    }

    /// A node's attributes, and when it was made where lower knows that.
    pub fn getattr_with_birth(&self, ino: Ino) -> Result<(Attributes, Option<Timestamp>)> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let attributes = self.stat(&node)?;
        Ok((attributes, self.birth(&node)?))
    }

    /// Lists a directory from a position on. `add` takes one name and answers whether
    /// it had room for it.
    pub fn readdir(
        &self,
        ino: Ino,
        from: u64,
        room: usize,
        mut add: impl FnMut(Listed<'_>) -> bool,
    ) -> Result<()> {
        self.list(ino, from, room, |_, listed| add(listed))
    }

    /// Lists a directory with attributes, and counts a reference of the kernel's for
    /// each node that was taken.
    pub fn readdirplus(
        &self,
        ino: Ino,
        from: u64,
        room: usize,
        mut add: impl FnMut(ListedPlus<'_>) -> bool,
    ) -> Result<()> {
        self.list(ino, from, room, |directory, listed| {
            if listed.name == b"." || listed.name == b".." {
                return add(ListedPlus {
                    listed,
                    attributes: None,
                });
            }
            let attributes = match stat_name(directory.as_fd(), listed.name) {
                // Listed without attributes, so that a look-up tells what is wrong.
                Ok(found) if found.device != self.lower.device() => None,
                Ok(found) => Some(found),
                Err(_) => None,
            };
            let Some(attributes) = attributes else {
                return add(ListedPlus {
                    listed,
                    attributes: None,
                });
            };
            // Counted before the kernel can hear of it, taken back if there is no room.
            self.table
                .intern(ino, listed.name, attributes.ino, attributes.file_type, 1, 0);
            let taken = add(ListedPlus {
                listed,
                attributes: Some(self.shown(attributes)),
            });
            if !taken {
                self.forget(attributes.ino, 1);
            }
            taken
        })
    }

    fn list(
        &self,
        ino: Ino,
        from: u64,
        room: usize,
        mut add: impl FnMut(&OwnedFd, Listed<'_>) -> bool,
    ) -> Result<()> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        // The position of the shared descriptor belongs to whoever holds this lock.
        let _content = node.content.lock();
        let directory = self.readable_directory(ino)?;
        rustix::fs::seek(&directory, SeekFrom::Start(from))?;
        let mut buffer: Vec<MaybeUninit<u8>> =
            vec![MaybeUninit::uninit(); room.clamp(1024, 64 << 10)];
        let mut entries = RawDir::new(&*directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if ino == self.root() && name == RESERVED {
                continue;
            }
            // Above the root is not ours to tell.
            let number = if name == b".." && ino == self.root() {
                self.root()
            } else {
                Ino(entry.ino())
            };
            let listed = Listed {
                ino: number,
                file_type: entry.file_type(),
                name,
                next: entry.next_entry_cookie(),
            };
            if !add(&directory, listed) {
                break;
            }
        }
        Ok(())
    }

    fn readable_directory(&self, ino: Ino) -> Result<Arc<OwnedFd>> {
        if let Some(held) = self.descriptors.get(ino, Use::Read) {
            return Ok(held);
        }
        let directory = self.directory(ino)?;
        // Itself, and not the "." in it, which takes the right to search it.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let opened = self.with_room(|| reopen(directory.as_fd(), flags))?;
        prime(&opened)?;
        Ok(self.descriptors.put(ino, Use::Read, opened))
    }

    /// A directory that `fsync` can be called on.
    pub(super) fn syncable_directory(&self, ino: Ino) -> Result<Arc<OwnedFd>> {
        self.readable_directory(ino)
    }

    /// The text of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        if node.file_type != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let handle = self.handle(&node)?;
        Ok(rustix::fs::readlinkat(&handle, "", Vec::new())?.into_bytes())
    }

    /// How full lower is.
    pub fn statfs(&self) -> Result<StatVfs> {
        rustix::fs::fstatvfs(self.lower.root())
    }
}
