//! Writing what is known of the peers.

use super::Update;
use crate::codec::{encode, encode_option, millis};
use crate::view::below;
use crate::{
    Agreement, BaseChange, Conflict, ContentHash, Entry, Epoch, Error, NodeId, PeerId, Proposal,
    RelPath, ReplicaId, Timestamp,
};

/// How many meanings of Git indexes are kept: each takes about a hundred bytes, and a
/// repository needs that of its last agreement and of what either side has now.
const MEANINGS: i64 = 10_000;

/// How many notes are kept.
const NOTES: i64 = 10_000;

impl Update<'_> {
    /// Adds a peer: no base, nothing seen.
    pub fn add_peer(&self, name: &str, url: &str) -> Result<PeerId, Error> {
        let added = self.execute(
            "INSERT INTO peer (name, url, cursor, durable) VALUES (?1, ?2, 0, 0)
             ON CONFLICT DO NOTHING",
            (name, url),
        )?;
        if added == 0 {
            return Err(Error::PeerExists(name.to_owned()));
        }
        Ok(PeerId(self.connection.last_insert_rowid()))
    }

    /// Changes where a peer is.
    pub fn set_peer_url(&self, peer: PeerId, url: &str) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET url = ?2 WHERE id = ?1",
            (peer.0, url),
        )
    }

    /// Says which replica was found at a peer.
    pub fn set_peer_replica(&self, peer: PeerId, replica: ReplicaId) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET replica = ?2 WHERE id = ?1",
            (peer.0, replica.0.as_slice()),
        )
    }

    /// Removes a peer with everything known of it.
    pub fn remove_peer(&self, peer: PeerId) -> Result<(), Error> {
        self.on_peer(peer, "DELETE FROM peer WHERE id = ?1", [peer.0])?;
        self.withdraw(peer)?;
        for sql in [
            "DELETE FROM base WHERE peer = ?1",
            "DELETE FROM remote WHERE peer = ?1",
            "DELETE FROM conflict WHERE peer = ?1",
        ] {
            self.execute(sql, [peer.0])?;
        }
        Ok(())
    }

    /// Forgets base, cursor, agreement, proposal and what was seen: the next contact
    /// with the peer is the first.
    pub fn reset_base(&self, peer: PeerId) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET cursor = 0, durable = 0, agreement = NULL,
             seen_epoch = NULL, seen_rev = NULL WHERE id = ?1",
            [peer.0],
        )?;
        self.withdraw(peer)?;
        self.clear_observations(peer)?;
        self.execute("DELETE FROM base WHERE peer = ?1", [peer.0])?;
        Ok(())
    }

    /// Changes a base, step by step in their order; but moves that follow each other
    /// happen at once. Each starts from where the base had it before all of them, so that
    /// two directories can change places with everything below them.
    pub fn apply_base(&self, peer: PeerId, changes: &[BaseChange]) -> Result<(), Error> {
        self.known(peer)?;
        let is_move = |change: &BaseChange| matches!(change, BaseChange::Move { .. });
        for run in changes.chunk_by(|a, b| is_move(a) && is_move(b)) {
            self.apply_base_run(peer, run)?;
        }
        Ok(())
    }

    fn apply_base_run(&self, peer: PeerId, run: &[BaseChange]) -> Result<(), Error> {
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
                    self.put_base(peer, path, *node, entry)?;
                }
                BaseChange::Remove { path } => {
                    self.execute(
                        "DELETE FROM base WHERE peer = ?1 AND path = ?2",
                        (peer.0, path.as_bytes()),
                    )?;
                }
            }
        }
        if let [(from, to)] = moves.as_slice() {
            return self.move_base(peer, from.as_bytes(), to.as_bytes());
        }
        // Out of each other's way first, what lies deeper before what it lies in, to
        // places that no path has: none starts with a slash. The other way round on
        // arrival: what moved into a moved directory stands above what that brought along.
        let mut parked: Vec<_> = (0..).zip(&moves).collect();
        let place = |index: usize| format!("/{index}").into_bytes();
        parked.sort_by_key(|(_, (from, _))| std::cmp::Reverse(from.depth()));
        for (index, (from, _)) in &parked {
            self.move_base(peer, from.as_bytes(), &place(*index))?;
        }
        parked.sort_by_key(|(_, (_, to))| to.depth());
        for (index, (_, to)) in &parked {
            self.move_base(peer, &place(*index), to.as_bytes())?;
        }
        Ok(())
    }

    fn put_base(
        &self,
        peer: PeerId,
        path: &RelPath,
        node: Option<NodeId>,
        entry: &Entry,
    ) -> Result<(), Error> {
        self.execute(
            "INSERT INTO base VALUES (?1, ?2, ?3, ?4) ON CONFLICT
             DO UPDATE SET node = excluded.node, entry = excluded.entry",
            (
                peer.0,
                path.as_bytes(),
                node.map(|NodeId(id)| id),
                encode("an entry", entry)?,
            ),
        )?;
        Ok(())
    }

    /// Moves what the base has at and below a path that is not the root's.
    fn move_base(&self, peer: PeerId, from: &[u8], to: &[u8]) -> Result<(), Error> {
        let (first, end) = below(from);
        // Where the rest of a path starts, counted from 1: its slash, or after it if
        // nothing comes before.
        let rest = from.len() + if to.is_empty() { 2 } else { 1 };
        let rest = i64::try_from(rest).unwrap_or(i64::MAX);
        // What the base still has at the new place is gone: the move replaced it.
        // `||` gives text; the cast makes it bytes again without looking at them.
        self.execute(
            "UPDATE OR REPLACE base SET path = CAST(?3 || substr(path, ?4) AS BLOB)
             WHERE peer = ?1 AND (path = ?2 OR (path >= ?5 AND path < ?6))",
            (peer.0, from, to, rest, first, end),
        )?;
        Ok(())
    }

    /// Stores what the peer was seen to have at a path; none: nothing.
    pub fn observe(
        &self,
        peer: PeerId,
        path: &RelPath,
        entry: Option<&Entry>,
    ) -> Result<(), Error> {
        self.execute(
            "INSERT INTO remote VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET entry = excluded.entry",
            (peer.0, path.as_bytes(), encode_option("an entry", entry)?),
        )?;
        Ok(())
    }

    /// Forgets what was seen at a path.
    pub fn forget_observation(&self, peer: PeerId, path: &RelPath) -> Result<(), Error> {
        self.execute(
            "DELETE FROM remote WHERE peer = ?1 AND path = ?2",
            (peer.0, path.as_bytes()),
        )?;
        Ok(())
    }

    /// Forgets everything that was seen of a peer.
    pub fn clear_observations(&self, peer: PeerId) -> Result<(), Error> {
        self.execute("DELETE FROM remote WHERE peer = ?1", [peer.0])?;
        Ok(())
    }

    /// Says up to where the peer's reports have been stored.
    pub fn set_seen(&self, peer: PeerId, epoch: Epoch, rev: u64) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET seen_epoch = ?2, seen_rev = ?3 WHERE id = ?1",
            (peer.0, epoch.0.cast_signed(), rev.cast_signed()),
        )
    }

    /// Forgets up to where the peer's reports were stored, and what they said: the peer
    /// reports its whole tree again.
    pub fn forget_seen(&self, peer: PeerId) -> Result<(), Error> {
        self.clear_observations(peer)?;
        self.on_peer(
            peer,
            "UPDATE peer SET seen_epoch = NULL, seen_rev = NULL WHERE id = ?1",
            [peer.0],
        )
    }

    /// Says up to where local changes survive a power loss of the peer.
    pub fn set_durable(&self, peer: PeerId, n: u64) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET durable = ?2 WHERE id = ?1",
            (peer.0, n.cast_signed()),
        )
    }

    /// Says up to where local changes are in the peer's base.
    pub fn set_cursor(&self, peer: PeerId, n: u64) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET cursor = ?2 WHERE id = ?1",
            (peer.0, n.cast_signed()),
        )
    }

    /// Says which agreement both sides hold.
    pub fn set_agreement(&self, peer: PeerId, agreement: Option<&Agreement>) -> Result<(), Error> {
        self.on_peer(
            peer,
            "UPDATE peer SET agreement = ?2 WHERE id = ?1",
            (peer.0, encode_option("an agreement", agreement)?),
        )
    }

    /// Stores an agreement before it is offered, in place of an older proposal.
    /// Observations stay as they are: one that says the same as the base of now may
    /// mean that the peer has left what the proposal is about to make the base.
    pub fn propose(&self, peer: PeerId, proposal: &Proposal) -> Result<(), Error> {
        self.known(peer)?;
        self.withdraw(peer)?;
        self.execute(
            "INSERT INTO proposal VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            (
                peer.0,
                encode("an agreement", &proposal.agreement)?,
                proposal.cursor.cast_signed(),
                proposal.batch.0.as_slice(),
                proposal.seen.map(|(epoch, _)| epoch.0.cast_signed()),
                proposal.seen.map(|(_, rev)| rev.cast_signed()),
            ),
        )?;
        let mut insert = self
            .connection
            .prepare_cached("INSERT INTO proposed_change VALUES (?1, ?2, ?3)")?;
        for (position, change) in (0_i64..).zip(&proposal.changes) {
            insert.execute((peer.0, position, encode("a proposed change", change)?))?;
        }
        Ok(())
    }

    /// The peer has what was proposed: takes over its base, cursor and agreement.
    pub fn accept(&self, peer: PeerId) -> Result<(), Error> {
        let Some(proposal) = self.proposal(peer)? else {
            return Err(Error::NothingProposed(peer));
        };
        self.apply_base(peer, &proposal.changes)?;
        self.set_cursor(peer, proposal.cursor)?;
        self.set_agreement(peer, Some(&proposal.agreement))?;
        self.withdraw(peer)?;
        self.drop_equal_observations(peer)
    }

    /// Forgets a proposal. Nothing happens if there is none.
    pub fn withdraw(&self, peer: PeerId) -> Result<(), Error> {
        self.execute("DELETE FROM proposal WHERE peer = ?1", [peer.0])?;
        self.execute("DELETE FROM proposed_change WHERE peer = ?1", [peer.0])?;
        Ok(())
    }

    /// Forgets the observations that say the same as the base. A round begins with this:
    /// one that is equal to the base and arrives later may mean that the peer went back
    /// to it.
    pub fn drop_equal_observations(&self, peer: PeerId) -> Result<(), Error> {
        self.execute(
            "DELETE FROM remote WHERE peer = ?1 AND entry IS
             (SELECT base.entry FROM base
              WHERE base.peer = remote.peer AND base.path = remote.path)",
            [peer.0],
        )?;
        Ok(())
    }

    /// Notes what was decided about a path, for people. Only so many of the newest are kept.
    pub fn note(&self, peer: PeerId, path: &RelPath, what: &str) -> Result<(), Error> {
        self.execute(
            "INSERT INTO note (n, at, peer, path, what) VALUES (?1, ?2, ?3, ?4, ?5)",
            (
                self.n().cast_signed(),
                millis(Timestamp::now()),
                peer.0,
                path.as_bytes(),
                what,
            ),
        )?;
        self.execute(
            "DELETE FROM note WHERE id <= (SELECT max(id) FROM note) - ?1",
            [NOTES],
        )?;
        Ok(())
    }

    /// Stores what a Git index stages. Only so many of the newest are kept.
    pub fn set_meaning(&self, content: ContentHash, meaning: ContentHash) -> Result<(), Error> {
        self.execute(
            "INSERT OR REPLACE INTO meaning (content, meaning) VALUES (?1, ?2)",
            (content.0.as_slice(), meaning.0.as_slice()),
        )?;
        self.execute(
            "DELETE FROM meaning WHERE id <= (SELECT max(id) FROM meaning) - ?1",
            [MEANINGS],
        )?;
        Ok(())
    }

    /// Opens a conflict, or brings the one that is open with the same peer at the
    /// same path up to date. Returns its key.
    pub fn open_conflict(&self, conflict: &Conflict) -> Result<i64, Error> {
        let id = self
            .connection
            .prepare_cached(
                "INSERT INTO conflict
                 (peer, path, base, local, remote, copy, info, since, since_nanos, unit)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
                 ON CONFLICT (peer, path) DO UPDATE SET base = excluded.base,
                 local = excluded.local, remote = excluded.remote, copy = excluded.copy,
                 info = excluded.info, since = excluded.since, since_nanos = excluded.since_nanos,
                 unit = excluded.unit RETURNING id",
            )?
            .query_row(
                (
                    conflict.peer.0,
                    conflict.path.as_bytes(),
                    encode_option("an entry", conflict.base.as_ref())?,
                    encode_option("an entry", conflict.local.as_ref())?,
                    encode_option("an entry", conflict.remote.as_ref())?,
                    conflict.copy.as_ref().map(RelPath::as_bytes),
                    conflict.info.as_ref().map(RelPath::as_bytes),
                    conflict.since.secs,
                    conflict.since.nanos,
                    conflict.unit.as_ref().map(|unit| unit.0.as_slice()),
                ),
                |row| row.get(0),
            )?;
        Ok(id)
    }

    /// Closes a conflict. False if there is none with that key.
    pub fn close_conflict(&self, id: i64) -> Result<bool, Error> {
        Ok(self.execute("DELETE FROM conflict WHERE id = ?1", [id])? > 0)
    }

    fn known(&self, peer: PeerId) -> Result<(), Error> {
        let known: bool = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM peer WHERE id = ?1)")?
            .query_row([peer.0], |row| row.get(0))?;
        if known {
            Ok(())
        } else {
            Err(Error::UnknownPeer(peer))
        }
    }

    fn on_peer(&self, peer: PeerId, sql: &str, params: impl rusqlite::Params) -> Result<(), Error> {
        match self.execute(sql, params)? {
            0 => Err(Error::UnknownPeer(peer)),
            _ => Ok(()),
        }
    }
}
