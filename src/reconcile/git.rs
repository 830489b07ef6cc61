//! Git directories: each is one unit.
//!
//! Objects are united, because their names say what they are. Of everything else (refs,
//! index, configuration, logs) either one side has changed something, and all of that
//! travels; or both have, and that is one conflict for the whole directory, in which
//! neither side's refs are touched and both sides' objects are on both sides.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::tree::git::{self, Role};
use crate::tree::{Content, ContentHash, Entry, RelPath};

use super::entry::{Note, Sides};
use super::tree::{Decision, Held, Plan};

/// What is known of Git directories among the names that are looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Git {
    /// The directories that are one, on either side or in the base. Each that has a name
    /// below it among those that are decided on is among them itself.
    pub units: BTreeSet<RelPath>,
    /// What indexes mean, by their content: see [`git::meaning`].
    pub meanings: HashMap<ContentHash, ContentHash>,
}

impl Git {
    /// The innermost Git directory that a path is in. One is not in itself.
    pub fn unit_of(&self, path: &RelPath) -> Option<RelPath> {
        if self.units.is_empty() {
            return None;
        }
        std::iter::successors(path.parent(), RelPath::parent)
            .find(|above| self.units.contains(above))
    }

    /// Whether two contents at a path are the same: bit by bit, or both an index that
    /// stages the same.
    pub(super) fn same(&self, path: &RelPath, one: &Content, other: &Content) -> bool {
        if one == other {
            return true;
        }
        let (Content::File { hash: one, .. }, Content::File { hash: other, .. }) = (one, other)
        else {
            return false;
        };
        match (self.meanings.get(one), self.meanings.get(other)) {
            (Some(one), Some(other)) if one == other => self
                .unit_of(path)
                .is_some_and(|unit| git::is_index(&unit, path)),
            _ => false,
        }
    }

    /// Whether a side has changed what lies at a path since the base, as far as it counts:
    /// directories come and go with what is in them.
    pub fn changed(&self, path: &RelPath, base: Option<&Entry>, side: Option<&Entry>) -> bool {
        let file = |entry: Option<&Entry>| {
            entry
                .map(|entry| entry.content.clone())
                .filter(|content| *content != Content::Directory)
        };
        match (file(base), file(side)) {
            (None, None) => false,
            (Some(base), Some(side)) => !self.same(path, &base, &side),
            _ => true,
        }
    }

    /// A digest of what the peer has changed in a Git directory apart from its objects.
    /// `names` are those that it shows differently from the base, in their order.
    pub fn version<'a>(
        &self,
        unit: &RelPath,
        names: impl Iterator<Item = (&'a RelPath, Option<&'a Entry>, Option<&'a Entry>)>,
    ) -> ContentHash {
        let mut digest = blake3::Hasher::new();
        for (path, base, remote) in names {
            if self.unit_of(path).as_ref() != Some(unit)
                || git::role(unit, path) != Role::State
                || !self.changed(path, base, remote)
            {
                continue;
            }
            let below = path.rebase(unit, &RelPath::ROOT).unwrap_or_default();
            let content = match remote.map(|entry| &entry.content) {
                None => Vec::new(),
                Some(Content::Directory) => b"d".to_vec(),
                Some(Content::Symlink { target }) => [b"l", target.as_slice()].concat(),
                Some(Content::File { hash, .. }) => {
                    let hash = self.meanings.get(hash).unwrap_or(hash);
                    [b"f", hash.0.as_slice()].concat()
                }
            };
            for part in [below.as_bytes(), &content] {
                digest.update(&(part.len() as u64).to_le_bytes());
                digest.update(part);
            }
        }
        ContentHash(*digest.finalize().as_bytes())
    }
}

/// What one side has changed in a unit.
#[derive(Clone, Copy, Default)]
struct Changed {
    /// Something that is not an object.
    state: bool,
    /// An object is there that the base does not know.
    objects: bool,
}

impl Changed {
    fn anything(self) -> bool {
        self.state || self.objects
    }
}

/// Makes the decisions about the names in each Git directory fit together.
pub(super) fn unite(plan: &mut Plan) {
    let mut members: BTreeMap<RelPath, Vec<(RelPath, Role)>> = BTreeMap::new();
    for path in plan.decisions.keys() {
        if let Some(unit) = plan.git.unit_of(path) {
            let role = git::role(&unit, path);
            members.entry(unit).or_default().push((path.clone(), role));
        }
    }
    let mut restored: Vec<RelPath> = Vec::new();
    // A unit comes before those inside it.
    for (unit, names) in &members {
        if restored.iter().any(|outer| unit.starts_with(outer)) {
            continue;
        }
        match plan.gone(unit) {
            Some(Gone::Both) => {}
            Some(gone) => {
                if plan.restore(unit, gone) {
                    restored.push(unit.clone());
                }
            }
            None => plan.unite(unit, names),
        }
    }
}

/// Where a whole Git directory that the base knows is gone from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gone {
    Here,
    There,
    /// Or it became something else on either side, which the table for one name decides.
    Both,
}

impl Plan {
    /// Whether a path is a Git directory in conflict, as opposed to a name at which two
    /// contents are.
    pub fn is_unit_in_conflict(&self, path: &RelPath) -> bool {
        self.git.units.contains(path)
            && self.decisions.get(path).is_some_and(|(sides, decision)| {
                *decision == Decision::Conflict && both_directories(sides)
            })
    }

    /// What is not an object in a Git directory, as far as it is looked at.
    pub fn state_of<'a>(
        &'a self,
        unit: &'a RelPath,
    ) -> impl Iterator<Item = (&'a RelPath, &'a Sides)> {
        self.below(unit)
            .filter(|(path, _)| git::role(unit, path) == Role::State)
    }

    /// The peer's version of a Git directory: see [`Git::version`].
    pub fn version_of(&self, unit: &RelPath) -> ContentHash {
        let names = self
            .state_of(unit)
            .map(|(path, sides)| (path, sides.base.as_ref(), sides.remote.as_ref()));
        self.git.version(unit, names)
    }

    fn below<'a>(&'a self, unit: &'a RelPath) -> impl Iterator<Item = (&'a RelPath, &'a Sides)> {
        self.decisions
            .range(unit.clone()..)
            .take_while(|(path, _)| path.as_bytes().starts_with(unit.as_bytes()))
            .filter(|(path, _)| self.git.unit_of(path).as_ref() == Some(unit))
            .map(|(path, (sides, _))| (path, sides))
    }

    fn gone(&self, unit: &RelPath) -> Option<Gone> {
        let (sides, _) = self.decisions.get(unit)?;
        let directory = |entry: &Option<Entry>| {
            entry
                .as_ref()
                .is_some_and(|entry| entry.content == Content::Directory)
        };
        if directory(&sides.local) && directory(&sides.remote) {
            return None;
        }
        Some(match (&sides.base, &sides.local, &sides.remote) {
            (Some(_), None, Some(_)) if directory(&sides.remote) => Gone::Here,
            (Some(_), Some(_), None) if directory(&sides.local) => Gone::There,
            _ => Gone::Both,
        })
    }

    /// A unit that was deleted on one side and in which the other changed something stays,
    /// and not only what was changed: the rest is needed. Returns whether that is so.
    fn restore(&mut self, unit: &RelPath, gone: Gone) -> bool {
        let keeper = |sides: &Sides| match gone {
            Gone::Here => sides.remote.clone(),
            _ => sides.local.clone(),
        };
        let git = std::mem::take(&mut self.git);
        let edited = self.decisions.iter().any(|(path, (sides, _))| {
            path != unit
                && path.starts_with(unit)
                && git
                    .unit_of(path)
                    .is_some_and(|unit| git::role(&unit, path) != Role::Lock)
                && git.changed(path, sides.base.as_ref(), keeper(sides).as_ref())
        });
        self.git = git;
        if !edited {
            return false;
        }
        let kept = match gone {
            Gone::Here => Note::KeptRemoteEdit,
            _ => Note::KeptLocalEdit,
        };
        for (path, (sides, decision)) in self.decisions.range_mut(unit.clone()..) {
            if path.starts_with(unit) {
                *decision = Decision::Agree {
                    result: keeper(sides),
                    note: (path == unit).then_some(kept),
                };
            }
        }
        true
    }

    fn unite(&mut self, unit: &RelPath, names: &[(RelPath, Role)]) {
        let (mut here, mut there) = (Changed::default(), Changed::default());
        for (path, role) in names {
            let Some((sides, _)) = self.decisions.get(path) else {
                continue;
            };
            let agreed = !self
                .git
                .changed(path, sides.local.as_ref(), sides.remote.as_ref());
            if *role == Role::Lock || agreed {
                continue;
            }
            for (changed, side) in [(&mut here, &sides.local), (&mut there, &sides.remote)] {
                if self.git.changed(path, sides.base.as_ref(), side.as_ref()) {
                    changed.state |= *role == Role::State;
                    changed.objects |= *role == Role::Object && side.is_some();
                }
            }
        }
        let conflict = here.state && there.state;
        for (path, role) in names {
            let Some((sides, decision)) = self.decisions.get_mut(path) else {
                continue;
            };
            match role {
                Role::Object => decide_object(sides, decision, here, there, conflict),
                _ if conflict => *decision = Decision::Hold(Held::BelowConflict),
                _ => {}
            }
        }
        if conflict {
            let (_, decision) = self.decisions.entry(unit.clone()).or_default();
            *decision = Decision::Conflict;
        }
    }

    /// Ends the conflict about a Git directory in favour of one side: of everything but the
    /// objects, of which both sides then have all.
    pub(super) fn settle_unit(
        &mut self,
        unit: &RelPath,
        winner: impl Fn(&Sides) -> &Option<Entry>,
    ) {
        let names: Vec<(RelPath, Role)> = self
            .below(unit)
            .map(|(path, _)| (path.clone(), git::role(unit, path)))
            .chain([(unit.clone(), Role::State)])
            .collect();
        for (path, role) in names {
            if let Some((sides, decision)) = self.decisions.get_mut(&path) {
                let result = match role {
                    Role::Object => sides.local.clone().or_else(|| sides.remote.clone()),
                    _ => winner(sides).clone(),
                };
                *decision = Decision::Agree { result, note: None };
            }
        }
    }
}

pub(super) fn both_directories(sides: &Sides) -> bool {
    [&sides.local, &sides.remote].into_iter().all(|entry| {
        entry
            .as_ref()
            .is_some_and(|entry| entry.content == Content::Directory)
    })
}

/// Objects are only ever added while both sides work: what one side has removed as not
/// needed may be what the other has just come to need.
fn decide_object(
    sides: &Sides,
    decision: &mut Decision,
    here: Changed,
    there: Changed,
    conflict: bool,
) {
    match decision {
        // One name, two contents: compressed or packed differently, and each as good.
        Decision::Conflict => {
            *decision = Decision::Agree {
                result: sides.local.clone(),
                note: None,
            };
        }
        Decision::Agree { result: None, .. } if conflict => {
            // Nothing is brought back that a person may want to be rid of, before it is
            // known whose refs will stand.
            *decision = Decision::Hold(Held::BelowConflict);
        }
        Decision::Agree { result: None, .. } => {
            let needed = match (&sides.local, &sides.remote) {
                (Some(_), None) => here.anything(),
                (None, Some(_)) => there.anything(),
                _ => false,
            };
            if needed {
                *decision = Decision::Agree {
                    result: sides.local.clone().or_else(|| sides.remote.clone()),
                    note: None,
                };
            }
        }
        _ => {}
    }
}
