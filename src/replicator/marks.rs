//! What is known to be on this side's disk: a number up to which lower is synced, and the
//! marks of the tree, which say in it what was agreed on last.
//!
//! The journal keeps beside its chain of agreements which mark it has written. So a mark
//! that lags behind an agreement, as all of them do for some seconds, is told from that of
//! a tree that was brought back from a copy. And it keeps the moment of the tree, which says
//! the same at once, in this life of the machine.

use mirrorfs_journal::{Durability, Journal, Marked, Update, View};
use serde::{Deserialize, Serialize};

use crate::fs::Filesystem;
use crate::replica::{Latest, Marks, Moment, Reserved, Time};
use crate::tree::{Agreement, PeerId, ReplicaId};

use super::Error;

/// The setting that holds up to which number lower is on disk.
const SYNCED: &str = "synced";

/// The setting that holds the tree's moment.
const MOMENT: &str = "moment";

/// The mark of the tree for one peer, as the journal knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Written {
    /// It is this, durably,
    last: Option<Agreement>,
    /// or this already, which was being written.
    next: Option<Agreement>,
}

/// Up to which change lower is known to be on disk.
pub(super) fn synced(view: &View) -> Result<u64, mirrorfs_journal::Error> {
    let stored = view
        .setting(SYNCED)?
        .and_then(|bytes| bytes.try_into().ok());
    Ok(stored.map_or(0, u64::from_le_bytes))
}

fn key(peer: PeerId) -> String {
    format!("mark.{}", peer.0)
}

fn written(view: &View, peer: PeerId) -> Result<Option<Written>, mirrorfs_journal::Error> {
    let stored = view.setting(&key(peer))?;
    Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
}

fn write(
    update: &Update<'_>,
    peer: PeerId,
    last: Option<Agreement>,
    next: Option<Agreement>,
) -> Result<(), mirrorfs_journal::Error> {
    let written = Written { last, next };
    let bytes = postcard::to_stdvec(&written).map_err(mirrorfs_journal::Error::other)?;
    update.set_setting(&key(peer), &bytes)
}

/// The tree's mark for a peer is what it is: from here on it belongs to this journal.
pub(super) fn accept_mark(
    update: &Update<'_>,
    peer: PeerId,
    mark: Option<Agreement>,
) -> Result<(), mirrorfs_journal::Error> {
    write(update, peer, mark, None)
}

/// Nothing is known any more of the tree's mark for a peer.
pub(super) fn forget_mark(
    update: &Update<'_>,
    peer: PeerId,
) -> Result<(), mirrorfs_journal::Error> {
    update.remove_setting(&key(peer))
}

fn moment(view: &View) -> Result<Option<Moment>, mirrorfs_journal::Error> {
    Ok(Moment::decode(view.setting(MOMENT)?))
}

/// Gives the tree a new moment, and takes it up with what this transaction writes down: that
/// it is about to be changed in a peer's name, or that an agreement is proposed.
pub(super) fn advance(
    update: &Update<'_>,
    reserved: &Reserved,
    agreed: Option<(ReplicaId, Agreement)>,
) -> Result<(), mirrorfs_journal::Error> {
    match Latest::advance(reserved, moment(update)?.as_ref(), agreed) {
        Some(moment) => update.set_setting(MOMENT, &moment.encode()),
        None => Ok(()),
    }
}

/// Compares the tree's marks with the journal: either may have been brought back from a
/// copy, or lost. To be called before anybody is met. Returns what there is to say.
pub fn check_marks(journal: &Journal, reserved: &Reserved) -> Result<Vec<String>, Error> {
    let marks = Marks::of(reserved)?;
    let told = Latest::of(reserved)?;
    let recorded = moment(&*journal.snapshot()?)?;
    let other = Latest::time(reserved, told.as_ref(), recorded.as_ref()) == Time::Other;
    Ok(journal.update(Durability::Full, move |update| {
        let mut news = Vec::new();
        for peer in update.peers()? {
            let Some(replica) = peer.replica else {
                continue;
            };
            let mark = marks.with(replica);
            if other {
                let chain = update.chain(peer.id)?;
                let at = Latest::stands_at(told.as_ref(), replica, &chain, mark);
                let found = update.take_mark(peer.id, at.as_ref())?;
                if found == Marked::Last {
                    // What was brought in since, or proposed, is of another time.
                    match at {
                        Some(at) => update.rejoin(peer.id, &at).map(drop)?,
                        None => update.reset_base(peer.id)?,
                    }
                }
                super::pulls::forget(update, peer.id)?;
                accept_mark(update, peer.id, mark)?;
                news.push(of_another_time(found, &peer.name));
                continue;
            }
            let known = written(update, peer.id)?;
            if mark == known.and_then(|known| known.last) {
                continue;
            }
            if mark.is_some() && mark == known.and_then(|known| known.next) {
                // It had been written when this was cut off. What comes next takes its place.
                accept_mark(update, peer.id, mark)?;
                continue;
            }
            let found = update.take_mark(peer.id, mark.as_ref())?;
            accept_mark(update, peer.id, mark)?;
            if found != Marked::Last {
                news.push(of_another_time(found, &peer.name));
            }
        }
        match told {
            Some(told) => update.set_setting(MOMENT, &told.moment().encode())?,
            None => update.remove_setting(MOMENT)?,
        }
        Ok(news)
    })?)
}

fn of_another_time(found: Marked, peer: &str) -> String {
    match found {
        Marked::Earlier | Marked::Missing => format!(
            "the tree was brought back from an earlier copy: what is newer on the peer {peer} comes back to it"
        ),
        Marked::Last | Marked::Unknown => format!(
            "what is recorded here and the tree are of different times: it is compared with the peer {peer} anew"
        ),
    }
}

/// What [`secure`] found last time, so that it does nothing while nothing happens.
#[derive(Default)]
pub struct Secured {
    n: u64,
    agreements: Vec<(PeerId, Option<Agreement>)>,
}

/// Syncs lower, writes down up to where it is on disk, and marks the tree with the
/// agreements that it holds. Takes as long as the disk takes.
pub fn secure(
    journal: &Journal,
    filesystem: &Filesystem,
    reserved: &Reserved,
    before: &mut Secured,
) -> Result<(), Error> {
    // Whatever was recorded or agreed on before this is in lower.
    let n = journal.recorder().last();
    let snapshot = journal.snapshot()?;
    let mut last = Vec::new();
    for peer in snapshot.peers()? {
        // What only the tree knows of is marked already.
        if let Some(replica) = peer.replica
            && !snapshot.lacks_base(peer.id)?
        {
            last.push((peer.id, replica, peer.agreement));
        }
    }
    drop(snapshot);
    let agreements: Vec<_> = last.iter().map(|(id, _, last)| (*id, *last)).collect();
    if n == before.n && agreements == before.agreements {
        return Ok(());
    }
    filesystem
        .sync_lower()
        .map_err(|error| crate::replica::Error::Io {
            action: "sync",
            path: ".".to_owned(),
            source: error.into(),
        })?;
    let coming = agreements.clone();
    journal.update(Durability::Full, move |update| {
        for (peer, next) in coming {
            let known = written(update, peer)?.unwrap_or_default();
            write(update, peer, known.last, next)?;
        }
        update.set_setting(SYNCED, &n.to_le_bytes())
    })?;
    Marks::write(
        reserved,
        last.into_iter().map(|(_, with, last)| (with, last)),
    )?;
    let marked = agreements.clone();
    journal.update(Durability::Normal, move |update| {
        for (peer, last) in marked {
            accept_mark(update, peer, last)?;
        }
        Ok(())
    })?;
    *before = Secured { n, agreements };
    Ok(())
}
