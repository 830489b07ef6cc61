use std::collections::BTreeMap;

use super::*;
use crate::{Content, ContentHash, Xattrs};

fn agreement(number: u64, nonce: u8) -> Agreement {
    Agreement {
        number,
        nonce: Id([nonce; 16]),
        previous: None,
    }
}

fn links(list: &[(u8, bool)]) -> Vec<ChainLink> {
    list.iter()
        .map(|(nonce, based)| ChainLink {
            agreement: agreement(u64::from(*nonce), *nonce),
            based: *based,
        })
        .collect()
}

fn common(ours: &[(u8, bool)], theirs: &[(u8, bool)]) -> Option<(u8, bool, bool)> {
    last_common(&links(ours), &links(theirs))
        .map(|common| (common.agreement.nonce.0[0], common.ours, common.theirs))
}

#[test]
fn the_last_common_agreement_is_the_newest_that_both_went_through() {
    let all = [(4, true), (3, true), (2, true), (1, true)];
    // One side is older, or both went on from a common one.
    assert_eq!(common(&all, &all[2..]), Some((2, true, true)));
    assert_eq!(common(&all[1..], &all), Some((3, true, true)));
    assert_eq!(common(&[(9, true), (2, true)], &all), Some((2, true, true)));
    // The base comes from whichever side has it; one that nobody has is of no use.
    assert_eq!(common(&[(4, false)], &all), Some((4, false, true)));
    assert_eq!(common(&all, &[(4, false)]), Some((4, true, false)));
    assert_eq!(
        common(
            &[(4, false), (2, true)],
            &[(4, false), (3, true), (2, true)]
        ),
        Some((2, true, true))
    );
    assert_eq!(common(&all, &[(7, true)]), None);
    assert_eq!(common(&all, &[]), None);
    assert_eq!(common(&[(4, false)], &[(4, false)]), None);
}

fn database() -> Connection {
    let db = Connection::open_in_memory().unwrap();
    db.execute_batch("CREATE TABLE meta (key TEXT)").unwrap();
    db.execute_batch(crate::index::CHAINS).unwrap();
    db
}

fn entry(content: u64) -> Entry {
    Entry {
        content: Content::File {
            size: content,
            hash: ContentHash([u8::try_from(content % 251).unwrap(); 32]),
        },
        mode: 0o644,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn shown(chain: &Chain<'_>) -> BTreeMap<RelPath, Entry> {
    chain.page(None, u32::MAX).unwrap().into_iter().collect()
}

/// A small generator: the same numbers each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// Changes at random, moves of whole directories among them, some of them made ahead of
/// the agreement: going back to any agreement gives the base that held at it, and the other
/// side, which is told of both, holds the same.
#[test]
fn the_base_of_any_agreement_is_had_by_going_back() {
    for seed in 0..60 {
        let db = database();
        let chain = Chain::new(&db, 7);
        let other = Chain::new(&db, 8);
        other.fill(&[(path("a"), entry(1))]).unwrap();
        let told = Chain::new(&db, 9);
        let mut numbers = Numbers(seed);
        let mut history = Vec::new();
        let names = ["a", "b", "c", "a/x", "a/y", "b/x", "b/y", "c/x", "a/x/1"];
        for number in 1..=8 {
            let mut changes = Vec::new();
            for _ in 0..numbers.below(5) {
                let at = path(names[usize::try_from(numbers.below(9)).unwrap()]);
                let to = path(names[usize::try_from(numbers.below(3)).unwrap()]);
                changes.push(match numbers.below(5) {
                    0 => BaseChange::Remove { path: at },
                    1 if !to.starts_with(&at) && !at.starts_with(&to) => {
                        BaseChange::Move { from: at, to }
                    }
                    _ => BaseChange::Put {
                        path: at,
                        node: None,
                        entry: entry(numbers.below(1000)),
                    },
                });
            }
            let made = agreement(number, u8::try_from(number).unwrap());
            let ahead = usize::try_from(numbers.below(3))
                .unwrap()
                .min(changes.len());
            chain.advance(&changes[..ahead]).unwrap();
            told.change(&chain.advanced().unwrap(), Some(&made))
                .unwrap();
            for chain in [&chain, &told] {
                chain.change(&changes[ahead..], Some(&made)).unwrap();
                chain.agree(&made, Timestamp::now()).unwrap();
            }
            assert_eq!(chain.advanced().unwrap(), []);
            assert_eq!(shown(&told), shown(&chain));
            history.push((made, shown(&chain)));
        }
        while !history.is_empty() {
            let keep = usize::try_from(numbers.below(history.len() as u64)).unwrap();
            let (to, expected) = history[keep].clone();
            let put = BaseChange::Put {
                path: path("a"),
                node: None,
                entry: entry(5000),
            };
            chain.advance(&[put]).unwrap();
            assert!(chain.rewind(&to).unwrap());
            assert_eq!(shown(&chain), expected, "seed {seed}, to {}", to.number);
            let left: Vec<_> = chain.links().unwrap().iter().map(|l| l.agreement).collect();
            assert_eq!(left.len(), keep + 1);
            assert_eq!(left[0], to);
            history.truncate(keep);
        }
        assert_eq!(shown(&other).len(), 1, "another chain is another's");
    }
}

#[test]
fn a_tree_says_where_it_stands() {
    let db = database();
    let chain = Chain::new(&db, 1);
    let now = Timestamp::now();
    assert_eq!(chain.take_mark(None, now).unwrap(), Marked::Last);
    let made: Vec<_> = (1..=3)
        .map(|n| agreement(n, u8::try_from(n).unwrap()))
        .collect();
    for (made, name) in made.iter().zip(["a", "b", "c"]) {
        let put = BaseChange::Put {
            path: path(name),
            node: None,
            entry: entry(made.number),
        };
        chain.change(&[put], Some(made)).unwrap();
        chain.agree(made, now).unwrap();
    }
    assert_eq!(chain.take_mark(Some(&made[2]), now).unwrap(), Marked::Last);
    assert_eq!(
        chain.take_mark(Some(&made[1]), now).unwrap(),
        Marked::Earlier
    );
    assert_eq!(shown(&chain).len(), 2);
    // The chain is older than the tree: what it has of earlier agreements stays of use.
    let newer = agreement(9, 9);
    assert_eq!(chain.take_mark(Some(&newer), now).unwrap(), Marked::Unknown);
    assert!(chain.lacks_base().unwrap());
    assert_eq!(shown(&chain).len(), 2);
    let known: Vec<_> = chain.links().unwrap();
    assert_eq!(known.len(), 3);
    assert_eq!((known[0].agreement, known[0].based), (newer, false));
    // The base comes from elsewhere.
    chain.clear().unwrap();
    chain.fill(&[(path("x"), entry(5))]).unwrap();
    chain.restart(&newer, now).unwrap();
    assert!(!chain.lacks_base().unwrap());
    // A mark that is not newer, and unknown, is of another history.
    assert_eq!(
        chain.take_mark(Some(&agreement(4, 44)), now).unwrap(),
        Marked::Unknown
    );
    assert!(shown(&chain).is_empty());
    assert_eq!(chain.take_mark(None, now).unwrap(), Marked::Missing);
    assert!(chain.links().unwrap().is_empty());
}

#[test]
fn the_past_is_bounded_and_what_is_left_can_be_reached() {
    let db = database();
    let chain = Chain::new(&db, 1);
    let time = |secs| Timestamp { secs, nanos: 0 };
    let mut states = Vec::new();
    for number in 1..=20 {
        let made = agreement(number, u8::try_from(number).unwrap());
        let changes: Vec<_> = ["a", "b"]
            .map(|at| BaseChange::Put {
                path: path(at),
                node: None,
                entry: entry(number),
            })
            .into();
        chain.change(&changes, Some(&made)).unwrap();
        chain
            .agree(&made, time(i64::try_from(number).unwrap()))
            .unwrap();
        states.push((made, shown(&chain)));
    }
    let oldest = |chain: &Chain<'_>| chain.links().unwrap().last().unwrap().agreement.number;
    chain.prune(time(5), 1000, 1000).unwrap();
    assert_eq!(oldest(&chain), 4, "older than the time");
    chain.prune(time(0), 20, 1000).unwrap();
    assert_eq!(oldest(&chain), 10, "so many changes are kept");
    chain.prune(time(0), 1000, 5).unwrap();
    assert_eq!(oldest(&chain), 15, "so many agreements are kept");
    let (to, expected) = &states[14];
    assert!(chain.rewind(to).unwrap());
    assert_eq!(shown(&chain), *expected);
    assert!(!chain.rewind(&states[12].0).unwrap());
    chain.prune(time(1000), 0, 0).unwrap();
    assert_eq!(oldest(&chain), 15, "the last one stays");
}
