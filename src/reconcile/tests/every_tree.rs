//! Every combination of three trees of a directory and two names below it.
//!
//! A name shows nothing, one of three contents, a directory, a symbolic link or a FIFO, which
//! stays local: to the rules it is nothing, and whoever carries out their results leaves it
//! alone.

use std::collections::BTreeSet;

use super::properties::all_hold;
use super::*;

fn leaves() -> Vec<Option<Entry>> {
    vec![
        None,
        Some(file("a")),
        Some(file("bb")),
        Some(file("ccc")),
        Some(directory()),
        Some(symlink("t")),
    ]
}

/// Every tree of at most the names `d`, `d/x` and, of fewer kinds, `d/y`: enough for what
/// becomes of one name below a directory to bear on the other.
fn trees() -> Vec<Tree> {
    let [top, x, y] = ["d", "d/x", "d/y"].map(|path| RelPath::new(path).unwrap());
    let mut trees = Vec::new();
    for first in leaves() {
        if first.as_ref() != Some(&directory()) {
            trees.push(
                first
                    .map(|entry| (top.clone(), entry))
                    .into_iter()
                    .collect(),
            );
            continue;
        }
        for child in leaves() {
            for other in [None, Some(file("a")), Some(file("bb"))] {
                let mut tree = Tree::from([(top.clone(), directory())]);
                tree.extend(child.clone().map(|entry| (x.clone(), entry)));
                tree.extend(other.map(|entry| (y.clone(), entry)));
                trees.push(tree);
            }
        }
    }
    trees
}

#[test]
fn all_properties_hold_for_every_combination() {
    let trees = trees();
    assert_eq!(trees.len(), 5 + 6 * 3);
    for base in &trees {
        for local in &trees {
            for remote in &trees {
                all_hold(base, local, remote);
            }
        }
    }
}

/// A tree with FIFOs, as one side has it.
#[derive(Clone, PartialEq, Debug)]
struct WithFifos {
    tree: Tree,
    fifos: BTreeSet<RelPath>,
}

impl WithFifos {
    fn is_directory(&self, path: &RelPath) -> bool {
        path.is_root() || self.tree.get(path) == Some(&directory())
    }

    /// Brings a name to what a plan says, as far as FIFOs and missing directories let it.
    fn bring(&mut self, path: &RelPath, result: Option<&Entry>) -> bool {
        let parent = path.parent().unwrap();
        let holds_fifos = self.fifos.iter().any(|fifo| fifo.starts_with(path));
        match result {
            // A directory that is left with nothing else counts as absent.
            None if holds_fifos => true,
            None => {
                self.tree.remove(path);
                true
            }
            Some(entry) if self.tree.get(path) == Some(entry) => true,
            Some(_) if holds_fifos || !self.is_directory(&parent) => false,
            Some(entry) => {
                self.tree.insert(path.clone(), entry.clone());
                true
            }
        }
    }

    /// What the rules see: a directory with nothing but FIFOs is none unless the other side
    /// or the base knows it.
    fn seen(&self, known: [&Tree; 2]) -> Tree {
        let empty = |path: &RelPath| {
            let holds = |name: &RelPath| name.starts_with(path) && name != path;
            self.fifos.iter().any(holds) && !self.tree.keys().any(holds)
        };
        let mut seen = self.tree.clone();
        seen.retain(|path, _| known.iter().any(|tree| tree.contains_key(path)) || !empty(path));
        seen
    }
}

/// Every tree of a side that has a FIFO at `d` or `d/x`.
fn trees_with_fifos() -> Vec<WithFifos> {
    let [top, x, y] = ["d", "d/x", "d/y"].map(|path| RelPath::new(path).unwrap());
    let mut trees = vec![WithFifos {
        tree: Tree::new(),
        fifos: [top.clone()].into(),
    }];
    for other in [None, Some(file("a")), Some(file("bb"))] {
        let mut tree = Tree::from([(top.clone(), directory())]);
        tree.extend(other.map(|entry| (y.clone(), entry)));
        trees.push(WithFifos {
            tree,
            fifos: [x.clone()].into(),
        });
    }
    trees
}

/// One round as it is carried out.
fn round(base: &mut Tree, local: &mut WithFifos, remote: &mut WithFifos) {
    let (here, there) = (
        local.seen([base, &remote.tree]),
        remote.seen([base, &local.tree]),
    );
    let plan = plan(base, &here, &there);
    // What is removed goes before its directory, and what is made comes after it.
    let (gone, made): (Vec<_>, Vec<_>) = plan
        .decisions
        .iter()
        .filter_map(|(path, (_, decision))| match decision {
            Decision::Agree { result, .. } => Some((path, result.as_ref())),
            _ => None,
        })
        .partition(|(_, result)| result.is_none());
    for (path, result) in gone.into_iter().rev().chain(made) {
        let done = [local.bring(path, result), remote.bring(path, result)];
        if done == [true, true] {
            match result {
                Some(entry) => base.insert(path.clone(), entry.clone()),
                None => base.remove(path),
            };
        }
    }
}

/// FIFOs stay where they are with their directories, whatever the other side deleted or
/// made there; what the other side has is not lost; and a directory that is left with
/// nothing else is not brought back.
#[test]
fn what_stays_local_is_left_alone_in_every_combination() {
    let plain: Vec<WithFifos> = trees()
        .into_iter()
        .map(|tree| WithFifos {
            tree,
            fifos: BTreeSet::new(),
        })
        .collect();
    let fifos = trees_with_fifos();
    let pairs = fifos
        .iter()
        .flat_map(|one| plain.iter().chain(&fifos).map(move |other| (one, other)))
        .flat_map(|(one, other)| [(one, other), (other, one)]);
    for (local, remote) in pairs {
        for base in trees() {
            let (mut agreed, mut here, mut there) = (base.clone(), local.clone(), remote.clone());
            let case = || format!("base {base:#?}\nlocal {local:#?}\nremote {remote:#?}");
            round(&mut agreed, &mut here, &mut there);
            for (before, after) in [(local, &here), (remote, &there)] {
                assert_eq!(before.fifos, after.fifos);
                for fifo in &after.fifos {
                    assert!(after.is_directory(&fifo.parent().unwrap()), "{}", case());
                    assert!(!after.tree.contains_key(fifo), "{}", case());
                }
                for (path, entry) in &before.tree {
                    let known = base.get(path).map(|entry| &entry.content);
                    let kept = [&here, &there].iter().any(|side| {
                        side.tree.get(path).map(|entry| &entry.content) == Some(&entry.content)
                    });
                    assert!(kept || known == Some(&entry.content), "{path}: {}", case());
                }
            }
            let once = (here.clone(), there.clone());
            round(&mut agreed, &mut here, &mut there);
            assert_eq!((here, there), once, "{}", case());
        }
    }
}
