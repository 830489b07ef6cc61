//! A content told by another one that the receiver has: which stretches of the old content
//! to take, and the bytes that are new.
//!
//! It comes in order, as a content that is sent whole does, and the whole is verified by
//! its hash. So whatever is believed of the old content here may be wrong; it costs a
//! transfer, and never more than that.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use crate::tree::ContentHash;
use crate::tree::hash::Hasher;

/// Smaller contents, in bytes, are sent whole.
pub const LEAST: u64 = 256 * 1024;
/// New bytes in one message, at the most.
pub const STRETCH: usize = 256 * 1024;
/// The most that one message takes from the old content, in bytes.
pub const REUSED: u64 = 16 << 20;
/// What the sum of a block takes: four bytes that can be rolled on, eight of its BLAKE3.
const SUM: usize = 12;
/// The most blocks of one content. Their sums fit into a frame.
const BLOCKS: u64 = 1 << 16;
/// The smallest block.
const SMALLEST: u64 = 4096;
/// So many blocks may look alike without being alike before they are not looked for any
/// more byte by byte.
const MISTAKEN: u32 = 4096;
/// What is the same between two changes is not told apart from them, in bytes, if it is less:
/// a message of its own would cost more.
const APART: u64 = 4096;
/// The multiplier of the rolling sum: odd, and with no pattern in it.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Reads as `pread` does.
pub type ReadAt<'a> = dyn Fn(&mut [u8], u64) -> io::Result<usize> + 'a;

/// What comes next of a content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// A stretch of the old content.
    Old {
        /// Where it starts there.
        from: u64,
        /// Its length.
        len: u64,
    },
    /// So many bytes that the receiver does not have.
    New(usize),
}

/// What is known of how a content is like an old one.
#[derive(Clone, Debug)]
pub enum Likeness {
    /// Nothing.
    None,
    /// Outside of these ranges, which are in order and well apart, it is the same at the same
    /// place.
    Ranges(Vec<Range<u64>>),
    /// The sums of the old content's blocks, wherever they may be found in the new one.
    Blocks(Blocks),
}

impl Likeness {
    /// What was written to a content of the size `old`, which became `size` by it.
    pub fn written(mut ranges: Vec<Range<u64>>, old: u64, size: u64) -> Self {
        ranges.push(old..u64::MAX);
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            let range = range.start..range.end.min(size);
            match merged.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if range.start < last.end.saturating_add(APART) => {
                    last.end = last.end.max(range.end);
                }
                _ => merged.push(range),
            }
        }
        Self::Ranges(merged)
    }

    /// Whether a content begins with all of an old one.
    pub fn appended(
        old: ContentHash,
        old_size: u64,
        size: u64,
        read: &ReadAt<'_>,
    ) -> io::Result<Option<Self>> {
        if old_size > size {
            return Ok(None);
        }
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; STRETCH];
        while hasher.len() < old_size {
            let want = clamp(old_size - hasher.len(), STRETCH);
            fill(read, &mut buffer[..want], hasher.len())?;
            hasher.update(&buffer[..want]);
        }
        Ok((hasher.digest() == old).then(|| Self::written(Vec::new(), old_size, size)))
    }

    /// How many bytes are new as far as that is known beforehand.
    pub fn new_bytes(&self) -> Option<u64> {
        match self {
            Self::Ranges(ranges) => Some(ranges.iter().map(|range| range.end - range.start).sum()),
            Self::None | Self::Blocks(_) => None,
        }
    }

    /// What comes at `offset` of a content of the given size, which is beyond it.
    pub fn next(&mut self, offset: u64, size: u64, read: &ReadAt<'_>) -> io::Result<Piece> {
        let left = size.saturating_sub(offset);
        match self {
            Self::None => Ok(Piece::New(clamp(left, STRETCH))),
            Self::Ranges(ranges) => {
                let at = ranges.partition_point(|range| range.end <= offset);
                Ok(match ranges.get(at) {
                    Some(range) if range.start <= offset => {
                        Piece::New(clamp(range.end - offset, STRETCH))
                    }
                    next => Piece::Old {
                        from: offset,
                        len: next.map_or(left, |range| range.start - offset).min(REUSED),
                    },
                })
            }
            Self::Blocks(blocks) => blocks.next(offset, left, read),
        }
    }
}

/// The sums of an old content's blocks.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// The old content's size.
    size: u64,
    block: u64,
    strong: Vec<[u8; 8]>,
    by_weak: HashMap<u32, Vec<u32>>,
    /// The block after the one that was found last.
    expected: Option<usize>,
    /// A stretch of the new content in which no block begins.
    unlike: Range<u64>,
    mistaken: u32,
}

/// The size of the blocks in which a content of a certain size is compared: the larger the
/// content, the larger they are, so that the sums are few beside what changed.
pub fn block_size(size: u64) -> u32 {
    // A change costs about a block, and the sums of all: least where both are the same.
    let balance = size.saturating_mul(SUM as u64).isqrt();
    let few = size.div_ceil(BLOCKS);
    let block = balance.max(few).max(SMALLEST).next_power_of_two();
    u32::try_from(block).unwrap_or(1 << 31)
}

/// The sums of a content's blocks, as they travel; none if blocks of that size are too many
/// or out of bounds.
pub fn sums(size: u64, block: u32, read: &ReadAt<'_>) -> io::Result<Option<Vec<u8>>> {
    let block = u64::from(block);
    if !(SMALLEST..=1 << 31).contains(&block) || size.div_ceil(block) > BLOCKS {
        return Ok(None);
    }
    let mut sums = Vec::new();
    let mut buffer = vec![0; STRETCH];
    let mut at = 0;
    while at < size {
        let end = (at + block).min(size);
        let (mut weak, mut strong) = (0, blake3::Hasher::new());
        while at < end {
            let part = &mut buffer[..clamp(end - at, STRETCH)];
            fill(read, part, at)?;
            weak = roll_in(weak, part);
            strong.update(part);
            at += part.len() as u64;
        }
        sums.extend_from_slice(&folded(weak).to_le_bytes());
        sums.extend_from_slice(&shortened(&strong));
    }
    Ok(Some(sums))
}

impl Blocks {
    /// Takes in the sums of an old content of a known size. None if they are not as many as
    /// it has blocks.
    pub fn new(size: u64, block: u32, sums: &[u8]) -> Option<Self> {
        let block = u64::from(block);
        let fits =
            block > 0 && (size.div_ceil(block)).checked_mul(SUM as u64)? == sums.len() as u64;
        if !fits || sums.is_empty() {
            return None;
        }
        let mut strong = Vec::with_capacity(sums.len() / SUM);
        let mut by_weak: HashMap<u32, Vec<u32>> = HashMap::new();
        for (at, sum) in sums.chunks_exact(SUM).enumerate() {
            let (weak, long) = sum.split_first_chunk::<4>()?;
            let long: [u8; 8] = long.try_into().ok()?;
            let whole = (at as u64 + 1) * block <= size;
            let alike = by_weak.entry(u32::from_le_bytes(*weak)).or_default();
            // Of blocks that are the same one is enough; the last is no whole block.
            if whole
                && !alike
                    .iter()
                    .any(|other| strong.get(*other as usize) == Some(&long))
            {
                alike.push(u32::try_from(at).ok()?);
            }
            strong.push(long);
        }
        Some(Self {
            size,
            block,
            strong,
            by_weak,
            expected: None,
            unlike: 0..0,
            mistaken: 0,
        })
    }

    fn next(&mut self, offset: u64, left: u64, read: &ReadAt<'_>) -> io::Result<Piece> {
        if self.unlike.contains(&offset) {
            return Ok(Piece::New(clamp(self.unlike.end - offset, STRETCH)));
        }
        let same_place = offset.is_multiple_of(self.block);
        let same_place = same_place.then(|| usize::try_from(offset / self.block).ok());
        for index in [self.expected, same_place.flatten()].into_iter().flatten() {
            if let Some(piece) = self.run(index, offset, left, read)? {
                return Ok(piece);
            }
        }
        let found = self.search(offset, left, read)?;
        self.expected = found.map(|(index, _)| index);
        if let Some((index, 0)) = found
            && let Some(piece) = self.run(index, offset, left, read)?
        {
            return Ok(piece);
        }
        let new = found.map(|(_, new)| new).filter(|new| *new > 0);
        let new = new.unwrap_or(clamp(left, STRETCH));
        self.unlike = offset..offset + new as u64;
        Ok(Piece::New(new))
    }

    /// How far a content goes on from `offset` as the old one does from a block on.
    fn run(
        &mut self,
        first: usize,
        offset: u64,
        left: u64,
        read: &ReadAt<'_>,
    ) -> io::Result<Option<Piece>> {
        let from = first as u64 * self.block;
        let (mut index, mut len) = (first, 0);
        let mut buffer = vec![0; clamp(self.block, STRETCH)];
        while len < REUSED
            && let Some(strong) = self.strong.get(index)
        {
            let block = self.block.min(self.size - index as u64 * self.block);
            if len + block > left {
                break;
            }
            let mut hasher = blake3::Hasher::new();
            let mut done = 0;
            while done < block {
                let part = clamp(block - done, buffer.len());
                fill(read, &mut buffer[..part], offset + len + done)?;
                hasher.update(&buffer[..part]);
                done += part as u64;
            }
            if shortened(&hasher) != *strong {
                break;
            }
            len += block;
            index += 1;
        }
        if len == 0 {
            return Ok(None);
        }
        self.expected = Some(index);
        Ok(Some(Piece::Old { from, len }))
    }

    /// Looks for a block at each byte of the next stretch. Gives the block, and how many
    /// bytes come before it.
    fn search(
        &mut self,
        offset: u64,
        left: u64,
        read: &ReadAt<'_>,
    ) -> io::Result<Option<(usize, usize)>> {
        let Ok(block) = usize::try_from(self.block) else {
            return Ok(None);
        };
        if left < self.block || self.mistaken >= MISTAKEN {
            return Ok(None);
        }
        let mut bytes = vec![0; clamp(left, STRETCH + block)];
        fill(read, &mut bytes, offset)?;
        let first = (1..block).fold(1_u64, |power, _| power.wrapping_mul(MULTIPLIER));
        let mut weak = roll_in(0, &bytes[..block]);
        // The window of a match that begins after this stretch is looked at with the next.
        for (at, window) in bytes.windows(block).enumerate().take(STRETCH) {
            if at > 0 {
                let gone = u64::from(bytes[at - 1]).wrapping_mul(first);
                weak = roll_in(weak.wrapping_sub(gone), &window[block - 1..]);
            }
            let Some(alike) = self.by_weak.get(&folded(weak)) else {
                continue;
            };
            let mut hasher = blake3::Hasher::new();
            hasher.update(window);
            let strong = shortened(&hasher);
            for index in alike {
                if self.strong.get(*index as usize) == Some(&strong) {
                    return Ok(Some((*index as usize, at)));
                }
            }
            self.mistaken += 1;
            if self.mistaken >= MISTAKEN {
                return Ok(None);
            }
        }
        Ok(None)
    }
}

fn roll_in(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| {
        sum.wrapping_mul(MULTIPLIER).wrapping_add(u64::from(*byte))
    })
}

/// The half of a rolling sum to which every byte has contributed.
fn folded(sum: u64) -> u32 {
    (sum >> 32) as u32
}

fn shortened(hasher: &blake3::Hasher) -> [u8; 8] {
    let mut short = [0; 8];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    short
}

fn clamp(len: u64, most: usize) -> usize {
    usize::try_from(len).unwrap_or(most).min(most)
}

/// Reads all of a stretch.
pub fn fill(read: &ReadAt<'_>, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it is shorter than it was",
                ));
            }
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
