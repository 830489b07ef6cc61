//! The promises, tested from outside: the built program with real mounts, real agents and
//! a real sshd. Each test names the promise or the clause that it tries to break.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "../support/mod.rs"]
mod support;

mod attach;
mod bad_links;
mod brakes;
mod conflict;
mod conflict_commands;
mod crash;
mod deltas;
mod disk_errors;
mod doctor;
mod filesystems;
mod first_contact;
mod flags;
mod flush;
mod harness;
mod identity;
mod late;
mod link;
mod live;
mod log;
mod lost_journal;
mod merging;
mod modes;
mod nth;
mod odd_files;
mod odd_peers;
mod ordinary_user;
mod peer_disk;
mod peers;
mod power_loss;
mod pulled;
mod refusals;
mod repositories;
mod rollback;
mod roots;
mod scale;
mod settle;
mod storm;
mod symlinks;
mod takeover;
mod trash;
mod units;
mod versions;
mod watch;
mod without_mount;
