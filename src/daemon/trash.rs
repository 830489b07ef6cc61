//! The trash of a tree or of a peer directory, for commands, and keeping it in bounds.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failure::{Failure, OrFail};
use super::lock::Lock;
use super::{locate, mounts, put, site};
use crate::replica::look::Look;
use crate::replica::trash::bounds::Bounds;
use crate::replica::trash::{Kept, Removed, RestoreError, Trash};
use crate::replica::{Owner, Reserved, Root};
use crate::replicator::LocalTree;
use crate::tree::{Content, RelPath, Timestamp, scan};

/// What is said of a path that nothing was found for.
pub const NOT_THERE: &str = "it is not in the trash";

/// What became of something that was to be brought back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Restored {
    /// Where it was.
    pub path: RelPath,
    /// Where it was to go, if that is somewhere else.
    pub to: Option<RelPath>,
    /// Why it is still in the trash; none if it was brought back.
    pub error: Option<String>,
}

/// Brings things back one by one. `to` is where what was asked for goes instead of where
/// it was.
fn restore(
    list: &[Kept],
    paths: &[RelPath],
    to: Option<&RelPath>,
    mut bring: impl FnMut(&Kept, &RelPath) -> Result<(), RestoreError>,
) -> Vec<Restored> {
    let mut all = Vec::new();
    for wanted in paths {
        let found = Kept::find(list, wanted);
        if found.is_empty() {
            all.push(Restored {
                path: wanted.clone(),
                to: to.cloned(),
                error: Some(NOT_THERE.to_owned()),
            });
        }
        for kept in found {
            let target = match to {
                None => kept.path.clone(),
                Some(to) => kept.path.rebase(wanted, to).unwrap_or_else(|| to.clone()),
            };
            let error = bring(&kept, &target).err().map(|error| error.to_string());
            all.push(Restored {
                to: (target != kept.path).then_some(target),
                path: kept.path,
                error,
            });
        }
    }
    all
}

/// Brings things back into a tree that this process has.
pub(super) fn restore_mounted(
    tree: &LocalTree,
    paths: &[RelPath],
    to: Option<&RelPath>,
) -> Result<Vec<Restored>, Failure> {
    let trash = of(&tree.reserved)?;
    let list = trash.list().or_fail(|| "cannot list the trash".into())?;
    Ok(restore(&list, paths, to, |kept, to| {
        let dir = trash.parent(kept)?;
        let name = kept.at.name();
        let entry = match crate::replica::look::look_in(&dir, name)? {
            Look::Seen(seen) => seen.entry,
            Look::Absent => return Err(RestoreError::Gone),
            Look::Changing => return Err(io::Error::other("it is being written").into()),
            Look::Special => {
                return Err(io::Error::other(
                    "it is a special file: unmount the tree and try again",
                )
                .into());
            }
        };
        let owner = scan::stat_at(dir.as_fd(), name)?.map(|stat| Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        });
        let file = match entry.content {
            Content::File { .. } => Some(scan::open_file(dir.as_fd(), name)?),
            _ => None,
        };
        put::put(tree, to, &entry, file.as_ref(), owner)?;
        if let Err(error) = trash.remove(kept) {
            tracing::warn!(%error, "something was brought back and is still in the trash");
        }
        Ok(())
    }))
}

/// Brings back what a wipe on a peer had taken before a brake was engaged.
pub(super) fn bring_back(tree: &LocalTree, paths: &[RelPath]) -> Result<(), Failure> {
    for Restored { path, error, .. } in restore_mounted(tree, paths, None)? {
        // What has been made anew meanwhile stays as it is.
        if let Some(error) = error {
            tracing::warn!(%path, error, "not brought back from the trash");
        }
    }
    Ok(())
}

/// The trash of a replica.
pub(super) fn of(reserved: &Reserved) -> Result<Trash, Failure> {
    Trash::of(reserved).or_fail(|| "cannot open the trash".into())
}

/// A directory with a trash that nobody has mounted: a tree, or a peer's copy.
pub struct Plain {
    root: Root,
    path: PathBuf,
    trash: Trash,
    _lock: Option<Lock>,
}

impl Plain {
    /// The root of the replica that a path is in, if it is in one that is not mounted.
    pub fn root_of(path: &Path) -> Result<Option<PathBuf>, Failure> {
        let path =
            mounts::canonical(path).or_fail(|| format!("cannot resolve {}", path.display()))?;
        let root = path.ancestors().find(|at| locate::identity(at).is_some());
        Ok(root.map(Path::to_path_buf))
    }

    /// Opens a replica by its root. A tree must not be mounted while it is worked in, so
    /// its lock is taken; an agent that serves a directory takes what is done in it for
    /// the work of the directory's user.
    pub fn open(path: &Path, is_tree: bool) -> Result<Self, Failure> {
        let shown = path.display();
        let message = || format!("cannot open {shown}");
        let root = File::open(path).or_fail(message)?;
        let Some((reserved, _)) = Reserved::open(root.as_fd()).or_fail(message)? else {
            return Err(Failure::new(format!("{shown} has no .mirrorfs")));
        };
        let lock = if is_tree {
            Some(site::take_tree_lock(&reserved, path)?)
        } else {
            None
        };
        Ok(Self {
            root: Root::new(root.into()),
            path: path.to_path_buf(),
            trash: of(&reserved)?,
            _lock: lock,
        })
    }

    /// What lies in the trash, the latest first.
    pub fn list(&self) -> Result<Vec<Kept>, Failure> {
        self.trash.list().or_fail(|| self.failed("list"))
    }

    /// Brings things back.
    pub fn restore(
        &self,
        paths: &[RelPath],
        to: Option<&RelPath>,
    ) -> Result<Vec<Restored>, Failure> {
        Ok(restore(&self.list()?, paths, to, |kept, to| {
            self.trash.restore(kept, &self.root, to)
        }))
    }

    /// Removes for good what was put there longer ago than `age`.
    pub fn empty(&self, age: Duration) -> Result<Removed, Failure> {
        self.trash.empty(ago(age)).or_fail(|| self.failed("empty"))
    }

    fn failed(&self, what: &str) -> String {
        let trash = self.path.join(".mirrorfs/trash");
        format!("cannot {what} {}", trash.display())
    }
}

/// The moment that long ago. What is put into the trash within the present second counts
/// as old enough for an age of nothing.
pub(super) fn ago(age: Duration) -> Timestamp {
    let now = Timestamp::now();
    let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    Timestamp {
        secs: now.secs.saturating_sub(age).saturating_add(1),
        nanos: 0,
    }
}

/// Removes from a trash what is not to be kept any more.
pub(super) fn keep_in_bounds(bounds: &mut Bounds) -> Result<Removed, Failure> {
    bounds
        .keep(crate::clock::wall())
        .or_fail(|| "cannot keep the trash in bounds".into())
}
