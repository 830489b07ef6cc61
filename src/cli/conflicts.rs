//! `mirrorfs conflicts`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::print;
use super::status::{of, reach, unexpected};
use crate::daemon::control::{Request, Response};
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail, locate};
use crate::tree::RelPath;

/// List open conflicts, or settle one
#[derive(Args, Debug)]
pub(super) struct Conflicts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List the conflicts that are open
    List {
        /// Of the mirror of this directory
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Settle the conflict at a path: one side's version wins, the other goes to the trash
    Resolve {
        /// The file in conflict
        path: PathBuf,
        /// This side's version wins over the version of the peer that is on record
        #[arg(long, required_unless_present = "remote")]
        local: bool,
        /// The peer's version wins
        #[arg(long, conflicts_with = "local")]
        remote: bool,
    },
}

impl Conflicts {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.action {
            Action::List { dir, json } => list(&dir, json),
            Action::Resolve { path, remote, .. } => resolve(&path, remote),
        }
    }
}

fn list(dir: &Path, json: bool) -> Result<Exit, Failure> {
    let state = StateDir::find()?;
    let (mirror, record) = locate::require(&state, dir)?;
    let conflicts = of(&mirror, &record)?.conflicts;
    if json {
        let text = serde_json::to_string_pretty(&conflicts)
            .or_fail(|| "cannot print the conflicts".into())?;
        print(text);
    } else {
        for conflict in &conflicts {
            match &conflict.copy {
                Some(copy) => print(format_args!("{}  (theirs: {copy})", conflict.path)),
                None => print(&conflict.path),
            }
        }
    }
    Ok(if conflicts.is_empty() {
        Exit::Done
    } else {
        Exit::Conflicts
    })
}

fn resolve(path: &Path, remote: bool) -> Result<Exit, Failure> {
    let state = StateDir::find()?;
    let path = std::path::absolute(path).or_fail(|| format!("no path: {}", path.display()))?;
    let (name, parent) = match (path.file_name(), path.parent()) {
        (Some(name), Some(parent)) => (name, parent),
        _ => return Err(Failure::new(format!("{} names no file", path.display()))),
    };
    // The file itself may be gone; the directory it is in tells the mirror.
    let (mirror, record) = locate::require(&state, parent)?;
    let parent = std::fs::canonicalize(parent)
        .or_fail(|| format!("cannot find the directory {}", parent.display()))?;
    let below = parent.join(name);
    let below = below
        .strip_prefix(&record.tree)
        .or_fail(|| format!("{} is not in {}", path.display(), record.tree.display()))?;
    let below = std::os::unix::ffi::OsStrExt::as_bytes(below.as_os_str());
    let below = RelPath::new(below).or_fail(|| format!("no path: {}", path.display()))?;
    let Some(mut daemon) = reach(&mirror, &record)? else {
        let tree = record.tree.display();
        return Err(Failure::new(format!("{tree} is not mounted"))
            .hint(format!("mirrorfs mount {tree} mounts it")));
    };
    match daemon.call(
        Request::Resolve {
            path: below,
            remote,
        },
        None,
    )? {
        Response::Resolving => {
            print(if remote {
                "the peer's version wins; this side's goes to .mirrorfs/trash"
            } else {
                "this side's version wins over the peer's version on record"
            });
            Ok(Exit::Done)
        }
        other => Err(unexpected(&other)),
    }
}
