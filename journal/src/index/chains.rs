//! The chains of agreements of a peer directory, one for each mounted side.

use std::collections::BTreeSet;

use rusqlite::{OptionalExtension, params};

use super::{IndexError, PeerIndex};
use crate::chain::{Chain, ChainLink, Marked, base_without};
use crate::model::{Agreement, Entry, RelPath, ReplicaId, Timestamp};
use crate::{BaseChange, Error, Id};

impl PeerIndex {
    /// The agreements with a mounted side, the newest first.
    pub fn chain(&self, mount: ReplicaId) -> Result<Vec<ChainLink>, IndexError> {
        self.with(mount, |chain| chain.links())
            .map(Option::unwrap_or_default)
    }

    /// The last agreement with a mounted side.
    pub fn last_agreement(&self, mount: ReplicaId) -> Result<Option<ChainLink>, IndexError> {
        self.with(mount, |chain| chain.last()).map(Option::flatten)
    }

    /// The last agreement with each mounted side.
    pub fn last_agreements(&self) -> Result<Vec<(ReplicaId, Agreement)>, IndexError> {
        let mut last = Vec::new();
        for mount in self.mounted()? {
            if let Some(link) = self.last_agreement(mount)? {
                last.push((mount, link.agreement));
            }
        }
        Ok(last)
    }

    /// The mounted sides that have been served.
    pub fn mounted(&self) -> Result<Vec<ReplicaId>, IndexError> {
        let get = || -> Result<Vec<[u8; 16]>, rusqlite::Error> {
            self.db
                .prepare_cached("SELECT replica FROM mounted ORDER BY id")?
                .query_map([], |row| row.get(0))?
                .collect()
        };
        let found = get().map_err(|e| self.fail(e))?;
        Ok(found.into_iter().map(Id).collect())
    }

    /// Takes up what the tree says was agreed on last with a mounted side. Returns how that
    /// fits the chain, which then ends with it.
    pub fn take_mark(
        &mut self,
        mount: ReplicaId,
        mark: Option<&Agreement>,
    ) -> Result<Marked, IndexError> {
        if mark.is_some() {
            self.meet(mount)?;
        }
        self.with(mount, |chain| chain.take_mark(mark, Timestamp::now()))
            .map(|found| found.unwrap_or(Marked::Last))
    }

    /// Goes back to an agreement; to none if that is none. The base goes back with it as
    /// far as it is known.
    pub fn rejoin(&mut self, mount: ReplicaId, at: Option<&Agreement>) -> Result<(), IndexError> {
        self.with(mount, |chain| match at {
            None => chain.clear(),
            Some(at) => chain.rewind(at).map(drop),
        })
        .map(drop)
    }

    /// Puts rows of a base that comes from the mounted side, in place of what is there if
    /// these are the first.
    pub fn fill_base(
        &mut self,
        mount: ReplicaId,
        first: bool,
        rows: &[(RelPath, Entry)],
    ) -> Result<(), IndexError> {
        self.meet(mount)?;
        self.with(mount, |chain| {
            if first {
                chain.clear()?;
            }
            chain.fill(rows)
        })
        .map(drop)
    }

    /// The base that came from the mounted side is complete, and is that of an agreement.
    pub fn end_base(&mut self, mount: ReplicaId, at: &Agreement) -> Result<(), IndexError> {
        self.meet(mount)?;
        self.with(mount, |chain| chain.restart(at, Timestamp::now()))
            .map(drop)
    }

    /// What the base with a mounted side has at a path.
    pub fn base_at(&self, mount: ReplicaId, path: &RelPath) -> Result<Option<Entry>, IndexError> {
        self.with(mount, |chain| chain.at(path))
            .map(Option::flatten)
    }

    /// Up to `limit` rows of the base with a mounted side whose paths come after `after`.
    pub fn base_page(
        &self,
        mount: ReplicaId,
        after: Option<&RelPath>,
        limit: u32,
    ) -> Result<Vec<(RelPath, Entry)>, IndexError> {
        self.with(mount, |chain| chain.page(after, limit))
            .map(Option::unwrap_or_default)
    }

    /// Keeps what a batch that is being offered changes in the base, each change with the
    /// steps it stands on. With `first`, what was kept of any batch before goes, but for
    /// one that is still being applied.
    pub fn propose(
        &mut self,
        batch: Id,
        first: bool,
        applying: Option<Id>,
        changes: &[(BaseChange, Vec<u32>)],
    ) -> Result<(), IndexError> {
        if first {
            let applying = applying.map(|id| id.0.to_vec());
            self.run(
                "DELETE FROM proposed WHERE batch IS NOT ?1",
                params![applying],
            )?;
        }
        for change in changes {
            let bytes = crate::codec::encode("a change of the base", change)
                .map_err(|error| self.chain_failed(error))?;
            self.run(
                "INSERT INTO proposed (batch, change) VALUES (?1, ?2)",
                params![batch.0.as_slice(), bytes],
            )?;
        }
        Ok(())
    }

    /// Takes up the agreement that a batch makes with a mounted side, with what was kept of
    /// its base but for what stands on steps that were not carried out. Once is as good as
    /// twice.
    pub fn agree(
        &mut self,
        mount: ReplicaId,
        agreement: &Agreement,
        batch: Id,
        diverged: &BTreeSet<u32>,
    ) -> Result<(), IndexError> {
        let last = self.last_agreement(mount)?;
        if last.is_some_and(|last| last.agreement == *agreement) {
            return Ok(());
        }
        let get = || -> Result<Vec<Vec<u8>>, rusqlite::Error> {
            self.db
                .prepare_cached("SELECT change FROM proposed WHERE batch = ?1 ORDER BY position")?
                .query_map([batch.0.as_slice()], |row| row.get(0))?
                .collect()
        };
        let mut changes = Vec::new();
        for bytes in get().map_err(|e| self.fail(e))? {
            changes.push(
                crate::codec::decode("a change of the base", &bytes)
                    .map_err(|error| self.chain_failed(error))?,
            );
        }
        let changes = base_without(&changes, diverged);
        self.meet(mount)?;
        self.with(mount, |chain| {
            chain.change(&changes, Some(agreement))?;
            chain.agree(agreement, Timestamp::now())
        })
        .map(drop)
    }

    /// Forgets how to get back to agreements made before a time, or beyond so many changes
    /// of the base or so many agreements.
    pub fn prune_chains(
        &mut self,
        before: Timestamp,
        changes: u64,
        links: u64,
    ) -> Result<(), IndexError> {
        for mount in self.mounted()? {
            self.with(mount, |chain| chain.prune(before, changes, links))?;
        }
        Ok(())
    }

    /// Gives a mounted side a chain.
    fn meet(&mut self, mount: ReplicaId) -> Result<(), IndexError> {
        self.run(
            "INSERT OR IGNORE INTO mounted (replica) VALUES (?1)",
            params![mount.0.as_slice()],
        )
    }

    fn with<T>(
        &self,
        mount: ReplicaId,
        work: impl FnOnce(&Chain<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, IndexError> {
        let key: Option<i64> = self
            .db
            .prepare_cached("SELECT id FROM mounted WHERE replica = ?1")
            .and_then(|mut statement| {
                statement
                    .query_row([mount.0.as_slice()], |row| row.get(0))
                    .optional()
            })
            .map_err(|e| self.fail(e))?;
        let Some(key) = key else { return Ok(None) };
        work(&Chain::new(&self.db, key))
            .map(Some)
            .map_err(|error| self.chain_failed(error))
    }

    pub(super) fn chain_failed(&self, source: Error) -> IndexError {
        IndexError::Chain {
            path: self.path.clone(),
            source,
        }
    }
}
