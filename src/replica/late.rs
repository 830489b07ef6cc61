//! Late versions: what a batch has replaced or removed, and a program that had it open has
//! written to since. It is an edit that nobody has seen, so it leaves the trash and comes
//! back into the tree, beside what has taken its place. It is moved and not copied: the
//! program goes on writing to what people see.

use mirrorfs_journal::index::Fingerprint;
use serde::{Deserialize, Serialize};

use super::keep::stamp;
use crate::tree::{ContentHash, Kind, NAME_MAX, RelPath, Timestamp, git::MARKS};

/// The directory in `.mirrorfs` in which late versions wait for their place in the tree.
pub(crate) const LATE: &str = "late";

/// A file in the trash of a plain directory that somebody may still write to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Displaced {
    /// Where it was.
    pub(crate) path: RelPath,
    /// Its content when it was displaced.
    pub(crate) content: ContentHash,
    /// How it was found when it was last seen to hold that.
    pub(crate) seen: Option<Seen>,
    /// Where it goes, or has gone, because it was written to.
    pub(crate) back: Option<Back>,
    /// When that was noticed.
    pub(crate) since: Timestamp,
}

impl Displaced {
    /// What is known of a file when it has just been displaced.
    pub(crate) fn new(path: RelPath, content: ContentHash) -> Self {
        Self {
            path,
            content,
            seen: None,
            back: None,
            since: Timestamp::default(),
        }
    }
}

/// Where a late version is put.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Back {
    /// In the tree.
    Tree(RelPath),
    /// In `.mirrorfs/conflicts`.
    Kept(RelPath),
}

/// By what a file is recognised as untouched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Seen {
    ino: u64,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

impl From<Fingerprint> for Seen {
    fn from(print: Fingerprint) -> Self {
        Self {
            ino: print.ino,
            size: print.size,
            mtime: print.mtime,
            ctime: print.ctime,
        }
    }
}

/// The names beside `path` under which a late version can be put, the best first:
/// `name.late.<UTC>.conflict`. One that is taken is followed by that of the next second.
pub(crate) fn beside(path: &RelPath, at: Timestamp) -> impl Iterator<Item = RelPath> {
    let parent = path.parent().unwrap_or_default();
    let name = path.name().to_vec();
    (0..).filter_map(move |later| {
        let at = Timestamp {
            secs: at.secs + later,
            nanos: 0,
        };
        let ending = format!(".late.{}.conflict", stamp(at));
        parent.join(&shortened(&name, &ending)).ok()
    })
}

/// A name with an ending, and shortened by as much as that takes.
pub(crate) fn shortened(name: &[u8], ending: &str) -> Vec<u8> {
    let ending = &ending.as_bytes()[..ending.len().min(NAME_MAX - 1)];
    let mut keep = name.len().min(NAME_MAX - ending.len());
    // Not in the middle of a UTF-8 sequence.
    while keep > 0 && keep < name.len() && name[keep] & 0xc0 == 0x80 {
        keep -= 1;
    }
    let mut shortened = name[..keep].to_vec();
    shortened.extend_from_slice(ending);
    shortened
}

/// Whether a path is in a Git directory, which gets no files that are not its own. `kind` is
/// what there is at a path.
pub(crate) fn is_in_git(path: &RelPath, kind: impl Fn(&RelPath) -> Option<Kind>) -> bool {
    let is_one = |dir: &RelPath| {
        dir.name() == b".git"
            || MARKS.iter().all(|(name, kinds)| {
                let mark = dir.join(name).ok().and_then(|mark| kind(&mark));
                mark.is_some_and(|kind| kinds.contains(&kind))
            })
    };
    std::iter::successors(path.parent(), RelPath::parent)
        .filter(|dir| !dir.is_root())
        .any(|dir| is_one(&dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text).unwrap()
    }

    #[test]
    fn names_tell_what_they_are_and_do_not_run_out() {
        let at = Timestamp {
            secs: 1_700_000_000,
            nanos: 5,
        };
        let names: Vec<String> = beside(&path("src/main.rs"), at)
            .take(2)
            .map(|name| name.to_string())
            .collect();
        assert_eq!(
            names,
            [
                "src/main.rs.late.20231114T221320Z.conflict",
                "src/main.rs.late.20231114T221321Z.conflict"
            ]
        );
        let long = beside(&path(&"ä".repeat(127)), at).next().unwrap();
        assert!(long.name().len() <= NAME_MAX && std::str::from_utf8(long.name()).is_ok());
    }

    #[test]
    fn a_git_directory_is_known_by_its_name_or_its_shape() {
        let bare = |at: &RelPath| match at.as_bytes() {
            b"bare/HEAD" => Some(Kind::File),
            b"bare/objects" | b"bare/refs" => Some(Kind::Directory),
            _ => None,
        };
        for (at, inside) in [
            ("d/.git/index", true),
            ("bare/refs/heads/x", true),
            ("bare", false),
            (".git", false),
            ("d/x", false),
        ] {
            assert_eq!(is_in_git(&path(at), bare), inside, "{at}");
        }
    }
}
