//! Large contents that are told by what the other side has: which content that is, and
//! what comes of it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use mirrorfs_journal::Snapshot;

use crate::fs::CutFile;
use crate::replica;
use crate::replica::delta::{Blocks, LEAST, Likeness, Piece, block_size, fill, sums};
use crate::tree::{Content, ContentHash, Entry};
use crate::wire::message::ToAgent;

use super::driver::lock;
use super::round::Round;

/// A content that the peer has, and that one of this side is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Old {
    /// The content.
    pub hash: ContentHash,
    /// Its size, in bytes.
    pub size: u64,
    /// What was written to it since, if that is all that happened to it.
    pub written: Option<Vec<Range<u64>>>,
}

/// The content of a file that is large enough to be compared.
pub(super) fn large_file(entry: Option<&Entry>) -> Option<(ContentHash, u64)> {
    match entry?.content {
        Content::File { size, hash } if size >= LEAST => Some((hash, size)),
        _ => None,
    }
}

/// What the contents that a round sends may be told by: what the peer has in their place.
/// `unlike` are those that could not be told so.
pub(super) fn olds(
    snapshot: &Snapshot,
    round: &Round,
    unlike: &HashSet<ContentHash>,
) -> Result<HashMap<ContentHash, Old>, mirrorfs_journal::Error> {
    let mut olds = HashMap::new();
    for (path, (sides, _)) in &round.plan.decisions {
        let (Some((new, new_size)), Some((hash, size))) = (
            large_file(sides.local.as_ref()),
            large_file(sides.remote.as_ref()),
        ) else {
            continue;
        };
        if new == hash || unlike.contains(&new) {
            continue;
        }
        let base = round.moves.origin(path);
        let base = base.map(|path| snapshot.base_at(round.peer.id, &path));
        let base = base.transpose()?.flatten();
        let mut written = None;
        // The journal tells what became of the base since the cursor, and only of that.
        if let (Some(base), Some(local)) = (base, round.locals.get(path))
            && base.node == Some(local.node)
            && large_file(Some(&base.entry)) == Some((hash, size))
        {
            written = snapshot.written(local.node, round.peer.cursor)?;
        }
        // Much that was written may have been the same again.
        let much = |ranges: &Vec<Range<u64>>| {
            let ranges = Likeness::written(ranges.clone(), size, new_size);
            ranges.new_bytes().is_none_or(|new| new > new_size / 2)
        };
        let written = written.filter(|ranges| !ranges.is_empty() && !much(ranges));
        olds.insert(
            new,
            Old {
                hash,
                size,
                written,
            },
        );
    }
    Ok(olds)
}

/// What a driver knows of the contents that travel in its round.
#[derive(Default)]
pub(super) struct Deltas {
    /// Whether the agent knows of it.
    pub(super) on: bool,
    /// How those that are being sent are like what the peer has.
    known: Arc<Mutex<HashMap<ContentHash, Likeness>>>,
    /// The one whose counterpart's sums were asked for.
    asked: Option<ContentHash>,
    /// Those that have been told by another one in this round.
    told: HashSet<ContentHash>,
    /// Those that did not arrive in that way: they are sent whole.
    unlike: HashSet<ContentHash>,
}

/// What is to be sent next of a content.
pub(super) enum Stretch {
    /// A stretch of it, and where the next one starts.
    Next(ToAgent, Option<u64>),
    /// A question that has to be answered first.
    Ask(ToAgent),
}

impl Deltas {
    /// What a round is told.
    pub(super) fn orders(&self) -> Option<HashSet<ContentHash>> {
        self.on.then(|| self.unlike.clone())
    }

    /// For the thread that reads stretches.
    pub(super) fn known(&self) -> Arc<Mutex<HashMap<ContentHash, Likeness>>> {
        Arc::clone(&self.known)
    }

    /// Something is being sent, or asked.
    pub(super) fn sends(&mut self, message: &ToAgent) {
        match message {
            ToAgent::AskSums { hash, .. } => self.asked = Some(*hash),
            ToAgent::Reuse { hash, .. } => drop(self.told.insert(*hash)),
            _ => {}
        }
    }

    /// The agent's answer about a content. Whether that had been asked.
    pub(super) fn answered(&mut self, hash: ContentHash, old: Option<&Old>, sums: &[u8]) -> bool {
        if self.asked.take_if(|asked| *asked == hash).is_none() {
            return false;
        }
        let blocks = old.and_then(|old| Blocks::new(old.size, block_size(old.size), sums));
        let likeness = blocks.map_or(Likeness::None, Likeness::Blocks);
        lock(&self.known).insert(hash, likeness);
        true
    }

    /// A content that was told by another one did not come out as it should.
    pub(super) fn failed(&mut self, hash: ContentHash) {
        self.unlike.insert(hash);
    }

    /// The batch failed: whatever was told in it may be why.
    pub(super) fn batch_failed(&mut self) {
        self.unlike.extend(self.told.drain());
    }

    /// The round is over.
    pub(super) fn end(&mut self) {
        self.known = Arc::default();
        self.asked = None;
        self.told.clear();
    }
}

/// Reads the next stretch of a content as it was at the cut, of so many new bytes at most.
pub(super) fn next_stretch(
    round: &Mutex<Round>,
    known: &Mutex<HashMap<ContentHash, Likeness>>,
    hash: ContentHash,
    offset: u64,
    most: usize,
) -> Result<Stretch, String> {
    let (file, size, path, old) = {
        let round = lock(round);
        if round.cut.abandoned() {
            return Err("too much changed while it was being sent; a new cut is taken".to_owned());
        }
        let Some(source) = round.sources.get(&hash) else {
            return Err(format!("content {hash} is not part of the round"));
        };
        let file = round.cut.open(source.ino, &source.path);
        let file = file.map_err(|error| format!("{}: {error}", source.path))?;
        let old = round.olds.get(&hash).cloned();
        (file, source.size, source.path.clone(), old)
    };
    let text = |error: io::Error| format!("{path}: {error}");
    let read = |buffer: &mut [u8], at| file.read_at(buffer, at);
    let mut likeness = match (lock(known).remove(&hash), old) {
        (Some(likeness), _) => likeness,
        (None, None) => Likeness::None,
        (None, Some(old)) => match old.written {
            Some(written) => Likeness::written(written, old.size, size),
            None => match Likeness::appended(old.hash, old.size, size, &read).map_err(text)? {
                Some(appended) => appended,
                None => {
                    return Ok(Stretch::Ask(ToAgent::AskSums {
                        hash,
                        old: old.hash,
                        block: block_size(old.size),
                    }));
                }
            },
        },
    };
    let piece = likeness.next(offset, size, &read).map_err(text)?;
    lock(known).insert(hash, likeness);
    let old = lock(round).olds.get(&hash).map(|old| old.hash);
    let (message, len) = match (piece, old) {
        (Piece::Old { from, len }, Some(old)) => {
            let message = ToAgent::Reuse {
                hash,
                offset,
                len,
                old,
                from,
            };
            (message, len)
        }
        (Piece::Old { .. }, None) => return Err(replica::Error::NotLike { hash }.to_string()),
        (Piece::New(len), _) => {
            let len = len.min(most);
            let mut bytes = vec![0; len];
            fill(&read, &mut bytes, offset).map_err(text)?;
            let message = ToAgent::Data {
                hash,
                offset,
                bytes,
            };
            (message, len as u64)
        }
    };
    let end = offset + len;
    Ok(Stretch::Next(message, (end < size).then_some(end)))
}

/// The file that a fetched content is told by, as it was at the cut, and its size.
pub(super) fn counterpart(
    round: &Round,
    hash: ContentHash,
) -> Result<(CutFile, u64), replica::Error> {
    let Some(old) = round.fetched_like.get(&hash).copied() else {
        return Err(replica::Error::NotLike { hash });
    };
    let Some(source) = round.sources.get(&old) else {
        return Err(replica::Error::NothingToReuse { hash, old });
    };
    match round.cut.open(source.ino, &source.path) {
        Ok(file) => Ok((file, source.size)),
        Err(error) => Err(replica::Error::Io {
            action: "open",
            path: source.path.to_string(),
            source: error,
        }),
    }
}

/// The sums of that file; none if they cannot be had.
pub(super) fn counterpart_sums(
    round: &Mutex<Round>,
    request: u64,
    hash: ContentHash,
    block: u32,
) -> ToAgent {
    let file = counterpart(&lock(round), hash).ok();
    let sums = file.and_then(|(file, size)| {
        let sums = sums(size, block, &|buffer, at| file.read_at(buffer, at));
        sums.ok().flatten()
    });
    ToAgent::Sums {
        request,
        block,
        sums: sums.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_arrive_is_sent_whole_from_then_on() {
        let mut deltas = Deltas::default();
        assert_eq!(
            deltas.orders(),
            None,
            "the agent has not said that it knows"
        );
        deltas.on = true;
        let [sent, asked, fetched] =
            [b"sent".as_slice(), b"asked", b"fetched"].map(ContentHash::of);
        deltas.sends(&ToAgent::Reuse {
            hash: sent,
            offset: 0,
            len: 1,
            old: asked,
            from: 0,
        });
        deltas.end();
        deltas.batch_failed();
        assert_eq!(deltas.orders(), Some(HashSet::new()), "another batch");
        deltas.sends(&ToAgent::Reuse {
            hash: sent,
            offset: 0,
            len: 1,
            old: asked,
            from: 0,
        });
        deltas.batch_failed();
        deltas.failed(fetched);
        assert_eq!(deltas.orders(), Some(HashSet::from([sent, fetched])));
    }

    #[test]
    fn only_an_answer_that_was_asked_for_counts() {
        let mut deltas = Deltas::default();
        let (new, old) = (ContentHash::of(b"new"), ContentHash::of(b"old"));
        assert!(!deltas.answered(new, None, &[]));
        deltas.sends(&ToAgent::AskSums {
            hash: new,
            old,
            block: 4096,
        });
        assert!(!deltas.answered(old, None, &[]));
        assert!(deltas.answered(new, None, &[]));
        assert!(!deltas.answered(new, None, &[]), "once");
        assert!(matches!(
            lock(&deltas.known).get(&new),
            Some(Likeness::None)
        ));
    }
}
