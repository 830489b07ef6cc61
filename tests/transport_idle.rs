//! A link that has nothing to do, or can do nothing, must not use the processor. In a
//! process of its own, whose processor time is that of one link.

#![cfg(feature = "libssh2")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    unreachable_pub,
    reason = "what is in support/ is used by several tests"
)]

#[path = "support/sshd.rs"]
mod sshd;

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::Duration;

use mirrorfs::transport::{Choice, ConnectOptions, Link, PeerUrl, connect};
use rustix::time::{ClockId, clock_gettime};
use sshd::Sshd;

/// How long each state is watched.
const WATCHED: Duration = Duration::from_millis(700);
/// What a link may use meanwhile: a tenth.
const ALLOWED: Duration = Duration::from_millis(70);

fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap()
}

fn assert_quiet(state: &str) {
    let before = processor_time();
    thread::sleep(WATCHED);
    let used = processor_time() - before;
    assert!(used < ALLOWED, "{state}: {used:?} of {WATCHED:?}");
    println!("{state}: {used:?}");
}

/// Writes until nothing more is taken.
fn fill(link: &mut Link) {
    link.stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let block = vec![0; 1 << 16];
    loop {
        match link.stream.write(&block) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_link_that_waits_uses_no_processor() {
    let server = Sshd::start();
    let open = |body: &str| {
        let options = ConnectOptions {
            choice: Choice::Libssh2,
            ssh_config: Some(server.path("ssh_config")),
            agent: Some(server.script("agent", body).to_str().unwrap().to_owned()),
            ..ConnectOptions::default()
        };
        let url = PeerUrl::parse(&server.url("/peer")).unwrap();
        connect(&url, &options).unwrap_or_else(|error| panic!("{error}"))
    };

    let mut link = open("exec cat");
    assert_quiet("nothing to do");
    link.stream.write_all(b"x").unwrap();
    link.stream.read_exact(&mut [0]).unwrap();
    assert_quiet("nothing left to do");
    fill(&mut link);
    assert_quiet("nobody reads what the agent echoes");
    drop(link);

    let mut link = open("exec sleep 20");
    fill(&mut link);
    assert_quiet("the agent does not read");
    link.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_quiet("the agent does not read, and nothing more will be written");
    link.stream.shutdown(std::net::Shutdown::Both).unwrap();
    assert_quiet("the caller has shut its end down");
    drop(link);

    let mut link = open("exec cat");
    server.pause();
    fill(&mut link);
    assert_quiet("the server is stopped");
    drop(link);
    server.resume();
}
