//! Every combination of three trees with one Git directory, and what is particular to
//! those.

use super::properties::all_hold;
use super::*;

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

/// A repository with these contents below it, beside what makes it one.
fn repository(contents: &[(&str, &str)]) -> Tree {
    let mut tree = Tree::from([
        (path("g"), directory()),
        (path("g/HEAD"), file("head")),
        (path("g/objects"), directory()),
        (path("g/refs"), directory()),
    ]);
    for (name, content) in contents {
        tree.insert(path(&format!("g/{name}")), file(content));
    }
    tree
}

/// A Git directory that is not there, is a file, or has any combination of an object, a ref
/// and an index, of which two stage the same.
fn trees() -> Vec<Tree> {
    let mut trees = vec![Tree::new(), Tree::from([(path("g"), file("gitdir: x"))])];
    for object in [None, Some("o")] {
        for reference in [None, Some("r"), Some("rr")] {
            for index in [
                None,
                Some("index 1"),
                Some("index 1 again"),
                Some("index 2"),
            ] {
                let contents = [
                    ("objects/aa", object),
                    ("refs/m", reference),
                    ("index", index),
                ];
                let there: Vec<_> = contents
                    .into_iter()
                    .filter_map(|(name, content)| Some((name, content?)))
                    .collect();
                trees.push(repository(&there));
            }
        }
    }
    trees
}

#[test]
fn all_properties_hold_for_every_combination() {
    let trees = trees();
    assert_eq!(trees.len(), 2 + 2 * 3 * 4);
    for base in &trees {
        for local in &trees {
            for remote in &trees {
                all_hold(base, local, remote);
            }
        }
    }
}

/// A commit on each side: nothing but the objects is exchanged, and there is one conflict.
#[test]
fn commits_on_both_sides_are_one_conflict() {
    let base = repository(&[("refs/m", "1"), ("index", "index 1"), ("logs", "1")]);
    let with = |reference, object: &str, log| {
        let mut tree = repository(&[("refs/m", reference), ("index", "index 1"), ("logs", log)]);
        tree.insert(path(&format!("g/objects/{object}")), file(object));
        tree
    };
    let (local, remote) = (with("2", "mine", "12"), with("3", "theirs", "13"));
    let plan = plan(&base, &local, &remote);
    let conflicts: Vec<&RelPath> = plan
        .decisions
        .iter()
        .filter(|(_, (_, decision))| *decision == Decision::Conflict)
        .map(|(path, _)| path)
        .collect();
    assert_eq!(conflicts, [&path("g")]);
    assert!(plan.is_unit_in_conflict(&path("g")));
    let (_, here, there) = apply(&plan, &base, &local, &remote);
    for name in ["g/objects/mine", "g/objects/theirs"] {
        assert!(here.contains_key(&path(name)) && there.contains_key(&path(name)));
    }
    assert_eq!(here[&path("g/refs/m")], file("2"));
    assert_eq!(there[&path("g/refs/m")], file("3"));
}

#[test]
fn what_git_holds_while_it_works_is_no_change() {
    let base = repository(&[("refs/m", "1")]);
    let local = repository(&[("refs/m", "2")]);
    let remote = repository(&[("refs/m", "1"), ("index.lock", ""), ("refs/m.lock", "")]);
    let plan = plan(&base, &local, &remote);
    assert!(!plan.is_unit_in_conflict(&path("g")));
    let (_, here, there) = apply(&plan, &base, &local, &remote);
    assert_eq!(here, there);
    assert_eq!(there[&path("g/refs/m")], file("2"));
}

/// One side packed its objects and dropped the loose ones, the other committed: what the
/// commit may need stays.
#[test]
fn objects_are_not_deleted_where_the_other_side_works() {
    let base = repository(&[("refs/m", "1"), ("objects/aa", "o")]);
    let local = repository(&[("refs/m", "2"), ("objects/aa", "o"), ("objects/bb", "p")]);
    let remote = repository(&[("refs/m", "1"), ("objects/pack/pack-1.pack", "packed")]);
    let after = apply(&plan(&base, &local, &remote), &base, &local, &remote);
    for tree in [&after.1, &after.2] {
        for name in ["g/objects/aa", "g/objects/bb", "g/objects/pack/pack-1.pack"] {
            assert!(tree.contains_key(&path(name)), "{name}");
        }
    }
    // Where it did not, they go.
    let after = apply(&plan(&base, &base, &remote), &base, &base, &remote);
    assert!(!after.1.contains_key(&path("g/objects/aa")));
}

/// The whole directory was deleted on one side and worked in on the other: all of it stays.
#[test]
fn a_deleted_repository_that_was_worked_in_stays_whole() {
    let base = repository(&[("refs/m", "1"), ("config", "c"), ("objects/aa", "o")]);
    let edited = repository(&[("refs/m", "2"), ("config", "c"), ("objects/aa", "o")]);
    for (local, remote, note) in [
        (&edited, &Tree::new(), Note::KeptLocalEdit),
        (&Tree::new(), &edited, Note::KeptRemoteEdit),
    ] {
        let plan = plan(&base, local, remote);
        let (_, here, there) = apply(&plan, &base, local, remote);
        assert_eq!(here, edited);
        assert_eq!(there, edited);
        let (_, decision) = &plan.decisions[&path("g")];
        assert!(matches!(decision, Decision::Agree { note: Some(found), .. } if *found == note));
    }
    let gone = Tree::new();
    let (_, here, there) = apply(&plan(&base, &base, &gone), &base, &base, &gone);
    assert!(here.is_empty() && there.is_empty());
}

/// `.git/modules/sub` is a unit of its own: a commit in it and one outside of it agree.
#[test]
fn a_repository_inside_another_is_a_unit_of_its_own() {
    let outer = [("refs/m", "1"), ("config", "c")];
    let nest = |outer: &[(&str, &str)], inner: &str| {
        let mut tree = repository(outer);
        tree.insert(path("g/modules"), directory());
        for (below, entry) in repository(&[("refs/m", inner)]) {
            let below = below.rebase(&path("g"), &path("g/modules/s")).unwrap();
            tree.insert(below, entry);
        }
        tree
    };
    let base = nest(&outer, "1");
    let local = nest(&[("refs/m", "2"), ("config", "c")], "1");
    let remote = nest(&outer, "3");
    let plan = plan(&base, &local, &remote);
    let (_, here, there) = apply(&plan, &base, &local, &remote);
    assert_eq!(here, there);
    assert_eq!(here[&path("g/refs/m")], file("2"));
    assert_eq!(here[&path("g/modules/s/refs/m")], file("3"));
}

/// The version that a person decides about is what the peer changed, whatever happens here
/// or to the times in its index.
#[test]
fn the_version_of_a_unit_is_what_the_peer_changed() {
    let unit = path("g");
    let base = repository(&[("refs/m", "1"), ("index", "index 2")]);
    let version = |local: &[(&str, &str)], remote: &[(&str, &str)]| {
        plan(&base, &repository(local), &repository(remote)).version_of(&unit)
    };
    let here = [("refs/m", "2"), ("index", "index 2")];
    let there = [("refs/m", "3"), ("index", "index 1")];
    let first = version(&here, &there);
    assert_eq!(first, version(&[("refs/m", "9")], &there));
    assert_eq!(
        first,
        version(
            &here,
            &[
                ("refs/m", "3"),
                ("index", "index 1 again"),
                ("HEAD.lock", "")
            ]
        )
    );
    assert_ne!(
        first,
        version(&here, &[("refs/m", "4"), ("index", "index 1")])
    );
    assert_ne!(first, version(&here, &[("refs/m", "3")]));
}
