//! What happens to bytes that anybody may have made up: one function for each way in.
//!
//! The fuzz targets in `fuzz/` call these, and an ordinary test runs the corpus that is
//! committed there through them. None may panic, whatever it is given, and what is taken
//! for a message has to come out again as it was written.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::{Decoder, encode, read_first, read_magic, read_message};
use super::message::{ToAgent, ToMount};
use super::version::{answered, greeted};
use crate::tree::RelPath;

/// What is done with bytes that came in.
pub type Probe = fn(&[u8]);

/// The ways in, each by the name that its target and its corpus have.
pub const WAYS: [(&str, Probe); 4] = [
    ("stream", stream),
    ("to_agent", to_agent),
    ("to_mount", to_mount),
    ("path", path),
];

/// A whole stream, from the magic on, as either side reads it: in one piece, in small
/// ones, and by waiting for it.
pub fn stream(bytes: &[u8]) {
    let whole = decoded(bytes.chunks(bytes.len().max(1)));
    let pieces = decoded(bytes.chunks(7));
    assert_eq!(whole, pieces, "it matters how a stream is cut into pieces");
    let mut input = bytes;
    if read_magic(&mut input).is_ok() {
        if let Ok(Some(first)) = read_first::<ToAgent>(&mut input) {
            let _ = greeted(first);
        }
        while let Ok(Some(_)) = read_message::<ToAgent>(&mut input) {}
    }
    let mut decoder = Decoder::expecting_magic();
    decoder.push(bytes);
    if let Ok(Some(first)) = decoder.first::<ToMount>() {
        let _ = answered(first);
    }
}

fn decoded<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let mut decoder = Decoder::expecting_magic();
    let mut found = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next::<ToMount>() {
                Ok(Some(message)) => found.push(format!("{message:?}")),
                Ok(None) => break,
                Err(error) => {
                    // What a shell printed is quoted as far as it has come.
                    let _ = error.to_string();
                    found.push("an error".to_owned());
                    return found;
                }
            }
        }
    }
    found
}

/// A message of the mounted side, out of its frame.
pub fn to_agent(bytes: &[u8]) {
    message::<ToAgent>(bytes);
}

/// A message of an agent, out of its frame.
pub fn to_mount(bytes: &[u8]) {
    message::<ToMount>(bytes);
}

fn message<M: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(message) = postcard::from_bytes::<M>(bytes) else {
        return;
    };
    let mut frame = Vec::new();
    if encode(&message, &mut frame).is_err() {
        // Larger than a frame, which it can never have come out of.
        return;
    }
    let mut decoder = Decoder::new();
    decoder.push(&frame);
    let again = decoder.next::<M>();
    assert!(
        matches!(&again, Ok(Some(again)) if *again == message),
        "{message:?} became {again:?}"
    );
}

/// A path, checked as those in messages are.
pub fn path(bytes: &[u8]) {
    let Ok(path) = RelPath::new(bytes) else {
        return;
    };
    assert_eq!(path.as_bytes(), bytes);
    let mut built = RelPath::ROOT;
    for name in path.components() {
        assert!(!name.is_empty() && name != b"." && name != b"..");
        assert!(!name.contains(&0) && !name.contains(&b'/'));
        let parent = built.clone();
        let joined = built.join(name);
        assert!(joined.is_ok(), "a component that is no name");
        built = joined.unwrap_or_default();
        assert_eq!(built.parent(), Some(parent));
        assert_eq!(built.name(), name);
        assert!(path.starts_with(&built));
    }
    assert_eq!(built, path);
    assert_eq!(path.depth(), path.components().count());
}
