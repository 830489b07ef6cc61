//! Files that are made without a name (`O_TMPFILE`), and may get one later.

use std::os::fd::{AsFd, BorrowedFd};

use mirrorfs_journal::Origin;
use rustix::fs::{Mode, OFlags};

use super::attributes::Attributes;
use super::caller::{hand_over_open, set_umask};
use super::descriptors::Use;
use super::lower::stat_open;
use super::ops_meta::own_user_xattrs;
use super::{Caller, Filesystem, Found, Result};
use crate::tree::Ino;

impl Filesystem {
    /// Makes a regular file without a name, in the filesystem of a directory and with the
    /// default ACL that it has. It is no part of the tree, and what becomes of it is not
    /// recorded, until [`Filesystem::link`] gives it a name; an `exclusive` one never gets any.
    pub fn make_nameless(
        &self,
        caller: &Caller,
        parent: Ino,
        mode: u32,
        umask: u32,
        exclusive: bool,
    ) -> Result<Found> {
        self.writable()?;
        let _namespace = self.namespace.write();
        let directory = self.directory(parent)?;
        set_umask(umask)?;
        let mut flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        if exclusive {
            flags |= OFlags::EXCL;
        }
        let mode_of_file = Mode::from_raw_mode(mode & 0o7777);
        let made = self.with_room(|| rustix::fs::openat(&directory, c".", flags, mode_of_file))?;
        hand_over_open(directory.as_fd(), made.as_fd(), caller, mode)?;
        let attributes = stat_open(made.as_fd())?;
        // Nothing else leads to it: it stays open also when the cache has closed it.
        let kept = self.descriptors.put(attributes.ino, Use::Write, made);
        self.table.intern_nameless(attributes.ino, kept, !exclusive);
        self.born(attributes.ino);
        Ok(Found {
            attributes,
            cacheable: true,
        })
    }

    /// Records a file that has got its first name: to everybody else it is new.
    pub(super) fn record_named(
        &self,
        parent: Ino,
        name: &[u8],
        attributes: &Attributes,
        held: BorrowedFd<'_>,
    ) -> Result<()> {
        self.born(attributes.ino);
        let xattrs = own_user_xattrs(held)?;
        let attributes = &Attributes {
            ctime: stat_open(held)?.ctime,
            ..*attributes
        };
        self.record_created(Origin::Local, parent, name, attributes, None, &xattrs)?;
        Ok(())
    }
}
