//! "Several peers have a cursor and a base each. What one peer brings in goes out to the
//! others and not back." Peers come and go while the tree is mounted.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::first_contact::PROJECT;
use crate::support::compare::compare;
use crate::support::process::Role;
use crate::support::{Outcome, PROMPT, Sandbox, Server, assert_same, eventually, wait_until};

fn peer_command(sandbox: &Sandbox, arguments: &[&str]) -> Outcome {
    let tree = sandbox.tree().display().to_string();
    let (action, rest) = arguments.split_first().unwrap();
    sandbox.run([&["peer", action, &tree], rest].concat())
}

pub fn become_same(left: &Path, right: &Path) {
    eventually("both become the same", PROMPT, || compare(left, right));
}

/// "Flush returns 0 only when the other side durably has everything": also what another
/// peer had before the call and brings in during it. The first peer's agent stands still
/// until the flush has begun, and the link to the second is slow, so that it cannot have
/// come there by chance.
#[test]
fn a_flush_covers_what_another_peer_brings_in_meanwhile() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.set("MIRRORFS_LOG", "debug");
    let second = sandbox.outside().join("second");
    fs::create_dir(&second).unwrap();
    sandbox.mount();
    sandbox.flush();
    let agent = sandbox.processes_of(Role::Agent)[0].pid;
    let agent = Pid::from_raw(i32::try_from(agent).unwrap()).unwrap();
    peer_command(&sandbox, &["add", &server.url(&second)]).ok();
    sandbox.flush();
    server.link.limit(100_000);
    let begun = || {
        let logs = sandbox.sh(&sandbox.state(), "cat mirrors/*/daemon.log");
        logs.matches("a flush begins").count()
    };
    let before = begun();
    kill_process(agent, Signal::STOP).unwrap();
    sandbox.sh(&sandbox.peer(), "head -c 300000 /dev/urandom >brought");
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| sandbox.flush());
        wait_until("the flush begins", PROMPT, || begun() > before);
        kill_process(agent, Signal::CONT).unwrap();
        flush.join().unwrap();
    });
    assert_same(&sandbox.peer(), &second);
}

/// A peer that is added to a mounted tree gets everything; what one peer brings in goes to
/// the other and does not come back; one that is removed hears no more; and when it is
/// added again, both are compared as on first contact, and nothing is lost.
#[test]
fn peers_come_and_go_while_the_tree_is_mounted() {
    let sandbox = Sandbox::new();
    let (tree, first) = (sandbox.tree(), sandbox.peer());
    let second = sandbox.outside().join("second");
    fs::create_dir(&second).unwrap();
    let place = second.display().to_string();
    sandbox.sh(&tree, PROJECT);
    sandbox.mount();
    sandbox.flush();

    peer_command(&sandbox, &["add", &place]).ok();
    sandbox.flush();
    assert_same(&tree, &second);
    let list = peer_command(&sandbox, &["list"]).ok().stdout;
    assert!(
        list.contains(&place) && list.contains("peer  connected"),
        "{list}"
    );

    // From one to the other, and not back.
    sandbox.sh(&second, "echo from-second >>docs/long; mv src/deep moved");
    become_same(&second, &first);
    sandbox.sh(&first, "echo from-first >>docs/nothing; rm src/main.rs");
    become_same(&first, &second);
    sandbox.flush();
    let before = sandbox.status().journal.seq;
    // The one thing here that has to take its time: that nothing happens in it.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(sandbox.status().journal.seq, before, "an echo");
    assert_same(&tree, &first);

    // A flush that is narrowed to one peer.
    let only = |name: &str| {
        let tree = tree.display().to_string();
        sandbox.run(["sync", &tree, "--flush", "--peer", name])
    };
    let said = only("second").ok().stdout;
    assert!(
        said.contains("peer second") && !said.contains("peer peer"),
        "{said}"
    );
    assert_ne!(only("third").code, 0);

    peer_command(&sandbox, &["remove", "second"]).ok();
    peer_command(&sandbox, &["remove", "second"]).expect_code(1);
    sandbox.sh(&tree, "echo alone >alone; rm docs/nothing");
    sandbox.flush();
    assert_same(&tree, &first);
    assert!(!second.join("alone").exists());
    sandbox.sh(&second, "echo meanwhile >meanwhile");

    peer_command(&sandbox, &["add", &place, "--name", "again"]).ok();
    sandbox.flush();
    // No base: what only one side has travels, deletions of before are not known.
    assert!(tree.join("meanwhile").exists() && tree.join("docs/nothing").exists());
    assert_same(&tree, &first);
    assert_same(&tree, &second);
    assert!(sandbox.status().conflicts.is_empty());

    // The same without a mount.
    sandbox.umount();
    peer_command(&sandbox, &["remove", "again"]).ok();
    assert_eq!(sandbox.status().peers.len(), 1);
    peer_command(&sandbox, &["add", &place]).ok();
    assert_eq!(sandbox.status().peers.len(), 2);
    sandbox.sh(&tree, "echo unmounted >unmounted");
    let by_name = ["sync", &tree.display().to_string(), "--peer", "second"].map(str::to_owned);
    sandbox.run(by_name).ok();
    assert_same(&tree, &second);
    assert!(!first.join("unmounted").exists());
}

/// A peer whose version of a file waits for a decision is not forgotten by accident, and
/// its version stays when it is.
#[test]
fn a_peer_in_conflict_is_removed_by_force_only() {
    let sandbox = Sandbox::new();
    let tree = sandbox.tree();
    sandbox.sh(&tree, "echo mine >notes");
    sandbox.sh(&sandbox.peer(), "echo theirs >notes");
    sandbox.mount();
    sandbox.try_flush().expect_code(3);
    let refused = peer_command(&sandbox, &["remove", "peer"]).expect_code(3);
    assert!(refused.stderr.contains("conflicts list"), "{refused}");
    let said = peer_command(&sandbox, &["remove", "peer", "--force"]).ok();
    assert!(said.stdout.contains("stay in the tree"), "{said}");
    let status = sandbox.status();
    assert!(status.peers.is_empty() && status.conflicts.is_empty());
    let copies = sandbox.conflict_copies(&tree);
    assert_eq!(copies.len(), 1);
    assert_eq!(fs::read_to_string(&copies[0]).unwrap(), "theirs\n");
    // What can never be a peer is said at once.
    let inside = tree.join("inside").display().to_string();
    assert_ne!(peer_command(&sandbox, &["add", &inside]).code, 0);
}
