//! Carrying out the steps on the mounted side: staging, then the door.

use std::collections::BTreeSet;
use std::sync::Arc;

use mirrorfs_journal::{Contents, Journal, Origin};
use parking_lot::Mutex;

use crate::door::Door;
use crate::door::units::{self, Held, Ordered, Unit};
use crate::fs::{DoorOp, DoorResult, Expect, Filesystem, StagedName};
use crate::replica::beneath::Place;
use crate::replica::keep::Shelf;
use crate::replica::{self, Owner, Placed, Reserved, Staging};
use crate::tree::links::Symlinks;
use crate::tree::{Content, ContentHash, Entry, Ino, Kind, RelPath, Xattrs};

use super::Error;
use super::batch::Step;
use super::conflict::{explanation, kept_name, unit_explanation};
use super::merge::{merge_found, rebase};
use super::pulls::{self, Made, Pull};
use super::round::{Found, Round};
use super::scope::{LocalNode, only_local};
use super::units::Units;

/// The mounted side's tree, as far as the replicator changes it.
#[derive(Clone)]
pub struct LocalTree {
    /// The filesystem behind the mount.
    pub filesystem: Arc<Filesystem>,
    /// The door into the mount; none where nothing is mounted, and the filesystem is
    /// told directly.
    pub door: Option<Arc<Mutex<Door>>>,
    /// The tree's reserved directory.
    pub reserved: Arc<Reserved>,
    /// The staging area in it.
    pub staging: Arc<Staging>,
    /// Who owns what a peer creates: the tree's owner, if this process may choose.
    pub owner: Option<Owner>,
    /// Which symbolic links of a peer are taken in.
    pub symlinks: Symlinks,
}

impl LocalTree {
    fn carry_out(&self, round: &Round, ops: Vec<Ordered>) -> Vec<DoorResult> {
        if let Some(door) = &self.door {
            return door.lock().apply_in_units(&self.filesystem, ops);
        }
        let mut held = Held::default();
        for at in units::of_several(&ops) {
            if let Some(reason) = self.obstacle(round, &ops[at].op) {
                held.refused(&ops[at], &reason);
            }
        }
        let mut results = Vec::with_capacity(ops.len());
        for ordered in ops {
            let refused = self.obstacle(round, &ordered.op);
            let result = match refused.or_else(|| held.reason(&ordered)) {
                Some(reason) => DoorResult::Refused { reason },
                None => {
                    let (op, origin) = (ordered.op.clone(), ordered.origin);
                    self.filesystem.carry_out(op, origin)
                }
            };
            if let DoorResult::Refused { reason } = &result {
                held.refused(&ordered, reason);
            }
            results.push(result);
        }
        results
    }

    /// Why a change cannot be made where nothing is mounted: nobody was seen changing what
    /// is there.
    fn obstacle(&self, round: &Round, op: &DoorOp) -> Option<String> {
        let decided = round.locals.get(op.path())?;
        let found = self.filesystem.attributes_at(op.path())?;
        let changed = matches!(op.expect(), Expect::Node { .. }) && !decided.is_unchanged(&found);
        changed.then(|| "it was changed meanwhile".to_owned())
    }
}

/// A change of this side's tree, and where a refusal of it is noted.
struct Ordering {
    path: RelPath,
    op: DoorOp,
    unit: Option<Unit>,
    /// What the step comes to, if it is one of the round's.
    made: Option<Made>,
}

impl Ordering {
    /// One that has to do with no other.
    fn alone((path, op): (RelPath, DoorOp)) -> Self {
        Self {
            path,
            op,
            unit: None,
            made: None,
        }
    }
}

/// Carries out everything a round has to do on this side. Steps that are refused are
/// noted in the round, with their cause returned.
pub fn apply(
    tree: &LocalTree,
    journal: &Journal,
    round: &mut Round,
) -> Result<Vec<(RelPath, String)>, Error> {
    let mut refused = Vec::new();
    let mut modes = Vec::new();
    let mut units = Units::of(round);
    let mut steps = Vec::new();
    for step in &round.local_steps {
        if let Some(reason) = never(tree, round, step) {
            refused.push((step.path.clone(), reason));
            continue;
        }
        let unit = units.unit(&step.path);
        match translate(tree, round, step, &mut modes) {
            Ok((ops, made)) => steps.push((step, unit, ops, made)),
            Err(reason) => {
                units.end(unit, &step.path);
                refused.push((step.path.clone(), reason));
            }
        }
    }
    let mut balked: BTreeSet<RelPath> = refused.iter().map(|(path, _)| path.clone()).collect();
    let mut ops = Vec::new();
    let mut pulls = Vec::new();
    for (step, unit, translated, made) in steps {
        let path = &step.path;
        if let Some(reason) = units.ended(unit) {
            refused.push((path.clone(), reason));
            unstage(tree, &made)?;
            modes.retain(|(of, _)| of != path);
            continue;
        }
        let ordered = translated.into_iter().map(|op| Ordering {
            path: path.clone(),
            op,
            unit,
            made: Some(made.clone()),
        });
        ops.extend(ordered);
        pulls.extend(Pull::of(round, step, made));
    }
    for found in &round.found {
        match artefacts(tree, round, found) {
            Ok(made) => ops.extend(made.into_iter().map(Ordering::alone)),
            Err(reason) => {
                refused.push((found.conflict.path.clone(), reason));
                // The older version stays on record, and its artefacts with it.
                continue;
            }
        }
        ops.extend(
            found
                .superseded
                .iter()
                .map(|(path, node)| Ordering::alone(removal(path, *node, round))),
        );
    }
    for resolved in &round.resolved {
        ops.extend(
            resolved
                .artefacts
                .iter()
                .map(|(path, node)| Ordering::alone(removal(path, *node, round))),
        );
    }
    ops.extend(modes.into_iter().map(Ordering::alone));
    pulls::announce(journal, &tree.reserved, round.peer.id, &pulls)?;
    let origin = Origin::Peer(round.peer.id);
    let (paths, ops): (Vec<_>, Vec<_>) = ops
        .into_iter()
        .map(|ordering| {
            let Ordering {
                path,
                op,
                unit,
                made,
            } = ordering;
            ((path, made), Ordered { op, origin, unit })
        })
        .unzip();
    let results = tree.carry_out(round, ops.clone());
    if !pulls.is_empty() {
        pulls::settle(journal, &tree.filesystem, round.peer.id, pulls)?;
    }
    for (((path, made), ordered), result) in paths.into_iter().zip(ops).zip(results) {
        match (result, &ordered.op) {
            (DoorResult::Done { n, ino }, DoorOp::Place { .. }) => {
                round.placed.insert(path, (ino, n));
            }
            (DoorResult::Done { .. }, _) => {}
            // A directory that is left with nothing but what is not mirrored counts as
            // absent, and what is in it is not deleted.
            (DoorResult::Refused { .. }, DoorOp::RemoveDir { .. })
                if holds_only_local(journal, &path)? => {}
            (DoorResult::Refused { reason }, _) => {
                if let Some(made) = &made {
                    unstage(tree, made)?;
                }
                round.placed.remove(&path);
                if !units::is_held(&reason) {
                    balked.insert(path.clone());
                }
                refused.push((path, reason));
            }
        }
    }
    round.balked = balked;
    round
        .refused
        .extend(refused.iter().map(|(path, _)| path.clone()));
    round.problems.extend(refused.iter().cloned());
    Ok(refused)
}

/// Removes what was staged for a change that was not made, and nothing that came in its
/// place.
fn unstage(tree: &LocalTree, made: &Made) -> Result<(), Error> {
    let Made::Placed { staged, ino } = made else {
        return Ok(());
    };
    if tree.filesystem.staged(staged)? == Some(*ino)
        && let Some(name) = replica::StagedName::new(staged.as_str())
        && let Err(error) = tree.staging.discard(&name)
    {
        tracing::warn!(%error, "something stays in the staging directory");
    }
    Ok(())
}

/// Whether a directory holds something, and all of it is local only.
fn holds_only_local(journal: &Journal, path: &RelPath) -> Result<bool, Error> {
    let snapshot = journal.snapshot()?;
    let Some(directory) = snapshot.at(path)? else {
        return Ok(false);
    };
    Ok(only_local(&snapshot, directory.id)?)
}

fn removal(path: &RelPath, node: LocalNode, round: &Round) -> (RelPath, DoorOp) {
    let expect = Expect::Node {
        ino: node.ino,
        unchanged_since: round.cut.mark().n,
    };
    (
        path.clone(),
        DoorOp::Remove {
            path: path.clone(),
            expect,
            agreed: false,
        },
    )
}

/// Why something is not taken in where this side has what stays local: to the rules
/// nothing is there, and yet it is somebody's.
const SPECIAL_IN_THE_WAY: &str =
    "a FIFO, socket or device is in the way of what the peer has here: move it elsewhere";

/// Why a step is not taken however often it is tried, as long as nobody changes anything. It
/// is none that others wait for.
fn never(tree: &LocalTree, round: &Round, step: &Step) -> Option<String> {
    let special = |node: &LocalNode| node.attr.kind == Kind::Special;
    if round.locals.get(&step.path).is_some_and(special) {
        return Some(SPECIAL_IN_THE_WAY.to_owned());
    }
    tree.symlinks.refuse(&step.path, step.after.as_ref()?)
}

/// The operations of one step, and what it comes to. Directories that the daemon itself could not write into
/// get their mode once they are filled.
fn translate(
    tree: &LocalTree,
    round: &Round,
    step: &Step,
    modes: &mut Vec<(RelPath, DoorOp)>,
) -> Result<(Vec<DoorOp>, Made), String> {
    let path = step.path.clone();
    let here = match round.locals.get(&path) {
        Some(node) => Expect::Node {
            ino: node.ino,
            unchanged_since: round.cut.mark().n,
        },
        None => Expect::Absent,
    };
    let agreed = round.plan.decisions.get(&path).is_some_and(|(sides, _)| {
        let content = |entry: &Option<Entry>| entry.as_ref().map(|entry| entry.content.clone());
        sides.base.is_some() && content(&sides.base) == content(&sides.local)
    });
    let is_directory = |entry: &Option<Entry>| {
        entry
            .as_ref()
            .is_some_and(|entry| entry.content == Content::Directory)
    };
    let vacate = |expect| {
        if is_directory(&step.before) {
            DoorOp::RemoveDir {
                path: path.clone(),
                expect,
            }
        } else {
            DoorOp::Remove {
                path: path.clone(),
                expect,
                agreed,
            }
        }
    };
    let Some(after) = &step.after else {
        return Ok((vec![vacate(here)], Made::Gone));
    };
    if let Some(before) = &step.before
        && before.content == after.content
    {
        let op = DoorOp::SetMeta {
            path: path.clone(),
            expect: here,
            mode: (before.mode != after.mode).then_some(after.mode),
            mtime: (before.mtime != after.mtime).then_some(after.mtime),
            xattrs: (before.xattrs != after.xattrs).then(|| after.xattrs.clone()),
        };
        return Ok((vec![op], Made::Meta));
    }
    let changes_kind =
        step.before.is_some() && (is_directory(&step.before) || is_directory(&step.after));
    let mut ops = Vec::new();
    let expect = if changes_kind {
        ops.push(vacate(here));
        Expect::Absent
    } else {
        here
    };
    let owner = round
        .locals
        .get(&path)
        .map(|node| (node.attr.uid, node.attr.gid));
    let (staged, placed) = stage(tree, round, after, owner)?;
    if after.content == Content::Directory && after.mode & 0o700 != 0o700 {
        modes.push((
            path.clone(),
            DoorOp::SetMeta {
                path: path.clone(),
                expect: Expect::Node {
                    ino: Ino(placed.ino),
                    unchanged_since: u64::MAX,
                },
                mode: Some(after.mode),
                mtime: None,
                xattrs: None,
            },
        ));
    }
    let made = Made::Placed {
        staged: staged.clone(),
        ino: Ino(placed.ino),
    };
    ops.push(DoorOp::Place {
        staged,
        path,
        expect,
        agreed,
    });
    Ok((ops, made))
}

/// Makes a fresh staged node, with the content that was fetched or that this side has.
fn stage(
    tree: &LocalTree,
    round: &Round,
    entry: &Entry,
    owner: Option<(u32, u32)>,
) -> Result<(StagedName, Placed), String> {
    hold(tree, round, entry)?;
    instantiate(tree, entry, owner_of(tree, owner))
}

/// Makes an inode of a version that is in conflict. What a power loss leaves of a conflict
/// copy would count as somebody's edit of it.
fn stage_version(
    tree: &LocalTree,
    round: &Round,
    entry: &Entry,
    owner: Option<(u32, u32)>,
) -> Result<StagedName, String> {
    hold(tree, round, entry)?;
    instantiate_durably(tree, entry, owner_of(tree, owner))
}

/// Sees to it that the content of an entry is in staging.
fn hold(tree: &LocalTree, round: &Round, entry: &Entry) -> Result<(), String> {
    if let Content::File { hash, size } = entry.content {
        if round.missing.contains(&hash) {
            return Err("its content could not be had from the peer yet".to_owned());
        }
        if !tree
            .staging
            .is_complete(hash)
            .map_err(|error| error.to_string())?
        {
            copy_local(tree, round, hash, size)?;
        }
    }
    Ok(())
}

/// Who may not choose owners makes files of its own.
fn owner_of(tree: &LocalTree, owner: Option<(u32, u32)>) -> Option<Owner> {
    tree.owner.map(|default| match owner {
        Some((uid, gid)) => Owner { uid, gid },
        None => default,
    })
}

pub(super) fn instantiate(
    tree: &LocalTree,
    entry: &Entry,
    owner: Option<Owner>,
) -> Result<(StagedName, Placed), String> {
    let name = replica::StagedName::random().map_err(|error| error.to_string())?;
    let placed = tree
        .staging
        .instantiate(entry, &name, false, owner)
        .map_err(|error| error.to_string())?;
    Ok((to_place(&name)?, placed))
}

fn instantiate_durably(
    tree: &LocalTree,
    entry: &Entry,
    owner: Option<Owner>,
) -> Result<StagedName, String> {
    let name = replica::StagedName::random().map_err(|error| error.to_string())?;
    tree.staging
        .instantiate_durably(entry, &name, owner)
        .map_err(|error| error.to_string())?;
    to_place(&name)
}

/// Both modules name staged things by the same 32 digits.
fn to_place(name: &replica::StagedName) -> Result<StagedName, String> {
    StagedName::new(name.as_str())
        .ok_or_else(|| format!("{} is no name of a staged thing", name.as_str()))
}

/// Brings a content that a file of this side had at the cut into staging.
fn copy_local(tree: &LocalTree, round: &Round, hash: ContentHash, size: u64) -> Result<(), String> {
    if size == 0 {
        let empty = tree
            .staging
            .begin(hash, 0)
            .map_err(|error| error.to_string())?;
        return empty.finish().map_err(|error| error.to_string());
    }
    let Some(source) = round.sources.get(&hash) else {
        return Err("its content could not be had from the peer yet".to_owned());
    };
    let file = round
        .cut
        .open(source.ino, &source.path)
        .map_err(|error| error.to_string())?;
    let mut incoming = tree
        .staging
        .begin(hash, source.size)
        .map_err(|error| error.to_string())?;
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = incoming.have();
    while offset < source.size {
        let want = buffer
            .len()
            .min(usize::try_from(source.size - offset).unwrap_or(usize::MAX));
        let read = file
            .read_at(&mut buffer[..want], offset)
            .map_err(|error| error.to_string())?;
        if read == 0 {
            return Err("its local copy is shorter than it was".to_owned());
        }
        incoming
            .append(offset, &buffer[..read])
            .map_err(|error| error.to_string())?;
        offset += read as u64;
    }
    incoming.finish().map_err(|error| error.to_string())
}

/// What puts the artefacts of a conflict beside the file.
fn artefacts(
    tree: &LocalTree,
    round: &Round,
    found: &Found,
) -> Result<Vec<(RelPath, DoorOp)>, String> {
    let conflict = &found.conflict;
    let mut ops = Vec::new();
    match (&conflict.copy, &conflict.remote) {
        (Some(copy), Some(remote)) => {
            if let Some(reason) = tree.symlinks.refuse(copy, remote) {
                return Err(reason);
            }
            let owner = round.locals.get(&conflict.path);
            let owner = owner.map(|node| (node.attr.uid, node.attr.gid));
            let staged = stage_version(tree, round, remote, owner)?;
            let op = DoorOp::Place {
                staged,
                path: copy.clone(),
                expect: Expect::Absent,
                agreed: false,
            };
            ops.push((copy.clone(), op));
        }
        _ if conflict.unit.is_some() => keep_unit(tree, round, found)?,
        // Never inside a Git directory: the peer's version is kept out of the tree.
        (None, Some(remote)) if remote.content != Content::Directory => {
            let staged = stage_version(tree, round, remote, None)?;
            let kept = kept_name(conflict);
            rustix::fs::renameat(
                tree.reserved.staging(),
                staged.as_str(),
                tree.reserved.conflicts(),
                &kept,
            )
            .map_err(|error| format!("cannot keep it in .mirrorfs/conflicts: {error}"))?;
        }
        _ => {}
    }
    if let Some(info) = &conflict.info {
        let text = explanation(
            &conflict.path,
            conflict.copy.as_ref(),
            &round.peer.name,
            conflict.local.as_ref(),
            conflict.remote.as_ref(),
            conflict.since,
        );
        let staged = stage_text(tree, &text)?;
        ops.push((
            info.clone(),
            DoorOp::Place {
                staged,
                path: info.clone(),
                expect: Expect::Absent,
                agreed: false,
            },
        ));
    }
    Ok(ops)
}

/// Makes a fresh staged file of ours.
fn stage_text(tree: &LocalTree, text: &str) -> Result<StagedName, String> {
    let entry = Entry {
        content: Content::File {
            size: text.len() as u64,
            hash: ContentHash::of(text.as_bytes()),
        },
        mode: 0o644,
        mtime: crate::clock::wall(),
        xattrs: Xattrs::new(),
    };
    stage_bytes(tree, text.as_bytes())?;
    instantiate_durably(tree, &entry, tree.owner)
}

/// Brings a content of ours into staging.
pub(super) fn stage_bytes(tree: &LocalTree, bytes: &[u8]) -> Result<(), String> {
    tree.staging
        .begin(ContentHash::of(bytes), bytes.len() as u64)
        .and_then(|mut incoming| {
            let have = usize::try_from(incoming.have())
                .unwrap_or(0)
                .min(bytes.len());
            incoming.append(have as u64, &bytes[have..])?;
            incoming.finish()
        })
        .map_err(|error| error.to_string())
}

/// Puts what was merged of a round's conflicts into the tree. All of it makes another round
/// necessary: what was merged is yet to be sent, and what was refused is a conflict again.
pub(super) fn apply_merged(
    tree: &LocalTree,
    journal: &Journal,
    round: &mut Round,
    contents: &Contents,
) -> Result<Vec<(RelPath, String)>, Error> {
    let merged = merge_found(tree, round, contents);
    let ops = merged.iter().map(|merged| Ordered {
        op: merged.op.clone(),
        origin: Origin::Local,
        unit: None,
    });
    let results = tree.carry_out(round, ops.collect());
    let (mut done, mut unfinished) = (Vec::new(), Vec::new());
    for (merged, result) in merged.into_iter().zip(results) {
        match result {
            DoorResult::Done { ino, .. } => {
                let reason = "it was merged, and the result is yet to be sent".to_owned();
                unfinished.push((merged.path.clone(), reason));
                done.push((merged, ino));
            }
            DoorResult::Refused { reason } => unfinished.push((merged.path, reason)),
        }
    }
    rebase(journal, &tree.reserved, round, done)?;
    Ok(unfinished)
}

/// The name of the explanation beside what is kept of a Git directory.
pub(super) const UNIT_INFO: &str = ".conflict-info";

/// Keeps what the peer has changed in a Git directory, under the names it has there, with
/// an explanation beside it.
fn keep_unit(tree: &LocalTree, round: &Round, found: &Found) -> Result<(), String> {
    let conflict = &found.conflict;
    let kept = kept_name(conflict);
    let shelf = Shelf::new(tree.reserved.conflicts(), kept.as_str());
    let staging = tree.staging.dir();
    let said = |error: std::io::Error| format!("cannot keep it in .mirrorfs/conflicts: {error}");
    let mut names = Vec::new();
    for (path, entry) in &found.unit {
        let staged = stage_version(tree, round, entry, None)?;
        let below = path
            .rebase(&conflict.path, &RelPath::ROOT)
            .unwrap_or_else(|| path.clone());
        shelf
            .keep(Place::new(&staging, staged.as_str()), &below)
            .map_err(said)?;
        names.push((below, entry.clone()));
    }
    let text = unit_explanation(&conflict.path, &round.peer.name, &names, conflict.since);
    let staged = stage_text(tree, &text)?;
    rustix::fs::renameat(
        staging,
        staged.as_str(),
        tree.reserved.conflicts(),
        format!("{kept}{UNIT_INFO}"),
    )
    .map_err(|error| said(error.into()))
}
