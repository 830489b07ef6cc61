//! Making things durable: the only calls of this module's that sync a disk.

use std::fs::File;
use std::os::fd::BorrowedFd;

use rustix::io::Result;

/// Makes a file's content and attributes durable.
pub(crate) fn file(file: &File) -> std::io::Result<()> {
    file.sync_all()?;
    #[cfg(test)]
    seen::note(file);
    Ok(())
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

#[cfg(test)]
pub(crate) mod seen {
    //! Which files this thread has synced.

    use std::cell::RefCell;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    thread_local! {
        static FILES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(file: &File) {
        let ino = file.metadata().unwrap().ino();
        FILES.with_borrow_mut(|files| files.push(ino));
    }

    /// Their inode numbers since the last time.
    pub(crate) fn take() -> Vec<u64> {
        FILES.take()
    }
}
