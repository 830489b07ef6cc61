//! The brake for the root of a tree: where both sides had agreed on something, a directory
//! that is missing, or that is empty and was never a tree, is not the tree. Most likely its
//! disk is not mounted. It is neither exchanged with the peers nor filled from them until
//! somebody says so.

use std::path::Path;

use super::exit::Exit;
use super::failure::Failure;
use super::state::{MirrorDir, Record, StateDir, canonical_as_far_as_it_exists};
use crate::replica::Identity;

/// The mirror whose tree was at a path at its last mount, and that has agreed on something
/// with a peer.
pub(super) fn known_at(state: &StateDir, tree: &Path) -> Result<Option<Record>, Failure> {
    let mut known = None;
    for (dir, record) in state.all()? {
        if record.tree == tree && has_agreed(&dir) {
            // Of several the one that was mounted last.
            let at = dir.taken_at();
            if known.as_ref().is_none_or(|(last, _)| at >= *last) {
                known = Some((at, record));
            }
        }
    }
    Ok(known.map(|(_, record)| record))
}

/// Whether anything was agreed on with a peer. What cannot be read was not.
fn has_agreed(dir: &MirrorDir) -> bool {
    let Ok(Some(view)) = mirrorfs_journal::look(dir.path()) else {
        return false;
    };
    let peers = view.peers().unwrap_or_default();
    peers
        .iter()
        .any(|peer| view.base_count(peer.id).is_ok_and(|count| count > 0))
}

impl Record {
    /// Who the tree was.
    pub(super) fn identity(&self) -> Identity {
        Identity {
            mirror: self.id.0,
            replica: self.replica,
        }
    }
}

/// Why an empty directory is not taken for the tree that was there.
pub(super) fn emptied(record: &Record) -> Failure {
    let tree = record.tree.display();
    brake(record, "is empty and has no .mirrorfs").hint(format!(
        "is its disk mounted? If it is gone for good, mirrorfs resume {tree} --refill brings everything back from the peers"
    ))
}

/// Why the tree of a mirror that is not mounted is not there, and what to do, for its status.
pub(super) fn told(dir: &MirrorDir, record: &Record) -> Option<String> {
    let is_empty = std::fs::read_dir(&record.tree).map(|mut names| names.next().is_none());
    let failure = match is_empty {
        Ok(true) => emptied(record),
        Ok(false) => return None,
        Err(_) => explain(record)?,
    };
    let hint = failure.hint.unwrap_or_default();
    has_agreed(dir).then(|| format!("{}; {hint}", failure.message))
}

/// Why nothing is done with a path at which there is no directory any more; none if no tree
/// was there.
pub(super) fn missing(state: &StateDir, path: &Path) -> Result<Option<Failure>, Failure> {
    let Ok(tree) = canonical_as_far_as_it_exists(path) else {
        return Ok(None);
    };
    if std::fs::symlink_metadata(&tree).is_ok_and(|found| found.is_dir()) {
        return Ok(None);
    }
    Ok(known_at(state, &tree)?.as_ref().and_then(explain))
}

/// Why a tree is not there; none if a directory is.
fn explain(record: &Record) -> Option<Failure> {
    let what = match std::fs::symlink_metadata(&record.tree) {
        Ok(found) if found.is_dir() => return None,
        Ok(_) => "is no directory any more",
        Err(_) => "does not exist any more",
    };
    let tree = record.tree.display();
    Some(brake(record, what).hint(format!(
        "is its disk mounted, or was it moved? If it is gone for good, make an empty directory there; mirrorfs resume {tree} --refill then brings everything back from the peers"
    )))
}

fn brake(record: &Record, what: &str) -> Failure {
    Failure::new(format!(
        "{} was the tree of the mirror {} and {what}: nothing is exchanged",
        record.tree.display(),
        record.name
    ))
    .exit(Exit::Brake)
}

#[cfg(test)]
mod tests {
    use mirrorfs_journal::{BaseChange, Durability, Journal};

    use super::*;
    use crate::daemon::state::{Environment, MirrorIdText, Mode, OnConflict};
    use crate::tree::{Content, Entry, Id, RelPath, Timestamp, Xattrs};

    #[test]
    fn only_where_something_was_agreed_on_a_tree_can_be_gone() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let state = StateDir::resolve(&Environment {
            state: Some(dir.join("state")),
            ..Environment::default()
        })
        .unwrap();
        let tree = dir.join("tree");
        let id = Id([5; 16]);
        let mirror = state.claim(id, id).unwrap();
        let record = Record {
            id: MirrorIdText(id),
            replica: id,
            name: "web".into(),
            tree: tree.clone(),
            mode: Mode::TwoWay,
            conflict: OnConflict::Keep,
            symlinks: crate::tree::links::Symlinks::All,
            device: None,
        };
        mirror.write_record(&record).unwrap();
        assert!(missing(&state, &tree).unwrap().is_none());
        let (journal, _) = Journal::open(mirror.path()).unwrap();
        let agree = |update: &mirrorfs_journal::Update<'_>| {
            let peer = update.add_peer("host", "/host")?;
            update.apply_base(
                peer,
                &[BaseChange::Put {
                    path: RelPath::new("x").map_err(mirrorfs_journal::Error::other)?,
                    node: None,
                    entry: Entry {
                        content: Content::Directory,
                        mode: 0o755,
                        mtime: Timestamp::default(),
                        xattrs: Xattrs::new(),
                    },
                }],
            )
        };
        journal.update(Durability::Normal, agree).unwrap();
        assert_eq!(known_at(&state, &tree).unwrap(), Some(record.clone()));
        assert_eq!(known_at(&state, &dir).unwrap(), None);
        let failure = missing(&state, &tree).unwrap().unwrap();
        assert!(failure.message.contains("does not exist any more"));
        assert_eq!(failure.exit, Exit::Brake);
        std::fs::write(&tree, "").unwrap();
        let failure = missing(&state, &tree).unwrap().unwrap();
        assert!(failure.message.contains("is no directory any more"));
        std::fs::remove_file(&tree).unwrap();
        std::fs::create_dir(&tree).unwrap();
        assert!(missing(&state, &tree).unwrap().is_none());
        let failure = emptied(&record);
        assert!(failure.hint.unwrap().contains("--refill"));
    }
}
