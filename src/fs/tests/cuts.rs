//! A cut shows what was there at its moment, whatever happens afterwards.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, RenameFlags};

use super::{Fixture, path};
use crate::fs::{Caller, Changes, Cut, FsOptions};
use crate::tree::{Ino, Kind, RelPath};

/// Everything that a cut's snapshot lists, read through the cut.
fn read_all(t: &Fixture, cut: &Cut) -> BTreeMap<RelPath, Vec<u8>> {
    let snapshot = t.journal.snapshot_at(cut.mark()).unwrap();
    let mut files = Vec::new();
    snapshot
        .walk(&mut |path: &RelPath, node: &mirrorfs_journal::Node| {
            if node.attr.kind == Kind::File {
                files.push((path.clone(), node.ino, node.attr.size));
            }
            Ok(())
        })
        .unwrap();
    files
        .into_iter()
        .map(|(path, ino, size)| {
            let content = read_file(cut, ino, &path, size);
            (path, content)
        })
        .collect()
}

fn read_file(cut: &Cut, ino: Ino, path: &RelPath, size: u64) -> Vec<u8> {
    let file = cut
        .open(ino, path)
        .unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let mut content = vec![0; size as usize];
    let mut at = 0;
    while at < content.len() {
        let end = content.len().min(at + 7000);
        let read = file.read_at(&mut content[at..end], at as u64).unwrap();
        assert!(read > 0, "{path:?} ends at {at} of {size}");
        at += read;
    }
    content
}

fn lower_files(t: &Fixture) -> BTreeMap<RelPath, Vec<u8>> {
    super::scan(&t.tree)
        .into_iter()
        .filter(|(_, shown)| shown.kind == Kind::File)
        .map(|(path, _)| {
            let content = std::fs::read(t.tree.join(path.as_os_path())).unwrap();
            (path, content)
        })
        .collect()
}

#[test]
fn a_cut_outlives_every_kind_of_change() {
    let t = Fixture::new();
    let own = Caller::own();
    let dir = t.mkdir(t.root(), "dir");
    let files: Vec<Ino> = (0..8)
        .map(|number| t.create(dir, &format!("f{number}"), &vec![number; 20_000]))
        .collect();
    let expected = lower_files(&t);
    let cut = t.fs.open_cut().unwrap();
    t.fs.write(files[0], 100, &[99; 5000], None).unwrap();
    t.fs.write(files[0], 3000, &[98; 5000], None).unwrap();
    t.fs.write(files[0], 19_000, &[97; 5000], None).unwrap();
    for size in [5, 30_000] {
        let size = Changes {
            size: Some(size),
            ..Changes::default()
        };
        t.fs.setattr(&own, files[1], &size).unwrap();
    }
    t.fs.unlink(&own, dir, b"f2").unwrap();
    t.fs.write(files[2], 0, b"written after it was unlinked", None)
        .unwrap();
    t.fs.forget(files[2], 1);
    t.fs.rename(&own, dir, b"f3", dir, b"f4", RenameFlags::empty())
        .unwrap();
    t.fs.fallocate(
        &own,
        files[5],
        0,
        4096,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
    )
    .unwrap();
    t.fs.copy_file_range(&own, files[5], 0, files[6], 10, 10_000)
        .unwrap();
    t.fs.forget(files[7], 1);
    t.fs.rename(
        &own,
        t.root(),
        b"dir",
        t.root(),
        b"renamed",
        RenameFlags::empty(),
    )
    .unwrap();
    let renamed = t.find("renamed");
    t.create(renamed, "f2", b"another");
    assert_eq!(read_all(&t, &cut), expected);
    assert!(!cut.abandoned());
    assert_ne!(lower_files(&t), expected);
    drop(cut);
    t.assert_captured();
}

#[test]
fn exchanged_directories_are_followed() {
    let t = Fixture::new();
    let own = Caller::own();
    for name in ["a", "b"] {
        let dir = t.mkdir(t.root(), name);
        let ino = t.create(dir, "f", name.as_bytes());
        t.fs.forget(ino, 1);
    }
    let expected = lower_files(&t);
    let cut = t.fs.open_cut().unwrap();
    t.fs.rename(&own, t.root(), b"a", t.root(), b"b", RenameFlags::EXCHANGE)
        .unwrap();
    t.fs.rename(&own, t.root(), b"b", t.root(), b"c", RenameFlags::empty())
        .unwrap();
    assert_eq!(read_all(&t, &cut), expected);
}

#[test]
fn a_full_spool_abandons_the_cut_and_not_the_writer() {
    let options = FsOptions {
        spool_limit: 10_000,
        kept_limit: 2,
        ..FsOptions::default()
    };
    let t = Fixture::with(options, |_| {});
    let own = Caller::own();
    let ino = t.create(t.root(), "f", &[1; 20_000]);
    let cut = t.fs.open_cut().unwrap();
    let file = cut.open(ino, &path("f")).unwrap();
    t.fs.write(ino, 0, &[2; 9000], None).unwrap();
    assert!(!cut.abandoned());
    assert_eq!(file.read_at(&mut [0; 10], 0).unwrap(), 10);
    t.fs.write(ino, 9000, &[2; 9000], None).unwrap();
    assert!(cut.abandoned());
    assert!(file.read_at(&mut [0; 10], 0).is_err());
    drop((file, cut));
    let cut = t.fs.open_cut().unwrap();
    for number in 0..3 {
        t.create(t.root(), &format!("new{number}"), b"x");
        t.fs.unlink(&own, t.root(), format!("new{number}").as_bytes())
            .unwrap();
    }
    assert!(!cut.abandoned(), "what was made after the cut is not kept");
    drop(cut);
    for number in 0..3 {
        t.create(t.root(), &format!("old{number}"), b"x");
    }
    let cut = t.fs.open_cut().unwrap();
    for number in 0..3 {
        t.fs.unlink(&own, t.root(), format!("old{number}").as_bytes())
            .unwrap();
    }
    assert!(cut.abandoned());
}

#[test]
fn only_what_is_needed_is_kept() {
    let options = FsOptions {
        spool_limit: 1000,
        ..FsOptions::default()
    };
    let t = Fixture::with(options, |_| {});
    let needed = t.create(t.root(), "needed", &[1; 500]);
    let other = t.create(t.root(), "other", &[1; 5000]);
    let cut = t.fs.open_cut().unwrap();
    cut.needs(HashSet::from([needed]));
    t.fs.write(other, 0, &[2; 5000], None).unwrap();
    t.fs.write(needed, 0, &[2; 500], None).unwrap();
    assert_eq!(read_file(&cut, needed, &path("needed"), 500), [1; 500]);
    cut.done(needed);
    t.fs.write(needed, 0, &[3; 500], None).unwrap();
    assert!(!cut.abandoned());
    // A closed cut leaves nothing behind.
    let nodes = t.fs.known_nodes();
    drop(cut);
    assert_eq!(t.fs.known_nodes(), nodes);
}

/// Ends the writers also where an assertion fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Several writers at work, each changing files, while cuts are taken and compared
/// with a copy made when nobody could write.
#[test]
fn cuts_under_concurrent_work() {
    let t = Fixture::new();
    let dirs: Vec<Ino> = (0..3)
        .map(|number| t.mkdir(t.root(), &format!("d{number}")))
        .collect();
    for dir in &dirs {
        for number in 0..6 {
            t.create(*dir, &format!("f{number}"), &vec![number; 9000]);
        }
    }
    let stop = AtomicBool::new(false);
    let worked = AtomicU64::new(0);
    // Writers hold it shared, so the copy is made at the moment of the cut.
    let gate = parking_lot::RwLock::new(());
    std::thread::scope(|scope| {
        for writer in 0..2u64 {
            let (t, dirs, stop, gate, worked) = (&t, &dirs, &stop, &gate, &worked);
            scope.spawn(move || {
                let own = Caller::own();
                let mut random = 0x9e37_79b9_7f4a_7c15 ^ (writer + 1);
                let mut next = move |limit: u64| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random % limit
                };
                while !stop.load(Ordering::Relaxed) {
                    let _shared = gate.read();
                    let dir = dirs[next(3) as usize];
                    let name = format!("f{}", next(6));
                    let name = name.as_bytes();
                    let found =
                        t.fs.lookup(&Caller::own(), dir, name)
                            .map(|found| found.attributes.ino);
                    // Losing a race against the other writer is part of the game.
                    let _ = match (next(6), found) {
                        (0, Ok(ino)) => {
                            let size = Changes {
                                size: Some(next(12_000)),
                                ..Changes::default()
                            };
                            t.fs.setattr(&own, ino, &size).map(drop)
                        }
                        (1, Ok(_)) => t.fs.unlink(&own, dir, name),
                        (2, Ok(_)) => {
                            let to = format!("f{}", next(6));
                            t.fs.rename(
                                &own,
                                dir,
                                name,
                                dirs[next(3) as usize],
                                to.as_bytes(),
                                RenameFlags::empty(),
                            )
                        }
                        (_, Ok(ino)) => {
                            let content = vec![next(256) as u8; next(6000) as usize + 1];
                            t.fs.write(ino, next(9000), &content, None).map(drop)
                        }
                        (_, Err(_)) => {
                            t.fs.create(&own, dir, name, 0o644, 0, true)
                                .map(|found| t.fs.forget(found.attributes.ino, 1))
                        }
                    };
                    if let Ok(ino) = found {
                        t.fs.forget(ino, 1);
                    }
                    worked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&stop);
        for _ in 0..25 {
            let (cut, expected) = {
                let _alone = gate.write();
                let cut = t.fs.open_cut().unwrap();
                (cut, lower_files(&t))
            };
            // Something has to have changed, and more changes while it is read.
            let then = worked.load(Ordering::Relaxed) + 50;
            while worked.load(Ordering::Relaxed) < then {
                std::thread::yield_now();
            }
            assert_eq!(read_all(&t, &cut), expected);
            assert!(!cut.abandoned());
        }
    });
    t.assert_captured();
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        file: u8,
        at: u16,
        len: u16,
        byte: u8,
    },
    Truncate {
        file: u8,
        size: u16,
    },
    Unlink(u8),
    Create(u8),
    Rename(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let file = 0..5u8;
    prop_oneof![
        4 => (file.clone(), 0..5000u16, 1..3000u16, any::<u8>())
            .prop_map(|(file, at, len, byte)| Step::Write { file, at, len, byte }),
        2 => (file.clone(), 0..6000u16).prop_map(|(file, size)| Step::Truncate { file, size }),
        1 => file.clone().prop_map(Step::Unlink),
        2 => file.clone().prop_map(Step::Create),
        2 => (file.clone(), file).prop_map(|(from, to)| Step::Rename(from, to)),
    ]
}

fn run(t: &Fixture, step: &Step) {
    let own = Caller::own();
    let name = |file: &u8| format!("f{file}").into_bytes();
    let ino = |file: &u8| {
        t.fs.lookup(&Caller::own(), t.root(), &name(file))
            .map(|found| found.attributes.ino)
    };
    // What is impossible at the moment is skipped.
    let _ = match step {
        Step::Write {
            file,
            at,
            len,
            byte,
        } => ino(file).and_then(|ino| {
            t.fs.write(ino, u64::from(*at), &vec![*byte; usize::from(*len)], None)
                .map(drop)
        }),
        Step::Truncate { file, size } => ino(file).and_then(|ino| {
            let size = Changes {
                size: Some(u64::from(*size)),
                ..Changes::default()
            };
            t.fs.setattr(&own, ino, &size).map(drop)
        }),
        Step::Unlink(file) => t.fs.unlink(&own, t.root(), &name(file)),
        Step::Create(file) => {
            t.fs.create(&own, t.root(), &name(file), 0o644, 0, true)
                .map(drop)
        }
        Step::Rename(from, to) => t.fs.rename(
            &own,
            t.root(),
            &name(from),
            t.root(),
            &name(to),
            RenameFlags::empty(),
        ),
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn a_cut_is_the_copy_made_before(
        before in proptest::collection::vec(step(), 5..25),
        between in proptest::collection::vec(step(), 0..25),
        after in proptest::collection::vec(step(), 0..25),
    ) {
        let t = Fixture::new();
        before.iter().for_each(|step| run(&t, step));
        let first = (t.fs.open_cut().unwrap(), lower_files(&t));
        between.iter().for_each(|step| run(&t, step));
        let second = (t.fs.open_cut().unwrap(), lower_files(&t));
        after.iter().for_each(|step| run(&t, step));
        prop_assert_eq!(read_all(&t, &second.0), second.1);
        prop_assert_eq!(read_all(&t, &first.0), first.1);
        drop((first.0, second.0));
        t.assert_captured();
    }
}
