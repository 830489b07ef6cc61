//! A world: a mounted side, its peers, users, links and what befalls them, all from one
//! seed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::hands::{self, Plain};
use super::jobs::Owner;
use super::ledger::Ledger;
use super::mounted::{Life, Place, copy_state, log_len};
use super::peer::{self, Agent, Older, Peer, ended_well};
use super::random::Random;
use super::shown::{self, Shown};
use super::{clock, hook, jobs};
use crate::agent::{self, Stepped};
use crate::replicator::{FlushOutcome, PeerState, Resume};
use crate::tree::{ContentHash, Id, MirrorId, RelPath};
use crate::wire::message::{ToAgent, ToMount};

/// What may befall a world.
#[derive(Clone, Debug)]
pub(crate) struct Fate {
    /// How many steps are made before everything is let settle.
    pub(crate) steps: usize,
    pub(crate) peers: usize,
    /// How often a link is cut, a process killed, in steps.
    pub(crate) cut_every: usize,
    pub(crate) kill_every: usize,
}

/// How long a settled world may take to settle, in simulated time and in steps.
const PATIENCE: Duration = Duration::from_secs(600);
const SETTLING: usize = 3_000;
/// How often all values are looked for.
const LOOK_EVERY: u64 = 400;

/// How a run went.
#[derive(Debug)]
pub(crate) struct Run {
    /// How many steps it took.
    pub(crate) steps: u64,
    /// The hash of everything that happened, in order.
    pub(crate) trace: ContentHash,
    /// The last of what happened.
    pub(crate) tail: Vec<String>,
    /// How many values were written, and how many of them must exist.
    pub(crate) values: (usize, usize),
    /// What went wrong.
    pub(crate) wrong: Option<String>,
}

pub(crate) struct World {
    random: Random,
    fate: Fate,
    dir: tempfile::TempDir,
    mirror: MirrorId,
    mounted: Place,
    life: Option<Life>,
    /// Lengths of the journal's log at which it may end after a kill.
    committed: Option<u64>,
    peers: Vec<Peer>,
    older: Rc<RefCell<Vec<(usize, Older)>>>,
    ledger: Rc<RefCell<Ledger>>,
    next_owner: Owner,
    next_dir: u64,
    steps: u64,
    trace: blake3::Hasher,
    tail: VecDeque<String>,
    watched: String,
}

/// Directories of this simulation: in memory, where there is a place for that.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    tempfile::Builder::new()
        .prefix("mirrorfs-sim-")
        .tempdir_in(memory)
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// Runs a world from a seed to its end.
pub(crate) fn run(seed: u64, fate: &Fate) -> Run {
    clock::start();
    jobs::start();
    let world = std::panic::catch_unwind(|| {
        let mut world = World::new(seed, fate);
        let wrong = world.live().err();
        world.end();
        Run {
            steps: world.steps,
            trace: ContentHash(*world.trace.finalize().as_bytes()),
            tail: world.tail.iter().cloned().collect(),
            values: world.ledger.borrow().count(),
            wrong,
        }
    });
    hook::set(None);
    jobs::set_others(None);
    jobs::stop();
    clock::stop();
    match world {
        Ok(run) => run,
        Err(panic) => {
            eprintln!("the simulation of seed {seed} panicked");
            std::panic::resume_unwind(panic)
        }
    }
}

impl World {
    fn new(seed: u64, fate: &Fate) -> Self {
        let dir = directory();
        let place = Place {
            tree: dir.path().join("mounted"),
            state: dir.path().join("state0"),
        };
        std::fs::create_dir(&place.tree).unwrap();
        let peers: Vec<Peer> = (0..fate.peers)
            .map(|peer| {
                let name = format!("peer{peer}");
                let (root, state) = (
                    dir.path().join(&name),
                    dir.path().join(name.clone() + "-state"),
                );
                std::fs::create_dir(&root).unwrap();
                std::fs::create_dir(&state).unwrap();
                Peer::new(&name, root, state)
            })
            .collect();
        Self {
            random: Random::new(seed),
            fate: fate.clone(),
            dir,
            mirror: Id([7; 16]),
            mounted: place,
            life: None,
            committed: None,
            peers,
            older: Rc::default(),
            ledger: Rc::default(),
            next_owner: 1,
            next_dir: 1,
            steps: 0,
            trace: blake3::Hasher::new(),
            tail: VecDeque::new(),
            watched: String::new(),
        }
    }

    /// Notes a step.
    fn note(&mut self, what: &str) {
        self.steps += 1;
        self.trace.update(what.as_bytes());
        self.trace.update(b"\n");
        if std::env::var_os("MIRRORFS_SIM_TRACE").is_some() {
            eprintln!("{:6} {:?} {what}", self.steps, clock::elapsed());
            self.watch();
        }
        self.tail.push_back(format!("{:6} {what}", self.steps));
        if self.tail.len() > 150 {
            self.tail.pop_front();
        }
    }

    /// Says what becomes of the path that somebody who looks for a mistake has named.
    fn watch(&mut self) {
        let Ok(path) = std::env::var("MIRRORFS_SIM_WATCH") else {
            return;
        };
        let peers = self.peers.iter().map(|peer| &peer.root);
        let shown: Vec<String> = std::iter::once(&self.mounted.tree)
            .chain(peers)
            .map(|root| format!("{:?}", shown::at(&root.join(&path))))
            .collect();
        let conflicts = self.life.iter().flat_map(|life| {
            let conflicts = life.journal.snapshot().unwrap().conflicts().unwrap();
            conflicts.into_iter().map(|conflict| {
                format!(
                    "{} ({:?}, {:?})",
                    conflict.path, conflict.copy, conflict.info
                )
            })
        });
        let shown = format!("{shown:?}, conflicts: {:?}", conflicts.collect::<Vec<_>>());
        if shown != self.watched {
            eprintln!("       {path}: {shown}");
            self.watched = shown;
        }
    }

    fn owner(&mut self) -> Owner {
        self.next_owner += 1;
        self.next_owner
    }

    fn live(&mut self) -> Result<(), String> {
        self.begin();
        for peer in 0..self.peers.len() {
            for _ in 0..self.random.below(6) {
                self.edit_peer(peer);
            }
        }
        for _ in 0..self.random.below(10) {
            self.edit_mounted();
        }
        let mut looked = 0;
        while self.steps < self.fate.steps as u64 {
            self.step()?;
            if self.steps >= looked + LOOK_EVERY {
                looked = self.steps;
                self.nothing_is_lost(true)?;
            }
        }
        self.settle()?;
        self.nothing_is_lost(false)?;
        self.sides_agree()
    }

    /// Ends all processes, in an order in which none waits for another.
    fn end(&mut self) {
        self.older.borrow_mut().clear();
        for peer in &mut self.peers {
            peer.agent = None;
        }
        self.life = None;
    }

    /// The daemon starts.
    fn begin(&mut self) {
        let (mut next, random) = (self.next_owner, &mut self.random);
        let life = Life::begin(
            &self.mounted,
            self.mirror,
            self.peers.len(),
            &mut || {
                next += 1;
                next
            },
            &mut || random.next() % 256 + 1,
        );
        self.next_owner = next;
        self.life = Some(life);
        self.committed = Some(log_len(&self.mounted.state, mirrorfs_journal::DATABASE));
        for peer in 0..self.peers.len() {
            self.pump(peer);
        }
    }

    // ---- steps ------------------------------------------------------------

    /// Does one thing at random.
    fn step(&mut self) -> Result<(), String> {
        let peer = self.random.below(self.peers.len());
        if self.random.one_in(self.fate.kill_every) {
            if self.random.one_in(3) {
                self.kill_daemon();
            } else {
                self.kill_agent(peer);
            }
            return Ok(());
        }
        if self.random.one_in(self.fate.cut_every) && self.cut(peer) {
            return Ok(());
        }
        loop {
            let peer = self.random.below(self.peers.len());
            let done = match self.random.weighted(&[6, 5, 20, 20, 20, 14, 8, 6, 10, 6]) {
                0 => self.edit_mounted(),
                1 => self.edit_peer(peer),
                2 => self.work(peer),
                3 => self.deliver_to_agent(peer)?,
                4 => self.deliver_to_mount(peer),
                5 => self.agent_notices(peer)?,
                6 => self.wake(peer),
                7 => self.time(),
                8 => self.dial(peer),
                _ => self.older_goes_on()?,
            };
            if done {
                return Ok(());
            }
        }
    }

    fn edit_mounted(&mut self) -> bool {
        let Some(life) = &self.life else { return false };
        let mut hands = hands::Mounted {
            root: self.mounted.tree.clone(),
            filesystem: life.filesystem.clone(),
        };
        let mut ledger = self.ledger.borrow_mut();
        let done = hands::edit(&mut hands, "mounted", &mut self.random, &mut ledger);
        drop(ledger);
        done.inspect(|done| self.note(done)).is_some()
    }

    fn edit_peer(&mut self, peer: usize) -> bool {
        let mut hands = Plain(self.peers[peer].root.clone());
        let mut ledger = self.ledger.borrow_mut();
        let name = &self.peers[peer].name;
        let done = hands::edit(&mut hands, name, &mut self.random, &mut ledger);
        drop(ledger);
        done.inspect(|done| self.note(done)).is_some()
    }

    /// A piece of a driver's work is done, or what came of one taken in.
    fn work(&mut self, peer: usize) -> bool {
        let Some(life) = &mut self.life else {
            return false;
        };
        let (owner, driver) = &mut life.drivers[peer];
        jobs::owner(*owner);
        let what = if self.random.one_in(2) && driver.take_result() {
            "takes in what was done for"
        } else if jobs::work(*owner) {
            "works for"
        } else if driver.take_result() {
            "takes in what was done for"
        } else {
            return false;
        };
        self.note(&format!("mounted {what} {peer}"));
        self.pump(peer);
        true
    }

    /// The driver hears of commits.
    fn wake(&mut self, peer: usize) -> bool {
        let Some(life) = &mut self.life else {
            return false;
        };
        let last = life.journal.recorder().last();
        if peer == 0 {
            if last == life.told {
                return false;
            }
            life.told = last;
        }
        let (owner, driver) = &mut life.drivers[peer];
        jobs::owner(*owner);
        driver.wake(last);
        self.note(&format!("mounted tells {peer} of changes"));
        self.pump(peer);
        true
    }

    fn deliver_to_agent(&mut self, peer: usize) -> Result<bool, String> {
        let Some(message) = self.peers[peer].next_for_agent() else {
            return Ok(false);
        };
        self.note(&format!("{peer} hears {}", peer::to_agent(&message)));
        if let ToAgent::Hello(hello) = &message {
            self.meet(peer, hello)?;
            return Ok(true);
        }
        let cut = matches!(message, ToAgent::Commit { .. })
            && self.random.one_in(self.fate.kill_every / 40 + 2);
        let interferes = matches!(message, ToAgent::Commit { .. }) && self.random.one_in(4);
        if cut {
            let mut left = self.random.below(12);
            hook::set(Some(Box::new(move || {
                left = left.saturating_sub(1);
                left == 0
            })));
        } else if interferes {
            hook::set(Some(self.interference(peer)));
        }
        let Some(agent) = &mut self.peers[peer].agent else {
            hook::set(None);
            return Ok(true);
        };
        jobs::owner(agent.owner);
        let ended = agent.session.message(message);
        hook::set(None);
        self.agent_did(peer, ended)?;
        Ok(true)
    }

    /// A user who edits between two renames of a batch.
    fn interference(&mut self, peer: usize) -> hook::Hook {
        let mut left = self.random.below(8);
        let mut random = Random::new(self.random.next());
        let ledger = Rc::clone(&self.ledger);
        let mut hands = Plain(self.peers[peer].root.clone());
        let name = self.peers[peer].name.clone();
        Box::new(move || {
            if left == 0 {
                let done = hands::edit(&mut hands, &name, &mut random, &mut ledger.borrow_mut());
                if let Some(done) = done
                    && std::env::var_os("MIRRORFS_SIM_TRACE").is_some()
                {
                    eprintln!("       meanwhile {done}");
                }
            }
            left = left.wrapping_sub(1);
            false
        })
    }

    fn meet(
        &mut self,
        peer: usize,
        hello: &crate::wire::message::MountHello,
    ) -> Result<(), String> {
        // An older agent that is alive lets go when it sees the fence.
        let older = Rc::clone(&self.older);
        jobs::set_others(Some(Box::new(move || {
            older
                .borrow_mut()
                .retain_mut(|(of, older)| *of != peer || older.agent.session.notice().is_ok());
        })));
        let owner = self.owner();
        jobs::owner(owner);
        let there = &mut self.peers[peer];
        there.agent = None;
        let met = Stepped::meet(&there.root, &there.state, hello);
        jobs::set_others(None);
        if let Some(answer) = &met.answer {
            there.answered(answer);
        }
        match met.agent {
            Ok(session) => {
                there.agent = Some(Agent { owner, session });
                let agent = there.agent.as_mut().unwrap();
                let begun = agent.session.begin();
                self.agent_did(peer, begun)
            }
            Err(error) => {
                if !ended_well(&error) {
                    return Err(format!("{peer} cannot be served: {error}"));
                }
                Ok(())
            }
        }
    }

    /// Sends what the agent has said, and ends it if it has ended.
    fn agent_did(&mut self, peer: usize, ended: Result<(), agent::Error>) -> Result<(), String> {
        let there = &mut self.peers[peer];
        let mut acknowledged = false;
        while let Some(message) = there.agent.as_mut().and_then(|agent| agent.session.sent()) {
            acknowledged |= matches!(message, ToMount::Applied { .. });
            there.answered(&message);
        }
        let Err(error) = ended else { return Ok(()) };
        let cut =
            matches!(&error, agent::Error::Apply(error) if error.to_string().contains("cut off"));
        if !cut {
            there.answered(&ToMount::Closing {
                reason: error.to_string(),
            });
        }
        if let Some(agent) = there.agent.take() {
            jobs::forget(agent.owner);
        }
        if cut && acknowledged {
            return Err(format!(
                "{peer} acknowledged a batch before it was applied: it was cut off amid it"
            ));
        }
        if cut {
            self.note(&format!("{peer} was killed amid a batch"));
            return Ok(());
        }
        if ended_well(&error) {
            return Ok(());
        }
        Err(format!("the session with {peer} ended: {error}"))
    }

    fn deliver_to_mount(&mut self, peer: usize) -> bool {
        let there = &mut self.peers[peer];
        let Some(message) = there.next_for_mount() else {
            if there.linked && there.agent.is_none() && there.on_the_way() == (0, 0) {
                // The stream has ended.
                return self.cut(peer);
            }
            return false;
        };
        let Some(life) = &mut self.life else {
            return false;
        };
        let (owner, driver) = &mut life.drivers[peer];
        jobs::owner(*owner);
        let what = peer::to_mount(&message);
        driver.message(message);
        self.note(&format!("mounted hears from {peer}: {what}"));
        self.pump(peer);
        true
    }

    fn agent_notices(&mut self, peer: usize) -> Result<bool, String> {
        let Some(agent) = &mut self.peers[peer].agent else {
            return Ok(false);
        };
        jobs::owner(agent.owner);
        let worked = self.random.one_in(2) && jobs::work(agent.owner);
        let (any, ended) = match agent.session.notice() {
            Ok(any) => (any, Ok(())),
            Err(error) => (true, Err(error)),
        };
        if !worked && !any {
            return Ok(false);
        }
        self.note(&format!("{peer} notices"));
        self.agent_did(peer, ended)?;
        Ok(true)
    }

    /// Time goes by: a little, or up to what somebody waits for.
    fn time(&mut self) -> bool {
        let little = Duration::from_micros(self.random.next() % 3000);
        let by = match self.next_deadline() {
            Some(left) if self.random.one_in(3) => left.max(little),
            _ => little,
        };
        clock::advance(by);
        self.tick();
        true
    }

    /// How long it is to the next moment that somebody waits for.
    fn next_deadline(&self) -> Option<Duration> {
        let now = crate::clock::monotonic();
        let drivers = self.life.iter().flat_map(|life| &life.drivers);
        let drivers = drivers.filter_map(|(_, driver)| {
            let deadline = driver.deadline()?;
            Some(deadline.saturating_sub(driver.elapsed()))
        });
        let agents = self.peers.iter().filter_map(|peer| {
            let due = peer.agent.as_ref()?.session.due()?;
            Some(due.saturating_duration_since(now))
        });
        drivers.chain(agents).min()
    }

    /// Everybody whose time has come does what was due.
    fn tick(&mut self) {
        self.note("time goes by");
        for peer in 0..self.peers.len() {
            if let Some(life) = &mut self.life {
                let (owner, driver) = &mut life.drivers[peer];
                if driver.deadline().is_some_and(|at| at <= driver.elapsed()) {
                    jobs::owner(*owner);
                    driver.tick();
                    self.pump(peer);
                }
            }
            let Some(agent) = &mut self.peers[peer].agent else {
                continue;
            };
            if agent
                .session
                .due()
                .is_some_and(|due| due <= crate::clock::monotonic())
            {
                jobs::owner(agent.owner);
                let ended = agent.session.tick();
                let _ = self.agent_did(peer, ended);
            }
        }
    }

    fn dial(&mut self, peer: usize) -> bool {
        let Some(life) = &mut self.life else {
            return false;
        };
        let (owner, driver) = &mut life.drivers[peer];
        if !driver.dials() {
            return false;
        }
        jobs::owner(*owner);
        if self.random.one_in(10) {
            driver.lost("nobody answers");
            self.note(&format!("mounted does not reach {peer}"));
        } else {
            let left = self.peers[peer].cut();
            self.leave(peer, left);
            self.peers[peer].link();
            let life = self.life.as_mut().unwrap();
            life.drivers[peer].1.connected();
            self.note(&format!("mounted reaches {peer}"));
        }
        self.pump(peer);
        true
    }

    /// An agent whose link was cut goes on with what it had received.
    fn older_goes_on(&mut self) -> Result<bool, String> {
        let taken = self.older.borrow_mut().pop();
        let Some((of, mut older)) = taken else {
            return Ok(false);
        };
        jobs::owner(older.agent.owner);
        let worked = jobs::work(older.agent.owner);
        let ended = match older.left.pop_front() {
            Some(message) => {
                self.note(&format!(
                    "{of}, cut off, goes on: {}",
                    peer::to_agent(&message)
                ));
                older.agent.session.message(message)
            }
            None => {
                self.note(&format!("{of}, cut off, ends"));
                Err(agent::Error::Disconnected)
            }
        };
        let ended = ended.and_then(|()| older.agent.session.notice().map(|_| ()));
        let _ = worked;
        match ended {
            Ok(()) => self.older.borrow_mut().push((of, older)),
            Err(error) => {
                jobs::forget(older.agent.owner);
                if !ended_well(&error) {
                    return Err(format!("the older session with {of} ended: {error}"));
                }
            }
        }
        Ok(true)
    }

    /// Cuts a link. The agent may have received some of what was on its way, and go on
    /// with that.
    fn cut(&mut self, peer: usize) -> bool {
        let there = &mut self.peers[peer];
        if !there.linked {
            return false;
        }
        let mut left = there.cut();
        left.truncate(self.random.below(left.len() + 1));
        self.leave(peer, left);
        if let Some(life) = &mut self.life {
            let (owner, driver) = &mut life.drivers[peer];
            jobs::owner(*owner);
            driver.lost("the link was cut");
        }
        self.note(&format!("the link to {peer} is cut"));
        self.pump(peer);
        true
    }

    /// Leaves an agent to itself, with what it has received.
    fn leave(&mut self, peer: usize, left: VecDeque<ToAgent>) {
        if let Some(agent) = self.peers[peer].agent.take() {
            let left = left
                .into_iter()
                .filter(|message| !matches!(message, ToAgent::Hello(_)))
                .collect();
            let older = Older { agent, left };
            self.older.borrow_mut().push((peer, older));
        }
    }

    // ---- kills ------------------------------------------------------------

    fn kill_agent(&mut self, peer: usize) {
        if let Some(agent) = self.peers[peer].agent.take() {
            jobs::forget(agent.owner);
            self.note(&format!("the agent of {peer} is killed"));
        }
        self.kill_older(peer);
    }

    fn kill_older(&mut self, peer: usize) {
        self.older.borrow_mut().retain(|(of, older)| {
            if *of == peer {
                jobs::forget(older.agent.owner);
            }
            *of != peer
        });
    }

    /// Kills the daemon. What was recorded and not committed may be lost.
    fn kill_daemon(&mut self) {
        let Some(life) = self.life.take() else { return };
        let database = mirrorfs_journal::DATABASE;
        let loses = self.random.one_in(2);
        let len = if loses { self.committed } else { None };
        if len.is_none() {
            drop(life.journal.snapshot());
        }
        let state = self.fresh_dir("state");
        copy_state(&self.mounted.state, &state, database, len);
        for (owner, _) in &life.drivers {
            jobs::forget(*owner);
        }
        drop(life);
        let old = std::mem::replace(&mut self.mounted.state, state);
        std::fs::remove_dir_all(old).unwrap();
        self.note(&format!("the daemon is killed, loses {loses}"));
        for peer in 0..self.peers.len() {
            let mut left = self.peers[peer].cut();
            left.truncate(self.random.below(left.len() + 1));
            self.leave(peer, left);
        }
        self.begin();
        self.note("the daemon starts");
    }

    fn fresh_dir(&mut self, name: &str) -> PathBuf {
        self.next_dir += 1;
        self.dir.path().join(format!("{name}{}", self.next_dir))
    }

    /// Puts what a driver has sent on its way, and notes how much of the journal is
    /// committed.
    fn pump(&mut self, peer: usize) {
        let Some(life) = &mut self.life else { return };
        let (_, driver) = &mut life.drivers[peer];
        while let Some(frame) = driver.frame() {
            self.peers[peer].sent(frame);
        }
        if !driver.holds_link() && self.peers[peer].linked {
            // It gave the link up.
            let left = self.peers[peer].cut();
            self.leave(peer, left);
        }
        let Some(life) = &self.life else { return };
        let status = life.journal.status();
        if status.committed == status.n {
            let database = mirrorfs_journal::DATABASE;
            self.committed = Some(log_len(&self.mounted.state, database));
        }
    }

    // ---- the end ----------------------------------------------------------

    /// Lets everything go on undisturbed until nothing is left to do.
    fn settle(&mut self) -> Result<(), String> {
        self.note("from here on everything goes well");
        self.fate.cut_every = usize::MAX;
        self.fate.kill_every = usize::MAX;
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
    fn nothing_is_lost(&mut self, midway: bool) -> Result<(), String> {
        let found = self.values(true, midway);
        let lost = self.ledger.borrow().lost(&found);
        if lost.is_empty() {
            return Ok(());
        }
        Err(format!("lost: {}", lost.join(", ")))
    }

    /// All values that exist anywhere.
    fn values(&self, trash: bool, staged: bool) -> HashSet<ContentHash> {
        let mut found = shown::values(&self.mounted.tree, trash, staged);
        for peer in &self.peers {
            found.extend(shown::values(&peer.root, trash, staged));
        }
        found
    }

    /// The sides show the same but for open conflicts.
    fn sides_agree(&self) -> Result<(), String> {
        let life = self.life.as_ref().unwrap();
        let conflicts = life.journal.snapshot().unwrap().conflicts().unwrap();
        let snapshot = life.journal.snapshot().unwrap();
        let mut mounted = shown::tree(&self.mounted.tree);
        // What is known as an artefact stays here, also where a kill came between the
        // placing of it and its record.
        let placing = crate::replicator::placing(&snapshot).unwrap();
        mounted.retain(|path, _| {
            let node = snapshot.at(path).unwrap();
            !placing.contains(path) && !node.is_some_and(|node| node.artefact)
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
    let paths: std::collections::BTreeSet<&RelPath> = mounted.keys().chain(there.keys()).collect();
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
