//! The journal as a whole: opening, reading, updating, closing.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

use crate::checkpoint::Checkpointer;
use crate::recorder::{Command, Shared};
use crate::snapshot::Pool;
use crate::start::Opened;
use crate::update::job;
use crate::writer::Writer;
use crate::{Error, Mark, Recorder, Snapshot, Start, Update, View, start};

/// The name of the database in the journal's directory.
pub const DATABASE: &str = "journal.db";

/// How many records may wait for the writer before callers wait for it.
const QUEUE: usize = 65_536;

/// What a commit survives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// The death of the process. A power loss may take back the last commits.
    Normal,
    /// A power loss.
    Full,
}

/// How a journal is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JournalStatus {
    /// The last number issued.
    pub n: u64,
    /// The last number committed.
    pub committed: u64,
    /// How many commits since the opening were made to survive a power loss; each takes
    /// all before it along.
    pub durable_commits: u64,
    /// Records and requests waiting for the writer.
    pub queued: usize,
    /// Why it takes no more records.
    pub poisoned: Option<String>,
}

/// An open journal. Clones share it. When the last clone is dropped without
/// [`close`](Self::close), what was recorded is committed, but the next start counts
/// as unclean.
#[derive(Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    sender: Sender<Command>,
    pool: Pool,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Journal {
    /// Opens the journal in a directory that exists, or makes one there. A database
    /// that is damaged is moved aside and a fresh one started. The caller sees to it
    /// that no other process has it open.
    pub fn open(dir: &Path) -> Result<(Self, Start), Error> {
        Self::open_with_queue(dir, QUEUE)
    }

    pub(crate) fn open_with_queue(dir: &Path, queue: usize) -> Result<(Self, Start), Error> {
        let path = dir.join(DATABASE);
        let Opened {
            connection,
            start,
            life,
        } = start::open(&path)?;
        let shared = Arc::new(Shared::default());
        shared.last.store(start.last, Ordering::Release);
        shared.committed.store(start.last, Ordering::Release);
        let checkpointer = Checkpointer::start(&path, Arc::clone(&shared))?;
        let (sender, receiver) = bounded(queue);
        let pool = Pool::new(&path);
        let writer = Writer::new(
            View::new(connection)?,
            life,
            receiver,
            Arc::clone(&shared),
            pool.clone(),
            checkpointer,
        );
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || writer.run())
            .map_err(|source| Error::Thread {
                name: "writer",
                source,
            })?;
        // Nobody can have sent anything yet, so nothing reads it before it is set.
        let _ = shared.writer.set(thread.thread().clone());
        let inner = Inner {
            shared,
            sender,
            pool,
            writer: Mutex::new(Some(thread)),
        };
        Ok((
            Self {
                inner: Arc::new(inner),
            },
            start,
        ))
    }

    /// A way in for changes.
    pub fn recorder(&self) -> Recorder {
        Recorder {
            shared: Arc::clone(&self.inner.shared),
            sender: self.inner.sender.clone(),
        }
    }

    /// The recorded tree as it was at the mark: everything recorded before it and
    /// nothing after. Waits for the writer to get there. A mark has one snapshot.
    pub fn snapshot_at(&self, mark: Mark) -> Result<Snapshot, Error> {
        match mark.snapshot.recv() {
            Ok(snapshot) => snapshot,
            Err(_) => {
                self.inner.shared.check()?;
                Err(Error::MarkTaken { n: mark.n })
            }
        }
    }

    /// The recorded tree as it is now.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        self.refuse_reentry()?;
        let mark = self.recorder().mark()?;
        self.snapshot_at(mark)
    }

    /// The recorded tree as it was committed last, which may lack the newest records. For
    /// showing how things are: unlike [`snapshot`](Self::snapshot) it needs no writer, so
    /// that it can be had of a journal that takes no more records.
    pub fn committed(&self) -> Result<Snapshot, Error> {
        self.inner.pool.snapshot()
    }

    /// Runs `change` on the writer's thread, after everything recorded before the
    /// call, in a transaction of its own, and returns once that is committed. If it
    /// returns an error or panics, nothing of it is kept. It must not wait for
    /// anything that records: the writer stands still meanwhile.
    pub fn update<T, F>(&self, durability: Durability, change: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Update<'_>) -> Result<T, Error> + Send + 'static,
    {
        self.inner.shared.check()?;
        self.refuse_reentry()?;
        let (reply, answer) = bounded(1);
        let update = Command::Update {
            durability,
            job: job(change, reply),
        };
        self.inner.shared.send(&self.inner.sender, update)?;
        match answer.recv() {
            Ok(result) => result,
            Err(_) => {
                self.inner.shared.check()?;
                Err(Error::UpdatePanicked)
            }
        }
    }

    /// How far it is.
    pub fn status(&self) -> JournalStatus {
        let shared = &self.inner.shared;
        JournalStatus {
            n: shared.last.load(Ordering::Acquire),
            committed: shared.committed.load(Ordering::Acquire),
            durable_commits: shared.durable_commits.load(Ordering::Acquire),
            queued: self.inner.sender.len(),
            poisoned: shared.poisoned.get().cloned(),
        }
    }

    /// Has `watcher` called with the newest committed number after each commit that
    /// holds a record. It runs on the writer's thread: it may only wake somebody.
    pub fn on_commit(&self, watcher: impl Fn(u64) + Send + Sync + 'static) {
        self.inner
            .shared
            .watchers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(watcher));
    }

    /// Commits everything durably, empties the write-ahead log and marks the journal
    /// as closed. After it, records are refused, also from other clones.
    pub fn close(&self) -> Result<(), Error> {
        self.refuse_reentry()?;
        let (reply, answer) = bounded(1);
        let result = match self
            .inner
            .shared
            .close(&self.inner.sender, Command::Close { reply })
        {
            Ok(()) => answer
                .recv()
                .unwrap_or_else(|_| Err(self.inner.shared.cause().into())),
            Err(poisoned) => Err(poisoned.into()),
        };
        self.inner.join();
        result
    }

    /// Waiting for the writer on the writer's own thread would never end.
    fn refuse_reentry(&self) -> Result<(), Error> {
        if self.inner.shared.is_writer() {
            return Err(Error::Reentrant);
        }
        Ok(())
    }
}

impl Inner {
    fn join(&self) {
        let thread = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the journal's writer panicked");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Refused if it was closed or poisoned: then the writer ends, if it has not.
        let _ = self.shared.close(&self.sender, Command::Stop);
        // An update that holds the last clone drops it on the writer's thread.
        if !self.shared.is_writer() {
            self.join();
        }
    }
}
