//! The agreements that were made with another replica, one after the other, and the base
//! as it was at each of them.
//!
//! The journal keeps a chain for each peer, the agent's index one for each mounted side
//! that it has served; both work on the same tables. `base` holds the base of the newest
//! agreement whose base is known. `base_undo` holds, for each agreement, what it replaced,
//! so that the base of any earlier one can be had by going backwards.
//!
//! The tables are made by the migrations of either database.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};

use crate::codec::{self, encode};
use crate::view::below;
use crate::{Agreement, BaseChange, Entry, Error, Id, NodeId, RelPath, Timestamp};

/// How many changes of a base are kept for going back, at the most.
pub const UNDO_MAX: u64 = 1_000_000;
/// How many agreements are kept, at the most.
pub const LINKS_MAX: u64 = 200_000;

/// An agreement in a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChainLink {
    /// The agreement.
    pub agreement: Agreement,
    /// Whether whoever keeps the chain can tell the base of it.
    pub based: bool,
}

/// An agreement that is in two chains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Common {
    /// The agreement.
    pub agreement: Agreement,
    /// Whether our side can tell its base.
    pub ours: bool,
    /// Whether the other side can.
    pub theirs: bool,
}

/// The last agreement that two chains share and whose base at least one of them knows.
/// Both are given with the newest first.
///
/// Whatever happened to either side, a tree that has gone through an agreement consists of
/// the base of it and of what was changed since. So the base of the last one that both have
/// gone through is the right third leg of every decision.
pub fn last_common(ours: &[ChainLink], theirs: &[ChainLink]) -> Option<Common> {
    let known: HashMap<Id, bool> = theirs
        .iter()
        .map(|link| (link.agreement.nonce, link.based))
        .collect();
    ours.iter().find_map(|link| {
        let theirs = *known.get(&link.agreement.nonce)?;
        (link.based || theirs).then_some(Common {
            agreement: link.agreement,
            ours: link.based,
            theirs,
        })
    })
}

/// The base that holds when the given steps were not carried out: whatever stands on one
/// of them, or lies below a move that failed, is left out.
pub fn base_without(base: &[(BaseChange, Vec<u32>)], diverged: &BTreeSet<u32>) -> Vec<BaseChange> {
    let failed = |on: &[u32]| on.iter().any(|op| diverged.contains(op));
    let failed_moves: Vec<&RelPath> = base
        .iter()
        .filter_map(|(change, on)| match change {
            BaseChange::Move { to, .. } if failed(on) => Some(to),
            _ => None,
        })
        .collect();
    base.iter()
        .filter(|(change, on)| {
            let at = match change {
                BaseChange::Put { path, .. } | BaseChange::Remove { path } => path,
                BaseChange::Move { to, .. } => to,
            };
            !failed(on) && !failed_moves.iter().any(|to| at.starts_with(to))
        })
        .map(|(change, _)| change.clone())
        .collect()
}

/// How the agreement that a tree is marked with fits the chain that is kept of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Marked {
    /// It is the last one, or neither has any.
    Last,
    /// It is an earlier one: the tree was brought back from a copy.
    Earlier,
    /// The chain does not know it: what keeps the chain was brought back from a copy, or
    /// lost.
    Unknown,
    /// The tree is marked with none: it is of a time before the first.
    Missing,
}

/// One chain with its base.
pub(crate) struct Chain<'c> {
    connection: &'c Connection,
    key: i64,
}

impl<'c> Chain<'c> {
    pub(crate) fn new(connection: &'c Connection, key: i64) -> Self {
        Self { connection, key }
    }

    /// The agreements, the newest first.
    pub(crate) fn links(&self) -> Result<Vec<ChainLink>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT agreement, based FROM agreed WHERE peer = ?1 ORDER BY position DESC",
        )?;
        let mut rows = statement.query([self.key])?;
        let mut links = Vec::new();
        while let Some(row) = rows.next()? {
            links.push(ChainLink {
                agreement: agreement(row.get_ref(0)?)?,
                based: row.get(1)?,
            });
        }
        Ok(links)
    }

    /// The newest agreement.
    pub(crate) fn last(&self) -> Result<Option<ChainLink>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT agreement, based FROM agreed WHERE peer = ?1 ORDER BY position DESC LIMIT 1",
        )?;
        let mut rows = statement.query([self.key])?;
        match rows.next()? {
            None => Ok(None),
            Some(row) => Ok(Some(ChainLink {
                agreement: agreement(row.get_ref(0)?)?,
                based: row.get(1)?,
            })),
        }
    }

    /// Whether the newest agreement is not among those whose base is known.
    pub(crate) fn lacks_base(&self) -> Result<bool, Error> {
        Ok(self.last()?.is_some_and(|last| !last.based))
    }

    /// Adds an agreement, of which `base` holds the base. What it replaced was written down
    /// by [`Self::change`].
    pub(crate) fn agree(&self, agreement: &Agreement, at: Timestamp) -> Result<(), Error> {
        self.run(
            "DELETE FROM agreed WHERE peer = ?1 AND position >= ?2",
            (self.key, position(agreement)),
        )?;
        self.run(
            "INSERT INTO agreed VALUES (?1, ?2, ?3, 1, ?4)",
            (
                self.key,
                position(agreement),
                encode("an agreement", agreement)?,
                codec::millis(at),
            ),
        )
    }

    /// Goes back to an earlier agreement, with its base. False, and nothing happens, if it
    /// is not in the chain, or only without a base.
    pub(crate) fn rewind(&self, to: &Agreement) -> Result<bool, Error> {
        let Some(at) = self.position_of(to, true)? else {
            return Ok(false);
        };
        // The earliest thing that a path was changed from after the agreement is what it
        // showed at it. SQLite takes the other columns from the row of the minimum.
        let mut statement = self.connection.prepare_cached(
            "SELECT path, node, entry, min(position) FROM base_undo
             WHERE peer = ?1 AND position > ?2 GROUP BY path",
        )?;
        let mut rows = statement.query((self.key, at))?;
        let mut back = Vec::new();
        while let Some(row) = rows.next()? {
            back.push((
                row.get::<_, Vec<u8>>(0)?,
                row.get::<_, Option<i64>>(1)?,
                row.get::<_, Option<Vec<u8>>>(2)?,
            ));
        }
        drop(rows);
        for (path, node, entry) in back {
            match entry {
                None => self.run(
                    "DELETE FROM base WHERE peer = ?1 AND path = ?2",
                    (self.key, path),
                )?,
                Some(entry) => self.run(
                    "INSERT OR REPLACE INTO base VALUES (?1, ?2, ?3, ?4)",
                    (self.key, path, node, entry),
                )?,
            }
        }
        self.run(
            "DELETE FROM base_undo WHERE peer = ?1 AND position > ?2",
            (self.key, at),
        )?;
        self.run(
            "DELETE FROM agreed WHERE peer = ?1 AND position > ?2",
            (self.key, at),
        )?;
        Ok(true)
    }

    /// Takes up what the tree itself says it holds. Returns how that fits; the chain then
    /// ends with it.
    pub(crate) fn take_mark(
        &self,
        mark: Option<&Agreement>,
        at: Timestamp,
    ) -> Result<Marked, Error> {
        let last = self.last()?;
        let Some(mark) = mark else {
            if last.is_none() {
                return Ok(Marked::Last);
            }
            self.clear()?;
            return Ok(Marked::Missing);
        };
        if last.is_some_and(|last| last.agreement == *mark) {
            return Ok(Marked::Last);
        }
        if self.rewind(mark)? {
            return Ok(Marked::Earlier);
        }
        // An older number means that the chain is of another history.
        if last.is_some_and(|last| last.agreement.number >= mark.number) {
            self.clear()?;
        }
        self.run(
            "DELETE FROM agreed WHERE peer = ?1 AND NOT based",
            [self.key],
        )?;
        self.run(
            "INSERT INTO agreed VALUES (?1, ?2, ?3, 0, ?4)",
            (
                self.key,
                position(mark),
                encode("an agreement", mark)?,
                codec::millis(at),
            ),
        )?;
        Ok(Marked::Unknown)
    }

    /// Says that `base` as it is now is that of an agreement, whatever was before.
    pub(crate) fn restart(&self, agreement: &Agreement, at: Timestamp) -> Result<(), Error> {
        self.run("DELETE FROM agreed WHERE peer = ?1", [self.key])?;
        self.run("DELETE FROM base_undo WHERE peer = ?1", [self.key])?;
        self.agree(agreement, at)
    }

    /// Forgets everything, the base too.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        self.run("DELETE FROM base WHERE peer = ?1", [self.key])?;
        self.run("DELETE FROM agreed WHERE peer = ?1", [self.key])?;
        self.run("DELETE FROM base_undo WHERE peer = ?1", [self.key])
    }

    /// Forgets how to get back to agreements that were made before a time, or beyond so
    /// many changes of the base or so many agreements. The last one stays.
    pub(crate) fn prune(&self, before: Timestamp, changes: u64, links: u64) -> Result<(), Error> {
        let last: Option<i64> = self.one(
            "SELECT max(position) FROM agreed WHERE peer = ?1 AND based",
            [self.key],
        )?;
        let Some(last) = last else { return Ok(()) };
        let old: Option<i64> = self.one(
            "SELECT max(position) FROM agreed WHERE peer = ?1 AND at < ?2",
            (self.key, codec::millis(before)),
        )?;
        let many: Option<i64> = self.one(
            "SELECT position FROM base_undo WHERE peer = ?1
             ORDER BY position DESC LIMIT 1 OFFSET ?2",
            (self.key, changes.cast_signed()),
        )?;
        let long: Option<i64> = self.one(
            "SELECT position FROM agreed WHERE peer = ?1
             ORDER BY position DESC LIMIT 1 OFFSET ?2",
            (self.key, links.cast_signed()),
        )?;
        let Some(upto) = [old, many, long].into_iter().flatten().max() else {
            return Ok(());
        };
        // The base of an agreement can be told while what came after it is on record.
        let upto = upto.min(last);
        self.run(
            "DELETE FROM base_undo WHERE peer = ?1 AND position <= ?2",
            (self.key, upto),
        )?;
        self.run(
            "DELETE FROM agreed WHERE peer = ?1 AND position < ?2",
            (self.key, upto),
        )
    }

    /// Puts rows into the base as they are.
    pub(crate) fn fill(&self, rows: &[(RelPath, Entry)]) -> Result<(), Error> {
        for (path, entry) in rows {
            self.run(
                "INSERT OR REPLACE INTO base VALUES (?1, ?2, NULL, ?3)",
                (self.key, path.as_bytes(), encode("an entry", entry)?),
            )?;
        }
        Ok(())
    }

    /// What the base has at a path.
    pub(crate) fn at(&self, path: &RelPath) -> Result<Option<Entry>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT entry FROM base WHERE peer = ?1 AND path = ?2")?;
        let mut rows = statement.query((self.key, path.as_bytes()))?;
        match rows.next()? {
            None => Ok(None),
            Some(row) => codec::decode_option("an entry", row.get_ref(0)?),
        }
    }

    /// Up to `limit` rows of the base whose paths come after `after`.
    pub(crate) fn page(
        &self,
        after: Option<&RelPath>,
        limit: u32,
    ) -> Result<Vec<(RelPath, Entry)>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT path, entry FROM base WHERE peer = ?1 AND (?2 IS NULL OR path > ?2)
             ORDER BY path LIMIT ?3",
        )?;
        let mut rows = statement.query((self.key, after.map(RelPath::as_bytes), limit))?;
        let mut page = Vec::new();
        while let Some(row) = rows.next()? {
            page.push((
                codec::path(row.get_ref(0)?)?,
                codec::decode("an entry", codec::blob("an entry", row.get_ref(1)?)?)?,
            ));
        }
        Ok(page)
    }

    /// Changes the base, step by step in their order; but moves that follow each other
    /// happen at once. Each starts from where the base had it before all of them, so that
    /// two directories can change places with everything below them.
    ///
    /// `towards` is the agreement that the changes lead to: what they replace is written
    /// down under it.
    pub(crate) fn change(
        &self,
        changes: &[BaseChange],
        towards: Option<&Agreement>,
    ) -> Result<(), Error> {
        self.change_under(changes, towards.map(position))
    }

    /// Changes the base ahead of the next agreement: what that replaces is written down for
    /// it, so that the base of the last one can still be had.
    pub(crate) fn advance(&self, changes: &[BaseChange]) -> Result<(), Error> {
        let last = self.last()?.map_or(0, |last| position(&last.agreement));
        self.change_under(changes, Some(last + 1))
    }

    /// What the base has been changed to ahead of the next agreement.
    pub(crate) fn advanced(&self) -> Result<Vec<BaseChange>, Error> {
        let last = self.last()?.map_or(0, |last| position(&last.agreement));
        let mut statement = self.connection.prepare_cached(
            "SELECT DISTINCT undo.path, base.entry FROM base_undo AS undo
             LEFT JOIN base ON base.peer = undo.peer AND base.path = undo.path
             WHERE undo.peer = ?1 AND undo.position > ?2 ORDER BY undo.path",
        )?;
        let mut rows = statement.query((self.key, last))?;
        let mut changes = Vec::new();
        while let Some(row) = rows.next()? {
            let path = codec::path(row.get_ref(0)?)?;
            changes.push(match codec::decode_option("an entry", row.get_ref(1)?)? {
                Some(entry) => BaseChange::Put {
                    path,
                    node: None,
                    entry,
                },
                None => BaseChange::Remove { path },
            });
        }
        Ok(changes)
    }

    fn change_under(&self, changes: &[BaseChange], under: Option<i64>) -> Result<(), Error> {
        let is_move = |change: &BaseChange| matches!(change, BaseChange::Move { .. });
        for run in changes.chunk_by(|a, b| is_move(a) && is_move(b)) {
            self.change_run(run, under)?;
        }
        Ok(())
    }

    fn change_run(&self, run: &[BaseChange], under: Option<i64>) -> Result<(), Error> {
        let mut moves = Vec::new();
        for change in run {
            match change {
                BaseChange::Move { from, to } if from == to => {}
                BaseChange::Move { from, to } if to.starts_with(from) => {
                    return Err(Error::MoveIntoItself {
                        from: from.clone(),
                        to: to.clone(),
                    });
                }
                BaseChange::Move { from, to } => moves.push((from, to)),
                BaseChange::Put { path, node, entry } => {
                    self.put(path, *node, entry, under)?;
                }
                BaseChange::Remove { path } => {
                    self.keep(path.as_bytes(), under)?;
                    self.run(
                        "DELETE FROM base WHERE peer = ?1 AND path = ?2",
                        (self.key, path.as_bytes()),
                    )?;
                }
            }
        }
        if let [(from, to)] = moves.as_slice() {
            return self.move_below(from.as_bytes(), to.as_bytes(), under);
        }
        // Out of each other's way first, what lies deeper before what it lies in, to
        // places that no path has: none starts with a slash. The other way round on
        // arrival: what moved into a moved directory stands above what that brought along.
        let mut parked: Vec<_> = (0..).zip(&moves).collect();
        let place = |index: usize| format!("/{index}").into_bytes();
        parked.sort_by_key(|(_, (from, _))| std::cmp::Reverse(from.depth()));
        for (index, (from, _)) in &parked {
            self.move_below(from.as_bytes(), &place(*index), under)?;
        }
        parked.sort_by_key(|(_, (_, to))| to.depth());
        for (index, (_, to)) in &parked {
            self.move_below(&place(*index), to.as_bytes(), under)?;
        }
        Ok(())
    }

    fn put(
        &self,
        path: &RelPath,
        node: Option<NodeId>,
        entry: &Entry,
        under: Option<i64>,
    ) -> Result<(), Error> {
        let bytes = encode("an entry", entry)?;
        let same: bool = self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM base WHERE peer = ?1 AND path = ?2 AND entry = ?3)",
            )?
            .query_row((self.key, path.as_bytes(), &bytes), |row| row.get(0))?;
        if !same {
            self.keep(path.as_bytes(), under)?;
        }
        self.run(
            "INSERT INTO base VALUES (?1, ?2, ?3, ?4) ON CONFLICT
             DO UPDATE SET node = excluded.node, entry = excluded.entry",
            (self.key, path.as_bytes(), node.map(|NodeId(id)| id), bytes),
        )
    }

    /// Writes down what the base has at a path, unless something earlier is on record for
    /// the same agreement.
    fn keep(&self, path: &[u8], under: Option<i64>) -> Result<(), Error> {
        let Some(under) = under else { return Ok(()) };
        self.run(
            "INSERT OR IGNORE INTO base_undo
             SELECT ?1, ?2, ?3, base.node, base.entry
             FROM (SELECT 1) LEFT JOIN base ON base.peer = ?1 AND base.path = ?2",
            (self.key, path, under),
        )
    }

    /// Moves what the base has at and below a path that is not the root's.
    fn move_below(&self, from: &[u8], to: &[u8], under: Option<i64>) -> Result<(), Error> {
        let (first, end) = below(from);
        // Where the rest of a path starts, counted from 1: its slash, or after it if
        // nothing comes before.
        let rest = from.len() + if to.is_empty() { 2 } else { 1 };
        let rest = i64::try_from(rest).unwrap_or(i64::MAX);
        if let Some(under) = under {
            // Both places of each row. The makeshift ones show nothing before or after.
            self.run(
                "INSERT OR IGNORE INTO base_undo
                 SELECT peer, path, ?5, node, entry FROM base
                 WHERE peer = ?1 AND (path = ?2 OR (path >= ?3 AND path < ?4))
                 AND substr(path, 1, 1) <> x'2f'",
                (self.key, from, &first, &end, under),
            )?;
            self.run(
                "INSERT OR IGNORE INTO base_undo
                 SELECT ?1, moved.there, ?7, old.node, old.entry
                 FROM (SELECT CAST(?3 || substr(path, ?4) AS BLOB) AS there FROM base
                       WHERE peer = ?1 AND (path = ?2 OR (path >= ?5 AND path < ?6))) AS moved
                 LEFT JOIN base AS old ON old.peer = ?1 AND old.path = moved.there
                 WHERE substr(moved.there, 1, 1) <> x'2f'",
                (self.key, from, to, rest, &first, &end, under),
            )?;
        }
        // What the base still has at the new place is gone: the move replaced it.
        // `||` gives text; the cast makes it bytes again without looking at them.
        self.run(
            "UPDATE OR REPLACE base SET path = CAST(?3 || substr(path, ?4) AS BLOB)
             WHERE peer = ?1 AND (path = ?2 OR (path >= ?5 AND path < ?6))",
            (self.key, from, to, rest, first, end),
        )
    }

    fn position_of(&self, agreement: &Agreement, based: bool) -> Result<Option<i64>, Error> {
        self.one(
            "SELECT position FROM agreed WHERE peer = ?1 AND agreement = ?2 AND based = ?3",
            (self.key, encode("an agreement", agreement)?, based),
        )
    }

    fn one(&self, sql: &str, params: impl rusqlite::Params) -> Result<Option<i64>, Error> {
        let found: Option<Option<i64>> = self
            .connection
            .prepare_cached(sql)?
            .query_row(params, |row| row.get(0))
            .optional()?;
        Ok(found.flatten())
    }

    fn run(&self, sql: &str, params: impl rusqlite::Params) -> Result<(), Error> {
        self.connection.prepare_cached(sql)?.execute(params)?;
        Ok(())
    }
}

fn position(agreement: &Agreement) -> i64 {
    agreement.number.cast_signed()
}

fn agreement(column: rusqlite::types::ValueRef<'_>) -> Result<Agreement, Error> {
    let what = "an agreement";
    codec::decode(what, codec::blob(what, column)?)
}

#[cfg(test)]
mod tests;
