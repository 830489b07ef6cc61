//! The covered directory: the descriptor opened before mounting, and the few ways
//! in which anything below it is opened.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use crate::tree::{Ino, RESERVED, Timestamp};

/// What `fstatfs` calls a FUSE filesystem.
const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;
/// What `fstatfs` calls an overlay.
const OVERLAYFS_SUPER_MAGIC: u64 = 0x794c_7630;

/// Why a directory cannot be mirrored.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// The path is missing or cannot be opened.
    #[error("cannot open {}: {source}", .dir.display())]
    Open {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A dead FUSE mount covers it: its daemon is gone.
    #[error(
        "{} is covered by a mount whose daemon is gone (ENOTCONN); detach it with `umount -l` or mount again",
        .dir.display()
    )]
    Dead {
        /// The directory.
        dir: PathBuf,
    },
    /// It lies on a FUSE filesystem, perhaps on a mirrorfs mount.
    #[error(
        "{} lies on a FUSE filesystem: it is mounted already, or belongs to another mount; unmount that first",
        .dir.display()
    )]
    Fuse {
        /// The directory.
        dir: PathBuf,
    },
    /// It lies on an overlay that gives files and directories the numbers of several
    /// filesystems: two nodes may have the same number there.
    #[error(
        "{} lies on an overlay whose layers are on different filesystems, so that inode numbers are not unique; mount the overlay with the option xino=on",
        .dir.display()
    )]
    Overlay {
        /// The directory.
        dir: PathBuf,
    },
}

/// An open lower directory. Everything below it is reached through this descriptor,
/// so that a mount on top of the same path does not come between.
#[derive(Debug)]
pub struct Lower {
    root: Arc<OwnedFd>,
    dir: PathBuf,
    device: u64,
    ino: Ino,
}

impl Lower {
    /// Opens a directory that is about to be covered.
    pub fn open(dir: &Path) -> Result<Self, LowerError> {
        let failed = |source: io::Error| LowerError::Open {
            dir: dir.to_path_buf(),
            source,
        };
        let failed_errno = |source: Errno| match source {
            // ECANCELED: it died a moment ago, and had served over io_uring.
            Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED => LowerError::Dead {
                dir: dir.to_path_buf(),
            },
            source => failed(source.into()),
        };
        let root = rustix::fs::open(
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(failed_errno)?;
        // fstatfs asks the filesystem itself, where O_PATH and stat may be answered
        // from the cache: only it tells a dead mount.
        let statfs = rustix::fs::fstatfs(&root).map_err(failed_errno)?;
        if statfs.f_type as u64 == FUSE_SUPER_MAGIC {
            return Err(LowerError::Fuse {
                dir: dir.to_path_buf(),
            });
        }
        let stat = rustix::fs::fstat(&root).map_err(failed_errno)?;
        if statfs.f_type as u64 == OVERLAYFS_SUPER_MAGIC
            && device_of_files(root.as_fd()).is_some_and(|device| device != stat.st_dev)
        {
            return Err(LowerError::Overlay {
                dir: dir.to_path_buf(),
            });
        }
        // The kernel's own name for the descriptor: absolute and without symlinks.
        let dir = std::fs::read_link(proc_path(root.as_fd())).map_err(failed)?;
        Ok(Self {
            root: Arc::new(root),
            dir,
            device: stat.st_dev,
            ino: Ino(stat.st_ino),
        })
    }

    /// The directory's absolute path, for messages and for mounting over it only.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root's inode number.
    pub fn ino(&self) -> Ino {
        self.ino
    }

    /// The device that the tree lies on. Nothing on another one is entered.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// The root's descriptor. It is `O_PATH`.
    pub fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    /// Opens a directory of the reserved one (`staging`, `trash`) for `*at` calls.
    pub fn reserved(&self, name: &[u8]) -> Result<OwnedFd, Errno> {
        let reserved = open_beneath(
            self.root.as_fd(),
            RESERVED,
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        )?;
        open_beneath(
            reserved.as_fd(),
            name,
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        )
    }
}

/// The device that a new file in a directory shows, if that can be seen without leaving a
/// trace.
fn device_of_files(directory: BorrowedFd<'_>) -> Option<u64> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, ".", flags, Mode::from_raw_mode(0o600)).ok()?;
    Some(rustix::fs::fstat(&file).ok()?.st_dev)
}

/// Opens one name in a directory: never through a symlink, never out of the
/// directory, never into another mount (EXDEV).
pub(super) fn open_beneath(
    directory: BorrowedFd<'_>,
    name: &[u8],
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let name = c_name(name)?;
    loop {
        match rustix::fs::openat2(
            directory,
            &name,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            mode,
            resolve,
        ) {
            // A rename elsewhere raced with the check of "beneath"; the kernel asks
            // to try again.
            Err(Errno::AGAIN) if !flags.contains(OFlags::NONBLOCK) => {}
            other => return other,
        }
    }
}

/// Opens a node anew through a descriptor held on it.
pub(super) fn reopen(held: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        proc_path(held),
        (flags | OFlags::CLOEXEC) & !OFlags::NOFOLLOW,
        Mode::empty(),
    )
}

/// The attributes of one name, itself and not what it points to.
pub(super) fn stat_name(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Attributes, Errno> {
    let stat = rustix::fs::statat(
        directory,
        c_name(name)?,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
    )?;
    Ok(Attributes::from(&stat))
}

/// The attributes of an open node.
pub(super) fn stat_open(held: BorrowedFd<'_>) -> Result<Attributes, Errno> {
    Ok(Attributes::from(&rustix::fs::fstat(held)?))
}

/// When a name's node was made, or with no name the open node itself. None where lower does
/// not know, or the kernel cannot ask.
pub(super) fn birth_at(held: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Timestamp>, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let told = match rustix::fs::statx(held, c_name(name)?, flags, StatxFlags::BTIME) {
        Err(Errno::NOSYS) => return Ok(None),
        other => other?,
    };
    let known = told.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(known.then_some(Timestamp {
        secs: told.stx_btime.tv_sec,
        nanos: told.stx_btime.tv_nsec,
    }))
}

/// The path that the kernel gives to a descriptor of this process. Unlike the
/// node's own path it needs no look-up and cannot be exchanged by anybody.
pub(super) fn proc_path(held: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()))
}

/// A name as system calls take it.
pub(super) fn c_name(name: &[u8]) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::INVAL)
}
