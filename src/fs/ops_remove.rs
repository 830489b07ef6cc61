//! Removing names.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::descriptors::Use;
use super::lower::{c_name, open_beneath};
use super::table::Displaced;
use super::{Caller, Filesystem, Result};
use crate::tree::Ino;

impl Filesystem {
    /// Removes a name of anything but a directory. By the door: moves it to the trash.
    pub fn unlink(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<()> {
        self.writable()?;
        let _namespace = self.namespace.write();
        self.allowed(parent, name)?;
        let claim = self.claim_removal(caller, parent, name, false)?;
        let found = self.stat_child(parent, name)?;
        if found.file_type == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        if let Some(claim) = &claim {
            self.expect(claim, Some(&found))?;
        }
        let directory = self.directory(parent)?;
        let last = found.nlink <= 1;
        let kept = self.keep_removed(parent, name, &found)?;
        let origin = match &claim {
            None => {
                rustix::fs::unlinkat(&directory, c_name(name)?, AtFlags::empty())?;
                Origin::Local
            }
            Some(claim) => {
                let kept = self
                    .discard(directory.as_fd(), claim, &found)
                    .inspect_err(|error| self.refuse(claim, &trash_failed(*error)))?;
                if last {
                    let path = claim.path.clone();
                    self.table.displace(found.ino, Displaced::new(path, kept));
                }
                claim.origin
            }
        };
        let gone = self.table.remove_name(parent, name, found.ino, last, kept);
        self.close(gone);
        self.note_names_changed();
        let mut n = self.record(
            origin,
            Change::Unlink {
                parent,
                name: name.to_vec(),
                ino: found.ino,
                last,
            },
        )?;
        if !last {
            n = self.record_remaining(origin, &found)?.unwrap_or(n);
        }
        self.claim_done(claim.as_ref(), found.ino, n);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<()> {
        self.writable()?;
        let _namespace = self.namespace.write();
        self.allowed(parent, name)?;
        let claim = self.claim_removal(caller, parent, name, true)?;
        let found = self.stat_child(parent, name)?;
        if let Some(claim) = &claim {
            self.expect(claim, Some(&found))?;
        }
        let directory = self.directory(parent)?;
        let kept = if found.file_type == FileType::Directory {
            self.keep_removed(parent, name, &found)?
        } else {
            None
        };
        rustix::fs::unlinkat(&directory, c_name(name)?, AtFlags::REMOVEDIR)?;
        let gone = self.table.remove_name(parent, name, found.ino, true, kept);
        self.close(gone);
        self.note_names_changed();
        let origin = claim.as_ref().map_or(Origin::Local, |claim| claim.origin);
        let n = self.record(
            origin,
            Change::Unlink {
                parent,
                name: name.to_vec(),
                ino: found.ino,
                last: true,
            },
        )?;
        self.claim_done(claim.as_ref(), found.ino, n);
        Ok(())
    }

    /// Opens what is about to lose a name, if the kernel or a cut may still want it:
    /// the name may be the last one, or the last one known.
    pub(super) fn keep_removed(
        &self,
        parent: Ino,
        name: &[u8],
        found: &Attributes,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let is_file = found.file_type == FileType::RegularFile;
        if is_file && self.is_needed(found.ino) {
            self.table
                .intern(parent, name, found.ino, found.file_type, 0, 0);
            self.keep_for_cuts(found.ino);
        }
        if self.table.get(found.ino).is_none() {
            return Ok(None);
        }
        for usage in [Use::Write, Use::Read, Use::Path] {
            // A descriptor that a program may still write through is worth more than
            // one that would have to be opened again.
            if let Some(held) = self.descriptors.get(found.ino, usage) {
                return Ok(Some(held));
            }
        }
        let directory = self.directory(parent)?;
        let opened =
            self.with_room(|| open_beneath(directory.as_fd(), name, OFlags::PATH, Mode::empty()))?;
        Ok(Some(Arc::new(opened)))
    }

    /// After one of several names is gone: the node's change time moved.
    pub(super) fn record_remaining(
        &self,
        origin: Origin,
        found: &Attributes,
    ) -> Result<Option<u64>> {
        let attributes = self
            .table
            .get(found.ino)
            .filter(|_| self.table.is_linked(found.ino))
            .and_then(|node| self.stat(&node).ok());
        match attributes {
            Some(attributes) => {
                self.record_moved(origin, &attributes)?;
                Ok(Some(self.recorder.last()))
            }
            // Nobody knows it; the next scan sees the time and compares.
            None => Ok(None),
        }
    }

    pub(super) fn child_path(&self, parent: Ino, name: &[u8]) -> Option<crate::tree::RelPath> {
        self.table.path(parent)?.join(name).ok()
    }
}

pub(super) fn trash_failed(error: Errno) -> String {
    format!(
        "cannot move the present version to .mirrorfs/trash: {}",
        std::io::Error::from(error)
    )
}
