//! The peers of a mounted tree, each with its replicator task.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use mirrorfs_journal::View;

use super::control::{Outcome, PeerFlushed};
use super::failure::{Failure, OrFail};
use super::report;
use super::site::Site;
use super::state::Mode;
use super::status::{Peer, PeerState};
use crate::reconcile::Policy;
use crate::replicator::{
    Context, FlushOutcome, Handle, LocalTree, PeerState as ReplicatorState, PeerStatus,
};
use crate::replicator::{Resolution, Resume};
use crate::transport::{self, PeerUrl};
use crate::tree::{PeerId, RelPath};

/// A peer and the task that serves it.
struct Served {
    id: PeerId,
    name: String,
    url: String,
    handle: Handle,
}

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

/// All peers of a mount.
#[derive(Default)]
pub struct Peers(Vec<Served>);

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
        let options = transport::ConnectOptions::from_env()
            .or_fail(|| "cannot use the settings of the transport in the environment".into())?;
        let deadline = options.deadline;
        let configured = site.peers()?;
        let several = configured.len() > 1;
        // Deletions that were seen are meant; what a scan found missing may not be. The brake
        // is for when that is more than is left.
        let wiped = site.recovery.removed > site.recovery.scanned;
        let mut served = Vec::new();
        for peer in configured {
            if only.is_some_and(|only| only != peer.id) {
                continue;
            }
            let url = PeerUrl::parse(&peer.url)
                .or_fail(|| format!("cannot use the peer {}", peer.name))?;
            let options = options.clone();
            let context = Context {
                mirror: site.identity.mirror,
                replica: site.identity.replica,
                journal: site.journal.clone(),
                tree: tree.clone(),
                connect: Arc::new(move || transport::connect(&url, &options)),
                peer: peer.id,
                policy: policy(site.record.mode),
                name_artefacts: several,
                scanned: wiped,
                dry_run,
                deadline,
            };
            let handle = Handle::spawn(context)
                .or_fail(|| format!("cannot serve the peer {}", peer.name))?;
            served.push(Served {
                id: peer.id,
                name: peer.name,
                url: peer.url,
                handle,
            });
        }
        Ok(Self(served))
    }

    /// Ends all tasks. What was not shipped stays in the journal.
    pub async fn stop(self) {
        let ends = self.0.into_iter().map(|peer| peer.handle.stop());
        join(ends.collect()).await;
    }

    /// Tries at once what was put off; the names of the peers.
    pub fn retry(&self) -> Vec<String> {
        self.0
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
        for peer in &self.0 {
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
        let peer = self.0.iter().find(|known| known.id == peer)?;
        peer.handle.resolve(path, resolution);
        // A flush ends after a round that knows of everything that was told before it.
        Some(peer.reach(n, patience).await)
    }

    /// What each peer's task says.
    pub fn statuses(&self) -> Vec<Told> {
        self.0
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
        self.0.iter().any(|peer| peer.name == name)
    }

    /// Waits until every peer, or the one named, durably holds all changes up to `n`,
    /// for no longer than `patience`.
    pub async fn flush(
        &self,
        only: Option<&str>,
        n: u64,
        patience: Duration,
    ) -> Vec<(String, Outcome)> {
        let flushes = self
            .0
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
    pub fn peer(&self, view: &View) -> Result<Peer, mirrorfs_journal::Error> {
        let told = &self.status;
        // A task that has settled has looked at everything the journal knows: what
        // differs still is in conflict or held back.
        let (pending_changes, pending_bytes) = if told.settled && told.durable_seq >= view.n() {
            (0, 0)
        } else {
            report::pending(view, self.id, told.durable_seq)?
        };
        Ok(Peer {
            name: self.name.clone(),
            url: self.url.clone(),
            state: match told.state {
                ReplicatorState::Connected => PeerState::Connected,
                ReplicatorState::Connecting => PeerState::Connecting,
                ReplicatorState::Unreachable => PeerState::Unreachable,
                ReplicatorState::Halted => PeerState::Halted,
            },
            transport: told.transport.as_ref().map(|(kind, _)| kind.clone()),
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
