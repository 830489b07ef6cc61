//! The door's operations where nothing is mounted: the same handlers, called by this
//! process itself.

use mirrorfs_journal::Origin;
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::attributes::Attributes;
use super::door::{DoorOp, DoorResult};
use super::ops_meta::{Changes, SetTime};
use super::{Caller, Filesystem, Result};
use crate::tree::{Attr, Ino, RelPath};

/// Stands for the door's thread id where there is no door. The kernel gives no thread
/// a number this high.
const DIRECT: u32 = u32::MAX;

impl Filesystem {
    /// Carries an operation out without a mount. Only for a tree that is not mounted:
    /// what the kernel has cached of a mount is not told.
    pub fn carry_out(&self, op: DoorOp, origin: Origin) -> DoorResult {
        self.door.be(DIRECT);
        let caller = Caller {
            pid: DIRECT,
            ..Caller::own()
        };
        let ticket = self.register(op.clone(), origin);
        match self.call(&caller, &op) {
            Ok(()) => self.settle(&ticket),
            Err(error) => ticket.result().unwrap_or_else(|| DoorResult::Refused {
                reason: std::io::Error::from(error).to_string(),
            }),
        }
    }

    /// What lower has at a path at this moment, as the journal would record it. Where
    /// nothing is mounted, anybody may have changed it since it was recorded.
    pub fn attributes_at(&self, path: &RelPath) -> Option<Attr> {
        let found = self.at(&Caller::own(), path, |ino| self.getattr(ino));
        found.ok().map(|attributes| attributes.recorded())
    }

    /// What lower has at a path at this moment.
    pub fn found_at(&self, path: &RelPath) -> Option<Attributes> {
        self.at(&Caller::own(), path, |ino| self.getattr(ino)).ok()
    }

    /// Records what is at a path once more, so that everybody who follows the journal looks
    /// at it.
    pub fn record_again(&self, path: &RelPath) -> Result<()> {
        self.at(&Caller::own(), path, |ino| self.record_attributes(ino))
    }

    fn call(&self, caller: &Caller, op: &DoorOp) -> Result<()> {
        let path = op.path();
        let parent = path.parent().ok_or(Errno::INVAL)?;
        let (root, name) = (self.root(), path.name());
        match op {
            DoorOp::Place { staged, .. } => {
                let door_name = staged.door_name();
                let found = self
                    .lookup(caller, root, door_name.as_bytes())?
                    .attributes
                    .ino;
                let placed = self.at(caller, &parent, |parent| {
                    let flags = RenameFlags::empty();
                    self.rename(caller, root, door_name.as_bytes(), parent, name, flags)
                });
                self.forget(found, 1);
                placed
            }
            DoorOp::Remove { .. } => {
                self.at(caller, &parent, |parent| self.unlink(caller, parent, name))
            }
            DoorOp::RemoveDir { .. } => {
                self.at(caller, &parent, |parent| self.rmdir(caller, parent, name))
            }
            DoorOp::SetMeta {
                mode,
                mtime,
                xattrs,
                ..
            } => self.at(caller, path, |ino| {
                if let Some(xattrs) = xattrs {
                    let known = self.listxattr(caller, ino)?;
                    let stale = known
                        .split(|byte| *byte == 0)
                        .filter(|name| name.starts_with(b"user.") && !xattrs.contains_key(*name));
                    for name in stale {
                        self.removexattr(caller, ino, name)?;
                    }
                    for (name, value) in xattrs {
                        let flags = rustix::fs::XattrFlags::empty();
                        self.setxattr(caller, ino, name, value, flags, None)?;
                    }
                }
                let changes = Changes {
                    mode: *mode,
                    mtime: mtime.map(SetTime::To),
                    ..Changes::default()
                };
                if mode.is_some() || mtime.is_some() {
                    self.setattr(caller, ino, &changes)?;
                }
                Ok(())
            }),
        }
    }

    /// Does something with the node at a path, known for as long as that takes.
    fn at<T>(
        &self,
        caller: &Caller,
        path: &RelPath,
        work: impl FnOnce(Ino) -> Result<T>,
    ) -> Result<T> {
        let mut known = Vec::new();
        let mut at = Ok(self.root());
        for name in path.components() {
            at = at.and_then(|parent| Ok(self.lookup(caller, parent, name)?.attributes.ino));
            match &at {
                Ok(ino) => known.push(*ino),
                Err(_) => break,
            }
        }
        let result = at.and_then(work);
        for ino in known {
            self.forget(ino, 1);
        }
        result
    }
}
