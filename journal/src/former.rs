//! Life after the mounted side: what the agent of a directory has agreed on with those who
//! had it as a peer, taken over by the journal of a mount of that directory.
//!
//! Until a peer turns out to be one of them ([`Update::take_former`]), such a chain lies in
//! the journal under a number that no peer has.

use std::collections::HashMap;
use std::path::Path;

use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, Row, params_from_iter};

use crate::chain::{Chain, ChainLink};
use crate::{Error, Id, NodeId, PeerId, RelPath, ReplicaId, Update, codec, index};

/// The tables of a chain, with the columns that follow its number.
const TABLES: [(&str, &str); 3] = [
    ("agreed", "position, agreement, based, at"),
    ("base", "path, NULL, entry"),
    ("base_undo", "path, position, NULL, entry"),
];

/// The chains in an agent's index.
pub struct Former {
    db: Connection,
    chains: Vec<(i64, ReplicaId, ChainLink)>,
}

impl Former {
    /// Opens the index in a directory. None if there is none, or none of a schema that this
    /// program knows, or nothing was agreed on.
    pub fn open(dir: &Path) -> Result<Option<Self>, Error> {
        Self::read(dir).map_err(Error::other)
    }

    fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(index::DATABASE);
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(path, flags)?;
        db.busy_timeout(std::time::Duration::from_secs(10))?;
        let schema: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if !(index::CHAINED..=index::SCHEMA).contains(&schema) {
            return Ok(None);
        }
        let mounted: Vec<(i64, [u8; 16])> = db
            .prepare("SELECT id, replica FROM mounted ORDER BY id")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        let mut chains = Vec::new();
        for (id, replica) in mounted {
            if let Some(last) = Chain::new(&db, id).last()? {
                chains.push((id, Id(replica), last));
            }
        }
        Ok((!chains.is_empty()).then_some(Self { db, chains }))
    }
}

fn key(replica: ReplicaId) -> String {
    format!("former.{replica}")
}

impl Update<'_> {
    /// Takes over what is in an agent's index and not known here. Returns with how many
    /// replicas that was agreed on.
    pub fn take_over(&self, former: &Former) -> Result<usize, Error> {
        let peers = self.peers()?;
        let mut taken = 0;
        for (id, replica, last) in &former.chains {
            let chain = Chain::new(&self.connection, -id);
            let known = peers.iter().any(|peer| peer.replica == Some(*replica));
            if known || chain.links()?.contains(last) {
                continue;
            }
            chain.clear()?;
            for (table, columns) in TABLES {
                self.copy(&former.db, *id, table, columns)
                    .map_err(|error| match error {
                        // A mistake of the index is none of the journal.
                        error if error.is_fatal() => Error::other(error),
                        error => error,
                    })?;
            }
            self.set_setting(&key(*replica), &(-id).to_le_bytes())?;
            taken += 1;
        }
        Ok(taken)
    }

    fn copy(&self, from: &Connection, id: i64, table: &str, columns: &str) -> Result<(), Error> {
        let count = columns.split(", ").count();
        let mut select = from.prepare(&format!("SELECT {columns} FROM {table} WHERE peer = ?1"))?;
        let places: Vec<String> = (2..count + 2).map(|at| format!("?{at}")).collect();
        let mut insert = self.connection.prepare_cached(&format!(
            "INSERT INTO {table} VALUES (?1, {})",
            places.join(", ")
        ))?;
        let mut rows = select.query([id])?;
        let values = |row: &Row<'_>| -> Result<Vec<Value>, rusqlite::Error> {
            std::iter::once(Ok(Value::Integer(-id)))
                .chain((0..count).map(|at| row.get(at)))
                .collect()
        };
        while let Some(row) = rows.next()? {
            insert.execute(params_from_iter(values(row)?))?;
        }
        Ok(())
    }

    /// Says of everything in the bases that were taken over which node it is, so that its
    /// renames and removals are known as such. To be called once the tree is recorded.
    pub fn bind_former(&self) -> Result<(), Error> {
        let mut nodes: HashMap<RelPath, NodeId> = HashMap::new();
        self.walk(|path, node| {
            nodes.insert(path.clone(), node.id);
            Ok(())
        })?;
        let mut select = self
            .connection
            .prepare("SELECT peer, path FROM base WHERE peer < 0 AND node IS NULL")?;
        let rows: Vec<(i64, RelPath)> = select
            .query_map([], |row| Ok((row.get(0)?, codec::path(row.get_ref(1)?))))?
            .map(|row| row.map(|(peer, path)| path.map(|path| (peer, path)))?)
            .collect::<Result<_, Error>>()?;
        for (peer, path) in rows {
            if let Some(node) = nodes.get(&path) {
                self.execute(
                    "UPDATE base SET node = ?3 WHERE peer = ?1 AND path = ?2",
                    (peer, path.as_bytes(), node.0),
                )?;
            }
        }
        Ok(())
    }

    /// Gives a peer the chain that was taken over for the replica that it turned out to be.
    /// False if there is none. Whether the tree is still what the chain is about, its mark
    /// has to tell: see [`Update::take_mark`].
    pub fn take_former(&self, peer: PeerId, replica: ReplicaId) -> Result<bool, Error> {
        let Some(stored) = self.setting(&key(replica))? else {
            return Ok(false);
        };
        self.remove_setting(&key(replica))?;
        let Ok(from) = stored.try_into().map(i64::from_le_bytes) else {
            return Ok(false);
        };
        Chain::new(&self.connection, peer.0).clear()?;
        for (table, _) in TABLES {
            self.execute(
                &format!("UPDATE {table} SET peer = ?2 WHERE peer = ?1"),
                (from, peer.0),
            )?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::index::PeerIndex;
    use crate::{
        Agreement, BaseChange, Content, ContentHash, Durability, Entry, Journal, Timestamp, Xattrs,
    };

    fn put(path: &str, content: &str) -> BaseChange {
        BaseChange::Put {
            path: RelPath::new(path).unwrap(),
            node: None,
            entry: Entry {
                content: Content::File {
                    size: content.len() as u64,
                    hash: ContentHash::of(content.as_bytes()),
                },
                mode: 0o644,
                mtime: Timestamp::default(),
                xattrs: Xattrs::new(),
            },
        }
    }

    fn agreement(number: u8) -> Agreement {
        Agreement {
            number: number.into(),
            nonce: Id([number; 16]),
            previous: None,
        }
    }

    /// The chain goes over with its past, belongs to nobody, and then to the peer that is
    /// found to be that replica.
    #[test]
    fn a_chain_is_taken_over_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mount, other) = (Id([1; 16]), Id([2; 16]));
        let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
        for (number, content) in [(1, "old"), (2, "new")] {
            let batch = Id([number; 16]);
            let changes = [(put("x", content), Vec::new())];
            index.propose(batch, true, None, &changes).unwrap();
            let none = BTreeSet::new();
            index
                .agree(mount, &agreement(number), batch, &none)
                .unwrap();
        }
        drop(index);
        let state = tempfile::tempdir().unwrap();
        assert!(Former::open(state.path()).unwrap().is_none());
        let (journal, _) = Journal::open(state.path()).unwrap();
        let take = || {
            let former = Former::open(dir.path()).unwrap().unwrap();
            journal
                .update(Durability::Full, move |update| update.take_over(&former))
                .unwrap()
        };
        // The agent may have been one of an older version.
        let db = Connection::open(dir.path().join(index::DATABASE)).unwrap();
        let older = "DROP TABLE displaced; PRAGMA user_version = 2";
        db.execute_batch(older).unwrap();
        drop(db);
        assert_eq!((take(), take()), (1, 0), "once is enough");
        let (peer, found) = journal
            .update(Durability::Full, move |update| {
                update.bind_former()?;
                let peer = update.add_peer("vm", "/vm")?;
                assert!(!update.take_former(peer, other)?);
                assert!(update.chain(peer)?.is_empty());
                assert!(update.take_former(peer, mount)?);
                assert!(!update.take_former(peer, mount)?);
                Ok((peer, update.chain(peer)?))
            })
            .unwrap();
        assert_eq!(found.len(), 2);
        let x = RelPath::new("x").unwrap();
        let at = |peer| journal.snapshot().unwrap().base_at(peer, &x).unwrap();
        let BaseChange::Put { entry: new, .. } = put("x", "new") else {
            panic!("a put");
        };
        assert_eq!(at(peer).unwrap().entry, new);
        let back = move |update: &Update<'_>| update.rejoin(peer, &agreement(1));
        assert!(journal.update(Durability::Full, back).unwrap());
        assert_ne!(at(peer).unwrap().entry, new);
    }
}
