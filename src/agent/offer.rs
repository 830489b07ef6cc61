//! A batch while its steps and contents come in.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use mirrorfs_journal::index::PeerIndex;

use crate::replica::{self, Incoming, Partial, Root, Staging};
use crate::tree::{Content, ContentHash, Entry, RelPath, scan};
use crate::wire::message::{BatchId, Op, Want};

/// The most steps of a batch. What diverges of them must fit into one answer.
const STEPS: usize = 150_000;
/// The most bytes that the steps of a batch may take in memory.
const BYTES: usize = 256 << 20;
/// The most contents that are asked for in one piece of an answer: what fits into a frame.
pub(super) const WANTS: usize = 20_000;
/// How many contents are kept open while they come in.
const OPEN: usize = 8;

/// A stretch of one content that is one of another as well.
pub(super) struct Reuse {
    pub(super) hash: ContentHash,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) old: ContentHash,
    pub(super) from: u64,
}

/// A batch that is being offered.
pub(super) struct Offer {
    pub(super) batch: BatchId,
    pub(super) ops: Vec<Op>,
    bytes: usize,
    /// Sizes of the contents that are still missing.
    missing: HashMap<ContentHash, u64>,
    open: VecDeque<(ContentHash, Partial)>,
    /// The content that others were last told by, with a file that has it.
    old: Option<(ContentHash, File)>,
    /// Whether all steps are here.
    complete: bool,
}

impl Offer {
    pub(super) fn new(batch: BatchId) -> Self {
        Self {
            batch,
            ops: Vec::new(),
            bytes: 0,
            missing: HashMap::new(),
            open: VecDeque::new(),
            old: None,
            complete: false,
        }
    }

    /// Takes in a piece of the steps.
    pub(super) fn extend(&mut self, ops: Vec<Op>) -> Result<(), String> {
        if self.complete {
            return Err("steps after the last piece".to_owned());
        }
        self.bytes += ops.iter().map(weight).sum::<usize>();
        if self.ops.len() + ops.len() > STEPS || self.bytes > BYTES {
            return Err(format!(
                "more than {STEPS} steps or {BYTES} bytes of them in one batch"
            ));
        }
        self.ops.extend(ops);
        Ok(())
    }

    /// All steps are here: finds out which contents are missing. What is known under any
    /// name, of this tree or of one that the batch removes, is taken from there.
    pub(super) fn wants(
        &mut self,
        root: &Root,
        staging: &Staging,
        index: &PeerIndex,
    ) -> Result<Vec<Want>, String> {
        self.complete = true;
        let mut sizes: HashMap<ContentHash, u64> = HashMap::new();
        let mut wants = Vec::new();
        for (hash, size) in self.ops.iter().filter_map(Op::content) {
            match sizes.insert(hash, size) {
                Some(other) if other != size => {
                    return Err(format!("content {hash} has two sizes, {other} and {size}"));
                }
                Some(_) => continue,
                None => {}
            }
            if is_here(hash, size, root, staging, index).map_err(|error| error.to_string())? {
                continue;
            }
            self.missing.insert(hash, size);
            let held = staging.held(hash).map_err(|error| error.to_string())?;
            // More than the whole is a leftover of something else.
            let have = if held > size { 0 } else { held };
            wants.push(Want { hash, have });
        }
        Ok(wants)
    }

    /// Takes in a stretch of a content.
    pub(super) fn data(
        &mut self,
        staging: &Staging,
        hash: ContentHash,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), replica::Error> {
        let Some(mut incoming) = self.incoming(staging, hash)? else {
            return Ok(());
        };
        incoming.append(offset, bytes)?;
        self.took(hash, incoming)
    }

    /// Takes in a stretch of a content that is one of another content as well.
    pub(super) fn reuse(
        &mut self,
        root: &Root,
        staging: &Staging,
        index: &PeerIndex,
        stretch: &Reuse,
    ) -> Result<(), replica::Error> {
        let hash = stretch.hash;
        let Some(mut incoming) = self.incoming(staging, hash)? else {
            return Ok(());
        };
        let known = self.old.take().filter(|(known, _)| *known == stretch.old);
        let known = known.or_else(|| Some((stretch.old, find(stretch.old, root, index)?.0)));
        let Some((old, file)) = known else {
            return Err(replica::Error::NothingToReuse {
                hash,
                old: stretch.old,
            });
        };
        incoming.append_from(
            stretch.offset,
            &|buffer, at| file.read_at(buffer, at),
            stretch.from,
            stretch.len,
        )?;
        self.old = Some((old, file));
        self.took(hash, incoming)
    }

    /// A content as far as it is here; none if nobody asked for it, or not any more.
    fn incoming<'a>(
        &mut self,
        staging: &'a Staging,
        hash: ContentHash,
    ) -> Result<Option<Incoming<'a>>, replica::Error> {
        let Some(size) = self.missing.get(&hash).copied() else {
            return Ok(None);
        };
        let at = self.open.iter().position(|(open, _)| *open == hash);
        Ok(Some(match at.and_then(|at| self.open.remove(at)) {
            Some((_, partial)) => staging.resume(partial),
            None => staging.begin(hash, size)?,
        }))
    }

    /// A stretch of a content has been taken in.
    fn took(&mut self, hash: ContentHash, incoming: Incoming<'_>) -> Result<(), replica::Error> {
        if incoming.missing() == 0 {
            incoming.finish_unsynced()?;
            self.missing.remove(&hash);
            return Ok(());
        }
        self.open.push_back((hash, incoming.set_aside()));
        if self.open.len() > OPEN {
            self.open.pop_front();
        }
        Ok(())
    }

    /// How many contents are missing; none before all steps are here.
    pub(super) fn missing(&self) -> Option<usize> {
        self.complete.then_some(self.missing.len())
    }

    /// The contents that the batch needs.
    pub(super) fn contents(&self) -> HashSet<ContentHash> {
        self.ops
            .iter()
            .filter_map(Op::content)
            .map(|(hash, _)| hash)
            .collect()
    }
}

/// A file that the index says has a certain content, and the size of that.
pub(super) fn find(hash: ContentHash, root: &Root, index: &PeerIndex) -> Option<(File, u64)> {
    for path in index.paths_of(&hash).unwrap_or_default() {
        let Ok(dir) = root.parent(&path) else {
            continue;
        };
        if let Ok(file) = scan::open_file(dir.as_fd(), path.name())
            && let Ok(Some(row)) = index.row(&path)
            && let Some(Content::File { size, .. }) = row.entry.map(|entry| entry.content)
            && file.metadata().is_ok_and(|found| found.len() == size)
        {
            return Some((file, size));
        }
    }
    None
}

fn is_here(
    hash: ContentHash,
    size: u64,
    root: &Root,
    staging: &Staging,
    index: &PeerIndex,
) -> Result<bool, replica::Error> {
    if staging.is_complete(hash)? {
        return Ok(true);
    }
    // Nothing is sent for a content that is empty, or held to its last byte.
    if size == 0 || staging.held(hash)? == size {
        return match staging.begin(hash, size)?.finish_unsynced() {
            Ok(()) => Ok(true),
            Err(replica::Error::WrongContent { .. }) if size > 0 => Ok(false),
            Err(error) => Err(error),
        };
    }
    for path in index.paths_of(&hash).unwrap_or_default() {
        let Ok(dir) = root.parent(&path) else {
            continue;
        };
        let Ok(file) = scan::open_file(dir.as_fd(), path.name()) else {
            continue;
        };
        if !file.metadata().is_ok_and(|found| found.len() == size) {
            continue;
        }
        if staging.reuse_from(hash, size, &file)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// About how many bytes a step takes in memory.
fn weight(op: &Op) -> usize {
    let path = |path: &RelPath| path.as_bytes().len();
    let entry = |entry: &Entry| {
        let target = match &entry.content {
            Content::Symlink { target } => target.len(),
            _ => 0,
        };
        let xattrs = entry
            .xattrs
            .iter()
            .map(|(name, value)| 64 + name.len() + value.len());
        target + xattrs.sum::<usize>()
    };
    let parts = match op {
        Op::Park { from, expect, .. } => path(from) + entry(expect),
        Op::Unpark { to, .. } => path(to),
        Op::MakeDir { path: at, entry: e } | Op::KeepConflict { path: at, entry: e } => {
            path(at) + entry(e)
        }
        Op::Put {
            path: at, entry: e, ..
        } => path(at) + entry(e),
        Op::SetMeta {
            path: at,
            entry: e,
            expect,
        } => path(at) + entry(e) + entry(expect),
        Op::Remove { path: at, expect } => path(at) + entry(expect),
        Op::RemoveDir { path: at } => path(at),
    };
    parts + size_of::<Op>()
}
