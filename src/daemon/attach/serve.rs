//! The process that keeps a directory attached.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use super::place::{AttachDir, Record};
use super::{Accepted, AttachState, Attachment, Order, Refused, mount_at, offer, text_of};
use crate::daemon::announce::{Announce, Announcement};
use crate::daemon::control::{Request, Response, Serve, Server};
use crate::daemon::exit::Exit;
use crate::daemon::failure::{Failure, OrFail};
use crate::daemon::launch;
use crate::daemon::lock::{Attempt, Lock};
use crate::daemon::mounts;
use crate::daemon::state::StateDir;
use crate::transport::{Link, PeerUrl};
use crate::tree::links::Symlinks;

/// First and longest pause before a connection is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A connection that lasted for this long was a good one.
const GOOD: Duration = Duration::from_secs(10);
/// How long an agent may take to end once its link is gone. It may be in the middle of an
/// apply.
const GRACE: Duration = Duration::from_secs(5);
/// How much of what the agent prints is kept, in lines.
const KEPT: usize = 5;

/// Keeps a directory attached until it is told to end. With `detached`, output goes to
/// a log as soon as the directory is this process's.
pub fn run(order: &Order, detached: bool, say: &mut dyn Announce) -> Result<Exit, Failure> {
    let to = mount_at(&order.to)?;
    let message = || format!("cannot use {}", order.dir.display());
    if !order.dir.exists() {
        std::fs::create_dir(&order.dir).or_fail(message)?;
        say.announce(Announcement::Note(format!(
            "made the directory {}",
            order.dir.display()
        )));
    }
    let dir = mounts::canonical(&order.dir).or_fail(message)?;
    let order = Order {
        dir,
        ..order.clone()
    };
    let state = StateDir::find()?;
    state.keep_apart(&order.dir)?;
    let place = AttachDir::of(&state, &order.dir);
    state.create(place.path())?;
    let _lock = take(&place, &order.dir)?;
    if detached {
        launch::log_to(&place.log())?;
    }
    std::env::set_current_dir("/").or_fail(|| "cannot enter /".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .or_fail(|| "cannot start the runtime".into())?;
    let kept = Kept {
        attachment: Mutex::new(Attachment {
            dir: text_of(&order.dir)?,
            to: to.to_string(),
            name: order.name.clone(),
            state: AttachState::Connecting,
            transport: None,
            transport_reason: None,
            last_error: None,
            pid: Some(std::process::id()),
        }),
        retry: Notify::new(),
        stop: Notify::new(),
    };
    let kept = Arc::new(kept);
    let kept = runtime.block_on(keep(&order, &to, &place, detached, kept, say));
    // What still waits for a name server ends when it gets its answer.
    runtime.shutdown_timeout(Duration::from_millis(100));
    kept.map(|()| Exit::Done)
}

fn take(place: &AttachDir, dir: &Path) -> Result<Lock, Failure> {
    match Lock::take_from_the_dying(&place.lock())
        .or_fail(|| format!("cannot lock {}", place.lock().display()))?
    {
        Attempt::Taken(lock) => Ok(lock),
        Attempt::Held(pid) => {
            let who = pid.map_or_else(String::new, |pid| format!(" by the process {pid}"));
            Err(
                Failure::new(format!("{} is attached already{who}", dir.display())).hint(format!(
                    "see mirrorfs status {0}; mirrorfs detach {0} ends it",
                    dir.display()
                )),
            )
        }
    }
}

/// What the process knows and can be told.
struct Kept {
    attachment: Mutex<Attachment>,
    /// Try at once.
    retry: Notify,
    /// End.
    stop: Notify,
}

impl Serve for Kept {
    async fn answer(&self, request: Request) -> Response {
        match request {
            Request::Ping => Response::Pong {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
            },
            Request::Attachment => Response::Attachment(Box::new(self.attachment.lock().clone())),
            Request::Retry => {
                self.retry.notify_one();
                Response::Retrying { peers: Vec::new() }
            }
            Request::Detach => Response::Detaching,
            other => Response::Failed(Failure::new(format!(
                "whoever keeps a directory attached is not asked for that: {other:?}"
            ))),
        }
    }

    fn answered(&self, response: &Response) {
        if matches!(response, Response::Detaching) {
            self.stop.notify_one();
        }
    }
}

/// Connects, serves, and connects again, until it is told to end.
async fn keep(
    order: &Order,
    to: &PeerUrl,
    place: &AttachDir,
    detached: bool,
    kept: Arc<Kept>,
    say: &mut dyn Announce,
) -> Result<(), Failure> {
    let listen = |kind| signal(kind).or_fail(|| "cannot listen to signals".into());
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let server = Server::bind(place.path())
        .or_fail(|| format!("cannot listen in {}", place.path().display()))?;
    let serving = tokio::spawn({
        let kept = Arc::clone(&kept);
        async move { server.serve(kept).await }
    });
    let until_told = async {
        loop {
            tokio::select! {
                () = kept.stop.notified() => return,
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                // The end of a terminal ends what runs in it, and nothing else.
                _ = hangup.recv() => if !detached { return },
            }
        }
    };
    let attached = tokio::select! {
        () = until_told => Ok(()),
        failure = attach_for_ever(order, to, place, &kept, say) => Err(failure),
    };
    serving.abort();
    let _ = serving.await;
    attached
}

/// Returns only if the very first attempt fails in a way that needs its user.
async fn attach_for_ever(
    order: &Order,
    to: &PeerUrl,
    place: &AttachDir,
    kept: &Kept,
    say: &mut dyn Announce,
) -> Failure {
    let mut first = true;
    let mut failures: u32 = 0;
    loop {
        kept.attachment.lock().state = AttachState::Connecting;
        let attempt = {
            let (order, to) = (order.clone(), to.clone());
            spawn_blocking(move || offer(&order, &to)).await
        };
        let attempt = match attempt {
            Ok(attempt) => attempt,
            Err(error) => Err(Refused::for_good(
                Failure::new("a thread ended early").because(&error),
            )),
        };
        let begin = Instant::now();
        let ended = match attempt {
            Ok(accepted) => {
                if let Err(failure) = note(order, to, place, kept, &accepted) {
                    return failure;
                }
                if std::mem::take(&mut first) {
                    say.announce(Announcement::Attached(kept.attachment.lock().clone()));
                }
                tracing::info!(name = accepted.name, "attached");
                serve(&order.dir, order.symlinks, accepted.link).await
            }
            Err(refused) if first && !refused.passes => return refused.failure,
            Err(refused) => {
                if std::mem::take(&mut first) {
                    if let Err(failure) = write(order, to, place, order.name.clone()) {
                        return failure;
                    }
                    say.announce(Announcement::Warning(format!(
                        "{}; trying again until it works",
                        refused.failure
                    )));
                    say.announce(Announcement::Attached(kept.attachment.lock().clone()));
                }
                refused.failure.to_string()
            }
        };
        tracing::info!("{ended}");
        failures = if begin.elapsed() > GOOD {
            1
        } else {
            failures + 1
        };
        {
            let mut attachment = kept.attachment.lock();
            attachment.state = AttachState::Unreachable;
            attachment.last_error = Some(ended);
        }
        tokio::select! {
            () = tokio::time::sleep(pause(failures)) => {}
            () = kept.retry.notified() => {}
        }
    }
}

/// Longer after each failure, and by up to a quarter longer still: several that were cut
/// off together do not come back together.
fn pause(failures: u32) -> Duration {
    let pause = BACKOFF.0 * 2_u32.saturating_pow(failures.saturating_sub(1).min(6));
    let random = crate::tree::Id::random().map_or(0, |id| id.0[0]);
    let pause = pause.min(BACKOFF.1);
    pause + pause.mul_f64(f64::from(random) / 1024.0)
}

fn note(
    order: &Order,
    to: &PeerUrl,
    place: &AttachDir,
    kept: &Kept,
    accepted: &Accepted,
) -> Result<(), Failure> {
    {
        let mut attachment = kept.attachment.lock();
        attachment.state = AttachState::Attached;
        attachment.name = Some(accepted.name.clone());
        attachment.transport = Some(accepted.link.transport.to_string());
        attachment.transport_reason = Some(accepted.link.reason.clone());
        attachment.last_error = None;
    }
    write(order, to, place, Some(accepted.name.clone()))
}

fn write(
    order: &Order,
    to: &PeerUrl,
    place: &AttachDir,
    name: Option<String>,
) -> Result<(), Failure> {
    place.write(&Record {
        dir: text_of(&order.dir)?,
        to: to.to_string(),
        name,
    })
}

/// Has an agent serve the directory over a link, until either of them ends; how that was.
///
/// The agent is a process of its own: whoever takes the directory's lock from it may kill
/// it without killing this one.
async fn serve(dir: &Path, symlinks: Symlinks, link: Link) -> String {
    let mut agent = match start_agent(dir, symlinks, &link) {
        Ok(agent) => agent,
        Err(error) => return format!("the agent cannot be started: {error}"),
    };
    let stderr = agent.stderr.take();
    let printed = stderr.map(|stderr| tokio::spawn(last_words(stderr)));
    let mut guard = Guard {
        link: Some(link),
        agent,
    };
    let status = guard.agent.wait().await;
    let said = match printed {
        Some(printed) => printed.await.unwrap_or_default(),
        None => String::new(),
    };
    let broken = guard.link.take().map(|link| link.stderr_tail());
    let mut text = match status {
        Ok(status) if status.success() => "the connection ended".to_owned(),
        Ok(status) => format!("the agent ended ({status})"),
        Err(error) => format!("the agent is gone: {error}"),
    };
    for more in [said, broken.unwrap_or_default()] {
        if !more.trim().is_empty() {
            text.push_str(": ");
            text.push_str(more.trim());
        }
    }
    text
}

/// A link and the agent that serves it. Dropping it ends the link, and gives the agent the
/// time to finish what it is applying.
struct Guard {
    link: Option<Link>,
    agent: Child,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.link = None;
        let patience = Instant::now() + GRACE;
        while matches!(self.agent.try_wait(), Ok(None)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.agent.start_kill();
    }
}

fn start_agent(dir: &Path, symlinks: Symlinks, link: &Link) -> std::io::Result<Child> {
    let mut agent = std::process::Command::new("/proc/self/exe");
    agent
        .arg0("mirrorfs")
        .args(["agent", "--stdio"])
        .arg(format!("--symlinks={symlinks}"))
        .arg(dir)
        .stdin(OwnedFd::from(link.stream.try_clone()?))
        .stdout(OwnedFd::from(link.stream.try_clone()?))
        .stderr(Stdio::piped())
        // A Ctrl-C in the terminal is this process's business.
        .process_group(0);
    Command::from(agent).kill_on_drop(true).spawn()
}

/// Passes on what an agent prints, and returns the end of it.
async fn last_words(stderr: ChildStderr) -> String {
    let mut kept = std::collections::VecDeque::new();
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!("agent: {line}");
        kept.push_back(line);
        if kept.len() > KEPT {
            kept.pop_front();
        }
    }
    Vec::from(kept).join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_half_a_minute_and_are_never_quite_the_same() {
        for (failures, least) in [(1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (60, 30)] {
            let least = Duration::from_secs(least);
            for _ in 0..20 {
                let pause = pause(failures);
                assert!(pause >= least && pause <= least.mul_f64(1.25), "{pause:?}");
            }
        }
    }
}
