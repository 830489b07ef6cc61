//! "Text that was edited in different places merges by itself only where the user asked for
//! it", and a conflict is shown three ways.

use crate::conflict::{Pair, text};
use crate::support::assert_same;

const TEXT: &str = "seq 20 >dir/notes";

/// A pair with twenty lines in `dir/notes`, that was told what to do about conflicts.
fn pair(conflict: Option<&str>) -> Pair {
    let pair = Pair::new();
    pair.sandbox.sh(&pair.sandbox.tree(), TEXT);
    pair.sandbox.flush();
    if let Some(conflict) = conflict {
        pair.sandbox.umount();
        let tree = pair.sandbox.tree();
        let option = format!("--conflict={conflict}");
        pair.sandbox
            .run(["mount", &option, tree.to_str().unwrap()])
            .ok();
        pair.sandbox.flush();
    }
    pair
}

fn edited(first: &str, last: &str) -> String {
    let middle: Vec<String> = (2..20).map(|number| number.to_string()).collect();
    format!("{first}\n{}\n{last}\n", middle.join("\n"))
}

#[test]
fn edits_in_different_places_merge_where_that_was_asked_for() {
    let pair = pair(Some("merge"));
    pair.apart(
        "sed -i '1s/.*/mine/' dir/notes; chmod 600 dir/notes",
        "sed -i '20s/.*/theirs/' dir/notes",
    );
    pair.sandbox.flush();
    let merged = edited("mine", "theirs");
    assert_eq!(text(pair.here("dir/notes")), merged);
    assert_eq!(text(pair.there("dir/notes")), merged);
    assert!(pair.copies().is_empty());
    assert!(pair.sandbox.status().conflicts.is_empty());
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
    // What the merge replaced is in the trash on either side.
    let tree = pair.sandbox.tree();
    let listed = pair
        .sandbox
        .run(["trash", "list", tree.to_str().unwrap()])
        .ok();
    listed.expect_said(&["dir/notes"]);
    let log = pair.sandbox.run(["log", tree.to_str().unwrap()]).ok();
    log.expect_said(&["edited in different places here and on 127.0.0.1: merged"]);
    // Again, from there on; it is remembered for the next mount.
    pair.sandbox.umount();
    pair.sandbox.run(["mount", tree.to_str().unwrap()]).ok();
    pair.sandbox.flush();
    pair.apart(
        "sed -i '1s/.*/more/' dir/notes",
        "sed -i '20s/.*/again/' dir/notes",
    );
    pair.sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), edited("more", "again"));
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

#[test]
fn edits_of_the_same_line_are_a_conflict_all_the_same() {
    let pair = pair(Some("merge"));
    pair.apart(
        "sed -i '1s/.*/mine/' dir/notes",
        "sed -i '1s/.*/theirs/' dir/notes",
    );
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("dir/notes")), edited("mine", "20"));
    assert_eq!(text(pair.there("dir/notes")), edited("theirs", "20"));
    assert_eq!(pair.copies().len(), 1);
}

#[test]
fn nothing_merges_unasked_and_the_difference_is_shown_three_ways() {
    let mut pair = pair(None);
    pair.apart(
        "sed -i '1s/.*/mine/' dir/notes",
        "sed -i '20s/.*/theirs/' dir/notes",
    );
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("dir/notes")), edited("mine", "20"));
    let path = pair.here("dir/notes");
    let arguments = ["conflicts", "diff", path.to_str().unwrap()];
    let shown = pair.sandbox.run(arguments).ok();
    shown.expect_said(&[
        "--- dir/notes (agreed on)",
        "+++ dir/notes (here)",
        "-1\n+mine",
        "+++ dir/notes (on 127.0.0.1)",
        "-20\n+theirs",
    ]);
    // A command of the user's gets the two, and knows where the third is.
    pair.sandbox
        .set("MIRRORFS_DIFF", "cat \"$MIRRORFS_BASE\" | head -1; true");
    let shown = pair.sandbox.run(arguments).ok();
    assert_eq!(shown.stdout, "1\n");
}
