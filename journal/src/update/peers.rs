//! Writing what is known of the peers.

use super::Update;
use crate::chain::Marked;
use crate::codec::{encode, encode_option, millis};
use crate::{
    Agreement, BaseChange, Conflict, ContentHash, Entry, Epoch, Error, PeerId, Proposal, RelPath,
    ReplicaId, Timestamp,
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
            "DELETE FROM remote WHERE peer = ?1",
            "DELETE FROM conflict WHERE peer = ?1",
        ] {
            self.execute(sql, [peer.0])?;
        }
        self.chain_of(peer).clear()
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
        self.chain_of(peer).clear()
    }

    /// Changes a base as the steps say, without an agreement. See [`Self::accept`].
    pub fn apply_base(&self, peer: PeerId, changes: &[BaseChange]) -> Result<(), Error> {
        self.known(peer)?;
        self.chain_of(peer).change(changes, None)
    }

    /// Changes a base ahead of the next agreement, which has to tell the peer of it: see
    /// [`View::advanced`](crate::View::advanced). Going back to the last agreement undoes it.
    pub fn advance_base(&self, peer: PeerId, changes: &[BaseChange]) -> Result<(), Error> {
        self.known(peer)?;
        self.chain_of(peer).advance(changes)
    }

    /// Goes back to an earlier agreement with a peer, with its base, and forgets what was
    /// seen of the peer: everything is compared, on the grounds of that base. False if the
    /// base of that agreement is not known here; then nothing happens.
    pub fn rejoin(&self, peer: PeerId, at: &Agreement) -> Result<bool, Error> {
        self.known(peer)?;
        if !self.chain_of(peer).rewind(at)? {
            return Ok(false);
        }
        self.compare_all(peer, Some(at))?;
        Ok(true)
    }

    /// Makes room for a base that comes from the peer.
    pub fn begin_base(&self, peer: PeerId) -> Result<(), Error> {
        self.reset_base(peer)
    }

    /// Puts rows of a base that comes from the peer.
    pub fn fill_base(&self, peer: PeerId, rows: &[(RelPath, Entry)]) -> Result<(), Error> {
        self.chain_of(peer).fill(rows)
    }

    /// The base that came from the peer is complete, and is that of an agreement.
    pub fn end_base(&self, peer: PeerId, at: &Agreement) -> Result<(), Error> {
        self.chain_of(peer).restart(at, Timestamp::now())?;
        self.compare_all(peer, Some(at))
    }

    /// Takes up what the tree says was agreed on last with a peer.
    pub fn take_mark(&self, peer: PeerId, mark: Option<&Agreement>) -> Result<Marked, Error> {
        self.known(peer)?;
        let chain = self.chain_of(peer);
        let found = chain.take_mark(mark, Timestamp::now())?;
        match found {
            Marked::Last => {}
            Marked::Earlier => self.compare_all(peer, mark)?,
            Marked::Missing => self.reset_base(peer)?,
            Marked::Unknown => {
                // Of a chain of another history nothing is left.
                let based = chain.links()?.into_iter().find(|link| link.based);
                let agreement = based.map(|link| link.agreement);
                self.compare_all(peer, agreement.as_ref())?;
            }
        }
        Ok(found)
    }

    /// Forgets how to get back to agreements made before a time, or beyond so many changes
    /// of the base or so many agreements.
    pub fn prune_chain(
        &self,
        peer: PeerId,
        before: Timestamp,
        changes: u64,
        links: u64,
    ) -> Result<(), Error> {
        self.chain_of(peer).prune(before, changes, links)
    }

    /// Nothing is known to be the same on both sides, but for what the base of `at` says.
    fn compare_all(&self, peer: PeerId, at: Option<&Agreement>) -> Result<(), Error> {
        self.withdraw(peer)?;
        self.clear_observations(peer)?;
        self.set_agreement(peer, at)?;
        self.on_peer(
            peer,
            "UPDATE peer SET cursor = 0, durable = 0, seen_epoch = NULL, seen_rev = NULL
             WHERE id = ?1",
            [peer.0],
        )
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

    fn set_agreement(&self, peer: PeerId, agreement: Option<&Agreement>) -> Result<(), Error> {
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
        let chain = self.chain_of(peer);
        chain.change(&proposal.changes, Some(&proposal.agreement))?;
        chain.agree(&proposal.agreement, Timestamp::now())?;
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
