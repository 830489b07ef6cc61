//! "A corrupt or lost journal costs a rescan and a first-contact merge; never data."

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::conflict::text;
use crate::support::{Sandbox, assert_same, assert_same_except};

fn journal(sandbox: &Sandbox) -> PathBuf {
    let mirrors = sandbox.state().join("mirrors");
    let mut found = fs::read_dir(mirrors)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    found.next().unwrap().join("journal.db")
}

/// A tree with a peer, in agreement, and what happens to the journal while nothing runs.
fn after(damage: impl Fn(&Path)) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir d; echo base >d/x; echo base >d/y; seq 500 | split -l1 - d/f",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    damage(&journal(&sandbox));
    sandbox
}

/// The mirror goes on as it was, with the peers it had, says what happened, and loses
/// nothing that was edited meanwhile on either side.
fn assert_goes_on(sandbox: &Sandbox, said: &[&str]) {
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "echo mine >d/x; echo new >d/here");
    sandbox.sh(&peer, "echo theirs >d/y; echo new >d/there");
    // Without naming the peer: that it has one is known.
    sandbox
        .run(["mount", tree.to_str().unwrap()])
        .ok()
        .expect_said(said);
    let flushed = sandbox.try_flush();
    assert!(matches!(flushed.code, 0 | 3), "{flushed}");
    assert_eq!(text(tree.join("d/x")), "mine\n");
    assert_eq!(text(peer.join("d/y")), "theirs\n");
    for side in [&tree, &peer] {
        assert_eq!(text(side.join("d/here")), "new\n");
        assert_eq!(text(side.join("d/there")), "new\n");
        assert_eq!(
            fs::read_dir(side.join("d"))
                .unwrap()
                .filter(|entry| {
                    entry
                        .as_ref()
                        .unwrap()
                        .file_name()
                        .to_string_lossy()
                        .starts_with('f')
                })
                .count(),
            500
        );
    }
    // What differs is listed, and nothing else differs.
    let status = sandbox.status();
    assert_eq!(status.journal.reason, None, "both sides agree again");
    assert_same_except(&tree, &peer, |path| {
        status
            .conflicts
            .iter()
            .any(|open| path.starts_with(&open.path))
    });
    for open in &status.conflicts {
        let path = tree.join(&open.path);
        sandbox
            .run(["conflicts", "resolve", path.to_str().unwrap(), "--local"])
            .ok();
    }
    sandbox.flush();
    assert_same(&tree, &peer);
}

fn aside(sandbox: &Sandbox) -> Vec<PathBuf> {
    sandbox
        .sh(
            journal(sandbox).parent().unwrap(),
            "ls -d journal.db.damaged-* 2>/dev/null || true",
        )
        .lines()
        .map(|name| journal(sandbox).with_file_name(name))
        .collect()
}

#[test]
fn a_journal_with_flipped_bytes_is_kept_aside_and_begun_anew() {
    let sandbox = after(|journal| {
        let file = OpenOptions::new().write(true).open(journal).unwrap();
        let pages = file.metadata().unwrap().len() / 4096;
        for page in 3..pages {
            file.write_all_at(&[0x5a; 64], page * 4096).unwrap();
        }
    });
    let damaged = fs::read(journal(&sandbox)).unwrap();
    assert_goes_on(&sandbox, &["is damaged", "was moved to", "may come back"]);
    let kept = aside(&sandbox);
    assert_eq!(kept.len(), 1);
    assert_eq!(fs::read(&kept[0]).unwrap(), damaged);
}

#[test]
fn a_truncated_journal_is_kept_aside_and_begun_anew() {
    let sandbox = after(|journal| {
        let file = OpenOptions::new().write(true).open(journal).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    });
    assert_goes_on(&sandbox, &["is damaged", "was moved to"]);
    assert_eq!(aside(&sandbox).len(), 1);
}

#[test]
fn a_deleted_journal_is_missed_and_begun_anew() {
    let sandbox = after(|journal| fs::remove_file(journal).unwrap());
    assert_goes_on(&sandbox, &["is gone", "may come back"]);
}

/// Until both sides have agreed again, status says what happened.
#[test]
fn status_says_that_the_journal_began_anew() {
    let sandbox = after(|journal| fs::remove_file(journal).unwrap());
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.run(["mount", sandbox.tree().to_str().unwrap()]);
    let status = sandbox.status();
    let reason = status.journal.reason.clone().unwrap_or_default();
    assert!(reason.contains("is gone"), "{status:?}");
    sandbox.sh(sandbox.root(), "mv away peer");
    sandbox.flush();
    assert_eq!(sandbox.status().journal.reason, None);
}
