//! What `stat` tells of a node.

use rustix::fs::{FileType, Stat};

use crate::tree::{Attr, Ino, Kind, Timestamp};

/// A node's attributes as lower has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// Lower's device.
    pub device: u64,
    /// Lower's inode number.
    pub ino: Ino,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Names that it has.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device that a device node stands for.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space it takes, in units of 512 bytes.
    pub blocks: u64,
    /// Preferred size of a transfer.
    pub blksize: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of anything.
    pub ctime: Timestamp,
}

impl Attributes {
    /// The kind that the journal knows.
    pub fn kind(&self) -> Kind {
        kind_of(self.file_type)
    }

    /// What the journal records.
    pub fn recorded(&self) -> Attr {
        Attr {
            kind: self.kind(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            mtime: self.mtime,
            ctime: self.ctime,
        }
    }
}

/// The journal's kind for a type of file.
pub(super) fn kind_of(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Special,
    }
}

impl From<&Stat> for Attributes {
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)] // field widths differ between targets
    fn from(stat: &Stat) -> Self {
        let time = |secs: i64, nanos: u64| Timestamp {
            secs,
            nanos: u32::try_from(nanos).unwrap_or(0),
        };
        Self {
            device: stat.st_dev,
            ino: Ino(stat.st_ino),
            file_type: FileType::from_raw_mode(stat.st_mode),
            mode: stat.st_mode & 0o7777,
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            blocks: stat.st_blocks as u64,
            blksize: stat.st_blksize as u32,
            atime: time(stat.st_atime as i64, stat.st_atime_nsec as u64),
            mtime: time(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
            ctime: time(stat.st_ctime as i64, stat.st_ctime_nsec as u64),
        }
    }
}
