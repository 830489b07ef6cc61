//! "The link cut at any moment: reconnect by itself, resume, converge." And: "the mount
//! never waits for a peer".

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::first_contact::PROJECT;
use crate::support::{PROMPT, Random, Sandbox, Server, assert_same, rounds, wait_until};

fn pair() -> (Sandbox, Server) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    (sandbox, server)
}

/// Cut at random bytes of everything that crosses, in both directions, while both sides
/// change.
#[test]
fn cut_at_random_bytes_it_reconnects_and_converges() {
    let (sandbox, server) = pair();
    let mut random = Random::new("cut at random bytes");
    sandbox.sh(&sandbox.tree(), PROJECT);
    server.link.cut_after(random.between(1, 400_000));
    sandbox.mount_with(server.url(&sandbox.peer()));
    for round in 0..rounds(8, 80) {
        let connections = server.link.accepted();
        server.link.cut_after(random.between(1, 150_000));
        let salt = random.next();
        sandbox.sh(
            &sandbox.tree(),
            &format!(
                "mkdir -p round{round}; for i in $(seq 20); do
                   head -c 9000 /dev/urandom >round{round}/$i; done
                 echo {salt} >>docs/long; mv round{round}/1 round{round}/renamed; rm -f empty/x"
            ),
        );
        sandbox.sh(
            &sandbox.peer(),
            &format!("mkdir -p there{round}; head -c 20000 /dev/urandom >there{round}/{salt}"),
        );
        // The cut comes when enough bytes have crossed; what is left over falls into the
        // next round.
        wait_until("this round's changes cross, cut or not", PROMPT, || {
            sandbox.tree().join(format!("there{round}/{salt}")).exists()
                || server.link.accepted() > connections
        });
    }
    server.link.restore();
    sandbox.flush();
    sandbox.converges();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.status().conflicts.is_empty());
    assert!(server.link.accepted() > 1, "the link was never cut");
}

/// "A cut link resumes at the byte": a large file cut half-way is not sent again from the
/// start, in whichever direction.
#[test]
fn a_cut_transfer_resumes() {
    let (sandbox, server) = pair();
    cut_half_way(&sandbox, &server, &sandbox.tree(), &sandbox.peer());
}

#[test]
fn a_cut_fetch_resumes() {
    let (sandbox, server) = pair();
    cut_half_way(&sandbox, &server, &sandbox.peer(), &sandbox.tree());
}

fn cut_half_way(sandbox: &Sandbox, server: &Server, from: &Path, to: &Path) {
    const SIZE: u64 = 24 << 20;
    let url = server.url(&sandbox.peer());
    sandbox.mount_with(&url);
    sandbox.flush();
    let content = Random::new("large").bytes(usize::try_from(SIZE).unwrap());
    // While it is written nothing is sent: a part of the file is another content.
    server.link.refuse();
    fs::write(from.join("large"), &content).unwrap();
    server.link.restore();
    server.link.cut_after(SIZE * 2 / 3);
    let (before, connections) = (server.link.forwarded(), server.link.accepted());
    wait_until("the link is made, cut, and made again", PROMPT, || {
        server.link.accepted() > connections + 1
    });
    sandbox.flush();
    assert!(fs::read(to.join("large")).unwrap() == content);
    let sent = server.link.forwarded() - before;
    assert!(
        sent < SIZE * 5 / 4,
        "{sent} bytes crossed for a file of {SIZE} cut at two thirds"
    );
}

/// The mount goes on at local speed with no link, a silent link and a slow link; the
/// states are told apart; everything arrives afterwards.
#[test]
fn the_mount_never_waits_for_the_link() {
    let (sandbox, server) = pair();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    let work = |name: &str| {
        let start = Instant::now();
        sandbox.sh(
            &sandbox.tree(),
            &format!(
                "cp -r docs {name}; ls -lR >/dev/null; echo x >>{name}/long; rm {name}/nothing"
            ),
        );
        let took = start.elapsed();
        assert!(took < Duration::from_secs(5), "{name} took {took:?}");
    };
    server.link.stall();
    work("silent");
    server.link.restore();
    server.link.limit(2_000);
    work("slow");
    server.link.refuse();
    work("none");
    sandbox.status_becomes("the peer is not connected", |status| {
        ["unreachable", "connecting"].contains(&status.peer().state.as_str())
            && status.peer().last_error.is_some()
            && status.journal.pending_changes > 0
    });
    server.link.restore();
    sandbox.connected();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    let status = sandbox.status();
    assert_eq!(status.journal.pending_changes, 0, "{status:?}");
    assert_eq!(status.peer().pending_changes, 0, "{status:?}");
}

/// With the peer out of reach a mount still comes up, and what is done in it arrives
/// later. "No peer: local work goes on."
#[test]
fn a_known_mirror_mounts_without_its_peer() {
    let (sandbox, server) = pair();
    let url = server.url(&sandbox.peer());
    sandbox.sh(&sandbox.tree(), "echo 1 >file");
    sandbox.mount_with(&url);
    sandbox.flush();
    sandbox.umount();
    server.link.refuse();
    sandbox.mount_with(&url);
    sandbox.sh(&sandbox.tree(), "echo 2 >file; echo new >other");
    sandbox.try_flush().expect_code(4);
    server.link.restore();
    sandbox.connected();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// The transport for what libssh2 cannot do.
#[test]
fn files_cross_whole_over_a_plain_ssh_program() {
    let (mut sandbox, server) = pair();
    sandbox.set("MIRRORFS_TRANSPORT", "ssh");
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    assert_eq!(sandbox.status().peer().transport.as_deref(), Some("ssh"));
    server.link.cut();
    sandbox.sh(&sandbox.tree(), "echo after >>docs/long");
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// A transfer that is cut never shows half a file under its name, nor an empty one.
#[test]
fn a_cut_transfer_shows_nothing_half_done() {
    let (sandbox, server) = pair();
    let mut random = Random::new("half done");
    sandbox.mount_with(server.url(&sandbox.peer()));
    let versions: Vec<Vec<u8>> = (0..4).map(|_| random.bytes(2 << 20)).collect();
    fs::write(sandbox.tree().join("file"), &versions[0]).unwrap();
    sandbox.flush();
    for version in &versions[1..] {
        server.link.cut_after(random.between(10_000, 3 << 20));
        let new = sandbox.tree().join("new");
        fs::write(&new, version).unwrap();
        fs::rename(&new, sandbox.tree().join("file")).unwrap();
        wait_until("this version arrives", PROMPT, || {
            let there = fs::read(sandbox.peer().join("file")).expect("the name is never gone");
            assert!(
                versions.contains(&there),
                "{} bytes of nothing",
                there.len()
            );
            there == *version
        });
        server.link.restore();
    }
}
