//! What lies in a Git directory, as far as mirroring has to tell it apart.
//!
//! A Git directory is one unit: refs, index and configuration belong together, while its
//! objects are named by their content and can always be united. What makes a directory one
//! is its shape (see [`MARKS`]), not its name: `.git`, a bare repository and each
//! `.git/modules/NAME` are units of their own.

mod index;

pub use index::{LARGEST as LARGEST_INDEX, meaning};

use super::{Kind, RelPath};

/// What a directory must hold to be a Git directory, with the kinds that each may have. Git
/// itself asks for no more. `HEAD` comes first, because hardly any other directory has one.
pub const MARKS: [(&[u8], &[Kind]); 3] = [
    (b"HEAD", &[Kind::File, Kind::Symlink]),
    (b"objects", &[Kind::Directory]),
    (b"refs", &[Kind::Directory]),
];

/// What a name in a Git directory is to the rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// An object, a pack with what belongs to it, or a directory of those: what has the
    /// same name has the same content, or one that is as good.
    Object,
    /// What Git holds while it works. It comes and goes, and says nothing of the rest.
    Lock,
    /// Everything else: refs, logs, index, configuration.
    State,
}

/// The role of what lies at `path`, which is below the Git directory `unit`.
pub fn role(unit: &RelPath, path: &RelPath) -> Role {
    let names: Vec<&[u8]> = path.components().skip(unit.depth()).collect();
    let last = names.last().copied().unwrap_or_default();
    // No ref can be called that: Git forbids the ending.
    if last.ends_with(b".lock") || names == [&b"gc.pid"[..]] {
        return Role::Lock;
    }
    match names.as_slice() {
        [b"objects"] | [b"objects", b"pack" | b"info"] => Role::Object,
        [b"objects", b"info", b"commit-graphs"] => Role::Object,
        [b"objects", b"info", b"commit-graphs", name] if name.starts_with(b"graph-") => {
            Role::Object
        }
        [b"objects", b"info", ..] => Role::State,
        [b"objects", b"pack", name, ..] if name.starts_with(b"multi-pack-index") => Role::State,
        [b"objects", ..] => Role::Object,
        _ => Role::State,
    }
}

/// Whether what lies at `path`, below the Git directory `unit`, is an index: its own, or
/// that of a work tree.
pub fn is_index(unit: &RelPath, path: &RelPath) -> bool {
    let names: Vec<&[u8]> = path.components().skip(unit.depth()).collect();
    matches!(names.as_slice(), [b"index"] | [b"worktrees", _, b"index"])
}

/// Where a file of a Git directory stands among those that are made in one batch. Whoever
/// reads between two renames finds packs before their index, and objects before the refs
/// that name them.
pub fn rank(unit: &RelPath, path: &RelPath) -> u8 {
    if role(unit, path) != Role::Object {
        return 2;
    }
    match path.name().rsplit(|byte| *byte == b'.').next() {
        Some(b"idx" | b"bitmap" | b"rev" | b"graph") => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text).unwrap()
    }

    #[test]
    fn roles_go_by_where_a_name_lies() {
        let unit = path("web/.git");
        let role = |name: &str| role(&unit, &path(&format!("web/.git/{name}")));
        for name in [
            "objects",
            "objects/ab",
            "objects/ab/cdef",
            "objects/ab/tmp_obj_x",
            "objects/pack/pack-1.pack",
            "objects/pack/pack-1.idx",
            "objects/info/commit-graphs/graph-1.graph",
        ] {
            assert_eq!(role(name), Role::Object, "{name}");
        }
        for name in [
            "HEAD",
            "index",
            "refs/heads/main",
            "refs/heads/objects",
            "logs/HEAD",
            "objects/info/packs",
            "objects/info/commit-graph",
            "objects/info/commit-graphs/commit-graph-chain",
            "objects/pack/multi-pack-index",
            "worktrees/w/objects",
        ] {
            assert_eq!(role(name), Role::State, "{name}");
        }
        for name in ["index.lock", "refs/heads/main.lock", "gc.pid"] {
            assert_eq!(role(name), Role::Lock, "{name}");
        }
    }

    #[test]
    fn indexes_are_known_by_their_place() {
        let unit = path("r.git");
        for (name, is) in [
            ("r.git/index", true),
            ("r.git/worktrees/w/index", true),
            ("r.git/refs/heads/index", false),
            ("r.git/worktrees/index", false),
        ] {
            assert_eq!(is_index(&unit, &path(name)), is, "{name}");
        }
    }

    #[test]
    fn packs_come_before_their_index_and_objects_before_refs() {
        let unit = path(".git");
        let mut names = [
            ".git/refs/heads/main",
            ".git/objects/pack/pack-1.idx",
            ".git/objects/pack/pack-1.pack",
        ];
        names.sort_by_key(|name| rank(&unit, &path(name)));
        assert_eq!(
            names,
            [
                ".git/objects/pack/pack-1.pack",
                ".git/objects/pack/pack-1.idx",
                ".git/refs/heads/main"
            ]
        );
    }
}
