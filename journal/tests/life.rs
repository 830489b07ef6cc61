//! Starting, stopping, and what a journal does when its disk or its file fails it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use mirrorfs_journal::*;

fn create(name: &str, ino: u64) -> Change {
    Change::Create {
        parent: Ino(1),
        name: name.into(),
        ino: Ino(ino),
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

fn fill(journal: &Journal, files: std::ops::Range<u64>) {
    let recorder = journal.recorder();
    for ino in files {
        recorder
            .record(Origin::Local, create(&format!("file {ino}"), 100 + ino))
            .unwrap();
    }
}

fn count(journal: &Journal) -> usize {
    let snapshot = journal.snapshot().unwrap();
    snapshot.children(NodeId::ROOT).unwrap().len()
}

#[test]
fn a_start_knows_how_the_last_life_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, first) = Journal::open(dir.path()).unwrap();
    assert!(first.fresh && !first.clean && !first.same_boot && first.reason.is_none());
    assert_eq!(first.last, 0);
    fill(&journal, 0..10);
    journal.close().unwrap();
    // Closed means one file that needs no recovery.
    assert!(!dir.path().join("journal.db-wal").exists());

    let (journal, second) = Journal::open(dir.path()).unwrap();
    assert!(second.clean && second.same_boot && !second.fresh);
    assert_eq!(second.last, 10);
    assert_ne!(second.epoch, first.epoch);
    fill(&journal, 10..15);
    drop(journal);

    let (journal, third) = Journal::open(dir.path()).unwrap();
    assert!(!third.clean && third.same_boot && !third.fresh);
    assert_eq!(third.last, 15);
    assert_eq!(count(&journal), 15);
    // Numbers go on where they were.
    fill(&journal, 15..16);
    assert_eq!(journal.recorder().last(), 16);
}

/// A copy of the files as they are while the journal is open is what a SIGKILL leaves.
#[test]
fn what_was_durable_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    fill(&journal, 0..500);
    journal.recorder().durable().unwrap();
    let left = tempfile::tempdir().unwrap();
    for name in ["journal.db", "journal.db-wal"] {
        fs::copy(dir.path().join(name), left.path().join(name)).unwrap();
    }
    let (found, start) = Journal::open(left.path()).unwrap();
    assert!(!start.clean && !start.fresh);
    assert_eq!(start.last, 500);
    assert_eq!(count(&found), 500);
}

#[test]
fn another_boot_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.close().unwrap();
    let database = rusqlite::Connection::open(dir.path().join(DATABASE)).unwrap();
    database
        .execute("UPDATE life SET boot = 'another'", [])
        .unwrap();
    drop(database);
    let (_, start) = Journal::open(dir.path()).unwrap();
    assert!(start.clean && !start.same_boot);
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(DATABASE);
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.close().unwrap();
    let database = rusqlite::Connection::open(&path).unwrap();
    database.pragma_update(None, "user_version", 1000).unwrap();
    drop(database);
    let before = fs::read(&path).unwrap();
    let Err(error) = Journal::open(dir.path()) else {
        panic!("opened a database of schema 1000");
    };
    assert!(matches!(error, Error::Newer { found: 1000, .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("journal.db") && message.contains("newer"));
    assert_eq!(fs::read(&path).unwrap(), before);
}

fn damaged_files(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("journal.db.damaged-"))
        .collect()
}

#[test]
fn a_file_that_is_no_database_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let rubbish = b"this is no database ".repeat(1000);
    fs::write(dir.path().join(DATABASE), &rubbish).unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.fresh && !start.clean);
    let aside = damaged_files(dir.path());
    assert_eq!(aside.len(), 1);
    assert!(start.reason.unwrap().contains(&aside[0]));
    assert_eq!(fs::read(dir.path().join(&aside[0])).unwrap(), rubbish);
    fill(&journal, 0..10);
    assert_eq!(count(&journal), 10);
}

/// Pages overwritten in the middle are found by the check after an unclean stop.
#[test]
fn damage_in_the_middle_is_found_after_an_unclean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    fill(&journal, 0..5000);
    journal.close().unwrap();
    // Opened and not closed, and nothing in the log that would mend the pages.
    drop(Journal::open(dir.path()).unwrap());
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join(DATABASE))
        .unwrap();
    let middle = file.metadata().unwrap().len() / 2 / 4096 * 4096;
    file.write_all_at(&[0xa5; 16 * 4096], middle).unwrap();
    drop(file);
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.fresh, "{start:?}");
    assert!(start.reason.is_some());
    assert_eq!(damaged_files(dir.path()).len(), 1);
    fill(&journal, 0..3);
    assert_eq!(count(&journal), 3);
}

/// Also after a clean stop, as long as that costs next to nothing.
#[test]
fn damage_of_a_small_database_is_found_at_every_start() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    fill(&journal, 0..5000);
    journal.close().unwrap();
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join(DATABASE))
        .unwrap();
    let middle = file.metadata().unwrap().len() / 2 / 4096 * 4096;
    file.write_all_at(&[0xa5; 16 * 4096], middle).unwrap();
    drop(file);
    let (_journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.fresh && start.reason.is_some(), "{start:?}");
    assert_eq!(damaged_files(dir.path()).len(), 1);
}

/// A file that is cut short, as a full disk or a bad copy leaves it.
#[test]
fn a_truncated_database_is_moved_aside() {
    for part in [2, 3, 100] {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        fill(&journal, 0..5000);
        journal.close().unwrap();
        let file = OpenOptions::new()
            .write(true)
            .open(dir.path().join(DATABASE))
            .unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(length / part).unwrap();
        drop(file);
        let (journal, start) = Journal::open(dir.path()).unwrap();
        assert!(start.fresh && start.reason.is_some(), "1/{part}: {start:?}");
        fill(&journal, 0..3);
        assert_eq!(count(&journal), 3);
    }
}

/// Pages that go bad while the journal is open: whoever meets them is told, the journal
/// takes nothing more, and the next start begins anew.
#[test]
fn damage_at_run_time_poisons() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    // More than the writer keeps in memory.
    let recorder = journal.recorder();
    for ino in 0..60_000_u64 {
        let name = format!("{ino:0200}");
        recorder
            .record(Origin::Local, create(&name, 100 + ino))
            .unwrap();
    }
    journal.close().unwrap();
    let (journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.clean && !start.fresh);
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join(DATABASE))
        .unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    for page in 10..pages {
        file.write_all_at(&[0xa5; 4096], page * 4096).unwrap();
    }
    drop(file);
    let recorder = journal.recorder();
    let poisoned = (0..10_000_u64).find_map(|ino| {
        let name = format!("{:0200}", ino * 7);
        let unlink = Change::Unlink {
            parent: Ino(1),
            name: name.into(),
            ino: Ino(100 + ino * 7),
            last: true,
        };
        recorder
            .record(Origin::Local, unlink)
            .and_then(|_| recorder.durable())
            .err()
    });
    let poisoned = poisoned.unwrap_or_else(|| panic!("nothing was noticed"));
    assert!(poisoned.0.contains("malformed"), "{poisoned}");
    drop(journal);
    let (_journal, start) = Journal::open(dir.path()).unwrap();
    assert!(start.fresh && start.reason.is_some(), "{start:?}");
}

/// A small tmpfs, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "small"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(status.unwrap().success());
    }
}

#[test]
fn a_full_disk_poisons() {
    use std::os::unix::fs::MetadataExt;
    // Only root can mount; the files a test makes tell who it is.
    if fs::metadata(tempfile::tempdir().unwrap().path())
        .unwrap()
        .uid()
        != 0
    {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let disk = SmallDisk::mount();
    let (journal, _) = Journal::open(disk.0.path()).unwrap();
    let recorder = journal.recorder();
    let mut durable = 0;
    let poisoned = 'full: {
        for ino in 0..1_000_000_u64 {
            let name = format!("{ino:0200}");
            if let Err(poisoned) = recorder.record(Origin::Local, create(&name, 100 + ino)) {
                break 'full poisoned;
            }
            if ino % 100 == 0 {
                if let Err(poisoned) = recorder.durable() {
                    break 'full poisoned;
                }
                durable = recorder.last();
            }
        }
        panic!("the disk never filled up");
    };
    assert!(durable > 0);
    assert!(poisoned.0.contains("full"), "{poisoned}");
    // For good, for everybody, with the cause, and at once.
    let again = recorder
        .record(Origin::Local, create("again", 5))
        .unwrap_err();
    assert_eq!(again.0, poisoned.0);
    assert_eq!(recorder.durable().unwrap_err().0, poisoned.0);
    assert!(matches!(journal.snapshot(), Err(Error::Poisoned(_))));
    let update = journal.update(Durability::Normal, |_| Ok(()));
    assert!(matches!(update, Err(Error::Poisoned(_))), "{update:?}");
    assert_eq!(journal.status().poisoned, Some(poisoned.0));
    assert!(journal.close().is_err());
    drop(journal);

    // What was durable is there, and the next start knows it was no clean stop.
    let roomy = tempfile::tempdir().unwrap();
    for name in ["journal.db", "journal.db-wal"] {
        if disk.0.path().join(name).exists() {
            fs::copy(disk.0.path().join(name), roomy.path().join(name)).unwrap();
        }
    }
    let (journal, start) = Journal::open(roomy.path()).unwrap();
    assert!(!start.clean && !start.fresh);
    assert!(start.last >= durable, "{} < {durable}", start.last);
    assert_eq!(count(&journal) as u64, start.last);
}

#[test]
fn an_update_that_fails_or_panics_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let failed: Result<(), _> = journal.update(Durability::Full, |update| {
        update.set_setting("half", b"done")?;
        Err(Error::other("changed my mind"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "changed my mind");
    let panicked: Result<(), _> = journal.update(Durability::Normal, |update| {
        update.set_setting("half", b"done")?;
        panic!("on purpose")
    });
    assert!(matches!(panicked, Err(Error::UpdatePanicked)));
    let inner = journal.clone();
    let nested = journal.update(Durability::Normal, move |_| {
        inner.update(Durability::Normal, |_| Ok(()))
    });
    assert!(matches!(nested, Err(Error::Reentrant)));
    assert_eq!(journal.snapshot().unwrap().setting("half").unwrap(), None);
    fill(&journal, 0..3);
    let seen = journal
        .update(Durability::Full, |update| {
            update.set_setting("whole", b"done")?;
            // It reads its own writes and all that was recorded before.
            assert_eq!(update.setting("whole")?.as_deref(), Some(&b"done"[..]));
            Ok((update.n(), update.children(NodeId::ROOT)?.len()))
        })
        .unwrap();
    assert_eq!(seen, (3, 3));
    journal.close().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let kept = journal.snapshot().unwrap().setting("whole").unwrap();
    assert_eq!(kept.as_deref(), Some(&b"done"[..]));
}
