//! Life after the mounted side: a directory that was a peer's is mounted, and what its
//! agent has agreed on with the machine that had it as its peer goes on in the new journal.

use std::path::Path;

use mirrorfs_journal::{Durability, Former, Journal};

use super::failure::{Failure, OrFail};
use super::state::StateDir;
use crate::agent;
use crate::tree::ReplicaId;

/// Finishes what the agent of a tree had begun to apply when it was cut off, so that the
/// tree is taken as it was at one moment.
pub(super) fn finish(state: &StateDir, tree: &Path, replica: ReplicaId) -> Result<(), Failure> {
    if !state.agent(replica).is_dir() {
        return Ok(());
    }
    match agent::recover(tree, state.path()) {
        // Whoever takes the tree next says who has it.
        Ok(_) | Err(agent::Error::Locked { .. }) => Ok(()),
        Err(error) => Err(Failure::new(format!(
            "cannot finish what was being applied to {}",
            tree.display()
        ))
        .because(&error)),
    }
}

/// Takes over what the agent of a tree knows and the tree's journal does not. Says whether
/// there was anything.
pub(super) fn take_over(
    state: &StateDir,
    journal: &Journal,
    replica: ReplicaId,
) -> Result<bool, Failure> {
    let dir = state.agent(replica);
    let message = || format!("cannot take over what is in {}", dir.display());
    let former = match Former::open(&dir) {
        Ok(Some(former)) => former,
        Ok(None) => return Ok(false),
        Err(error) => {
            // Without it a mirror that comes back is met as for the first time, which is
            // safe; the tree can be worked in either way.
            tracing::warn!(%error, "{}", message());
            return Ok(false);
        }
    };
    let taken = journal
        .update(Durability::Full, move |update| update.take_over(&former))
        .or_fail(message)?;
    Ok(taken > 0)
}

/// Says which of the tree's nodes are in what was taken over, once the tree is recorded.
pub(super) fn bind(journal: &Journal) -> Result<(), Failure> {
    journal
        .update(Durability::Normal, |update| update.bind_former())
        .or_fail(|| "cannot write to the journal".into())
}
