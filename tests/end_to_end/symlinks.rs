//! "symlinks are data, carried as they are and never followed; `symlinks = "safe"` (the
//! default from a peer of low trust) holds back those that leave the tree."

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use crate::support::{Outcome, Sandbox, assert_same, assert_same_except};

/// Links that stay in the tree, and such that leave it or might.
const LINKS: &str = "mkdir -p a/b; echo x >a/x
    ln -s ../x a/b/inside; ln -s a/b/../x up; ln -s nowhere dangling
    ln -s /etc/passwd absolute; ln -s ../../.. a/b/outside";
const UNSAFE: [&str; 3] = ["up", "absolute", "a/b/outside"];

fn run(sandbox: &Sandbox, command: &str, flags: &[&str]) -> Outcome {
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let named = [OsStr::new(command), tree.as_ref(), peer.as_ref()];
    sandbox.run(named.into_iter().chain(flags.iter().map(OsStr::new)))
}

#[track_caller]
fn held_back(sandbox: &Sandbox, dir: &Path) {
    for path in UNSAFE {
        assert!(fs::symlink_metadata(dir.join(path)).is_err(), "{path}");
        let problems = sandbox.status().problems;
        assert!(
            problems
                .iter()
                .any(|problem| problem.path == path && problem.error.contains("--symlinks")),
            "{path}: {problems:?}"
        );
    }
}

/// Without the option all of them travel, as they are.
#[test]
fn all_links_travel_as_they_are() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.peer(), LINKS);
    run(&sandbox, "sync", &[]).ok();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

#[test]
fn a_mount_holds_back_what_leads_out_and_takes_the_rest() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    run(&sandbox, "mount", &["--symlinks=safe"]).ok();
    sandbox.sh(&peer, LINKS);
    // What is made here is nobody else's.
    sandbox.sh(&tree, "ln -s /etc/hostname mine");
    assert_eq!(sandbox.try_flush().code, 1);
    assert_same_except(&tree, &peer, |path| UNSAFE.contains(&path));
    assert!(fs::read_link(peer.join("mine")).is_ok());
    held_back(&sandbox, &tree);
    // It is remembered, and what is on the peer stays there.
    sandbox.try_umount();
    run(&sandbox, "mount", &[]).ok();
    assert_eq!(sandbox.try_flush().code, 1);
    held_back(&sandbox, &tree);
    assert!(fs::read_link(peer.join("absolute")).is_ok());
    sandbox.try_umount();
    run(&sandbox, "mount", &["--symlinks=all"]).ok();
    sandbox.flush();
    assert_same(&tree, &peer);
    assert!(sandbox.status().problems.is_empty());
    sandbox.umount();
}

#[test]
fn a_round_without_a_mount_holds_back_the_same() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&peer, LINKS);
    run(&sandbox, "sync", &["--symlinks=safe"]).expect_code(1);
    assert_same_except(&tree, &peer, |path| UNSAFE.contains(&path));
    for path in UNSAFE {
        assert!(fs::symlink_metadata(tree.join(path)).is_err(), "{path}");
    }
    run(&sandbox, "sync", &["--symlinks=all"]).ok();
    assert_same(&tree, &peer);
}
