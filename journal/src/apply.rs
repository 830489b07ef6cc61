//! Putting one record into the tables.
//!
//! Records come in the order in which the changes took effect, so they fit the tree.
//! Should one not fit (something went round the mount, or a record was lost), the tree
//! is brought to what the record says is there now, a warning is logged, and the next
//! start is told to scan.

mod rows;

use rusqlite::Connection;

use crate::{Attr, Change, Error, Ino, Kind, NodeId, Origin, codec};

/// Where a record goes.
pub(crate) struct Apply<'c> {
    pub(crate) connection: &'c Connection,
    pub(crate) life: i64,
    /// Milliseconds since 1970.
    pub(crate) at: i64,
    pub(crate) n: u64,
    pub(crate) origin: Origin,
}

/// A name in the recorded tree.
#[derive(Clone, Copy)]
struct Place<'a> {
    parent: i64,
    name: &'a [u8],
}

const ROOT: i64 = NodeId::ROOT.0;

impl Apply<'_> {
    pub(crate) fn apply(&self, change: Change) -> Result<(), Error> {
        let code = change.code();
        match change {
            Change::Root { ino, attr } => self.root(code, ino, attr),
            Change::Create {
                parent,
                name,
                ino,
                attr,
                target,
            } => self.create(code, (parent, &name), ino, attr, target.as_deref()),
            Change::Link { parent, name, ino } => self.link(code, (parent, &name), ino),
            Change::Unlink {
                parent,
                name,
                ino,
                last,
            } => self.unlink(code, (parent, &name), ino, last),
            Change::Rename {
                parent,
                name,
                new_parent,
                new_name,
                ino,
                replaced,
            } => self.rename(
                code,
                (parent, &name),
                (new_parent, &new_name),
                ino,
                replaced,
            ),
            Change::Exchange {
                parent,
                name,
                ino,
                new_parent,
                new_name,
                other,
            } => self.exchange(code, (parent, &name), ino, (new_parent, &new_name), other),
            Change::Write {
                ino,
                offset,
                len,
                attr,
            } => self.changed(code, ino, attr, true, Some((offset, len))),
            Change::Truncate { ino, attr } | Change::Content { ino, attr } => {
                self.changed(code, ino, attr, true, None)
            }
            Change::Attr { ino, attr } => self.changed(code, ino, attr, false, None),
            Change::Xattrs { ino, attr, xattrs } => {
                let xattrs = if xattrs.is_empty() {
                    None
                } else {
                    Some(codec::encode("extended attributes", &xattrs)?)
                };
                self.run(
                    "UPDATE node SET xattrs = ?2 WHERE ino = ?1",
                    (ino.0.cast_signed(), xattrs),
                )?;
                self.changed(code, ino, attr, false, None)
            }
            Change::Sync { ino } => {
                self.run(
                    "UPDATE node SET synced_n = ?2 WHERE ino = ?1",
                    (ino.0.cast_signed(), self.n.cast_signed()),
                )?;
                Ok(())
            }
        }
    }

    fn root(&self, code: i64, ino: Ino, attr: Attr) -> Result<(), Error> {
        if let Some(node) = self.node_of(ino)?
            && node != ROOT
        {
            self.misfit("the root's inode number belonged to another node")?;
            self.remove_node(node)?;
        }
        self.run(
            "UPDATE node SET ino = ?2 WHERE id = ?1",
            (ROOT, ino.0.cast_signed()),
        )?;
        self.changed(code, ino, attr, false, None)
    }

    fn create(
        &self,
        code: i64,
        place: (Ino, &[u8]),
        ino: Ino,
        attr: Attr,
        target: Option<&[u8]>,
    ) -> Result<(), Error> {
        let Some(place) = self.place(place)? else {
            return Ok(());
        };
        match self.node_of(ino)? {
            Some(ROOT) => return self.misfit("a node was created with the root's inode number"),
            Some(old) => {
                // The filesystem gives a number out again only when its node is gone.
                self.misfit("an inode number was given out again before its node was gone")?;
                self.remove_node(old)?;
            }
            None => {}
        }
        if self.displace(place)? {
            self.misfit("a node was created under a name that existed")?;
        }
        let node = self.insert_node(ino, attr, target)?;
        self.set_entry(place, node)?;
        self.log(code, node, None, Some(place))
    }

    fn link(&self, code: i64, place: (Ino, &[u8]), ino: Ino) -> Result<(), Error> {
        let Some(place) = self.place(place)? else {
            return Ok(());
        };
        let node = match self.node_of(ino)? {
            Some(node) => node,
            None => {
                self.misfit("a node that is not known got a further name")?;
                self.insert_node(ino, unknown_attr(), None)?
            }
        };
        if node == ROOT || self.kind(node)? == Kind::Directory {
            return self.misfit("a directory got a further name");
        }
        match self.entry(place)? {
            // Nothing is displaced by a second name for the node itself.
            Some(there) if there == node => self.misfit("a name was linked that existed")?,
            Some(_) => {
                self.misfit("a name was linked that existed")?;
                self.displace(place)?;
            }
            None => {}
        }
        self.set_entry(place, node)?;
        self.log(code, node, None, Some(place))
    }

    fn unlink(&self, code: i64, place: (Ino, &[u8]), ino: Ino, last: bool) -> Result<(), Error> {
        let known = self.node_of(ino)?.filter(|node| *node != ROOT);
        let place = self.place(place)?;
        let there = match place {
            Some(place) => {
                let there = self.entry(place)?;
                if there.is_some() {
                    self.delete_entry(place)?;
                }
                there
            }
            None => None,
        };
        match (there, known) {
            (Some(there), known) => {
                self.log(code, there, None, place)?;
                if known.is_some_and(|known| known != there) {
                    self.misfit("a name that was removed named another node")?;
                }
                let named = self.is_named(there)?;
                if named && last && known == Some(there) {
                    self.misfit("the last name of a node was removed, but others are recorded")?;
                }
                if !named || (last && known == Some(there)) {
                    self.remove_node(there)?;
                }
                Ok(())
            }
            (None, Some(known)) => {
                self.misfit("a name was removed that was not recorded")?;
                if last {
                    self.log(code, known, None, place)?;
                    self.remove_node(known)?;
                }
                Ok(())
            }
            (None, None) => self.misfit("a name was removed that was not recorded"),
        }
    }

    fn rename(
        &self,
        code: i64,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        ino: Ino,
        replaced: Option<(Ino, bool)>,
    ) -> Result<(), Error> {
        let from = self.place(from)?;
        let there = match from {
            Some(from) => self.entry(from)?,
            None => None,
        };
        let Some(node) = self.moved_node(ino, there)? else {
            return self.misfit("a name moved that was not recorded");
        };
        let Some(to) = self.place(to)? else {
            // Left where it was until the scan tells: a deletion that nobody asked for
            // would be carried to the peers.
            return Ok(());
        };
        if self.is_inside(to.parent, node)? {
            return self.misfit("a directory moved into itself");
        }
        self.log(code, node, None, Some(to))?;
        if let Some(from) = from
            && there.is_some()
        {
            self.delete_entry(from)?;
            if let Some(there) = there
                && there != node
                && !self.is_named(there)?
            {
                self.remove_node(there)?;
            }
        }
        if self.kind(node)? == Kind::Directory {
            // A directory has one name, whatever was recorded before.
            self.run("DELETE FROM entry WHERE node = ?1", [node])?;
        }
        match (self.entry(to)?, replaced) {
            (Some(old), _) if old == node => {}
            (Some(_), replaced) => {
                if replaced.is_none() {
                    self.misfit("a rename met a name that existed")?;
                }
                self.displace(to)?;
            }
            (None, Some(_)) => self.misfit("a rename replaced a name that was not recorded")?,
            (None, None) => {}
        }
        if let Some((old, true)) = replaced
            && let Some(old) = self.node_of(old)?
            && old != node
            && old != ROOT
        {
            self.misfit("the last name of a node was replaced, but others are recorded")?;
            self.remove_node(old)?;
        }
        self.release_artefact(node)?;
        self.set_entry(to, node)
    }

    /// What somebody gave another name is no longer the artefact on record: it is a file
    /// like any other.
    fn release_artefact(&self, node: i64) -> Result<(), Error> {
        self.run(
            "UPDATE node SET artefact = 0 WHERE id = ?1 AND artefact",
            [node],
        )
    }

    /// The node that a rename moved: by its inode number, or else what was recorded
    /// under the name, which then has another number than was known.
    fn moved_node(&self, ino: Ino, there: Option<i64>) -> Result<Option<i64>, Error> {
        match (self.node_of(ino)?, there) {
            (Some(ROOT), _) => Ok(None),
            (Some(node), there) => {
                if there != Some(node) {
                    self.misfit("a name that moved named another node")?;
                }
                Ok(Some(node))
            }
            (None, Some(there)) => {
                self.misfit("a node that moved has another inode number than was known")?;
                self.run(
                    "UPDATE node SET ino = ?2 WHERE id = ?1",
                    (there, ino.0.cast_signed()),
                )?;
                Ok(Some(there))
            }
            (None, None) => Ok(None),
        }
    }

    fn exchange(
        &self,
        code: i64,
        first: (Ino, &[u8]),
        ino: Ino,
        second: (Ino, &[u8]),
        other: Ino,
    ) -> Result<(), Error> {
        let (Some(first), Some(second)) = (self.place(first)?, self.place(second)?) else {
            return Ok(());
        };
        let (Some(one), Some(two)) = (self.entry(first)?, self.entry(second)?) else {
            // With one of them unknown it is a rename as far as is known.
            self.misfit("names changed places that were not recorded")?;
            return match (self.node_of(ino)?, self.node_of(other)?) {
                (Some(one), _) if one != ROOT => self.put_moved(code, first, second, one),
                (_, Some(two)) if two != ROOT => self.put_moved(code, second, first, two),
                _ => Ok(()),
            };
        };
        if self.node_of(ino)? != Some(one) || self.node_of(other)? != Some(two) {
            self.misfit("names that changed places named other nodes")?;
        }
        if self.is_inside(second.parent, one)? || self.is_inside(first.parent, two)? {
            return self.misfit("a directory changed places with something inside it");
        }
        self.log(code, one, None, Some(second))?;
        self.log(code, two, None, Some(first))?;
        self.release_artefact(one)?;
        self.release_artefact(two)?;
        self.set_entry(first, two)?;
        self.set_entry(second, one)
    }

    /// Repairs half an exchange.
    fn put_moved(&self, code: i64, from: Place<'_>, to: Place<'_>, node: i64) -> Result<(), Error> {
        if self.is_inside(to.parent, node)? {
            return Ok(());
        }
        self.log(code, node, None, Some(to))?;
        if self.entry(from)? == Some(node) {
            self.delete_entry(from)?;
        }
        if self.kind(node)? == Kind::Directory {
            self.run("DELETE FROM entry WHERE node = ?1", [node])?;
        }
        if self.entry(to)? != Some(node) {
            self.displace(to)?;
        }
        self.set_entry(to, node)
    }

    /// Attributes after a change of content or attributes. A node without a name may
    /// still be open somewhere and change: nobody is interested.
    fn changed(
        &self,
        code: i64,
        ino: Ino,
        attr: Attr,
        content: bool,
        range: Option<(u64, u64)>,
    ) -> Result<(), Error> {
        // Not `UPDATE ... RETURNING`: that keeps its rows in a table of its own.
        let Some(node) = self.node_of(ino)? else {
            return Ok(());
        };
        self.run(
            "UPDATE node SET mode = ?2, uid = ?3, gid = ?4, size = ?5, mtime = ?6,
             mtime_nanos = ?7, ctime = ?8, ctime_nanos = ?9, changed_n = ?10,
             content_n = iif(?11, ?10, content_n) WHERE id = ?1",
            (
                node,
                attr.mode,
                attr.uid,
                attr.gid,
                attr.size.cast_signed(),
                attr.mtime.secs,
                attr.mtime.nanos,
                attr.ctime.secs,
                attr.ctime.nanos,
                self.n.cast_signed(),
                content,
            ),
        )?;
        self.log(code, node, range, None)
    }
}

/// What stands in until a scan or the next change tells.
fn unknown_attr() -> Attr {
    Attr {
        kind: Kind::File,
        mode: 0o600,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: Default::default(),
        ctime: Default::default(),
    }
}
