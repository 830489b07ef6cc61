//! Putting something new into a mounted tree, as an ordinary change of this side: it is
//! recorded and mirrored, and never takes the place of anything.

use std::fs::File;
use std::io;

use mirrorfs_journal::Origin;
use rustix::fs::OFlags;

use crate::fs::{DoorOp, DoorResult, Expect, StagedName};
use crate::replica::trash::{RestoreError, refuse_reserved};
use crate::replica::{self, Owner};
use crate::replicator::LocalTree;
use crate::tree::{Content, Entry, Kind, RelPath, Timestamp, Xattrs, reach};

/// Puts an entry at a path where nothing is, with the content of `from` if it is a file.
/// Directories that are missing on the way are made.
pub(super) fn put(
    tree: &LocalTree,
    path: &RelPath,
    entry: &Entry,
    from: Option<&File>,
    owner: Option<Owner>,
) -> Result<(), RestoreError> {
    refuse_reserved(path)?;
    if tree.filesystem.attributes_at(path).is_some() {
        return Err(RestoreError::InTheWay);
    }
    place_entry(tree, path, entry, from, owner, Expect::Absent)
}

/// The same where `expect` is what is there: that goes to the trash.
pub(super) fn place_entry(
    tree: &LocalTree,
    path: &RelPath,
    entry: &Entry,
    from: Option<&File>,
    owner: Option<Owner>,
    expect: Expect,
) -> Result<(), RestoreError> {
    refuse_reserved(path)?;
    let mut way = Way::default();
    let result = way
        .make(tree, path)
        .and_then(|()| {
            // Who may not choose owners makes files of its own.
            let owner = tree.owner.and(owner).or(tree.owner);
            let staged = way.stage(tree, entry, from, owner)?;
            way.place(staged, path, expect);
            Ok(())
        })
        .and_then(|()| carry_out(tree, std::mem::take(&mut way.ops)));
    if result.is_err() && matches!(expect, Expect::Node { .. }) {
        // What is under the last name may be what was to be replaced.
        way.staged.pop();
    }
    way.clear(tree);
    result
}

/// Puts something that lies in the staging directory at a path where nothing is. If it
/// cannot be, it stays there.
pub(super) fn place_staged(
    tree: &LocalTree,
    path: &RelPath,
    staged: StagedName,
) -> Result<(), RestoreError> {
    refuse_reserved(path)?;
    let mut way = Way::default();
    let result = way
        .make(tree, path)
        .map(|()| way.place(staged, path, Expect::Absent))
        .and_then(|()| carry_out(tree, std::mem::take(&mut way.ops)));
    way.clear(tree);
    result
}

/// Removes what `expect` says is at a path: it goes to the trash.
pub(super) fn remove(tree: &LocalTree, path: &RelPath, expect: Expect) -> Result<(), RestoreError> {
    let op = DoorOp::Remove {
        path: path.clone(),
        expect,
        agreed: false,
    };
    carry_out(tree, vec![(op, Origin::Local)])
}

/// What leads to something new in the tree: the directories that are missing, and itself.
#[derive(Default)]
struct Way {
    staged: Vec<replica::StagedName>,
    ops: Vec<(DoorOp, Origin)>,
}

impl Way {
    /// The directories of a path.
    fn make(&mut self, tree: &LocalTree, path: &RelPath) -> Result<(), RestoreError> {
        let mut at = RelPath::ROOT;
        let parent = path.parent().unwrap_or_default();
        for name in parent.components() {
            at = at.join(name).map_err(io::Error::other)?;
            match tree.filesystem.attributes_at(&at) {
                Some(found) if found.kind == Kind::Directory => {}
                Some(_) => return Err(RestoreError::NoDirectory(at)),
                None => {
                    let staged = self.stage(tree, &directory(), None, tree.owner)?;
                    self.place(staged, &at, Expect::Absent);
                }
            }
        }
        Ok(())
    }

    fn stage(
        &mut self,
        tree: &LocalTree,
        entry: &Entry,
        from: Option<&File>,
        owner: Option<Owner>,
    ) -> Result<StagedName, RestoreError> {
        let name = replica::StagedName::random().map_err(io::Error::other)?;
        self.staged.push(name.clone());
        match from {
            Some(from) => tree.staging.instantiate_copy(entry, &name, from, owner),
            None => tree.staging.instantiate(entry, &name, false, owner),
        }
        .map_err(io::Error::other)?;
        Ok(StagedName::new(name.as_str())
            .ok_or_else(|| io::Error::other("a staged thing has a name of another form"))?)
    }

    fn place(&mut self, staged: StagedName, path: &RelPath, expect: Expect) {
        let op = DoorOp::Place {
            staged,
            path: path.clone(),
            expect,
            agreed: false,
        };
        self.ops.push((op, Origin::Local));
    }

    /// Removes what was staged and not placed. What was placed is not there under this name
    /// any more.
    fn clear(&self, tree: &LocalTree) {
        for name in &self.staged {
            if let Err(error) = tree.staging.discard(name) {
                tracing::warn!(%error, "something stays in the staging directory");
            }
        }
    }
}

fn carry_out(tree: &LocalTree, ops: Vec<(DoorOp, Origin)>) -> Result<(), RestoreError> {
    let results = match &tree.door {
        Some(door) => door.lock().apply(&tree.filesystem, ops),
        // Nothing is mounted, and the tree is this process's.
        None => ops
            .into_iter()
            .map(|(op, origin)| tree.filesystem.carry_out(op, origin))
            .collect(),
    };
    for result in results {
        if let DoorResult::Refused { reason } = result {
            return Err(io::Error::other(reason).into());
        }
    }
    Ok(())
}

fn directory() -> Entry {
    Entry {
        content: Content::Directory,
        mode: 0o755,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

/// Opens a file of the covered directory for reading.
pub(super) fn open_lower(tree: &LocalTree, path: &RelPath) -> io::Result<File> {
    use std::os::fd::AsFd;
    let root = tree.filesystem.lower().root();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    Ok(reach::open_beneath(root.as_fd(), path, flags)?.into())
}
