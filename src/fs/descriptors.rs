//! A bounded cache of open descriptors. There is none per node: a tree has more
//! nodes than a process may have descriptors.
//!
//! Not in the cache, and so not bounded by it, are those of removed files that somebody
//! still has open, one each.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use super::{Filesystem, Result};
use crate::tree::Ino;

/// Lets this process have as many descriptors as it may.
pub fn raise_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// A part of the descriptors that this process may have, and no more than `most`.
pub(super) fn share(part: u64, most: usize) -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).maximum;
    limit
        .map_or(most, |limit| usize::try_from(limit / part).unwrap_or(most))
        .clamp(1, most.max(1))
}

/// What a descriptor can be used for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Use {
    /// `O_PATH`: `*at` calls, stat, and opening anew.
    Path,
    /// Reading a file or a directory.
    Read,
    /// Reading and writing a file.
    Write,
}

#[derive(Debug, Default)]
struct Held {
    by_key: HashMap<(Ino, Use), (Arc<OwnedFd>, u64)>,
    by_age: BTreeMap<u64, (Ino, Use)>,
    clock: u64,
}

/// Descriptors by inode number, the least recently used going first. A descriptor
/// keeps its inode, so its number cannot be taken over by another one meanwhile.
#[derive(Debug)]
pub(super) struct Descriptors {
    limit: usize,
    held: Mutex<Held>,
}

impl Descriptors {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            held: Mutex::new(Held::default()),
        }
    }

    pub(super) fn get(&self, ino: Ino, usage: Use) -> Option<Arc<OwnedFd>> {
        let mut held = self.held.lock();
        let held = &mut *held;
        held.clock += 1;
        let (descriptor, age) = held.by_key.get_mut(&(ino, usage))?;
        held.by_age.remove(age);
        *age = held.clock;
        held.by_age.insert(held.clock, (ino, usage));
        Some(descriptor.clone())
    }

    pub(super) fn put(&self, ino: Ino, usage: Use, descriptor: OwnedFd) -> Arc<OwnedFd> {
        let descriptor = Arc::new(descriptor);
        let mut dropped = Vec::new();
        let mut held = self.held.lock();
        held.clock += 1;
        let age = held.clock;
        if let Some((old, old_age)) = held.by_key.insert((ino, usage), (descriptor.clone(), age)) {
            held.by_age.remove(&old_age);
            dropped.push(old);
        }
        held.by_age.insert(age, (ino, usage));
        while held.by_key.len() > self.limit {
            let Some((_, key)) = held.by_age.pop_first() else {
                break;
            };
            dropped.extend(held.by_key.remove(&key).map(|(descriptor, _)| descriptor));
        }
        drop(held);
        // Closing may be slow (the last reference of a deleted file): not under the lock.
        drop(dropped);
        descriptor
    }

    /// Closes the less recently used half.
    fn halve(&self) {
        let mut dropped = Vec::new();
        let mut held = self.held.lock();
        for _ in 0..held.by_key.len().div_ceil(2) {
            let Some((_, key)) = held.by_age.pop_first() else {
                break;
            };
            dropped.extend(held.by_key.remove(&key).map(|(descriptor, _)| descriptor));
        }
        drop(held);
        drop(dropped);
    }

    pub(super) fn remove(&self, ino: Ino) {
        let mut dropped = Vec::new();
        let mut held = self.held.lock();
        for usage in [Use::Path, Use::Read, Use::Write] {
            if let Some((descriptor, age)) = held.by_key.remove(&(ino, usage)) {
                held.by_age.remove(&age);
                dropped.push(descriptor);
            }
        }
        drop(held);
        drop(dropped);
    }
}

impl Filesystem {
    /// Opens something; if there are no descriptors left, once more after the cache has
    /// given up half of its own.
    pub(super) fn with_room<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.descriptors.halve();
                open()
            }
            opened => opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let open = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let cache = Descriptors::new(2);
        cache.put(Ino(1), Use::Path, open());
        cache.put(Ino(2), Use::Path, open());
        assert!(cache.get(Ino(1), Use::Path).is_some());
        cache.put(Ino(3), Use::Path, open());
        assert!(cache.get(Ino(2), Use::Path).is_none());
        assert!(cache.get(Ino(1), Use::Path).is_some());
        cache.remove(Ino(1));
        assert!(cache.get(Ino(1), Use::Path).is_none());
        assert!(cache.get(Ino(3), Use::Path).is_some());
    }
}
