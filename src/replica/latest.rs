//! How far a tree has come in this life of the machine: the file `latest` in its `.mirrorfs`.
//!
//! The mark ([`Marks`]) is written after a sync, because it must never say more than a power
//! loss leaves, and so lags for some seconds. What happens while the machine runs is not
//! subject to that. Before the records of a tree (the journal, or an agent's index) take up
//! that the tree has changed or is about to, the tree is given a new moment; the records keep
//! it with what they take up. A tree whose moment is not that of its records was brought back
//! from a copy, or they were. The file is not synced, and says nothing in another life of the
//! machine than the one that it names.

use serde::{Deserialize, Serialize};

use super::marks::Line;
use super::{Context, Error, Marks, Reserved};
use crate::tree::{Agreement, Id, ReplicaId};
use mirrorfs_journal::ChainLink;

/// The file.
const FILE: &str = "latest";

/// A moment of a tree, as its records keep it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Moment {
    /// The life of the machine.
    boot: String,
    id: Id,
}

impl Moment {
    /// As the records keep it.
    pub fn encode(&self) -> Vec<u8> {
        [&self.id.0, self.boot.as_bytes()].concat()
    }

    /// The same backwards. What this program does not write is as good as none.
    pub fn decode(kept: Option<Vec<u8>>) -> Option<Self> {
        let kept = kept?;
        let (id, boot) = kept.split_first_chunk()?;
        Some(Self {
            boot: String::from_utf8(boot.to_vec()).ok()?,
            id: Id(*id),
        })
    }
}

/// What a tree says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Latest {
    moment: Moment,
    /// The moment before, which its records still have if they were cut off.
    before: Option<Id>,
    /// What has been agreed on, or proposed.
    agreements: Marks,
}

/// How it is written down.
#[derive(Serialize, Deserialize)]
struct LatestFile {
    boot: String,
    moment: String,
    before: Option<String>,
    agreements: Vec<Line>,
}

/// Whether a tree and its records are of the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Time {
    /// They are.
    Same,
    /// One of them was brought back from a copy, or lost.
    Other,
    /// Neither says anything of this life of the machine.
    Untold,
}

impl Latest {
    /// What the tree says; none if it says nothing of this life of the machine.
    pub fn of(reserved: &Reserved) -> Result<Option<Self>, Error> {
        let Some(text) = reserved.read_file(FILE)? else {
            return Ok(None);
        };
        // A shorter text that took the place of a longer one may have some of that after it.
        let mut texts = serde_json::Deserializer::from_slice(&text).into_iter::<LatestFile>();
        let Some(Ok(file)) = texts.next() else {
            return Ok(None);
        };
        let told = |file: LatestFile| {
            Some(Self {
                moment: Moment {
                    id: Id::parse(&file.moment)?,
                    boot: file.boot,
                },
                before: file.before.as_deref().and_then(Id::parse),
                agreements: Marks::read(file.agreements),
            })
        };
        Ok(told(file).filter(|told| Some(told.moment.boot.as_str()) == reserved.boot()))
    }

    /// Gives the tree a new moment, in which it has gone through an agreement with a
    /// replica, or is about to. `recorded` is the one that its records have, and what this
    /// returns the one that they are to take up: none if nothing could be written, which
    /// costs no more than what is told by it.
    pub fn advance(
        reserved: &Reserved,
        recorded: Option<&Moment>,
        agreed: Option<(ReplicaId, Agreement)>,
    ) -> Option<Moment> {
        Self::write(reserved, recorded, agreed)
            .inspect_err(|error| tracing::warn!(%error, "the tree does not say how far it is"))
            .ok()
            .flatten()
    }

    fn write(
        reserved: &Reserved,
        recorded: Option<&Moment>,
        agreed: Option<(ReplicaId, Agreement)>,
    ) -> Result<Option<Moment>, Error> {
        let what = || format!(".mirrorfs/{FILE}");
        let Some(boot) = reserved.boot() else {
            return Ok(None);
        };
        let told = Self::of(reserved)?;
        let id = Id::random().map_err(|_| Error::Random)?;
        let mut agreements = told.map(|told| told.agreements).unwrap_or_default();
        if let Some((replica, agreement)) = agreed {
            agreements.set(replica, Some(agreement));
        }
        let before = recorded.filter(|recorded| recorded.boot == boot);
        let file = LatestFile {
            boot: boot.to_owned(),
            moment: id.to_string(),
            before: before.map(|before| before.id.to_string()),
            agreements: agreements.lines(),
        };
        let text = serde_json::to_vec(&file).map_err(std::io::Error::from);
        reserved.overwrite_file(FILE, &text.context("write", what())?)?;
        let boot = boot.to_owned();
        Ok(Some(Moment { boot, id }))
    }

    /// The moment.
    pub fn moment(&self) -> &Moment {
        &self.moment
    }

    /// Whether a tree is of the same time as records that have `recorded` as its moment.
    /// `told` is what the tree says.
    pub fn time(reserved: &Reserved, told: Option<&Self>, recorded: Option<&Moment>) -> Time {
        let recorded = recorded.filter(|recorded| Some(recorded.boot.as_str()) == reserved.boot());
        match (told, recorded) {
            (None, None) => Time::Untold,
            (Some(told), Some(recorded))
                if told.moment == *recorded || told.before == Some(recorded.id) =>
            {
                Time::Same
            }
            _ => Time::Other,
        }
    }

    /// Where a tree stands that is of another time than the chain that its records have: the
    /// last agreement with a replica that it has gone through, by what it says and by its mark.
    pub fn stands_at(
        told: Option<&Self>,
        replica: ReplicaId,
        chain: &[ChainLink],
        mark: Option<Agreement>,
    ) -> Option<Agreement> {
        let Some(latest) = told.and_then(|told| told.agreements.with(replica)) else {
            return mark;
        };
        let named = |nonce| {
            chain
                .iter()
                .find(|link| Some(link.agreement.nonce) == nonce)
        };
        let newest = chain.first().map(|link| link.agreement.number);
        if named(Some(latest.nonce)).is_some() || newest.is_none_or(|newest| newest < latest.number)
        {
            return Some(latest);
        }
        // A proposal that came to nothing led on from the agreement before it.
        named(latest.previous).map_or(mark, |link| Some(link.agreement))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;

    fn agreement(number: u64, nonce: u8, previous: Option<u8>) -> Agreement {
        Agreement {
            number,
            nonce: Id([nonce; 16]),
            previous: previous.map(|id| Id([id; 16])),
        }
    }

    #[test]
    fn a_tree_and_its_records_are_of_one_time_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id([3; 16])).unwrap();
        let time = |recorded: Option<&Moment>| {
            let told = Latest::of(&reserved).unwrap();
            Latest::time(&reserved, told.as_ref(), recorded)
        };
        assert_eq!(time(None), Time::Untold);
        let one = (Id([1; 16]), agreement(1, 1, None));
        let first = Latest::advance(&reserved, None, Some(one)).unwrap();
        assert_eq!(time(Some(&first)), Time::Same);
        assert_eq!(time(None), Time::Other, "the records were lost");
        let file = dir.path().join(".mirrorfs/latest");
        let copy = fs::read(&file).unwrap();
        Latest::advance(&reserved, Some(&first), None).unwrap();
        assert_eq!(time(Some(&first)), Time::Same, "the records were cut off");
        let second = Latest::advance(&reserved, Some(&first), None).unwrap();
        assert_eq!(time(Some(&first)), Time::Same, "they were cut off again");
        assert_eq!(time(Some(&second)), Time::Same);
        let third = Latest::advance(&reserved, Some(&second), None).unwrap();
        assert_eq!(
            time(Some(&first)),
            Time::Other,
            "the records were brought back"
        );
        assert_eq!(time(Some(&third)), Time::Same);
        fs::write(&file, copy).unwrap();
        assert_eq!(time(Some(&third)), Time::Other, "the tree was brought back");

        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.clone() + "rest}").unwrap();
        assert_eq!(time(Some(&first)), Time::Same);
        let other = text.replace(&first.boot, "another life of the machine");
        fs::write(&file, other).unwrap();
        assert_eq!(time(None), Time::Untold);
        assert_eq!(time(Some(&first)), Time::Other);
        fs::write(&file, "no such thing").unwrap();
        assert_eq!(time(None), Time::Untold);
    }

    #[test]
    fn where_a_tree_stands() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        let (reserved, _) = Reserved::create(root.as_fd(), Id([3; 16])).unwrap();
        let with = Id([1; 16]);
        let (one, two) = (agreement(1, 1, None), agreement(2, 2, Some(1)));
        let chain: Vec<ChainLink> = [two, one]
            .map(|agreement| ChainLink {
                agreement,
                based: true,
            })
            .into();
        let at = |chain: &[ChainLink]| {
            let told = Latest::of(&reserved).unwrap();
            Latest::stands_at(told.as_ref(), with, chain, Some(one))
        };
        assert_eq!(at(&chain), Some(one), "only the mark says anything");
        Latest::advance(&reserved, None, Some((with, two))).unwrap();
        assert_eq!(at(&chain), Some(two));
        assert_eq!(at(&chain[1..]), Some(two), "the chain is behind it");
        assert_eq!(at(&[]), Some(two));
        // One that the chain never got, beside one that it has.
        Latest::advance(&reserved, None, Some((with, agreement(2, 9, Some(1))))).unwrap();
        assert_eq!(at(&chain), Some(one));
        Latest::advance(&reserved, None, Some((with, agreement(2, 9, Some(8))))).unwrap();
        assert_eq!(at(&chain), Some(one), "nothing in common but the mark");
    }
}
