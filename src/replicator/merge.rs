//! Text that was edited in different places merges by itself, where the user asked for it.
//!
//! A clean merge takes the local file's place, and the peer's version becomes what both
//! had agreed on: the next round then sends the merged file as an edit of it. Cut off in
//! between, the next round finds the same conflict, whose merge is what is there already.

use std::os::fd::AsFd;
use std::sync::Arc;

use mirrorfs_journal::{BaseChange, Contents, Durability, Journal};

use crate::fs::{DoorOp, Expect, StagedName};
use crate::reconcile::{Merge, Sides, merge};
use crate::replica::Reserved;
use crate::tree::{Content, ContentHash, Entry, Ino, RelPath, Timestamp, scan};

use super::Error;
use super::apply::{LocalTree, instantiate, stage_bytes};
use super::round::{Found, Round};

/// How many files of a round are kept as base, and how many bytes of them: what comes in
/// bulk is seldom edited on both sides at once, and would push out what is.
const FILES: usize = 500;
const BYTES: u64 = 8 * 1024 * 1024;

/// Whether bytes are text, as Git tells: no NUL near the beginning.
pub(super) fn is_text(bytes: &[u8]) -> bool {
    !bytes.iter().take(8000).any(|byte| *byte == 0)
}

/// The three versions of one text in one, if no line was changed on both sides.
pub(super) fn merge_text(base: &[u8], local: &[u8], remote: &[u8]) -> Option<Vec<u8>> {
    if ![base, local, remote].into_iter().all(is_text) {
        return None;
    }
    diffy::merge_bytes(base, local, remote).ok()
}

/// A conflict that was merged, on its way into the tree.
pub(super) struct Merged {
    pub(super) path: RelPath,
    pub(super) op: DoorOp,
    /// The peer's version, which becomes the base.
    remote: Entry,
}

/// Merges what can be merged of the conflicts that a round has found. Those are then none.
pub(super) fn merge_found(tree: &LocalTree, round: &mut Round, contents: &Contents) -> Vec<Merged> {
    let mut merged = Vec::new();
    let mut left = Vec::new();
    for found in std::mem::take(&mut round.found) {
        match merge_one(tree, round, &found, contents) {
            Ok(Some(done)) => merged.push(done),
            Ok(None) => left.push(found),
            Err(reason) => {
                tracing::debug!(path = %found.conflict.path, reason, "not merged");
                left.push(found);
            }
        }
    }
    round.found = left;
    merged
}

fn merge_one(
    tree: &LocalTree,
    round: &Round,
    found: &Found,
    contents: &Contents,
) -> Result<Option<Merged>, String> {
    let conflict = &found.conflict;
    let path = &conflict.path;
    let (Some(base), Some(local), Some(remote)) =
        (&conflict.base, &conflict.local, &conflict.remote)
    else {
        return Ok(None);
    };
    // The base of what moves in this round is known under another path.
    let moved = round.moves.origin(path).as_ref() != Some(path);
    let (Some(node), false, None) = (round.locals.get(path), moved, conflict.unit) else {
        return Ok(None);
    };
    let hashes = [base, local, remote].map(|entry| match entry.content {
        Content::File { hash, size } if size <= mirrorfs_journal::LARGEST_CONTENT => Some(hash),
        _ => None,
    });
    let [Some(base_hash), Some(local_hash), Some(remote_hash)] = hashes else {
        return Ok(None);
    };
    let Some(base_text) = contents.get(base_hash).map_err(|error| error.to_string())? else {
        return Ok(None);
    };
    let local_text = super::round::read_at(&round.cut, path, node.ino, node.attr.size)?;
    if ContentHash::of(&local_text) != local_hash {
        return Ok(None);
    }
    let staged = tree
        .staging
        .read(remote_hash)
        .map_err(|error| error.to_string())?;
    let Some(remote_text) = staged else {
        return Ok(None);
    };
    let Some(text) = merge_text(&base_text, &local_text, &remote_text) else {
        return Ok(None);
    };
    // Mode and attributes merge as they would without a conflict.
    let content = Content::File {
        size: text.len() as u64,
        hash: ContentHash::of(&text),
    };
    let with = |entry: &Entry| {
        Some(Entry {
            content: content.clone(),
            ..entry.clone()
        })
    };
    let fields = merge(&Sides {
        base: with(base),
        local: with(local),
        remote: with(remote),
    });
    let Merge::Agreed(Some(entry), _) = fields else {
        return Ok(None);
    };
    let entry = Entry {
        mtime: Timestamp::now(),
        ..entry
    };
    stage_bytes(tree, &text)?;
    let owner = tree.owner.map(|_| crate::replica::Owner {
        uid: node.attr.uid,
        gid: node.attr.gid,
    });
    let (staged, _): (StagedName, _) = instantiate(tree, &entry, owner)?;
    Ok(Some(Merged {
        path: path.clone(),
        op: DoorOp::Place {
            staged,
            path: path.clone(),
            expect: Expect::Node {
                ino: node.ino,
                unchanged_since: round.cut.mark().n,
            },
            agreed: false,
        },
        remote: remote.clone(),
    }))
}

/// What was merged is in the tree: the peer's version is what it is an edit of.
pub(super) fn rebase(
    journal: &Journal,
    reserved: &Arc<Reserved>,
    round: &Round,
    merged: Vec<(Merged, Ino)>,
) -> Result<(), Error> {
    if merged.is_empty() {
        return Ok(());
    }
    let (peer, name) = (round.peer.id, round.peer.name.clone());
    let reserved = Arc::clone(reserved);
    journal.update(Durability::Normal, move |update| {
        super::marks::advance(update, &reserved, None)?;
        for (Merged { path, remote, .. }, ino) in merged {
            let node = update.node_by_ino(ino)?.map(|node| node.id);
            update.note(
                peer,
                &path,
                &format!("edited in different places here and on {name}: merged"),
            )?;
            update.advance_base(
                peer,
                &[BaseChange::Put {
                    path,
                    node,
                    entry: remote,
                }],
            )?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Small texts that a round has made the base, with where they are.
pub(super) fn worth_keeping(round: &Round) -> Vec<(RelPath, ContentHash, u64)> {
    use crate::reconcile::Decision;
    let mut worth = Vec::new();
    let mut bytes = 0;
    for (path, (sides, decision)) in &round.plan.decisions {
        let Decision::Agree {
            result: Some(entry),
            ..
        } = decision
        else {
            continue;
        };
        let known = sides.base.as_ref().map(|base| &base.content);
        if let Content::File { size, hash } = entry.content
            && known != Some(&entry.content)
            && size <= mirrorfs_journal::LARGEST_CONTENT
            && !round.refused.contains(path)
        {
            bytes += size;
            worth.push((path.clone(), hash, size));
        }
    }
    if worth.len() > FILES || bytes > BYTES {
        return Vec::new();
    }
    worth
}

/// Keeps them, as far as they are still what they were.
pub(super) fn keep(
    tree: &LocalTree,
    contents: &Contents,
    worth: Vec<(RelPath, ContentHash, u64)>,
) -> Result<(), mirrorfs_journal::Error> {
    use std::io::Read;
    let missing = contents.missing(worth.iter().map(|(_, hash, _)| *hash).collect())?;
    let root = tree.filesystem.lower().root().as_fd().try_clone_to_owned();
    let root = crate::replica::Root::new(root.map_err(mirrorfs_journal::Error::other)?);
    let mut read = Vec::new();
    for (path, hash, size) in worth {
        let bytes = || -> std::io::Result<Vec<u8>> {
            let dir = root.parent(&path)?;
            let file = scan::open_file(dir.as_fd(), path.name())?;
            let mut bytes = Vec::new();
            file.take(size + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        if missing.contains(&hash)
            && let Ok(bytes) = bytes()
            && is_text(&bytes)
            && ContentHash::of(&bytes) == hash
        {
            read.push((hash, bytes));
        }
    }
    if read.is_empty() {
        return Ok(());
    }
    contents.keep(read)
}

#[cfg(test)]
mod tests {
    use super::merge_text;

    #[test]
    fn only_edits_in_different_places_merge() {
        let base = b"one\ntwo\nthree\nfour\nfive\nsix\nseven\n";
        let local = b"ONE\ntwo\nthree\nfour\nfive\nsix\nseven\n";
        let remote = b"one\ntwo\nthree\nfour\nfive\nsix\nSEVEN\n";
        let both = b"ONE\ntwo\nthree\nfour\nfive\nsix\nSEVEN\n";
        assert_eq!(merge_text(base, local, remote).as_deref(), Some(&both[..]));
        // The same edit on both sides is one; a merge of what is merged changes nothing.
        assert_eq!(merge_text(base, local, local).as_deref(), Some(&local[..]));
        assert_eq!(merge_text(base, both, remote).as_deref(), Some(&both[..]));
        let other = b"1\ntwo\nthree\nfour\nfive\nsix\nseven\n";
        assert_eq!(merge_text(base, local, other), None);
        assert_eq!(merge_text(b"a\0b", b"a\0c", b"a\0b"), None, "no text");
    }
}
