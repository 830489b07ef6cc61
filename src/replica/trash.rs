//! What was put into the trash of a replica: listing it, bringing it back, and getting
//! rid of it.
//!
//! Both sides keep what a peer's change displaced in `.mirrorfs/trash/<stamp>-<token>/`,
//! under the path it had (`replica::keep`, `fs::trash`). How much of it is kept is told in
//! [`bounds`].

pub mod bounds;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::beneath::{Place, is_no_directory, rename_new};
use super::keep::is_agreed;
use super::look::is_open_for_writing;
use super::{Context, Error, Reserved, Root};
use crate::tree::{Ino, Kind, RESERVED, RelPath, Timestamp, reach, scan};

/// The trash of a replica.
pub struct Trash {
    dir: OwnedFd,
    /// Tells of what somebody may still write to.
    spared: Option<Spared>,
}

/// Whether a file stays that is not to be kept for its own sake.
type Spared = Box<dyn Fn(Ino) -> bool + Send>;

/// Something in the trash.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Where it lies, from the trash directory: the slot, then the path it had.
    pub at: RelPath,
    /// Where it was, from the root of the tree.
    pub path: RelPath,
    /// When it was put there, to the second.
    pub since: Timestamp,
    /// What it is; never a directory.
    pub kind: Kind,
    /// The size of its content, in bytes.
    pub size: u64,
    /// What it takes on the disk, in bytes.
    pub room: u64,
}

/// What was removed from the trash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Removed {
    /// How many things.
    pub files: u64,
    /// What they took on the disk, in bytes.
    pub bytes: u64,
    /// How many stay because a program that had one open when it was displaced has it open
    /// for writing still: what it writes is nowhere else.
    pub in_use: u64,
}

/// Why something cannot be brought back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something is at the place.
    #[error("something is there already")]
    InTheWay,
    /// What shall hold it is no directory.
    #[error("{0} is no directory")]
    NoDirectory(RelPath),
    /// The place belongs to mirrorfs.
    #[error("the directory .mirrorfs is reserved")]
    Reserved,
    /// It is not in the trash any more.
    #[error("it is not in the trash any more")]
    Gone,
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for RestoreError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A slot with all that lies in it.
struct Slot {
    name: Vec<u8>,
    since: Timestamp,
    files: Vec<Kept>,
    /// Parents come before what they hold.
    dirs: Vec<RelPath>,
}

impl Trash {
    /// The trash in a replica's reserved directory.
    pub fn of(reserved: &Reserved) -> Result<Self, Error> {
        let dir = reserved
            .trash()
            .try_clone_to_owned()
            .context("open", ".mirrorfs/trash")?;
        Ok(Self { dir, spared: None })
    }

    /// The same, but that a file stays for as long as a program may still write to it.
    pub fn sparing(self, spared: impl Fn(Ino) -> bool + Send + 'static) -> Self {
        let spared: Spared = Box::new(spared);
        Self {
            spared: Some(spared),
            ..self
        }
    }

    /// What has left the trash because a program wrote to it: it lies in the same way.
    pub(crate) fn late(reserved: &Reserved) -> Result<Self, Error> {
        let dir = reserved
            .late()
            .try_clone_to_owned()
            .context("open", ".mirrorfs/late")?;
        Ok(Self { dir, spared: None })
    }

    /// What lies in it, the latest first.
    pub fn list(&self) -> Result<Vec<Kept>, Error> {
        let mut all: Vec<Kept> = self
            .slots()?
            .into_iter()
            .flat_map(|slot| slot.files)
            .collect();
        all.sort_by(|a, b| (b.since, &a.path, &b.at).cmp(&(a.since, &b.path, &a.at)));
        Ok(all)
    }

    /// Opens the directory that something lies in.
    pub(crate) fn parent(&self, kept: &Kept) -> Result<OwnedFd, RestoreError> {
        let parent = kept.at.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match reach::open_beneath(self.dir.as_fd(), &parent, flags) {
            Err(Errno::NOENT | Errno::NOTDIR) => Err(RestoreError::Gone),
            other => Ok(other?),
        }
    }

    /// Moves something back into a tree that nobody has mounted, to where nothing is.
    /// Directories that are missing on the way are made.
    pub fn restore(&self, kept: &Kept, root: &Root, to: &RelPath) -> Result<(), RestoreError> {
        refuse_reserved(to)?;
        let from = self.parent(kept)?;
        make_parents(root, to)?;
        let parent = root.parent(to)?;
        let moved = rename_new(
            Place::new(&from, kept.at.name()),
            Place::new(&parent, to.name()),
        );
        match moved {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RestoreError::InTheWay);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RestoreError::Gone);
            }
            Err(error) => return Err(error.into()),
        }
        self.tidy(kept);
        Ok(())
    }

    /// Removes something that was brought back by a copy.
    pub fn remove(&self, kept: &Kept) -> Result<(), Error> {
        let shown = || format!(".mirrorfs/trash/{}", kept.at);
        let parent = kept.at.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let unlinked = reach::open_beneath(self.dir.as_fd(), &parent, flags).and_then(|dir| {
            let place = Place::new(&dir, kept.at.name());
            rustix::fs::unlinkat(&dir, place.os_name(), AtFlags::empty())
        });
        match unlinked {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(error) => return Err(error).context("remove", shown()),
        }
        self.tidy(kept);
        Ok(())
    }

    /// Removes everything that was put there before a moment.
    pub fn empty(&self, before: Timestamp) -> Result<Removed, Error> {
        let mut removed = Removed::default();
        for slot in self.slots()? {
            if slot.since < before {
                self.remove_slot(&slot, &mut removed)?;
            }
        }
        Ok(removed)
    }

    fn slots(&self) -> Result<Vec<Slot>, Error> {
        self.slots_with(|_, _| true)
    }

    /// The slots of which the names, and the moments at which they were made, are wanted.
    fn slots_with(
        &self,
        wanted: impl Fn(&[u8], Option<Timestamp>) -> bool,
    ) -> Result<Vec<Slot>, Error> {
        let mut slots = Vec::new();
        let names = scan::names(self.dir.as_fd()).context("list", ".mirrorfs/trash")?;
        for name in names {
            let Ok(at) = RelPath::new(name.clone()) else {
                continue;
            };
            if !wanted(&name, stamped(&name)) {
                continue;
            }
            let Some(stat) = scan::stat_at(self.dir.as_fd(), &name)
                .context("look at", format!(".mirrorfs/trash/{at}"))?
            else {
                continue;
            };
            // Only slots are made here; what else there is somebody else has put there.
            if scan::kind_of(&stat) == Kind::Directory {
                let since = stamped(&name).unwrap_or_else(|| scan::mtime_of(&stat));
                slots.push(self.slot(name, at, since)?);
            }
        }
        Ok(slots)
    }

    fn slot(&self, name: Vec<u8>, at: RelPath, since: Timestamp) -> Result<Slot, Error> {
        let mut slot = Slot {
            name,
            since,
            files: Vec::new(),
            dirs: Vec::new(),
        };
        let mut left = vec![at.clone()];
        while let Some(dir) = left.pop() {
            let shown = || format!(".mirrorfs/trash/{dir}");
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let fd = match reach::open_beneath(self.dir.as_fd(), &dir, flags) {
                // Brought back or removed meanwhile.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                other => other.context("open", shown())?,
            };
            for name in scan::names(fd.as_fd()).context("list", shown())? {
                let found = scan::stat_at(fd.as_fd(), &name).context("look at", shown())?;
                let (Some(stat), Ok(path)) = (found, dir.join(&name)) else {
                    continue;
                };
                let kind = scan::kind_of(&stat);
                if kind == Kind::Directory {
                    left.push(path);
                    continue;
                }
                if let Some(was) = path.rebase(&at, &RelPath::ROOT) {
                    slot.files.push(Kept {
                        at: path,
                        path: was,
                        since,
                        kind,
                        size: scan::size_of(&stat),
                        room: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
                    });
                }
            }
            slot.dirs.push(dir);
        }
        slot.dirs.sort();
        Ok(slot)
    }

    fn remove_slot(&self, slot: &Slot, removed: &mut Removed) -> Result<(), Error> {
        for kept in &slot.files {
            self.remove_unused(kept, removed)?;
        }
        for dir in slot.dirs.iter().rev() {
            self.remove_dir(dir);
        }
        Ok(())
    }

    fn remove_unused(&self, kept: &Kept, removed: &mut Removed) -> Result<(), Error> {
        if kept.kind == Kind::File && self.is_in_use(kept) {
            removed.in_use += 1;
            return Ok(());
        }
        self.remove(kept)?;
        removed.files += 1;
        removed.bytes += kept.room;
        Ok(())
    }

    fn is_in_use(&self, kept: &Kept) -> bool {
        self.parent(kept).is_ok_and(|dir| {
            let place = Place::new(&dir, kept.at.name());
            let spared = |spared: &Spared| matches!(place.ino(), Ok(Some(ino)) if spared(Ino(ino)));
            self.spared.as_ref().is_some_and(spared) || is_open_for_writing(place)
        })
    }

    /// Removes the directories that something lay in, as far as they are empty now.
    pub(crate) fn tidy(&self, kept: &Kept) {
        let mut at = kept.at.parent();
        while let Some(dir) = at.filter(|dir| !dir.is_root()) {
            if !self.remove_dir(&dir) {
                return;
            }
            at = dir.parent();
        }
    }

    /// A directory that something lies in stays, and so does its slot: nothing is lost.
    fn remove_dir(&self, dir: &RelPath) -> bool {
        let parent = dir.parent().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let removed = reach::open_beneath(self.dir.as_fd(), &parent, flags).and_then(|fd| {
            let place = Place::new(&fd, dir.name());
            rustix::fs::unlinkat(&fd, place.os_name(), AtFlags::REMOVEDIR)
        });
        removed.is_ok()
    }
}

impl Slot {
    /// Whether both sides had agreed on what lies in it.
    fn agreed(&self) -> bool {
        is_agreed(&self.name)
    }

    fn room(&self) -> u64 {
        self.files.iter().map(|kept| kept.room).sum()
    }
}

impl Kept {
    /// What lies in the trash for a path, or below it where nothing lies for the path
    /// itself: of each path the latest. `list` is that of [`Trash::list`]. What `list`
    /// says as [`Kept::at`] names that one and no other.
    pub fn find(list: &[Self], wanted: &RelPath) -> Vec<Self> {
        if let Some(exact) = list.iter().find(|kept| kept.at == *wanted) {
            return vec![exact.clone()];
        }
        if let Some(latest) = list.iter().find(|kept| kept.path == *wanted) {
            return vec![latest.clone()];
        }
        let mut found: Vec<Self> = Vec::new();
        for kept in list.iter().filter(|kept| kept.path.starts_with(wanted)) {
            if !found.iter().any(|known| known.path == kept.path) {
                found.push(kept.clone());
            }
        }
        found
    }
}

/// Refuses a path in the reserved directory.
pub(crate) fn refuse_reserved(path: &RelPath) -> Result<(), RestoreError> {
    match path.components().next() {
        Some(RESERVED) | None => Err(RestoreError::Reserved),
        Some(_) => Ok(()),
    }
}

fn make_parents(root: &Root, path: &RelPath) -> Result<(), RestoreError> {
    let mut at = RelPath::ROOT;
    let parent = path.parent().unwrap_or_default();
    for name in parent.components() {
        let dir = root.dir(&at)?;
        let place = Place::new(&dir, name);
        match rustix::fs::mkdirat(&dir, place.os_name(), Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        at = at.join(name).map_err(io::Error::other)?;
        match root.dir(&at) {
            Err(error) if is_no_directory(&error) => {
                return Err(RestoreError::NoDirectory(at));
            }
            other => drop(other?),
        }
    }
    Ok(())
}

/// The moment that a slot's name begins with.
fn stamped(name: &[u8]) -> Option<Timestamp> {
    let stamp = std::str::from_utf8(name.get(..16)?).ok()?;
    let at = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", stamp).ok()?;
    let at = at.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    Some(Timestamp {
        secs: at.as_second(),
        nanos: 0,
    })
}

#[cfg(test)]
pub(crate) mod tests;
