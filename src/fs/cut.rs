//! Cuts: the tree as it was at one moment, while work on it goes on.
//!
//! Taking one costs a marker in the journal. From then on whatever is about to be
//! overwritten is saved first, once, and a removed file stays open.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mirrorfs_journal::Mark;
use parking_lot::Mutex;
use rustix::fs::FileType;
use rustix::io::Errno;

use super::descriptors::Use;
use super::lower::stat_open;
use super::ops_data::read_full;
use super::spool::{SavedFile, Spool};
use super::table::Node;
use super::{Error, Filesystem, Result};
use crate::tree::{Ino, RelPath};

#[derive(Debug)]
struct Renamed {
    from: RelPath,
    to: RelPath,
    exchanged: bool,
}

#[derive(Debug, Default)]
struct Kept {
    /// Only these are wanted; none: everything that existed.
    needs: Option<HashSet<Ino>>,
    done: HashSet<Ino>,
    /// Made after the cut: a number that was taken over is not the node of the cut.
    born: HashSet<Ino>,
    saved: HashMap<Ino, SavedFile>,
    /// Removed since, and pinned in the node table.
    removed: HashSet<Ino>,
    renames: Vec<Renamed>,
    spool: Spool,
}

impl Kept {
    fn wants(&self, ino: Ino) -> bool {
        !self.done.contains(&ino)
            && !self.born.contains(&ino)
            && self.needs.as_ref().is_none_or(|needs| needs.contains(&ino))
    }
}

/// One open cut, as the operations see it.
#[derive(Debug)]
pub(super) struct CutState {
    mark: Mark,
    abandoned: AtomicBool,
    kept: Mutex<Kept>,
}

/// The tree as it was at one moment. Dropping it ends the saving.
#[derive(Debug)]
pub struct Cut {
    filesystem: Arc<Filesystem>,
    state: Arc<CutState>,
}

/// A file as it was at a cut.
#[derive(Debug)]
pub struct CutFile {
    filesystem: Arc<Filesystem>,
    state: Arc<CutState>,
    node: Arc<Node>,
    lower: Arc<OwnedFd>,
}

impl Filesystem {
    /// Takes a cut. No operation is in flight at its moment.
    pub fn open_cut(self: &Arc<Self>) -> std::result::Result<Cut, Error> {
        let _namespace = self.namespace.write();
        let mark = self.recorder.mark()?;
        let state = Arc::new(CutState {
            mark,
            abandoned: AtomicBool::new(false),
            kept: Mutex::new(Kept::default()),
        });
        self.cuts.lock().push(state.clone());
        self.open_cuts.fetch_add(1, Ordering::AcqRel);
        Ok(Cut {
            filesystem: self.clone(),
            state,
        })
    }

    /// Where the oldest cut is that anybody still has.
    pub(super) fn oldest_cut(&self) -> Option<u64> {
        let cuts = self.cuts.lock();
        cuts.iter().map(|cut| cut.mark.n).min()
    }

    fn each_cut(&self, mut each: impl FnMut(&CutState)) {
        if self.open_cuts.load(Ordering::Acquire) == 0 {
            return;
        }
        let cuts = self.cuts.lock().clone();
        for cut in cuts {
            if !cut.abandoned.load(Ordering::Acquire) {
                each(&cut);
            }
        }
    }

    /// Saves, for every open cut, what a change of content is about to overwrite. To
    /// be called with the node's lock held. `range` is told the present size.
    /// A cut that cannot save is abandoned; the change is never held up.
    pub(super) fn preserve(&self, ino: Ino, file: &OwnedFd, range: impl Fn(u64) -> Range<u64>) {
        self.each_cut(|cut| {
            let mut kept = cut.kept.lock();
            // Abandoned again under the lock: from then on nobody gives pins back.
            if cut.abandoned.load(Ordering::Acquire) || !kept.wants(ino) {
                return;
            }
            let kept = &mut *kept;
            let saved = self.save(kept, ino, file, &range);
            if let Err(error) = saved {
                tracing::debug!(ino = ino.0, %error, "a cut is abandoned");
                abandon(self, cut, kept);
            }
        });
    }

    fn save(
        &self,
        kept: &mut Kept,
        ino: Ino,
        file: &OwnedFd,
        range: &impl Fn(u64) -> Range<u64>,
    ) -> Result<()> {
        let size = stat_open(file.as_fd())?.size;
        let saved = kept
            .saved
            .entry(ino)
            .or_insert_with(|| SavedFile::new(size));
        let range = range(size);
        let range = range.start..range.end.min(saved.size);
        if range.start >= range.end {
            return Ok(());
        }
        kept.spool
            .save(saved, file, range, self.options.spool_limit, || {
                self.lower.reserved(b"staging")
            })
    }

    /// Tells the cuts of a node that did not exist when they were taken.
    pub(super) fn born(&self, ino: Ino) {
        self.each_cut(|cut| {
            let mut kept = cut.kept.lock();
            // One that was removed and is kept cannot have lost its number.
            if !kept.removed.contains(&ino) {
                kept.born.insert(ino);
            }
        });
    }

    pub(super) fn log_placed(&self, ino: Ino) {
        self.born(ino);
    }

    /// Whether a cut wants a file that is about to be removed.
    pub(super) fn is_needed(&self, ino: Ino) -> bool {
        let mut needed = false;
        self.each_cut(|cut| needed |= cut.kept.lock().wants(ino));
        needed
    }

    /// Pins a file that is about to be removed for the cuts that want it. The node is
    /// in the table.
    pub(super) fn keep_for_cuts(&self, ino: Ino) {
        self.each_cut(|cut| {
            let mut kept = cut.kept.lock();
            if cut.abandoned.load(Ordering::Acquire)
                || !kept.wants(ino)
                || kept.removed.contains(&ino)
            {
                return;
            }
            if kept.removed.len() >= self.options.kept_limit {
                abandon(self, cut, &mut kept);
            } else if self.table.pin(ino) {
                kept.removed.insert(ino);
            }
        });
    }

    /// Tells the cuts of a rename, before the node table follows it.
    pub(super) fn log_rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        exchanged: bool,
    ) {
        if self.open_cuts.load(Ordering::Acquire) == 0 {
            return;
        }
        let (Some(from), Some(to)) = (
            self.child_path(parent, name),
            self.child_path(new_parent, new_name),
        ) else {
            return;
        };
        self.each_cut(|cut| {
            cut.kept.lock().renames.push(Renamed {
                from: from.clone(),
                to: to.clone(),
                exchanged,
            });
        });
    }
}

/// Gives up a cut: everything it kept is released, reads from it fail.
fn abandon(filesystem: &Filesystem, cut: &CutState, kept: &mut Kept) {
    cut.abandoned.store(true, Ordering::Release);
    let removed = std::mem::take(kept).removed;
    for ino in removed {
        let gone = filesystem.table.unpin(ino);
        filesystem.close(gone);
    }
}

impl Cut {
    /// The cut's place in the journal.
    pub fn mark(&self) -> Mark {
        self.state.mark.clone()
    }

    /// Whether it could not keep up: it has to be taken again.
    pub fn abandoned(&self) -> bool {
        self.state.abandoned.load(Ordering::Acquire)
    }

    /// Narrows down what is to be preserved from now on.
    pub fn needs(&self, needs: HashSet<Ino>) {
        let mut kept = self.state.kept.lock();
        let kept = &mut *kept;
        kept.needs = Some(needs);
        let unwanted: Vec<Ino> = kept
            .saved
            .keys()
            .chain(&kept.removed)
            .filter(|ino| !kept.wants(**ino))
            .copied()
            .collect();
        for ino in unwanted {
            self.release(kept, ino);
        }
    }

    /// A file is not wanted any more.
    pub fn done(&self, ino: Ino) {
        let mut kept = self.state.kept.lock();
        kept.done.insert(ino);
        self.release(&mut kept, ino);
    }

    fn release(&self, kept: &mut Kept, ino: Ino) {
        if let Some(saved) = kept.saved.remove(&ino) {
            kept.spool.release(&saved);
        }
        if kept.removed.remove(&ino) {
            let gone = self.filesystem.table.unpin(ino);
            self.filesystem.close(gone);
        }
    }

    /// Opens a file by the number and the path that it has in the cut's snapshot.
    pub fn open(&self, ino: Ino, path: &RelPath) -> io::Result<CutFile> {
        let filesystem = &self.filesystem;
        let _namespace = filesystem.namespace.read();
        if self.abandoned() {
            return Err(Errno::CANCELED.into());
        }
        let removed = self.state.kept.lock().removed.contains(&ino);
        let node = if (removed || filesystem.table.is_linked(ino)) && filesystem.table.pin(ino) {
            filesystem.node(ino)?
        } else {
            let node = filesystem.pin_path(&self.present_path(path))?;
            if node.ino != ino {
                filesystem.close(filesystem.table.unpin(node.ino));
                return Err(Errno::STALE.into());
            }
            node
        };
        let lower = if node.file_type == FileType::RegularFile {
            let _content = node.content.lock();
            filesystem.file(&node, Use::Read)
        } else {
            Err(Errno::INVAL)
        };
        match lower {
            Ok(lower) => Ok(CutFile {
                filesystem: filesystem.clone(),
                state: self.state.clone(),
                node,
                lower,
            }),
            Err(error) => {
                filesystem.close(filesystem.table.unpin(node.ino));
                Err(error.into())
            }
        }
    }

    /// Where what the snapshot has at a path is by now.
    fn present_path(&self, path: &RelPath) -> RelPath {
        let mut present = path.clone();
        for renamed in &self.state.kept.lock().renames {
            if let Some(moved) = present.rebase(&renamed.from, &renamed.to) {
                present = moved;
            } else if renamed.exchanged
                && let Some(moved) = present.rebase(&renamed.to, &renamed.from)
            {
                present = moved;
            }
        }
        present
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.filesystem
            .cuts
            .lock()
            .retain(|cut| !Arc::ptr_eq(cut, &self.state));
        self.filesystem.open_cuts.fetch_sub(1, Ordering::AcqRel);
        abandon(&self.filesystem, &self.state, &mut self.state.kept.lock());
    }
}

impl CutFile {
    /// Reads as `pread` would have at the moment of the cut.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // No change of content is under way while this is held.
        let _content = self.node.content.lock();
        let kept = self.state.kept.lock();
        if self.state.abandoned.load(Ordering::Acquire) {
            return Err(Errno::CANCELED.into());
        }
        Ok(match kept.saved.get(&self.node.ino) {
            Some(saved) => kept.spool.read(saved, &self.lower, offset, buffer)?,
            None => {
                drop(kept);
                read_full(&self.lower, offset, buffer)?
            }
        })
    }
}

impl Drop for CutFile {
    fn drop(&mut self) {
        let gone = self.filesystem.table.unpin(self.node.ino);
        self.filesystem.close(gone);
    }
}
