//! What a mount's daemon answers to commands.

mod configure;
mod settle;
mod trash;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::control::{Flushed, HandOver, Outcome, Request, Response, Serve};
use super::failure::{Failure, OrFail};
use super::late::LateComers;
use super::peers::{Peers, Told};
use super::report::{self, Specials};
use super::site::Site;
use super::status::{Mount, MountState, Problem, Status};
use crate::door::Door;
use crate::replicator::{LocalTree, Resume};

/// Asks the daemon to unmount and end.
pub struct Stop {
    /// How long to flush before.
    pub patience: Duration,
    /// Who wants to know how it went; nobody after a signal.
    pub answer: Option<oneshot::Sender<Response>>,
}

/// A mounted tree and all that works on it.
pub struct Service {
    /// The tree.
    pub site: Arc<Site>,
    /// How requests reach the mount, in words.
    channel: String,
    /// The tree as changes are brought into it.
    tree: LocalTree,
    /// The way into the mount.
    pub door: Arc<Mutex<Door>>,
    /// The peers' tasks.
    pub peers: Arc<Peers>,
    /// What programs go on writing to after it was replaced.
    late: Arc<LateComers>,
    /// Special files, kept track of.
    specials: Arc<Mutex<Specials>>,
    /// To whoever ends the daemon.
    stop: mpsc::Sender<Stop>,
    /// Told when the last answer of the daemon has been written.
    farewell: mpsc::Sender<()>,
}

impl Service {
    /// Puts a service together.
    #[allow(clippy::too_many_arguments)] // its fields
    pub(super) fn new(
        site: Arc<Site>,
        channel: String,
        tree: LocalTree,
        door: Arc<Mutex<Door>>,
        late: Arc<LateComers>,
        peers: Peers,
        stop: mpsc::Sender<Stop>,
        farewell: mpsc::Sender<()>,
    ) -> Self {
        Self {
            site,
            channel,
            tree,
            door,
            late,
            peers: Arc::new(peers),
            specials: Arc::default(),
            stop,
            farewell,
        }
    }

    /// How things are.
    pub async fn status(&self) -> Result<Status, Failure> {
        let told = self.peers.statuses();
        let (site, specials) = (Arc::clone(&self.site), Arc::clone(&self.specials));
        let channel = self.channel.clone();
        blocking(move || assemble(&site, &channel, &mut specials.lock(), &told)).await
    }

    /// Makes every change that was made before the call durable on the peers.
    pub async fn flush(&self, only: Option<&str>, patience: Duration) -> Result<Flushed, Failure> {
        let deadline = Instant::now() + patience;
        let peers = &self.peers;
        if let Some(name) = only
            && !peers.has(name)
        {
            return Err(Failure::new(format!("there is no peer named {name:?}"))
                .hint("mirrorfs status lists the peers"));
        }
        let recorder = self.site.journal.recorder();
        // What programs stored through mappings, then the journal, then the peers.
        let (site, door) = (Arc::clone(&self.site), Arc::clone(&self.door));
        let late = Arc::clone(&self.late);
        let recorded = tokio::time::timeout(
            patience,
            blocking(move || {
                let mut unsettled = settle(&site, &door);
                if late.bring_in()? {
                    unsettled.push(Problem {
                        path: ".mirrorfs/late".into(),
                        error: "a file that was written to after it had been replaced cannot be brought back".into(),
                    });
                }
                let recorder = site.journal.recorder();
                let n = recorder.last();
                recorder
                    .durable()
                    .or_fail(|| "the journal cannot be made durable".into())?;
                Ok((n, unsettled))
            }),
        )
        .await;
        let (seq, outcomes, unsettled) = match recorded {
            Ok(recorded) => {
                let (n, unsettled) = recorded?;
                tracing::debug!(n, "a flush begins");
                let left = deadline.saturating_duration_since(Instant::now());
                let mut outcomes = peers.flush(only, n, left).await;
                // What one of them has brought in was made before this was asked for, and
                // the others are to have it as well.
                let now = recorder.last();
                if only.is_none() && outcomes.len() > 1 && now > n {
                    let left = deadline.saturating_duration_since(Instant::now());
                    outcomes = peers.flush(only, now, left).await;
                }
                (n, outcomes, unsettled)
            }
            Err(_) => {
                let all = peers.statuses();
                let late = all
                    .iter()
                    .filter(|told| only.is_none_or(|name| name == told.name()));
                let late = late.map(|told| (told.name().to_owned(), Outcome::TimedOut));
                (recorder.last(), late.collect(), Vec::new())
            }
        };
        let mut told = peers.statuses();
        // What another peer cannot do is no business of whoever asks for this one.
        told.retain(|told| only.is_none_or(|name| name == told.name()));
        let site = Arc::clone(&self.site);
        blocking(move || {
            let mut flushed = outcome(&site, seq, &told, outcomes)?;
            flushed.problems.extend(unsettled);
            Ok(flushed)
        })
        .await
    }
}

impl Serve for Service {
    async fn answer(&self, request: Request) -> Response {
        let result = match request {
            Request::Ping => Ok(Response::Pong {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
            }),
            Request::Status => self
                .status()
                .await
                .map(|status| Response::Status(Box::new(status))),
            Request::Flush { peer, timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms);
                let flushed = self.flush(peer.as_deref(), timeout).await;
                match read_only(&self.site) {
                    None => flushed.map(Response::Flushed),
                    // What is here may not be what programs were told.
                    Some(reason) => Err(Failure::new(reason)),
                }
            }
            Request::Retry => Ok(Response::Retrying {
                peers: self.peers.retry(),
            }),
            Request::AddPeer { url, name } => self.add_peer(url, name).await,
            Request::Attach { .. } | Request::Attachment | Request::Detach => {
                Err(Failure::new("the daemon of a mount is not asked for that"))
            }
            Request::RemovePeer { name, force } => self.remove_peer(name, force).await,
            Request::Resume {
                peer,
                allow_deletions,
            } => {
                let resume = if allow_deletions {
                    Resume::AllowDeletions
                } else {
                    Resume::Refill
                };
                let (peers, wiped) = self.peers.resume(peer.as_deref(), resume);
                if resume == Resume::Refill && !wiped.is_empty() {
                    self.bring_back(wiped).await
                } else {
                    Ok(())
                }
                .map(|()| Response::Resumed { peers })
            }
            Request::Conflict { path } => self.conflicts(path).await,
            Request::Resolve {
                path,
                choice,
                discard_edits,
            } => self.resolve(path, choice, discard_edits).await,
            Request::Trash { skip } => self.trash(skip).await,
            Request::Restore { paths, to } => self.restore(paths, to).await,
            Request::Empty { older_than_ms } => self.empty(older_than_ms).await,
            Request::Unmount { timeout_ms } => {
                let (answer, response) = oneshot::channel();
                let stop = Stop {
                    patience: Duration::from_millis(timeout_ms),
                    answer: Some(answer),
                };
                match self.stop.try_send(stop) {
                    Ok(()) => response
                        .await
                        .or_fail(|| "the daemon ended on the way".into()),
                    Err(_) => Err(Failure::new("the mount is being ended already")
                        .hint("wait for the other mirrorfs umount to finish")),
                }
            }
        };
        result.unwrap_or_else(Response::Failed)
    }

    async fn take_over(&self, request: Request) -> Result<(Response, Box<HandOver>), Failure> {
        self.attach(request).await
    }

    fn answered(&self, response: &Response) {
        if matches!(response, Response::Unmounted { .. }) {
            // The daemon waits for this before it ends.
            let _ = self.farewell.try_send(());
        }
    }
}

/// Has stores through shared mappings reach the filesystem. Tells what of them may not
/// have.
fn settle(site: &Site, door: &Mutex<Door>) -> Vec<Problem> {
    let failed = match door.lock().settle_mappings(&site.filesystem) {
        Ok(settled) => settled.failed,
        Err(error) => vec![(site.tree().display().to_string(), error.to_string())],
    };
    let told = failed.into_iter().map(|(path, error)| {
        let error = format!("what a program stores through a mapping cannot be had: {error}");
        tracing::warn!(path, "{error}");
        Problem { path, error }
    });
    told.collect()
}

fn assemble(
    site: &Site,
    channel: &str,
    specials: &mut Specials,
    told: &[Told],
) -> Result<Status, Failure> {
    let message = || "cannot read the journal".to_owned();
    let journal = site.journal.status();
    let reason = read_only(site);
    let view = match &reason {
        None => site.journal.snapshot().or_fail(message)?,
        Some(_) => site.journal.committed().or_fail(message)?,
    };
    let peers = told
        .iter()
        .map(|told| told.peer(&view))
        .collect::<Result<Vec<_>, _>>()
        .or_fail(message)?;
    Ok(Status {
        mirror: report::mirror(&site.record),
        mount: Mount {
            state: MountState::Mounted,
            reason,
            channel: Some(channel.to_owned()),
        },
        journal: report::journal(&view, journal.n, &peers).or_fail(message)?,
        peers,
        conflicts: report::conflicts(&view).or_fail(message)?,
        held_back: specials.held_back(&view).or_fail(message)?,
        problems: problems(site, told),
    })
}

/// Why the mount takes no more changes, if that is so, and the way on.
pub(super) fn read_only(site: &Site) -> Option<String> {
    let journal = site.journal.status().poisoned.map(|why| {
        format!("the journal takes no more records ({why}): make room or repair the disk; nothing that was acknowledged is lost")
    });
    let why = journal.or_else(|| {
        let why = site.filesystem.poisoned()?;
        Some(format!(
            "{why}: what was written just before may be lost; repair the disk"
        ))
    })?;
    Some(format!("read-only: {why}. Then unmount and mount again"))
}

fn problems(site: &Site, told: &[Told]) -> Vec<super::status::Problem> {
    let peers = told.iter().flat_map(Told::problems);
    report::problems(site.filesystem.problems().into_iter().chain(peers))
}

/// What a flush reached, from what the peers' tasks say.
pub(super) fn outcome(
    site: &Site,
    seq: u64,
    told: &[Told],
    outcomes: Vec<(String, Outcome)>,
) -> Result<Flushed, Failure> {
    let message = || "cannot read the journal".to_owned();
    let view = site.journal.snapshot().or_fail(message)?;
    let mut peers = Vec::new();
    for (name, outcome) in outcomes {
        if let Some(told) = told.iter().find(|told| told.name() == name) {
            peers.push(told.flushed(outcome, &view).or_fail(message)?);
        }
    }
    Ok(Flushed {
        seq,
        peers,
        conflicts: report::conflicts(&view).or_fail(message)?,
        problems: problems(site, told),
    })
}

/// Runs what waits for a disk or another process off the runtime's only thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new("a thread of the daemon ended early").because(&error)),
    }
}
