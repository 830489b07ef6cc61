//! Brakes on the root of the mounted tree: "a root that vanished, became empty, changed type,
//! device or identity". Whatever is in its place, the peer keeps what it has.

use std::fs;
use std::path::Path;

use crate::support::{Outcome, Sandbox, assert_same};

fn mirrored(sandbox: &Sandbox) {
    sandbox.sh(
        &sandbox.tree(),
        "mkdir d; for i in $(seq 30); do echo $i >d/f$i; done; echo kept >kept",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
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
