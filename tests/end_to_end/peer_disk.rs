//! A peer whose disk is full, goes away, or comes back as something else: a clear error,
//! nothing truncated, and above all no deletion in the mount.

use std::fs;
use std::time::Duration;

use crate::support::disk::Disk;
use crate::support::{PROMPT, Sandbox, assert_same, wait_until};

const MANY: &str =
    "for i in $(seq 100); do mkdir -p all/d$((i%5)); echo $i >all/d$((i%5))/f$i; done";

/// How many files a tree of [`MANY`] still has.
fn files(sandbox: &Sandbox) -> usize {
    sandbox
        .sh(&sandbox.tree(), "find . -name 'f*' -type f | wc -l")
        .trim()
        .parse()
        .unwrap()
}

/// "A full peer: local work goes on." The error is in status, flush does not answer 0,
/// nothing on the peer is truncated, and it recovers when there is room.
#[test]
fn a_full_peer_is_reported_and_recovers() {
    let sandbox = Sandbox::new();
    let disk = sandbox.root().join("disk");
    let _disk = Disk::new(&sandbox.root().join("image"), &disk, 48);
    let peer = disk.join("peer");
    sandbox.sh(
        &sandbox.tree(),
        "echo small >small; head -c 3000000 /dev/urandom >kept",
    );
    sandbox.mount_with(&peer);
    sandbox.flush();
    // Without it there is room for the new file beside a moment at which half of it was
    // written.
    sandbox.sh(&disk, "head -c 36000000 /dev/urandom >ballast");

    sandbox.sh(
        &sandbox.tree(),
        // Each name shows whole versions only, so that a part of one is a fault.
        "head -c 12000000 /dev/urandom >new1; head -c 3100000 /dev/urandom >new2; echo newer >new3
         mv new1 large; mv new2 kept; mv new3 small",
    );
    let tree = sandbox.tree().display().to_string();
    let outcome = sandbox.run(["sync", &tree, "--flush", "--timeout", "30s"]);
    assert!([1, 5].contains(&outcome.code), "{outcome}");
    let status = sandbox.status_becomes("the full disk shows", |status| {
        let texts = [&status.peer().last_error, &status.peer().halt_reason];
        texts.into_iter().flatten().any(|text| {
            let text = text.to_lowercase();
            text.contains("no space") || text.contains("full")
        })
    });
    assert!(status.peer().pending_changes > 0, "{status:?}");
    assert!(!peer.join("large").exists());
    for name in ["kept", "small"] {
        let (here, there) = (sandbox.tree().join(name), peer.join(name));
        let there = fs::metadata(&there).unwrap().len();
        let old = if name == "kept" { 3_000_000 } else { 6 };
        let new = fs::metadata(&here).unwrap().len();
        assert!(
            [old, new].contains(&there),
            "{name} has {there} bytes on the peer"
        );
    }
    sandbox.sh(&sandbox.tree(), "echo on >goes; cat goes");

    fs::remove_file(disk.join("ballast")).unwrap();
    wait_until("it recovers by itself", Duration::from_secs(120), || {
        peer.join("large").exists()
    });
    sandbox.flush();
    assert_same(&sandbox.tree(), &peer);
    assert!(sandbox.status().peer().last_error.is_none());
}

/// The tree's own disk is full: the program in the mount gets ENOSPC, what arrives from
/// the peer waits, nothing is truncated on either side.
#[test]
fn a_full_tree_truncates_nothing() {
    let sandbox = Sandbox::new();
    let _disk = Disk::new(&sandbox.root().join("image"), &sandbox.tree(), 24);
    sandbox.sh(&sandbox.tree(), "head -c 3000000 /dev/urandom >kept");
    sandbox.mount();
    sandbox.flush();
    let ballast = sandbox.tree().join("ballast");
    let error = fs::write(&ballast, vec![1; 40 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    sandbox.sh(
        &sandbox.peer(),
        "head -c 8000000 /dev/urandom >new; mv new kept",
    );
    sandbox.sh(&sandbox.tree(), "cmp -n 1 kept kept");
    let size = fs::metadata(sandbox.tree().join("kept")).unwrap().len();
    assert!([3_000_000, 8_000_000].contains(&size), "{size}");
    fs::remove_file(&ballast).unwrap();
    wait_until(
        "the peer's version arrives",
        Duration::from_secs(120),
        || fs::metadata(sandbox.tree().join("kept")).unwrap().len() == 8_000_000,
    );
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "The peer came back empty, and the source was wiped": the peer's disk is unmounted, and
/// an empty directory is what remains under its path.
#[test]
fn a_peer_whose_disk_goes_away_deletes_nothing() {
    let sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox.root().join("image"), &sandbox.peer(), 24);
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    disk.vanish();
    sandbox.kill_agents();
    sandbox.sh(&sandbox.tree(), "echo on >goes");
    sandbox.status_becomes("the loss shows", |status| {
        let peer = status.peer();
        peer.halt_reason.is_some() || (peer.state != "connected" && peer.last_error.is_some())
    });
    let outcome = sandbox.try_flush();
    assert!([4, 6].contains(&outcome.code), "{outcome}");
    assert_eq!(files(&sandbox), 100);
    assert!(sandbox.status().peer().halt_reason.is_some() || outcome.code == 4);
}

/// The peer's directory is moved away while it is watched.
#[test]
fn a_peer_directory_that_goes_away_deletes_nothing() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(sandbox.root(), "mv peer away");
    let outcome = sandbox.try_flush();
    assert!([4, 6].contains(&outcome.code), "{outcome}");
    assert_eq!(files(&sandbox), 100);
    let status = sandbox.status();
    let peer = status.peer();
    assert!(
        peer.halt_reason.is_some() || peer.last_error.is_some(),
        "{status:?}"
    );
}

/// The peer's directory is removed file by file while it is watched. What was seen of
/// that before the root itself was gone are deletions like any others: in the trash.
#[test]
fn what_a_removed_peer_directory_takes_along_is_in_the_trash() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(sandbox.root(), "rm -rf peer");
    let outcome = sandbox.try_flush();
    assert!([4, 6].contains(&outcome.code), "{outcome}");
    let left = files(&sandbox);
    sandbox.try_umount();
    sandbox.assert_down();
    let trash = sandbox.reserved_contents(&sandbox.tree(), "trash");
    assert_eq!(left + trash.len(), 100);
}

/// "A root that became empty": everything in the peer's directory is deleted, but for its
/// `.mirrorfs`. The brake holds the deletions, and everything else goes on.
#[test]
fn a_peer_that_is_emptied_engages_the_brake() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    // At one moment: deletions that come one by one are reported one by one.
    sandbox.sh(&sandbox.peer(), "mv all ../outside/");
    sandbox.status_becomes("the brake shows", |status| {
        status.peer().halt_reason.is_some()
    });
    sandbox.try_flush().expect_code(6);
    assert_eq!(files(&sandbox), 100);
    sandbox.sh(&sandbox.tree(), "echo on >goes");
    wait_until("everything else goes on", PROMPT, || {
        sandbox.peer().join("goes").exists()
    });
}

/// Deletions within reason do not brake: fewer than 21 files, or less than half.
#[test]
fn an_ordinary_deletion_on_the_peer_does_not_brake() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.peer(), "rm -rf all/d0 all/d1");
    sandbox.flush();
    assert_eq!(files(&sandbox), 60);
    assert!(sandbox.status().peer().halt_reason.is_none());
}

/// "Deletions the mount itself saw do not brake, except the emptying of the root."
#[test]
fn a_deletion_in_the_mount_does_not_brake() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.tree(), "rm -rf all/d0 all/d1 all/d2 all/d3");
    sandbox.flush();
    assert!(!sandbox.peer().join("all/d3").exists());
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "The peer was replaced by another instance": the directory is another one now, empty,
/// with no identity. Nothing is deleted, and it is not taken for the old one silently.
#[test]
fn a_peer_replaced_by_an_empty_directory_deletes_nothing() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(sandbox.root(), "mv peer old; mkdir peer");
    let outcome = sandbox.try_mount(sandbox.peer());
    if outcome.code == 0 {
        let outcome = sandbox.try_flush();
        assert_eq!(outcome.code, 6, "{outcome}");
        assert!(sandbox.status().peer().halt_reason.is_some());
    }
    assert_eq!(files(&sandbox), 100);
}

/// The same while it is mounted.
#[test]
fn a_peer_replaced_while_mounted_deletes_nothing() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(sandbox.root(), "mv peer old; mkdir peer");
    sandbox.kill_agents();
    sandbox.sh(&sandbox.tree(), "echo on >goes");
    let outcome = sandbox.try_flush();
    assert!([4, 6].contains(&outcome.code), "{outcome}");
    assert_eq!(files(&sandbox), 100);
    assert_eq!(
        sandbox
            .sh(
                &sandbox.root().join("old"),
                "find . -name 'f*' -type f | wc -l"
            )
            .trim(),
        "100"
    );
}

/// The old directory comes back: everything goes on as if nothing had been.
#[test]
fn a_peer_that_comes_back_goes_on() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), MANY);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.kill_agents();
    sandbox.sh(&sandbox.tree(), "echo on >goes; rm all/d0/f5");
    assert!([4, 6].contains(&sandbox.try_flush().code));
    sandbox.sh(&sandbox.root().join("away"), "echo there >came");
    sandbox.sh(sandbox.root(), "rm -rf peer; mv away peer");
    sandbox.connected();
    sandbox.flush();
    assert_eq!(files(&sandbox), 99);
    assert!(sandbox.tree().join("came").exists());
    assert_same(&sandbox.tree(), &sandbox.peer());
}
