//! Late writes: a program goes on writing to a file that a peer's change has replaced or
//! removed. What it writes is an edit of this side that nobody has seen, and the trash is no
//! place for it: with the first write the file leaves the trash for `.mirrorfs/late`, and
//! whoever listens brings it back into the tree from there. So it is where it belongs also
//! if the daemon dies with the next instruction.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::door::StagedName;
use super::lower::{open_beneath, stat_open};
use super::table::{Displaced, STAGING};
use super::trash::enter;
use super::{Filesystem, Result};
use crate::replica::beneath::Place;
use crate::replica::keep::Shelf;
use crate::replica::late::LATE;
use crate::tree::{Ino, RESERVED, RelPath, reach};

/// Told that something has come late.
pub type LateHook = Box<dyn Fn() + Send + Sync>;

impl Filesystem {
    /// Sets what is called when something has come late, with locks held. It must not wait.
    pub fn on_late(&self, hook: Option<LateHook>) {
        *self.late.write() = hook;
    }

    /// Whether a node that is not in the tree any more is one that a program may still write
    /// to.
    pub fn is_displaced(&self, ino: Ino) -> bool {
        self.table.displaced(ino).is_some()
    }

    /// What is known of a late version that was to be placed, and was not: it is displaced
    /// as before.
    pub fn not_placed(&self, staged: &StagedName, ino: Ino, path: &RelPath) -> Result<()> {
        let _namespace = self.namespace.write();
        if self.table.get(ino).is_none() {
            return Ok(());
        }
        let staging = self.lower.reserved(b"staging")?;
        let name = staged.as_str().as_bytes();
        let kept = open_beneath(staging.as_fd(), name, OFlags::PATH, Mode::empty())?;
        if stat_open(kept.as_fd())?.ino != ino {
            return Ok(());
        }
        let gone = self
            .table
            .remove_name(STAGING, name, ino, true, Some(Arc::new(kept)));
        self.close(gone);
        let displaced = Displaced::new(path.clone(), path.clone());
        displaced.late.store(true, Ordering::Release);
        self.table.displace(ino, displaced);
        Ok(())
    }

    /// A displaced node was written to. To be called with its lock held.
    pub(super) fn came_late(&self, displaced: &Displaced) {
        if displaced.late.swap(true, Ordering::AcqRel) {
            return;
        }
        let path = &displaced.path;
        match self.take_from_trash(displaced) {
            Ok(()) => {
                tracing::info!(%path, "written to after a peer's change had replaced it");
                if let Some(hook) = &*self.late.read() {
                    hook();
                }
            }
            Err(error) => {
                // With the next write it is tried again.
                displaced.late.store(false, Ordering::Release);
                let text = format!(
                    "a program went on writing to the version that a peer's change replaced; what it wrote is in .mirrorfs/trash/{} and cannot be brought back: {}",
                    displaced.kept,
                    std::io::Error::from(error)
                );
                self.problems.add(path.clone(), text);
            }
        }
    }

    fn take_from_trash(&self, displaced: &Displaced) -> Result<()> {
        let trash = self.lower.reserved(b"trash")?;
        let kept = &displaced.kept;
        let parent = kept.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let from = reach::open_beneath(trash.as_fd(), &parent, flags)?;
        let reserved = open_beneath(self.lower.root().as_fd(), RESERVED, flags, Mode::empty())?;
        let late = enter(reserved.as_fd(), LATE.as_bytes())?;
        let slot = kept.components().next().unwrap_or_default();
        let slot = String::from_utf8_lossy(slot).into_owned();
        let shelved = Shelf::new(late.as_fd(), slot).keep(
            Place {
                dir: from.as_fd(),
                name: kept.name(),
            },
            &displaced.path,
        );
        shelved
            .map(drop)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}
