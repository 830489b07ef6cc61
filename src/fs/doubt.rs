//! What a power loss may have done to lower: what changed after it was last synced proves
//! nothing. The record as it was, what the scan found and the contents themselves tell what
//! is in doubt; what is to become of it is decided elsewhere, with what the peers have.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use mirrorfs_journal::{Change, Journal, Node, NodeId, Origin, View};
use rustix::fs::{Mode, OFlags};

use super::lower::open_beneath;
use super::{Error, Filesystem};
use crate::tree::hash::hash_file;
use crate::tree::{Content, Kind, RelPath};

/// A record that a power loss took away is younger than the last that it left by at most
/// this, in seconds: it is on disk within a few, unless the disk is very slow. What carries
/// a later time was changed while nothing was mounted.
const UNRECORDED: i64 = 60;

/// What is there and may be anything.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Suspect {
    /// The node.
    pub node: NodeId,
    /// Its last change. A later one is somebody's, and ends the doubt.
    pub changed_n: u64,
    /// What the record says is there, as far as that is known.
    pub last: Option<Content>,
    /// The record says that nothing is there any more.
    pub gone: bool,
    /// It is not what is recorded, or holds nothing.
    pub torn: bool,
}

/// What is not there and may never have been meant to go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing {
    /// The node that it was.
    pub node: NodeId,
    /// Where it was, if the record has it.
    pub path: Option<RelPath>,
    /// What the record says is there; none if it says that nothing is.
    pub last: Option<Content>,
}

/// What a power loss left in doubt.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Suspects {
    /// What is there.
    pub present: Vec<Suspect>,
    /// What is not.
    pub missing: Vec<Missing>,
}

/// What was on record when the power failed.
pub struct Recorded<'a> {
    /// The record.
    pub before: &'a View,
    /// Up to this change lower is known to be on disk.
    pub synced: u64,
    /// All changes after this one were found by scans.
    pub scanned_from: u64,
    /// Whether times tell what was changed after the power loss, while nothing was mounted.
    pub times_tell: bool,
}

impl Filesystem {
    /// Finds what a power loss left in doubt. To be called after [`Filesystem::recover`].
    pub fn suspects(&self, journal: &Journal, was: &Recorded<'_>) -> Result<Suspects, Error> {
        let after = journal.snapshot()?;
        let removals = Removals::of(was, &after)?;
        let last = was.before.recorded_at()?.filter(|_| was.times_tell);
        let mut found = Suspects::default();
        for id in after.touched(was.synced)? {
            if id == NodeId::ROOT {
                continue;
            }
            let recorded = was.before.node(id)?;
            let Some(now) = after.node(id)? else {
                match recorded {
                    None if removals.kept.contains(&id) => {}
                    None => found.missing.push(Missing {
                        node: id,
                        path: None,
                        last: None,
                    }),
                    Some(node) => found.lose(id, was.before.paths(id)?, content_of(&node)),
                }
                continue;
            };
            let paths = after.paths(id)?;
            if let Some(node) = &recorded {
                let mut lost = was.before.paths(id)?;
                lost.retain(|path| !paths.contains(path));
                found.lose(id, lost, content_of(node));
            }
            let Some(path) = paths.first() else {
                continue;
            };
            let scanned = recorded.is_none() || now.changed_n > was.scanned_from;
            let made_since = last.is_some_and(|last| now.attr.ctime.secs > last.secs + UNRECORDED);
            let suspect = match now.attr.kind {
                Kind::Special => None,
                _ if scanned && made_since => None,
                _ if scanned => self.scanned(was, &removals, recorded.as_ref(), &now, path)?,
                Kind::File if now.synced_n <= now.changed_n => self.unproven(&now, path)?,
                _ => None,
            };
            found.present.extend(suspect);
        }
        Ok(found)
    }

    /// What the scan has found to be different from the record.
    fn scanned(
        &self,
        was: &Recorded<'_>,
        removals: &Removals,
        recorded: Option<&Node>,
        now: &Node,
        path: &RelPath,
    ) -> Result<Option<Suspect>, Error> {
        let there = was.before.at(path)?;
        let gone = recorded.is_none()
            && there.is_none()
            && (removals.removed(was.before, path)? || moved_away(was.before, now)?);
        if now.attr.kind == Kind::Directory && !gone {
            return Ok(None);
        }
        let blank = now.attr.kind == Kind::File && self.is_blank(path).unwrap_or(true);
        Ok(Some(Suspect {
            node: now.id,
            changed_n: now.changed_n,
            last: recorded.or(there.as_ref()).and_then(content_of),
            gone,
            torn: recorded.is_some() || blank,
        }))
    }

    /// A file that looks as recorded: whether it holds what is recorded.
    fn unproven(&self, now: &Node, path: &RelPath) -> Result<Option<Suspect>, Error> {
        let holds = match now.hash {
            Some(hash) => self
                .opened(path)
                .and_then(|file| hash_file(&file))
                .map(|found| found == (hash, now.attr.size)),
            None if now.attr.size == 0 => Ok(true),
            None => self.is_blank(path).map(|blank| !blank),
        };
        // What cannot be read is listed when it is to be sent.
        if holds.unwrap_or(true) {
            return Ok(None);
        }
        let changed_n = self.recorder.record(
            Origin::Scan,
            Change::Content {
                ino: now.ino,
                attr: now.attr,
            },
        )?;
        Ok(Some(Suspect {
            node: now.id,
            changed_n,
            last: content_of(now),
            gone: false,
            torn: true,
        }))
    }

    /// Whether a file holds no byte but zeros.
    fn is_blank(&self, path: &RelPath) -> io::Result<bool> {
        let file = self.opened(path)?;
        let mut buffer = vec![0; 64 * 1024];
        let mut at = 0;
        loop {
            match file.read_at(&mut buffer, at) {
                Ok(0) => return Ok(true),
                Ok(read) if buffer[..read].iter().any(|byte| *byte != 0) => return Ok(false),
                Ok(read) => at += read as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn opened(&self, path: &RelPath) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let root = self.lower.root().as_fd();
        Ok(open_beneath(root, path.as_bytes(), flags, Mode::empty())?.into())
    }
}

impl Suspects {
    fn lose(&mut self, node: NodeId, paths: Vec<RelPath>, last: Option<Content>) {
        self.missing.extend(paths.into_iter().map(|path| Missing {
            node,
            path: Some(path),
            last: last.clone(),
        }));
    }
}

/// What the record says was removed, and may not have been.
struct Removals {
    /// The nodes, by the directory and the name that they had.
    places: HashMap<(NodeId, Vec<u8>), NodeId>,
    /// Those whose directory was synced afterwards.
    kept: HashSet<NodeId>,
}

impl Removals {
    fn of(was: &Recorded<'_>, after: &View) -> Result<Self, Error> {
        let mut found = Self {
            places: HashMap::new(),
            kept: HashSet::new(),
        };
        for lost in was.before.names_lost(was.synced)? {
            let Some((parent, name)) = lost.place else {
                continue;
            };
            let directory = after.node(parent)?;
            if directory.is_some_and(|directory| directory.synced_n > lost.n) {
                found.kept.insert(lost.node);
            } else {
                found.places.insert((parent, name), lost.node);
            }
        }
        Ok(found)
    }

    /// Whether the record says that what was at a path is removed.
    fn removed(&self, before: &View, path: &RelPath) -> Result<bool, Error> {
        let (mut at, mut removed) = (NodeId::ROOT, false);
        for name in path.components() {
            let there = before.child(at, name)?;
            removed = there.is_none();
            let gone = || self.places.get(&(at, name.to_vec())).copied();
            match there.or_else(gone) {
                Some(node) => at = node,
                None => return Ok(false),
            }
        }
        Ok(removed)
    }
}

/// Whether the record has the same under another name: a rename that did not reach the disk.
fn moved_away(before: &View, now: &Node) -> Result<bool, Error> {
    let same = |known: Node| {
        let (was, is) = (known.attr, now.attr);
        known.id != now.id
            && was.kind == is.kind
            && (is.kind == Kind::Directory || (was.size, was.mtime) == (is.size, is.mtime))
    };
    Ok(before.node_by_ino(now.ino)?.is_some_and(same))
}

fn content_of(node: &Node) -> Option<Content> {
    match node.attr.kind {
        Kind::Special => None,
        Kind::Directory => Some(Content::Directory),
        Kind::Symlink => Some(Content::Symlink {
            target: node.target.clone().unwrap_or_default(),
        }),
        Kind::File => node.hash.map(|hash| Content::File {
            size: node.attr.size,
            hash,
        }),
    }
}
