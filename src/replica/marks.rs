//! What a tree itself says it has agreed on last, and with whom: the file `agreements` in
//! its `.mirrorfs`. It goes where the tree goes, into a snapshot or a backup, so that a
//! tree that was brought back from one is told from the tree that its state is about.
//!
//! It is written after the filesystem was synced. So it may lag behind what the tree holds,
//! and never leads. ([`Latest`](super::Latest) says more, while the machine runs.)

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Context, Error, Reserved};
use crate::tree::{Agreement, Id, ReplicaId};

/// The file.
const FILE: &str = "agreements";

/// The last agreement of a tree with each of the replicas that it has agreed with.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Marks(BTreeMap<ReplicaId, Agreement>);

/// How the marks are written down, for people to read.
#[derive(Serialize, Deserialize)]
pub(super) struct Line {
    with: String,
    number: u64,
    nonce: String,
    previous: Option<String>,
}

impl Marks {
    /// What the tree says. A file that cannot be read says nothing.
    pub fn of(reserved: &Reserved) -> Result<Self, Error> {
        let Some(text) = reserved.read_file(FILE)? else {
            return Ok(Self::default());
        };
        Ok(Self::read(
            serde_json::from_slice(&text).unwrap_or_default(),
        ))
    }

    pub(super) fn read(lines: Vec<Line>) -> Self {
        let read = |line: Line| {
            Some((
                Id::parse(&line.with)?,
                Agreement {
                    number: line.number,
                    nonce: Id::parse(&line.nonce)?,
                    previous: line.previous.as_deref().and_then(Id::parse),
                },
            ))
        };
        Self(lines.into_iter().filter_map(read).collect())
    }

    pub(super) fn lines(&self) -> Vec<Line> {
        let line = |(with, agreement): (&ReplicaId, &Agreement)| Line {
            with: with.to_string(),
            number: agreement.number,
            nonce: agreement.nonce.to_string(),
            previous: agreement.previous.map(|id| id.to_string()),
        };
        self.0.iter().map(line).collect()
    }

    pub(super) fn set(&mut self, replica: ReplicaId, agreement: Option<Agreement>) {
        match agreement {
            Some(agreement) => self.0.insert(replica, agreement),
            None => self.0.remove(&replica),
        };
    }

    /// The last agreement with a replica.
    pub fn with(&self, replica: ReplicaId) -> Option<Agreement> {
        self.0.get(&replica).copied()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (ReplicaId, Agreement)> {
        self.0
            .iter()
            .map(|(replica, agreement)| (*replica, *agreement))
    }

    /// Marks the tree with the last agreements with some replicas; with none, the mark
    /// goes. Those with others stay. Durable when it returns. To be called once everything
    /// that the agreements say is durable itself.
    pub fn write(
        reserved: &Reserved,
        last: impl IntoIterator<Item = (ReplicaId, Option<Agreement>)>,
    ) -> Result<(), Error> {
        let before = Self::of(reserved)?;
        let mut marks = before.clone();
        for (replica, agreement) in last {
            marks.set(replica, agreement);
        }
        if marks == before {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&marks.lines())
            .map_err(std::io::Error::from)
            .context("write", ".mirrorfs/agreements")?;
        reserved.replace_file(FILE, &text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_tree_is_marked_for_each_replica() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id([3; 16])).unwrap();
        let agreement = |number, previous| Agreement {
            number,
            nonce: Id([7; 16]),
            previous,
        };
        let (one, two) = (Id([1; 16]), Id([2; 16]));
        assert_eq!(Marks::of(&reserved).unwrap(), Marks::default());
        Marks::write(&reserved, [(one, Some(agreement(1, None)))]).unwrap();
        let second = agreement(5, Some(Id([6; 16])));
        Marks::write(&reserved, [(two, Some(second))]).unwrap();
        let marks = Marks::of(&reserved).unwrap();
        assert_eq!(marks.with(one), Some(agreement(1, None)));
        assert_eq!(marks.with(two), Some(second));
        Marks::write(&reserved, [(one, None)]).unwrap();
        let left: Vec<_> = Marks::of(&reserved).unwrap().iter().collect();
        assert_eq!(left, [(two, second)]);
        reserved.replace_file(FILE, b"no list").unwrap();
        assert_eq!(Marks::of(&reserved).unwrap(), Marks::default());
    }
}
