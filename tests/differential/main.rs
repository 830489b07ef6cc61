//! "A program cannot tell the mount from the disk below, except where this page says so"
//! (`docs/semantics.md`): the same work in a mount and in a plain directory on the same
//! disk, compared. Each test ends with the journal's view of the tree against a look at
//! the plain directory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "../support/mod.rs"]
mod support;

mod actor;
mod caches;
mod differences;
mod directories;
mod durable;
mod files;
mod nameless;
mod operation;
mod pair;
mod random_operations;
mod sharing;
mod side;
mod users;
mod view;
