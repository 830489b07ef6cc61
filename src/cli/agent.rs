//! `mirrorfs agent`.

use std::path::PathBuf;

use clap::Args;

use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail};
use crate::transport::deadline_from_env;

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
        let deadline = deadline_from_env().or_fail(|| "cannot use the environment".into())?;
        crate::agent::serve(
            &self.root,
            state.path(),
            deadline,
            std::io::stdin(),
            std::io::stdout(),
        )
        .or_fail(|| format!("cannot serve {}", self.root.display()))?;
        Ok(Exit::Done)
    }
}
