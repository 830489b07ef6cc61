//! Edits on one side, and how long each takes to the other.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use inotify::{Inotify, WatchMask};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::arguments::Arguments;
use crate::place::Place;

/// An edit that has not arrived by then has been lost, or the link has.
const LOST: Duration = Duration::from_secs(60);
/// The bench looks for itself as often as this, whatever it has been told.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// Makes edits. Two runs with the same numbers of files and edits choose the same files.
pub struct Edits<'a> {
    place: &'a Place,
    edits: usize,
    pause: Duration,
    /// How many have been made.
    made: usize,
    random: u64,
}

impl<'a> Edits<'a> {
    pub fn new(place: &'a Place, arguments: &Arguments) -> Self {
        Self {
            place,
            edits: arguments.edits,
            pause: arguments.pause,
            made: 0,
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    /// Edits files below `from`, and gives the times until `to` showed what was written.
    pub fn measure(&mut self, from: &Path, to: &Path) -> Vec<Duration> {
        let mut arrivals = Arrivals::below(to, self.place.directories());
        (0..self.edits)
            .map(|_| {
                let spread = 1_000;
                let pause = self.pause * 2 * self.below(spread) / spread;
                std::thread::sleep(pause);
                let files = u32::try_from(self.place.files()).unwrap();
                let path = self.place.file(self.below(files) as usize);
                self.made += 1;
                let content = format!("edit {}\n", self.made);
                let mut file = File::create(from.join(&path)).unwrap();
                file.write_all(content.as_bytes()).unwrap();
                let closed = Instant::now();
                drop(file);
                arrivals.wait(&to.join(&path), content.as_bytes());
                closed.elapsed()
            })
            .collect()
    }

    /// A number below another one (xorshift).
    fn below(&mut self, bound: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        u32::try_from(self.random % u64::from(bound)).unwrap()
    }
}

/// Tells when something on the other side changes, as an editor there would be told.
struct Arrivals(Inotify);

impl Arrivals {
    fn below(root: &Path, directories: usize) -> Self {
        let inotify = Inotify::init().unwrap();
        let mask = WatchMask::MOVED_TO | WatchMask::CREATE | WatchMask::CLOSE_WRITE;
        for dir in 0..directories {
            let dir = root.join(dir.to_string());
            inotify.watches().add(dir, mask).unwrap();
        }
        Self(inotify)
    }

    /// Returns as soon as the file shows the content.
    fn wait(&mut self, path: &Path, content: &[u8]) {
        let begin = Instant::now();
        let mut buffer = [0; 4096];
        while std::fs::read(path).unwrap() != content {
            assert!(begin.elapsed() < LOST, "{} has not come", path.display());
            let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
            if poll(&mut fds, Some(&LOOK)).unwrap() > 0 {
                let _ = self.0.read_events(&mut buffer).unwrap().count();
            }
        }
    }
}
