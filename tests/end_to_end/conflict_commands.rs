//! `mirrorfs conflicts`: looking at a conflict, and the ways to end it.

use std::fs;

use crate::conflict::{Pair, text};
use crate::support::{Outcome, PROMPT, Sandbox, assert_same, eventually};

/// A pair with `dir/notes` in conflict.
fn in_conflict() -> Pair {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair
}

fn conflicts(pair: &Pair, command: &str, path: &str, switches: &[&str]) -> Outcome {
    let path = pair.here(path);
    let mut arguments = vec!["conflicts", command, path.to_str().unwrap()];
    arguments.extend(switches);
    pair.sandbox.run(arguments)
}

fn resolve(pair: &Pair, how: &str) -> Outcome {
    conflicts(pair, "resolve", "dir/notes", &[how])
}

fn copy_name(pair: &Pair) -> String {
    let copies = pair.copies();
    assert_eq!(copies.len(), 1, "{copies:?}");
    copies[0].file_name().unwrap().to_str().unwrap().to_owned()
}

/// No conflict is left, nor any artefact, and both sides are the same.
#[track_caller]
fn assert_settled(pair: &Pair) {
    pair.sandbox.flush();
    let status = pair.sandbox.status();
    assert!(status.conflicts.is_empty(), "{status:?}");
    assert!(pair.copies().is_empty(), "{:?}", pair.copies());
    let infos = pair
        .sandbox
        .names_ending(&pair.here("dir"), ".conflict-info");
    assert!(infos.is_empty(), "{infos:?}");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

fn trash(pair: &Pair, root: &std::path::Path) -> Vec<String> {
    let outcome = pair
        .sandbox
        .run(["trash", "list", root.to_str().unwrap(), "--json"])
        .ok();
    let list: Vec<serde_json::Value> = serde_json::from_str(&outcome.stdout).unwrap();
    list.iter()
        .map(|kept| kept["path"].as_str().unwrap().to_owned())
        .collect()
}

/// "What happened, both versions' size, time, hash, where the artefacts are", mounted and
/// not.
#[test]
fn show_tells_all_there_is_to_know() {
    let pair = in_conflict();
    let copy = format!("dir/{}", copy_name(&pair));
    let hash = |content: &[u8]| blake3::hash(content).to_string();
    let (mine, theirs, base) = (hash(b"mine\n"), hash(b"theirs\n"), hash(b"base\n"));
    let says = |pair: &Pair| {
        conflicts(pair, "show", "dir/notes", &[])
            .ok()
            .expect_said(&[
                "dir/notes",
                "5 bytes",
                "7 bytes",
                &mine,
                &theirs,
                &base,
                &format!("{copy}: the version of the peer"),
                ".conflict-info",
                "conflicts diff",
                "resolve",
            ])
    };
    says(&pair);
    pair.sandbox.try_umount();
    pair.sandbox.assert_down();
    says(&pair);
    fs::write(pair.here(&copy), "edited\n").unwrap();
    conflicts(&pair, "show", "dir/notes", &[])
        .ok()
        .expect_said(&["edited here"]);
    conflicts(&pair, "show", "dir/other", &[])
        .expect_code(1)
        .expect_said(&["no conflict at dir/other", "conflicts list"]);
}

#[test]
fn diff_compares_the_two_versions() {
    let mut pair = in_conflict();
    let outcome = conflicts(&pair, "diff", "dir/notes", &[]).ok();
    for line in ["-base\n+mine\n", "-base\n+theirs\n"] {
        assert!(outcome.stdout.contains(line), "{outcome}");
    }
    let (here, copy) = (pair.here("dir/notes"), pair.copies().remove(0));
    pair.sandbox.set("MIRRORFS_DIFF", "echo compared");
    let outcome = conflicts(&pair, "diff", "dir/notes", &[]).ok();
    let expected = format!("compared {} {}\n", here.display(), copy.display());
    assert_eq!(outcome.stdout, expected);
    pair.sandbox.set("MIRRORFS_DIFF", "exit 7;");
    conflicts(&pair, "diff", "dir/notes", &[])
        .expect_code(1)
        .expect_said(&["exit 7", "failed"]);
}

#[test]
fn local_wins_when_told_so() {
    let pair = in_conflict();
    resolve(&pair, "--local").ok();
    assert_settled(&pair);
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
    assert_eq!(trash(&pair, &pair.sandbox.peer()), ["dir/notes"]);
}

#[test]
fn remote_wins_when_told_so() {
    let pair = in_conflict();
    resolve(&pair, "--remote").ok();
    assert_settled(&pair);
    assert_eq!(text(pair.here("dir/notes")), "theirs\n");
    let kept = trash(&pair, &pair.sandbox.tree());
    assert!(kept.contains(&"dir/notes".to_owned()), "{kept:?}");
}

/// "Keep the local file and keep the remote version as an ordinary, mirrored file beside
/// it under a name of its own."
#[test]
fn both_are_kept_when_told_so() {
    let pair = in_conflict();
    fs::write(pair.here("dir/notes.theirs"), "in the way\n").unwrap();
    resolve(&pair, "--both")
        .ok()
        .expect_said(&["dir/notes.theirs-2"]);
    assert_settled(&pair);
    for side in [pair.sandbox.tree(), pair.sandbox.peer()] {
        assert_eq!(text(side.join("dir/notes")), "mine\n");
        assert_eq!(text(side.join("dir/notes.theirs")), "in the way\n");
        assert_eq!(text(side.join("dir/notes.theirs-2")), "theirs\n");
    }
}

/// "The local file as it is now is the result, and the artefacts go", edited or not: an
/// edited one to the trash.
#[test]
fn a_merged_file_is_the_result() {
    let pair = in_conflict();
    fs::write(&pair.copies()[0], "half a merge\n").unwrap();
    fs::write(pair.here("dir/notes"), "merged\n").unwrap();
    resolve(&pair, "--merged").ok();
    assert_settled(&pair);
    assert_eq!(text(pair.there("dir/notes")), "merged\n");
    let kept = trash(&pair, &pair.sandbox.tree());
    assert!(
        kept.iter().any(|path| path.ends_with(".conflict")),
        "{kept:?}"
    );
}

/// An edited copy stops every way that would lose the edits.
#[test]
fn an_edited_copy_is_not_thrown_away_unasked() {
    let pair = in_conflict();
    let copy = copy_name(&pair);
    fs::write(pair.here("dir").join(&copy), "half a merge\n").unwrap();
    for how in ["--local", "--remote", "--both"] {
        resolve(&pair, how).expect_code(1).expect_said(&[
            &copy,
            "edited",
            "would be lost",
            "--merged",
            "--discard-edits",
        ]);
    }
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("dir").join(&copy)), "half a merge\n");
    assert_eq!(text(pair.there("dir/notes")), "theirs\n");
    conflicts(
        &pair,
        "resolve",
        "dir/notes",
        &["--remote", "--discard-edits"],
    )
    .ok();
    assert_settled(&pair);
    assert_eq!(text(pair.here("dir/notes")), "theirs\n");
    let kept = trash(&pair, &pair.sandbox.tree());
    assert!(kept.contains(&format!("dir/{copy}")), "{kept:?}");
}

/// Somebody decides while the peer cannot be reached, and the peer's user edits on: the
/// decision was not about that version, which stays, and becomes the copy.
#[test]
fn a_decision_is_about_the_version_on_record_only() {
    let pair = in_conflict();
    pair.server.link.refuse();
    eventually("the peer is known to be away", PROMPT, || {
        let status = pair.sandbox.status();
        (status.peer().state == "unreachable")
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    });
    pair.sandbox
        .sh(&pair.there("dir"), "echo 'theirs again' >notes");
    resolve(&pair, "--local")
        .expect_code(4)
        .expect_said(&["yet to be told"]);
    pair.server.link.restore();
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.there("dir/notes")), "theirs again\n");
    assert_eq!(text(pair.here("dir/notes")), "mine\n");
    assert_eq!(text(&pair.copies()[0]), "theirs again\n");
    resolve(&pair, "--local").ok();
    assert_settled(&pair);
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
}

/// A file against a directory: whichever wins, all of the other goes to the trash.
#[test]
fn a_file_against_a_directory_is_settled_either_way() {
    for (how, winner) in [("--local", "mine\n"), ("--remote", "theirs\n")] {
        let pair = Pair::new();
        pair.apart("echo mine >fresh", "mkdir fresh; echo theirs >fresh/in");
        pair.sandbox.try_flush().expect_code(3);
        conflicts(&pair, "show", "fresh", &[])
            .ok()
            .expect_said(&["a directory", "5 bytes"]);
        conflicts(&pair, "diff", "fresh", &[])
            .expect_code(1)
            .expect_said(&["not in the tree"]);
        conflicts(&pair, "resolve", "fresh", &["--both"])
            .expect_code(1)
            .expect_said(&["has a directory", "mv fresh"]);
        conflicts(&pair, "resolve", "fresh", &[how]).ok();
        assert_settled(&pair);
        let (loser, path) = match how {
            "--local" => (pair.sandbox.peer(), "fresh"),
            _ => (pair.sandbox.tree(), "fresh/in"),
        };
        assert_eq!(text(pair.there(path)), winner);
        let kept = trash(&pair, &loser);
        let lost = if how == "--local" {
            "fresh/in"
        } else {
            "fresh"
        };
        assert!(kept.contains(&lost.to_owned()), "{kept:?}");
    }
}

/// The same where the directory is here.
#[test]
fn a_directory_against_a_file_is_settled_either_way() {
    for (how, path, winner) in [
        ("--local", "fresh/in", "mine\n"),
        ("--remote", "fresh", "theirs\n"),
    ] {
        let pair = Pair::new();
        pair.apart("mkdir fresh; echo mine >fresh/in", "echo theirs >fresh");
        pair.sandbox.try_flush().expect_code(3);
        conflicts(&pair, "resolve", "fresh", &[how]).ok();
        assert_settled(&pair);
        assert_eq!(text(pair.there(path)), winner);
    }
}

/// Two peers, each with a version of its own: not both can win, and all can be kept.
#[test]
fn the_versions_of_two_peers_are_both_kept() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let other = sandbox.root().join("other");
    sandbox.sh(&tree, "echo base >x");
    for peer in [&peer, &other] {
        sandbox.mount_with(peer);
        sandbox.flush();
        sandbox.umount();
    }
    sandbox.sh(&tree, "echo mine >x");
    sandbox.sh(&peer, "echo one >x");
    sandbox.sh(&other, "echo two >x");
    sandbox.mount();
    sandbox.try_flush().expect_code(3);
    let x = tree.join("x");
    let resolve = |how| sandbox.run(["conflicts", "resolve", x.to_str().unwrap(), how]);
    resolve("--remote")
        .expect_code(1)
        .expect_said(&["other and peer have different versions", "--both"]);
    resolve("--both")
        .ok()
        .expect_said(&["x.theirs and x.theirs-2"]);
    sandbox.flush();
    assert_eq!(text(&x), "mine\n");
    assert_eq!(sandbox.sh(&tree, "sort x.theirs*"), "one\ntwo\n");
    assert_same(&tree, &peer);
    assert_same(&tree, &other);
}

#[test]
fn exactly_one_way_is_to_be_named() {
    let pair = in_conflict();
    conflicts(&pair, "resolve", "dir/notes", &[]).expect_code(2);
    conflicts(&pair, "resolve", "dir/notes", &["--local", "--remote"]).expect_code(2);
    conflicts(
        &pair,
        "resolve",
        "dir/notes",
        &["--merged", "--discard-edits"],
    )
    .expect_code(2);
    resolve(&pair, "--local").ok();
    resolve(&pair, "--local")
        .expect_code(1)
        .expect_said(&["no conflict at dir/notes"]);
}
