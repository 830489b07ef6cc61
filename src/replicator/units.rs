//! Which of a round's steps on the mounted side belong together: those in one Git directory,
//! and elsewhere those in one directory. One that is refused stops the rest of its unit, so
//! that nobody is shown a moment of the peer's that never was.
//!
//! A program may keep a file open for days, and its directory shall not wait that long: what
//! was refused in the round before holds up nothing but a Git directory.

use std::collections::HashMap;

use crate::door::units::{Unit, held_by};
use crate::tree::RelPath;

use super::round::Round;

/// The units of a round.
pub(super) struct Units<'a> {
    round: &'a Round,
    numbers: HashMap<RelPath, Unit>,
    /// Those that are not begun, each with why.
    ended: HashMap<Unit, RelPath>,
}

impl<'a> Units<'a> {
    pub(super) fn of(round: &'a Round) -> Self {
        Self {
            round,
            numbers: HashMap::new(),
            ended: HashMap::new(),
        }
    }

    /// The unit of a path; none if it is to wait for nothing, and nothing for it.
    pub(super) fn unit(&mut self, path: &RelPath) -> Option<Unit> {
        let repository = self.round.plan.git.unit_of(path);
        if repository.is_none() && self.round.balked.contains(path) {
            return None;
        }
        let directory = repository.or_else(|| path.parent())?;
        let next = Unit::try_from(self.numbers.len()).ok()?;
        Some(*self.numbers.entry(directory).or_insert(next))
    }

    /// Nothing of a unit is to be done, because of what one of its steps needs.
    pub(super) fn end(&mut self, unit: Option<Unit>, by: &RelPath) {
        if let Some(unit) = unit {
            self.ended.entry(unit).or_insert_with(|| by.clone());
        }
    }

    /// Why nothing of a unit is to be done; none if it is.
    pub(super) fn ended(&self, unit: Option<Unit>) -> Option<String> {
        Some(held_by(self.ended.get(&unit?)?))
    }
}
