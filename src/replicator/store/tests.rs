use mirrorfs_journal::{Epoch, Proposal};

use super::super::round::load_unsettled;
use super::*;
use crate::tree::{Agreement, Entry, Id, NodeId, Timestamp, Xattrs};

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn file(content: &str) -> Entry {
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

fn agreement(number: u64) -> Agreement {
    Agreement {
        number,
        nonce: Id([u8::try_from(number).unwrap(); 16]),
        previous: None,
    }
}

fn put(at: &str, node: i64, content: &str) -> BaseChange {
    BaseChange::Put {
        path: path(at),
        node: Some(NodeId(node)),
        entry: file(content),
    }
}

fn propose(update: &Update<'_>, peer: PeerId, number: u64, changes: Vec<BaseChange>) {
    let proposal = Proposal {
        agreement: agreement(number),
        cursor: number * 10,
        batch: Id([0; 16]),
        seen: None,
        changes,
    };
    update.propose(peer, &proposal).unwrap();
}

/// The daemon hears of a batch that it does not remember: it was applied but for two
/// steps. With the cursor behind them nothing else would bring these up again, and
/// neither what the forgotten round had left: a flush would answer 0 without them.
#[test]
fn what_a_forgotten_round_did_not_settle_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let (peer, hello) = journal
        .update(Durability::Normal, |update| {
            let peer = update.add_peer("host", "/host")?;
            let first = [("gone", 1), ("edited", 2), ("from", 3), ("fine", 4)];
            let first = first.map(|(at, node)| put(at, node, "old")).to_vec();
            propose(update, peer, 1, first);
            update.accept(peer)?;
            let changes = vec![
                BaseChange::Remove { path: path("gone") },
                put("edited", 2, "new"),
                BaseChange::Move {
                    from: path("from"),
                    to: path("to"),
                },
                put("fine", 4, "new"),
                BaseChange::Put {
                    path: path("gone again"),
                    node: None,
                    entry: file("new"),
                },
            ];
            propose(update, peer, 2, changes);
            let mut left = Unsettled::default();
            left.paths.insert(path("unreadable"));
            let standing = vec![vec![0], vec![1], vec![2, 3], vec![4], vec![]];
            // What the round decided on, and for one path something that came after.
            let seen = [("gone", vec![0]), ("fine", vec![4]), ("edited", vec![1])];
            let spent = seen.map(|(at, standing)| Spent {
                path: path(at),
                entry: Some(file("seen")),
                standing,
            });
            for spent in &spent {
                update.observe(peer, &spent.path, spent.entry.as_ref())?;
            }
            update.observe(peer, &path("edited"), Some(&file("newer")))?;
            let terms = Terms {
                standing,
                left,
                spent: spent.into(),
            };
            let terms = postcard::to_stdvec(&terms).unwrap();
            update.set_setting(&terms_key(peer), &terms)?;
            let diverged = [0, 3].map(|op| Divergence {
                op,
                reason: String::new(),
            });
            let hello = AgentHello {
                protocol: (1, 1),
                features: Vec::new(),
                version: String::new(),
                replica: Id([7; 16]),
                mirror: None,
                agreement: Some(agreement(2)),
                diverged: diverged.to_vec(),
                epoch: Epoch(1),
                whole: false,
                settled: true,
            };
            Ok((peer, hello))
        })
        .unwrap();
    let standing = meet(&journal, peer, &hello).unwrap();
    assert_eq!(standing.map(|standing| standing.cursor), Some(20));
    let snapshot = journal.snapshot().unwrap();
    let base = |at: &str| {
        snapshot
            .base_at(peer, &path(at))
            .unwrap()
            .map(|base| base.entry)
    };
    assert_eq!(base("gone"), Some(file("old")));
    assert_eq!(base("edited"), Some(file("new")));
    assert_eq!(base("from"), Some(file("old")));
    assert_eq!(base("to"), None);
    assert_eq!(base("fine"), Some(file("new")));
    // What it had decided on says how things were before, and is not to turn against it.
    let pending: Vec<_> = snapshot.remote_pending(peer).unwrap();
    let expected = [("edited", "newer"), ("gone", "seen")];
    assert_eq!(
        pending,
        expected.map(|(at, content)| (path(at), Some(file(content))))
    );
    let left = load_unsettled(&snapshot, peer).unwrap();
    let paths = ["from", "gone", "gone again", "to", "unreadable"].map(path);
    assert_eq!(left.paths, BTreeSet::from(paths));
    assert_eq!(left.nodes, BTreeSet::from([NodeId(3)]));
}
