//! "A bad link is normal": slow, far, silent, cut in every way, and made again. And:
//! "what is in flight is sized by the link, not by the buffers of ssh".

use std::fs;

use crate::support::proxy::Way;
use crate::support::{PROMPT, Random, Sandbox, Server, assert_same, wait_until};

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
