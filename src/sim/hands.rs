//! What users do to a tree.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps};

use super::clock;
use super::ledger::{Ledger, link_value};
use super::random::Random;
use super::shown::{self, Shown};
use crate::fs::{Caller, Changes, Filesystem, SetTime};
use crate::tree::{ContentHash, Ino, RelPath, Timestamp};

/// The calls that a program makes.
pub(crate) trait Hands {
    /// The directory as it can be read.
    fn root(&self) -> &Path;
    fn create(&mut self, path: &RelPath, content: &[u8]);
    /// Truncates and writes.
    fn overwrite(&mut self, path: &RelPath, content: &[u8]);
    fn append(&mut self, path: &RelPath, content: &[u8]);
    fn rename(&mut self, from: &RelPath, to: &RelPath);
    fn make_dir(&mut self, path: &RelPath);
    fn link(&mut self, path: &RelPath, target: &str);
    fn remove(&mut self, path: &RelPath);
    fn remove_dir(&mut self, path: &RelPath);
    fn chmod(&mut self, path: &RelPath, mode: u32);
    /// Gives a file or link a time.
    fn touch(&mut self, path: &RelPath, at: Timestamp);
}

/// A user of a plain directory.
pub(crate) struct Plain(pub(crate) PathBuf);

impl Plain {
    fn at(&self, path: &RelPath) -> PathBuf {
        self.0.join(path.as_os_path())
    }
}

impl Hands for Plain {
    fn root(&self) -> &Path {
        &self.0
    }

    fn create(&mut self, path: &RelPath, content: &[u8]) {
        fs::write(self.at(path), content).unwrap();
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn overwrite(&mut self, path: &RelPath, content: &[u8]) {
        fs::write(self.at(path), content).unwrap();
    }

    fn append(&mut self, path: &RelPath, content: &[u8]) {
        use std::io::Write;
        let file = fs::File::options().append(true).open(self.at(path));
        file.unwrap().write_all(content).unwrap();
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath) {
        fs::rename(self.at(from), self.at(to)).unwrap();
    }

    fn make_dir(&mut self, path: &RelPath) {
        fs::create_dir(self.at(path)).unwrap();
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn link(&mut self, path: &RelPath, target: &str) {
        std::os::unix::fs::symlink(target, self.at(path)).unwrap();
    }

    fn remove(&mut self, path: &RelPath) {
        fs::remove_file(self.at(path)).unwrap();
    }

    fn remove_dir(&mut self, path: &RelPath) {
        fs::remove_dir(self.at(path)).unwrap();
    }

    fn chmod(&mut self, path: &RelPath, mode: u32) {
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn touch(&mut self, path: &RelPath, at: Timestamp) {
        let time = Timespec {
            tv_sec: at.secs,
            tv_nsec: at.nanos.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, self.at(path), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// A user of the mount.
pub(crate) struct Mounted {
    pub(crate) root: PathBuf,
    pub(crate) filesystem: Arc<Filesystem>,
}

impl Mounted {
    fn ino(&self, path: &RelPath) -> Ino {
        let mut at = self.filesystem.root();
        for name in path.components() {
            at = self
                .filesystem
                .lookup(&Caller::own(), at, name)
                .unwrap()
                .attributes
                .ino;
        }
        at
    }

    fn parent(&self, path: &RelPath) -> Ino {
        self.ino(&path.parent().unwrap())
    }

    fn change(&self, path: &RelPath, changes: &Changes) {
        self.filesystem
            .setattr(&Caller::own(), self.ino(path), changes)
            .unwrap();
    }

    fn write(&self, ino: Ino, offset: u64, content: &[u8]) {
        let mut written = 0;
        while written < content.len() {
            written += self
                .filesystem
                .write(ino, offset + written as u64, &content[written..], None)
                .unwrap();
        }
    }
}

impl Hands for Mounted {
    fn root(&self) -> &Path {
        &self.root
    }

    fn create(&mut self, path: &RelPath, content: &[u8]) {
        let made = self
            .filesystem
            .create(
                &Caller::own(),
                self.parent(path),
                path.name(),
                0o644,
                0o022,
                true,
            )
            .unwrap();
        self.write(made.attributes.ino, 0, content);
    }

    fn overwrite(&mut self, path: &RelPath, content: &[u8]) {
        self.change(
            path,
            &Changes {
                size: Some(0),
                ..Changes::default()
            },
        );
        self.write(self.ino(path), 0, content);
    }

    fn append(&mut self, path: &RelPath, content: &[u8]) {
        let ino = self.ino(path);
        let size = self.filesystem.getattr(ino).unwrap().size;
        self.write(ino, size, content);
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath) {
        self.ino(from);
        self.filesystem
            .rename(
                &Caller::own(),
                self.parent(from),
                from.name(),
                self.parent(to),
                to.name(),
                RenameFlags::empty(),
            )
            .unwrap();
    }

    fn make_dir(&mut self, path: &RelPath) {
        self.filesystem
            .mkdir(&Caller::own(), self.parent(path), path.name(), 0o755, 0o022)
            .unwrap();
    }

    fn link(&mut self, path: &RelPath, target: &str) {
        self.filesystem
            .symlink(
                &Caller::own(),
                self.parent(path),
                path.name(),
                target.as_bytes(),
            )
            .unwrap();
    }

    fn remove(&mut self, path: &RelPath) {
        self.ino(path);
        self.filesystem
            .unlink(&Caller::own(), self.parent(path), path.name())
            .unwrap();
    }

    fn remove_dir(&mut self, path: &RelPath) {
        self.ino(path);
        self.filesystem
            .rmdir(&Caller::own(), self.parent(path), path.name())
            .unwrap();
    }

    fn chmod(&mut self, path: &RelPath, mode: u32) {
        self.change(
            path,
            &Changes {
                mode: Some(mode),
                ..Changes::default()
            },
        );
    }

    fn touch(&mut self, path: &RelPath, at: Timestamp) {
        self.change(
            path,
            &Changes {
                mtime: Some(SetTime::To(at)),
                ..Changes::default()
            },
        );
    }
}

/// One of the few paths that users work at, so that they get into each other's way.
fn place(random: &mut Random) -> RelPath {
    let depth = 1 + random.weighted(&[4, 4, 2]);
    let mut path = RelPath::ROOT;
    for names in [&["a", "b", "c", "d"][..], &["x", "y", "z"], &["p", "q"]]
        .iter()
        .take(depth)
    {
        path = path.join(random.pick(names).as_bytes()).unwrap();
    }
    path
}

/// A new value, as bytes that are like no other. Now and then it takes several frames.
fn content(random: &mut Random, ledger: &mut Ledger) -> Vec<u8> {
    let mut content = format!("value {}\n", ledger.fresh()).into_bytes();
    let more = match random.below(200) {
        0 => 100_000 + random.below(500_000),
        1..=9 => random.below(9_000),
        _ => random.below(40),
    };
    content.reserve(more);
    for _ in 0..more.div_ceil(8) {
        content.extend_from_slice(&random.next().to_le_bytes());
    }
    content
}

/// Does something at random to a tree. Says what, if anything.
pub(crate) fn edit(
    hands: &mut dyn Hands,
    who: &str,
    random: &mut Random,
    ledger: &mut Ledger,
) -> Option<String> {
    let path = place(random);
    let parent = path.parent()?;
    let root = hands.root().to_owned();
    let at = |path: &RelPath| root.join(path.as_os_path());
    let is_dir = |path: &RelPath| matches!(shown::at(&at(path)), Some(Shown::Directory { .. }));
    if !is_dir(&parent) {
        return None;
    }
    // Every change has a time of its own.
    clock::advance(std::time::Duration::from_micros(1));
    let now = crate::clock::wall();
    let found = shown::at(&at(&path));
    let new = |ledger: &mut Ledger, content: &[u8], how: &str| {
        let hash = ContentHash::of(content);
        ledger.written(hash, format!("{how} by {who} at {path}"));
        super::ledger::short(hash)
    };
    match random.weighted(&[40, 6, 12, 14, 14, 3, 4, 3, 2]) {
        0 => {
            let content = content(random, ledger);
            let saves = random.one_in(2);
            match &found {
                None => hands.create(&path, &content),
                Some(old @ Shown::File { .. }) if !saves => {
                    ledger.replaced(old.value()?);
                    hands.overwrite(&path, &content);
                }
                Some(old @ (Shown::File { .. } | Shown::Link { .. })) => {
                    ledger.replaced(old.value()?);
                    let aside = parent.join(b".save").ok()?;
                    hands.create(&aside, &content);
                    hands.touch(&aside, now);
                    hands.rename(&aside, &path);
                }
                _ => return None,
            }
            hands.touch(&path, now);
            Some(format!(
                "{who} writes {path}: {}",
                new(ledger, &content, "written")
            ))
        }
        1 => {
            let Some(old @ Shown::File { .. }) = &found else {
                return None;
            };
            ledger.replaced(old.value()?);
            let line = format!("value {}\n", ledger.fresh());
            hands.append(&path, line.as_bytes());
            hands.touch(&path, now);
            let content = fs::read(at(&path)).ok()?;
            Some(format!(
                "{who} appends to {path}: {}",
                new(ledger, &content, "appended")
            ))
        }
        2 => {
            if found.is_some() {
                return None;
            }
            hands.make_dir(&path);
            Some(format!("{who} makes {path}"))
        }
        3 => {
            remove_all(hands, &path, found?, ledger)?;
            Some(format!("{who} removes {path}"))
        }
        4 => {
            let moved = found?;
            let to = place(random);
            if to == path || to.starts_with(&path) || path.starts_with(&to) {
                return None;
            }
            if !is_dir(&to.parent()?) {
                return None;
            }
            let directory = matches!(moved, Shown::Directory { .. });
            match shown::at(&at(&to)) {
                None => {}
                Some(Shown::Directory { .. }) => return None,
                Some(_) if directory => return None,
                Some(old) => ledger.replaced(old.value()?),
            }
            hands.rename(&path, &to);
            Some(format!("{who} moves {path} to {to}"))
        }
        5 => {
            if found.is_some() {
                return None;
            }
            let target = format!("target {}", ledger.fresh());
            hands.link(&path, &target);
            hands.touch(&path, now);
            ledger.written(
                link_value(target.as_bytes()),
                format!("link made by {who} at {path}"),
            );
            Some(format!("{who} links {path}"))
        }
        6 => {
            let mode = match found? {
                Shown::File { .. } => *random.pick(&[0o600, 0o644, 0o755, 0o444]),
                Shown::Directory { .. } => *random.pick(&[0o700, 0o755, 0o775]),
                _ => return None,
            };
            hands.chmod(&path, mode);
            Some(format!("{who} sets the mode of {path} to {mode:o}"))
        }
        7 => {
            let Some(Shown::File { .. }) = found else {
                return None;
            };
            let to = place(random);
            if !is_dir(&to.parent()?) || shown::at(&at(&to)).is_some() {
                return None;
            }
            let content = fs::read(at(&path)).ok()?;
            hands.create(&to, &content);
            hands.touch(&to, now);
            Some(format!("{who} copies {path} to {to}"))
        }
        _ => {
            // A file that no user made here, such as an artefact of a conflict.
            let names = fs::read_dir(at(&parent)).ok()?.flatten();
            let mut names: Vec<_> = names
                .map(|name| name.file_name().to_string_lossy().into_owned())
                .filter(|name| name.ends_with(".conflict"))
                .collect();
            names.sort();
            if names.is_empty() {
                return None;
            }
            let artefact = parent.join(random.pick(&names).as_bytes()).ok()?;
            let old = shown::at(&at(&artefact))?;
            ledger.replaced(old.value()?);
            hands.remove(&artefact);
            Some(format!("{who} removes an artefact beside {path}"))
        }
    }
}

/// Removes a path and everything below it, as somebody who sees it.
fn remove_all(
    hands: &mut dyn Hands,
    path: &RelPath,
    found: Shown,
    ledger: &mut Ledger,
) -> Option<()> {
    if !matches!(found, Shown::Directory { .. }) {
        ledger.replaced(found.value()?);
        hands.remove(path);
        return Some(());
    }
    let mut below = Vec::new();
    let root = hands.root().to_owned();
    shown::walk(&root, path, &mut |path, shown| below.push((path, shown)));
    for (path, shown) in below.iter().rev() {
        match shown {
            Shown::Directory { .. } => hands.remove_dir(path),
            shown => {
                ledger.replaced(shown.value()?);
                hands.remove(path);
            }
        }
    }
    hands.remove_dir(path);
    Some(())
}
