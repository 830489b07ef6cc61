//! The directory to be served: opening it, and the reasons not to.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::Error;
use crate::replica::{Identity, Reserved, Root};
use crate::scratch::Scratch;
use crate::tree::links::Symlinks;
use crate::tree::{MirrorId, ReplicaId, scan};
use crate::wire::message::Refusal;

/// Filesystems that tell only of the changes that are made on this machine.
const REMOTE: [(i64, &str); 9] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x786f_4256, "a VirtualBox shared folder"),
    (0xbacb_acbc_u32 as i64, "a VMware shared folder"),
    (FUSE, "FUSE"),
];
const FUSE: i64 = 0x6573_5546;

/// An open directory that may be served.
pub(super) struct Served {
    pub(super) path: PathBuf,
    pub(super) root: Root,
    /// Why its changes cannot be watched, if they cannot.
    pub(super) remote: Option<String>,
    /// Whether its `.mirrorfs` lies elsewhere, or it itself does, for a look only.
    pub(super) aside: bool,
    /// Which symbolic links are made in it.
    pub(super) symlinks: Symlinks,
}

impl Served {
    /// Opens a directory. One that is missing is made if it may be and its parent exists.
    pub(super) fn open(path: &Path, state: &Path, make_it: bool) -> Result<Self, Error> {
        let shown = path.display();
        let refuse = |reason: String| Error::Refused(Refusal::Root { reason });
        let path = std::path::absolute(path).map_err(|error| Error::io("find", shown, error))?;
        let shown = path.display();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) if !make_it => {
                return Err(refuse(super::hello::gone(&path, "does not exist any more")));
            }
            Err(Errno::NOENT) => make(&path)?,
            Err(Errno::NOTDIR) => {
                return Err(refuse(format!(
                    "{shown} is not a directory: name another one"
                )));
            }
            Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED) => {
                return Err(refuse(format!(
                    "{shown} is a mount whose process is gone: run `mirrorfs umount` or `umount -l` for it on the peer"
                )));
            }
            Err(error @ (Errno::ACCESS | Errno::PERM)) => {
                return Err(refuse(format!(
                    "{shown} cannot be opened ({error}): log in as its owner, or change its mode on the peer"
                )));
            }
            Err(error) => return Err(Error::io("open", shown, error)),
        };
        let remote = check_filesystem(&path, &fd)?;
        if rustix::fs::accessat(
            &fd,
            c".",
            Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK,
            AtFlags::EACCESS,
        )
        .is_err()
        {
            return Err(refuse(format!(
                "{shown} is not writable for user {}: log in as its owner, or change its mode on the peer",
                rustix::process::geteuid().as_raw()
            )));
        }
        if let (Ok(root), Ok(state)) = (path.canonicalize(), state.canonicalize())
            && state.starts_with(&root)
        {
            return Err(refuse(format!(
                "the state directory {} lies inside {shown}: set MIRRORFS_STATE on the peer to a directory outside",
                state.display()
            )));
        }
        Ok(Self {
            path,
            root: Root::new(fd),
            remote,
            aside: false,
            symlinks: Symlinks::All,
        })
    }

    /// The same for a look: instead of one that is missing, and would be made, an empty one
    /// in `scratch` is shown.
    pub(super) fn open_for_a_look(
        path: &Path,
        state: &Path,
        scratch: &Scratch,
    ) -> Result<Self, Error> {
        match rustix::fs::stat(path) {
            Err(Errno::NOENT) => {}
            _ => return Self::open(path, state, false),
        }
        let fail = |error| Error::io("create", scratch.path().display(), error);
        Ok(Self {
            path: scratch.path().join("root"),
            root: Root::new(scratch.dir("root").map_err(fail)?.into()),
            remote: None,
            aside: true,
            symlinks: Symlinks::All,
        })
    }

    /// Whether the directory is free for a replica of `mirror` that is not `other`.
    /// Returns who it is, if it has been served before.
    pub(super) fn check_identity(
        &self,
        mirror: MirrorId,
        other: ReplicaId,
    ) -> Result<Option<Identity>, Error> {
        let found = Reserved::identity_of(self.root.fd())?;
        if let Some(found) = found {
            if found.replica == other {
                return Err(Error::Refused(Refusal::SameReplica));
            }
            if found.mirror != mirror {
                return Err(Error::Refused(Refusal::OtherMirror {
                    found: found.mirror,
                }));
            }
        }
        let path = self.path.canonicalize().unwrap_or(self.path.clone());
        for above in path.ancestors().skip(1) {
            let Ok(fd) = File::open(above) else { continue };
            match Reserved::identity_of(fd.as_fd()) {
                Ok(Some(identity)) if identity.replica == other => {
                    return Err(Error::Refused(Refusal::SameReplica));
                }
                Ok(Some(_)) => {
                    return Err(Error::Refused(Refusal::Root {
                        reason: format!(
                            "{} lies inside {}, which belongs to a mirror itself: name a directory outside",
                            path.display(),
                            above.display()
                        ),
                    }));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Whether the path still leads to the directory that was opened.
    pub(super) fn is_in_place(&self, reserved: &Reserved) -> bool {
        let (Ok(here), Ok(there)) = (
            rustix::fs::fstat(self.root.fd()),
            rustix::fs::stat(&self.path),
        ) else {
            return false;
        };
        (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
            && (self.aside || reserved.is_in_place(self.root.fd()))
    }

    /// What the index takes for the identity of the directory.
    pub(super) fn identity(&self, replica: ReplicaId) -> Result<Vec<u8>, Error> {
        let fail = |error| Error::io("look at", self.path.display(), error);
        let stat = rustix::fs::fstat(self.root.fd()).map_err(|error| fail(error.into()))?;
        let filesystem = scan::filesystem_of(self.root.fd()).map_err(fail)?;
        Ok(format!("{replica} {filesystem} {}", stat.st_ino).into_bytes())
    }
}

fn make(path: &Path) -> Result<OwnedFd, Error> {
    let shown = path.display();
    let parent = path.parent().unwrap_or(path);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(at) = rustix::fs::open(parent, flags, Mode::empty()) else {
        return Err(Error::Refused(Refusal::Root {
            reason: format!(
                "{shown} does not exist, and neither does its parent {}: create {} on the peer, or name another directory",
                parent.display(),
                parent.display()
            ),
        }));
    };
    let name = path.file_name().unwrap_or(OsStr::from_bytes(b"."));
    match rustix::fs::mkdirat(&at, name, Mode::RWXU | Mode::RWXG | Mode::RWXO) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => {
            return Err(Error::Refused(Refusal::Root {
                reason: format!(
                    "{shown} does not exist and cannot be created ({error}): create it on the peer"
                ),
            }));
        }
    }
    rustix::fs::openat(&at, name, flags, Mode::empty())
        .map_err(|error| Error::io("open", shown, error))
}

/// Refuses a mirrorfs mount, and says why a filesystem cannot be watched.
fn check_filesystem(path: &Path, fd: &OwnedFd) -> Result<Option<String>, Error> {
    let stat = match rustix::fs::fstatfs(fd) {
        Ok(stat) => stat,
        Err(error) => return Err(Error::io("look at", path.display(), error)),
    };
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let magic = stat.f_type as i64;
    if magic == FUSE && is_mirrorfs(fd) {
        return Err(Error::Refused(Refusal::Root {
            reason: format!(
                "{} is a mirrorfs mount: serve a plain directory, or unmount it there first (`mirrorfs umount`)",
                path.display()
            ),
        }));
    }
    Ok(REMOTE
        .iter()
        .find(|(known, _)| *known == magic)
        .map(|(_, name)| {
            format!(
                "{} is on {name}, which tells only of changes made on this machine",
                path.display()
            )
        }))
}

fn is_mirrorfs(fd: &OwnedFd) -> bool {
    let (Ok(stat), Ok(mounts)) = (rustix::fs::fstat(fd), std::fs::read("/proc/self/mountinfo"))
    else {
        return false;
    };
    let device = format!(
        "{}:{}",
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev)
    );
    mounts.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        fields.nth(2) == Some(device.as_bytes())
            && fields
                .skip_while(|field| *field != b"-")
                .nth(1)
                .is_some_and(|fs_type| fs_type == b"fuse.mirrorfs")
    })
}
