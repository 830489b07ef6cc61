//! Reaching a directory whose path is longer than one system call takes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::RelPath;

/// Longest path that one call gets. Linux takes 4,095 bytes.
const STRIDE: usize = 3500;

/// Opens what is at a path beneath a directory, through real directories of the same
/// filesystem only. A path of any length is walked in strides, each of which the kernel
/// keeps beneath the directory that the one before reached.
pub fn open_beneath(root: BorrowedFd<'_>, path: &RelPath, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut at: Option<OwnedFd> = None;
    let mut rest = path.as_bytes();
    while rest.len() > STRIDE {
        let Some(cut) = rest[..STRIDE].iter().rposition(|byte| *byte == b'/') else {
            return Err(Errno::NAMETOOLONG);
        };
        let from = at.as_ref().map_or(root, OwnedFd::as_fd);
        let next = stride(
            from,
            &rest[..cut],
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        )?;
        at = Some(next);
        rest = &rest[cut + 1..];
    }
    let last = if rest.is_empty() {
        b".".as_slice()
    } else {
        rest
    };
    stride(at.as_ref().map_or(root, OwnedFd::as_fd), last, flags)
}

fn stride(from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        from,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_any_length_is_reached_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let name = vec![b'n'; 200];
        let mut at = OwnedFd::from(root.try_clone().unwrap());
        let mut path = RelPath::ROOT;
        for _ in 0..40 {
            rustix::fs::mkdirat(&at, name.as_slice(), Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, name.as_slice(), OFlags::RDONLY, Mode::empty()).unwrap();
            path = path.join(&name).unwrap();
        }
        assert!(path.as_bytes().len() > 8000);
        let found = open_beneath(root.as_fd(), &path, OFlags::PATH).unwrap();
        let (found, made) = (
            rustix::fs::fstat(&found).unwrap(),
            rustix::fs::fstat(&at).unwrap(),
        );
        assert_eq!(found.st_ino, made.st_ino);
        std::os::unix::fs::symlink("/", dir.path().join("l")).unwrap();
        let link = RelPath::new("l/etc").unwrap();
        assert_eq!(
            open_beneath(root.as_fd(), &link, OFlags::PATH).unwrap_err(),
            Errno::LOOP
        );
        assert!(open_beneath(root.as_fd(), &RelPath::ROOT, OFlags::PATH).is_ok());
    }
}
