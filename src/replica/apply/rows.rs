//! Writing down what a batch left in the tree.

use std::collections::{BTreeSet, HashMap, HashSet};

use mirrorfs_journal::index::{Durable, Fingerprint, PeerIndex, Row};

use super::record::{Record, Staged};
use super::run::{Change, Done};
use super::{Answer, Applier, ApplyError, Outcome, SYNCED_SINGLY, Unsynced};
use crate::replica::look::{fingerprint, is_recent};
use crate::replica::{Latest, Moment, Root};
use crate::tree::{Content, Entry, RelPath, Timestamp};
use crate::wire::message::Op;

/// How many rows are taken out of the index at once.
const ROWS: u32 = 1000;

impl Applier<'_> {
    /// Commits rows, agreement and answer. A row is written only where the tree shows
    /// the very inode that the batch placed, as it was placed: anything else is
    /// somebody's change and is to be observed.
    pub(super) fn commit(&mut self, record: Record, done: Done) -> Result<Outcome, ApplyError> {
        let Done {
            changes,
            diverged,
            mut recheck,
            displaced,
        } = done;
        let mut uncertain = Vec::with_capacity(displaced.len());
        for (kept, displaced) in &displaced {
            let row = postcard::to_stdvec(displaced).map_err(ApplyError::Record)?;
            uncertain.push((kept, row));
        }
        let answer = Answer {
            batch: record.batch,
            diverged,
        };
        let bytes = postcard::to_stdvec(&answer).map_err(ApplyError::Record)?;
        let left_out: BTreeSet<u32> = answer.diverged.iter().map(|step| step.op).collect();
        let moved = record.encode_moved(self.reserved.boot())?;
        let recorded = Moment::decode(self.index.moment()?);
        let agreed = (record.mount, record.agreement);
        let moment = Latest::advance(self.reserved, recorded.as_ref(), Some(agreed));
        let root = self.root;
        let unsynced = Unsynced {
            root: root.clone(),
            dirs: dirs_of(&record, &changes),
        };
        // A removal that makes room for something else is not to find nothing.
        let placed: HashSet<RelPath> = changes.iter().filter_map(placed_path).collect();
        let mut rewatch = Vec::new();
        let mut slots: HashMap<u32, Vec<Row>> = HashMap::new();
        self.index
            .transaction(Durable::Process, |index| -> Result<(), ApplyError> {
                for change in changes {
                    let path = change_path(&change)
                        .filter(|path| {
                            !(matches!(change, Change::Gone { .. }) && placed.contains(*path))
                        })
                        .cloned();
                    if !write(index, root, change, &mut slots, &mut rewatch)? {
                        recheck.extend(path);
                    }
                }
                for (kept, row) in &uncertain {
                    index.set_displaced(kept, row)?;
                }
                index.agree(record.mount, &record.agreement, record.batch, &left_out)?;
                index.set_applied(&bytes)?;
                index.set_redo(&moved)?;
                if let Some(moment) = &moment {
                    index.set_moment(Some(&moment.encode()))?;
                }
                Ok(())
            })?;
        Ok(Outcome {
            batch: answer.batch,
            diverged: answer.diverged,
            recheck,
            rewatch,
            displaced,
            unsynced,
        })
    }
}

/// The directories in which names were moved, if they are few and nothing but names.
fn dirs_of(record: &Record, changes: &[Change]) -> Option<Vec<RelPath>> {
    let mut dirs = BTreeSet::new();
    for change in changes {
        match change {
            Change::Placed { path, .. } | Change::Gone { path } => {
                dirs.insert(path.parent().unwrap_or_default());
            }
            _ => return None,
        }
    }
    let kept = |op: &Op| matches!(op, Op::KeepConflict { .. });
    if dirs.len() > SYNCED_SINGLY || record.steps.iter().any(|step| kept(&step.op)) {
        return None;
    }
    // A directory that went with the batch is not there to be synced.
    let gone = |dir: &RelPath| {
        changes
            .iter()
            .any(|change| matches!(change, Change::Gone { path } if dir.starts_with(path)))
    };
    dirs.retain(|dir| !gone(dir));
    Some(dirs.into_iter().collect())
}

fn change_path(change: &Change) -> Option<&RelPath> {
    match change {
        Change::Placed { path, .. } | Change::Meta { path, .. } | Change::Gone { path } => {
            Some(path)
        }
        Change::Parked { from, .. } => Some(from),
        Change::Unparked { to, .. } => Some(to),
        Change::None => None,
    }
}

fn placed_path(change: &Change) -> Option<RelPath> {
    match change {
        Change::Placed { path, .. } | Change::Unparked { to: path, .. } => Some(path.clone()),
        _ => None,
    }
}

/// Writes one change down. False if the tree shows something else.
fn write(
    index: &mut PeerIndex,
    root: &Root,
    change: Change,
    slots: &mut HashMap<u32, Vec<Row>>,
    rewatch: &mut Vec<RelPath>,
) -> Result<bool, ApplyError> {
    match change {
        Change::None => Ok(true),
        Change::Placed {
            path,
            entry,
            staged,
        } => {
            if entry.content == Content::Directory {
                rewatch.push(path.clone());
            }
            let Some(print) = print_of(root, &path) else {
                return Ok(false);
            };
            let ours = print.ino == staged.ino && is_as_placed(&print, &entry, &staged);
            if ours {
                // Only a carried time that is as good as now leaves a doubt.
                let racy = is_recent(print.mtime, Timestamp::now());
                index.put(&path, print, racy, !staged.complete, &entry)?;
            }
            Ok(ours)
        }
        Change::Meta {
            path,
            entry,
            kept,
            complete,
        } => {
            let is_as_set = |print: &Fingerprint| {
                let times = entry.content == Content::Directory || print.mtime == kept.mtime;
                (print.ino, print.mode) == (kept.ino, kept.mode) && times
            };
            let Some(print) = print_of(root, &path).filter(is_as_set) else {
                return Ok(false);
            };
            // Setting the time hides a write that came just before: look again.
            let racy = entry.content != Content::Directory;
            index.put(&path, print, racy, !complete, &entry)?;
            Ok(true)
        }
        Change::Gone { path } => {
            take_below(index, &path)?;
            index.bury(&path)?;
            Ok(matches!(root.stat(&path), Ok(None)))
        }
        Change::Parked { from, slot } => {
            let mut rows = take_below(index, &from)?;
            rows.extend(index.row(&from)?.filter(|row| row.entry.is_some()));
            index.bury(&from)?;
            for row in &mut rows {
                let relative = row.path.rebase(&from, &RelPath::ROOT);
                row.path = relative.unwrap_or_default();
            }
            slots.insert(slot, rows);
            Ok(true)
        }
        Change::Unparked { to, slot } => {
            let rows = slots.remove(&slot).unwrap_or_default();
            let mut known = true;
            for row in rows {
                let Row {
                    path,
                    fingerprint,
                    racy,
                    masked,
                    entry: Some(entry),
                    ..
                } = row
                else {
                    continue;
                };
                let Some(path) = path.rebase(&RelPath::ROOT, &to) else {
                    continue;
                };
                let mut print = fingerprint;
                if path == to {
                    // Being renamed changed its change time.
                    let found = print_of(root, &to);
                    let same = found.filter(|found| {
                        print.ctime = found.ctime;
                        *found == print || entry.content == Content::Directory
                    });
                    match same {
                        Some(found) => print = found,
                        None => known = false,
                    }
                }
                index.put(&path, print, racy, masked, &entry)?;
            }
            rewatch.push(to);
            Ok(known)
        }
    }
}

/// Takes the rows below a path out of the index.
fn take_below(index: &mut PeerIndex, path: &RelPath) -> Result<Vec<Row>, ApplyError> {
    let mut taken = Vec::new();
    loop {
        let rows = index.below(path, None, ROWS)?;
        if rows.is_empty() {
            return Ok(taken);
        }
        for row in rows {
            index.bury(&row.path)?;
            taken.push(row);
        }
    }
}

fn print_of(root: &Root, path: &RelPath) -> Option<Fingerprint> {
    root.stat(path)
        .ok()
        .flatten()
        .map(|stat| fingerprint(&stat))
}

/// A directory's size and times change with its names, and one that could not be filled
/// with its own mode has got that since; anything else must be untouched.
fn is_as_placed(print: &Fingerprint, entry: &Entry, staged: &Staged) -> bool {
    if entry.content == Content::Directory {
        return print.mode == staged.mode || entry.mode & 0o700 != 0o700;
    }
    (print.size, print.mtime, print.mode) == (staged.size, staged.mtime, staged.mode)
}
