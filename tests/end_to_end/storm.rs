//! A kill storm: programs work on both sides of a mirror behind sshd, each with a record of
//! its own of what was acknowledged, while daemon, agent and connection are ended at random.
//! "Zero lost, zero torn, zero overwritten unseen."

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::crash::{Model, assert_acknowledged, contents, work};
use crate::support::{
    PROMPT, Random, Role, Sandbox, Server, compare, eventually, rounds, wait_until,
};

/// After so many kills everything has to be on both sides.
const SPELL: u32 = 25;

/// How many files both sides save to in a spell.
const SHARED: u64 = 6;

/// What is ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Victim {
    Daemon,
    Agent,
    Connection,
    /// Whatever runs, on both sides.
    Everything,
}

impl Victim {
    const ALL: [Self; 4] = [
        Self::Daemon,
        Self::Agent,
        Self::Connection,
        Self::Everything,
    ];

    fn any(random: &mut Random) -> Self {
        Self::ALL[usize::try_from(random.below(4)).unwrap()]
    }

    /// Whether the mount dies with it.
    fn takes_the_mount(self) -> bool {
        matches!(self, Self::Daemon | Self::Everything)
    }

    fn end(self, sandbox: &Sandbox, server: &Server) {
        match self {
            Self::Daemon => sandbox.kill_daemon(),
            Self::Agent => sandbox.kill_agents(),
            Self::Connection => server.link.reset(),
            Self::Everything => {
                let all = sandbox.processes();
                assert!(all.iter().any(|process| process.role == Role::Daemon));
                for process in &all {
                    process.kill();
                }
                wait_until("all are gone", PROMPT, || {
                    all.iter().all(|process| !process.alive())
                });
            }
        }
    }
}

/// One side's saves to files that the other side saves to as well. Each adds a line to what
/// the file held, and what it took the place of is kept until every line of it is known to
/// be in the new content. So no line may ever be missing, whoever saved what and when.
struct Saver {
    side: &'static str,
    /// The lines of which the save was acknowledged.
    saved: Mutex<BTreeSet<String>>,
}

impl Saver {
    fn new(side: &'static str) -> Self {
        Self {
            side,
            saved: Mutex::default(),
        }
    }

    /// Saves until told to stop, or until the mount is dead.
    fn work(&self, dir: &Path, random: &mut Random, go_on: &AtomicBool) {
        while go_on.load(Ordering::Relaxed) {
            if self.save(dir, random).is_err() {
                return;
            }
            // Without a pause there would be little else than these saves.
            std::thread::sleep(Duration::from_millis(random.between(1, 20)));
        }
    }

    fn save(&self, dir: &Path, random: &mut Random) -> io::Result<()> {
        let file = dir.join(format!("f{}", random.below(SHARED)));
        let line = line(self.side, random.next());
        let new = dir.join(format!("new-{}", line.replace(' ', "-")));
        let content = match fs::read_to_string(&file) {
            Ok(content) => content + &line + "\n",
            Err(error) if error.kind() == io::ErrorKind::NotFound => format!("{line}\n"),
            Err(error) => return Err(error),
        };
        fs::write(&new, &content)?;
        match renameat_with(CWD, &new, CWD, &file, RenameFlags::EXCHANGE) {
            Ok(()) => {
                let before = fs::read_to_string(&new)?;
                let whole: BTreeSet<&str> = content.lines().collect();
                if before.lines().all(|line| whole.contains(line)) {
                    fs::remove_file(&new)?;
                }
            }
            // Nobody has made the file yet, or somebody does so now.
            Err(rustix::io::Errno::NOENT) => {
                match renameat_with(CWD, &new, CWD, &file, RenameFlags::NOREPLACE) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.saved.lock().unwrap().insert(line);
        Ok(())
    }
}

/// A line that tells whether it is whole.
fn line(side: &str, value: u64) -> String {
    format!(
        "{side} {value:016x} {:016x}",
        value.rotate_left(21) ^ 0x5bd1
    )
}

fn is_whole(text: &str) -> bool {
    let fields: Vec<&str> = text.split(' ').collect();
    let [side, value, _] = fields[..] else {
        return false;
    };
    u64::from_str_radix(value, 16).is_ok_and(|value| text == line(side, value))
}

/// Collects the lines of the shared files in a directory and of the conflict copies of them.
/// Fails if one of the files is torn.
#[track_caller]
fn collect(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            collect(&path, found);
        } else if !name.ends_with(".conflict-info") {
            let text = fs::read_to_string(&path).unwrap();
            let torn = text.lines().find(|line| !is_whole(line));
            assert!(
                torn.is_none() && (text.is_empty() || text.ends_with('\n')),
                "{} is torn at {torn:?}",
                path.display()
            );
            found.extend(text.lines().map(str::to_owned));
        }
    }
}

/// What works on a mirror, and what it has done.
struct Storm<'a> {
    sandbox: &'a Sandbox,
    url: String,
    /// What single calls have made of a directory that only this side changes.
    here: Mutex<Model>,
    there: Mutex<Model>,
    savers: [Saver; 2],
    calls: AtomicUsize,
}

impl Storm<'_> {
    /// Lets everybody work for a while on both sides, and then ends something.
    fn blow(&self, shared: &str, victim: Victim, random: &mut Random, end: impl FnOnce()) {
        let (tree, peer) = (self.sandbox.tree(), self.sandbox.peer());
        let go_on = AtomicBool::new(true);
        let mut seeds = [(); 4].map(|()| Random::of(random.next()));
        let [one, two, three, four] = &mut seeds;
        let calls = || {
            self.calls.fetch_add(1, Ordering::Relaxed);
            go_on.load(Ordering::Relaxed)
        };
        let pause = Duration::from_millis(random.between(1, 600));
        let doubt = std::thread::scope(|scope| {
            let here = scope.spawn(|| work(one, &tree.join("here"), &self.here, calls));
            let there = scope.spawn(|| {
                work(two, &peer.join("there"), &self.there, || {
                    // A directory that is watched and not mounted: no more than can be told.
                    std::thread::sleep(Duration::from_millis(1));
                    calls()
                })
            });
            scope.spawn(|| self.savers[0].work(&tree.join(shared), three, &go_on));
            scope.spawn(|| self.savers[1].work(&peer.join(shared), four, &go_on));
            std::thread::sleep(pause);
            end();
            go_on.store(false, Ordering::Relaxed);
            assert!(there.join().unwrap().is_none(), "the disk failed");
            here.join().unwrap()
        });
        if victim.takes_the_mount() {
            self.sandbox.mount_with(&self.url);
        } else {
            assert!(doubt.is_none(), "the mount failed with {victim:?}");
        }
        let mut here = self.here.lock().unwrap();
        *here = assert_acknowledged(&tree.join("here"), &here, doubt.as_ref());
    }

    /// Fails unless both sides have all that either has done, but for what is in conflict.
    fn settle(&self) {
        let (tree, peer) = (self.sandbox.tree(), self.sandbox.peer());
        let outcome = self.sandbox.try_flush();
        assert!([0, 3].contains(&outcome.code), "{outcome}");
        for dir in ["here", "there"] {
            eventually("both sides have the same", PROMPT, || {
                compare::compare(&tree.join(dir), &peer.join(dir))
            });
        }
        assert_eq!(contents(&peer.join("here")), *self.here.lock().unwrap());
        assert_eq!(contents(&tree.join("there")), *self.there.lock().unwrap());
    }
}

/// Two hundred kills, and more under `./test --long`.
#[test]
fn nothing_is_lost_in_a_kill_storm() {
    let mut random = Random::new("storm");
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let dirs = "mkdir -p here/d0 here/d1 here/d2 here/d3 there/d0 there/d1 there/d2 there/d3";
    sandbox.sh(&tree, dirs);
    let storm = Storm {
        sandbox: &sandbox,
        url: server.url(&peer),
        here: Mutex::default(),
        there: Mutex::default(),
        savers: [Saver::new("here"), Saver::new("there")],
        calls: AtomicUsize::new(0),
    };
    sandbox.mount_with(&storm.url);
    sandbox.flush();

    let kills = rounds(200, 2_000);
    let mut ended = std::collections::BTreeMap::<Victim, u32>::new();
    let mut shared: Vec<PathBuf> = Vec::new();
    for kill in 0..kills {
        let dir = format!("shared/{}", kill / SPELL);
        if kill % SPELL == 0 {
            fs::create_dir_all(tree.join(&dir)).unwrap();
            sandbox.try_flush();
            assert!(peer.join(&dir).is_dir());
            shared.push(dir.clone().into());
        }
        let victim = Victim::any(&mut random);
        *ended.entry(victim).or_default() += 1;
        storm.blow(&dir, victim, &mut random, || victim.end(&sandbox, &server));
        if (kill + 1) % SPELL == 0 {
            storm.settle();
        }
    }
    storm.settle();
    let conflicts = sandbox.status().conflicts.len();
    sandbox.try_umount();
    sandbox.assert_down();

    // The peer keeps the mounted side's version of what is in conflict, too.
    let mut found = BTreeSet::new();
    for root in [&tree, &peer] {
        collect(&root.join("shared"), &mut found);
    }
    let mut lost = BTreeSet::new();
    let mut saves = 0;
    for saver in &storm.savers {
        let saved = saver.saved.lock().unwrap();
        saves += saved.len();
        lost.extend(saved.difference(&found).cloned());
    }
    eprintln!(
        "{kills} kills {ended:?}; {} calls, {saves} saves to shared files, {conflicts} \
         conflicts; lost {}, torn 0",
        storm.calls.load(Ordering::Relaxed),
        lost.len()
    );
    assert!(lost.is_empty(), "lost: {lost:#?}");
    assert!(conflicts > 0, "nobody was in anybody's way");
}
