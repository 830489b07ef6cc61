//! Late writes: a program has a file open while a batch replaces or removes it, and goes on
//! writing to what lies in the trash by then. Where leases can be had such a file is not
//! replaced at all; where not, it is watched in the trash, compared with what it held now and
//! then, at each flush and before anything of the trash goes, and brought back into the tree
//! once it holds something else. From there on it is a file like any other.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use inotify::{EventMask, WatchDescriptor};
use mirrorfs_journal::index::Durable;
use rustix::fs::OFlags;

use super::super::Error;
use super::super::watch::Event;
use super::Engine;
use crate::replica::beneath::Place;
use crate::replica::keep::Shelf;
use crate::replica::late::{Back, Displaced, beside, is_in_git};
use crate::replica::look::{fingerprint, is_racy};
use crate::replica::trash::{Kept, RestoreError, Trash};
use crate::tree::hash::hash_file;
use crate::tree::{ContentHash, Kind, RelPath, Timestamp, reach, scan};
use crate::wire::message::ToMount;

/// How often what is in the trash is looked at without a reason: a store through a mapping
/// makes no event.
const EVERY: Duration = Duration::from_secs(10);
/// So many are looked at that often, and more the less often.
const FEW: u32 = 500;
/// How many names are tried.
const NAMES: usize = 1000;
/// What `fstatfs` calls a filesystem that never cleans a page: there a store through a
/// mapping need not move any time.
const TMPFS: i64 = 0x0102_1994;

/// What somebody may still write to in the trash, by where it lies.
pub(super) struct Displacements {
    rows: BTreeMap<RelPath, Displaced>,
    watches: HashMap<WatchDescriptor, RelPath>,
    next: Option<Instant>,
    /// Something could not be brought back.
    stuck: bool,
    tells: bool,
}

impl Displacements {
    /// None yet. `tells` is whether the other side wants to hear of late versions.
    pub(super) fn telling(tells: bool) -> Self {
        Self {
            rows: BTreeMap::new(),
            watches: HashMap::new(),
            next: None,
            stuck: false,
            tells,
        }
    }

    /// When they are to be looked at next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next
    }

    fn put_off(&mut self) {
        let many = u32::try_from(self.watching()).unwrap_or(u32::MAX) / FEW;
        self.next = (self.watching() > 0 || self.stuck)
            .then(|| crate::clock::monotonic() + EVERY.saturating_mul(many.saturating_add(1)));
    }

    fn watching(&self) -> usize {
        self.rows.values().filter(|row| row.back.is_none()).count()
    }
}

/// What a look at something in the trash found.
enum Found {
    /// It is not there any more.
    Gone,
    /// It holds what it held.
    Untouched,
    /// Somebody has written to it.
    Written,
}

impl Engine {
    /// Takes up what earlier sessions have left. To be called before the tree is scanned:
    /// what has come back into it is found by that.
    pub(super) fn load_displaced(&mut self) -> Result<(), Error> {
        if self.observer.served.aside {
            return Ok(());
        }
        for (kept, row) in self.observer.index.displaced()? {
            match postcard::from_bytes::<Displaced>(&row) {
                Ok(row) => self.watch_displaced(kept, row),
                Err(error) => tracing::warn!(%kept, %error, "not known any more"),
            }
        }
        self.check_displaced()
    }

    /// Something has just been displaced.
    pub(super) fn watch_displaced(&mut self, kept: RelPath, row: Displaced) {
        if row.back.is_none()
            && let Ok(file) = self.open_displaced(&kept)
            && let Some(watch) = self.observer.watch_file(file.as_fd())
        {
            self.displaced.watches.insert(watch, kept.clone());
        }
        self.displaced.rows.insert(kept, row);
        // At once: it may have been written to before there was a watch.
        self.displaced.next = Some(crate::clock::monotonic());
    }

    /// Takes out of events those that are about something in the trash.
    pub(super) fn displaced_events(&mut self, events: Vec<Event>) -> Result<Vec<Event>, Error> {
        if self.displaced.watches.is_empty() {
            return Ok(events);
        }
        let mut others = Vec::with_capacity(events.len());
        for event in events {
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                // Nobody knows what was lost.
                self.displaced.next = Some(crate::clock::monotonic());
            }
            match self.displaced.watches.get(&event.watch).cloned() {
                Some(kept) => self.check_one(&kept)?,
                None => others.push(event),
            }
        }
        Ok(others)
    }

    /// Looks at everything that somebody may write to.
    pub(super) fn check_displaced(&mut self) -> Result<(), Error> {
        let rows = self.displaced.rows.keys().cloned().collect::<Vec<_>>();
        self.displaced.stuck = false;
        for kept in rows {
            self.check_one(&kept)?;
        }
        self.displaced.put_off();
        Ok(())
    }

    fn check_one(&mut self, kept: &RelPath) -> Result<(), Error> {
        let Some(row) = self.displaced.rows.get(kept) else {
            return Ok(());
        };
        let (path, begun) = (row.path.clone(), row.back.is_some());
        match self.look_at_displaced(kept) {
            // What has been brought back is not in the trash.
            Ok(Found::Gone) if begun => Ok(()),
            Ok(Found::Gone) => self.forget_displaced(kept),
            Ok(Found::Untouched) if !begun => Ok(()),
            Ok(Found::Untouched | Found::Written) => self.bring_back(kept),
            Err(error) => {
                tracing::warn!(%path, %error, "cannot look at what was replaced");
                Ok(())
            }
        }
    }

    fn open_displaced(&self, kept: &RelPath) -> io::Result<std::fs::File> {
        let parent = kept.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = reach::open_beneath(self.observer.reserved.trash(), &parent, flags)?;
        scan::open_file(dir.as_fd(), kept.name())
    }

    fn look_at_displaced(&mut self, kept: &RelPath) -> io::Result<Found> {
        let file = match self.open_displaced(kept) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Gone),
            other => other?,
        };
        let Some(row) = self.displaced.rows.get_mut(kept) else {
            return Ok(Found::Gone);
        };
        let print = fingerprint(&rustix::fs::fstat(&file)?);
        if row.seen == Some(print.into()) {
            return Ok(Found::Untouched);
        }
        // Pages that are clean make the next store move the times of the file.
        rustix::fs::fdatasync(&file)?;
        let now = Timestamp::now();
        let (hash, _): (ContentHash, u64) = hash_file(&file)?;
        if hash != row.content {
            return Ok(Found::Written);
        }
        let after = fingerprint(&rustix::fs::fstat(&file)?);
        #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
        let cleans = rustix::fs::fstatfs(&file)?.f_type as i64 != TMPFS;
        row.seen = (cleans && after == print && !is_racy(&print, now)).then(|| print.into());
        Ok(Found::Untouched)
    }

    fn forget_displaced(&mut self, kept: &RelPath) -> Result<(), Error> {
        self.unwatch(kept);
        self.displaced.rows.remove(kept);
        self.observer.index.forget_displaced(kept)?;
        Ok(())
    }

    fn unwatch(&mut self, kept: &RelPath) {
        let mut gone = Vec::new();
        self.displaced.watches.retain(|watch, of| {
            let stays = of != kept;
            if !stays {
                gone.push(watch.clone());
            }
            stays
        });
        for watch in gone {
            self.observer.unwatch_file(watch);
        }
    }

    /// Brings a late version back into the tree, or into `.mirrorfs/conflicts` if it was in a
    /// Git directory, and tells of it.
    fn bring_back(&mut self, kept: &RelPath) -> Result<(), Error> {
        let Some(row) = self.displaced.rows.get(kept) else {
            return Ok(());
        };
        let path = row.path.clone();
        self.unwatch(kept);
        let root = self.observer.served.root.clone();
        let kind = |at: &RelPath| {
            root.stat(at)
                .ok()
                .flatten()
                .map(|stat| scan::kind_of(&stat))
        };
        let back = if is_in_git(&path, kind) {
            self.keep_late(kept, &path)
        } else {
            self.restore_late(kept, &path)
        };
        match back {
            Ok(back) => {
                tracing::info!(%path, ?back, "written to after it had been replaced");
                if let Back::Tree(at) = &back {
                    for above in std::iter::successors(at.parent(), RelPath::parent)
                        .filter(|above| !above.is_root())
                        .collect::<Vec<_>>()
                        .iter()
                        .rev()
                    {
                        self.observer.look(above, false)?;
                    }
                    self.observer.look_anew(at)?;
                }
                if self.joining.is_none() {
                    self.report(false)?;
                    self.tell(kept)?;
                }
                Ok(())
            }
            Err(Stopped::Error(error)) => Err(error),
            Err(Stopped::Failed(error)) => {
                // The next look tries again.
                self.displaced.stuck = true;
                self.displaced
                    .next
                    .get_or_insert(crate::clock::monotonic() + EVERY);
                tracing::warn!(%path, %error, "a late version stays in the trash");
                Ok(())
            }
        }
    }

    fn keep_late(&mut self, kept: &RelPath, path: &RelPath) -> Result<Back, Stopped> {
        let slot = kept.components().next().unwrap_or_default();
        let slot = String::from_utf8_lossy(slot).into_owned();
        let planned = crate::replica::keep::on_shelf(&slot, path)?;
        self.plan_back(kept, Back::Kept(planned.clone()))?;
        let reserved = &self.observer.reserved;
        let parent = kept.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = reach::open_beneath(reserved.trash(), &parent, flags).map_err(io::Error::from)?;
        let at =
            Shelf::new(reserved.conflicts(), slot).keep(Place::new(&dir, kept.name()), path)?;
        if at != planned {
            self.plan_back(kept, Back::Kept(at.clone()))?;
        }
        Ok(Back::Kept(at))
    }

    fn restore_late(&mut self, kept: &RelPath, path: &RelPath) -> Result<Back, Stopped> {
        let trash = Trash::of(&self.observer.reserved).map_err(Error::from)?;
        let root = self.observer.served.root.clone();
        let from = Kept {
            at: kept.clone(),
            path: path.clone(),
            since: Timestamp::default(),
            kind: Kind::File,
            size: 0,
            room: 0,
        };
        let mut path = path.clone();
        let mut names = beside(&path, crate::clock::wall())
            .take(NAMES)
            .collect::<Vec<_>>();
        names.reverse();
        while let Some(at) = names.pop() {
            if !matches!(root.stat(&at), Ok(None)) {
                continue;
            }
            self.plan_back(kept, Back::Tree(at.clone()))?;
            match trash.restore(&from, &root, &at) {
                Ok(()) => return Ok(Back::Tree(at)),
                Err(RestoreError::InTheWay) => {}
                // What held it is a file by now: beside that.
                Err(RestoreError::NoDirectory(file)) => {
                    let above = file.parent().unwrap_or_default();
                    path = above.join(path.name()).map_err(io::Error::other)?;
                    names = beside(&path, crate::clock::wall()).take(NAMES).collect();
                    names.reverse();
                }
                Err(RestoreError::Io(error)) => return Err(error.into()),
                Err(error) => return Err(io::Error::other(error).into()),
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists).into())
    }

    /// Writes down where a late version goes, before it does.
    fn plan_back(&mut self, kept: &RelPath, back: Back) -> Result<(), Stopped> {
        let Some(row) = self.displaced.rows.get_mut(kept) else {
            return Ok(());
        };
        row.back = Some(back);
        row.since = crate::clock::wall();
        let bytes = postcard::to_stdvec(row).map_err(io::Error::other)?;
        self.observer.commit()?;
        let index = &mut self.observer.index;
        index
            .transaction(Durable::Process, |index| index.set_displaced(kept, &bytes))
            .map_err(Error::from)?;
        Ok(())
    }

    /// Tells of every late version that is still there.
    pub(super) fn tell_late(&mut self) -> Result<(), Error> {
        let rows = self.displaced.rows.iter();
        let late: Vec<RelPath> = rows
            .filter(|(_, row)| row.back.is_some())
            .map(|(kept, _)| kept.clone())
            .collect();
        for kept in late {
            self.tell(&kept)?;
        }
        Ok(())
    }

    fn tell(&mut self, kept: &RelPath) -> Result<(), Error> {
        let Some(row) = self.displaced.rows.get(kept) else {
            return Ok(());
        };
        let (copy, conflict) = match &row.back {
            Some(Back::Tree(at)) => (Some(at.clone()), None),
            Some(Back::Kept(at)) => (None, Some(at.clone())),
            None => return Ok(()),
        };
        let there = match (&copy, &conflict) {
            (Some(at), _) => self.observer.served.root.stat(at).ok().flatten().is_some(),
            (None, Some(at)) => {
                let conflicts = self.observer.reserved.conflicts();
                reach::open_beneath(conflicts, at, OFlags::PATH).is_ok()
            }
            (None, None) => false,
        };
        if !there {
            // Somebody has decided about it.
            return self.forget_displaced(kept);
        }
        if !self.displaced.tells {
            return Ok(());
        }
        self.send(ToMount::Late {
            path: row.path.clone(),
            copy,
            kept: conflict,
            since: row.since,
        })
    }
}

/// Why something was not brought back.
enum Stopped {
    /// It may be the next time.
    Failed(io::Error),
    /// The session cannot go on.
    Error(Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}
