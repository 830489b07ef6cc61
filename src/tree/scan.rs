//! Looking at one name or one directory of a real tree, without following anything.
//!
//! What is found is put into the vocabulary of the tree; whether it matters is decided
//! elsewhere. Everything works on descriptors that the caller resolved.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

use super::{Kind, Timestamp, Xattrs};

/// The most bytes of attributes that one entry may carry. Larger sets do not fit into a
/// frame together with the rest of an observation.
pub const XATTRS_MAX: usize = 256 * 1024;

/// The permission bits that are carried: setuid and setgid never are.
pub const MODE_MASK: u32 = 0o1777;

/// What kind of thing an inode is.
pub fn kind_of(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Special,
    }
}

/// The permission bits of an inode that are carried to the other side.
pub fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode & MODE_MASK
}

/// When the content last changed.
pub fn mtime_of(stat: &Stat) -> Timestamp {
    timestamp(stat.st_mtime, stat.st_mtime_nsec)
}

/// When anything of the inode last changed.
pub fn ctime_of(stat: &Stat) -> Timestamp {
    timestamp(stat.st_ctime, stat.st_ctime_nsec)
}

/// The size in bytes.
pub fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

// The types of these fields differ between architectures.
#[allow(clippy::useless_conversion)]
fn timestamp(secs: impl TryInto<i64>, nanos: impl TryInto<i64>) -> Timestamp {
    let nanos: i64 = nanos.try_into().unwrap_or(0);
    Timestamp {
        secs: secs.try_into().unwrap_or(0),
        nanos: u32::try_from(nanos.clamp(0, 999_999_999)).unwrap_or(0),
    }
}

/// The number of the filesystem that something is on: where it tells, its own, which unlike
/// that of the device survives a reboot.
pub fn filesystem_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    match rustix::fs::fstatvfs(fd)?.f_fsid {
        0 => Ok(rustix::fs::fstat(fd)?.st_dev),
        fsid => Ok(fsid),
    }
}

/// Looks at a name of a directory without following it; none if nothing is there.
pub fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens a name for reading if it is a regular file, leaving its access time alone where
/// that is allowed. Never blocks on a FIFO and never follows a link.
pub fn open_file(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<File> {
    let name = OsStr::from_bytes(name);
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = match rustix::fs::openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may leave the access time alone.
        Err(rustix::io::Errno::PERM) => rustix::fs::openat(dir, name, flags, Mode::empty())?,
        other => other?,
    };
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no longer a regular file",
        ));
    }
    Ok(file)
}

/// Opens a name, whatever it is, as a mere reference to its inode.
pub fn open_reference(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        dir,
        OsStr::from_bytes(name),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The text of a symbolic link.
pub fn read_link(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(dir, OsStr::from_bytes(name), Vec::new())?.into_bytes())
}

/// The names in a directory, without `.` and `..`, in the order of the filesystem.
pub fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let fd = rustix::fs::openat(
        dir,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// A path to the inode that a descriptor refers to. Unlike calls on the descriptor
/// itself it also serves descriptors that only refer (`O_PATH`), so that attributes of
/// what cannot be opened can be read and set.
pub fn reference_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The `user.` attributes of a file or directory. Empty where the filesystem has none.
pub fn xattrs(fd: BorrowedFd<'_>) -> io::Result<Xattrs> {
    use rustix::io::Errno;
    let path = reference_path(fd);
    let mut found = Xattrs::new();
    let mut total = 0;
    let mut list = vec![0_u8; 1024];
    let len = loop {
        match rustix::fs::listxattr(&path, &mut list[..]) {
            Ok(len) => break len,
            Err(Errno::RANGE) if list.len() < 64 * 1024 => list.resize(64 * 1024, 0),
            Err(Errno::NOTSUP) => return Ok(found),
            Err(error) => return Err(error.into()),
        }
    };
    for name in list[..len].split(|byte| *byte == 0) {
        if !name.starts_with(b"user.") {
            continue;
        }
        let mut value = vec![0_u8; 4096];
        let len = loop {
            match rustix::fs::getxattr(&path, OsStr::from_bytes(name), &mut value[..]) {
                Ok(len) => break Some(len),
                Err(Errno::RANGE) if value.len() < 64 * 1024 => value.resize(64 * 1024, 0),
                // It was removed between the listing and now.
                Err(Errno::NODATA) => break None,
                Err(error) => return Err(error.into()),
            }
        };
        let Some(len) = len else { continue };
        value.truncate(len);
        total += name.len() + value.len();
        if total > XATTRS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {XATTRS_MAX} bytes of extended attributes"),
            ));
        }
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn tells_kinds_apart_and_follows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"x").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("fifo"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let fd = File::open(dir.path()).unwrap();
        let kind = |name: &[u8]| {
            stat_at(fd.as_fd(), name)
                .unwrap()
                .map(|stat| kind_of(&stat))
        };
        assert_eq!(kind(b"file"), Some(Kind::File));
        assert_eq!(kind(b"link"), Some(Kind::Symlink));
        assert_eq!(kind(b"fifo"), Some(Kind::Special));
        assert_eq!(kind(b"none"), None);
        assert_eq!(read_link(fd.as_fd(), b"link").unwrap(), b"file");
        assert!(open_file(fd.as_fd(), b"link").is_err());
        assert!(open_file(fd.as_fd(), b"fifo").is_err(), "and does not hang");
        let mut listed = names(fd.as_fd()).unwrap();
        listed.sort();
        assert_eq!(
            listed,
            [b"fifo".to_vec(), b"file".to_vec(), b"link".to_vec()]
        );
    }

    #[test]
    fn reads_user_attributes_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"x").unwrap();
        let set = |name: &str, value: &[u8]| {
            rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
        };
        set("user.one", b"1");
        set("user.large", &[7; 3000]);
        let fd = File::open(dir.path()).unwrap();
        let found = xattrs(open_reference(fd.as_fd(), b"file").unwrap().as_fd()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[&b"user.one"[..]], b"1");
        assert_eq!(found[&b"user.large"[..]], [7; 3000]);
    }
}
