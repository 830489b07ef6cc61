//! For tests: a tree with peers that are only on record, and what a round plans there.

use std::sync::Mutex;

use mirrorfs_journal::{BaseChange, Durability};

use super::round::{Orders, Round, plan};
use crate::fs::tests::Fixture;
use crate::reconcile::Decision;
use crate::tree::{Content, ContentHash, Entry, Epoch, Id, PeerId, RelPath, Timestamp, Xattrs};

pub(super) fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

pub(super) fn file(content: &str) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o644,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

/// A tree whose peers are on record.
pub(super) struct Desk {
    pub(super) tree: Fixture,
}

impl Desk {
    pub(super) fn new() -> Self {
        Self {
            tree: Fixture::new(),
        }
    }

    /// A peer that has everything up to now, with a base.
    pub(super) fn peer(&self, name: &'static str, base: &[(&str, &str)]) -> PeerId {
        let base: Vec<(RelPath, Entry)> = base
            .iter()
            .map(|(at, content)| (path(at), file(content)))
            .collect();
        let add = move |update: &mirrorfs_journal::Update<'_>| {
            let peer = update.add_peer(name, name)?;
            update.set_peer_replica(peer, Id([9; 16]))?;
            update.set_seen(peer, Epoch(1), 1)?;
            let mut changes = Vec::new();
            for (path, entry) in base {
                let node = update.at(&path)?.map(|node| node.id);
                changes.push(BaseChange::Put { path, node, entry });
            }
            update.apply_base(peer, &changes)?;
            update.set_cursor(peer, update.n())?;
            Ok(peer)
        };
        self.tree.journal.update(Durability::Normal, add).unwrap()
    }

    /// The peer has told that it shows something else.
    pub(super) fn shows(&self, peer: PeerId, at: &str, entry: Option<Entry>) {
        let at = path(at);
        self.tree
            .journal
            .update(Durability::Normal, move |update| {
                update.observe(peer, &at, entry.as_ref())
            })
            .unwrap();
    }

    pub(super) fn plan(&self, peer: PeerId) -> Round {
        let reports = Mutex::new(());
        let tree = &self.tree;
        let (round, _) = plan(&tree.journal, &tree.fs, peer, &Orders::default(), &reports).unwrap();
        round
    }

    /// What the next round with a peer does about a path.
    pub(super) fn decision(&self, peer: PeerId, at: &str) -> Option<Decision> {
        let mut round = self.plan(peer);
        let decided = round.plan.decisions.remove(&path(at));
        decided.map(|(_, decision)| decision)
    }
}
