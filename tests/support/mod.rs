//! What the end-to-end tests share: a sandbox with a tree, a peer and a home of its own,
//! the built program run as a user would run it, and the means to break things: a link
//! that can be cut, kills, a small disk.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test program uses its own part of what is here"
)]

pub mod capture;
pub mod channel;
pub mod compare;
pub mod disk;
pub mod inject;
pub mod process;
pub mod program;
pub mod proxy;
pub mod random;
pub mod recorded;
pub mod repository;
pub mod sandbox;
pub mod server;
pub mod status;
pub mod tool;
pub mod wait;

pub use capture::assert_captured;
pub use compare::{assert_same, assert_same_except};
pub use process::Role;
pub use program::Outcome;
pub use random::Random;
pub use recorded::assert_recorded;
pub use sandbox::Sandbox;
pub use server::Server;
pub use wait::{PROMPT, eventually, wait_until};

/// How often a test that chooses at random repeats itself: `short` in every run, `long`
/// under `./test --long`.
pub fn rounds(short: u32, long: u32) -> u32 {
    if std::env::var_os("MIRRORFS_TEST_LONG").is_some() {
        long
    } else {
        short
    }
}
