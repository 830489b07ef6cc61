//! The steps of a batch, one rename each: their order, what depends on what, and moves.

mod files;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use mirrorfs_journal::index::Fingerprint;
use rustix::fs::OFlags;

use super::prepare::path_of;
use super::record::{Record, Staged, Step};
use super::{Applier, ApplyError};
use crate::replica::beneath::{Place, Root, is_no_directory, rename_new};
use crate::replica::keep::{Shelf, on_shelf, slot_name};
use crate::replica::late::Displaced;
use crate::replica::look::{Writers, is_open_for_writing, writers};
use crate::replica::{Context, meta};
use crate::tree::git::MARKS;
use crate::tree::{Content, Entry, RelPath, reach, scan};
use crate::wire::message::{Divergence, Expect, Op};

/// What the steps of a batch did to the names of the tree, in order.
pub(super) enum Change {
    /// Nothing.
    None,
    /// An inode from staging is there now.
    Placed {
        path: RelPath,
        entry: Entry,
        staged: Staged,
    },
    /// Mode, time and attributes were set, and the filesystem kept this of them.
    Meta {
        path: RelPath,
        entry: Entry,
        kept: Fingerprint,
        complete: bool,
    },
    /// Nothing is there any more.
    Gone { path: RelPath },
    /// It is in a slot now.
    Parked { from: RelPath, slot: u32 },
    /// It came out of a slot.
    Unparked { to: RelPath, slot: u32 },
}

/// Why a step ended early.
pub(super) enum Stop {
    Diverged(String),
    #[cfg(test)]
    Cut,
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Diverged(error.to_string())
    }
}

impl From<rustix::io::Errno> for Stop {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

fn diverged<T>(reason: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Diverged(reason.into()))
}

/// What running the steps came to.
#[derive(Default)]
pub(super) struct Done {
    pub(super) changes: Vec<Change>,
    pub(super) diverged: Vec<Divergence>,
    /// Where something is that was not foreseen.
    pub(super) recheck: Vec<RelPath>,
    /// What went to the trash and may be written to there, by where it lies.
    pub(super) displaced: Vec<(RelPath, Displaced)>,
}

/// A batch on its way through the steps.
struct Run<'a, 'b> {
    applier: &'a mut Applier<'b>,
    record: &'a Record,
    resumed: bool,
    /// What is in a slot: where it was, and under which name it waits.
    slots: HashMap<u32, (RelPath, String)>,
    /// Below these nothing further is done.
    blocked: Vec<RelPath>,
    /// Directories that were made writable for the time being, with their own mode.
    opened: Vec<(RelPath, u32)>,
    /// Inodes that the batch puts into place.
    ours: HashSet<u64>,
    /// What went to the trash and may be written to there, by where it lies.
    displaced: Vec<(RelPath, Displaced)>,
}

impl Applier<'_> {
    pub(super) fn run(&mut self, record: &Record, resumed: bool) -> Result<Done, ApplyError> {
        Run {
            applier: self,
            record,
            resumed,
            slots: HashMap::new(),
            blocked: Vec::new(),
            opened: Vec::new(),
            ours: record.steps.iter().filter_map(moved_ino).collect(),
            displaced: Vec::new(),
        }
        .all()
    }

    /// To be called before each rename, for tests to interfere there.
    #[cfg_attr(not(test), allow(clippy::unnecessary_wraps, clippy::unused_self))]
    fn point(&mut self) -> Result<(), Stop> {
        #[cfg(test)]
        if self.hook.as_mut().is_some_and(|hook| hook()) {
            return Err(Stop::Cut);
        }
        Ok(())
    }
}

impl Run<'_, '_> {
    fn all(mut self) -> Result<Done, ApplyError> {
        let mut done = Done::default();
        for (at, step) in self.record.steps.iter().enumerate() {
            let path = path_of(&step.op);
            let outcome = match (
                &step.refused,
                self.blocked.iter().find(|b| path.starts_with(b)),
            ) {
                (Some(reason), _) => diverged(reason.clone()),
                // A version that is kept aside depends on nothing in the tree.
                (None, Some(b)) if !matches!(step.op, Op::KeepConflict { .. }) => {
                    diverged(format!("an earlier step at {b} was not carried out"))
                }
                _ => self.step(at, step),
            };
            match outcome {
                Ok(Change::None) => {}
                Ok(change) => done.changes.push(change),
                Err(Stop::Diverged(reason)) => {
                    self.blocked.push(unit_of(self.applier.root, path));
                    done.recheck.push(path.clone());
                    if let Op::Unpark { slot, .. } = &step.op
                        && let Some(from) = self.put_back(*slot, &mut done)?
                    {
                        done.recheck.push(from);
                    }
                    done.diverged.push(Divergence {
                        op: u32::try_from(at).unwrap_or(u32::MAX),
                        reason: format!("{path}: {reason}"),
                    });
                }
                #[cfg(test)]
                Err(Stop::Cut) => return Err(ApplyError::Cut),
            }
        }
        let left: Vec<u32> = self.slots.keys().copied().collect();
        for slot in left {
            let from = self.put_back(slot, &mut done)?;
            done.recheck.extend(from);
        }
        self.final_modes(&mut done);
        if self.resumed {
            self.find_displaced()?;
        }
        done.displaced = std::mem::take(&mut self.displaced);
        for step in &self.record.steps {
            // What could not be placed. What was placed is not there under this name.
            if let Some(staged) = &step.staged {
                let _ = self.applier.staging.discard(&staged.name);
            }
        }
        Ok(done)
    }

    fn step(&mut self, at: usize, step: &Step) -> Result<Change, Stop> {
        match (&step.op, &step.staged) {
            (Op::Park { from, slot, expect }, _) => self.park(at, from, *slot, expect, step.before),
            (Op::Unpark { slot, to }, _) => self.unpark(*slot, to, step),
            (Op::MakeDir { path, entry }, Some(staged)) => self.create(path, entry, staged),
            (
                Op::Put {
                    path,
                    entry,
                    expect,
                },
                Some(staged),
            ) => match expect {
                Expect::Absent => self.create(path, entry, staged),
                Expect::Entry(expect) => self.replace(at, path, entry, expect, staged),
            },
            (
                Op::SetMeta {
                    path,
                    entry,
                    expect,
                },
                _,
            ) => self.set_meta(path, entry, expect),
            (Op::Remove { path, expect }, _) => self.remove(at, path, expect, step.before),
            (Op::RemoveDir { path }, _) => self.remove_dir(path),
            (Op::KeepConflict { path, .. }, Some(staged)) => {
                let place = Place {
                    dir: self.applier.staging.dir(),
                    name: staged.name.as_ref(),
                };
                if place.ino()? == Some(staged.ino) {
                    self.conflicts().keep(place, path)?;
                }
                Ok(Change::None)
            }
            _ => diverged("nothing was staged for this step"),
        }
    }

    fn park(
        &mut self,
        at: usize,
        from: &RelPath,
        slot: u32,
        expect: &Entry,
        ino: Option<u64>,
    ) -> Result<Change, Stop> {
        let name = self.slot_name(at);
        let parked = Change::Parked {
            from: from.clone(),
            slot,
        };
        let staging = self.applier.staging.dir().try_clone_to_owned()?;
        let aside = Place::new(&staging, &name);
        let waits = aside.ino()?.is_some();
        if self.resumed && !waits && self.has_arrived(slot, ino)? {
            // Both halves of the move have been done.
            self.slots.insert(slot, (from.clone(), name));
            return Ok(parked);
        }
        let mut before = None;
        if !(self.resumed && waits) {
            let parent = self.parent(from)?;
            let place = Place::new(&parent, from.name());
            before = Some(self.expected(place, from, expect, false)?);
            if expect.content != Content::Directory && is_open_for_writing(place) {
                return diverged("open for writing");
            }
            self.applier.point()?;
            rename_new(place, aside)?;
        }
        self.applier.point()?;
        if let Err(reason) = self.came_out(aside, from, expect, before.as_ref()) {
            self.back_to(aside, from)?;
            return diverged(reason);
        }
        self.slots.insert(slot, (from.clone(), name.clone()));
        Ok(parked)
    }

    fn unpark(&mut self, slot: u32, to: &RelPath, _step: &Step) -> Result<Change, Stop> {
        let Some((_, name)) = self.slots.get(&slot) else {
            return diverged("it was not taken from where it was");
        };
        let name = name.clone();
        let parent = self.parent(to)?;
        let place = Place::new(&parent, to.name());
        let staging = self.applier.staging.dir().try_clone_to_owned()?;
        let aside = Place::new(&staging, &name);
        let placed = Change::Unparked {
            to: to.clone(),
            slot,
        };
        if !(self.resumed && aside.ino()?.is_none()) {
            self.applier.point()?;
            match rename_new(aside, place) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return diverged("something is there already");
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.slots.remove(&slot);
        Ok(placed)
    }

    /// Whether what a slot took has come to where it goes, by its inode. A later step may
    /// have replaced it there since: then that one's inode says the same.
    fn has_arrived(&self, slot: u32, ino: Option<u64>) -> io::Result<bool> {
        let Some(ino) = ino else { return Ok(false) };
        let unparked = |step: &Step| match &step.op {
            Op::Unpark { slot: found, to } if *found == slot => Some(to.clone()),
            _ => None,
        };
        let Some(to) = self.record.steps.iter().find_map(unparked) else {
            return Ok(false);
        };
        let there = self.applier.root.stat(&to)?.map(|stat| stat.st_ino);
        if there == Some(ino) {
            return Ok(true);
        }
        let staging = self.applier.staging.dir();
        for (at, step) in self.record.steps.iter().enumerate() {
            if matches!(step.op, Op::Unpark { .. }) || *path_of(&step.op) != to {
                continue;
            }
            let staged = step.staged.as_ref().map(|staged| staged.ino);
            // The name is missing while the old inode is on its way into the trash.
            let aside = self.slot_name(at);
            if staged.is_some_and(|staged| there == Some(staged))
                || self.trash(true).holds(&to, ino)?
                || self.trash(false).holds(&to, ino)?
                || Place::new(&staging, &aside).ino()? == Some(ino)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts what waits in a slot back where it was taken from.
    fn put_back(&mut self, slot: u32, done: &mut Done) -> Result<Option<RelPath>, ApplyError> {
        let Some((from, name)) = self.slots.remove(&slot) else {
            return Ok(None);
        };
        let back = (|| -> Result<(), Stop> {
            let staging = self.applier.staging.dir().try_clone_to_owned()?;
            let aside = Place::new(&staging, &name);
            if aside.ino()?.is_none() {
                return Ok(());
            }
            self.back_to(aside, &from)
        })();
        match back {
            Ok(()) => done.changes.push(Change::Unparked {
                to: from.clone(),
                slot,
            }),
            Err(Stop::Diverged(reason)) => {
                tracing::warn!(path = %from, reason, "a move could not be undone");
            }
            #[cfg(test)]
            Err(Stop::Cut) => return Err(ApplyError::Cut),
        }
        Ok(Some(from))
    }

    /// Moves to the trash what was found to be what a step expects at a path. Where leases
    /// cannot be had, somebody may have it open.
    fn discard(&mut self, out: Place<'_>, path: &RelPath, expect: &Entry) -> io::Result<()> {
        let (writers, content) = match expect.content {
            Content::File { hash, .. } => (writers(out), Some(hash)),
            _ => (Writers::None, None),
        };
        let base = self.applier.index.base_at(self.record.mount, path);
        // What cannot be told is kept as if this were the only copy, and so is what somebody
        // may make one by writing to it.
        let agreed = matches!(writers, Writers::None | Writers::NoLeases)
            && base.is_ok_and(|base| base.is_some_and(|base| base.content == expect.content));
        let kept = self.trash(agreed).keep(out, path)?;
        if let (true, Some(content)) = (writers != Writers::None, content) {
            self.displaced
                .push((kept, Displaced::new(path.clone(), content)));
        }
        Ok(())
    }

    /// The same for what had been moved there before the batch was cut off.
    fn find_displaced(&mut self) -> Result<(), ApplyError> {
        for agreed in [true, false] {
            self.find_displaced_on(&self.shelf_name(agreed))?;
        }
        Ok(())
    }

    fn find_displaced_on(&mut self, shelf: &str) -> Result<(), ApplyError> {
        for step in &self.record.steps {
            let (Op::Put {
                path,
                expect: Expect::Entry(expect),
                ..
            }
            | Op::Remove { path, expect }) = &step.op
            else {
                continue;
            };
            let Content::File { hash, .. } = expect.content else {
                continue;
            };
            let kept = on_shelf(shelf, path).context("name", path.to_string())?;
            let parent = kept.parent().unwrap_or_default();
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let trash = self.applier.reserved.trash();
            let Ok(dir) = reach::open_beneath(trash, &parent, flags) else {
                continue;
            };
            let place = Place::new(&dir, kept.name());
            let known = self.displaced.iter().any(|(known, _)| *known == kept);
            if !known && matches!(place.ino(), Ok(Some(_))) && writers(place) != Writers::None {
                self.displaced
                    .push((kept, Displaced::new(path.clone(), hash)));
            }
        }
        Ok(())
    }

    /// The directory of a path, writable for its owner while the batch lasts.
    fn parent(&mut self, path: &RelPath) -> Result<OwnedFd, Stop> {
        let fd = match self.applier.root.parent(path) {
            Ok(fd) => fd,
            Err(error) if is_no_directory(&error) => return diverged("its directory is gone"),
            Err(error) => return Err(error.into()),
        };
        let user = rustix::process::geteuid();
        let Some(parent) = path
            .parent()
            .filter(|parent| !parent.is_root() && !user.is_root())
        else {
            return Ok(fd);
        };
        let stat = rustix::fs::fstat(&fd)?;
        let mode = scan::mode_of(&stat);
        if stat.st_uid != user.as_raw() || self.opened.iter().any(|(opened, _)| *opened == parent) {
            return Ok(fd);
        }
        if mode & 0o300 != 0o300 {
            meta::set_mode(fd.as_fd(), mode | 0o700)?;
            self.opened.push((parent, mode));
        } else if self.resumed {
            // Opened before the batch was cut off, if the index knows it closed.
            let known = self.applier.index.row(&parent).ok().flatten();
            if let Some(row) = known
                && row.fingerprint.mode & 0o300 != 0o300
                && (row.fingerprint.mode & scan::MODE_MASK) | 0o700 == mode
            {
                self.opened
                    .push((parent, row.fingerprint.mode & scan::MODE_MASK));
            }
        }
        Ok(fd)
    }

    /// Gives directories the mode they are to have once nothing needs to be put into
    /// them any more, the deepest first.
    fn final_modes(&mut self, done: &mut Done) {
        let mut modes = std::mem::take(&mut self.opened);
        for change in &done.changes {
            if let Change::Placed { path, entry, .. } = change
                && entry.content == Content::Directory
                && entry.mode & 0o700 != 0o700
            {
                modes.retain(|(opened, _)| opened != path);
                modes.push((path.clone(), entry.mode));
            }
        }
        modes.sort_by_key(|(path, _)| std::cmp::Reverse(path.depth()));
        for (path, mode) in modes {
            let set = self
                .applier
                .root
                .dir(&path)
                .and_then(|fd| meta::set_mode(fd.as_fd(), mode));
            if set.is_err() {
                done.recheck.push(path);
            }
        }
    }

    /// Where a step keeps what it takes out. Unlike names of new inodes these are never
    /// cleaned up, because what they show may exist nowhere else.
    fn slot_name(&self, at: usize) -> String {
        format!("{}.{at}", self.record.batch)
    }

    /// Where things go that both sides had `agreed` on, or not.
    fn trash(&self, agreed: bool) -> Shelf<'_> {
        Shelf::new(self.applier.reserved.trash(), self.shelf_name(agreed))
    }

    fn conflicts(&self) -> Shelf<'_> {
        Shelf::new(self.applier.reserved.conflicts(), self.shelf_name(false))
    }

    fn shelf_name(&self, agreed: bool) -> String {
        slot_name(&self.record.stamp, &self.record.batch.to_string(), agreed)
    }
}

/// The inode that a step puts somewhere, or takes along to be put somewhere.
fn moved_ino(step: &Step) -> Option<u64> {
    match step.op {
        Op::Park { .. } => step.before,
        _ => step.staged.as_ref().map(|staged| staged.ino),
    }
}

/// What stops when a step at a path diverges: everything below it, and if it lies in a
/// Git directory all of that, which is of no use in parts.
fn unit_of(root: &Root, path: &RelPath) -> RelPath {
    std::iter::successors(path.parent(), RelPath::parent)
        .find(|above| !above.is_root() && is_git_directory(root, above))
        .unwrap_or_else(|| path.clone())
}

fn is_git_directory(root: &Root, path: &RelPath) -> bool {
    // By its name too: what makes it one may be what has not been made yet.
    path.name() == b".git"
        || MARKS.iter().all(|(name, kinds)| {
            let mark = path.join(name).ok().and_then(|mark| root.stat(&mark).ok());
            mark.flatten()
                .is_some_and(|stat| kinds.contains(&scan::kind_of(&stat)))
        })
}
