//! `mirrorfs resume`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::status::{reach, unexpected};
use super::sync::{place_of, say};
use super::{Terminal, print};
use crate::daemon::control::{Request, Response};
use crate::daemon::once::{self, Round};
use crate::daemon::site::Order;
use crate::daemon::state::{MirrorDir, Record, StateDir};
use crate::daemon::{Exit, Failure, locate};
use crate::replicator::Resume as Resumed;

/// How long a round without a mount may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Go on where a safety brake holds something back
///
/// mirrorfs status says what is held back, and why. Without a switch, a peer that was
/// halted (because another directory is in its place, say) is taken as it is, and compared
/// with this side in full. Where the tree is not mounted, a round is exchanged as by mirrorfs
/// sync, with that order.
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
            return self.unmounted(&dir, &record);
        };
        let request = Request::Resume {
            peer: self.peer.clone(),
            allow_deletions: self.allow_deletions,
        };
        match daemon.call(request, None)? {
            Response::Resumed { peers: 0 } => Err(Failure::new("there is no such peer")
                .hint(format!("mirrorfs status {tree} lists the peers"))),
            Response::Resumed { .. } => {
                print(self.going_on());
                Ok(Exit::Done)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn going_on(&self) -> &'static str {
        if self.allow_deletions {
            "going on: what is missing on one side is deleted on the other"
        } else {
            "going on: what is missing on one side is brought back from the other"
        }
    }

    /// One round, by this process.
    fn unmounted(&self, dir: &MirrorDir, record: &Record) -> Result<Exit, Failure> {
        let peer = match &self.peer {
            Some(name) => Some(place_of(dir, record, name)?),
            None => None,
        };
        let order = Order {
            dir: record.tree.clone(),
            peer,
            refill: !self.allow_deletions,
            ..Order::default()
        };
        let round = Round {
            mode: None,
            timeout: TIMEOUT,
            dry_run: false,
            force: false,
            resume: Some(match self.allow_deletions {
                true => Resumed::AllowDeletions,
                false => Resumed::Refill,
            }),
        };
        let report = once::run(&order, &round, &mut Terminal)?;
        print(self.going_on());
        Ok(report.flushed.map_or(report.exit, |flushed| say(&flushed)))
    }
}
