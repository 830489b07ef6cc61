//! What a session tells of the directory, and when it has told everything.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::AsFd;

use mirrorfs_journal::index::Row;

use super::super::Error;
use super::super::observer::COOKIE;
use super::{Drain, Engine};
use crate::tree::{Content, ContentHash, RelPath, git, scan};
use crate::wire::message::{Observation, PIECE, Revision, ToMount, row_weight};

/// How many rows are read for that at once.
const ROWS: u32 = 512;
/// How many problems are listed, and how many bytes of them.
const PROBLEMS: usize = 2000;
const PROBLEM_BYTES: usize = 512 * 1024;
/// How often a drain waits for another look at a large file that keeps changing.
const LOOKS: u32 = 3;

impl Engine {
    /// Reports everything that is younger than what was reported last; with `always` at
    /// least that there is nothing.
    pub(super) fn report(&mut self, always: bool) -> Result<(), Error> {
        self.observer.commit()?;
        if self.joining.is_some() {
            return Ok(());
        }
        if always || self.observer.index.rev() != self.reported {
            self.report_rows()?;
        }
        let Some(problems) = self.observer.new_problems() else {
            return Ok(());
        };
        let mut list = Vec::new();
        let mut bytes = 0;
        for (path, reason) in problems {
            bytes += path.as_bytes().len() + reason.len() + 16;
            if list.len() == PROBLEMS || bytes > PROBLEM_BYTES {
                let more = problems.len() - list.len();
                list.push((RelPath::ROOT, format!("and {more} more")));
                break;
            }
            list.push((path.clone(), reason.clone()));
        }
        self.send(ToMount::Problems { problems: list })
    }

    pub(super) fn report_rows(&mut self) -> Result<(), Error> {
        let epoch = self.observer.index.epoch();
        let mut observations = Vec::new();
        let mut bytes = 0;
        loop {
            let rows = self.observer.index.since(self.reported, self.whole, ROWS)?;
            let end = rows.len() < ROWS as usize;
            if rows.iter().any(|row| row.entry.is_none()) {
                // Deletions are reported only of a directory that is there to be seen.
                self.check_root()?;
            }
            for row in rows {
                self.reported = row.rev;
                let observation = Observation {
                    meaning: self.meaning(&row),
                    path: row.path,
                    entry: row.entry,
                    rev: row.rev,
                };
                let size = row_weight(&observation.path, observation.entry.as_ref());
                if bytes + size > PIECE && !observations.is_empty() {
                    let rev = observation.rev - 1;
                    self.send(ToMount::Observed {
                        observations: std::mem::take(&mut observations),
                        complete: false,
                        upto: Revision { epoch, rev },
                    })?;
                    bytes = 0;
                }
                bytes += size;
                observations.push(observation);
            }
            if end {
                break;
            }
        }
        self.whole = false;
        self.reported = self.observer.index.rev();
        self.send(ToMount::Observed {
            observations,
            complete: true,
            upto: self.revision(),
        })
    }

    /// What a Git index stages, so that one that was only refreshed is no news. Only of what
    /// the row tells, and not of what may have come since.
    fn meaning(&self, row: &Row) -> Option<ContentHash> {
        let Content::File { hash, size } = row.entry.as_ref()?.content else {
            return None;
        };
        if row.path.name() != b"index" || size > git::LARGEST_INDEX {
            return None;
        }
        let dir = self.observer.served.root.parent(&row.path).ok()?;
        let file = scan::open_file(dir.as_fd(), row.path.name()).ok()?;
        let mut bytes = Vec::new();
        file.take(size).read_to_end(&mut bytes).ok()?;
        if ContentHash::of(&bytes) != hash {
            return None;
        }
        git::meaning(&bytes)
    }

    pub(super) fn revision(&self) -> Revision {
        Revision {
            epoch: self.observer.index.epoch(),
            rev: self.observer.index.rev(),
        }
    }

    pub(super) fn drain(&mut self, token: u64) -> Result<(), Error> {
        // Who asks wants to hear of the directory that the peer's path names.
        self.check_root()?;
        let mut drain = Drain {
            token,
            cookie: None,
            large: HashMap::new(),
        };
        if self.observer.unwatched().is_some() {
            self.scan()?;
            self.drained_up_to_now(&mut drain)?;
        } else {
            self.cookies += 1;
            let name = format!("{COOKIE}{}", self.cookies);
            let path = || format!(".mirrorfs/{name}");
            let flags = rustix::fs::OFlags::WRONLY
                | rustix::fs::OFlags::CREATE
                | rustix::fs::OFlags::CLOEXEC;
            rustix::fs::openat(
                self.observer.reserved.dir(),
                &name,
                flags,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            )
            .map_err(|error| Error::io("create", path(), error))?;
            drain.cookie = Some(name.into_bytes());
        }
        self.drains.push(drain);
        Ok(())
    }

    /// The watch has come to where a drain asked it to come.
    pub(super) fn cookie(&mut self, name: &[u8]) -> Result<(), Error> {
        let name_text = String::from_utf8_lossy(name).into_owned();
        self.observer.reserved.remove_file(&name_text)?;
        let mut drains = std::mem::take(&mut self.drains);
        for drain in &mut drains {
            if drain.cookie.as_deref() == Some(name) {
                drain.cookie = None;
                self.drained_up_to_now(drain)?;
            }
        }
        self.drains = drains;
        Ok(())
    }

    pub(super) fn drained_up_to_now(&mut self, drain: &mut Drain) -> Result<(), Error> {
        self.check_displaced()?;
        self.observer.retry_problems();
        self.observer.process(true)?;
        let large = self.observer.large().iter();
        drain.large = large.map(|path| (path.clone(), 0)).collect();
        Ok(())
    }

    pub(super) fn answer_drains(&mut self) -> Result<(), Error> {
        for drain in &mut self.drains {
            let observer = &self.observer;
            drain
                .large
                .retain(|path, looks| *looks < LOOKS && observer.is_open(path));
        }
        let ready = |drain: &Drain| drain.cookie.is_none() && drain.large.is_empty();
        if !self.drains.iter().any(ready) {
            return Ok(());
        }
        // What did not hold still is said to be missing instead.
        self.observer.give_up_waiting();
        self.report(false)?;
        let (done, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.drains)
            .into_iter()
            .partition(ready);
        self.drains = waiting;
        for drain in done {
            self.send(ToMount::Drained { token: drain.token })?;
        }
        Ok(())
    }
}
