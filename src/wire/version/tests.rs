//! Hellos of other versions, as they were or will be recorded on the wire.

use super::*;
use crate::tree::{Epoch, Id};
use crate::wire::frame::{Decoder, encode, read_first};

/// What a mounted side of protocol 0 would have sent: no replica, no session yet.
const OLDER_MOUNT: &[u8] = b"\x00\x00\x00\x00\x050.0.9\x11\x11\x11\x11\x11\x11\x11\x11";
/// What an agent of protocol 0 would have sent.
const OLDER_AGENT: &[u8] = b"\x00\x00\x00\x00\x050.0.9\x22\x22\x22\x22";
/// What an agent of protocols 2 to 5 sends, that knows a part this program does not.
const NEWER_AGENT: &[u8] = b"\x00\x02\x05\x01\x06deltas\x053.1.0\xff\xff\xff\xff\xff\xff\xff\xff";
/// How either hello of 0.1.0 begins.
const RECORDED: &[u8; 10] = b"\x00\x01\x01\x00\x050.1.0";

fn framed(plain: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(plain.len()).unwrap().to_le_bytes().to_vec();
    frame.push(0);
    frame.extend_from_slice(plain);
    frame
}

fn agent_says(plain: &[u8]) -> Result<ToMount, FrameError> {
    let mut decoder = Decoder::new();
    decoder.push(&framed(plain));
    let by_decoder = decoder.first().and_then(|first| answered(first.unwrap()));
    let by_reader = read_first(&mut framed(plain).as_slice());
    let by_reader = by_reader.and_then(|first| answered(first.unwrap()));
    assert_eq!(format!("{by_decoder:?}"), format!("{by_reader:?}"));
    by_decoder
}

fn mount_says(plain: &[u8]) -> Result<Result<MountHello, Refusal>, FrameError> {
    greeted(read_first(&mut framed(plain).as_slice())?.unwrap())
}

fn mount_hello() -> MountHello {
    Introduction::hello(Id([1; 16]), Id([2; 16]), Id([3; 16]))
}

fn encoded<M: Serialize>(message: &M) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(message, &mut frame).unwrap();
    assert_eq!(frame[4], 0, "a hello as small as this is not compressed");
    frame.split_off(5)
}

fn text(refusal: &Refusal) -> String {
    refusal.to_string()
}

#[test]
fn an_older_or_newer_side_is_told_which_one_to_upgrade() {
    let refusal = mount_says(OLDER_MOUNT).unwrap().unwrap_err();
    assert!(
        text(&refusal).contains("upgrade mirrorfs on the mounted side"),
        "{refusal}"
    );
    let Ok(ToMount::Refused { refusal }) = agent_says(OLDER_AGENT) else {
        panic!("an older agent was taken for one of this protocol");
    };
    assert!(
        text(&refusal).contains("upgrade mirrorfs on the peer's side"),
        "{refusal}"
    );
    let Ok(ToMount::Refused { refusal }) = agent_says(NEWER_AGENT) else {
        panic!("a newer agent was taken for one of this protocol");
    };
    assert_eq!(
        text(&refusal),
        "the agent speaks protocols 2 to 5, this side 1 to 1: upgrade mirrorfs on the mounted side"
    );
}

/// A refusal is how an older agent answers this side: it must stay readable for ever.
#[test]
fn the_refusal_has_the_recorded_layout() {
    let recorded = b"\x01\x00\x00\x00\x01\x01";
    let Ok(ToMount::Refused { refusal }) = agent_says(recorded) else {
        panic!("the refusal cannot be read");
    };
    let expected = Refusal::Protocol {
        agent: (0, 0),
        mount: (1, 1),
    };
    assert_eq!(refusal, expected);
    assert_eq!(encoded(&ToMount::Refused { refusal: expected }), recorded);
}

/// The beginning of a hello is read by all versions.
#[test]
fn a_hello_begins_in_the_recorded_way() {
    let recorded = Introduction {
        protocol: (1, 1),
        features: Vec::new(),
        version: "0.1.0".to_owned(),
    };
    assert_eq!(Introduction::of_hello(RECORDED), Some(recorded.clone()));
    let mut hello = mount_hello();
    hello.protocol = recorded.protocol;
    hello.features = recorded.features;
    hello.version = recorded.version;
    let plain = encoded(&ToAgent::Hello(hello));
    assert_eq!(&plain[..10], RECORDED);
}

/// A version that speaks this protocol and later ones may have more to say at the end of
/// its hello: both work together in this protocol.
#[test]
fn versions_that_share_a_protocol_work_together() {
    let mut hello = mount_hello();
    hello.protocol = (1, 7);
    hello.features = vec!["deltas".to_owned(), "a part that is new".to_owned()];
    let mut plain = encoded(&ToAgent::Hello(hello.clone()));
    plain.extend_from_slice(b"what a later protocol adds");
    assert_eq!(mount_says(&plain).unwrap().unwrap(), hello);
    let common = Introduction {
        protocol: (1, 3),
        features: vec!["deltas".to_owned()],
        version: String::new(),
    }
    .common(&(&hello).into());
    assert_eq!(
        common,
        Some(Common {
            protocol: 3,
            features: vec!["deltas".to_owned()]
        })
    );
}

/// An agent's hello as this protocol has it, with more at its end.
#[test]
fn an_agents_hello_may_grow() {
    let hello = AgentHello {
        protocol: (1, 4),
        features: Vec::new(),
        version: "0.4.0".to_owned(),
        replica: Id([1; 16]),
        mirror: None,
        agreement: None,
        diverged: Vec::new(),
        epoch: Epoch(7),
        whole: true,
        settled: true,
    };
    let mut plain = encoded(&ToMount::Hello(hello.clone()));
    assert_eq!(agent_says(&plain).unwrap(), ToMount::Hello(hello.clone()));
    plain.extend_from_slice(&[0; 40]);
    assert_eq!(agent_says(&plain).unwrap(), ToMount::Hello(hello));
}

/// What says that it speaks a protocol of ours and then does not is no version mismatch,
/// and nothing but a hello may be longer than it is.
#[test]
fn a_damaged_first_message_is_an_error() {
    let mut cut = encoded(&ToAgent::Hello(mount_hello()));
    cut.truncate(cut.len() - 20);
    assert!(matches!(mount_says(&cut), Err(FrameError::NoHello)));
    let ping = encoded(&ToAgent::Ping { token: 1 });
    assert!(matches!(mount_says(&ping), Err(FrameError::NoHello)));
    let mut long = b"\x01\x00\x00\x00\x01\x01".to_vec();
    long.push(0);
    assert!(matches!(agent_says(&long), Err(FrameError::Trailing(1))));
    assert!(matches!(agent_says(b""), Err(FrameError::Message(_))));
    for length in 0..NEWER_AGENT.len() {
        let _ = agent_says(&NEWER_AGENT[..length]);
    }
}
