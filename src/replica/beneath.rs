//! Reaching names of a tree without ever leaving it, and the renames that neither
//! overwrite nor lose anything.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use crate::tree::RelPath;
use crate::tree::scan;

/// An open root of a tree. Every path is resolved beneath it by the kernel
/// (`openat2`), through real directories of the same filesystem only: a directory that
/// somebody swaps for a symbolic link makes the step fail, not go elsewhere.
#[derive(Clone)]
pub struct Root {
    fd: Arc<OwnedFd>,
}

impl Root {
    /// Takes over a descriptor of the root directory.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// The root's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens a directory of the tree as a reference.
    pub fn dir(&self, path: &RelPath) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        Ok(crate::tree::reach::open_beneath(self.fd(), path, flags)?)
    }

    /// Opens the directory that holds a path. The root has none.
    pub fn parent(&self, path: &RelPath) -> io::Result<OwnedFd> {
        match path.parent() {
            Some(parent) => self.dir(&parent),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the root of the tree is no name in it",
            )),
        }
    }

    /// Looks at a path; none if nothing is there, or no directory on the way to it.
    pub fn stat(&self, path: &RelPath) -> io::Result<Option<Stat>> {
        if path.is_root() {
            return Ok(Some(rustix::fs::fstat(&self.fd)?));
        }
        match self.parent(path) {
            Ok(dir) => scan::stat_at(dir.as_fd(), path.name()),
            Err(error) if is_no_directory(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether an error of resolving a directory says that there is none (any more).
pub(crate) fn is_no_directory(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
    )
}

/// A name in an open directory.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) dir: BorrowedFd<'a>,
    pub(crate) name: &'a [u8],
}

impl<'a> Place<'a> {
    pub(crate) fn new(dir: &'a impl AsFd, name: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self {
            dir: dir.as_fd(),
            name: name.as_ref(),
        }
    }

    pub(crate) fn os_name(&self) -> &'a OsStr {
        OsStr::from_bytes(self.name)
    }

    pub(crate) fn stat(&self) -> io::Result<Option<Stat>> {
        scan::stat_at(self.dir, self.name)
    }

    pub(crate) fn ino(&self) -> io::Result<Option<u64>> {
        Ok(self.stat()?.map(|stat| stat.st_ino))
    }
}

/// Moves a name to where nothing is, and fails with EEXIST if something is there.
pub(crate) fn rename_new(from: Place<'_>, to: Place<'_>) -> io::Result<()> {
    match rustix::fs::renameat_with(
        from.dir,
        from.os_name(),
        to.dir,
        to.os_name(),
        RenameFlags::NOREPLACE,
    ) {
        Err(Errno::INVAL | Errno::NOSYS) => rename_new_without_flag(from, to),
        other => Ok(other?),
    }
}

/// The same where the filesystem lacks the flag (NFS, some FUSE filesystems): a link is
/// as exclusive, and so is making a directory, over which a directory can be renamed.
fn rename_new_without_flag(from: Place<'_>, to: Place<'_>) -> io::Result<()> {
    let stat = from.stat()?.ok_or(Errno::NOENT)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        rustix::fs::mkdirat(to.dir, to.os_name(), Mode::RWXU)?;
        // Fails with ENOTEMPTY if somebody was quick enough to put a name into it.
        return Ok(rustix::fs::renameat(
            from.dir,
            from.os_name(),
            to.dir,
            to.os_name(),
        )?);
    }
    rustix::fs::linkat(
        from.dir,
        from.os_name(),
        to.dir,
        to.os_name(),
        AtFlags::empty(),
    )?;
    Ok(rustix::fs::unlinkat(
        from.dir,
        from.os_name(),
        AtFlags::empty(),
    )?)
}

/// Exchanges two names in one step. False where the filesystem cannot.
pub(crate) fn exchange(one: Place<'_>, other: Place<'_>) -> io::Result<bool> {
    match rustix::fs::renameat_with(
        one.dir,
        one.os_name(),
        other.dir,
        other.os_name(),
        RenameFlags::EXCHANGE,
    ) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn root(dir: &std::path::Path) -> Root {
        Root::new(fs::File::open(dir).unwrap().into())
    }

    #[test]
    fn leaves_the_tree_through_no_link() {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("in")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        let root = root(dir.path());
        let path = |text: &str| RelPath::new(text).unwrap();
        assert!(root.dir(&path("real")).is_ok());
        assert!(root.dir(&path("link")).is_err());
        assert!(root.dir(&path("link/in")).is_err());
        assert!(root.stat(&path("link/in")).unwrap().is_none());
        assert!(root.parent(&RelPath::ROOT).is_err());
    }

    #[test]
    fn the_fallback_of_creation_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("new"), b"new").unwrap();
        fs::write(at("old"), b"old").unwrap();
        fs::create_dir(at("newdir")).unwrap();
        fs::create_dir(at("olddir")).unwrap();
        let fd = fs::File::open(dir.path()).unwrap();
        let place = |name: &'static str| Place::new(&fd, name);
        for rename in [rename_new, rename_new_without_flag] {
            for (from, to) in [("new", "old"), ("newdir", "olddir"), ("new", "olddir")] {
                let error = rename(place(from), place(to)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            }
        }
        rename_new_without_flag(place("new"), place("a")).unwrap();
        rename_new_without_flag(place("newdir"), place("b")).unwrap();
        assert!(!at("new").exists() && !at("newdir").exists());
        assert_eq!(fs::read(at("a")).unwrap(), b"new");
        assert!(at("b").is_dir());
        assert_eq!(fs::read(at("old")).unwrap(), b"old");
    }
}
