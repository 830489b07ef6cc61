//! The FUSE mount of a [`Filesystem`](crate::fs::Filesystem). Nothing else names
//! fuser.

mod adaptor;
mod convert;
mod fusermount;
mod mount;
mod mountinfo;
mod seats;
#[cfg(test)]
pub(crate) mod tests;

pub use mount::{Mount, MountError, MountOptions, clear_dead_mount, mount};
