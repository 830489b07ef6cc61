//! Keeping the index equal to the directory: from events where it is watched, by scanning
//! where it is not, and always by looking, never by believing an event.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use inotify::{EventMask, WatchDescriptor};
use mirrorfs_journal::index::{PeerIndex, Row};
use rustix::io::Errno;

use super::Error;
use super::lock::FENCE;
use super::root::Served;
use super::watch::{Event, Origin, Watches, is_exhausted};
use crate::replica::look::{Look, Seen, fingerprint, look_at, must_read};
use crate::replica::{Latest, Moment, Reserved, Root, is_no_directory};
use crate::tree::{Content, RESERVED, RelPath, scan};

/// How long things must be quiet before what changed is looked at, and for how long a
/// change waits for that at most.
const QUIET: Duration = Duration::from_millis(3);
const PATIENCE: Duration = Duration::from_millis(50);
/// Above this size, in bytes, a file is read on another thread.
const LARGE: u64 = 4 << 20;
/// How long a file that changes while it is read is left alone, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// After how many attempts it becomes a problem.
const ATTEMPTS: u32 = 4;
/// How many rows below a directory are buried at once.
const ROWS: u32 = 500;
/// How many directories are scanned in one transaction of the index.
const SCANNED: u32 = 64;
/// The name of the files whose events tell how far the watch has come.
pub(super) const COOKIE: &str = "cookie-";

/// A large file to be looked at on another thread.
pub(super) struct Job {
    pub(super) path: RelPath,
    pub(super) root: Root,
    pub(super) known: Option<Row>,
}

impl Job {
    /// Looks.
    pub(super) fn look(&self) -> io::Result<Look> {
        look_at(&self.root, &self.path, self.known.as_ref(), &|_| None)
    }
}

/// What an event says beside that something changed.
pub(super) enum Signal {
    /// The watch has come as far as this cookie.
    Cookie(Vec<u8>),
    /// A newer session wants the directory.
    Fence,
}

/// When a path is looked at again.
struct Later {
    at: Instant,
    attempts: u32,
}

/// Watches and indexes one directory.
pub(super) struct Observer {
    pub(super) served: Served,
    pub(super) reserved: Reserved,
    pub(super) index: PeerIndex,
    watches: Option<Watches>,
    /// Why not everything is watched.
    unwatched: Option<String>,
    device: u64,
    problems: BTreeMap<RelPath, String>,
    problems_changed: bool,
    /// What changed, and whether everything below it is to be looked at too.
    fresh: HashMap<RelPath, bool>,
    /// Since when something is fresh, and when the last of it came.
    since: Option<(Instant, Instant)>,
    later: HashMap<RelPath, Later>,
    large: HashSet<RelPath>,
    /// Which of them changed meanwhile.
    again: HashSet<RelPath>,
    /// What is reported once a look at it has ended, even if it is what the index knew.
    anew: HashSet<RelPath>,
    jobs: Sender<Job>,
    in_transaction: bool,
    /// The revision that was committed last.
    committed: u64,
}

impl Observer {
    pub(super) fn new(
        served: Served,
        reserved: Reserved,
        index: PeerIndex,
        watches: Result<Watches, String>,
        jobs: Sender<Job>,
    ) -> Result<Self, Error> {
        let device = rustix::fs::fstat(served.root.fd())
            .map_err(|error| Error::io("look at", served.path.display(), error))?
            .st_dev;
        let (watches, unwatched) = match watches {
            Ok(watches) => (Some(watches), served.remote.clone()),
            Err(reason) => (None, Some(reason)),
        };
        Ok(Self {
            committed: index.rev(),
            served,
            reserved,
            index,
            watches,
            unwatched,
            device,
            problems: BTreeMap::new(),
            problems_changed: false,
            fresh: HashMap::new(),
            since: None,
            later: HashMap::new(),
            large: HashSet::new(),
            again: HashSet::new(),
            anew: HashSet::new(),
            jobs,
            in_transaction: false,
        })
    }

    /// Why the directory has to be scanned now and then; none while watching works.
    pub(super) fn unwatched(&self) -> Option<&str> {
        self.unwatched.as_deref()
    }

    /// Looks at everything. What has the fingerprint it had is not read again.
    pub(super) fn scan(&mut self) -> Result<(), Error> {
        if self.watches.is_some() {
            // Enough watches may have become free.
            self.unwatched = self.served.remote.clone();
        }
        self.scan_tree(&RelPath::ROOT, false)
    }

    /// Gives the watches up: from now on only scanning tells.
    pub(super) fn stop_watching(&mut self, reason: String) {
        self.watches = None;
        self.unwatched = Some(reason);
    }

    /// Takes in events.
    pub(super) fn take(&mut self, events: Vec<Event>, signals: &mut Vec<Signal>) {
        for event in events {
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                // Nobody knows what was lost.
                self.changed(RelPath::ROOT, true);
                continue;
            }
            let Some(watches) = &mut self.watches else {
                return;
            };
            let origin = watches.origin(&event);
            let Some(name) = event.name else { continue };
            match origin {
                Origin::Unknown => {}
                Origin::Reserved if name == FENCE.as_bytes() => signals.push(Signal::Fence),
                Origin::Reserved if name.starts_with(COOKIE.as_bytes()) => {
                    signals.push(Signal::Cookie(name));
                }
                Origin::Reserved => {}
                Origin::Tree(dir) => {
                    let Ok(path) = dir.join(&name) else { continue };
                    let appeared = EventMask::CREATE | EventMask::MOVED_TO;
                    let tree =
                        event.mask.contains(EventMask::ISDIR) && event.mask.intersects(appeared);
                    if event.mask.contains(EventMask::CLOSE_WRITE) {
                        self.later.remove(&path);
                    }
                    self.changed(path, tree);
                }
            }
        }
    }

    /// Notes that a path is to be looked at; with `tree` everything below it too.
    pub(super) fn changed(&mut self, path: RelPath, tree: bool) {
        if path.components().next() == Some(RESERVED) || self.later.contains_key(&path) {
            return;
        }
        let now = crate::clock::monotonic();
        let (first, _) = self.since.unwrap_or((now, now));
        self.since = Some((first, now));
        *self.fresh.entry(path).or_default() |= tree;
    }

    /// When something is to be looked at next.
    pub(super) fn due(&self) -> Option<Instant> {
        let fresh = self
            .since
            .map(|(first, last)| (last + QUIET).min(first + PATIENCE));
        let later = self.later.values().map(|later| later.at).min();
        fresh.into_iter().chain(later).min()
    }

    /// Looks at what is due; with `all` at everything that has changed, due or not.
    pub(super) fn process(&mut self, all: bool) -> Result<(), Error> {
        let now = crate::clock::monotonic();
        let quiet = self
            .since
            .is_some_and(|(first, last)| now >= (last + QUIET).min(first + PATIENCE));
        let mut paths: BTreeSet<(RelPath, bool)> = BTreeSet::new();
        if all || quiet {
            self.since = None;
            paths.extend(self.fresh.drain());
        }
        for (path, later) in &mut self.later {
            if all || later.at <= now {
                // Not again before the look has said so.
                later.at = now + RETRY.1;
                paths.insert((path.clone(), false));
            }
        }
        for (path, tree) in paths {
            self.look(&path, tree)?;
        }
        if all && !self.fresh.is_empty() {
            // Looking at a file brought its other names up.
            return self.process(true);
        }
        Ok(())
    }

    /// Looks at a path, and below it if it is a directory that is new here.
    pub(super) fn look(&mut self, path: &RelPath, tree: bool) -> Result<(), Error> {
        if path.is_root() {
            return self.scan_tree(path, true);
        }
        let troubled = self.problems.contains_key(path);
        if self.observe(path, true)? {
            let watched = self.watches.as_ref().is_none_or(|w| w.has(path));
            if tree || troubled || !watched {
                self.scan_tree(path, true)?;
            }
        }
        Ok(())
    }

    /// Takes in what another thread saw of a large file.
    pub(super) fn looked(&mut self, path: &RelPath, found: io::Result<Look>) -> Result<(), Error> {
        self.large.remove(path);
        if self.again.remove(path) {
            self.changed(path.clone(), false);
        }
        if let Ok(Look::Seen(seen)) = &found {
            let stat = self.served.root.stat(path);
            if !matches!(&stat, Ok(Some(stat)) if fingerprint(stat) == seen.print) {
                self.later.remove(path);
                self.changed(path.clone(), false);
                return Ok(());
            }
        }
        self.settle(path, found)?;
        Ok(())
    }

    /// The large files that are being looked at.
    pub(super) fn large(&self) -> &HashSet<RelPath> {
        &self.large
    }

    /// Whether a file is being looked at, or is about to be.
    pub(super) fn is_open(&self, path: &RelPath) -> bool {
        self.large.contains(path) || self.fresh.contains_key(path)
    }

    /// The list of problems, if it is another one than before.
    pub(super) fn new_problems(&mut self) -> Option<&BTreeMap<RelPath, String>> {
        std::mem::take(&mut self.problems_changed).then_some(&self.problems)
    }

    /// Looks again at what could not be reported, because somebody waits: a disk may give
    /// today what it did not yesterday, and no event tells of that.
    pub(super) fn retry_problems(&mut self) {
        let troubled: Vec<RelPath> = self.problems.keys().cloned().collect();
        for path in troubled {
            self.changed(path, false);
        }
    }

    /// Declares files that did not hold still problems, because somebody waits.
    pub(super) fn give_up_waiting(&mut self) {
        let busy: Vec<RelPath> = self.later.keys().chain(&self.large).cloned().collect();
        for path in busy {
            self.problem(&path, being_written());
        }
    }

    /// Makes what was observed last, so that it may be reported.
    pub(super) fn commit(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.in_transaction) {
            if self.index.rev() != self.committed {
                // What is reported from here on is of this tree: another that takes its
                // place has not changed from it.
                let recorded = Moment::decode(self.index.moment()?);
                if let Some(moment) = Latest::advance(&self.reserved, recorded.as_ref(), None) {
                    self.index.set_moment(Some(&moment.encode()))?;
                }
            }
            self.index.commit()?;
            self.committed = self.index.rev();
        }
        Ok(())
    }

    /// Gives a path a new revision, so that what the index knows of it is reported again.
    /// Not where a look for [`Self::look_anew`] has not ended: that reports it, and what the
    /// index knows until then is not what is there.
    pub(super) fn renew(&mut self, path: &RelPath) -> Result<(), Error> {
        if self.anew.contains(path) {
            return Ok(());
        }
        self.begin()?;
        Ok(self.index.renew(path)?)
    }

    /// Looks at a path, and has reported what is there, be it what the index knew. The look
    /// may not end at once, because the file is large or being written: then it is reported
    /// as soon as it does, and not before.
    pub(super) fn look_anew(&mut self, path: &RelPath) -> Result<(), Error> {
        self.anew.insert(path.clone());
        self.look(path, true)
    }

    fn renew_if_asked(&mut self, path: &RelPath) -> Result<(), Error> {
        if self.anew.remove(path) {
            self.renew(path)?;
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Error> {
        if !std::mem::replace(&mut self.in_transaction, true) {
            self.index.begin()?;
        }
        Ok(())
    }

    fn scan_tree(&mut self, start: &RelPath, live: bool) -> Result<(), Error> {
        let mut stack = vec![start.clone()];
        let mut scanned = 0;
        while let Some(dir) = stack.pop() {
            // The watch comes first: what changes after the listing becomes an event.
            let listed = self.served.root.dir(&dir).and_then(|fd| {
                self.watch(&dir, fd.as_fd());
                scan::names(fd.as_fd())
            });
            let names = match listed {
                Ok(names) => names,
                Err(error) if is_no_directory(&error) && !dir.is_root() => {
                    self.observe(&dir, live)?;
                    continue;
                }
                Err(error) => {
                    // Nothing is known of what is below: no deletions either.
                    self.problem(&dir, cannot_read(&error));
                    continue;
                }
            };
            let mut known: BTreeSet<Vec<u8>> = self.index.names_in(&dir)?.into_iter().collect();
            for name in names {
                known.remove(&name);
                if dir.is_root() && name == RESERVED {
                    continue;
                }
                let Ok(path) = dir.join(&name) else { continue };
                if self.observe(&path, live)? {
                    stack.push(path);
                }
            }
            for name in known {
                let Ok(path) = dir.join(&name) else { continue };
                self.observe(&path, live)?;
            }
            scanned += 1;
            if scanned % SCANNED == 0 {
                self.commit()?;
            }
        }
        Ok(())
    }

    /// Watches a file that has no name in the tree, if that can be had.
    pub(super) fn watch_file(
        &mut self,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Option<WatchDescriptor> {
        self.watches.as_mut()?.add_file(file).ok()
    }

    /// Stops watching it.
    pub(super) fn unwatch_file(&mut self, watch: WatchDescriptor) {
        if let Some(watches) = &mut self.watches {
            watches.remove_file(watch);
        }
    }

    fn watch(&mut self, path: &RelPath, dir: std::os::fd::BorrowedFd<'_>) {
        let Some(watches) = &mut self.watches else {
            return;
        };
        match watches.add(path, dir) {
            Ok(()) => {}
            Err(error) if is_exhausted(&error) => {
                self.unwatched.get_or_insert_with(|| {
                    format!(
                        "there are no more inotify watches ({error}): raise fs.inotify.max_user_watches on the peer"
                    )
                });
            }
            // It is gone, or cannot be read, which its listing tells.
            Err(_) => {}
        }
    }

    /// Looks at one path and writes down what is there. Says whether it is a directory.
    fn observe(&mut self, path: &RelPath, live: bool) -> Result<bool, Error> {
        if self.large.contains(path) {
            // Once more when the look that is under way has ended.
            self.again.insert(path.clone());
            return Ok(false);
        }
        let known = self.index.row(path)?;
        match self.served.root.stat(path) {
            Ok(Some(stat)) if stat.st_dev != self.device => {
                self.problem(path, "another filesystem is mounted here".to_owned());
                return Ok(false);
            }
            Ok(Some(stat))
                if live && scan::size_of(&stat) > LARGE && must_read(&stat, known.as_ref()) =>
            {
                self.large.insert(path.clone());
                let job = Job {
                    path: path.clone(),
                    root: self.served.root.clone(),
                    known,
                };
                // The thread lives as long as the session.
                let _ = self.jobs.send(job);
                return Ok(false);
            }
            _ => {}
        }
        let index = &self.index;
        let found = look_at(&self.served.root, path, known.as_ref(), &|print| {
            index.by_fingerprint(print).ok().flatten()
        });
        self.settle(path, found)
    }

    fn settle(&mut self, path: &RelPath, found: io::Result<Look>) -> Result<bool, Error> {
        match found {
            Ok(Look::Seen(seen)) => {
                self.later.remove(path);
                self.no_problem(path);
                let is_dir = self.seen(path, &seen)?;
                self.renew_if_asked(path)?;
                Ok(is_dir)
            }
            Ok(Look::Absent) => {
                self.later.remove(path);
                self.absent(path)?;
                self.renew_if_asked(path)?;
                Ok(false)
            }
            Ok(Look::Special) => {
                self.later.remove(path);
                self.absent(path)?;
                self.renew_if_asked(path)?;
                self.problem(path, "special file, stays local".to_owned());
                Ok(false)
            }
            Ok(Look::Changing) => {
                let attempts = self.later.get(path).map_or(0, |later| later.attempts) + 1;
                let pause = RETRY.0 * 2_u32.pow(attempts.min(7));
                let at = crate::clock::monotonic() + pause.min(RETRY.1);
                self.later.insert(path.clone(), Later { at, attempts });
                if attempts >= ATTEMPTS {
                    self.problem(path, being_written());
                }
                Ok(false)
            }
            Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => {
                self.problem(path, "another filesystem is mounted here".to_owned());
                Ok(false)
            }
            Err(error) => {
                // Not being able to look is no sight of a deletion.
                self.later.remove(path);
                self.problem(path, cannot_read(&error));
                Ok(false)
            }
        }
    }

    fn seen(&mut self, path: &RelPath, seen: &Seen) -> Result<bool, Error> {
        self.begin()?;
        let is_dir = seen.entry.content == Content::Directory;
        let known = self.index.row(path)?;
        let old = known.as_ref().and_then(|row| row.entry.as_ref());
        if !is_dir && old.is_some_and(|old| old.content == Content::Directory) {
            self.bury_below(path)?;
            if let Some(watches) = &mut self.watches {
                watches.remove_below(path);
            }
        }
        match &known {
            Some(row) if old == Some(&seen.entry) => {
                let (was, is) = (row.fingerprint, seen.print);
                // A directory's size and times change with every name in it.
                let changed = match is_dir {
                    true => (was.ino, was.mode) != (is.ino, is.mode),
                    false => was != is || row.racy != seen.racy,
                };
                if changed {
                    self.index.touch(path, is, seen.racy)?;
                }
            }
            _ => {
                self.index
                    .put(path, seen.print, seen.racy, seen.masked, &seen.entry)?;
            }
        }
        if !is_dir {
            // An event names one of a file's hard links; the others changed with it.
            for (name, print) in self.index.names_of(seen.print.ino)? {
                if name != *path && print != seen.print {
                    self.changed(name, false);
                }
            }
        }
        Ok(is_dir)
    }

    fn absent(&mut self, path: &RelPath) -> Result<(), Error> {
        self.begin()?;
        self.bury_below(path)?;
        self.index.bury(path)?;
        if let Some(watches) = &mut self.watches {
            watches.remove_below(path);
        }
        let gone: Vec<RelPath> = self
            .problems
            .range(path.clone()..)
            .map(|(found, _)| found)
            .take_while(|found| found.as_bytes().starts_with(path.as_bytes()))
            .filter(|found| found.starts_with(path))
            .cloned()
            .collect();
        for path in gone {
            self.no_problem(&path);
        }
        Ok(())
    }

    fn bury_below(&mut self, path: &RelPath) -> Result<(), Error> {
        loop {
            let rows = self.index.below(path, None, ROWS)?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in rows {
                self.index.bury(&row.path)?;
            }
        }
    }

    fn problem(&mut self, path: &RelPath, reason: String) {
        if self.problems.get(path) != Some(&reason) {
            self.problems.insert(path.clone(), reason);
            self.problems_changed = true;
        }
    }

    fn no_problem(&mut self, path: &RelPath) {
        self.problems_changed |= self.problems.remove(path).is_some();
    }
}

fn being_written() -> String {
    "being written: it is mirrored when it holds still".to_owned()
}

fn cannot_read(error: &io::Error) -> String {
    format!("cannot be read: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::watch::Watched;
    use crate::tree::Id;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lost_events_are_made_up_for_by_a_scan() {
        let dir = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let path = |at: &str| dir.path().join(at);
        fs::create_dir(path("sub")).unwrap();
        let twins = ["one", "two"].map(|name| fs::File::create(path(name)).unwrap());
        let served = Served::open(dir.path(), state.path(), true).unwrap();
        let (reserved, identity) =
            Reserved::create(served.root.fd(), Id::random().unwrap()).unwrap();
        let index = crate::agent::open_index(&served, state.path(), identity.replica).unwrap();
        let (watches, events) = Watches::start().unwrap();
        let (jobs, _to_look) = crossbeam_channel::unbounded();
        let mut observer = Observer::new(served, reserved, index, Ok(watches), jobs).unwrap();
        observer.scan().unwrap();
        // More events than the kernel's queue and all that is read ahead of it hold; two
        // files in turn, because equal neighbours become one event.
        let queue = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let queue: u32 = queue.trim().parse().unwrap();
        for at in 0..queue + 300_000 {
            let mode = fs::Permissions::from_mode(0o600 | (at & 2) << 5);
            twins[(at & 1) as usize].set_permissions(mode).unwrap();
        }
        fs::create_dir(path("sub/new")).unwrap();
        fs::write(path("sub/new/lost"), "lost").unwrap();
        let mut signals = Vec::new();
        let mut overflowed = false;
        while !overflowed {
            let Watched::Events(events) = events.recv().unwrap() else {
                panic!("the watch failed");
            };
            overflowed = events
                .iter()
                .any(|event| event.mask.contains(EventMask::Q_OVERFLOW));
            observer.take(events, &mut signals);
        }
        observer.process(true).unwrap();
        let row = observer.index.row(&RelPath::new("sub/new/lost").unwrap());
        assert!(row.unwrap().is_some_and(|row| row.entry.is_some()));
    }
}
