//! `mirrorfs agent`.

use std::path::PathBuf;

use clap::Args;

use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail};

/// Serve a directory to a mount elsewhere (started on the peer by mirrorfs mount)
#[derive(Args, Debug)]
pub(super) struct Agent {
    /// Speak the protocol on standard input and output
    #[arg(long, required = true)]
    stdio: bool,
    /// Serve this directory
    root: PathBuf,
}

impl Agent {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        crate::agent::serve(
            &self.root,
            state.path(),
            std::io::stdin(),
            std::io::stdout(),
        )
        .or_fail(|| format!("cannot serve {}", self.root.display()))?;
        Ok(Exit::Done)
    }
}
