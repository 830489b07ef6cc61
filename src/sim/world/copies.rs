//! Copies that are taken of a side, as a snapshot or a backup is, and brought back later.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::World;
use crate::sim::mounted::copy_state;

/// Whose copy it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Mounted,
    Peer(usize),
}

/// A side as it was at a moment.
pub(super) struct Backup {
    side: Side,
    tree: PathBuf,
    state: PathBuf,
}

/// What of a side is of another time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Tree,
    State,
    Both,
    /// The state is deleted.
    Lost,
}

impl World {
    /// Takes a copy of a side, or brings one back. Each copy is brought back once.
    pub(super) fn turn_back(&mut self) -> Result<(), String> {
        let side = match self.random.below(self.peers.len() + 1) {
            0 => Side::Mounted,
            peer => Side::Peer(peer - 1),
        };
        let found = self.backups.iter().position(|backup| backup.side == side);
        match found {
            Some(at) => {
                let backup = self.backups.remove(at);
                let parts = [Part::Tree, Part::State, Part::Both, Part::Lost];
                let part = *self.random.pick(&parts);
                self.restore(&backup, part)
            }
            None => {
                let copied = self.back_up(side);
                self.backups.extend(copied);
                Ok(())
            }
        }
    }

    /// Takes a copy of a side, if there is anything to copy.
    pub(super) fn back_up(&mut self, side: Side) -> Option<Backup> {
        let (tree, state) = (self.fresh_dir("tree-copy"), self.fresh_dir("state-copy"));
        match side {
            Side::Mounted => {
                let life = self.life.as_ref()?;
                // All that was recorded is in the files.
                drop(life.journal.snapshot());
                copy_state(
                    &self.mounted.state,
                    &state,
                    mirrorfs_journal::DATABASE,
                    None,
                );
                copy(&self.mounted.tree, &tree);
            }
            Side::Peer(peer) => {
                let there = &self.peers[peer];
                if !there.root.join(".mirrorfs/identity").exists() {
                    return None;
                }
                copy(&there.root, &tree);
                copy(&there.state, &state);
            }
        }
        self.note(&format!("{side:?} is copied"));
        Some(Backup { side, tree, state })
    }

    /// Brings a side back, or part of it. What only the tree had is gone with it.
    pub(super) fn restore(&mut self, backup: &Backup, part: Part) -> Result<(), String> {
        match backup.side {
            Side::Mounted => self.stop_daemon(),
            Side::Peer(peer) => self.kill_agent(peer),
        }
        self.nothing_is_lost(true)?;
        let (tree, state) = match backup.side {
            Side::Mounted => (self.mounted.tree.clone(), self.mounted.state.clone()),
            Side::Peer(peer) => {
                let there = &self.peers[peer];
                (there.root.clone(), there.state.clone())
            }
        };
        if matches!(part, Part::Tree | Part::Both) {
            fs::remove_dir_all(&tree).unwrap();
            fs::rename(&backup.tree, &tree).unwrap();
        }
        if part != Part::Tree {
            fs::remove_dir_all(&state).unwrap();
            fs::create_dir(&state).unwrap();
        }
        if matches!(part, Part::State | Part::Both) {
            copy(&backup.state, &state);
        }
        let left = self.values(true, false);
        self.ledger.borrow_mut().taken_away(&left);
        self.note(&format!("{part:?} of {:?} is brought back", backup.side));
        if backup.side == Side::Mounted {
            self.begin();
            self.note("the daemon starts");
        }
        Ok(())
    }
}

/// Copies a directory with everything in it, times and modes included, into one that is
/// empty or not there.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let copied = Command::new("cp")
        .args(["-a", "--"])
        .arg(from.join("."))
        .arg(to)
        .status();
    assert!(
        copied.unwrap().success(),
        "{} is not copied",
        from.display()
    );
    for file in fs::read_dir(to).unwrap().flatten() {
        // The memory that processes share on a database belongs to no copy.
        if file.file_name().to_string_lossy().ends_with("-shm") {
            fs::remove_file(file.path()).unwrap();
        }
    }
}
