//! "Identity: the same peer under a new name, another peer under the same name,
//! a copied tree with its `.mirrorfs` (two mirrors with one id) are recognised."

use std::ffi::OsStr;
use std::fs;
use std::time::Duration;

use crate::support::program::run;
use crate::support::{Outcome, PROMPT, Sandbox, Server, assert_same, eventually, wait_until};

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

/// "A copied tree with its `.mirrorfs` (two mirrors with one id)": both cannot be told from
/// one that was brought back, until they take turns. One is halted then and the other goes
/// on, and what either has edited is on the peer or where it was.
#[test]
fn a_copy_beside_the_original_is_recognised() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), "echo one >one");
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    sandbox.umount();
    let root = sandbox.root().to_owned();
    sandbox.sh(
        &root,
        "cp -a tree twin; cp -a state twin-state
         sed -i 's:/tree\":/twin\":' twin-state/mirrors/*/mirror.json",
    );
    let at_twin = |arguments: &[&str]| {
        let mut command = sandbox.command(sandbox.program());
        command.env("MIRRORFS_STATE", root.join("twin-state"));
        run(command.args(arguments), Duration::from_secs(120))
    };
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    at_twin(&["mount", "twin"]).ok();
    sandbox.sh(&sandbox.tree(), "echo original >original");
    sandbox.sh(&root.join("twin"), "echo copy >copy");
    let words = "so one of them is a copy";
    let halted = eventually("one of the two is halted", PROMPT, || {
        let original = sandbox.status_json().stdout;
        let twin = at_twin(&["status", "twin", "--json"]).stdout;
        match (original.contains(words), twin.contains(words)) {
            (true, false) => Ok("tree"),
            (false, true) => Ok("twin"),
            _ => Err(format!("{original}\n{twin}")),
        }
    });
    // The way out, for the one that is not to go on.
    let tree = sandbox.tree();
    if halted == "tree" {
        sandbox.try_flush().expect_code(6);
        at_twin(&["sync", "twin", "--flush"]).ok();
        sandbox.try_umount();
        assert_same(&root.join("twin"), &sandbox.peer());
        assert_eq!(
            fs::read_to_string(tree.join("original")).unwrap(),
            "original\n"
        );
    } else {
        at_twin(&["sync", "twin", "--flush"]).expect_code(6);
        sandbox.flush();
        assert_same(&tree, &sandbox.peer());
    }
    at_twin(&["umount", "twin"]);
    let copy = fs::read_to_string(root.join("twin/copy")).unwrap();
    assert_eq!(copy, "copy\n");
}
