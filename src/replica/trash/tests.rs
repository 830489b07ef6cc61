//! The trash of a plain directory.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use super::bounds::Bounds;
use super::*;
use crate::replica::keep::stamp;
use crate::sim::clock;
use crate::tree::Id;

struct Fixture {
    dir: tempfile::TempDir,
    root: Root,
    trash: Trash,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id([1; 16])).unwrap();
        Self {
            trash: Trash::of(&reserved).unwrap(),
            root: Root::new(root.into()),
            dir,
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn keep(&self, secs: i64, token: &str, path: &str, content: &[u8]) {
        let stamp = stamp(Timestamp { secs, nanos: 0 });
        let at = self.at(&format!(".mirrorfs/trash/{stamp}-{token}/{path}"));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, content).unwrap();
    }

    fn listed(&self) -> Vec<(i64, String, u64)> {
        let list = self.trash.list().unwrap();
        list.into_iter()
            .map(|kept| (kept.since.secs, kept.path.to_string(), kept.size))
            .collect()
    }

    fn slots(&self) -> usize {
        fs::read_dir(self.at(".mirrorfs/trash")).unwrap().count()
    }

    fn restore(&self, wanted: &str, to: &str) -> Result<(), RestoreError> {
        let list = self.trash.list().unwrap();
        let found = Kept::find(&list, &path(wanted));
        assert_eq!(found.len(), 1, "{found:?}");
        self.trash.restore(&found[0], &self.root, &path(to))
    }
}

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

const DAY: i64 = 24 * 3600;

#[test]
fn lists_the_latest_first() {
    let t = Fixture::new();
    t.keep(1000, "a", "d/x", b"one");
    t.keep(2000, "b", "d/x", b"three");
    t.keep(2000, "b", "y", b"");
    std::os::unix::fs::symlink("t", t.at(".mirrorfs/trash/19700101T001640Z-a/link")).unwrap();
    let expected = [
        (2000, "d/x", 5),
        (2000, "y", 0),
        (1000, "d/x", 3),
        (1000, "link", 1),
    ];
    assert_eq!(
        t.listed(),
        expected.map(|(at, path, size)| (at, path.to_owned(), size))
    );
}

#[test]
fn restores_where_nothing_is_and_nowhere_else() {
    let t = Fixture::new();
    t.keep(1000, "a", "d/e/x", b"old");
    t.keep(2000, "b", "d/e/x", b"new");
    fs::create_dir_all(t.at("d/e")).unwrap();
    fs::write(t.at("d/e/x"), b"here").unwrap();
    fs::write(t.at("file"), b"").unwrap();
    std::os::unix::fs::symlink("/", t.at("link")).unwrap();
    for (to, what) in [
        ("d/e/x", "already"),
        ("d", "already"),
        ("file/x", "file is no directory"),
        ("link/x", "link is no directory"),
        (".mirrorfs/staging/x", "reserved"),
    ] {
        let error = t.restore("d/e/x", to).unwrap_err().to_string();
        assert!(error.contains(what), "{to}: {error}");
    }
    assert_eq!(fs::read(t.at("d/e/x")).unwrap(), b"here");
    assert_eq!(t.listed().len(), 2);

    fs::remove_dir_all(t.at("d")).unwrap();
    t.restore("d/e/x", "d/e/x").unwrap();
    assert_eq!(fs::read(t.at("d/e/x")).unwrap(), b"new");
    // The older one, by where it lies.
    t.restore("19700101T001640Z-a/d/e/x", "elsewhere/x")
        .unwrap();
    assert_eq!(fs::read(t.at("elsewhere/x")).unwrap(), b"old");
    assert_eq!(t.slots(), 0, "empty slots go");
}

#[test]
fn a_directory_is_what_lay_below_it() {
    let t = Fixture::new();
    t.keep(1000, "a", "d/x", b"old");
    t.keep(2000, "b", "d/x", b"new");
    t.keep(1000, "a", "d/y", b"y");
    t.keep(1000, "a", "d-not", b"");
    let list = t.trash.list().unwrap();
    let found = Kept::find(&list, &path("d"));
    let found: Vec<_> = found
        .iter()
        .map(|kept| (kept.since.secs, kept.path.to_string()))
        .collect();
    assert_eq!(found, [(2000, "d/x".to_owned()), (1000, "d/y".to_owned())]);
    assert!(Kept::find(&list, &path("nothing")).is_empty());
}

#[test]
fn empties_what_is_older() {
    let t = Fixture::new();
    t.keep(1000, "a", "d/x", b"old");
    t.keep(2000, "b", "x", b"new");
    let before = Timestamp {
        secs: 2000,
        nanos: 0,
    };
    assert_eq!(t.trash.empty(before).unwrap().files, 1);
    assert_eq!(t.listed(), [(2000, "x".to_owned(), 3)]);
    assert_eq!(t.slots(), 1);
    assert_eq!(t.trash.empty(Timestamp::now()).unwrap().files, 1);
    assert_eq!(t.slots(), 0);
}

/// What a program still writes to is nowhere else.
#[test]
fn what_is_open_for_writing_stays() {
    let t = Fixture::new();
    t.keep(1000, "a", "d/x", b"old");
    t.keep(1000, "a", "d/y", b"old");
    let x = t.at(".mirrorfs/trash/19700101T001640Z-a/d/x");
    let writer = File::options().append(true).open(x).unwrap();
    let removed = t.trash.empty(Timestamp::now()).unwrap();
    assert_eq!((removed.files, removed.in_use), (1, 1));
    assert_eq!(t.listed(), [(1000, "d/x".to_owned(), 3)]);
    drop(writer);
    assert_eq!(t.trash.empty(Timestamp::now()).unwrap().files, 1);
    assert_eq!(t.slots(), 0);
}

/// Thirty days, and then the oldest first until the rest fits.
#[test]
fn expires_by_age_and_by_room() {
    let t = Fixture::new();
    let now = Timestamp {
        secs: 100 * DAY,
        nanos: 0,
    };
    t.keep(69 * DAY, "a", "too-old", b"1");
    t.keep(71 * DAY, "b", "second", &[2; 8192]);
    t.keep(72 * DAY, "c", "third", &[3; 8192]);
    t.keep(73 * DAY, "d", "fourth", &[4; 8192]);
    let names =
        |t: &Fixture| -> Vec<String> { t.listed().into_iter().map(|(_, path, _)| path).collect() };
    t.trash.expire_beyond(now, u64::MAX).unwrap();
    assert_eq!(names(&t), ["fourth", "third", "second"]);
    let room: u64 = t.trash.list().unwrap().iter().map(|kept| kept.room).sum();
    assert!(room > 0);
    t.trash.expire_beyond(now, room).unwrap();
    assert_eq!(names(&t), ["fourth", "third", "second"]);
    t.trash.expire_beyond(now, room - 1).unwrap();
    assert_eq!(names(&t), ["fourth", "third"]);
    t.trash.expire_beyond(now, 0).unwrap();
    assert!(names(&t).is_empty());
    // By the disk that it lies on: nothing here takes a tenth of it.
    t.keep(99 * DAY, "e", "young", b"1");
    assert_eq!(t.trash.expire(now).unwrap(), Removed::default());
}

/// "Content equal to the base at most hourly per path, content the other side never had
/// evicted last": whoever fills the trash, by a controlled clock. `replace` puts a version in
/// the place of the one before, which both sides had agreed on or not. The first that is
/// replaced is "old".
pub(crate) fn check_bounds(reserved: &Reserved, mut replace: impl FnMut(&str, bool)) {
    let minutes = |minutes: u64| clock::advance(Duration::from_secs(60 * minutes));
    let trash = || Trash::of(reserved).unwrap();
    let there = || -> Vec<String> {
        let all = trash().list().unwrap();
        let read = |kept: &Kept| {
            let dir = trash().parent(kept).unwrap();
            let file = scan::open_file(dir.as_fd(), kept.at.name()).unwrap();
            io::read_to_string(file).unwrap()
        };
        // The oldest first.
        all.iter().rev().map(read).collect()
    };
    clock::start();
    let mut bounds = Bounds::of(trash());
    replace("0", false);
    for version in 1..=13 {
        minutes(10);
        replace(&version.to_string(), true);
    }
    assert_eq!(there().len(), 14);
    bounds.keep(crate::clock::wall()).unwrap();
    // The first of each hour, and the latest.
    assert_eq!(there(), ["old", "0", "6", "12"]);
    // As the session goes on, a minute later and two.
    for (version, expected) in [
        ("14", ["old", "0", "6", "12", "13"]),
        ("15", ["old", "0", "6", "12", "14"]),
    ] {
        minutes(1);
        replace(version, true);
        bounds.keep(crate::clock::wall()).unwrap();
        assert_eq!(there(), expected);
    }
    // Where there is too much: what both had agreed on, and the only copy last.
    for expected in [
        &["old", "6", "12", "14"][..],
        &["old", "12", "14"],
        &["old", "14"],
        &["old"],
    ] {
        let taken: u64 = trash().list().unwrap().iter().map(|kept| kept.room).sum();
        trash()
            .expire_beyond(crate::clock::wall(), taken - 1)
            .unwrap();
        assert_eq!(there(), expected);
    }
    clock::stop();
}

/// Who deletes a file that was just written gets its last version back, and others are
/// nothing to it.
#[test]
fn each_path_keeps_its_latest_version() {
    let t = Fixture::new();
    t.keep(1000, "a.agreed", "d/x", b"1");
    t.keep(1010, "b.agreed", "d/x", b"2");
    t.keep(1010, "b.agreed", "d/y", b"2");
    t.keep(1020, "c.agreed.2", "d/x", b"3");
    t.keep(1030, "d", "d/x", b"4");
    t.trash
        .expire_beyond(
            Timestamp {
                secs: 2000,
                nanos: 0,
            },
            u64::MAX,
        )
        .unwrap();
    let expected = [(1030, "d/x"), (1020, "d/x"), (1010, "d/y"), (1000, "d/x")];
    assert_eq!(
        t.listed(),
        expected.map(|(at, path)| (at, path.to_owned(), 1))
    );
}
