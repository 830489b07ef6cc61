//! Peers' changes through a real mount, by the real process.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use mirrorfs_journal::{EventKind, Origin, PeerId};

use super::units::{self, Ordered};
use super::{Door, OPEN_FOR_WRITING};
use crate::fs::tests::path;
use crate::fs::{DoorOp, DoorResult, Expect, StagedName};
use crate::fuse::tests::Mounted;
use crate::tree::{Ino, Timestamp, Xattrs};

const PEER: Origin = Origin::Peer(PeerId(3));

/// The door process of these tests. As a test of its own it does nothing.
#[test]
fn child_is_the_door() {
    if std::env::var_os("MIRRORFS_TEST_DOOR").is_some() {
        super::process::run().unwrap();
    }
}

fn door(m: &Mounted) -> Door {
    Door::start_with(m.dir(), m.device(), || {
        let mut command = Command::new("/proc/self/exe");
        command
            .args([
                "--exact",
                "door::tests::child_is_the_door",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("MIRRORFS_TEST_DOOR", "1");
        command
    })
    .unwrap()
}

fn staging(m: &Mounted) -> PathBuf {
    // Lower, not the mount.
    PathBuf::from(format!(
        "/proc/self/fd/{}/.mirrorfs/staging",
        std::os::fd::AsRawFd::as_raw_fd(&**m.t.fs.lower().root())
    ))
}

fn place(m: &Mounted, to: &str, content: &str, expect: Expect) -> DoorOp {
    let staged = StagedName::random().unwrap();
    std::fs::write(staging(m).join(staged.as_str()), content).unwrap();
    DoorOp::Place {
        staged,
        path: path(to),
        expect,
        agreed: false,
    }
}

fn one(m: &Mounted, door: &mut Door, op: DoorOp) -> DoorResult {
    let mut results = door.apply(&m.t.fs, vec![(op, PEER)]);
    assert_eq!(results.len(), 1);
    results.remove(0)
}

fn done(result: DoorResult) -> (u64, Ino) {
    match result {
        DoorResult::Done { n, ino } => (n, ino),
        DoorResult::Refused { reason } => panic!("{reason}"),
    }
}

fn refused(result: DoorResult) -> String {
    match result {
        DoorResult::Done { .. } => panic!("it took effect"),
        DoorResult::Refused { reason } => reason,
    }
}

fn now(m: &Mounted, ino: Ino) -> Expect {
    Expect::Node {
        ino,
        unchanged_since: m.t.journal.recorder().last(),
    }
}

/// A program in the mount that says when it is ready and goes on when told.
fn program(m: &Mounted, script: &str) -> Child {
    let mut child = Command::new("python3")
        .args(["-c", script])
        .arg(m.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0])
        .expect("the program did not get ready");
    child
}

fn finish(mut child: Child) {
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn changes_come_in_where_they_are_expected() {
    let Some(mut m) = Mounted::new() else { return };
    let mut door = door(&m);
    let dir = StagedName::random().unwrap();
    std::fs::create_dir(staging(&m).join(dir.as_str())).unwrap();
    let results = door.apply(
        &m.t.fs,
        vec![
            (
                DoorOp::Place {
                    staged: dir,
                    path: path("dir"),
                    expect: Expect::Absent,
                    agreed: false,
                },
                PEER,
            ),
            (place(&m, "dir/f", "one", Expect::Absent), PEER),
            (place(&m, "missing/f", "lost", Expect::Absent), PEER),
        ],
    );
    assert!(matches!(results[0], DoorResult::Done { .. }));
    let (n, ino) = done(results[1].clone());
    assert!(matches!(results[2], DoorResult::Refused { .. }));
    assert_eq!(m.sh("cat dir/f; ls -A"), "onedir\n");
    // The kernel has it under its own number.
    assert_eq!(m.sh("stat -c %i dir/f").trim(), ino.0.to_string());

    // A local edit comes first.
    m.sh("echo local > dir/f");
    let stale = Expect::Node {
        ino,
        unchanged_since: n,
    };
    let late = place(&m, "dir/f", "two", stale);
    assert!(refused(one(&m, &mut door, late)).contains("changed meanwhile"));
    let on_top = place(&m, "dir/f", "two", Expect::Absent);
    refused(one(&m, &mut door, on_top));
    assert_eq!(m.sh("cat dir/f"), "local\n");
    let replace = place(&m, "dir/f", "two", now(&m, ino));
    let (_, ino) = done(one(&m, &mut door, replace));
    assert_eq!(m.sh("cat dir/f; stat -c %s dir/f"), "two3\n");

    // Metadata, several calls of one operation.
    let meta = |mode, expect| DoorOp::SetMeta {
        path: path("dir/f"),
        expect,
        mode: Some(mode),
        mtime: Some(Timestamp {
            secs: 1_000_000_000,
            nanos: 5,
        }),
        xattrs: Some(Xattrs::from([(b"user.k".to_vec(), b"v".to_vec())])),
    };
    let (n, _) = done(one(&m, &mut door, meta(0o640, now(&m, ino))));
    let stat = "stat -c '%a %Y' dir/f; getfattr --only-values -n user.k dir/f";
    assert_eq!(m.sh(stat), "640 1000000000\nv");
    m.sh("chmod 600 dir/f");
    let stale = Expect::Node {
        ino,
        unchanged_since: n,
    };
    refused(one(&m, &mut door, meta(0o644, stale)));
    assert_eq!(m.sh("stat -c %a dir/f"), "600\n");

    // Removals.
    let remove = |expect| DoorOp::Remove {
        path: path("dir/f"),
        expect,
        agreed: false,
    };
    refused(one(&m, &mut door, remove(stale)));
    done(one(&m, &mut door, remove(now(&m, ino))));
    let dir = Ino(m.sh("stat -c %i dir").trim().parse().unwrap());
    m.sh("touch dir/kept");
    let rmdir = |m: &Mounted| DoorOp::RemoveDir {
        path: path("dir"),
        expect: now(m, dir),
    };
    refused(one(&m, &mut door, rmdir(&m)));
    m.sh("rm dir/kept");
    done(one(&m, &mut door, rmdir(&m)));
    assert_eq!(m.sh("ls -A"), "");
    drop(door);
    m.down();
    let trash = std::fs::read_dir(m.dir().join(".mirrorfs/trash"))
        .unwrap()
        .count();
    assert_eq!(trash, 2, "what was replaced and what was removed");
}

/// Who made the records after a number, each once.
fn authors(m: &Mounted, after: u64) -> Vec<Origin> {
    let mut authors = Vec::new();
    let view = m.t.journal.snapshot().unwrap();
    view.history(None, |event| {
        if let EventKind::Change { origin, .. } = event.kind
            && event.n > after
            && !authors.contains(&origin)
        {
            authors.push(origin);
        }
        true
    })
    .unwrap();
    authors
}

/// "A local step that is refused stops the rest of its directory": where that can be seen
/// beforehand nothing of it is begun.
#[test]
fn a_unit_ends_with_what_is_refused() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("mkdir d o; for f in d/a d/b d/c d/gone o/x; do echo old >$f; done");
    let mut door = door(&m);
    let ino =
        |m: &Mounted, name: &str| Ino(m.sh(&format!("stat -c %i {name}")).trim().parse().unwrap());
    let new = |m: &Mounted, name: &str| place(m, name, "new\n", now(m, ino(m, name)));
    let ordered = |unit, op| Ordered {
        op,
        origin: PEER,
        unit: Some(unit),
    };
    let waits = |result: &DoorResult| match result {
        DoorResult::Refused { reason } => units::is_held(reason) && reason.contains("d/b"),
        DoorResult::Done { .. } => false,
    };
    let batch = |m: &Mounted| {
        let mut ops: Vec<_> = ["d/a", "d/b", "d/c"]
            .map(|name| ordered(1, new(m, name)))
            .into();
        ops.push(ordered(
            1,
            DoorOp::Remove {
                path: path("d/gone"),
                expect: now(m, ino(m, "d/gone")),
                agreed: false,
            },
        ));
        ops.push(ordered(2, new(m, "o/x")));
        ops
    };
    let shown = "cat d/a d/b d/c d/gone";

    // Somebody has one of them open.
    let script = "import os, sys; os.chdir(sys.argv[1]); f = open('d/b', 'r+')\nprint(1, end='', flush=True); sys.stdin.read()";
    let writer = program(&m, script);
    let mut results = door.apply_in_units(&m.t.fs, batch(&m));
    assert!(
        [0, 2, 3].iter().all(|at| waits(&results[*at])),
        "{results:?}"
    );
    done(results.remove(4));
    assert_eq!(refused(results.remove(1)), OPEN_FOR_WRITING);
    assert_eq!(m.sh(shown), "old\nold\nold\nold\n");
    finish(writer);

    // Somebody has changed one of them.
    let ops = batch(&m);
    m.sh("echo edited >d/b");
    let results = door.apply_in_units(&m.t.fs, ops);
    assert!(
        [0, 2, 3].iter().all(|at| waits(&results[*at])),
        "{results:?}"
    );
    assert!(refused(results[1].clone()).contains("changed meanwhile"));
    assert_eq!(m.sh(shown), "old\nedited\nold\nold\n");

    // What cannot be seen beforehand stops what comes after it. A directory that is not
    // empty stops nothing.
    m.sh("mkdir full; touch full/x");
    let full = DoorOp::RemoveDir {
        path: path("full"),
        expect: now(&m, ino(&m, "full")),
    };
    let ops = vec![
        ordered(3, full),
        ordered(3, new(&m, "d/a")),
        ordered(3, place(&m, "missing/f", "lost", Expect::Absent)),
        ordered(3, new(&m, "d/c")),
    ];
    let results = door.apply_in_units(&m.t.fs, ops);
    refused(results[0].clone());
    done(results[1].clone());
    assert!(!units::is_held(&refused(results[2].clone())));
    assert!(units::is_held(&refused(results[3].clone())));
    assert_eq!(m.sh(shown), "new\nedited\nold\nold\n");

    // All of a unit, once nothing is in the way; more than go at once.
    let mut ops = batch(&m);
    let many = (0..600).map(|at| ordered(4, place(&m, &format!("o/{at}"), "", Expect::Absent)));
    ops.extend(many);
    ops.insert(
        300,
        ordered(4, place(&m, "missing/f", "lost", Expect::Absent)),
    );
    let results = door.apply_in_units(&m.t.fs, ops);
    let (before, after) = results.split_at(300);
    assert!(
        before
            .iter()
            .all(|result| matches!(result, DoorResult::Done { .. }))
    );
    assert!(
        after
            .iter()
            .all(|result| matches!(result, DoorResult::Refused { .. }))
    );
    assert_eq!(
        m.sh("cat d/a d/b d/c; ls d; ls o | wc -l"),
        "new\nnew\nnew\na\nb\nc\n296\n"
    );
    drop(door);
    m.down();
}

#[test]
fn the_records_are_the_peers() {
    let Some(mut m) = Mounted::new() else { return };
    let mut door = door(&m);
    m.sh("mkdir d && echo x > d/linked && ln d/linked second && mkdir empty");
    let number =
        |m: &Mounted, name: &str| Ino(m.sh(&format!("stat -c %i {name}")).trim().parse().unwrap());
    let (linked, empty) = (number(&m, "second"), number(&m, "empty"));
    let before = m.t.journal.recorder().last();
    let created = place(&m, "f", "content", Expect::Absent);
    let (n, ino) = done(one(&m, &mut door, created));
    let view = m.t.journal.snapshot().unwrap();
    let node = view.node_by_ino(ino).unwrap().unwrap();
    assert!(node.changed_n <= n && node.content_n <= n);
    let replaced = place(&m, "f", "other", now(&m, ino));
    let (_, ino) = done(one(&m, &mut door, replaced));
    let meta = DoorOp::SetMeta {
        path: path("f"),
        expect: now(&m, ino),
        mode: Some(0o600),
        mtime: None,
        xattrs: Some(Xattrs::from([(b"user.k".to_vec(), b"v".to_vec())])),
    };
    done(one(&m, &mut door, meta));
    for (name, ino) in [("f", ino), ("d/linked", linked)] {
        let removed = DoorOp::Remove {
            path: path(name),
            expect: now(&m, ino),
            agreed: false,
        };
        done(one(&m, &mut door, removed));
    }
    let removed = DoorOp::RemoveDir {
        path: path("empty"),
        expect: now(&m, empty),
    };
    done(one(&m, &mut door, removed));
    assert_eq!(authors(&m, before), [PEER]);
    // What others do meanwhile is theirs.
    let before = m.t.journal.recorder().last();
    m.sh("echo y > second");
    assert_eq!(authors(&m, before), [Origin::Local]);
    drop(door);
    m.down();
}

#[test]
fn watchers_in_the_mount_see_it() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("mkdir d && echo old > d/f && echo old > d/g");
    let mut inotify = inotify::Inotify::init().unwrap();
    let mask =
        inotify::WatchMask::MOVED_TO | inotify::WatchMask::DELETE | inotify::WatchMask::MOVED_FROM;
    inotify.watches().add(m.dir().join("d"), mask).unwrap();
    let mut door = door(&m);
    let ino = |name: &str| {
        Ino(m
            .sh(&format!("stat -c %i d/{name}"))
            .trim()
            .parse()
            .unwrap())
    };
    let (f, g) = (ino("f"), ino("g"));
    let replace = place(&m, "d/f", "new", now(&m, f));
    done(one(&m, &mut door, replace));
    let remove = DoorOp::Remove {
        path: path("d/g"),
        expect: now(&m, g),
        agreed: false,
    };
    done(one(&m, &mut door, remove));
    let mut buffer = [0; 4096];
    let seen: Vec<_> = inotify
        .read_events_blocking(&mut buffer)
        .unwrap()
        .map(|event| {
            (
                event.mask,
                event.name.unwrap().to_string_lossy().into_owned(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (inotify::EventMask::MOVED_TO, "f".to_owned()),
            (inotify::EventMask::DELETE, "g".to_owned()),
        ]
    );
    drop((door, inotify));
    m.down();
}

#[test]
fn a_file_open_for_writing_waits() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("echo old > f");
    let ino = Ino(m.sh("stat -c %i f").trim().parse().unwrap());
    let mut door = door(&m);
    let writer = program(
        &m,
        "import sys,os; f=open(sys.argv[1]+'/f','ab'); os.write(1,b'!'); sys.stdin.read()",
    );
    let op = place(&m, "f", "new", now(&m, ino));
    assert_eq!(refused(one(&m, &mut door, op)), OPEN_FOR_WRITING);
    finish(writer);
    let reader = program(
        &m,
        "import sys,os; f=open(sys.argv[1]+'/f','rb'); os.write(1,b'!'); sys.stdin.read()
assert f.read() == b'old\\n'",
    );
    let op = place(&m, "f", "new", now(&m, ino));
    done(one(&m, &mut door, op));
    finish(reader);
    assert_eq!(m.sh("cat f"), "new");
    drop(door);
    m.down();
}

#[test]
fn mapped_stores_are_settled() {
    let Some(mut m) = Mounted::new() else { return };
    let mut door = door(&m);
    // The kernel's list of mappings writes the second name in another way.
    let script = r"
import sys,os,mmap
v=[]
for name in ('a b','a\nb'):
    f=open(sys.argv[1]+'/'+name,'w+b'); f.truncate(400000)
    v.append(mmap.mmap(f.fileno(),0)); f.close()
    for at in range(0,400000,4096): v[-1][at]=7
os.write(1,b'!'); sys.stdin.read()
";
    let mapper = program(&m, script);
    let in_lower = |name: &str| {
        let root = std::os::fd::AsRawFd::as_raw_fd(&**m.t.fs.lower().root());
        let content = std::fs::read(format!("/proc/self/fd/{root}/{name}")).unwrap();
        content.iter().filter(|byte| **byte == 7).count()
    };
    let settled = door.settle_mappings(&m.t.fs).unwrap();
    // More, if there is a process that even root may not look at.
    assert!(settled.files >= 2);
    assert_eq!(settled.failed, []);
    assert_eq!((in_lower("a b"), in_lower("a\nb")), (98, 98));
    finish(mapper);
    drop(door);
    m.down();
}

/// "Where it cannot see all processes, every known regular file": the door of this test is
/// an ordinary user's, and may not look at a program of root.
#[test]
fn mapped_stores_of_a_program_that_cannot_be_seen_are_settled() {
    let Some(mut m) = Mounted::new() else { return };
    let dir = m.dir().to_path_buf();
    let above = dir.parent().unwrap();
    std::fs::set_permissions(above, PermissionsExt::from_mode(0o755)).unwrap();
    // Where this program was built may be closed to others.
    let program_of_all = above.join("program");
    // By another process: what a thread of this one still has open for writing, nobody runs.
    let copied = Command::new("cp")
        .arg(std::env::current_exe().unwrap())
        .arg(&program_of_all)
        .status();
    assert!(copied.unwrap().success());
    let mut door = Door::start_with(&dir, m.device(), move || {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program_of_all)
            .args(["--exact", "door::tests::child_is_the_door"])
            .args(["--nocapture", "--test-threads=1"])
            .env("MIRRORFS_TEST_DOOR", "1");
        command
    })
    .unwrap();
    m.sh(
        "mkdir -p d/e; for i in $(seq 400); do echo x > d/e/$i; done; echo x > none; chmod 0 none",
    );
    let script = "
import sys,os,mmap
f=open(sys.argv[1]+'/d/a b','w+b'); f.truncate(400000)
v=mmap.mmap(f.fileno(),0); f.close()
for at in range(0,400000,4096): v[at]=7
os.write(1,b'!'); sys.stdin.read()
";
    let mapper = program(&m, script);
    let settled = door.settle_mappings(&m.t.fs).unwrap();
    assert!(settled.unseen > 0);
    // Those without content were never read or written.
    assert_eq!((settled.files, settled.failed), (401, vec![]));
    let root = std::os::fd::AsRawFd::as_raw_fd(&**m.t.fs.lower().root());
    let content = std::fs::read(format!("/proc/self/fd/{root}/d/a b")).unwrap();
    assert_eq!(content.iter().filter(|byte| **byte == 7).count(), 98);
    finish(mapper);
    drop(door);
    m.down();
}

#[test]
fn it_is_started_again_and_never_enters_lower() {
    let Some(mut m) = Mounted::new() else { return };
    let mut door = door(&m);
    let pid = door.pid().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    // Killed while idle or under way: refused at most once.
    let op = place(&m, "f", "content", Expect::Absent);
    let first = one(&m, &mut door, op);
    if matches!(first, DoorResult::Refused { .. }) {
        let op = place(&m, "f", "content", Expect::Absent);
        done(one(&m, &mut door, op));
    }
    assert_ne!(door.pid(), Some(pid));
    let op = place(&m, "g", "content", Expect::Absent);
    m.down();
    assert!(refused(one(&m, &mut door, op)).contains("not mounted"));
    assert!(!m.dir().join("g").exists());
    assert!(door.settle_mappings(&m.t.fs).is_err());
}

/// The door is killed while its removal is with the filesystem already: whoever waits for an
/// answer to that ends with it and not before, so that the removal is still the door's, and
/// what it removes goes to the trash.
#[test]
fn what_a_killed_door_was_at_is_still_its_own() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("echo precious > f");
    let ino = Ino(m.sh("stat -c %i f").trim().parse().unwrap());
    let mut door = door(&m);
    let pid = rustix::process::Pid::from_raw(door.pid().unwrap().cast_signed()).unwrap();
    let before = m.t.journal.recorder().last();
    let op = DoorOp::Remove {
        path: path("f"),
        expect: now(&m, ino),
        agreed: false,
    };
    let result = std::thread::scope(|scope| {
        let held = m.t.fs.hold_names();
        let applied = scope.spawn(|| one(&m, &mut door, op));
        let begin = std::time::Instant::now();
        while !m.t.fs.names_are_waited_for() {
            assert!(begin.elapsed().as_secs() < 60, "no removal has come");
            std::thread::yield_now();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        drop(held);
        applied.join().unwrap()
    });
    done(result);
    assert_eq!(authors(&m, before), [PEER]);
    drop(door);
    m.down();
    let mut slots = std::fs::read_dir(m.dir().join(".mirrorfs/trash")).unwrap();
    let slot = slots.next().unwrap().unwrap().path();
    assert_eq!(std::fs::read(slot.join("f")).unwrap(), b"precious\n");
}
