//! A snapshot shows exactly what was recorded before its mark.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use mirrorfs_journal::*;

fn create(number: u64) -> Change {
    Change::Create {
        parent: Ino(1),
        name: format!("{number}").into(),
        ino: Ino(100 + number),
        attr: Attr {
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
        },
        target: None,
    }
}

#[test]
fn a_cut_is_exact_while_others_write() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let stop = AtomicBool::new(false);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let recorder = journal.recorder();
            let (stop, next) = (&stop, &next);
            scope.spawn(move || {
                // Bounded, since each cut below looks at every name.
                while !stop.load(Ordering::Relaxed) && next.load(Ordering::Relaxed) < 4000 {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    recorder.record(Origin::Local, create(number)).unwrap();
                }
            });
        }
        let cuts: Vec<_> = (0..2)
            .map(|_| {
                let journal = &journal;
                scope.spawn(move || {
                    let mut before = 0;
                    for _ in 0..25 {
                        let mark = journal.recorder().mark().unwrap();
                        let n = mark.n;
                        assert!(n >= before);
                        before = n;
                        // Each record makes one name, so the count is the number.
                        let snapshot = journal.snapshot_at(mark).unwrap();
                        assert_eq!(snapshot.n(), n);
                        let names = snapshot.children(NodeId::ROOT).unwrap();
                        assert_eq!(names.len() as u64, n);
                        assert!(names.iter().all(|(_, node)| node.changed_n <= n));
                        assert_eq!(snapshot.touched(0).unwrap().len() as u64, n);
                        if n > 0 {
                            assert_eq!(snapshot.touched(n - 1).unwrap().len(), 1);
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = cuts.into_iter().map(|cut| cut.join()).collect();
        stop.store(true, Ordering::Relaxed);
        for result in results {
            result.unwrap();
        }
    });
}

#[test]
fn marks_nobody_asks_for_stop_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    let mut kept = Vec::new();
    for number in 0..200 {
        recorder.record(Origin::Local, create(number)).unwrap();
        let mark = recorder.mark().unwrap();
        if number % 50 == 0 {
            kept.push(mark);
        }
    }
    recorder.durable().unwrap();
    assert_eq!(journal.status().committed, 200);
    // A mark taken long ago still has its moment, once.
    for mark in kept {
        let again = mark.clone();
        let n = mark.n;
        let snapshot = journal.snapshot_at(mark).unwrap();
        assert_eq!(snapshot.children(NodeId::ROOT).unwrap().len() as u64, n);
        let refused = journal.snapshot_at(again).map(|_| ());
        assert!(matches!(refused, Err(Error::MarkTaken { .. })));
    }
}

#[test]
fn a_snapshot_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    recorder.record(Origin::Local, create(0)).unwrap();
    let snapshot = journal.snapshot().unwrap();
    for number in 1..20_000 {
        recorder.record(Origin::Local, create(number)).unwrap();
    }
    recorder.durable().unwrap();
    assert_eq!(snapshot.children(NodeId::ROOT).unwrap().len(), 1);
    // It may outlive the journal, which closes all the same.
    journal.close().unwrap();
    assert_eq!(snapshot.n(), 1);
    assert_eq!(snapshot.children(NodeId::ROOT).unwrap().len(), 1);
    drop(snapshot);
    assert!(Journal::open(dir.path()).unwrap().1.clean);
}

#[test]
fn commits_wake_watchers() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let (woken, news) = mpsc::channel();
    let seen = Arc::new(AtomicU64::new(0));
    let newest = Arc::clone(&seen);
    journal.on_commit(move |n| {
        newest.store(n, Ordering::Release);
        let _ = woken.send(n);
    });
    let n = journal.recorder().record(Origin::Local, create(0)).unwrap();
    assert_eq!(news.recv().unwrap(), n);
    assert_eq!(seen.load(Ordering::Acquire), n);
}
