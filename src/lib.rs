//! mirrorfs: a FUSE filesystem for working inside a virtual machine without the fear
//! of losing the machine. `docs/architecture.md` is the map of these modules.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod agent;
mod background;
pub mod cli;
mod clock;
pub mod daemon;
pub mod door;
pub mod fs;
pub mod fuse;
pub mod reconcile;
pub mod replica;
pub mod replicator;
mod scratch;
mod seeded;
#[cfg(test)]
mod sim;
pub mod transport;
pub mod tree;
pub mod wire;
