//! What must hold of any plan, whatever the three trees are.

use super::*;
use crate::tree::Kind;
use crate::tree::git::{Role, role};

/// Checks one combination for everything that is promised.
pub(super) fn all_hold(base: &Tree, local: &Tree, remote: &Tree) {
    let case = Case {
        base,
        local,
        remote,
    };
    let plan = case.decided(Policy::TwoWay);
    case.results_are_trees(&plan);
    case.nothing_new_is_lost(&plan);
    case.only_what_the_base_says_is_displaced(&plan);
    case.the_swapped_sides_mirror_it(&plan);
    case.a_second_round_has_nothing_to_do(&plan);
    case.subtrees_do_not_depend_on_each_other(&plan);
    case.one_way_policies_leave_the_sender_alone();
    case.a_brake_holds_every_deletion(&plan);
    case.a_refill_brings_everything_back(&plan);
    case.a_settled_conflict_is_the_winners(&plan);
    case.a_repository_is_one_unit(&plan);
}

struct Case<'a> {
    base: &'a Tree,
    local: &'a Tree,
    remote: &'a Tree,
}

fn content(entry: Option<&Entry>) -> Option<&Content> {
    entry.map(|entry| &entry.content)
}

/// Whether one content is as good as the other at a path: the same, or two indexes that
/// stage the same, or two forms of one Git object.
fn as_good(plan: &Plan, path: &RelPath, one: Option<&Content>, other: Option<&Content>) -> bool {
    let (Some(one), Some(other)) = (one, other) else {
        return one == other;
    };
    let is_object = |unit: RelPath| role(&unit, path) == Role::Object;
    let files = one.kind() == Kind::File && other.kind() == Kind::File;
    plan.git.same(path, one, other) || (files && plan.git.unit_of(path).is_some_and(is_object))
}

fn is_tree(tree: &Tree) -> bool {
    tree.keys().all(|path| match path.parent() {
        Some(parent) if !parent.is_root() => {
            content(tree.get(&parent)) == Some(&Content::Directory)
        }
        _ => true,
    })
}

impl Case<'_> {
    fn decided(&self, policy: Policy) -> Plan {
        super::decided(self.base, self.local, self.remote, policy)
    }

    fn after(&self, plan: &Plan) -> (Tree, Tree, Tree) {
        apply(plan, self.base, self.local, self.remote)
    }

    /// For the message of a failure.
    fn shown(&self, plan: &Plan) -> String {
        let Self {
            base,
            local,
            remote,
        } = self;
        format!("base {base:#?}\nlocal {local:#?}\nremote {remote:#?}\n{plan:#?}")
    }

    fn results_are_trees(&self, plan: &Plan) {
        let (_, local, remote) = self.after(plan);
        assert!(is_tree(&local) && is_tree(&remote), "{}", self.shown(plan));
    }

    /// What a side has and the base has not is still there, and is on the other side too
    /// or is a conflict.
    fn nothing_new_is_lost(&self, plan: &Plan) {
        let (_, local, remote) = self.after(plan);
        for (side, after) in [(self.local, &local), (self.remote, &remote)] {
            for (path, entry) in side {
                let as_good = |other| as_good(plan, path, other, Some(&entry.content));
                if as_good(content(self.base.get(path))) {
                    continue;
                }
                let kept = as_good(content(after.get(path)));
                let told = match &plan.decisions[path].1 {
                    Decision::Agree { result, .. } => as_good(content(result.as_ref())),
                    Decision::Conflict => true,
                    Decision::Leave => false,
                    Decision::Hold(why) => {
                        *why == Held::BelowConflict
                            && plan.decisions.iter().any(|(above, (_, decision))| {
                                path.starts_with(above) && *decision == Decision::Conflict
                            })
                    }
                };
                assert!(kept && told, "{path}: {}", self.shown(plan));
            }
        }
    }

    /// A side loses or replaces a content only where it was what both had agreed on.
    fn only_what_the_base_says_is_displaced(&self, plan: &Plan) {
        let (_, local, remote) = self.after(plan);
        for (side, after) in [(self.local, &local), (self.remote, &remote)] {
            for (path, entry) in side {
                let as_good = |other| as_good(plan, path, other, Some(&entry.content));
                let displaced = !as_good(content(after.get(path)));
                assert!(
                    !displaced || as_good(content(self.base.get(path))),
                    "{path}: {}",
                    self.shown(plan)
                );
            }
        }
    }

    /// But for metadata that both changed, of which the local one stands.
    fn the_swapped_sides_mirror_it(&self, plan: &Plan) {
        let swapped = super::plan(self.base, self.remote, self.local);
        assert_eq!(swapped.decisions.len(), plan.decisions.len());
        for (path, (_, decision)) in &plan.decisions {
            let mirrored = &swapped.decisions[path].1;
            let same = match (decision, mirrored) {
                (
                    Decision::Agree { result, note },
                    Decision::Agree {
                        result: other,
                        note: other_note,
                    },
                ) => {
                    let sides = (
                        self.base.get(path),
                        self.local.get(path),
                        self.remote.get(path),
                    );
                    let local_stands = *note == Some(Note::LocalMetadataWon)
                        // Without a base nobody can tell who changed it: no note.
                        || matches!(sides, (None, Some(_), Some(_)))
                        // Two forms of the same, of which one is as good as the other.
                        || content(result.as_ref()) != content(other.as_ref())
                        // Touched on both sides.
                        || matches!(sides, (Some(base), Some(local), Some(remote))
                            if base.mtime != local.mtime && base.mtime != remote.mtime);
                    as_good(
                        plan,
                        path,
                        content(result.as_ref()),
                        content(other.as_ref()),
                    ) && (local_stands || result == other)
                        && *other_note == note.map(mirror)
                }
                (decision, mirrored) => decision == mirrored,
            };
            assert!(same, "{path}: {mirrored:?}\n{}", self.shown(plan));
        }
    }

    fn a_second_round_has_nothing_to_do(&self, plan: &Plan) {
        let (base, local, remote) = self.after(plan);
        let second = super::plan(&base, &local, &remote);
        let after = apply(&second, &base, &local, &remote);
        assert_eq!(
            after,
            (base, local, remote),
            "{}\nthen {second:#?}",
            self.shown(plan)
        );
        let conflicts = |plan: &Plan| -> Vec<RelPath> {
            let decisions = plan.decisions.iter();
            decisions
                .filter(|(_, (_, decision))| *decision == Decision::Conflict)
                .map(|(path, _)| path.clone())
                .collect()
        };
        assert_eq!(
            conflicts(&second),
            conflicts(plan),
            "{}\nthen {second:#?}",
            self.shown(plan)
        );
    }

    /// What is decided about one subtree is decided whatever else is looked at, so that
    /// rounds over parts, in any order, come to the same.
    fn subtrees_do_not_depend_on_each_other(&self, plan: &Plan) {
        let tops: std::collections::BTreeSet<&[u8]> = plan
            .decisions
            .keys()
            .filter_map(|path| path.components().next())
            .collect();
        for top in tops {
            let of = |tree: &Tree| -> Tree {
                tree.iter()
                    .filter(|(path, _)| path.components().next() == Some(top))
                    .map(|(path, entry)| (path.clone(), entry.clone()))
                    .collect()
            };
            let part = super::plan(&of(self.base), &of(self.local), &of(self.remote));
            for (path, decided) in &part.decisions {
                assert_eq!(
                    plan.decisions.get(path),
                    Some(decided),
                    "{}",
                    self.shown(plan)
                );
            }
        }
    }

    fn one_way_policies_leave_the_sender_alone(&self) {
        for policy in [Policy::PushOnly, Policy::PullOnly] {
            let plan = self.decided(policy);
            self.results_are_trees(&plan);
            self.only_what_the_base_says_is_displaced(&plan);
            let (_, local, remote) = self.after(&plan);
            let untouched = match policy {
                Policy::PushOnly => local == *self.local,
                _ => remote == *self.remote,
            };
            assert!(untouched, "{policy:?} {}", self.shown(&plan));
        }
    }

    fn a_brake_holds_every_deletion(&self, plan: &Plan) {
        let (mut here, mut there) = (plan.clone(), plan.clone());
        here.brake_local_deletions();
        there.brake_remote_deletions(|_| true);
        for plan in [&here, &there] {
            self.results_are_trees(plan);
            self.only_what_the_base_says_is_displaced(plan);
        }
        let (_, local, _) = self.after(&here);
        let (_, _, remote) = self.after(&there);
        let keeps =
            |before: &Tree, after: &Tree| before.keys().all(|path| after.contains_key(path));
        assert!(keeps(self.local, &local), "{}", self.shown(&here));
        assert!(keeps(self.remote, &remote), "{}", self.shown(&there));
        assert_eq!((here.local_deletions(), there.remote_deletions()), (0, 0));
    }

    fn a_refill_brings_everything_back(&self, plan: &Plan) {
        let (mut here, mut there) = (plan.clone(), plan.clone());
        here.undo_remote_deletions();
        there.undo_local_deletions(|_| true);
        for plan in [&here, &there] {
            self.results_are_trees(plan);
            self.only_what_the_base_says_is_displaced(plan);
        }
        let (_, local, _) = self.after(&here);
        let (_, _, remote) = self.after(&there);
        let keeps =
            |before: &Tree, after: &Tree| before.keys().all(|path| after.contains_key(path));
        assert!(keeps(self.local, &local), "{}", self.shown(&here));
        assert!(keeps(self.remote, &remote), "{}", self.shown(&there));
    }

    fn a_settled_conflict_is_the_winners(&self, plan: &Plan) {
        let conflicts = plan
            .decisions
            .iter()
            .filter(|(_, (_, decision))| *decision == Decision::Conflict);
        for (path, _) in conflicts {
            let (mut here, mut there) = (plan.clone(), plan.clone());
            here.settle_for_local(path);
            there.settle_for_remote(path);
            let unit = plan.is_unit_in_conflict(path);
            for (plan, winner) in [(&here, self.local), (&there, self.remote)] {
                self.results_are_trees(plan);
                if unit {
                    self.has_the_winners_state_and_all_objects(plan, path, winner);
                    continue;
                }
                let below = |tree: &Tree| -> Tree {
                    tree.iter()
                        .filter(|(at, _)| at.starts_with(path))
                        .map(|(at, entry)| (at.clone(), entry.clone()))
                        .collect()
                };
                let (base, local, remote) = self.after(plan);
                for tree in [&base, &local, &remote] {
                    assert_eq!(below(tree), below(winner), "{path} {}", self.shown(plan));
                }
            }
        }
    }

    fn has_the_winners_state_and_all_objects(&self, plan: &Plan, unit: &RelPath, winner: &Tree) {
        let (_, local, remote) = self.after(plan);
        for after in [&local, &remote] {
            for path in self.names(plan, unit, Role::State) {
                let (now, won) = (content(after.get(&path)), content(winner.get(&path)));
                let directory = now.or(won) == Some(&Content::Directory);
                assert!(now == won || directory, "{path} {}", self.shown(plan));
            }
            for path in self.names(plan, unit, Role::Object) {
                let had = self.local.contains_key(&path) || self.remote.contains_key(&path);
                assert!(
                    !had || after.contains_key(&path),
                    "{path} {}",
                    self.shown(plan)
                );
            }
        }
    }

    fn names(&self, plan: &Plan, unit: &RelPath, of: Role) -> Vec<RelPath> {
        let names = plan
            .decisions
            .keys()
            .filter(|path| plan.git.unit_of(path).as_ref() == Some(unit) && role(unit, path) == of);
        names.cloned().collect()
    }

    /// Neither side gets a mixture of both, and where both have changed something nothing
    /// but objects is exchanged, of which both then have all that either side added.
    fn a_repository_is_one_unit(&self, plan: &Plan) {
        let (_, local, remote) = self.after(plan);
        for unit in &plan.git.units {
            let on_both = [self.local, self.remote]
                .iter()
                .all(|tree| content(tree.get(unit)) == Some(&Content::Directory));
            if !on_both {
                continue;
            }
            let state = self.names(plan, unit, Role::State);
            let equal = |one: &Tree, other: &Tree| {
                state.iter().all(|path| {
                    let (one, other) = (content(one.get(path)), content(other.get(path)));
                    let directory = one.or(other) == Some(&Content::Directory);
                    directory || as_good(plan, path, one, other)
                })
            };
            for after in [&local, &remote] {
                assert!(
                    equal(after, self.local) || equal(after, self.remote),
                    "a mixture: {}",
                    self.shown(plan)
                );
            }
            let conflict = plan.is_unit_in_conflict(unit);
            assert_eq!(conflict, !equal(&local, &remote), "{}", self.shown(plan));
            if conflict {
                assert!(equal(&local, self.local) && equal(&remote, self.remote));
            }
            let added = |path: &RelPath| {
                !self.base.contains_key(path)
                    && (self.local.contains_key(path) || self.remote.contains_key(path))
            };
            for path in self.names(plan, unit, Role::Object) {
                if added(&path) {
                    let both = local.contains_key(&path) && remote.contains_key(&path);
                    assert!(both, "{path} {}", self.shown(plan));
                }
            }
        }
    }
}

fn mirror(note: Note) -> Note {
    match note {
        Note::KeptLocalEdit => Note::KeptRemoteEdit,
        Note::KeptRemoteEdit => Note::KeptLocalEdit,
        Note::LocalMetadataWon => Note::LocalMetadataWon,
    }
}
