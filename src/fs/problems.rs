//! What the user should know about: a bounded list, one text per path.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::tree::RelPath;

/// More would only hide each other.
const LIMIT: usize = 1000;

#[derive(Debug, Default)]
pub(super) struct Problems {
    by_path: Mutex<BTreeMap<RelPath, String>>,
}

impl Problems {
    pub(super) fn add(&self, path: RelPath, text: String) {
        let mut by_path = self.by_path.lock();
        if by_path.len() < LIMIT || by_path.contains_key(&path) {
            if by_path.get(&path) != Some(&text) {
                tracing::warn!(%path, "{text}");
            }
            by_path.insert(path, text);
        }
    }

    pub(super) fn remove(&self, path: &RelPath) {
        self.by_path.lock().remove(path);
    }

    pub(super) fn list(&self) -> Vec<(RelPath, String)> {
        self.by_path
            .lock()
            .iter()
            .map(|(path, text)| (path.clone(), text.clone()))
            .collect()
    }
}
