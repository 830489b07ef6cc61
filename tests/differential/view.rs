//! What a tree shows, and in which respects two trees have to show the same.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

const RESERVED: &[u8] = b".mirrorfs";

/// A time as stat tells it.
pub type Moment = (i64, i64);

/// What stat shows, as far as the two sides have to show the same. Numbers of devices and
/// inodes are their own, times are compared by whether they moved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shown {
    pub file_type: FileType,
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    pub blocks: u64,
    pub blksize: i64,
}

impl Shown {
    /// Whether both show the same. A file's blocks count what the disk needs to find the
    /// others by (ext4's tree of extents), and that depends on where space was free: up
    /// to three such blocks at the sizes of these tests.
    pub fn is_like(&self, other: &Self) -> bool {
        let spare = if self.file_type.is_file() { 24 } else { 0 };
        let blocks = self.blocks;
        *self
            == Self {
                blocks,
                ..other.clone()
            }
            && blocks.abs_diff(other.blocks) <= spare
    }
}

/// One node.
#[derive(Clone, Debug)]
pub struct Seen {
    pub shown: Shown,
    pub ino: u64,
    pub mtime: Moment,
    pub ctime: Moment,
}

impl From<&Stat> for Seen {
    fn from(stat: &Stat) -> Self {
        let file_type = FileType::from_raw_mode(stat.st_mode);
        Self {
            shown: Shown {
                file_type,
                mode: stat.st_mode & 0o7777,
                nlink: stat.st_nlink,
                uid: stat.st_uid,
                gid: stat.st_gid,
                rdev: stat.st_rdev,
                size: stat.st_size.cast_unsigned(),
                blocks: stat.st_blocks.cast_unsigned(),
                blksize: stat.st_blksize,
            },
            ino: stat.st_ino,
            mtime: (stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
            ctime: (stat.st_ctime, stat.st_ctime_nsec.cast_signed()),
        }
    }
}

/// A tree by path. The root is the empty path.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub nodes: BTreeMap<Vec<u8>, Seen>,
    times: HashMap<u64, (Moment, Moment)>,
    is_lower: bool,
}

impl View {
    /// Looks at everything below a directory, and at nodes that are only open.
    pub fn of(root: &Path, open: impl IntoIterator<Item = Stat>) -> Self {
        let mut view = Self::default();
        view.look(root);
        for stat in open {
            view.note(&Seen::from(&stat));
        }
        view
    }

    /// Looks at everything below a covered directory but for what is reserved.
    pub fn of_lower(root: &Path) -> Self {
        let mut view = Self {
            is_lower: true,
            ..Self::default()
        };
        view.look(root);
        view
    }

    fn look(&mut self, root: &Path) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Some(dir) = permitted(rustix::fs::open(root, flags, Mode::empty())) else {
            return;
        };
        self.add(Vec::new(), &rustix::fs::fstat(&dir).unwrap());
        self.below(&dir, b"");
    }

    fn note(&mut self, seen: &Seen) {
        let file_type = seen.shown.file_type;
        if file_type.is_file() || file_type.is_dir() || file_type.is_symlink() {
            self.times.insert(seen.ino, (seen.mtime, seen.ctime));
        }
    }

    fn add(&mut self, path: Vec<u8>, stat: &Stat) {
        let seen = Seen::from(stat);
        self.note(&seen);
        self.nodes.insert(path, seen);
    }

    fn below(&mut self, dir: &rustix::fd::OwnedFd, prefix: &[u8]) {
        for (name, (file_type, ino)) in list(dir) {
            if name == b"." || name == b".." {
                continue;
            }
            let os_name = OsStr::from_bytes(&name);
            let stat = rustix::fs::statat(dir, os_name, AtFlags::SYMLINK_NOFOLLOW);
            let Some(stat) = permitted(stat) else {
                continue;
            };
            let mut path = prefix.to_vec();
            path.extend(&name);
            if prefix.is_empty() && name == RESERVED {
                assert!(self.is_lower, "the reserved directory shows");
                continue;
            }
            assert_eq!(ino, stat.st_ino, "d_ino of {}", path.escape_ascii());
            let actual = FileType::from_raw_mode(stat.st_mode);
            assert_eq!(file_type, actual, "d_type of {}", path.escape_ascii());
            self.add(path.clone(), &stat);
            if actual.is_dir() {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let inner = rustix::fs::openat(dir, os_name, flags, Mode::empty());
                path.push(b'/');
                if let Some(inner) = permitted(inner) {
                    self.below(&inner, &path);
                }
            }
        }
    }

    /// Whether the times of a node (content, anything) moved since an earlier look, if it
    /// was there already. Those of FIFOs and devices do not count: the kernel's FUSE does
    /// not move them when somebody writes there.
    pub fn moved(&self, since: &Self, ino: u64) -> Option<(bool, bool)> {
        let (now, before) = (self.times.get(&ino)?, since.times.get(&ino)?);
        Some((now.0 != before.0, now.1 != before.1))
    }
}

/// None where an ordinary user may not look.
fn permitted<T>(looked: rustix::io::Result<T>) -> Option<T> {
    match looked {
        Err(Errno::ACCESS) => None,
        looked => Some(looked.unwrap()),
    }
}

/// Everything that a directory lists, each name with its type and number. Fails if a name
/// comes twice.
pub fn list(dir: &rustix::fd::OwnedFd) -> BTreeMap<Vec<u8>, (FileType, u64)> {
    try_list(dir).unwrap()
}

pub fn try_list(
    dir: &rustix::fd::OwnedFd,
) -> rustix::io::Result<BTreeMap<Vec<u8>, (FileType, u64)>> {
    rustix::fs::seek(dir, rustix::fs::SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut listed = BTreeMap::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes().to_vec();
        let twice = listed.insert(name.clone(), (entry.file_type(), entry.ino()));
        assert!(twice.is_none(), "{} is listed twice", name.escape_ascii());
    }
    Ok(listed)
}

/// All extended attributes of what a path names itself.
pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    try_xattrs(path).unwrap()
}

pub fn try_xattrs(path: &Path) -> rustix::io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..])?;
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let name_of = OsStr::from_bytes(name);
            let length = rustix::fs::lgetxattr(path, name_of, &mut value[..])?;
            value.truncate(length);
            Ok((name.to_vec(), value))
        })
        .collect()
}
