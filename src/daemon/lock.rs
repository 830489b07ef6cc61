//! The lock of a mirror: one live owner, and everybody can see who it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// A held lock. The kernel releases it with the last descriptor of its open file, so
/// it cannot outlive its owner, however that ended.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// What became of an attempt to take the lock.
#[derive(Debug)]
pub enum Attempt {
    /// It is ours.
    Taken(Lock),
    /// Another process holds it; its pid, if it has written it down yet.
    Held(Option<u32>),
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn try_lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn owner(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// How long a holder that was killed may take to be gone.
pub(super) const DYING: Duration = Duration::from_secs(10);

/// Whether a process is gone, or has been killed and not been buried: its descriptors are
/// closed only when its last thread has ended.
fn is_ending(pid: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return true;
    };
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let killed = |name: &str| {
        let pending = field(name).and_then(|mask| u64::from_str_radix(mask, 16).ok());
        pending.is_some_and(|mask| mask & 1 << (libc::SIGKILL - 1) != 0)
    };
    field("State:").is_some_and(|state| state.starts_with(['Z', 'X']))
        || killed("SigPnd:")
        || killed("ShdPnd:")
}

impl Lock {
    /// Takes the lock if it is free, and writes this process's pid into it.
    pub fn take(path: &Path) -> io::Result<Attempt> {
        Self::take_file(open(path)?)
    }

    /// Takes the lock of a file that is open for reading and writing.
    pub fn take_file(mut file: File) -> io::Result<Attempt> {
        while !try_lock(&file, FlockOperation::NonBlockingLockExclusive)? {
            // Somebody who merely looks whether it is held shares it for a moment. An
            // owner does not.
            if !try_lock(&file, FlockOperation::NonBlockingLockShared)? {
                return Ok(Attempt::Held(owner(&mut file)));
            }
            std::thread::yield_now();
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Attempt::Taken(Self { _file: file }))
    }

    /// Takes the lock; a holder that is on its way out (killed, but not yet gone) is
    /// waited for.
    pub fn take_from_the_dying(path: &Path) -> io::Result<Attempt> {
        let deadline = Instant::now() + DYING;
        loop {
            match Self::take(path)? {
                Attempt::Held(Some(pid)) if is_ending(pid) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                attempt => return Ok(attempt),
            }
        }
    }

    /// Whether the lock is held, and by which process.
    pub fn holder(path: &Path) -> io::Result<Option<Option<u32>>> {
        let mut file = match OpenOptions::new().read(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if try_lock(&file, FlockOperation::NonBlockingLockShared)? {
            Ok(None)
        } else {
            Ok(Some(owner(&mut file)))
        }
    }

    /// Returns once nobody holds the lock.
    pub fn wait_until_free(path: &Path) -> io::Result<()> {
        match OpenOptions::new().read(true).open(path) {
            Ok(file) => Ok(flock(&file, FlockOperation::LockShared)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_holder_and_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert_eq!(Lock::holder(&path).unwrap(), None);
        let Attempt::Taken(lock) = Lock::take(&path).unwrap() else {
            panic!("a fresh lock is free")
        };
        let me = Some(std::process::id());
        assert!(matches!(Lock::take(&path).unwrap(), Attempt::Held(pid) if pid == me));
        assert_eq!(Lock::holder(&path).unwrap(), Some(me));
        drop(lock);
        assert_eq!(Lock::holder(&path).unwrap(), None);
        assert!(matches!(Lock::take(&path).unwrap(), Attempt::Taken(_)));
        Lock::wait_until_free(&path).unwrap();
    }

    #[test]
    fn who_is_gone_is_ending() {
        assert!(!is_ending(std::process::id()));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        assert!(!is_ending(child.id()));
        child.kill().unwrap();
        // Until it is waited for it is a zombie; before that the signal is pending.
        assert!(is_ending(child.id()));
        child.wait().unwrap();
        assert!(is_ending(child.id()));
    }

    #[test]
    fn looking_is_not_holding() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (path, done) = (&path, &done);
            for _ in 0..2 {
                scope.spawn(move || {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        Lock::holder(path).unwrap();
                    }
                });
            }
            for _ in 0..500 {
                assert!(matches!(Lock::take(path).unwrap(), Attempt::Taken(_)));
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
