//! A world: a mounted side, its peers, users, links and what befalls them, all from one
//! seed.

mod copies;
mod ending;
mod kills;
mod links;
mod scripts;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use self::copies::Backup;
use super::hands::{self, Plain};
use super::jobs::Owner;
use super::ledger::Ledger;
use super::mounted::{Life, Place, log_len};
use super::peer::{Older, Peer};
use super::random::Random;
use super::{clock, hook, jobs, shown};
use crate::tree::{ContentHash, Id, MirrorId};

/// What may befall a world.
#[derive(Clone, Debug)]
pub(crate) struct Fate {
    /// How many steps are made before everything is let settle.
    pub(crate) steps: usize,
    pub(crate) peers: usize,
    /// How often a link is cut, a process killed, in steps.
    pub(crate) cut_every: usize,
    pub(crate) kill_every: usize,
    /// How often a side is copied, or brought back from a copy of it.
    pub(crate) turn_back_every: usize,
}

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
    backups: Vec<Backup>,
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
    run_as(seed, fate, World::live)
}

/// Runs a world in which happens what `live` says.
fn run_as(
    seed: u64,
    fate: &Fate,
    live: impl FnOnce(&mut World) -> Result<(), String> + std::panic::UnwindSafe,
) -> Run {
    clock::start();
    jobs::start();
    let world = std::panic::catch_unwind(|| {
        let mut world = World::new(seed, fate);
        let wrong = live(&mut world).err();
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
            backups: Vec::new(),
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
        if self.random.one_in(self.fate.turn_back_every) {
            return self.turn_back();
        }
        loop {
            let peer = self.random.below(self.peers.len());
            let done = match self
                .random
                .weighted(&[6, 5, 20, 20, 20, 14, 8, 6, 10, 6, 1])
            {
                0 => self.edit_mounted(),
                1 => self.edit_peer(peer),
                2 => self.work(peer),
                3 => self.deliver_to_agent(peer)?,
                4 => self.deliver_to_mount(peer),
                5 => self.agent_notices(peer)?,
                6 => self.wake(peer),
                7 => self.time(),
                8 => self.dial(peer),
                9 => self.older_goes_on()?,
                _ => self.secure(),
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

    /// Lower is synced and marked, as the daemon does every few seconds.
    fn secure(&mut self) -> bool {
        let Some(life) = &mut self.life else {
            return false;
        };
        life.secure();
        self.note("mounted syncs lower");
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
}
