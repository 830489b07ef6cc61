//! What was asked for.

use std::path::PathBuf;

/// See the usage in `main`.
pub struct Arguments {
    pub peer: bool,
    pub pairs: usize,
    pub json: Option<PathBuf>,
    pub dir: PathBuf,
    filter: Option<String>,
}

impl Arguments {
    pub fn parse(mut given: impl Iterator<Item = String>) -> Option<Self> {
        let mut arguments = Self {
            peer: false,
            pairs: 5,
            json: None,
            dir: std::env::temp_dir(),
            filter: None,
        };
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--peer" => arguments.peer = true,
                "--pairs" => arguments.pairs = given.next()?.parse().ok().filter(|n| *n > 0)?,
                "--json" => arguments.json = Some(given.next()?.into()),
                "--dir" => arguments.dir = given.next()?.into(),
                // What cargo adds.
                "--bench" => {}
                other if other.starts_with('-') => return None,
                filter => arguments.filter = Some(filter.to_owned()),
            }
        }
        Some(arguments)
    }

    /// Whether a workload is to be run; one that is `only_named` not by a filter that
    /// leaves it open.
    pub fn selects(&self, name: &str, only_named: bool) -> bool {
        match &self.filter {
            None => !only_named,
            Some(filter) => filter.split(',').any(|part| name.contains(part)),
        }
    }
}
