//! The steps that make, replace, remove and change single names.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use mirrorfs_journal::index::Fingerprint;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::super::record::Staged;
use super::{Change, Run, Stop, diverged};
use crate::replica::beneath::{Place, exchange, rename_new};
use crate::replica::look::{Look, Seen, fingerprint, is_expected, is_open_for_writing, look};
use crate::replica::meta;
use crate::seeded::{self, Bug};
use crate::tree::{Content, Entry, Kind, RelPath, scan};

impl Run<'_, '_> {
    /// A name that did not exist: a file, a link or a directory.
    pub(super) fn create(
        &mut self,
        path: &RelPath,
        entry: &Entry,
        staged: &Staged,
    ) -> Result<Change, Stop> {
        let parent = self.parent(path)?;
        let place = Place::new(&parent, path.name());
        let waiting = Place {
            dir: self.applier.staging.dir(),
            name: staged.name.as_ref(),
        };
        let placed = || Change::Placed {
            path: path.clone(),
            entry: entry.clone(),
            staged: staged.clone(),
        };
        if self.resumed && place.ino()? == Some(staged.ino) {
            return Ok(placed());
        }
        self.applier.point()?;
        match rename_new(waiting, place) {
            Ok(()) => Ok(placed()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                diverged("something is there already")
            }
            Err(error) if self.resumed && error.kind() == io::ErrorKind::NotFound => {
                diverged("it was changed after it had been placed")
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A name that shows something else from now on.
    pub(super) fn replace(
        &mut self,
        at: usize,
        path: &RelPath,
        entry: &Entry,
        expect: &Entry,
        staged: &Staged,
    ) -> Result<Change, Stop> {
        let parent = self.parent(path)?;
        let place = Place::new(&parent, path.name());
        let staging = self.applier.staging.dir().try_clone_to_owned()?;
        let waiting = Place::new(&staging, &staged.name);
        let aside = self.slot_name(at);
        let aside = Place::new(&staging, &aside);
        let placed = Change::Placed {
            path: path.clone(),
            entry: entry.clone(),
            staged: staged.clone(),
        };
        if self.resumed {
            match (place.ino()? == Some(staged.ino), waiting.ino()?) {
                (true, None) if aside.ino()?.is_none() => return Ok(placed),
                (true, None) => return self.settle(aside, path, expect, None).map(|()| placed),
                // The fallback for filesystems without the flag makes a second link first.
                (true, Some(ino)) if ino == staged.ino => {}
                (true, Some(_)) => {
                    return self
                        .settle_or_swap_back(place, waiting, path, expect, None, staged)
                        .map(|()| placed);
                }
                (false, Some(ino)) if ino == staged.ino => {
                    // Taken aside, and the new one not placed yet.
                    if aside.ino()?.is_some() && place.ino()?.is_none() {
                        rename_new(aside, place)?;
                    }
                }
                (false, Some(_)) => {
                    self.conflicts().keep(waiting, path)?;
                    return diverged("it was changed after it had been placed");
                }
                (false, None) => return diverged("it was changed after it had been placed"),
            }
        }
        let before = self.expected(place, path, expect, false)?;
        if expect.content == Content::Directory {
            return diverged("a directory is in the way");
        }
        if is_open_for_writing(place) {
            return diverged("open for writing");
        }
        self.applier.point()?;
        if exchange(waiting, place)? {
            self.applier.point()?;
            self.settle_or_swap_back(place, waiting, path, expect, Some(&before), staged)?;
            return Ok(placed);
        }
        // Without an exchange the name is missing for a moment.
        rename_new(place, aside)?;
        self.applier.point()?;
        if let Err(reason) = self.came_out(aside, path, expect, Some(&before)) {
            self.back(aside, place, path)?;
            return diverged(reason);
        }
        if let Err(error) = rename_new(waiting, place) {
            self.back(aside, place, path)?;
            return Err(error.into());
        }
        self.discard(aside, path, expect)?;
        Ok(placed)
    }

    /// Looks at what an exchange brought out, and puts it into the trash, or back.
    pub(super) fn settle_or_swap_back(
        &mut self,
        place: Place<'_>,
        out: Place<'_>,
        path: &RelPath,
        expect: &Entry,
        before: Option<&Seen>,
        staged: &Staged,
    ) -> Result<(), Stop> {
        let reason = match self.settle(out, path, expect, before) {
            Ok(()) => return Ok(()),
            Err(Stop::Diverged(reason)) => reason,
            #[cfg(test)]
            Err(cut) => return Err(cut),
        };
        self.applier.point()?;
        if !matches!(exchange(out, place), Ok(true)) {
            // The name is gone, or its directory.
            self.back(out, place, path)?;
            return diverged(reason);
        }
        match out.ino()? {
            Some(ino) if ino != staged.ino => {
                // Replaced once more between the two exchanges. Once is enough: the
                // latest version is kept aside.
                let kept = self.conflicts().keep(out, path)?;
                diverged(format!(
                    "{reason}, and again meanwhile: that version is kept as .mirrorfs/conflicts/{kept}"
                ))
            }
            _ => diverged(reason),
        }
    }

    pub(super) fn settle(
        &mut self,
        out: Place<'_>,
        path: &RelPath,
        expect: &Entry,
        before: Option<&Seen>,
    ) -> Result<(), Stop> {
        if let Err(reason) = self.came_out(out, path, expect, before) {
            return diverged(reason);
        }
        self.applier.point()?;
        self.discard(out, path, expect)?;
        Ok(())
    }

    /// Whether what was taken out of the tree is what was expected. Nobody can open it by
    /// its name any more, so that a writer who is not there now will never be.
    pub(super) fn came_out(
        &self,
        out: Place<'_>,
        path: &RelPath,
        expect: &Entry,
        before: Option<&Seen>,
    ) -> Result<(), String> {
        if seeded::has(Bug::IgnoresTheExpectedState) {
            return Ok(());
        }
        let stat = out.stat().map_err(|error| error.to_string())?;
        let Some(stat) = stat else {
            return Err("it vanished".to_owned());
        };
        if scan::kind_of(&stat) != expect.content.kind() {
            return Err("it was replaced".to_owned());
        }
        if expect.content == Content::Directory {
            return Ok(());
        }
        if is_open_for_writing(out) {
            return Err("open for writing".to_owned());
        }
        let print = fingerprint(&stat);
        // A rename changes the change time, and nothing else.
        let unchanged = before.is_some_and(|seen| {
            let mut known = seen.print;
            known.ctime = print.ctime;
            known == print && !seen.racy && is_expected(&seen.entry, expect, false)
        });
        if unchanged {
            return Ok(());
        }
        match look(out, None, &|_| None) {
            Ok(Look::Seen(seen)) if is_expected(&seen.entry, expect, false) => Ok(()),
            Ok(_) => Err(format!("{path} was changed here")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Puts what was taken out back where it was, or aside if something is there now.
    pub(super) fn back(
        &mut self,
        out: Place<'_>,
        place: Place<'_>,
        path: &RelPath,
    ) -> Result<(), Stop> {
        if rename_new(out, place).is_ok() {
            return Ok(());
        }
        let kept = self.conflicts().keep(out, path)?;
        diverged(format!(
            "it could not be put back and is kept as .mirrorfs/conflicts/{kept}"
        ))
    }

    /// The same for something whose directory may be gone as well.
    pub(super) fn back_to(&mut self, out: Place<'_>, path: &RelPath) -> Result<(), Stop> {
        if let Ok(parent) = self.parent(path) {
            return self.back(out, Place::new(&parent, path.name()), path);
        }
        let kept = self.conflicts().keep(out, path)?;
        diverged(format!(
            "its directory is gone, and it is kept as .mirrorfs/conflicts/{kept}"
        ))
    }

    pub(super) fn remove(
        &mut self,
        at: usize,
        path: &RelPath,
        expect: &Entry,
        ino: Option<u64>,
    ) -> Result<Change, Stop> {
        let gone = Change::Gone { path: path.clone() };
        let parent = match self.parent(path) {
            Ok(parent) => parent,
            Err(_) if matches!(self.applier.root.stat(path), Ok(None)) => return Ok(gone),
            Err(stop) => return Err(stop),
        };
        let place = Place::new(&parent, path.name());
        let staging = self.applier.staging.dir().try_clone_to_owned()?;
        let name = self.slot_name(at);
        let aside = Place::new(&staging, &name);
        let mut before = None;
        if !(self.resumed && aside.ino()?.is_some()) {
            let Some(stat) = place.stat()? else {
                return Ok(gone);
            };
            if self.resumed && ino != Some(stat.st_ino) {
                if self.ours.contains(&stat.st_ino) {
                    // Removed, and a later step has used the name already.
                    return Ok(gone);
                }
                return diverged("it was replaced");
            }
            before = Some(self.expected(place, path, expect, false)?);
            if expect.content == Content::Directory {
                return diverged("a directory is not removed as a file");
            }
            if is_open_for_writing(place) {
                return diverged("open for writing");
            }
            self.applier.point()?;
            rename_new(place, aside)?;
        }
        self.applier.point()?;
        if let Err(reason) = self.came_out(aside, path, expect, before.as_ref()) {
            self.back(aside, place, path)?;
            return diverged(reason);
        }
        if let Err(error) = self.discard(aside, path, expect) {
            self.back(aside, place, path)?;
            return Err(error.into());
        }
        Ok(gone)
    }

    pub(super) fn remove_dir(&mut self, path: &RelPath) -> Result<Change, Stop> {
        let gone = Change::Gone { path: path.clone() };
        if matches!(self.applier.root.stat(path), Ok(None)) {
            return Ok(gone);
        }
        let parent = self.parent(path)?;
        let place = Place::new(&parent, path.name());
        if self.resumed && place.ino()?.is_some_and(|ino| self.ours.contains(&ino)) {
            return Ok(gone);
        }
        self.applier.point()?;
        match rustix::fs::unlinkat(&parent, place.os_name(), rustix::fs::AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(gone),
            // What stays on this side is no reason to keep a directory in the mirror, and
            // is not deleted either. Anything else came after the step was decided on: the
            // other side must not take the directory for gone.
            Err(Errno::NOTEMPTY | Errno::EXIST) if !holds_mirrored(&parent, place.os_name())? => {
                Ok(Change::None)
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) => diverged("something was made in it meanwhile"),
            Err(Errno::NOTDIR) => diverged("it is no directory any more"),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn set_meta(
        &mut self,
        path: &RelPath,
        entry: &Entry,
        expect: &Entry,
    ) -> Result<Change, Stop> {
        let parent = self.parent(path)?;
        let place = Place::new(&parent, path.name());
        let seen = self.seen(place, path)?;
        if !is_expected(&seen.entry, entry, true) {
            if !is_expected(&seen.entry, expect, true) && !self.half_set(&seen.entry, entry) {
                return diverged("it was changed here");
            }
            if is_open_for_writing(place) {
                return diverged("open for writing");
            }
        }
        let fd = scan::open_reference(parent.as_fd(), place.name)?;
        if rustix::fs::fstat(&fd)?.st_ino != seen.print.ino {
            return diverged("it was replaced");
        }
        let mut complete = true;
        // What the filesystem makes of it, to tell that from what somebody does next.
        let print = || Ok::<_, Stop>(fingerprint(&rustix::fs::fstat(&fd)?));
        self.applier.point()?;
        let kept = match entry.content {
            Content::Symlink { .. } => {
                meta::set_mtime(place, entry.mtime)?;
                print()?
            }
            Content::File { .. } => {
                complete = meta::set_xattrs(fd.as_fd(), &entry.xattrs)?;
                meta::set_mode(fd.as_fd(), entry.mode)?;
                let mode = print()?.mode;
                self.applier.point()?;
                meta::set_mtime_of(fd.as_fd(), entry.mtime)?;
                Fingerprint { mode, ..print()? }
            }
            Content::Directory => {
                complete = meta::set_xattrs(fd.as_fd(), &entry.xattrs)?;
                self.opened.retain(|(opened, _)| opened != path);
                meta::set_mode(fd.as_fd(), entry.mode)?;
                print()?
            }
        };
        Ok(Change::Meta {
            path: path.clone(),
            entry: entry.clone(),
            kept,
            complete,
        })
    }

    /// Whether an interrupted [`Self::set_meta`] explains what is there.
    pub(super) fn half_set(&self, found: &Entry, entry: &Entry) -> bool {
        self.resumed && found.content == entry.content
    }

    /// Looks at a name and compares.
    pub(super) fn expected(
        &self,
        place: Place<'_>,
        path: &RelPath,
        expect: &Entry,
        metadata: bool,
    ) -> Result<Seen, Stop> {
        let seen = if expect.content == Content::Directory {
            // Of a directory only the kind counts.
            match place.stat()? {
                Some(stat) if scan::kind_of(&stat) == expect.content.kind() => {
                    self.seen(place, path)?
                }
                Some(_) => return diverged("it is no directory any more"),
                None => return diverged("it was removed here"),
            }
        } else {
            self.seen(place, path)?
        };
        if !is_expected(&seen.entry, expect, metadata) && !seeded::has(Bug::IgnoresTheExpectedState)
        {
            return diverged("it was changed here");
        }
        Ok(seen)
    }

    pub(super) fn seen(&self, place: Place<'_>, path: &RelPath) -> Result<Seen, Stop> {
        let index = &self.applier.index;
        let known = index
            .row(path)
            .map_err(|error| Stop::Diverged(error.to_string()))?;
        match look(place, known.as_ref(), &|print| {
            index.by_fingerprint(print).ok().flatten()
        })? {
            Look::Seen(seen) => Ok(seen),
            Look::Absent => diverged("it was removed here"),
            Look::Special => diverged("a special file is there"),
            Look::Changing => diverged("it is being written"),
        }
    }
}

/// Whether something that is mirrored lies in a directory that is not empty: a file, a
/// link, or a directory like it or with nothing in it.
fn holds_mirrored(parent: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let names = scan::names(dir.as_fd())?;
    if names.is_empty() {
        return Ok(true);
    }
    for name in &names {
        let mirrored = match scan::stat_at(dir.as_fd(), name)? {
            None => false,
            Some(stat) => match scan::kind_of(&stat) {
                Kind::Special => false,
                Kind::Directory => holds_mirrored(&dir, OsStr::from_bytes(name))?,
                Kind::File | Kind::Symlink => true,
            },
        };
        if mirrored {
            return Ok(true);
        }
    }
    Ok(false)
}
