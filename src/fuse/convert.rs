//! Between fuser's types and ours.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo, TimeOrNow};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::fs::{Attributes, SetTime};
use crate::tree::{Ino, Timestamp};

/// The number that the protocol gives to the root.
const ROOT_ID: u64 = 1;

/// Between the numbers of the protocol and lower's. They are the same, except that
/// the protocol's root is number 1: it changes places with the root's own number.
/// fuser makes the node id the inode number that programs see, and those have to
/// survive a remount.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    pub(super) root: Ino,
}

impl Ids {
    pub(super) fn ino(self, id: INodeNo) -> Ino {
        Ino(self.swap(id.0))
    }

    pub(super) fn id(self, ino: Ino) -> INodeNo {
        INodeNo(self.swap(ino.0))
    }

    fn swap(self, number: u64) -> u64 {
        if number == ROOT_ID {
            self.root.0
        } else if number == self.root.0 {
            ROOT_ID
        } else {
            number
        }
    }

    /// Attributes for an entry, whose number becomes the node id.
    pub(super) fn entry(self, attributes: &Attributes) -> FileAttr {
        file_attr(attributes, self.id(attributes.ino))
    }

    /// Attributes alone: the number is only shown.
    pub(super) fn attributes(self, attributes: &Attributes) -> FileAttr {
        let id = if attributes.ino == self.root {
            INodeNo(self.root.0)
        } else {
            self.id(attributes.ino)
        };
        file_attr(attributes, id)
    }
}

fn file_attr(attributes: &Attributes, ino: INodeNo) -> FileAttr {
    FileAttr {
        ino,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.file_type),
        perm: u16::try_from(attributes.mode & 0o7777).unwrap_or(0),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: protocol_device(attributes.rdev),
        blksize: attributes.blksize,
        flags: 0,
    }
}

/// The attributes that go with the answer "there is no such name, remember that".
pub(super) fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(super) fn file_type(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::CharacterDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        _ => fuser::FileType::RegularFile,
    }
}

pub(super) fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw_os_error())
}

fn system_time(time: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    let whole = if time.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole
        .and_then(|whole| whole.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::To(timestamp(time)),
    }
}

/// Undoes what fuser 0.18 does to a time before 1970: it subtracts the nanoseconds
/// as well, where the protocol adds them.
fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp {
            secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: since.subsec_nanos(),
        },
        Err(before) => Timestamp {
            secs: i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |secs| -secs),
            nanos: before.duration().subsec_nanos(),
        },
    }
}

/// The kernel's wire form of a device number: 12 bits of major, 20 of minor, the
/// minor's lowest eight at the bottom.
fn protocol_device(device: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

/// The reverse of [`protocol_device`].
pub(super) fn device(wire: u32) -> u64 {
    rustix::fs::makedev(
        (wire >> 8) & 0xfff,
        (wire & 0xff) | ((wire >> 12) & 0xfff00),
    )
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_root_changes_places_with_number_one() {
        let ids = Ids { root: Ino(77) };
        assert_eq!(ids.ino(INodeNo(1)), Ino(77));
        assert_eq!(ids.ino(INodeNo(77)), Ino(1));
        assert_eq!(ids.ino(INodeNo(5)), Ino(5));
        for number in [1, 5, 77] {
            assert_eq!(ids.ino(ids.id(Ino(number))), Ino(number));
        }
    }

    #[test]
    fn device_numbers_survive_the_protocol() {
        for (major, minor) in [(1, 3), (8, 257), (4095, 0xfffff)] {
            let number = rustix::fs::makedev(major, minor);
            assert_eq!(device(protocol_device(number)), number);
        }
    }

    #[test]
    fn times_before_the_epoch_are_told_right() {
        let time = Timestamp {
            secs: -2,
            nanos: 800_000_000,
        };
        assert_eq!(system_time(time), UNIX_EPOCH - Duration::from_millis(1200));
        // As fuser decodes what the kernel sends for it.
        let decoded = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(timestamp(decoded), time);
    }
}
