//! What was asked for.

use std::path::PathBuf;
use std::time::Duration;

/// See the usage in `main`.
pub struct Arguments {
    pub files: usize,
    pub edits: usize,
    pub pause: Duration,
    pub json: Option<PathBuf>,
    pub dir: PathBuf,
}

impl Arguments {
    pub fn parse(mut given: impl Iterator<Item = String>) -> Option<Self> {
        let mut arguments = Self {
            files: 100_000,
            edits: 1_000,
            pause: Duration::from_millis(50),
            json: None,
            dir: std::env::temp_dir(),
        };
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--files" => arguments.files = given.next()?.parse().ok().filter(|n| *n > 0)?,
                "--edits" => arguments.edits = given.next()?.parse().ok().filter(|n| *n > 0)?,
                "--pause" => {
                    arguments.pause = Duration::from_millis(given.next()?.parse().ok()?);
                }
                "--json" => arguments.json = Some(given.next()?.into()),
                "--dir" => arguments.dir = given.next()?.into(),
                // What cargo adds.
                "--bench" => {}
                _ => return None,
            }
        }
        Some(arguments)
    }
}
