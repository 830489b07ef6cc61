//! Processes that are killed.

use std::path::PathBuf;

use super::World;
use crate::sim::jobs;
use crate::sim::mounted::copy_state;

impl World {
    pub(super) fn kill_agent(&mut self, peer: usize) {
        if let Some(agent) = self.peers[peer].agent.take() {
            jobs::forget(agent.owner);
            self.note(&format!("the agent of {peer} is killed"));
        }
        self.kill_older(peer);
    }

    pub(super) fn kill_older(&mut self, peer: usize) {
        self.older.borrow_mut().retain(|(of, older)| {
            if *of == peer {
                jobs::forget(older.agent.owner);
            }
            *of != peer
        });
    }

    /// Kills the daemon, and starts another.
    pub(super) fn kill_daemon(&mut self) {
        self.stop_daemon();
        self.begin();
        self.note("the daemon starts");
    }

    /// Kills the daemon. What was recorded and not committed may be lost.
    pub(super) fn stop_daemon(&mut self) {
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
    }

    pub(super) fn fresh_dir(&mut self, name: &str) -> PathBuf {
        self.next_dir += 1;
        self.dir.path().join(format!("{name}{}", self.next_dir))
    }
}
