//! `mirrorfs trash`: "What a peer's change deletes or replaces goes to the trash, kept 30
//! days or 10 % of the disk".

use std::fs;
use std::path::Path;

use crate::support::{Outcome, PROMPT, Sandbox, assert_same, wait_until};

const TREE: &str = "mkdir -p a/b; echo notes >a/b/notes; echo more >a/more; echo other >other
    chmod 640 a/b/notes; setfattr -n user.note -v kept a/b/notes; ln -s more a/link
    touch -d '2001-02-03 04:05:06.000000007' a/b/notes";

fn mounted() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), TREE);
    sandbox.mount();
    sandbox.flush();
    sandbox
}

fn trash(sandbox: &Sandbox, action: &str, root: &Path, rest: &[&str]) -> Outcome {
    let mut arguments = vec!["trash", action, root.to_str().unwrap()];
    arguments.extend(rest);
    sandbox.run(arguments)
}

/// The paths in a trash, sorted.
#[track_caller]
fn listed(sandbox: &Sandbox, root: &Path) -> Vec<String> {
    let outcome = trash(sandbox, "list", root, &["--json"]).ok();
    let list: Vec<serde_json::Value> = serde_json::from_str(&outcome.stdout).unwrap();
    let mut paths: Vec<_> = list
        .iter()
        .map(|kept| kept["path"].as_str().unwrap().to_owned())
        .collect();
    paths.sort();
    paths
}

const ALL: [&str; 3] = ["a/b/notes", "a/link", "a/more"];

/// Deleted there, brought back here: as an ordinary change, so that it is there again too.
#[test]
fn what_the_peer_deleted_comes_back_in_the_mount() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let before = fs::metadata(tree.join("a/b/notes")).unwrap();
    sandbox.sh(&peer, "rm -r a");
    sandbox.flush();
    assert!(!tree.join("a").exists());
    assert_eq!(listed(&sandbox, &tree), ALL);
    let outcome = trash(&sandbox, "list", &tree, &[]).ok();
    let line = outcome
        .stdout
        .lines()
        .find(|line| line.ends_with("  a/b/notes"))
        .unwrap_or_else(|| panic!("{outcome}"));
    assert!(line.contains("Z ") && line.contains(" 6 bytes "), "{line}");

    trash(&sandbox, "restore", &tree, &["a/b/notes"])
        .ok()
        .expect_said(&["a/b/notes is back"]);
    let after = fs::metadata(tree.join("a/b/notes")).unwrap();
    assert_eq!(fs::read(tree.join("a/b/notes")).unwrap(), b"notes\n");
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    assert_eq!(after.permissions(), before.permissions());
    let note = sandbox.sh(&tree, "getfattr --only-values -n user.note a/b/notes");
    assert_eq!(note, "kept");
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(listed(&sandbox, &tree), ALL[1..]);

    // From within, all that was below a directory.
    let within = sandbox.sh(
        &tree,
        &format!("{} trash restore a/", sandbox.program().display()),
    );
    assert_eq!(within.lines().count(), 2, "{within}");
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(sandbox.sh(&peer, "cat a/link"), "more\n");
    assert_eq!(listed(&sandbox, &tree), [""; 0]);
}

/// Deleted here, brought back in the peer's directory while it is being served: like any
/// change of its user, it arrives in the mount.
#[test]
fn what_was_deleted_here_comes_back_on_the_peer() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "rm -r a");
    sandbox.flush();
    assert_eq!(listed(&sandbox, &peer), ALL);
    trash(&sandbox, "restore", &peer, &["a/b/notes", "a/more"]).ok();
    wait_until("what was brought back arrives in the mount", PROMPT, || {
        tree.join("a/b/notes").exists() && tree.join("a/more").exists()
    });
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(listed(&sandbox, &peer), ["a/link"]);
}

/// Which of the things in a trash both sides had agreed on.
#[track_caller]
fn agreed(sandbox: &Sandbox, root: &Path) -> Vec<(String, bool)> {
    let outcome = trash(sandbox, "list", root, &["--json"]).ok();
    let list: Vec<serde_json::Value> = serde_json::from_str(&outcome.stdout).unwrap();
    let mut kept: Vec<_> = list
        .iter()
        .map(|kept| {
            let slot = kept["id"].as_str().unwrap().split('/').next().unwrap();
            let path = kept["path"].as_str().unwrap();
            (path.to_owned(), slot.contains(".agreed"))
        })
        .collect();
    kept.sort();
    kept
}

/// "Content the other side never had [is] evicted last": it is told from what both have had,
/// on either side.
#[test]
fn what_only_one_side_had_is_told_from_the_rest() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    for (turn, root, other) in [(1, &tree, &peer), (2, &peer, &tree)] {
        let script = format!("echo changed {turn} >a/more; rm a/b/notes");
        sandbox.sh(other, &script);
        sandbox.flush();
        // Both edit; the other side's wins.
        sandbox.sh(&tree, &format!("echo here {turn} >other"));
        sandbox.sh(&peer, &format!("echo there {turn} >other"));
        sandbox.try_flush().expect_code(3);
        let winner = if root == &tree { "--remote" } else { "--local" };
        let at = tree.join("other").display().to_string();
        sandbox.run(["conflicts", "resolve", &at, winner]).ok();
        sandbox.flush();
        let found = agreed(&sandbox, root);
        let of = |path: &str| -> Vec<bool> {
            let found = found.iter().filter(|(at, _)| at == path);
            found.map(|(_, agreed)| *agreed).collect()
        };
        assert_eq!(of("a/b/notes"), [true], "{found:?}");
        assert_eq!(of("a/more"), [true], "{found:?}");
        assert_eq!(of("other"), [false], "{found:?}");
        sandbox.sh(&tree, "echo notes >a/b/notes");
        sandbox.flush();
    }
}

/// Without a mount the tree and its trash are plain directories.
#[test]
fn an_unmounted_tree_gets_its_things_back() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&peer, "rm -r a");
    sandbox.flush();
    sandbox.umount();
    assert_eq!(listed(&sandbox, &tree), ALL);
    trash(&sandbox, "restore", &tree, &["a"]).ok();
    assert_eq!(sandbox.sh(&tree, "cat a/link a/b/notes"), "more\nnotes\n");
    sandbox.mount();
    sandbox.flush();
    assert_same(&tree, &peer);
}

/// "Restoring never overwrites: if something is at the path, it says so and what to do."
#[test]
fn nothing_is_overwritten_by_what_comes_back() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    // A peer that loses everything would be a wipe, which a brake holds.
    sandbox.sh(&tree, "echo stays >stays");
    sandbox.flush();
    sandbox.sh(&peer, "rm other; rm -r a");
    sandbox.flush();
    sandbox.sh(&tree, "echo new >other; echo 'a file' >a");
    sandbox.sh(&tree, "rm a; mkdir a; echo 'in the way' >a/b");
    sandbox.flush();
    let refused = |root: &Path, path: &str, why: &str| {
        trash(&sandbox, "restore", root, &[path])
            .expect_code(1)
            .expect_said(&[path, why, "--as"]);
    };
    refused(&tree, "other", "something is there already");
    refused(&tree, "a/b/notes", "a/b is no directory");
    assert_eq!(fs::read(tree.join("other")).unwrap(), b"new\n");
    trash(&sandbox, "restore", &tree, &["nothing"])
        .expect_code(1)
        .expect_said(&["nothing", "not in the trash", "trash list"]);
    trash(
        &sandbox,
        "restore",
        &tree,
        &["other", "--as", ".mirrorfs/x"],
    )
    .expect_code(1)
    .expect_said(&["reserved"]);
    trash(
        &sandbox,
        "restore",
        &tree,
        &["other", "a/more", "--as", "x"],
    )
    .expect_code(2);
    assert_eq!(
        listed(&sandbox, &tree),
        ["a/b/notes", "a/link", "a/more", "other"]
    );
    trash(&sandbox, "restore", &tree, &["other", "--as", "old/other"])
        .ok()
        .expect_said(&["other is back as old/other"]);
    trash(&sandbox, "restore", &tree, &["a", "--as", "before"])
        .ok()
        .expect_said(&["a/b/notes is back as before/b/notes"]);
    sandbox.flush();
    assert_eq!(fs::read(peer.join("old/other")).unwrap(), b"other\n");
    assert_eq!(fs::read(peer.join("before/b/notes")).unwrap(), b"notes\n");
    assert_same(&tree, &peer);

    // The same in a directory that is not mounted.
    sandbox.sh(&tree, "rm other");
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(&peer, "echo newer >other");
    refused(&peer, "other", "something is there already");
    assert_eq!(fs::read(peer.join("other")).unwrap(), b"newer\n");
}

/// Two versions of one path, and names that are no text.
#[test]
fn every_version_and_every_name_can_come_back() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "echo odd >$'odd \\xff\\nname'");
    sandbox.flush();
    sandbox.sh(&peer, "echo second >other");
    sandbox.flush();
    sandbox.sh(&peer, "echo third >other; rm odd*");
    sandbox.flush();
    let outcome = trash(&sandbox, "list", &tree, &["--json"]).ok();
    let list: Vec<serde_json::Value> = serde_json::from_str(&outcome.stdout).unwrap();
    let others: Vec<&str> = list
        .iter()
        .filter(|kept| kept["path"] == "other")
        .map(|kept| kept["id"].as_str().unwrap())
        .collect();
    assert_eq!(others.len(), 2, "{outcome}");
    for (number, id) in others.iter().enumerate() {
        let to = format!("version-{number}");
        trash(&sandbox, "restore", &tree, &[id, "--as", &to]).ok();
    }
    // The later one comes first, unless both were displaced within one second.
    let versions = sandbox.sh(&tree, "sort version-0 version-1");
    assert_eq!(versions, "other\nsecond\n");
    sandbox.sh(
        &tree,
        &format!(
            "{} trash restore $'odd \\xff\\nname'",
            sandbox.program().display()
        ),
    );
    sandbox.flush();
    assert_eq!(sandbox.sh(&peer, "cat odd*"), "odd\n");
    assert_same(&tree, &peer);
}

#[test]
fn emptying_removes_what_is_old_enough() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&peer, "rm -r a");
    sandbox.flush();
    // Something stays: a tree that is emptied bit by bit engages a brake.
    sandbox.sh(&tree, "echo stays >stays; rm other");
    sandbox.flush();
    for (root, things) in [(&tree, "3 things"), (&peer, "1 thing")] {
        let before = listed(&sandbox, root);
        trash(&sandbox, "empty", root, &["--older-than", "7d"])
            .ok()
            .expect_said(&["removed 0 things"]);
        assert_eq!(listed(&sandbox, root), before);
        trash(&sandbox, "empty", root, &[])
            .ok()
            .expect_said(&["removed", things]);
        assert_eq!(listed(&sandbox, root), [""; 0]);
        trash(&sandbox, "empty", root, &["--older-than", "soon"]).expect_code(2);
    }
    sandbox.flush();
    assert_same(&tree, &peer);
}

/// "Retention: applied by the daemon and by the agent at start."
#[test]
fn what_is_too_old_goes_by_itself() {
    let sandbox = mounted();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.umount();
    for root in [&tree, &peer] {
        sandbox.sh(
            root,
            "cd .mirrorfs/trash; mkdir -p 20200101T000000Z-old/d; echo old >20200101T000000Z-old/d/x
             now=$(date -u +%Y%m%dT%H%M%SZ)-young; mkdir $now; echo young >$now/y",
        );
        assert_eq!(listed(&sandbox, root), ["d/x", "y"]);
    }
    sandbox.mount();
    for root in [&tree, &peer] {
        wait_until("what is too old is gone", PROMPT, || {
            listed(&sandbox, root) == ["y"]
        });
    }
    sandbox.umount();
    for root in [&tree, &peer] {
        let left = fs::read_dir(root.join(".mirrorfs/trash")).unwrap().count();
        assert_eq!(left, 1, "the empty directories are gone as well");
    }
}

/// A directory that belongs to no mirror has no trash.
#[test]
fn what_is_no_replica_has_no_trash() {
    let sandbox = Sandbox::new();
    trash(&sandbox, "list", &sandbox.outside(), &[])
        .expect_code(1)
        .expect_said(&["is not in a mirror"]);
}

/// An ordinary user's mount, where the daemon makes no other user's files.
#[test]
fn an_ordinary_user_brings_things_back() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.sh(&sandbox.tree(), TREE);
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.peer(), "rm -r a");
    sandbox.flush();
    let tree = sandbox.tree();
    trash(&sandbox, "restore", &tree, &["a"]).ok();
    sandbox.flush();
    assert_eq!(sandbox.sh(&tree, "cat a/b/notes"), "notes\n");
    sandbox.umount();
    assert_same(&tree, &sandbox.peer());
}
