//! What a round does about what is in doubt.

use mirrorfs_journal::Durability;

use super::super::planning::{Desk, file, path};
use super::{Doubt, Doubts};
use crate::reconcile::{Decision, Held};
use crate::tree::{Entry, PeerId};

/// Puts what is at a path in doubt: with what the record says was there, and whether it is
/// to be gone.
fn doubt(desk: &Desk, peer: PeerId, at: &str, last: Option<&str>, gone: bool) {
    let node = desk.tree.journal.snapshot().unwrap().at(&path(at)).unwrap();
    let last = last.map(|content| file(content).content);
    let at = path(at);
    desk.tree
        .journal
        .update(Durability::Normal, move |update| {
            let mut doubts = Doubts::load(update, peer)?;
            match node {
                Some(node) => drop(doubts.present.insert(
                    node.id,
                    Doubt {
                        changed_n: node.changed_n,
                        last,
                        gone,
                        torn: !gone,
                    },
                )),
                None => drop(doubts.missing.insert(at, last)),
            }
            doubts.store(update, peer)
        })
        .unwrap();
}

fn agreed(entry: Option<Entry>) -> Option<Decision> {
    Some(Decision::Agree {
        result: entry,
        note: None,
    })
}

const HELD: Option<Decision> = Some(Decision::Hold(Held::Doubt));

#[test]
fn what_the_peer_has_comes_back_and_what_it_lacks_stays() {
    let desk = Desk::new();
    for name in ["acked", "edited", "new"] {
        desk.tree.create(desk.tree.root(), name, b"");
    }
    let base = [("acked", "old"), ("edited", "old"), ("gone", "old")];
    let peer = desk.peer("host", &base);
    doubt(&desk, peer, "acked", Some("old"), false);
    doubt(&desk, peer, "edited", Some("newer"), false);
    doubt(&desk, peer, "new", Some("newer"), false);
    doubt(&desk, peer, "gone", Some("newer"), false);
    let round = desk.plan(peer);
    let decided = |at: &str| Some(round.plan.decisions[&path(at)].1.clone());
    assert_eq!(decided("acked"), agreed(Some(file("old"))));
    assert_eq!(decided("gone"), agreed(Some(file("old"))));
    assert_eq!((decided("edited"), decided("new")), (HELD, HELD));
    assert!(round.batch.ops.is_empty(), "{:?}", round.batch.ops);
    let steps: Vec<_> = round
        .local_steps
        .iter()
        .map(|step| step.path.to_string())
        .collect();
    assert_eq!(steps, ["gone", "acked"]);
    let mut told: Vec<_> = round
        .problems
        .iter()
        .map(|(path, _)| path.to_string())
        .collect();
    told.sort();
    assert_eq!(told, ["edited", "new"]);
}

/// What was deleted everywhere does not travel back because a power loss brought it back.
#[test]
fn what_was_meant_to_go_goes_again() {
    let desk = Desk::new();
    desk.tree.create(desk.tree.root(), "back", b"old");
    desk.tree.create(desk.tree.root(), "kept", b"old");
    let peer = desk.peer("host", &[("kept", "old")]);
    doubt(&desk, peer, "back", None, true);
    doubt(&desk, peer, "kept", None, true);
    assert_eq!(desk.decision(peer, "back"), agreed(None));
    // The peer was not told of this one: it is as it was.
    let kept = desk.plan(peer).plan.decisions.remove(&path("kept"));
    assert!(kept.is_none_or(|(_, decision)| decision != HELD.unwrap()));
}

#[test]
fn an_edit_of_the_peer_is_taken_or_kept_beside() {
    let desk = Desk::new();
    for name in ["acked", "edited"] {
        desk.tree.create(desk.tree.root(), name, b"");
    }
    let peer = desk.peer(
        "host",
        &[("acked", "old"), ("edited", "old"), ("gone", "old")],
    );
    for name in ["acked", "edited", "gone"] {
        let last = if name == "acked" { "old" } else { "newer" };
        doubt(&desk, peer, name, Some(last), false);
        desk.shows(peer, name, Some(file("theirs")));
    }
    assert_eq!(desk.decision(peer, "acked"), agreed(Some(file("theirs"))));
    assert_eq!(desk.decision(peer, "gone"), agreed(Some(file("theirs"))));
    assert_eq!(desk.decision(peer, "edited"), Some(Decision::Conflict));
    // What it has deleted meanwhile is not sent to it, nor deleted here.
    desk.shows(peer, "edited", None);
    assert_eq!(desk.decision(peer, "edited"), HELD);
}

#[test]
fn what_is_missing_comes_from_the_peer_with_the_newest_version() {
    let desk = Desk::new();
    let older = desk.peer("older", &[("gone", "old")]);
    let newer = desk.peer("newer", &[("gone", "newer")]);
    for peer in [older, newer] {
        doubt(&desk, peer, "gone", Some("newer"), false);
    }
    assert_eq!(desk.decision(older, "gone"), HELD);
    assert_eq!(desk.decision(newer, "gone"), agreed(Some(file("newer"))));
}

/// Whoever changes it says what it is.
#[test]
fn a_doubt_ends_with_the_next_change() {
    let desk = Desk::new();
    let ino = desk.tree.create(desk.tree.root(), "edited", b"");
    let peer = desk.peer("host", &[("edited", "old")]);
    doubt(&desk, peer, "edited", Some("newer"), false);
    assert_eq!(desk.decision(peer, "edited"), HELD);
    assert_eq!(desk.decision(peer, "edited"), HELD, "again");
    desk.tree.fs.write(ino, 0, b"right", None).unwrap();
    let Some(Decision::Agree { result, .. }) = desk.decision(peer, "edited") else {
        panic!("not sent");
    };
    assert_eq!(result.unwrap().content, file("right").content);
    let left = Doubts::load(&desk.tree.journal.snapshot().unwrap(), peer).unwrap();
    assert_eq!(left, Doubts::default());
}
