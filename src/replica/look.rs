//! What a name shows, in the vocabulary of the tree: from what is known if its
//! fingerprint still is the same, else by reading it.

use std::io;
use std::os::fd::AsFd;

use mirrorfs_journal::index::{Fingerprint, Row};
use rustix::fs::Stat;

use super::beneath::{Place, Root, is_no_directory};
use crate::tree::hash::hash_file;
use crate::tree::scan;
use crate::tree::{Content, Entry, Kind, RelPath, Timestamp, Xattrs};

/// How long after a change another one may leave the times as they are, in nanoseconds:
/// two ticks of the slowest clock that kernels stamp inodes with.
const TICK: i128 = 20_000_000;
/// The same where the filesystem keeps whole seconds only, or even ones.
const COARSE_TICK: i128 = 2_000_000_000;

/// Not in `libc` for every target; the same number on all architectures that Rust knows
/// but PA-RISC.
const F_SETSIG: libc::c_int = 10;

/// What a look found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Look {
    /// Nothing of that name.
    Absent,
    /// Something that is not mirrored.
    Special,
    /// A file that kept changing while it was read.
    Changing,
    /// An entry.
    Seen(Seen),
}

/// An entry as it was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// What is there.
    pub entry: Entry,
    /// By what it is recognised.
    pub print: Fingerprint,
    /// Whether a later change might not show in the fingerprint.
    pub racy: bool,
    /// Whether the entry has attributes that the filesystem does not hold.
    pub masked: bool,
}

/// The fingerprint of an inode.
pub fn fingerprint(stat: &Stat) -> Fingerprint {
    Fingerprint {
        ino: stat.st_ino,
        size: scan::size_of(stat),
        mode: stat.st_mode,
        mtime: scan::mtime_of(stat),
        ctime: scan::ctime_of(stat),
    }
}

/// Whether an inode with this fingerprint, looked at now, might be changed without
/// getting another one.
pub fn is_racy(print: &Fingerprint, now: Timestamp) -> bool {
    is_recent(print.mtime, now) || is_recent(print.ctime, now)
}

pub(crate) fn is_recent(stamp: Timestamp, now: Timestamp) -> bool {
    let nanos = |at: Timestamp| i128::from(at.secs) * 1_000_000_000 + i128::from(at.nanos);
    let tick = if stamp.nanos == 0 { COARSE_TICK } else { TICK };
    nanos(stamp) + tick > nanos(now)
}

/// Whether a file is so large that reading it should not hold up anything else.
pub fn must_read(stat: &Stat, known: Option<&Row>) -> bool {
    scan::kind_of(stat) == Kind::File && recognised(&fingerprint(stat), known).is_none()
}

/// What a known row says about an inode with this fingerprint.
fn recognised(print: &Fingerprint, known: Option<&Row>) -> Option<Seen> {
    let row = known.filter(|row| !row.racy && row.fingerprint == *print)?;
    Some(Seen {
        entry: row.entry.clone()?,
        print: *print,
        racy: false,
        masked: row.masked,
    })
}

/// Looks at a name. `known` is the row of its path, if there is one; `elsewhere` may
/// know the same inode by its fingerprint under another path.
pub(crate) fn look(
    place: Place<'_>,
    known: Option<&Row>,
    elsewhere: &dyn Fn(&Fingerprint) -> Option<Row>,
) -> io::Result<Look> {
    // Twice, because a file may be replaced between the look and the opening.
    for _ in 0..2 {
        let now = Timestamp::now();
        let Some(stat) = place.stat()? else {
            return Ok(Look::Absent);
        };
        let print = fingerprint(&stat);
        let kind = scan::kind_of(&stat);
        if kind != Kind::Directory {
            if let Some(seen) = recognised(&print, known) {
                return Ok(Look::Seen(seen));
            }
            if let Some(mut seen) = recognised(&print, elsewhere(&print).as_ref()) {
                carry_over(&mut seen, known);
                return Ok(Look::Seen(seen));
            }
        }
        let mut seen = Seen {
            entry: Entry {
                content: Content::Directory,
                mode: scan::mode_of(&stat),
                mtime: Timestamp::default(),
                xattrs: Xattrs::new(),
            },
            print,
            racy: is_racy(&print, now),
            masked: false,
        };
        let read = match kind {
            Kind::Special => return Ok(Look::Special),
            Kind::Directory => read_directory(place, &mut seen),
            Kind::Symlink => read_symlink(place, &mut seen),
            Kind::File => read_file(place, &mut seen),
        };
        match read {
            Ok(true) => {
                carry_over(&mut seen, known);
                return Ok(Look::Seen(seen));
            }
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Look::Changing)
}

/// Looks at a path of a tree; see `look`.
pub fn look_at(
    root: &Root,
    path: &RelPath,
    known: Option<&Row>,
    elsewhere: &dyn Fn(&Fingerprint) -> Option<Row>,
) -> io::Result<Look> {
    match root.parent(path) {
        Ok(dir) => look(Place::new(&dir, path.name()), known, elsewhere),
        Err(error) if is_no_directory(&error) => Ok(Look::Absent),
        Err(error) => Err(error),
    }
}

/// Looks at a name of a directory without knowing anything of it.
pub(crate) fn look_in(dir: &std::os::fd::OwnedFd, name: &[u8]) -> io::Result<Look> {
    look(Place::new(dir, name), None, &|_| None)
}

fn read_directory(place: Place<'_>, seen: &mut Seen) -> io::Result<bool> {
    let fd = scan::open_reference(place.dir, place.name)?;
    if rustix::fs::fstat(&fd)?.st_ino != seen.print.ino {
        return Ok(false);
    }
    seen.entry.xattrs = scan::xattrs(fd.as_fd())?;
    Ok(true)
}

fn read_symlink(place: Place<'_>, seen: &mut Seen) -> io::Result<bool> {
    seen.entry.content = Content::Symlink {
        target: scan::read_link(place.dir, place.name)?,
    };
    seen.entry.mode = 0o777;
    seen.entry.mtime = seen.print.mtime;
    Ok(place.ino()? == Some(seen.print.ino))
}

fn read_file(place: Place<'_>, seen: &mut Seen) -> io::Result<bool> {
    let file = scan::open_file(place.dir, place.name)?;
    let (hash, size) = hash_file(&file)?;
    seen.entry.content = Content::File { size, hash };
    seen.entry.mtime = seen.print.mtime;
    seen.entry.xattrs = scan::xattrs(file.as_fd())?;
    Ok(size == seen.print.size && fingerprint(&rustix::fs::fstat(&file)?) == seen.print)
}

/// What the filesystem could not hold of an entry that was applied is no change made
/// here: while the inode's own value stays what it became then, the entry's stays too.
fn carry_over(seen: &mut Seen, known: Option<&Row>) {
    let Some(row) = known else { return };
    let Some(old) = &row.entry else { return };
    if old.content.kind() != seen.entry.content.kind() {
        return;
    }
    if row.fingerprint.mode == seen.print.mode {
        seen.entry.mode = old.mode;
    }
    if row.fingerprint.mtime == seen.print.mtime {
        seen.entry.mtime = old.mtime;
    }
    if row.masked {
        for (name, value) in &old.xattrs {
            let missing = seen.entry.xattrs.entry(name.clone());
            missing.or_insert_with(|| value.clone());
        }
        seen.masked = true;
    }
}

/// Whether what was found is what was expected: kind, content and link target; of a
/// directory the kind only. With `metadata` mode, time and attributes too.
pub(crate) fn is_expected(found: &Entry, expected: &Entry, metadata: bool) -> bool {
    let mode = |entry: &Entry| entry.mode & scan::MODE_MASK;
    found.content == expected.content
        && (!metadata
            || found.content.kind() == Kind::Symlink
            || (mode(found) == mode(expected)
                && found.xattrs == expected.xattrs
                && (found.content.kind() == Kind::Directory || found.mtime == expected.mtime)))
}

/// Whether a file is open for writing somewhere, or mapped so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Writers {
    /// Nowhere.
    None,
    /// It is.
    Some,
    /// It cannot be told: the file is another user's.
    Unknown,
    /// It cannot be told of any file: the filesystem has no leases.
    NoLeases,
}

/// Whether somebody is known to have the file open for writing, or mapped so.
pub(crate) fn is_open_for_writing(place: Place<'_>) -> bool {
    writers(place) == Writers::Some
}

/// Looks for writers. A read lease is granted only while nobody has the file open for
/// writing, or mapped so.
pub(crate) fn writers(place: Place<'_>) -> Writers {
    use std::os::fd::AsRawFd;
    let Ok(file) = scan::open_file(place.dir, place.name) else {
        return Writers::Unknown;
    };
    // Whoever opens the file for writing before the lease is given back makes the kernel
    // send a signal: SIGIO would end this process, SIGURG is one that nobody minds.
    // SAFETY: F_SETSIG takes an integer and touches no memory of this process.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } != 0 {
        return Writers::Unknown;
    }
    // SAFETY: F_SETLEASE takes an integer and touches no memory of this process.
    let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    if taken == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        return Writers::None;
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Writers::Some,
        Some(libc::EACCES | libc::EPERM) => Writers::Unknown,
        _ => Writers::NoLeases,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File, OpenOptions};

    fn nowhere(_: &Fingerprint) -> Option<Row> {
        None
    }

    fn see(dir: &std::path::Path, name: &str, known: Option<&Row>) -> Seen {
        let fd = File::open(dir).unwrap();
        match look(Place::new(&fd, name), known, &nowhere).unwrap() {
            Look::Seen(seen) => seen,
            other => panic!("{other:?}"),
        }
    }

    fn row(seen: &Seen) -> Row {
        Row {
            path: crate::tree::RelPath::new("file").unwrap(),
            rev: 1,
            fingerprint: seen.print,
            racy: false,
            masked: seen.masked,
            entry: Some(seen.entry.clone()),
        }
    }

    #[test]
    fn a_matching_fingerprint_saves_the_reading_unless_it_is_racy() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"one").unwrap();
        let seen = see(dir.path(), "file", None);
        assert!(seen.racy, "just written");
        let mut known = row(&seen);
        let pretended = Content::File {
            size: 3,
            hash: crate::tree::ContentHash::of(b"two"),
        };
        known.entry.as_mut().unwrap().content = pretended.clone();
        let found = see(dir.path(), "file", Some(&known));
        assert_eq!(found.entry.content, pretended);
        known.racy = true;
        let found = see(dir.path(), "file", Some(&known));
        assert_eq!(found.entry.content, seen.entry.content);
    }

    #[test]
    fn what_the_filesystem_did_not_hold_is_no_edit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"one").unwrap();
        let mut known = row(&see(dir.path(), "file", None));
        known.masked = true;
        let entry = known.entry.as_mut().unwrap();
        entry.mode |= 0o4000;
        entry.mtime.nanos ^= 1;
        entry.xattrs.insert(b"user.big".to_vec(), vec![0; 9]);
        let (mode, mtime, xattrs) = (entry.mode, entry.mtime, entry.xattrs.clone());
        known.fingerprint.ctime = Timestamp::default();
        let found = see(dir.path(), "file", Some(&known)).entry;
        assert_eq!((found.mode, found.mtime), (mode, mtime));
        assert_eq!(found.xattrs, xattrs);
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"two").unwrap();
        let found = see(dir.path(), "file", Some(&known)).entry;
        assert_eq!(found.mode, 0o600);
        assert_ne!(found.mtime, mtime);
    }

    #[test]
    fn writers_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"one").unwrap();
        let fd = File::open(dir.path()).unwrap();
        let probe = || is_open_for_writing(Place::new(&fd, "file"));
        assert!(!probe());
        let _reader = File::open(&path).unwrap();
        assert!(!probe());
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert!(probe());
        drop(writer);
        assert!(!probe());
    }

    /// The kernel tells the holder of a lease by a signal that ends a process which does
    /// not expect it. Whoever opens the file in the middle of a probe must not end us.
    #[test]
    fn a_writer_who_comes_during_a_probe_ends_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"one").unwrap();
        let fd = File::open(dir.path()).unwrap();
        let mut writers = std::process::Command::new("sh")
            .args(["-c", "while :; do : >>\"$1\"; done", "sh"])
            .arg(&path)
            .spawn()
            .unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(1);
        let (mut open, mut closed) = (0, 0);
        while std::time::Instant::now() < end {
            match is_open_for_writing(Place::new(&fd, "file")) {
                true => open += 1,
                false => closed += 1,
            }
        }
        writers.kill().unwrap();
        writers.wait().unwrap();
        assert!(
            open > 0 && closed > 0,
            "{open} probes met a writer, {closed} none"
        );
    }
}
