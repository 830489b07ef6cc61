//! How large the journal of a busy project gets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use mirrorfs_journal::*;

fn attr(size: u64) -> Attr {
    Attr {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        size,
        mtime: Timestamp { secs: 1, nanos: 2 },
        ctime: Timestamp { secs: 3, nanos: 4 },
    }
}

/// A day's work on 2,000 files: editors and builds write, replace and remove.
fn work(recorder: &Recorder, changes: u64, next: &mut u64) {
    const FILES: u64 = 2000;
    for number in 0..changes {
        let file = *next % FILES;
        let name = format!("src/some_module_of_the_project_{file}.rs").replace('/', "_");
        let (this, last) = (1000 + *next, (1000 + *next).wrapping_sub(FILES));
        let change = if number % 4 != 0 && *next >= FILES {
            Change::Write {
                ino: Ino(last),
                offset: 64 * number,
                len: 4096,
                attr: attr(4096),
            }
        } else {
            // A file saved by writing another and renaming it.
            *next += 1;
            if *next > FILES {
                recorder
                    .record(
                        Origin::Local,
                        Change::Unlink {
                            parent: Ino(1),
                            name: name.clone().into(),
                            ino: Ino(last),
                            last: true,
                        },
                    )
                    .unwrap();
            }
            Change::Create {
                parent: Ino(1),
                name: name.into(),
                ino: Ino(this),
                attr: attr(0),
                target: None,
            }
        };
        recorder.record(Origin::Local, change).unwrap();
    }
}

/// However long the history, the file takes no more than what is kept of it: at most
/// PER_CHANGE bytes a change and PER_FILE a file. The daemon keeps a million
/// changes and compacts each hour; here it is a fiftieth of both, over a year of 365 days.
#[test]
fn a_year_of_history_does_not_make_it_grow() {
    const PER_CHANGE: u64 = 130;
    const PER_FILE: u64 = 600;
    let long = std::env::var_os("MIRRORFS_TEST_LONG").is_some();
    let (keep, a_day) = if long {
        (1_000_000, 20_000)
    } else {
        (20_000, 400)
    };
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let (recorder, mut next) = (journal.recorder(), 0);
    let mut largest = 0;
    for _day in 0..365 {
        work(&recorder, a_day, &mut next);
        loop {
            let gone = journal.update(Durability::Normal, move |update| {
                update.compact(Timestamp::now(), keep, 5000)
            });
            if gone.unwrap() == 0 {
                break;
            }
        }
        let file = fs::metadata(dir.path().join(DATABASE)).unwrap().len();
        largest = largest.max(file);
    }
    let snapshot = journal.snapshot().unwrap();
    let recorded = snapshot.n();
    assert!(recorded > 365 * a_day, "{recorded}");
    assert_eq!(recorded - snapshot.compacted().unwrap(), keep);
    drop(snapshot);
    journal.close().unwrap();
    let file = fs::metadata(dir.path().join(DATABASE)).unwrap().len();
    largest = largest.max(file);
    let limit = keep * PER_CHANGE + 2000 * PER_FILE;
    println!("{recorded} changes, {keep} kept: {largest} bytes at most, limit {limit}");
    assert!(largest < limit, "{largest} > {limit}");
}
