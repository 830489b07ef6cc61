//! `mirrorfs log`: what changed, when, on which side, how far it got, and what was decided.

use std::fs;

use serde_json::Value;

use crate::conflict::Pair;
use crate::support::{PROMPT, wait_until};

/// What a peer is called unless somebody gives it another name: its host.
const PEER: &str = "127.0.0.1";

fn log(pair: &Pair, arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["log", "--json"];
    all.extend(arguments);
    let outcome = pair.sandbox.run(all).ok();
    outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The words of what happened at a path, the latest first.
fn words(lines: &[Value], path: &str) -> Vec<String> {
    lines
        .iter()
        // A rename moves the change time, too.
        .filter(|line| line["path"] == path && line["change"] != "attributes")
        .map(|line| line["change"].as_str().unwrap().to_owned())
        .collect()
}

fn state(line: &Value) -> &str {
    line["peers"][0]["state"].as_str().unwrap()
}

#[test]
fn the_log_tells_where_changes_came_from_and_how_far_they_got() {
    let pair = Pair::new();
    let (sandbox, tree) = (&pair.sandbox, pair.sandbox.tree());
    let tree = tree.to_str().unwrap();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir d; echo new >d/x; mv d e; mv e/x e/y; rm e/y",
    );
    sandbox.sh(&sandbox.peer(), "echo theirs >from-there");
    sandbox.flush();
    let lines = log(&pair, &[tree]);
    // By the name that each thing had at the time.
    assert_eq!(words(&lines, "d/x"), ["written", "created"]);
    assert_eq!(words(&lines, "e"), ["renamed"]);
    assert_eq!(words(&lines, "e/y"), ["removed", "renamed"]);
    let renamed = lines
        .iter()
        .find(|line| line["path"] == "e/y" && line["change"] == "renamed");
    assert_eq!(renamed.unwrap()["from"], "e/x");
    let theirs = lines
        .iter()
        .find(|line| line["path"] == "from-there")
        .unwrap();
    assert_eq!(
        (theirs["side"].as_str(), state(theirs)),
        (Some(PEER), "source")
    );
    let written = lines.iter().find(|line| line["path"] == "d/x").unwrap();
    assert_eq!(
        (written["side"].as_str(), state(written)),
        (Some("local"), "durable")
    );
    assert_eq!(
        (written["offset"].as_u64(), written["length"].as_u64()),
        (Some(0), Some(4))
    );
    let numbers: Vec<u64> = lines
        .iter()
        .map(|line| line["seq"].as_u64().unwrap())
        .collect();
    assert!(
        numbers.is_sorted_by(|a, b| a >= b),
        "the latest first: {numbers:?}"
    );

    // Of one path, also of one that is gone with its directory.
    let gone = log(&pair, &[&format!("{tree}/d/x")]);
    assert_eq!(words(&gone, "d/x"), ["written", "created"]);
    assert_eq!(gone.len(), 2, "{gone:?}");
    assert_eq!(log(&pair, &[tree, "-n", "3"]), lines[..3]);
    assert_eq!(log(&pair, &[tree, "--since", "1h"]), lines);
    assert_eq!(log(&pair, &[tree, "--since", "0"]), [] as [Value; 0]);

    // What a peer does not have yet, and the same while nothing is mounted.
    pair.server.link.refuse();
    fs::write(pair.here("late"), "late").unwrap();
    let late = |pair: &Pair| {
        let lines = log(pair, &[&format!("{tree}/late")]);
        lines
            .iter()
            .map(|line| state(line).to_owned())
            .collect::<Vec<_>>()
    };
    wait_until("both changes are journaled", PROMPT, || {
        late(&pair) == ["journaled", "journaled"]
    });
    sandbox.try_umount();
    sandbox.assert_down();
    assert_eq!(late(&pair), ["journaled", "journaled"]);
    let said = sandbox.run(["log", &format!("{tree}/late")]).ok();
    said.expect_said(&["late (4 bytes at 0), not on 127.0.0.1 yet"]);
}

/// "Note it": what was decided and is not plain from the files.
#[test]
fn decisions_are_in_the_log() {
    let pair = Pair::new();
    pair.apart(
        "echo mine >dir/notes; chmod 700 dir/other",
        "rm dir/notes; chmod 600 dir/other",
    );
    pair.sandbox.flush();
    pair.apart("echo mine >fresh", "echo theirs >fresh");
    pair.sandbox.try_flush().expect_code(3);
    fs::write(pair.there("fresh"), "mine\n").unwrap();
    pair.sandbox.flush();
    let tree = pair.sandbox.tree();
    let notes: Vec<(String, String)> = log(&pair, &[tree.to_str().unwrap()])
        .iter()
        .filter(|line| line["change"] == "note")
        .map(|line| {
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            (text("path"), text("note"))
        })
        .collect();
    let expected = [
        ("fresh", "the conflict is over"),
        ("fresh", "conflict: changed here and on 127.0.0.1"),
        (
            "dir/other",
            "mode or attributes were changed here and on 127.0.0.1: those of this side stand",
        ),
        (
            "dir/notes",
            "deleted on 127.0.0.1, edited here: the edit was kept",
        ),
    ];
    let mut notes: Vec<(&str, &str)> = notes
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    notes[2..].sort_by_key(|note| std::cmp::Reverse(*note));
    assert_eq!(notes, expected);
}
