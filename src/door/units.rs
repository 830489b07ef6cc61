//! Operations that belong together: a moment of the peer's tree that shows in parts in one
//! directory is none that ever was. So a unit is carried out from its beginning to its end,
//! or to the first that is refused, and not begun where that can be seen beforehand.

use std::collections::HashMap;

use mirrorfs_journal::Origin;

use crate::fs::{DoorOp, Expect};
use crate::tree::RelPath;

/// Which operations belong together.
pub type Unit = u32;

/// An operation, in whose name it is made, and the unit that it is part of, if it is of any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ordered {
    /// What is to be done.
    pub op: DoorOp,
    /// Whose change it is.
    pub origin: Origin,
    /// What it is part of.
    pub unit: Option<Unit>,
}

/// The units that have come to their end early, each with what was refused.
#[derive(Debug, Default)]
pub struct Held(HashMap<Unit, RelPath>);

impl Held {
    /// An operation was refused.
    pub fn refused(&mut self, ordered: &Ordered, reason: &str) {
        if let Some(unit) = ordered.unit.filter(|_| holds(&ordered.op)) {
            let path = ordered.op.path();
            tracing::debug!(%path, reason, "the rest of its directory waits");
            self.0.entry(unit).or_insert_with(|| path.clone());
        }
    }

    /// Why an operation is not to be tried; none if it is.
    pub fn reason(&self, ordered: &Ordered) -> Option<String> {
        let by = self.0.get(&ordered.unit?)?;
        Some(held_by(by))
    }
}

/// The words for what waits for another.
pub(crate) fn held_by(by: &RelPath) -> String {
    format!("{WAITS}{by}, which could not be changed: they belong to one moment of the peer's")
}

const WAITS: &str = "it waits for ";

/// Whether that is the reason of a refusal.
pub(crate) fn is_held(reason: &str) -> bool {
    reason.starts_with(WAITS)
}

/// Whether the rest of its unit waits for an operation. A directory that cannot be removed,
/// because of something in it, shows nothing that was not there.
pub(crate) fn holds(op: &DoorOp) -> bool {
    !matches!(op, DoorOp::RemoveDir { .. })
}

/// Whether an operation takes a file out of the tree.
pub(super) fn displaces(op: &DoorOp) -> bool {
    match op {
        DoorOp::Place { expect, .. } => matches!(expect, Expect::Node { .. }),
        DoorOp::Remove { .. } => true,
        DoorOp::RemoveDir { .. } | DoorOp::SetMeta { .. } => false,
    }
}

/// The positions of operations that others of their unit would wait for.
pub(crate) fn of_several(operations: &[Ordered]) -> Vec<usize> {
    let mut sizes: HashMap<Unit, usize> = HashMap::new();
    for unit in operations.iter().filter_map(|ordered| ordered.unit) {
        *sizes.entry(unit).or_default() += 1;
    }
    let several = |ordered: &Ordered| {
        let unit = ordered.unit.filter(|_| holds(&ordered.op));
        unit.is_some_and(|unit| sizes.get(&unit).is_some_and(|size| *size > 1))
    };
    let positions = operations.iter().enumerate();
    positions
        .filter(|(_, ordered)| several(ordered))
        .map(|(at, _)| at)
        .collect()
}
