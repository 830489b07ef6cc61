//! Where a cut saves the bytes that are about to be overwritten: memory for the
//! first, an unlinked file in the staging directory for the rest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Result;
use super::ops_data::read_full;

/// Kept in memory per cut before a file is used.
const IN_MEMORY: u64 = 4 << 20;
/// Copied at a time.
const CHUNK: usize = 1 << 20;

#[derive(Debug)]
enum Bytes {
    Memory(Box<[u8]>),
    File(u64),
}

#[derive(Debug)]
struct Saved {
    end: u64,
    bytes: Bytes,
}

/// The saved parts of one file.
#[derive(Debug, Default)]
pub(super) struct SavedFile {
    /// The size when it was first touched. Nothing past it belongs to the cut.
    pub(super) size: u64,
    ranges: BTreeMap<u64, Saved>,
}

/// The storage of one cut.
#[derive(Debug, Default)]
pub(super) struct Spool {
    file: Option<OwnedFd>,
    file_len: u64,
    in_memory: u64,
    pub(super) total: u64,
}

impl SavedFile {
    /// A file that is touched for the first time.
    pub(super) fn new(size: u64) -> Self {
        Self {
            size,
            ..Self::default()
        }
    }

    /// The parts of a range that are not saved yet.
    fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let first = self
            .ranges
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        for (start, saved) in self.ranges.range(first..range.end) {
            if saved.end <= at {
                continue;
            }
            if *start > at {
                missing.push(at..(*start).min(range.end));
            }
            at = saved.end;
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }
}

impl Spool {
    /// Saves what `range` of a file holds now, as far as it is not saved yet.
    pub(super) fn save(
        &mut self,
        saved: &mut SavedFile,
        file: &OwnedFd,
        range: Range<u64>,
        limit: u64,
        staging: impl Fn() -> Result<OwnedFd>,
    ) -> Result<()> {
        for missing in saved.missing(&range) {
            if self.total + (missing.end - missing.start) > limit {
                return Err(Errno::NOSPC);
            }
            let mut at = missing.start;
            while at < missing.end {
                let len = usize::try_from(missing.end - at).map_or(CHUNK, |len| len.min(CHUNK));
                let mut bytes = vec![0; len];
                // Within the size at first touch: shorter only if lower was truncated
                // behind our back, and then zeros are as good as anything.
                read_full(file, at, &mut bytes)?;
                let end = at + len as u64;
                let bytes = self.store(bytes, &staging)?;
                saved.ranges.insert(at, Saved { end, bytes });
                at = end;
            }
        }
        Ok(())
    }

    fn store(&mut self, bytes: Vec<u8>, staging: impl Fn() -> Result<OwnedFd>) -> Result<Bytes> {
        let len = bytes.len() as u64;
        if self.in_memory + len <= IN_MEMORY {
            self.in_memory += len;
            self.total += len;
            return Ok(Bytes::Memory(bytes.into_boxed_slice()));
        }
        let file = match &self.file {
            Some(file) => file,
            None => {
                let opened = rustix::fs::openat(
                    staging()?,
                    ".",
                    OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
                    Mode::from_raw_mode(0o600),
                )?;
                self.file.insert(opened)
            }
        };
        let at = self.file_len;
        let mut written = 0;
        while written < bytes.len() {
            written += rustix::io::pwrite(file, &bytes[written..], at + written as u64)?;
        }
        self.file_len += len;
        self.total += len;
        Ok(Bytes::File(at))
    }

    /// Reads a file as it was: what is saved from here, the rest from lower.
    pub(super) fn read(
        &self,
        saved: &SavedFile,
        lower: &OwnedFd,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        if offset >= saved.size {
            return Ok(0);
        }
        let len = usize::try_from(saved.size - offset)
            .map_or(buffer.len(), |left| left.min(buffer.len()));
        let buffer = &mut buffer[..len];
        let range = offset..offset + len as u64;
        for missing in saved.missing(&range) {
            let from = index(missing.start - offset);
            let to = index(missing.end - offset);
            let part = &mut buffer[from..to];
            let read = read_full(lower, missing.start, part)?;
            // Truncations save what they cut off, so there is nothing to miss here
            // but a file that was changed behind our back.
            part[read..].fill(0);
        }
        let first = saved
            .ranges
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        for (start, piece) in saved.ranges.range(first..range.end) {
            let from = (*start).max(range.start);
            let to = piece.end.min(range.end);
            if from >= to {
                continue;
            }
            let part = &mut buffer[index(from - offset)..index(to - offset)];
            let skip = from - start;
            match &piece.bytes {
                Bytes::Memory(bytes) => {
                    part.copy_from_slice(&bytes[index(skip)..index(skip) + part.len()]);
                }
                Bytes::File(at) => {
                    let file = self.file.as_ref().ok_or(Errno::IO)?;
                    if read_full(file, at + skip, part)? != part.len() {
                        return Err(Errno::IO);
                    }
                }
            }
        }
        Ok(len)
    }

    /// Gives a file's space back, as far as it was memory.
    pub(super) fn release(&mut self, saved: &SavedFile) {
        for piece in saved.ranges.values() {
            if let Bytes::Memory(bytes) = &piece.bytes {
                self.in_memory -= bytes.len() as u64;
                self.total -= bytes.len() as u64;
            }
        }
    }
}

/// Offsets inside a buffer, which fit by construction.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
