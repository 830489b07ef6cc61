//! Putting aside what a batch displaces: into the trash, or among the conflicts. Always
//! by rename, so that it needs no room, loses no attribute and cannot be cut in half.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::beneath::{Place, rename_new};
use crate::tree::{RelPath, Timestamp};

/// How many things that were displaced from one path a batch can tell apart.
const SHELVES: u32 = 10_000;

/// A directory named after a batch, within the trash or the conflicts, in which things
/// are kept under the path they had.
pub(crate) struct Shelf<'a> {
    dir: BorrowedFd<'a>,
    name: String,
}

impl<'a> Shelf<'a> {
    /// The shelf of a batch in `dir`. It is made when it is first used.
    pub(crate) fn new(dir: BorrowedFd<'a>, name: impl Into<String>) -> Self {
        Self {
            dir,
            name: name.into(),
        }
    }

    /// Moves a name onto the shelf and says where it is, relative to the shelf's
    /// directory. What already lies there is never displaced: then a further shelf is
    /// begun.
    pub(crate) fn keep(&self, from: Place<'_>, path: &RelPath) -> io::Result<RelPath> {
        let mut number = 1;
        loop {
            let shelf = match number {
                1 => self.name.clone(),
                _ => format!("{}.{number}", self.name),
            };
            let kept = self
                .open(&shelf, path)
                .and_then(|dir| rename_new(from, Place::new(&dir, path.name())));
            match kept {
                Ok(()) => return on_shelf(&shelf, path),
                Err(error)
                    if number < SHELVES
                        && matches!(
                            Errno::from_io_error(&error),
                            Some(Errno::EXIST | Errno::NOTDIR | Errno::LOOP | Errno::ISDIR)
                        ) =>
                {
                    number += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the shelf holds an inode under a path, as the first that was kept there.
    pub(crate) fn holds(&self, path: &RelPath, ino: u64) -> io::Result<bool> {
        let kept = on_shelf(&self.name, path)?;
        match rustix::fs::statat(self.dir, kept.as_bytes(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(stat.st_ino == ino),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the directory of a path on a shelf, making what is missing.
    fn open(&self, shelf: &str, path: &RelPath) -> io::Result<OwnedFd> {
        let mut dir = enter(self.dir, shelf.as_bytes())?;
        let parent = path.parent().unwrap_or_default();
        for name in parent.components() {
            dir = enter(dir.as_fd(), name)?;
        }
        Ok(dir)
    }
}

/// Where something is kept on a shelf, from the directory that the shelf is in.
pub(crate) fn on_shelf(shelf: &str, path: &RelPath) -> io::Result<RelPath> {
    RelPath::new([shelf.as_bytes(), b"/", path.as_bytes()].concat()).map_err(io::Error::other)
}

/// Removes a name in a directory of ours with everything below it; nothing if it is not
/// there. Links are removed and not followed.
pub(crate) fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let place = Place { dir, name };
    match rustix::fs::unlinkat(dir, place.os_name(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let below = rustix::fs::openat(dir, place.os_name(), flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&below)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    for name in names {
        remove_tree(below.as_fd(), &name)?;
    }
    Ok(rustix::fs::unlinkat(
        dir,
        place.os_name(),
        AtFlags::REMOVEDIR,
    )?)
}

fn enter(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let place = Place { dir, name };
    match rustix::fs::mkdirat(dir, place.os_name(), Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::openat(
        dir,
        place.os_name(),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// How the name of a slot of the trash ends that holds nothing but what both sides had agreed
/// on. Of what is in others this may be the only copy.
pub(crate) const AGREED: &str = ".agreed";

/// The name of a slot of the trash that is made at a moment, for whatever `token` names.
pub(crate) fn slot_name(stamp: &str, token: &str, agreed: bool) -> String {
    format!("{stamp}-{token}{}", if agreed { AGREED } else { "" })
}

/// Whether both sides had agreed on what lies in a slot of that name. (One that was begun
/// because the first held something at a path already ends with a number.)
pub(crate) fn is_agreed(slot: &[u8]) -> bool {
    let name = match slot.iter().rposition(|byte| *byte == b'.') {
        Some(dot) if slot.len() > dot + 1 && slot[dot + 1..].iter().all(u8::is_ascii_digit) => {
            &slot[..dot]
        }
        _ => slot,
    };
    name.ends_with(AGREED.as_bytes())
}

/// A moment as `yyyymmddThhmmssZ`, in UTC.
pub(crate) fn stamp(at: Timestamp) -> String {
    let nanos = i32::try_from(at.nanos).unwrap_or(0);
    match jiff::Timestamp::new(at.secs, nanos) {
        Ok(at) => at.strftime("%Y%m%dT%H%M%SZ").to_string(),
        Err(_) => "00000000T000000Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn displaces_nothing_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("shelf")).unwrap();
        let (from, to) = (
            File::open(dir.path()).unwrap(),
            File::open(at("shelf")).unwrap(),
        );
        let shelf = Shelf::new(to.as_fd(), "now");
        let keep = |content: &str, path: &str| {
            fs::write(at("x"), content).unwrap();
            shelf
                .keep(Place::new(&from, "x"), &RelPath::new(path).unwrap())
                .unwrap()
        };
        let kept = |path: &str| RelPath::new(path).unwrap();
        assert_eq!(keep("1", "a"), kept("now/a"));
        assert_eq!(keep("2", "a"), kept("now.2/a"));
        assert_eq!(keep("3", "a/b/c"), kept("now.3/a/b/c"));
        assert_eq!(keep("4", "d/e"), kept("now/d/e"));
        let ino = |kept: &str| fs::metadata(at("shelf").join(kept)).unwrap().ino();
        let holds = |path: &str, kept| shelf.holds(&RelPath::new(path).unwrap(), ino(kept));
        assert!(holds("a", "now/a").unwrap());
        assert!(holds("d/e", "now/d/e").unwrap());
        assert!(!holds("d/e", "now/a").unwrap());
        assert!(!holds("a/b/c", "now/a").unwrap());
        for (content, path) in [("1", "now/a"), ("2", "now.2/a"), ("3", "now.3/a/b/c")] {
            assert_eq!(fs::read_to_string(at("shelf").join(path)).unwrap(), content);
        }
    }

    #[test]
    fn a_slot_tells_whether_both_sides_had_agreed() {
        for agreed in [true, false] {
            let name = slot_name("20231114T221320Z", "0f", agreed);
            for further in ["", ".2", ".9999"] {
                assert_eq!(is_agreed(format!("{name}{further}").as_bytes()), agreed);
            }
        }
        assert!(!is_agreed(b"agreed") && !is_agreed(b".2") && !is_agreed(b""));
        assert!(!is_agreed(b"x.agreed.") && !is_agreed(b"x.agreed.y"));
    }

    #[test]
    fn stamps_are_utc() {
        let at = |secs| stamp(Timestamp { secs, nanos: 1 });
        assert_eq!(at(0), "19700101T000000Z");
        assert_eq!(at(1_700_000_000), "20231114T221320Z");
        assert_eq!(at(i64::MAX), "00000000T000000Z");
    }
}
