//! "A VM restored from a snapshot, a host restored from a backup, a tree without its state,
//! a state without its tree: all become this one case." Nothing newer is overwritten by
//! anything older, no edit is lost, and what was deleted since stays deleted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::program::run;
use crate::support::{Sandbox, Server, assert_same};

/// The places of either side.
struct Side {
    tree: PathBuf,
    state: PathBuf,
}

struct World {
    sandbox: Sandbox,
    mounted: Side,
    peer: Side,
}

/// What is brought back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Both,
    Tree,
    State,
}

impl World {
    /// A mirror at an agreement, of which there are copies, and then at a later one.
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let mounted = Side {
            tree: sandbox.tree(),
            state: sandbox.state().join("mirrors"),
        };
        let peer = Side {
            tree: sandbox.peer(),
            state: sandbox.state().join("agents"),
        };
        let world = Self {
            sandbox,
            mounted,
            peer,
        };
        world.work(
            "mkdir -p d sub/deep
             for f in same pushed pulled gone gone-there d/gone edited sub/deep/x move-me; do
                 echo old >$f
             done
             git init -q repo; cd repo; echo one >file; git add file; git commit -qm one",
        );
        world.copy(&world.mounted);
        world.copy(&world.peer);
        world.sandbox.mount();
        world.sandbox.sh(
            &world.mounted.tree,
            "echo newer >pushed; rm gone d/gone; rmdir d; echo new >added; mv move-me moved
             cd repo; echo two >file; git commit -qam two",
        );
        world.sandbox.flush();
        world.sandbox.sh(
            &world.peer.tree,
            "echo newer >pulled; rm gone-there; echo new >added-there",
        );
        world.sandbox.converges();
        world.sandbox.flush();
        world.sandbox.umount();
        world
    }

    fn work(&self, script: &str) {
        self.sandbox.sh(&self.mounted.tree, script);
        self.sandbox.mount();
        self.sandbox.flush();
        self.sandbox.umount();
    }

    /// Where the copy of something is.
    fn kept(place: &Path) -> PathBuf {
        let mut kept = place.as_os_str().to_owned();
        kept.push(".kept");
        kept.into()
    }

    fn copy(&self, side: &Side) {
        for place in [&side.tree, &side.state] {
            let (place, kept) = (place.display(), Self::kept(place));
            let kept = kept.display();
            self.sandbox.sh(
                self.sandbox.root(),
                &format!("rm -rf '{kept}'; cp -a '{place}' '{kept}'"),
            );
        }
    }

    /// Puts the copy in place of what there is.
    fn restore(&self, side: &Side, what: What) {
        let places = match what {
            What::Both => vec![&side.tree, &side.state],
            What::Tree => vec![&side.tree],
            What::State => vec![&side.state],
        };
        for place in places {
            let (place, kept) = (place.display(), Self::kept(place));
            let kept = kept.display();
            self.sandbox.sh(
                self.sandbox.root(),
                &format!("rm -rf '{place}'; cp -a '{kept}' '{place}'"),
            );
        }
    }

    /// Mounts, and waits until both are the same, with no conflict.
    fn settle(&self) {
        self.sandbox.mount();
        self.sandbox.flush();
        let status = self.sandbox.status();
        assert!(status.conflicts.is_empty(), "{status:#?}");
        assert_same(&self.mounted.tree, &self.peer.tree);
    }

    /// Everything that was agreed on last is there, and nothing that was gone.
    fn shows_the_newest(&self) {
        for (name, content) in [
            ("same", "old\n"),
            ("pushed", "newer\n"),
            ("pulled", "newer\n"),
            ("added", "new\n"),
            ("added-there", "new\n"),
            ("moved", "old\n"),
            ("sub/deep/x", "old\n"),
            ("repo/file", "two\n"),
        ] {
            for tree in [&self.mounted.tree, &self.peer.tree] {
                let found = fs::read_to_string(tree.join(name))
                    .unwrap_or_else(|error| panic!("{}/{name}: {error}", tree.display()));
                assert_eq!(found, content, "{name}");
            }
        }
        for name in ["gone", "gone-there", "d", "move-me"] {
            assert!(!self.mounted.tree.join(name).exists(), "{name} is back");
        }
        self.sandbox
            .sh(&self.peer.tree, "cd repo; git fsck --strict");
    }
}

/// One side brought back in each of three ways, edited on both sides before they meet again.
fn one_side(rolled_back: impl Fn(&World) -> &Side, what: What) {
    let world = World::new();
    let side = rolled_back(&world);
    let other = if side.tree == world.mounted.tree {
        &world.peer
    } else {
        &world.mounted
    };
    world.restore(side, what);
    world
        .sandbox
        .sh(&side.tree, "echo after >edited; echo after >made-after");
    world
        .sandbox
        .sh(&other.tree, "echo since >since; echo since >sub/deep/x");
    world.sandbox.mount();
    world.sandbox.flush();
    for tree in [&side.tree, &other.tree] {
        let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
        assert_eq!(read("edited"), "after\n");
        assert_eq!(read("made-after"), "after\n");
        assert_eq!(read("since"), "since\n");
        assert_eq!(read("sub/deep/x"), "since\n");
    }
    world.sandbox.sh(
        &world.mounted.tree,
        "echo old >sub/deep/x; rm made-after since; echo old >edited",
    );
    world.sandbox.umount();
    world.settle();
    world.shows_the_newest();
    world.sandbox.umount();
    // And all is well from here on.
    world.sandbox.sh(&world.peer.tree, "rm same");
    world.sandbox.mount();
    world.sandbox.flush();
    assert!(!world.mounted.tree.join("same").exists());
}

#[test]
fn the_mounted_side_comes_back_from_a_snapshot() {
    one_side(|world| &world.mounted, What::Both);
}

#[test]
fn the_mounted_tree_comes_back_without_its_state() {
    one_side(|world| &world.mounted, What::Tree);
}

#[test]
fn the_mounted_sides_state_comes_back_without_its_tree() {
    one_side(|world| &world.mounted, What::State);
}

#[test]
fn the_peer_comes_back_from_a_backup() {
    one_side(|world| &world.peer, What::Both);
}

#[test]
fn the_peers_tree_comes_back_without_its_state() {
    one_side(|world| &world.peer, What::Tree);
}

#[test]
fn the_peers_state_comes_back_without_its_tree() {
    one_side(|world| &world.peer, What::State);
}

/// Both are of the same earlier time, and go on from there.
#[test]
fn both_sides_come_back() {
    let world = World::new();
    world.restore(&world.mounted, What::Both);
    world.restore(&world.peer, What::Both);
    world
        .sandbox
        .sh(&world.mounted.tree, "rm gone; echo here >pushed");
    world
        .sandbox
        .sh(&world.peer.tree, "rm gone-there; echo there >pulled");
    world.settle();
    let read = |name: &str| fs::read_to_string(world.mounted.tree.join(name)).unwrap();
    assert_eq!(
        (read("pushed"), read("pulled")),
        ("here\n".into(), "there\n".into())
    );
    for name in ["gone", "gone-there", "added"] {
        assert!(!world.mounted.tree.join(name).exists(), "{name}");
    }
}

/// A state that is lost altogether, on either side: the tree says where it stood.
#[test]
fn a_lost_state_is_no_first_contact() {
    for mounted in [true, false] {
        let world = World::new();
        let (side, other) = if mounted {
            (&world.mounted, &world.peer)
        } else {
            (&world.peer, &world.mounted)
        };
        fs::remove_dir_all(&side.state).unwrap();
        // Deleted here, edited there: with no base each of these would come back or be a
        // conflict.
        world.sandbox.sh(&side.tree, "rm same; echo mine >pushed");
        world
            .sandbox
            .sh(&other.tree, "rm added; echo theirs >pulled");
        world.settle();
        for tree in [&world.mounted.tree, &world.peer.tree] {
            assert!(!tree.join("same").exists() && !tree.join("added").exists());
            let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
            assert_eq!(
                (read("pushed"), read("pulled")),
                ("mine\n".into(), "theirs\n".into())
            );
        }
    }
}

/// Changed on the side that came back and on the other since the copy: that is a conflict,
/// and neither is lost.
#[test]
fn edits_on_both_sides_of_a_rollback_are_a_conflict() {
    let world = World::new();
    world.restore(&world.mounted, What::Both);
    world.sandbox.sh(&world.mounted.tree, "echo after >pushed");
    world.sandbox.mount();
    let code = world.sandbox.try_flush().code;
    assert_eq!(code, 3);
    let (tree, peer) = (&world.mounted.tree, &world.peer.tree);
    assert_eq!(fs::read_to_string(tree.join("pushed")).unwrap(), "after\n");
    assert_eq!(fs::read_to_string(peer.join("pushed")).unwrap(), "newer\n");
    let copies = world.sandbox.conflict_copies(tree);
    assert_eq!(copies.len(), 1);
    assert_eq!(fs::read_to_string(&copies[0]).unwrap(), "newer\n");
    assert_eq!(world.sandbox.status().conflicts.len(), 1);
}

/// A tree alone that is brought back from a copy made just before an agreement, which its
/// mark does not tell yet: the copy is no edit, and the newer versions come back.
#[test]
fn a_tree_from_a_moment_ago_is_no_edit() {
    let world = World::new();
    world.copy(&world.mounted);
    world.sandbox.mount();
    world.sandbox.flush();
    world
        .sandbox
        .sh(&world.mounted.tree, "echo newest >pushed; rm same");
    world
        .sandbox
        .sh(&world.peer.tree, "echo newest >pulled; echo newest >made");
    world.sandbox.converges();
    world.sandbox.flush();
    world.sandbox.kill_daemon();
    let unmounted = world.sandbox.try_umount();
    assert_eq!(unmounted.code, 1, "nothing was flushed: {unmounted:?}");
    world.sandbox.assert_down();
    // As in the seconds in which it lags: the mark is the one that the journal knows.
    let mark = world.mounted.tree.join(".mirrorfs/agreements");
    let written = fs::read(&mark).unwrap();
    world.restore(&world.mounted, What::Tree);
    fs::write(&mark, written).unwrap();
    world.settle();
    for tree in [&world.mounted.tree, &world.peer.tree] {
        for name in ["pushed", "pulled", "made"] {
            let found = fs::read_to_string(tree.join(name)).unwrap();
            assert_eq!(found, "newest\n", "{name} in {}", tree.display());
        }
        assert!(!tree.join("same").exists());
    }
}

/// An old commit that is checked out is an edit like any other.
#[test]
fn a_checkout_of_an_old_commit_is_no_rollback() {
    let world = World::new();
    world.sandbox.mount();
    let repo = world.mounted.tree.join("repo");
    world.sandbox.sh(
        &repo,
        "git checkout -q HEAD~1; rm ../pushed; echo old >../pulled",
    );
    world.sandbox.flush();
    world.sandbox.umount();
    // Also where nothing is mounted meanwhile.
    world.sandbox.sh(&world.mounted.tree, "echo old >added");
    world.settle();
    for tree in [&world.mounted.tree, &world.peer.tree] {
        let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
        assert_eq!(
            (read("repo/file"), read("pulled"), read("added")),
            ("one\n".into(), "old\n".into(), "old\n".into())
        );
        assert!(!tree.join("pushed").exists());
    }
}

/// A virtual machine that is brought back with its memory goes on where it was: the daemon
/// knows of nothing. Here it is a daemon without a link while a copy of all it has goes on
/// and agrees with the peer.
#[test]
fn a_live_snapshot_goes_on_without_a_restart() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url = server.url(&sandbox.peer());
    let (tree, peer, root) = (sandbox.tree(), sandbox.peer(), sandbox.root().to_owned());
    sandbox.sh(
        &tree,
        "for f in same pushed pulled gone; do echo old >$f; done",
    );
    sandbox.mount_with(&url);
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(&root, "cp -a tree twin; cp -a state twin-state; sed -i 's:/tree\":/twin\":' twin-state/mirrors/*/mirror.json");
    sandbox.mount_with(&url);
    sandbox.flush();
    server.link.refuse();
    sandbox.status_becomes("the peer is away", |status| {
        status.peer().state != "connected"
    });

    // What the machine did after the snapshot was taken, until it was brought back to it.
    sandbox.sh(&root, "ln -s ../agent-state/agents twin-state/agents");
    let name = sandbox.status().peer().name.clone();
    let at_twin = |arguments: &[&str]| {
        let mut command = sandbox.command(sandbox.program());
        command.env("MIRRORFS_STATE", root.join("twin-state"));
        run(command.args(arguments), Duration::from_secs(120)).ok()
    };
    let path = peer.display().to_string();
    at_twin(&["mount", "twin", &path, "--peer-name", &name]);
    sandbox.sh(
        &root,
        "cd twin; echo newer >pushed; rm gone; echo new >added",
    );
    at_twin(&["sync", "twin", "--flush"]);
    sandbox.sh(&peer, "echo newer >pulled");
    at_twin(&["sync", "twin", "--flush"]);
    at_twin(&["umount", "twin"]);

    sandbox.sh(&tree, "echo after >made-after");
    server.link.restore();
    sandbox.flush();
    assert!(sandbox.status().conflicts.is_empty());
    assert_same(&tree, &peer);
    let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
    for (name, content) in [
        ("same", "old\n"),
        ("pushed", "newer\n"),
        ("pulled", "newer\n"),
        ("added", "new\n"),
        ("made-after", "after\n"),
    ] {
        assert_eq!(read(name), content, "{name}");
    }
    assert!(!tree.join("gone").exists());
}
