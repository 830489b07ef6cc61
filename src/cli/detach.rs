//! `mirrorfs detach`.

use std::path::PathBuf;

use clap::Args;

use super::print;
use super::status::unexpected;
use crate::daemon::control::{Client, Request, Response};
use crate::daemon::lock::Lock;
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail, attach};

/// End what mirrorfs attach keeps up
///
/// Flushes nothing: mirrorfs sync DIR --flush before it does. The mount goes on, and keeps
/// its changes for when the directory is attached again.
#[derive(Args, Debug)]
pub(super) struct Detach {
    /// Detach this directory
    dir: PathBuf,
}

impl Detach {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let name = self.dir.display();
        let not = || Failure::new(format!("{name} is not attached to any mount"));
        let Some((dir, record)) = attach::find(&state, &self.dir)? else {
            return Err(not());
        };
        let Some(mut process) = Client::connect(dir.path())? else {
            return Err(not());
        };
        match process.call(Request::Detach, None)? {
            Response::Detaching => {
                Lock::wait_until_free(&dir.lock())
                    .or_fail(|| format!("cannot wait for {}", dir.lock().display()))?;
                print(format_args!(
                    "{} is detached from {}",
                    record.dir, record.to
                ));
                Ok(Exit::Done)
            }
            other => Err(unexpected(&other)),
        }
    }
}
