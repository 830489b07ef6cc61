//! Contents of small files as both sides last agreed on them, so that a conflict can be
//! shown three ways, and merged.
//!
//! This is a cache: what it holds may go at any time, and a database that is damaged is
//! simply begun anew.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use crate::{ContentHash, Error};

/// Larger files are not kept, in bytes.
pub const LARGEST: u64 = 256 * 1024;

/// How many bytes of content are kept in all. The oldest go first.
const ROOM: i64 = 64 * 1024 * 1024;

const DATABASE: &str = "contents.db";

const CREATE: &str = "
CREATE TABLE IF NOT EXISTS content (
    id    INTEGER PRIMARY KEY AUTOINCREMENT,
    hash  BLOB NOT NULL UNIQUE,
    bytes BLOB NOT NULL
) STRICT;
";

/// The contents beside a journal.
pub struct Contents {
    connection: Mutex<Connection>,
    room: i64,
}

fn path(dir: &Path) -> PathBuf {
    dir.join(DATABASE)
}

impl Contents {
    /// Opens what is kept in a directory that exists.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = path(dir);
        let connection = match prepare(&path) {
            Err(error) if error.is_corruption() => {
                tracing::warn!(path = %path.display(), %error, "begun anew");
                for companion in ["", "-wal", "-shm"] {
                    let mut name = path.clone().into_os_string();
                    name.push(companion);
                    let _ = std::fs::remove_file(name);
                }
                prepare(&path)?
            }
            prepared => prepared?,
        };
        Ok(Self {
            connection: Mutex::new(connection),
            room: ROOM,
        })
    }

    /// Which of these are not kept yet.
    pub fn missing(&self, wanted: Vec<ContentHash>) -> Result<HashSet<ContentHash>, Error> {
        let connection = self.lock();
        let mut known = connection.prepare_cached("SELECT 1 FROM content WHERE hash = ?1")?;
        let mut missing = HashSet::new();
        for hash in wanted {
            if !known.exists([hash.0.as_slice()])? {
                missing.insert(hash);
            }
        }
        Ok(missing)
    }

    /// Keeps contents. What is too large is left out, and what there is no room for goes.
    pub fn keep(&self, contents: Vec<(ContentHash, Vec<u8>)>) -> Result<(), Error> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        {
            let mut insert = transaction
                .prepare_cached("INSERT OR IGNORE INTO content (hash, bytes) VALUES (?1, ?2)")?;
            for (hash, bytes) in contents {
                if bytes.len() as u64 <= LARGEST {
                    insert.execute((hash.0.as_slice(), bytes))?;
                }
            }
            let total: i64 = transaction
                .prepare_cached("SELECT coalesce(sum(length(bytes)), 0) FROM content")?
                .query_row([], |row| row.get(0))?;
            let mut excess = total - self.room;
            let mut oldest =
                transaction.prepare_cached("SELECT id, length(bytes) FROM content ORDER BY id")?;
            let mut oldest = oldest.query([])?;
            let mut upto = 0_i64;
            while excess > 0
                && let Some(row) = oldest.next()?
            {
                upto = row.get(0)?;
                excess -= row.get::<_, i64>(1)?;
            }
            transaction
                .prepare_cached("DELETE FROM content WHERE id <= ?1")?
                .execute([upto])?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// A content, if it is kept.
    pub fn get(&self, hash: ContentHash) -> Result<Option<Vec<u8>>, Error> {
        read(&self.lock(), hash)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A content that is kept in a directory, for whoever only looks.
pub fn kept_content(dir: &Path, hash: ContentHash) -> Result<Option<Vec<u8>>, Error> {
    let path = path(dir);
    if !path.exists() {
        return Ok(None);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    read(&connection, hash)
}

fn read(connection: &Connection, hash: ContentHash) -> Result<Option<Vec<u8>>, Error> {
    let bytes: Option<Vec<u8>> = connection
        .prepare_cached("SELECT bytes FROM content WHERE hash = ?1")?
        .query_row([hash.0.as_slice()], |row| row.get(0))
        .optional()?;
    Ok(bytes.filter(|bytes| ContentHash::of(bytes) == hash))
}

fn prepare(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    // What a power loss damages is begun anew.
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;")?;
    connection.execute_batch(CREATE)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut contents = Contents::open(dir.path()).unwrap();
        contents.room = 10_000;
        let content = |number: u8| (ContentHash::of(&[number; 3000]), vec![number; 3000]);
        for number in 0..5 {
            contents.keep(vec![content(number)]).unwrap();
        }
        let kept = |number: u8| contents.get(content(number).0).unwrap().is_some();
        assert_eq!([0, 1, 2, 3, 4].map(kept), [false, false, true, true, true]);
        let too_large = vec![0; usize::try_from(LARGEST).unwrap() + 1];
        let hash = ContentHash::of(&too_large);
        contents.keep(vec![(hash, too_large)]).unwrap();
        assert_eq!(contents.get(hash).unwrap(), None);
        let wanted = vec![content(0).0, content(4).0];
        assert_eq!(
            contents.missing(wanted).unwrap(),
            HashSet::from([content(0).0])
        );
        assert_eq!(
            kept_content(dir.path(), content(4).0).unwrap(),
            Some(content(4).1)
        );
    }

    #[test]
    fn a_damaged_one_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(path(dir.path()), b"no database at all ".repeat(500)).unwrap();
        let contents = Contents::open(dir.path()).unwrap();
        let hash = ContentHash::of(b"x");
        contents.keep(vec![(hash, b"x".to_vec())]).unwrap();
        assert_eq!(contents.get(hash).unwrap().as_deref(), Some(&b"x"[..]));
    }
}
