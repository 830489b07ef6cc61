//! Setting what an entry carries beside its content.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, Mode, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::beneath::Place;
use crate::tree::scan::{self, MODE_MASK};
use crate::tree::{Timestamp, Xattrs};

/// Gives an inode exactly these `user.` attributes. False if the filesystem holds fewer:
/// it has none at all, or none so large. That is no error, because the rest of the
/// entry is worth having; the caller remembers that they are missing.
pub(crate) fn set_xattrs(fd: BorrowedFd<'_>, wanted: &Xattrs) -> io::Result<bool> {
    let path = scan::reference_path(fd);
    let present = scan::xattrs(fd)?;
    let mut complete = true;
    for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
        match rustix::fs::removexattr(&path, os(name)) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (name, value) in wanted {
        // Any other name space is refused: `security.` and `trusted.` grant rights.
        if !name.starts_with(b"user.") {
            complete = false;
            continue;
        }
        if present.get(name) == Some(value) {
            continue;
        }
        match rustix::fs::setxattr(&path, os(name), value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOTSUP | Errno::NOSPC | Errno::TOOBIG | Errno::RANGE | Errno::PERM) => {
                complete = false;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(complete)
}

/// Sets permission bits, of a thing that may not be openable. Never setuid or setgid.
pub(crate) fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::chmodat(
        rustix::fs::CWD,
        scan::reference_path(fd),
        Mode::from_raw_mode(mode & MODE_MASK),
        AtFlags::empty(),
    )?)
}

/// Sets the modification time of a name, also of a symbolic link.
pub(crate) fn set_mtime(place: Place<'_>, mtime: Timestamp) -> io::Result<()> {
    Ok(rustix::fs::utimensat(
        place.dir,
        place.os_name(),
        &only_mtime(mtime),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Sets the modification time of an inode that is no symbolic link.
pub(crate) fn set_mtime_of(fd: BorrowedFd<'_>, mtime: Timestamp) -> io::Result<()> {
    Ok(rustix::fs::utimensat(
        rustix::fs::CWD,
        scan::reference_path(fd),
        &only_mtime(mtime),
        AtFlags::empty(),
    )?)
}

fn only_mtime(mtime: Timestamp) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: mtime.secs,
            tv_nsec: mtime.nanos.min(999_999_999).into(),
        },
    }
}

fn os(name: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name)
}
