//! "The daemon killed with SIGKILL at any moment: `mirrorfs mount` again recovers, and
//! nothing written before the kill is missing on the peer after the next flush." (L0)

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::first_contact::PROJECT;
use crate::support::{PROMPT, Random, Role, Sandbox, Server, assert_same, rounds, wait_until};

/// What a writer did to a tree, one system call each.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Create(String),
    Write(String, u64, Vec<u8>),
    Truncate(String, u64),
    Rename(String, String),
    Remove(String),
}

/// What the files of a tree hold.
pub(crate) type Model = BTreeMap<String, Vec<u8>>;

impl Step {
    /// A step that makes sense in a tree like this.
    fn any(random: &mut Random, model: &Model) -> Self {
        let name = format!("d{}/f{}", random.below(4), random.below(40));
        let pick = random.below(model.len().max(1) as u64);
        let known = model.keys().nth(usize::try_from(pick).unwrap()).cloned();
        match (random.below(10), known) {
            (0..=2, _) | (_, None) => Self::Create(name),
            (3..=6, Some(name)) => {
                let size = model[&name].len() as u64;
                let count = usize::try_from(random.between(1, 9000)).unwrap();
                Self::Write(name, random.below(size + 1), random.bytes(count))
            }
            (7, Some(name)) => {
                let size = model[&name].len() as u64;
                Self::Truncate(name, random.below(size + 100))
            }
            (8, Some(from)) => Self::Rename(from, name),
            (_, Some(name)) => Self::Remove(name),
        }
    }

    fn apply_to(&self, model: &mut Model) {
        match self {
            Self::Create(name) => {
                model.insert(name.clone(), Vec::new());
            }
            Self::Write(name, offset, bytes) => {
                let content = model.get_mut(name).unwrap();
                let (start, end) = (
                    usize::try_from(*offset).unwrap(),
                    usize::try_from(*offset).unwrap() + bytes.len(),
                );
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[start..end].copy_from_slice(bytes);
            }
            Self::Truncate(name, size) => {
                let size = usize::try_from(*size).unwrap();
                model.get_mut(name).unwrap().resize(size, 0);
            }
            Self::Rename(from, to) => {
                let content = model.remove(from).unwrap();
                model.insert(to.clone(), content);
            }
            Self::Remove(name) => {
                model.remove(name);
            }
        }
    }

    /// Carries the step out. A write may be cut short by the end of the daemon: then what
    /// is left of it is given back.
    fn apply_in(&self, root: &Path) -> io::Result<Option<Self>> {
        match self {
            Self::Create(name) => File::create(root.join(name)).map(drop),
            Self::Write(name, offset, bytes) => {
                let file = File::options().write(true).open(root.join(name))?;
                let written = file.write_at(bytes, *offset)?;
                let rest = bytes[written..].to_vec();
                let rest = Self::Write(name.clone(), offset + written as u64, rest);
                return Ok((written < bytes.len()).then_some(rest));
            }
            Self::Truncate(name, size) => File::options()
                .write(true)
                .open(root.join(name))?
                .set_len(*size),
            Self::Rename(from, to) => fs::rename(root.join(from), root.join(to)),
            Self::Remove(name) => fs::remove_file(root.join(name)),
        }
        .map(|()| None)
    }
}

/// Works until told to stop, or until the mount dies. The model has what was acknowledged;
/// gives the step in doubt.
pub(crate) fn work(
    random: &mut Random,
    root: &Path,
    model: &Mutex<Model>,
    go_on: impl Fn() -> bool,
) -> Option<Step> {
    while go_on() {
        let step = Step::any(random, &model.lock().unwrap());
        match step.apply_in(root) {
            Ok(None) => step.apply_to(&mut model.lock().unwrap()),
            Ok(Some(rest)) => {
                let (Step::Write(name, offset, bytes), Step::Write(_, _, left)) = (step, &rest)
                else {
                    unreachable!("only writes can be short")
                };
                let done = bytes[..bytes.len() - left.len()].to_vec();
                Step::Write(name, offset, done).apply_to(&mut model.lock().unwrap());
                return Some(rest);
            }
            Err(error) => {
                eprintln!("the writer stops at {}: {error}", brief(&step));
                return Some(step);
            }
        }
    }
    None
}

fn brief(step: &Step) -> String {
    let mut text = format!("{step:?}");
    text.truncate(60);
    text
}

pub(crate) fn contents(root: &Path) -> Model {
    let mut model = Model::new();
    for dir in 0..4 {
        let dir = format!("d{dir}");
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{dir}/{}", entry.file_name().to_str().unwrap());
            model.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    model
}

/// Fails unless the tree holds what was acknowledged, with the step in doubt done or not.
/// Gives what it holds.
#[track_caller]
pub(crate) fn assert_acknowledged(
    root: &Path,
    acknowledged: &Model,
    doubt: Option<&Step>,
) -> Model {
    let found = contents(root);
    if found == *acknowledged {
        return found;
    }
    // A call that was under way may have taken effect or not; a write, in part.
    let outcomes = match doubt {
        Some(Step::Write(name, offset, bytes)) => (1..=bytes.len())
            .map(|len| Step::Write(name.clone(), *offset, bytes[..len].to_vec()))
            .collect(),
        Some(step) => vec![step.clone()],
        None => Vec::new(),
    };
    for step in outcomes {
        let mut after = acknowledged.clone();
        step.apply_to(&mut after);
        if found == after {
            return found;
        }
    }
    for (name, content) in acknowledged {
        match found.get(name) {
            None => eprintln!("missing: {name}"),
            Some(there) if there != content => {
                eprintln!("{name}: {} bytes, expected {}", there.len(), content.len());
            }
            _ => {}
        }
    }
    for name in found
        .keys()
        .filter(|name| !acknowledged.contains_key(*name))
    {
        eprintln!("unexpected: {name}");
    }
    panic!(
        "{} does not hold what was acknowledged; in doubt: {}",
        root.display(),
        doubt.map_or_else(String::new, brief)
    );
}

/// Kills the daemon at random moments under a writer, several rounds on one tree.
fn kill_under_a_writer(sandbox: &Sandbox, peer: &str, count: u32) {
    let mut random = Random::new("kill_under_a_writer");
    sandbox.sh(&sandbox.tree(), "mkdir d0 d1 d2 d3");
    let model = Mutex::new(Model::new());
    sandbox.mount_with(peer);
    for round in 1..=count {
        let pause = Duration::from_millis(random.between(1, 1500));
        eprintln!("round {round}: the kill comes after {pause:?}");
        let tree = sandbox.tree();
        let mut writers = Random::new(&format!("writer {round}"));
        let doubt = std::thread::scope(|scope| {
            let writer = scope.spawn(|| work(&mut writers, &tree, &model, || true));
            std::thread::sleep(pause);
            sandbox.kill_daemon();
            writer.join().unwrap()
        });
        // "A dead daemon must leave ENOTCONN, not an empty directory."
        let error = File::create(tree.join("late")).expect_err("a dead daemon's mount works");
        // The others come first, while the kernel takes down what the daemon had.
        let told = [libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED].map(Some);
        assert!(told.contains(&error.raw_os_error()), "{error}");
        sandbox.mount_with(peer);
        let acknowledged = model.lock().unwrap().clone();
        let found = assert_acknowledged(&tree, &acknowledged, doubt.as_ref());
        sandbox.flush();
        assert_same(&tree, &sandbox.peer());
        assert_eq!(contents(&sandbox.peer()), found);
        *model.lock().unwrap() = found;
        assert!(sandbox.status().conflicts.is_empty());
    }
    sandbox.umount();
    assert_eq!(contents(&sandbox.tree()), *model.lock().unwrap());
}

/// L0 with a directory on this machine as the peer.
#[test]
fn a_killed_daemon_loses_no_acknowledged_write() {
    let sandbox = Sandbox::new();
    let peer = sandbox.peer().display().to_string();
    kill_under_a_writer(&sandbox, &peer, rounds(6, 60));
}

/// L0 with a peer behind sshd, whose agent outlives the daemon for a while.
#[test]
fn a_killed_daemon_with_a_peer_behind_ssh_loses_nothing() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let peer = server.url(&sandbox.peer());
    kill_under_a_writer(&sandbox, &peer, rounds(3, 30));
}

/// Killed while the first contact fills a peer, again and again: it ends filled, with no
/// conflict made out of its own half-done work.
#[test]
fn killed_again_and_again_during_first_contact() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.sh(
        &sandbox.tree(),
        "for i in $(seq 600); do mkdir -p m/$((i%20)); head -c 6000 /dev/urandom >m/$((i%20))/$i; done",
    );
    let mut random = Random::new("first contact");
    for _ in 0..rounds(5, 30) {
        sandbox.mount();
        std::thread::sleep(Duration::from_millis(random.below(600)));
        sandbox.kill_daemon();
    }
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.status().conflicts.is_empty());
}

/// Killed while the peer's tree is being taken in: nothing of it is taken for an edit or
/// a deletion.
#[test]
fn killed_again_and_again_while_a_tree_comes_in() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.peer(),
        "for i in $(seq 600); do mkdir -p m/$((i%20)); head -c 6000 /dev/urandom >m/$((i%20))/$i; done",
    );
    sandbox.sh(sandbox.root(), "cp -a peer before");
    let mut random = Random::new("coming in");
    for _ in 0..rounds(5, 30) {
        sandbox.mount();
        std::thread::sleep(Duration::from_millis(random.below(600)));
        sandbox.kill_daemon();
    }
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert_same(&sandbox.root().join("before"), &sandbox.peer());
    assert!(sandbox.status().conflicts.is_empty());
}

/// The agent killed at random moments under a writer: the daemon starts another, and
/// "one that was cut off is finished when the agent starts again".
#[test]
fn killed_agents_are_replaced_and_nothing_is_lost() {
    let mut random = Random::new("agents");
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "mkdir d0 d1 d2 d3");
    sandbox.mount();
    sandbox.flush();
    let model = Mutex::new(Model::new());
    let tree = sandbox.tree();
    let mut writers = Random::new("agents' writer");
    for _ in 0..rounds(4, 40) {
        let pause = Duration::from_millis(random.between(1, 1200));
        let left = AtomicUsize::new(1500);
        let doubt = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                work(&mut writers, &tree, &model, || {
                    left.fetch_sub(1, Ordering::Relaxed) > 0
                })
            });
            std::thread::sleep(pause);
            wait_until("there is an agent to kill", PROMPT, || {
                !sandbox.processes_of(Role::Agent).is_empty()
            });
            sandbox.kill_agents();
            writer.join().unwrap()
        });
        assert!(doubt.is_none(), "the mount failed when the agent died");
        sandbox.connected();
    }
    sandbox.flush();
    assert_same(&tree, &sandbox.peer());
    assert_eq!(contents(&sandbox.peer()), *model.lock().unwrap());
    assert!(sandbox.status().conflicts.is_empty());
}

/// Daemon and agent killed together, as when one machine holds both. What was acknowledged
/// is there each time, and no conflict comes of it: an apply that was cut off in a batch
/// full of renames is completed, and nothing in it is taken for somebody's edit.
#[test]
fn everything_killed_at_once() {
    let mut random = Random::new("everything");
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "mkdir d0 d1 d2 d3");
    sandbox.mount();
    let model = Mutex::new(Model::new());
    let tree = sandbox.tree();
    let mut writers = Random::new("everything's writer");
    for _ in 0..rounds(4, 40) {
        let pause = Duration::from_millis(random.between(1, 1000));
        let doubt = std::thread::scope(|scope| {
            let writer = scope.spawn(|| work(&mut writers, &tree, &model, || true));
            std::thread::sleep(pause);
            for process in sandbox.processes() {
                process.kill();
            }
            writer.join().unwrap()
        });
        sandbox.mount();
        let acknowledged = model.lock().unwrap().clone();
        let found = assert_acknowledged(&tree, &acknowledged, doubt.as_ref());
        sandbox.flush();
        assert_same(&tree, &sandbox.peer());
        *model.lock().unwrap() = found;
    }
    assert!(sandbox.status().conflicts.is_empty());
}

/// "One that was cut off is finished [...] by `mirrorfs recover DIR` on the peer alone, and
/// until then a marker says so."
#[test]
fn recover_finishes_on_the_peer_alone_what_was_cut_off() {
    // The agent may be done before it is killed: then once more.
    let cut_off = std::iter::repeat_with(|| {
        let sandbox = Sandbox::new();
        sandbox.sh(
            &sandbox.tree(),
            "mkdir d; for i in $(seq 3000); do echo $i >d/$i; done",
        );
        sandbox.mount();
        let mut agents = Vec::new();
        wait_until("there is an agent", PROMPT, || {
            agents = sandbox.processes_of(Role::Agent);
            !agents.is_empty()
        });
        // The daemon first: it would start another agent.
        let mut victims = sandbox.processes_of(Role::Daemon);
        victims.extend(agents);
        let deadline = std::time::Instant::now() + PROMPT;
        while !sandbox.peer().join("d").exists() && std::time::Instant::now() < deadline {
            std::hint::spin_loop();
        }
        for victim in &victims {
            victim.kill();
        }
        wait_until("both are gone", PROMPT, || {
            victims.iter().all(|victim| !victim.alive())
        });
        sandbox
    })
    .take(20)
    .find(|sandbox| fs::read_dir(sandbox.peer().join("d")).is_ok_and(|d| d.count() < 3000));
    let sandbox = cut_off.expect("no apply was cut off in twenty attempts");
    let peer = sandbox.peer();
    let marker = peer.join(".mirrorfs/applying");
    assert!(marker.exists(), "nothing tells of it");
    sandbox.run(["recover".as_ref(), peer.as_os_str()]).ok();
    assert!(!marker.exists());
    sandbox.try_umount();
    assert_same(&sandbox.tree(), &peer);
    // And again: nothing is left to do.
    sandbox.run(["recover".as_ref(), peer.as_os_str()]).ok();
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &peer);
    assert!(sandbox.status().conflicts.is_empty());
}

/// A dead mount is told as such, and `umount` clears it: the tree is there as it was.
#[test]
fn a_dead_mount_is_reported_and_can_be_unmounted() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.mount();
    sandbox.kill_daemon();
    let status = sandbox.status();
    assert_eq!(status.mount.state, "unmounted", "{status:?}");
    assert!(status.mount.reason.is_some(), "{status:?}");
    sandbox.try_umount();
    assert!(!sandbox.is_mounted());
    assert_eq!(
        fs::read_to_string(sandbox.tree().join("file")).unwrap(),
        "x\n"
    );
}

/// A file open for writing when the daemon dies: what was written is in the tree, and
/// the descriptor reports an error instead of pretending.
#[test]
fn an_open_file_of_a_dead_mount_reports_errors() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let path: PathBuf = sandbox.tree().join("log");
    let file = File::create(&path).unwrap();
    file.write_all_at(b"acknowledged", 0).unwrap();
    sandbox.kill_daemon();
    assert!(file.write_all_at(b"lost", 12).is_err());
    sandbox.mount();
    assert_eq!(fs::read(&path).unwrap(), b"acknowledged");
    sandbox.flush();
    assert_eq!(
        fs::read(sandbox.peer().join("log")).unwrap(),
        b"acknowledged"
    );
}
