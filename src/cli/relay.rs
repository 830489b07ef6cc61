//! `mirrorfs relay`: what `mirrorfs attach` starts beside a mount.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::Args;

use super::status::reach;
use crate::daemon::control::{Client, Response};
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail, locate};

/// Lead a connection to the daemon of a mount (started there by mirrorfs attach)
#[derive(Args, Debug)]
pub(super) struct Relay {
    /// Relay standard input and output
    #[arg(long, required = true)]
    stdio: bool,
    /// Relay to the daemon of the mount at this directory
    dir: PathBuf,
}

impl Relay {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.daemon().and_then(|daemon| relay(&daemon)) {
            Ok(()) => Ok(Exit::Done),
            Err(failure) => {
                // Whoever calls reads one answer, and prints it to a person.
                let exit = failure.exit;
                let mut line = serde_json::to_vec(&Response::Failed(failure))
                    .or_fail(|| "cannot answer".into())?;
                line.push(b'\n');
                let written = std::io::stdout().write_all(&line);
                written.or_fail(|| "cannot answer".into())?;
                Ok(exit)
            }
        }
    }

    fn daemon(&self) -> Result<UnixStream, Failure> {
        let state = StateDir::find()?;
        let (dir, record) = locate::require(&state, &self.dir)?;
        let tree = record.tree.display();
        // One that is just starting is waited for.
        let daemon = match reach(&dir, &record)? {
            Some(_) => Client::raw(dir.path())?,
            None => None,
        };
        daemon.ok_or_else(|| {
            Failure::new(format!("{tree} is not mounted there"))
                .hint(format!("on that machine: mirrorfs mount {tree}"))
                .exit(Exit::Unreachable)
        })
    }
}

/// Copies both ways until the daemon ends the connection, which it does when the other
/// side has.
fn relay(daemon: &UnixStream) -> Result<(), Failure> {
    let message = || "the connection to the daemon failed".to_owned();
    let to_daemon = daemon.try_clone().or_fail(message)?;
    std::thread::Builder::new()
        .name("relay".into())
        .spawn(move || {
            let copied = copy(&mut std::io::stdin().lock(), &mut &to_daemon);
            if let Err(error) = copied {
                tracing::debug!(%error, "the caller or the daemon is gone");
            }
            // The daemon sees the end, and ends the other direction.
            let _ = to_daemon.shutdown(Shutdown::Write);
        })
        .or_fail(message)?;
    // Not through std's buffer, which would wait for the end of a line.
    let output = std::io::stdout().as_fd().try_clone_to_owned();
    let mut output = File::from(output.or_fail(message)?);
    copy(&mut &*daemon, &mut output).or_fail(message)
}

/// Passes on at once whatever comes in.
fn copy(input: &mut impl Read, output: &mut impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => output.write_all(&buffer[..length])?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
