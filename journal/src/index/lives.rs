//! The lives of the mounted sides: whose journal was being written when each was served last.
//!
//! A tree that is brought back from a copy goes on in another life of the same replica, and
//! the life before it is over. Two that take turns are both alive: one is a copy of the other.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension};
use serde::{Deserialize, Serialize};

use super::{DATABASE, IndexError, PeerIndex};
use crate::model::{Epoch, ReplicaId};

/// How many are remembered.
const LIVES: usize = 64;

/// Where they are in the index.
const KEY: &str = "lives";

/// A life of a mounted side that was served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Life {
    mount: ReplicaId,
    epoch: Epoch,
    /// The one in whose place it came back, if it did.
    instead_of: Option<Epoch>,
}

/// The lives that were served, the latest last.
#[derive(Default, Serialize, Deserialize)]
struct Lives(Vec<Life>);

impl Lives {
    fn read(stored: Option<Vec<u8>>) -> Self {
        stored
            .and_then(|bytes| postcard::from_bytes(&bytes).ok())
            .unwrap_or_default()
    }

    fn last(&self, mount: ReplicaId) -> Option<Life> {
        self.0.iter().rfind(|life| life.mount == mount).copied()
    }

    /// Whether a life would take the place of one that has come back in its own place.
    fn take_turns(&self, mount: ReplicaId, epoch: Epoch) -> bool {
        let last = self.last(mount);
        last.is_some_and(|last| last.instead_of == Some(epoch))
    }

    fn begin(&mut self, mount: ReplicaId, epoch: Epoch) {
        let last = self.last(mount).map(|last| last.epoch);
        let before = self.0.len();
        self.0
            .retain(|life| (life.mount, life.epoch) != (mount, epoch));
        let known = self.0.len() < before;
        self.0.push(Life {
            mount,
            epoch,
            instead_of: last.filter(|_| known),
        });
        let old = self.0.len().saturating_sub(LIVES);
        self.0.drain(..old);
    }
}

/// Whether a life of a mounted side takes turns with another one, as far as the index in a
/// directory tells. Looks without touching anything: somebody else may be at work.
pub fn is_copied(dir: &Path, mount: ReplicaId, life: Epoch) -> bool {
    let look = || -> Result<Option<Vec<u8>>, rusqlite::Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(dir.join(DATABASE), flags)?;
        db.busy_timeout(std::time::Duration::from_secs(10))?;
        db.query_row("SELECT value FROM meta WHERE key = ?1", [KEY], |row| {
            row.get(0)
        })
        .optional()
    };
    // What cannot be told now is told when the index is opened.
    Lives::read(look().ok().flatten()).take_turns(mount, life)
}

impl PeerIndex {
    /// Notes that a life of a mounted side is being served from now on. False, and nothing
    /// is noted, if it takes turns with another one.
    pub fn begin_life(&mut self, mount: ReplicaId, life: Epoch) -> Result<bool, IndexError> {
        let mut lives = Lives::read(self.meta(KEY)?);
        if lives.last(mount).is_some_and(|last| last.epoch == life) {
            return Ok(true);
        }
        if lives.take_turns(mount, life) {
            return Ok(false);
        }
        lives.begin(mount, life);
        let bytes = crate::codec::encode("lives", &lives).map_err(|e| self.chain_failed(e))?;
        self.set_meta(KEY, &bytes)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Id;

    #[test]
    fn who_takes_turns_is_told_from_who_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (mount, other) = (Id([1; 16]), Id([2; 16]));
        assert!(!is_copied(dir.path(), mount, Epoch(1)));
        let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
        let mut begin = |life| {
            let copied = is_copied(dir.path(), mount, Epoch(life));
            let begun = index.begin_life(mount, Epoch(life)).unwrap();
            assert_eq!(begun, !copied);
            // What another mounted side does is nothing to this one.
            assert!(index.begin_life(other, Epoch(u64::MAX)).unwrap());
            begun
        };
        // One after the other, and one that is brought back with its memory.
        for life in [1, 1, 2, 3, 1, 1, 4, 2] {
            assert!(begin(life), "{life}");
        }
        // The other one is there still.
        assert!(!begin(4));
        assert!(begin(2) && !begin(4));
        // Started anew, it says that it is the one to go on; then the other one does not.
        assert!(begin(5) && begin(2) && !begin(5));
        for life in 10..100 {
            assert!(begin(life));
        }
        assert!(begin(2), "long forgotten");
    }
}
