//! Worlds in which things happen in an order that is written down, with one thing that comes
//! in between any two steps.

use super::{Fate, World, run_as};
use crate::sim::hands::{Hands, Mounted, Plain};
use crate::sim::{clock, shown};
use crate::tree::{RelPath, Timestamp};

const QUIET: Fate = Fate {
    steps: 0,
    peers: 1,
    cut_every: usize::MAX,
    kill_every: usize::MAX,
    turn_back_every: usize::MAX,
};
/// More steps than any of these worlds takes until it has come to rest.
const MANY: usize = 60;

impl World {
    fn mounted_hands(&self) -> Mounted {
        Mounted {
            root: self.mounted.tree.clone(),
            filesystem: self.life.as_ref().unwrap().filesystem.clone(),
        }
    }

    /// Does the next thing that there is to do; lets time go by if there is nothing.
    fn go_a_step(&mut self) -> Result<(), String> {
        let last = self.life.as_ref().unwrap().journal.recorder().last();
        let told = self.life.as_ref().unwrap().told;
        let any = (last != told && self.wake(0))
            || self.dial(0)
            || self.work(0)
            || self.deliver_to_agent(0)?
            || self.agent_notices(0)?
            || self.deliver_to_mount(0);
        if !any {
            let by = self.next_deadline().unwrap_or_default();
            clock::advance(by);
            self.time();
        }
        Ok(())
    }
}

fn now() -> Timestamp {
    clock::advance(std::time::Duration::from_millis(1));
    crate::clock::wall()
}

/// A file is written over there, and its mode is changed here: each side has something that
/// the other has not. Before the content is put into place here, the mode is changed back,
/// so that the content has to wait; but over there the first mode has been set. With that
/// this side looks as it did before both, and what is over there is not to be forgotten.
/// (Which of the two modes is left depends on the moment.)
#[test]
fn a_mode_that_is_changed_twice_does_not_undo_what_a_peer_wrote() {
    let path = RelPath::new("a").unwrap();
    for n in 0..MANY {
        let path = path.clone();
        let run = run_as(7, &QUIET, move |world| {
            world.begin();
            let mut there = Plain(world.peers[0].root.clone());
            there.create(&path, b"first");
            there.touch(&path, now());
            world.settle()?;
            there.overwrite(&path, b"written there");
            there.touch(&path, now());
            world.mounted_hands().chmod(&path, 0o600);
            for _ in 0..n {
                world.go_a_step()?;
            }
            world.mounted_hands().chmod(&path, 0o644);
            world.settle()?;
            world.sides_agree()?;
            let here = shown::at(&world.mounted.tree.join("a"));
            let value = here.as_ref().and_then(shown::Shown::value);
            (value == Some(crate::tree::ContentHash::of(b"written there")))
                .then_some(())
                .ok_or_else(|| format!("a is {here:?}"))
        });
        assert_eq!(run.wrong, None, "after {n} steps: {:#?}", run.tail);
    }
}
