//! Reading the recorded tree. A [`View`] is what snapshots and updates have in
//! common.

mod history;
mod peers;

pub use history::{Event, EventKind, LostName, What};
pub(crate) use peers::below;
pub use peers::{Base, BaseChange, Conflict, Peer, Proposal};

use std::ops::Range;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row};

use crate::change::{Effect, effect};
use crate::codec;
use crate::{Attr, ContentHash, Epoch, Error, Ino, NodeId, RelPath, Timestamp, Xattrs};

/// A directory deeper than this is taken for a loop in a damaged record: Linux
/// itself cannot name it in one path.
const DEPTH_MAX: usize = 4096;

/// A node of the recorded tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its identity, never used again.
    pub id: NodeId,
    /// Its inode number. Zero for the root of a tree that nothing was recorded of.
    pub ino: Ino,
    /// Its attributes after its last change.
    pub attr: Attr,
    /// A symbolic link's text.
    pub target: Option<Vec<u8>>,
    /// Its `user.` attributes.
    pub xattrs: Xattrs,
    /// The last change of its content.
    pub content_n: u64,
    /// The last change of its content, attributes or extended attributes. A change
    /// of its names does not count.
    pub changed_n: u64,
    /// The last time it was synced to disk; zero if never.
    pub synced_n: u64,
    /// The digest of its content, if one was computed since that last changed.
    pub hash: Option<ContentHash>,
    /// It is the artefact of a conflict and stays local.
    pub artefact: bool,
}

/// The columns that [`Node::read`] expects first.
const NODE: &str = "SELECT node.id, node.ino, node.kind, node.mode, node.uid, node.gid, node.size,
    node.mtime, node.mtime_nanos, node.ctime, node.ctime_nanos, node.target, node.xattrs,
    node.content_n, node.changed_n, node.synced_n, node.hash, node.hash_n, node.artefact";

impl Node {
    fn read(row: &Row<'_>) -> Result<Self, Error> {
        let content_n: i64 = row.get(13)?;
        let hash = if row.get::<_, i64>(17)? == content_n && row.get_ref(16)? != ValueRef::Null {
            Some(ContentHash(codec::array("a hash", row.get_ref(16)?)?))
        } else {
            None
        };
        Ok(Self {
            id: NodeId(row.get(0)?),
            ino: Ino(row.get::<_, Option<i64>>(1)?.unwrap_or(0).cast_unsigned()),
            attr: Attr {
                kind: codec::kind(row.get(2)?)?,
                mode: row.get(3)?,
                uid: row.get(4)?,
                gid: row.get(5)?,
                size: row.get::<_, i64>(6)?.cast_unsigned(),
                mtime: Timestamp {
                    secs: row.get(7)?,
                    nanos: row.get(8)?,
                },
                ctime: Timestamp {
                    secs: row.get(9)?,
                    nanos: row.get(10)?,
                },
            },
            target: row.get(11)?,
            xattrs: codec::decode_option("extended attributes", row.get_ref(12)?)?
                .unwrap_or_default(),
            content_n: content_n.cast_unsigned(),
            changed_n: row.get::<_, i64>(14)?.cast_unsigned(),
            synced_n: row.get::<_, i64>(15)?.cast_unsigned(),
            hash,
            artefact: row.get(18)?,
        })
    }
}

/// The journal's tables as one transaction shows them.
pub struct View {
    pub(crate) connection: Connection,
    n: u64,
}

impl View {
    /// Reads in the transaction that is open on the connection.
    pub(crate) fn new(connection: Connection) -> Result<Self, Error> {
        let n: i64 = connection
            .prepare_cached("SELECT last_n FROM progress")?
            .query_row([], |row| row.get(0))?;
        Ok(Self {
            connection,
            n: n.cast_unsigned(),
        })
    }

    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }

    /// The writer's view moves on with it.
    pub(crate) fn advance(&mut self, n: u64) {
        self.n = n;
    }

    /// The last change it shows.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// The life that goes on: each start of the journal begins one with an epoch of its own.
    pub fn life(&self) -> Result<Epoch, Error> {
        let epoch: i64 = self
            .connection
            .prepare_cached("SELECT epoch FROM life ORDER BY id DESC LIMIT 1")?
            .query_row([], |row| row.get(0))?;
        Ok(Epoch(epoch.cast_unsigned()))
    }

    /// Whether every record since the start fitted the tree that is recorded. Where one did
    /// not, the tree was repaired by what could be known, and the next start scans.
    pub fn is_exact(&self) -> Result<bool, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT inexact = 0 FROM progress")?
            .query_row([], |row| row.get(0))?)
    }

    /// Changes up to this number may be missing from the record of changes. For an
    /// older position [`touched`](Self::touched) answers with everything there is.
    pub fn compacted(&self) -> Result<u64, Error> {
        let n: i64 = self
            .connection
            .prepare_cached("SELECT compacted_n FROM progress")?
            .query_row([], |row| row.get(0))?;
        Ok(n.cast_unsigned())
    }

    /// The nodes, alive or gone, whose content, attributes or names changed after
    /// `since`. What lies below a renamed directory is not listed: only the directory
    /// itself changed its name.
    pub fn touched(&self, since: u64) -> Result<Vec<NodeId>, Error> {
        let mut statement = self
            .connection
            .prepare_cached(if since < self.compacted()? {
                "SELECT node FROM change WHERE n > ?1 UNION SELECT id FROM node
             UNION SELECT node FROM base WHERE node IS NOT NULL ORDER BY 1"
            } else {
                "SELECT DISTINCT node FROM change WHERE n > ?1 ORDER BY 1"
            })?;
        let nodes = statement
            .query_map([since.cast_signed()], |row| row.get(0).map(NodeId))?
            .collect::<Result<_, _>>()?;
        Ok(nodes)
    }

    /// The ranges of a file that were written after `since`, in bytes, first and end. None
    /// if its content changed in another way as well, or that is not on record.
    pub fn written(&self, node: NodeId, since: u64) -> Result<Option<Vec<Range<u64>>>, Error> {
        if since < self.compacted()? {
            return Ok(None);
        }
        let mut statement = self
            .connection
            .prepare_cached("SELECT kind, start, length FROM change WHERE n > ?1 AND node = ?2")?;
        let mut rows = statement.query((since.cast_signed(), node.0))?;
        let mut written = Vec::new();
        while let Some(row) = rows.next()? {
            let range: (Option<i64>, Option<i64>) = (row.get(1)?, row.get(2)?);
            match (effect(row.get(0)?), range) {
                (Effect::Name, _) => {}
                (Effect::Bytes, (Some(start), Some(length))) => {
                    let start = start.cast_unsigned();
                    written.push(start..start.saturating_add(length.cast_unsigned()));
                }
                (Effect::Bytes | Effect::Content, _) => return Ok(None),
            }
        }
        Ok(Some(written))
    }

    /// A node that is alive.
    pub fn node(&self, node: NodeId) -> Result<Option<Node>, Error> {
        self.one_node(&format!("{NODE} FROM node WHERE id = ?1"), node.0)
    }

    /// The living node with this inode number.
    pub fn node_by_ino(&self, ino: Ino) -> Result<Option<Node>, Error> {
        self.one_node(
            &format!("{NODE} FROM node WHERE ino = ?1"),
            ino.0.cast_signed(),
        )
    }

    fn one_node(&self, sql: &str, key: i64) -> Result<Option<Node>, Error> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query([key])?;
        rows.next()?.map(Node::read).transpose()
    }

    /// All paths of a node; the root's is the empty one. None for a node that is gone.
    pub fn paths(&self, node: NodeId) -> Result<Vec<RelPath>, Error> {
        if node == NodeId::ROOT {
            return Ok(vec![RelPath::ROOT]);
        }
        let mut statement = self.connection.prepare_cached(
            "SELECT parent, name FROM entry WHERE node = ?1 ORDER BY parent, name",
        )?;
        let names: Vec<(i64, Vec<u8>)> = statement
            .query_map([node.0], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        let mut paths = Vec::with_capacity(names.len());
        for (parent, name) in names {
            if let Some(path) = self.path_up(parent, name)? {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// The path of a name, found upwards through directories (which have one name).
    fn path_up(&self, parent: i64, name: Vec<u8>) -> Result<Option<RelPath>, Error> {
        let mut names = vec![name];
        let mut directory = parent;
        while directory != NodeId::ROOT.0 {
            let above: Option<(i64, Vec<u8>)> = self
                .connection
                .prepare_cached("SELECT parent, name FROM entry WHERE node = ?1")?
                .query_row([directory], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            let Some((above, name)) = above else {
                return Ok(None);
            };
            if names.len() >= DEPTH_MAX {
                return Ok(None);
            }
            names.push(name);
            directory = above;
        }
        names.reverse();
        RelPath::new(names.join(&b'/'))
            .map(Some)
            .map_err(|error| Error::Undecodable {
                what: "a name",
                cause: error.to_string(),
            })
    }

    /// The node at a path.
    pub fn at(&self, path: &RelPath) -> Result<Option<Node>, Error> {
        let mut node = NodeId::ROOT;
        for name in path.components() {
            match self.child(node, name)? {
                Some(child) => node = child,
                None => return Ok(None),
            }
        }
        self.node(node)
    }

    /// The node that a directory has under a name.
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Result<Option<NodeId>, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT node FROM entry WHERE parent = ?1 AND name = ?2")?
            .query_row((directory.0, name), |row| row.get(0).map(NodeId))
            .optional()?)
    }

    /// The names in a directory, in the order of their bytes.
    pub fn children(&self, directory: NodeId) -> Result<Vec<(Vec<u8>, Node)>, Error> {
        let mut statement = self.connection.prepare_cached(&format!(
            "{NODE}, entry.name FROM entry JOIN node ON node.id = entry.node
             WHERE entry.parent = ?1 ORDER BY entry.name"
        ))?;
        let mut rows = statement.query([directory.0])?;
        let mut children = Vec::new();
        while let Some(row) = rows.next()? {
            children.push((row.get(19)?, Node::read(row)?));
        }
        Ok(children)
    }

    /// Shows every name below the root, a directory before what is in it. A node with
    /// several names is shown under each.
    pub fn walk(
        &self,
        mut visit: impl FnMut(&RelPath, &Node) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // One iterator for each directory on the way down: memory is bounded by depth
        // times the size of a directory, not by the size of the tree.
        let mut open = vec![(RelPath::ROOT, self.children(NodeId::ROOT)?.into_iter())];
        while let Some((directory, rest)) = open.last_mut() {
            let Some((name, node)) = rest.next() else {
                open.pop();
                continue;
            };
            let path = directory.join(&name).map_err(|error| Error::Undecodable {
                what: "a name",
                cause: error.to_string(),
            })?;
            visit(&path, &node)?;
            if node.attr.kind == crate::Kind::Directory && open.len() < DEPTH_MAX {
                open.push((path, self.children(node.id)?.into_iter()));
            }
        }
        Ok(())
    }

    /// Whether the tree has a file or a symbolic link that is no artefact.
    pub fn has_files(&self) -> Result<bool, Error> {
        let kinds = [crate::Kind::File, crate::Kind::Symlink].map(codec::kind_code);
        Ok(self
            .connection
            .prepare_cached("SELECT 1 FROM node WHERE kind IN (?1, ?2) AND NOT artefact LIMIT 1")?
            .exists(kinds)?)
    }

    /// What was stored under a key by [`Update::set_setting`](crate::Update::set_setting).
    pub fn setting(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(self
            .connection
            .prepare_cached("SELECT value FROM setting WHERE key = ?1")?
            .query_row([key], |row| row.get(0))
            .optional()?)
    }
}
