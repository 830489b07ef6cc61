//! Bases, observations, proposals, conflicts, and what compaction may forget.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use mirrorfs_journal::*;

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn file(content: &str) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o644,
        mtime: Timestamp { secs: -1, nanos: 5 },
        xattrs: Xattrs::from([(b"user.a".to_vec(), b"b".to_vec())]),
    }
}

fn put(at: impl Into<Vec<u8>>, node: i64, content: &str) -> BaseChange {
    BaseChange::Put {
        path: RelPath::new(at).unwrap(),
        node: Some(NodeId(node)),
        entry: file(content),
    }
}

fn opened() -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    (dir, journal)
}

fn update<T: Send + 'static>(
    journal: &Journal,
    change: impl FnOnce(&Update<'_>) -> Result<T, Error> + Send + 'static,
) -> T {
    journal.update(Durability::Normal, change).unwrap()
}

fn below(journal: &Journal, peer: PeerId, at: &RelPath) -> Vec<Vec<u8>> {
    let snapshot = journal.snapshot().unwrap();
    let below = snapshot.base_below(peer, at).unwrap();
    below.into_iter().map(|(path, _)| path.into()).collect()
}

#[test]
fn a_moved_directory_takes_what_is_below_and_no_sibling() {
    let (_dir, journal) = opened();
    let paths: [&[u8]; 9] = [
        b"a",
        b"a-b",
        b"a-b/x",
        b"a/b",
        b"a/b/c",
        b"a/\xff\xfe",
        b"a0",
        b"aa/b",
        b"a\xff",
    ];
    let (one, two) = update(&journal, move |update| {
        let one = update.add_peer("one", "/one")?;
        let two = update.add_peer("two", "/two")?;
        let all: Vec<_> = (10..)
            .zip(paths)
            .map(|(node, at)| put(at, node, "x"))
            .collect();
        update.apply_base(one, &all)?;
        update.apply_base(two, &all)?;
        let (from, to) = (path("a"), path("z/new"));
        update.apply_base(one, &[BaseChange::Move { from, to }])?;
        Ok((one, two))
    });
    let moved: [&[u8]; 9] = [
        b"a-b",
        b"a-b/x",
        b"a0",
        b"aa/b",
        b"a\xff",
        b"z/new",
        b"z/new/b",
        b"z/new/b/c",
        b"z/new/\xff\xfe",
    ];
    assert_eq!(below(&journal, one, &RelPath::ROOT), moved);
    assert_eq!(below(&journal, one, &path("z/new")), moved[6..]);
    assert_eq!(below(&journal, one, &path("a")), Vec::<Vec<u8>>::new());
    // The other peer's base is its own.
    assert_eq!(below(&journal, two, &RelPath::ROOT), paths);
    assert_eq!(below(&journal, two, &path("a")), paths[3..6]);
    let snapshot = journal.snapshot().unwrap();
    assert_eq!(snapshot.base_count(one).unwrap(), 9);
    let at = snapshot.base_of(one, NodeId(14)).unwrap();
    assert_eq!(at.len(), 1);
    assert_eq!(at[0].0, path("z/new/b/c"));
    assert_eq!(at[0].1.entry, file("x"));
    // Up out of a directory, onto its own parent's place.
    update(&journal, move |update| {
        let (from, to) = (path("z/new"), path("z"));
        update.apply_base(one, &[BaseChange::Move { from, to }])
    });
    let up: [&[u8]; 3] = [b"z/b", b"z/b/c", b"z/\xff\xfe"];
    assert_eq!(below(&journal, one, &path("z")), up);
    let into_itself = journal.update(Durability::Normal, move |update| {
        let (from, to) = (path("z"), path("z/b/z"));
        update.apply_base(one, &[BaseChange::Move { from, to }])
    });
    assert!(matches!(into_itself, Err(Error::MoveIntoItself { .. })));
    assert_eq!(below(&journal, one, &path("z")), up);
}

/// Moves that follow each other happen at once: all start from where the base had them
/// before.
#[test]
fn moves_happen_at_once() {
    let (_dir, journal) = opened();
    let after = |before: &[&str], moves: &[(&str, &str)]| {
        let before: Vec<_> = before.iter().map(|at| put(*at, 7, at)).collect();
        let moves: Vec<_> = moves
            .iter()
            .map(|(from, to)| BaseChange::Move {
                from: path(from),
                to: path(to),
            })
            .collect();
        let peer = update(&journal, move |update| {
            let peer = update.add_peer("peer", "/peer")?;
            update.apply_base(peer, &before)?;
            update.apply_base(peer, &moves)?;
            Ok(peer)
        });
        // Each path with what was put at the place that it came from.
        let found: Vec<(String, String)> = journal
            .snapshot()
            .unwrap()
            .base_below(peer, &RelPath::ROOT)
            .unwrap()
            .into_iter()
            .map(|(now, base)| {
                let was = before_of(&base.entry);
                (now.to_string(), was)
            })
            .collect();
        update(&journal, move |update| update.remove_peer(peer));
        found
    };
    let pairs = |pairs: &[(&str, &str)]| {
        let owned = |(now, was): &(&str, &str)| ((*now).to_owned(), (*was).to_owned());
        pairs.iter().map(owned).collect::<Vec<_>>()
    };
    // Two directories change places, with everything below them.
    assert_eq!(
        after(
            &["a", "a/x", "a/z", "b", "b/x", "b/y", "b/y/v"],
            &[("a", "b"), ("b", "a")]
        ),
        pairs(&[
            ("a", "b"),
            ("a/x", "b/x"),
            ("a/y", "b/y"),
            ("a/y/v", "b/y/v"),
            ("b", "a"),
            ("b/x", "a/x"),
            ("b/z", "a/z"),
        ])
    );
    // Each to the next one's place, in either order.
    for moves in [
        [("a", "b"), ("b", "c"), ("c", "d")],
        [("c", "d"), ("b", "c"), ("a", "b")],
    ] {
        assert_eq!(
            after(&["a", "a/1", "b", "b/2", "c", "c/3"], &moves),
            pairs(&[
                ("b", "a"),
                ("b/1", "a/1"),
                ("c", "b"),
                ("c/2", "b/2"),
                ("d", "c"),
                ("d/3", "c/3"),
            ])
        );
    }
    // Out of a directory that moves as well, and into one.
    assert_eq!(
        after(
            &["d", "d/s", "d/s/x", "d/t", "o", "o/p"],
            &[("d", "e"), ("o", "e/s"), ("d/s", "f")]
        ),
        pairs(&[
            ("e", "d"),
            ("e/s", "o"),
            ("e/s/p", "o/p"),
            ("e/t", "d/t"),
            ("f", "d/s"),
            ("f/x", "d/s/x"),
        ])
    );
    // A directory and what was in it change places.
    assert_eq!(
        after(
            &["d", "d/s", "d/s/x", "d/t"],
            &[("d/s", "d"), ("d", "d2"), ("d/t", "d/u")]
        ),
        pairs(&[("d", "d/s"), ("d/u", "d/t"), ("d/x", "d/s/x"), ("d2", "d")])
    );
}

/// The path that [`put`] was given as content: found by its hash.
fn before_of(entry: &Entry) -> String {
    let known = [
        "a", "a/1", "a/x", "a/z", "b", "b/2", "b/x", "b/y", "b/y/v", "c", "c/3", "d", "d/s",
        "d/s/x", "d/t", "o", "o/p",
    ];
    let found = known
        .into_iter()
        .find(|content| file(content).content == entry.content);
    found.unwrap().to_owned()
}

#[test]
fn a_proposal_is_accepted_whole_or_not_at_all() {
    let (dir, journal) = opened();
    let agreement = Agreement {
        number: 3,
        nonce: Id([7; 16]),
        previous: Some(Id([6; 16])),
    };
    let proposal = Proposal {
        agreement,
        cursor: 17,
        batch: Id([9; 16]),
        seen: Some((Epoch(u64::MAX), 5)),
        changes: vec![
            put("new", 20, "new"),
            BaseChange::Remove { path: path("old") },
            BaseChange::Move {
                from: path("d"),
                to: path("e"),
            },
        ],
    };
    let stored = proposal.clone();
    let peer = update(&journal, move |update| {
        let peer = update.add_peer("host", "ssh://host/d")?;
        update.apply_base(peer, &[put("old", 2, "old"), put("d/f", 3, "f")])?;
        update.propose(peer, &stored)?;
        Ok(peer)
    });
    // Only offered: the base is what it was, also after a crash.
    drop(journal);
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let snapshot = journal.snapshot().unwrap();
    assert_eq!(snapshot.proposal(peer).unwrap(), Some(proposal));
    let found = snapshot.peer(peer).unwrap().unwrap();
    assert_eq!((found.cursor, found.agreement), (0, None));
    assert_eq!(found.proposed.unwrap().agreement, agreement);
    assert_eq!(below(&journal, peer, &RelPath::ROOT), [&b"d/f"[..], b"old"]);
    drop(snapshot);

    journal
        .update(Durability::Full, move |update| update.accept(peer))
        .unwrap();
    let snapshot = journal.snapshot().unwrap();
    let found = snapshot.peer(peer).unwrap().unwrap();
    assert_eq!((found.cursor, found.agreement), (17, Some(agreement)));
    assert_eq!(found.proposed, None);
    assert_eq!(below(&journal, peer, &RelPath::ROOT), [&b"e/f"[..], b"new"]);
    let twice = journal.update(Durability::Full, move |update| update.accept(peer));
    assert!(matches!(twice, Err(Error::NothingProposed(_))));
}

#[test]
fn observations_are_pending_where_they_differ_from_the_base() {
    let (_dir, journal) = opened();
    let peer = update(&journal, |update| {
        let peer = update.add_peer("host", "/host")?;
        update.apply_base(peer, &[put("same", 2, "1"), put("gone", 3, "1")])?;
        update.observe(peer, &path("same"), Some(&file("1")))?;
        update.observe(peer, &path("gone"), None)?;
        update.observe(peer, &path("new"), Some(&file("2")))?;
        update.observe(peer, &path("never"), None)?;
        Ok(peer)
    });
    let pending = journal.snapshot().unwrap().remote_pending(peer).unwrap();
    assert_eq!(
        pending,
        [(path("gone"), None), (path("new"), Some(file("2")))]
    );
    update(&journal, move |update| {
        update.apply_base(peer, &[put("same", 2, "other")])?;
        update.forget_observation(peer, &path("gone"))
    });
    let pending = journal.snapshot().unwrap().remote_pending(peer).unwrap();
    assert_eq!(
        pending,
        [
            (path("new"), Some(file("2"))),
            (path("same"), Some(file("1")))
        ]
    );
}

#[test]
fn peers_and_conflicts_come_and_go() {
    let (_dir, journal) = opened();
    let conflict = |peer, remote: &str| Conflict {
        id: 0,
        peer,
        path: path("d/f"),
        base: None,
        local: Some(file("local")),
        remote: Some(file(remote)),
        copy: Some(path("d/f.remote.conflict")),
        info: None,
        since: Timestamp { secs: 9, nanos: 1 },
        unit: None,
    };
    let (peer, first, again) = update(&journal, move |update| {
        let peer = update.add_peer("host", "/host")?;
        assert!(matches!(
            update.add_peer("host", "/other"),
            Err(Error::PeerExists(_))
        ));
        let first = update.open_conflict(&conflict(peer, "one"))?;
        let again = update.open_conflict(&conflict(peer, "two"))?;
        update.set_seen(peer, Epoch(3), 4)?;
        update.set_durable(peer, 5)?;
        update.set_peer_replica(peer, Id([1; 16]))?;
        Ok((peer, first, again))
    });
    assert_eq!(first, again);
    let snapshot = journal.snapshot().unwrap();
    let mut expected = conflict(peer, "two");
    expected.id = first;
    assert_eq!(snapshot.conflicts().unwrap(), [expected]);
    let found = &snapshot.peers().unwrap()[0];
    assert_eq!(found.seen, Some((Epoch(3), 4)));
    assert_eq!((found.durable, found.replica), (5, Some(Id([1; 16]))));
    drop(snapshot);
    let other = update(&journal, move |update| {
        update.apply_base(peer, &[put("x", 2, "x")])?;
        update.observe(peer, &path("x"), None)?;
        update.remove_peer(peer)?;
        update.add_peer("host", "/again")
    });
    assert_ne!(other, peer, "a key is never used again");
    let snapshot = journal.snapshot().unwrap();
    assert_eq!(snapshot.conflicts().unwrap(), []);
    assert_eq!(snapshot.base_count(peer).unwrap(), 0);
    assert_eq!(snapshot.remote_pending(peer).unwrap(), []);
    let unknown = journal.update(Durability::Normal, move |update| update.set_cursor(peer, 1));
    assert!(matches!(unknown, Err(Error::UnknownPeer(_))));
}

#[test]
fn a_hash_counts_only_for_the_content_it_was_computed_of() {
    let (_dir, journal) = opened();
    let recorder = journal.recorder();
    let attr = Attr {
        kind: Kind::File,
        mode: 0o600,
        uid: 0,
        gid: 0,
        size: 1,
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
    };
    let ino = Ino(5);
    let create = Change::Create {
        parent: Ino(1),
        name: b"f".to_vec(),
        ino,
        attr,
        target: None,
    };
    let n = recorder.record(Origin::Local, create).unwrap();
    let hash = ContentHash::of(b"x");
    let node = journal
        .snapshot()
        .unwrap()
        .node_by_ino(ino)
        .unwrap()
        .unwrap();
    assert_eq!((node.content_n, node.hash), (n, None));
    assert!(update(&journal, move |update| update.set_hash(node.id, n, hash)));
    let found = || journal.snapshot().unwrap().node(node.id).unwrap().unwrap();
    assert_eq!(found().hash, Some(hash));
    // A change of mode leaves the content alone; a write does not.
    recorder
        .record(Origin::Local, Change::Attr { ino, attr })
        .unwrap();
    assert_eq!((found().hash, found().changed_n), (Some(hash), n + 1));
    let write = Change::Write {
        ino,
        offset: 0,
        len: 1,
        attr,
    };
    recorder.record(Origin::Local, write).unwrap();
    assert_eq!((found().hash, found().content_n), (None, n + 2));
    assert!(!update(&journal, move |update| update.set_hash(node.id, n, hash)));
    recorder
        .record(Origin::Local, Change::Sync { ino })
        .unwrap();
    assert_eq!((found().hash, found().synced_n), (None, n + 3));
    assert!(update(&journal, move |update| update.set_artefact(node.id, true)));
    assert!(found().artefact);
}

#[test]
fn compaction_keeps_what_a_lagging_peer_needs() {
    let (dir, journal) = opened();
    let recorder = journal.recorder();
    let attr = Attr {
        kind: Kind::File,
        mode: 0o600,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
    };
    for number in 0..100 {
        let create = Change::Create {
            parent: Ino(1),
            name: format!("{number:03}").into(),
            ino: Ino(100 + number),
            attr,
            target: None,
        };
        recorder.record(Origin::Local, create).unwrap();
    }
    let (quick, slow) = update(&journal, |update| {
        let quick = update.add_peer("quick", "/quick")?;
        let slow = update.add_peer("slow", "/slow")?;
        update.set_cursor(quick, 100)?;
        update.set_cursor(slow, 40)?;
        Ok((quick, slow))
    });
    let future = Timestamp {
        secs: Timestamp::now().secs + 3600,
        nanos: 0,
    };
    let past = Timestamp {
        secs: future.secs - 7200,
        nanos: 0,
    };
    let compact =
        |before, keep, limit| update(&journal, move |update| update.compact(before, keep, limit));
    let touched = |since| journal.snapshot().unwrap().touched(since).unwrap().len();
    assert_eq!(compact(past, 0, 1000), 0, "too young");
    assert_eq!(compact(future, 100, 1000), 0, "too few");
    assert_eq!(compact(future, 70, 1000), 30);
    assert_eq!(compact(future, 0, 7), 7, "no more than asked for");
    assert_eq!(compact(future, 0, 1000), 3);
    assert_eq!(compact(future, 0, 1000), 0, "the slow peer needs the rest");
    assert_eq!(journal.snapshot().unwrap().compacted().unwrap(), 40);
    assert_eq!((touched(40), touched(99)), (60, 1));
    // Whoever asks for more gets everything there is, the root included, and what
    // only a base remembers.
    let gone = NodeId(1_000_000);
    update(&journal, move |update| {
        update.apply_base(slow, &[put("gone", gone.0, "x")])
    });
    assert_eq!(touched(39), 102);
    update(&journal, move |update| update.remove_peer(slow));
    assert_eq!(compact(future, 0, 1000), 60);
    assert_eq!(touched(100), 0);
    let found = journal.snapshot().unwrap().peer(quick).unwrap().unwrap();
    assert_eq!(found.cursor, 100);
    // Numbers are not used again although no row is left that tells them.
    journal.close().unwrap();
    let (_, start) = Journal::open(dir.path()).unwrap();
    assert_eq!(start.last, 100);
}

/// "Known by record": what somebody gave another name is not the artefact on record.
#[test]
fn an_artefact_that_is_renamed_is_one_no_more() {
    let (_dir, journal) = opened();
    let recorder = journal.recorder();
    let attr = Attr {
        kind: Kind::File,
        mode: 0o600,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
    };
    let (root, names) = (Ino(1), [b"one", b"two"]);
    let make = |number: u64, name: &[u8]| {
        let change = Change::Create {
            parent: root,
            name: name.to_vec(),
            ino: Ino(number),
            attr,
            target: None,
        };
        recorder.record(Origin::Local, change).unwrap();
    };
    make(11, names[0]);
    make(12, names[1]);
    let mark = |artefact: bool| {
        update(&journal, move |update| {
            for ino in [Ino(11), Ino(12)] {
                let node = update.node_by_ino(ino)?.unwrap();
                update.set_artefact(node.id, artefact)?;
            }
            Ok(())
        });
    };
    let artefacts = || {
        let snapshot = journal.snapshot().unwrap();
        [Ino(11), Ino(12)].map(|ino| snapshot.node_by_ino(ino).unwrap().unwrap().artefact)
    };
    mark(true);
    assert_eq!(artefacts(), [true, true]);
    let renamed = Change::Rename {
        parent: root,
        name: names[0].to_vec(),
        new_parent: root,
        new_name: b"three".to_vec(),
        ino: Ino(11),
        replaced: None,
    };
    recorder.record(Origin::Local, renamed).unwrap();
    assert_eq!(artefacts(), [false, true]);
    mark(true);
    let exchanged = Change::Exchange {
        parent: root,
        name: b"three".to_vec(),
        ino: Ino(11),
        new_parent: root,
        new_name: names[1].to_vec(),
        other: Ino(12),
    };
    recorder.record(Origin::Local, exchanged).unwrap();
    assert_eq!(artefacts(), [false, false]);
}
