//! The directory `.mirrorfs` in a tree's root: who the tree is, and room on the tree's
//! own filesystem for what is on its way in or out of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::late::LATE;
use super::{Context, Error};
use crate::tree::{ContentHash, Id, MirrorId, ReplicaId};

/// The file that says who a tree is.
const IDENTITY: &str = "identity";
/// Longest identity file that is read, in bytes.
const IDENTITY_MAX: u64 = 64 * 1024;

/// Who a tree is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The mirror it belongs to.
    pub mirror: MirrorId,
    /// Which of the mirror's replicas it is.
    pub replica: ReplicaId,
}

/// How the identity is written down, for people to read.
#[derive(Serialize, Deserialize)]
struct IdentityFile {
    mirror: String,
    replica: String,
}

/// An open `.mirrorfs`. It is reached through its descriptor only, so that a rename or
/// an unmount of the tree cannot redirect it.
pub struct Reserved {
    dir: OwnedFd,
    staging: OwnedFd,
    trash: OwnedFd,
    conflicts: OwnedFd,
    late: OwnedFd,
    boot: Option<String>,
}

impl Reserved {
    /// Opens the reserved directory of a tree; none if the tree has none, or one that
    /// was never finished.
    pub fn open(root: BorrowedFd<'_>) -> Result<Option<(Self, Identity)>, Error> {
        let dir = match open_dir(root, ".mirrorfs") {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error).context("open", ".mirrorfs"),
        };
        let Some(identity) = read_identity(dir.as_fd())? else {
            return Ok(None);
        };
        Ok(Some((Self::with(dir)?, identity)))
    }

    /// Who the tree is whose root this is, without touching anything.
    pub fn identity_of(root: BorrowedFd<'_>) -> Result<Option<Identity>, Error> {
        match open_dir(root, ".mirrorfs") {
            Ok(dir) => read_identity(dir.as_fd()),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error).context("open", ".mirrorfs"),
        }
    }

    /// Makes the reserved directory of a tree that has none, with a new replica of
    /// `mirror`. It exists, durably, when this returns. A directory whose making was cut
    /// off is completed; one that is complete is taken as it is if it belongs to
    /// `mirror`.
    pub fn create(root: BorrowedFd<'_>, mirror: MirrorId) -> Result<(Self, Identity), Error> {
        Self::make(root, mirror, None)
    }

    /// The same for a tree that was lost: with the identity it had.
    pub fn create_again(
        root: BorrowedFd<'_>,
        identity: Identity,
    ) -> Result<(Self, Identity), Error> {
        Self::make(root, identity.mirror, Some(identity.replica))
    }

    fn make(
        root: BorrowedFd<'_>,
        mirror: MirrorId,
        replica: Option<ReplicaId>,
    ) -> Result<(Self, Identity), Error> {
        make_dir(root, ".mirrorfs").context("create", ".mirrorfs")?;
        let dir = open_dir(root, ".mirrorfs").context("open", ".mirrorfs")?;
        if let Some(identity) = read_identity(dir.as_fd())? {
            if identity.mirror != mirror {
                return Err(Error::OtherMirror {
                    found: identity.mirror,
                });
            }
            return Ok((Self::with(dir)?, identity));
        }
        // So that no repository around the tree sees any of this.
        replace_file(dir.as_fd(), ".gitignore", b"*\n")?;
        let reserved = Self::with(dir)?;
        let replica = match replica {
            Some(replica) => replica,
            None => Id::random().map_err(|_| Error::Random)?,
        };
        let identity = Identity { mirror, replica };
        // Last, because it is what makes the directory complete.
        let file = IdentityFile {
            mirror: identity.mirror.to_string(),
            replica: identity.replica.to_string(),
        };
        let text = serde_json::to_vec_pretty(&file)
            .map_err(std::io::Error::from)
            .context("write", ".mirrorfs/identity")?;
        replace_file(reserved.dir(), IDENTITY, &text)?;
        sync_dir(root).context("sync", ".")?;
        Ok((reserved, identity))
    }

    fn with(dir: OwnedFd) -> Result<Self, Error> {
        let inner = |name: &'static str| -> Result<OwnedFd, Error> {
            make_dir(dir.as_fd(), name).context("create", format!(".mirrorfs/{name}"))?;
            open_dir(dir.as_fd(), name).context("open", format!(".mirrorfs/{name}"))
        };
        Ok(Self {
            staging: inner("staging")?,
            trash: inner("trash")?,
            conflicts: inner("conflicts")?,
            late: inner(LATE)?,
            dir,
            boot: mirrorfs_journal::boot_id().ok(),
        })
    }

    /// The reserved directory itself.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// This life of the machine; none if the kernel does not name it.
    pub fn boot(&self) -> Option<&str> {
        self.boot.as_deref()
    }

    /// Where contents and new inodes wait until they are placed.
    pub fn staging(&self) -> BorrowedFd<'_> {
        self.staging.as_fd()
    }

    /// Where replaced and removed files go.
    pub fn trash(&self) -> BorrowedFd<'_> {
        self.trash.as_fd()
    }

    /// Where versions are kept that lost a conflict, or an unforeseen race.
    pub fn conflicts(&self) -> BorrowedFd<'_> {
        self.conflicts.as_fd()
    }

    /// Where replaced and removed files wait that a program has written to since.
    pub fn late(&self) -> BorrowedFd<'_> {
        self.late.as_fd()
    }

    /// The name in [`staging`](Self::staging) under which a complete and verified
    /// content is found.
    pub fn staged_name(&self, hash: ContentHash) -> String {
        hash.to_string()
    }

    /// Whether the directory still is where it was opened, with its identity in it. It
    /// is not when the tree was unmounted, wiped or replaced.
    pub fn is_in_place(&self, root: BorrowedFd<'_>) -> bool {
        let Ok(Some(there)) = crate::tree::scan::stat_at(root, crate::tree::RESERVED) else {
            return false;
        };
        let here = rustix::fs::fstat(&self.dir);
        let identity = crate::tree::scan::stat_at(self.dir.as_fd(), IDENTITY.as_bytes());
        here.is_ok_and(|here| (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino))
            && matches!(identity, Ok(Some(_)))
    }

    /// Reads one of the small files of the directory; none if there is none.
    pub fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        read_small(self.dir.as_fd(), name)
    }

    /// Replaces one of the small files of the directory, durably and in one step.
    pub fn replace_file(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        replace_file(self.dir.as_fd(), name, content)
    }

    /// Writes one of the small files of the directory, over what is in it, for what only has
    /// to outlive this process: not durable. What was longer keeps its end until that is
    /// cut off.
    pub fn overwrite_file(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = || format!(".mirrorfs/{name}");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)
            .context("open", path())?;
        let mut file = File::from(fd);
        file.write_all(content).context("write", path())?;
        let len = content.len() as u64;
        if file.metadata().context("look at", path())?.len() > len {
            file.set_len(len).context("write", path())?;
        }
        Ok(())
    }

    /// Removes one of the small files of the directory, if it is there.
    pub fn remove_file(&self, name: &str) -> Result<(), Error> {
        match rustix::fs::unlinkat(&self.dir, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).context("remove", format!(".mirrorfs/{name}")),
        }
    }
}

/// Makes everything durable that happened to the names of a directory.
pub(super) fn sync_dir(dir: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let fd = rustix::fs::openat(
        dir,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    super::sync::dir(fd.as_fd())
}

fn open_dir(at: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        at,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Makes a directory for its owner alone: it holds contents of files of any mode.
pub(super) fn make_dir(at: BorrowedFd<'_>, name: &str) -> rustix::io::Result<()> {
    match rustix::fs::mkdirat(at, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn read_identity(dir: BorrowedFd<'_>) -> Result<Option<Identity>, Error> {
    let Some(text) = read_small(dir, IDENTITY)? else {
        return Ok(None);
    };
    let bad = |reason: String| Error::Identity {
        path: ".mirrorfs/identity".to_owned(),
        reason,
    };
    let file: IdentityFile = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let parse =
        |text: &str| Id::parse(text).ok_or_else(|| bad("not 32 hexadecimal digits".to_owned()));
    Ok(Some(Identity {
        mirror: parse(&file.mirror)?,
        replica: parse(&file.replica)?,
    }))
}

fn read_small(dir: BorrowedFd<'_>, name: &str) -> Result<Option<Vec<u8>>, Error> {
    let path = || format!(".mirrorfs/{name}");
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error).context("open", path()),
    };
    let mut content = Vec::new();
    file.take(IDENTITY_MAX)
        .read_to_end(&mut content)
        .context("read", path())?;
    Ok(Some(content))
}

fn replace_file(dir: BorrowedFd<'_>, name: &str, content: &[u8]) -> Result<(), Error> {
    let path = || format!(".mirrorfs/{name}");
    let new = format!("{name}.new");
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        rustix::fs::openat(dir, &new, flags, Mode::RUSR | Mode::WUSR).context("create", path())?;
    let mut file = File::from(fd);
    file.write_all(content).context("write", path())?;
    super::sync::file(&file).context("sync", path())?;
    rustix::fs::renameat(dir, &new, dir, name).context("replace", path())?;
    sync_dir(dir).context("sync", ".mirrorfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_lasts() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        assert!(Reserved::open(root.as_fd()).unwrap().is_none());
        let mirror = Id([3; 16]);
        let (reserved, made) = Reserved::create(root.as_fd(), mirror).unwrap();
        assert_eq!(made.mirror, mirror);
        assert!(reserved.is_in_place(root.as_fd()));
        let (_, found) = Reserved::open(root.as_fd()).unwrap().unwrap();
        assert_eq!(found, made);
        let (_, again) = Reserved::create(root.as_fd(), mirror).unwrap();
        assert_eq!(again, made, "creating twice keeps the replica");
        assert!(matches!(
            Reserved::create(root.as_fd(), Id([4; 16])),
            Err(Error::OtherMirror { found }) if found == mirror
        ));
        let ignore = std::fs::read(dir.path().join(".mirrorfs/.gitignore")).unwrap();
        assert_eq!(ignore, b"*\n");
        std::fs::remove_dir_all(dir.path().join(".mirrorfs")).unwrap();
        assert!(!reserved.is_in_place(root.as_fd()));
    }

    #[test]
    fn a_half_made_directory_is_completed_and_a_damaged_one_reported() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join(".mirrorfs")).unwrap();
        assert!(Reserved::open(root.as_fd()).unwrap().is_none());
        Reserved::create(root.as_fd(), Id([3; 16])).unwrap();
        std::fs::write(dir.path().join(".mirrorfs/identity"), b"{}").unwrap();
        assert!(matches!(
            Reserved::open(root.as_fd()),
            Err(Error::Identity { .. })
        ));
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join(".mirrorfs")).unwrap();
        assert!(Reserved::create(root.as_fd(), Id([3; 16])).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
