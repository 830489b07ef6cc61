//! L1: what `fsync`, `fdatasync`, `msync(MS_SYNC)` and writes under `O_SYNC` or `O_DSYNC`
//! have returned for survives power loss of this machine, in the tree and in the journal.
//!
//! The tree and the journal lie on a disk in a file. A copy of that file holds what had
//! reached the disk: everything that was only in memory is not in it, as after a power cut.

use std::path::Path;
use std::time::Duration;

use mirrorfs_journal::RelPath;

use crate::pair::NOBODY;
use crate::support::disk::Disk;
use crate::support::program::run;
use crate::support::{Sandbox, eventually};

/// The disk is not synced by itself meanwhile.
const OPTIONS: &str = "loop,commit=600";

struct Machine {
    sandbox: Sandbox,
    // In this order: the tree and the state are on the disk.
    _mounts: [Disk; 3],
}

impl Machine {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let root = sandbox.root().to_owned();
        let (image, point) = (root.join("image"), root.join("disk"));
        drop(Disk::new(&image, &point, 48));
        let disk = Disk::mounted(&["-o", OPTIONS, &image.display().to_string()], &point);
        let bound = |name: &str| {
            std::fs::create_dir(point.join(name)).unwrap();
            let from = point.join(name).display().to_string();
            Disk::mounted(&["--bind", &from], &root.join(name))
        };
        let _mounts = [bound("tree"), bound("state"), disk];
        sandbox.sh(&sandbox.tree(), "mkdir d; head -c 65536 /dev/zero >d/old");
        sandbox.mount_with(NOBODY);
        sandbox.sh(&root, "sync -f disk");
        Self { sandbox, _mounts }
    }

    fn work(&self, script: &str) {
        let program = format!("import ctypes, mmap, os\nCONTENT = b'durable' * 5000\n{script}");
        let outcome = run(
            self.sandbox
                .command("python3")
                .args(["-c", &program])
                .current_dir(self.sandbox.tree()),
            Duration::from_secs(60),
        );
        outcome.ok();
    }

    /// Cuts the power, and looks at what is on the disk then.
    fn after_a_power_cut<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        let root = self.sandbox.root();
        let copy = root.join("copy");
        self.sandbox.sh(root, "cp --sparse=always image copy");
        let point = root.join("after");
        let disk = Disk::mounted(&["-o", "loop", &copy.display().to_string()], &point);
        let seen = look(&point);
        drop(disk);
        seen
    }
}

/// What a disk has at a path of the tree, and what the journal on it says of that: size,
/// and time of the last change in nanoseconds.
struct Found {
    content: Option<Vec<u8>>,
    there: Option<(u64, i128)>,
    recorded: Option<(u64, i128)>,
}

fn find(disk: &Path, path: &str) -> Found {
    use std::os::unix::fs::MetadataExt;
    let at = disk.join("tree").join(path);
    let moment = |secs: i64, nanos: i64| i128::from(secs) * 1_000_000_000 + i128::from(nanos);
    let there = std::fs::metadata(&at).ok();
    let mirrors = std::fs::read_dir(disk.join("state/mirrors")).unwrap();
    let journal: Vec<_> = mirrors.map(|entry| entry.unwrap().path()).collect();
    let view = mirrorfs_journal::look(&journal[0]).unwrap().unwrap();
    let node = view.at(&RelPath::new(path).unwrap()).unwrap();
    Found {
        content: std::fs::read(&at).ok(),
        there: there.map(|found| (found.size(), moment(found.ctime(), found.ctime_nsec()))),
        recorded: node.map(|node| {
            let at = node.attr.ctime;
            (node.attr.size, moment(at.secs, at.nanos.into()))
        }),
    }
}

/// Whatever the way, the content is on the disk and the change in the journal, before the
/// call returns.
#[test]
fn what_was_synced_survives_a_power_cut() {
    let machine = Machine::new();
    let made = |sync: &str| {
        format!("f = os.open(NAME, os.O_RDWR | os.O_CREAT); os.write(f, CONTENT); {sync}")
    };
    let under = |flag: &str| {
        format!("f = os.open(NAME, os.O_RDWR | os.O_CREAT | os.{flag}); os.write(f, CONTENT)")
    };
    let by_call = |flag: &str| {
        format!("f = os.open(NAME, os.O_RDWR | os.O_CREAT); os.pwritev(f, [CONTENT], 0, os.{flag})")
    };
    let renamed = "f = os.open('t', os.O_RDWR | os.O_CREAT); os.write(f, CONTENT); os.fsync(f)
os.rename('t', NAME); os.fsync(os.open(os.path.dirname(NAME), os.O_RDONLY))";
    let mapped = "f = os.open(NAME, os.O_RDWR | os.O_CREAT); os.ftruncate(f, len(CONTENT))
m = mmap.mmap(f, len(CONTENT)); m[:] = CONTENT; m.flush()";
    let in_place = "f = os.open('d/old', os.O_RDWR); m = mmap.mmap(f, 65536)
m[:35000] = CONTENT; m.flush(); os.close(f)";
    for (way, path, script, exact) in [
        ("fsync", "d/a", made("os.fsync(f)"), true),
        ("fdatasync", "d/b", made("os.fdatasync(f)"), false),
        ("O_SYNC", "d/c", under("O_SYNC"), true),
        ("O_DSYNC", "d/e", under("O_DSYNC"), false),
        ("RWF_SYNC", "d/f", by_call("RWF_SYNC"), true),
        ("RWF_DSYNC", "d/g", by_call("RWF_DSYNC"), false),
        ("msync", "d/h", mapped.into(), true),
        ("msync of old pages", "d/old", in_place.into(), true),
        ("fsync of the directory", "d/i", renamed.into(), true),
        (
            "fsync by another descriptor",
            "d/j",
            made("os.fsync(os.open(NAME, os.O_RDONLY))"),
            true,
        ),
    ] {
        machine.work(&format!("NAME = '{path}'\n{script}"));
        let found = machine.after_a_power_cut(|disk| find(disk, path));
        let content = found
            .content
            .unwrap_or_else(|| panic!("{way}: it is not there"));
        assert!(
            content.starts_with(&b"durable".repeat(5000)),
            "{way}: {} bytes",
            content.len()
        );
        let (there, recorded) = (found.there.unwrap(), found.recorded);
        let recorded = recorded.unwrap_or_else(|| panic!("{way}: not in the journal"));
        // Of times fdatasync says nothing.
        assert_eq!(recorded.0, there.0, "{way}: size in the journal");
        assert!(!exact || recorded == there, "{way}: {recorded:?} {there:?}");
    }
    machine.sandbox.try_umount().expect_code(4);
}

/// "Up to there lower is known to be on disk": what the journal on the disk says to be synced
/// is on it, although no program has asked for that.
#[test]
fn what_is_on_record_as_synced_is_on_the_disk() {
    let machine = Machine::new();
    machine.work("f = os.open('d/later', os.O_RDWR | os.O_CREAT); os.write(f, CONTENT)");
    let synced = |state: &Path| {
        let mirrors = std::fs::read_dir(state.join("mirrors")).unwrap();
        let journal: Vec<_> = mirrors.map(|entry| entry.unwrap().path()).collect();
        let view = mirrorfs_journal::look(&journal[0]).unwrap().unwrap();
        let node = view.at(&RelPath::new("d/later").unwrap()).unwrap()?;
        let synced = view.setting("synced").unwrap()?;
        let synced = u64::from_le_bytes(synced.try_into().unwrap());
        Some(synced >= node.changed_n)
    };
    eventually(
        "it counts as synced",
        Duration::from_secs(60),
        || match synced(&machine.sandbox.state()) {
            Some(true) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    machine.after_a_power_cut(|disk| {
        assert_eq!(synced(&disk.join("state")), Some(true));
        let content = std::fs::read(disk.join("tree/d/later")).unwrap();
        assert!(
            content == b"durable".repeat(5000),
            "{} bytes",
            content.len()
        );
    });
    machine.sandbox.try_umount().expect_code(4);
}

/// The instrument itself: what was not synced is not there after the cut, neither in the
/// tree nor in the journal. (The kernel may
/// write pages back whenever it likes, but not every time.)
#[test]
fn what_was_not_synced_is_lost_in_these_power_cuts() {
    let machine = Machine::new();
    let mut attempt = 0;
    eventually(
        "an unsynced change is lost",
        Duration::from_secs(60),
        || {
            attempt += 1;
            let path = format!("d/unsynced{attempt}");
            machine.work(&format!(
                "os.write(os.open('{path}', os.O_RDWR | os.O_CREAT), CONTENT)"
            ));
            let found = machine.after_a_power_cut(|disk| find(disk, &path));
            if found.content.is_some_and(|content| !content.is_empty()) {
                Err("it is there".into())
            } else if found.recorded.is_some() {
                Err("it is in the journal".into())
            } else {
                Ok(())
            }
        },
    );
    machine.sandbox.try_umount().expect_code(4);
}
