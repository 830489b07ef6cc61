//! The peer side: serves a directory to the mounted side over a byte stream.
//!
//! It applies the batches it is given, reports what it sees change, and hands out
//! contents. It decides nothing, and it trusts nobody: what comes over the stream is
//! bounded and checked before it is used, and reaches the disk beneath the directory's
//! descriptor only.

mod fetch;
mod hello;
pub(crate) mod lock;
mod observer;
mod offer;
mod root;
mod session;
mod silence;
#[cfg(test)]
mod tests;
mod watch;

#[cfg(test)]
pub(crate) use session::simulated::Stepped;

use std::fmt::Display;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mirrorfs_journal::index::{IndexError, PeerIndex};

use crate::replica::apply::{Applier, ApplyError};
use crate::replica::{self, Reserved, Staging};
use crate::scratch::Scratch;
use crate::tree::ReplicaId;
use crate::tree::links::Symlinks;
use crate::wire::frame::FrameError;
use crate::wire::message::Refusal;

/// Why a session ended, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: String,
        /// How it failed.
        source: std::io::Error,
    },
    /// The session was refused, and the other side has been told.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// Another agent serves the directory and does not let go.
    #[error("another agent{} serves this directory: end it first", pid.map_or_else(String::new, |pid| format!(" (process {pid})")))]
    Locked {
        /// Its process, as far as it is known.
        pid: Option<i32>,
    },
    /// The directory has never been served.
    #[error("{path} is no peer directory: it has no .mirrorfs")]
    NotAPeer {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is not where it was.
    #[error("{path} was removed, replaced or unmounted: nothing about it is reported any more")]
    RootGone {
        /// The directory.
        path: PathBuf,
    },
    /// A newer session serves the directory.
    #[error("a newer session took over")]
    Fenced,
    /// The other side broke the rules of the protocol.
    #[error("the mounted side broke the protocol: {0}")]
    Protocol(String),
    /// The stream failed.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The link is gone.
    #[error("the link to the mounted side is gone")]
    Disconnected,
    /// The link may be there, but nothing comes over it.
    #[error("nothing was heard from the mounted side for too long: it is gone, or its link is")]
    Silent,
    /// The directory's `.mirrorfs` failed.
    #[error("{0}")]
    Replica(#[from] replica::Error),
    /// The index failed.
    #[error("{0}")]
    Index(#[from] IndexError),
    /// A batch was interrupted.
    #[error("{0}")]
    Apply(#[from] ApplyError),
}

impl Error {
    fn io(action: &'static str, path: impl Display, source: impl Into<std::io::Error>) -> Self {
        Self::Io {
            action,
            path: path.to_string(),
            source: source.into(),
        }
    }
}

/// Serves the directory `root` until the other side ends the session. What the agent
/// must remember lies in `state`, below `agents/`, one directory for each replica. The
/// other side is given up when it is silent for longer than `deadline`, and of its symbolic
/// links those are made that `symlinks` says.
pub fn serve(
    root: &Path,
    state: &Path,
    deadline: Duration,
    symlinks: Symlinks,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), Error> {
    let mut opened = hello::meet(root, state, None, input, output)?;
    opened.served.symlinks = symlinks;
    session::run(opened, deadline)
}

/// The same for a dry run: a directory that has never been served is as it was afterwards,
/// and so is `state`.
pub fn look(
    root: &Path,
    state: &Path,
    deadline: Duration,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), Error> {
    let scratch = Scratch::new().map_err(|error| Error::io("make", "a directory", error))?;
    let opened = hello::meet(root, state, Some(&scratch), input, output)?;
    session::run(opened, deadline)
}

/// Completes what an interrupted agent had begun to apply to a directory, with nobody at
/// the other end. Says whether there was anything to complete.
pub fn recover(root: &Path, state: &Path) -> Result<bool, Error> {
    let served = root::Served::open(root, state, false)?;
    let Some((reserved, identity)) = Reserved::open(served.root.fd())? else {
        return Err(Error::NotAPeer {
            path: root.to_owned(),
        });
    };
    let _lock = lock::Lock::take_free(&reserved)?;
    let mut index = open_index(&served, state, identity.replica)?;
    let staging = Staging::new(&reserved)?;
    let outcome = applier(&served, &reserved, &staging, &mut index).recover()?;
    if let Some(outcome) = &outcome {
        renew(&mut index, outcome)?;
    }
    Ok(outcome.is_some())
}

/// Where what is remembered of a replica lies.
fn index_dir(state: &Path, replica: ReplicaId) -> PathBuf {
    state.join("agents").join(replica.to_string())
}

fn open_index(served: &root::Served, state: &Path, replica: ReplicaId) -> Result<PeerIndex, Error> {
    use std::os::unix::fs::DirBuilderExt;
    let dir = index_dir(state, replica);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(|error| Error::io("create", dir.display(), error))?;
    Ok(PeerIndex::open(&dir, &served.identity(replica)?)?)
}

fn applier<'a>(
    served: &'a root::Served,
    reserved: &'a Reserved,
    staging: &'a Staging,
    index: &'a mut PeerIndex,
) -> Applier<'a> {
    Applier {
        root: &served.root,
        reserved,
        staging,
        index,
        symlinks: served.symlinks,
        #[cfg(test)]
        hook: crate::sim::hook::take(),
    }
}

/// Makes sure that what is at paths where something unforeseen was found is reported,
/// whether the index knows it already or not.
fn renew(index: &mut PeerIndex, outcome: &replica::apply::Outcome) -> Result<(), IndexError> {
    index.transaction(mirrorfs_journal::index::Durable::Process, |index| {
        outcome
            .recheck
            .iter()
            .try_for_each(|path| index.renew(path))
    })
}
