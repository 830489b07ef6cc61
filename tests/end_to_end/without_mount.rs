//! "`mirrorfs sync DIR PEER` runs one round by scanning, with the same rules, base and
//! journal, where FUSE is not available or not wanted."

use std::ffi::OsStr;
use std::fs;

use crate::first_contact::PROJECT;
use crate::support::{Outcome, Sandbox, Server, assert_same};

fn sync(sandbox: &Sandbox, peer: impl AsRef<OsStr>) -> Outcome {
    let outcome = sandbox.run([OsStr::new("sync"), sandbox.tree().as_ref(), peer.as_ref()]);
    sandbox.assert_down();
    outcome
}

/// First contact, changes on both sides, deletions, and a round with nothing to do.
#[test]
fn rounds_without_a_mount() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, PROJECT);
    sandbox.sh(&peer, "echo there >there");
    sync(&sandbox, &peer).ok();
    assert_same(&tree, &peer);
    assert!(tree.join("there").exists());

    sandbox.sh(
        &tree,
        "rm there; echo more >>docs/long; mv src/main.rs src/lib.rs",
    );
    sandbox.sh(
        &peer,
        "rm dangling; mkdir new; echo x >new/x; chmod 600 docs/nothing",
    );
    sync(&sandbox, &peer).ok();
    assert_same(&tree, &peer);
    assert!(!peer.join("there").exists());
    assert!(peer.join("src/lib.rs").exists());
    assert!(tree.join("new/x").exists());
    assert!(fs::symlink_metadata(tree.join("dangling")).is_err());

    sync(&sandbox, &peer).ok();
    assert_same(&tree, &peer);
}

/// A conflict: 3, both kept; the next round does not forget it; a merged file resolves it
/// together with equal sides.
#[test]
fn a_conflict_without_a_mount() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "echo base >notes; echo x >other");
    sync(&sandbox, &peer).ok();
    sandbox.sh(&tree, "echo mine >notes");
    sandbox.sh(&peer, "echo theirs >notes; echo y >other");
    sync(&sandbox, &peer).expect_code(3);
    assert_eq!(fs::read_to_string(tree.join("notes")).unwrap(), "mine\n");
    assert_eq!(fs::read_to_string(peer.join("notes")).unwrap(), "theirs\n");
    assert_eq!(fs::read_to_string(tree.join("other")).unwrap(), "y\n");
    let copies = sandbox.conflict_copies(&tree);
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(fs::read_to_string(&copies[0]).unwrap(), "theirs\n");
    sync(&sandbox, &peer).expect_code(3);
    assert_eq!(sandbox.conflict_copies(&tree).len(), 1);
    assert_eq!(sandbox.conflict_copies(&peer).len(), 0);
    sandbox.sh(&peer, "echo mine >notes");
    sync(&sandbox, &peer).ok();
}

/// A mount later goes on from the same base: no first contact, so a deletion is one.
#[test]
fn a_mount_continues_where_a_round_without_one_ended() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sync(&sandbox, sandbox.peer()).ok();
    sandbox.sh(&sandbox.tree(), "rm docs/long");
    sandbox.mount();
    sandbox.flush();
    assert!(!sandbox.peer().join("docs/long").exists());
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.sh(&sandbox.tree(), "rm docs/second-name");
    sandbox.umount();
    sandbox.sh(&sandbox.tree(), "rm docs/nothing");
    sync(&sandbox, sandbox.peer()).ok();
    assert!(!sandbox.peer().join("docs/nothing").exists());
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// Over SSH; 4 when nobody answers.
#[test]
fn a_round_over_ssh() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url = server.url(&sandbox.peer());
    sandbox.sh(&sandbox.tree(), PROJECT);
    sync(&sandbox, &url).ok();
    assert_same(&sandbox.tree(), &sandbox.peer());
    server.link.refuse();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sync(&sandbox, &url).expect_code(4);
    server.link.restore();
    sync(&sandbox, &url).ok();
    assert!(sandbox.peer().join("file").exists());
}

/// Without /dev/fuse, where there is nothing but this.
#[test]
fn a_round_by_an_ordinary_user() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sync(&sandbox, sandbox.peer()).ok();
    assert_same(&sandbox.tree(), &sandbox.peer());
}
