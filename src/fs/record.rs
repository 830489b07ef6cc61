//! Reporting changes to the journal, and remembering which node changed when.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use mirrorfs_journal::{Change, Origin};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::table::Node;
use super::{Filesystem, Result};
use crate::tree::{Ino, Kind};

/// When each node changed last, as far as anybody has to know.
#[derive(Debug)]
pub(super) struct Changed {
    by_node: HashMap<Ino, u64>,
    /// Nodes that are not there changed at this number or before.
    floor: u64,
    /// With so many the older ones are forgotten.
    limit: usize,
}

impl Changed {
    /// Fewer are not worth forgetting.
    const FEW: usize = 65_536;

    fn prune(&mut self, up_to: u64) {
        self.by_node.retain(|_, n| *n > up_to);
        self.floor = self.floor.max(up_to);
        self.limit = Self::FEW.max(2 * self.by_node.len());
        self.by_node.shrink_to(self.limit);
    }
}

impl Default for Changed {
    fn default() -> Self {
        Self {
            by_node: HashMap::new(),
            floor: 0,
            limit: Self::FEW,
        }
    }
}

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
            if let Some(displaced) = self.table.displaced(node.ino)
                && matches!(change(), Change::Write { .. } | Change::Truncate { .. })
            {
                self.came_late(&displaced);
            }
            return Ok(self.recorder.last());
        }
        let n = self.record(origin, change())?;
        self.note_changed(node.ino, n);
        Ok(n)
    }

    /// Remembers the number of a node's change. To be called under the lock under which it
    /// took effect, so that no cut is taken meanwhile.
    pub(super) fn note_changed(&self, ino: Ino, n: u64) {
        let full = {
            let mut changed = self.changed.lock();
            changed.by_node.insert(ino, n);
            changed.by_node.len() >= changed.limit
        };
        if full {
            // A decision is older than a change only if the cut is that it was made at.
            let oldest = self.oldest_cut().unwrap_or_else(|| self.recorder.last());
            self.changed.lock().prune(oldest);
        }
    }

    /// The number of the node's last change of content or attributes. Of a change that
    /// every decision knows, which may be forgotten, a number that is not less.
    pub(super) fn last_change(&self, ino: Ino) -> u64 {
        let changed = self.changed.lock();
        changed.by_node.get(&ino).copied().unwrap_or(changed.floor)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::tests::Fixture;

    /// What a peer that is away for months would make the daemon remember.
    #[test]
    fn only_changes_since_the_oldest_cut_are_remembered() {
        let t = Fixture::new();
        let known = || t.fs.changed.lock().by_node.len();
        let change = |range: std::ops::Range<u64>| {
            for n in range {
                t.fs.note_changed(Ino(1_000 + n), n);
            }
        };
        let file = t.create(t.root(), "f", b"");
        let before = t.fs.last_change(file);
        let cut = t.fs.open_cut().unwrap();
        let at = cut.mark().n;
        change(at + 1..at + 200_000);
        assert_eq!(t.fs.last_change(Ino(1_000 + at + 1)), at + 1);
        assert_eq!(t.fs.last_change(Ino(1_000 + at + 70_000)), at + 70_000);
        // Of the older ones nothing is told that a decision at the cut could not know.
        assert!((before..=at).contains(&t.fs.last_change(file)));
        drop(cut);
        for _ in 0..100 {
            // The numbers are the recorder's, which has issued none meanwhile.
            t.fs.changed.lock().prune(at + 200_000);
            change(at + 200_000..at + 200_100);
        }
        assert!(known() <= 100, "{}", known());
        // By itself, as soon as there are many.
        for name in 0..70_000 {
            t.fs.note_changed(Ino(5_000_000 + name), 1);
        }
        assert!(known() < Changed::FEW, "{}", known());
    }
}
