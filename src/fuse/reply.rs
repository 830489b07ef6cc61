//! What the kernel is answered.

use rustix::fs::{FileType, StatVfs};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::abi;

/// Nothing changes the tree but this mount, so the kernel may keep what it knows. (Ten
/// years, in seconds: what every kernel can turn into its own units.)
pub(super) const FOR_EVER: u64 = 10 * 365 * 24 * 3600;

/// Bytes of the largest answer that is not content: STATX.
const SMALL: usize = size_of::<abi::StatxOut>();

/// How a request was served. It lives on the stack of the thread that serves, for as long
/// as one request takes: nothing is gained by a box.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub(super) enum Answer {
    /// The kernel expects none.
    Silence,
    /// It failed.
    Failed(Errno),
    /// It is done, and this is told.
    Small(Small),
    /// It is done, and the first so many bytes of the buffer are told.
    Filled(usize),
}

/// A few structures, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Small {
    bytes: [u8; SMALL],
    len: usize,
}

impl Small {
    const NOTHING: Self = Self {
        bytes: [0; SMALL],
        len: 0,
    };

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Appends a structure. All that are ever put together are smaller than the space.
    fn with<T: IntoBytes + Immutable>(mut self, part: &T) -> Self {
        let part = part.as_bytes();
        let end = self.len + part.len();
        debug_assert!(end <= SMALL);
        if let Some(space) = self.bytes.get_mut(self.len..end) {
            space.copy_from_slice(part);
            self.len = end;
        }
        self
    }
}

impl Answer {
    /// Done, and nothing to tell.
    pub(super) const DONE: Self = Self::Small(Small::NOTHING);
    /// Never to be asked again.
    pub(super) const NOT_IMPLEMENTED: Self = Self::Failed(Errno::NOSYS);

    pub(super) fn of<T: IntoBytes + Immutable>(part: &T) -> Self {
        Self::Small(Small::NOTHING.with(part))
    }

    pub(super) fn of_two<A, B>(first: &A, second: &B) -> Self
    where
        A: IntoBytes + Immutable,
        B: IntoBytes + Immutable,
    {
        Self::Small(Small::NOTHING.with(first).with(second))
    }

    /// Attributes, to be kept.
    pub(super) fn attributes(attr: abi::Attr) -> Self {
        Self::of(&abi::AttrOut {
            attr_valid: FOR_EVER,
            attr,
            ..abi::AttrOut::default()
        })
    }

    /// A number of bytes that were written or copied.
    pub(super) fn written(bytes: usize) -> Self {
        Self::of(&abi::WriteOut {
            size: u32::try_from(bytes).unwrap_or(u32::MAX),
            padding: 0,
        })
    }

    /// How full the filesystem is.
    pub(super) fn statfs(stat: &StatVfs) -> Self {
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Self::of(&abi::StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: narrow(stat.f_bsize),
            namelen: narrow(stat.f_namemax),
            frsize: narrow(stat.f_frsize),
            ..abi::StatfsOut::default()
        })
    }

    /// The value of an extended attribute or the list of their names, for a caller with
    /// room for `size` bytes who, with 0, asks how many there are.
    pub(super) fn value(value: &[u8], size: u32, buffer: &mut [u8]) -> Self {
        let Ok(len) = u32::try_from(value.len()) else {
            return Self::Failed(Errno::TOOBIG);
        };
        if size == 0 {
            return Self::of(&abi::GetxattrOut {
                size: len,
                padding: 0,
            });
        }
        if len > size {
            return Self::Failed(Errno::RANGE);
        }
        Self::content(value, buffer)
    }

    /// Bytes that somebody made elsewhere.
    pub(super) fn content(content: &[u8], buffer: &mut [u8]) -> Self {
        match buffer.get_mut(..content.len()) {
            Some(space) => {
                space.copy_from_slice(content);
                Self::Filled(content.len())
            }
            None => Self::Failed(Errno::RANGE),
        }
    }
}

impl From<Result<(), Errno>> for Answer {
    fn from(result: Result<(), Errno>) -> Self {
        match result {
            Ok(()) => Self::DONE,
            Err(error) => Self::Failed(error),
        }
    }
}

/// The names of a listing, as they are put into the buffer one after the other.
#[derive(Debug)]
pub(super) struct Listing<'a> {
    buffer: &'a mut [u8],
    filled: usize,
}

/// One name of a listing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'a> {
    pub(super) ino: u64,
    pub(super) next: u64,
    pub(super) file_type: FileType,
    pub(super) name: &'a [u8],
}

impl<'a> Listing<'a> {
    /// Into the buffer, no more than `size` bytes.
    pub(super) fn new(buffer: &'a mut [u8], size: usize) -> Self {
        let size = size.min(buffer.len());
        let buffer = buffer.get_mut(..size).unwrap_or_default();
        Self { buffer, filled: 0 }
    }

    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Adds a name, behind its entry in a listing that has them. False if there is no
    /// room for it.
    pub(super) fn add(&mut self, entry: Option<&abi::EntryOut>, name: Name<'_>) -> bool {
        let dirent = abi::Dirent {
            ino: name.ino,
            off: name.next,
            namelen: u32::try_from(name.name.len()).unwrap_or(u32::MAX),
            kind: name.file_type.as_raw_mode() >> 12,
        };
        let entry = entry.map(IntoBytes::as_bytes).unwrap_or_default();
        let len = entry.len() + size_of::<abi::Dirent>() + name.name.len();
        let padded = len.next_multiple_of(8);
        let Some(mut space) = self.buffer.get_mut(self.filled..self.filled + padded) else {
            return false;
        };
        for part in [entry, dirent.as_bytes(), name.name] {
            let (here, rest) = space.split_at_mut(part.len());
            here.copy_from_slice(part);
            space = rest;
        }
        space.fill(0);
        self.filled += padded;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_padded_and_end_with_the_room() {
        let name = |name| Name {
            ino: 5,
            next: 9,
            file_type: FileType::Directory,
            name,
        };
        let mut buffer = [0xff; 100];
        let mut listing = Listing::new(&mut buffer, 72);
        assert!(listing.add(None, name(b"abc")));
        assert!(listing.add(None, name(b"12345678")));
        assert!(!listing.add(None, name(b"x")));
        assert_eq!(listing.filled(), 64);
        assert_eq!(&buffer[20..32], b"\x04\0\0\0abc\0\0\0\0\0");
        assert_eq!(&buffer[56..64], b"12345678");
        assert!(!Listing::new(&mut buffer, 0).add(None, name(b"x")));
    }

    #[test]
    fn a_value_fits_or_its_size_is_told() {
        let mut buffer = [0; 8];
        assert!(matches!(
            Answer::value(b"value", 5, &mut buffer),
            Answer::Filled(5)
        ));
        assert_eq!(&buffer[..5], b"value");
        assert!(matches!(
            Answer::value(b"value", 4, &mut buffer),
            Answer::Failed(Errno::RANGE)
        ));
        let Answer::Small(small) = Answer::value(b"value", 0, &mut buffer) else {
            panic!("no size");
        };
        assert_eq!(small.bytes(), [5, 0, 0, 0, 0, 0, 0, 0]);
        // More than there is room for anywhere.
        assert!(matches!(
            Answer::value(b"ninebytes", 9, &mut buffer),
            Answer::Failed(Errno::RANGE)
        ));
    }
}
