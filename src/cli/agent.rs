//! `mirrorfs agent`.

use std::path::PathBuf;

use clap::Args;

use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail};
use crate::transport::deadline_from_env;
use crate::tree::links::Symlinks;

/// Serve a directory to a mount elsewhere (started on the peer by mirrorfs mount)
#[derive(Args, Debug)]
pub(super) struct Agent {
    /// Speak the protocol on standard input and output
    #[arg(long, required = true)]
    stdio: bool,
    /// Make all symbolic links, or only those that stay in the directory
    #[arg(long, value_enum, default_value_t)]
    symlinks: Symlinks,
    /// Serve this directory
    root: PathBuf,
}

/// Show a directory to a dry run elsewhere, and change nothing in it (started on the peer by
/// mirrorfs sync --dry-run)
#[derive(Args, Debug)]
pub(super) struct Look {
    #[command(flatten)]
    agent: Agent,
}

impl Look {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        self.agent.serve(true)
    }
}

impl Agent {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        self.serve(false)
    }

    fn serve(self, for_a_look: bool) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let deadline = deadline_from_env().or_fail(|| "cannot use the environment".into())?;
        let (input, output) = (std::io::stdin(), std::io::stdout());
        let served = if for_a_look {
            crate::agent::look(&self.root, state.path(), deadline, input, output)
        } else {
            let root = &self.root;
            crate::agent::serve(root, state.path(), deadline, self.symlinks, input, output)
        };
        served.or_fail(|| format!("cannot serve {}", self.root.display()))?;
        Ok(Exit::Done)
    }
}
