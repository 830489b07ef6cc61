//! Everything that a batch needs before the first name is moved.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;

use rustix::io::Errno;

use super::record::{Record, Staged, Step};
use super::{Applier, ApplyError, Batch};
use crate::replica::{Context, Error, Owner, StagedName, keep, sync};
use crate::seeded::{self, Bug};
use crate::tree::links::Symlinks;
use crate::tree::scan;
use crate::tree::{Content, ContentHash, Entry, RESERVED, RelPath};
use crate::wire::message::{Expect, Op};

/// Up to how many inodes are synced one by one before the whole filesystem is.
const SYNCED_SINGLY: usize = 32;
/// How many rows are taken out of the index at once.
const ROWS: u32 = 1000;

impl Applier<'_> {
    /// Makes all new inodes of a batch, durably. If that fails, what was made goes, and
    /// the contents stay staged.
    pub(super) fn prepare(&mut self, batch: Batch) -> Result<Record, ApplyError> {
        check_slots(&batch.ops)?;
        let mut uses: HashMap<ContentHash, u32> = HashMap::new();
        for (hash, _) in batch.ops.iter().filter_map(Op::content) {
            *uses.entry(hash).or_default() += 1;
        }
        let mut steps = Vec::with_capacity(batch.ops.len());
        let mut misled = self.misled(&batch.ops)?;
        let default_owner = self.default_owner()?;
        let origins = Origins::of(&batch.ops);
        for op in batch.ops {
            match self.step(op, &origins, &mut uses, default_owner) {
                Ok(mut step) => {
                    if let Op::Unpark { slot, .. } = &step.op
                        && let Some(reason) = misled.remove(slot)
                    {
                        step.refused = Some(reason);
                    }
                    steps.push(step);
                }
                Err(error) => {
                    self.undo_preparation(&steps);
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.sync_staged(&steps) {
            self.undo_preparation(&steps);
            return Err(error.into());
        }
        Ok(Record {
            batch: batch.id,
            mount: batch.mount,
            agreement: batch.agreement,
            stamp: keep::stamp(crate::clock::wall()),
            steps,
        })
    }

    /// The moves by which a symbolic link would come to lead where none is to lead, by their
    /// slots, with the reason.
    fn misled(&self, ops: &[Op]) -> Result<HashMap<u32, String>, ApplyError> {
        let mut misled = HashMap::new();
        if self.symlinks == Symlinks::All {
            return Ok(misled);
        }
        let mut parked = HashMap::new();
        for op in ops {
            match op {
                Op::Park { from, slot, expect } => {
                    parked.insert(*slot, (from, expect));
                }
                Op::Unpark { slot, to } => {
                    let Some((from, moved)) = parked.get(slot) else {
                        continue;
                    };
                    let mut reason = self.symlinks.refuse(to, moved);
                    let mut after = None;
                    while reason.is_none() {
                        let rows = self.index.below(from, after.as_ref(), ROWS)?;
                        reason = rows.iter().find_map(|row| {
                            let path = row.path.rebase(from, to)?;
                            self.symlinks.refuse(&path, row.entry.as_ref()?)
                        });
                        match rows.into_iter().next_back() {
                            Some(last) => after = Some(last.path),
                            None => break,
                        }
                    }
                    if let Some(reason) = reason {
                        misled.insert(*slot, reason);
                    }
                }
                _ => {}
            }
        }
        Ok(misled)
    }

    fn step(
        &self,
        op: Op,
        origins: &Origins,
        uses: &mut HashMap<ContentHash, u32>,
        default_owner: Option<Owner>,
    ) -> Result<Step, ApplyError> {
        let last = op.content().is_some_and(|(hash, _)| {
            uses.get_mut(&hash).is_some_and(|uses| {
                *uses -= 1;
                *uses == 0
            })
        });
        let mut step = Step {
            refused: refusal(&op).or_else(|| match &op {
                Op::Put { path, entry, .. } => self.symlinks.refuse(path, entry),
                _ => None,
            }),
            op,
            staged: None,
            before: None,
        };
        if step.refused.is_some() {
            return Ok(step);
        }
        step.before = match &step.op {
            Op::Park { from, .. } => self.ino(from)?,
            Op::Remove { path, .. } => self.ino(&origins.of_path(path))?,
            _ => None,
        };
        let staged = match &step.op {
            Op::MakeDir { entry, .. } => self.stage(entry, false, default_owner),
            Op::KeepConflict { entry, .. } => self.stage(entry, last, None),
            Op::Put {
                path,
                entry,
                expect,
            } => {
                let replaced = match (default_owner, expect) {
                    (Some(_), Expect::Entry(_)) => self.owner(&origins.of_path(path))?,
                    _ => None,
                };
                self.stage(entry, last, replaced.or(default_owner))
            }
            _ => return Ok(step),
        };
        match staged {
            Ok(staged) => step.staged = Some(staged),
            // The rest of the batch is worth having.
            Err(ApplyError::Replica(Error::Io { source, .. })) if cannot_hold(&source) => {
                step.refused = Some(format!("the filesystem cannot hold it: {source}"));
            }
            Err(error) => return Err(error),
        }
        Ok(step)
    }

    fn stage(&self, entry: &Entry, last: bool, owner: Option<Owner>) -> Result<Staged, ApplyError> {
        let name = StagedName::random()?;
        let placed = match self.staging.instantiate(entry, &name, last, owner) {
            Ok(placed) => placed,
            Err(error) => {
                self.give_back(entry, &name, last);
                return Err(error.into());
            }
        };
        let path = || format!(".mirrorfs/staging/{}", name.as_str());
        let stat = scan::stat_at(self.staging.dir(), name.as_ref())
            .context("look at", path())?
            .ok_or(rustix::io::Errno::NOENT)
            .context("look at", path())?;
        Ok(Staged {
            ino: placed.ino,
            complete: placed.complete,
            size: scan::size_of(&stat),
            mtime: scan::mtime_of(&stat),
            mode: stat.st_mode,
            taken: last && matches!(entry.content, Content::File { .. }),
            name,
        })
    }

    /// Takes back what was prepared, as far as it is still in staging.
    pub(super) fn undo_preparation(&self, steps: &[Step]) {
        for step in steps {
            let (Op::Put { entry, .. }
            | Op::KeepConflict { entry, .. }
            | Op::MakeDir { entry, .. }) = &step.op
            else {
                continue;
            };
            if let Some(staged) = &step.staged {
                self.give_back(entry, &staged.name, staged.taken);
            }
        }
    }

    /// A content that became an inode is a content again. Failures leave it under its
    /// random name, to be cleaned up.
    fn give_back(&self, entry: &Entry, name: &StagedName, taken: bool) {
        let dir = self.staging.dir();
        if let (Content::File { hash, .. }, true) = (&entry.content, taken) {
            let _ = rustix::fs::renameat(dir, name.as_str(), dir, hash.to_string());
        }
        let _ = self.staging.discard(name);
    }

    fn sync_staged(&self, steps: &[Step]) -> Result<(), Error> {
        if seeded::has(Bug::NoSyncOfStaged) {
            return Ok(());
        }
        let staged: Vec<_> = steps
            .iter()
            .filter_map(|step| step.staged.as_ref())
            .collect();
        if staged.len() > SYNCED_SINGLY {
            return sync::filesystem(self.root.fd()).context("sync", ".");
        }
        for staged in &staged {
            let shown = || format!(".mirrorfs/staging/{}", staged.name.as_str());
            // Links and directories are metadata only, which syncing staging covers.
            match scan::open_file(self.staging.dir(), staged.name.as_ref()) {
                Ok(file) => sync::file(&file).context("sync", shown())?,
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                    return sync::filesystem(self.root.fd()).context("sync", ".");
                }
                Err(_) => {}
            }
        }
        if staged.is_empty() {
            return Ok(());
        }
        self.staging.sync()
    }

    fn ino(&self, path: &RelPath) -> Result<Option<u64>, ApplyError> {
        let stat = self.root.stat(path);
        // What cannot be looked at is found out about by the step itself.
        Ok(stat.ok().flatten().map(|stat| stat.st_ino))
    }

    /// Who owns what root makes: a directory served by root belongs to somebody.
    fn default_owner(&self) -> Result<Option<Owner>, ApplyError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let stat = rustix::fs::fstat(self.root.fd().as_fd()).context("look at", ".")?;
        Ok(Some(Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        }))
    }

    fn owner(&self, path: &RelPath) -> Result<Option<Owner>, ApplyError> {
        let stat = self.root.stat(path).context("look at", path.to_string())?;
        Ok(stat.map(|stat| Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        }))
    }
}

/// Where things are before the moves of a batch: all of its other steps name them where
/// they are afterwards.
struct Origins(Vec<(RelPath, RelPath)>);

impl Origins {
    fn of(ops: &[Op]) -> Self {
        let mut parked = HashMap::new();
        let mut moves = Vec::new();
        for op in ops {
            match op {
                Op::Park { from, slot, .. } => {
                    parked.insert(*slot, from);
                }
                Op::Unpark { slot, to } => {
                    if let Some(from) = parked.remove(slot) {
                        moves.push((to.clone(), from.clone()));
                    }
                }
                _ => {}
            }
        }
        // The innermost move decides.
        moves.sort_by_key(|(to, _)| std::cmp::Reverse(to.depth()));
        Self(moves)
    }

    fn of_path(&self, path: &RelPath) -> RelPath {
        let rebased = |(to, from): &(RelPath, RelPath)| path.rebase(to, from);
        self.0
            .iter()
            .find_map(rebased)
            .unwrap_or_else(|| path.clone())
    }
}

fn check_slots(ops: &[Op]) -> Result<(), ApplyError> {
    let mut parked = HashSet::new();
    for op in ops {
        match op {
            Op::Park { slot, .. } if !parked.insert(*slot) => {
                return Err(ApplyError::Malformed(format!("slot {slot} is used twice")));
            }
            Op::Unpark { slot, .. } if !parked.remove(slot) => {
                return Err(ApplyError::Malformed(format!("slot {slot} holds nothing")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether an error of making something is about this thing on this filesystem, such as a
/// symbolic link where there are none or of a target that is too long. A full disk, or one
/// that fails, is not: there is no telling what it would have taken.
fn cannot_hold(error: &std::io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::NAMETOOLONG
                | Errno::PERM
                | Errno::OPNOTSUPP
                | Errno::NOSYS
                | Errno::INVAL
                | Errno::ILSEQ
                | Errno::FBIG
        )
    )
}

/// Why a step is refused whatever is in the tree.
fn refusal(op: &Op) -> Option<String> {
    let path = path_of(op);
    if path.is_root() {
        return Some("the root of the tree is not changed".to_owned());
    }
    if path.components().next() == Some(RESERVED) {
        return Some(format!("{path}: .mirrorfs is reserved"));
    }
    match op {
        Op::MakeDir { entry, .. } if entry.content != Content::Directory => {
            Some(format!("{path}: not a directory's entry"))
        }
        Op::Put { entry, .. } | Op::KeepConflict { entry, .. }
            if entry.content == Content::Directory =>
        {
            Some(format!("{path}: a directory is not put"))
        }
        _ => None,
    }
}

/// The path that a step changes; where something moves, the one it ends at.
pub fn path_of(op: &Op) -> &RelPath {
    match op {
        Op::Park { from: path, .. }
        | Op::Unpark { to: path, .. }
        | Op::MakeDir { path, .. }
        | Op::Put { path, .. }
        | Op::SetMeta { path, .. }
        | Op::Remove { path, .. }
        | Op::RemoveDir { path }
        | Op::KeepConflict { path, .. } => path,
    }
}
