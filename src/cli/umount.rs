//! `mirrorfs umount`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::status::{reach, unexpected};
use super::sync::patience;
use super::{complain, duration, print, render};
use crate::daemon::control::{Flushed, Request, Response};
use crate::daemon::lock::Lock;
use crate::daemon::mounts::{self, Mounts};
use crate::daemon::state::{MirrorDir, Record, StateDir};
use crate::daemon::{Exit, Failure, OrFail, holders, locate};

/// Flush what can be flushed, and unmount
///
/// The directory then is plain files. The exit code tells what could not be flushed; what
/// is pending stays in the journal for the next mount.
#[derive(Args, Debug)]
pub(super) struct Umount {
    /// Unmount the mirror of this directory
    dir: PathBuf,
    /// Flush for at most this time
    #[arg(long, value_parser = duration::parse, default_value = "30s")]
    timeout: Duration,
}

impl Umount {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let (dir, record) = locate::require(&state, &self.dir)?;
        let Some(mut daemon) = reach(&dir, &record)? else {
            return without_daemon(&record);
        };
        let request = Request::Unmount {
            timeout_ms: duration::millis(self.timeout),
        };
        match daemon.call(request, Some(patience(self.timeout)))? {
            Response::Unmounted { flushed, failures } => {
                // The journal is closed by now; the lock goes with the process.
                Lock::wait_until_free(&dir.lock())
                    .or_fail(|| format!("cannot wait for {}", dir.lock().display()))?;
                match failed(&record, failures) {
                    None => Ok(unmounted(&record, &flushed)),
                    Some(failure) => Err(failure),
                }
            }
            Response::Busy { flushed, error } => Err(in_use(&dir, &record, &flushed, &error)),
            other => Err(unexpected(&other)),
        }
    }
}

/// Says that a tree is unmounted, and that this is all that went well.
fn failed(record: &Record, failures: Vec<Failure>) -> Option<Failure> {
    if failures.is_empty() {
        return None;
    }
    let tree = record.tree.display();
    let mut failure = Failure::new(format!(
        "{tree} is unmounted and plain files, but not everything was flushed"
    ));
    for each in failures {
        failure.causes.push(each.message);
        failure.causes.extend(each.causes);
    }
    Some(failure.hint(format!(
        "nothing that was acknowledged is lost: mirrorfs mount {tree} scans it and sends what is missing"
    )))
}

fn unmounted(record: &Record, flushed: &Flushed) -> Exit {
    let exit = flushed.left();
    if exit != Exit::Done {
        complain(&render::flushed(flushed).trim_end());
    }
    print(format_args!(
        "{} is unmounted{}",
        record.tree.display(),
        match exit {
            Exit::Done if flushed.peers.is_empty() => "; it has no peers",
            Exit::Done => "; the peers durably hold everything",
            _ => "; what could not be exchanged is listed above and stays in the journal",
        }
    ));
    exit
}

fn in_use(dir: &MirrorDir, record: &Record, flushed: &Flushed, error: &str) -> Failure {
    let tree = record.tree.display();
    if flushed.left() != Exit::Done {
        complain(&render::flushed(flushed).trim_end());
    }
    let mut failure = Failure::new(format!("cannot unmount {tree}"));
    // The daemon and its helper reach the tree by descriptors of the covered directory,
    // whose paths look the same.
    let daemon = dir.owner().ok().flatten().flatten();
    let holders = holders::of(&record.tree)
        .into_iter()
        .filter(|holder| Some(holder.pid) != daemon && holders::parent(holder.pid) != daemon);
    failure.causes = holders.take(10).map(|holder| holder.to_string()).collect();
    if failure.causes.is_empty() {
        failure.causes.push(error.to_owned());
    }
    failure.hint("leave the directory (cd) or end these programs, then try again; the mount stays until then")
}

/// There is no daemon: nothing is mounted, or its daemon died.
fn without_daemon(record: &Record) -> Result<Exit, Failure> {
    let tree = record.tree.display();
    if mounts::is_dead(&record.tree) {
        crate::fuse::clear_dead_mount(&record.tree)
            .or_fail(|| format!("cannot clear the dead mount at {tree}"))
            .map_err(|failure| failure.hint(format!("unmount it by hand: umount -l {tree}")))?;
        return Err(Failure::new(format!(
            "{tree} is unmounted and plain files, but its daemon had died and nothing was flushed"
        ))
        .hint(format!(
            "mirrorfs mount {tree} recovers and sends what is pending"
        )));
    }
    let mounted = Mounts::read()
        .ok()
        .and_then(|mounts| mounts.at(&record.tree).cloned())
        .is_some_and(|mount| mount.is_mirrorfs());
    if mounted {
        return Err(Failure::new(format!(
            "{tree} is mounted by a daemon that keeps its state elsewhere"
        ))
        .hint("run the command as the user who mounted it, with the same MIRRORFS_STATE"));
    }
    Err(Failure::new(format!("{tree} is not mounted")).hint(format!("see mirrorfs status {tree}")))
}
