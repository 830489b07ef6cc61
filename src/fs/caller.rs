//! Who makes a request, and what that means for what is created.

use std::cell::Cell;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::io::Errno;

/// The process behind a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Its filesystem user.
    pub uid: u32,
    /// Its filesystem group.
    pub gid: u32,
    /// Its thread id, in the daemon's namespace; 0 if there is none.
    pub pid: u32,
}

impl Caller {
    /// This process itself.
    pub fn own() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            pid: 0,
        }
    }

    /// Whether the caller may keep setuid and setgid bits on what it writes to.
    /// What counts is CAP_FSETID, which the request does not tell.
    pub(super) fn is_privileged(&self) -> bool {
        self.uid == 0
    }

    /// The caller, if setuid and setgid bits have to go where it changes a file.
    pub(super) fn unprivileged(&self) -> Option<&Self> {
        (!self.is_privileged()).then_some(self)
    }

    /// Whether the caller belongs to a group. The request carries the primary one
    /// only; the others are looked up.
    pub(super) fn in_group(&self, gid: u32) -> bool {
        if self.gid == gid {
            return true;
        }
        let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", self.pid)) else {
            return false;
        };
        status
            .lines()
            .find_map(|line| line.strip_prefix("Groups:"))
            .is_some_and(|groups| {
                groups
                    .split_ascii_whitespace()
                    .any(|group| group.parse() == Ok(gid))
            })
    }
}

thread_local! {
    /// The umask that this thread has of its own; none before it has one.
    static UMASK: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Sets the calling thread's umask, so that lower applies it, or does not where a
/// default ACL rules.
pub(super) fn set_umask(umask: u32) -> Result<(), Errno> {
    UMASK.with(|own| {
        if own.get() == Some(umask) {
            return Ok(());
        }
        if own.get().is_none() {
            // SAFETY: unsharing CLONE_FS gives this thread an umask, root and working
            // directory of its own; no descriptor and no memory is affected.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?;
        }
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        own.set(Some(umask));
        Ok(())
    })
}

/// Hands a node that root just created to the caller. In a directory with the
/// setgid bit lower has set the group already.
///
/// Creating under setfsuid instead would take away the rights that come from
/// supplementary groups.
pub(super) fn hand_over(
    directory: BorrowedFd<'_>,
    name: &[u8],
    caller: &Caller,
    mode: Option<u32>,
) -> Result<(), Errno> {
    let Some(heir) = Heir::of(directory, caller)? else {
        return Ok(());
    };
    let name = super::lower::c_name(name)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(directory, &name, Some(heir.user), heir.group, flags)?;
    // chown takes setuid and setgid from whatever is no directory.
    if let Some(mode) = mode.filter(|mode| mode & 0o6000 != 0) {
        let now = super::lower::stat_name(directory, name.as_bytes())?;
        rustix::fs::chmodat(
            directory,
            &name,
            Mode::from_raw_mode(now.mode | (mode & 0o6000)),
            AtFlags::empty(),
        )?;
    }
    Ok(())
}

/// The same for a file that is open, and has perhaps no name.
pub(super) fn hand_over_open(
    directory: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    caller: &Caller,
    mode: u32,
) -> Result<(), Errno> {
    let Some(heir) = Heir::of(directory, caller)? else {
        return Ok(());
    };
    rustix::fs::fchown(file, Some(heir.user), heir.group)?;
    if mode & 0o6000 != 0 {
        let now = super::lower::stat_open(file)?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(now.mode | (mode & 0o6000)))?;
    }
    Ok(())
}

/// Whom what was just made in a directory has to be given to.
struct Heir {
    user: Uid,
    /// None where the directory has passed its own on.
    group: Option<Gid>,
}

impl Heir {
    /// None if it stays ours.
    fn of(directory: BorrowedFd<'_>, caller: &Caller) -> Result<Option<Self>, Errno> {
        let is_root = caller.uid == 0 && caller.gid == 0;
        if is_root || !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let directory_mode = super::lower::stat_open(directory)?.mode;
        Ok(Some(Self {
            user: Uid::from_raw(caller.uid),
            group: (directory_mode & 0o2000 == 0).then(|| Gid::from_raw(caller.gid)),
        }))
    }
}
