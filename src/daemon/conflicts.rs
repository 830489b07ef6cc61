//! Open conflicts in detail: what each side has now, what is on record, and where the
//! artefacts are; and what stands in the way of settling one.

use std::io::Read;
use std::os::fd::AsFd;

use mirrorfs_journal::{Conflict, View};
use serde::{Deserialize, Serialize};

use super::failure::{Failure, OrFail};
use super::late;
use crate::replica::Root;
use crate::replica::look::{Look, look_at};
use crate::replicator::{kept_name, unit_state};
use crate::tree::{Content, ContentHash, Entry, RelPath, Timestamp, scan};

/// How somebody wants a conflict to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// This side's version replaces the peer's.
    Local,
    /// The peer's version replaces this side's.
    Remote,
    /// This side's version stays, and the peer's becomes a file of its own beside it.
    Both,
    /// The file as it is now is the result.
    Merged,
}

/// One side's version.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Version {
    /// Nothing is there.
    Nothing,
    /// A regular file.
    File {
        /// Its size, in bytes.
        size: u64,
        /// When it was changed.
        mtime: Timestamp,
        /// The BLAKE3 hash of its content.
        hash: String,
    },
    /// A directory.
    Directory,
    /// A Git directory, of which both sides have changed something.
    GitDirectory,
    /// A symbolic link.
    Symlink {
        /// Where it points to.
        target: String,
    },
    /// It cannot be looked at, or is of no kind that is mirrored.
    Unknown {
        /// Why.
        reason: String,
    },
}

/// What became of the copy of the peer's version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Copy {
    /// It is what the peer had.
    Unedited,
    /// Somebody edited it.
    Edited,
    /// Somebody removed it or moved it away.
    Missing,
}

/// An open conflict.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Detail {
    /// Where.
    pub path: RelPath,
    /// With which peer.
    pub peer: String,
    /// When it was noticed.
    pub since: Timestamp,
    /// What both had agreed on.
    pub base: Version,
    /// What this side has now.
    pub local: Version,
    /// The peer's version on record.
    pub remote: Version,
    /// What the peer has by now, if that is something else than what is on record.
    pub newer: Option<Version>,
    /// Where the peer's version is kept in the tree, and whether it is still that.
    pub copy: Option<(RelPath, Copy)>,
    /// Where the peer's version is kept if it is not in the tree.
    pub kept: Option<String>,
    /// Where the explanation is.
    pub info: Option<RelPath>,
    /// Of a Git directory: what each side has changed in it.
    pub unit: Option<Unit>,
    /// It is a late version: what a program went on writing to after a change of the other
    /// side had replaced it. The peer is where it was written; none for this side.
    #[serde(default)]
    pub late: bool,
}

/// What both sides have changed in a Git directory, apart from its objects.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Unit {
    /// On this side.
    pub here: Vec<Changed>,
    /// On the peer.
    pub there: Vec<Changed>,
}

/// A name in a Git directory that one side has changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Changed {
    /// Its path from there.
    pub name: RelPath,
    /// What it says, of a ref; none if it is gone, or is something else.
    pub says: Option<String>,
}

/// The conflicts at a path, one for each peer that has another version, with their
/// records. `root` is that of the tree below the mount.
pub(super) fn at(
    view: &View,
    root: &Root,
    path: &RelPath,
) -> Result<Vec<(Conflict, Detail)>, Failure> {
    let message = || "cannot read the conflicts from the journal".to_owned();
    let mut found = Vec::new();
    for conflict in view.conflicts().or_fail(message)? {
        if conflict.path == *path {
            let detail = detail(view, root, &conflict).or_fail(message)?;
            found.push((conflict, detail));
        }
    }
    Ok(found)
}

/// Says that there is nothing at a path to be decided about.
pub(super) fn none_at(path: &RelPath) -> Failure {
    Failure::new(format!("there is no conflict at {path}"))
        .hint("mirrorfs conflicts list shows them")
}

/// The same with the late versions there, for people.
pub fn details(view: &View, root: &Root, path: &RelPath) -> Result<Vec<Detail>, Failure> {
    let found = at(view, root, path)?;
    let mut details: Vec<Detail> = found.into_iter().map(|(_, detail)| detail).collect();
    let message = || "cannot read the late versions from the journal".to_owned();
    for late in late::at(view, path).or_fail(message)? {
        let look = |at: &RelPath| looked_at(root, at);
        details.push(late::detail(view, &late, look).or_fail(message)?);
    }
    if details.is_empty() {
        return Err(none_at(path));
    }
    Ok(details)
}

fn detail(
    view: &View,
    root: &Root,
    conflict: &Conflict,
) -> Result<Detail, mirrorfs_journal::Error> {
    let pending = view.remote_pending(conflict.peer)?;
    let now = match pending.into_iter().find(|(path, _)| *path == conflict.path) {
        Some((_, entry)) => entry,
        None => view
            .base_at(conflict.peer, &conflict.path)?
            .map(|base| base.entry),
    };
    if let Some(recorded) = conflict.unit {
        return unit_detail(view, root, conflict, recorded);
    }
    let is_file = !matches!(
        conflict.remote.as_ref().map(|entry| &entry.content),
        None | Some(Content::Directory)
    );
    Ok(Detail {
        path: conflict.path.clone(),
        peer: view
            .peer(conflict.peer)?
            .map_or_else(String::new, |peer| peer.name),
        since: conflict.since,
        base: version(conflict.base.as_ref()),
        local: looked_at(root, &conflict.path),
        remote: version(conflict.remote.as_ref()),
        newer: (now != conflict.remote).then(|| version(now.as_ref())),
        copy: conflict
            .copy
            .as_ref()
            .map(|copy| (copy.clone(), state(root, copy, conflict))),
        kept: (conflict.copy.is_none() && is_file)
            .then(|| format!(".mirrorfs/conflicts/{}", kept_name(conflict))),
        info: conflict.info.clone(),
        unit: None,
        late: false,
    })
}

fn unit_detail(
    view: &View,
    root: &Root,
    conflict: &Conflict,
    recorded: ContentHash,
) -> Result<Detail, mirrorfs_journal::Error> {
    let now = unit_state(view, conflict.peer, &conflict.path)?;
    let kept = kept_name(conflict);
    let below = |path: &RelPath| path.rebase(&conflict.path, &RelPath::ROOT);
    let here = now.here.iter().filter_map(|path| {
        Some(Changed {
            name: below(path)?,
            says: ref_at(root, path, &below(path)?),
        })
    });
    let there = now.there.iter().filter_map(|path| {
        let name = below(path)?;
        let kept = [
            b".mirrorfs/conflicts/",
            kept.as_bytes(),
            b"/",
            name.as_bytes(),
        ]
        .concat();
        let says = RelPath::new(kept).ok();
        let says = says.and_then(|kept| ref_at(root, &kept, &name));
        Some(Changed { name, says })
    });
    Ok(Detail {
        path: conflict.path.clone(),
        peer: view
            .peer(conflict.peer)?
            .map_or_else(String::new, |peer| peer.name),
        since: conflict.since,
        base: version(conflict.base.as_ref()),
        local: Version::GitDirectory,
        remote: Version::GitDirectory,
        newer: (now.version != recorded).then_some(Version::GitDirectory),
        copy: None,
        unit: Some(Unit {
            here: here.collect(),
            there: there.collect(),
        }),
        kept: Some(format!(".mirrorfs/conflicts/{kept}")),
        info: None,
        late: false,
    })
}

/// What the ref at `path` says, which is called `name` in its Git directory.
fn ref_at(root: &Root, path: &RelPath, name: &RelPath) -> Option<String> {
    /// A hash of SHA-256, or the name of a branch.
    const LONGEST: u64 = 512;
    let first = name.components().next()?;
    if first != b"refs" && !(name.depth() == 1 && first.ends_with(b"HEAD")) {
        return None;
    }
    let dir = root.parent(path).ok()?;
    let file = scan::open_file(dir.as_fd(), path.name()).ok()?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text.lines().next()?.to_owned())
}

fn version(entry: Option<&Entry>) -> Version {
    let Some(entry) = entry else {
        return Version::Nothing;
    };
    match &entry.content {
        Content::File { size, hash } => Version::File {
            size: *size,
            mtime: entry.mtime,
            hash: hash.to_string(),
        },
        Content::Directory => Version::Directory,
        Content::Symlink { target } => Version::Symlink {
            target: String::from_utf8_lossy(target).into_owned(),
        },
    }
}

fn looked_at(root: &Root, path: &RelPath) -> Version {
    let reason = match look_at(root, path, None, &|_| None) {
        Ok(Look::Absent) => return Version::Nothing,
        Ok(Look::Seen(seen)) => return version(Some(&seen.entry)),
        Ok(Look::Special) => "a FIFO, socket or device".to_owned(),
        Ok(Look::Changing) => "it is being written".to_owned(),
        Err(error) => error.to_string(),
    };
    Version::Unknown { reason }
}

fn state(root: &Root, copy: &RelPath, conflict: &Conflict) -> Copy {
    match look_at(root, copy, None, &|_| None) {
        Ok(Look::Absent) => Copy::Missing,
        Ok(Look::Seen(seen))
            if conflict
                .remote
                .as_ref()
                .is_some_and(|remote| remote.content == seen.entry.content) =>
        {
            Copy::Unedited
        }
        _ => Copy::Edited,
    }
}

/// Whether the conflicts at a path can end like that now; if not, why, and what to do.
pub(super) fn allow<'a>(
    details: impl Iterator<Item = &'a Detail>,
    choice: Choice,
    discard_edits: bool,
) -> Result<(), Failure> {
    let mut first: Option<&Detail> = None;
    for detail in details {
        detail.allows(choice, discard_edits)?;
        match first {
            Some(first) if choice == Choice::Remote && first.remote != detail.remote => {
                // Which of them was met first says nothing.
                let mut peers = [&first.peer, &detail.peer];
                peers.sort();
                return Err(Failure::new(format!(
                    "{} and {} have different versions of {}: only one could win",
                    peers[0], peers[1], detail.path
                ))
                .hint("keep all of them with --both, or make the file what it should be and use --merged"));
            }
            Some(_) => {}
            None => first = Some(detail),
        }
    }
    Ok(())
}

impl Detail {
    /// Whether the conflict can end like that now; if not, why, and what to do.
    fn allows(&self, choice: Choice, discard_edits: bool) -> Result<(), Failure> {
        let path = &self.path;
        if self.newer.is_some() {
            return Err(Failure::new(format!(
                "{} has another version of {path} by now than the one on record, which nobody here has seen",
                self.peer
            ))
            .hint(format!(
                "it is fetched as soon as the peer is connected; then look at it: mirrorfs conflicts show {path}"
            )));
        }
        match (&self.copy, choice) {
            (_, Choice::Merged) => Ok(()),
            (Some((copy, Copy::Edited)), _) if choice == Choice::Both || !discard_edits => {
                let lost = match choice {
                    Choice::Remote => {
                        "the version of the peer would win, and your edits would be lost"
                    }
                    _ => "your edits would be lost",
                };
                let failure = Failure::new(format!("{copy} was edited: {lost}"));
                Err(failure.hint(format!(
                    "to keep them, make {path} what it should be (cp {copy} {path}) and resolve it with --merged; to have them put into the trash, add --discard-edits to --local or --remote"
                )))
            }
            (Some((_, Copy::Unedited)), Choice::Both) => Ok(()),
            (_, Choice::Both) => Err(self.nothing_beside()),
            _ => Ok(()),
        }
    }

    fn nothing_beside(&self) -> Failure {
        let path = &self.path;
        if self.unit.is_some() {
            return Failure::new(format!("{path} is a Git directory: there is one in one place"))
                .hint("the commits of both sides are in it: merge the peer's, whose hash mirrorfs conflicts show tells, then --local");
        }
        if self.kept.is_some() {
            return Failure::new(format!(
                "{path} is in a Git directory, which must not get files of another name"
            ))
            .hint("take one side's version: --local or --remote");
        }
        if self.remote == Version::Directory {
            return Failure::new(format!("{} has a directory at {path}", self.peer)).hint(format!(
                "move yours away (mv {path} NEWNAME): both are mirrored then"
            ));
        }
        Failure::new(format!("the copy of the version of {} is gone", self.peer)).hint(format!(
            "that means that yours wins; see mirrorfs conflicts show {path}"
        ))
    }
}

/// The names that a peer's version may get beside a file, one after the other.
pub(super) fn names_beside(path: &RelPath) -> impl Iterator<Item = RelPath> {
    let parent = path.parent().unwrap_or_default();
    let name = path.name().to_vec();
    let endings = std::iter::once(".theirs".to_owned())
        .chain((2_u32..=999).map(|number| format!(".theirs-{number}")));
    endings.filter_map(move |ending| {
        let mut longer = name.clone();
        longer.truncate(crate::tree::NAME_MAX - ending.len());
        // Not in the middle of a UTF-8 sequence.
        while longer.len() < name.len()
            && name[longer.len()] & 0xc0 == 0x80
            && longer.pop().is_some()
        {}
        longer.extend_from_slice(ending.as_bytes());
        parent.join(&longer).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(copy: Option<Copy>) -> Detail {
        let path = RelPath::new("dir/notes").unwrap();
        let file = |hash: &str| Version::File {
            size: 3,
            mtime: Timestamp::default(),
            hash: hash.to_owned(),
        };
        Detail {
            path: path.clone(),
            peer: "host".into(),
            since: Timestamp::default(),
            base: file("a"),
            local: file("b"),
            remote: file("c"),
            newer: None,
            copy: copy.map(|copy| (RelPath::new("dir/notes.copy").unwrap(), copy)),
            kept: None,
            info: None,
            unit: None,
            late: false,
        }
    }

    const ALL: [Choice; 4] = [Choice::Local, Choice::Remote, Choice::Both, Choice::Merged];

    #[test]
    fn what_nobody_has_seen_is_decided_by_nobody() {
        let mut unseen = detail(Some(Copy::Unedited));
        for choice in ALL {
            unseen.allows(choice, false).unwrap();
        }
        unseen.newer = Some(Version::Nothing);
        for choice in ALL {
            let failure = unseen.allows(choice, true).unwrap_err();
            assert!(failure.message.contains("host has another version"));
        }
    }

    #[test]
    fn an_edited_copy_is_lost_only_on_purpose() {
        let edited = detail(Some(Copy::Edited));
        for choice in [Choice::Local, Choice::Remote, Choice::Both] {
            let failure = edited.allows(choice, false).unwrap_err();
            assert!(failure.message.contains("edits would be lost"), "{failure}");
            assert!(failure.hint.unwrap().contains("--merged"));
        }
        for choice in [Choice::Local, Choice::Remote] {
            edited.allows(choice, true).unwrap();
        }
        edited.allows(Choice::Both, true).unwrap_err();
        edited.allows(Choice::Merged, false).unwrap();
    }

    #[test]
    fn of_several_peers_not_all_can_win() {
        let (one, mut two) = (detail(None), detail(None));
        let refused = |two: &Detail, choice| allow([&one, two].into_iter(), choice, false);
        refused(&two, Choice::Remote).unwrap();
        two.remote = Version::Directory;
        two.peer = "disk".into();
        let failure = refused(&two, Choice::Remote).unwrap_err();
        assert!(failure.message.contains("disk and host"), "{failure}");
        refused(&two, Choice::Local).unwrap();
    }

    #[test]
    fn both_needs_a_version_to_put_beside_the_file() {
        let says = |detail: &Detail| detail.allows(Choice::Both, false).unwrap_err().to_string();
        assert!(says(&detail(Some(Copy::Missing))).contains("is gone"));
        let mut other = detail(None);
        other.remote = Version::Directory;
        assert!(says(&other).contains("directory"));
        other.kept = Some(".mirrorfs/conflicts/x".into());
        assert!(says(&other).contains("Git"));
    }

    #[test]
    fn names_beside_a_file_are_many_and_short_enough() {
        let names = |path: &str| -> Vec<String> {
            let path = RelPath::new(path).unwrap();
            names_beside(&path)
                .take(2)
                .map(|path| path.to_string())
                .collect()
        };
        assert_eq!(names("d/x"), ["d/x.theirs", "d/x.theirs-2"]);
        let long = "ä".repeat(127);
        for name in names(&long) {
            assert!(name.len() <= 255 && name.contains("ä.theirs"), "{name}");
        }
    }

    /// The journal knows of a newer version than the one on record before that is fetched.
    #[test]
    fn a_newer_version_is_seen_before_it_is_fetched() {
        use mirrorfs_journal::{Durability, Journal};
        use std::fs;
        let dir = tempfile::tempdir().unwrap();
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("x"), b"mine").unwrap();
        fs::write(tree.path().join("x.copy"), b"theirs").unwrap();
        let root = Root::new(fs::File::open(tree.path()).unwrap().into());
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let path = |text: &str| RelPath::new(text).unwrap();
        let entry = |content: &str| Entry {
            content: Content::File {
                size: content.len() as u64,
                hash: crate::tree::ContentHash::of(content.as_bytes()),
            },
            mode: 0o644,
            mtime: Timestamp::default(),
            xattrs: crate::tree::Xattrs::new(),
        };
        let record = Conflict {
            id: 0,
            peer: crate::tree::PeerId(0),
            path: path("x"),
            base: None,
            local: Some(entry("mine")),
            remote: Some(entry("theirs")),
            copy: Some(path("x.copy")),
            info: None,
            since: Timestamp::default(),
            unit: None,
        };
        let observed = |content: &str| {
            let (record, seen) = (record.clone(), entry(content));
            let update = journal.update(Durability::Normal, move |update| {
                let peer = match update.peers()?.first() {
                    Some(peer) => peer.id,
                    None => update.add_peer("host", "/host")?,
                };
                update.observe(peer, &record.path, Some(&seen))?;
                update.open_conflict(&Conflict { peer, ..record })
            });
            update.unwrap();
            let view = journal.snapshot().unwrap();
            details(&view, &root, &path("x")).unwrap().remove(0)
        };
        let now = observed("theirs");
        assert_eq!((now.newer, now.peer.as_str()), (None, "host"));
        assert_eq!(now.copy, Some((path("x.copy"), Copy::Unedited)));
        assert_eq!(now.remote, version(Some(&entry("theirs"))));
        assert!(matches!(now.local, Version::File { size: 4, .. }));
        assert_eq!(
            observed("newer").newer,
            Some(version(Some(&entry("newer"))))
        );
        fs::write(tree.path().join("x.copy"), b"edited").unwrap();
        assert_eq!(observed("theirs").copy.unwrap().1, Copy::Edited);
        fs::remove_file(tree.path().join("x.copy")).unwrap();
        assert_eq!(observed("theirs").copy.unwrap().1, Copy::Missing);
        let view = journal.snapshot().unwrap();
        let failure = details(&view, &root, &path("y")).unwrap_err();
        assert!(failure.hint.unwrap().contains("conflicts list"));
    }
}
