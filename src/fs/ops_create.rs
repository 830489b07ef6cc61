//! Making nodes and names.

use std::os::fd::{AsFd, BorrowedFd};

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::caller::{hand_over, hand_over_open, set_umask};
use super::descriptors::Use;
use super::door::is_reserved;
use super::lower::{c_name, open_beneath, proc_path, stat_name, stat_open};
use super::{Caller, Filesystem, Found, Result};
use crate::tree::{Ino, Kind, Xattrs};

impl Filesystem {
    /// Makes a regular file; or finds it, if it exists and the caller does not insist.
    pub fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        exclusive: bool,
    ) -> Result<Found> {
        self.writable()?;
        let _namespace = self.namespace.write();
        self.allowed(parent, name)?;
        let directory = self.directory(parent)?;
        set_umask(umask)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let mode_of_file = Mode::from_raw_mode(mode & 0o7777);
        // A descriptor is found before a file is made.
        let opened = self.with_room(|| open_beneath(directory.as_fd(), name, flags, mode_of_file));
        let opened = match opened {
            Err(Errno::EXIST) if !exclusive => {
                let found = self.stat_child(parent, name)?;
                self.table
                    .intern(parent, name, found.ino, found.file_type, 1, 0);
                return Ok(Found {
                    attributes: self.shown(found),
                    cacheable: true,
                });
            }
            other => other?,
        };
        if let Err(error) = hand_over_open(directory.as_fd(), opened.as_fd(), caller, mode) {
            self.undo(directory.as_fd(), name, AtFlags::empty());
            return Err(error);
        }
        let attributes = stat_open(opened.as_fd())?;
        // Kept open: if its mode forbids opening it again, its maker may write to it
        // all the same.
        self.descriptors.put(attributes.ino, Use::Write, opened);
        self.made(parent, name, attributes, None)
    }

    /// Makes a file, FIFO, socket or device.
    #[allow(clippy::too_many_arguments)] // as the request has them
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        file_type: FileType,
        mode: u32,
        umask: u32,
        device: u64,
    ) -> Result<Found> {
        if matches!(file_type, FileType::Directory | FileType::Symlink) {
            return Err(Errno::INVAL);
        }
        self.make(caller, parent, name, Some(mode), umask, None, |directory| {
            rustix::fs::mknodat(
                directory,
                c_name(name)?,
                file_type,
                Mode::from_raw_mode(mode & 0o7777),
                device,
            )
        })
    }

    /// Makes a directory.
    pub fn mkdir(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<Found> {
        self.make(caller, parent, name, None, umask, None, |directory| {
            rustix::fs::mkdirat(directory, c_name(name)?, Mode::from_raw_mode(mode & 0o7777))
        })
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Found> {
        self.make(caller, parent, name, None, 0, Some(target), |directory| {
            rustix::fs::symlinkat(c_name(target)?, directory, c_name(name)?)
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn make(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        mode: Option<u32>,
        umask: u32,
        target: Option<&[u8]>,
        make: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<Found> {
        self.writable()?;
        let _namespace = self.namespace.write();
        self.allowed(parent, name)?;
        let directory = self.directory(parent)?;
        set_umask(umask)?;
        make(directory.as_fd())?;
        if let Err(error) = hand_over(directory.as_fd(), name, caller, mode) {
            let kind = stat_name(directory.as_fd(), name).map(|made| made.kind());
            let flags = match kind {
                Ok(Kind::Directory) => AtFlags::REMOVEDIR,
                _ => AtFlags::empty(),
            };
            self.undo(directory.as_fd(), name, flags);
            return Err(error);
        }
        let attributes = stat_name(directory.as_fd(), name)?;
        self.made(parent, name, attributes, target)
    }

    /// Takes back what could not be handed over to its owner: nobody has seen it.
    fn undo(&self, directory: BorrowedFd<'_>, name: &[u8], flags: AtFlags) {
        let removed = c_name(name).and_then(|name| rustix::fs::unlinkat(directory, name, flags));
        if let Err(error) = removed {
            tracing::warn!("cannot take back what was made for another user: {error}");
        }
    }

    fn made(
        &self,
        parent: Ino,
        name: &[u8],
        attributes: Attributes,
        target: Option<&[u8]>,
    ) -> Result<Found> {
        self.table
            .intern(parent, name, attributes.ino, attributes.file_type, 1, 0);
        self.born(attributes.ino);
        let recorded = self.record_created(
            Origin::Local,
            parent,
            name,
            &attributes,
            target,
            &Xattrs::new(),
        );
        if let Err(error) = recorded {
            self.forget(attributes.ino, 1);
            return Err(error);
        }
        Ok(Found {
            attributes,
            cacheable: true,
        })
    }

    /// Records a new node; the last number of its records is returned.
    pub(super) fn record_created(
        &self,
        origin: Origin,
        parent: Ino,
        name: &[u8],
        attributes: &Attributes,
        target: Option<&[u8]>,
        xattrs: &Xattrs,
    ) -> Result<u64> {
        let mut n = self.record(
            origin,
            Change::Create {
                parent,
                name: name.to_vec(),
                ino: attributes.ino,
                attr: attributes.recorded(),
                target: target.map(<[u8]>::to_vec),
            },
        )?;
        if !xattrs.is_empty() {
            n = self.record(
                origin,
                Change::Xattrs {
                    ino: attributes.ino,
                    attr: attributes.recorded(),
                    xattrs: xattrs.clone(),
                },
            )?;
        }
        self.note_changed(attributes.ino, n);
        self.note_names_changed();
        Ok(n)
    }

    /// Gives a node a further name.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Found> {
        self.writable()?;
        let _namespace = self.namespace.write();
        self.allowed(parent, name)?;
        let node = self.node(ino)?;
        let is_first = self.table.awaits_name(ino);
        if !is_first && !self.table.is_linked(ino) {
            // An unlinked file cannot come back: the kernel does not let it either.
            return Err(Errno::NOENT);
        }
        let handle = self.handle(&node)?;
        let directory = self.directory(parent)?;
        // By the descriptor: none of its names may be known any more.
        rustix::fs::linkat(
            rustix::fs::CWD,
            proc_path(handle.as_fd()),
            &directory,
            c_name(name)?,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.table.intern(parent, name, ino, node.file_type, 1, 0);
        let attributes = stat_name(directory.as_fd(), name)?;
        let recorded = if is_first {
            self.record_named(parent, name, &attributes, handle.as_fd())
        } else {
            self.record(
                Origin::Local,
                Change::Link {
                    parent,
                    name: name.to_vec(),
                    ino,
                },
            )
            .and_then(|_| self.record_moved(Origin::Local, &attributes))
        };
        self.note_names_changed();
        if let Err(error) = recorded {
            self.forget(ino, 1);
            return Err(error);
        }
        Ok(Found {
            attributes,
            cacheable: true,
        })
    }

    /// Keeps the reserved names of the root to ourselves.
    pub(super) fn allowed(&self, parent: Ino, name: &[u8]) -> Result<()> {
        if parent == self.root() && is_reserved(name) {
            return Err(Errno::PERM);
        }
        Ok(())
    }
}
