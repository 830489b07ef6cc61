//! Frames as they are sent, cut, damaged and made up.

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Message {
    number: u64,
    bytes: Vec<u8>,
    names: Vec<String>,
}

fn message(bytes: Vec<u8>) -> Message {
    Message {
        number: 7,
        bytes,
        names: vec!["name".to_owned()],
    }
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(length)
    .collect()
}

fn framed(message: &Message) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(message, &mut frame).unwrap();
    frame
}

fn decode(bytes: &[u8]) -> Result<Option<Message>, FrameError> {
    let mut decoder = Decoder::new();
    decoder.push(bytes);
    decoder.next()
}

#[test]
fn zstd_is_used_where_it_pays_and_nowhere_else() {
    let zeros = framed(&message(vec![0; 100_000]));
    assert!(zeros.len() < 1000 && zeros[4] == ZSTD);
    let random = framed(&message(noise(100_000)));
    assert_eq!(random[4], PLAIN);
    let small = framed(&message(vec![0; 100]));
    assert_eq!(small[4], PLAIN);
}

#[test]
fn a_message_is_limited_before_compression() {
    let fits = message(vec![0; MAX_FRAME - 100]);
    assert_eq!(decode(&framed(&fits)).unwrap(), Some(fits));
    let mut out = vec![1];
    let error = encode(&message(vec![0; MAX_FRAME]), &mut out).unwrap_err();
    assert!(matches!(error, FrameError::TooLarge { .. }));
    assert_eq!(out, [1]);
}

#[test]
fn a_chunk_of_content_fits_whatever_it_holds() {
    for bytes in [noise(MAX_CHUNK), vec![0; MAX_CHUNK]] {
        let message = message(bytes);
        assert_eq!(decode(&framed(&message)).unwrap(), Some(message));
    }
}

#[test]
fn oversized_lengths_are_refused_before_the_bytes_come() {
    let header = [&(MAX_FRAME as u32 + 1).to_le_bytes()[..], &[PLAIN]].concat();
    assert!(matches!(
        decode(&header),
        Err(FrameError::Oversized { size }) if size == MAX_FRAME as u64 + 1
    ));
    assert!(matches!(
        read_message::<Message>(&mut &header[..]),
        Err(FrameError::Oversized { .. })
    ));
}

#[test]
fn a_compression_bomb_is_refused_by_what_it_announces() {
    let packed = zstd::bulk::compress(&vec![0; MAX_FRAME + 1], 1).unwrap();
    let mut frame = u32::try_from(packed.len()).unwrap().to_le_bytes().to_vec();
    frame.push(ZSTD);
    frame.extend(packed);
    assert!(matches!(decode(&frame), Err(FrameError::Oversized { .. })));
}

#[test]
fn a_frame_that_lies_about_its_content_is_refused() {
    // Two zstd frames: the first announces less than both hold.
    let one = zstd::bulk::compress(&noise(400), 1).unwrap();
    let packed = [one.clone(), one].concat();
    let mut frame = u32::try_from(packed.len()).unwrap().to_le_bytes().to_vec();
    frame.push(ZSTD);
    frame.extend(packed);
    assert!(matches!(decode(&frame), Err(FrameError::Compression(_))));
}

#[test]
fn trailing_bytes_and_unknown_flags_are_refused_for_good() {
    let plain = postcard::to_stdvec(&message(Vec::new())).unwrap();
    let mut frame = u32::try_from(plain.len() + 1)
        .unwrap()
        .to_le_bytes()
        .to_vec();
    frame.push(PLAIN);
    frame.extend(&plain);
    frame.push(0);
    assert!(matches!(decode(&frame), Err(FrameError::Trailing(1))));
    let mut decoder = Decoder::new();
    decoder.push(&[1, 0, 0, 0, 9, 0]);
    for _ in 0..2 {
        assert!(matches!(
            decoder.next::<Message>(),
            Err(FrameError::UnknownFlag(9))
        ));
    }
}

#[test]
fn a_stream_may_end_between_frames_and_nowhere_else() {
    let frame = framed(&message(noise(1000)));
    let mut input = &frame[..];
    assert!(read_message::<Message>(&mut input).unwrap().is_some());
    assert!(read_message::<Message>(&mut input).unwrap().is_none());
    for cut in 1..frame.len() {
        let mut decoder = Decoder::new();
        decoder.push(&frame[..cut]);
        assert!(matches!(decoder.next::<Message>(), Ok(None)));
        assert!(matches!(decoder.finish(), Err(FrameError::Truncated)));
        assert!(matches!(
            read_message::<Message>(&mut &frame[..cut]),
            Err(FrameError::Truncated)
        ));
    }
}

#[test]
fn the_magic_comes_before_the_first_frame() {
    let mut stream = Vec::new();
    write_magic(&mut stream).unwrap();
    let sent = message(noise(10));
    write_message(&mut stream, &sent).unwrap();
    let mut input = &stream[..];
    read_magic(&mut input).unwrap();
    assert_eq!(read_message(&mut input).unwrap(), Some(sent.clone()));
    let mut decoder = Decoder::expecting_magic();
    let mut found = None;
    for byte in stream {
        assert_eq!(found, None);
        decoder.push(&[byte]);
        found = decoder.next::<Message>().unwrap();
    }
    assert_eq!(found, Some(sent));
    decoder.finish().unwrap();
}

#[test]
fn another_speaker_is_quoted_with_what_to_do() {
    for (said, hint) in [
        (&b"Last login: Monday\r\n\x1b[0m"[..], ".bashrc"),
        (b"bash: mirrorfs: command not found\n", "MIRRORFS_AGENT"),
        (b"mfs\x09", "same version"),
        (b"m", "\"m\""),
        (b"", "closed"),
    ] {
        let error = read_magic(&mut &said[..]).unwrap_err().to_string();
        assert!(error.contains(hint), "{error}");
        assert!(!error.contains('\x1b'), "{error}");
        let mut decoder = Decoder::expecting_magic();
        decoder.push(said);
        let error = match decoder.next::<Message>() {
            Err(error) => error.to_string(),
            Ok(_) => decoder.finish().unwrap_err().to_string(),
        };
        assert!(error.contains(hint), "{error}");
    }
}

proptest! {
    #[test]
    fn what_is_sent_arrives(
        sent in prop::collection::vec(
            (any::<u64>(), prop::collection::vec(0_u8..4, 0..5000), prop::collection::vec(".*", 0..4))
                .prop_map(|(number, bytes, names)| Message { number, bytes, names }),
            0..6,
        ),
        piece in 1_usize..3000,
    ) {
        let mut stream = Vec::new();
        for message in &sent {
            encode(message, &mut stream).unwrap();
        }
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for piece in stream.chunks(piece) {
            decoder.push(piece);
            while let Some(message) = decoder.next::<Message>().unwrap() {
                found.push(message);
            }
        }
        prop_assert!(decoder.finish().is_ok());
        prop_assert_eq!(&found, &sent);
        let mut input = &stream[..];
        for message in sent {
            prop_assert_eq!(read_message(&mut input).unwrap(), Some(message));
        }
    }

    /// Random bytes behind a plausible header: an error or a message, no panic, and
    /// no memory for more than has arrived.
    #[test]
    fn random_bytes_are_refused_or_read(
        length in 0_u32..64,
        flag in 0_u8..3,
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        use crate::wire::message::{ToAgent, ToMount};
        let mut stream = length.to_le_bytes().to_vec();
        stream.push(flag);
        stream.extend(bytes);
        let mut decoder = Decoder::new();
        decoder.push(&stream);
        while let Ok(Some(_)) = decoder.next::<ToAgent>() {}
        let mut decoder = Decoder::expecting_magic();
        decoder.push(&MAGIC);
        decoder.push(&stream);
        while let Ok(Some(_)) = decoder.next::<ToMount>() {}
        prop_assert!(decoder.buffer.capacity() < 4096);
        let _ = read_message::<ToMount>(&mut &stream[..]);
    }

    /// A bit flipped anywhere in a compressed frame does no harm.
    #[test]
    fn damaged_frames_are_refused_or_read(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut frame = framed(&message(vec![3; 10_000]));
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        let _ = decode(&frame);
    }
}
