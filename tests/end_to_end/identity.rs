//! "Identity: the same peer under a new name, another peer under the same name are
//! recognised."

use std::ffi::OsStr;
use std::fs;

use crate::support::{Outcome, PROMPT, Sandbox, Server, assert_same, wait_until};

fn mirrored() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo one >one; mkdir d; echo two >d/two");
    sandbox.mount();
    sandbox.flush();
    sandbox
}

#[track_caller]
fn add(sandbox: &Sandbox, place: impl AsRef<OsStr>, rest: &[&str]) -> Outcome {
    let tree = sandbox.tree();
    let mut arguments = vec![
        OsStr::new("peer"),
        "add".as_ref(),
        tree.as_ref(),
        place.as_ref(),
    ];
    arguments.extend(rest.iter().map(OsStr::new));
    sandbox.run(arguments)
}

/// A peer's directory that has moved is the peer at another place, not another one.
#[test]
fn the_same_peer_at_another_place_is_recognised() {
    let sandbox = mirrored();
    let moved = sandbox.root().join("moved");
    sandbox.sh(sandbox.root(), "mv peer moved");
    add(&sandbox, &moved, &["--name", "second"])
        .expect_code(1)
        .expect_said(&["is the peer peer already", "--name peer"]);
    for mounted in [true, false] {
        if !mounted {
            sandbox.try_umount();
            sandbox.assert_down();
        }
        add(&sandbox, &moved, &[]).ok();
    }
    sandbox.sh(&sandbox.tree(), "echo more >d/two; rm one");
    sandbox
        .run([OsStr::new("mount"), sandbox.tree().as_ref()])
        .ok();
    sandbox.flush();
    let status = sandbox.status();
    assert_eq!(status.peers.len(), 1, "{status:?}");
    assert_eq!(status.peer().name, "peer");
    assert_eq!(status.peer().url, moved.display().to_string());
    assert_same(&sandbox.tree(), &moved);
}

/// Under the name of a peer nothing else is taken for it.
#[test]
fn another_directory_under_the_name_of_a_peer_is_refused() {
    let sandbox = mirrored();
    let other = sandbox.root().join("other");
    add(&sandbox, &other, &["--name", "second"]).ok();
    sandbox.flush();
    assert_same(&sandbox.tree(), &other);
    add(&sandbox, &other, &["--name", "peer"])
        .expect_code(1)
        .expect_said(&["is that of the peer second, and not of peer"]);
    let tree = sandbox.tree().display().to_string();
    sandbox.run(["peer", "remove", &tree, "second"]).ok();
    add(&sandbox, &other, &["--name", "peer"])
        .expect_code(1)
        .expect_said(&["is another directory than the peer peer"]);
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// A copy of a peer's directory is not the peer at another place while the peer is there.
#[test]
fn a_copy_of_a_peer_is_not_taken_for_it() {
    let sandbox = mirrored();
    let copy = sandbox.root().join("copy");
    // What else there is in `.mirrorfs` is in motion.
    sandbox.sh(
        sandbox.root(),
        "mkdir -p copy/.mirrorfs; cp -a peer/one peer/d copy
         cp peer/.mirrorfs/identity copy/.mirrorfs",
    );
    for name in [&[][..], &["--name", "peer"]] {
        add(&sandbox, &copy, name)
            .expect_code(1)
            .expect_said(&["is a copy of the peer peer", "remove its .mirrorfs"]);
    }
    sandbox.sh(&copy, "rm -r .mirrorfs");
    add(&sandbox, &copy, &[]).ok();
    sandbox.flush();
    sandbox.sh(&sandbox.tree(), "echo more >d/two");
    sandbox.flush();
    assert_same(&sandbox.tree(), &copy);
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// One directory by two ways, where that could not be told when the second was added.
#[test]
fn one_directory_is_not_two_peers() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), "echo one >one");
    sandbox.mount();
    sandbox.flush();
    server.link.refuse();
    add(&sandbox, server.url(&sandbox.peer()), &["--name", "again"]).ok();
    server.link.restore();
    sandbox.status_becomes("the second is told from the first", |status| {
        let again = status.peers.iter().find(|peer| peer.name == "again");
        let reason = again.and_then(|peer| peer.halt_reason.as_deref());
        reason.is_some_and(|reason| reason.contains("is that of the peer peer already"))
    });
    sandbox.try_flush().expect_code(6);
    let tree = sandbox.tree().display().to_string();
    sandbox.run(["peer", "remove", &tree, "again"]).ok();
    sandbox.sh(&sandbox.tree(), "echo more >one");
    wait_until("the peer goes on", PROMPT, || sandbox.try_flush().code == 0);
    assert_eq!(
        fs::read_to_string(sandbox.peer().join("one")).unwrap(),
        "more\n"
    );
    assert_same(&sandbox.tree(), &sandbox.peer());
}
