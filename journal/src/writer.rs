//! The one thread that writes: drains the channel, commits in groups.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::apply::Apply;
use crate::checkpoint::{Checkpoint, Checkpointer};
use crate::coalesce::{Write, Writes};
use crate::recorder::{Command, Shared};
use crate::snapshot::Pool;
use crate::update::{Job, Update, Verdict};
use crate::{Change, Durability, Error, Origin, Poisoned, Timestamp, View, codec};

/// A group is committed at the latest when it has this many records,
const GROUP: usize = 8192;
/// or is this old.
const GROUP_AGE: Duration = Duration::from_millis(50);
/// A group that is younger waits for more records, unless somebody waits for the commit.
const LINGER: Duration = Duration::from_millis(2);
/// How long the writer waits between two tries to get at a locked database.
const TRY_EVERY: Duration = Duration::from_millis(5);
const A_MINUTE_OF_TRIES: i32 = 12_000;
/// Records between two requests for a checkpoint.
const CHECKPOINT_EVERY: usize = 4096;
/// With nothing to do for so long, the log is emptied.
const IDLE: Duration = Duration::from_secs(2);
/// From this many frames (64 MiB) on the log has outgrown the checkpoint thread,
/// which never catches up with a writer that never pauses. The writer then does one
/// itself: while it does, nothing is added, so the log starts over.
const LOG_FRAMES: u64 = 16_384;

pub(crate) struct Writer {
    view: View,
    /// Key of this life of the journal.
    life: i64,
    receiver: Receiver<Command>,
    shared: Arc<Shared>,
    pool: Pool,
    checkpointer: Checkpointer,
    group: Group,
    /// Callers of `durable` to be answered by the next commit.
    waiting: Vec<Sender<Result<(), Poisoned>>>,
    /// What `PRAGMA synchronous` is at. It cannot be changed within a transaction.
    level: Durability,
    /// The last number taken in.
    last: u64,
    /// Records since a checkpoint was asked for.
    since_checkpoint: usize,
    /// Something was committed after the log was last emptied.
    log_in_use: bool,
    /// At how many frames the writer does the next checkpoint itself.
    log_limit: u64,
}

/// The transaction that is open, and what of it is not in the tables yet.
#[derive(Default)]
struct Group {
    open: bool,
    started: Option<Instant>,
    /// The `at` of its records: milliseconds since 1970.
    at: i64,
    records: usize,
    writes: Writes,
}

/// Whether the writer goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    /// Take the next command into the group.
    More,
    /// Commit first.
    Commit,
    End,
}

impl Writer {
    pub(crate) fn new(
        view: View,
        life: i64,
        receiver: Receiver<Command>,
        shared: Arc<Shared>,
        pool: Pool,
        checkpointer: Checkpointer,
    ) -> Self {
        let last = view.n();
        Self {
            view,
            life,
            receiver,
            shared,
            pool,
            checkpointer,
            group: Group::default(),
            waiting: Vec::new(),
            level: Durability::Full,
            last,
            since_checkpoint: 0,
            log_in_use: true,
            log_limit: LOG_FRAMES,
        }
    }

    /// Runs until the journal is closed or dropped.
    pub(crate) fn run(mut self) {
        let result = self.serve();
        if let Err(error) = result {
            self.poison(&error);
        }
        // From here on senders find the channel closed, and get the cause.
    }

    fn serve(&mut self) -> Result<(), Error> {
        // Only a checkpoint of ours keeps this thread out, for as long as the disk stands
        // still. Whoever makes changes waits meanwhile, and nothing has failed.
        self.view.connection.busy_handler(Some(stand_by))?;
        loop {
            let first = if self.log_in_use {
                match self.receiver.recv_timeout(IDLE) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => {
                        self.idle();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            } else {
                match self.receiver.recv() {
                    Ok(command) => command,
                    Err(_) => return Ok(()),
                }
            };
            if self.group_from(first)? == Flow::End {
                return Ok(());
            }
        }
    }

    /// Takes commands as long as there are any, waits for more while the group is young,
    /// and commits. A commit costs as much as dozens of records.
    fn group_from(&mut self, first: Command) -> Result<Flow, Error> {
        let mut flow = self.take(first)?;
        let mut lingered = false;
        while flow == Flow::More && !self.group_is_full() {
            match self.receiver.try_recv() {
                Ok(command) => flow = self.take(command)?,
                Err(_) if self.group.open && !lingered => {
                    self.linger();
                    lingered = true;
                }
                Err(_) => break,
            }
        }
        if flow != Flow::End {
            self.commit()?;
        }
        Ok(flow)
    }

    /// Sleeps until the group is no longer young, or somebody is in a hurry. Not in the
    /// channel: there each record would wake this thread, at the expense of whoever made
    /// it.
    fn linger(&self) {
        let Some(started) = self.group.started else {
            return;
        };
        while !self.shared.hurry.swap(false, Ordering::Acquire) {
            let left = LINGER.saturating_sub(started.elapsed());
            if left.is_zero() {
                return;
            }
            std::thread::park_timeout(left);
        }
    }

    fn group_is_full(&self) -> bool {
        self.group.records >= GROUP
            || self
                .group
                .started
                .is_some_and(|started| started.elapsed() >= GROUP_AGE)
    }

    fn take(&mut self, command: Command) -> Result<Flow, Error> {
        match command {
            Command::Record { n, origin, change } => {
                self.shared.room.give(&change);
                self.record(n, origin, change)?;
                Ok(Flow::More)
            }
            Command::Durable { reply } => {
                self.shared.durable_waiting.fetch_sub(1, Ordering::Relaxed);
                self.waiting.push(reply);
                // Others that are about to ask share the commit.
                if self.shared.durable_waiting.load(Ordering::Relaxed) > 0 {
                    Ok(Flow::More)
                } else {
                    Ok(Flow::Commit)
                }
            }
            Command::Mark { reply } => {
                self.commit()?;
                // The read transaction is opened here, so it shows exactly what is
                // committed, and nobody has to be waited for. If the mark is gone it
                // is dropped with the channel.
                let _ = reply.send(self.pool.snapshot());
                Ok(Flow::More)
            }
            Command::Update { durability, job } => {
                self.commit()?;
                self.update(durability, job)?;
                Ok(Flow::More)
            }
            Command::Stop => {
                self.commit()?;
                Ok(Flow::End)
            }
            Command::Close { reply } => {
                let closed = self.close();
                if let Err(error) = &closed {
                    self.set_cause(error);
                }
                let _ = reply.send(closed);
                Ok(Flow::End)
            }
        }
    }

    fn begin(&mut self) -> Result<(), Error> {
        if self.group.open {
            return Ok(());
        }
        // Somebody is about to ask for durability: one commit instead of two.
        let level = if self.shared.durable_waiting.load(Ordering::Relaxed) > 0 {
            Durability::Full
        } else {
            Durability::Normal
        };
        self.set_level(level)?;
        self.view
            .connection
            .prepare_cached("BEGIN IMMEDIATE")?
            .execute([])?;
        self.group.open = true;
        self.group.started = Some(Instant::now());
        self.group.at = codec::millis(Timestamp::now());
        Ok(())
    }

    fn set_level(&mut self, level: Durability) -> Result<(), Error> {
        if self.level != level {
            self.view.connection.execute_batch(match level {
                Durability::Normal => "PRAGMA synchronous = NORMAL",
                Durability::Full => "PRAGMA synchronous = FULL",
            })?;
            self.level = level;
        }
        Ok(())
    }

    fn record(&mut self, n: u64, origin: Origin, change: Change) -> Result<(), Error> {
        self.begin()?;
        self.group.records += 1;
        self.last = n;
        if let Change::Write {
            ino,
            offset,
            len,
            attr,
        } = change
        {
            let write = Write {
                n,
                origin,
                start: offset,
                end: offset.saturating_add(len),
                attr,
            };
            return match self.group.writes.add(ino, write) {
                Some(before) => self.apply(before.into_change(ino)),
                None => Ok(()),
            };
        }
        for ino in change.nodes().into_iter().flatten() {
            if let Some(write) = self.group.writes.take(ino) {
                self.apply(write.into_change(ino))?;
            }
        }
        self.apply((n, origin, change))
    }

    fn apply(&self, (n, origin, change): (u64, Origin, Change)) -> Result<(), Error> {
        Apply {
            connection: &self.view.connection,
            life: self.life,
            at: self.group.at,
            n,
            origin,
        }
        .apply(change)
    }

    /// Ends the group: everything taken in so far is committed, durably if somebody
    /// waits for that.
    fn commit(&mut self) -> Result<(), Error> {
        self.try_commit().inspect_err(|error| self.set_cause(error))
    }

    /// Names the cause before any waiting caller finds its channel closed.
    fn set_cause(&self, error: &Error) {
        let _ = self.shared.poisoned.set(error.to_string());
    }

    fn try_commit(&mut self) -> Result<(), Error> {
        let mut full = false;
        if self.group.open {
            for (ino, write) in self.group.writes.drain() {
                self.apply(write.into_change(ino))?;
            }
            self.view
                .connection
                .prepare_cached("UPDATE progress SET last_n = ?1")?
                .execute([self.last.cast_signed()])?;
            self.commit_transaction()?;
            full = self.level == Durability::Full;
            self.since_checkpoint += self.group.records;
            self.group = Group::default();
            self.view.advance(self.last);
            self.shared.committed.store(self.last, Ordering::Release);
            self.announce();
        }
        if !self.waiting.is_empty() {
            if !full {
                self.barrier()?;
            }
            for waiting in self.waiting.drain(..) {
                let _ = waiting.send(Ok(()));
            }
        }
        self.checkpoint()
    }

    fn commit_transaction(&mut self) -> Result<(), Error> {
        self.view.connection.prepare_cached("COMMIT")?.execute([])?;
        self.log_in_use = true;
        if self.level == Durability::Full {
            self.shared.durable_commits.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    /// A commit that has nothing to write but syncs the log, and with it all commits
    /// before.
    fn barrier(&mut self) -> Result<(), Error> {
        self.set_level(Durability::Full)?;
        let connection = &self.view.connection;
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        connection
            .prepare_cached("UPDATE progress SET barrier = barrier + 1")?
            .execute([])?;
        self.commit_transaction()
    }

    fn announce(&self) {
        let watchers = self
            .shared
            .watchers
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        for watcher in watchers.iter() {
            watcher(self.last);
        }
    }

    fn update(&mut self, durability: Durability, job: Job) -> Result<(), Error> {
        self.begin_update(durability)
            .inspect_err(|error| self.set_cause(error))?;
        let Some(answer) = job(&Update::new(&self.view)) else {
            tracing::error!("an update of the journal panicked; it was rolled back");
            return self.roll_back();
        };
        match answer.verdict {
            Verdict::Keep => match self.commit_transaction() {
                Ok(()) => {
                    (answer.send)(Ok(()));
                    self.since_checkpoint += 1;
                    Ok(())
                }
                Err(error) => {
                    self.set_cause(&error);
                    (answer.send)(Err(self.shared.cause().into()));
                    Err(error)
                }
            },
            Verdict::RollBack => {
                let rolled_back = self.roll_back();
                (answer.send)(Ok(()));
                rolled_back
            }
            Verdict::Poison(cause) => {
                let _ = self.shared.poisoned.set(cause.clone());
                (answer.send)(Ok(()));
                Err(Poisoned(cause).into())
            }
        }
    }

    fn begin_update(&mut self, durability: Durability) -> Result<(), Error> {
        self.set_level(durability)?;
        self.view
            .connection
            .prepare_cached("BEGIN IMMEDIATE")?
            .execute([])?;
        Ok(())
    }

    fn roll_back(&self) -> Result<(), Error> {
        // After some errors SQLite has done so by itself.
        if !self.view.connection.is_autocommit() {
            self.view
                .connection
                .prepare_cached("ROLLBACK")?
                .execute([])?;
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        let frames = self.shared.log_frames.load(Ordering::Relaxed);
        if frames >= self.log_limit {
            let left = Checkpoint::Passive.run(&self.view.connection)?;
            self.shared.log_frames.store(0, Ordering::Relaxed);
            // A reader that pins the log makes this useless: then not at each commit.
            self.log_limit = left.saturating_add(LOG_FRAMES);
            self.since_checkpoint = 0;
        } else if self.since_checkpoint >= CHECKPOINT_EVERY {
            self.checkpointer.request(Checkpoint::Passive);
            self.since_checkpoint = 0;
        }
        if let Some(cause) = self.shared.poisoned.get() {
            return Err(Poisoned(cause.clone()).into());
        }
        Ok(())
    }

    fn idle(&mut self) {
        if self.log_in_use {
            self.checkpointer.request(Checkpoint::Truncate);
            self.log_in_use = false;
            self.log_limit = LOG_FRAMES;
        }
    }

    /// Leaves a database that needs no recovery and says so.
    fn close(&mut self) -> Result<(), Error> {
        self.commit()?;
        self.checkpointer.stop();
        self.pool.clear();
        self.set_level(Durability::Full)?;
        self.view
            .connection
            .execute("UPDATE life SET clean = 1 WHERE id = ?1", [self.life])?;
        // A snapshot that is still open keeps the log from being emptied; it is complete
        // all the same, so that is not worth waiting for.
        self.view.connection.busy_timeout(Duration::ZERO)?;
        Checkpoint::Truncate.run(&self.view.connection)?;
        Ok(())
    }

    /// Nothing is recorded any more, and everybody who waits is told why.
    fn poison(&mut self, error: &Error) {
        tracing::error!(%error, "the journal takes no more records");
        self.set_cause(error);
        let cause = self.shared.cause();
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(Err(cause.clone()));
        }
        for command in self.receiver.try_iter() {
            match command {
                Command::Durable { reply } => drop(reply.send(Err(cause.clone()))),
                Command::Mark { reply } => drop(reply.send(Err(cause.clone().into()))),
                Command::Close { reply } => drop(reply.send(Err(cause.clone().into()))),
                Command::Record { .. } | Command::Update { .. } | Command::Stop => {}
            }
        }
    }
}

/// Waits before the next try to get a lock that somebody has, and never gives up.
fn stand_by(tries_before: i32) -> bool {
    if tries_before == A_MINUTE_OF_TRIES {
        tracing::warn!("the journal has been locked for a minute: does its disk stand still?");
    }
    std::thread::sleep(TRY_EVERY);
    true
}

impl Drop for Writer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self
                .shared
                .poisoned
                .set("its writer panicked, see the log".to_owned());
        }
        self.shared.room.end();
    }
}

#[cfg(test)]
mod tests;
