//! The door process: one thread, no FUSE descriptor, ordinary system calls.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::mappings;
use super::protocol::{self, Outcome, Reply, Request};
use super::units::{Unit, holds};
use crate::fs::{DoorOp, Expect, GREETED, StagedName};
use crate::tree::{RelPath, Timestamp, Xattrs};

const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;

/// Serves requests from the socket that is standard input, until it is closed.
pub fn run() -> io::Result<()> {
    ignore_lease_breaks();
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let mut socket = UnixStream::from(socket);
    loop {
        let request = match protocol::receive(&mut socket) {
            Ok(request) => request,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let reply = answer(&request);
        protocol::send(&mut socket, &reply)?;
    }
}

/// Whoever opens a file for writing while the probe holds its lease makes the kernel
/// send SIGIO, which would end the process.
fn ignore_lease_breaks() {
    // SAFETY: ignoring a signal installs no handler; the process has one thread.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
}

fn answer(request: &Request) -> Reply {
    match request {
        Request::Apply {
            dir,
            device,
            greeting,
            operations,
        } => match enter(dir, *device).and_then(|root| greet(root, greeting)) {
            Ok(root) => Reply::Applied(apply_all(root.as_fd(), operations)),
            Err(reason) => Reply::Refused(reason),
        },
        Request::Probe { dir, device, paths } => match enter(dir, *device) {
            Ok(root) => Reply::Probed(
                paths
                    .iter()
                    .map(|path| is_open_for_writing(root.as_fd(), path).unwrap_or(false))
                    .collect(),
            ),
            Err(reason) => Reply::Refused(reason),
        },
        Request::Settle {
            dir,
            device,
            everybody,
            paths,
        } => match enter(dir, *device) {
            Ok(root) => Reply::Settled(mappings::settle(
                root.as_fd(),
                Path::new(OsStr::from_bytes(dir)),
                *device,
                *everybody,
                paths.as_deref(),
            )),
            Err(reason) => Reply::Refused(reason),
        },
    }
}

/// Opens the root of the mount and makes sure that it is one: after an unmount the
/// same path is lower. Closed after the batch, so that it does not keep the mount busy.
fn enter(dir: &[u8], device: u64) -> Result<OwnedFd, String> {
    let path = Path::new(OsStr::from_bytes(dir));
    let failed = |error: Errno| format!("cannot open {}: {}", path.display(), describe(error));
    let root = rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed)?;
    let statfs = rustix::fs::fstatfs(&root).map_err(failed)?;
    let stat = rustix::fs::fstat(&root).map_err(failed)?;
    if statfs.f_type as u64 != FUSE_SUPER_MAGIC || stat.st_dev != device {
        return Err(format!("{} is not mounted", path.display()));
    }
    Ok(root)
}

/// Makes the filesystem know this process by the number that its requests carry. A
/// removal that it took for somebody else's would not go to the trash.
fn greet(root: OwnedFd, greeting: &StagedName) -> Result<OwnedFd, String> {
    let looked_up = rustix::fs::statat(&root, greeting.door_name(), AtFlags::SYMLINK_NOFOLLOW);
    match looked_up {
        Err(GREETED) => Ok(root),
        other => Err(format!(
            "the filesystem does not recognise the door process ({:?}); does it run in the same pid namespace?",
            other.err()
        )),
    }
}

pub(super) fn describe(error: Errno) -> String {
    io::Error::from(error).to_string()
}

pub(super) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )
}

fn apply_all(root: BorrowedFd<'_>, operations: &[(DoorOp, Option<Unit>)]) -> Vec<Outcome> {
    let mut held: HashMap<Unit, RelPath> = HashMap::new();
    let mut outcomes = Vec::with_capacity(operations.len());
    for (operation, unit) in operations {
        if let Some(by) = unit.and_then(|unit| held.get(&unit)) {
            outcomes.push(Outcome::Held(by.clone()));
            continue;
        }
        let outcome =
            apply(root, operation).unwrap_or_else(|error| Outcome::Failed(describe(error)));
        if let Some(unit) = unit
            && outcome != Outcome::Done
            && holds(operation)
        {
            held.insert(*unit, operation.path().clone());
        }
        outcomes.push(outcome);
    }
    outcomes
}

fn is_open_for_writing(root: BorrowedFd<'_>, path: &RelPath) -> Result<bool, Errno> {
    let parent = path.parent().ok_or(Errno::INVAL)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let directory = crate::tree::reach::open_beneath(root, &parent, flags)?;
    has_writer(directory.as_fd(), path)
}

fn apply(root: BorrowedFd<'_>, operation: &DoorOp) -> Result<Outcome, Errno> {
    let path = operation.path();
    let parent = path.parent().ok_or(Errno::INVAL)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let directory = crate::tree::reach::open_beneath(root, &parent, flags)?;
    let name = CString::new(path.name()).map_err(|_| Errno::INVAL)?;
    match operation {
        DoorOp::Place { staged, expect, .. } => {
            if matches!(expect, Expect::Node { .. }) && has_writer(directory.as_fd(), path)? {
                return Ok(Outcome::OpenForWriting);
            }
            rustix::fs::renameat(root, staged.door_name(), &directory, &name)?;
        }
        DoorOp::Remove { .. } => {
            if has_writer(directory.as_fd(), path)? {
                return Ok(Outcome::OpenForWriting);
            }
            rustix::fs::unlinkat(&directory, &name, AtFlags::empty())?;
        }
        DoorOp::RemoveDir { .. } => {
            rustix::fs::unlinkat(&directory, &name, AtFlags::REMOVEDIR)?;
        }
        DoorOp::SetMeta {
            mode,
            mtime,
            xattrs,
            ..
        } => {
            let node = open_beneath(directory.as_fd(), name_of(path), OFlags::PATH)?;
            set_meta(&node, *mode, *mtime, xattrs.as_ref())?;
        }
    }
    Ok(Outcome::Done)
}

fn name_of(path: &RelPath) -> &Path {
    Path::new(OsStr::from_bytes(path.name()))
}

/// Opens and closes a file, so that what was stored through a mapping of it reaches
/// lower, and probes for writers: a read lease is refused while anybody has it open
/// for writing.
fn has_writer(directory: BorrowedFd<'_>, path: &RelPath) -> Result<bool, Errno> {
    let stat = match rustix::fs::statat(directory, name_of(path), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        other => other?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(false);
    }
    // NONBLOCK: a lease of somebody else must not make us wait.
    let open = || open_beneath(directory, name_of(path), OFlags::RDONLY | OFlags::NONBLOCK);
    match open() {
        Ok(file) => drop(file),
        // Unreadable for us: nothing can be probed, and the handler checks all the same.
        Err(Errno::ACCESS | Errno::PERM) => return Ok(false),
        Err(Errno::AGAIN) => return Ok(true),
        Err(error) => return Err(error),
    }
    let file = match open() {
        Err(Errno::AGAIN) => return Ok(true),
        other => other?,
    };
    match set_lease(&file, libc::F_RDLCK) {
        Ok(()) => {
            // Given back before anything is renamed: its breaking would wait for us.
            set_lease(&file, libc::F_UNLCK)?;
            Ok(false)
        }
        Err(Errno::AGAIN) => Ok(true),
        // Not the owner's process and without CAP_LEASE, or no leases here at all.
        Err(_) => Ok(false),
    }
}

fn set_lease(file: &OwnedFd, lease: i32) -> Result<(), Errno> {
    // SAFETY: F_SETLEASE takes an int and touches no memory of ours; the descriptor
    // is open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, lease) };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn set_meta(
    node: &OwnedFd,
    mode: Option<u32>,
    mtime: Option<Timestamp>,
    xattrs: Option<&Xattrs>,
) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(node)?;
    let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    let path = PathBuf::from(format!("/proc/self/fd/{}", node.as_raw_fd()));
    if let Some(xattrs) = xattrs.filter(|_| !is_link) {
        match set_xattrs(&path, xattrs) {
            // Setting them takes the right to write, which the owner may give himself.
            Err(Errno::ACCESS) => {
                rustix::fs::chmod(&path, Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o600))?;
                let set = set_xattrs(&path, xattrs);
                rustix::fs::chmod(&path, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
                set?;
            }
            other => other?,
        }
    }
    if let Some(mode) = mode.filter(|mode| !is_link && stat.st_mode & 0o7777 != mode & 0o7777) {
        rustix::fs::chmod(&path, Mode::from_raw_mode(mode & 0o7777))?;
    }
    if let Some(mtime) = mtime {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: mtime.secs,
                tv_nsec: mtime.nanos.into(),
            },
        };
        rustix::fs::utimensat(node, "", &times, AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

fn set_xattrs(path: &Path, wanted: &Xattrs) -> Result<(), Errno> {
    let present = crate::fs::user_xattrs(path)?;
    for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
        rustix::fs::removexattr(path, name.as_slice())?;
    }
    for (name, value) in wanted {
        if present.get(name) != Some(value) {
            rustix::fs::setxattr(path, name.as_slice(), value, XattrFlags::empty())?;
        }
    }
    Ok(())
}
