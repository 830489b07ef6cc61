//! The three-way rules: pure functions of base, local, remote and policy.
//!
//! [`merge`] decides about one name by the table of the design, field by field.
//! [`reconcile`] does so for a set of names and then makes the results fit together
//! as trees: what survives needs its parents, and a file cannot lie where a
//! directory stays. Nothing here reads a disk, a database or a clock.

mod entry;
mod tree;

pub use entry::{Merge, Note, Sides, merge};
pub use tree::{Decision, Held, Plan, Policy, reconcile};

#[cfg(test)]
mod tests;
