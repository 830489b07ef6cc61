//! Reading what is known of the peers: bases, observations, proposals, conflicts.

use rusqlite::Row;
use serde::{Deserialize, Serialize};

use super::View;
use crate::chain::{Chain, ChainLink};
use crate::codec;
use crate::{
    Agreement, ContentHash, Entry, Epoch, Error, Id, NodeId, PeerId, RelPath, ReplicaId, Timestamp,
};

/// What both sides last agreed on for a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Base {
    /// The local node that was there, if its identity is known.
    pub node: Option<NodeId>,
    /// What was there.
    pub entry: Entry,
}

/// A step from one base to the next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum BaseChange {
    /// The path shows this.
    Put {
        /// Where.
        path: RelPath,
        /// The local node, if known.
        node: Option<NodeId>,
        /// What.
        entry: Entry,
    },
    /// The path (not what is below it) shows nothing.
    Remove {
        /// Where.
        path: RelPath,
    },
    /// A path moved with everything below it.
    Move {
        /// From where.
        from: RelPath,
        /// To where.
        to: RelPath,
    },
}

/// An agreement that was offered to a peer and not acknowledged yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proposal {
    /// The agreement.
    pub agreement: Agreement,
    /// The peer's cursor once it is accepted.
    pub cursor: u64,
    /// The batch that leads there.
    pub batch: Id,
    /// The peer's reports that it takes into account.
    pub seen: Option<(Epoch, u64)>,
    /// What it changes in the base. Empty in [`Peer::proposed`];
    /// [`View::proposal`] loads it.
    pub changes: Vec<BaseChange>,
}

/// A configured peer and how far it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its key here.
    pub id: PeerId,
    /// Its name, for people.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// The replica found there.
    pub replica: Option<ReplicaId>,
    /// Local changes up to here are in its base.
    pub cursor: u64,
    /// Its reports up to here are in the table of observations.
    pub seen: Option<(Epoch, u64)>,
    /// The last agreement.
    pub agreement: Option<Agreement>,
    /// What was proposed to it, without the changes.
    pub proposed: Option<Proposal>,
    /// Local changes up to here survive a power loss over there.
    pub durable: u64,
}

/// A conflict that is open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// Its key; ignored by [`Update::open_conflict`](crate::Update::open_conflict).
    pub id: i64,
    /// The other side.
    pub peer: PeerId,
    /// Where.
    pub path: RelPath,
    /// What both had agreed on.
    pub base: Option<Entry>,
    /// What this side has.
    pub local: Option<Entry>,
    /// What the peer has.
    pub remote: Option<Entry>,
    /// Where the peer's version is kept.
    pub copy: Option<RelPath>,
    /// Where the explanation is kept.
    pub info: Option<RelPath>,
    /// When it was noticed.
    pub since: Timestamp,
    /// Of a Git directory, in which names are in conflict and not the directory itself:
    /// a digest of what the peer has changed there.
    pub unit: Option<ContentHash>,
}

/// The bounds of what lies below a path, itself excluded: `a/` and everything up to,
/// not including, `a0`, because `0` follows `/`. A sibling `a-b` sorts before `a/`.
/// The root has no upper bound.
pub(crate) fn below(path: &[u8]) -> (Vec<u8>, Option<Vec<u8>>) {
    if path.is_empty() {
        // Above the empty path.
        return (vec![0], None);
    }
    let bound = |end: u8| [path, &[end]].concat();
    (bound(b'/'), Some(bound(b'/' + 1)))
}

fn position(row: &Row<'_>, epoch: usize, rev: usize) -> Result<Option<(Epoch, u64)>, Error> {
    let epoch: Option<i64> = row.get(epoch)?;
    let rev: Option<i64> = row.get(rev)?;
    Ok(epoch
        .zip(rev)
        .map(|(epoch, rev)| (Epoch(epoch.cast_unsigned()), rev.cast_unsigned())))
}

impl View {
    /// What was agreed on for a path.
    pub fn base_at(&self, peer: PeerId, path: &RelPath) -> Result<Option<Base>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT node, entry FROM base WHERE peer = ?1 AND path = ?2")?;
        let mut rows = statement.query((peer.0, path.as_bytes()))?;
        rows.next()?.map(|row| base(row, 0)).transpose()
    }

    /// Whether an observation of a path is stored, whatever it says.
    pub fn is_observed(&self, peer: PeerId, path: &RelPath) -> Result<bool, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT 1 FROM remote WHERE peer = ?1 AND path = ?2")?;
        Ok(statement.exists((peer.0, path.as_bytes()))?)
    }

    /// What the peer was seen to have at a path, if that is still kept, also what the base has
    /// come to say meanwhile. Nothing at all is an observation, too.
    pub fn observation(
        &self,
        peer: PeerId,
        path: &RelPath,
    ) -> Result<Option<Option<Entry>>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT entry FROM remote WHERE peer = ?1 AND path = ?2")?;
        let mut rows = statement.query((peer.0, path.as_bytes()))?;
        rows.next()?
            .map(|row| codec::decode_option("an entry", row.get_ref(0)?))
            .transpose()
    }

    /// The paths under which a node, alive or gone, is in the base.
    pub fn base_of(&self, peer: PeerId, node: NodeId) -> Result<Vec<(RelPath, Base)>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT path, node, entry FROM base INDEXED BY base_node
             WHERE peer = ?1 AND node = ?2 ORDER BY path",
        )?;
        bases(statement.query((peer.0, node.0))?)
    }

    /// The base below a path, without the path itself, in the order of the bytes.
    pub fn base_below(&self, peer: PeerId, path: &RelPath) -> Result<Vec<(RelPath, Base)>, Error> {
        let (from, to) = below(path.as_bytes());
        match to {
            Some(to) => bases(
                self.connection
                    .prepare_cached(
                        "SELECT path, node, entry FROM base
                         WHERE peer = ?1 AND path >= ?2 AND path < ?3 ORDER BY path",
                    )?
                    .query((peer.0, from, to))?,
            ),
            None => bases(
                self.connection
                    .prepare_cached(
                        "SELECT path, node, entry FROM base
                         WHERE peer = ?1 AND path >= ?2 ORDER BY path",
                    )?
                    .query((peer.0, from))?,
            ),
        }
    }

    /// The base below a path, without what lies below one of its names.
    pub fn base_below_but(
        &self,
        peer: PeerId,
        path: &RelPath,
        skipped: &[u8],
    ) -> Result<Vec<(RelPath, Base)>, Error> {
        let skipped = path.join(skipped).map_err(Error::other)?;
        let ((from, to), (skip_from, skip_to)) =
            (below(path.as_bytes()), below(skipped.as_bytes()));
        // Neither the path of a directory nor one of its names is the root's.
        let (to, skip_to) = (to.unwrap_or_default(), skip_to.unwrap_or_default());
        bases(
            self.connection
                .prepare_cached(
                    "SELECT path, node, entry FROM base
                     WHERE peer = ?1 AND path >= ?2 AND path < ?3
                     UNION ALL SELECT path, node, entry FROM base
                     WHERE peer = ?1 AND path >= ?4 AND path < ?5 ORDER BY path",
                )?
                .query((peer.0, from, skip_from, skip_to, to))?,
        )
    }

    /// What a Git index stages, as [`Update::set_meaning`](crate::Update::set_meaning)
    /// has stored it.
    pub fn meaning(&self, content: ContentHash) -> Result<Option<ContentHash>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT meaning FROM meaning WHERE content = ?1")?;
        let mut rows = statement.query([content.0.as_slice()])?;
        match rows.next()? {
            Some(row) => Ok(Some(ContentHash(codec::array(
                "a meaning",
                row.get_ref(0)?,
            )?))),
            None => Ok(None),
        }
    }

    /// How many paths the base has.
    pub fn base_count(&self, peer: PeerId) -> Result<u64, Error> {
        let count: i64 = self
            .connection
            .prepare_cached("SELECT count(*) FROM base WHERE peer = ?1")?
            .query_row([peer.0], |row| row.get(0))?;
        Ok(count.cast_unsigned())
    }

    /// How many of them are no directories.
    pub fn base_files(&self, peer: PeerId) -> Result<u64, Error> {
        // An entry begins with its kind, and that of a directory is the first one.
        let count: i64 = self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM base WHERE peer = ?1 AND substr(entry, 1, 1) <> x'00'",
            )?
            .query_row([peer.0], |row| row.get(0))?;
        Ok(count.cast_unsigned())
    }

    /// What the peer was seen to have where that differs from the base, in the order
    /// of the paths.
    pub fn remote_pending(&self, peer: PeerId) -> Result<Vec<(RelPath, Option<Entry>)>, Error> {
        // Equal entries have equal encodings.
        self.seen(
            peer,
            "SELECT remote.path, remote.entry FROM remote
             LEFT JOIN base ON base.peer = remote.peer AND base.path = remote.path
             WHERE remote.peer = ?1 AND remote.entry IS NOT base.entry ORDER BY remote.path",
        )
    }

    /// Everything that the peer was seen to have and is still kept, also what the base has
    /// come to say meanwhile.
    pub fn observations(&self, peer: PeerId) -> Result<Vec<(RelPath, Option<Entry>)>, Error> {
        self.seen(
            peer,
            "SELECT path, entry FROM remote WHERE peer = ?1 ORDER BY path",
        )
    }

    fn seen(&self, peer: PeerId, query: &str) -> Result<Vec<(RelPath, Option<Entry>)>, Error> {
        let mut statement = self.connection.prepare_cached(query)?;
        let mut rows = statement.query([peer.0])?;
        let mut seen = Vec::new();
        while let Some(row) = rows.next()? {
            seen.push((
                codec::path(row.get_ref(0)?)?,
                codec::decode_option("an entry", row.get_ref(1)?)?,
            ));
        }
        Ok(seen)
    }

    /// All configured peers, in the order in which they were added.
    pub fn peers(&self) -> Result<Vec<Peer>, Error> {
        let mut statement = self.connection.prepare_cached(PEER)?;
        let mut rows = statement.query([None::<i64>])?;
        let mut peers = Vec::new();
        while let Some(row) = rows.next()? {
            peers.push(read_peer(row)?);
        }
        Ok(peers)
    }

    /// One peer.
    pub fn peer(&self, peer: PeerId) -> Result<Option<Peer>, Error> {
        let mut statement = self.connection.prepare_cached(PEER)?;
        let mut rows = statement.query([Some(peer.0)])?;
        rows.next()?.map(read_peer).transpose()
    }

    /// The agreements with a peer, the newest first.
    pub fn chain(&self, peer: PeerId) -> Result<Vec<ChainLink>, Error> {
        self.chain_of(peer).links()
    }

    /// Whether the tree holds an agreement with a peer whose base is not known here.
    pub fn lacks_base(&self, peer: PeerId) -> Result<bool, Error> {
        self.chain_of(peer).lacks_base()
    }

    /// What the base of a peer has been changed to since the last agreement with it, which
    /// the peer has not been told of.
    pub fn advanced(&self, peer: PeerId) -> Result<Vec<BaseChange>, Error> {
        self.chain_of(peer).advanced()
    }

    /// Up to `limit` rows of the base whose paths come after `after`.
    pub fn base_page(
        &self,
        peer: PeerId,
        after: Option<&RelPath>,
        limit: u32,
    ) -> Result<Vec<(RelPath, Entry)>, Error> {
        self.chain_of(peer).page(after, limit)
    }

    pub(crate) fn chain_of(&self, peer: PeerId) -> Chain<'_> {
        Chain::new(&self.connection, peer.0)
    }

    /// What was proposed to a peer, with its changes.
    pub fn proposal(&self, peer: PeerId) -> Result<Option<Proposal>, Error> {
        let Some(mut proposal) = self.peer(peer)?.and_then(|peer| peer.proposed) else {
            return Ok(None);
        };
        let mut statement = self.connection.prepare_cached(
            "SELECT change FROM proposed_change WHERE peer = ?1 ORDER BY position",
        )?;
        let mut rows = statement.query([peer.0])?;
        while let Some(row) = rows.next()? {
            let change = codec::blob("a proposed change", row.get_ref(0)?)?;
            proposal
                .changes
                .push(codec::decode("a proposed change", change)?);
        }
        Ok(Some(proposal))
    }

    /// The conflicts that are open, in the order in which they were opened.
    pub fn conflicts(&self) -> Result<Vec<Conflict>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, peer, path, base, local, remote, copy, info, since, since_nanos, unit
             FROM conflict ORDER BY id",
        )?;
        let mut rows = statement.query([])?;
        let mut conflicts = Vec::new();
        while let Some(row) = rows.next()? {
            let place = |column: usize| -> Result<Option<RelPath>, Error> {
                let column = row.get_ref(column)?;
                match column {
                    rusqlite::types::ValueRef::Null => Ok(None),
                    column => codec::path(column).map(Some),
                }
            };
            conflicts.push(Conflict {
                id: row.get(0)?,
                peer: PeerId(row.get(1)?),
                path: codec::path(row.get_ref(2)?)?,
                base: codec::decode_option("an entry", row.get_ref(3)?)?,
                local: codec::decode_option("an entry", row.get_ref(4)?)?,
                remote: codec::decode_option("an entry", row.get_ref(5)?)?,
                copy: place(6)?,
                info: place(7)?,
                since: Timestamp {
                    secs: row.get(8)?,
                    nanos: row.get(9)?,
                },
                unit: match row.get_ref(10)? {
                    rusqlite::types::ValueRef::Null => None,
                    unit => Some(ContentHash(codec::array("a unit", unit)?)),
                },
            });
        }
        Ok(conflicts)
    }
}

const PEER: &str = "SELECT peer.id, name, url, replica, peer.cursor, durable,
    peer.seen_epoch, peer.seen_rev, peer.agreement,
    proposal.agreement, proposal.cursor, batch, proposal.seen_epoch, proposal.seen_rev
    FROM peer LEFT JOIN proposal ON proposal.peer = peer.id
    WHERE ?1 IS NULL OR peer.id = ?1 ORDER BY peer.id";

fn read_peer(row: &Row<'_>) -> Result<Peer, Error> {
    let replica: Option<Vec<u8>> = row.get(3)?;
    let proposed: Option<Agreement> = codec::decode_option("an agreement", row.get_ref(9)?)?;
    Ok(Peer {
        id: PeerId(row.get(0)?),
        name: row.get(1)?,
        url: row.get(2)?,
        replica: match replica {
            Some(_) => Some(Id(codec::array("a replica", row.get_ref(3)?)?)),
            None => None,
        },
        cursor: row.get::<_, i64>(4)?.cast_unsigned(),
        durable: row.get::<_, i64>(5)?.cast_unsigned(),
        seen: position(row, 6, 7)?,
        agreement: codec::decode_option("an agreement", row.get_ref(8)?)?,
        proposed: match proposed {
            None => None,
            Some(agreement) => Some(Proposal {
                agreement,
                cursor: row.get::<_, i64>(10)?.cast_unsigned(),
                batch: Id(codec::array("a batch", row.get_ref(11)?)?),
                seen: position(row, 12, 13)?,
                changes: Vec::new(),
            }),
        },
    })
}

fn base(row: &Row<'_>, first: usize) -> Result<Base, Error> {
    Ok(Base {
        node: row.get::<_, Option<i64>>(first)?.map(NodeId),
        entry: codec::decode(
            "an entry",
            codec::blob("an entry", row.get_ref(first + 1)?)?,
        )?,
    })
}

fn bases(mut rows: rusqlite::Rows<'_>) -> Result<Vec<(RelPath, Base)>, Error> {
    let mut bases = Vec::new();
    while let Some(row) = rows.next()? {
        bases.push((codec::path(row.get_ref(0)?)?, base(row, 1)?));
    }
    Ok(bases)
}
