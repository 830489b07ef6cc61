//! "A bad link is normal": slow, far, silent, cut in every way, and made again. And:
//! "what is in flight is sized by the link, not by the buffers of ssh".

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::first_contact::PROJECT;
use crate::support::proxy::Way;
use crate::support::{PROMPT, Random, Role, Sandbox, Server, assert_same, rounds, wait_until};

/// 20 Mbit/s, in bytes.
const SLOW: u64 = 2_500_000;

fn pair() -> (Sandbox, Server) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    (sandbox, server)
}

/// Both sides give a silent link up after so many seconds.
fn hurry(sandbox: &mut Sandbox, server: &Server, seconds: u32) {
    let seconds = seconds.to_string();
    sandbox.set("MIRRORFS_DEADLINE", &seconds);
    server.set_for_agents(sandbox, &[("MIRRORFS_DEADLINE", &seconds)]);
}

/// While the other side cannot answer, no more is sent than the link carries in a moment.
/// What would be on its way without that is megabytes: ssh's window, and the buffers below.
fn in_flight(way: Way, answers: Way) {
    let (mut sandbox, server) = pair();
    hurry(&mut sandbox, &server, 3);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.link.limit(SLOW);
    let (from, to) = match way {
        Way::There => (sandbox.tree(), sandbox.peer()),
        Way::Back => (sandbox.peer(), sandbox.tree()),
    };
    let content = Random::new("in flight").bytes(6 << 20);
    let before = server.link.forwarded_way(way);
    fs::write(sandbox.outside().join("large"), &content).unwrap();
    fs::rename(sandbox.outside().join("large"), from.join("large"))
        .or_else(|_| fs::write(from.join("large"), &content))
        .unwrap();
    wait_until("the file is on its way", PROMPT, || {
        server.link.forwarded_way(way) > before + (1 << 20)
    });
    server.link.stall_way(answers);
    let (at, connections) = (server.link.forwarded_way(way), server.link.accepted());
    wait_until("the silence is noticed", PROMPT, || {
        server.link.accepted() > connections
    });
    let more = server.link.forwarded_way(way) - at;
    assert!(more < 800 << 10, "{more} bytes were on their way");
    server.link.cut();
    server.link.restore();
    wait_until("the file arrives", PROMPT, || {
        fs::read(to.join("large")).is_ok_and(|found| found == content)
    });
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

#[test]
fn what_is_sent_is_sized_by_the_link() {
    in_flight(Way::There, Way::Back);
}

#[test]
fn what_is_fetched_is_sized_by_the_link() {
    in_flight(Way::Back, Way::There);
}

/// Edits both sides, and waits until both have everything.
fn work_on_both(sandbox: &Sandbox, name: &str) {
    sandbox.sh(
        &sandbox.tree(),
        &format!("mkdir {name}; echo x >{name}/here"),
    );
    sandbox.sh(&sandbox.peer(), &format!("echo y >{name}-there"));
    wait_until("both sides have everything", PROMPT, || {
        sandbox.peer().join(name).join("here").exists()
            && sandbox.tree().join(format!("{name}-there")).exists()
    });
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "A stalled peer is noticed within the deadline and replaced": a connection that is
/// half-open, and one whose sshd is stopped. The agent behind it ends, or makes room.
#[test]
fn a_peer_that_fell_silent_is_replaced() {
    let (mut sandbox, server) = pair();
    hurry(&mut sandbox, &server, 3);
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.link.freeze();
    replaced(&sandbox, "frozen");
    let _paused = server.pause();
    replaced(&sandbox, "stopped");
}

/// The link of now is replaced, and its agent does not stay behind.
fn replaced(sandbox: &Sandbox, name: &str) {
    let agents = sandbox.processes_of(Role::Agent);
    work_on_both(sandbox, name);
    wait_until("the agent that nobody hears is gone", PROMPT, || {
        let left = agents.iter().filter(|agent| agent.alive()).count();
        left < agents.len()
    });
}

/// A link that is far away, uneven and slow carries changes both ways all the same.
#[test]
fn a_far_and_uneven_link_carries_everything() {
    let (sandbox, server) = pair();
    sandbox.sh(&sandbox.tree(), PROJECT);
    server
        .link
        .far(Duration::from_millis(40), Duration::from_millis(60));
    server.link.limit(SLOW / 2);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.sh(&sandbox.tree(), "head -c 500000 /dev/urandom >large-here");
    sandbox.sh(&sandbox.peer(), "head -c 500000 /dev/urandom >large-there");
    work_on_both(&sandbox, "far");
    assert!(sandbox.status().conflicts.is_empty());
}

/// Resets in the middle of whatever it is, one after the other.
#[test]
fn a_link_that_is_reset_is_made_again() {
    let (sandbox, server) = pair();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(server.url(&sandbox.peer()));
    for round in 0..rounds(3, 30) {
        sandbox.sh(
            &sandbox.tree(),
            &format!("head -c 300000 /dev/urandom >file{round}; echo {round} >>docs/long"),
        );
        server.link.reset();
        work_on_both(&sandbox, &format!("round{round}"));
    }
    assert!(sandbox.status().conflicts.is_empty());
}

/// A link whose end arrives late: the peer still serves a session that is over on this
/// side. The new one takes its place at once.
#[test]
fn a_session_whose_end_nobody_told_makes_room() {
    let (sandbox, server) = pair();
    let url = server.url(&sandbox.peer());
    sandbox.mount_with(&url);
    sandbox.flush();
    let agents = sandbox.processes_of(Role::Agent);
    assert_eq!(agents.len(), 1, "{agents:?}");
    server.link.hold_closes();
    sandbox.kill_daemon();
    assert!(agents[0].alive(), "the end was told");
    sandbox.mount_with(&url);
    work_on_both(&sandbox, "anew");
    wait_until("the older agent is gone", PROMPT, || !agents[0].alive());
    server.link.restore();
}

/// "sshd with RekeyLimit 256K": the keys of the connection are renewed all the time, while
/// data flows in both directions.
fn rekeyed(transport: &str) {
    let mut sandbox = Sandbox::new();
    let server = Server::start_with(&mut sandbox, "RekeyLimit 256K", &[]);
    sandbox.set("MIRRORFS_TRANSPORT", transport);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    let connections = server.link.accepted();
    let mib = usize::try_from(rounds(6, 64)).unwrap();
    let mut random = Random::new(transport);
    let (here, there) = (random.bytes(mib << 20), random.bytes(mib << 20));
    fs::write(sandbox.tree().join("here"), &here).unwrap();
    fs::write(sandbox.peer().join("there"), &there).unwrap();
    sandbox.flush();
    assert!(fs::read(sandbox.peer().join("here")).unwrap() == here);
    assert!(fs::read(sandbox.tree().join("there")).unwrap() == there);
    assert_eq!(server.link.accepted(), connections, "the link broke");
    let status = sandbox.status();
    assert_eq!(status.peer().transport.as_deref(), Some(transport));
}

#[test]
fn keys_are_renewed_under_libssh2() {
    rekeyed("libssh2");
}

#[test]
fn keys_are_renewed_under_the_ssh_program() {
    rekeyed("ssh");
}

/// A network of its own, with nothing in it but its loopback, which can be taken down.
struct Network(Child);

impl Network {
    fn new() -> Self {
        let mut command = std::process::Command::new("unshare");
        let mut holder = command
            .args([
                "--net",
                "sh",
                "-c",
                "ip link set lo up && echo up && exec cat",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 3];
        let out = holder.stdout.as_mut().unwrap();
        std::io::Read::read_exact(out, &mut said).expect("a network of its own");
        Self(holder)
    }

    /// What runs a command in it.
    fn enter(&self) -> Vec<String> {
        let pid = self.0.id().to_string();
        ["nsenter", "--net", "--target", &pid, "--"]
            .map(str::to_owned)
            .to_vec()
    }

    fn set(&self, sandbox: &Sandbox, to: &str) {
        let enter = self.enter().join(" ");
        sandbox.sh(
            &sandbox.root().join("outside"),
            &format!("{enter} ip link set lo {to}"),
        );
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// "Network namespaces with the link taken down": what is sent is lost without a word, and
/// later the network is there again.
#[test]
fn a_network_that_goes_down_comes_back() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make a network");
        return;
    }
    let mut sandbox = Sandbox::new();
    let network = Network::new();
    let enter = network.enter();
    let words: Vec<&str> = enter.iter().map(String::as_str).collect();
    let server = Server::start_with(&mut sandbox, "", &words);
    hurry(&mut sandbox, &server, 3);
    sandbox.sh(&sandbox.tree(), PROJECT);
    let url = server.direct_url(&sandbox.peer());
    let mount = format!(
        "{} '{}' mount '{}' '{url}'",
        enter.join(" "),
        sandbox.program().display(),
        sandbox.tree().display()
    );
    sandbox.sh(sandbox.root(), &mount);
    sandbox.flush();
    network.set(&sandbox, "down");
    sandbox.sh(&sandbox.tree(), "echo down >>docs/long; echo x >while-down");
    sandbox.status_becomes("the silence is noticed", |status| {
        status.peer().state != "connected" && status.peer().last_error.is_some()
    });
    sandbox.sh(&sandbox.tree(), "echo local work goes on >>docs/long");
    sandbox.try_flush().expect_code(4);
    network.set(&sandbox, "up");
    sandbox.connected();
    work_on_both(&sandbox, "up");
    assert!(sandbox.status().conflicts.is_empty());
}
