//! The trash of a mounted tree, which nobody but the daemon can reach.

use std::sync::Arc;
use std::time::Duration;

use super::{Service, blocking};
use crate::daemon::control::{Response, TRASH_PAGE};
use crate::daemon::failure::{Failure, OrFail};
use crate::daemon::trash;
use crate::tree::RelPath;

impl Service {
    pub(super) async fn trash(&self, skip: usize) -> Result<Response, Failure> {
        let reserved = Arc::clone(&self.site.reserved);
        blocking(move || {
            let kept = trash::of(&reserved)?
                .list()
                .or_fail(|| "cannot list the trash".into())?;
            let kept = kept.into_iter().skip(skip).take(TRASH_PAGE).collect();
            Ok(Response::Trash { kept })
        })
        .await
    }

    pub(super) async fn restore(
        &self,
        paths: Vec<RelPath>,
        to: Option<RelPath>,
    ) -> Result<Response, Failure> {
        let tree = self.tree.clone();
        blocking(move || {
            let restored = trash::restore_mounted(&tree, &paths, to.as_ref())?;
            Ok(Response::Restored { restored })
        })
        .await
    }

    /// Brings back what a wipe on a peer had taken before a brake was engaged.
    pub(super) async fn bring_back(&self, paths: Vec<RelPath>) -> Result<(), Failure> {
        let tree = self.tree.clone();
        blocking(move || trash::bring_back(&tree, &paths)).await
    }

    pub(super) async fn empty(&self, older_than_ms: u64) -> Result<Response, Failure> {
        let reserved = Arc::clone(&self.site.reserved);
        let before = trash::ago(Duration::from_millis(older_than_ms));
        blocking(move || {
            let removed = trash::of(&reserved)?
                .empty(before)
                .or_fail(|| "cannot empty the trash".into())?;
            Ok(Response::Emptied(removed))
        })
        .await
    }
}
