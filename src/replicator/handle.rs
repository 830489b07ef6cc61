//! The daemon's hold on a peer: what its task works with, what it tells, and what it can
//! be told.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mirrorfs_journal::{Contents, Journal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::reconcile::Policy;
use crate::transport::{ConnectError, Link};
use crate::tree::{Id, MirrorId, PeerId, RelPath, ReplicaId};

use super::Error;
use super::apply::LocalTree;
use super::brake::Brakes;
use super::driver::{Driver, lock};
use super::machine::Machine;
use super::round::{Resolution, Resume};

/// How a link to the peer is made. Called on a thread that may block.
pub type Connect = dyn Fn() -> Result<Link, ConnectError> + Send + Sync;

/// Everything a peer's task works with.
#[derive(Clone)]
pub struct Context {
    /// The mirror.
    pub mirror: MirrorId,
    /// This side's replica.
    pub replica: ReplicaId,
    /// The journal.
    pub journal: Journal,
    /// The mounted side's tree.
    pub tree: LocalTree,
    /// Makes a link.
    pub connect: Arc<Connect>,
    /// The peer.
    pub peer: PeerId,
    /// Which way changes travel.
    pub policy: Policy,
    /// Whether several peers are configured.
    pub name_artefacts: Arc<AtomicBool>,
    /// Text that was edited in different places merges by itself.
    pub merge: bool,
    /// Where small texts are kept as both sides agreed on them, if that can be had.
    pub contents: Option<Arc<Contents>>,
    /// Decide, tell, and change nothing on either side.
    pub dry_run: bool,
    /// How long nothing may be heard from the peer before its link is given up.
    pub deadline: Duration,
}

/// The state of a peer in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerState {
    /// In session.
    Connected,
    /// Being tried.
    Connecting,
    /// Tried without success; tried again later.
    Unreachable,
    /// Waits for a person's decision.
    Halted,
}

/// What a person sees of a peer.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub id: PeerId,
    /// Its state.
    pub state: PeerState,
    /// The transport in use or last used, and why that one.
    pub transport: Option<(String, String)>,
    /// The version of mirrorfs over there; none before it was met.
    pub version: Option<String>,
    /// Local changes up to here are on the peer.
    pub applied_seq: u64,
    /// Local changes up to here survive a power loss of the peer.
    pub durable_seq: u64,
    /// Bytes of the round under way that are still to be sent.
    pub pending_bytes: u64,
    /// Nothing is under way and nothing is known to be left.
    pub settled: bool,
    /// Why something does not go on.
    pub last_error: Option<String>,
    /// What a person has to decide.
    pub halt_reason: Option<String>,
    /// While a brake holds deletions here: the files that went before it was engaged.
    pub wiped: Vec<RelPath>,
    /// Paths with a problem, on either side.
    pub problems: Vec<(RelPath, String)>,
    /// Why the peer's directory is scanned instead of watched.
    pub degraded: Option<String>,
    /// In a dry run: what would be done.
    pub preview: Option<Vec<Preview>>,
}

/// One line of a dry run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Preview {
    /// What would happen: `push`, `pull`, `conflict` or `held`.
    pub action: &'static str,
    /// To what: `create`, `replace`, `metadata`, `delete`, `move`; the reason if held.
    pub change: String,
    /// Where.
    pub path: RelPath,
}

/// How a flush ended for one peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushOutcome {
    /// The peer durably holds everything that could be sent.
    Durable,
    /// The peer could not be reached.
    Unreachable,
    /// A brake is engaged or the session was refused.
    Halted,
    /// The peer's task has ended.
    Stopped,
}

/// What a task can be told.
pub(super) enum Control {
    Wake(u64),
    RetryNow,
    Redial,
    Flush {
        n: u64,
        answer: oneshot::Sender<FlushOutcome>,
    },
    Resolve {
        path: RelPath,
        resolution: Resolution,
    },
    Resume(Resume),
    Stop,
}

/// A driver for a peer as it is recorded, and where it tells how it is doing. `jitter`
/// spreads the reconnects of several peers.
pub(super) fn prepare(
    context: Context,
    jitter: u64,
) -> Result<(Driver, Arc<Mutex<PeerStatus>>), Error> {
    let snapshot = context.journal.snapshot()?;
    let Some(peer) = snapshot.peer(context.peer)? else {
        return Err(Error::UnknownPeer);
    };
    let brakes = Brakes::load(&snapshot, peer.id)?;
    drop(snapshot);
    let newest = context.journal.recorder().last();
    let machine =
        Machine::new(peer.cursor, peer.durable, newest, jitter).with_deadline(context.deadline);
    let status = Arc::new(Mutex::new(PeerStatus {
        id: peer.id,
        state: PeerState::Connecting,
        transport: None,
        version: None,
        applied_seq: peer.cursor,
        durable_seq: peer.durable,
        pending_bytes: 0,
        settled: false,
        last_error: None,
        halt_reason: brakes.reason(&peer.name),
        wiped: brakes.wiped().to_vec(),
        problems: Vec::new(),
        degraded: None,
        preview: None,
    }));
    let driver = Driver::new(context, machine, Arc::clone(&status));
    Ok((driver, status))
}

/// The daemon's hold on a peer's task.
pub struct Handle {
    control: mpsc::UnboundedSender<Control>,
    status: Arc<Mutex<PeerStatus>>,
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Handle {
    /// Starts the task within the current runtime.
    pub fn spawn(context: Context) -> Result<Self, Error> {
        let jitter = Id::random().map_err(|_| Error::Random)?.0[0];
        let journal = context.journal.clone();
        let (driver, status) = prepare(context, u64::from(jitter) + 1)?;
        let (control, controls) = mpsc::unbounded_channel();
        let waker = control.clone();
        // Runs on the journal's writer thread: only a wake.
        journal.on_commit(move |n| drop(waker.send(Control::Wake(n))));
        let task = tokio::spawn(driver.run(controls));
        Ok(Self {
            control,
            status,
            task: tokio::sync::Mutex::new(Some(task)),
        })
    }

    /// What a person sees of the peer.
    pub fn status(&self) -> PeerStatus {
        lock(&self.status).clone()
    }

    /// Tries at once what was put off.
    pub fn retry_now(&self) {
        let _ = self.control.send(Control::RetryNow);
    }

    /// Connects anew at once, also where a link seems to be up: there is a better one.
    pub fn redial(&self) {
        let _ = self.control.send(Control::Redial);
    }

    /// Goes on where a brake is engaged, once.
    pub fn resume(&self, resume: Resume) {
        let _ = self.control.send(Control::Resume(resume));
    }

    /// Settles a conflict in favour of one side.
    pub fn resolve(&self, path: RelPath, resolution: Resolution) {
        let _ = self.control.send(Control::Resolve { path, resolution });
    }

    /// Waits until the peer durably holds every change up to `n`, and everything that had
    /// changed over there has come in. Dropping the future gives up waiting.
    pub async fn flush(&self, n: u64) -> FlushOutcome {
        let (answer, outcome) = oneshot::channel();
        if self.control.send(Control::Flush { n, answer }).is_err() {
            return FlushOutcome::Stopped;
        }
        outcome.await.unwrap_or(FlushOutcome::Stopped)
    }

    /// Ends the task, and returns once it has ended. What was not shipped stays in the
    /// journal; a flush that is under way ends with [`FlushOutcome::Stopped`].
    pub async fn stop(&self) {
        let _ = self.control.send(Control::Stop);
        if let Some(task) = self.task.lock().await.take() {
            let _ = task.await;
        }
    }
}
