//! What a directory on the disk shows.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::ledger::{link_value, short};
use crate::tree::{ContentHash, RelPath};

/// What a name shows.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Shown {
    Directory { mode: u32 },
    File { hash: ContentHash, mode: u32 },
    Link { target: Vec<u8> },
    Other,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory { mode } => write!(f, "directory {mode:o}"),
            Self::File { hash, mode } => write!(f, "file {} {mode:o}", short(*hash)),
            Self::Link { target } => write!(f, "link to {}", String::from_utf8_lossy(target)),
            Self::Other => f.write_str("something else"),
        }
    }
}

impl Shown {
    /// The value that it holds.
    pub(crate) fn value(&self) -> Option<ContentHash> {
        match self {
            Self::File { hash, .. } => Some(*hash),
            Self::Link { target } => Some(link_value(target)),
            _ => None,
        }
    }
}

/// What a path shows; none if there is nothing.
pub(crate) fn at(path: &Path) -> Option<Shown> {
    let found = fs::symlink_metadata(path).ok()?;
    let mode = found.permissions().mode() & 0o7777;
    let kind = found.file_type();
    Some(if kind.is_dir() {
        Shown::Directory { mode }
    } else if kind.is_symlink() {
        let target = fs::read_link(path).ok()?;
        Shown::Link {
            target: target.as_os_str().as_bytes().to_vec(),
        }
    } else if kind.is_file() {
        Shown::File {
            hash: ContentHash::of(&fs::read(path).ok()?),
            mode,
        }
    } else {
        Shown::Other
    })
}

/// Everything below a directory, but for the reserved one.
pub(crate) fn tree(root: &Path) -> BTreeMap<RelPath, Shown> {
    let mut found = BTreeMap::new();
    walk(root, &RelPath::ROOT, &mut |path, shown| {
        found.insert(path, shown);
    });
    found.retain(|path, _| path.components().next() != Some(crate::tree::RESERVED));
    found
}

/// The values that a replica holds in its tree, its conflicts or its trash; with
/// `staged` also in the making.
pub(crate) fn values(root: &Path, trash: bool, staged: bool) -> HashSet<ContentHash> {
    let mut found = HashSet::new();
    for at in fs::read_dir(root).into_iter().flatten().flatten() {
        if at.file_name().as_bytes() != crate::tree::RESERVED {
            gather(&at.path(), &mut found);
        }
    }
    let reserved = root.join(".mirrorfs");
    gather(&reserved.join("conflicts"), &mut found);
    if trash {
        gather(&reserved.join("trash"), &mut found);
    }
    if staged {
        gather(&reserved.join("staging"), &mut found);
    }
    found
}

fn gather(path: &Path, found: &mut HashSet<ContentHash>) {
    match at(path) {
        Some(Shown::Directory { .. }) => {
            for at in fs::read_dir(path).into_iter().flatten().flatten() {
                gather(&at.path(), found);
            }
        }
        Some(shown) => found.extend(shown.value()),
        None => {}
    }
}

/// Shows everything below a directory, parents first and in the order of the names.
pub(crate) fn walk(root: &Path, below: &RelPath, show: &mut dyn FnMut(RelPath, Shown)) {
    let mut names: Vec<Vec<u8>> = fs::read_dir(root.join(below.as_os_path()))
        .into_iter()
        .flatten()
        .flatten()
        .map(|at| at.file_name().as_bytes().to_vec())
        .collect();
    names.sort();
    for name in names {
        let Ok(path) = below.join(&name) else {
            continue;
        };
        if below.is_root() && name == crate::tree::RESERVED {
            continue;
        }
        if let Some(shown) = at(&root.join(path.as_os_path())) {
            let directory = matches!(shown, Shown::Directory { .. });
            show(path.clone(), shown);
            if directory {
                walk(root, &path, show);
            }
        }
    }
}
