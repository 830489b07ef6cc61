//! Writing to the journal what is not a change of the tree. An [`Update`] is the
//! writer's transaction as a closure on its thread sees it.

mod peers;

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam_channel::Sender;
use rusqlite::OptionalExtension;

use crate::codec;
use crate::{ContentHash, Error, NodeId, Timestamp, View};

/// A transaction on the writer's thread. Reads what its own writes left.
pub struct Update<'w> {
    view: &'w View,
}

impl Deref for Update<'_> {
    type Target = View;

    fn deref(&self) -> &View {
        self.view
    }
}

/// A closure for the writer to run.
pub(crate) type Job = Box<dyn FnOnce(&Update<'_>) -> Option<Answer> + Send>;

/// What a closure returned, held until its transaction is through.
pub(crate) struct Answer {
    /// Whether the closure succeeded, so that what it wrote shall be kept; else the
    /// error's severity.
    pub(crate) verdict: Verdict,
    /// Hands the result to the caller, or the error that the commit ran into.
    pub(crate) send: Box<dyn FnOnce(Result<(), Error>) + Send>,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Keep,
    RollBack,
    /// The database failed underneath: nothing more can be promised.
    Poison(String),
}

/// Wraps a closure so that the writer need not know its result. The job returns
/// none if the closure panicked; the caller then sees its channel closed.
pub(crate) fn job<T, F>(change: F, reply: Sender<Result<T, Error>>) -> Job
where
    T: Send + 'static,
    F: FnOnce(&Update<'_>) -> Result<T, Error> + Send + 'static,
{
    Box::new(move |update| {
        // The transaction is rolled back after a panic, so no half-made state is seen.
        let result = catch_unwind(AssertUnwindSafe(|| change(update))).ok()?;
        let verdict = match &result {
            Ok(_) => Verdict::Keep,
            Err(error) if error.is_fatal() => Verdict::Poison(error.to_string()),
            Err(_) => Verdict::RollBack,
        };
        Some(Answer {
            verdict,
            send: Box::new(move |committed| {
                // A caller that is gone does not want to know.
                let _ = reply.send(committed.and(result));
            }),
        })
    })
}

impl<'w> Update<'w> {
    pub(crate) fn new(view: &'w View) -> Self {
        Self { view }
    }

    pub(crate) fn execute(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize, Error> {
        Ok(self.view.connection.prepare_cached(sql)?.execute(params)?)
    }

    /// Stores the digest of a node's content as it was at `content_n`. Does nothing
    /// and returns false if the content has changed since, or the node is gone.
    pub fn set_hash(&self, node: NodeId, content_n: u64, hash: ContentHash) -> Result<bool, Error> {
        let updated = self.execute(
            "UPDATE node SET hash = ?3, hash_n = content_n WHERE id = ?1 AND content_n = ?2",
            (node.0, content_n.cast_signed(), hash.0.as_slice()),
        )?;
        Ok(updated > 0)
    }

    /// Says whether a node is an artefact of a conflict, which stays local. False if
    /// the node is gone.
    pub fn set_artefact(&self, node: NodeId, artefact: bool) -> Result<bool, Error> {
        let updated = self.execute(
            "UPDATE node SET artefact = ?2 WHERE id = ?1",
            (node.0, artefact),
        )?;
        Ok(updated > 0)
    }

    /// Stores a value under a key.
    pub fn set_setting(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.execute(
            "INSERT INTO setting VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = excluded.value",
            (key, value),
        )?;
        Ok(())
    }

    /// Removes a key and its value.
    pub fn remove_setting(&self, key: &str) -> Result<(), Error> {
        self.execute("DELETE FROM setting WHERE key = ?1", [key])?;
        Ok(())
    }

    /// Forgets changes that every peer has in its base, that were recorded before
    /// `before`, and that are not among the newest `keep` numbers. Returns how many
    /// rows went. At most `limit` numbers go at once, so that the writer is not held
    /// up: call again while it returns any.
    ///
    /// A peer whose cursor is zero does not hold changes back: it has yet to see the
    /// whole tree, and [`touched`](View::touched) answers with that.
    pub fn compact(&self, before: Timestamp, keep: u64, limit: u64) -> Result<u64, Error> {
        let passed: Option<i64> = self
            .connection
            .prepare_cached("SELECT min(cursor) FROM peer WHERE cursor > 0")?
            .query_row([], |row| row.get(0))?;
        let newest = self.n().saturating_sub(keep);
        let upto = passed.map_or(newest, |n| newest.min(n.cast_unsigned()));
        self.forget(upto, before, limit)
    }

    /// The same whether every peer has them or not: one that has been away for so long is
    /// compared in full once it is back. For what lies beyond a number that nobody waits for.
    pub fn compact_unseen(&self, keep: u64, limit: u64) -> Result<u64, Error> {
        const EVER: Timestamp = Timestamp {
            secs: i64::MAX / 1000,
            nanos: 0,
        };
        self.forget(self.n().saturating_sub(keep), EVER, limit)
    }

    fn forget(&self, mut upto: u64, before: Timestamp, limit: u64) -> Result<u64, Error> {
        let oldest: Option<i64> = self
            .connection
            .prepare_cached("SELECT min(n) FROM change")?
            .query_row([], |row| row.get(0))?;
        let Some(oldest) = oldest else {
            return Ok(0);
        };
        upto = upto.min(
            oldest
                .cast_unsigned()
                .saturating_add(limit)
                .saturating_sub(1),
        );
        // Numbers are in the order of time: the first that is young enough ends it.
        let young: Option<i64> = self
            .connection
            .prepare_cached("SELECT n FROM change WHERE n <= ?2 AND at >= ?1 ORDER BY n LIMIT 1")?
            .query_row((codec::millis(before), upto.cast_signed()), |row| {
                row.get(0)
            })
            .optional()?;
        if let Some(young) = young {
            upto = upto.min(young.cast_unsigned().saturating_sub(1));
        }
        let removed = self.execute("DELETE FROM change WHERE n <= ?1", [upto.cast_signed()])?;
        if removed > 0 {
            self.execute(
                "UPDATE progress SET compacted_n = max(compacted_n, ?1)",
                [upto.cast_signed()],
            )?;
            self.execute(
                "DELETE FROM life WHERE id < (SELECT max(id) FROM life)
                 AND id < coalesce((SELECT min(life) FROM change), id + 1)",
                [],
            )?;
        }
        Ok(u64::try_from(removed).unwrap_or(u64::MAX))
    }
}
