//! inotify: a watch for each directory, and a thread that hands the events on.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use crossbeam_channel::{Receiver, Sender, bounded};
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::tree::RelPath;
use crate::tree::scan;

/// How many bytes of events are read at once.
const BUFFER: usize = 64 * 1024;
/// How many readings may wait for the engine. Beyond that they wait in the kernel, which
/// says so when its queue runs over.
const READINGS: usize = 64;

/// An event, with its watch.
pub(super) struct Event {
    pub(super) watch: WatchDescriptor,
    pub(super) mask: EventMask,
    pub(super) name: Option<Vec<u8>>,
}

/// What the thread hands on.
pub(super) enum Watched {
    /// Events, in the order of the kernel's queue.
    Events(Vec<Event>),
    /// The kernel's queue cannot be read any more.
    Failed(io::Error),
}

/// The watches of a tree.
pub(super) struct Watches {
    watches: inotify::Watches,
    paths: HashMap<WatchDescriptor, RelPath>,
    by_path: BTreeMap<RelPath, WatchDescriptor>,
    reserved: Option<WatchDescriptor>,
    /// Ends the thread when it is dropped.
    _stop: Option<OwnedFd>,
}

/// Where an event happened.
pub(super) enum Origin {
    /// In the reserved directory.
    Reserved,
    /// In this directory of the tree.
    Tree(RelPath),
    /// In a directory that is not watched any more.
    Unknown,
}

impl Watches {
    /// Starts the thread.
    pub(super) fn start() -> io::Result<(Self, Receiver<Watched>)> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map(|(read, write)| (write, read))?;
        let (sender, receiver) = bounded(READINGS);
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || pump(inotify, &stopped, &sender))?;
        Ok((Self::of(watches, Some(stop)), receiver))
    }

    /// The same without the thread: the events are there to be read.
    #[cfg(test)]
    pub(super) fn unattended() -> io::Result<(Self, Inotify)> {
        let inotify = Inotify::init()?;
        Ok((Self::of(inotify.watches(), None), inotify))
    }

    fn of(watches: inotify::Watches, stop: Option<OwnedFd>) -> Self {
        Self {
            watches,
            paths: HashMap::new(),
            by_path: BTreeMap::new(),
            reserved: None,
            _stop: stop,
        }
    }

    /// Watches the reserved directory for files that appear.
    pub(super) fn add_reserved(&mut self, dir: BorrowedFd<'_>) -> io::Result<()> {
        let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
        self.reserved = Some(self.watches.add(scan::reference_path(dir), mask)?);
        Ok(())
    }

    /// Watches a directory, or moves its watch to the path it now has. From then on
    /// every change to its names and their files becomes an event.
    pub(super) fn add(&mut self, path: &RelPath, dir: BorrowedFd<'_>) -> io::Result<()> {
        // By descriptor, so that no link can be put in the way. The path in /proc is
        // itself a link to the directory, so that DONT_FOLLOW must not be given.
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ATTRIB
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::ONLYDIR
            | WatchMask::EXCL_UNLINK;
        let watch = self.watches.add(scan::reference_path(dir), mask)?;
        if let Some(former) = self.paths.insert(watch.clone(), path.clone())
            && former != *path
            && self.by_path.get(&former) == Some(&watch)
        {
            self.by_path.remove(&former);
        }
        self.by_path.insert(path.clone(), watch);
        Ok(())
    }

    /// Watches one file, whatever becomes of its name, for writes.
    pub(super) fn add_file(&mut self, file: BorrowedFd<'_>) -> io::Result<WatchDescriptor> {
        let mask = WatchMask::MODIFY | WatchMask::CLOSE_WRITE;
        self.watches.add(scan::reference_path(file), mask)
    }

    /// Stops watching a file.
    pub(super) fn remove_file(&mut self, watch: WatchDescriptor) {
        // Fails if the file is gone, and its watch with it.
        let _ = self.watches.remove(watch);
    }

    /// Whether a directory is watched.
    pub(super) fn has(&self, path: &RelPath) -> bool {
        self.by_path.contains_key(path)
    }

    /// Stops watching a directory and everything below it.
    pub(super) fn remove_below(&mut self, path: &RelPath) {
        let range = (Bound::Included(path.clone()), Bound::Unbounded);
        let below: Vec<RelPath> = self
            .by_path
            .range(range)
            .map(|(found, _)| found)
            .take_while(|found| found.as_bytes().starts_with(path.as_bytes()))
            .filter(|found| found.starts_with(path))
            .cloned()
            .collect();
        for path in below {
            if let Some(watch) = self.by_path.remove(&path)
                && self.paths.get(&watch) == Some(&path)
            {
                self.paths.remove(&watch);
                // Fails if the directory is gone, and its watch with it.
                let _ = self.watches.remove(watch);
            }
        }
    }

    /// Where an event happened. A watch that the kernel dropped is forgotten.
    pub(super) fn origin(&mut self, event: &Event) -> Origin {
        if event.mask.contains(EventMask::IGNORED) {
            if let Some(path) = self.paths.remove(&event.watch)
                && self.by_path.get(&path) == Some(&event.watch)
            {
                self.by_path.remove(&path);
            }
            return Origin::Unknown;
        }
        if self.reserved.as_ref() == Some(&event.watch) {
            return Origin::Reserved;
        }
        match self.paths.get(&event.watch) {
            Some(path) => Origin::Tree(path.clone()),
            None => Origin::Unknown,
        }
    }
}

/// Whether an error of adding a watch means that there are no more to be had.
pub(super) fn is_exhausted(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOSPC | Errno::NOMEM | Errno::MFILE | Errno::NFILE)
    )
}

/// Reads what has happened.
pub(super) fn read(inotify: &mut Inotify, buffer: &mut [u8]) -> io::Result<Vec<Event>> {
    let events = inotify.read_events(buffer)?;
    Ok(events
        .map(|event| Event {
            watch: event.wd,
            mask: event.mask,
            name: event.name.map(|name| name.as_bytes().to_vec()),
        })
        .collect())
}

fn pump(mut inotify: Inotify, stopped: &OwnedFd, sender: &Sender<Watched>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(inotify.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                let _ = sender.send(Watched::Failed(error.into()));
                return;
            }
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        let events = match read(&mut inotify, &mut buffer) {
            Ok(events) => events,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                let _ = sender.send(Watched::Failed(error));
                return;
            }
        };
        if sender.send(Watched::Events(events)).is_err() {
            return;
        }
    }
}
