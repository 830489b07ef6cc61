//! Batches on real directories, with a user at work in them and with power cuts.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::super::{sync, trash};
use super::*;
use crate::tree::{Content, ContentHash, Entry, Id, MirrorId, Timestamp, Xattrs};
use crate::wire::message::Expect;

type Hook = Box<dyn FnMut() -> bool>;

/// A tree with its index, reopened at will.
struct World {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
}

const MIRROR: MirrorId = Id([7; 16]);
const BATCH: BatchId = Id([9; 16]);

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
            state: tempfile::tempdir().unwrap(),
        };
        world.file("edit", "old");
        world.file("gone", "bye");
        world.file("swap1", "one");
        world.file("swap2", "two");
        world.file("over", "a file");
        world.file("from/deep/x", "x");
        world.file("from/y", "y");
        world.file("from/z", "z of from");
        world.file("empty/last", "z");
        world.file("meta", "m");
        world.file("draft", "draft");
        world.file("name", "a name");
        world
    }

    fn path(&self, at: &str) -> PathBuf {
        self.dir.path().join(at)
    }

    fn file(&self, at: &str, content: &str) {
        let path = self.path(at);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn with<T>(&self, hook: Option<Hook>, work: impl FnOnce(&mut Applier<'_>) -> T) -> T {
        let root = Root::new(File::open(self.dir.path()).unwrap().into());
        let (reserved, _) = Reserved::create(root.fd(), MIRROR).unwrap();
        let staging = Staging::new(&reserved).unwrap();
        let mut index = PeerIndex::open(self.state.path(), b"tree").unwrap();
        work(&mut Applier {
            root: &root,
            reserved: &reserved,
            staging: &staging,
            index: &mut index,
            symlinks: crate::tree::links::Symlinks::All,
            hook,
        })
    }

    fn apply_with(&self, ops: &[Op], hook: Option<Hook>) -> Result<Outcome, ApplyError> {
        self.with(hook, |applier| {
            for content in CONTENTS {
                let (hash, size) = (ContentHash::of(content.as_bytes()), content.len() as u64);
                if !applier.staging.is_complete(hash).unwrap() {
                    let mut incoming = applier.staging.begin(hash, size).unwrap();
                    let have = incoming.have();
                    let rest = &content.as_bytes()[have as usize..];
                    incoming.append(have, rest).unwrap();
                    incoming.finish().unwrap();
                }
            }
            applier.apply(Batch {
                id: BATCH,
                mount: MOUNT,
                agreement: agreement(1),
                ops: ops.to_vec(),
            })
        })
    }

    fn apply(&self, ops: &[Op]) -> Outcome {
        self.apply_with(ops, None).unwrap()
    }

    fn show(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        show(self.dir.path(), self.dir.path(), &mut found);
        found
    }

    /// What lies in the trash or among the conflicts, by path.
    fn kept(&self, shelf: &str) -> BTreeMap<String, String> {
        let mut kept = BTreeMap::new();
        for shelf in fs::read_dir(self.path(".mirrorfs").join(shelf)).unwrap() {
            let shelf = shelf.unwrap().path();
            show(&shelf, &shelf, &mut kept);
        }
        kept
    }

    fn entry(&self, at: &str) -> Entry {
        let path = self.path(at);
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_dir() {
            Content::Directory
        } else if meta.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            Content::Symlink {
                target: std::os::unix::ffi::OsStrExt::as_bytes(target.as_os_str()).to_vec(),
            }
        } else {
            let content = fs::read(&path).unwrap();
            Content::File {
                size: content.len() as u64,
                hash: ContentHash::of(&content),
            }
        };
        let mtime = if meta.is_dir() {
            Timestamp::default()
        } else {
            Timestamp {
                secs: meta.mtime(),
                nanos: meta.mtime_nsec() as u32,
            }
        };
        Entry {
            content,
            mode: meta.mode() & 0o1777,
            mtime,
            xattrs: Xattrs::new(),
        }
    }
}

fn show(base: &Path, dir: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path
            .strip_prefix(base)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        if name == ".mirrorfs" {
            continue;
        }
        let meta = path.symlink_metadata().unwrap();
        if meta.is_dir() {
            found.insert(name, format!("dir {:o}", meta.mode() & 0o7777));
            show(base, &path, found);
        } else if meta.is_symlink() {
            found.insert(
                name,
                format!("-> {}", fs::read_link(&path).unwrap().display()),
            );
        } else {
            found.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

const CONTENTS: [&str; 6] = [
    "new",
    "child",
    "moved and edited",
    "kept aside",
    "final",
    "the next",
];

fn path(at: &str) -> RelPath {
    RelPath::new(at).unwrap()
}

const MOUNT: ReplicaId = crate::tree::Id([5; 16]);

fn agreement(number: u64) -> Agreement {
    Agreement {
        number,
        nonce: Id([number as u8; 16]),
        previous: None,
    }
}

fn new_file(content: &str) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o640,
        mtime: Timestamp {
            secs: 1_000_000_000,
            nanos: 42,
        },
        xattrs: Xattrs::new(),
    }
}

fn new_dir(mode: u32) -> Entry {
    Entry {
        content: Content::Directory,
        mode,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn put(at: &str, content: &str, expect: Expect) -> Op {
    Op::Put {
        path: path(at),
        entry: new_file(content),
        expect,
    }
}

/// One of everything.
fn everything(world: &World) -> Vec<Op> {
    let park = |from: &str, slot| Op::Park {
        from: path(from),
        slot,
        expect: world.entry(from),
    };
    let unpark = |slot, to: &str| Op::Unpark { slot, to: path(to) };
    let mut meta = world.entry("meta");
    meta.mode = 0o600;
    meta.mtime.secs = 5;
    vec![
        park("from/deep", 3),
        park("from", 2),
        park("swap1", 0),
        park("swap2", 1),
        park("draft", 4),
        park("name", 5),
        unpark(0, "swap2"),
        unpark(1, "swap1"),
        unpark(4, "final"),
        unpark(5, "names"),
        unpark(2, "to"),
        unpark(3, "to/elsewhere"),
        Op::MakeDir {
            path: path("made"),
            entry: new_dir(0o500),
        },
        put("made/child", "child", Expect::Absent),
        Op::Remove {
            path: path("over"),
            expect: world.entry("over"),
        },
        Op::MakeDir {
            path: path("over"),
            entry: new_dir(0o755),
        },
        put("over/child", "child", Expect::Absent),
        put("edit", "new", Expect::Entry(world.entry("edit"))),
        put("final", "final", Expect::Entry(world.entry("draft"))),
        put("draft", "the next", Expect::Absent),
        Op::Remove {
            path: path("names"),
            expect: world.entry("name"),
        },
        Op::MakeDir {
            path: path("names"),
            entry: new_dir(0o755),
        },
        put(
            "to/elsewhere/x",
            "moved and edited",
            Expect::Entry(world.entry("from/deep/x")),
        ),
        Op::Put {
            path: path("link"),
            entry: Entry {
                content: Content::Symlink {
                    target: b"/etc/passwd".to_vec(),
                },
                ..new_file("")
            },
            expect: Expect::Absent,
        },
        Op::SetMeta {
            path: path("meta"),
            entry: meta,
            expect: world.entry("meta"),
        },
        Op::Remove {
            path: path("gone"),
            expect: world.entry("gone"),
        },
        Op::Remove {
            path: path("to/z"),
            expect: world.entry("from/z"),
        },
        Op::Remove {
            path: path("empty/last"),
            expect: world.entry("empty/last"),
        },
        Op::RemoveDir {
            path: path("empty"),
        },
        Op::KeepConflict {
            path: path("edit"),
            entry: new_file("kept aside"),
        },
    ]
}

fn afterwards() -> BTreeMap<String, String> {
    [
        ("edit", "new"),
        ("final", "final"),
        ("draft", "the next"),
        ("names", "dir 755"),
        ("swap1", "two"),
        ("swap2", "one"),
        ("over", "dir 755"),
        ("over/child", "child"),
        ("made", "dir 500"),
        ("made/child", "child"),
        ("to", "dir 755"),
        ("to/y", "y"),
        ("to/elsewhere", "dir 755"),
        ("to/elsewhere/x", "moved and edited"),
        ("link", "-> /etc/passwd"),
        ("meta", "m"),
    ]
    .into_iter()
    .map(|(path, content)| (path.to_owned(), content.to_owned()))
    .collect()
}

fn check_after_everything(world: &World, context: &str) {
    assert_eq!(world.show(), afterwards(), "{context}");
    let meta = world.path("meta").metadata().unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.mtime()),
        (0o600, 5),
        "{context}"
    );
    let edit = world.path("edit").metadata().unwrap();
    assert_eq!(edit.mode() & 0o7777, 0o640, "{context}");
    assert_eq!((edit.mtime(), edit.mtime_nsec()), (1_000_000_000, 42));
    let trash = world.kept("trash");
    for (path, content) in [
        ("edit", "old"),
        ("final", "draft"),
        ("names", "a name"),
        ("gone", "bye"),
        ("to/z", "z of from"),
        ("over", "a file"),
        ("to/elsewhere/x", "x"),
        ("empty/last", "z"),
    ] {
        assert_eq!(
            trash.get(path).map(String::as_str),
            Some(content),
            "{context}"
        );
    }
    assert_eq!(world.kept("conflicts")["edit"], "kept aside", "{context}");
    assert!(!world.path(".mirrorfs/applying").exists(), "{context}");
    world.with(None, |applier| {
        let index = &applier.index;
        let last = index.last_agreement(MOUNT).unwrap();
        assert_eq!(
            last.map(|last| last.agreement),
            Some(agreement(1)),
            "{context}"
        );
        for (at, shown) in afterwards() {
            let row = index.row(&path(&at)).unwrap();
            // What was only moved was never observed here, and is known by nobody.
            let placed = [
                "edit",
                "final",
                "draft",
                "names",
                "made",
                "made/child",
                "over",
                "over/child",
                "link",
                "meta",
            ]
            .contains(&at.as_str());
            assert_eq!(
                row.is_some_and(|row| row.entry.is_some()),
                placed || at == "to/elsewhere/x",
                "{context}: {at} {shown}"
            );
        }
    });
    let staging = world.path(".mirrorfs/staging");
    let left: Vec<_> = fs::read_dir(staging)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.len() != 64)
        .collect();
    assert!(left.is_empty(), "{context}: {left:?}");
}

#[test]
fn carries_out_every_kind_of_step() {
    let world = World::new();
    let outcome = world.apply(&everything(&world));
    assert!(outcome.diverged.is_empty(), "{:?}", outcome.diverged);
    assert!(outcome.recheck.is_empty(), "{:?}", outcome.recheck);
    check_after_everything(&world, "");
    outcome.unsynced.sync().unwrap();
    world.with(None, |applier| {
        assert!(applier.index.redo().unwrap().is_some());
        applier.synced().unwrap();
        assert!(applier.index.redo().unwrap().is_none());
        assert_eq!(
            Marks::of(applier.reserved).unwrap().with(MOUNT),
            Some(agreement(1))
        );
    });
}

fn cut_at(count: u32) -> (Hook, Rc<Cell<bool>>) {
    let (mut left, cut) = (count, Rc::new(Cell::new(false)));
    let seen = cut.clone();
    let hook = move || {
        if left == 0 {
            seen.set(true);
            return true;
        }
        left -= 1;
        false
    };
    (Box::new(hook), cut)
}

#[test]
pub(crate) fn a_batch_that_is_cut_off_anywhere_is_completed() {
    let mut points = 0;
    loop {
        let world = World::new();
        let ops = everything(&world);
        let (hook, cut) = cut_at(points);
        let outcome = world.apply_with(&ops, Some(hook));
        if !cut.get() {
            outcome.unwrap();
            break;
        }
        assert!(matches!(outcome, Err(ApplyError::Interrupted(_))));
        assert!(world.path(".mirrorfs/applying").exists());
        let context = format!("cut at {points}");
        let outcome = world.with(None, |applier| applier.recover().unwrap().unwrap());
        assert!(outcome.diverged.is_empty(), "{context}: {outcome:?}");
        check_after_everything(&world, &context);
        assert!(world.with(None, |applier| applier.recover().unwrap().is_none()));
        points += 1;
    }
    assert!(points > 30, "only {points} points");
}

/// "The peer verifies each by BLAKE3, syncs them and a redo record, applies."
#[test]
pub(crate) fn what_is_put_in_place_was_synced_before() {
    let world = World::new();
    let synced = Rc::new(Cell::new(None));
    let first = synced.clone();
    let hook = move || {
        first.set(Some(first.take().unwrap_or_else(sync::seen::take)));
        false
    };
    let ops = [("a", "new"), ("b", "new"), ("c", "child")];
    world.with(Some(Box::new(hook)), |applier| {
        for content in ["new", "child"] {
            let (hash, size) = (ContentHash::of(content.as_bytes()), content.len() as u64);
            let mut incoming = applier.staging.begin(hash, size).unwrap();
            incoming.append(0, content.as_bytes()).unwrap();
            incoming.finish_unsynced().unwrap();
        }
        sync::seen::take();
        let ops = ops.map(|(at, content)| put(at, content, Expect::Absent));
        let batch = Batch {
            id: BATCH,
            mount: MOUNT,
            agreement: agreement(1),
            ops: ops.to_vec(),
        };
        applier.apply(batch).unwrap();
    });
    let synced = synced.take().unwrap();
    for (at, _) in ops {
        let ino = world.path(at).metadata().unwrap().ino();
        assert!(
            synced.contains(&ino),
            "{at} was not synced before the first rename"
        );
    }
}

/// "The tree carries a marker of its last agreement, written after lower was synced, so it
/// may lag and never lead."
#[test]
pub(crate) fn the_tree_is_marked_after_it_was_synced() {
    let world = World::new();
    let mark = world.path(".mirrorfs/agreements");
    let at_rename = mark.clone();
    let hook = move || {
        assert!(!at_rename.exists(), "marked before a rename");
        false
    };
    let ops = everything(&world);
    let outcome = world.apply_with(&ops, Some(Box::new(hook))).unwrap();
    assert!(!mark.exists(), "marked before the names were synced");
    outcome.unsynced.sync().unwrap();
    world.with(None, |applier| applier.synced().unwrap());
    assert!(mark.exists());
}

#[test]
fn a_recovery_that_is_cut_off_is_completed_too() {
    for first in [0, 3, 9, 14, 21, 27] {
        let mut second = 0;
        loop {
            let world = World::new();
            let (hook, _) = cut_at(first);
            world
                .apply_with(&everything(&world), Some(hook))
                .unwrap_err();
            let (hook, cut) = cut_at(second);
            let recovered = world.with(Some(hook), |applier| applier.recover());
            if !cut.get() {
                recovered.unwrap();
                break;
            }
            let context = format!("cut at {first}, then at {second}");
            let outcome = world.with(None, |applier| applier.recover().unwrap().unwrap());
            assert!(outcome.diverged.is_empty(), "{context}: {outcome:?}");
            check_after_everything(&world, &context);
            second += 5;
        }
    }
}

/// The agent's trash, which batch after batch fills.
#[test]
fn versions_agreed_on_are_kept_hourly_and_go_first() {
    let world = World::new();
    let root = File::open(world.dir.path()).unwrap();
    let (reserved, _) = Reserved::create(root.as_fd(), MIRROR).unwrap();
    let mut number = 0_u8;
    trash::tests::check_bounds(&reserved, |version, agreed| {
        number += 1;
        let found = world.entry("edit");
        let was_agreed = world.with(None, |applier| {
            let base = applier.index.base_at(MOUNT, &path("edit")).unwrap();
            base.is_some_and(|base| base.content == found.content)
        });
        assert_eq!(was_agreed, agreed);
        let op = put("edit", version, Expect::Entry(found));
        world.with(None, |applier| {
            let (bytes, id) = (version.as_bytes(), Id([number; 16]));
            let mut incoming = applier
                .staging
                .begin(ContentHash::of(bytes), bytes.len() as u64)
                .unwrap();
            incoming.append(0, bytes).unwrap();
            incoming.finish().unwrap();
            let base = mirrorfs_journal::BaseChange::Put {
                path: path("edit"),
                node: None,
                entry: new_file(version),
            };
            applier
                .index
                .propose(id, true, None, &[(base, vec![0])])
                .unwrap();
            let outcome = applier
                .apply(Batch {
                    id,
                    mount: MOUNT,
                    agreement: agreement(number.into()),
                    ops: vec![op],
                })
                .unwrap();
            assert!(outcome.diverged.is_empty(), "{outcome:?}");
            applier.synced().unwrap();
        });
    });
}

#[test]
fn before_the_record_nothing_has_happened() {
    let world = World::new();
    let before = world.show();
    let mut ops = everything(&world);
    // A content that was never staged.
    ops.push(put("other", "missing", Expect::Absent));
    assert!(matches!(
        world.apply_with(&ops, None),
        Err(ApplyError::Replica(_))
    ));
    assert_eq!(world.show(), before);
    world.with(None, |applier| {
        for content in CONTENTS {
            let hash = ContentHash::of(content.as_bytes());
            assert!(applier.staging.is_complete(hash).unwrap(), "{content}");
        }
        assert!(applier.recover().unwrap().is_none());
    });
}

#[test]
pub(crate) fn what_the_user_changed_diverges_and_the_rest_goes_on() {
    let world = World::new();
    let ops = everything(&world);
    world.file("edit", "the user's");
    world.file("gone", "still wanted");
    world.file("made", "in the way");
    world.file("swap1", "edited");
    world.file("link", "taken");
    world.file("empty/new", "n");
    world.file("meta", "edited");
    fs::remove_file(world.path("over")).unwrap();
    symlink("nowhere", world.path("over")).unwrap();
    let outcome = world.apply(&ops);
    let diverged: Vec<u32> = outcome.diverged.iter().map(|d| d.op).collect();
    // Parking and placing swap1, what depends on either, and each step of its own.
    assert_eq!(diverged, [2, 6, 7, 12, 13, 14, 15, 16, 17, 23, 24, 25, 28]);
    let shown = world.show();
    for (path, content) in [
        ("edit", "the user's"),
        ("gone", "still wanted"),
        ("made", "in the way"),
        ("swap1", "edited"),
        ("swap2", "two"),
        ("link", "taken"),
        ("over", "-> nowhere"),
        ("empty/new", "n"),
        ("meta", "edited"),
        ("to/elsewhere/x", "moved and edited"),
    ] {
        assert_eq!(shown.get(path).map(String::as_str), Some(content), "{path}");
    }
    assert!(!shown.contains_key("empty/last"), "removed: {shown:?}");
}

/// Interferes before the rename with a number.
fn interfering(at: u32, mut work: impl FnMut() + 'static) -> Option<Hook> {
    let mut count = 0;
    Some(Box::new(move || {
        if count == at {
            work();
        }
        count += 1;
        false
    }))
}

#[test]
fn a_change_in_the_last_moment_is_swapped_back() {
    for (at, kept) in [(0, None), (1, Some("newest"))] {
        let world = World::new();
        let ops = [put("edit", "new", Expect::Entry(world.entry("edit")))];
        let dir = world.dir.path().to_owned();
        // An editor that saves through a rename, between the look and the exchange, and
        // in the second case once more before the exchange is undone.
        let save = move |content: &str| {
            fs::write(dir.join("edit~"), content).unwrap();
            fs::rename(dir.join("edit~"), dir.join("edit")).unwrap();
        };
        let mut count = 0;
        let hook: Hook = Box::new(move || {
            if count == 0 {
                save("newer");
            }
            if count == 2 && at == 1 {
                save("newest");
            }
            count += 1;
            false
        });
        let outcome = world.apply_with(&ops, Some(hook)).unwrap();
        assert_eq!(outcome.diverged.len(), 1);
        assert_eq!(fs::read_to_string(world.path("edit")).unwrap(), "newer");
        let conflicts = world.kept("conflicts");
        assert_eq!(conflicts.get("edit").map(String::as_str), kept);
        assert!(world.kept("trash").is_empty());
    }
}

#[test]
fn a_removal_of_what_changed_in_the_last_moment_is_undone() {
    let world = World::new();
    let ops = [Op::Remove {
        path: path("gone"),
        expect: world.entry("gone"),
    }];
    let gone = world.path("gone");
    let hook = interfering(0, move || fs::write(&gone, "changed").unwrap());
    let outcome = world.apply_with(&ops, hook).unwrap();
    assert_eq!(outcome.diverged.len(), 1);
    assert_eq!(fs::read_to_string(world.path("gone")).unwrap(), "changed");
    // And if the name has been taken meanwhile, both are there.
    let ops = [Op::Remove {
        path: path("meta"),
        expect: world.entry("meta"),
    }];
    let meta = world.path("meta");
    let mut count = 0;
    let hook: Hook = Box::new(move || {
        fs::write(&meta, ["changed", "created"][count]).unwrap();
        count += 1;
        false
    });
    let outcome = world.apply_with(&ops, Some(hook)).unwrap();
    assert_eq!(outcome.diverged.len(), 1);
    assert_eq!(fs::read_to_string(world.path("meta")).unwrap(), "created");
    assert_eq!(world.kept("conflicts")["meta"], "changed");
}

#[test]
fn a_mode_that_is_set_in_the_last_moment_is_no_part_of_the_batch() {
    let world = World::new();
    let mut meta = world.entry("meta");
    let expect = meta.clone();
    meta.mode = 0o600;
    let steps = [
        ("new", put("new", "new", Expect::Absent)),
        (
            "edit",
            put("edit", "new", Expect::Entry(world.entry("edit"))),
        ),
        (
            "meta",
            Op::SetMeta {
                path: path("meta"),
                entry: meta,
                expect,
            },
        ),
    ];
    for (name, op) in steps {
        // Before the last step of all: at the point that comes when this one is done, or
        // when its mode is set.
        let ops = [op, put("last", "new", Expect::Absent)];
        let at = world.path(name);
        let hook: Hook = Box::new(move || {
            let mode = |at: &Path| fs::metadata(at).map(|found| found.permissions().mode() & 0o777);
            if matches!(mode(&at), Ok(0o600)) || fs::read(&at).is_ok_and(|found| found == b"new") {
                fs::set_permissions(&at, fs::Permissions::from_mode(0o751)).unwrap();
            }
            false
        });
        let outcome = world.apply_with(&ops, Some(hook)).unwrap();
        assert_eq!(outcome.diverged.len(), 0, "{name}");
        assert_eq!(outcome.recheck, [path(name)]);
        let looked = world.entry(name);
        assert_eq!(looked.mode, 0o751);
        fs::remove_file(world.path("last")).unwrap();
    }
}

#[test]
fn nothing_is_replaced_under_a_writer() {
    let world = World::new();
    let ops = [
        put("edit", "new", Expect::Entry(world.entry("edit"))),
        Op::Remove {
            path: path("gone"),
            expect: world.entry("gone"),
        },
    ];
    let open = |at: &str| fs::OpenOptions::new().append(true).open(world.path(at));
    let writers = [open("edit").unwrap(), open("gone").unwrap()];
    let outcome = world.apply(&ops);
    assert_eq!(outcome.diverged.len(), 2);
    assert!(outcome.diverged[0].reason.contains("open for writing"));
    // Opened only after the first look.
    drop(writers);
    let edit = world.path("edit");
    let kept = Rc::new(Cell::new(None));
    let writer = kept.clone();
    let hook = interfering(0, move || {
        writer.set(Some(
            fs::OpenOptions::new().append(true).open(&edit).unwrap(),
        ));
    });
    let outcome = world.apply_with(&ops[..1], hook).unwrap();
    assert_eq!(outcome.diverged.len(), 1);
    use std::io::Write;
    kept.take().unwrap().write_all(b" and more").unwrap();
    assert_eq!(
        fs::read_to_string(world.path("edit")).unwrap(),
        "old and more"
    );
}

/// A directory in which the peer's user has just made something is not gone: taking it for
/// gone, the other side would never be able to take in what is in it.
#[test]
fn a_directory_that_is_filled_as_it_is_removed_diverges() {
    let world = World::new();
    let dirs = ["gets-file", "gets-empty", "gets-fifo", "gets-deep-fifo"];
    for dir in dirs {
        fs::create_dir(world.path(dir)).unwrap();
    }
    let ops = dirs.map(|dir| Op::RemoveDir { path: path(dir) });
    let fifo = |at: &str| {
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(
            rustix::fs::CWD,
            world.path(at),
            rustix::fs::FileType::Fifo,
            mode,
            0,
        )
        .unwrap();
    };
    fs::write(world.path("gets-file/new"), "new").unwrap();
    fs::create_dir(world.path("gets-empty/dir")).unwrap();
    fifo("gets-fifo/pipe");
    fs::create_dir(world.path("gets-deep-fifo/dir")).unwrap();
    fifo("gets-deep-fifo/dir/pipe");
    let outcome = world.apply(&ops);
    let diverged: Vec<u32> = outcome.diverged.iter().map(|found| found.op).collect();
    assert_eq!(diverged, [0, 1], "{:?}", outcome.diverged);
    assert!(world.path("gets-file/new").exists());
    assert!(world.path("gets-fifo/pipe").exists());
}

#[test]
fn nothing_outside_is_touched() {
    let world = World::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("victim"), "victim").unwrap();
    let mut victim = new_file("victim");
    victim.mode = 0o644;
    symlink(outside.path(), world.path("link")).unwrap();
    let target = outside.path().to_owned();
    let deep = world.path("from/deep");
    let ops = [
        put("link/planted", "new", Expect::Absent),
        Op::Remove {
            path: path("link/victim"),
            expect: victim.clone(),
        },
        put("link/victim", "new", Expect::Entry(victim.clone())),
        Op::SetMeta {
            path: path("link/victim"),
            entry: victim.clone(),
            expect: victim,
        },
        Op::RemoveDir {
            path: path("link/empty"),
        },
        put(".mirrorfs/identity", "new", Expect::Absent),
        Op::RemoveDir {
            path: RelPath::ROOT,
        },
        put("from/deep/planted", "new", Expect::Absent),
    ];
    fs::create_dir(outside.path().join("empty")).unwrap();
    // The parent is swapped for a link after the batch has been prepared.
    let hook = interfering(0, move || {
        let _ = fs::remove_dir_all(&deep);
        let _ = symlink(&target, &deep);
    });
    let outcome = world.apply_with(&ops, hook).unwrap();
    let found: BTreeMap<_, _> = {
        let mut found = BTreeMap::new();
        show(outside.path(), outside.path(), &mut found);
        found
    };
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found["victim"], "victim");
    assert!(found.contains_key("empty"));
    for op in [0, 2, 3, 5, 6] {
        assert!(outcome.diverged.iter().any(|d| d.op == op), "step {op}");
    }
    let identity = fs::read_to_string(world.path(".mirrorfs/identity")).unwrap();
    assert!(identity.contains("replica"));
}

/// Whatever it is called: it is known by what is in it.
#[test]
fn a_git_directory_is_applied_as_far_as_it_is_whole() {
    for git in ["repo/.git", "repo/store"] {
        let world = World::new();
        let at = |name: &str| format!("{git}/{name}");
        world.file(&at("HEAD"), "main");
        world.file(&at("objects/aa/taken"), "");
        world.file(&at("refs/heads/main"), "");
        let head = world.entry(&at("HEAD"));
        let ops = [
            put(&at("objects/aa/taken"), "new", Expect::Absent),
            put(&at("HEAD"), "child", Expect::Entry(head)),
            put("repo/file", "child", Expect::Absent),
        ];
        let outcome = world.apply(&ops);
        let diverged: Vec<u32> = outcome.diverged.iter().map(|d| d.op).collect();
        assert_eq!(diverged, [0, 1]);
        assert_eq!(world.show()[&at("HEAD")], "main");
        assert_eq!(world.show()["repo/file"], "child");
    }
}

#[test]
fn a_read_only_directory_takes_what_it_is_given() {
    let world = World::new();
    let user = rustix::process::geteuid();
    let mode = |mode| fs::Permissions::from_mode(mode);
    fs::set_permissions(world.path("from"), mode(0o555)).unwrap();
    let outcome = world.apply(&[put("from/new", "new", Expect::Absent)]);
    assert!(outcome.diverged.is_empty(), "as user {user:?}: {outcome:?}");
    assert_eq!(world.show()["from/new"], "new");
    assert_eq!(world.show()["from"], "dir 555");
    fs::set_permissions(world.path("from"), mode(0o755)).unwrap();
}

#[test]
fn malformed_batches_are_refused() {
    let world = World::new();
    let park = Op::Park {
        from: path("edit"),
        slot: 1,
        expect: world.entry("edit"),
    };
    let unpark = Op::Unpark {
        slot: 2,
        to: path("x"),
    };
    for ops in [vec![park.clone(), park.clone()], vec![park.clone(), unpark]] {
        assert!(matches!(
            world.apply_with(&ops, None),
            Err(ApplyError::Malformed(_))
        ));
    }
    // What is parked and goes nowhere is put back.
    world.apply(&[park]);
    assert_eq!(world.show()["edit"], "old");
}

#[test]
fn a_full_disk_changes_nothing() {
    let mount = tempfile::tempdir().unwrap();
    let mounted = rustix::mount::mount(
        "none",
        mount.path(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=256k"),
    );
    if mounted.is_err() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let root = Root::new(File::open(mount.path()).unwrap().into());
    let (reserved, _) = Reserved::create(root.fd(), MIRROR).unwrap();
    let staging = Staging::new(&reserved).unwrap();
    fs::write(mount.path().join("file"), "old").unwrap();
    let content: Vec<u8> = (0..1_000_000_u32)
        .map(|at| at.to_le_bytes()[0] | 1)
        .collect();
    let hash = ContentHash::of(&content);
    let mut incoming = staging.begin(hash, content.len() as u64).unwrap();
    let mut offset = 0;
    let full = loop {
        let stretch = &content[offset..offset + 65_536];
        match incoming.append(offset as u64, stretch) {
            Ok(()) => offset += stretch.len(),
            Err(error) => break error,
        }
    };
    assert!(full.is_disk_full(), "{full}");
    assert_eq!(incoming.have(), offset as u64, "what came before is kept");
    drop(incoming);
    assert_eq!(staging.held(hash).unwrap(), offset as u64);
    assert_eq!(fs::read(mount.path().join("file")).unwrap(), b"old");
    assert!(reserved.is_in_place(root.fd().as_fd()));
    drop((staging, reserved, root));
    rustix::mount::unmount(mount.path(), rustix::mount::UnmountFlags::empty()).unwrap();
}
