//! Where the demo plays: temporary directories with a state directory of their own, and
//! everything that must be gone afterwards.

use std::fmt;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::cli::{complain, print};
use crate::daemon::control::{Client, Request, Response};
use crate::daemon::lock::Lock;
use crate::daemon::state::{Environment, MirrorDir, StateDir};
use crate::daemon::status::PeerState;
use crate::daemon::{Failure, OrFail, mounts};
use crate::tree::Id;

/// How long anything in the demo may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at: the resolution of the times that are shown.
const LOOK: Duration = Duration::from_millis(1);

/// The demo's directories.
pub(super) struct Stage {
    base: PathBuf,
    state: StateDir,
    interrupted: Arc<AtomicBool>,
    kept: bool,
    cleared: bool,
}

/// How long something took.
pub(super) struct Took(Duration);

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0.as_millis())
    }
}

impl Stage {
    /// Makes the directories.
    pub(super) fn set() -> Result<Self, Failure> {
        let id = Id::random().or_fail(|| "there are no random numbers".into())?;
        let name = format!("mirrorfs-demo-{}", &id.to_string()[..8]);
        let base = std::env::temp_dir().join(name);
        let create = |dir: &Path| {
            DirBuilder::new()
                .mode(0o700)
                .create(dir)
                .or_fail(|| format!("cannot create {}", dir.display()))
                .map_err(|failure| failure.hint("set TMPDIR to a directory you can write to"))
        };
        create(&base)?;
        let base = base
            .canonicalize()
            .or_fail(|| format!("cannot resolve {}", base.display()))?;
        let state = StateDir::resolve(&Environment {
            state: Some(base.join("state")),
            ..Environment::default()
        })?;
        let stage = Self {
            base,
            state,
            interrupted: Arc::default(),
            kept: false,
            cleared: false,
        };
        create(&stage.tree())?;
        create(&stage.peer())?;
        print(format_args!("working in {}", stage.base.display()));
        listen(Arc::clone(&stage.interrupted))?;
        Ok(stage)
    }

    /// The tree that gets mounted.
    pub(super) fn tree(&self) -> PathBuf {
        self.base.join("web")
    }

    /// The directory that stands for another machine.
    pub(super) fn peer(&self) -> PathBuf {
        self.base.join("host")
    }

    /// Leaves the directories where they are.
    pub(super) fn keep(&mut self) {
        self.kept = true;
    }

    /// Runs a command of mirrorfs and shows it with what it prints. It must succeed.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<(), Failure> {
        self.go_on()?;
        let line = arguments.join(" ");
        print(format_args!("  $ mirrorfs {line}"));
        let output = Command::new("/proc/self/exe")
            .args(arguments)
            .current_dir(&self.base)
            .env("MIRRORFS_STATE", self.state.path())
            .env_remove("MIRRORFS_DISABLE")
            .output()
            .or_fail(|| format!("cannot run mirrorfs {line}"))?;
        for text in [&output.stderr, &output.stdout] {
            for line in String::from_utf8_lossy(text).lines() {
                print(format_args!("  {line}"));
            }
        }
        self.go_on()?;
        if output.status.success() {
            Ok(())
        } else {
            Err(Failure::new(format!(
                "mirrorfs {line} failed ({})",
                output.status
            )))
        }
    }

    /// Waits until something holds, and tells how long that took.
    pub(super) fn until(
        &self,
        what: &str,
        mut holds: impl FnMut() -> bool,
    ) -> Result<Took, Failure> {
        let begin = Instant::now();
        while !holds() {
            self.go_on()?;
            if begin.elapsed() > PATIENCE {
                return Err(Failure::new(format!(
                    "waited {} s in vain for {what}",
                    PATIENCE.as_secs()
                ))
                .hint(self.log()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(Took(begin.elapsed()))
    }

    /// Whether the daemon says that the peer is connected.
    pub(super) fn is_connected(&self) -> bool {
        let status = || -> Option<PeerState> {
            let dir = self.mirror().ok()??;
            let mut daemon = Client::connect(dir.path()).ok()??;
            match daemon.call(Request::Status, Some(PATIENCE)).ok()? {
                Response::Status(status) => Some(status.peers.first()?.state),
                _ => None,
            }
        };
        status() == Some(PeerState::Connected)
    }

    /// Kills the daemon, and returns once it is gone.
    pub(super) fn kill(&self) -> Result<u32, Failure> {
        let gone = || Failure::new("the demo's daemon is gone").hint(self.log());
        let dir = self.mirror()?.ok_or_else(gone)?;
        let pid = dir.owner()?.flatten().ok_or_else(gone)?;
        kill(pid).or_fail(|| format!("cannot kill {pid}"))?;
        Lock::wait_until_free(&dir.lock()).or_fail(|| format!("cannot wait for {pid}"))?;
        Ok(pid)
    }

    /// Ends what runs and removes what was made.
    pub(super) fn clear(mut self) -> Result<(), Failure> {
        self.sweep()
    }

    fn sweep(&mut self) -> Result<(), Failure> {
        if std::mem::replace(&mut self.cleared, true) {
            return Ok(());
        }
        let left = || {
            format!(
                "the demo could not clean up {}: unmount {} and remove it",
                self.base.display(),
                self.tree().display()
            )
        };
        if let Some(dir) = self.mirror()? {
            if let Some(mut daemon) = Client::connect(dir.path())? {
                // Whatever it answers, the lock tells how it went.
                let _ = daemon.call(Request::Unmount { timeout_ms: 0 }, Some(PATIENCE));
            }
            if let Some(Some(pid)) = dir.owner()?
                && mounts::Mounts::read()
                    .or_fail(left)?
                    .at(&self.tree())
                    .is_some()
            {
                kill(pid).or_fail(left)?;
            }
            Lock::wait_until_free(&dir.lock()).or_fail(left)?;
        }
        crate::fuse::clear_dead_mount(&self.tree()).or_fail(left)?;
        if self.kept {
            print(format_args!("\nkept in {}", self.base.display()));
            return Ok(());
        }
        std::fs::remove_dir_all(&self.base).or_fail(left)?;
        print("\ncleaned up");
        Ok(())
    }

    fn mirror(&self) -> Result<Option<MirrorDir>, Failure> {
        Ok(self.state.all()?.into_iter().next().map(|(dir, _)| dir))
    }

    fn go_on(&self) -> Result<(), Failure> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Failure::new("interrupted"));
        }
        Ok(())
    }

    fn log(&self) -> String {
        let log = self
            .mirror()
            .ok()
            .flatten()
            .and_then(|dir| std::fs::read_to_string(dir.log()).ok())
            .unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(5).collect();
        let lines: Vec<_> = lines.into_iter().rev().collect();
        format!("the daemon's last words:\n{}", lines.join("\n"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(failure) = self.sweep() {
            complain(&failure);
        }
    }
}

fn kill(pid: u32) -> rustix::io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    match pid {
        Some(pid) => kill_process(pid, Signal::KILL),
        None => Err(rustix::io::Errno::SRCH),
    }
}

/// Notes an interrupt instead of dying of it, so that everything is cleaned up.
fn listen(interrupted: Arc<AtomicBool>) -> Result<(), Failure> {
    let message = || "cannot listen to signals".to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .or_fail(message)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut interrupt), Ok(mut terminate)) = (
                    signal(SignalKind::interrupt()),
                    signal(SignalKind::terminate()),
                ) else {
                    return;
                };
                tokio::select! {
                    _ = interrupt.recv() => (),
                    _ = terminate.recv() => (),
                }
                interrupted.store(true, Ordering::Relaxed);
            });
        })
        .or_fail(message)?;
    Ok(())
}
