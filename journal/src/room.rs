//! How many bytes may wait for the writer. The channel bounds the number of records; few of
//! them are large, and those are bounded here.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::Change;

/// What the large records in the channel may have on them together.
const LIMIT: usize = 32 << 20;
/// What less than this is on a record is not counted: 65,536 of them are what the channel
/// holds at most.
const SMALL: usize = 1 << 10;

#[derive(Debug, Default)]
struct Taken {
    bytes: usize,
    /// Nobody takes anything from the channel any more.
    ended: bool,
}

/// The room for large records. Its lock is a leaf: nothing is waited for with it.
#[derive(Debug, Default)]
pub(crate) struct Room {
    taken: Mutex<Taken>,
    freed: Condvar,
}

impl Room {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for a change, and takes it. `hurry` is called before a
    /// wait.
    pub(crate) fn take(&self, change: &Change, hurry: impl Fn()) {
        let weight = weight(change);
        if weight == 0 {
            return;
        }
        let mut taken = self.lock();
        // One at least goes through, however large it is.
        while taken.bytes > 0 && taken.bytes + weight > LIMIT && !taken.ended {
            hurry();
            taken = self
                .freed
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        taken.bytes += weight;
    }

    /// Gives the room of a change back: it has left the channel, or never came into it.
    pub(crate) fn give(&self, change: &Change) {
        let weight = weight(change);
        if weight > 0 {
            let mut taken = self.lock();
            taken.bytes = taken.bytes.saturating_sub(weight);
            drop(taken);
            self.freed.notify_all();
        }
    }

    /// Lets everybody go on who waits.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.freed.notify_all();
    }
}

/// The bytes that a change has beside its fixed part; 0 if that is little.
fn weight(change: &Change) -> usize {
    let bytes = match change {
        Change::Create { name, target, .. } => name.len() + target.as_ref().map_or(0, Vec::len),
        Change::Xattrs { xattrs, .. } => xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum(),
        _ => 0,
    };
    if bytes < SMALL { 0 } else { bytes }
}
