//! `mirrorfs status`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::{print, render};
use crate::daemon::control::{Client, Request, Response};
use crate::daemon::state::{MirrorDir, Record, StateDir};
use crate::daemon::{Exit, Failure, OrFail, attach, locate, report, status};

/// How long a daemon that is starting or ending is waited for, and how often it is looked
/// for meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// Show how a mirror is doing
///
/// The exit code is the gravest thing that holds: see mirrorfs --help.
#[derive(Args, Debug)]
pub(super) struct Status {
    /// Show the mirror of this directory; by default that of the working directory, or
    /// else all mirrors
    dir: Option<PathBuf>,
    /// Print one JSON object for each mirror
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let here = self.dir.as_deref().unwrap_or(Path::new("."));
        let (mirrors, attached) = match locate::find(&state, here)? {
            Some(found) => (vec![found], Vec::new()),
            None => match (attach::find(&state, here)?, &self.dir) {
                (Some(found), _) => (Vec::new(), vec![found]),
                (None, Some(dir)) => (vec![locate::require(&state, dir)?], Vec::new()),
                (None, None) => (state.all()?, attach::all(&state)?),
            },
        };
        if mirrors.is_empty() && attached.is_empty() {
            return Err(
                Failure::new("there are no mirrors").hint("mirrorfs mount DIR PEER makes one")
            );
        }
        let mut exit = Exit::Done;
        for (position, (dir, record)) in mirrors.iter().enumerate() {
            let status = of(dir, record)?;
            exit = exit.and(status.exit());
            if self.json {
                let text = serde_json::to_string_pretty(&status)
                    .or_fail(|| "cannot print the status".into())?;
                print(text);
            } else {
                if position > 0 {
                    print("");
                }
                print(render::status(&status).trim_end());
            }
        }
        for (dir, record) in &attached {
            let attachment = dir.status(record)?;
            exit = exit.and(attachment.state.exit());
            if self.json {
                let text = serde_json::to_string_pretty(&attachment);
                print(text.or_fail(|| "cannot print the status".into())?);
            } else {
                print(render::attachment(&attachment).trim_end());
            }
        }
        Ok(exit)
    }
}

/// The status of a mirror: from its daemon, or else from its journal.
pub(super) fn of(dir: &MirrorDir, record: &Record) -> Result<status::Status, Failure> {
    let Some(mut daemon) = reach(dir, record)? else {
        return report::unmounted(dir, record);
    };
    let answer = match daemon.call(Request::Status, None) {
        // It died while it was asked: what it left tells.
        Err(_) if Client::connect(dir.path())?.is_none() => match reach(dir, record)? {
            None => return report::unmounted(dir, record),
            Some(mut daemon) => daemon.call(Request::Status, None),
        },
        answer => answer,
    };
    match answer? {
        Response::Status(status) => Ok(*status),
        other => Err(unexpected(&other)),
    }
}

/// Connects to the daemon of a mirror; none if it has none. One that is just starting or
/// ending is waited for.
pub(super) fn reach(dir: &MirrorDir, record: &Record) -> Result<Option<Client>, Failure> {
    let begin = Instant::now();
    loop {
        if let Some(daemon) = Client::connect(dir.path())? {
            return Ok(Some(daemon));
        }
        let Some(pid) = dir.owner()? else {
            return Ok(None);
        };
        if begin.elapsed() > PATIENCE {
            return Err(busy(record, pid));
        }
        std::thread::sleep(LOOK);
    }
}

/// A process holds the mirror and does not listen.
fn busy(record: &Record, pid: Option<u32>) -> Failure {
    let who = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
    Failure::new(format!(
        "a mirrorfs process{who} is at work on {} and does not answer yet",
        record.tree.display()
    ))
    .hint("it is starting, ending, or exchanging a round without a mount: try again in a moment")
}

/// The daemon answered something else than what was asked.
pub(super) fn unexpected(response: &Response) -> Failure {
    Failure::new(format!(
        "the daemon gave an unexpected answer: {response:?}"
    ))
    .hint("it may be another version of mirrorfs: unmount and mount again")
}
