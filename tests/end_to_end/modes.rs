//! "Modes: two-way (default), push-only, pull-only."

use crate::conflict::text;
use crate::support::{Sandbox, assert_same};

fn mount(sandbox: &Sandbox, mode: &str) {
    let tree = sandbox.tree();
    let option = format!("--mode={mode}");
    sandbox.run(["mount", &option, tree.to_str().unwrap()]).ok();
}

/// Each mode lets changes travel its way, leaves the sender alone, is remembered, and holds
/// back what goes the other way until somebody says otherwise: then all of it travels.
#[test]
fn changes_travel_the_way_that_was_chosen() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir d; echo 1 >d/here; echo 1 >d/there; echo 1 >d/gone; echo 1 >d/lost",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();

    mount(&sandbox, "push-only");
    sandbox.sh(&tree, "echo 2 >d/here");
    sandbox.sh(&peer, "echo 2 >d/there; echo new >d/new-there; rm d/gone");
    sandbox.flush();
    assert_eq!(text(peer.join("d/here")), "2\n");
    assert_eq!(text(tree.join("d/there")), "1\n");
    assert!(!tree.join("d/new-there").exists());
    assert!(tree.join("d/gone").exists());
    sandbox.umount();
    sandbox.run(["mount", tree.to_str().unwrap()]).ok();
    assert_eq!(
        sandbox.status().mirror.mode,
        "push-only",
        "it is remembered"
    );
    sandbox.umount();

    mount(&sandbox, "pull-only");
    sandbox.sh(&tree, "echo 3 >d/here; echo new >d/new-here; rm d/lost");
    sandbox.flush();
    assert_eq!(text(tree.join("d/there")), "2\n");
    assert_eq!(text(tree.join("d/new-there")), "new\n");
    assert!(!tree.join("d/gone").exists());
    assert_eq!(text(peer.join("d/here")), "2\n");
    assert!(!peer.join("d/new-here").exists());
    assert!(peer.join("d/lost").exists());
    // Something else travels meanwhile, so that what is held back is long past.
    sandbox.sh(&peer, "echo 4 >d/there");
    sandbox.flush();
    sandbox.umount();

    mount(&sandbox, "two-way");
    sandbox.flush();
    assert_eq!(text(peer.join("d/here")), "3\n");
    assert_eq!(text(peer.join("d/new-here")), "new\n");
    assert!(!peer.join("d/lost").exists());
    assert_same(&tree, &peer);
}
