//! `mirrorfs attach`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Terminal;
use crate::daemon::announce::{Announce, Announcement};
use crate::daemon::launch::{self, Pipe};
use crate::daemon::{Exit, Failure, attach};
use crate::tree::links::Symlinks;

/// Make a directory of this machine a peer of a mount on another
///
/// This machine makes the connection, and makes it again whenever it breaks, for as long as
/// the command runs. The mount goes on without it.
#[derive(Args, Clone, Debug)]
pub(super) struct Attach {
    /// Attach to the mount here: user@vm:dir, or ssh://user@vm:port/dir
    mount: String,
    /// Attach this directory; it is made if it does not exist
    dir: PathBuf,
    /// Go on in the background; mirrorfs status DIR and mirrorfs detach DIR are for it
    #[arg(long)]
    detach: bool,
    /// Call this peer by this name over there; by default that of this machine
    #[arg(long)]
    name: Option<String>,
    /// Choose which symbolic links of the mount are made here: all, or those that stay in
    /// the directory
    #[arg(long, value_enum, default_value_t = Symlinks::Safe)]
    symlinks: Symlinks,
}

impl Attach {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if !self.detach {
            return attach::run(&self.order(), false, &mut Terminal);
        }
        let last = launch::spawn("attached", self.arguments(), &mut Terminal)?;
        Terminal.announce(last);
        Ok(Exit::Done)
    }

    fn order(&self) -> attach::Order {
        attach::Order {
            to: self.mount.clone(),
            dir: self.dir.clone(),
            name: self.name.clone(),
            symlinks: self.symlinks,
        }
    }

    /// The same order for `mirrorfs attached`.
    fn arguments(&self) -> Vec<OsString> {
        let name = self.name.as_ref().map(|name| format!("--name={name}"));
        let symlinks = self.symlinks.to_possible_value();
        let symlinks = symlinks.map(|which| format!("--symlinks={}", which.get_name()));
        name.into_iter()
            .chain(symlinks)
            .map(OsString::from)
            .chain([
                "--".into(),
                self.mount.clone().into(),
                self.dir.clone().into(),
            ])
            .collect()
    }
}

/// Keep a directory attached in the background (started by mirrorfs attach --detach)
#[derive(Args, Debug)]
pub(super) struct Attached {
    #[command(flatten)]
    order: Attach,
}

impl Attached {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut pipe = Pipe::detach()?;
        match attach::run(&self.order.order(), true, &mut pipe) {
            Ok(exit) => Ok(exit),
            Err(failure) => {
                let exit = failure.exit;
                pipe.announce(Announcement::Failed(failure));
                Ok(exit)
            }
        }
    }
}
