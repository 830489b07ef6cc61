//! Frames: how messages travel on a byte stream.
//!
//! A session starts with [`MAGIC`] in each direction, sent at once and without waiting
//! for the other's. After it come frames, each of
//!
//! ```text
//! length   4 bytes, little endian: bytes of the payload, at most MAX_FRAME
//! flag     1 byte: 0 plain, 1 zstd
//! payload  one message in postcard encoding, or its zstd frame
//! ```
//!
//! A message is at most [`MAX_FRAME`] bytes both on the wire and unpacked, so what a
//! sender may put into one does not depend on how well it compresses. Every length is
//! checked before anything is allocated for it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

use super::message::MAGIC;
use super::version::{First, Introduction};

/// Most bytes of a payload, and of a message once unpacked.
pub const MAX_FRAME: usize = 1 << 20;

/// Most bytes of file content that one message should carry, which leaves ample room
/// for everything else in it.
pub const MAX_CHUNK: usize = MAX_FRAME / 2;

/// Bytes before the payload.
const HEADER: usize = 5;
const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// Messages below this go as they are: zstd's own framing eats most of the gain.
const WORTH_TRYING: usize = 256;
/// zstd level 1: the link should not wait for the processor.
const LEVEL: i32 = 1;
/// How much of what a peer printed is quoted in an error.
const QUOTED: usize = 200;

/// What can go wrong between two ends of a stream.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A message of this side does not fit a frame.
    #[error("a message of {size} bytes does not fit a frame of {MAX_FRAME}")]
    TooLarge {
        /// Its encoded size.
        size: usize,
    },
    /// The peer announced a frame or a message that nobody may send.
    #[error(
        "the peer announced {size} bytes where at most {MAX_FRAME} are allowed: the stream is damaged or the peer is not mirrorfs"
    )]
    Oversized {
        /// What it announced.
        size: u64,
    },
    /// A flag byte that this protocol does not have.
    #[error("the peer sent a frame of unknown kind {0:#04x}: the stream is damaged")]
    UnknownFlag(u8),
    /// The payload cannot be unpacked.
    #[error("the peer sent a frame that cannot be decompressed: {0}")]
    Compression(io::Error),
    /// The payload is not a message.
    #[error("the peer sent a message that cannot be read: {0}")]
    Message(postcard::Error),
    /// The payload is longer than its message.
    #[error("the peer sent a message with {0} bytes too many")]
    Trailing(usize),
    /// The first message is no hello that this protocol has.
    #[error("the peer did not begin with a hello that can be read: the stream is damaged")]
    NoHello,
    /// A message of this side cannot be written down.
    #[error("a message cannot be encoded: {0}")]
    Encode(postcard::Error),
    /// The other end does not speak this protocol.
    #[error("{}", explain(.text))]
    NotMirrorfs {
        /// The first bytes it sent, printable.
        text: String,
    },
    /// The stream ended inside a frame.
    #[error("the peer closed the connection in the middle of a message")]
    Truncated,
    /// The stream failed.
    #[error("the connection to the peer failed: {0}")]
    Io(#[from] io::Error),
}

/// Says what a text in place of [`MAGIC`] means for the reader.
fn explain(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if text.starts_with("mfs") {
        "the peer speaks a mirrorfs protocol that this version does not know: install the same version on both sides".to_owned()
    } else if lower.contains("not found") || lower.contains("no such file") {
        format!(
            "the peer has no mirrorfs (it said {text:?}): install mirrorfs there, or set MIRRORFS_AGENT to the command that starts it"
        )
    } else if text.is_empty() {
        "the peer closed the connection before it said anything".to_owned()
    } else {
        format!(
            "the peer's shell printed {text:?} before the agent: make .bashrc (or what prints this) silent for non-interactive shells"
        )
    }
}

/// The printable part of what a peer sent instead of [`MAGIC`].
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for part in String::from_utf8_lossy(&bytes[..bytes.len().min(QUOTED)]).chars() {
        match part {
            '\n' | '\t' => text.push(' '),
            part if part.is_control() => {}
            part => text.push(part),
        }
    }
    text.trim().to_owned()
}

thread_local! {
    // A context is some hundred kilobytes; making one for each message costs more than
    // packing or unpacking it.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses a message if that makes it notably smaller.
fn compress(message: &[u8]) -> Option<Vec<u8>> {
    if message.len() < WORTH_TRYING {
        return None;
    }
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Compressor::new(LEVEL).ok();
        }
        // Too small a destination is an error to zstd, so that a message which does
        // not shrink by a sixteenth is not worth the receiver's time either.
        let mut packed = Vec::with_capacity(message.len() - message.len() / 16);
        let length = slot
            .as_mut()?
            .compress_to_buffer(message, &mut packed)
            .ok()?;
        packed.truncate(length);
        Some(packed)
    })
}

/// Appends a message as one frame.
///
/// On an error `out` is as it was.
pub fn encode<M: Serialize>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let plain = postcard::to_stdvec(message).map_err(FrameError::Encode)?;
    if plain.len() > MAX_FRAME {
        return Err(FrameError::TooLarge { size: plain.len() });
    }
    let (flag, payload) = match compress(&plain) {
        Some(packed) => (ZSTD, packed),
        None => (PLAIN, plain),
    };
    let length = u32::try_from(payload.len()).map_err(|_| FrameError::TooLarge {
        size: payload.len(),
    })?;
    out.reserve(HEADER + payload.len());
    out.extend_from_slice(&length.to_le_bytes());
    out.push(flag);
    out.extend_from_slice(&payload);
    Ok(())
}

/// Turns bytes as they arrive into messages.
///
/// After an error every further call gives an error again: what follows a damaged
/// frame has no meaning.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where the bytes not yet consumed start.
    start: usize,
    awaiting_magic: bool,
}

impl Decoder {
    /// A decoder for a stream whose [`MAGIC`] has already been read.
    pub fn new() -> Self {
        Self::default()
    }

    /// A decoder for a stream from its very start: [`MAGIC`] comes before the first
    /// frame, and anything else is [`FrameError::NotMirrorfs`].
    pub fn expecting_magic() -> Self {
        Self {
            awaiting_magic: true,
            ..Self::default()
        }
    }

    /// Takes in bytes that have arrived. Holds them until [`Decoder::next`] has
    /// consumed them, so call that until it gives none before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, or none if more bytes are needed for it.
    // Not an iterator: the type of the message is the caller's choice per call.
    #[allow(clippy::should_implement_trait)]
    pub fn next<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        self.next_as(parse)
    }

    /// The first message, which may be of another version, or none if more bytes are
    /// needed for it.
    pub fn first<M: DeserializeOwned>(&mut self) -> Result<Option<First<M>>, FrameError> {
        self.next_as(parse_first)
    }

    fn next_as<T>(
        &mut self,
        parse: impl FnOnce(&[u8]) -> Result<T, FrameError>,
    ) -> Result<Option<T>, FrameError> {
        if self.awaiting_magic {
            let held = self.held();
            let length = held.len().min(MAGIC.len());
            if held[..length] != MAGIC[..length] {
                return Err(FrameError::NotMirrorfs {
                    text: printable(held),
                });
            }
            if length < MAGIC.len() {
                return Ok(None);
            }
            self.start += MAGIC.len();
            self.awaiting_magic = false;
        }
        let held = &self.buffer[self.start..];
        let Some((header, rest)) = held.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let (length, flag) = parse_header(*header)?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let message = parse(&unpack(flag, payload)?)?;
        self.start += HEADER + length;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        Ok(Some(message))
    }

    /// Says whether the stream may end here: an error if it ends before the magic or
    /// inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.awaiting_magic {
            return Err(FrameError::NotMirrorfs {
                text: printable(self.held()),
            });
        }
        if self.held().is_empty() {
            Ok(())
        } else {
            Err(FrameError::Truncated)
        }
    }

    fn held(&self) -> &[u8] {
        &self.buffer[self.start..]
    }
}

fn parse_header(header: [u8; HEADER]) -> Result<(usize, u8), FrameError> {
    let [a, b, c, d, flag] = header;
    let announced = u32::from_le_bytes([a, b, c, d]);
    match usize::try_from(announced) {
        Ok(length) if length <= MAX_FRAME => match flag {
            PLAIN | ZSTD => Ok((length, flag)),
            flag => Err(FrameError::UnknownFlag(flag)),
        },
        _ => Err(FrameError::Oversized {
            size: u64::from(announced),
        }),
    }
}

/// A message as its sender wrote it down.
fn unpack(flag: u8, payload: &[u8]) -> Result<Cow<'_, [u8]>, FrameError> {
    if flag == PLAIN {
        return Ok(Cow::Borrowed(payload));
    }
    // A frame made by `encode` states the size of its content; one that does not is
    // refused rather than unpacked to see.
    let size = match zstd_safe::get_frame_content_size(payload) {
        Ok(Some(size)) => size,
        _ => {
            return Err(FrameError::Compression(io::Error::other(
                "it does not say how large its content is",
            )));
        }
    };
    let capacity = usize::try_from(size)
        .ok()
        .filter(|size| *size <= MAX_FRAME)
        .ok_or(FrameError::Oversized { size })?;
    DECOMPRESSOR
        .with_borrow_mut(|slot| match slot {
            Some(unpacker) => unpacker.decompress(payload, capacity),
            None => slot
                .insert(Decompressor::new()?)
                .decompress(payload, capacity),
        })
        .map(Cow::Owned)
        .map_err(FrameError::Compression)
}

fn parse<M: DeserializeOwned>(plain: &[u8]) -> Result<M, FrameError> {
    let (message, rest) = postcard::take_from_bytes(plain).map_err(FrameError::Message)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(FrameError::Trailing(rest.len()))
    }
}

/// A hello of a later version may say more at its end; one that cannot be read at all
/// still tells who spoke.
fn parse_first<M: DeserializeOwned>(plain: &[u8]) -> Result<First<M>, FrameError> {
    let introduction = Introduction::of_hello(plain);
    match (postcard::take_from_bytes(plain), introduction) {
        (Ok((message, rest)), hello) if rest.is_empty() || hello.is_some() => {
            Ok(First::Message(message))
        }
        (_, Some(introduction)) => Ok(First::Foreign(introduction)),
        (Ok((_, rest)), None) => Err(FrameError::Trailing(rest.len())),
        (Err(error), None) => Err(FrameError::Message(error)),
    }
}

/// Sends [`MAGIC`]. Both sides do this at once, before they read.
pub fn write_magic(output: &mut impl Write) -> Result<(), FrameError> {
    output.write_all(&MAGIC)?;
    output.flush()?;
    Ok(())
}

/// Reads the other side's [`MAGIC`]; anything else is quoted in the error.
pub fn read_magic(input: &mut impl Read) -> Result<(), FrameError> {
    let mut held = Vec::with_capacity(QUOTED);
    // Byte for byte: nothing that follows the magic may be swallowed.
    while held.len() < MAGIC.len() {
        let mut byte = [0];
        match input.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => held.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        }
        if !MAGIC.starts_with(&held) {
            // The rest of what has arrived makes the message worth reading. It is
            // in the pipe already, as programs write lines and not bytes.
            let mut more = [0; QUOTED];
            let length = input.read(&mut more).unwrap_or(0);
            held.extend_from_slice(&more[..length]);
            break;
        }
    }
    if held == MAGIC {
        Ok(())
    } else {
        Err(FrameError::NotMirrorfs {
            text: printable(&held),
        })
    }
}

/// Writes one message as a frame and flushes.
pub fn write_message<M: Serialize>(output: &mut impl Write, message: &M) -> Result<(), FrameError> {
    let mut frame = Vec::new();
    encode(message, &mut frame)?;
    output.write_all(&frame)?;
    output.flush()?;
    Ok(())
}

/// Reads one message, waiting for it; none if the stream ended before its first byte.
pub fn read_message<M: DeserializeOwned>(input: &mut impl Read) -> Result<Option<M>, FrameError> {
    read_as(input, parse)
}

/// Reads the first message, which may be of another version, waiting for it; none if the
/// stream ended before its first byte.
pub fn read_first<M: DeserializeOwned>(
    input: &mut impl Read,
) -> Result<Option<First<M>>, FrameError> {
    read_as(input, parse_first)
}

fn read_as<T>(
    input: &mut impl Read,
    parse: impl FnOnce(&[u8]) -> Result<T, FrameError>,
) -> Result<Option<T>, FrameError> {
    let mut header = [0; HEADER];
    let mut filled = 0;
    while filled < HEADER {
        match input.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (length, flag) = parse_header(header)?;
    let mut payload = vec![0; length];
    input.read_exact(&mut payload).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            FrameError::Truncated
        } else {
            FrameError::Io(error)
        }
    })?;
    parse(&unpack(flag, &payload)?).map(Some)
}

#[cfg(test)]
mod tests;
