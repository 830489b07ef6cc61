//! The three-way rules: pure functions of base, local, remote and policy.
//!
//! [`merge`] decides about one name by the table of the design, field by field.
//! [`reconcile`] does so for a set of names and then makes the results fit together
//! as trees: what survives needs its parents, a file cannot lie where a directory
//! stays, and a Git directory is one unit. Nothing here reads a disk, a database or a clock.

mod entry;
mod git;
mod tree;

pub use entry::{Merge, Note, Sides, merge};
pub use git::Git;
pub use tree::{Decision, Held, Plan, Policy, reconcile};

#[cfg(test)]
mod tests;
