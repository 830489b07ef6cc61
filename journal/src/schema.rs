//! The tables, and how a database gets them.

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::Error;

/// SQLite before this can corrupt a WAL database that two connections checkpoint.
const SQLITE_MIN: i32 = 3_051_003;

/// Statements that bring a database from schema `index` to `index + 1`. Only ever
/// appended to.
const MIGRATIONS: &[&str] = &[FIRST, GIT, LOG, CHAINS];

/// Times are seconds since 1970 with nanoseconds beside them, except `at`
/// (milliseconds). Paths and names are bytes. Unsigned numbers are stored with the
/// same 64 bits.
const FIRST: &str = "
-- One row: how far the journal has come.
CREATE TABLE progress (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    last_n      INTEGER NOT NULL,  -- the last number whose record is in the tables
    compacted_n INTEGER NOT NULL,  -- changes up to here may be missing from `change`
    inexact     INTEGER NOT NULL,  -- a record did not fit the tree: scan at the next start
    barrier     INTEGER NOT NULL   -- counts commits that only had to be durable
) STRICT;
INSERT INTO progress VALUES (1, 0, 0, 0, 0);

-- One row per start of the journal, each with its random epoch.
CREATE TABLE life (
    id      INTEGER PRIMARY KEY,
    epoch   INTEGER NOT NULL,
    first_n INTEGER NOT NULL,      -- the first number it could issue
    started INTEGER NOT NULL,
    boot    TEXT NOT NULL,
    clean   INTEGER NOT NULL       -- it was closed
) STRICT;

-- The recorded tree. Ids are drawn from the numbers of changes and never used twice.
CREATE TABLE node (
    id          INTEGER PRIMARY KEY,
    ino         INTEGER UNIQUE,
    kind        INTEGER NOT NULL,
    mode        INTEGER NOT NULL,
    uid         INTEGER NOT NULL,
    gid         INTEGER NOT NULL,
    size        INTEGER NOT NULL,
    mtime       INTEGER NOT NULL,
    mtime_nanos INTEGER NOT NULL,
    ctime       INTEGER NOT NULL,
    ctime_nanos INTEGER NOT NULL,
    target      BLOB,
    xattrs      BLOB,
    content_n   INTEGER NOT NULL,
    changed_n   INTEGER NOT NULL,
    synced_n    INTEGER NOT NULL,
    hash        BLOB,
    hash_n      INTEGER NOT NULL,  -- the content_n that the hash was computed at
    artefact    INTEGER NOT NULL
) STRICT;
INSERT INTO node VALUES (1, NULL, 1, 493, 0, 0, 0, 0, 0, 0, 0, NULL, NULL, 0, 0, 0, NULL, 0, 0);

CREATE TABLE entry (
    parent INTEGER NOT NULL,
    name   BLOB NOT NULL,
    node   INTEGER NOT NULL,
    PRIMARY KEY (parent, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX entry_node ON entry (node);

-- What happened to which node. A change that concerns two nodes has two rows.
CREATE TABLE change (
    n      INTEGER NOT NULL,
    node   INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    life   INTEGER NOT NULL,
    origin INTEGER NOT NULL,       -- 0 local, -1 scan, else the peer
    kind   INTEGER NOT NULL,
    start  INTEGER,                -- bytes written, from and how many
    length INTEGER,
    name   BLOB,                   -- the name it has, or had if it is gone
    PRIMARY KEY (n, node)
) STRICT, WITHOUT ROWID;

CREATE TABLE peer (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    name               TEXT NOT NULL UNIQUE,
    url                TEXT NOT NULL,
    replica            BLOB,
    cursor             INTEGER NOT NULL,
    durable            INTEGER NOT NULL,
    seen_epoch         INTEGER,
    seen_rev           INTEGER,
    agreement          BLOB
) STRICT;

CREATE TABLE base (
    peer  INTEGER NOT NULL,
    path  BLOB NOT NULL,
    node  INTEGER,
    entry BLOB NOT NULL,
    PRIMARY KEY (peer, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX base_node ON base (peer, node);

-- What a peer's agent reported, until base says the same.
CREATE TABLE remote (
    peer  INTEGER NOT NULL,
    path  BLOB NOT NULL,
    entry BLOB,
    PRIMARY KEY (peer, path)
) STRICT, WITHOUT ROWID;

CREATE TABLE conflict (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    peer        INTEGER NOT NULL,
    path        BLOB NOT NULL,
    base        BLOB,
    local       BLOB,
    remote      BLOB,
    copy        BLOB,
    info        BLOB,
    since       INTEGER NOT NULL,
    since_nanos INTEGER NOT NULL,
    UNIQUE (peer, path)
) STRICT;

CREATE TABLE proposal (
    peer       INTEGER PRIMARY KEY,
    agreement  BLOB NOT NULL,
    cursor     INTEGER NOT NULL,
    batch      BLOB NOT NULL,
    seen_epoch INTEGER,
    seen_rev   INTEGER
) STRICT;

CREATE TABLE proposed_change (
    peer     INTEGER NOT NULL,
    position INTEGER NOT NULL,
    change   BLOB NOT NULL,
    PRIMARY KEY (peer, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE setting (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
";

/// Git directories as units.
const GIT: &str = "
-- What Git indexes stage, by the hash of their content. Only the newest are kept.
CREATE TABLE meaning (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    content BLOB NOT NULL UNIQUE,
    meaning BLOB NOT NULL
) STRICT;

-- Of a conflict about a Git directory: which version of it the peer has.
ALTER TABLE conflict ADD COLUMN unit BLOB;
";

/// What `mirrorfs log` tells beside the changes, and where names were.
const LOG: &str = "
-- The directory of the name; NULL in what an older program has recorded.
ALTER TABLE change ADD COLUMN parent INTEGER;

-- What was decided and a person may want to know. Only the newest are kept.
CREATE TABLE note (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,
    n    INTEGER NOT NULL,  -- the last change before it
    at   INTEGER NOT NULL,
    peer INTEGER NOT NULL,
    path BLOB NOT NULL,
    what TEXT NOT NULL
) STRICT;
";

/// Chains of agreements. What was agreed on before is the first of its chain.
const CHAINS: &str = "
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

INSERT INTO agreed SELECT id, 0, agreement, 1, 0 FROM peer WHERE agreement IS NOT NULL;
";

/// Refuses a SQLite that is too old.
pub(crate) fn check_sqlite() -> Result<(), Error> {
    if rusqlite::version_number() < SQLITE_MIN {
        return Err(Error::OldSqlite {
            found: rusqlite::version(),
        });
    }
    Ok(())
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Write,
    Read,
    Checkpoint,
}

/// Opens a connection with the settings that all of ours share.
pub(crate) fn connect(path: &Path, purpose: Use) -> Result<Connection, Error> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if purpose == Use::Write {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let connection = Connection::open_with_flags(path, flags)?;
    connection.set_prepared_statement_cache_capacity(128);
    // Or statements whose plan might depend on a value are planned anew with each value:
    // two fifths of what the writer did. There are no statistics to plan by.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // The writer waits for a TRUNCATE checkpoint in progress (without a limit once it
    // runs, see there); a checkpoint gives way at once, and readers of a WAL database wait only while it is being recovered.
    connection.busy_timeout(match purpose {
        Use::Write | Use::Read => std::time::Duration::from_secs(60),
        Use::Checkpoint => std::time::Duration::ZERO,
    })?;
    connection.execute_batch("PRAGMA temp_store = MEMORY; PRAGMA wal_autocheckpoint = 0;")?;
    match purpose {
        Use::Write => {
            connection.execute_batch("PRAGMA cache_size = -16384; PRAGMA synchronous = FULL;")?;
        }
        Use::Read => connection.execute_batch("PRAGMA query_only = ON;")?,
        // A checkpoint syncs the log before and the database after it copies.
        Use::Checkpoint => connection.execute_batch("PRAGMA synchronous = NORMAL;")?,
    }
    Ok(connection)
}

/// Refuses a database whose tables are not those of this program.
pub(crate) fn check_readable(connection: &Connection, path: &Path) -> Result<(), Error> {
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match found.cmp(&known) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(Error::other(format!(
            "{}: written by an older mirrorfs; the next mount brings it up to date",
            path.display()
        ))),
        std::cmp::Ordering::Greater => Err(Error::Newer {
            path: path.to_owned(),
            found,
            known,
        }),
    }
}

/// Turns on the write-ahead log and brings the tables to the newest schema. Says
/// whether the database had none.
pub(crate) fn prepare(connection: &mut Connection, path: &Path) -> Result<bool, Error> {
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    // Asked before anything is written: a newer database is left as it is.
    if found > known {
        return Err(Error::Newer {
            path: path.to_owned(),
            found,
            known,
        });
    }
    // The row comes before the change of the header is committed: an error of that is
    // told by the step after it, which `query_row` never takes.
    let modes: Vec<String> = connection
        .prepare("PRAGMA journal_mode = WAL")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let mode = modes.concat();
    if mode != "wal" {
        return Err(Error::other(format!(
            "{}: the file system does not support SQLite's write-ahead log (journal mode stays {mode}): put the state directory on a local disk",
            path.display()
        )));
    }
    for (from, migration) in (0_i64..).zip(MIGRATIONS) {
        if from >= found {
            let step = connection.transaction()?;
            step.execute_batch(migration)?;
            step.pragma_update(None, "user_version", from + 1)?;
            step.commit()?;
        }
    }
    Ok(found == 0)
}
