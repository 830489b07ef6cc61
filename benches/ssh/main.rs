//! Throughput of the two SSH transports, libssh2 and the ssh program, to a real sshd on
//! loopback, in turn, in one run. Prints a line for each direction, with the ratio.
//!
//! ```text
//! cargo bench --bench ssh -- [--rounds N] [--mib N]
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

#[path = "../../tests/support/sshd.rs"]
mod sshd;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use mirrorfs::transport::{Choice, ConnectOptions, Link, PeerUrl, connect};
use sshd::Sshd;

const TRANSPORTS: [Choice; 2] = [Choice::Libssh2, Choice::Ssh];

/// A way for bytes to go, with what is at the other end of it.
struct Direction {
    name: &'static str,
    agent: fn(u64) -> String,
    pass: fn(&mut Link, u64),
}

const DIRECTIONS: [Direction; 2] = [
    Direction {
        name: "to the peer",
        agent: |bytes| format!("head -c {bytes} >/dev/null; exec echo done"),
        pass: |link, bytes| {
            let block = vec![7; 1 << 20];
            for _ in 0..bytes / block.len() as u64 {
                link.stream.write_all(&block).unwrap();
            }
            let mut answer = [0; 4];
            link.stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"done");
        },
    },
    Direction {
        name: "from the peer",
        agent: |bytes| format!("read go; exec head -c {bytes} /dev/zero"),
        pass: |link, bytes| {
            link.stream.write_all(b"go\n").unwrap();
            let mut block = vec![0; 1 << 20];
            for _ in 0..bytes / block.len() as u64 {
                link.stream.read_exact(&mut block).unwrap();
            }
        },
    },
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: u64| {
        arguments
            .iter()
            .position(|argument| argument == name)
            .map_or(default, |at| arguments[at + 1].parse().expect("a number"))
    };
    let (rounds, bytes) = (number("--rounds", 7), number("--mib", 256) << 20);
    let server = Sshd::start();
    println!("{} MiB, median of {rounds} rounds, in MiB/s", bytes >> 20);
    for direction in DIRECTIONS {
        let script = server.script("agent", &(direction.agent)(bytes));
        let mut times: [Vec<Duration>; 2] = Default::default();
        for round in 0..rounds {
            // Which of the two comes first changes, so that neither gains by it.
            for at in 0..2 {
                let at = usize::try_from(round).unwrap().wrapping_add(at) % 2;
                let options = ConnectOptions {
                    choice: TRANSPORTS[at],
                    ssh_config: Some(server.path("ssh_config")),
                    known_hosts: Some(server.path("known_hosts")),
                    identity: Some(server.path("client_key")),
                    agent: Some(script.to_str().unwrap().to_owned()),
                    ..ConnectOptions::default()
                };
                let url = PeerUrl::parse(&server.url("/peer")).unwrap();
                let mut link = connect(&url, &options).unwrap();
                let begin = Instant::now();
                (direction.pass)(&mut link, bytes);
                times[at].push(begin.elapsed());
            }
        }
        let [libssh2, ssh] = times.map(|mut times| {
            times.sort();
            (bytes >> 20) as f64 / times[times.len() / 2].as_secs_f64()
        });
        println!(
            "{:14} libssh2 {libssh2:5.0}   ssh {ssh:5.0}   ratio {:.2}",
            direction.name,
            libssh2 / ssh
        );
    }
}
