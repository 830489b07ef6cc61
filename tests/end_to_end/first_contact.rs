//! First contact: without a base, equal content agrees, what only one side has travels,
//! and what differs is a conflict. An empty side is simply filled.

use std::fs;

use crate::support::{Sandbox, assert_same, assert_same_except};

/// A small project with everything that is carried: kinds, modes, times, attributes.
pub const PROJECT: &str = "
    mkdir -p src/deep/er docs empty/inner
    echo 'fn main() {}' >src/main.rs; chmod 755 src/main.rs
    touch -d '2021-03-04 05:06:07.123456789' src/main.rs
    seq 20000 >docs/long; : >docs/nothing; chmod 600 docs/nothing
    head -c 300000 /dev/urandom >src/deep/er/noise
    ln -s ../docs/long src/link; ln -s nowhere dangling; ln -s /etc/passwd absolute
    setfattr -n user.note -v 'a note' docs/long
    ln docs/long docs/second-name
    chmod 700 src/deep";

/// "A full tree to an empty peer."
#[test]
fn a_full_tree_fills_an_empty_peer() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.sh(sandbox.root(), "cp -a tree before");
    sandbox.mount();
    assert_same(&sandbox.root().join("before"), &sandbox.tree());
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.status().conflicts.is_empty());
    sandbox.umount();
    // "Leaves plain files."
    assert_same(&sandbox.root().join("before"), &sandbox.tree());
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "An empty tree from a full peer": as when a machine is set up anew.
#[test]
fn an_empty_tree_is_filled_from_a_full_peer() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.peer(), PROJECT);
    sandbox.sh(sandbox.root(), "cp -a peer before");
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.root().join("before"), &sandbox.tree());
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
    assert_same(&sandbox.root().join("before"), &sandbox.tree());
}

/// "Two trees that overlap": equal agrees, one-sided travels, different is a conflict
/// that keeps both.
#[test]
fn overlapping_trees_merge_and_lose_nothing() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    for side in [&tree, &peer] {
        sandbox.sh(
            side,
            "mkdir -p both; echo same >both/equal; ln -s equal both/link",
        );
    }
    sandbox.sh(
        &tree,
        "mkdir here; echo 1 >here/a; echo local >both/differs; echo l >both/only-here",
    );
    sandbox.sh(
        &peer,
        "mkdir there; echo 2 >there/b; echo remote >both/differs; echo r >both/only-there",
    );
    sandbox.mount();
    sandbox.try_flush().expect_code(3);

    assert_eq!(fs::read_to_string(tree.join("there/b")).unwrap(), "2\n");
    assert_eq!(fs::read_to_string(peer.join("here/a")).unwrap(), "1\n");
    assert_eq!(
        fs::read_to_string(tree.join("both/only-there")).unwrap(),
        "r\n"
    );
    assert_eq!(
        fs::read_to_string(peer.join("both/only-here")).unwrap(),
        "l\n"
    );
    assert_eq!(
        fs::read_to_string(tree.join("both/differs")).unwrap(),
        "local\n"
    );
    assert_eq!(
        fs::read_to_string(peer.join("both/differs")).unwrap(),
        "remote\n"
    );
    let copies = sandbox.conflict_copies(&tree.join("both"));
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(fs::read_to_string(&copies[0]).unwrap(), "remote\n");
    let status = sandbox.status();
    assert_eq!(status.conflicts.len(), 1, "{status:?}");
    assert_eq!(status.conflicts[0].path, "both/differs");
    assert_same_except(&tree, &peer, |path| path.starts_with("both/differs"));
}

/// Equal trees agree, and nothing is sent or touched: also not the files' inodes.
#[test]
fn equal_trees_agree_without_touching_a_file() {
    use std::os::unix::fs::MetadataExt;
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.sh(sandbox.root(), "rmdir peer; cp -a tree peer");
    let inode = || {
        fs::metadata(sandbox.peer().join("docs/nothing"))
            .unwrap()
            .ino()
    };
    let before = inode();
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert_eq!(inode(), before);
    assert!(
        sandbox
            .reserved_contents(&sandbox.peer(), "trash")
            .is_empty()
    );
}

/// The same content with other times and modes is no conflict: metadata merges, and where
/// both differ local wins.
#[test]
fn equal_content_with_other_metadata_is_no_conflict() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "echo same >file; chmod 755 file; touch -d 2020-01-01 file",
    );
    sandbox.sh(
        &sandbox.peer(),
        "echo same >file; chmod 600 file; touch -d 2021-01-01 file",
    );
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.status().conflicts.is_empty());
}

/// A peer directory that is not there yet is made; its parent has to be there.
#[test]
fn a_new_peer_directory_is_made() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let peer = sandbox.root().join("new peer");
    sandbox.mount_with(&peer);
    sandbox.flush();
    assert_same(&sandbox.tree(), &peer);
}

/// The reserved directory is not listed and not writable through the mount, and never
/// mirrored.
#[test]
fn the_reserved_directory_is_out_of_reach() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.mount();
    sandbox.flush();
    let names: Vec<_> = fs::read_dir(sandbox.tree())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["file"]);
    let reserved = sandbox.tree().join(".mirrorfs");
    assert!(fs::read_dir(&reserved).is_err());
    assert!(fs::create_dir(&reserved).is_err());
    assert!(fs::write(reserved.join("file"), "x").is_err());
    assert!(fs::rename(sandbox.tree().join("file"), &reserved).is_err());
    // In a directory below it is a name like any other.
    let inner = sandbox.tree().join("dir/.mirrorfs");
    fs::create_dir_all(&inner).unwrap();
    fs::write(inner.join("file"), "x").unwrap();
    sandbox.flush();
    assert!(sandbox.peer().join("dir/.mirrorfs/file").exists());
}

/// "When the VM is gone, work goes on in a mount of the peer's directory: it takes over the
/// mirror's identity and base."
#[test]
fn the_peer_directory_can_be_mounted_when_the_tree_is_gone() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(
        sandbox.root(),
        "rm -rf tree state; mkdir tree state; mv peer saved; mv tree peer; mv saved tree",
    );
    sandbox.mount();
    sandbox.sh(&sandbox.tree(), "echo on >goes; rm docs/nothing");
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.peer().join("goes").exists());
    assert!(sandbox.peer().join("src/deep/er/noise").exists());
    assert!(sandbox.status().conflicts.is_empty());
}

/// A lost state directory costs a scan and a first contact, never data: nothing on either
/// side is taken for a deletion.
#[test]
fn a_lost_state_directory_loses_nothing() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(sandbox.root(), "rm -rf state; mkdir state");
    sandbox.sh(&sandbox.tree(), "echo new >here");
    sandbox.sh(&sandbox.peer(), "echo new >there");
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    for name in ["here", "there", "docs/long", "src/deep/er/noise"] {
        assert!(sandbox.peer().join(name).exists(), "{name}");
    }
    assert!(sandbox.status().conflicts.is_empty());
}
