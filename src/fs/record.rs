//! Reporting changes to the journal, and remembering which node changed when.

use std::sync::atomic::Ordering;

use mirrorfs_journal::{Change, Origin};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::table::Node;
use super::{Filesystem, Result};
use crate::tree::{Ino, Kind};

impl Filesystem {
    /// Refuses changes once the journal does.
    pub(super) fn writable(&self) -> Result<()> {
        if self.poisoned.get().is_some() {
            return Err(Errno::ROFS);
        }
        Ok(())
    }

    /// Why nothing can be changed any more, if that is so.
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.get().map(String::as_str)
    }

    /// Records a change. To be called under the lock under which it took effect.
    pub(super) fn record(&self, origin: Origin, change: Change) -> Result<u64> {
        self.recorder.record(origin, change).map_err(|poisoned| {
            // What just took effect in lower is found by the scan of the next start.
            self.poison(&poisoned.to_string());
            Errno::ROFS
        })
    }

    pub(super) fn poison(&self, reason: &str) {
        if self.poisoned.set(reason.to_owned()).is_ok() {
            tracing::error!("the mount is read-only from now on: {reason}");
        }
    }

    /// Records a change of a node's content or attributes, unless it has no name in
    /// the tree any more.
    pub(super) fn record_node(
        &self,
        origin: Origin,
        node: &Node,
        change: impl FnOnce() -> Change,
    ) -> Result<u64> {
        if !self.table.is_linked(node.ino) {
            if let Some(displaced) = self.table.displaced(node.ino) {
                self.problems.add(
                    displaced.path.clone(),
                    format!(
                        "a program went on writing to the version that a peer's change replaced; what it wrote is in {}",
                        displaced.trash
                    ),
                );
            }
            return Ok(self.recorder.last());
        }
        let n = self.record(origin, change())?;
        self.note_changed(node.ino, n);
        Ok(n)
    }

    pub(super) fn note_changed(&self, ino: Ino, n: u64) {
        self.changed.lock().insert(ino, n);
    }

    /// The number of the node's last change of content or attributes, as far as it is
    /// still remembered.
    pub(super) fn last_change(&self, ino: Ino) -> u64 {
        self.changed.lock().get(&ino).copied().unwrap_or(0)
    }

    /// Forgets changes up to a number. No expectation older than it may come any
    /// more.
    pub fn prune_changes(&self, up_to: u64) {
        let mut changed = self.changed.lock();
        changed.retain(|_, n| *n > up_to);
        if changed.capacity() > 4 * changed.len() + 1024 {
            changed.shrink_to_fit();
        }
    }

    /// A file's change time moves when a name of it does; the recorded tree has to
    /// know it, or the next scan takes the file for a changed one.
    pub(super) fn record_moved(&self, origin: Origin, attributes: &Attributes) -> Result<()> {
        if attributes.kind() == Kind::File {
            self.record(
                origin,
                Change::Attr {
                    ino: attributes.ino,
                    attr: attributes.recorded(),
                },
            )?;
        }
        Ok(())
    }

    pub(super) fn note_names_changed(&self) {
        self.names_changed.fetch_add(1, Ordering::AcqRel);
    }
}
