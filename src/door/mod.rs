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
pub mod units;

use std::collections::BTreeMap;
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
use units::{Held, Ordered};

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

    /// Makes changes in the tree, in this order, each whatever becomes of the others, and
    /// tells what became of each.
    pub fn apply(
        &mut self,
        filesystem: &Filesystem,
        operations: Vec<(DoorOp, Origin)>,
    ) -> Vec<DoorResult> {
        let alone = |(op, origin)| Ordered {
            op,
            origin,
            unit: None,
        };
        self.apply_in_units(filesystem, operations.into_iter().map(alone).collect())
    }

    /// The same for changes of which several make a unit. A unit is not begun if it is known
    /// beforehand that one of it will be refused, and ends with the first that is.
    pub fn apply_in_units(
        &mut self,
        filesystem: &Filesystem,
        operations: Vec<Ordered>,
    ) -> Vec<DoorResult> {
        let mut held = Held::default();
        let mut known = self.obstacles(filesystem, &operations);
        for (at, reason) in &known {
            held.refused(&operations[*at], reason);
        }
        let mut results = Vec::with_capacity(operations.len());
        let mut operations = operations.into_iter().enumerate().peekable();
        while operations.peek().is_some() {
            // What becomes of each of them, in their order; none for those of the batch.
            let mut slots: Vec<Option<DoorResult>> = Vec::new();
            let mut batch = Vec::new();
            while batch.len() < BATCH
                && let Some((at, operation)) = operations.next()
            {
                let refused = known.remove(&at).or_else(|| held.reason(&operation));
                slots.push(refused.map(|reason| DoorResult::Refused { reason }));
                if slots.last().is_some_and(Option::is_none) {
                    batch.push(operation);
                }
            }
            let mut applied = self.apply_batch(filesystem, &batch).into_iter();
            let mut ordered = batch.iter();
            for slot in slots {
                results.push(match slot {
                    Some(result) => result,
                    None => {
                        let result = applied.next().unwrap_or(DoorResult::Refused {
                            reason: NOT_REACHED.into(),
                        });
                        if let (Some(operation), DoorResult::Refused { reason }) =
                            (ordered.next(), &result)
                        {
                            held.refused(operation, reason);
                        }
                        result
                    }
                });
            }
        }
        results
    }

    /// Which operations of units of several are going to be refused, as far as that can be
    /// seen, by their position.
    fn obstacles(
        &mut self,
        filesystem: &Filesystem,
        operations: &[Ordered],
    ) -> BTreeMap<usize, String> {
        let mut obstacles = BTreeMap::new();
        let mut probed = Vec::new();
        for at in units::of_several(operations) {
            let op = &operations[at].op;
            if filesystem.is_overtaken(op) {
                obstacles.insert(at, OVERTAKEN.to_owned());
            } else if units::displaces(op) {
                probed.push(at);
            }
        }
        for chunk in probed.chunks(BATCH) {
            let request = Request::Probe {
                dir: self.dir.as_os_str().as_bytes().to_vec(),
                device: self.device,
                paths: chunk
                    .iter()
                    .map(|at| operations[*at].op.path().clone())
                    .collect(),
            };
            match self.ask(None, &request) {
                Ok(Reply::Probed(open)) => obstacles.extend(
                    chunk
                        .iter()
                        .zip(open)
                        .filter(|(_, open)| *open)
                        .map(|(at, _)| (*at, OPEN_FOR_WRITING.to_owned())),
                ),
                // Each operation looks for itself once more.
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "the door process is started anew"),
            }
        }
        obstacles
    }

    fn apply_batch(&mut self, filesystem: &Filesystem, batch: &[Ordered]) -> Vec<DoorResult> {
        if batch.is_empty() {
            return Vec::new();
        }
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
            .map(|ordered| filesystem.register(ordered.op.clone(), ordered.origin))
            .collect();
        let operations: Vec<_> = batch
            .iter()
            .map(|ordered| (ordered.op.clone(), ordered.unit))
            .collect();
        let request = Request::Apply {
            dir: self.dir.as_os_str().as_bytes().to_vec(),
            device: self.device,
            greeting,
            operations,
        };
        let outcomes = match self.ask(Some(filesystem), &request) {
            Ok(Reply::Applied(outcomes)) => outcomes,
            Ok(Reply::Refused(reason)) => vec![Outcome::Failed(reason); batch.len()],
            Ok(Reply::Settled(_) | Reply::Probed(_)) => {
                vec![Outcome::Failed("an answer to nothing".into())]
            }
            Err(error) => {
                tracing::warn!("{error}");
                vec![Outcome::Failed(error.to_string()); batch.len()]
            }
        };
        let outcomes = outcomes
            .into_iter()
            .chain(std::iter::repeat(Outcome::Failed(NOT_REACHED.into())));
        tickets
            .iter()
            .zip(batch)
            .zip(outcomes)
            .map(|((ticket, ordered), outcome)| conclude(filesystem, ticket, &ordered.op, outcome))
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
            Reply::Applied(_) | Reply::Probed(_) => {
                Err(DoorError::Mount("an answer to nothing".into()))
            }
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
        (Outcome::Held(by), _) => DoorResult::Refused {
            reason: units::held_by(&by),
        },
        (Outcome::Failed(reason), _) => DoorResult::Refused { reason },
    }
}

/// The reason of what comes after an operation at which the door ended.
const NOT_REACHED: &str = "the door did not get to it";
/// The reason of what was decided on before the last change of what is there.
const OVERTAKEN: &str = "it was changed meanwhile";

/// The reason of a refusal that is worth trying again: a program has the file open.
pub const OPEN_FOR_WRITING: &str = "open for writing";
