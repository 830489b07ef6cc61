//! From decisions to steps: what the peer and the mounted side each have to do, in an
//! order in which every step finds what the one before left.

use std::collections::{BTreeSet, HashMap};

use mirrorfs_journal::BaseChange;

use crate::reconcile::{Decision, Plan};
use crate::tree::git::rank;
use crate::tree::{Content, Entry, NodeId, RelPath};
use crate::wire::message::{Expect, Op};

use super::moves::Moves;

/// One change of one name on one side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Where.
    pub path: RelPath,
    /// What is there.
    pub before: Option<Entry>,
    /// What shall be there.
    pub after: Option<Entry>,
}

impl Step {
    fn is_directory(entry: Option<&Entry>) -> bool {
        entry.is_some_and(|entry| entry.content == Content::Directory)
    }

    /// Whether later steps may need this one as their parent.
    fn makes_directory(&self) -> bool {
        Self::is_directory(self.after.as_ref()) && !Self::is_directory(self.before.as_ref())
    }

    /// The position of the step's kind in the order of a batch.
    fn phase(&self) -> Phase {
        let (was, becomes) = (
            Self::is_directory(self.before.as_ref()),
            Self::is_directory(self.after.as_ref()),
        );
        match (&self.before, &self.after) {
            (Some(_), None) if was => Phase::RemoveDir,
            (_, None) => Phase::Remove,
            (None, Some(_)) if becomes => Phase::MakeDir,
            (None, Some(_)) => Phase::Create,
            (Some(before), Some(after)) if before.content == after.content => Phase::Metadata,
            (Some(_), Some(_)) if was || becomes => Phase::ChangeKind,
            (Some(_), Some(_)) => Phase::Replace,
        }
    }
}

/// The order of a batch: new names, then replacements, then removals.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    MakeDir,
    ChangeKind,
    Create,
    Replace,
    Metadata,
    Remove,
    RemoveDir,
}

/// The steps that take one side to the plan's results, in order.
pub fn steps(plan: &Plan, side: impl Fn(&crate::reconcile::Sides) -> &Option<Entry>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (path, (sides, decision)) in &plan.decisions {
        let Decision::Agree { result, .. } = decision else {
            continue;
        };
        let before = side(sides);
        if before != result {
            steps.push(Step {
                path: path.clone(),
                before: before.clone(),
                after: result.clone(),
            });
        }
    }
    // What lies below a directory that becomes a file must be gone before that.
    let shrinking: BTreeSet<RelPath> = steps
        .iter()
        .filter(|step| {
            step.phase() == Phase::ChangeKind && Step::is_directory(step.before.as_ref())
        })
        .map(|step| step.path.clone())
        .collect();
    let below_shrinking = |path: &RelPath| {
        let mut at = path.parent();
        while let Some(parent) = at {
            if shrinking.contains(&parent) {
                return true;
            }
            at = parent.parent();
        }
        false
    };
    let mut keyed: Vec<_> = steps
        .into_iter()
        .map(|step| {
            let phase = step.phase();
            let early = matches!(phase, Phase::Remove | Phase::RemoveDir)
                && !shrinking.is_empty()
                && below_shrinking(&step.path);
            let depth = step.path.depth() as isize;
            // A file that becomes a directory is changed among the new directories,
            // parents first; a directory that becomes a file among the files.
            let (order, depth) = match phase {
                _ if step.makes_directory() => (0, depth),
                Phase::MakeDir => (0, depth),
                Phase::ChangeKind => (2, 0),
                Phase::Create => (3, 0),
                Phase::Replace => (4, 0),
                Phase::Metadata => (5, 0),
                Phase::Remove | Phase::RemoveDir => (if early { 1 } else { 6 }, -depth),
            };
            // Made in this order, and removed in the reverse.
            let rank = plan
                .git
                .unit_of(&step.path)
                .map_or(1, |unit| rank(&unit, &step.path));
            let rank = if phase == Phase::Remove {
                2 - rank
            } else {
                rank
            };
            ((order, depth, phase == Phase::RemoveDir, rank), step)
        })
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, step)| step).collect()
}

/// What goes to the peer, and what both sides hold once it is there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Batch {
    /// The steps on the peer.
    pub ops: Vec<Op>,
    /// The new base, each change with the steps it stands on.
    pub base: Vec<(BaseChange, Vec<u32>)>,
}

impl Batch {
    /// The batch of a plan. `nodes` names the local node at each path that has one.
    pub fn new(plan: &Plan, moves: &Moves, nodes: &HashMap<RelPath, NodeId>) -> Self {
        let mut batch = Self::default();
        batch.park(plan, moves);
        let mut by_path: HashMap<RelPath, Vec<u32>> = HashMap::new();
        let mut unparks: Vec<Op> = batch
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::Park { from, slot, .. } => Some((from, *slot)),
                _ => None,
            })
            .map(|(from, slot)| Op::Unpark {
                slot,
                to: moves.relocate(from),
            })
            .collect();
        // Deepest first, to be taken from the end.
        unparks.sort_by_key(|op| std::cmp::Reverse(unparked_depth(op)));
        for step in steps(plan, |sides| &sides.remote) {
            // Parents come before what moves into them, whether they are made or move
            // themselves, and everything else finds all of them in place.
            while unparks
                .last()
                .is_some_and(|op| !step.makes_directory() || unparked_depth(op) < step.path.depth())
            {
                batch.unpark(&mut unparks, &mut by_path);
            }
            batch.push(&step, &mut by_path);
        }
        while !unparks.is_empty() {
            batch.unpark(&mut unparks, &mut by_path);
        }
        for step in moves.iter() {
            let on = by_path.get(&step.to).cloned().unwrap_or_default();
            let change = BaseChange::Move {
                from: step.from.clone(),
                to: step.to.clone(),
            };
            batch.base.push((change, on));
        }
        for (path, (sides, decision)) in &plan.decisions {
            let Decision::Agree { result, .. } = decision else {
                continue;
            };
            let on = by_path.get(path).cloned().unwrap_or_default();
            let change = match result {
                Some(entry) => BaseChange::Put {
                    path: path.clone(),
                    node: nodes.get(path).copied(),
                    entry: entry.clone(),
                },
                None if sides.base.is_some() => BaseChange::Remove { path: path.clone() },
                None => continue,
            };
            batch.base.push((change, on));
        }
        batch
    }

    fn park(&mut self, plan: &Plan, moves: &Moves) {
        let mut parks: Vec<_> = moves.iter().collect();
        parks.sort_by_key(|step| std::cmp::Reverse(step.from.depth()));
        for step in parks {
            let expect = plan
                .decisions
                .get(&step.to)
                .and_then(|(sides, _)| sides.remote.clone().or_else(|| sides.base.clone()));
            let Some(expect) = expect else { continue };
            let slot = self.ops.len() as u32;
            self.ops.push(Op::Park {
                from: step.from.clone(),
                slot,
                expect,
            });
        }
    }

    fn unpark(&mut self, unparks: &mut Vec<Op>, by_path: &mut HashMap<RelPath, Vec<u32>>) {
        let Some(Op::Unpark { slot, to }) = unparks.pop() else {
            return;
        };
        // The slot is the index of the parking step: those come first.
        by_path
            .entry(to.clone())
            .or_default()
            .extend([slot, self.ops.len() as u32]);
        self.ops.push(Op::Unpark { slot, to });
    }

    fn push(&mut self, step: &Step, by_path: &mut HashMap<RelPath, Vec<u32>>) {
        let path = step.path.clone();
        let steps = by_path.entry(path.clone()).or_default();
        let mut add = |op| {
            steps.push(self.ops.len() as u32);
            self.ops.push(op);
        };
        match (&step.before, &step.after) {
            (None, None) => {}
            (Some(before), None) if before.content == Content::Directory => {
                add(Op::RemoveDir { path });
            }
            (Some(before), None) => add(Op::Remove {
                path,
                expect: before.clone(),
            }),
            (None, Some(after)) if after.content == Content::Directory => {
                add(Op::MakeDir {
                    path,
                    entry: after.clone(),
                });
            }
            (None, Some(after)) => {
                add(Op::Put {
                    path,
                    entry: after.clone(),
                    expect: Expect::Absent,
                });
            }
            (Some(before), Some(after)) if before.content == after.content => {
                add(Op::SetMeta {
                    path,
                    entry: after.clone(),
                    expect: before.clone(),
                });
            }
            (Some(before), Some(after)) if after.content == Content::Directory => {
                add(Op::Remove {
                    path: path.clone(),
                    expect: before.clone(),
                });
                add(Op::MakeDir {
                    path,
                    entry: after.clone(),
                });
            }
            (Some(before), Some(after)) if before.content == Content::Directory => {
                add(Op::RemoveDir { path: path.clone() });
                add(Op::Put {
                    path,
                    entry: after.clone(),
                    expect: Expect::Absent,
                });
            }
            (Some(before), Some(after)) => add(Op::Put {
                path,
                entry: after.clone(),
                expect: Expect::Entry(before.clone()),
            }),
        }
    }
}

fn unparked_depth(op: &Op) -> usize {
    match op {
        Op::Unpark { to, .. } => to.depth(),
        _ => 0,
    }
}
