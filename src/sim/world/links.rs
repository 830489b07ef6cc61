//! What goes over the links, and what becomes of it at either end.

use std::collections::VecDeque;
use std::rc::Rc;

use super::World;
use crate::agent::{self, Stepped};
use crate::sim::hands::{self, Plain};
use crate::sim::mounted::log_len;
use crate::sim::peer::{self, Agent, Older, ended_well};
use crate::sim::random::Random;
use crate::sim::{hook, jobs};
use crate::wire::message::{ToAgent, ToMount};

impl World {
    pub(super) fn deliver_to_agent(&mut self, peer: usize) -> Result<bool, String> {
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
    pub(super) fn agent_did(
        &mut self,
        peer: usize,
        ended: Result<(), agent::Error>,
    ) -> Result<(), String> {
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

    pub(super) fn deliver_to_mount(&mut self, peer: usize) -> bool {
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

    pub(super) fn agent_notices(&mut self, peer: usize) -> Result<bool, String> {
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

    pub(super) fn dial(&mut self, peer: usize) -> bool {
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
    pub(super) fn older_goes_on(&mut self) -> Result<bool, String> {
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
    pub(super) fn cut(&mut self, peer: usize) -> bool {
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
    pub(super) fn leave(&mut self, peer: usize, left: VecDeque<ToAgent>) {
        if let Some(agent) = self.peers[peer].agent.take() {
            let left = left
                .into_iter()
                .filter(|message| !matches!(message, ToAgent::Hello(_)))
                .collect();
            let older = Older { agent, left };
            self.older.borrow_mut().push((peer, older));
        }
    }

    /// Puts what a driver has sent on its way, and notes how much of the journal is
    /// committed.
    pub(super) fn pump(&mut self, peer: usize) {
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
}
