//! `mirrorfs recover`.

use std::path::PathBuf;

use clap::Args;

use super::print;
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail};

/// Finish what an interrupted agent had begun to apply to a peer directory
///
/// To be run on the peer when the other side is gone: after it, the directory is the
/// mirrored tree as it was at one moment.
#[derive(Args, Debug)]
pub(super) struct Recover {
    /// Recover this peer directory
    dir: PathBuf,
}

impl Recover {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let name = self.dir.display();
        let finished = crate::agent::recover(&self.dir, state.path())
            .or_fail(|| format!("cannot recover {name}"))?;
        print(if finished {
            format!("{name}: an interrupted batch was finished; the directory is whole")
        } else {
            format!("{name} is whole: nothing had been interrupted")
        });
        Ok(Exit::Done)
    }
}
