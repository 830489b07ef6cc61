//! Attributes and extended attributes.

use std::os::fd::{AsFd, BorrowedFd};

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::descriptors::Use;
use super::lower::{c_name, proc_path, stat_open};
use super::ops_data::privileged_bits;
use super::table::Node;
use super::{Caller, Filesystem, Result};
use crate::tree::{Ino, Timestamp, Xattrs};

const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// A time to be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    /// The present.
    Now,
    /// This one.
    To(Timestamp),
}

/// Attributes to be set; what is none stays.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of the last change of the content.
    pub mtime: Option<SetTime>,
    /// Whether a new size takes setuid and setgid away; none where nobody tells, and the
    /// caller's number decides.
    pub kill_suidgid: Option<bool>,
}

impl Filesystem {
    /// Sets attributes, the size among them.
    pub fn setattr(&self, caller: &Caller, ino: Ino, changes: &Changes) -> Result<Attributes> {
        self.writable()?;
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let _content = node.content.lock();
        let claim = self.claim_meta(caller, ino)?;
        let origin = claim.as_ref().map_or(Origin::Local, |claim| claim.origin);
        if let Some(size) = changes.size {
            let file = self.file(&node, Use::Write)?;
            self.preserve(ino, &file, |before| size..before.max(size));
            rustix::fs::ftruncate(&file, size)?;
            let unprivileged = match changes.kill_suidgid {
                Some(kill) => kill.then_some(caller),
                None => caller.unprivileged(),
            };
            let attributes = self.after_write(&file, unprivileged)?;
            let n = self.record_node(origin, &node, || Change::Truncate {
                ino,
                attr: attributes.recorded(),
            })?;
            self.claim_done(claim.as_ref(), ino, n);
        }
        let only_size = Changes {
            size: changes.size,
            kill_suidgid: changes.kill_suidgid,
            ..Changes::default()
        };
        if *changes == only_size {
            return self.stat(&node);
        }
        self.set_metadata(&node, changes, caller)?;
        let attributes = self.stat(&node)?;
        let n = self.record_node(origin, &node, || Change::Attr {
            ino,
            attr: attributes.recorded(),
        })?;
        self.claim_done(claim.as_ref(), ino, n);
        Ok(attributes)
    }

    /// Records the attributes of a node as they are.
    pub(super) fn record_attributes(&self, ino: Ino) -> Result<()> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let _content = node.content.lock();
        let attributes = self.stat(&node)?;
        self.record_node(Origin::Scan, &node, || Change::Attr {
            ino,
            attr: attributes.recorded(),
        })?;
        Ok(())
    }

    fn set_metadata(&self, node: &Node, changes: &Changes, caller: &Caller) -> Result<()> {
        let handle = self.handle(node)?;
        let path = proc_path(handle.as_fd());
        if changes.uid.is_some() || changes.gid.is_some() {
            let before = stat_open(handle.as_fd())?;
            rustix::fs::chownat(
                &handle,
                "",
                changes.uid.map(Uid::from_raw),
                changes.gid.map(Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
            // Lower clears these for root, which we are; for others more may have to go.
            let after = stat_open(handle.as_fd())?;
            let privileged = caller
                .unprivileged()
                .map_or(0, |caller| privileged_bits(&before, caller));
            if after.mode & privileged != 0 {
                rustix::fs::chmod(&path, Mode::from_raw_mode(after.mode & !privileged))?;
            }
        }
        if let Some(mode) = changes.mode {
            if node.file_type == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            rustix::fs::chmod(&path, Mode::from_raw_mode(mode & 0o7777))?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            let times = Timestamps {
                last_access: timespec(changes.atime),
                last_modification: timespec(changes.mtime),
            };
            rustix::fs::utimensat(&handle, "", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }

    /// Reads an extended attribute.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let name = c_name(name)?;
        // The first write to a file asks: a descriptor that is open already needs no way
        // through /proc.
        for usage in [Use::Write, Use::Read] {
            if let Some(held) = self.descriptors.get(ino, usage) {
                return read_growing(|buffer| rustix::fs::fgetxattr(&held, &name, buffer));
            }
        }
        let handle = self.handle(&node)?;
        let path = proc_path(handle.as_fd());
        read_growing(|buffer| rustix::fs::getxattr(&path, &name, buffer))
    }

    /// Lists the extended attributes that a caller may know of, each name followed by a
    /// NUL.
    pub fn listxattr(&self, caller: &Caller, ino: Ino) -> Result<Vec<u8>> {
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let handle = self.handle(&node)?;
        let path = proc_path(handle.as_fd());
        let names = read_growing(|buffer| rustix::fs::listxattr(&path, buffer))?;
        if caller.is_privileged() {
            return Ok(names);
        }
        // Lower shows them to us because we are root. What counts is CAP_SYS_ADMIN, which
        // the request does not tell.
        Ok(names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| !name.starts_with(b"trusted."))
            .collect::<Vec<_>>()
            .concat())
    }

    /// Sets an extended attribute. An access ACL takes the setgid bit from a caller who
    /// may not keep it: `kill_sgid` says so; none where nobody tells, and the caller's
    /// numbers decide.
    pub fn setxattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
        kill_sgid: Option<bool>,
    ) -> Result<()> {
        self.change_xattr(caller, ino, name, kill_sgid, |path, c_name| {
            rustix::fs::setxattr(path, c_name, value, flags)
        })
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, caller: &Caller, ino: Ino, name: &[u8]) -> Result<()> {
        // To take an ACL away leaves the mode as it is.
        self.change_xattr(caller, ino, name, Some(false), |path, c_name| {
            rustix::fs::removexattr(path, c_name)
        })
    }

    fn change_xattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &[u8],
        kill_sgid: Option<bool>,
        change: impl FnOnce(&std::path::Path, &std::ffi::CStr) -> Result<()>,
    ) -> Result<()> {
        self.writable()?;
        let _namespace = self.namespace.read();
        let node = self.node(ino)?;
        let _content = node.content.lock();
        let claim = self.claim_meta(caller, ino)?;
        let origin = claim.as_ref().map_or(Origin::Local, |claim| claim.origin);
        let handle = self.handle(&node)?;
        let path = proc_path(handle.as_fd());
        change(&path, &c_name(name)?)?;
        let mut attributes = self.stat(&node)?;
        if name == ACCESS_ACL
            && attributes.mode & 0o2000 != 0
            && kill_sgid
                .unwrap_or_else(|| !caller.is_privileged() && !caller.in_group(attributes.gid))
        {
            // As chmod by somebody outside the group would.
            rustix::fs::chmod(&path, Mode::from_raw_mode(attributes.mode & !0o2000))?;
            attributes = self.stat(&node)?;
        }
        let n = if name.starts_with(b"user.") {
            let xattrs = own_user_xattrs(handle.as_fd())?;
            let attributes = self.stat(&node)?;
            self.record_node(origin, &node, || Change::Xattrs {
                ino,
                attr: attributes.recorded(),
                xattrs,
            })?
        } else {
            self.record_node(origin, &node, || Change::Attr {
                ino,
                attr: attributes.recorded(),
            })?
        };
        self.claim_done(claim.as_ref(), ino, n);
        Ok(())
    }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        Some(SetTime::Now) => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        },
        Some(SetTime::To(time)) => Timespec {
            tv_sec: time.secs,
            tv_nsec: time.nanos.into(),
        },
    }
}

/// All `user.` attributes of a node, by its `/proc/self/fd` name. Empty where lower
/// or the kind of node has none.
pub(crate) fn user_xattrs(path: &std::path::Path) -> Result<Xattrs> {
    let names = match read_growing(|buffer| rustix::fs::listxattr(path, buffer)) {
        Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => return Ok(Xattrs::new()),
        other => other?,
    };
    let mut xattrs = Xattrs::new();
    for name in names.split(|byte| *byte == 0) {
        if !name.starts_with(b"user.") {
            continue;
        }
        let c_name = c_name(name)?;
        match read_growing(|buffer| rustix::fs::getxattr(path, &c_name, buffer)) {
            Ok(value) => {
                xattrs.insert(name.to_vec(), value);
            }
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(xattrs)
}

/// The same of a file of ours whose own mode forbids to read them: an ordinary user may have
/// set one on a file that he may only write to. The time of its change moves with that.
pub(super) fn own_user_xattrs(held: BorrowedFd<'_>) -> Result<Xattrs> {
    let path = proc_path(held);
    match user_xattrs(&path) {
        Err(Errno::ACCESS) => {}
        other => return other,
    }
    let before = stat_open(held)?;
    if before.uid != rustix::process::geteuid().as_raw() {
        return Err(Errno::ACCESS);
    }
    rustix::fs::chmod(&path, Mode::from_raw_mode(before.mode | 0o400))?;
    let read = user_xattrs(&path);
    rustix::fs::chmod(&path, Mode::from_raw_mode(before.mode))?;
    read
}

/// Calls with a small buffer first and with the largest the kernel knows then.
fn read_growing(mut read: impl FnMut(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 512];
    loop {
        match read(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < 64 << 10 => buffer = vec![0; 64 << 10],
            Err(error) => return Err(error),
        }
    }
}
