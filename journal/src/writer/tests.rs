//! Tests that look into the tables or need a small queue.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::*;

fn attr(size: u64) -> Attr {
    Attr {
        kind: Kind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size,
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
    }
}

fn create(name: &str, ino: u64) -> Change {
    Change::Create {
        parent: Ino(1),
        name: name.into(),
        ino: Ino(ino),
        attr: attr(0),
        target: None,
    }
}

fn write(ino: u64, offset: u64, len: u64) -> Change {
    Change::Write {
        ino: Ino(ino),
        offset,
        len,
        attr: attr(offset + len),
    }
}

/// Keeps the writer busy until the returned sender is dropped.
fn hold(journal: &Journal) -> (mpsc::Sender<()>, std::thread::JoinHandle<()>) {
    let (release, held) = mpsc::channel::<()>();
    let (started, running) = mpsc::channel();
    let journal = journal.clone();
    let thread = std::thread::spawn(move || {
        journal
            .update(Durability::Normal, move |_| {
                started.send(()).unwrap();
                let _ = held.recv();
                Ok(())
            })
            .unwrap();
    });
    running.recv().unwrap();
    (release, thread)
}

/// Waits for a condition; a test that waits for ever has failed.
fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::yield_now();
    }
}

/// A checkpoint keeps the writer out for as long as the disk stands still, which may be
/// minutes: a frozen filesystem, a machine that is being copied. Nobody gives up for that; a
/// minute was once the limit, and `./test --long` waits for longer.
#[test]
fn whoever_keeps_the_writer_out_is_waited_for() {
    let long = std::env::var_os("MIRRORFS_TEST_LONG").is_some();
    let standing_still = Duration::from_millis(if long { 75_000 } else { 300 });
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let other = rusqlite::Connection::open(dir.path().join(DATABASE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let recorder = journal.recorder();
    recorder.record(Origin::Local, create("f", 2)).unwrap();
    let started = Instant::now();
    let durable = std::thread::spawn(move || recorder.durable());
    while started.elapsed() < standing_still {
        assert!(!durable.is_finished(), "{:?}", started.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    other.execute_batch("ROLLBACK").unwrap();
    durable.join().unwrap().unwrap();
    journal.close().unwrap();
}

/// A checkpoint runs on a thread of its own, and the writer does not hear that it met an error
/// of the disk.
#[test]
fn a_journal_that_a_checkpoint_gave_up_can_be_closed() {
    for close in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let shared = std::sync::Arc::clone(&journal.recorder().shared);
        shared
            .poisoned
            .set("checkpoint: a test".to_owned())
            .unwrap();
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || {
            if close {
                journal.close().unwrap_err();
            }
            drop(journal);
            ended.send(()).unwrap();
        });
        end.recv_timeout(Duration::from_secs(30)).unwrap();
    }
}

#[test]
fn a_full_queue_makes_callers_wait() {
    const QUEUE: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open_with_queue(dir.path(), QUEUE).unwrap();
    let recorder = journal.recorder();
    let (release, held) = hold(&journal);
    let caller = {
        let recorder = recorder.clone();
        std::thread::spawn(move || {
            for ino in 0..100 {
                recorder
                    .record(Origin::Local, create(&format!("f{ino}"), 10 + ino))
                    .unwrap();
            }
        })
    };
    until(|| journal.status().queued == QUEUE);
    // With the writer held nobody makes room, so there is nothing to wait for: the
    // numbers issued cannot pass what the queue holds, however long one looks.
    for _ in 0..1000 {
        std::thread::yield_now();
        assert!(recorder.last() <= QUEUE as u64);
        assert!(journal.status().queued <= QUEUE);
    }
    assert!(!caller.is_finished());
    drop(release);
    held.join().unwrap();
    caller.join().unwrap();
    assert_eq!(recorder.last(), 100);
    assert_eq!(
        journal
            .snapshot()
            .unwrap()
            .children(NodeId::ROOT)
            .unwrap()
            .len(),
        100
    );
}

/// Records may be large: of those the queue holds few.
#[test]
fn a_queue_full_of_bytes_makes_callers_wait() {
    const VALUE: usize = 60_000;
    const FILES: u64 = 1_500;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    for ino in 0..FILES {
        let name = format!("f{ino}");
        recorder
            .record(Origin::Local, create(&name, 10 + ino))
            .unwrap();
    }
    let before = recorder.last();
    let (release, held) = hold(&journal);
    let caller = {
        let recorder = recorder.clone();
        std::thread::spawn(move || {
            for ino in 0..FILES {
                let xattrs = [(b"user.large".to_vec(), vec![1; VALUE])];
                let change = Change::Xattrs {
                    ino: Ino(10 + ino),
                    attr: attr(0),
                    xattrs: xattrs.into(),
                };
                recorder.record(Origin::Local, change).unwrap();
            }
        })
    };
    let most = (32 << 20) / VALUE;
    until(|| journal.status().queued >= most);
    for _ in 0..1000 {
        std::thread::yield_now();
        assert!(recorder.last() - before <= most as u64 + 1);
    }
    // Others go on: theirs are small.
    recorder.record(Origin::Local, create("small", 9)).unwrap();
    assert!(!caller.is_finished());
    drop(release);
    held.join().unwrap();
    caller.join().unwrap();
    assert_eq!(recorder.last(), before + FILES + 1);
    // Nobody waits for a writer that is gone.
    journal.close().unwrap();
    let change = Change::Xattrs {
        ino: Ino(10),
        attr: attr(0),
        xattrs: [(b"user.large".to_vec(), vec![1; 40 << 20])].into(),
    };
    assert!(recorder.record(Origin::Local, change.clone()).is_err());
    assert!(recorder.record(Origin::Local, change).is_err());
}

/// Kind, start and length of the rows of one node.
fn rows(view: &View, node: NodeId) -> Vec<(u64, i64, Option<i64>, Option<i64>)> {
    let mut statement = view
        .connection
        .prepare("SELECT n, kind, start, length FROM change WHERE node = ?1 ORDER BY n")
        .unwrap();
    statement
        .query_map([node.0], |row| {
            Ok((
                row.get::<_, i64>(0)?.cast_unsigned(),
                row.get(1)?,
                row.get(2)?,
                row.get(3)?,
            ))
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

#[test]
fn adjacent_writes_of_a_group_are_one_record() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    let record = |change| recorder.record(Origin::Local, change).unwrap();
    let (release, held) = hold(&journal);
    record(create("a", 10));
    record(create("b", 11));
    for block in 0..50 {
        record(write(10, block * 4096, 4096));
        record(write(11, block * 100, 100));
    }
    let last_of_a = record(write(10, 50 * 4096, 1));
    let apart = record(write(11, 1 << 20, 10));
    drop(release);
    held.join().unwrap();
    let snapshot = journal.snapshot().unwrap();
    let a = snapshot.node_by_ino(Ino(10)).unwrap().unwrap();
    let b = snapshot.node_by_ino(Ino(11)).unwrap().unwrap();
    assert_eq!(
        rows(&snapshot, a.id)[1..],
        [(last_of_a, 6, Some(0), Some(50 * 4096 + 1))]
    );
    assert_eq!((a.content_n, a.attr.size), (last_of_a, 50 * 4096 + 1));
    assert_eq!(
        rows(&snapshot, b.id)[1..],
        [
            (last_of_a - 1, 6, Some(0), Some(5000)),
            (apart, 6, Some(1 << 20), Some(10))
        ]
    );
    assert_eq!(b.content_n, apart);
}

#[test]
fn what_was_queued_before_a_close_is_kept_and_nothing_is_taken_after() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    recorder.record(Origin::Local, create("first", 9)).unwrap();
    let (release, held) = hold(&journal);
    let callers: Vec<_> = (0..4)
        .map(|caller: u64| {
            let recorder = recorder.clone();
            std::thread::spawn(move || {
                let mut kept = Vec::new();
                for file in 0.. {
                    let ino = 100 + caller * 1_000_000 + file;
                    match recorder.record(Origin::Local, create(&format!("f{ino}"), ino)) {
                        Ok(_) => kept.push(ino),
                        Err(_) => return kept,
                    }
                }
                kept
            })
        })
        .collect();
    until(|| recorder.last() > 1000);
    drop(release);
    journal.close().unwrap();
    held.join().unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.clean);
    let snapshot = journal.snapshot().unwrap();
    let mut kept = 1;
    for caller in callers {
        for ino in caller.join().unwrap() {
            assert!(snapshot.node_by_ino(Ino(ino)).unwrap().is_some(), "{ino}");
            kept += 1;
        }
    }
    assert_eq!(start.last, kept);
    assert!(recorder.record(Origin::Local, create("late", 7)).is_err());
    assert!(recorder.durable().is_err());
    assert!(recorder.mark().is_err());
}

#[test]
fn durable_leaves_nothing_uncommitted() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..4_u64 {
            let journal = &journal;
            scope.spawn(move || {
                let recorder = journal.recorder();
                for file in 0..50 {
                    let ino = 10 + caller * 1000 + file;
                    let n = recorder
                        .record(Origin::Local, create(&format!("f{ino}"), ino))
                        .unwrap();
                    recorder.durable().unwrap();
                    assert!(journal.status().committed >= n);
                }
            });
        }
    });
    assert_eq!(journal.status().n, 200);
    recorder_commits_full(&journal);
}

/// With nothing recorded, a request for durability still syncs: an earlier commit may
/// have been an ordinary one.
fn recorder_commits_full(journal: &Journal) {
    let barriers = |journal: &Journal| -> i64 {
        journal
            .update(Durability::Normal, |update| {
                Ok(update
                    .connection
                    .query_row("SELECT barrier FROM progress", [], |row| row.get(0))?)
            })
            .unwrap()
    };
    let before = barriers(journal);
    journal.recorder().durable().unwrap();
    assert_eq!(barriers(journal), before + 1);
}
