//! "After an fsync error the journal is poisoned: the mount goes read-only and says so; no
//! retry that pretends."

use std::fs;

use crate::support::disk::Disk;
use crate::support::inject::{Fault, Injector, Kind, Place, Plan, RoleOf};
use crate::support::program::run;
use crate::support::{PROMPT, Sandbox, assert_same};

/// A mount with a peer, in agreement, under an injector.
fn mounted() -> (Sandbox, Injector) {
    let sandbox = Sandbox::new();
    fs::write(sandbox.tree().join("before"), "acknowledged").unwrap();
    let injector = Injector::new(sandbox.root());
    let mut mount = sandbox.command(sandbox.program());
    mount.arg("mount").args([sandbox.tree(), sandbox.peer()]);
    injector.attach(&mut mount);
    run(&mut mount, PROMPT).ok();
    sandbox.flush();
    (sandbox, injector)
}

/// Writes a file and syncs it, and tells which error that met.
fn write_and_sync(sandbox: &Sandbox, name: &str) -> String {
    let script = format!(
        "import errno, os
try:
    f = os.open('{name}', os.O_WRONLY | os.O_CREAT)
    os.write(f, b'content')
    os.fsync(f)
    print('fine')
except OSError as e:
    print(errno.errorcode[e.errno])"
    );
    let mut python = sandbox.command("python3");
    let outcome = run(
        python.args(["-c", &script]).current_dir(sandbox.tree()),
        PROMPT,
    );
    outcome.ok().stdout.trim().to_owned()
}

fn once(place: Place, call: &'static str) -> Plan {
    let role = RoleOf::Daemon;
    Plan {
        kind: Kind { role, place, call },
        n: 1,
        fault: Fault::Once(libc::EIO),
    }
}

/// The mount is read-only and says why, a flush does not succeed, and neither changes when
/// the disk is well again. In the next life all goes on.
fn assert_given_up(sandbox: &Sandbox, injector: &Injector, why: &str) {
    let status = sandbox.status_becomes("the mount is read-only", |status| {
        status.mount.reason.is_some()
    });
    let reason = status.mount.reason.unwrap();
    assert!(reason.contains("read-only"), "{reason}");
    assert!(reason.contains(why), "{reason}");
    injector.stop();
    for _ in 0..2 {
        assert_eq!(write_and_sync(sandbox, "later"), "EROFS");
        sandbox
            .try_flush()
            .expect_code(1)
            .expect_said(&["read-only"]);
    }
    sandbox.try_umount();
    sandbox.assert_down();
    sandbox.mount();
    assert_eq!(write_and_sync(sandbox, "later"), "fine");
    sandbox.flush();
    let before = fs::read(sandbox.peer().join("before")).unwrap();
    assert_eq!(before, b"acknowledged");
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

#[test]
fn a_journal_that_cannot_be_synced_is_given_up() {
    let (sandbox, injector) = mounted();
    let synced = |call| {
        let kind = once(Place::Database, call).kind;
        injector.counts().contains_key(&kind)
    };
    let call = if synced("fdatasync") {
        "fdatasync"
    } else {
        "fsync"
    };
    injector.plan(once(Place::Database, call));
    // Unless the error met a sync of the journal that nobody waited for.
    write_and_sync(&sandbox, "lost");
    assert_given_up(&sandbox, &injector, "the journal takes no more records");
}

#[test]
fn a_file_that_cannot_be_synced_ends_the_mount_s_promises() {
    let (sandbox, injector) = mounted();
    injector.plan(once(Place::Tree, "fsync"));
    assert_eq!(write_and_sync(&sandbox, "lost"), "EIO");
    assert_given_up(&sandbox, &injector, "cannot be synced");
}

/// What nobody has synced is synced by the daemon every few seconds, and an error is told to
/// it alone.
#[test]
fn a_tree_that_cannot_be_synced_ends_the_mount_s_promises() {
    let (sandbox, injector) = mounted();
    injector.plan(once(Place::Tree, "syncfs"));
    // It may have been synced before this already.
    fs::write(sandbox.tree().join("new"), "content").ok();
    assert_given_up(&sandbox, &injector, "cannot be synced");
}

/// The disk that the state directory lies on is full: nothing that was acknowledged is lost,
/// and all goes on once there is room.
#[test]
fn a_full_state_directory_stops_changes_and_loses_none() {
    let sandbox = Sandbox::new();
    let _disk = Disk::new(&sandbox.root().join("image"), &sandbox.state(), 24);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.state(), "cat /dev/zero >ballast || true");
    let script = "import errno
for n in range(1_000_000):
    try:
        with open(f'f{n}', 'w') as f:
            f.write('content')
    except OSError as e:
        print(n, errno.errorcode[e.errno])
        break";
    let mut python = sandbox.command("python3");
    let stopped = run(
        python.args(["-c", script]).current_dir(sandbox.tree()),
        PROMPT,
    )
    .ok();
    let (made, error) = stopped.stdout.trim().split_once(' ').unwrap();
    assert!(["EROFS", "EIO"].contains(&error), "{error}");
    let made: u32 = made.parse().unwrap();
    let reason = sandbox.status().mount.reason.unwrap_or_default();
    assert!(
        reason.contains("read-only") && reason.contains("full"),
        "{reason}"
    );
    sandbox.try_flush().expect_code(1);
    fs::remove_file(sandbox.state().join("ballast")).unwrap();
    sandbox.try_umount();
    assert!(!sandbox.is_mounted());
    sandbox.mount();
    sandbox.flush();
    for n in 0..made {
        let content = fs::read(sandbox.peer().join(format!("f{n}"))).unwrap();
        assert_eq!(content, b"content", "f{n}");
    }
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}
