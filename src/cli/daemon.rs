//! `mirrorfs daemon`: what `mirrorfs mount` starts in the background.

use clap::Args;

use super::mount::Mount;
use crate::daemon::announce::{Announce, Announcement};
use crate::daemon::launch::Pipe;
use crate::daemon::{Exit, Failure, run};

/// Serve a mount in the background (started by mirrorfs mount)
#[derive(Args, Debug)]
pub(super) struct Daemon {
    #[command(flatten)]
    mount: Mount,
}

impl Daemon {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut pipe = Pipe::detach()?;
        match run::run(&self.mount.order(), true, &mut pipe) {
            Ok(exit) => Ok(exit),
            Err(failure) => {
                let exit = failure.exit;
                pipe.announce(Announcement::Failed(failure));
                Ok(exit)
            }
        }
    }
}
