//! How a world ends: everything is let come to rest, and then looked at.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use super::World;
use crate::replicator::{FlushOutcome, PeerState, Resume};
use crate::sim::shown::{self, Shown};
use crate::sim::{clock, jobs};
use crate::tree::{ContentHash, RelPath};

/// How long a settled world may take to settle, in simulated time and in steps.
const PATIENCE: Duration = Duration::from_secs(600);
const SETTLING: usize = 3_000;

impl World {
    /// Lets everything go on undisturbed until nothing is left to do.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        self.note("from here on everything goes well");
        self.fate.cut_every = usize::MAX;
        self.fate.kill_every = usize::MAX;
        self.fate.turn_back_every = usize::MAX;
        // Twice: what the first peer brings is sent to the others, and answered.
        for _ in 0..2 {
            for peer in 0..self.peers.len() {
                self.flush(peer)?;
            }
        }
        let begin = clock::elapsed();
        for _ in 0..SETTLING {
            self.go_on()?;
            let life = self.life.as_ref().unwrap();
            let settled = |peer: usize| {
                let (owner, driver) = &life.drivers[peer];
                driver.status().settled
                    && !driver.in_round()
                    && jobs::waiting(*owner) == 0
                    && self.peers[peer].on_the_way() == (0, 0)
            };
            let quiet = (0..self.peers.len()).all(settled);
            if quiet && clock::elapsed() > begin + Duration::from_secs(20) {
                return Ok(());
            }
        }
        Err(format!("it does not settle: {}", self.statuses()))
    }

    fn statuses(&self) -> String {
        let drivers = self.life.iter().flat_map(|life| &life.drivers);
        let statuses: Vec<String> = drivers
            .map(|(_, driver)| {
                let status = driver.status();
                format!(
                    "{:?}, settled {}, error {:?}, halted {:?}, problems {:?}",
                    status.state,
                    status.settled,
                    status.last_error,
                    status.halt_reason,
                    status.problems
                )
            })
            .collect();
        statuses.join("; ")
    }

    /// Waits for a flush, and takes the ways on that a person would take.
    fn flush(&mut self, peer: usize) -> Result<(), String> {
        let begin = clock::elapsed();
        while clock::elapsed() < begin + PATIENCE {
            let life = self.life.as_mut().unwrap();
            let n = life.journal.recorder().last();
            let (owner, driver) = &mut life.drivers[peer];
            jobs::owner(*owner);
            let mut outcome = driver.flush(n);
            self.pump(peer);
            let outcome = loop {
                match outcome.try_recv() {
                    Ok(outcome) => break Some(outcome),
                    Err(tokio::sync::oneshot::error::TryRecvError::Closed) => break None,
                    Err(_) => {}
                }
                self.go_on()?;
                if clock::elapsed() > begin + PATIENCE {
                    return Err(format!("a flush does not end: {}", self.statuses()));
                }
            };
            self.note(&format!("flushed {peer}: {outcome:?}"));
            match outcome {
                Some(FlushOutcome::Durable) => return Ok(()),
                Some(FlushOutcome::Halted) => {
                    let (owner, driver) = &mut self.life.as_mut().unwrap().drivers[peer];
                    jobs::owner(*owner);
                    driver.resume(Resume::Refill);
                    self.pump(peer);
                }
                _ => {}
            }
            for _ in 0..50 {
                self.go_on()?;
            }
        }
        Err(format!("flushes do not succeed: {}", self.statuses()))
    }

    /// Does everything that there is to do, then lets time go by.
    fn go_on(&mut self) -> Result<(), String> {
        let mut any = false;
        for peer in 0..self.peers.len() {
            any |= self.dial(peer);
            while self.work(peer) {
                any = true;
            }
            while self.deliver_to_agent(peer)? {
                any = true;
            }
            any |= self.agent_notices(peer)?;
            while self.deliver_to_mount(peer) {
                any = true;
            }
        }
        while self.older_goes_on()? {
            any = true;
        }
        let life = self.life.as_ref().unwrap();
        if life.journal.recorder().last() != life.told {
            for peer in 0..self.peers.len() {
                self.wake(peer);
            }
            any = true;
        }
        if !any {
            let by = self.next_deadline().unwrap_or(Duration::from_secs(1));
            clock::advance(by.max(Duration::from_micros(100)));
            self.tick();
        }
        Ok(())
    }

    /// Every value that nobody who saw it replaced is somewhere.
    pub(super) fn nothing_is_lost(&mut self, midway: bool) -> Result<(), String> {
        let found = self.values(true, midway);
        let lost = self.ledger.borrow().lost(&found);
        if lost.is_empty() {
            return Ok(());
        }
        Err(format!("lost: {}", lost.join(", ")))
    }

    /// All values that exist anywhere.
    pub(super) fn values(&self, trash: bool, staged: bool) -> HashSet<ContentHash> {
        let mut found = shown::values(&self.mounted.tree, trash, staged);
        for peer in &self.peers {
            found.extend(shown::values(&peer.root, trash, staged));
        }
        found
    }

    /// The sides show the same but for open conflicts.
    pub(super) fn sides_agree(&self) -> Result<(), String> {
        let life = self.life.as_ref().unwrap();
        let conflicts = life.journal.snapshot().unwrap().conflicts().unwrap();
        let snapshot = life.journal.snapshot().unwrap();
        let mut mounted = shown::tree(&self.mounted.tree);
        // What is known as an artefact stays here, also where a kill came between the
        // placing of it and its record, or the tree was brought back with other inodes.
        let mut artefacts = crate::replicator::placing(&snapshot).unwrap();
        for conflict in &conflicts {
            let both = [&conflict.copy, &conflict.info];
            artefacts.extend(both.into_iter().flatten().cloned());
        }
        mounted.retain(|path, _| {
            let node = snapshot.at(path).unwrap();
            !artefacts.contains(path) && !node.is_some_and(|node| node.artefact)
        });
        for (peer, id) in self.peers.iter().zip(life.peers()) {
            let open: Vec<&RelPath> = conflicts
                .iter()
                .filter(|conflict| conflict.peer == id)
                .map(|conflict| &conflict.path)
                .collect();
            let there = shown::tree(&peer.root);
            let differ = differences(&mounted, &there, &open);
            if !differ.is_empty() {
                let recorded: Vec<String> = differ
                    .iter()
                    .map(|(path, what)| {
                        let node = snapshot.at(path).unwrap();
                        let artefact = node.is_some_and(|node| node.artefact);
                        let base = snapshot.base_at(id, path).unwrap();
                        let base = base.map(|base| base.entry.content);
                        format!("{path}: {what}, base {base:?}, artefact {artefact}")
                    })
                    .collect();
                return Err(format!(
                    "mounted and {} differ: {}; {}; conflicts at {open:?}",
                    peer.name,
                    recorded.join(", "),
                    self.statuses()
                ));
            }
            if let Some(state) = life
                .drivers
                .iter()
                .map(|(_, driver)| driver.status().state)
                .find(|state| *state != PeerState::Connected)
            {
                return Err(format!("a peer is left {state:?}"));
            }
        }
        Ok(())
    }
}

fn differences(
    mounted: &BTreeMap<RelPath, Shown>,
    there: &BTreeMap<RelPath, Shown>,
    open: &[&RelPath],
) -> Vec<(RelPath, String)> {
    let paths: BTreeSet<&RelPath> = mounted.keys().chain(there.keys()).collect();
    paths
        .into_iter()
        .filter(|path| mounted.get(*path) != there.get(*path))
        .filter(|path| !open.iter().any(|open| path.starts_with(open)))
        .map(|path| {
            let differ = format!("{:?} and {:?}", mounted.get(path), there.get(path));
            (path.clone(), differ)
        })
        .collect()
}
