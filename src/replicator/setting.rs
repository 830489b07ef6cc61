//! What is kept in the journal for each peer beside what has tables of its own.

use std::marker::PhantomData;

use mirrorfs_journal::{Error, Update, View};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::tree::PeerId;

/// A value that is kept for each peer. Nothing is written where it is what it is by default.
pub(super) struct PerPeer<T> {
    name: &'static str,
    kind: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned + Default + PartialEq> PerPeer<T> {
    /// The value of a name. What lies under it has the form of `T`, which may only be
    /// appended to.
    pub(super) const fn new(name: &'static str) -> Self {
        Self {
            name,
            kind: PhantomData,
        }
    }

    fn key(&self, peer: PeerId) -> String {
        format!("{}.{}", self.name, peer.0)
    }

    /// The value as it is on record. What another program wrote and this one cannot read
    /// counts as never written.
    pub(super) fn load(&self, view: &View, peer: PeerId) -> Result<T, Error> {
        let stored = view.setting(&self.key(peer))?;
        Ok(stored
            .and_then(|bytes| postcard::from_bytes(&bytes).ok())
            .unwrap_or_default())
    }

    /// Puts the value on record.
    pub(super) fn store(&self, update: &Update<'_>, peer: PeerId, value: &T) -> Result<(), Error> {
        if *value == T::default() {
            return self.forget(update, peer);
        }
        let bytes = postcard::to_stdvec(value).map_err(Error::other)?;
        let key = self.key(peer);
        if update.setting(&key)?.as_ref() == Some(&bytes) {
            return Ok(());
        }
        update.set_setting(&key, &bytes)
    }

    /// Forgets the value, with its peer or because it is over.
    pub(super) fn forget(&self, update: &Update<'_>, peer: PeerId) -> Result<(), Error> {
        update.remove_setting(&self.key(peer))
    }
}

#[cfg(test)]
mod tests {
    use mirrorfs_journal::{Durability, Journal};

    use super::*;

    const NUMBERS: PerPeer<Vec<u32>> = PerPeer::new("numbers");

    #[test]
    fn each_peer_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let (one, two) = (PeerId(1), PeerId(2));
        let set = |peer, value: Vec<u32>| {
            let store = move |update: &Update<'_>| NUMBERS.store(update, peer, &value);
            journal.update(Durability::Normal, store).unwrap();
        };
        let get = |peer| {
            let snapshot = journal.snapshot().unwrap();
            NUMBERS.load(&snapshot, peer).unwrap()
        };
        set(one, vec![1, 2]);
        set(two, vec![3]);
        assert_eq!((get(one), get(two)), (vec![1, 2], vec![3]));
        set(one, Vec::new());
        assert_eq!((get(one), get(two)), (vec![], vec![3]));
        let raw = |key: &str| journal.snapshot().unwrap().setting(key).unwrap();
        assert_eq!(raw("numbers.1"), None, "nothing is kept of nothing");
        let damage = |update: &Update<'_>| update.set_setting("numbers.2", b"\xff");
        journal.update(Durability::Normal, damage).unwrap();
        assert!(get(two).is_empty());
        let forget = move |update: &Update<'_>| NUMBERS.forget(update, two);
        journal.update(Durability::Normal, forget).unwrap();
        assert_eq!(raw("numbers.2"), None);
    }
}
