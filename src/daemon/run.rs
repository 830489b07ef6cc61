//! The daemon itself: from an order to an end.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::announce::{Announce, Announcement, Ready};
use super::control::{Flushed, Response, Server};
use super::exit::Exit;
use super::failure::{Failure, OrFail};
use super::late::LateComers;
use super::launch;
use super::peers::Peers;
use super::service::{Service, Stop, blocking};
use super::site::{Order, Site, local_tree};
use super::state::Record;
use super::upkeep::{self, keep_up};
use crate::door::Door;
use crate::fuse::{self, Mount, MountOptions};
use parking_lot::Mutex;

/// How long a daemon that was told to end by a signal tries to flush. Whoever shuts the
/// machine down sends SIGKILL not much later.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last answer may take to be written.
const FAREWELL: Duration = Duration::from_secs(5);

/// Mounts a tree and serves it until it is unmounted. With `detached`, output goes to
/// the mirror's log as soon as that is known.
pub fn run(order: &Order, detached: bool, say: &mut dyn Announce) -> Result<Exit, Failure> {
    let site = Site::open(order, say, |dir| {
        if detached {
            launch::log_to(&dir.log())
        } else {
            Ok(())
        }
    })?;
    // The daemon must not keep whatever directory it was started in from being
    // unmounted, its own mount least of all.
    std::env::set_current_dir("/").or_fail(|| "cannot enter /".into())?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .or_fail(|| "cannot start the runtime".into())?;
    // Before there is a mount: what ends this process from then on has to unmount it.
    let signals = {
        let _entered = runtime.enter();
        Signals::listen()?
    };
    let tree = site.tree().to_path_buf();
    let mount = fuse::mount(Arc::clone(&site.filesystem), &tree, MountOptions::default())
        .or_fail(|| format!("cannot mount {}", tree.display()))?;
    let mount = Arc::new(mount);
    let served = serve(site, &mount, runtime, signals, say);
    if let Err(failure) = &served
        && !mount.ended()
    {
        // A program may be in it already: then it stays, dead, rather than show an
        // empty directory or the covered one.
        tracing::error!("{failure}");
        if let Err(error) = mount.unmount() {
            tracing::error!(%error, "the mount stays without a daemon");
        }
    }
    served
}

fn serve(
    site: Site,
    mount: &Arc<Mount>,
    runtime: Runtime,
    signals: Signals,
    say: &mut dyn Announce,
) -> Result<Exit, Failure> {
    site.dir.write_record(&Record {
        device: Some(mount.device()),
        ..site.record.clone()
    })?;
    let door = Door::start(site.tree(), mount.device())
        .or_fail(|| format!("cannot work through the mount {}", site.tree().display()))?;
    let attended = runtime.block_on(attend(
        Arc::new(site),
        Arc::new(Mutex::new(door)),
        mount,
        signals,
        say,
    ));
    runtime.shutdown_timeout(FAREWELL);
    attended
}

/// Answers commands and serves the peers until the mount has ended.
async fn attend(
    site: Arc<Site>,
    door: Arc<Mutex<Door>>,
    mount: &Arc<Mount>,
    mut signals: Signals,
    say: &mut dyn Announce,
) -> Result<Exit, Failure> {
    let (stop, mut stops) = mpsc::channel(1);
    let (farewell, mut farewells) = mpsc::channel(1);
    let tree = local_tree(&site, Some(Arc::clone(&door)))?;
    let late = Arc::new(LateComers::new(tree.clone(), site.journal.clone()));
    let service = Arc::new(Service::new(
        Arc::clone(&site),
        mount.channel().to_string(),
        tree.clone(),
        door,
        Arc::clone(&late),
        Peers::start(&site, &tree)?,
        stop,
        farewell,
    ));
    let server = Server::bind(site.dir.path())
        .or_fail(|| format!("cannot listen in {}", site.dir.path().display()))?;
    let serving = tokio::spawn({
        let service = Arc::clone(&service);
        async move { server.serve(service).await }
    });
    let upkeep = tokio::spawn(keep_up(site.journal.clone(), tree.clone()));
    let attending = tokio::spawn(late.attend());
    let securing = tokio::spawn(upkeep::secure(Arc::clone(&site)));
    let mut ended = watch(mount)?;

    say.announce(Announcement::Ready(ready(&site)?));
    tracing::info!(tree = %site.tree().display(), "mounted");

    let mut failures = Vec::new();
    let (flushed, answer) = loop {
        failures.clear();
        let stop = tokio::select! {
            Some(stop) = stops.recv() => stop,
            signal = signals.next() => {
                tracing::info!("{signal}: unmounting");
                Stop { patience: SIGNAL_PATIENCE, answer: None }
            }
            _ = ended.recv() => {
                tracing::info!("unmounted by somebody else");
                break (Flushed::default(), None);
            }
        };
        let flushed = match service.flush(None, stop.patience).await {
            Ok(flushed) => flushed,
            Err(failure) => {
                tracing::error!("{failure}");
                failures.push(failure);
                Flushed::default()
            }
        };
        // A peer's task works through the mount, and would keep it busy.
        service.peers.stop().await;
        // So would what the door still does for a flush that was given up.
        let (target, door) = (Arc::clone(mount), Arc::clone(&service.door));
        let unmounted = blocking(move || {
            let _idle = door.lock();
            Ok(target.unmount())
        })
        .await?;
        let Err(error) = unmounted else {
            break (flushed, stop.answer);
        };
        tracing::warn!(%error, "cannot unmount");
        // Without its peers the mount is still of use to whoever is in it.
        if let Err(failure) = service.peers.restart(&site, &tree) {
            tracing::error!("{failure}");
        }
        let busy = Response::Busy {
            flushed,
            error: error.to_string(),
        };
        // Whoever asked may have gone away.
        let _ = stop.answer.map(|answer| answer.send(busy));
    };

    service.peers.stop().await;
    upkeep.abort();
    securing.abort();
    attending.abort();
    // What runs on a thread of its own is not aborted, and ends before this does.
    let secured = {
        let site = Arc::clone(&site);
        blocking(move || site.secure()).await
    };
    let closed = match secured {
        Ok(()) => {
            let journal = site.journal.clone();
            blocking(move || {
                journal.close().or_fail(|| {
                    "the journal could not be closed: the next mount scans the tree".into()
                })
            })
            .await
        }
        // Left as after a crash: lower need not be on disk.
        Err(failure) => {
            tracing::warn!("{failure}");
            Ok(())
        }
    };
    // Nobody finds the socket once the mirror's lock is free.
    serving.abort();
    let _ = serving.await;
    let exit = flushed.left();
    if let Some(answer) = answer {
        failures.extend(closed.as_ref().err().cloned());
        let response = Response::Unmounted { flushed, failures };
        if answer.send(response).is_ok() {
            // The caller may have hung up, so this wait has an end.
            let _ = tokio::time::timeout(FAREWELL, farewells.recv()).await;
        }
    }
    closed.map(|()| exit)
}

fn ready(site: &Site) -> Result<Ready, Failure> {
    Ok(Ready {
        pid: std::process::id(),
        name: site.record.name.clone(),
        tree: site.tree().display().to_string(),
        peers: site
            .peers()?
            .into_iter()
            .map(|peer| (peer.name, peer.url))
            .collect(),
        log: site.dir.log().display().to_string(),
    })
}

/// Tells when the FUSE session is over, whoever ended it.
fn watch(mount: &Arc<Mount>) -> Result<mpsc::Receiver<()>, Failure> {
    let (sender, receiver) = mpsc::channel(1);
    let mount = Arc::clone(mount);
    std::thread::Builder::new()
        .name("mount-end".into())
        .spawn(move || {
            if let Err(error) = mount.wait() {
                tracing::error!(%error, "the FUSE session failed");
            }
            let _ = sender.try_send(());
        })
        .or_fail(|| "cannot start a thread".into())?;
    Ok(receiver)
}

/// The signals that mean something to a daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over from their default, which ends the process. What comes before
    /// anybody waits for one is kept. To be called inside a runtime.
    fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).or_fail(|| "cannot listen to signals".into());
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for a signal that asks for the end.
    async fn next(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                // The end of a terminal is no reason to unmount.
                _ = self.hangup.recv() => tracing::debug!("SIGHUP: ignored"),
            }
        }
    }
}
