//! How much of what was displaced is kept, and what goes first.
//!
//! * Nothing is kept for longer than 30 days, and all of it may take a tenth of the disk.
//! * What both sides had agreed on is displaced by somebody who has seen it. Of such versions
//!   of one path the latest is kept, and of those before it one an hour: a file that is written
//!   every second does not fill the disk.
//! * Where there is too much, such versions go first, and the oldest of them before others.
//!   What this side alone has had goes last: of that this may be the only copy.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use super::{Removed, Slot, Trash, stamped};
use crate::replica::keep::is_agreed;
use crate::replica::{Context, Error};
use crate::tree::{RelPath, Timestamp, scan};

/// How long things are kept.
pub const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 3600);
/// The part of the disk that they may take.
const SHARE: u64 = 10;
/// How far apart versions of one path are that both sides had agreed on.
const APART: Duration = Duration::from_secs(3600);
/// How often what is too old or too much is looked for. That looks at all there is.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);

/// How often [`Bounds::keep`] is to be called.
pub const EVERY: Duration = Duration::from_secs(60);

/// Keeps a trash in bounds.
pub struct Bounds {
    trash: Trash,
    looked: Option<Timestamp>,
    expired: Option<Timestamp>,
}

impl Bounds {
    /// Of a trash.
    pub fn of(trash: Trash) -> Self {
        Self {
            trash,
            looked: None,
            expired: None,
        }
    }

    /// Removes what is not to be kept any more. To be called [every minute](EVERY); it does
    /// little while nothing is displaced.
    pub fn keep(&mut self, now: Timestamp) -> Result<Removed, Error> {
        let looked = self.looked.replace(now);
        let due = |last: Timestamp| now < last || since(last, now) >= EXPIRE_EVERY;
        if self.expired.is_none_or(due) {
            self.expired = Some(now);
            return self.trash.expire(now);
        }
        let mut removed = Removed::default();
        // A slot may get its name some time before it is there.
        let lately = before(looked.unwrap_or(now), EVERY);
        if self.trash.has_agreed_since(lately)? {
            // What is older has been looked at before.
            let slots = self.trash.agreed_slots(Some(before(now, 2 * APART)))?;
            self.trash.thin(&slots, &mut removed)?;
        }
        Ok(removed)
    }
}

impl Trash {
    /// Removes what is older than [`KEPT_FOR`], and of the rest what goes first until it
    /// takes no more than a tenth of the disk.
    pub fn expire(&self, now: Timestamp) -> Result<Removed, Error> {
        let disk = rustix::fs::fstatvfs(&self.dir).context("look at", ".mirrorfs/trash")?;
        let room = disk.f_blocks.saturating_mul(disk.f_frsize) / SHARE;
        self.expire_beyond(now, room)
    }

    pub(super) fn expire_beyond(&self, now: Timestamp, room: u64) -> Result<Removed, Error> {
        let mut removed = Removed::default();
        self.thin(&self.agreed_slots(None)?, &mut removed)?;
        let oldest = before(now, KEPT_FOR);
        let (mut slots, old): (Vec<Slot>, Vec<Slot>) = self
            .slots()?
            .into_iter()
            .partition(|slot| slot.since >= oldest);
        for slot in &old {
            self.remove_slot(slot, &mut removed)?;
        }
        slots.sort_by(|a, b| {
            let key = |slot: &Slot| (!slot.agreed(), slot.since);
            key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
        });
        let mut taken: u64 = slots.iter().map(Slot::room).sum();
        for slot in &slots {
            if taken <= room {
                break;
            }
            taken -= slot.room();
            self.remove_slot(slot, &mut removed)?;
        }
        Ok(removed)
    }

    fn has_agreed_since(&self, moment: Timestamp) -> Result<bool, Error> {
        let names = scan::names(self.dir.as_fd()).context("list", ".mirrorfs/trash")?;
        Ok(names
            .iter()
            .any(|name| is_agreed(name) && stamped(name) >= Some(moment)))
    }

    /// The slots with what both sides had agreed on, made since a moment.
    fn agreed_slots(&self, since: Option<Timestamp>) -> Result<Vec<Slot>, Error> {
        self.slots_with(|name, stamped| is_agreed(name) && (since.is_none() || stamped >= since))
    }

    /// Removes versions that were displaced less than [`APART`] after another one of their
    /// path that is kept, but for the latest of each path.
    fn thin(&self, slots: &[Slot], removed: &mut Removed) -> Result<(), Error> {
        let mut slots: Vec<&Slot> = slots.iter().collect();
        slots.sort_by(|a, b| (a.since, &a.name).cmp(&(b.since, &b.name)));
        let mut kept: HashMap<&RelPath, Timestamp> = HashMap::new();
        let mut left: HashMap<&RelPath, usize> = HashMap::new();
        for file in slots.iter().flat_map(|slot| &slot.files) {
            *left.entry(&file.path).or_default() += 1;
        }
        for slot in &slots {
            let mut emptied = false;
            for file in &slot.files {
                let left = left.entry(&file.path).or_default();
                *left -= 1;
                let close = kept
                    .get(&file.path)
                    .is_some_and(|last| since(*last, file.since) < APART);
                if close && *left > 0 {
                    self.remove_unused(file, removed)?;
                    emptied = true;
                } else {
                    kept.insert(&file.path, file.since);
                }
            }
            if emptied {
                for dir in slot.dirs.iter().rev() {
                    self.remove_dir(dir);
                }
            }
        }
        Ok(())
    }
}

fn before(now: Timestamp, by: Duration) -> Timestamp {
    let by = i64::try_from(by.as_secs()).unwrap_or(i64::MAX);
    Timestamp {
        secs: now.secs.saturating_sub(by),
        nanos: now.nanos,
    }
}

fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(now.secs.saturating_sub(then.secs)).unwrap_or(0))
}
