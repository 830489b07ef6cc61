//! The door's placing: something staged takes its place in the tree.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mirrorfs_journal::Change;
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::attributes::Attributes;
use super::door::{Claim, StagedName};
use super::lower::{c_name, proc_path, stat_name};
use super::ops_meta::user_xattrs;
use super::ops_remove::trash_failed;
use super::table::{Displaced, STAGING};
use super::{Caller, Filesystem, Result};
use crate::tree::{Ino, Kind, Xattrs};

impl Filesystem {
    /// What lies in the staging directory under a name, once every operation that was
    /// under way has ended.
    pub fn staged(&self, name: &StagedName) -> std::result::Result<Option<Ino>, super::Error> {
        let _namespace = self.namespace.write();
        let staging = self.lower.reserved(b"staging");
        match staging.and_then(|staging| stat_name(staging.as_fd(), name.as_str().as_bytes())) {
            Ok(found) => Ok(Some(found.ino)),
            Err(Errno::NOENT) => Ok(None),
            Err(source) => Err(super::Error::Staging {
                name: name.as_str().to_owned(),
                source: source.into(),
            }),
        }
    }

    /// Moves `staging/token` to a name, if what is there is what the operation
    /// expects. What was there goes to the trash.
    pub(super) fn place(
        &self,
        _caller: &Caller,
        token: &[u8],
        parent: Ino,
        name: &[u8],
    ) -> Result<()> {
        let _namespace = self.namespace.write();
        // The token is the authority: nobody but the door was ever told it.
        let claim = self.door.placing(token).ok_or(Errno::NOENT)?;
        let path = self.child_path(parent, name).ok_or(Errno::STALE)?;
        if path != claim.path {
            self.refuse(&claim, "the directory was moved meanwhile");
            return Err(Errno::STALE);
        }
        let found = self.try_stat_child(parent, name)?;
        self.expect(&claim, found.as_ref())?;
        let staging = self.directory(STAGING)?;
        let staged = stat_name(staging.as_fd(), token)
            .inspect_err(|_| self.refuse(&claim, "the staged content is gone"))?;
        let directory = self.directory(parent)?;
        let (target, xattrs) = describe(staging.as_fd(), token, &staged)?;
        let mut n = 0;
        match found {
            None => {
                rename_new(staging.as_fd(), token, directory.as_fd(), name)
                    .inspect_err(|error| self.refuse_errno(&claim, *error))?;
                self.log_placed(staged.ino);
            }
            Some(found) => {
                if found.kind() == Kind::Directory || staged.kind() == Kind::Directory {
                    self.refuse(
                        &claim,
                        "a directory is neither replaced nor replaces anything",
                    );
                    return Err(Errno::ISDIR);
                }
                n = self.replace(&claim, &staging, token, &directory, (parent, name), &found)?;
                self.log_placed(staged.ino);
            }
        }
        // Whatever the kernel knew of the staged thing is now the thing in the tree.
        self.table.pin(staged.ino);
        self.table
            .intern(parent, name, staged.ino, staged.file_type, 0, 0);
        let mut gone = self
            .table
            .remove_name(STAGING, token, staged.ino, false, None);
        gone.extend(self.table.unpin(staged.ino));
        self.close(gone);
        let attributes = stat_name(directory.as_fd(), name).unwrap_or(staged);
        let created = self.record_created(
            claim.origin,
            parent,
            name,
            &attributes,
            target.as_deref(),
            &xattrs,
        )?;
        self.problems.remove(&path);
        self.claim_done(Some(&claim), staged.ino, created.max(n));
        Ok(())
    }

    fn replace(
        &self,
        claim: &Claim,
        staging: &Arc<OwnedFd>,
        token: &[u8],
        directory: &Arc<OwnedFd>,
        (parent, name): (Ino, &[u8]),
        found: &Attributes,
    ) -> Result<u64> {
        let last = found.nlink <= 1;
        let kept = self.keep_removed(parent, name, found)?;
        let failed = |error: Errno| self.refuse(claim, &trash_failed(error));
        // Whatever needs space comes before the tree changes.
        let slot = self
            .trash_slot(Some(token), claim)
            .inspect_err(|error| failed(*error))?;
        let in_trash = match exchange(staging.as_fd(), token, directory.as_fd(), name) {
            Ok(()) => match slot.take(staging.as_fd(), token, name, found) {
                Ok(in_trash) => in_trash,
                Err(error) => {
                    failed(error);
                    exchange(staging.as_fd(), token, directory.as_fd(), name)?;
                    return Err(error);
                }
            },
            // Some filesystems cannot exchange. Under the lock nobody sees the gap.
            Err(Errno::INVAL | Errno::NOSYS) => {
                let in_trash = slot
                    .take(directory.as_fd(), name, name, found)
                    .inspect_err(|error| failed(*error))?;
                rename_new(staging.as_fd(), token, directory.as_fd(), name)
                    .inspect_err(|error| self.refuse_errno(claim, *error))?;
                in_trash
            }
            Err(error) => {
                self.refuse_errno(claim, error);
                return Err(error);
            }
        };
        if last {
            let displaced = Displaced::new(claim.path.clone(), in_trash);
            self.table.displace(found.ino, displaced);
        }
        let gone = self.table.remove_name(parent, name, found.ino, last, kept);
        self.close(gone);
        let n = self.record(
            claim.origin,
            Change::Unlink {
                parent,
                name: name.to_vec(),
                ino: found.ino,
                last,
            },
        )?;
        if last {
            Ok(n)
        } else {
            Ok(self.record_remaining(claim.origin, found)?.unwrap_or(n))
        }
    }

    fn refuse_errno(&self, claim: &Claim, error: Errno) {
        self.refuse(claim, &std::io::Error::from(error).to_string());
    }
}

/// A link's text, or what `user.` attributes a file or directory carries.
fn describe(
    staging: BorrowedFd<'_>,
    token: &[u8],
    staged: &Attributes,
) -> Result<(Option<Vec<u8>>, Xattrs)> {
    match staged.kind() {
        Kind::Symlink => {
            let target = rustix::fs::readlinkat(staging, c_name(token)?, Vec::new())?;
            Ok((Some(target.into_bytes()), Xattrs::new()))
        }
        Kind::Special => Err(Errno::PERM),
        Kind::File | Kind::Directory => {
            let handle = super::lower::open_beneath(
                staging,
                token,
                rustix::fs::OFlags::PATH,
                rustix::fs::Mode::empty(),
            )?;
            Ok((None, user_xattrs(&proc_path(handle.as_fd()))?))
        }
    }
}

fn exchange(
    staging: BorrowedFd<'_>,
    token: &[u8],
    directory: BorrowedFd<'_>,
    name: &[u8],
) -> Result<()> {
    rustix::fs::renameat_with(
        staging,
        c_name(token)?,
        directory,
        c_name(name)?,
        RenameFlags::EXCHANGE,
    )
}

fn rename_new(
    staging: BorrowedFd<'_>,
    token: &[u8],
    directory: BorrowedFd<'_>,
    name: &[u8],
) -> Result<()> {
    rustix::fs::renameat_with(
        staging,
        c_name(token)?,
        directory,
        c_name(name)?,
        RenameFlags::NOREPLACE,
    )
}
