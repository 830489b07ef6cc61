//! The way in for changes: a bounded channel to the writer.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::Thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::room::Room;
use crate::snapshot::Snapshot;
use crate::update::Job;
use crate::{Change, Durability, Error, Origin, Poisoned};

/// What is sent to the writer. The order in the channel is the order of the numbers.
pub(crate) enum Command {
    Record {
        n: u64,
        origin: Origin,
        change: Change,
    },
    Mark {
        reply: Sender<Result<Snapshot, Error>>,
    },
    Durable {
        reply: Sender<Result<(), Poisoned>>,
    },
    Update {
        durability: Durability,
        job: Job,
    },
    Close {
        reply: Sender<Result<(), Error>>,
    },
    /// The last [`Journal`](crate::Journal) is gone: commit and end, unclean.
    Stop,
}

/// Called with the newest committed number.
pub(crate) type Watcher = Box<dyn Fn(u64) + Send + Sync>;

/// What all parts of one journal share.
#[derive(Default)]
pub(crate) struct Shared {
    /// The last number issued, and the lock under which numbers are issued and sent.
    issued: Mutex<()>,
    pub(crate) last: AtomicU64,
    pub(crate) committed: AtomicU64,
    /// For what large records have on them.
    pub(crate) room: Room,
    /// Callers of `durable` whose request the writer has not read yet.
    pub(crate) durable_waiting: AtomicUsize,
    /// Commits that survive a power loss.
    pub(crate) durable_commits: AtomicU64,
    /// Frames in the write-ahead log after the last checkpoint.
    pub(crate) log_frames: AtomicU64,
    /// Why nothing is recorded any more.
    pub(crate) poisoned: OnceLock<String>,
    /// Set, under the lock, once the last command has been sent.
    closed: AtomicBool,
    pub(crate) writer: OnceLock<Thread>,
    /// Somebody waits for what the writer does with the commands in the channel.
    pub(crate) hurry: AtomicBool,
    pub(crate) watchers: RwLock<Vec<Watcher>>,
}

impl Shared {
    fn issue(&self) -> MutexGuard<'_, ()> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error that everybody gets once nothing can be recorded any more.
    pub(crate) fn cause(&self) -> Poisoned {
        Poisoned(
            self.poisoned
                .get()
                .map_or("it was closed", String::as_str)
                .to_owned(),
        )
    }

    pub(crate) fn check(&self) -> Result<(), Poisoned> {
        if self.poisoned.get().is_some() || self.closed.load(Ordering::Acquire) {
            return Err(self.cause());
        }
        Ok(())
    }

    /// Sends a command whose sender waits for what comes of it.
    pub(crate) fn send(&self, sender: &Sender<Command>, command: Command) -> Result<(), Poisoned> {
        match sender.try_send(command) {
            Ok(()) => self.hurry(),
            Err(TrySendError::Full(command)) => {
                self.hurry();
                sender.send(command).map_err(|_| self.cause())?;
                self.hurry();
            }
            Err(TrySendError::Disconnected(_)) => return Err(self.cause()),
        }
        Ok(())
    }

    /// Whether this is the writer's thread.
    pub(crate) fn is_writer(&self) -> bool {
        let current = std::thread::current().id();
        self.writer
            .get()
            .is_some_and(|writer| writer.id() == current)
    }

    /// Makes the writer look at the channel now.
    fn hurry(&self) {
        self.hurry.store(true, Ordering::Release);
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    /// Sends the last command. Nothing that was given a number comes after it.
    pub(crate) fn close(&self, sender: &Sender<Command>, last: Command) -> Result<(), Poisoned> {
        let _issuing = self.issue();
        if let Err(poisoned) = self.check() {
            // Poisoned by a checkpoint, the writer still waits for what comes. If it has
            // ended, nobody has to tell it.
            let _ = self.send(sender, Command::Stop);
            return Err(poisoned);
        }
        self.closed.store(true, Ordering::Release);
        self.send(sender, last)
    }
}

/// Records changes. Cheap to clone; all clones feed the same stream.
#[derive(Clone)]
pub struct Recorder {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sender: Sender<Command>,
}

/// A position in the stream of records. While one is kept and its snapshot not
/// taken, the write-ahead log cannot shrink: drop marks that are not needed.
#[derive(Clone)]
pub struct Mark {
    /// The last number issued before it.
    pub n: u64,
    pub(crate) snapshot: Receiver<Result<Snapshot, Error>>,
}

impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mark({})", self.n)
    }
}

impl Recorder {
    /// Records a change that has taken effect and returns its number. Waits while
    /// the queue is full, of records or of bytes. Numbers are in the order of the calls: a caller that needs
    /// two changes in an order calls under its own lock.
    pub fn record(&self, origin: Origin, change: Change) -> Result<u64, Poisoned> {
        self.shared.room.take(&change, || self.shared.hurry());
        // The lock is held while waiting for room: whoever comes next waits anyway.
        let issuing = self.shared.issue();
        if let Err(poisoned) = self.shared.check() {
            self.shared.room.give(&change);
            return Err(poisoned);
        }
        let n = self.shared.last.load(Ordering::Relaxed) + 1;
        let record = Command::Record { n, origin, change };
        match self.sender.try_send(record) {
            Ok(()) => {}
            Err(TrySendError::Full(record)) => self.shared.send(&self.sender, record)?,
            Err(TrySendError::Disconnected(_)) => return Err(self.shared.cause()),
        }
        self.shared.last.store(n, Ordering::Release);
        drop(issuing);
        Ok(n)
    }

    /// Marks this position: [`Journal::snapshot_at`](crate::Journal::snapshot_at)
    /// then shows exactly what was recorded before.
    pub fn mark(&self) -> Result<Mark, Poisoned> {
        let (reply, snapshot) = bounded(1);
        let issuing = self.shared.issue();
        self.shared.check()?;
        let n = self.shared.last.load(Ordering::Relaxed);
        self.shared.send(&self.sender, Command::Mark { reply })?;
        drop(issuing);
        Ok(Mark { n, snapshot })
    }

    /// The last number issued.
    pub fn last(&self) -> u64 {
        self.shared.last.load(Ordering::Acquire)
    }

    /// Returns once everything recorded before the call survives a power loss.
    /// Callers that come together share one commit.
    pub fn durable(&self) -> Result<(), Poisoned> {
        self.begin_durable()?.wait()
    }

    /// Asks for what [`durable`](Self::durable) waits for, so that the caller can do
    /// something else meanwhile.
    pub fn begin_durable(&self) -> Result<Barrier<'_>, Poisoned> {
        self.shared.check()?;
        let (reply, answer) = bounded(1);
        self.shared.durable_waiting.fetch_add(1, Ordering::Relaxed);
        self.shared
            .send(&self.sender, Command::Durable { reply })
            .inspect_err(|_| {
                self.shared.durable_waiting.fetch_sub(1, Ordering::Relaxed);
            })?;
        Ok(Barrier {
            shared: &self.shared,
            answer,
        })
    }
}

/// A commit that was asked for with [`Recorder::begin_durable`].
#[must_use = "nothing is durable before it was waited for"]
pub struct Barrier<'a> {
    shared: &'a Shared,
    answer: Receiver<Result<(), Poisoned>>,
}

impl Barrier<'_> {
    /// Returns once everything recorded before it was asked for survives a power loss.
    pub fn wait(self) -> Result<(), Poisoned> {
        self.answer
            .recv()
            .unwrap_or_else(|_| Err(self.shared.cause()))
    }
}

impl std::fmt::Debug for Barrier<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Barrier")
    }
}
