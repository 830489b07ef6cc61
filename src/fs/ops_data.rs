//! Reading and changing contents.

use std::os::fd::{AsFd, OwnedFd};

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::descriptors::Use;
use super::lower::stat_open;
use super::{Caller, Filesystem, Result};
use crate::tree::Ino;

/// One request copies this much at most; the caller asks again for the rest. So no
/// copy holds its locks for long.
const COPY_LIMIT: u64 = 16 << 20;

impl Filesystem {
    /// Reads from a file into `buffer`, as much as there is.
    pub fn read(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let file = {
            let _namespace = self.namespace.read();
            let node = self.node(ino)?;
            node.note_paged();
            match self.descriptors.get(ino, Use::Write) {
                Some(held) => held,
                None => {
                    let _content = node.content.lock();
                    self.file(&node, Use::Read)?
                }
            }
        };
        read_full(&file, offset, buffer)
    }

    /// Writes to a file. `unprivileged` is the caller where the kernel says that setuid
    /// and setgid have to go.
    pub fn write(
        &self,
        ino: Ino,
        offset: u64,
        content: &[u8],
        unprivileged: Option<&Caller>,
    ) -> Result<usize> {
        self.writable()?;
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        node.note_paged();
        let _content = node.content.lock();
        let file = self.file(&node, Use::Write)?;
        let len = content.len() as u64;
        self.preserve(ino, &file, |size| {
            offset..offset.saturating_add(len).min(size)
        });
        let written = rustix::io::pwrite(&file, content, offset)?;
        let attributes = self.after_write(&file, unprivileged)?;
        self.record_node(Origin::Local, &node, || Change::Write {
            ino,
            offset,
            len: written as u64,
            attr: attributes.recorded(),
        })?;
        Ok(written)
    }

    /// The attributes after a change of content, without setuid and setgid where an
    /// unprivileged caller may not keep them: lower leaves them to root, which we are.
    pub(super) fn after_write(
        &self,
        file: &OwnedFd,
        unprivileged: Option<&Caller>,
    ) -> Result<Attributes> {
        let attributes = stat_open(file.as_fd())?;
        let privileged = unprivileged.map_or(0, |caller| privileged_bits(&attributes, caller));
        if privileged == 0 {
            return Ok(attributes);
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode & !privileged))?;
        // The kernel asks for size and times again after a write, but goes on
        // believing in the mode, and would run the program as its owner.
        self.make_stale(attributes.ino);
        stat_open(file.as_fd())
    }

    pub(super) fn make_stale(&self, ino: Ino) {
        if let Some(hook) = &*self.stale.read() {
            hook(ino);
        }
    }

    /// Allocates, punches or zeroes a range.
    pub fn fallocate(
        &self,
        caller: &Caller,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: FallocateFlags,
    ) -> Result<()> {
        self.writable()?;
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let _content = node.content.lock();
        let file = self.file(&node, Use::Write)?;
        let shifts = mode.intersects(FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE);
        let before = stat_open(file.as_fd())?;
        self.preserve(ino, &file, |size| {
            if shifts {
                offset..size
            } else {
                offset..offset.saturating_add(len).min(size)
            }
        });
        rustix::fs::fallocate(&file, mode, offset, len)?;
        let attributes = self.after_write(&file, caller.unprivileged())?;
        let len = if shifts {
            before.size.max(attributes.size).saturating_sub(offset)
        } else {
            len
        };
        self.record_node(Origin::Local, &node, || Change::Write {
            ino,
            offset,
            len,
            attr: attributes.recorded(),
        })?;
        Ok(())
    }

    /// Copies a range from file to file inside lower. May copy less than asked for.
    #[allow(clippy::too_many_arguments)] // as the request has them
    pub fn copy_file_range(
        &self,
        caller: &Caller,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<usize> {
        self.writable()?;
        let _namespace = self.namespace.read();
        let from = self.node(source)?;
        let to = self.node(target)?;
        let (_first, _second);
        if source == target {
            _first = to.content.lock();
        } else if source < target {
            _first = from.content.lock();
            _second = to.content.lock();
        } else {
            _first = to.content.lock();
            _second = from.content.lock();
        }
        let from = self.file(&from, Use::Read)?;
        let file = self.file(&to, Use::Write)?;
        let len = len.min(COPY_LIMIT);
        self.preserve(target, &file, |size| {
            target_offset..target_offset.saturating_add(len).min(size)
        });
        let (mut read_at, mut write_at) = (source_offset, target_offset);
        let copied = rustix::fs::copy_file_range(
            &from,
            Some(&mut read_at),
            &file,
            Some(&mut write_at),
            usize::try_from(len).unwrap_or(usize::MAX),
        )?;
        if copied == 0 {
            return Ok(0);
        }
        let attributes = self.after_write(&file, caller.unprivileged())?;
        self.record_node(Origin::Local, &to, || Change::Write {
            ino: target,
            offset: target_offset,
            len: copied as u64,
            attr: attributes.recorded(),
        })?;
        Ok(copied)
    }

    /// Finds the next data or hole. Every other kind of seek is the kernel's own.
    pub fn seek(&self, ino: Ino, to: SeekFrom) -> Result<u64> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let _content = node.content.lock();
        let file = self.file(&node, Use::Read)?;
        rustix::fs::seek(&file, to)
    }

    /// Makes a node durable in lower, and everything that the journal was told before. The
    /// two syncs run at the same time; which of them ends first proves nothing to anybody
    /// before both have.
    pub fn fsync(&self, ino: Ino, content_only: bool) -> Result<()> {
        let is_directory = self.node(ino)?.file_type == FileType::Directory;
        // Whatever happens from here on may or may not be covered by the sync.
        let before = (self.last_change(ino), self.names_version());
        let held = {
            let _namespace = self.namespace.read();
            let node = self.node(ino)?;
            let _content = node.content.lock();
            if is_directory {
                self.syncable_directory(ino)?
            } else {
                self.file(&node, Use::Read)?
            }
        };
        let poisoned = |poisoned: mirrorfs_journal::Poisoned| {
            self.poison(&poisoned.to_string());
            Errno::IO
        };
        let journaled = self.recorder.begin_durable().map_err(poisoned)?;
        let synced = if content_only {
            rustix::fs::fdatasync(&held)
        } else {
            rustix::fs::fsync(&held)
        };
        if let Err(error) = synced {
            // The kernel drops the dirty pages after telling once: nothing that was
            // written before can be promised any more.
            self.poison(&format!("lower cannot be synced: {error}"));
            return Err(error);
        }
        {
            let _namespace = self.namespace.read();
            let node = self.node(ino)?;
            let _content = node.content.lock();
            let covered = self.last_change(ino) == before.0
                && (!is_directory || self.names_version() == before.1);
            if covered && self.table.is_linked(ino) {
                self.record(Origin::Local, Change::Sync { ino })
                    .map_err(|_| Errno::IO)?;
            }
        }
        journaled.wait().map_err(poisoned)
    }

    /// Syncs the filesystem below. Its root is held by a descriptor that is good for paths
    /// only. An error is told once, and nothing after it proves anything: from then on this
    /// fails like everything else.
    pub fn sync_lower(&self) -> Result<()> {
        if self.poisoned().is_some() {
            return Err(Errno::ROFS);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(self.lower.root(), c".", flags, Mode::empty())?;
        rustix::fs::syncfs(&root).inspect_err(|error| {
            self.poison(&format!("lower cannot be synced: {error}"));
        })
    }

    fn names_version(&self) -> u64 {
        self.names_changed
            .load(std::sync::atomic::Ordering::Acquire)
    }
}

/// What goes when a caller changes a file who may not keep it: the setuid bit, and the
/// setgid bit, which stays only where there is no group execution and the caller belongs
/// to the group. That is the kernel's rule (`setattr_should_drop_sgid`).
pub(super) fn privileged_bits(attributes: &Attributes, caller: &Caller) -> u32 {
    let mode = attributes.mode;
    if attributes.file_type == FileType::Directory {
        return 0;
    }
    let setgid = mode & 0o2000 != 0 && (mode & 0o010 != 0 || !caller.in_group(attributes.gid));
    mode & 0o4000 | if setgid { 0o2000 } else { 0 }
}

/// Reads until the buffer is full or the file ends. A short answer means the end to the
/// kernel, which would show and cache zeros after it: so an error is one, also after a
/// part that could be read.
pub(super) fn read_full(file: &OwnedFd, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(file, &mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
