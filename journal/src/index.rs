//! The agent's index of a peer directory: what it last saw under every name, numbered.
//!
//! It is a database of its own, beside none of the mounted side's. It holds observations
//! (which a scan could find again, at the price of hashing), the redo record of a batch
//! that is being applied, and for each mounted side that was served the chain of
//! agreements with the base, which nothing else could give back.

mod chains;
mod codec;
mod lives;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Row as SqlRow, params};

use crate::model::{Content, ContentHash, Entry, Epoch, RelPath, ReplicaId, Timestamp, Xattrs};
pub use lives::is_copied;

use codec::{decode_xattrs, encode_xattrs, kind_number, signed};

/// Statements that bring an index from schema `position` to the next. Only ever appended
/// to.
const MIGRATIONS: [&str; 3] = [CREATE, CHAINS, DISPLACED];
/// The schema this program writes.
pub(crate) const SCHEMA: i64 = MIGRATIONS.len() as i64;
/// The first schema with the chains as they are.
pub(crate) const CHAINED: i64 = 2;

/// The file.
pub(crate) const DATABASE: &str = "index.db";

/// The mounted sides, each with the key of its chain; their bases; and what a batch that
/// has been offered changes in the base. An agreement from before is forgotten: with whom
/// it was made was not written down.
pub(crate) const CHAINS: &str = "
-- The agreements of a chain. `position` grows along it. Of those that are not `based` only
-- the tree knows: the base of this database is older.
CREATE TABLE agreed (
    peer      INTEGER NOT NULL,
    position  INTEGER NOT NULL,
    agreement BLOB NOT NULL,
    based     INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    PRIMARY KEY (peer, position)
) STRICT, WITHOUT ROWID;

-- What the base had at a path before the agreement at a position was made.
CREATE TABLE base_undo (
    peer     INTEGER NOT NULL,
    path     BLOB NOT NULL,
    position INTEGER NOT NULL,
    node     INTEGER,
    entry    BLOB,
    PRIMARY KEY (peer, path, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX base_undo_position ON base_undo (peer, position);

CREATE TABLE mounted (id INTEGER PRIMARY KEY, replica BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE base (
    peer INTEGER NOT NULL,
    path BLOB NOT NULL,
    node INTEGER,
    entry BLOB NOT NULL,
    PRIMARY KEY (peer, path)
) STRICT, WITHOUT ROWID;
CREATE TABLE proposed (
    position INTEGER PRIMARY KEY,
    batch BLOB NOT NULL,
    change BLOB NOT NULL
) STRICT;
DELETE FROM meta WHERE key IN ('agreement', 'applied');
";

/// What batches have displaced and programs may still write to.
const DISPLACED: &str = "
CREATE TABLE displaced (kept BLOB PRIMARY KEY, row BLOB NOT NULL) STRICT, WITHOUT ROWID;
";

const CREATE: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE row (
    path BLOB PRIMARY KEY,
    dir BLOB,                     -- the parent's path; NULL for the root and for tombstones
    rev INTEGER NOT NULL,
    ino INTEGER NOT NULL, size INTEGER NOT NULL, real_mode INTEGER NOT NULL,
    mtime_s INTEGER NOT NULL, mtime_n INTEGER NOT NULL,
    ctime_s INTEGER NOT NULL, ctime_n INTEGER NOT NULL,
    racy INTEGER NOT NULL,        -- seen too shortly after its last change to be trusted
    masked INTEGER NOT NULL,      -- the filesystem holds fewer attributes than the entry
    kind INTEGER,                 -- NULL: a tombstone
    mode INTEGER, e_mtime_s INTEGER, e_mtime_n INTEGER,
    e_size INTEGER, hash BLOB, target BLOB, xattrs BLOB
) STRICT, WITHOUT ROWID;
CREATE INDEX row_rev ON row (rev);
CREATE INDEX row_dir ON row (dir) WHERE dir IS NOT NULL;
CREATE INDEX row_hash ON row (hash) WHERE hash IS NOT NULL AND kind IS NOT NULL;
CREATE INDEX row_ino ON row (ino);
";

const COLUMNS: &str = "path, rev, ino, size, real_mode, mtime_s, mtime_n, ctime_s, ctime_n, \
     racy, masked, kind, mode, e_mtime_s, e_mtime_n, e_size, hash, target, xattrs";

/// What can go wrong with the index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// SQLite failed.
    #[error("index {path}: {source}")]
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// How it failed.
        source: rusqlite::Error,
    },
    /// The database was written by a newer program.
    #[error(
        "index {path} has schema {found}, and this program knows up to {SCHEMA}: upgrade mirrorfs on the peer"
    )]
    Newer {
        /// The database file.
        path: PathBuf,
        /// Its schema.
        found: i64,
    },
    /// A stored value is not what this program writes.
    #[error("index {path} is damaged ({what}): remove the file, and the directory is scanned anew")]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// What was found damaged.
        what: &'static str,
    },
    /// A chain of agreements failed.
    #[error("index {path}: {source}")]
    Chain {
        /// The database file.
        path: PathBuf,
        /// How it failed.
        source: crate::Error,
    },
    /// The kernel gives no random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
}

/// By what an inode is recognised as unchanged without reading it. No device number:
/// those change across reboots, and a tree lies on one device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fingerprint {
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Kind and permission bits, as `stat` gives them.
    pub mode: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Change time.
    pub ctime: Timestamp,
}

/// What the index knows of one path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The path.
    pub path: RelPath,
    /// The revision at which it became this.
    pub rev: u64,
    /// By what it is recognised. Of a tombstone: what was last there.
    pub fingerprint: Fingerprint,
    /// Whether it was seen so shortly after its last change that a later change may have
    /// left the fingerprint as it is.
    pub racy: bool,
    /// Whether the filesystem holds fewer attributes than the entry says.
    pub masked: bool,
    /// What is there; none for a tombstone.
    pub entry: Option<Entry>,
}

/// How long a transaction must last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durable {
    /// It survives the death of the process. A scan would find it again.
    Process,
    /// It survives a power loss, from the commit on.
    PowerLoss,
}

/// The index of one peer directory, open.
pub struct PeerIndex {
    db: Connection,
    path: PathBuf,
    epoch: Epoch,
    rev: u64,
    durable_commits: u64,
}

impl PeerIndex {
    /// Opens the index in a directory that exists, or makes it. `identity` says which
    /// tree it is about, in any form: an index of another one is emptied and begins a
    /// new epoch.
    pub fn open(dir: &Path, identity: &[u8]) -> Result<Self, IndexError> {
        let path = dir.join(DATABASE);
        let fail = |source| IndexError::Sqlite {
            path: path.clone(),
            source,
        };
        let db = Connection::open(&path).map_err(fail)?;
        db.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA busy_timeout = 10000;
             PRAGMA cache_size = -16384;",
        )
        .map_err(fail)?;
        db.set_prepared_statement_cache_capacity(64);
        let found: i64 = db
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(fail)?;
        if found > SCHEMA {
            return Err(IndexError::Newer { path, found });
        }
        for (from, migration) in (0..).zip(MIGRATIONS) {
            if from >= found {
                db.execute_batch(&format!(
                    "BEGIN IMMEDIATE; {migration} PRAGMA user_version = {}; COMMIT;",
                    from + 1
                ))
                .map_err(fail)?;
            }
        }
        let mut index = Self {
            db,
            path,
            epoch: Epoch(0),
            rev: 0,
            durable_commits: 0,
        };
        let known = index.meta("identity")?;
        match index.meta("epoch")? {
            Some(epoch) if known.as_deref() == Some(identity) => {
                index.epoch = Epoch(index.decode_u64(&epoch)?);
                let rev = index.meta("rev")?.unwrap_or_else(|| vec![0; 8]);
                index.rev = index.decode_u64(&rev)?;
            }
            _ => index.begin_epoch(identity)?,
        }
        Ok(index)
    }

    /// Forgets every row, under a new epoch. The chains stay: whether the tree is what they
    /// are about is told by its own mark.
    fn begin_epoch(&mut self, identity: &[u8]) -> Result<(), IndexError> {
        let epoch = random_epoch()?;
        self.transaction(Durable::PowerLoss, |index| {
            index.run("DELETE FROM row", ())?;
            index.run("DELETE FROM meta", ())?;
            index.set_meta("identity", identity)?;
            index.set_meta("epoch", &epoch.0.to_le_bytes())?;
            index.rev = 0;
            Ok(())
        })?;
        self.epoch = epoch;
        Ok(())
    }

    /// Begins a new epoch that keeps the rows, for a tree that turned out to be of
    /// another time than the index, or for revisions that were lost.
    pub fn renew_epoch(&mut self) -> Result<(), IndexError> {
        let epoch = random_epoch()?;
        self.transaction(Durable::PowerLoss, |index| {
            index.set_meta("epoch", &epoch.0.to_le_bytes())?;
            index.delete_meta("applied")
        })?;
        self.epoch = epoch;
        Ok(())
    }

    /// The life of this index.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How many commits since the opening were made to survive a power loss; each takes
    /// all before it along.
    pub fn durable_commits(&self) -> u64 {
        self.durable_commits
    }

    /// The database.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The newest revision.
    pub fn rev(&self) -> u64 {
        self.rev
    }

    /// Begins a transaction that lasts until [`Self::commit`]. What was written is seen at
    /// once, and is lost if the index is dropped before.
    pub fn begin(&mut self) -> Result<(), IndexError> {
        self.batch("BEGIN IMMEDIATE")
    }

    /// Ends the transaction that [`Self::begin`] began. Survives the death of the process.
    pub fn commit(&mut self) -> Result<(), IndexError> {
        self.set_meta("rev", &self.rev.to_le_bytes())?;
        self.batch("COMMIT")
    }

    /// Carries out `work` as one transaction, or nothing of it.
    pub fn transaction<T, E: From<IndexError>>(
        &mut self,
        durable: Durable,
        work: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let before = self.rev;
        if durable == Durable::PowerLoss {
            self.batch("PRAGMA synchronous = FULL")?;
        }
        self.begin()?;
        let done = work(self).and_then(|done| {
            self.commit()?;
            Ok(done)
        });
        if done.is_err() {
            self.rev = before;
            // Fails if SQLite rolled back by itself, and then there is nothing to do.
            let _ = self.db.execute_batch("ROLLBACK");
        }
        if durable == Durable::PowerLoss {
            self.batch("PRAGMA synchronous = NORMAL")?;
            self.durable_commits += u64::from(done.is_ok());
        }
        done
    }

    /// What is known of a path.
    pub fn row(&self, path: &RelPath) -> Result<Option<Row>, IndexError> {
        self.one(
            &format!("SELECT {COLUMNS} FROM row WHERE path = ?1"),
            params![path.as_bytes()],
        )
    }

    /// A row, alive or a tombstone, with exactly this fingerprint that can be trusted:
    /// what moved with its directory has the content it had elsewhere.
    pub fn by_fingerprint(&self, print: &Fingerprint) -> Result<Option<Row>, IndexError> {
        let rows = self.all(
            &format!("SELECT {COLUMNS} FROM row WHERE ino = ?1 AND racy = 0 LIMIT 8"),
            params![signed(print.ino)],
        )?;
        Ok(rows.into_iter().find(|row| row.fingerprint == *print))
    }

    /// All names of an inode, with the fingerprint that each was last seen with.
    pub fn names_of(&self, ino: u64) -> Result<Vec<(RelPath, Fingerprint)>, IndexError> {
        let rows = self.all(
            &format!("SELECT {COLUMNS} FROM row WHERE ino = ?1 AND kind IS NOT NULL"),
            params![signed(ino)],
        )?;
        Ok(rows
            .into_iter()
            .map(|row| (row.path, row.fingerprint))
            .collect())
    }

    /// Some paths that hold a content.
    pub fn paths_of(&self, hash: &ContentHash) -> Result<Vec<RelPath>, IndexError> {
        let rows = self.all(
            &format!(
                "SELECT {COLUMNS} FROM row WHERE hash = ?1 AND kind IS NOT NULL ORDER BY racy LIMIT 4"
            ),
            params![hash.0.as_slice()],
        )?;
        Ok(rows.into_iter().map(|row| row.path).collect())
    }

    /// The names that are known directly in a directory.
    pub fn names_in(&self, dir: &RelPath) -> Result<Vec<Vec<u8>>, IndexError> {
        let mut statement = self
            .db
            .prepare_cached("SELECT path FROM row WHERE dir = ?1")
            .map_err(|e| self.fail(e))?;
        let paths = statement
            .query_map(params![dir.as_bytes()], |row| row.get::<_, Vec<u8>>(0))
            .map_err(|e| self.fail(e))?;
        let mut names = Vec::new();
        for path in paths {
            let path = self.decode_path(path.map_err(|e| self.fail(e))?)?;
            names.push(path.name().to_vec());
        }
        Ok(names)
    }

    /// The paths below a directory that are known, without itself, parents first, at most
    /// `limit` of them, after `after`.
    pub fn below(
        &self,
        dir: &RelPath,
        after: Option<&RelPath>,
        limit: u32,
    ) -> Result<Vec<Row>, IndexError> {
        let mut low = dir.as_bytes().to_vec();
        let mut high = low.clone();
        if dir.is_root() {
            high.push(0xff);
            high.resize(crate::model::NAME_MAX + 1, 0xff);
        } else {
            low.push(b'/');
            high.push(b'/' + 1);
        }
        let low = after.map_or(low, |after| after.as_bytes().to_vec());
        self.all(
            &format!(
                "SELECT {COLUMNS} FROM row WHERE path > ?1 AND path < ?2 AND kind IS NOT NULL
                 ORDER BY path LIMIT ?3"
            ),
            params![low, high, limit],
        )
    }

    /// Up to `limit` rows that are younger than a revision, oldest first. With `alive`
    /// without the tombstones.
    pub fn since(&self, rev: u64, alive: bool, limit: u32) -> Result<Vec<Row>, IndexError> {
        let filter = if alive { "AND kind IS NOT NULL" } else { "" };
        self.all(
            &format!("SELECT {COLUMNS} FROM row WHERE rev > ?1 {filter} ORDER BY rev LIMIT ?2"),
            params![signed(rev), limit],
        )
    }

    /// How many names are known.
    pub fn count(&self) -> Result<u64, IndexError> {
        self.db
            .query_row(
                "SELECT count(*) FROM row WHERE kind IS NOT NULL",
                (),
                |row| row.get::<_, i64>(0),
            )
            .map(|count| count.unsigned_abs())
            .map_err(|e| self.fail(e))
    }

    /// Records what a path shows now, under a revision of its own, and returns that.
    pub fn put(
        &mut self,
        path: &RelPath,
        fingerprint: Fingerprint,
        racy: bool,
        masked: bool,
        entry: &Entry,
    ) -> Result<u64, IndexError> {
        let rev = self.rev + 1;
        self.write(&Row {
            path: path.clone(),
            rev,
            fingerprint,
            racy,
            masked,
            entry: Some(entry.clone()),
        })?;
        self.rev = rev;
        Ok(rev)
    }

    /// Records a new fingerprint of a path that shows what it showed before.
    pub fn touch(
        &mut self,
        path: &RelPath,
        print: Fingerprint,
        racy: bool,
    ) -> Result<(), IndexError> {
        self.run(
            "UPDATE row SET ino = ?2, size = ?3, real_mode = ?4, mtime_s = ?5, mtime_n = ?6,
                 ctime_s = ?7, ctime_n = ?8, racy = ?9 WHERE path = ?1",
            params![
                path.as_bytes(),
                signed(print.ino),
                signed(print.size),
                print.mode,
                print.mtime.secs,
                print.mtime.nanos,
                print.ctime.secs,
                print.ctime.nanos,
                racy
            ],
        )
    }

    /// Records that nothing is at a path, if something was; what was below it is none of
    /// this call's business. Says whether something was.
    pub fn bury(&mut self, path: &RelPath) -> Result<bool, IndexError> {
        let changed = self
            .db
            .prepare_cached(
                "UPDATE row SET kind = NULL, dir = NULL, rev = ?2 WHERE path = ?1 AND kind IS NOT NULL",
            )
            .and_then(|mut statement| {
                statement.execute(params![path.as_bytes(), signed(self.rev + 1)])
            })
            .map_err(|e| self.fail(e))?;
        if changed > 0 {
            self.rev += 1;
        }
        Ok(changed > 0)
    }

    /// Gives a path a new revision, as it is, so that it is reported (again); nothing at
    /// a path that was never known becomes a tombstone.
    pub fn renew(&mut self, path: &RelPath) -> Result<(), IndexError> {
        let rev = self.rev + 1;
        match self.row(path)? {
            Some(row) => self.write(&Row { rev, ..row })?,
            None => self.write(&Row {
                path: path.clone(),
                rev,
                fingerprint: Fingerprint::default(),
                racy: true,
                masked: false,
                entry: None,
            })?,
        }
        self.rev = rev;
        Ok(())
    }

    /// Forgets tombstones up to a revision that the other side has taken in.
    pub fn forget_tombstones(&mut self, up_to: u64) -> Result<(), IndexError> {
        if up_to <= self.forgotten()? {
            return Ok(());
        }
        self.transaction(Durable::Process, |index| {
            index.run(
                "DELETE FROM row WHERE kind IS NULL AND rev <= ?1",
                params![signed(up_to)],
            )?;
            index.set_meta("forgotten", &up_to.to_le_bytes())
        })
    }

    /// Up to which revision tombstones have been forgotten. Whoever has not taken in as
    /// much learns of those deletions only from a report of the whole tree.
    pub fn forgotten(&self) -> Result<u64, IndexError> {
        match self.meta("forgotten")? {
            Some(bytes) => self.decode_u64(&bytes),
            None => Ok(0),
        }
    }

    /// The life of the machine in which contents began to be staged; none if that is not
    /// known.
    pub fn boot(&self) -> Result<Option<Vec<u8>>, IndexError> {
        self.meta("boot")
    }

    /// Notes in which life of the machine contents are staged from here on.
    pub fn set_boot(&mut self, boot: &[u8]) -> Result<(), IndexError> {
        self.set_meta("boot", boot)
    }

    /// The moment of the tree that the index is about, as it was set.
    pub fn moment(&self) -> Result<Option<Vec<u8>>, IndexError> {
        self.meta("moment")
    }

    /// Takes up a moment of the tree together with what is observed of it.
    pub fn set_moment(&mut self, moment: Option<&[u8]>) -> Result<(), IndexError> {
        match moment {
            Some(moment) => self.set_meta("moment", moment),
            None => self.delete_meta("moment"),
        }
    }

    /// Whether a mounted side has to go back to an agreement before anything is told it.
    pub fn rejoins(&self, mount: ReplicaId) -> Result<bool, IndexError> {
        Ok(self.meta(&format!("rejoins.{mount}"))?.is_some())
    }

    /// Says whether it has to.
    pub fn set_rejoins(&mut self, mount: ReplicaId, rejoins: bool) -> Result<(), IndexError> {
        let key = format!("rejoins.{mount}");
        match rejoins {
            true => self.set_meta(&key, &[]),
            false => self.delete_meta(&key),
        }
    }

    /// The redo record of a batch whose traces may not have reached the disk yet.
    pub fn redo(&self) -> Result<Option<Vec<u8>>, IndexError> {
        self.meta("redo")
    }

    /// Writes the redo record.
    pub fn set_redo(&mut self, record: &[u8]) -> Result<(), IndexError> {
        self.set_meta("redo", record)
    }

    /// Removes the redo record.
    pub fn clear_redo(&mut self) -> Result<(), IndexError> {
        self.delete_meta("redo")
    }

    /// What the last applied batch answered, for a link that was cut before it arrived.
    pub fn applied(&self) -> Result<Option<Vec<u8>>, IndexError> {
        self.meta("applied")
    }

    /// Records what the last applied batch answers.
    pub fn set_applied(&mut self, answer: &[u8]) -> Result<(), IndexError> {
        self.set_meta("applied", answer)
    }

    /// What batches have displaced and programs may still write to: where each lies in the
    /// trash, and what the agent knows of it.
    pub fn displaced(&self) -> Result<Vec<(RelPath, Vec<u8>)>, IndexError> {
        let mut statement = self
            .db
            .prepare_cached("SELECT kept, row FROM displaced ORDER BY kept")
            .map_err(|e| self.fail(e))?;
        let rows = statement
            .query_map((), |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get(1)?)))
            .map_err(|e| self.fail(e))?;
        let mut displaced = Vec::new();
        for row in rows {
            let (kept, row) = row.map_err(|e| self.fail(e))?;
            displaced.push((self.decode_path(kept)?, row));
        }
        Ok(displaced)
    }

    /// Notes something displaced, or what is known of it now.
    pub fn set_displaced(&mut self, kept: &RelPath, row: &[u8]) -> Result<(), IndexError> {
        self.run(
            "INSERT OR REPLACE INTO displaced VALUES (?1, ?2)",
            params![kept.as_bytes(), row],
        )
    }

    /// Forgets something displaced.
    pub fn forget_displaced(&mut self, kept: &RelPath) -> Result<(), IndexError> {
        self.run(
            "DELETE FROM displaced WHERE kept = ?1",
            params![kept.as_bytes()],
        )
    }

    fn write(&mut self, row: &Row) -> Result<(), IndexError> {
        let entry = row.entry.as_ref();
        let (size, hash, target) = match entry.map(|entry| &entry.content) {
            Some(Content::File { size, hash }) => {
                (Some(signed(*size)), Some(hash.0.as_slice()), None)
            }
            Some(Content::Symlink { target }) => (None, None, Some(target.as_slice())),
            Some(Content::Directory) | None => (None, None, None),
        };
        let parent = entry.and(row.path.parent());
        let xattrs = entry
            .filter(|entry| !entry.xattrs.is_empty())
            .map(|entry| encode_xattrs(&entry.xattrs));
        let print = &row.fingerprint;
        self.run(
            "INSERT OR REPLACE INTO row VALUES
             (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
            params![
                row.path.as_bytes(),
                parent.as_ref().map(RelPath::as_bytes),
                signed(row.rev),
                signed(print.ino),
                signed(print.size),
                print.mode,
                print.mtime.secs,
                print.mtime.nanos,
                print.ctime.secs,
                print.ctime.nanos,
                row.racy,
                row.masked,
                entry.map(|entry| kind_number(entry.content.kind())),
                entry.map(|entry| entry.mode),
                entry.map(|entry| entry.mtime.secs),
                entry.map(|entry| entry.mtime.nanos),
                size,
                hash,
                target,
                xattrs,
            ],
        )
    }

    fn read(&self, row: &SqlRow<'_>) -> Result<Row, IndexError> {
        let get = |e| self.fail(e);
        let path = self.decode_path(row.get(0).map_err(get)?)?;
        let time = |at: usize| -> Result<Timestamp, IndexError> {
            Ok(Timestamp {
                secs: row.get::<_, Option<i64>>(at).map_err(get)?.unwrap_or(0),
                nanos: row.get::<_, Option<u32>>(at + 1).map_err(get)?.unwrap_or(0),
            })
        };
        let number = |at: usize| -> Result<u64, IndexError> {
            Ok(row.get::<_, i64>(at).map_err(get)?.cast_unsigned())
        };
        let content = match row.get::<_, Option<u8>>(11).map_err(get)? {
            None => None,
            Some(1) => Some(Content::File {
                size: number(15)?,
                hash: ContentHash(row.get(16).map_err(get)?),
            }),
            Some(2) => Some(Content::Directory),
            Some(3) => Some(Content::Symlink {
                target: row.get(17).map_err(get)?,
            }),
            Some(_) => return Err(self.damaged("kind of a row")),
        };
        let entry = match content {
            None => None,
            Some(content) => Some(Entry {
                content,
                mode: row.get(12).map_err(get)?,
                mtime: time(13)?,
                xattrs: match row.get::<_, Option<Vec<u8>>>(18).map_err(get)? {
                    None => Xattrs::new(),
                    Some(bytes) => {
                        decode_xattrs(&bytes).ok_or_else(|| self.damaged("attributes of a row"))?
                    }
                },
            }),
        };
        Ok(Row {
            path,
            rev: number(1)?,
            fingerprint: Fingerprint {
                ino: number(2)?,
                size: number(3)?,
                mode: row.get(4).map_err(get)?,
                mtime: time(5)?,
                ctime: time(7)?,
            },
            racy: row.get(9).map_err(get)?,
            masked: row.get(10).map_err(get)?,
            entry,
        })
    }

    fn all(&self, sql: &str, with: impl rusqlite::Params) -> Result<Vec<Row>, IndexError> {
        let mut statement = self.db.prepare_cached(sql).map_err(|e| self.fail(e))?;
        let mut rows = statement.query(with).map_err(|e| self.fail(e))?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(|e| self.fail(e))? {
            found.push(self.read(row)?);
        }
        Ok(found)
    }

    fn one(&self, sql: &str, with: impl rusqlite::Params) -> Result<Option<Row>, IndexError> {
        Ok(self.all(sql, with)?.into_iter().next())
    }

    fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, IndexError> {
        self.db
            .prepare_cached("SELECT value FROM meta WHERE key = ?1")
            .and_then(|mut statement| statement.query_row([key], |row| row.get(0)).optional())
            .map_err(|e| self.fail(e))
    }

    fn set_meta(&self, key: &str, value: &[u8]) -> Result<(), IndexError> {
        self.run(
            "INSERT OR REPLACE INTO meta VALUES (?1, ?2)",
            params![key, value],
        )
    }

    fn delete_meta(&self, key: &str) -> Result<(), IndexError> {
        self.run("DELETE FROM meta WHERE key = ?1", params![key])
    }

    fn run(&self, sql: &str, with: impl rusqlite::Params) -> Result<(), IndexError> {
        self.db
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(with))
            .map(|_| ())
            .map_err(|e| self.fail(e))
    }

    fn batch(&self, sql: &str) -> Result<(), IndexError> {
        self.db.execute_batch(sql).map_err(|e| self.fail(e))
    }

    fn fail(&self, source: rusqlite::Error) -> IndexError {
        IndexError::Sqlite {
            path: self.path.clone(),
            source,
        }
    }

    fn damaged(&self, what: &'static str) -> IndexError {
        IndexError::Damaged {
            path: self.path.clone(),
            what,
        }
    }

    fn decode_u64(&self, bytes: &[u8]) -> Result<u64, IndexError> {
        let bytes = bytes.try_into().map_err(|_| self.damaged("a number"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn decode_path(&self, bytes: Vec<u8>) -> Result<RelPath, IndexError> {
        RelPath::new(bytes).map_err(|_| self.damaged("a path"))
    }
}

fn random_epoch() -> Result<Epoch, IndexError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|_| IndexError::Random)?;
    Ok(Epoch(u64::from_le_bytes(bytes)))
}
