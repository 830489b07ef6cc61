//! The command line: one file per command.

mod agent;
mod attach;
mod conflicts;
mod daemon;
mod demo;
mod detach;
mod doctor;
mod door;
mod duration;
mod log;
mod mount;
mod peer;
mod recover;
mod relay;
mod render;
mod resume;
mod status;
mod sync;
mod trash;
mod umount;

use std::fmt::Display;
use std::io::Write;

use clap::{Parser, Subcommand};

use crate::daemon::announce::{Announce, Announcement};
use crate::daemon::{Exit, Failure};

/// Work in a local directory, and have every change carried to another machine.
///
/// Exit codes: 0 done; 1 error, or a file that could not be mirrored; 2 usage;
/// 3 conflicts open; 4 peer unreachable (changes are safe in the journal); 5 timed out
/// with changes pending; 6 a safety brake is engaged.
#[derive(Parser, Debug)]
#[command(
    name = "mirrorfs",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Mount(mount::Mount),
    Status(status::Status),
    Sync(sync::Sync),
    Umount(umount::Umount),
    Conflicts(conflicts::Conflicts),
    Log(log::Log),
    Trash(trash::Trash),
    Resume(resume::Resume),
    Peer(peer::Peer),
    Attach(attach::Attach),
    Detach(detach::Detach),
    Doctor(doctor::Doctor),
    Agent(agent::Agent),
    Recover(recover::Recover),
    Demo(demo::Demo),
    #[command(hide = true)]
    Look(agent::Look),
    #[command(hide = true)]
    Daemon(daemon::Daemon),
    #[command(hide = true)]
    Attached(attach::Attached),
    #[command(hide = true)]
    Relay(relay::Relay),
    #[command(hide = true)]
    Door(door::Door),
}

impl Cli {
    /// What is logged unless `MIRRORFS_LOG` says otherwise.
    pub fn log_level(&self) -> &'static str {
        match &self.command {
            Command::Daemon(_) | Command::Door(_) | Command::Attached(_) => "info",
            Command::Mount(mount) if mount.foreground => "info",
            Command::Sync(sync) if sync.verbose => "info,mirrorfs::replicator::driver=debug",
            _ => "warn",
        }
    }

    /// Does what was asked for.
    pub fn run(self) -> Result<Exit, Failure> {
        match self.command {
            Command::Mount(command) => command.run(),
            Command::Status(command) => command.run(),
            Command::Sync(command) => command.run(),
            Command::Umount(command) => command.run(),
            Command::Conflicts(command) => command.run(),
            Command::Log(command) => command.run(),
            Command::Trash(command) => command.run(),
            Command::Resume(command) => command.run(),
            Command::Peer(command) => command.run(),
            Command::Attach(command) => command.run(),
            Command::Detach(command) => command.run(),
            Command::Attached(command) => command.run(),
            Command::Relay(command) => command.run(),
            Command::Doctor(command) => command.run(),
            Command::Agent(command) => command.run(),
            Command::Look(command) => command.run(),
            Command::Recover(command) => command.run(),
            Command::Demo(command) => command.run(),
            Command::Daemon(command) => command.run(),
            Command::Door(command) => command.run(),
        }
    }
}

/// Prints a line on standard output. That nobody reads it any more (`| head`) is no
/// error.
fn print(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints a line on standard error.
pub fn complain(line: &dyn Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says to a person what a starting daemon announces.
struct Terminal;

impl Announce for Terminal {
    fn announce(&mut self, announcement: Announcement) {
        match announcement {
            Announcement::Note(note) => complain(&format_args!("mirrorfs: {note}")),
            Announcement::Warning(warning) => complain(&format_args!("warning: {warning}")),
            Announcement::Ready(ready) => print(ready),
            Announcement::Attached(attachment) => print(attachment),
            Announcement::Failed(failure) => complain(&failure),
            // Whoever has a terminal to say things on asks by itself.
            Announcement::Ask(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_is_in_the_imperative_and_complete() {
        for command in Cli::command().get_subcommands() {
            let about = command
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(!about.is_empty(), "{} has no help", command.get_name());
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {} has no help",
                    command.get_name(),
                    argument.get_id()
                );
            }
        }
    }
}
