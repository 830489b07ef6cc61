use std::collections::BTreeSet;

use super::*;
use crate::Marked;
use crate::model::{Agreement, Id};

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn print(ino: u64) -> Fingerprint {
    Fingerprint {
        ino,
        size: u64::MAX,
        mode: 0o100_644,
        mtime: Timestamp { secs: -1, nanos: 5 },
        ctime: Timestamp { secs: 1, nanos: 6 },
    }
}

fn entry(content: Content) -> Entry {
    Entry {
        content,
        mode: 0o640,
        mtime: Timestamp { secs: -1, nanos: 5 },
        xattrs: Xattrs::from([(b"user.a".to_vec(), vec![]), (b"user.b".to_vec(), vec![1])]),
    }
}

fn put(index: &mut PeerIndex, at: &str, ino: u64, entry: &Entry) -> u64 {
    index
        .transaction(Durable::Process, |index| {
            index.put(&path(at), print(ino), false, true, entry)
        })
        .unwrap()
}

#[test]
fn rows_come_back_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let entries = [
        entry(Content::Directory),
        entry(Content::File {
            size: u64::MAX,
            hash: ContentHash::of(b"x"),
        }),
        entry(Content::Symlink {
            target: vec![0xff, 0xfe],
        }),
    ];
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    for (at, entry) in entries.iter().enumerate() {
        put(&mut index, &format!("d{at}/x"), at as u64, entry);
    }
    let epoch = index.epoch();
    drop(index);
    let index = PeerIndex::open(dir.path(), b"tree").unwrap();
    assert_eq!((index.epoch(), index.rev()), (epoch, 3));
    for (at, entry) in entries.iter().enumerate() {
        let row = index.row(&path(&format!("d{at}/x"))).unwrap().unwrap();
        assert_eq!(row.entry.as_ref(), Some(entry));
        assert_eq!(row.fingerprint, print(at as u64));
        assert!(row.masked && !row.racy);
    }
    assert_eq!(
        index.paths_of(&ContentHash::of(b"x")).unwrap(),
        [path("d1/x")]
    );
    assert!(index.by_fingerprint(&print(2)).unwrap().is_some());
    assert!(index.by_fingerprint(&print(7)).unwrap().is_none());
}

#[test]
fn another_tree_begins_another_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    put(&mut index, "a", 1, &entry(Content::Directory));
    let agreement = Agreement {
        number: 4,
        nonce: Id([1; 16]),
        previous: Some(Id([2; 16])),
    };
    let mount = Id([9; 16]);
    let none = BTreeSet::new();
    index.agree(mount, &agreement, Id([8; 16]), &none).unwrap();
    let last = |index: &PeerIndex| index.last_agreement(mount).unwrap();
    assert_eq!(last(&index).map(|last| last.agreement), Some(agreement));
    let epoch = index.epoch();
    drop(index);
    let mut index = PeerIndex::open(dir.path(), b"other").unwrap();
    assert_ne!(index.epoch(), epoch);
    assert_eq!((index.rev(), index.count().unwrap()), (0, 0));
    // Whether the tree has gone through it is told by its own mark.
    assert_eq!(last(&index).map(|last| last.agreement), Some(agreement));
    assert_eq!(index.take_mark(mount, None).unwrap(), Marked::Missing);
    assert_eq!(last(&index), None);
}

#[test]
fn tombstones_are_reported_until_they_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    let entry = entry(Content::Directory);
    for at in ["a", "a/b", "a.c", "b"] {
        put(&mut index, at, 1, &entry);
    }
    let paths = |rows: Vec<Row>| rows.into_iter().map(|row| row.path).collect::<Vec<_>>();
    let below = index.below(&path("a"), None, 9).unwrap();
    assert_eq!(paths(below), [path("a/b")]);
    let below = index.below(&RelPath::ROOT, Some(&path("a")), 2).unwrap();
    assert_eq!(paths(below), [path("a.c"), path("a/b")]);
    let mut names = index.names_in(&RelPath::ROOT).unwrap();
    names.sort();
    assert_eq!(names, [b"a".to_vec(), b"a.c".to_vec(), b"b".to_vec()]);
    assert!(index.bury(&path("b")).unwrap());
    assert!(!index.bury(&path("b")).unwrap());
    assert_eq!(paths(index.since(4, false, 9).unwrap()), [path("b")]);
    assert!(index.since(4, true, 9).unwrap().is_empty());
    index.renew(&path("a")).unwrap();
    index.renew(&path("never")).unwrap();
    let since = index.since(4, false, 9).unwrap();
    assert_eq!(paths(since), [path("b"), path("a"), path("never")]);
    index.forget_tombstones(5).unwrap();
    assert_eq!(
        paths(index.since(4, false, 9).unwrap()),
        [path("a"), path("never")]
    );
}

#[test]
fn a_failed_transaction_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    let failed = index.transaction(Durable::PowerLoss, |index| {
        index.put(
            &path("a"),
            print(1),
            false,
            false,
            &entry(Content::Directory),
        )?;
        index.set_redo(b"record")?;
        Err::<(), _>(IndexError::Random)
    });
    assert!(failed.is_err());
    assert_eq!(index.rev(), 0);
    assert!(index.row(&path("a")).unwrap().is_none());
    assert!(index.redo().unwrap().is_none());
}

#[test]
fn what_is_displaced_is_remembered_until_it_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    index.set_displaced(&path("slot/a"), b"one").unwrap();
    index.set_displaced(&path("slot/b"), b"two").unwrap();
    index.set_displaced(&path("slot/a"), b"other").unwrap();
    drop(index);
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    let known = |index: &PeerIndex| index.displaced().unwrap();
    let two = (path("slot/b"), b"two".to_vec());
    assert_eq!(
        known(&index),
        [(path("slot/a"), b"other".to_vec()), two.clone()]
    );
    index.forget_displaced(&path("slot/a")).unwrap();
    assert_eq!(known(&index), [two]);
}

/// What the program before wrote, as it wrote it, is read on.
#[test]
fn an_index_of_an_older_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = PeerIndex::open(dir.path(), b"tree").unwrap();
    let file = entry(Content::Directory);
    put(&mut index, "d", 1, &file);
    let epoch = index.epoch();
    drop(index);
    let db = Connection::open(dir.path().join("index.db")).unwrap();
    db.execute_batch("DROP TABLE displaced; PRAGMA user_version = 2")
        .unwrap();
    drop(db);
    let index = PeerIndex::open(dir.path(), b"tree").unwrap();
    assert_eq!((index.epoch(), index.rev()), (epoch, 1));
    assert_eq!(index.row(&path("d")).unwrap().unwrap().entry, Some(file));
    assert!(index.displaced().unwrap().is_empty());
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(PeerIndex::open(dir.path(), b"tree").unwrap());
    let db = Connection::open(dir.path().join("index.db")).unwrap();
    db.execute_batch("PRAGMA user_version = 99").unwrap();
    assert!(matches!(
        PeerIndex::open(dir.path(), b"tree"),
        Err(IndexError::Newer { found: 99, .. })
    ));
}
