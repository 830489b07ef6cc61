//! "`mirrorfs sync DIR PEER [--dry-run] [--push-only|--pull-only] [--force] [--verbose]`":
//! each does what it says. "Every mode has a dry run that prints the plan and touches
//! nothing."

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use crate::conflict::text;
use crate::first_contact::PROJECT;
use crate::support::{Outcome, Sandbox, Server, assert_same};

fn sync(sandbox: &Sandbox, peer: impl AsRef<OsStr>, flags: &[&str]) -> Outcome {
    let tree = sandbox.tree();
    let named = [OsStr::new("sync"), tree.as_ref(), peer.as_ref()];
    let outcome = sandbox.run(named.into_iter().chain(flags.iter().map(OsStr::new)));
    sandbox.assert_down();
    outcome
}

/// Everything there is to see of a directory: names, inodes, sizes, modes, and all times
/// that move when something is touched. What is in a `.mirrorfs` is the agent's own; that
/// one appears would show in the times of its directory.
fn seen(sandbox: &Sandbox, dir: &Path) -> String {
    if !dir.exists() {
        return "nothing".to_owned();
    }
    sandbox.sh(
        dir,
        r"find . -name .mirrorfs -prune -o -printf '%p %y %i %s %m %T@ %C@\n' | sort",
    )
}

/// The files of the state directory. (Reading a database makes and removes files beside it.)
fn recorded(sandbox: &Sandbox) -> String {
    let find = r"find mirrors -type f ! -name '*-shm' ! -name '*-wal' -printf '%p %i %s %T@\n'";
    sandbox.sh(
        &sandbox.state(),
        &format!("mkdir -p mirrors; {find} | sort"),
    )
}

/// Runs something that must not leave a trace in the tree, on the peer, or in the state.
fn untouched(sandbox: &Sandbox, run: impl FnOnce() -> Outcome) -> Outcome {
    let look = || {
        (
            seen(sandbox, &sandbox.tree()),
            seen(sandbox, &sandbox.peer()),
            recorded(sandbox),
        )
    };
    let before = look();
    let outcome = run();
    assert_eq!(look(), before, "{outcome}");
    outcome
}

fn lines(outcome: Outcome) -> Vec<String> {
    let outcome = outcome.ok();
    let mut lines: Vec<_> = outcome.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// First contact, by a dry run, with a directory here and one behind SSH, whether it exists
/// or not: no identity, no journal, no directory.
#[test]
fn a_dry_run_of_first_contact_leaves_no_trace() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), "mkdir d; echo 1 >d/here; echo 1 >both");
    let (peer, url) = (sandbox.peer(), server.url(&sandbox.peer()));
    for to in [peer.as_os_str(), url.as_ref()] {
        if peer.exists() {
            fs::remove_dir_all(&peer).unwrap();
        }
        let plan = lines(untouched(&sandbox, || sync(&sandbox, to, &["--dry-run"])));
        assert!(!peer.exists());
        assert!(!sandbox.state().join("agents").exists());
        assert!(!sandbox.root().join("agent-state/agents").exists());
        assert_eq!(plan.len(), 3, "{plan:?}");
        assert!(
            plan.iter()
                .all(|line| line.contains("push") && line.contains("create")),
            "{plan:?}"
        );

        fs::create_dir(&peer).unwrap();
        sandbox.sh(&peer, "echo 1 >there; echo 2 >both");
        let plan = lines(untouched(&sandbox, || sync(&sandbox, to, &["--dry-run"])));
        assert_eq!(plan.len(), 4, "{plan:?}");
        for (word, path) in [("push", "d/here"), ("pull", "there"), ("conflict", "both")] {
            assert!(
                plan.iter()
                    .any(|line| line.contains(word) && line.contains(path)),
                "{plan:?}"
            );
        }
    }
    // And then in earnest.
    sync(&sandbox, &peer, &[]).expect_code(3);
    assert!(peer.join("d/here").exists() && sandbox.tree().join("there").exists());
}

/// Between two that know each other, in each mode.
#[test]
fn each_mode_has_a_dry_run() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, PROJECT);
    sync(&sandbox, &peer, &[]).ok();
    sandbox.sh(&tree, "echo more >>docs/long; rm src/main.rs");
    sandbox.sh(&peer, "echo new >new; chmod 640 docs/nothing");
    let dry = |flags: &[&str]| lines(untouched(&sandbox, || sync(&sandbox, &peer, flags)));
    let has = |plan: &[String], words: [&str; 3]| {
        plan.iter()
            .any(|line| words.iter().all(|word| line.contains(word)))
    };

    let plan = dry(&["--dry-run"]);
    assert!(has(&plan, ["push", "replace", "docs/long"]), "{plan:?}");
    assert!(has(&plan, ["push", "delete", "src/main.rs"]), "{plan:?}");
    assert!(has(&plan, ["pull", "create", "new"]), "{plan:?}");
    assert!(has(&plan, ["pull", "metadata", "docs/nothing"]), "{plan:?}");
    assert!(!plan.iter().any(|line| line.contains("held")), "{plan:?}");

    let plan = dry(&["--dry-run", "--push-only"]);
    assert!(has(&plan, ["push", "replace", "docs/long"]), "{plan:?}");
    assert!(has(&plan, ["held", "mode", "new"]), "{plan:?}");
    assert!(!plan.iter().any(|line| line.contains("pull")), "{plan:?}");

    let plan = dry(&["--dry-run", "--pull-only"]);
    assert!(has(&plan, ["pull", "create", "new"]), "{plan:?}");
    assert!(has(&plan, ["held", "mode", "docs/long"]), "{plan:?}");
    assert!(!plan.iter().any(|line| line.contains("push")), "{plan:?}");

    // Whatever is compared anew, nothing comes of it either.
    let plan = dry(&["--dry-run", "--force"]);
    assert!(has(&plan, ["push", "replace", "docs/long"]), "{plan:?}");
    assert!(has(&plan, ["pull", "create", "new"]), "{plan:?}");

    sync(&sandbox, &peer, &[]).ok();
    assert_same(&tree, &peer);
    assert!(dry(&["--dry-run"]).is_empty());
}

/// A mode on the command line holds for that round; what it held back travels with the next.
#[test]
fn changes_travel_the_way_that_a_flag_says() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, "echo 1 >here; echo 1 >there; echo 1 >gone");
    sync(&sandbox, &peer, &[]).ok();
    sandbox.sh(&tree, "echo 2 >here");
    sandbox.sh(&peer, "echo 2 >there; rm gone");

    sync(&sandbox, &peer, &["--push-only"]).ok();
    assert_eq!(
        (text(peer.join("here")), text(tree.join("there"))),
        ("2\n".into(), "1\n".into())
    );
    assert!(tree.join("gone").exists());
    sandbox.sh(&tree, "echo 3 >here");
    sync(&sandbox, &peer, &["--pull-only"]).ok();
    assert_eq!(
        (text(peer.join("here")), text(tree.join("there"))),
        ("2\n".into(), "2\n".into())
    );
    assert!(!tree.join("gone").exists());
    sync(&sandbox, &peer, &[]).ok();
    assert_eq!(text(peer.join("here")), "3\n");
    assert_same(&tree, &peer);

    sync(&sandbox, &peer, &["--push-only", "--pull-only"]).expect_code(2);
}

/// What both sides had agreed on is not forgotten by comparing anew: a deletion stays one,
/// and what is equal is not sent.
#[test]
fn force_compares_everything_anew() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, PROJECT);
    sync(&sandbox, &peer, &[]).ok();
    sandbox.sh(&tree, "rm docs/long");
    sandbox.sh(&peer, "echo there >there");
    let inode = sandbox.sh(&peer, "stat -c %i src/main.rs");
    sync(&sandbox, &peer, &["--force"]).ok();
    assert!(!peer.join("docs/long").exists() && tree.join("there").exists());
    assert_same(&tree, &peer);
    assert_eq!(sandbox.sh(&peer, "stat -c %i src/main.rs"), inode);
}

#[test]
fn verbose_says_more() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo 1 >file");
    let quiet = sync(&sandbox, sandbox.peer(), &[]).ok();
    sandbox.sh(&sandbox.tree(), "echo 2 >file");
    let verbose = sync(&sandbox, sandbox.peer(), &["--verbose"]).ok();
    assert!(!quiet.stderr.contains("push create file"), "{quiet}");
    assert!(verbose.stderr.contains("push replace file"), "{verbose}");
}

/// They are for a directory that is not mounted, and say so of one that is.
#[test]
fn a_mounted_directory_takes_none_of_them() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let tree = sandbox.tree();
    for flag in ["--dry-run", "--push-only", "--pull-only", "--force"] {
        let outcome = sandbox.run([OsStr::new("sync"), tree.as_ref(), flag.as_ref()]);
        let outcome = outcome.expect_code(1);
        assert!(
            outcome.stderr.contains(flag) && outcome.stderr.contains("umount"),
            "{outcome}"
        );
    }
    sandbox.umount();
}
