//! The way on: from a brake by `mirrorfs resume`, from a conflict by
//! `mirrorfs conflicts resolve`.

use std::fs;

use crate::support::{Sandbox, assert_same};

/// A hundred files on both sides, and then none but one on the peer's.
fn wiped() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "for i in $(seq 100); do echo $i >f$i; done",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.peer(), "rm f?? f100 f[1-8]");
    sandbox.status_becomes("the brake shows", |status| {
        status.peer().halt_reason.is_some()
    });
    sandbox.try_flush().expect_code(6);
    sandbox
}

fn files(sandbox: &Sandbox) -> usize {
    fs::read_dir(sandbox.tree()).unwrap().count()
}

/// "`mirrorfs resume --refill` (bring them back)": all of them, also those that went before
/// there were enough of them for a brake.
#[test]
fn a_refill_brings_back_what_was_deleted() {
    let sandbox = wiped();
    let tree = sandbox.tree();
    sandbox
        .run(["resume".as_ref(), tree.as_os_str(), "--refill".as_ref()])
        .ok();
    sandbox.flush();
    assert_eq!(files(&sandbox), 100);
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.status().peer().halt_reason.is_none());
}

/// A wipe that begins slowly takes what it takes until it is one; a refill undoes that too.
#[test]
fn a_refill_brings_back_what_a_slow_wipe_took() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir d; for i in $(seq 60); do echo $i >d/f$i; done",
    );
    sandbox.mount();
    sandbox.flush();
    for i in 1..=3 {
        sandbox.sh(&sandbox.peer(), &format!("rm d/f{i}"));
        sandbox.flush();
    }
    assert!(!sandbox.tree().join("d/f1").exists());
    sandbox.sh(&sandbox.peer(), "rm -r d");
    sandbox.status_becomes("the brake shows", |status| {
        status.peer().halt_reason.is_some()
    });
    let tree = sandbox.tree();
    sandbox
        .run(["resume".as_ref(), tree.as_os_str(), "--refill".as_ref()])
        .ok();
    sandbox.flush();
    assert_eq!(fs::read_dir(tree.join("d")).unwrap().count(), 60);
    assert_same(&tree, &sandbox.peer());
}

/// What programs on the peer write under one name and rename to another is no wipe.
#[test]
fn files_that_come_and_go_are_no_wipe() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "for i in $(seq 0 9); do echo $i >f$i; done",
    );
    sandbox.mount();
    sandbox.flush();
    for i in 0..30 {
        let file = format!("f{}", i % 10);
        sandbox.sh(&sandbox.peer(), &format!("echo new {i} >{file}.tmp"));
        sandbox.flush();
        assert!(sandbox.tree().join(format!("{file}.tmp")).exists());
        sandbox.sh(&sandbox.peer(), &format!("mv {file}.tmp {file}"));
        sandbox.flush();
    }
    assert!(sandbox.status().peer().halt_reason.is_none());
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "or `--allow-deletions`": what goes is in the trash.
#[test]
fn allowed_deletions_go_through() {
    let sandbox = wiped();
    let tree = sandbox.tree();
    sandbox
        .run([
            "resume".as_ref(),
            tree.as_os_str(),
            "--allow-deletions".as_ref(),
        ])
        .ok();
    sandbox.flush();
    assert_eq!(files(&sandbox), 1);
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
    let kept = sandbox.reserved_contents(&sandbox.tree(), "trash");
    assert!(
        kept.contains(&b"17\n".to_vec()),
        "{} in the trash",
        kept.len()
    );
}

/// A conflict is listed and settled for either side; the side that lost is in the trash.
#[test]
fn a_conflict_is_settled_for_either_side() {
    for (side, winner, loser) in [
        ("--local", "mine\n", "theirs\n"),
        ("--remote", "theirs\n", "mine\n"),
    ] {
        let sandbox = Sandbox::new();
        sandbox.sh(&sandbox.tree(), "echo base >notes");
        sandbox.mount();
        sandbox.flush();
        sandbox.umount();
        sandbox.sh(&sandbox.tree(), "echo mine >notes");
        sandbox.sh(&sandbox.peer(), "echo theirs >notes");
        sandbox.mount();
        sandbox.try_flush().expect_code(3);
        let tree = sandbox.tree();
        let listed = sandbox.run(["conflicts".as_ref(), "list".as_ref(), tree.as_os_str()]);
        assert!(listed.expect_code(3).stdout.starts_with("notes"));
        let notes = tree.join("notes");
        sandbox
            .run([
                "conflicts".as_ref(),
                "resolve".as_ref(),
                notes.as_os_str(),
                side.as_ref(),
            ])
            .ok();
        sandbox.flush();
        assert_eq!(fs::read_to_string(&notes).unwrap(), winner);
        assert_same(&sandbox.tree(), &sandbox.peer());
        let (lost, trash) = if side == "--local" {
            (sandbox.peer(), "trash")
        } else {
            (sandbox.tree(), "trash")
        };
        sandbox.umount();
        let kept = sandbox.reserved_contents(&lost, trash);
        assert!(kept.contains(&loser.as_bytes().to_vec()), "{side}");
    }
}
