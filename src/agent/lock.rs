//! One agent per directory. The lock has a live owner: the kernel gives it back when its
//! holder dies, however it dies. A newer session takes it from an older one, because the
//! older one's link is most likely dead without having noticed.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::Error;
use crate::replica::Reserved;
use crate::seeded::{self, Bug};

/// The lock's file in `.mirrorfs`.
const LOCK: &str = "lock";
/// The file in `.mirrorfs` whose appearance tells the holder to let go.
pub(super) const FENCE: &str = "fence";

/// How long an older session may take to let go, to die of SIGTERM, and to die of
/// SIGKILL, each since the beginning.
const ASK: Duration = Duration::from_secs(1);
const TERMINATE: Duration = Duration::from_secs(4);
const DEADLINE: Duration = Duration::from_secs(8);
/// How often the lock is tried meanwhile.
const PAUSE: Duration = Duration::from_millis(10);

/// The held lock of a directory.
pub(super) struct Lock {
    file: OwnedFd,
}

impl Lock {
    /// Takes the lock, from an older session if need be.
    pub(super) fn take(reserved: &Reserved) -> Result<Self, Error> {
        let lock = Self::open(reserved)?;
        let begin = Instant::now();
        let mut asked = false;
        let mut sent = None;
        while !seeded::has(Bug::NoFence) && !lock.try_hold()? {
            let waited = begin.elapsed();
            if !asked {
                asked = true;
                reserved.replace_file(FENCE, b"")?;
            }
            let signal = match waited {
                _ if waited > DEADLINE => {
                    return Err(Error::Locked {
                        pid: lock.holder(reserved),
                    });
                }
                _ if waited > TERMINATE => Some(Signal::KILL),
                _ if waited > ASK => Some(Signal::TERM),
                _ => None,
            };
            if signal != sent {
                sent = signal;
                if let Some(signal) = signal {
                    lock.signal(reserved, signal);
                }
            }
            #[cfg(test)]
            if crate::sim::jobs::others_go_on() {
                continue;
            }
            std::thread::sleep(PAUSE);
        }
        reserved.remove_file(FENCE)?;
        lock.sign()?;
        Ok(lock)
    }

    /// Takes the lock if nobody holds it.
    pub(super) fn take_free(reserved: &Reserved) -> Result<Self, Error> {
        let lock = Self::open(reserved)?;
        if !lock.try_hold()? {
            return Err(Error::Locked {
                pid: lock.holder(reserved),
            });
        }
        lock.sign()?;
        Ok(lock)
    }

    fn open(reserved: &Reserved) -> Result<Self, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(reserved.dir(), LOCK, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| Error::io("open", ".mirrorfs/lock", error))?;
        Ok(Self { file })
    }

    fn try_hold(&self) -> Result<bool, Error> {
        use rustix::io::Errno;
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(error) => Err(Error::io("lock", ".mirrorfs/lock", error)),
        }
    }

    /// Writes down who holds the lock.
    fn sign(&self) -> Result<(), Error> {
        let text = format!("{}\n", getpid().as_raw_nonzero());
        rustix::fs::ftruncate(&self.file, 0)
            .and_then(|()| rustix::io::pwrite(&self.file, text.as_bytes(), 0))
            .map(|_| ())
            .map_err(|error| Error::io("write", ".mirrorfs/lock", error))
    }

    fn holder(&self, reserved: &Reserved) -> Option<i32> {
        let text = reserved.read_file(LOCK).ok().flatten()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok()
    }

    /// Sends a signal to the holder if it is another process that has this very lock
    /// open. The number in the file alone proves nothing: it may be of another machine,
    /// or have been used again.
    fn signal(&self, reserved: &Reserved, signal: Signal) {
        let Some(pid) = self.holder(reserved).and_then(Pid::from_raw) else {
            return;
        };
        if pid == getpid() {
            return;
        }
        // First a hold on the process, then the look: so both are about the same one.
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
            && self.is_open_in(pid)
        {
            tracing::info!(
                pid = pid.as_raw_nonzero(),
                ?signal,
                "ending an older session"
            );
            let _ = pidfd_send_signal(&process, signal);
        }
    }

    fn is_open_in(&self, pid: Pid) -> bool {
        use std::os::unix::fs::MetadataExt;
        let Ok(own) = rustix::fs::fstat(&self.file) else {
            return false;
        };
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()))
        else {
            return false;
        };
        descriptors
            .flatten()
            .filter_map(|entry| std::fs::metadata(entry.path()).ok())
            .any(|found| (found.dev(), found.ino()) == (own.st_dev, own.st_ino))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tree::Id;
    use std::os::fd::AsFd;

    /// "A newer session fences the older before it replays."
    #[test]
    pub(crate) fn a_newer_session_waits_until_the_older_has_let_go() {
        use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id::random().unwrap()).unwrap();
        let older = Lock::take(&reserved).unwrap();
        let fence = dir.path().join(".mirrorfs").join(FENCE);
        let (let_go, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let waited = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !fence.exists() && !over.load(SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let_go.store(true, SeqCst);
                drop(older);
            });
            let newer = Lock::take(&reserved);
            let waited = let_go.load(SeqCst);
            over.store(true, SeqCst);
            newer.map(|_| waited)
        });
        assert!(waited.unwrap(), "both hold the directory");
    }

    #[test]
    fn a_number_alone_is_no_holder() {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id::random().unwrap()).unwrap();
        let lock = Lock::take(&reserved).unwrap();
        assert_eq!(
            lock.holder(&reserved),
            Some(getpid().as_raw_nonzero().get())
        );
        assert!(lock.is_open_in(getpid()));
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        assert!(!lock.is_open_in(Pid::from_child(&other)));
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(matches!(
            Lock::take_free(&reserved),
            Err(Error::Locked { pid: Some(_) })
        ));
        drop(lock);
        Lock::take_free(&reserved).unwrap();
    }
}
