//! The harness itself: a test is worth nothing if its tools see no difference.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::support::compare::{differences, read};
use crate::support::process;
use crate::support::program::run;
use crate::support::proxy::Proxy;
use crate::support::{Sandbox, Server, assert_same};

#[test]
fn comparing_sees_every_kind_of_difference() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir -p a/b empty; echo one >a/b/file; ln -s b a/link; setfattr -n user.note -v x a/b/file
         mkdir .mirrorfs; echo private >.mirrorfs/identity; git init -q repo; cd repo
         echo x >x; git add x; git commit -qm x",
    );
    sandbox.sh(sandbox.root(), "rm -rf peer; cp -a tree peer");
    assert_same(&tree, &peer);
    for (change, undo) in [
        ("echo two >a/b/file", "cp -p ../tree/a/b/file a/b/file"),
        ("chmod 600 a/b/file", "chmod 644 a/b/file"),
        (
            "touch -d '1970-01-02 00:00:00.000000001' a/b/file",
            "touch -r ../tree/a/b/file a/b/file",
        ),
        ("ln -sfn c a/link", "ln -sfn b a/link"),
        ("rmdir empty", "mkdir empty"),
        ("mkdir more", "rmdir more"),
        ("chmod 700 empty", "chmod 755 empty"),
        (
            "setfattr -n user.note -v y a/b/file",
            "setfattr -n user.note -v x a/b/file",
        ),
    ] {
        sandbox.sh(&peer, change);
        let found = differences(&read(&tree), &read(&peer));
        assert_eq!(found.len(), 1, "after {change}: {found:?}");
        sandbox.sh(&peer, undo);
        assert_same(&tree, &peer);
    }
    // An index that was refreshed is the same; one with another entry is not.
    sandbox.sh(
        &peer.join("repo"),
        "touch -d '2001-01-01' x; git update-index --refresh; touch -r ../../tree/repo/x x",
    );
    assert_same(&tree, &peer);
    sandbox.sh(
        &peer.join("repo"),
        "git update-index --chmod=+x x; rm -f .git/objects/x",
    );
    assert!(!differences(&read(&tree), &read(&peer)).is_empty());
}

#[test]
fn the_link_can_be_cut_at_a_byte_and_stalled() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let link = Proxy::to(listener.local_addr().unwrap().port());
    let connect = || {
        let near = TcpStream::connect(("127.0.0.1", link.port())).unwrap();
        let far = listener.accept().unwrap().0;
        (near, far)
    };

    link.cut_after(5);
    let (mut near, mut far) = connect();
    near.write_all(b"0123456789").unwrap();
    let mut arrived = Vec::new();
    far.read_to_end(&mut arrived).unwrap();
    assert_eq!(arrived, b"01234");

    let (mut near, mut far) = connect();
    link.stall();
    near.write_all(b"later").unwrap();
    far.set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    assert!(far.read(&mut [0; 5]).is_err());
    link.restore();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = [0; 5];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"later");

    link.refuse();
    assert_eq!(near.read(&mut [0; 1]).unwrap_or(0), 0);
    let mut refused = TcpStream::connect(("127.0.0.1", link.port())).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap_or(0), 0);
}

#[test]
fn the_server_lets_in_with_the_key_and_nobody_else() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let keys = sandbox.root().join("ssh");
    let ssh = |known: &str| {
        let mut command = sandbox.command("ssh");
        command
            .args(["-F", "none", "-o", "BatchMode=yes", "-i"])
            .arg(keys.join("client"))
            .arg("-o")
            .arg(format!("UserKnownHostsFile={known}"))
            .args(["-p", &server.link.port().to_string()])
            .arg("127.0.0.1")
            .arg("echo inside");
        run(&mut command, Duration::from_secs(30))
    };
    let known = server.known_hosts().display().to_string();
    assert_eq!(ssh(&known).ok().stdout, "inside\n");
    assert_ne!(ssh("/dev/null").code, 0);
    server.link.refuse();
    assert_ne!(ssh(&known).code, 0);
}

#[test]
fn a_sandbox_sees_its_own_processes_only() {
    let (mine, other) = (Sandbox::new(), Sandbox::new());
    // `mirrorfs agent` waits for a hello.
    let mut agent = mine
        .command(mine.program())
        .args(["agent", "--stdio"])
        .arg(mine.peer())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    crate::support::wait_until("the agent is found", Duration::from_secs(20), || {
        mine.processes_of(process::Role::Agent).len() == 1
    });
    assert!(other.processes().is_empty());
    mine.kill_agents();
    agent.wait().unwrap();
    assert!(mine.processes().is_empty());
}
