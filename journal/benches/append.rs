//! How much the journal takes in, and how long a durable commit takes.
//!
//! The database lies in the directory for temporary files (`TMPDIR`): put that on the
//! disk that is to be measured.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use mirrorfs_journal::*;

const RECORDS: u64 = 20_000;

fn main() {
    divan::main();
}

fn attr(size: u64) -> Attr {
    Attr {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        size,
        mtime: Timestamp::now(),
        ctime: Timestamp::now(),
    }
}

fn create(number: u64) -> Change {
    Change::Create {
        parent: Ino(1),
        name: format!("a file named {number}").into(),
        ino: Ino(100 + number),
        attr: attr(0),
        target: None,
    }
}

fn write(number: u64) -> Change {
    // Every file is written in turn, so that nothing can be coalesced.
    Change::Write {
        ino: Ino(100 + number % 1000),
        offset: number * 8192,
        len: 4096,
        attr: attr(number * 8192 + 4096),
    }
}

struct Opened {
    journal: Journal,
    recorder: Recorder,
    next: AtomicU64,
    _dir: tempfile::TempDir,
}

fn opened(files: u64) -> Opened {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let recorder = journal.recorder();
    for number in 0..files {
        recorder.record(Origin::Local, create(number)).unwrap();
    }
    recorder.durable().unwrap();
    Opened {
        journal,
        recorder,
        next: AtomicU64::new(files),
        _dir: dir,
    }
}

/// Records until all are committed.
fn throughput(bencher: Bencher<'_, '_>, change: fn(u64) -> Change) {
    let opened = opened(1000);
    bencher.counter(ItemsCount::new(RECORDS)).bench(|| {
        for _ in 0..RECORDS {
            let number = opened.next.fetch_add(1, Ordering::Relaxed);
            opened
                .recorder
                .record(Origin::Local, black_box(change(number)))
                .unwrap();
        }
        opened.journal.snapshot().unwrap().n()
    });
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn creations(bencher: Bencher<'_, '_>) {
    throughput(bencher, create);
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn writes(bencher: Bencher<'_, '_>) {
    throughput(bencher, write);
}

/// What a caller waits for one record while the queue has room.
#[divan::bench(sample_count = 100, sample_size = 100)]
fn one_record(bencher: Bencher<'_, '_>) {
    let opened = opened(1000);
    bencher.bench(|| {
        let number = opened.next.fetch_add(1, Ordering::Relaxed);
        opened
            .recorder
            .record(Origin::Local, write(number))
            .unwrap()
    });
}

/// One record and its durable commit, as for an fsync, by so many callers at once.
#[divan::bench(threads = [1, 4], sample_count = 200, sample_size = 1)]
fn durable(bencher: Bencher<'_, '_>) {
    let opened = opened(1000);
    bencher.bench(|| {
        let number = opened.next.fetch_add(1, Ordering::Relaxed);
        opened
            .recorder
            .record(Origin::Local, write(number))
            .unwrap();
        opened.recorder.durable().unwrap();
    });
}
