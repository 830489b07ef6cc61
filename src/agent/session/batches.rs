//! Batches within a session: offered, filled, applied, synced.

use std::os::unix::fs::FileExt;

use mirrorfs_journal::index::Durable;

use super::super::offer::{Offer, Reuse, WANTS, find};
use super::super::{Error, applier};
use super::{Done, Engine, Observer};
use crate::background;
use crate::replica::apply::{Answer, ApplyError, Batch};
use crate::replica::{self, delta};
use crate::seeded::{self, Bug};
use crate::tree::{Agreement, ContentHash, RelPath};
use crate::wire::message::{Agreed, BatchId, Op, Revision, ToMount};

/// How many dropped batches are remembered.
const DROPPED: usize = 64;

impl Engine {
    pub(super) fn offer(
        &mut self,
        batch: BatchId,
        ops: Vec<crate::wire::message::Op>,
        more: bool,
    ) -> Result<(), Error> {
        if self.offer.as_ref().is_none_or(|offer| offer.batch != batch) {
            self.drop_offer();
            if self.dropped.contains(&batch) {
                // The rest of an offer that has failed.
                return Ok(());
            }
        }
        let offer = self.offer.get_or_insert_with(|| Offer::new(batch));
        if let Err(reason) = offer.extend(ops) {
            return self.fail(reason);
        }
        if more {
            return Ok(());
        }
        let root = &self.observer.served.root;
        match offer.wants(root, &self.staging, &self.observer.index) {
            Ok(wants) => {
                let mut pieces = wants.chunks(WANTS).peekable();
                while let Some(piece) = pieces.next_if(|piece| piece.len() == WANTS) {
                    self.send(ToMount::Need {
                        batch,
                        wants: piece.to_vec(),
                        more: true,
                    })?;
                }
                let wants = pieces.next().unwrap_or_default().to_vec();
                self.send(ToMount::Need {
                    batch,
                    wants,
                    more: false,
                })
            }
            Err(reason) => self.fail(reason),
        }
    }

    pub(super) fn data(
        &mut self,
        hash: ContentHash,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Error> {
        let Some(offer) = &mut self.offer else {
            return Ok(());
        };
        let taken = offer.data(&self.staging, hash, offset, bytes);
        self.taken(taken)
    }

    pub(super) fn reuse(&mut self, stretch: &Reuse) -> Result<(), Error> {
        let Some(offer) = &mut self.offer else {
            return Ok(());
        };
        let (root, index) = (&self.observer.served.root, &self.observer.index);
        let taken = offer.reuse(root, &self.staging, index, stretch);
        self.taken(taken)
    }

    /// Tells the sums of a content that is here, so that another can be told by it.
    pub(super) fn sums(
        &self,
        hash: ContentHash,
        old: ContentHash,
        block: u32,
    ) -> Result<(), Error> {
        let (root, index) = (&self.observer.served.root, &self.observer.index);
        let sums = find(old, root, index).and_then(|(file, size)| {
            let sums = delta::sums(size, block, &|buffer, at| file.read_at(buffer, at));
            sums.ok().flatten()
        });
        let sums = sums.unwrap_or_default();
        self.send(ToMount::Sums { hash, sums })
    }

    /// Fails the batch if a stretch could not be taken in.
    fn taken(&mut self, taken: Result<(), replica::Error>) -> Result<(), Error> {
        match taken {
            Ok(()) => Ok(()),
            Err(error) => {
                if error.is_disk_full() {
                    // Contents kept for a resumption must not be what fills the disk.
                    let needed = self.offer.as_ref().map(Offer::contents).unwrap_or_default();
                    self.staging.clean(&|hash| needed.contains(&hash))?;
                }
                self.fail(why(&error))
            }
        }
    }

    /// Drops the offered batch; what arrived of its contents stays for the next one.
    pub(super) fn drop_offer(&mut self) {
        if let Some(offer) = self.offer.take() {
            self.dropped.push_back(offer.batch);
            if self.dropped.len() > DROPPED {
                self.dropped.pop_front();
            }
        }
    }

    pub(super) fn fail(&mut self, reason: String) -> Result<(), Error> {
        let Some(batch) = self.offer.as_ref().map(|offer| offer.batch) else {
            return Ok(());
        };
        self.drop_offer();
        self.send(ToMount::Failed { batch, reason })
    }

    /// Writes down what the agreement of a batch is to change in the base.
    pub(super) fn agreed(&mut self, batch: BatchId, changes: Vec<Agreed>) -> Result<(), Error> {
        let offer = self.offer.as_ref().filter(|offer| offer.batch == batch);
        let ops = offer.map_or(&[][..], |offer| &offer.ops);
        let mut known = Vec::with_capacity(changes.len());
        for change in changes {
            known.push(match change {
                Agreed::Other(change, on) => (change, on),
                Agreed::Step(at) => {
                    let op = ops.get(at as usize);
                    // The batch may have failed meanwhile; its commit will then, too.
                    let Some(change) = op.and_then(Op::agreed) else {
                        return Ok(());
                    };
                    (change, vec![at])
                }
            });
        }
        let first = self.agreed.replace(batch) != Some(batch);
        self.observer.commit()?;
        let (syncing, index) = (self.syncing, &mut self.observer.index);
        Ok(index.transaction(Durable::Process, |index| {
            index.propose(batch, first, syncing, &known)
        })?)
    }

    pub(super) fn commit(
        &mut self,
        batch: BatchId,
        agreement: Agreement,
        seen: Revision,
    ) -> Result<(), Error> {
        if self.syncing.is_some() {
            // One redo record at a time.
            self.waiting = Some((batch, agreement, seen));
            return Ok(());
        }
        if let Some(answer) = self.answered(batch)? {
            let upto = self.revision();
            self.send(ToMount::Applied {
                batch,
                diverged: answer.diverged,
                upto,
            })?;
            return self.send(ToMount::Durable { batch });
        }
        let ops = match self.offer.as_ref().filter(|offer| offer.batch == batch) {
            Some(offer) => match offer.missing() {
                Some(0) => self.offer.take().map(|offer| offer.ops).unwrap_or_default(),
                Some(missing) => {
                    return self.fail(format!(
                        "{missing} contents of the batch are missing: offer it again"
                    ));
                }
                None => return self.fail("committed before all its steps had come".to_owned()),
            },
            None if self.dropped.contains(&batch) => {
                let reason = "the batch had been dropped".to_owned();
                return self.send(ToMount::Failed { batch, reason });
            }
            None => Vec::new(),
        };
        self.check_root()?;
        self.report(false)?;
        self.agreed = None;
        let batch = Batch {
            id: batch,
            mount: self.mount,
            agreement,
            ops,
        };
        self.apply(batch, seen)
    }

    /// The answer to a batch that has been applied already.
    pub(super) fn answered(&self, batch: BatchId) -> Result<Option<Answer>, Error> {
        let Some(bytes) = self.observer.index.applied()? else {
            return Ok(None);
        };
        let answer = postcard::from_bytes::<Answer>(&bytes).ok();
        Ok(answer.filter(|answer| answer.batch == batch))
    }

    /// Applies a batch that was decided on when the reports up to `seen` were known.
    pub(super) fn apply(&mut self, batch: Batch, seen: Revision) -> Result<(), Error> {
        let id = batch.id;
        let paths: Vec<RelPath> = batch
            .ops
            .iter()
            .map(|op| crate::replica::apply::path_of(op).clone())
            .collect();
        let overtaken = self.reported_since(&paths, seen)?;
        if seeded::has(Bug::AcknowledgesBeforeTheCommit) {
            let upto = self.revision();
            self.send(ToMount::Applied {
                batch: id,
                diverged: Vec::new(),
                upto,
            })?;
            self.send(ToMount::Durable { batch: id })?;
        }
        let Observer {
            served,
            reserved,
            index,
            ..
        } = &mut self.observer;
        let outcome = match applier(served, reserved, &self.staging, index).apply(batch) {
            Ok(outcome) => outcome,
            Err(error @ ApplyError::Interrupted(_)) => return Err(error.into()),
            Err(error) => {
                let reason = match &error {
                    ApplyError::Replica(error) => why(error),
                    other => other.to_string(),
                };
                return self.send(ToMount::Failed { batch: id, reason });
            }
        };
        // What the batch itself brought is known there already.
        self.reported = self.observer.index.rev();
        let upto = self.revision();
        for dir in &outcome.rewatch {
            self.observer.look(dir, true)?;
        }
        for path in &outcome.recheck {
            // The other side is about to believe that the step's result is here; that there
            // is nothing, as the index knows already, is news to it.
            self.observer.look_anew(path)?;
        }
        for path in &overtaken {
            self.observer.renew(path)?;
        }
        for divergence in &outcome.diverged {
            if let Some(path) = paths.get(divergence.op as usize) {
                self.observer.renew(path)?;
            }
        }
        self.observer.commit()?;
        self.send(ToMount::Applied {
            batch: id,
            diverged: outcome.diverged,
            upto,
        })?;
        // Not before the answer: what comes before it the other side takes for a sight of
        // the tree before the batch, and has it follow the batch's moves.
        self.report(false)?;
        for (kept, displaced) in outcome.displaced {
            self.watch_displaced(kept, displaced);
        }
        let (done, unsynced) = (self.done.clone(), outcome.unsynced);
        self.syncing = Some(id);
        background::start("sync", move || {
            // Nobody waits for it any more if this fails.
            let _ = done.send(Done::Synced(id, unsynced.sync()));
        })
        .map_err(|error| Error::io("start", "a thread", error))
    }

    /// Which of the paths have been reported since `seen`. A step does not compare all that
    /// is reported (a file is removed whatever its mode is), so what it leaves there is
    /// news to a side that knows of the report.
    fn reported_since(&self, paths: &[RelPath], seen: Revision) -> Result<Vec<RelPath>, Error> {
        let index = &self.observer.index;
        let mut overtaken = Vec::new();
        for path in paths {
            let row = index.row(path)?;
            if row.is_some_and(|row| seen.epoch != index.epoch() || row.rev > seen.rev) {
                overtaken.push(path.clone());
            }
        }
        Ok(overtaken)
    }

    pub(super) fn done(&mut self, done: Done) -> Result<(), Error> {
        match done {
            Done::Looked(path, found) => {
                self.observer.looked(&path, found)?;
                for drain in &mut self.drains {
                    if let Some(looks) = drain.large.get_mut(&path) {
                        *looks += 1;
                    }
                }
                Ok(())
            }
            Done::Expiring(ready) => {
                self.check_displaced()?;
                // Whoever waits goes on when this is dropped.
                drop(ready);
                Ok(())
            }
            Done::Synced(batch, synced) => {
                let path = self.observer.served.path.display();
                synced.map_err(|error| Error::io("sync", path, error))?;
                self.observer.commit()?;
                let Observer {
                    served,
                    reserved,
                    index,
                    ..
                } = &mut self.observer;
                applier(served, reserved, &self.staging, index).synced()?;
                let needed = self.offer.as_ref().map(Offer::contents).unwrap_or_default();
                self.staging.clean(&|hash| needed.contains(&hash))?;
                self.syncing = None;
                self.send(ToMount::Durable { batch })?;
                match self.waiting.take() {
                    Some((batch, agreement, seen)) => self.commit(batch, agreement, seen),
                    None => Ok(()),
                }
            }
        }
    }
}

/// What went wrong, for people, with what to do about it.
fn why(error: &replica::Error) -> String {
    if error.is_disk_full() {
        return format!("the peer's disk is full: make room there; nothing was changed ({error})");
    }
    error.to_string()
}
