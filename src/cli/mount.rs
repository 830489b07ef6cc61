//! `mirrorfs mount`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Terminal, print};
use crate::daemon::announce::{Announce, Announcement};
use crate::daemon::site::Order;
use crate::daemon::state::{Mode, OnConflict};
use crate::daemon::{Exit, Failure, launch, run};
use crate::tree::links::Symlinks;

/// Mount a directory over itself, and mirror it to a peer
///
/// Returns once the mount is usable. Programs see the same files at the same place; every
/// change is recorded from then on and carried to the peers.
#[derive(Args, Clone, Debug)]
pub(super) struct Mount {
    /// Mount this directory
    dir: PathBuf,
    /// Mirror to this peer: a path, user@host:path, or ssh://user@host:port/path.
    /// Optional if the mirror has a peer already
    peer: Option<String>,
    /// Stay in the foreground, and log to standard error
    #[arg(long)]
    pub(super) foreground: bool,
    /// Call the mirror by this name; by default that of the directory
    #[arg(long)]
    name: Option<String>,
    /// Call the peer by this name; by default that of its host or directory
    #[arg(long, requires = "peer")]
    peer_name: Option<String>,
    /// Choose which changes travel; remembered for the next mount
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Choose what becomes of a file that both sides have edited: keep both versions, or
    /// merge text that was edited in different places; remembered for the next mount
    #[arg(long, value_enum)]
    conflict: Option<OnConflict>,
    /// Choose which symbolic links of the peers are taken in: all, or those that stay in the
    /// tree; remembered for the next mount
    #[arg(long, value_enum)]
    symlinks: Option<Symlinks>,
}

impl Mount {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if std::env::var_os("MIRRORFS_DISABLE").is_some_and(|value| value == "1") {
            print(format_args!(
                "mirrorfs is disabled (MIRRORFS_DISABLE=1): {} is not mounted",
                self.dir.display()
            ));
            return Ok(Exit::Done);
        }
        if self.foreground {
            return run::run(&self.order(), false, &mut Terminal);
        }
        let ready = launch::start(self.arguments(), &mut Terminal)?;
        Terminal.announce(Announcement::Ready(ready));
        Ok(Exit::Done)
    }

    /// What is to be done.
    pub(super) fn order(&self) -> Order {
        Order {
            dir: self.dir.clone(),
            peer: self.peer.clone(),
            peer_name: self.peer_name.clone(),
            name: self.name.clone(),
            mode: self.mode,
            conflict: self.conflict,
            symlinks: self.symlinks,
            mount: true,
            refill: false,
            dry_run: false,
        }
    }

    /// The same order for `mirrorfs daemon`.
    fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        let mut option = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                let mut argument = OsString::from(format!("--{name}="));
                argument.push(value);
                arguments.push(argument);
            }
        };
        option("name", self.name.clone().map(OsString::from));
        option("peer-name", self.peer_name.clone().map(OsString::from));
        let mode = self.mode.and_then(|mode| mode.to_possible_value());
        option("mode", mode.map(|mode| OsString::from(mode.get_name())));
        let conflict = self.conflict.and_then(|what| what.to_possible_value());
        option(
            "conflict",
            conflict.map(|what| OsString::from(what.get_name())),
        );
        let symlinks = self.symlinks.and_then(|which| which.to_possible_value());
        option(
            "symlinks",
            symlinks.map(|which| OsString::from(which.get_name())),
        );
        // A directory may be called `-x`.
        arguments.push("--".into());
        arguments.push(self.dir.clone().into());
        arguments.extend(self.peer.clone().map(OsString::from));
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        mount: Mount,
    }

    #[test]
    fn the_daemon_gets_the_same_order() {
        let line = [
            "mirrorfs",
            "--name=-n",
            "--peer-name",
            "host",
            "--mode",
            "push-only",
            "--conflict=merge",
            "--symlinks=safe",
            "--",
            "-dir",
            "h:p",
        ];
        let mount = Line::parse_from(line).mount;
        let again =
            Line::parse_from(std::iter::once(OsString::from("mirrorfs")).chain(mount.arguments()))
                .mount;
        assert_eq!(
            format!("{:?}", again.order()),
            format!("{:?}", mount.order())
        );
        assert_eq!(again.mode, Some(Mode::PushOnly));
        assert_eq!(again.conflict, Some(OnConflict::Merge));
        assert_eq!(again.symlinks, Some(Symlinks::Safe));
    }
}
