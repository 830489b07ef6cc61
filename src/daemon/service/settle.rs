//! Conflicts: telling about them, and settling them.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mirrorfs_journal::Conflict;

use super::{Service, blocking};
use crate::daemon::conflicts::{self, Choice};
use crate::daemon::control::{Outcome, Response};
use crate::daemon::failure::{Failure, OrFail};
use crate::daemon::late;
use crate::daemon::put;
use crate::daemon::site::Site;
use crate::replica::Root;
use crate::replica::trash::RestoreError;
use crate::replicator::{LocalTree, RemoteVersion, Resolution, Side};
use crate::tree::{Content, RelPath};

/// How long a conflict that was settled may take to be over on both sides, before the
/// caller is told that it is under way.
const PATIENCE: Duration = Duration::from_secs(20);

impl Service {
    pub(super) async fn conflicts(&self, path: RelPath) -> Result<Response, Failure> {
        let site = Arc::clone(&self.site);
        blocking(move || {
            let view = snapshot(&site)?;
            let conflicts = conflicts::details(&view, &root(&site)?, &path)?;
            Ok(Response::Conflicts { conflicts })
        })
        .await
    }

    pub(super) async fn resolve(
        &self,
        path: RelPath,
        choice: Choice,
        discard_edits: bool,
    ) -> Result<Response, Failure> {
        let (site, tree, at) = (Arc::clone(&self.site), self.tree.clone(), path.clone());
        let late = Arc::clone(&self.late);
        let (records, beside, settled) = blocking(move || {
            let view = snapshot(&site)?;
            let found = conflicts::at(&view, &root(&site)?, &at)?;
            let open = late::at(&view, &at).or_fail(|| "cannot read the journal".into())?;
            if found.is_empty() && open.is_empty() {
                return Err(conflicts::none_at(&at));
            }
            if choice == Choice::Remote && found.len().min(1) + open.len() > 1 {
                return Err(Failure::new(format!("{at} has more than one other version: only one could win"))
                    .hint("keep all of them with --both, or make the file what it should be and use --merged"));
            }
            let details = found.iter().map(|(_, detail)| detail);
            conflicts::allow(details, choice, discard_edits)?;
            let records: Vec<Conflict> = found.into_iter().map(|(record, _)| record).collect();
            let mut beside = Vec::new();
            if choice == Choice::Both {
                for record in &records {
                    beside.push(put_beside(&tree, record)?);
                }
            }
            beside.extend(late.resolve(&open, choice)?);
            Ok((records, beside, !open.is_empty()))
        })
        .await?;
        let n = self.site.journal.recorder().last();
        let peers = &self.peers;
        let mut outcome = Outcome::Durable;
        for record in &records {
            let resolution = Resolution {
                side: match choice {
                    Choice::Remote => Side::Remote,
                    Choice::Local | Choice::Both | Choice::Merged => Side::Local,
                },
                remote: RemoteVersion::recorded(record),
                edited_too: discard_edits || choice == Choice::Merged,
            };
            let reached = peers
                .resolve(record.peer, path.clone(), resolution, n, PATIENCE)
                .await;
            match reached {
                Some(Outcome::Durable) => {}
                Some(other) => outcome = other,
                None => outcome = Outcome::Failed,
            }
        }
        if settled && outcome == Outcome::Durable {
            // What became of a late version is a change like any other.
            let reached = peers.flush(None, n, PATIENCE).await;
            let missed = reached.into_iter().map(|(_, outcome)| outcome);
            outcome = missed.fold(outcome, |all, one| match one {
                Outcome::Durable => all,
                other => other,
            });
        }
        if outcome == Outcome::Durable {
            let site = Arc::clone(&self.site);
            blocking(move || still_open(&site, &records)).await?;
        }
        Ok(Response::Resolved { outcome, beside })
    }
}

fn snapshot(site: &Site) -> Result<mirrorfs_journal::Snapshot, Failure> {
    let snapshot = site.journal.snapshot();
    snapshot.or_fail(|| "cannot read the journal".into())
}

/// The covered directory.
fn root(site: &Site) -> Result<Root, Failure> {
    let root = site.filesystem.lower().root().as_fd();
    let root = root.try_clone_to_owned();
    Ok(Root::new(root.or_fail(|| {
        format!("cannot open {}", site.tree().display())
    })?))
}

/// Makes the peer's version a file of its own, and says which.
fn put_beside(tree: &LocalTree, conflict: &Conflict) -> Result<RelPath, Failure> {
    let path = &conflict.path;
    let message = || format!("cannot put the peer's version of {path} beside it");
    let (Some(copy), Some(remote)) = (&conflict.copy, &conflict.remote) else {
        return Err(Failure::new(message()));
    };
    let file = match remote.content {
        Content::File { .. } => Some(put::open_lower(tree, copy).or_fail(message)?),
        _ => None,
    };
    for name in conflicts::names_beside(path) {
        match put::put(tree, &name, remote, file.as_ref(), None) {
            Ok(()) => return Ok(name),
            Err(RestoreError::InTheWay) => {}
            Err(error) => return Err(Failure::new(message()).because(&error)),
        }
    }
    Err(Failure::new(message()).because(&RestoreError::InTheWay))
}

/// Says so if a conflict was looked at once more and is not over.
fn still_open(site: &Site, records: &[Conflict]) -> Result<(), Failure> {
    let open = snapshot(site)?
        .conflicts()
        .or_fail(|| "cannot read the conflicts".into())?;
    for record in records {
        let Some(now) = open
            .iter()
            .find(|open| (open.peer, &open.path) == (record.peer, &record.path))
        else {
            continue;
        };
        let path = &record.path;
        let failure = if RemoteVersion::recorded(now) == RemoteVersion::recorded(record) {
            Failure::new(format!("the conflict at {path} could not be settled yet"))
                .hint("mirrorfs status says what is in the way; it is tried again")
        } else {
            Failure::new(format!(
                "the peer has changed {path} meanwhile: nothing was overwritten"
            ))
            .hint(format!(
                "look at the new version: mirrorfs conflicts show {path}"
            ))
        };
        return Err(failure);
    }
    Ok(())
}
