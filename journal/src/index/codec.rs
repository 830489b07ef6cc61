//! How values of the index are written down.

use crate::model::{Kind, Xattrs};

pub(super) fn kind_number(kind: Kind) -> u8 {
    match kind {
        Kind::File => 1,
        Kind::Directory => 2,
        Kind::Symlink => 3,
        Kind::Special => 4,
    }
}

/// SQLite's integers are signed; the bits are what counts.
pub(super) fn signed(number: u64) -> i64 {
    number.cast_signed()
}

pub(super) fn encode_xattrs(xattrs: &Xattrs) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in xattrs.iter().flat_map(|(name, value)| [name, value]) {
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

pub(super) fn decode_xattrs(mut bytes: &[u8]) -> Option<Xattrs> {
    let mut xattrs = Xattrs::new();
    let mut part = || -> Option<Vec<u8>> {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        let (part, rest) = rest.split_at_checked(len)?;
        bytes = rest;
        Some(part.to_vec())
    };
    while let Some(name) = part() {
        xattrs.insert(name, part()?);
    }
    bytes.is_empty().then_some(xattrs)
}
