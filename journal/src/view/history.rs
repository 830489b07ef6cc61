//! What is on record of the past: which change was made when, by whom, and under which
//! name.

use std::collections::{HashMap, HashSet};

use rusqlite::{OptionalExtension, Row};

use super::View;
use crate::change::DISPLACED;
use crate::{Error, NodeId, Origin, PeerId, RelPath, Timestamp, codec};

/// What a change did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// The root was seen.
    Root,
    /// Something new got its first name.
    Created,
    /// It got a further name.
    Linked,
    /// A name is gone.
    Removed,
    /// A name moved.
    Renamed,
    /// It changed places with something else.
    Exchanged,
    /// Bytes were written.
    Written,
    /// The size was set.
    Truncated,
    /// Mode, owner or times were set.
    Attributes,
    /// Extended attributes were set.
    Xattrs,
    /// A scan found another content.
    Found,
    /// Something else got its name.
    Replaced,
}

/// A change, or something that was decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Its number; of a decision, that of the last change before it.
    pub n: u64,
    /// When it was recorded, to the millisecond.
    pub at: Timestamp,
    /// Where it happened, by the name it had then. None if that is not on record any more.
    pub path: Option<RelPath>,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// The tree changed.
    Change {
        /// Who changed it.
        origin: Origin,
        /// How.
        what: What,
        /// Of a name that moved: where it was.
        from: Option<RelPath>,
        /// Of bytes that were written: the first, and how many.
        range: Option<(u64, u64)>,
    },
    /// Something was decided that a person may want to know.
    Note {
        /// Between this side and which peer.
        peer: PeerId,
        /// What, in words.
        what: String,
    },
}

/// A name that a node got or lost.
struct Named {
    n: i64,
    code: i64,
    parent: Option<i64>,
    name: Vec<u8>,
}

/// All names that are on record, by node. Takes memory in proportion to the record.
struct Names<'v> {
    view: &'v View,
    by_node: HashMap<i64, Vec<Named>>,
}

/// A name that something lost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LostName {
    /// The change that took it.
    pub n: u64,
    /// What had it.
    pub node: NodeId,
    /// The directory and the name, if they are on record.
    pub place: Option<(NodeId, Vec<u8>)>,
}

impl View {
    /// The names that were removed, or given to something else, after a change.
    pub fn names_lost(&self, since: u64) -> Result<Vec<LostName>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT n, node, parent, name FROM change
             WHERE n > ?1 AND kind IN (?2, ?3) ORDER BY n",
        )?;
        let mut rows = statement.query((since.cast_signed(), LOSES[0], LOSES[1]))?;
        let mut lost = Vec::new();
        while let Some(row) = rows.next()? {
            let (parent, name): (Option<i64>, Option<Vec<u8>>) = (row.get(2)?, row.get(3)?);
            lost.push(LostName {
                n: row.get::<_, i64>(0)?.cast_unsigned(),
                node: NodeId(row.get(1)?),
                place: parent.map(NodeId).zip(name),
            });
        }
        Ok(lost)
    }

    /// When the last change on record was recorded.
    pub fn recorded_at(&self) -> Result<Option<Timestamp>, Error> {
        let at: Option<i64> = self
            .connection
            .prepare_cached("SELECT at FROM change ORDER BY n DESC LIMIT 1")?
            .query_row([], |row| row.get(0))
            .optional()?;
        Ok(at.map(codec::from_millis))
    }

    /// Shows what is on record since a moment, the latest first, until `visit` has enough.
    pub fn history(
        &self,
        since: Option<Timestamp>,
        mut visit: impl FnMut(Event) -> bool,
    ) -> Result<(), Error> {
        let names = Names::read(self)?;
        let since = since.map_or(i64::MIN, codec::millis);
        let mut notes = self.connection.prepare_cached(
            "SELECT n, at, peer, path, what FROM note WHERE at >= ?1 ORDER BY id DESC",
        )?;
        let mut notes = notes.query([since])?;
        let mut note = notes.next()?.map(read_note).transpose()?;
        let mut changes = self.connection.prepare_cached(
            "SELECT n, node, at, origin, kind, start, length FROM change
             WHERE at >= ?1 ORDER BY n DESC, node DESC",
        )?;
        let mut changes = changes.query([since])?;
        while let Some(row) = changes.next()? {
            let event = names.read_change(row)?;
            while let Some(later) = note.take_if(|note| note.n >= event.n) {
                if !visit(later) {
                    return Ok(());
                }
                note = notes.next()?.map(read_note).transpose()?;
            }
            if !visit(event) {
                return Ok(());
            }
        }
        while let Some(rest) = note {
            if !visit(rest) {
                return Ok(());
            }
            note = notes.next()?.map(read_note).transpose()?;
        }
        Ok(())
    }
}

impl View {
    /// The last change of each of these nodes, alive or gone, and who made it, as far as
    /// that was after `since` and is still on record.
    pub fn last_changes(
        &self,
        nodes: &HashSet<NodeId>,
        since: u64,
    ) -> Result<HashMap<NodeId, (u64, Origin)>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT n, node, origin FROM change WHERE n > ?1 ORDER BY n")?;
        let mut rows = statement.query([since.cast_signed()])?;
        let mut last = HashMap::new();
        while let Some(row) = rows.next()? {
            let node = NodeId(row.get(1)?);
            if nodes.contains(&node) {
                let n: i64 = row.get(0)?;
                last.insert(node, (n.cast_unsigned(), Origin::of_code(row.get(2)?)));
            }
        }
        Ok(last)
    }
}

fn read_note(row: &Row<'_>) -> Result<Event, Error> {
    Ok(Event {
        n: row.get::<_, i64>(0)?.cast_unsigned(),
        at: codec::from_millis(row.get(1)?),
        path: Some(codec::path(row.get_ref(3)?)?),
        kind: EventKind::Note {
            peer: PeerId(row.get(2)?),
            what: row.get(4)?,
        },
    })
}

fn what(code: i64) -> Result<What, Error> {
    Ok(match code {
        0 => What::Root,
        1 => What::Created,
        2 => What::Linked,
        4 => What::Renamed,
        3 => What::Removed,
        5 => What::Exchanged,
        6 => What::Written,
        7 => What::Truncated,
        8 => What::Attributes,
        9 => What::Xattrs,
        10 => What::Found,
        DISPLACED => What::Replaced,
        other => {
            return Err(Error::Undecodable {
                what: "a change",
                cause: format!("its kind is {other}"),
            });
        }
    })
}

/// The codes of what takes a name away instead of giving one.
const LOSES: [i64; 2] = [3, DISPLACED];

impl<'v> Names<'v> {
    fn read(view: &'v View) -> Result<Self, Error> {
        let mut statement = view.connection.prepare_cached(
            "SELECT n, node, kind, parent, name FROM change WHERE name IS NOT NULL ORDER BY n",
        )?;
        let mut rows = statement.query([])?;
        let mut by_node: HashMap<i64, Vec<Named>> = HashMap::new();
        while let Some(row) = rows.next()? {
            by_node.entry(row.get(1)?).or_default().push(Named {
                n: row.get(0)?,
                code: row.get(2)?,
                parent: row.get(3)?,
                name: row.get(4)?,
            });
        }
        Ok(Self { view, by_node })
    }

    fn read_change(&self, row: &Row<'_>) -> Result<Event, Error> {
        let (n, node): (i64, i64) = (row.get(0)?, row.get(1)?);
        let origin = Origin::of_code(row.get(3)?);
        let what = what(row.get(4)?)?;
        let moved = matches!(what, What::Renamed | What::Exchanged);
        let range: (Option<i64>, Option<i64>) = (row.get(5)?, row.get(6)?);
        Ok(Event {
            n: n.cast_unsigned(),
            at: codec::from_millis(row.get(2)?),
            path: self.path_at(node, n)?,
            kind: EventKind::Change {
                origin,
                what,
                from: if moved {
                    self.path_at(node, n - 1)?
                } else {
                    None
                },
                range: range
                    .0
                    .zip(range.1)
                    .map(|(start, length)| (start.cast_unsigned(), length.cast_unsigned())),
            },
        })
    }

    /// The path of a node just after a change.
    fn path_at(&self, node: i64, n: i64) -> Result<Option<RelPath>, Error> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut seen = HashSet::new();
        let mut at = node;
        while at != NodeId::ROOT.0 {
            if !seen.insert(at) {
                return Ok(None);
            }
            let Some((parent, name)) = self.name_at(at, n)? else {
                // Older than the record: perhaps a peer still knows.
                let Some(mut known) = self.agreed(at)? else {
                    return Ok(None);
                };
                for name in names.iter().rev() {
                    known = known.join(name).map_err(Error::other)?;
                }
                return Ok(Some(known));
            };
            names.push(name);
            at = parent;
        }
        names.reverse();
        RelPath::new(names.join(&b'/'))
            .map(Some)
            .map_err(Error::other)
    }

    /// The directory and name of a node just after a change.
    fn name_at(&self, node: i64, n: i64) -> Result<Option<(i64, Vec<u8>)>, Error> {
        let known = self.by_node.get(&node).map_or(&[][..], Vec::as_slice);
        let next = known.partition_point(|named| named.n <= n);
        let found = match (next.checked_sub(1), known.get(next)) {
            (Some(last), _) => Some(&known[last]),
            // Before the first that is on record it had the name that it lost there.
            (None, Some(first)) if LOSES.contains(&first.code) => Some(first),
            (None, Some(_)) => return Ok(None),
            (None, None) => None,
        };
        match found {
            Some(named) => match named.parent {
                Some(parent) => Ok(Some((parent, named.name.clone()))),
                None => self.entry_of(node, Some(&named.name)),
            },
            None => self.entry_of(node, None),
        }
    }

    /// Where a node is now, under a certain name or any.
    fn entry_of(&self, node: i64, name: Option<&[u8]>) -> Result<Option<(i64, Vec<u8>)>, Error> {
        let mut statement = self.view.connection.prepare_cached(
            "SELECT parent, name FROM entry WHERE node = ?1 AND (?2 IS NULL OR name = ?2)
             ORDER BY parent, name LIMIT 1",
        )?;
        let mut rows = statement.query((node, name))?;
        match rows.next()? {
            Some(row) => Ok(Some((row.get(0)?, row.get(1)?))),
            None => Ok(None),
        }
    }

    /// The path under which a node was last agreed on with a peer.
    fn agreed(&self, node: i64) -> Result<Option<RelPath>, Error> {
        let mut statement = self
            .view
            .connection
            .prepare_cached("SELECT path FROM base WHERE node = ?1 ORDER BY peer LIMIT 1")?;
        let mut rows = statement.query([node])?;
        rows.next()?
            .map(|row| codec::path(row.get_ref(0)?))
            .transpose()
    }
}
