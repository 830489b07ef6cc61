//! Opening a database: a damaged one is moved aside, and each start begins a life
//! with an epoch of its own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use crate::codec;
use crate::schema::{self, Use};
use crate::{Epoch, Error, Timestamp};

/// What was found when the journal was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Start {
    /// The epoch of the numbers issued from now on.
    pub epoch: Epoch,
    /// The last number that was issued and is on record.
    pub last: u64,
    /// The last life closed the journal, and every record fitted the recorded tree.
    /// If not, lower may differ from the record: scan. False for a fresh journal.
    pub clean: bool,
    /// The machine has not been started anew since the last life. False for a fresh
    /// journal, of which nothing is known.
    pub same_boot: bool,
    /// There was no journal, or none that could be used: nothing is recorded.
    pub fresh: bool,
    /// Why a journal that was there could not be used, and where it is now.
    pub reason: Option<String>,
}

/// A database up to this size, in bytes, is checked at every start; a larger one only after
/// a crash. That takes some tens of milliseconds at the most.
const CHECKED: u64 = 32 * 1024 * 1024;

pub(crate) struct Opened {
    pub(crate) connection: Connection,
    pub(crate) start: Start,
    /// Key of this life.
    pub(crate) life: i64,
}

/// Opens the database for the writer.
pub(crate) fn open(path: &Path) -> Result<Opened, Error> {
    schema::check_sqlite()?;
    match begin(path) {
        Err(error) if error.is_corruption() => {
            let aside = move_aside(path)?;
            let reason = format!(
                "{} is damaged ({error}); it was moved to {} and a fresh journal started: the tree is scanned, and deletions made while it was lost may come back",
                path.display(),
                aside.display()
            );
            tracing::error!("{reason}");
            let mut opened = begin(path)?;
            opened.start.reason = Some(reason);
            Ok(opened)
        }
        result => result,
    }
}

fn begin(path: &Path) -> Result<Opened, Error> {
    let mut connection = schema::connect(path, Use::Write)?;
    let fresh = schema::prepare(&mut connection, path)?;
    let boot = boot_id()?;
    let last_life: Option<(bool, String)> = connection
        .query_row(
            "SELECT clean, boot FROM life ORDER BY id DESC LIMIT 1",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let (closed, same_boot) =
        last_life.map_or((false, false), |(clean, last)| (clean, last == boot));
    let small = std::fs::metadata(path).is_ok_and(|found| found.len() <= CHECKED);
    if !fresh && (!closed || small) {
        // Costs a read of the whole file.
        let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if found != "ok" {
            return Err(Error::Undecodable {
                what: "the database",
                cause: found,
            });
        }
    }
    let (last, inexact): (i64, bool) =
        connection.query_row("SELECT last_n, inexact FROM progress", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    let epoch = Epoch(getrandom::u64()?);
    // The connection is at FULL: numbers of this epoch are issued only after the
    // epoch itself survives a power loss, so no two lives can share one.
    let life = connection.transaction()?;
    life.execute(
        "INSERT INTO life (epoch, first_n, started, boot, clean) VALUES (?1, ?2, ?3, ?4, 0)",
        (
            epoch.0.cast_signed(),
            last + 1,
            codec::millis(Timestamp::now()),
            boot,
        ),
    )?;
    let id = life.last_insert_rowid();
    life.execute("UPDATE progress SET inexact = 0", [])?;
    life.commit()?;
    if fresh {
        sync_directory(path)?;
    }
    Ok(Opened {
        connection,
        start: Start {
            epoch,
            last: last.cast_unsigned(),
            clean: closed && !inexact,
            same_boot,
            fresh,
            reason: None,
        },
        life: id,
    })
}

/// Names this life of the machine: the kernel draws it at each start. `MIRRORFS_BOOT_ID`
/// stands in for it where a test pretends that the machine was started anew.
pub fn boot_id() -> Result<String, Error> {
    if let Some(id) = pretended() {
        // As long as the kernel's.
        return Ok(format!("{:0>36}", id.to_string_lossy()));
    }
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let id = fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        doing: "read the boot id",
        source,
    })?;
    Ok(id.trim_end().to_owned())
}

/// Whether a test pretends that the machine was started anew: then nothing can be learned
/// from how times relate to that.
pub fn boot_is_pretended() -> bool {
    pretended().is_some()
}

fn pretended() -> Option<OsString> {
    std::env::var_os("MIRRORFS_BOOT_ID").filter(|id| !id.is_empty())
}

/// Renames the database and its companions, and returns the database's new name.
fn move_aside(path: &Path) -> Result<PathBuf, Error> {
    let now = Timestamp::now();
    let suffix = |companion: &str| -> PathBuf {
        let mut name = OsString::from(path);
        name.push(format!(".damaged-{}-{:09}{companion}", now.secs, now.nanos));
        name.into()
    };
    // The database goes last: cut off in between, it is found damaged again, whereas
    // a log without its database would be taken for the next one's.
    for companion in ["-wal", "-shm", ""] {
        let mut from = OsString::from(path);
        from.push(companion);
        match fs::rename(&from, suffix(companion)) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(Error::Io {
                    path: from.into(),
                    doing: "move the damaged database aside",
                    source,
                });
            }
        }
    }
    sync_directory(path)?;
    Ok(suffix(""))
}

/// Makes the names in the database's directory survive a power loss.
fn sync_directory(path: &Path) -> Result<(), Error> {
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| Error::Io {
            path: directory.to_owned(),
            doing: "sync the journal's directory",
            source,
        })
}
