//! Between the kernel's numbers and ours.

use rustix::fs::StatxFlags;

use super::abi::{self, ROOT_ID};
use crate::fs::{Attributes, SetTime};
use crate::tree::{Ino, Timestamp};

/// Between the node ids of the protocol and lower's inode numbers. They are the same,
/// except that the protocol's root is number 1: it changes places with the root's own
/// number. The inode numbers that programs see are lower's, always.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    pub(super) root: Ino,
}

impl Ids {
    pub(super) fn ino(self, id: u64) -> Ino {
        Ino(self.swap(id))
    }

    pub(super) fn id(self, ino: Ino) -> u64 {
        self.swap(ino.0)
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
}

/// Attributes as the protocol has them.
pub(super) fn attr(attributes: &Attributes) -> abi::Attr {
    abi::Attr {
        ino: attributes.ino.0,
        size: attributes.size,
        blocks: attributes.blocks,
        // The kernel reads these as signed: that is how a time before 1970 is told.
        atime: attributes.atime.secs.cast_unsigned(),
        mtime: attributes.mtime.secs.cast_unsigned(),
        ctime: attributes.ctime.secs.cast_unsigned(),
        atimensec: attributes.atime.nanos,
        mtimensec: attributes.mtime.nanos,
        ctimensec: attributes.ctime.nanos,
        mode: full_mode(attributes),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: protocol_device(attributes.rdev),
        blksize: attributes.blksize,
        flags: 0,
    }
}

/// Attributes as `statx` has them, with the time of birth where lower knows it.
pub(super) fn statx(attributes: &Attributes, birth: Option<Timestamp>) -> abi::Statx {
    let time = |time: Timestamp| abi::SxTime {
        tv_sec: time.secs,
        tv_nsec: time.nanos,
        reserved: 0,
    };
    let mut mask = StatxFlags::BASIC_STATS;
    mask.set(StatxFlags::BTIME, birth.is_some());
    abi::Statx {
        mask: mask.bits(),
        blksize: attributes.blksize,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        mode: u16::try_from(full_mode(attributes)).unwrap_or_default(),
        ino: attributes.ino.0,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: time(attributes.atime),
        btime: birth.map(time).unwrap_or_default(),
        ctime: time(attributes.ctime),
        mtime: time(attributes.mtime),
        rdev_major: rustix::fs::major(attributes.rdev),
        rdev_minor: rustix::fs::minor(attributes.rdev),
        ..abi::Statx::default()
    }
}

fn full_mode(attributes: &Attributes) -> u32 {
    attributes.file_type.as_raw_mode() | (attributes.mode & 0o7777)
}

/// A time that a SETATTR sets.
pub(super) fn set_time(now: bool, secs: u64, nanos: u32) -> SetTime {
    if now {
        SetTime::Now
    } else {
        SetTime::To(Timestamp {
            secs: secs.cast_signed(),
            nanos,
        })
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
        assert_eq!(ids.ino(1), Ino(77));
        assert_eq!(ids.ino(77), Ino(1));
        assert_eq!(ids.ino(5), Ino(5));
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
        let wire = time.secs.cast_unsigned();
        assert_eq!(set_time(false, wire, time.nanos), SetTime::To(time));
    }
}
