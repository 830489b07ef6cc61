//! The peers of a mounted tree, each with its replicator task.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use mirrorfs_journal::{Peer, View};

use parking_lot::Mutex;

use super::control::{Outcome, PeerFlushed};
use super::failure::{Failure, OrFail};
use super::report;
use super::site::Site;
use super::state::{Mode, OnConflict};
use super::status::{self, PeerState};
use crate::reconcile::Policy;
use crate::replicator::{Connect, Resolution, Resume};
use crate::replicator::{
    Context, FlushOutcome, Handle, LocalTree, PeerState as ReplicatorState, PeerStatus,
};
use crate::transport::{self, Link, PeerUrl, Serve};
use crate::tree::{PeerId, RelPath};

/// A peer and the task that serves it.
struct Served {
    id: PeerId,
    name: String,
    url: String,
    handle: Handle,
    /// A link that the peer has made and that nobody has taken up yet.
    made: Made,
}

/// Where a link lies that was made from the other side.
type Made = Arc<Mutex<Option<Link>>>;

impl Served {
    /// Waits until the peer durably holds all changes up to `n`.
    async fn reach(&self, n: u64, patience: Duration) -> Outcome {
        match tokio::time::timeout(patience, self.handle.flush(n)).await {
            Ok(FlushOutcome::Durable) => Outcome::Durable,
            Ok(FlushOutcome::Unreachable) => Outcome::Unreachable,
            Ok(FlushOutcome::Halted) => Outcome::Halted,
            Ok(FlushOutcome::Stopped) => Outcome::Failed,
            Err(_) => Outcome::TimedOut,
        }
    }
}

/// All peers of a mount. They come and go while it is mounted; whoever waits for one of
/// them holds up nobody else.
#[derive(Default)]
pub struct Peers {
    served: Mutex<Vec<Arc<Served>>>,
    /// Whether artefacts of conflicts need the peer's name.
    several: Arc<AtomicBool>,
    /// The mount is ending: no further peer is served.
    closed: AtomicBool,
}

impl Peers {
    /// Starts a task for each peer that is configured. To be called in a runtime.
    pub fn start(site: &Site, tree: &LocalTree) -> Result<Self, Failure> {
        Self::start_some(site, tree, None, false)
    }

    /// Starts a task for one peer only, or for all, and has them only tell what they
    /// would do if it is a dry run.
    pub fn start_some(
        site: &Site,
        tree: &LocalTree,
        only: Option<PeerId>,
        dry_run: bool,
    ) -> Result<Self, Failure> {
        let peers = Self::default();
        let configured = site.peers()?;
        peers.several.store(configured.len() > 1, Ordering::Relaxed);
        for peer in configured {
            if only.is_none_or(|only| only == peer.id) {
                peers.spawn(site, tree, peer, dry_run)?;
            }
        }
        Ok(peers)
    }

    /// Starts the tasks again after [`Peers::stop`].
    pub fn restart(&self, site: &Site, tree: &LocalTree) -> Result<(), Failure> {
        self.closed.store(false, Ordering::Relaxed);
        for peer in site.peers()? {
            self.spawn(site, tree, peer, false)?;
        }
        Ok(())
    }

    /// Starts a task for a peer that has just been configured, unless it has one.
    pub fn add(&self, site: &Site, tree: &LocalTree, peer: PeerId) -> Result<(), Failure> {
        let configured = site.peers()?;
        if configured.len() > 1 {
            self.several.store(true, Ordering::Relaxed);
        }
        let known = self.served.lock().iter().any(|served| served.id == peer);
        match configured.into_iter().find(|found| found.id == peer) {
            Some(peer) if !known => self.spawn(site, tree, peer, false),
            _ => Ok(()),
        }
    }

    fn spawn(
        &self,
        site: &Site,
        tree: &LocalTree,
        peer: Peer,
        dry_run: bool,
    ) -> Result<(), Failure> {
        let mut options = transport::ConnectOptions::from_env()
            .or_fail(|| "cannot use the settings of the transport in the environment".into())?;
        if dry_run {
            options.serve = Serve::Look;
        }
        let url =
            PeerUrl::parse(&peer.url).or_fail(|| format!("cannot use the peer {}", peer.name))?;
        let deadline = options.deadline;
        let made = Made::default();
        let connect: Arc<Connect> = {
            let made = Arc::clone(&made);
            Arc::new(move || match made.lock().take() {
                Some(link) => Ok(link),
                None => transport::connect(&url, &options),
            })
        };
        let mut served = self.served.lock();
        if self.closed.load(Ordering::Relaxed) {
            return Err(Failure::new("the mount is just being ended")
                .hint("mount it again, then try again"));
        }
        let context = Context {
            mirror: site.identity.mirror,
            replica: site.identity.replica,
            journal: site.journal.clone(),
            tree: tree.clone(),
            connect,
            peer: peer.id,
            policy: policy(site.record.mode),
            merge: site.record.conflict == OnConflict::Merge,
            contents: site.contents.clone(),
            name_artefacts: Arc::clone(&self.several),
            dry_run,
            deadline,
        };
        let handle =
            Handle::spawn(context).or_fail(|| format!("cannot serve the peer {}", peer.name))?;
        served.push(Arc::new(Served {
            id: peer.id,
            name: peer.name,
            url: peer.url,
            handle,
            made,
        }));
        Ok(())
    }

    /// Where a peer is taken to be by its task, if it has one.
    pub fn url(&self, peer: PeerId) -> Option<String> {
        let all = self.served.lock();
        let found = all.iter().find(|known| known.id == peer)?;
        Some(found.url.clone())
    }

    /// Has a peer's task go on over a link that the peer has made. It replaces whatever
    /// link there is: the peer would not have made it if that were good.
    pub fn take_link(&self, peer: PeerId, link: Link) {
        let all = self.all();
        if let Some(peer) = all.iter().find(|known| known.id == peer) {
            *peer.made.lock() = Some(link);
            peer.handle.redial();
        }
    }

    /// Ends the task of one peer, if it has one.
    pub async fn remove(&self, peer: PeerId) {
        let found = {
            let mut served = self.served.lock();
            let at = served.iter().position(|known| known.id == peer);
            at.map(|at| served.remove(at))
        };
        if let Some(peer) = found {
            peer.handle.stop().await;
        }
    }

    /// Ends all tasks, and serves no further peer. What was not shipped stays in the
    /// journal.
    pub async fn stop(&self) {
        let all = {
            let mut served = self.served.lock();
            self.closed.store(true, Ordering::Relaxed);
            std::mem::take(&mut *served)
        };
        join(all.iter().map(|peer| peer.handle.stop()).collect()).await;
    }

    fn all(&self) -> Vec<Arc<Served>> {
        self.served.lock().clone()
    }

    /// Tries at once what was put off; the names of the peers.
    pub fn retry(&self) -> Vec<String> {
        self.all()
            .iter()
            .map(|peer| {
                peer.handle.retry_now();
                peer.name.clone()
            })
            .collect()
    }

    /// Goes on where a brake is engaged; how many peers that concerns, and which files had
    /// been deleted here before it was engaged.
    pub fn resume(&self, only: Option<&str>, resume: Resume) -> (usize, Vec<RelPath>) {
        let (mut count, mut wiped) = (0, Vec::new());
        for peer in self.all() {
            if only.is_none_or(|name| name == peer.name) {
                wiped.extend(peer.handle.status().wiped);
                peer.handle.resume(resume);
                count += 1;
            }
        }
        (count, wiped)
    }

    /// Settles a conflict with the peer it is with, and waits until that was tried; none
    /// if nobody serves the peer.
    pub async fn resolve(
        &self,
        peer: PeerId,
        path: RelPath,
        resolution: Resolution,
        n: u64,
        patience: Duration,
    ) -> Option<Outcome> {
        let all = self.all();
        let peer = all.iter().find(|known| known.id == peer)?;
        peer.handle.resolve(path, resolution);
        // A flush ends after a round that knows of everything that was told before it.
        Some(peer.reach(n, patience).await)
    }

    /// What each peer's task says.
    pub fn statuses(&self) -> Vec<Told> {
        self.all()
            .iter()
            .map(|peer| Told {
                id: peer.id,
                name: peer.name.clone(),
                url: peer.url.clone(),
                status: peer.handle.status(),
            })
            .collect()
    }

    /// Whether there is a peer of that name.
    pub fn has(&self, name: &str) -> bool {
        self.served.lock().iter().any(|peer| peer.name == name)
    }

    /// Waits until every peer, or the one named, durably holds all changes up to `n`,
    /// for no longer than `patience`.
    pub async fn flush(
        &self,
        only: Option<&str>,
        n: u64,
        patience: Duration,
    ) -> Vec<(String, Outcome)> {
        let all = self.all();
        let flushes = all
            .iter()
            .filter(|peer| only.is_none_or(|name| name == peer.name))
            .map(|peer| async move { (peer.name.clone(), peer.reach(n, patience).await) });
        join(flushes.collect()).await
    }
}

/// What one peer's task says about itself.
pub struct Told {
    id: PeerId,
    name: String,
    url: String,
    status: PeerStatus,
}

impl Told {
    /// The peer's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Paths with a problem.
    pub fn problems(&self) -> impl Iterator<Item = (RelPath, String)> {
        self.status.problems.iter().cloned()
    }

    /// Whether a dry run has yet to tell its plan, or why there is none.
    pub fn undecided(&self) -> bool {
        self.status.preview.is_none()
            && matches!(
                self.status.state,
                ReplicatorState::Connected | ReplicatorState::Connecting
            )
    }

    /// The lines of a dry run, or why there are none.
    pub fn plan(&self) -> Result<impl Iterator<Item = String>, Outcome> {
        match (&self.status.preview, self.status.state) {
            (Some(preview), _) => Ok(preview
                .iter()
                .map(|step| format!("{} {} {}", step.action, step.change, step.path))),
            (None, ReplicatorState::Unreachable) => Err(Outcome::Unreachable),
            (None, ReplicatorState::Halted) => Err(Outcome::Halted),
            (None, _) => Err(Outcome::TimedOut),
        }
    }

    /// The peer's part of a status. `view` tells what it lacks.
    pub fn peer(&self, view: &View) -> Result<status::Peer, mirrorfs_journal::Error> {
        let told = &self.status;
        // A task that has settled has looked at everything the journal knows: what
        // differs still is in conflict or held back.
        let (pending_changes, pending_bytes) = if told.settled && told.durable_seq >= view.n() {
            (0, 0)
        } else {
            report::pending(view, self.id, told.durable_seq)?
        };
        Ok(status::Peer {
            name: self.name.clone(),
            url: self.url.clone(),
            state: match told.state {
                ReplicatorState::Connected => PeerState::Connected,
                ReplicatorState::Connecting => PeerState::Connecting,
                ReplicatorState::Unreachable => PeerState::Unreachable,
                ReplicatorState::Halted => PeerState::Halted,
            },
            transport: told.transport.as_ref().map(|(kind, _)| kind.clone()),
            transport_reason: told.transport.as_ref().map(|(_, reason)| reason.clone()),
            version: told.version.clone(),
            scanned_because: told.degraded.clone(),
            applied_seq: told.applied_seq,
            durable_seq: told.durable_seq,
            pending_changes,
            pending_bytes,
            last_error: told.last_error.clone(),
            halt_reason: told.halt_reason.clone(),
        })
    }

    /// What a flush reached with this peer.
    pub fn flushed(
        &self,
        outcome: Outcome,
        view: &View,
    ) -> Result<PeerFlushed, mirrorfs_journal::Error> {
        let peer = self.peer(view)?;
        let error = match outcome {
            Outcome::Durable => None,
            Outcome::Halted => peer.halt_reason.or(peer.last_error),
            _ => peer.last_error.or(peer.halt_reason),
        };
        Ok(PeerFlushed {
            name: peer.name,
            outcome,
            pending_changes: peer.pending_changes,
            pending_bytes: peer.pending_bytes,
            error,
        })
    }
}

fn policy(mode: Mode) -> Policy {
    match mode {
        Mode::TwoWay => Policy::TwoWay,
        Mode::PushOnly => Policy::PushOnly,
        Mode::PullOnly => Policy::PullOnly,
    }
}

/// Runs futures side by side to their ends.
async fn join<T, F: Future<Output = T>>(futures: Vec<F>) -> Vec<T> {
    let mut running: Vec<_> = futures
        .into_iter()
        .map(|future| (Some(Box::pin(future)), None))
        .collect();
    std::future::poll_fn(|context| {
        let mut waiting = false;
        for (future, value) in &mut running {
            if let Some(unfinished) = future {
                match Pin::as_mut(unfinished).poll(context) {
                    Poll::Ready(ready) => {
                        *value = Some(ready);
                        *future = None;
                    }
                    Poll::Pending => waiting = true,
                }
            }
        }
        if waiting {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    running.into_iter().filter_map(|(_, value)| value).collect()
}
