//! `mirrorfs resume`.

use std::path::PathBuf;

use clap::Args;

use super::print;
use super::status::{reach, unexpected};
use crate::daemon::control::{Request, Response};
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, locate};

/// Go on where a safety brake holds something back
///
/// mirrorfs status says what is held back, and why. Without a switch, a peer that was
/// halted (because another directory is in its place, say) is taken as it is, and compared
/// with this side in full.
#[derive(Args, Debug)]
pub(super) struct Resume {
    /// Resume the mirror of this directory
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Bring back what is missing on one side from the other
    #[arg(long, conflicts_with = "allow_deletions")]
    refill: bool,
    /// Delete on both sides what is missing on one
    #[arg(long)]
    allow_deletions: bool,
    /// Only for the peer of this name
    #[arg(long, value_name = "NAME")]
    peer: Option<String>,
}

impl Resume {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let (dir, record) = locate::require(&state, &self.dir)?;
        let tree = record.tree.display();
        let Some(mut daemon) = reach(&dir, &record)? else {
            return Err(Failure::new(format!("{tree} is not mounted"))
                .hint(format!("mirrorfs mount {tree} mounts it")));
        };
        let request = Request::Resume {
            peer: self.peer,
            allow_deletions: self.allow_deletions,
        };
        match daemon.call(request, None)? {
            Response::Resumed { peers: 0 } => Err(Failure::new("there is no such peer")
                .hint(format!("mirrorfs status {tree} lists the peers"))),
            Response::Resumed { .. } => {
                print(if self.allow_deletions {
                    "going on: what is missing on one side is deleted on the other"
                } else {
                    "going on: what is missing on one side is brought back from the other"
                });
                Ok(Exit::Done)
            }
            other => Err(unexpected(&other)),
        }
    }
}
