//! Ratios, for people and for programs.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::workloads::Workload;

/// The times of one workload, pair by pair.
pub struct Measured {
    pub native: Vec<Duration>,
    pub mounted: Vec<Duration>,
}

/// What was measured so far. Each line is printed as soon as it is known.
pub struct Report {
    peer: bool,
    pairs: usize,
    channel: String,
    rows: Vec<Value>,
}

impl Report {
    pub fn new(peer: bool, pairs: usize, channel: String) -> Self {
        println!("served through {channel}");
        println!(
            "{} pairs, {}; milliseconds are medians, the ratio is the median of the pairs'\n",
            pairs,
            if peer {
                "a local peer is mirrored to"
            } else {
                "no peer can be reached"
            }
        );
        println!(
            "{:<34} {:>10} {:>10} {:>7} {:>13} {:>6}",
            "workload", "native ms", "mount ms", "ratio", "(range)", "goal"
        );
        Self {
            peer,
            pairs,
            channel,
            rows: Vec::new(),
        }
    }

    pub fn add(&mut self, workload: &Workload, measured: &Measured) {
        let mut ratios: Vec<f64> = measured
            .native
            .iter()
            .zip(&measured.mounted)
            .map(|(native, mounted)| mounted.as_secs_f64() / native.as_secs_f64())
            .collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[ratios.len() / 2];
        let (native, mounted) = (median(&measured.native), median(&measured.mounted));
        let (low, high) = (ratios[0], ratios[ratios.len() - 1]);
        println!(
            "{:<34} {native:>10.2} {mounted:>10.2} {ratio:>7.2} {:>13} {:>6}{}",
            workload.name,
            format!("{low:.2}-{high:.2}"),
            workload.goal,
            if ratio > workload.goal { " !" } else { "" }
        );
        self.rows.push(json!({
            "workload": workload.name,
            "native_ms": native,
            "mount_ms": mounted,
            "ratio": ratio,
            "ratios": ratios,
            "goal": workload.goal,
        }));
    }

    pub fn left_out(&mut self, name: &str, program: &str) {
        println!("{name:<34} left out: {program} is not there");
    }

    pub fn finish(self, json: Option<&Path>) {
        let Some(path) = json else { return };
        let report = json!({
            "pairs": self.pairs,
            "peer": self.peer,
            "channel": self.channel,
            "workloads": self.rows,
        });
        std::fs::write(path, format!("{report:#}\n")).unwrap();
    }
}

fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}
