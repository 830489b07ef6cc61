//! `mirrorfs door`: the helper of a daemon that changes the tree through the mount.

use clap::Args;

use crate::daemon::{Exit, Failure, OrFail};

/// Make a daemon's changes through its mount (started by mirrorfs daemon)
#[derive(Args, Debug)]
pub(super) struct Door;

impl Door {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        crate::door::process::run().or_fail(|| "the door process failed".into())?;
        Ok(Exit::Done)
    }
}
