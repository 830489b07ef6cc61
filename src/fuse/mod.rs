//! The FUSE mount of a [`Filesystem`](crate::fs::Filesystem), and the server behind it.
//! Nothing else knows the kernel's protocol.
//!
//! ```text
//! mount ─▶ session (INIT, threads) ─┬▶ device ─┬▶ dispatch ─▶ the filesystem
//!                                   └▶ ring ───┘   request: bytes to operations
//!                                                  reply:   answers to bytes
//! ```

mod abi;
mod convert;
mod device;
mod dispatch;
mod fusermount;
mod mount;
mod mountinfo;
mod reply;
mod request;
mod ring;
mod seats;
mod session;
mod slow;
#[cfg(test)]
pub(crate) mod tests;

pub use mount::{Mount, MountError, MountOptions, clear_dead_mount, mount};
pub use session::{Channel, NoRing, expected_channel};
