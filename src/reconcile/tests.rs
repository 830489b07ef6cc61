//! The table row by row, single rules, and the properties of the result: over every
//! combination on two-level trees, and over random trees.

mod every_repository;
mod every_tree;
mod properties;
mod random;

use std::collections::BTreeMap;

use super::*;
use crate::tree::{Content, ContentHash, Entry, RelPath, Timestamp, Xattrs};

fn file(content: &str) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o644,
        mtime: Timestamp {
            secs: content.len() as i64,
            nanos: 1,
        },
        xattrs: Xattrs::new(),
    }
}

fn directory() -> Entry {
    Entry {
        content: Content::Directory,
        mode: 0o755,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn symlink(target: &str) -> Entry {
    Entry {
        content: Content::Symlink {
            target: target.into(),
        },
        mode: 0o777,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn sides(base: Option<Entry>, local: Option<Entry>, remote: Option<Entry>) -> Sides {
    Sides {
        base,
        local,
        remote,
    }
}

fn agreed(result: Option<Entry>) -> Merge {
    Merge::Agreed(result, None)
}

#[test]
fn the_table_row_by_row() {
    let (a, x, y) = (
        || Some(file("a")),
        || Some(file("xx")),
        || Some(file("yyy")),
    );
    for base in [None, a()] {
        assert_eq!(merge(&sides(base.clone(), x(), x())), agreed(x()), "agree");
        assert_eq!(merge(&sides(base, x(), y())), Merge::Conflict, "conflict");
    }
    assert_eq!(merge(&sides(None, x(), None)), agreed(x()), "push");
    assert_eq!(merge(&sides(None, None, x())), agreed(x()), "pull");
    assert_eq!(merge(&sides(a(), None, a())), agreed(None), "delete remote");
    assert_eq!(merge(&sides(a(), a(), None)), agreed(None), "delete local");
    assert_eq!(merge(&sides(a(), x(), a())), agreed(x()), "push");
    assert_eq!(merge(&sides(a(), a(), x())), agreed(x()), "pull");
    assert_eq!(merge(&sides(a(), a(), a())), agreed(a()), "skip");
    assert_eq!(merge(&sides(a(), None, None)), agreed(None), "forget");
    assert_eq!(
        merge(&sides(a(), x(), None)),
        Merge::Agreed(x(), Some(Note::KeptLocalEdit)),
        "keep the local edit"
    );
    assert_eq!(
        merge(&sides(a(), None, y())),
        Merge::Agreed(y(), Some(Note::KeptRemoteEdit)),
        "keep the remote edit"
    );
}

#[test]
fn metadata_merges_field_by_field() {
    let base = file("a");
    let local = Entry {
        mode: 0o755,
        ..base.clone()
    };
    let mut remote = file("other");
    remote.xattrs.insert(b"user.k".to_vec(), b"v".to_vec());
    let Merge::Agreed(Some(merged), None) = merge(&sides(
        Some(base.clone()),
        Some(local.clone()),
        Some(remote.clone()),
    )) else {
        panic!("no conflict: different fields")
    };
    assert_eq!(merged.content, remote.content);
    assert_eq!(
        merged.mtime, remote.mtime,
        "the time follows the content that wins"
    );
    assert_eq!(merged.mode, 0o755);
    assert_eq!(merged.xattrs, remote.xattrs);

    let both = Entry {
        mode: 0o600,
        ..base.clone()
    };
    assert_eq!(
        merge(&sides(Some(base), Some(local.clone()), Some(both))),
        Merge::Agreed(Some(local), Some(Note::LocalMetadataWon))
    );
}

#[test]
fn a_touched_file_carries_its_time() {
    let base = file("a");
    let touched = Entry {
        mtime: Timestamp { secs: 99, nanos: 9 },
        ..base.clone()
    };
    for (local, remote) in [(&touched, &base), (&base, &touched)] {
        let merged = merge(&sides(
            Some(base.clone()),
            Some(local.clone()),
            Some(remote.clone()),
        ));
        assert_eq!(merged, agreed(Some(touched.clone())));
    }
}

type Tree = BTreeMap<RelPath, Entry>;

fn scope(base: &Tree, local: &Tree, remote: &Tree) -> BTreeMap<RelPath, Sides> {
    let mut scope = BTreeMap::new();
    for path in base.keys().chain(local.keys()).chain(remote.keys()) {
        scope.insert(
            path.clone(),
            sides(
                base.get(path).cloned(),
                local.get(path).cloned(),
                remote.get(path).cloned(),
            ),
        );
    }
    scope
}

/// The Git directories that any of the trees has, and what the contents called `index 1`,
/// `index 1 again` and `index 2` mean.
fn git(trees: [&Tree; 3]) -> Git {
    use crate::tree::git::MARKS;
    let is_unit = |tree: &Tree, path: &RelPath| {
        MARKS.iter().all(|(name, kinds)| {
            let mark = tree.get(&path.join(name).unwrap());
            mark.is_some_and(|entry| kinds.contains(&entry.content.kind()))
        })
    };
    let units = trees.into_iter().flat_map(|tree| {
        let paths = tree.keys().filter(|path| is_unit(tree, path));
        paths.cloned().collect::<Vec<_>>()
    });
    let of = |content: &str| ContentHash::of(content.as_bytes());
    Git {
        units: units.collect(),
        meanings: ["index 1", "index 1 again", "index 2"]
            .map(|content| (of(content), of(&content[..7])))
            .into(),
    }
}

fn decided(base: &Tree, local: &Tree, remote: &Tree, policy: Policy) -> Plan {
    let git = git([base, local, remote]);
    reconcile(scope(base, local, remote), git, policy)
}

fn plan(base: &Tree, local: &Tree, remote: &Tree) -> Plan {
    decided(base, local, remote, Policy::TwoWay)
}

/// Base, local and remote after the plan has been carried out.
fn apply(plan: &Plan, base: &Tree, local: &Tree, remote: &Tree) -> (Tree, Tree, Tree) {
    let (mut base, mut local, mut remote) = (base.clone(), local.clone(), remote.clone());
    for (path, (_, decision)) in &plan.decisions {
        let Decision::Agree { result, .. } = decision else {
            continue;
        };
        for tree in [&mut base, &mut local, &mut remote] {
            match result {
                Some(entry) => tree.insert(path.clone(), entry.clone()),
                None => tree.remove(path),
            };
        }
    }
    (base, local, remote)
}

#[test]
fn an_edit_below_a_deleted_directory_keeps_its_parents() {
    let (d, x, y) = (
        RelPath::new("d").unwrap(),
        RelPath::new("d/x").unwrap(),
        RelPath::new("d/y").unwrap(),
    );
    let base: Tree = [
        (d.clone(), directory()),
        (x.clone(), file("a")),
        (y.clone(), file("a")),
    ]
    .into();
    let mut remote = base.clone();
    remote.insert(x.clone(), file("edited"));
    let plan = plan(&base, &Tree::new(), &remote);
    let (_, local, remote) = apply(&plan, &base, &Tree::new(), &remote);
    assert_eq!(local, remote);
    assert_eq!(
        local.keys().collect::<Vec<_>>(),
        [&d, &x],
        "the unchanged one is deleted"
    );
}

#[test]
fn policies_let_changes_travel_one_way() {
    let scope: BTreeMap<RelPath, Sides> = [
        (
            RelPath::new("here").unwrap(),
            sides(None, Some(file("l")), None),
        ),
        (
            RelPath::new("there").unwrap(),
            sides(None, None, Some(file("r"))),
        ),
    ]
    .into();
    for (policy, travels) in [(Policy::PushOnly, "here"), (Policy::PullOnly, "there")] {
        let plan = reconcile(scope.clone(), Git::default(), policy);
        for (path, (_, decision)) in &plan.decisions {
            let held = *decision == Decision::Hold(Held::Policy);
            assert_eq!(
                held,
                path.as_bytes() != travels.as_bytes(),
                "{policy:?} {path}"
            );
        }
    }
}

#[test]
fn the_brake_holds_deletions_and_nothing_else() {
    let scope: BTreeMap<RelPath, Sides> = [
        (
            RelPath::new("gone").unwrap(),
            sides(Some(file("a")), Some(file("a")), None),
        ),
        (
            RelPath::new("new").unwrap(),
            sides(None, None, Some(file("r"))),
        ),
    ]
    .into();
    let mut plan = reconcile(scope, Git::default(), Policy::TwoWay);
    assert_eq!((plan.local_deletions(), plan.remote_deletions()), (1, 0));
    plan.brake_local_deletions();
    let decisions: Vec<&Decision> = plan
        .decisions
        .values()
        .map(|(_, decision)| decision)
        .collect();
    assert_eq!(*decisions[0], Decision::Hold(Held::Brake));
    assert!(matches!(
        decisions[1],
        Decision::Agree {
            result: Some(_),
            ..
        }
    ));
}

#[test]
fn a_refill_brings_back_what_is_gone() {
    let scope: BTreeMap<RelPath, Sides> = [(
        RelPath::new("gone").unwrap(),
        sides(Some(file("a")), Some(file("a")), None),
    )]
    .into();
    let mut plan = reconcile(scope, Git::default(), Policy::TwoWay);
    plan.undo_remote_deletions();
    let (_, decision) = &plan.decisions[&RelPath::new("gone").unwrap()];
    assert_eq!(
        *decision,
        Decision::Agree {
            result: Some(file("a")),
            note: None
        }
    );
}

/// A directory that becomes a file on the peer while one of its files is gone from there:
/// if the deletion is held, so is what would need it.
#[test]
fn a_held_deletion_keeps_its_directory() {
    let (d, x) = (RelPath::new("d").unwrap(), RelPath::new("d/x").unwrap());
    let base: Tree = [(d.clone(), directory()), (x.clone(), file("a"))].into();
    let remote: Tree = [(d.clone(), file("now a file"))].into();
    let mut plan = plan(&base, &base, &remote);
    plan.brake_local_deletions();
    for path in [&d, &x] {
        let (_, decision) = &plan.decisions[path];
        assert_eq!(*decision, Decision::Hold(Held::Brake), "{path}");
    }
}

/// The same where what is gone is to be brought back: there is no place for it.
#[test]
fn a_refill_into_what_is_a_file_by_now_is_a_conflict() {
    let (d, x) = (RelPath::new("d").unwrap(), RelPath::new("d/x").unwrap());
    let base: Tree = [(d.clone(), directory()), (x.clone(), file("a"))].into();
    let remote: Tree = [(d.clone(), file("now a file"))].into();
    let mut plan = plan(&base, &base, &remote);
    plan.undo_remote_deletions();
    assert_eq!(plan.decisions[&d].1, Decision::Conflict);
    let below = &plan.decisions[&x].1;
    assert_eq!(*below, Decision::Hold(Held::BelowConflict));
}

/// A file against a directory, settled either way: what lies below goes along.
#[test]
fn a_settled_conflict_takes_what_lies_below_along() {
    let (d, x) = (RelPath::new("d").unwrap(), RelPath::new("d/x").unwrap());
    let (base, local) = (Tree::new(), Tree::from([(d.clone(), file("mine"))]));
    let remote: Tree = [(d.clone(), directory()), (x, file("theirs"))].into();
    let undecided = plan(&base, &local, &remote);
    let mut settled = undecided.clone();
    settled.settle_for_local(&d);
    let (agreed, here, there) = apply(&settled, &base, &local, &remote);
    assert_eq!([&agreed, &here, &there], [&local; 3]);
    let mut settled = undecided;
    settled.settle_for_remote(&d);
    let (agreed, here, there) = apply(&settled, &base, &local, &remote);
    assert_eq!([&agreed, &here, &there], [&remote; 3]);
}
