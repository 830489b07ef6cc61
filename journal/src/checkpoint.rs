//! Moving committed pages from the write-ahead log into the database, away from the
//! writer, whose commits would otherwise stall for it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use rusqlite::Connection;

use crate::Error;
use crate::recorder::Shared;
use crate::schema::{self, Use};

/// What the writer asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Checkpoint {
    /// Copies what it can without being in anybody's way.
    Passive,
    /// Copies everything and empties the log; gives up at once if a reader or the
    /// writer is busy.
    Truncate,
}

impl Checkpoint {
    /// Runs it on a connection. Returns how many frames the log holds after it, or
    /// zero if all of them have been copied: the next commit then starts it over.
    pub(crate) fn run(self, connection: &Connection) -> Result<u64, Error> {
        let sql = match self {
            Self::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
            Self::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
        };
        let mut statement = connection.prepare_cached(sql)?;
        let (frames, copied): (i64, i64) =
            statement.query_row([], |row| Ok((row.get(1)?, row.get(2)?)))?;
        Ok(if copied >= frames {
            0
        } else {
            u64::try_from(frames).unwrap_or(0)
        })
    }
}

/// The thread and the way to it.
pub(crate) struct Checkpointer {
    requests: Option<Sender<Checkpoint>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    pub(crate) fn start(path: &Path, shared: Arc<Shared>) -> Result<Self, Error> {
        let connection = schema::connect(path, Use::Checkpoint)?;
        // One request waits at most: a second would find the same log.
        let (requests, receiver) = bounded(1);
        let path = path.to_owned();
        let thread = std::thread::Builder::new()
            .name("journal-checkpoint".to_owned())
            .spawn(move || run(&connection, &path, &receiver, &shared))
            .map_err(|source| Error::Thread {
                name: "checkpoint",
                source,
            })?;
        Ok(Self {
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    /// Asks without waiting.
    pub(crate) fn request(&self, checkpoint: Checkpoint) {
        if let Some(requests) = &self.requests {
            let _ = requests.try_send(checkpoint);
        }
    }

    /// Ends the thread after the checkpoint it is at.
    pub(crate) fn stop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's checkpoint thread panicked");
        }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(connection: &Connection, path: &Path, requests: &Receiver<Checkpoint>, shared: &Shared) {
    for checkpoint in requests {
        match checkpoint.run(connection) {
            Ok(frames) => shared.log_frames.store(frames, Ordering::Relaxed),
            Err(error) if is_no_room(&error) => {
                // Everything is still in the log. If that finds no room either, the
                // writer's own commit says so.
                tracing::warn!(path = %path.display(), %error, "the journal cannot be checkpointed");
            }
            Err(error) if error.is_fatal() => {
                // A failed sync may have dropped pages that look written: whatever the
                // next one says, it proves nothing.
                tracing::error!(path = %path.display(), %error, "checkpoint failed");
                let _ = shared.poisoned.set(format!("checkpoint: {error}"));
                return;
            }
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "checkpoint put off");
            }
        }
    }
}

fn is_no_room(error: &Error) -> bool {
    matches!(error, Error::Sqlite(error)
        if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
}
