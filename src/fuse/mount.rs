//! The mount itself: made over the directory whose descriptor the filesystem holds,
//! owned by this process, never unmounted behind a program's back.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::convert::Ids;
use super::device;
use super::seats::Seats;
use super::session::{Channel, Serving, Session};
use super::{fusermount, mountinfo};
use crate::fs::Filesystem;
use crate::tree::Ino;

/// What the mount says it is made from. No path: programs look at those of all mounts
/// (mkfs.btrfs does), and fail where the mount is another user's, or dead.
const SOURCE: &str = "mirrorfs";

/// What went wrong with a mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel offers no FUSE.
    #[error(
        "cannot open {device}: {0}; is the fuse module loaded (`modprobe fuse`), and does this container have the device?",
        device = device::PATH
    )]
    Device(#[source] io::Error),
    /// The mount was refused.
    #[error("cannot mount over {}: {source}", .dir.display())]
    Mount {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The filesystem was opened on another directory.
    #[error("{} is not the directory that was opened ({})", .dir.display(), .lower.display())]
    Elsewhere {
        /// Where to mount.
        dir: PathBuf,
        /// What was opened.
        lower: PathBuf,
    },
    /// The session did not come up.
    #[error("the FUSE session over {} failed: {source}", .dir.display())]
    Session {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something still uses the mount.
    #[error(
        "{} is busy: a program has a file open or its working directory in it; `fuser -vm {}` shows which",
        .dir.display(),
        .dir.display()
    )]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// Ours is not the mount on top.
    #[error("{} is not this mount any more", .dir.display())]
    NotMounted {
        /// The directory.
        dir: PathBuf,
    },
    /// Unmounting failed.
    #[error("cannot unmount {}: {source}", .dir.display())]
    Unmount {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The most threads that serve requests. There are not more of them than processors.
    pub threads: usize,
    /// Ignore setuid and setgid bits of programs in the tree.
    pub nosuid: bool,
    /// Ignore device nodes in the tree.
    pub nodev: bool,
    /// Serve over io_uring where the kernel offers that.
    pub io_uring: bool,
    /// Mount with mount(2) rather than through `fusermount3`.
    pub privileged: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            threads: usize::MAX,
            nosuid: false,
            nodev: false,
            io_uring: true,
            privileged: rustix::process::geteuid().is_root(),
        }
    }
}

#[derive(Debug, Default)]
struct Ended {
    result: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
}

/// A live mount. Dropping it does not unmount: a mount outlives whoever forgets it,
/// as an empty directory would be worse than one that does not answer.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    device: u64,
    privileged: bool,
    channel: Channel,
    ended: Arc<Ended>,
}

/// Mounts a filesystem over the directory that it was opened on, and serves it on
/// threads of its own.
pub fn mount(
    filesystem: Arc<Filesystem>,
    dir: &Path,
    options: MountOptions,
) -> Result<Mount, MountError> {
    let lower = filesystem.lower();
    let elsewhere = || MountError::Elsewhere {
        dir: dir.to_path_buf(),
        lower: lower.dir().to_path_buf(),
    };
    let mount_failed = |source: io::Error| MountError::Mount {
        dir: lower.dir().to_path_buf(),
        source,
    };
    let at_dir = rustix::fs::stat(dir).map_err(|error| mount_failed(error.into()))?;
    if at_dir.st_dev != lower.device() || Ino(at_dir.st_ino) != lower.ino() {
        return Err(elsewhere());
    }
    let dir = lower.dir().to_path_buf();
    let fuse = if options.privileged {
        mount_privileged(&filesystem, &options)?
    } else {
        let text = format!("default_permissions,subtype=mirrorfs,fsname={SOURCE}");
        fusermount::mount(&dir, &text).map_err(mount_failed)?
    };
    // Whatever fails from here on must not leave a mount that nobody serves.
    let undo = |error: MountError| {
        if let Err(failed) = detach(&dir, options.privileged) {
            tracing::warn!("cannot take the mount back: {failed}");
        }
        error
    };
    let device = match mountinfo::topmost(&dir) {
        Ok(Some(mounted)) if mounted.fs_type.starts_with("fuse") => mounted.device,
        Ok(_) => return Err(undo(MountError::NotMounted { dir: dir.clone() })),
        Err(error) => return Err(undo(mount_failed(error))),
    };
    serve(filesystem, fuse, dir.clone(), device, &options).map_err(undo)
}

fn mount_privileged(
    filesystem: &Filesystem,
    options: &MountOptions,
) -> Result<OwnedFd, MountError> {
    let lower = filesystem.lower();
    let failed = |source: io::Error| MountError::Mount {
        dir: lower.dir().to_path_buf(),
        source,
    };
    let fuse = device::open().map_err(|error| MountError::Device(error.into()))?;
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
        fuse.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let data = CString::new(data).map_err(|error| failed(error.into()))?;
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::NOSUID, options.nosuid);
    flags.set(MountFlags::NODEV, options.nodev);
    // By its descriptor: whatever happens to the path meanwhile, it is the directory
    // that was opened that gets covered.
    let target = format!("/proc/self/fd/{}", lower.root().as_fd().as_raw_fd());
    rustix::mount::mount(SOURCE, target, "fuse.mirrorfs", flags, data.as_c_str())
        .map_err(|error| failed(error.into()))?;
    Ok(fuse)
}

fn serve(
    filesystem: Arc<Filesystem>,
    fuse: OwnedFd,
    dir: PathBuf,
    number: u64,
    options: &MountOptions,
) -> Result<Mount, MountError> {
    let failed = |source: io::Error| MountError::Session {
        dir: dir.clone(),
        source,
    };
    let ids = Ids {
        root: filesystem.root(),
    };
    // Who may come in is decided by the kernel: allow_other or not.
    let seats = Seats::new(options.threads);
    let session = Session::establish(fuse, options.io_uring, &seats).map_err(failed)?;
    let device = Arc::clone(session.device());
    filesystem.on_stale_attributes(Some(Box::new(move |ino| {
        if let Err(error) = device.attributes_changed(ids.id(ino)) {
            tracing::debug!(ino = ino.0, %error, "nothing to invalidate");
        }
    })));
    let served = Arc::clone(&filesystem);
    let Serving { threads, channel } = session.serve(filesystem, ids, &seats).map_err(failed)?;
    tracing::info!("requests come through {channel}");
    let ended = Arc::new(Ended::default());
    let end = Arc::clone(&ended);
    std::thread::Builder::new()
        .name("fuse-session".into())
        .spawn(move || attend(threads, &served, &end))
        .map_err(failed)?;
    Ok(Mount {
        dir,
        device: number,
        privileged: options.privileged,
        channel,
        ended,
    })
}

/// Waits for the threads that serve: they end when the mount does.
fn attend(threads: Vec<JoinHandle<Result<(), Errno>>>, served: &Filesystem, end: &Ended) {
    let mut result = Ok(());
    for thread in threads {
        let ended = match thread.join() {
            Ok(ended) => ended.map_err(|error| error.to_string()),
            Err(_) => Err("a thread that served it panicked".into()),
        };
        result = result.and(ended);
    }
    if let Err(error) = &result {
        tracing::error!("the FUSE session ended: {error}");
    }
    // It holds the FUSE descriptor.
    served.on_stale_attributes(None);
    *end.result.lock() = Some(result);
    end.changed.notify_all();
}

impl Mount {
    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The device number that everything in the mount shows as `st_dev`.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// How requests reach the daemon.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether the session is over: unmounted by somebody, or aborted.
    pub fn ended(&self) -> bool {
        self.ended.result.lock().is_some()
    }

    /// Waits for the end of the session and tells how it came.
    pub fn wait(&self) -> io::Result<()> {
        let mut result = self.ended.result.lock();
        loop {
            match &*result {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => return Err(io::Error::other(error.clone())),
                None => self.ended.changed.wait(&mut result),
            }
        }
    }

    /// Waits for the end of the session for a while; false if it did not come.
    pub fn wait_for(&self, time: Duration) -> bool {
        let mut result = self.ended.result.lock();
        self.ended
            .changed
            .wait_while_for(&mut result, |result| result.is_none(), time);
        result.is_some()
    }

    /// Unmounts, and waits for the session to end. Refused while a program uses the
    /// mount.
    pub fn unmount(&self) -> Result<(), MountError> {
        if self.ended() {
            return Ok(());
        }
        let failed = |source: io::Error| MountError::Unmount {
            dir: self.dir.clone(),
            source,
        };
        let top = mountinfo::topmost(&self.dir).map_err(failed)?;
        if top.is_none_or(|top| top.device != self.device) {
            return Err(MountError::NotMounted {
                dir: self.dir.clone(),
            });
        }
        let result = if self.privileged {
            rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW).map_err(io::Error::from)
        } else {
            fusermount::unmount(&self.dir, false)
        };
        result.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::BUSY) => MountError::Busy {
                dir: self.dir.clone(),
            },
            _ => failed(error),
        })?;
        // A mount in another namespace keeps the connection alive: not ours to wait for.
        self.wait_for(Duration::from_secs(5));
        Ok(())
    }

    /// The way out of a hang: the kernel answers every request with ECONNABORTED, and
    /// the mount is dead.
    pub fn abort(&self) -> io::Result<()> {
        let minor = rustix::fs::minor(self.device);
        std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1")
    }
}

/// Detaches a dead mount from a directory. Returns whether there was one.
pub fn clear_dead_mount(dir: &Path) -> Result<bool, MountError> {
    let mut cleared = false;
    loop {
        let dead = rustix::fs::open(
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|held| rustix::fs::fstatfs(&held));
        // A request that was under way when the daemon died was aborted, and what comes
        // while the kernel takes its rings down is cancelled.
        if !matches!(
            dead,
            Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED)
        ) {
            return Ok(cleared);
        }
        detach(dir, rustix::process::geteuid().is_root()).map_err(|source| {
            MountError::Unmount {
                dir: dir.to_path_buf(),
                source,
            }
        })?;
        cleared = true;
    }
}

pub(super) fn detach(dir: &Path, privileged: bool) -> io::Result<()> {
    if privileged {
        Ok(rustix::mount::unmount(
            dir,
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        )?)
    } else {
        fusermount::unmount(dir, true)
    }
}
