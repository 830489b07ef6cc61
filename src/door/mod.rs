//! The door: changes from peers enter the tree through the mount, by ordinary system
//! calls of a small process that does not hold the FUSE descriptor.
//!
//! A process that holds the descriptor and waits for its own mount cannot be killed;
//! this one can. So the kernel's caches stay right and programs that watch the tree
//! see what they would see of any other program.

mod mappings;
pub mod process;
mod protocol;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mirrorfs_journal::Origin;

use crate::fs::{DoorOp, DoorResult, Filesystem, Ticket};
use crate::tree::RelPath;
use protocol::{Outcome, Reply, Request};

pub use protocol::Settled;

/// The hidden command that runs [`process::run`].
pub const COMMAND: &str = "door";

/// Operations sent at a time.
const BATCH: usize = 256;

/// Why the door is shut.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The process cannot be started.
    #[error("cannot start the door process: {0}")]
    Start(#[source] io::Error),
    /// It is gone, or the mount does not answer it.
    #[error("the door process is gone: {0}")]
    Gone(#[source] io::Error),
    /// The mount is not there.
    #[error("the mount cannot be entered: {0}")]
    Mount(String),
}

type Launch = Box<dyn Fn() -> Command + Send + Sync>;

/// The client of the door process, which it starts, and starts again when it died.
pub struct Door {
    dir: PathBuf,
    device: u64,
    launch: Launch,
    running: Option<Running>,
}

struct Running {
    child: Child,
    socket: UnixStream,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door")
            .field("dir", &self.dir)
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}

impl Door {
    /// Starts a door into the mount at a directory, whose device number it checks
    /// before each batch: after an unmount the same path is lower.
    pub fn start(dir: &Path, device: u64) -> Result<Self, DoorError> {
        Self::start_with(dir, device, || {
            // Not the path of the program: that may have been replaced by an upgrade.
            let mut command = Command::new("/proc/self/exe");
            command.arg(COMMAND);
            command
        })
    }

    /// Starts a door by another command. It gets the socket as standard input and has
    /// to call [`process::run`].
    pub fn start_with(
        dir: &Path,
        device: u64,
        launch: impl Fn() -> Command + Send + Sync + 'static,
    ) -> Result<Self, DoorError> {
        let mut door = Self {
            dir: dir.to_path_buf(),
            device,
            launch: Box::new(launch),
            running: None,
        };
        door.running()?;
        Ok(door)
    }

    /// The process's number, if it was started.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.child.id())
    }

    fn running(&mut self) -> Result<&mut Running, DoorError> {
        match &mut self.running {
            Some(running) => Ok(running),
            vacant => {
                let (ours, theirs) = UnixStream::pair().map_err(DoorError::Start)?;
                let child = (self.launch)()
                    .stdin(Stdio::from(OwnedFd::from(theirs)))
                    .stdout(Stdio::null())
                    // Not to be hit by what the terminal sends to the daemon's group.
                    .process_group(0)
                    .spawn()
                    .map_err(DoorError::Start)?;
                Ok(vacant.insert(Running {
                    child,
                    socket: ours,
                }))
            }
        }
    }

    /// Makes changes in the tree, in this order, and tells what became of each.
    pub fn apply(
        &mut self,
        filesystem: &Filesystem,
        operations: Vec<(DoorOp, Origin)>,
    ) -> Vec<DoorResult> {
        let mut results = Vec::with_capacity(operations.len());
        let mut operations = operations.into_iter().peekable();
        while operations.peek().is_some() {
            let batch: Vec<_> = operations.by_ref().take(BATCH).collect();
            results.extend(self.apply_batch(filesystem, batch));
        }
        results
    }

    fn apply_batch(
        &mut self,
        filesystem: &Filesystem,
        batch: Vec<(DoorOp, Origin)>,
    ) -> Vec<DoorResult> {
        // A process that died while idle is no reason to refuse anything.
        if let Some(running) = &mut self.running
            && !matches!(running.child.try_wait(), Ok(None))
        {
            filesystem.door_gone();
            self.running = None;
        }
        let greeting = match filesystem.expect_door() {
            Ok(greeting) => greeting,
            Err(error) => {
                let reason = format!("no random numbers: {error}");
                return vec![DoorResult::Refused { reason }; batch.len()];
            }
        };
        let tickets: Vec<Ticket> = batch
            .iter()
            .map(|(operation, origin)| filesystem.register(operation.clone(), *origin))
            .collect();
        let operations: Vec<DoorOp> = batch.into_iter().map(|(operation, _)| operation).collect();
        let request = Request::Apply {
            dir: self.dir.as_os_str().as_bytes().to_vec(),
            device: self.device,
            greeting,
            operations: operations.clone(),
        };
        let outcomes = match self.ask(Some(filesystem), &request) {
            Ok(Reply::Applied(outcomes)) => outcomes,
            Ok(Reply::Refused(reason)) => vec![Outcome::Failed(reason); operations.len()],
            Ok(Reply::Settled(_)) => vec![Outcome::Failed("an answer to nothing".into())],
            Err(error) => {
                tracing::warn!("{error}");
                vec![Outcome::Failed(error.to_string()); operations.len()]
            }
        };
        let outcomes = outcomes
            .into_iter()
            .chain(std::iter::repeat(Outcome::Failed(
                "the door did not get to it".into(),
            )));
        tickets
            .iter()
            .zip(&operations)
            .zip(outcomes)
            .map(|((ticket, operation), outcome)| conclude(filesystem, ticket, operation, outcome))
            .collect()
    }

    /// Has what programs stored through shared mappings written back, so that it is
    /// in lower and in the journal: of every file that any process has mapped. Where a
    /// process cannot be looked at, of every file that the kernel has pages of.
    pub fn settle_mappings(&mut self, filesystem: &Filesystem) -> Result<Settled, DoorError> {
        let mut settled = self.settle(None)?;
        if settled.unseen == 0 {
            return Ok(settled);
        }
        for paths in filesystem.paged_files().chunks(BATCH) {
            let more = self.settle(Some(paths.to_vec()))?;
            settled.files += more.files;
            settled.failed.extend(more.failed);
        }
        Ok(settled)
    }

    fn settle(&mut self, paths: Option<Vec<RelPath>>) -> Result<Settled, DoorError> {
        let request = Request::Settle {
            dir: self.dir.as_os_str().as_bytes().to_vec(),
            device: self.device,
            everybody: rustix::process::geteuid().is_root(),
            paths,
        };
        // Asked twice it does no harm, and a door that was killed is no reason to tell
        // somebody that his mappings cannot be had.
        let answer = match self.ask(None, &request) {
            Err(DoorError::Gone(error)) => {
                tracing::debug!(%error, "the door process is started anew");
                self.ask(None, &request)
            }
            other => other,
        };
        match answer? {
            Reply::Settled(settled) => Ok(settled),
            Reply::Refused(reason) => Err(DoorError::Mount(reason)),
            Reply::Applied(_) => Err(DoorError::Mount("an answer to nothing".into())),
        }
    }

    /// Sends a request and waits for the answer.
    fn ask(
        &mut self,
        filesystem: Option<&Filesystem>,
        request: &Request,
    ) -> Result<Reply, DoorError> {
        let running = self.running()?;
        let answer = protocol::send(&mut running.socket, request)
            .and_then(|()| protocol::receive(&mut running.socket));
        // Before it can end and be waited for: then somebody else may get its number.
        if let Some(filesystem) = filesystem {
            filesystem.door_gone();
        }
        answer.map_err(|error| {
            self.shut();
            DoorError::Gone(error)
        })
    }

    fn shut(&mut self) {
        if let Some(mut running) = self.running.take() {
            // It holds no FUSE descriptor, so a kill ends it wherever it waits.
            let ended = running.child.kill().and_then(|()| running.child.wait());
            if let Err(error) = ended {
                tracing::debug!(%error, "the door process had ended");
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.shut();
    }
}

fn conclude(
    filesystem: &Filesystem,
    ticket: &Ticket,
    operation: &DoorOp,
    outcome: Outcome,
) -> DoorResult {
    match (outcome, ticket.result()) {
        (Outcome::Done, _) => filesystem.settle(ticket),
        // Refused by the handler, which knows why.
        (_, Some(refused @ DoorResult::Refused { .. })) => refused,
        // It took effect, and only the answer was lost. Of metadata only a part may
        // have.
        (_, Some(done)) if !matches!(operation, DoorOp::SetMeta { .. }) => done,
        (Outcome::OpenForWriting, _) => DoorResult::Refused {
            reason: OPEN_FOR_WRITING.into(),
        },
        (Outcome::Failed(reason), _) => DoorResult::Refused { reason },
    }
}

/// The reason of a refusal that is worth trying again: a program has the file open.
pub const OPEN_FOR_WRITING: &str = "open for writing";
