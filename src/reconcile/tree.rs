//! Many names: the results of [`merge`] made to fit together as trees.

use std::collections::{BTreeMap, BTreeSet};

use crate::tree::{Content, Entry, RelPath};

use super::entry::{Merge, Note, Sides, merge_by};
use super::git::{self, Git, both_directories};

/// Which way changes travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// Both ways.
    #[default]
    TwoWay,
    /// From the mounted side to the peer. What changed on the peer alone stays there.
    PushOnly,
    /// From the peer to the mounted side. What changed here alone stays here.
    PullOnly,
}

/// Why a name is left as it is on both sides although it is not agreed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// The policy does not let the change travel.
    Policy,
    /// The deletion is braked.
    Brake,
    /// It lies below a name in conflict.
    BelowConflict,
    /// A power loss may have made this side what it is.
    Doubt,
}

/// What is to be done about one name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Decision {
    /// Both sides come to show this, which becomes the base.
    Agree {
        /// What both shall show.
        result: Option<Entry>,
        /// What a person may want to know.
        note: Option<Note>,
    },
    /// Both sides keep what they have.
    Conflict,
    /// Nothing is done for now.
    Hold(Held),
    /// Both sides keep what they have: it means the same as what both had agreed on.
    #[default]
    Leave,
}

impl Decision {
    fn makes_directory(&self) -> bool {
        matches!(self, Self::Agree { result: Some(entry), .. } if entry.content == Content::Directory)
    }
}

/// Names with their three legs and what is to be done about each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// By path, so that parents come before what they hold.
    pub decisions: BTreeMap<RelPath, (Sides, Decision)>,
    /// The Git directories among them.
    pub git: Git,
}

/// Decides about a set of names.
///
/// The set must be closed downwards where something disappears: when a directory is
/// gone on one side, every name below it that either side or the base knows is in it.
pub fn reconcile(scope: BTreeMap<RelPath, Sides>, git: Git, policy: Policy) -> Plan {
    let mut plan = Plan {
        git,
        ..Plan::default()
    };
    for (path, sides) in scope {
        let same = |one: &Content, other: &Content| plan.git.same(&path, one, other);
        let decision = match merge_by(&sides, &same) {
            Merge::Agreed(result, note) => Decision::Agree { result, note },
            Merge::Conflict => Decision::Conflict,
            Merge::Alike => Decision::Leave,
        };
        plan.decisions.insert(path, (sides, decision));
    }
    git::unite(&mut plan);
    keep_parents(&mut plan);
    restrict(&mut plan, policy);
    plan
}

/// Whatever survives needs its directories. One that was deleted on one side and holds
/// something the other side changed stays; one that became something else there is a
/// conflict at that name, and everything below it waits.
fn keep_parents(plan: &mut Plan) {
    let survivors: Vec<RelPath> = plan
        .decisions
        .iter()
        .filter(|(_, (_, decision))| {
            !matches!(
                decision,
                Decision::Agree { result: None, .. } | Decision::Hold(_)
            )
        })
        .map(|(path, _)| path.clone())
        .collect();
    let mut blocked = BTreeSet::new();
    for survivor in survivors {
        let mut at = survivor.parent();
        while let Some(parent) = at {
            if let Some((sides, decision)) = plan.decisions.get_mut(&parent) {
                match decision {
                    Decision::Agree { result: None, note } => {
                        let directory = [&sides.local, &sides.remote, &sides.base]
                            .into_iter()
                            .flatten()
                            .find(|entry| entry.content == Content::Directory);
                        if let Some(directory) = directory {
                            *decision = Decision::Agree {
                                result: Some(directory.clone()),
                                note: *note,
                            };
                        }
                    }
                    Decision::Agree {
                        result: Some(entry),
                        ..
                    } if entry.content != Content::Directory => {
                        *decision = Decision::Conflict;
                        blocked.insert(parent.clone());
                    }
                    // Of a Git directory in conflict both sides have one.
                    Decision::Conflict if !both_directories(sides) => {
                        blocked.insert(parent.clone());
                    }
                    _ => {}
                }
            }
            at = parent.parent();
        }
    }
    for blocker in blocked {
        plan.hold_below(&blocker, Held::BelowConflict);
    }
}

/// Takes back what the policy does not let travel.
fn restrict(plan: &mut Plan, policy: Policy) {
    for (sides, decision) in plan.decisions.values_mut() {
        let Decision::Agree { result, .. } = decision else {
            continue;
        };
        let stays = match policy {
            Policy::TwoWay => continue,
            Policy::PushOnly => *result == sides.local,
            Policy::PullOnly => *result == sides.remote,
        };
        if !stays {
            *decision = Decision::Hold(Held::Policy);
        }
    }
}

impl Plan {
    /// How many files the plan would delete from the mounted side.
    pub fn local_deletions(&self) -> usize {
        self.deletions(|sides| &sides.local)
    }

    /// How many files the plan would delete from the peer.
    pub fn remote_deletions(&self) -> usize {
        self.deletions(|sides| &sides.remote)
    }

    fn deletions(&self, side: impl Fn(&Sides) -> &Option<Entry>) -> usize {
        self.decisions
            .values()
            .filter(|(sides, decision)| {
                matches!(decision, Decision::Agree { result: None, .. }) && is_file(side(sides))
            })
            .count()
    }

    /// By how many files the base grows with the plan; less than none where it loses some.
    pub fn growth(&self) -> isize {
        self.decisions
            .values()
            .map(|(sides, decision)| match decision {
                Decision::Agree { result, .. } => {
                    isize::from(is_file(result)) - isize::from(is_file(&sides.base))
                }
                _ => 0,
            })
            .sum()
    }

    /// Holds every deletion from the mounted side back.
    pub fn brake_local_deletions(&mut self) {
        self.brake(|_, sides| sides.local.is_some());
    }

    /// Holds deletions from the peer back.
    pub fn brake_remote_deletions(&mut self, held: impl Fn(&RelPath) -> bool) {
        self.brake(|path, sides| sides.remote.is_some() && held(path));
    }

    /// Brings back on the peer what is gone from there and still here.
    pub fn undo_remote_deletions(&mut self) {
        self.undo(|_| true, |sides| &sides.local);
    }

    /// Brings back on the mounted side what is gone from here and still on the peer.
    pub fn undo_local_deletions(&mut self, wanted: impl Fn(&RelPath) -> bool) {
        self.undo(wanted, |sides| &sides.remote);
    }

    /// Ends the conflict at a path in favour of the mounted side: below it too, where one
    /// of the sides has a directory and the other has not. Of a Git directory the set must
    /// hold all names that are not objects, and all objects that either side removed.
    pub fn settle_for_local(&mut self, path: &RelPath) {
        self.settle(path, |sides| &sides.local);
    }

    /// Ends the conflict at a path in favour of the peer, likewise.
    pub fn settle_for_remote(&mut self, path: &RelPath) {
        self.settle(path, |sides| &sides.remote);
    }

    fn settle(&mut self, path: &RelPath, winner: impl Fn(&Sides) -> &Option<Entry>) {
        if self.is_unit_in_conflict(path) {
            self.settle_unit(path, winner);
            keep_parents(self);
            return;
        }
        for (at, (sides, decision)) in self.decisions.range_mut(path.clone()..) {
            if at.starts_with(path) {
                *decision = Decision::Agree {
                    result: winner(sides).clone(),
                    note: None,
                };
            }
        }
    }

    fn undo(
        &mut self,
        wanted: impl Fn(&RelPath) -> bool,
        keeper: impl Fn(&Sides) -> &Option<Entry>,
    ) {
        for (path, (sides, decision)) in &mut self.decisions {
            if let Decision::Agree {
                result: result @ None,
                ..
            } = decision
                && wanted(path)
            {
                result.clone_from(keeper(sides));
            }
        }
        // What comes back may lie where the other side has a file by now.
        keep_parents(self);
    }

    fn brake(&mut self, concerned: impl Fn(&RelPath, &Sides) -> bool) {
        let mut held = Vec::new();
        for (path, (sides, decision)) in &mut self.decisions {
            if matches!(decision, Decision::Agree { result: None, .. }) && concerned(path, sides) {
                *decision = Decision::Hold(Held::Brake);
                held.push(path.clone());
            }
        }
        for path in held {
            self.hold_parents(&path, Held::Brake);
        }
    }

    /// Leaves a name as it is on both sides, with the directories that it is in.
    pub fn hold(&mut self, path: &RelPath, why: Held) {
        if let Some((_, decision)) = self.decisions.get_mut(path) {
            *decision = Decision::Hold(why);
        }
        self.hold_parents(path, why);
    }

    /// What stays keeps its directories, also from becoming something else.
    fn hold_parents(&mut self, path: &RelPath, why: Held) {
        let mut at = path.parent();
        while let Some(parent) = at {
            if let Some((_, decision @ Decision::Agree { .. })) = self.decisions.get_mut(&parent)
                && !decision.makes_directory()
            {
                *decision = Decision::Hold(why);
                self.hold_below(&parent, why);
            }
            at = parent.parent();
        }
    }

    fn hold_below(&mut self, above: &RelPath, why: Held) {
        for (path, (_, decision)) in self.decisions.range_mut(above.clone()..) {
            if path != above && path.starts_with(above) {
                *decision = Decision::Hold(why);
            }
        }
    }
}

fn is_file(entry: &Option<Entry>) -> bool {
    let entry = entry.as_ref();
    entry.is_some_and(|entry| entry.content != Content::Directory)
}
