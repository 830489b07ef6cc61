//! `mirrorfs doctor`: what a mirror needs, which transport a peer is reached by and why,
//! and nothing that changes by looking.

use std::ffi::OsString;
use std::fs;

use serde::Deserialize;

use crate::support::{Outcome, Sandbox, Server};

/// One line of what it found.
#[derive(Deserialize, Debug)]
struct Check {
    about: String,
    verdict: String,
    finding: String,
    hint: Option<String>,
}

fn doctor(sandbox: &Sandbox, more: &[OsString]) -> (Outcome, Vec<Check>) {
    let mut arguments: Vec<OsString> = vec!["doctor".into(), "--json".into()];
    arguments.push(sandbox.tree().into());
    arguments.extend_from_slice(more);
    let outcome = sandbox.run(&arguments);
    let checks = serde_json::from_str(&outcome.stdout);
    let checks = checks.unwrap_or_else(|error| panic!("{error}: {outcome}"));
    (outcome, checks)
}

#[track_caller]
fn about<'a>(checks: &'a [Check], what: &str) -> &'a Check {
    let found = checks.iter().find(|check| check.about == what);
    found.unwrap_or_else(|| panic!("nothing about {what}: {checks:?}"))
}

#[test]
fn it_looks_at_the_machine_and_at_a_tree_that_is_new() {
    let sandbox = Sandbox::new();
    let peer = sandbox.peer().into_os_string();
    let (outcome, checks) = doctor(&sandbox, std::slice::from_ref(&peer));
    assert_eq!(outcome.code, 0, "{outcome}");
    for what in ["fuse", "ssh", "tree", "peer"] {
        assert_eq!(about(&checks, what).verdict, "good", "{outcome}");
    }
    for what in ["channel", "state", "watches"] {
        assert_ne!(about(&checks, what).verdict, "bad", "{outcome}");
    }
    assert!(about(&checks, "peer").finding.contains("local"));
    let names = |dir| fs::read_dir(dir).unwrap().count();
    assert_eq!(names(sandbox.tree()), 0, "it left something in the tree");
    assert!(
        !sandbox.peer().exists() || names(sandbox.peer()) == 0,
        "it left something in the peer's directory"
    );
    let inside = sandbox.tree().join("inside").into_os_string();
    let (outcome, checks) = doctor(&sandbox, &[inside]);
    assert_eq!(outcome.code, 1, "{outcome}");
    assert_eq!(about(&checks, "peer").verdict, "bad", "{outcome}");
    let missing = sandbox.run([
        "doctor".as_ref(),
        sandbox.outside().join("missing").as_os_str(),
    ]);
    assert_eq!(missing.code, 1, "{missing}");
    let said = "BAD   tree: ";
    assert!(missing.stdout.contains(said), "{missing}");
    assert!(
        missing.stdout.contains("hint: create it first"),
        "{missing}"
    );
}

/// Carries bytes between its standard streams and a port.
const THROUGH: &str = "
import os, socket, sys, threading
port = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536): port.sendall(data)
    port.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := port.recv(65536): os.write(1, data)
";

/// "`auto` decides from `ssh -G`, `doctor` says which and why."
#[test]
fn it_says_which_transport_and_why() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url: OsString = server.url(&sandbox.peer()).into();
    let reached = |sandbox: &Sandbox, url: &OsString| {
        let (outcome, mut checks) = doctor(sandbox, std::slice::from_ref(url));
        assert_eq!(outcome.code, 0, "{outcome}");
        checks.pop().unwrap().finding
    };
    let plain = reached(&sandbox, &url);
    if cfg!(feature = "libssh2") {
        assert!(
            plain.ends_with(
                "can be reached by libssh2 (nothing in the ssh configuration needs the ssh program)"
            ),
            "{plain}"
        );
    }
    let config = sandbox.outside().join("config");
    let through = sandbox.outside().join("through");
    fs::write(&through, THROUGH).unwrap();
    let command = format!(
        "Host *\n  ProxyCommand python3 {} %h %p\n",
        through.display()
    );
    fs::write(&config, command).unwrap();
    sandbox.set("MIRRORFS_SSH_CONFIG", &config);
    let proxied = reached(&sandbox, &url);
    assert!(proxied.contains("can be reached by ssh ("), "{proxied}");
    if cfg!(feature = "libssh2") {
        assert!(proxied.contains("ProxyCommand"), "{proxied}");
    }
}

#[test]
fn what_stands_in_the_way_of_a_peer_comes_with_the_way_out() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url: OsString = server.url(&sandbox.peer()).into();
    server.know_host(false);
    let (outcome, checks) = doctor(&sandbox, std::slice::from_ref(&url));
    assert_eq!(outcome.code, 1, "{outcome}");
    let peer = about(&checks, "peer");
    assert_eq!(peer.verdict, "bad");
    assert!(peer.finding.contains("ssh-keyscan"), "{peer:?}");
    server.know_host(true);
    drop(server);
    let (outcome, checks) = doctor(&sandbox, std::slice::from_ref(&url));
    assert_eq!(outcome.code, 4, "{outcome}");
    assert_eq!(about(&checks, "peer").verdict, "bad");
}

#[test]
fn a_connected_peer_keeps_its_agent_and_a_dead_mount_is_named() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    let connections = server.link.accepted();
    let (outcome, checks) = doctor(&sandbox, &[]);
    assert_eq!(outcome.code, 0, "{outcome}");
    let status = sandbox.status();
    let peer = about(&checks, &format!("peer {}", status.peers[0].name));
    assert_eq!(peer.verdict, "good");
    assert!(peer.finding.contains("is connected by"), "{peer:?}");
    assert!(peer.finding.contains("mirrorfs 0."), "{peer:?}");
    assert_eq!(server.link.accepted(), connections, "it connected anew");
    sandbox.kill_daemon();
    let (outcome, checks) = doctor(&sandbox, &[]);
    assert_eq!(outcome.code, 1, "{outcome}");
    let tree = about(&checks, "tree");
    assert!(tree.finding.contains("daemon has ended"), "{tree:?}");
    let hint = tree.hint.as_ref().unwrap();
    assert!(hint.contains("mirrorfs mount"), "{hint}");
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
}
