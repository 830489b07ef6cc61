//! What a mount costs: each workload on the disk itself and in the mount, in turn, in one
//! run. Prints a table of ratios and writes them as JSON.
//!
//! ```text
//! cargo bench --bench mount -- [--peer] [--pairs N] [--json FILE] [--dir DIR] [FILTER]
//! ```
//!
//! Needs root (for the caches to be dropped), `git`, `tar` and `rg`; what is not there is
//! left out and named. FILTER chooses workloads by parts of their names, with commas between
//! them; a build of this whole project is measured only if it is named. With `--peer` a local directory is mirrored to while the workloads
//! run; without, the peer cannot be reached and changes stay in the journal.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod arguments;
mod place;
mod report;
mod workloads;

use std::time::Duration;

use arguments::Arguments;
use place::Bench;
use report::{Measured, Report};

fn main() {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1)) else {
        eprintln!(
            "cargo bench --bench mount -- [--peer] [--pairs N] [--json FILE] [--dir DIR] [FILTER]"
        );
        std::process::exit(2);
    };
    let bench = Bench::new(&arguments);
    let mut report = Report::new(arguments.peer, arguments.pairs, bench.channel());
    for workload in workloads::all() {
        if !arguments.selects(workload.name, workload.only_named) {
            continue;
        }
        if let Some(program) = workload
            .needs
            .iter()
            .find(|program| !place::is_there(program))
        {
            report.left_out(workload.name, program);
            continue;
        }
        let mut times: [Vec<Duration>; 2] = Default::default();
        for pair in 0..arguments.pairs {
            // Which of the two comes first changes, so that neither gains by it.
            for at in [pair % 2, 1 - pair % 2] {
                let place = bench.place(at);
                (workload.prepare)(&place);
                if workload.cold {
                    place::drop_caches();
                }
                times[at].push((workload.run)(&place));
                place.clear();
            }
        }
        let [native, mounted] = times;
        report.add(&workload, &Measured { native, mounted });
    }
    report.finish(arguments.json.as_deref());
}
