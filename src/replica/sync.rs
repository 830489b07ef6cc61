//! Making things durable: the only calls of this module's that sync a disk.

use std::fs::File;
use std::os::fd::BorrowedFd;

use rustix::io::Result;

/// Makes a file's content and attributes durable.
pub(crate) fn file(file: &File) -> std::io::Result<()> {
    file.sync_all()
}

/// Makes everything durable that happened to the names of a directory that is open for
/// reading.
pub(crate) fn dir(dir: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::fsync(dir)
}

/// Makes everything durable that happened on the filesystem that a directory lies on.
pub(crate) fn filesystem(dir: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::syncfs(dir)
}
