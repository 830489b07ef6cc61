//! Worlds in which things happen in an order that is written down, with one thing that comes
//! in between any two steps.

use std::os::unix::fs::DirEntryExt;

use super::copies::{Part, Side};
use super::{Fate, World, run_as};
use crate::replica::sync;
use crate::sim::hands::{Hands, Mounted, Plain};
use crate::sim::{clock, shown};
use crate::tree::{ContentHash, RelPath, Timestamp};

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
/// this side looks as it did before both, and what is over there is not to be forgotten; nor
/// is the second mode, which is the last that anybody has set.
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
            let expected = shown::Shown::File {
                hash: ContentHash::of(b"written there"),
                mode: 0o644,
            };
            (here == Some(expected))
                .then_some(())
                .ok_or_else(|| format!("a is {here:?}"))
        });
        assert_eq!(run.wrong, None, "after {n} steps: {:#?}", run.tail);
    }
}

/// What both sides have at a path once everything has come to rest.
fn ends_with(world: &mut World, path: &RelPath, contents: &[&[u8]]) -> Result<(), String> {
    world.settle()?;
    world.sides_agree()?;
    let here = shown::at(&world.mounted.tree.join(path.as_os_path()));
    let value = here.as_ref().and_then(shown::Shown::value);
    let mut expected = contents.iter().map(|content| ContentHash::of(content));
    expected
        .any(|expected| value == Some(expected))
        .then_some(())
        .ok_or_else(|| format!("{path} is {here:?}"))
}

/// A file is written over there, and another one is removed. At any moment of the way of that
/// their directory is moved here, so that one round may take in both, or find the directory
/// gone from where it was. What was seen of the files names their old place, and nothing is
/// looked for there afterwards; and nobody here has written or removed anything.
#[test]
fn what_is_written_in_a_directory_that_is_moved_is_there_once() {
    let path = |text: &str| RelPath::new(text).unwrap();
    for n in 0..MANY {
        let run = run_as(17, &QUIET, move |world| {
            world.begin();
            let mut there = Plain(world.peers[0].root.clone());
            there.make_dir(&path("dir"));
            there.create(&path("dir/file"), b"first");
            there.touch(&path("dir/file"), now());
            there.create(&path("dir/other"), b"other");
            there.touch(&path("dir/other"), now());
            world.settle()?;
            there.remove(&path("dir/other"));
            there.overwrite(&path("dir/file"), b"written there");
            there.touch(&path("dir/file"), now());
            for _ in 0..n {
                world.go_a_step()?;
            }
            world.mounted_hands().rename(&path("dir"), &path("moved"));
            world.settle()?;
            // Whoever makes a directory of that name anew finds nothing in it.
            world.mounted_hands().make_dir(&path("dir"));
            ends_with(world, &path("moved/file"), &[b"written there"])?;
            let mut names = Vec::new();
            for dir in ["dir", "moved"] {
                let below = std::fs::read_dir(world.mounted.tree.join(dir)).unwrap();
                names.extend(below.flatten().map(|name| name.path()));
            }
            (names == [world.mounted.tree.join("moved/file")])
                .then_some(())
                .ok_or_else(|| format!("there is {names:?}"))
        });
        assert_eq!(run.wrong, None, "after {n} steps: {:#?}", run.tail);
    }
}

/// A file is written on one side, and at any moment of the way of that change, and some time
/// after it, the tree of one side alone is brought back to before it: so that it may be
/// reported, brought in, proposed, agreed on, put into place, and not yet in the mark that is
/// written after a sync. The older version is not taken for an edit: where the other side has
/// the newer one, that is what comes back.
fn brought_back(written: Side, back: Side) {
    let path = RelPath::new("a").unwrap();
    let (first, second) = (&b"first"[..], &b"second"[..]);
    for n in 0..MANY {
        let path = path.clone();
        let run = run_as(11, &QUIET, move |world| {
            world.begin();
            let roots = [world.mounted.tree.clone(), world.peers[0].root.clone()];
            let writes = |world: &mut World, content: &[u8]| {
                let mut hands: Box<dyn Hands> = match written {
                    Side::Mounted => Box::new(world.mounted_hands()),
                    Side::Peer(_) => Box::new(Plain(roots[1].clone())),
                };
                match hands.root().join("a").exists() {
                    true => hands.overwrite(&path, content),
                    false => hands.create(&path, content),
                }
                hands.touch(&path, now());
            };
            writes(world, first);
            world.settle()?;
            world.life.as_mut().unwrap().secure();
            let backup = world.back_up(back).unwrap();
            writes(world, second);
            for _ in 0..n {
                world.go_a_step()?;
            }
            let other = match back {
                Side::Mounted => &roots[1],
                Side::Peer(_) => &roots[0],
            };
            let known = std::fs::read(other.join("a")).unwrap();
            world.restore(&backup, Part::Tree)?;
            // What only the tree had that was brought back is gone with it, unless it comes
            // to the other side in the meantime.
            let may_end: &[&[u8]] = if known == second {
                &[second]
            } else {
                &[first, second]
            };
            ends_with(world, &path, may_end)
        });
        assert_eq!(run.wrong, None, "after {n} steps: {:#?}", run.tail);
    }
}

#[test]
fn a_mounted_tree_brought_back_does_not_undo_what_a_peer_wrote() {
    brought_back(Side::Peer(0), Side::Mounted);
}

#[test]
fn a_mounted_tree_brought_back_does_not_undo_what_was_written_in_it() {
    brought_back(Side::Mounted, Side::Mounted);
}

#[test]
fn a_peer_brought_back_does_not_undo_what_was_written_in_the_mount() {
    brought_back(Side::Mounted, Side::Peer(0));
}

#[test]
fn a_peer_brought_back_does_not_undo_what_was_written_there() {
    brought_back(Side::Peer(0), Side::Peer(0));
}

/// Both sides write a file, and what is put beside it of that conflict is durable before it
/// has its name: what a power loss left of it would count as somebody's edit, and travel.
#[test]
fn what_is_kept_of_a_conflict_was_synced_before() {
    let path = RelPath::new("a").unwrap();
    let run = run_as(13, &QUIET, move |world| {
        world.begin();
        let mut there = Plain(world.peers[0].root.clone());
        there.create(&path, b"first");
        there.touch(&path, now());
        world.settle()?;
        sync::seen::take();
        there.overwrite(&path, b"written there");
        there.touch(&path, now());
        world.mounted_hands().overwrite(&path, b"written here");
        world.settle()?;
        let synced = sync::seen::take();
        let names = std::fs::read_dir(&world.mounted.tree).unwrap().flatten();
        let kept = names.filter(|name| name.file_name().to_string_lossy().contains("conflict"));
        let kept: Vec<_> = kept.map(|name| (name.ino(), name.path())).collect();
        if kept.len() != 2 {
            return Err(format!("a copy and what it says of it: {kept:?}"));
        }
        match kept.iter().find(|(ino, _)| !synced.contains(ino)) {
            Some((_, path)) => Err(format!("{} was not synced", path.display())),
            None => Ok(()),
        }
    });
    assert_eq!(run.wrong, None, "{:#?}", run.tail);
}
