//! How values are written into columns.

use rusqlite::types::ValueRef;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Kind, RelPath, Timestamp};

/// Encodes a structured value. Equal values have equal encodings (maps are ordered),
/// which lets SQL compare them.
pub(crate) fn encode<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, Error> {
    postcard::to_stdvec(value).map_err(|error| Error::Unencodable {
        what,
        cause: error.to_string(),
    })
}

/// Reverses [`encode`].
pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, Error> {
    postcard::from_bytes(bytes).map_err(|error| Error::Undecodable {
        what,
        cause: error.to_string(),
    })
}

/// Encodes a value that may be missing as a column that may be NULL.
pub(crate) fn encode_option<T: Serialize>(
    what: &'static str,
    value: Option<&T>,
) -> Result<Option<Vec<u8>>, Error> {
    value.map(|value| encode(what, value)).transpose()
}

/// Decodes a column that may be NULL.
pub(crate) fn decode_option<T: DeserializeOwned>(
    what: &'static str,
    column: ValueRef<'_>,
) -> Result<Option<T>, Error> {
    match column {
        ValueRef::Null => Ok(None),
        column => decode(what, blob(what, column)?).map(Some),
    }
}

/// The bytes of a column.
pub(crate) fn blob<'r>(what: &'static str, column: ValueRef<'r>) -> Result<&'r [u8], Error> {
    column.as_blob().map_err(|error| Error::Undecodable {
        what,
        cause: error.to_string(),
    })
}

/// The path in a column.
pub(crate) fn path(column: ValueRef<'_>) -> Result<RelPath, Error> {
    RelPath::new(blob("a path", column)?).map_err(|error| Error::Undecodable {
        what: "a path",
        cause: error.to_string(),
    })
}

/// An array of fixed size in a column.
pub(crate) fn array<const N: usize>(
    what: &'static str,
    column: ValueRef<'_>,
) -> Result<[u8; N], Error> {
    let bytes = blob(what, column)?;
    bytes.try_into().map_err(|_| Error::Undecodable {
        what,
        cause: format!("{} bytes instead of {N}", bytes.len()),
    })
}

pub(crate) fn kind_code(kind: Kind) -> i64 {
    match kind {
        Kind::File => 0,
        Kind::Directory => 1,
        Kind::Symlink => 2,
        Kind::Special => 3,
    }
}

pub(crate) fn kind(code: i64) -> Result<Kind, Error> {
    match code {
        0 => Ok(Kind::File),
        1 => Ok(Kind::Directory),
        2 => Ok(Kind::Symlink),
        3 => Ok(Kind::Special),
        _ => Err(Error::Undecodable {
            what: "a node's kind",
            cause: format!("no kind has the number {code}"),
        }),
    }
}

/// The moment that so many milliseconds since 1970 are.
pub(crate) fn from_millis(millis: i64) -> Timestamp {
    Timestamp {
        secs: millis.div_euclid(1000),
        nanos: u32::try_from(millis.rem_euclid(1000)).unwrap_or(0) * 1_000_000,
    }
}

/// Milliseconds since 1970.
pub(crate) fn millis(time: Timestamp) -> i64 {
    time.secs
        .saturating_mul(1000)
        .saturating_add(i64::from(time.nanos / 1_000_000))
}
