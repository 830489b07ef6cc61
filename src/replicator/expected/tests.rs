use super::*;
use crate::tree::{ContentHash, Id, Timestamp, Xattrs};
use crate::wire::message::{AgentHello, Refusal};

const EPOCH: Epoch = Epoch(7);

fn hello(settled: bool) -> ToMount {
    ToMount::Hello(AgentHello {
        protocol: (1, 1),
        features: Vec::new(),
        version: String::new(),
        replica: Id([1; 16]),
        mirror: None,
        agreement: None,
        diverged: Vec::new(),
        epoch: EPOCH,
        whole: true,
        settled,
    })
}

fn file() -> Entry {
    Entry {
        content: Content::File {
            size: 1,
            hash: ContentHash([1; 32]),
        },
        mode: 0o644,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn seen(path: &str, rev: u64, entry: Entry) -> Observation {
    Observation {
        path: RelPath::new(path).unwrap(),
        entry: Some(entry),
        rev,
        meaning: None,
    }
}

fn report(observations: Vec<Observation>, complete: bool, rev: u64) -> ToMount {
    ToMount::Observed {
        observations,
        complete,
        upto: Revision { epoch: EPOCH, rev },
    }
}

/// A session in which the agent has greeted.
fn greeted() -> Expected {
    let mut expected = Expected::default();
    expected.check(&hello(true)).unwrap();
    expected
}

#[track_caller]
fn refused(message: &ToMount, why: &str) {
    let reason = greeted().check(message).unwrap_err();
    assert!(reason.contains(why), "{reason}");
}

#[test]
fn what_an_agent_says_in_its_turn_is_taken() {
    let mut expected = Expected::default();
    for message in [
        hello(false),
        ToMount::Chain {
            links: Vec::new(),
            more: false,
        },
        report(vec![seen("a", 1, file())], false, 1),
        report(vec![seen("b", 2, file())], true, 2),
        ToMount::Pong { token: 1 },
        report(vec![seen("a", 3, file())], true, 3),
    ] {
        expected.check(&message).unwrap();
    }
    let refusal = Refusal::SameReplica;
    let mut expected = Expected::default();
    expected.check(&ToMount::Refused { refusal }).unwrap();
}

#[test]
fn it_begins_with_one_hello() {
    let reason = Expected::default().check(&ToMount::Pong { token: 0 });
    assert!(reason.unwrap_err().contains("hello"));
    refused(&hello(true), "second time");
    let links = Vec::new();
    refused(&ToMount::Chain { links, more: true }, "nobody asked");
}

#[test]
fn reports_are_of_this_time_and_in_order() {
    refused(&report(vec![seen("a", 3, file())], true, 2), "future");
    refused(&report(Vec::new(), true, u64::MAX), "future");
    let other = ToMount::Observed {
        observations: Vec::new(),
        complete: true,
        upto: Revision {
            epoch: Epoch(8),
            rev: 1,
        },
    };
    refused(&other, "another time");
    let mut expected = greeted();
    expected.check(&report(Vec::new(), true, 9)).unwrap();
    assert!(expected.check(&report(Vec::new(), true, 8)).is_err());
    assert!(expected.check(&report(Vec::new(), false, 9)).is_err());
}

#[test]
fn nothing_is_listed_without_end() {
    let long = vec!["x".repeat(255); 60].join("/");
    let piece: Vec<_> = (0..60).map(|_| seen(&long, 1, file())).collect();
    let piece = report(piece, false, 1);
    let mut expected = greeted();
    let mut pieces = 0;
    let reason = loop {
        match expected.check(&piece) {
            Ok(()) => pieces += 1,
            Err(reason) => break reason,
        }
        assert!(pieces < 10_000);
    };
    assert!(reason.contains("without end"), "{reason}");
    let mut expected = Expected::default();
    expected.check(&hello(false)).unwrap();
    let link = mirrorfs_journal::ChainLink {
        agreement: crate::tree::Agreement {
            number: 1,
            nonce: Id([1; 16]),
            previous: None,
        },
        based: false,
    };
    let piece = ToMount::Chain {
        links: vec![link; 10_000],
        more: true,
    };
    assert!((0..100).any(|_| expected.check(&piece).is_err()));
}

#[test]
fn what_no_file_can_be_is_refused() {
    let reserved = seen(".mirrorfs/staging/x", 1, file());
    refused(&report(vec![reserved], true, 1), "reserved");
    let deep = seen(&vec!["d"; 300_000].join("/"), 1, file());
    refused(&report(vec![deep], true, 1), "a path of more than");
    let with = |change: &dyn Fn(&mut Entry)| {
        let mut entry = file();
        change(&mut entry);
        report(vec![seen("a", 1, entry)], true, 1)
    };
    let link = |target: &[u8]| Content::Symlink {
        target: target.to_vec(),
    };
    let attribute = |entry: &mut Entry, name: &str| {
        entry.xattrs.insert(name.as_bytes().to_vec(), b"x".to_vec());
    };
    for message in [
        with(&|entry| entry.mode = 0o10_0644),
        with(&|entry| entry.mtime.nanos = 1_000_000_000),
        with(&|entry| attribute(entry, "security.capability")),
        with(&|entry| attribute(entry, "trusted.overlay.opaque")),
        with(&|entry| attribute(entry, "user.a\0b")),
        with(&|entry| entry.content = link(b"")),
        with(&|entry| entry.content = link(b"a\0b")),
        with(&|entry| entry.content = link(&[b'x'; 5000])),
    ] {
        refused(&message, "what no file can be");
    }
    // A link that leaves the tree is carried as it is, and never followed.
    let outside = with(&|entry| entry.content = link(b"../../etc/passwd"));
    greeted().check(&outside).unwrap();
}
