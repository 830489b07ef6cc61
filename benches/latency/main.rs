//! How long an edit takes to the other side: from `close(2)` on one side until the other one
//! shows the new content, edit by edit, first from the mount to a peer behind a real sshd on
//! loopback, then back. Prints the distribution of each direction, and writes it as JSON.
//!
//! ```text
//! cargo bench --bench latency -- [--files N] [--edits N] [--pause MS] [--json FILE] [--dir DIR]
//! ```
//!
//! Needs `/usr/sbin/sshd`, which is started with keys and a port of its own. The tree holds
//! so many FILES (100,000), and so many EDITS (1,000) are made in each direction: a file
//! chosen at random is rewritten as an editor does that saves in place. The next one follows
//! when the last has arrived, after a pause of up to twice as long as said (50 ms).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod arguments;
mod edits;
mod place;
mod report;
#[path = "../../tests/support/sshd.rs"]
mod sshd;

use arguments::Arguments;
use edits::Edits;
use place::Place;
use report::Report;

fn main() {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1)) else {
        eprintln!(
            "cargo bench --bench latency -- [--files N] [--edits N] [--pause MS] [--json FILE] [--dir DIR]"
        );
        std::process::exit(2);
    };
    let place = Place::new(&arguments);
    let mut report = Report::new(&arguments);
    let mut edits = Edits::new(&place, &arguments);
    for (name, from, to) in [
        ("mount to peer", place.tree(), place.peer()),
        ("peer to mount", place.peer(), place.tree()),
    ] {
        report.add(name, edits.measure(&from, &to));
    }
    report.finish(arguments.json.as_deref());
}
