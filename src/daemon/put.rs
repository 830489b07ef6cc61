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
    let mut places = Vec::new();
    let mut at = RelPath::ROOT;
    let parent = path.parent().unwrap_or_default();
    for name in parent.components() {
        at = at.join(name).map_err(io::Error::other)?;
        match tree.filesystem.attributes_at(&at) {
            Some(found) if found.kind == Kind::Directory => {}
            Some(_) => return Err(RestoreError::NoDirectory(at)),
            None => places.push((at.clone(), directory(), None, tree.owner)),
        }
    }
    // Who may not choose owners makes files of its own.
    let owner = tree.owner.and(owner).or(tree.owner);
    places.push((path.clone(), entry.clone(), from, owner));

    let mut staged = Vec::new();
    let mut ops = Vec::new();
    let result = places
        .into_iter()
        .try_for_each(|(path, entry, from, owner)| {
            let name = replica::StagedName::random().map_err(io::Error::other)?;
            staged.push(name.clone());
            match from {
                Some(from) => tree.staging.instantiate_copy(&entry, &name, from, owner),
                None => tree.staging.instantiate(&entry, &name, false, owner),
            }
            .map_err(io::Error::other)?;
            let staged = StagedName::new(name.as_str())
                .ok_or_else(|| io::Error::other("a staged thing has a name of another form"))?;
            let op = DoorOp::Place {
                staged,
                path,
                expect: Expect::Absent,
                agreed: false,
            };
            ops.push((op, Origin::Local));
            Ok::<_, RestoreError>(())
        })
        .and_then(|()| carry_out(tree, ops));
    for name in &staged {
        // What was placed is not there under this name any more.
        if let Err(error) = tree.staging.discard(name) {
            tracing::warn!(%error, "something stays in the staging directory");
        }
    }
    result
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
