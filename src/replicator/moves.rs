//! Moves found by a node's identity, and the one namespace they make.
//!
//! Base and remote know a moved node under its old path, local under the new one. All
//! decisions are made under the new paths (*final* coordinates); this is the
//! translation between them.

use crate::tree::RelPath;

/// One node that changed its place, with everything below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// Where base and remote have it.
    pub from: RelPath,
    /// Where local has it.
    pub to: RelPath,
}

/// The moves of one round. A move below another one is its own entry; what merely went
/// along with its directory is none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Moves {
    moves: Vec<Move>,
}

impl Moves {
    /// Adds a move unless its ancestors' moves explain it already. Ancestors come first.
    pub fn add(&mut self, from: RelPath, to: RelPath) {
        if self.relocate(&from) != to {
            self.moves.push(Move { from, to });
        }
    }

    /// All moves.
    pub fn iter(&self) -> impl Iterator<Item = &Move> {
        self.moves.iter()
    }

    /// Whether nothing moved.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// The final path of what base has at `path`.
    pub fn relocate(&self, path: &RelPath) -> RelPath {
        self.moves
            .iter()
            .filter(|step| path.starts_with(&step.from))
            .max_by_key(|step| step.from.depth())
            .and_then(|step| path.rebase(&step.from, &step.to))
            .unwrap_or_else(|| path.clone())
    }

    /// Where base has what is finally at `path`; none if that place is new or vacated.
    pub fn origin(&self, path: &RelPath) -> Option<RelPath> {
        let origin = self
            .moves
            .iter()
            .filter(|step| path.starts_with(&step.to))
            .max_by_key(|step| step.to.depth())
            .and_then(|step| path.rebase(&step.to, &step.from))
            .unwrap_or_else(|| path.clone());
        (self.relocate(&origin) == *path).then_some(origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text).unwrap()
    }

    #[test]
    fn what_went_along_is_no_move() {
        let mut moves = Moves::default();
        moves.add(path("d"), path("e"));
        moves.add(path("d/x"), path("e/x"));
        assert_eq!(moves.iter().count(), 1);
        assert_eq!(moves.relocate(&path("d/x/y")), path("e/x/y"));
        assert_eq!(moves.origin(&path("e/x")), Some(path("d/x")));
        assert_eq!(moves.origin(&path("d/x")), None, "vacated");
        assert_eq!(moves.relocate(&path("dd")), path("dd"));
    }

    #[test]
    fn nested_moves_and_swaps() {
        let mut moves = Moves::default();
        moves.add(path("d"), path("e"));
        moves.add(path("d/s"), path("f"));
        assert_eq!(moves.relocate(&path("d/s/x")), path("f/x"));
        assert_eq!(moves.origin(&path("f/x")), Some(path("d/s/x")));
        assert_eq!(moves.origin(&path("e/s")), None);

        let mut swap = Moves::default();
        swap.add(path("a"), path("b"));
        swap.add(path("b"), path("a"));
        assert_eq!(swap.origin(&path("a")), Some(path("b")));
        assert_eq!(swap.origin(&path("b")), Some(path("a")));
    }

    #[test]
    fn into_a_moved_directory() {
        let mut moves = Moves::default();
        moves.add(path("d"), path("e"));
        moves.add(path("x"), path("e/x"));
        assert_eq!(moves.origin(&path("e/x")), Some(path("x")));
        assert_eq!(moves.origin(&path("e/y")), Some(path("d/y")));
    }
}
