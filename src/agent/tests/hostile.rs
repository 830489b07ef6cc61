//! A malicious mounted side, and a malicious user beside the agent: what steps that name
//! paths outside of the tree, or that pass through links, come to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;

/// Steps on what is reserved, through a link, and with rights that are not to be given.
#[test]
fn a_hostile_batch_changes_nothing_outside() {
    let above = tempfile::tempdir().unwrap();
    fs::write(above.path().join("victim"), "victim").unwrap();
    let peer = Peer::new();
    std::os::unix::fs::symlink(above.path(), peer.path("out")).unwrap();
    let (mut mount, _) = peer.meet(None);
    let victim = file(b"victim");
    let identity = fs::read(peer.path(".mirrorfs/identity")).ok();
    let hostile = [
        put("out/new", "evil"),
        Op::MakeDir {
            path: path("out/dir"),
            entry: directory(),
        },
        Op::Remove {
            path: path("out/victim"),
            expect: victim.clone(),
        },
        Op::SetMeta {
            path: path("out/victim"),
            entry: Entry {
                mode: 0o777,
                ..victim.clone()
            },
            expect: victim.clone(),
        },
        put(".mirrorfs/new", "evil"),
        put(".mirrorfs/trash/new", "evil"),
        Op::RemoveDir {
            path: path(".mirrorfs/staging"),
        },
        Op::RemoveDir {
            path: RelPath::ROOT,
        },
    ];
    for (number, step) in (1..).zip(hostile) {
        let batch = Id([number; 16]);
        for want in mount.offer(batch, std::slice::from_ref(&step)) {
            mount.data(want.hash, want.have, b"evil");
        }
        // Refused, diverged, or without effect: what counts is what is there afterwards.
        match mount.commit(batch, number) {
            Ok(_) => mount.durable(batch),
            Err(reason) => assert!(!reason.is_empty()),
        }
    }
    let mut entry = file(b"right");
    entry.mode = 0o6755;
    entry
        .xattrs
        .insert(b"security.evil".to_vec(), b"x".to_vec());
    entry.xattrs.insert(b"trusted.evil".to_vec(), b"x".to_vec());
    let step = Op::Put {
        path: path("suid"),
        entry,
        expect: Expect::Absent,
    };
    mount.apply(99, &[step], &[b"right"]);
    let found = fs::metadata(peer.path("suid")).unwrap();
    assert_eq!(found.permissions().mode() & 0o7777, 0o755);
    let attributes = rustix::fs::listxattr(peer.path("suid"), &mut [0_u8; 4096]).unwrap_or(0);
    assert_eq!(attributes, 0, "attributes that give rights");
    mount.hang_up().unwrap();
    assert_eq!(fs::read(peer.path(".mirrorfs/identity")).ok(), identity);
    let names: Vec<_> = fs::read_dir(above.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["victim"]);
    assert_eq!(fs::read(above.path().join("victim")).unwrap(), b"victim");
}

/// A content that is acknowledged and was never sent.
#[test]
fn what_was_never_sent_cannot_be_taken() {
    let peer = Peer::new();
    let (mut mount, _) = peer.meet(None);
    mount.send(ToAgent::Taken { bytes: 1 });
    let reason = mount.closing();
    assert!(reason.contains("acknowledges 1 bytes"), "{reason}");
}

/// "Symlink swap during apply": while batches work in a directory, somebody exchanges it
/// again and again for a link to another one.
#[test]
fn a_directory_swapped_for_a_link_lets_nothing_out() {
    let above = tempfile::tempdir().unwrap();
    fs::write(above.path().join("kept"), "kept").unwrap();
    let peer = Peer::new();
    fs::create_dir(peer.path("dir")).unwrap();
    peer.write("dir/kept", "kept");
    std::os::unix::fs::symlink(above.path(), peer.path("link")).unwrap();
    let (mut mount, _) = peer.meet(None);
    let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let (dir, link) = (peer.path("dir"), peer.path("link"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Should the other thread fail, this one ends all the same.
            let start = Instant::now();
            while !done.load(Ordering::Relaxed) && start.elapsed() < 4 * PATIENCE {
                let at = rustix::fs::CWD;
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(at, &dir, at, &link, flags).unwrap();
                begun.store(true, Ordering::Relaxed);
            }
        });
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        for number in 1..=100 {
            let name = format!("dir/new{number}");
            let remove = Op::Remove {
                path: path("dir/kept"),
                expect: file(b"kept"),
            };
            let replace = Op::Put {
                path: path("dir/kept"),
                entry: file(b"new"),
                expect: Expect::Entry(file(b"kept")),
            };
            let other = if number % 2 == 0 { remove } else { replace };
            let batch = Id([number; 16]);
            for want in mount.offer(batch, &[put(&name, "new"), other]) {
                mount.data(want.hash, want.have, b"new");
            }
            // What is found in place of the directory diverges; both are right.
            if mount.commit(batch, number).is_ok() {
                mount.durable(batch);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    mount.hang_up().unwrap();
    let names: Vec<_> = fs::read_dir(above.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["kept"]);
    assert_eq!(fs::read(above.path().join("kept")).unwrap(), b"kept");
}
