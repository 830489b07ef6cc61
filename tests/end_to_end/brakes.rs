//! "Brakes on what is inferred, not on what was seen": a side that is wiped does not wipe
//! the other. Deletions are held, everything else goes on, and nothing but an order, or the
//! return of what is held, releases them.

use std::fs;
use std::path::Path;

use crate::support::{PROMPT, Sandbox, assert_same, wait_until};

/// A hundred files on both sides.
fn mirrored() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir -p all/most all/rest; for i in $(seq 90); do echo $i >all/most/f$i; done
         for i in $(seq 91 100); do echo $i >all/rest/f$i; done; echo kept >kept",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox
}

/// How many of the hundred there are.
fn files(root: &Path) -> usize {
    let names = |of: &str| fs::read_dir(root.join("all").join(of)).map_or(0, |names| names.count());
    names("most") + names("rest")
}

fn resume(sandbox: &Sandbox, how: &str) {
    let tree = sandbox.tree();
    sandbox
        .run(["resume".as_ref(), tree.as_os_str(), how.as_ref()])
        .ok();
}

/// The brake is engaged, in status and in flush, mounted or not, and says why in a sentence
/// and what to do.
fn assert_held(sandbox: &Sandbox, why: &str) {
    sandbox.try_flush().expect_code(6);
    let outcome = sandbox.status_json().expect_code(6);
    let status = sandbox.status();
    let peer = status.peer();
    assert_eq!(peer.state, "halted", "{outcome}");
    let reason = peer.halt_reason.as_deref().unwrap_or_default();
    for words in [why, "resume --refill", "--allow-deletions"] {
        assert!(reason.contains(words), "{words:?} is not in {reason:?}");
    }
}

/// The same after other work, that is more than was there before, and after another mount.
fn assert_held_on(sandbox: &Sandbox, why: &str) {
    assert_held(sandbox, why);
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "for i in $(seq 300); do echo $i >new$i; done");
    wait_until("everything else goes on", PROMPT, || {
        peer.join("new300").exists()
    });
    sandbox.sh(&peer, "echo there >came");
    wait_until("also the other way", PROMPT, || tree.join("came").exists());
    assert_held(sandbox, why);
    for _ in 0..2 {
        sandbox.try_umount();
        sandbox.assert_down();
        let outcome = sandbox.status_json().expect_code(6);
        assert!(outcome.stdout.contains("resume --refill"), "{outcome}");
        sandbox.mount();
        assert_held(sandbox, why);
    }
    sandbox.kill_daemon();
    sandbox.mount();
    assert_held(sandbox, why);
}

#[test]
fn a_wiped_peer_is_held_whatever_else_happens() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    // At one moment: of deletions that come one by one the first are carried out.
    sandbox.sh(&peer, "mv all/most ../kept");
    assert_held_on(&sandbox, "are gone from the peer");
    assert_eq!(files(&tree), 100);
    // A part of it comes back: the rest is held still.
    sandbox.sh(&peer, "mkdir all/most; mv ../kept/f1? all/most");
    assert_held(&sandbox, "are gone from the peer");
    assert_eq!(files(&tree), 100);
    // All of it: nothing is missing any more.
    sandbox.sh(&peer, "mv ../kept/* all/most");
    sandbox.status_becomes("the brake is released", |status| {
        status.peer().halt_reason.is_none()
    });
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(files(&tree), 100);
    // And an ordinary deletion is one again.
    sandbox.sh(&peer, "rm all/most/f7");
    sandbox.flush();
    assert_eq!(files(&tree), 99);
}

/// What is found missing by the scan at a start, also if the peer hears of it later.
#[test]
fn a_wiped_tree_is_held_whatever_else_happens() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.umount();
    sandbox.sh(&tree, "rm -r all/most");
    // This mount finds it, and has nobody to tell; to the next one it is no news.
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.run([Path::new("mount"), &tree]).ok();
    sandbox.try_umount();
    sandbox.assert_down();
    sandbox.sh(sandbox.root(), "mv away peer");
    sandbox.mount();
    assert_held_on(&sandbox, "were found missing here");
    assert_eq!(files(&peer), 100);
    // What the mount has seen is meant, meanwhile too.
    sandbox.sh(&tree, "rm all/rest/f91 new7");
    wait_until("a deletion that was seen is carried out", PROMPT, || {
        !peer.join("all/rest/f91").exists() && !peer.join("new7").exists()
    });
    assert_held(&sandbox, "were found missing here");
    resume(&sandbox, "--refill");
    sandbox.flush();
    assert_eq!((files(&tree), files(&peer)), (99, 99));
    assert_same(&tree, &peer);
    assert!(sandbox.status().peer().halt_reason.is_none());
}

/// "Deletions the mount itself saw do not brake, except the emptying of the root."
#[test]
fn a_tree_that_is_emptied_through_the_mount_is_held() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    emptied_unseen(&sandbox, "rm -r all kept");
    assert_held_on(&sandbox, "the tree was emptied");
    assert_eq!(files(&peer), 100);
    assert!(peer.join("kept").exists());
    sandbox.sh(&tree, "rm new7");
    wait_until("an ordinary deletion is carried out", PROMPT, || {
        !peer.join("new7").exists()
    });
    resume(&sandbox, "--refill");
    sandbox.flush();
    assert_eq!(files(&tree), 100);
    assert_same(&tree, &peer);
    emptied_unseen(&sandbox, "rm -r ./*");
    assert_held(&sandbox, "the tree was emptied");
    assert_eq!(files(&peer), 100);
    resume(&sandbox, "--allow-deletions");
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(files(&peer), 0);
}

/// Something happens in the mount while the peer is away, so that it hears of all of it at
/// once.
fn emptied_unseen(sandbox: &Sandbox, script: &str) {
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.kill_agents();
    sandbox.status_becomes("the peer is away", |status| {
        status.peer().state != "connected"
    });
    sandbox.sh(&sandbox.tree(), script);
    sandbox.sh(sandbox.root(), "mv away peer");
    sandbox.status_becomes("the emptying shows", |status| {
        let reason = status.peer().halt_reason.as_deref();
        reason.is_some_and(|reason| reason.contains("the tree was emptied"))
    });
}

/// The same where the peer hears of it bit by bit: the last of it is held.
#[test]
fn a_tree_that_is_emptied_bit_by_bit_is_held() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    for bit in ["rm all/most/f1?", "rm -r all/most"] {
        sandbox.sh(&tree, bit);
        sandbox.flush();
    }
    sandbox.sh(&tree, "rm -r all kept");
    assert_held(&sandbox, "the tree was emptied");
    assert!(peer.join("kept").exists());
    resume(&sandbox, "--refill");
    sandbox.flush();
    assert!(tree.join("kept").exists());
    assert_same(&tree, &peer);
}

/// What programs write and remove again in a tree that holds nothing else empties nothing,
/// however often.
#[test]
fn files_that_come_and_go_are_no_emptying() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    for round in 0..6 {
        sandbox.sh(&tree, &format!("echo {round} >one; echo {round} >another"));
        sandbox.flush();
        assert!(peer.join("another").exists());
        sandbox.sh(&tree, "rm one another");
        sandbox.flush();
        assert!(!peer.join("another").exists());
    }
    assert!(sandbox.status().peer().halt_reason.is_none());
}

/// Half of the base is half of its files: directories neither make up for files nor count
/// as such.
#[test]
fn directories_do_not_count() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir $(seq -f e%g 150); mkdir -p all/most all/rest
         for i in $(seq 25); do echo $i >all/most/f$i; done
         for i in $(seq 15); do echo $i >all/rest/f$i; done",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&peer, "rmdir e1 e2 e3 e[4-9] e10?");
    sandbox.flush();
    assert!(!tree.join("e105").exists());
    sandbox.umount();
    sandbox.sh(&tree, "rmdir e??; rm all/rest/f1");
    sandbox.mount();
    sandbox.flush();
    assert!(!peer.join("e42").exists());
    assert_eq!(files(&peer), 39);
    sandbox.sh(&peer, "mv all/most ../outside");
    assert_held(&sandbox, "are gone from the peer");
    assert_eq!(files(&tree), 39);
}

/// A whole tree under another name is not gone.
#[test]
fn a_renamed_directory_is_no_wipe() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&peer, "mv all moved");
    sandbox.flush();
    assert_same(&tree, &peer);
    assert!(tree.join("moved/most/f42").exists());
    sandbox.umount();
    sandbox.sh(&tree, "mv moved all");
    sandbox.mount();
    sandbox.flush();
    assert_same(&tree, &peer);
    assert_eq!(files(&peer), 100);
}

/// Another mirror's directory in the place of the peer's.
#[test]
fn a_peer_replaced_by_another_mirror_is_not_taken_for_it() {
    let sandbox = mirrored();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let other = Sandbox::new();
    other.sh(&other.tree(), "echo other >other");
    other.mount();
    other.flush();
    other.umount();
    let swap = format!("mv peer away; cp -a '{}' peer", other.peer().display());
    sandbox.sh(sandbox.root(), &swap);
    sandbox.kill_agents();
    sandbox.sh(&tree, "echo on >goes");
    sandbox.status_becomes("it is refused", |status| {
        let reason = status.peer().halt_reason.as_deref();
        reason.is_some_and(|reason| reason.contains("belongs to mirror"))
    });
    sandbox.try_flush().expect_code(6);
    assert_eq!(files(&tree), 100);
    assert!(!tree.join("other").exists() && !peer.join("goes").exists());
    sandbox.sh(sandbox.root(), "rm -r peer; mv away peer");
    wait_until("the peer itself is taken up again", PROMPT, || {
        sandbox.try_flush().code == 0
    });
    assert_same(&tree, &peer);
}
