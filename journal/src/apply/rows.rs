//! The steps that records are made of: looking up, placing, removing, noting down.

use rusqlite::{OptionalExtension, Params};

use super::{Apply, Place, ROOT};
use crate::change::DISPLACED;
use crate::{Attr, Error, Ino, Kind, RelPath, codec};

impl Apply<'_> {
    pub(super) fn insert_node(
        &self,
        ino: Ino,
        attr: Attr,
        target: Option<&[u8]>,
    ) -> Result<i64, Error> {
        // A record makes one node at most and the root is 1, so its number plus one is
        // an id that was never used and never will be.
        let node = self.n.cast_signed() + 1;
        self.run(
            "INSERT INTO node VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, NULL,
             ?13, ?13, 0, NULL, 0, 0)",
            (
                node,
                ino.0.cast_signed(),
                codec::kind_code(attr.kind),
                attr.mode,
                attr.uid,
                attr.gid,
                attr.size.cast_signed(),
                attr.mtime.secs,
                attr.mtime.nanos,
                attr.ctime.secs,
                attr.ctime.nanos,
                target,
                self.n.cast_signed(),
            ),
        )?;
        Ok(node)
    }

    /// Looks up where a name belongs. None, with a warning, if there is no such place.
    pub(super) fn place<'a>(
        &self,
        (parent, name): (Ino, &'a [u8]),
    ) -> Result<Option<Place<'a>>, Error> {
        if RelPath::ROOT.join(name).is_err() {
            self.misfit("a record has a name that no directory can hold")?;
            return Ok(None);
        }
        let Some((parent, kind)) = self.directory(parent)? else {
            self.misfit("a record names a directory that is not known")?;
            return Ok(None);
        };
        if kind != Kind::Directory {
            self.misfit("a record has a name inside something that is no directory")?;
            return Ok(None);
        }
        Ok(Some(Place { parent, name }))
    }

    /// A node with its kind. As long as nobody has said which number the root has, it
    /// is the first directory that is named: names come parents first.
    pub(super) fn directory(&self, ino: Ino) -> Result<Option<(i64, Kind)>, Error> {
        let mut known = self
            .connection
            .prepare_cached("SELECT id, kind FROM node WHERE ino = ?1")?;
        let mut rows = known.query([ino.0.cast_signed()])?;
        if let Some(row) = rows.next()? {
            return Ok(Some((row.get(0)?, codec::kind(row.get(1)?)?)));
        }
        let adopted = self
            .connection
            .prepare_cached("UPDATE node SET ino = ?2 WHERE id = ?1 AND ino IS NULL")?
            .execute((ROOT, ino.0.cast_signed()))?;
        Ok((adopted > 0).then_some((ROOT, Kind::Directory)))
    }

    pub(super) fn node_of(&self, ino: Ino) -> Result<Option<i64>, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT id FROM node WHERE ino = ?1")?
            .query_row([ino.0.cast_signed()], |row| row.get(0))
            .optional()?)
    }

    pub(super) fn kind(&self, node: i64) -> Result<Kind, Error> {
        let code = self
            .connection
            .prepare_cached("SELECT kind FROM node WHERE id = ?1")?
            .query_row([node], |row| row.get(0))?;
        codec::kind(code)
    }

    pub(super) fn entry(&self, place: Place<'_>) -> Result<Option<i64>, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT node FROM entry WHERE parent = ?1 AND name = ?2")?
            .query_row((place.parent, place.name), |row| row.get(0))
            .optional()?)
    }

    pub(super) fn is_named(&self, node: i64) -> Result<bool, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM entry WHERE node = ?1)")?
            .query_row([node], |row| row.get(0))?)
    }

    /// Whether a directory is `ancestor` or lies below it.
    pub(super) fn is_inside(&self, directory: i64, ancestor: i64) -> Result<bool, Error> {
        let mut at = directory;
        while at != ancestor {
            let above: Option<i64> = self
                .connection
                .prepare_cached("SELECT parent FROM entry WHERE node = ?1")?
                .query_row([at], |row| row.get(0))
                .optional()?;
            match above {
                Some(above) => at = above,
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Gives a node a name. A repair before it may have removed the directory or the
    /// node itself; then nothing may be left hanging.
    pub(super) fn set_entry(&self, place: Place<'_>, node: i64) -> Result<(), Error> {
        if !self.exists(place.parent)? || !self.exists(node)? {
            self.misfit("a name belonged into a directory that had to be removed")?;
            if !self.is_named(node)? {
                self.remove_node(node)?;
            }
            return Ok(());
        }
        self.run(
            "INSERT OR REPLACE INTO entry VALUES (?1, ?2, ?3)",
            (place.parent, place.name, node),
        )
    }

    fn exists(&self, node: i64) -> Result<bool, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT 1 FROM node WHERE id = ?1")?
            .exists([node])?)
    }

    pub(super) fn delete_entry(&self, place: Place<'_>) -> Result<(), Error> {
        self.run(
            "DELETE FROM entry WHERE parent = ?1 AND name = ?2",
            (place.parent, place.name),
        )
    }

    /// Takes a name away from whatever has it, and says whether anything had.
    pub(super) fn displace(&self, place: Place<'_>) -> Result<bool, Error> {
        let Some(node) = self.entry(place)? else {
            return Ok(false);
        };
        self.delete_entry(place)?;
        self.log(DISPLACED, node, None, Some(place))?;
        if !self.is_named(node)? {
            self.remove_node(node)?;
        }
        Ok(true)
    }

    /// Removes a node with all its names, and what is recorded below it. In a tree
    /// that fits there is nothing below it, since a directory must be empty to go.
    pub(super) fn remove_node(&self, node: i64) -> Result<(), Error> {
        let mut gone = vec![node];
        while let Some(node) = gone.pop() {
            self.log(DISPLACED, node, None, None)?;
            self.run("DELETE FROM entry WHERE node = ?1", [node])?;
            let children: Vec<i64> = self
                .connection
                .prepare_cached("DELETE FROM entry WHERE parent = ?1 RETURNING node")?
                .query_map([node], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            self.run("DELETE FROM node WHERE id = ?1", [node])?;
            if !children.is_empty() {
                self.misfit("a directory went that was not empty")?;
            }
            for child in children {
                self.log(DISPLACED, child, None, None)?;
                if !self.is_named(child)? {
                    gone.push(child);
                }
            }
        }
        Ok(())
    }

    /// Writes down that this record concerned a node.
    pub(super) fn log(
        &self,
        code: i64,
        node: i64,
        range: Option<(u64, u64)>,
        place: Option<Place<'_>>,
    ) -> Result<(), Error> {
        // What a record did to a node first is what it is about.
        self.run(
            "INSERT OR IGNORE INTO change VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            (
                self.n.cast_signed(),
                node,
                self.at,
                self.life,
                self.origin.code(),
                code,
                range.map(|(start, _)| start.cast_signed()),
                range.map(|(_, length)| length.cast_signed()),
                place.map(|place| place.name),
                place.map(|place| place.parent),
            ),
        )
    }

    /// Notes that a record did not fit the tree.
    pub(super) fn misfit(&self, what: &str) -> Result<(), Error> {
        tracing::warn!(
            n = self.n,
            "{what}: the recorded tree was repaired, the next start will scan"
        );
        self.run("UPDATE progress SET inexact = 1 WHERE inexact = 0", [])
    }

    pub(super) fn run(&self, sql: &str, params: impl Params) -> Result<(), Error> {
        self.connection.prepare_cached(sql)?.execute(params)?;
        Ok(())
    }
}
