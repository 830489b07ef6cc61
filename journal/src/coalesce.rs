//! Joining adjacent writes to one file within a group into one record.

use std::collections::HashMap;

use crate::{Attr, Change, Ino, Origin};

/// A write that may still grow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Write {
    /// The number of its last part, which is the number it is recorded under.
    pub(crate) n: u64,
    pub(crate) origin: Origin,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// After its last part.
    pub(crate) attr: Attr,
}

impl Write {
    pub(crate) fn into_change(self, ino: Ino) -> (u64, Origin, Change) {
        let change = Change::Write {
            ino,
            offset: self.start,
            len: self.end - self.start,
            attr: self.attr,
        };
        (self.n, self.origin, change)
    }
}

/// The writes of the current group that are not in the tables yet, one for each file.
#[derive(Default)]
pub(crate) struct Writes {
    by_ino: HashMap<Ino, Write>,
}

impl Writes {
    /// Takes a write. Returns the one of the same file that it does not continue and
    /// that is to be recorded now.
    pub(crate) fn add(&mut self, ino: Ino, write: Write) -> Option<Write> {
        match self.by_ino.get_mut(&ino) {
            Some(held)
                if held.origin == write.origin
                    && write.start <= held.end
                    && held.start <= write.end =>
            {
                held.n = write.n;
                held.start = held.start.min(write.start);
                held.end = held.end.max(write.end);
                held.attr = write.attr;
                None
            }
            _ => self.by_ino.insert(ino, write),
        }
    }

    /// Gives out the write of a file that another record is about to name.
    pub(crate) fn take(&mut self, ino: Ino) -> Option<Write> {
        self.by_ino.remove(&ino)
    }

    /// Gives out all.
    pub(crate) fn drain(&mut self) -> Vec<(Ino, Write)> {
        self.by_ino.drain().collect()
    }
}
