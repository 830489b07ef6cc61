//! Moving what a peer's change displaces to `.mirrorfs/trash`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::door::Claim;
use super::lower::{c_name, open_beneath};
use super::{Filesystem, Result};
use crate::replica::keep::{slot_name, stamp};
use crate::tree::{Id, Kind, RelPath};

/// A fresh directory in the trash, for one displaced file.
pub(super) struct TrashSlot {
    /// Where in the slot the file goes: below the directories it had in the tree.
    directory: OwnedFd,
    /// Where that is, from the trash.
    at: RelPath,
}

impl Filesystem {
    /// Makes a directory in the trash, with those of the claim's path below it.
    pub(super) fn trash_slot(&self, token: Option<&[u8]>, claim: &Claim) -> Result<TrashSlot> {
        let trash = self.lower.reserved(b"trash")?;
        let token = match token {
            Some(token) => String::from_utf8_lossy(token).into_owned(),
            None => Id::random().map_err(|_| Errno::IO)?.to_string(),
        };
        let name = slot_name(&stamp(crate::clock::wall()), &token, claim.agreed);
        let mut directory = enter(trash.as_fd(), name.as_bytes())?;
        let mut at = RelPath::new(name).map_err(|_| Errno::INVAL)?;
        let parent = claim.path.parent().unwrap_or_default();
        for component in parent.components() {
            directory = enter(directory.as_fd(), component)?;
            at = at.join(component).map_err(|_| Errno::INVAL)?;
        }
        Ok(TrashSlot { directory, at })
    }

    /// Takes a name out of the tree and keeps what it showed in the trash. Returns
    /// where. A node with further names stays theirs, and the trash gets a copy: a
    /// link in the trash would count, and would change with them.
    pub(super) fn discard(
        &self,
        directory: BorrowedFd<'_>,
        claim: &Claim,
        found: &Attributes,
    ) -> Result<RelPath> {
        let slot = self.trash_slot(None, claim)?;
        let name = claim.path.name();
        slot.take(directory, name, name, found)
    }
}

impl TrashSlot {
    /// Moves what `from` shows here as `name`. Says where that is, from the trash.
    pub(super) fn take(
        &self,
        directory: BorrowedFd<'_>,
        from: &[u8],
        name: &[u8],
        found: &Attributes,
    ) -> Result<RelPath> {
        if found.kind() == Kind::File && found.nlink > 1 {
            self.copy(directory, from, name, found)?;
            rustix::fs::unlinkat(directory, c_name(from)?, AtFlags::empty())?;
        } else {
            rustix::fs::renameat_with(
                directory,
                c_name(from)?,
                &self.directory,
                c_name(name)?,
                RenameFlags::NOREPLACE,
            )?;
        }
        self.at.join(name).map_err(|_| Errno::INVAL)
    }

    fn copy(
        &self,
        directory: BorrowedFd<'_>,
        from: &[u8],
        name: &[u8],
        found: &Attributes,
    ) -> Result<()> {
        let source = open_beneath(
            directory,
            from,
            OFlags::RDONLY | OFlags::NONBLOCK,
            Mode::empty(),
        )?;
        let target = open_beneath(
            self.directory.as_fd(),
            name,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
            Mode::from_raw_mode(0o600),
        )?;
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            copy_all(&source, &target)?;
        }
        let time = |time: crate::tree::Timestamp| Timespec {
            tv_sec: time.secs,
            tv_nsec: time.nanos.into(),
        };
        rustix::fs::fchmod(&target, Mode::from_raw_mode(found.mode & 0o777))?;
        rustix::fs::futimens(
            &target,
            &Timestamps {
                last_access: time(found.atime),
                last_modification: time(found.mtime),
            },
        )
    }
}

/// Opens a directory, and makes it if it is missing.
pub(super) fn enter(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    match rustix::fs::mkdirat(directory, c_name(name)?, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    open_beneath(directory, name, flags, Mode::empty())
}

fn copy_all(source: &OwnedFd, target: &OwnedFd) -> Result<()> {
    loop {
        match rustix::fs::copy_file_range(source, None, target, None, 64 << 20) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
