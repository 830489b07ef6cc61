//! Renaming and exchanging names.

use std::os::fd::AsFd;

use mirrorfs_journal::{Change, Origin};
use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::door::{is_reserved, placed_token};
use super::lower::{c_name, stat_name};
use super::{Caller, Filesystem, Result};
use crate::tree::Ino;

impl Filesystem {
    /// Renames. From the name of something staged it is the door's placing.
    pub fn rename(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        self.writable()?;
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        if parent == self.root() && is_reserved(name) {
            let token = placed_token(name).ok_or(Errno::NOENT)?;
            self.allowed(new_parent, new_name)?;
            return self.place(caller, token, new_parent, new_name);
        }
        let _namespace = self.namespace.write();
        self.allowed(new_parent, new_name)?;
        let found = self.stat_child(parent, name)?;
        let target = self.try_stat_child(new_parent, new_name)?;
        if flags.contains(RenameFlags::EXCHANGE) {
            let other = target.ok_or(Errno::NOENT)?;
            return self.exchange((parent, name, &found), (new_parent, new_name, &other));
        }
        let from = self.directory(parent)?;
        let to = self.directory(new_parent)?;
        let kept = match &target {
            Some(target) if !flags.contains(RenameFlags::NOREPLACE) && target.ino != found.ino => {
                self.keep_removed(new_parent, new_name, target)?
            }
            _ => None,
        };
        let (c_name_from, c_name_to) = (c_name(name)?, c_name(new_name)?);
        if flags.is_empty() {
            rustix::fs::renameat(&from, &c_name_from, &to, &c_name_to)?;
        } else {
            rustix::fs::renameat_with(&from, &c_name_from, &to, &c_name_to, flags)?;
        }
        if target.is_some_and(|target| target.ino == found.ino) {
            // Two names of one node: POSIX has nothing happen.
            return Ok(());
        }
        self.log_rename(parent, name, new_parent, new_name, false);
        let mut replaced = None;
        if let Some(target) = &target {
            let last = target.nlink <= 1 || target.file_type == FileType::Directory;
            let gone = self
                .table
                .remove_name(new_parent, new_name, target.ino, last, kept);
            self.close(gone);
            replaced = Some((target.ino, last));
        }
        self.moved(parent, name, new_parent, new_name, &found);
        self.note_names_changed();
        self.record(
            Origin::Local,
            Change::Rename {
                parent,
                name: name.to_vec(),
                new_parent,
                new_name: new_name.to_vec(),
                ino: found.ino,
                replaced,
            },
        )?;
        self.record_moved(
            Origin::Local,
            &stat_name(to.as_fd(), new_name).unwrap_or(found),
        )?;
        if let (Some(target), Some((_, false))) = (&target, replaced) {
            self.record_remaining(Origin::Local, target)?;
        }
        Ok(())
    }

    fn exchange(
        &self,
        (parent, name, found): (Ino, &[u8], &Attributes),
        (new_parent, new_name, other): (Ino, &[u8], &Attributes),
    ) -> Result<()> {
        let from = self.directory(parent)?;
        let to = self.directory(new_parent)?;
        rustix::fs::renameat_with(
            &from,
            c_name(name)?,
            &to,
            c_name(new_name)?,
            RenameFlags::EXCHANGE,
        )?;
        if found.ino == other.ino {
            return Ok(());
        }
        self.log_rename(parent, name, new_parent, new_name, true);
        self.moved(parent, name, new_parent, new_name, found);
        self.moved(new_parent, new_name, parent, name, other);
        self.note_names_changed();
        self.record(
            Origin::Local,
            Change::Exchange {
                parent,
                name: name.to_vec(),
                ino: found.ino,
                new_parent,
                new_name: new_name.to_vec(),
                other: other.ino,
            },
        )?;
        self.record_moved(
            Origin::Local,
            &stat_name(to.as_fd(), new_name).unwrap_or(*found),
        )?;
        self.record_moved(
            Origin::Local,
            &stat_name(from.as_fd(), name).unwrap_or(*other),
        )
    }

    /// Follows a rename in the node table. The new name comes first, so that the
    /// directory it leaves cannot take its own last reference along.
    fn moved(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        found: &Attributes,
    ) {
        if self.table.pin(found.ino) {
            self.table
                .intern(new_parent, new_name, found.ino, found.file_type, 0, 0);
            let mut gone = self.table.remove_name(parent, name, found.ino, false, None);
            gone.extend(self.table.unpin(found.ino));
            self.close(gone);
        }
    }
}
