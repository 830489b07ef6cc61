//! Contents on their way into a tree, and the new inodes made of them.
//!
//! A content is collected under its hash in `.mirrorfs/staging`: as `<hash>.part` while
//! it is incomplete, as `<hash>` once it has been verified. What arrived stays there
//! across reconnects and restarts. From a complete content [`Staging::instantiate`]
//! makes an inode under an unguessable name that is ready to be renamed into the tree.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::beneath::Place;
use super::delta::{ReadAt, STRETCH, fill};
use super::{Context, Error, Reserved, meta};
use crate::tree::hash::{Hasher, hash_file};
use crate::tree::scan;
use crate::tree::{Content, ContentHash, Entry, Id, Kind};

/// The unit in which runs of zero bytes become holes.
const BLOCK: usize = 4096;

/// The unguessable name of an inode in the staging directory.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct StagedName(String);

impl StagedName {
    /// Draws a name.
    pub fn random() -> Result<Self, Error> {
        Ok(Self(Id::random().map_err(|_| Error::Random)?.to_string()))
    }

    /// Checks a name.
    pub fn new(name: &str) -> Option<Self> {
        Id::parse(name).map(|_| Self(name.to_owned()))
    }

    /// The name as a file name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<[u8]> for StagedName {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// Who shall own what is made. Given by a process that may choose (root) only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What [`Staging::instantiate`] made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Placed {
    /// Its inode number, which survives being renamed into place.
    pub ino: u64,
    /// Whether the filesystem holds all of the entry's attributes.
    pub complete: bool,
}

/// The staging directory of a replica.
pub struct Staging {
    dir: OwnedFd,
}

impl Staging {
    /// Works in the staging directory of `reserved`.
    pub fn new(reserved: &Reserved) -> Result<Self, Error> {
        let dir = reserved
            .staging()
            .try_clone_to_owned()
            .context("open", ".mirrorfs/staging")?;
        Ok(Self { dir })
    }

    /// Whether a content is held completely and has been verified.
    pub fn is_complete(&self, hash: ContentHash) -> Result<bool, Error> {
        let found = scan::stat_at(self.dir.as_fd(), hash.to_string().as_bytes())
            .context("look at", shown(&hash.to_string()))?;
        Ok(found.is_some())
    }

    /// A content, if it is held completely.
    pub fn read(&self, hash: ContentHash) -> Result<Option<Vec<u8>>, Error> {
        let name = hash.to_string();
        if !self.is_complete(hash)? {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        scan::open_file(self.dir.as_fd(), name.as_bytes())
            .and_then(|mut file| std::io::Read::read_to_end(&mut file, &mut bytes))
            .context("read", shown(&name))?;
        Ok(Some(bytes))
    }

    /// How many bytes of an incomplete content are held.
    pub fn held(&self, hash: ContentHash) -> Result<u64, Error> {
        let name = part(hash);
        let found =
            scan::stat_at(self.dir.as_fd(), name.as_bytes()).context("look at", shown(&name))?;
        Ok(found.map_or(0, |stat| scan::size_of(&stat)))
    }

    /// Begins to collect a content, or goes on where an earlier attempt stopped. What is
    /// held of it is read again, because only a hash from the first byte on can verify it.
    /// While another attempt is under way this one fails: what one writes, the other has
    /// not verified.
    pub fn begin(&self, hash: ContentHash, size: u64) -> Result<Incoming<'_>, Error> {
        let name = part(hash);
        let file = Claimed::new(self.dir.as_fd(), &name).context("create", shown(&name))?;
        let held = file.metadata().context("look at", shown(&name))?.len();
        let mut hasher = Hasher::new();
        if held > size {
            file.set_len(0).context("truncate", shown(&name))?;
        } else {
            hasher.read_to(&file, held).context("read", shown(&name))?;
        }
        Ok(Incoming {
            staging: self,
            partial: Partial {
                hash,
                size,
                file,
                hasher,
            },
        })
    }

    /// Goes on with a content that was set aside.
    pub fn resume(&self, partial: Partial) -> Incoming<'_> {
        Incoming {
            staging: self,
            partial,
        }
    }

    /// Makes a content complete from a file that is believed to hold it, sharing its
    /// blocks where the filesystem can. False if it turns out to hold something else.
    pub fn reuse_from(&self, hash: ContentHash, size: u64, from: &File) -> Result<bool, Error> {
        let name = StagedName::random()?;
        let file = self.create(&name)?;
        let done = copy(from, &file, size)
            .and_then(|()| hash_file(&file))
            .map(|found| found == (hash, size));
        if matches!(done, Ok(true)) {
            rustix::fs::renameat(&self.dir, name.as_str(), &self.dir, hash.to_string())
                .context("rename", shown(name.as_str()))?;
            self.drop_name(&part(hash))?;
        } else {
            self.drop_name(name.as_str())?;
        }
        done.context("copy to", shown(name.as_str()))
    }

    /// Makes the inode of an entry under a fresh name: a file with a content that is
    /// held completely, a symbolic link or a directory; with mode, modification time and
    /// attributes, and never setuid, setgid or a device. The `last` user of a content
    /// takes the held copy itself. A directory is made with at least mode 0700.
    pub fn instantiate(
        &self,
        entry: &Entry,
        name: &StagedName,
        last: bool,
        owner: Option<Owner>,
    ) -> Result<Placed, Error> {
        let file = |hash| self.make_file(hash, name, last);
        self.make(entry, name, owner, file)
    }

    /// The same with a content that is durable before it has another name, so that a power
    /// loss does not leave it empty where nobody else has it to give.
    pub fn instantiate_durably(
        &self,
        entry: &Entry,
        name: &StagedName,
        owner: Option<Owner>,
    ) -> Result<Placed, Error> {
        self.make(entry, name, owner, |hash| {
            self.make_file(hash, name, false)?;
            scan::open_file(self.dir.as_fd(), name.as_str().as_bytes())
                .and_then(|file| super::sync::file(&file))
                .context("sync", shown(name.as_str()))
        })
    }

    /// The same with the content of an open file, durably. It is copied, so that whoever
    /// has the file open does not write to what is made of it.
    pub fn instantiate_copy(
        &self,
        entry: &Entry,
        name: &StagedName,
        from: &File,
        owner: Option<Owner>,
    ) -> Result<Placed, Error> {
        self.make(entry, name, owner, |_| {
            let size = from
                .metadata()
                .context("look at", shown(name.as_str()))?
                .len();
            let file = self.create(name)?;
            copy(from, &file, size)
                .and_then(|()| super::sync::file(&file))
                .context("copy to", shown(name.as_str()))
        })
    }

    fn make(
        &self,
        entry: &Entry,
        name: &StagedName,
        owner: Option<Owner>,
        file: impl FnOnce(ContentHash) -> Result<(), Error>,
    ) -> Result<Placed, Error> {
        let shown = || shown(name.as_str());
        let place = Place::new(&self.dir, name);
        let made = match &entry.content {
            Content::File { hash, .. } => file(*hash),
            Content::Directory => {
                rustix::fs::mkdirat(&self.dir, name.as_str(), Mode::RWXU).context("create", shown())
            }
            Content::Symlink { target } => {
                let target = std::ffi::OsStr::from_bytes(target);
                rustix::fs::symlinkat(target, &self.dir, name.as_str()).context("create", shown())
            }
        };
        made?;
        let reference =
            scan::open_reference(self.dir.as_fd(), place.name).context("open", shown())?;
        if let Some(owner) = owner {
            rustix::fs::chownat(
                &self.dir,
                name.as_str(),
                Some(rustix::fs::Uid::from_raw(owner.uid)),
                Some(rustix::fs::Gid::from_raw(owner.gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .context("change the owner of", shown())?;
        }
        let kind = entry.content.kind();
        let mut complete = true;
        if kind != Kind::Symlink {
            complete = meta::set_xattrs(reference.as_fd(), &entry.xattrs)
                .context("set attributes of", shown())?;
            let least = if kind == Kind::Directory { 0o700 } else { 0 };
            meta::set_mode(reference.as_fd(), entry.mode | least)
                .context("set mode of", shown())?;
        }
        if kind != Kind::Directory {
            meta::set_mtime(place, entry.mtime).context("set times of", shown())?;
        }
        let stat = rustix::fs::fstat(&reference).context("look at", shown())?;
        Ok(Placed {
            ino: stat.st_ino,
            complete,
        })
    }

    /// Drops what is held of a content.
    pub fn forget(&self, hash: ContentHash) -> Result<(), Error> {
        self.drop_name(&part(hash))?;
        self.drop_name(&hash.to_string())
    }

    /// Drops an inode that was made and is not going to be placed.
    pub fn discard(&self, name: &StagedName) -> Result<(), Error> {
        self.drop_name(name.as_str())
    }

    /// Removes what earlier batches left: every content but those that `keep` names, and
    /// inodes under random names, of which only files nobody else links and empty
    /// directories can be left over by a crash before the redo record. To be called when
    /// no batch is under way.
    pub fn clean(&self, keep: &dyn Fn(ContentHash) -> bool) -> Result<(), Error> {
        let names = scan::names(self.dir.as_fd()).context("list", ".mirrorfs/staging")?;
        for name in names {
            let Ok(name) = String::from_utf8(name) else {
                continue;
            };
            let stem = name.strip_suffix(".part").unwrap_or(&name);
            let kept = parse_hash(stem).is_some_and(keep);
            if !kept && (parse_hash(stem).is_some() || Id::parse(stem).is_some()) {
                self.drop_name(&name)?;
            }
        }
        Ok(())
    }

    /// Makes the names in the staging directory durable.
    pub fn sync(&self) -> Result<(), Error> {
        super::reserved::sync_dir(self.dir.as_fd()).context("sync", ".mirrorfs/staging")
    }

    /// The staging directory.
    pub fn dir(&self) -> std::os::fd::BorrowedFd<'_> {
        self.dir.as_fd()
    }

    fn make_file(&self, hash: ContentHash, name: &StagedName, last: bool) -> Result<(), Error> {
        let held = hash.to_string();
        if last {
            return rustix::fs::renameat(&self.dir, &held, &self.dir, name.as_str())
                .context("rename", shown(&held));
        }
        let from =
            scan::open_file(self.dir.as_fd(), held.as_bytes()).context("open", shown(&held))?;
        let size = from.metadata().context("look at", shown(&held))?.len();
        let file = self.create(name)?;
        copy(&from, &file, size).context("copy to", shown(name.as_str()))
    }

    fn create(&self, name: &StagedName) -> Result<File, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, name.as_str(), flags, Mode::RUSR | Mode::WUSR)
            .context("create", shown(name.as_str()))?;
        Ok(File::from(fd))
    }

    fn drop_name(&self, name: &str) -> Result<(), Error> {
        let removed = match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => rustix::fs::unlinkat(&self.dir, name, AtFlags::REMOVEDIR),
            other => other,
        };
        match removed {
            // What is not empty is not a leftover of ours: it stays, for people to see.
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
            Err(error) => Err(error).context("remove", shown(name)),
        }
    }
}

/// A content that is being collected, without its staging directory: to be set aside
/// and resumed by [`Staging::resume`].
pub struct Partial {
    hash: ContentHash,
    size: u64,
    file: Claimed,
    hasher: Hasher,
}

/// An incomplete content's file, for one at a time.
struct Claimed(File);

impl Claimed {
    fn new(dir: BorrowedFd<'_>, name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let file = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    let busy = "another transfer is at it and is waited for";
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, busy));
                }
                // Where there are no locks nobody can be told of.
                Ok(()) | Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
            let claimed = Self(File::from(file));
            // Whoever had it may have completed it meanwhile.
            if claimed.has(dir, name)? {
                return Ok(claimed);
            }
        }
    }

    /// Whether a name is this file's.
    fn has(&self, dir: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
        let own = rustix::fs::fstat(&self.0)?;
        let found = scan::stat_at(dir, name.as_bytes())?;
        Ok(found.is_some_and(|found| (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)))
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        // A process that is just being started may hold a copy of the descriptor.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

impl std::ops::Deref for Claimed {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

/// A content that is being collected.
pub struct Incoming<'a> {
    staging: &'a Staging,
    partial: Partial,
}

impl Incoming<'_> {
    /// How many of the first bytes are held.
    pub fn have(&self) -> u64 {
        self.partial.hasher.len()
    }

    /// How many bytes are missing.
    pub fn missing(&self) -> u64 {
        self.partial.size - self.have()
    }

    /// Takes in a stretch that continues what is held. Zeros become holes.
    pub fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let len = bytes.len() as u64;
        let end = offset.checked_add(len);
        if offset != self.have() || end.is_none_or(|end| end > self.partial.size) {
            return Err(Error::Gap {
                hash: self.partial.hash,
                offset,
                len,
                have: self.have(),
                size: self.partial.size,
            });
        }
        let written = write_sparse(&self.partial.file, offset, bytes);
        if written.is_err() {
            // What was written in part would be taken for a prefix after a restart.
            let _ = self.partial.file.set_len(offset);
        }
        written.context("write to", shown(&part(self.partial.hash)))?;
        self.partial.hasher.update(bytes);
        Ok(())
    }

    /// Takes in a stretch that continues what is held from another content.
    pub fn append_from(
        &mut self,
        offset: u64,
        old: &ReadAt<'_>,
        from: u64,
        len: u64,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; usize::try_from(len).unwrap_or(STRETCH).min(STRETCH)];
        let mut done = 0;
        while done < len {
            let want = usize::try_from(len - done).unwrap_or(STRETCH).min(STRETCH);
            let part = &mut buffer[..want];
            from.checked_add(done)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
                .and_then(|from| fill(old, part, from))
                .context("read", format!("what {} is made of", self.partial.hash))?;
            self.append(offset.saturating_add(done), part)?;
            done += want as u64;
        }
        Ok(())
    }

    /// Verifies the content and makes it durable and available. A content that is not
    /// what its hash says is dropped.
    pub fn finish(self) -> Result<(), Error> {
        self.verify(true)
    }

    /// Verifies the content and makes it available. The caller syncs what it makes of it
    /// before it relies on it.
    pub fn finish_unsynced(self) -> Result<(), Error> {
        self.verify(false)
    }

    /// Sets the content aside with the staging directory released.
    pub fn set_aside(self) -> Partial {
        self.partial
    }

    fn verify(self, sync: bool) -> Result<(), Error> {
        let Partial {
            hash, file, hasher, ..
        } = self.partial;
        let found = hasher.digest();
        if found != hash {
            self.staging.forget(hash)?;
            return Err(Error::WrongContent {
                expected: hash,
                found,
            });
        }
        if sync {
            super::sync::file(&file).context("sync", shown(&part(hash)))?;
        }
        let dir = &self.staging.dir;
        // Only what was verified gets the name.
        let own = file.has(dir.as_fd(), &part(hash));
        if !own.context("look at", shown(&part(hash)))? {
            let gone = Err(io::Error::from(io::ErrorKind::NotFound));
            return gone.context("rename", shown(&part(hash)));
        }
        rustix::fs::renameat(dir, part(hash), dir, hash.to_string())
            .context("rename", shown(&part(hash)))?;
        if sync {
            self.staging.sync()?;
        }
        Ok(())
    }
}

fn part(hash: ContentHash) -> String {
    format!("{hash}.part")
}

fn shown(name: &str) -> String {
    format!(".mirrorfs/staging/{name}")
}

fn parse_hash(text: &str) -> Option<ContentHash> {
    let (high, low) = text.split_at_checked(32)?;
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&Id::parse(high)?.0);
    bytes[16..].copy_from_slice(&Id::parse(low)?.0);
    Some(ContentHash(bytes))
}

/// Writes a stretch, leaving out whole blocks of zeros beyond the end of the file.
fn write_sparse(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    file.set_len(offset + bytes.len() as u64)?;
    let zeros = [0; BLOCK];
    // Up to the first block boundary, then block by block, neighbours together.
    let lead = BLOCK - (offset % BLOCK as u64) as usize;
    let mut start = 0;
    let mut at = if lead == BLOCK { 0 } else { lead };
    while at < bytes.len() {
        let end = (at + BLOCK).min(bytes.len());
        if bytes[at..end] == zeros[..end - at] {
            file.write_all_at(&bytes[start..at], offset + start as u64)?;
            start = end;
        }
        at = end;
    }
    file.write_all_at(&bytes[start..], offset + start as u64)
}

/// Copies `size` bytes, by sharing blocks, in the kernel, or through memory, whichever
/// is the first that works.
fn copy(from: &File, to: &File, size: u64) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return to.set_len(size);
    }
    // Holes stay holes: where the filesystem cannot tell, all of it is data.
    to.set_len(size)?;
    let mut at = 0;
    while at < size {
        let (data, hole) = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => (
                data,
                rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(size),
            ),
            Err(Errno::NXIO) => return Ok(()),
            Err(_) => (at, size),
        };
        copy_range(from, to, data, hole.min(size))?;
        at = hole.max(data + 1);
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut source, mut done) = (start, start);
    while done < end {
        let want = usize::try_from(end - done)
            .unwrap_or(usize::MAX)
            .min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut done), want) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::NOSPC) => return Err(Errno::NOSPC.into()),
            Err(_) => break,
        }
    }
    let mut buffer = vec![0; 256 * 1024];
    while done < end {
        let want = buffer
            .len()
            .min(usize::try_from(end - done).unwrap_or(usize::MAX));
        let got = from.read_at(&mut buffer[..want], done)?;
        if got == 0 {
            break;
        }
        to.write_all_at(&buffer[..got], done)?;
        done += got as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{MirrorId, Timestamp, Xattrs};
    use std::os::unix::fs::MetadataExt;

    struct Tree {
        dir: tempfile::TempDir,
        staging: Staging,
    }

    fn tree() -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), MirrorId::random().unwrap()).unwrap();
        let staging = Staging::new(&reserved).unwrap();
        Tree { dir, staging }
    }

    impl Tree {
        fn path(&self, name: &str) -> std::path::PathBuf {
            self.dir.path().join(".mirrorfs/staging").join(name)
        }

        fn hold(&self, content: &[u8]) -> ContentHash {
            let hash = ContentHash::of(content);
            let mut incoming = self.staging.begin(hash, content.len() as u64).unwrap();
            incoming.append(0, content).unwrap();
            incoming.finish().unwrap();
            hash
        }
    }

    fn file(content: &[u8], mode: u32) -> Entry {
        Entry {
            content: Content::File {
                size: content.len() as u64,
                hash: ContentHash::of(content),
            },
            mode,
            mtime: Timestamp {
                secs: -5,
                nanos: 123_456_789,
            },
            xattrs: Xattrs::from([(b"user.x".to_vec(), b"y".to_vec())]),
        }
    }

    #[test]
    fn goes_on_where_it_stopped_and_verifies_the_whole() {
        let tree = tree();
        let content: Vec<u8> = (0..100_000_u32).map(|at| (at % 253) as u8).collect();
        let (hash, size) = (ContentHash::of(&content), content.len() as u64);
        let mut incoming = tree.staging.begin(hash, size).unwrap();
        incoming.append(0, &content[..40_000]).unwrap();
        drop(incoming);
        assert_eq!(tree.staging.held(hash).unwrap(), 40_000);
        let mut incoming = tree.staging.begin(hash, size).unwrap();
        assert_eq!((incoming.have(), incoming.missing()), (40_000, 60_000));
        assert!(matches!(
            incoming.append(50_000, &content[50_000..]),
            Err(Error::Gap { have: 40_000, .. })
        ));
        assert!(incoming.append(40_000, &[0; 60_001]).is_err(), "too much");
        incoming.append(40_000, &content[40_000..]).unwrap();
        assert!(!tree.staging.is_complete(hash).unwrap());
        incoming.finish().unwrap();
        assert!(tree.staging.is_complete(hash).unwrap());
        let found = std::fs::read(tree.path(&hash.to_string())).unwrap();
        assert_eq!(found, content);
    }

    #[test]
    fn drops_a_content_that_is_not_what_was_announced() {
        let tree = tree();
        let hash = ContentHash::of(b"right");
        let mut incoming = tree.staging.begin(hash, 5).unwrap();
        incoming.append(0, b"wrong").unwrap();
        assert!(matches!(incoming.finish(), Err(Error::WrongContent { .. })));
        assert_eq!(tree.staging.held(hash).unwrap(), 0);
        assert!(!tree.staging.is_complete(hash).unwrap());
    }

    /// "No torn files": two that collect the same content do not write to each other's file,
    /// and what has been put in its place unverified does not get its name.
    #[test]
    fn one_at_a_time_collects_a_content() {
        let tree = tree();
        let hash = ContentHash::of(b"content");
        let mut one = tree.staging.begin(hash, 7).unwrap();
        one.append(0, b"con").unwrap();
        assert!(tree.staging.begin(hash, 7).is_err());
        one.append(3, b"tent").unwrap();
        tree.staging.forget(hash).unwrap();
        let mut other = tree.staging.begin(hash, 7).unwrap();
        other.append(0, b"co").unwrap();
        assert!(one.finish().is_err());
        assert!(!tree.staging.is_complete(hash).unwrap());
        drop(other);
        assert_eq!(tree.staging.begin(hash, 7).unwrap().have(), 2);
    }

    #[test]
    fn makes_fresh_inodes_with_everything_an_entry_carries() {
        let tree = tree();
        let hash = tree.hold(b"content");
        let entry = file(b"content", 0o4444);
        let names: Vec<_> = (0..2).map(|_| StagedName::random().unwrap()).collect();
        let first = tree
            .staging
            .instantiate(&entry, &names[0], false, None)
            .unwrap();
        let second = tree
            .staging
            .instantiate(&entry, &names[1], true, None)
            .unwrap();
        assert_ne!(first.ino, second.ino);
        assert!(
            !tree.staging.is_complete(hash).unwrap(),
            "taken by the last"
        );
        for (name, placed) in names.iter().zip([first, second]) {
            let path = tree.path(name.as_str());
            let found = std::fs::metadata(&path).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"content");
            assert_eq!(found.ino(), placed.ino);
            assert_eq!(found.mode() & 0o7777, 0o444, "setuid is dropped");
            assert_eq!((found.mtime(), found.mtime_nsec()), (-5, 123_456_789));
            if placed.complete {
                let fd = File::open(&path).unwrap();
                assert_eq!(scan::xattrs(fd.as_fd()).unwrap(), entry.xattrs);
            }
        }
    }

    #[test]
    fn links_are_data_and_directories_can_be_filled() {
        let tree = tree();
        let name = StagedName::random().unwrap();
        let mut entry = file(b"", 0o777);
        entry.content = Content::Symlink {
            target: b"/etc/passwd".to_vec(),
        };
        tree.staging.instantiate(&entry, &name, true, None).unwrap();
        let path = tree.path(name.as_str());
        assert_eq!(
            std::fs::read_link(&path).unwrap().as_os_str(),
            "/etc/passwd"
        );
        assert_eq!(path.symlink_metadata().unwrap().mtime(), -5);
        let name = StagedName::random().unwrap();
        entry.content = Content::Directory;
        entry.mode = 0o2055;
        tree.staging.instantiate(&entry, &name, true, None).unwrap();
        let found = tree.path(name.as_str()).metadata().unwrap();
        assert_eq!(found.mode() & 0o7777, 0o755);
    }

    #[test]
    fn reuses_what_is_known_only_if_it_is_the_same() {
        let tree = tree();
        let known = tree.dir.path().join("known");
        std::fs::write(&known, b"known content").unwrap();
        let file = File::open(&known).unwrap();
        let hash = ContentHash::of(b"known content");
        assert!(tree.staging.reuse_from(hash, 13, &file).unwrap());
        assert!(tree.staging.is_complete(hash).unwrap());
        let other = ContentHash::of(b"other content");
        assert!(!tree.staging.reuse_from(other, 13, &file).unwrap());
        assert!(!tree.staging.is_complete(other).unwrap());
    }

    #[test]
    fn zeros_become_holes_and_stay_zeros() {
        let tree = tree();
        let mut content = vec![0_u8; 3 << 20];
        content[5000] = 1;
        content[2 << 20] = 2;
        let hash = ContentHash::of(&content);
        let mut incoming = tree.staging.begin(hash, content.len() as u64).unwrap();
        // Stretches that neither begin nor end at a block.
        for (at, stretch) in content.chunks(70_001).enumerate() {
            incoming.append(at as u64 * 70_001, stretch).unwrap();
        }
        incoming.finish().unwrap();
        let path = tree.path(&hash.to_string());
        assert_eq!(std::fs::read(&path).unwrap(), content);
        assert!(path.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn cleaning_keeps_what_is_wanted_and_what_is_not_ours() {
        let tree = tree();
        let kept = tree.hold(b"kept");
        let gone = tree.hold(b"gone");
        let name = StagedName::random().unwrap();
        std::fs::create_dir_all(tree.path(name.as_str()).join("inside")).unwrap();
        std::fs::write(tree.path("foreign"), b"").unwrap();
        tree.staging.clean(&|hash| hash == kept).unwrap();
        assert!(tree.staging.is_complete(kept).unwrap());
        assert!(!tree.staging.is_complete(gone).unwrap());
        assert!(tree.path("foreign").exists());
        assert!(tree.path(name.as_str()).join("inside").exists());
    }
}
