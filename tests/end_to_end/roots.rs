//! Brakes on the root of the mounted tree: "a root that vanished, became empty, changed type,
//! device or identity". Whatever is in its place, the peer keeps what it has.

use std::fs;
use std::path::Path;

use crate::support::disk::Disk;
use crate::support::{Outcome, PROMPT, Sandbox, assert_same, wait_until};

fn mirrored(sandbox: &Sandbox) {
    sandbox.sh(
        &sandbox.tree(),
        "mkdir d; for i in $(seq 30); do echo $i >d/f$i; done; echo kept >kept",
    );
    sandbox.mount();
    sandbox.flush();
    unmount(sandbox);
}

/// A disk may be mounted below.
fn unmount(sandbox: &Sandbox) {
    sandbox.try_umount();
    wait_until("everything ends", PROMPT, || sandbox.processes().is_empty());
}

fn run(sandbox: &Sandbox, arguments: &[&str]) -> Outcome {
    let tree = sandbox.tree();
    let mut all = vec![arguments[0].as_ref(), tree.as_os_str()];
    all.extend(arguments[1..].iter().map(std::ffi::OsStr::new));
    sandbox.run(all)
}

/// Nothing is done with it, mounted or not, with the peer's name or without, and the way on is
/// said.
fn assert_refused(sandbox: &Sandbox, what: &str) {
    let peer = sandbox.peer();
    let peer = peer.to_str().unwrap();
    for arguments in [
        &["mount"][..],
        &["mount", peer],
        &["sync"],
        &["sync", peer],
        &["sync", peer, "--dry-run"],
    ] {
        run(sandbox, arguments).expect_code(6).expect_said(&[
            what,
            "is its disk mounted",
            "resume",
            "--refill",
        ]);
    }
    assert_peer_is_whole(sandbox);
}

fn assert_peer_is_whole(sandbox: &Sandbox) {
    assert_eq!(fs::read_dir(sandbox.peer().join("d")).unwrap().count(), 30);
    assert!(sandbox.peer().join("kept").exists());
}

/// "An empty directory at the same place": it is neither taken for an emptied tree nor filled
/// behind the back of who forgot to mount a disk. Filling it is an order.
#[test]
fn an_empty_directory_is_not_the_tree() {
    let sandbox = Sandbox::new();
    mirrored(&sandbox);
    sandbox.sh(sandbox.root(), "mv tree away; mkdir tree");
    assert_refused(&sandbox, "is empty and has no .mirrorfs");
    let status = run(&sandbox, &["status"]).expect_code(6);
    assert!(status.stdout.contains("is its disk mounted"), "{status}");
    assert_eq!(fs::read_dir(sandbox.tree()).unwrap().count(), 0);
    // The tree is back, with what somebody did to it meanwhile.
    sandbox.sh(sandbox.root(), "rmdir tree; mv away tree; rm tree/d/f1");
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(!sandbox.peer().join("d/f1").exists());
    sandbox.umount();
    // Gone for good.
    sandbox.sh(sandbox.root(), "rm -r tree; mkdir tree");
    run(&sandbox, &["resume", "--allow-deletions"]).expect_code(6);
    assert!(sandbox.peer().join("kept").exists());
    run(&sandbox, &["resume", "--refill"]).ok();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.tree().join("d/f30").exists());
    sandbox.sh(&sandbox.tree(), "rm d/f2");
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(!sandbox.peer().join("d/f2").exists());
}

#[test]
fn nothing_and_a_file_are_not_the_tree() {
    let sandbox = Sandbox::new();
    mirrored(&sandbox);
    sandbox.sh(sandbox.root(), "mv tree away");
    assert_refused(&sandbox, "does not exist any more");
    sandbox.sh(sandbox.root(), "echo file >tree");
    assert_refused(&sandbox, "is no directory any more");
    sandbox.sh(sandbox.root(), "rm tree; mv away tree");
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "Unmounting the disk below", "replacing it with another mirror", and a disk on which a part
/// of the tree is missing.
#[test]
fn a_disk_that_is_gone_or_another_is_not_taken_for_the_tree() {
    let sandbox = Sandbox::new();
    let image = |name: &str| sandbox.root().join(name);
    let disk = Disk::new(&image("image"), &sandbox.tree(), 16);
    mirrored(&sandbox);
    sandbox.sh(sandbox.root(), "mkdir saved; cp -a tree/. saved");
    drop(disk);
    assert_refused(&sandbox, "is empty and has no .mirrorfs");

    // Another mirror's.
    let other = Sandbox::new();
    let another = Disk::new(&image("another"), &sandbox.tree(), 16);
    let aside = other.peer();
    sandbox.sh(&sandbox.tree(), "echo other >other");
    run(&sandbox, &["mount", aside.to_str().unwrap()]).ok();
    run(&sandbox, &["sync", "--flush"]).ok();
    unmount(&sandbox);
    run(&sandbox, &["mount", sandbox.peer().to_str().unwrap()])
        .expect_code(1)
        .expect_said(&["belongs to another mirror"]);
    assert_peer_is_whole(&sandbox);
    assert!(!sandbox.peer().join("other").exists() && !aside.join("kept").exists());
    drop(another);

    // The tree's own, but for a few files: fewer than a brake on numbers would hold.
    let _copy = Disk::new(&image("copy"), &sandbox.tree(), 16);
    sandbox.sh(sandbox.root(), "cp -a saved/. tree; rm tree/d/f1 tree/d/f2");
    run(&sandbox, &["mount"])
        .ok()
        .expect_said(&["on another disk than before"]);
    sandbox.try_flush().expect_code(6);
    let status = sandbox.status();
    let reason = status.peer().halt_reason.clone().unwrap_or_default();
    assert!(
        reason.contains("another disk") && reason.contains("2 files"),
        "{reason}"
    );
    // What the mount sees is meant all the same.
    sandbox.sh(&sandbox.tree(), "rm d/f3; echo new >new");
    sandbox.try_flush().expect_code(6);
    wait_until("everything else goes on", PROMPT, || {
        !sandbox.peer().join("d/f3").exists() && sandbox.peer().join("new").exists()
    });
    assert!(sandbox.peer().join("d/f1").exists());
    unmount(&sandbox);
    // The order is given without a mount.
    run(&sandbox, &["sync"]).expect_code(6);
    run(&sandbox, &["resume", "--refill"]).ok();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.tree().join("d/f1").exists());
    // On the same disk a deletion is one again.
    sandbox.sh(&sandbox.tree(), "rm d/f1");
    run(&sandbox, &["sync"]).ok();
    assert!(!sandbox.peer().join("d/f1").exists());
}

/// "`mirrorfs sync DIR PEER`" has its brakes, and its way on.
#[test]
fn a_brake_without_a_mount_is_released_without_one() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let place = peer.to_str().unwrap();
    sandbox.sh(
        &tree,
        "mkdir d; for i in $(seq 60); do echo $i >d/f$i; done; echo kept >kept",
    );
    run(&sandbox, &["sync", place]).ok();
    let count = |root: &Path| fs::read_dir(root.join("d")).map_or(0, Iterator::count);
    for (wiped, how, left) in [
        (&tree, "--refill", 60),
        (&peer, "--refill", 60),
        (&tree, "--allow-deletions", 0),
    ] {
        sandbox.sh(wiped, "rm -r d");
        for _ in 0..2 {
            run(&sandbox, &["sync", place]).expect_code(6);
        }
        let other = if wiped == &tree { &peer } else { &tree };
        assert_eq!(count(other), 60, "{how}");
        run(&sandbox, &["resume", how]).ok();
        assert_eq!((count(&tree), count(&peer)), (left, left), "{how}");
        run(&sandbox, &["sync", place]).ok();
        assert_same(&tree, &peer);
    }
}
