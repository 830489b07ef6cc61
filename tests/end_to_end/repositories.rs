//! "Git directories are one unit": with real Git on both sides.

use std::fs;
use std::path::{Path, PathBuf};

use crate::conflict::{Pair, text};
use crate::support::{Outcome, PROMPT, Sandbox, assert_same, assert_same_except, eventually};

/// Git as nobody in particular, without the configuration of this machine.
const GIT: &str = "git() { command git -c user.name=t -c user.email=t@t -c gc.auto=0 \
                   -c safe.directory='*' -c init.defaultBranch=main \"$@\"; }; ";

fn git(sandbox: &Sandbox, dir: &Path, script: &str) -> String {
    sandbox.sh(dir, &format!("set -e; {GIT}{script}"))
}

/// A pair whose directory `repo` has a repository with one commit.
fn repository() -> Pair {
    let pair = Pair::new();
    git(
        &pair.sandbox,
        &pair.sandbox.tree(),
        "git init -q repo; cd repo; echo one >a; echo one >b; git add .; git commit -qm one",
    );
    pair.sandbox.flush();
    pair
}

/// Runs a script in the repository on each side while neither hears of the other.
fn apart(pair: &Pair, here: &str, there: &str) {
    let script = |what: &str| format!("set -e; {GIT}cd repo; {what}");
    pair.apart(&script(here), &script(there));
}

fn sides(pair: &Pair) -> [PathBuf; 2] {
    [pair.here("repo"), pair.there("repo")]
}

fn conflicts(pair: &Pair, arguments: &[&str]) -> Outcome {
    let path = pair.here("repo/.git");
    let mut all = vec!["conflicts", arguments[0], path.to_str().unwrap()];
    all.extend(&arguments[1..]);
    pair.sandbox.run(all)
}

/// Both repositories are sound, and have these commits.
#[track_caller]
fn assert_sound(pair: &Pair, commits: &[&str]) {
    for side in sides(pair) {
        git(&pair.sandbox, &side, "git fsck --strict --no-dangling");
        for commit in commits {
            git(
                &pair.sandbox,
                &side,
                &format!("git cat-file -e {commit}^{{tree}}"),
            );
        }
    }
}

fn head(pair: &Pair, side: &Path) -> String {
    git(&pair.sandbox, side, "git rev-parse HEAD")
        .trim()
        .to_owned()
}

/// A commit on each side: one conflict for the directory, neither repository is touched but
/// for the objects, of which both have all. A merge here settles it.
#[test]
fn commits_on_both_sides_are_one_conflict() {
    let pair = repository();
    apart(
        &pair,
        "echo mine >a; git commit -qam mine",
        "echo theirs >b; git commit -qam theirs",
    );
    let [here, there] = sides(&pair);
    let (mine, theirs) = (head(&pair, &here), head(&pair, &there));
    pair.sandbox.try_flush().expect_code(3);
    let status = pair.sandbox.status();
    assert_eq!(status.conflicts.len(), 1, "{status:?}");
    assert_eq!(status.conflicts[0].path, "repo/.git");
    assert_eq!(status.conflicts[0].copy, None);
    assert_eq!(
        (head(&pair, &here), head(&pair, &there)),
        (mine.clone(), theirs.clone())
    );
    assert_sound(&pair, &[&mine, &theirs]);
    // "Kept in .mirrorfs/conflicts/ and never inside it", nor in the work tree.
    for side in &sides(&pair) {
        assert_eq!(pair.sandbox.sh(side, "find . -name '*conflict*'"), "");
    }
    // Nor is there anything that Git would list.
    assert_eq!(
        git(&pair.sandbox, &here, "git status --porcelain"),
        " M b\n"
    );

    conflicts(&pair, &["show"]).ok().expect_said(&[
        "repo/.git",
        &format!("refs/heads/main: {mine}"),
        &format!("refs/heads/main: {theirs}"),
        "--local|--remote",
    ]);
    conflicts(&pair, &["resolve", "--both"])
        .expect_code(1)
        .expect_said(&["is a Git directory", "merge"]);
    // The work tree has what the peer committed; that is no part of the conflict.
    let merge = format!("git checkout -q b; git merge -qm merged {theirs}");
    git(&pair.sandbox, &here, &merge);
    conflicts(&pair, &["resolve", "--local"]).ok();
    pair.sandbox.flush();
    assert_eq!(head(&pair, &there), head(&pair, &here));
    assert_eq!(git(&pair.sandbox, &there, "git status --porcelain"), "");
    assert_sound(&pair, &[&mine, &theirs, "HEAD"]);
    assert_same_except(&pair.sandbox.tree(), &pair.sandbox.peer(), |path| {
        path.ends_with(".git/index")
    });
    // What lost is in the peer's trash, and nothing is kept of the conflict here.
    let trash = pair
        .sandbox
        .reserved_contents(&pair.sandbox.peer(), "trash");
    assert!(
        trash.contains(&format!("{theirs}\n").into_bytes()),
        "{trash:?}"
    );
    eventually("what was kept here is gone", PROMPT, || {
        pair.sandbox.umount();
        let left = pair
            .sandbox
            .reserved_contents(&pair.sandbox.tree(), "conflicts");
        pair.sandbox
            .mount_with(pair.server.url(&pair.sandbox.peer()));
        left.is_empty()
            .then_some(())
            .ok_or_else(|| format!("{left:?}"))
    });
}

/// The peer's side wins when told so; a decision about a version that has moved on since is
/// not carried out.
#[test]
fn the_peers_repository_wins_when_told_so() {
    let pair = repository();
    apart(
        &pair,
        "echo mine >a; git commit -qam mine; git branch here",
        "echo theirs >b; git commit -qam theirs; git branch there",
    );
    let [here, there] = sides(&pair);
    let mine = head(&pair, &here);
    pair.sandbox.try_flush().expect_code(3);
    // Local commits change nothing about the conflict; the peer's make it another one.
    git(&pair.sandbox, &here, "git commit -q --allow-empty -m more");
    let more = head(&pair, &here);
    pair.sandbox.try_flush().expect_code(3);
    pair.server.link.refuse();
    git(
        &pair.sandbox,
        &there,
        "git commit -q --allow-empty -m newer",
    );
    let newer = head(&pair, &there);
    eventually("the peer is known to be away", PROMPT, || {
        let status = pair.sandbox.status();
        (status.peer().state == "unreachable")
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    });
    conflicts(&pair, &["resolve", "--remote"]).expect_code(4);
    pair.server.link.restore();
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(head(&pair, &here), more);
    conflicts(&pair, &["show"]).ok().expect_said(&[&newer]);
    conflicts(&pair, &["resolve", "--remote"]).ok();
    pair.sandbox.flush();
    assert_eq!(head(&pair, &here), newer);
    assert_eq!(head(&pair, &there), newer);
    assert_eq!(
        git(
            &pair.sandbox,
            &here,
            "git for-each-ref --format='%(refname:short)'"
        ),
        "main\nthere\n"
    );
    // The commits of the side that lost are still there to be named.
    assert_sound(&pair, &[&mine, &more, &newer]);
}

/// Commits here, work there: nothing is in conflict, and everything travels.
#[test]
fn commits_on_one_side_and_edits_on_the_other_agree() {
    let pair = repository();
    apart(
        &pair,
        "echo mine >a; git commit -qam mine; git branch topic; git gc -q",
        "echo theirs >b; echo fresh >c",
    );
    pair.sandbox.flush();
    let [here, there] = sides(&pair);
    assert_eq!(head(&pair, &here), head(&pair, &there));
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
    assert_sound(&pair, &["topic"]);
    for side in [&here, &there] {
        assert_eq!(
            git(&pair.sandbox, side, "git status --porcelain"),
            " M b\n?? c\n"
        );
    }
    // The same the other way round.
    apart(
        &pair,
        "echo more >d",
        "git add b c; git commit -qm theirs; git repack -adq; git pack-refs --all",
    );
    pair.sandbox.flush();
    assert_eq!(head(&pair, &here), head(&pair, &there));
    assert_sound(&pair, &["topic"]);
}

/// "Two indexes that differ only in their stat fields are equal": looking at the repository
/// on the peer, where every file has another inode, is no change to it.
#[test]
fn a_refreshed_index_is_no_change() {
    let pair = repository();
    let [here, there] = sides(&pair);
    let index = || fs::read(there.join(".git/index")).unwrap();
    let before = index();
    apart(
        &pair,
        "echo mine >a; git commit -qam mine",
        "git status; git update-index --really-refresh",
    );
    assert_ne!(index(), before, "the index on the peer was refreshed");
    pair.sandbox.flush();
    assert_eq!(head(&pair, &here), head(&pair, &there));
    assert!(pair.sandbox.status().conflicts.is_empty());

    // Refreshed on both sides, each keeps its own.
    git(&pair.sandbox, &there, "git status");
    git(&pair.sandbox, &here, "touch a b; git status");
    let (mine, theirs) = (fs::read(here.join(".git/index")).unwrap(), index());
    assert_ne!(mine, theirs);
    pair.sandbox.flush();
    assert_eq!(fs::read(here.join(".git/index")).unwrap(), mine);
    assert_eq!(index(), theirs);
    // And what the peer stages then still arrives.
    git(&pair.sandbox, &there, "echo x >x; git add x");
    pair.sandbox.flush();
    assert_eq!(
        git(&pair.sandbox, &here, "git status --porcelain"),
        "A  x\n"
    );
    assert!(pair.sandbox.status().conflicts.is_empty());
}

/// First contact with a clone that went another way, bare and by another name.
#[test]
fn first_contact_takes_a_repository_as_a_unit() {
    let mut sandbox = Sandbox::new();
    let server = crate::support::Server::start(&mut sandbox);
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    git(
        &sandbox,
        &tree,
        "git init -q w; cd w; git commit -q --allow-empty -m one",
    );
    git(
        &sandbox,
        &tree,
        "git clone -q --bare w store; rm -rf w; cp -a store same",
    );
    sandbox.sh(&tree, &format!("cp -a store same {}", peer.display()));
    let commit = "git commit-tree -m x HEAD^{tree} -p HEAD";
    let mine = git(
        &sandbox,
        &tree.join("store"),
        &format!("{commit} >c; cat c; git update-ref refs/heads/mine $(cat c); rm c"),
    );
    let theirs = git(
        &sandbox,
        &peer.join("store"),
        &format!("{commit} -m y >c; cat c; git update-ref refs/heads/theirs $(cat c); rm c"),
    );
    sandbox.mount_with(server.url(&peer));
    sandbox.try_flush().expect_code(3);
    let status = sandbox.status();
    let paths: Vec<_> = status
        .conflicts
        .iter()
        .map(|open| open.path.as_str())
        .collect();
    assert_eq!(paths, ["store"]);
    for side in [&tree, &peer] {
        let store = side.join("store");
        git(&sandbox, &store, "git fsck --strict --no-dangling");
        for commit in [&mine, &theirs] {
            git(
                &sandbox,
                &store,
                &format!("git cat-file -e {}", commit.trim()),
            );
        }
    }
    assert!(!tree.join("store/refs/heads/theirs").exists());
    assert_eq!(text(tree.join("store/refs/heads/mine")), mine);
}

/// The repository was deleted there and worked in here: all of it stays.
#[test]
fn a_repository_deleted_there_and_committed_to_here_stays_whole() {
    let pair = repository();
    apart(
        &pair,
        "echo mine >a; git commit -qam mine",
        "cd ..; rm -rf repo",
    );
    pair.sandbox.flush();
    let [here, there] = sides(&pair);
    assert_eq!(head(&pair, &here), head(&pair, &there));
    assert_sound(&pair, &["HEAD"]);
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}
