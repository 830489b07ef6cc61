//! What a daemon does from time to time so that nothing grows without bound.

use std::sync::Arc;
use std::time::Duration;

use mirrorfs_journal::{Durability, Journal};

use super::service::blocking;
use super::site::Site;
use super::{Failure, OrFail, trash};
use crate::replica::trash::Removed;
use crate::replica::trash::bounds::{self, Bounds};
use crate::replicator::{self, LocalTree, Secured};
use crate::tree::Timestamp;

/// How often.
const EVERY: Duration = Duration::from_secs(3600);

/// What of the past the journal keeps.
#[derive(Clone, Copy, Debug)]
struct Retention {
    /// So many of the newest changes in any case.
    least: u64,
    /// At most so many, as far as the peers have them.
    most: u64,
    /// At most so many, whatever the peers have.
    unseen: u64,
    /// Nothing that is older than this, in seconds.
    age: i64,
}

/// 30 days, like the trash. A change takes less than 130 bytes (`journal/tests/size.rs`), so
/// that the record of changes stays below 130 MB while every peer is there from time to
/// time, and below 520 MB with one that never comes back.
const RETENTION: Retention = Retention {
    least: 10_000,
    most: 1_000_000,
    unseen: 4_000_000,
    age: 30 * 24 * 3600,
};

/// How many changes go in one transaction, which holds up the journal's writer.
const AT_ONCE: u64 = 5_000;

/// How often lower is synced while it changes: a power loss takes what was changed within
/// such a time before it, and not synced by whoever changed it.
const SECURE_EVERY: Duration = Duration::from_secs(3);

/// Syncs lower and marks the tree while there are changes, until the task is dropped.
pub(super) async fn secure(site: Arc<Site>) {
    let mut due = tokio::time::interval(SECURE_EVERY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut secured = Secured::default();
    loop {
        due.tick().await;
        let site = Arc::clone(&site);
        let worked = blocking(move || {
            let result = replicator::secure(
                &site.journal,
                &site.filesystem,
                &site.reserved,
                &mut secured,
            );
            Ok((secured, result))
        });
        secured = match worked.await {
            Ok((secured, Ok(()))) => secured,
            Ok((secured, Err(error))) => {
                tracing::warn!(%error, "cannot make sure of what is on the disk");
                secured
            }
            Err(failure) => {
                tracing::warn!("{failure}");
                Secured::default()
            }
        };
    }
}

/// Works until the task is dropped.
pub(super) async fn keep_up(journal: Journal, tree: LocalTree) {
    tokio::join!(keep_compact(journal), keep_in_bounds(tree));
}

async fn keep_compact(journal: Journal) {
    let mut due = tokio::time::interval(EVERY);
    loop {
        due.tick().await;
        let journal = journal.clone();
        let now = Timestamp::now();
        // The next hour is another chance for what fails.
        match blocking(move || compact(&journal, RETENTION, now)).await {
            Ok(0) => {}
            Ok(forgotten) => tracing::debug!(forgotten, "compacted the journal"),
            Err(failure) => tracing::warn!("{failure}"),
        }
    }
}

async fn keep_in_bounds(tree: LocalTree) {
    let filesystem = tree.filesystem;
    let mut trash = match trash::of(&tree.reserved) {
        Ok(trash) => Bounds::of(trash.sparing(move |ino| filesystem.is_displaced(ino))),
        Err(failure) => return tracing::warn!("{failure}"),
    };
    let mut due = tokio::time::interval(bounds::EVERY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let worked = blocking(move || {
            let removed = trash::keep_in_bounds(&mut trash);
            Ok((trash, removed))
        });
        let removed;
        (trash, removed) = match worked.await {
            Ok(worked) => worked,
            Err(failure) => return tracing::warn!("{failure}"),
        };
        match removed {
            Ok(Removed { files: 0, .. }) => {}
            Ok(Removed { files, bytes, .. }) => {
                tracing::info!(
                    files,
                    bytes,
                    "removed from the trash what was not to be kept"
                );
            }
            Err(failure) => tracing::warn!("{failure}"),
        }
    }
}

/// Forgets the changes that nobody needs any more: those every peer has that are old or
/// beyond a number. Returns how many went.
fn compact(journal: &Journal, retention: Retention, now: Timestamp) -> Result<u64, Failure> {
    let old = Timestamp {
        secs: now.secs - retention.age,
        nanos: 0,
    };
    let mut forgotten = 0;
    for (before, keep) in [(old, retention.least), (now, retention.most)] {
        loop {
            let gone = journal
                .update(Durability::Normal, move |update| {
                    update.compact(before, keep, AT_ONCE)
                })
                .or_fail(|| "cannot compact the journal".into())?;
            if gone == 0 {
                break;
            }
            forgotten += gone;
        }
    }
    journal
        .update(Durability::Normal, move |update| {
            for peer in update.peers()? {
                update.prune_chain(
                    peer.id,
                    old,
                    mirrorfs_journal::UNDO_MAX,
                    mirrorfs_journal::LINKS_MAX,
                )?;
            }
            Ok(())
        })
        .or_fail(|| "cannot prune the agreements in the journal".into())?;
    loop {
        let gone = journal
            .update(Durability::Normal, move |update| {
                update.compact_unseen(retention.unseen, AT_ONCE)
            })
            .or_fail(|| "cannot compact the journal".into())?;
        if gone == 0 {
            return Ok(forgotten);
        }
        forgotten += gone;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::tests::Fixture;

    #[test]
    fn the_past_is_bounded_by_age_and_by_number() {
        let t = Fixture::new();
        for number in 0..50 {
            t.create(t.root(), &format!("f{number}"), b"");
        }
        let journal = t.journal.clone();
        let kept = || {
            let snapshot = journal.snapshot().unwrap();
            snapshot.n() - snapshot.compacted().unwrap()
        };
        let retention = Retention {
            least: 10,
            most: 1000,
            unseen: 1000,
            age: 100,
        };
        let in_seconds = |secs| Timestamp {
            secs: Timestamp::now().secs + secs,
            nanos: 0,
        };
        t.fs.fsync(t.root(), false).unwrap();
        assert_eq!(compact(&journal, retention, in_seconds(1)).unwrap(), 0);
        let few = Retention {
            most: 30,
            ..retention
        };
        assert!(compact(&journal, few, in_seconds(1)).unwrap() > 0);
        assert_eq!(kept(), 30, "too many");
        assert!(compact(&journal, retention, in_seconds(101)).unwrap() > 0);
        assert_eq!(kept(), 10, "too old");
        // What is known of the tree does not depend on it.
        t.assert_captured();
        // A peer that has been away holds it up, but not for ever.
        let away = |update: &mirrorfs_journal::Update<'_>| {
            let peer = update.add_peer("away", "/away")?;
            update.set_cursor(peer, update.n() - 9)
        };
        journal.update(Durability::Normal, away).unwrap();
        let none = Retention {
            least: 0,
            most: 0,
            ..retention
        };
        assert!(compact(&journal, none, in_seconds(101)).unwrap() > 0);
        assert_eq!(kept(), 9, "what the peer lacks");
        let least = Retention { unseen: 4, ..none };
        assert!(compact(&journal, least, in_seconds(101)).unwrap() > 0);
        assert_eq!(kept(), 4);
    }
}
