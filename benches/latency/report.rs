//! Distributions, for people and for programs.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::arguments::Arguments;

/// What is printed of a distribution, with the goal in milliseconds if there is one.
const QUANTILES: [(&str, f64, Option<f64>); 5] = [
    ("min", 0.0, None),
    ("median", 0.5, Some(10.0)),
    ("p90", 0.9, None),
    ("p99", 0.99, Some(50.0)),
    ("max", 1.0, None),
];

/// What was measured so far. Each line is printed as soon as it is known.
pub struct Report {
    files: usize,
    edits: usize,
    rows: Vec<Value>,
}

impl Report {
    pub fn new(arguments: &Arguments) -> Self {
        println!(
            "{} files, {} edits in each direction; from close(2) to the new content, in milliseconds\n",
            arguments.files, arguments.edits
        );
        print!("{:<16}", "direction");
        for (name, _, goal) in QUANTILES {
            let goal = goal.map_or(String::new(), |goal| format!(" (<{goal})"));
            print!(" {:>14}", format!("{name}{goal}"));
        }
        println!("   load");
        Self {
            files: arguments.files,
            edits: arguments.edits,
            rows: Vec::new(),
        }
    }

    pub fn add(&mut self, direction: &str, mut times: Vec<Duration>) {
        times.sort();
        let at = |quantile: f64| {
            let last = times.len() - 1;
            times[(last as f64 * quantile).round() as usize].as_secs_f64() * 1000.0
        };
        let mut row = json!({ "direction": direction });
        print!("{direction:<16}");
        for (name, quantile, goal) in QUANTILES {
            let time = at(quantile);
            let missed = goal.is_some_and(|goal| time > goal);
            print!(
                " {:>14}",
                format!("{time:.2}{}", if missed { " !" } else { "" })
            );
            row[format!("{name}_ms")] = json!(time);
        }
        let load = load();
        println!("   {load}");
        row["load"] = json!(load);
        row["times_ms"] = times
            .iter()
            .map(|time| json!(time.as_secs_f64() * 1000.0))
            .collect();
        self.rows.push(row);
    }

    pub fn finish(self, json: Option<&Path>) {
        let Some(path) = json else { return };
        let report = json!({
            "files": self.files,
            "edits": self.edits,
            "directions": self.rows,
        });
        std::fs::write(path, format!("{report:#}\n")).unwrap();
    }
}

/// The load of the machine over the last minutes, which is what else the times depend on.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    load.split(' ').take(2).collect::<Vec<_>>().join(" ")
}
