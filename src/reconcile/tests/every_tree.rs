//! Every combination of three trees of a directory and two names below it.
//!
//! A name shows nothing, one of three contents, a directory or a symbolic link. What stays
//! local (a FIFO, a socket, a device) has no place here: to the rules it is nothing.

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
