//! What becomes of decisions about conflicts.

use super::super::planning::{self, Desk};
use super::*;
use crate::reconcile::Git;
use crate::tree::Xattrs;

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn file(content: &str) -> Option<Entry> {
    Some(Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o644,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    })
}

/// A conflict about `x`, with the version of the peer that is on record, and what the
/// plan of a round makes of it when the peer shows `remote` and somebody decided about
/// `decided`.
fn outcome(record: &str, remote: &str, decided: Option<&str>, side: Side) -> Decision {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let sides = Sides {
        base: file("base"),
        local: file("mine"),
        remote: file(remote),
    };
    let conflict = Conflict {
        id: 1,
        peer: PeerId(1),
        path: path("x"),
        base: sides.base.clone(),
        local: sides.local.clone(),
        remote: file(record),
        copy: None,
        info: None,
        since: Timestamp::default(),
        unit: None,
    };
    let mut plan = reconcile([(path("x"), sides)].into(), Git::default(), Policy::TwoWay);
    let mut orders = Orders::default();
    if let Some(decided) = decided {
        let resolution = Resolution {
            side,
            remote: RemoteVersion::Entry(file(decided)),
            edited_too: false,
        };
        orders.resolutions.insert(path("x"), resolution);
    }
    let snapshot = journal.snapshot().unwrap();
    resolve(&snapshot, &mut plan, &[conflict], &orders).unwrap();
    plan.decisions.remove(&path("x")).unwrap().1
}

fn agreed(content: &str) -> Decision {
    Decision::Agree {
        result: file(content),
        note: None,
    }
}

/// "Any other than what the base says is a conflict": no clock is asked.
#[test]
pub(crate) fn what_both_have_changed_is_a_conflict_whatever_the_clocks_say() {
    for secs in [0, i64::from(u32::MAX)] {
        let desk = Desk::new();
        desk.tree.create(desk.tree.root(), "x", b"mine");
        let peer = desk.peer("host", &[("x", "base")]);
        let theirs = Entry {
            mtime: Timestamp { secs, nanos: 0 },
            ..planning::file("theirs")
        };
        desk.shows(peer, "x", Some(theirs));
        assert_eq!(desk.decision(peer, "x"), Some(Decision::Conflict));
    }
}

#[test]
fn a_decision_about_the_version_on_record_is_carried_out() {
    for (side, winner) in [(Side::Local, "mine"), (Side::Remote, "theirs")] {
        let decided = outcome("theirs", "theirs", Some("theirs"), side);
        assert_eq!(decided, agreed(winner));
    }
    let undecided = outcome("theirs", "theirs", None, Side::Local);
    assert_eq!(undecided, Decision::Conflict);
}

/// The peer's version moved on after somebody had looked at it: before the round noticed,
/// or so early that the newer one is on record already.
#[test]
fn a_decision_about_an_older_version_is_not_carried_out() {
    for record in ["theirs", "newer"] {
        for side in [Side::Local, Side::Remote] {
            let decided = outcome(record, "newer", Some("theirs"), side);
            assert_eq!(decided, Decision::Conflict, "{record} {side:?}");
        }
    }
}

/// A batch makes no more than it is told to, parents first; whatever else there is to do,
/// and what something moves into, does not wait.
#[test]
fn what_is_only_to_be_made_can_wait() {
    let directory = || {
        Some(Entry {
            content: Content::Directory,
            ..file("").unwrap()
        })
    };
    let sides = |base, local, remote| Sides {
        base,
        local,
        remote,
    };
    let mut scope: BTreeMap<RelPath, Sides> = BTreeMap::new();
    for at in ["a", "a/1", "a/2", "b", "b/1", "target"] {
        let local = if at.len() == 1 || at == "target" {
            directory()
        } else {
            file(at)
        };
        scope.insert(path(at), sides(None, local, None));
    }
    scope.insert(path("z-edit"), sides(file("o"), file("n"), file("o")));
    scope.insert(path("z-gone"), sides(file("o"), None, file("o")));
    let mut moves = Moves::default();
    moves.add(path("old"), path("target/new"));
    let plan = reconcile(scope, Git::default(), Policy::TwoWay);
    let left = |most| {
        let mut plan = plan.clone();
        let more = leave_for_later(&mut plan, &moves, most);
        let paths: Vec<String> = plan.decisions.keys().map(ToString::to_string).collect();
        (more, paths.join(" "))
    };
    let all = "a a/1 a/2 b b/1 target z-edit z-gone".to_owned();
    assert_eq!(left(6), (false, all));
    assert_eq!(left(4), (true, "a a/1 a/2 b target z-edit z-gone".into()));
    assert_eq!(left(2), (true, "a a/1 target z-edit z-gone".into()));
}
