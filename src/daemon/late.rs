//! Late versions of this side: bringing into the tree what programs have written to after a
//! peer's change had replaced it, and deciding about such versions.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mirrorfs_journal::{Journal, View};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::conflicts::{self, Choice, Copy, Detail, Version};
use super::failure::{Failure, OrFail};
use super::put;
use super::service::blocking;
use crate::fs::{Attributes, Expect, StagedName};
use crate::replica::Owner;
use crate::replica::beneath::Place;
use crate::replica::keep::Shelf;
use crate::replica::late::{beside, is_in_git};
use crate::replica::look::{Look, look_in};
use crate::replica::trash::{Kept, RestoreError, Trash};
use crate::replicator::LocalTree;
use crate::replicator::late::{At, Late, Moving, announce, arrived, decided, late, put_back};
use crate::tree::{Content, Ino, Kind, RelPath, scan};

/// How many names are tried.
const NAMES: usize = 1000;
/// When something is tried again that could not be brought in.
const AGAIN: Duration = Duration::from_secs(5);

/// Brings late versions into a tree, one at a time.
pub(super) struct LateComers {
    tree: LocalTree,
    journal: Journal,
    came: Arc<Notify>,
    one_at_a_time: Mutex<()>,
}

impl LateComers {
    /// Begins to listen to the filesystem.
    pub(super) fn new(tree: LocalTree, journal: Journal) -> Self {
        let came = Arc::new(Notify::new());
        let told = Arc::clone(&came);
        tree.filesystem
            .on_late(Some(Box::new(move || told.notify_one())));
        Self {
            tree,
            journal,
            came,
            one_at_a_time: Mutex::new(()),
        }
    }

    /// Brings in what there is, and then what comes, until the task is dropped.
    pub(super) async fn attend(self: Arc<Self>) {
        loop {
            let this = Arc::clone(&self);
            let left = match blocking(move || this.bring_in()).await {
                Ok(left) => left,
                Err(failure) => {
                    tracing::warn!("{failure}");
                    true
                }
            };
            if left {
                let _ = tokio::time::timeout(AGAIN, self.came.notified()).await;
            } else {
                self.came.notified().await;
            }
        }
    }

    /// Brings in what there is. Says whether something is left.
    pub(super) fn bring_in(&self) -> Result<bool, Failure> {
        let _one = self.one_at_a_time.lock();
        let message = || "cannot look for late versions in .mirrorfs/late".to_owned();
        let waiting = Trash::late(&self.tree.reserved).or_fail(message)?;
        let mut left = false;
        for kept in waiting.list().or_fail(message)? {
            match self.bring_one(&waiting, &kept) {
                Ok(at) => {
                    tracing::info!(path = %kept.path, ?at, "a late version was brought back");
                    waiting.tidy(&kept);
                }
                Err(error) => {
                    left = true;
                    tracing::warn!(path = %kept.path, %error, "a late version stays in .mirrorfs/late");
                }
            }
        }
        Ok(left)
    }

    fn bring_one(&self, waiting: &Trash, kept: &Kept) -> Result<At, RestoreError> {
        let (tree, path) = (&self.tree, &kept.path);
        let dir = waiting.parent(kept)?;
        let place = Place::new(&dir, kept.at.name());
        let kind = |at: &RelPath| tree.filesystem.attributes_at(at).map(|found| found.kind);
        let found = |at| Late {
            on: None,
            path: path.clone(),
            at,
            since: crate::clock::wall(),
        };
        if is_in_git(path, kind) {
            let slot = kept.at.components().next().unwrap_or_default();
            let slot = String::from_utf8_lossy(slot).into_owned();
            let at = At::Kept(Shelf::new(tree.reserved.conflicts(), slot).keep(place, path)?);
            arrived(&self.journal, Some(found(at.clone()))).map_err(io::Error::other)?;
            return Ok(at);
        }
        let ino = Ino(place.ino()?.ok_or(RestoreError::Gone)?);
        let at = beside(path, crate::clock::wall())
            .take(NAMES)
            .find(|at| tree.filesystem.attributes_at(at).is_none())
            .ok_or(RestoreError::InTheWay)?;
        let staged = StagedName::random().map_err(io::Error::other)?;
        let late = found(At::Tree(at.clone()));
        let moving = Moving {
            staged: staged.clone(),
            ino,
            late: late.clone(),
        };
        announce(&self.journal, moving).map_err(io::Error::other)?;
        let staging = tree.reserved.staging();
        rustix::fs::renameat(&dir, place.os_name(), staging, staged.as_str())?;
        let placed = put::place_staged(tree, &at, staged.clone());
        if placed.is_err() {
            tree.filesystem.not_placed(&staged, ino, path)?;
            put_back(&tree.reserved, &staged, path).map_err(io::Error::other)?;
        }
        let record = placed.is_ok().then(|| late.clone());
        arrived(&self.journal, record).map_err(io::Error::other)?;
        placed.map(|()| late.at)
    }

    /// Ends the conflicts of late versions at a path. Says which files they have become, if
    /// they stay.
    pub(super) fn resolve(&self, open: &[Late], choice: Choice) -> Result<Vec<RelPath>, Failure> {
        let mut beside = Vec::new();
        for late in open {
            let path = &late.path;
            let message = || format!("cannot settle the late version of {path}");
            match &late.at {
                At::Tree(at) => match choice {
                    Choice::Local | Choice::Merged => self.remove(at).or_fail(message)?,
                    Choice::Remote => {
                        self.put(at, std::iter::once(path.clone()), true)
                            .or_fail(message)?;
                        self.remove(at).or_fail(message)?;
                    }
                    Choice::Both => {
                        let names = conflicts::names_beside(path);
                        beside.push(self.put(at, names, false).or_fail(message)?);
                        self.remove(at).or_fail(message)?;
                    }
                },
                At::Kept(at) => {
                    if matches!(choice, Choice::Remote | Choice::Both) {
                        return Err(Failure::new(format!(
                            "{path} is in a Git directory: the late version is not put there"
                        ))
                        .hint(format!(
                            "it is kept as .mirrorfs/conflicts/{at}, and stays there with --local"
                        )));
                    }
                }
            }
            decided(&self.journal, late).or_fail(message)?;
        }
        Ok(beside)
    }

    fn remove(&self, at: &RelPath) -> Result<(), RestoreError> {
        match self.tree.filesystem.found_at(at) {
            Some(found) => put::remove(&self.tree, at, self.as_it_is(&found)),
            None => Ok(()),
        }
    }

    /// What is there, unchanged from now on.
    fn as_it_is(&self, found: &Attributes) -> Expect {
        Expect::Node {
            ino: found.ino,
            unchanged_since: self.journal.recorder().last(),
        }
    }

    /// Puts the content of a late version at the first of some names that is free, or in
    /// place of what is there.
    fn put(
        &self,
        at: &RelPath,
        names: impl Iterator<Item = RelPath>,
        replaces: bool,
    ) -> Result<RelPath, RestoreError> {
        let tree = &self.tree;
        let root = tree.filesystem.lower().root().as_fd();
        let parent = at.parent().unwrap_or_default();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
        let dir = crate::tree::reach::open_beneath(root, &parent, flags)?;
        let entry = match look_in(&dir, at.name())? {
            Look::Seen(seen) if matches!(seen.entry.content, Content::File { .. }) => seen.entry,
            Look::Absent => return Err(RestoreError::Gone),
            _ => return Err(io::Error::other("it is being written").into()),
        };
        let file = scan::open_file(dir.as_fd(), at.name())?;
        let owner = scan::stat_at(dir.as_fd(), at.name())?.map(|stat| Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        });
        for name in names {
            let expect = match tree.filesystem.found_at(&name) {
                None => Expect::Absent,
                Some(found) if replaces && found.kind() != Kind::Directory => self.as_it_is(&found),
                Some(_) => continue,
            };
            put::place_entry(tree, &name, &entry, Some(&file), owner, expect)?;
            return Ok(name);
        }
        Err(RestoreError::InTheWay)
    }
}

/// The late versions at a path that nobody has decided about.
pub(super) fn at(view: &View, path: &RelPath) -> Result<Vec<Late>, mirrorfs_journal::Error> {
    let mut open = late(view)?;
    open.retain(|late| late.path == *path);
    Ok(open)
}

/// A late version for people. `look` tells what is at a path of the tree.
pub(super) fn detail(
    view: &View,
    late: &Late,
    look: impl Fn(&RelPath) -> Version,
) -> Result<Detail, mirrorfs_journal::Error> {
    let peer = match late.on {
        None => String::new(),
        Some(peer) => view.peer(peer)?.map_or_else(String::new, |peer| peer.name),
    };
    let (copy, kept, remote) = match &late.at {
        At::Tree(at) => {
            let there = look(at);
            let state = match there {
                Version::Nothing => Copy::Missing,
                _ => Copy::Unedited,
            };
            (Some((at.clone(), state)), None, there)
        }
        At::Kept(at) => {
            let kept = format!(".mirrorfs/conflicts/{at}");
            let reason = format!("a file that is kept as {kept}");
            (None, Some(kept), Version::Unknown { reason })
        }
    };
    Ok(Detail {
        path: late.path.clone(),
        peer,
        since: late.since,
        base: Version::Nothing,
        local: look(&late.path),
        remote,
        newer: None,
        copy,
        kept,
        info: None,
        unit: None,
        late: true,
    })
}
