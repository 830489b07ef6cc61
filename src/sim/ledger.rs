//! Every value that somebody wrote, and what has become of it.

use std::collections::{BTreeMap, HashSet};

use crate::tree::ContentHash;

/// A value: the content of a file, or where a link points to. No two are the same, so
/// that each can be looked for.
struct Value {
    /// Who wrote it, when and where.
    story: String,
    /// Somebody who saw it replaced or removed it, or a copy that was brought back took it
    /// away. After that it may be gone.
    replaced: bool,
}

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Ledger {
    values: BTreeMap<ContentHash, Value>,
    next: u64,
}

/// The value of a link.
pub(crate) fn link_value(target: &[u8]) -> ContentHash {
    ContentHash::of(&[b"link to ", target].concat())
}

impl Ledger {
    /// A number that no other value has.
    pub(crate) fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Somebody wrote a value.
    pub(crate) fn written(&mut self, value: ContentHash, story: String) {
        self.values.entry(value).or_insert(Value {
            story,
            replaced: false,
        });
    }

    /// Somebody who saw a value replaced or removed it.
    pub(crate) fn replaced(&mut self, value: ContentHash) {
        if let Some(value) = self.values.get_mut(&value) {
            value.replaced = true;
        }
    }

    /// A copy was brought back: what is not among these values went with what it replaced.
    pub(crate) fn taken_away(&mut self, left: &HashSet<ContentHash>) {
        for (hash, value) in &mut self.values {
            value.replaced |= !left.contains(hash);
        }
    }

    /// The values that must be somewhere and are not.
    pub(crate) fn lost(&self, found: &HashSet<ContentHash>) -> Vec<String> {
        self.values
            .iter()
            .filter(|(hash, value)| !value.replaced && !found.contains(*hash))
            .map(|(hash, value)| format!("{} ({})", value.story, short(*hash)))
            .collect()
    }

    /// How many values were written, and how many of them must exist.
    pub(crate) fn count(&self) -> (usize, usize) {
        let must = |value: &&Value| !value.replaced;
        (self.values.len(), self.values.values().filter(must).count())
    }
}

/// The first digits of a hash.
pub(crate) fn short(hash: ContentHash) -> String {
    hash.to_string().chars().take(8).collect()
}
