//! Which mirror a path belongs to. A mount hides `.mirrorfs`, so a mounted tree is
//! found through the state directory.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::failure::Failure;
use super::gone;
use super::mounts::{self, Mounts};
use super::state::{MirrorDir, Record, StateDir};
use crate::replica::Reserved;

/// Finds the mirror that `path` is the tree of, or lies in; none if it lies in none
/// that this user has state of.
pub fn find(state: &StateDir, path: &Path) -> Result<Option<(MirrorDir, Record)>, Failure> {
    let canonical = match mounts::canonical(path) {
        Ok(canonical) => canonical,
        Err(error) => {
            return Err(gone::missing(state, path)?.unwrap_or_else(|| {
                Failure::new(format!("cannot resolve {}", path.display()))
                    .because(&error)
                    .hint("name the directory of a mirror, or one inside it")
            }));
        }
    };
    let all = state.all()?;
    let depth = |record: &Record| record.tree.components().count();
    let above = |record: &Record| canonical.starts_with(&record.tree);
    let by_path = all.iter().filter(|(_, record)| above(record));
    let nearest = by_path.clone().map(|(_, record)| depth(record)).max();
    // Several mirrors may have had their trees at one place, one after the other.
    let mut last = None;
    for (dir, record) in by_path.filter(|(_, record)| Some(depth(record)) == nearest) {
        if dir.owner()?.is_some() {
            return Ok(Some((dir.clone(), record.clone())));
        }
        if !is_anothers(record) {
            let at = dir.taken_at();
            if last.as_ref().is_none_or(|(before, _, _)| at >= *before) {
                last = Some((at, dir, record));
            }
        }
    }
    if let Some((_, dir, record)) = last {
        return Ok(Some((dir.clone(), record.clone())));
    }
    // A mount seen through another path, such as a bind mount.
    if let Ok(found) = fs::metadata(&canonical) {
        for (dir, record) in &all {
            if record.device == Some(found.dev()) && dir.owner()?.is_some() {
                return Ok(Some((dir.clone(), record.clone())));
            }
        }
    }
    // A tree that was moved since its last mount.
    for above in canonical.ancestors() {
        if let Some(identity) = identity(above) {
            let Some(dir) = state.known(identity.mirror, identity.replica)? else {
                return Ok(None);
            };
            return Ok(dir.record()?.map(|record| {
                let tree = above.to_path_buf();
                (dir, Record { tree, ..record })
            }));
        }
    }
    Ok(None)
}

/// Like [`find`], and says what to do if there is none.
pub fn require(state: &StateDir, path: &Path) -> Result<(MirrorDir, Record), Failure> {
    if let Some(found) = find(state, path)? {
        return Ok(found);
    }
    let name = path.display();
    let failure = Failure::new(format!("{name} is not in a mirror that is known here"));
    let mounted = mounts::canonical(path)
        .ok()
        .and_then(|path| Mounts::read().ok()?.mirror_above(&path).cloned());
    Err(match mounted {
        Some(mount) => {
            let user = mount
                .user
                .map_or_else(String::new, |user| format!(" by user {user}"));
            failure.hint(format!(
                "{} is mounted{user}, with its state elsewhere than in {}: run the command as that user, or with the MIRRORFS_STATE of the mount",
                mount.path.display(),
                state.path().display()
            ))
        }
        None => failure.hint(format!(
            "mirrorfs mount {name} PEER makes it one; mirrorfs status without DIR lists all"
        )),
    })
}

/// Whether the tree that a record names is now another replica's. A tree without
/// identity, or gone, is not.
fn is_anothers(record: &Record) -> bool {
    identity(&record.tree).is_some_and(|identity| identity.replica != record.replica)
}

/// The identity that a tree which is not mounted carries, if it can be read.
pub(super) fn identity(tree: &Path) -> Option<crate::replica::Identity> {
    let root = File::open(tree).ok()?;
    let (_, identity) = Reserved::open(root.as_fd()).ok()??;
    Some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::state::{Environment, MirrorIdText};
    use crate::tree::Id;

    #[test]
    fn finds_a_mirror_by_its_tree_and_by_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let state = StateDir::resolve(&Environment {
            state: Some(dir.join("state")),
            ..Environment::default()
        })
        .unwrap();
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("deep")).unwrap();
        assert!(find(&state, &tree).unwrap().is_none());
        let failure = require(&state, &tree).unwrap_err();
        assert!(failure.hint.unwrap().contains("mirrorfs mount"));

        let root = File::open(&tree).unwrap();
        let (_, identity) = Reserved::create(root.as_fd(), Id([5; 16])).unwrap();
        // Known by identity alone is not enough: its state is elsewhere.
        assert!(find(&state, &tree).unwrap().is_none());

        let mirror = state.claim(identity.mirror, identity.replica).unwrap();
        let record = Record {
            id: MirrorIdText(identity.mirror),
            replica: identity.replica,
            name: "tree".into(),
            tree: tree.clone(),
            mode: crate::daemon::state::Mode::TwoWay,
            conflict: crate::daemon::state::OnConflict::Keep,
            symlinks: crate::tree::links::Symlinks::All,
            device: None,
        };
        mirror.write_record(&record).unwrap();
        for inside in [tree.clone(), tree.join("deep")] {
            let (found, known) = find(&state, &inside).unwrap().unwrap();
            assert_eq!((found, known), (mirror.clone(), record.clone()));
        }

        // Another mirror's tree was at the same place: whoever has it now is meant.
        let next = state.claim(Id([7; 16]), Id([8; 16])).unwrap();
        let another = Record {
            id: MirrorIdText(Id([7; 16])),
            replica: Id([8; 16]),
            ..record.clone()
        };
        next.write_record(&another).unwrap();
        let (found, _) = find(&state, &tree).unwrap().unwrap();
        assert_eq!(found, mirror, "by the identity of the tree");
        let held = crate::daemon::lock::Lock::take_from_the_dying(&next.lock()).unwrap();
        let (found, _) = find(&state, &tree).unwrap().unwrap();
        assert_eq!(found, next, "by its owner");
        drop(held);
        fs::remove_dir_all(next.path()).unwrap();

        // Moved, and another tree put in its place.
        let moved = dir.join("moved");
        fs::rename(&tree, &moved).unwrap();
        fs::create_dir(&tree).unwrap();
        let root = File::open(&tree).unwrap();
        Reserved::create(root.as_fd(), Id([6; 16])).unwrap();
        let (found, known) = find(&state, &moved.join("deep")).unwrap().unwrap();
        assert_eq!((found, known.tree), (mirror, moved));
        assert!(find(&state, &tree).unwrap().is_none());
    }
}
