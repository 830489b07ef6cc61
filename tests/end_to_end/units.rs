//! "One that is refused stops the rest of its directory's operations (its Git directory's)":
//! on the mounted side nobody is shown a moment of the peer's in parts.

use std::fs::OpenOptions;

use crate::conflict::text;
use crate::support::{PROMPT, Sandbox, assert_same, eventually};

/// While a program has the index open, no ref of a commit that the peer has made comes in.
/// Objects may, which nothing refers to. Then all of it does.
#[test]
fn a_git_directory_comes_in_whole_or_not_at_all() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &peer,
        "git init -q -b main repo; cd repo; echo one >x; git add x; git commit -qm one",
    );
    sandbox.mount();
    sandbox.flush();
    assert_same(&tree, &peer);
    let look = "cd repo; git fsck --strict --no-dangling; git rev-parse HEAD
                cat .git/logs/HEAD .git/COMMIT_EDITMSG";
    let before = sandbox.sh(&tree, look);
    let held = OpenOptions::new()
        .append(true)
        .open(tree.join("repo/.git/index"))
        .unwrap();
    sandbox.sh(
        &peer,
        "cd repo; echo two >x; echo more >y; git add x y; git commit -qm two; git branch other",
    );
    for _ in 0..2 {
        // Twice: what waited once goes on waiting.
        let flushed = sandbox.try_flush().expect_code(1);
        flushed.expect_said(&[".git/index", "open for writing"]);
        assert_eq!(sandbox.sh(&tree, look), before);
    }
    drop(held);
    sandbox.flush();
    assert_same(&tree, &peer);
    let after = sandbox.sh(
        &tree,
        "cd repo; git fsck --strict; git log --format=%s; git status --porcelain",
    );
    assert_eq!(after, "two\none\n");
    sandbox.umount();
}

/// A program may keep a file open for days. Its directory does not wait that long.
#[test]
fn a_file_that_stays_open_does_not_hold_its_directory_for_ever() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&peer, "mkdir d; for f in a log z; do echo old >d/$f; done");
    sandbox.mount();
    sandbox.flush();
    let held = OpenOptions::new()
        .append(true)
        .open(tree.join("d/log"))
        .unwrap();
    sandbox.sh(
        &peer,
        "for f in a log new z; do echo theirs >t; mv t d/$f; done",
    );
    eventually("the rest of the directory", PROMPT, || {
        let _ = sandbox.try_flush();
        let shown = sandbox.sh(&tree, "cat d/a d/new d/z 2>&1 || true");
        if shown == "theirs\n".repeat(3) {
            Ok(())
        } else {
            Err(shown)
        }
    });
    assert_eq!(text(tree.join("d/log")), "old\n");
    drop(held);
    sandbox.flush();
    assert_same(&tree, &peer);
    sandbox.umount();
}
