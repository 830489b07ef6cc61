//! "Fail the n-th: for every write, fsync, rename, SQLite call and frame of a scripted
//! session, for every n: an error once, an error for good, SIGKILL. Afterwards recovery,
//! and nothing acknowledged under L0 or L1 is missing."

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::inject::{Fault, Injector, Kind, Place, Plan, RoleOf};
use crate::support::program::run;
use crate::support::{Outcome, PROMPT, Random, Sandbox, assert_same, rounds};

/// What the files of a tree hold, by path.
type Model = BTreeMap<String, Vec<u8>>;

/// One system call of the session, in the mount.
enum Step {
    MakeDir(&'static str),
    Create(&'static str),
    Write(&'static str, u64, Vec<u8>),
    Truncate(&'static str, u64),
    Sync(&'static str),
    Rename(&'static str, &'static str),
    Remove(&'static str),
}

impl Step {
    fn apply_in(&self, root: &Path) -> io::Result<()> {
        let open = |name: &str| File::options().write(true).open(root.join(name));
        match self {
            Self::MakeDir(name) => fs::create_dir(root.join(name)),
            Self::Create(name) => File::create_new(root.join(name)).map(drop),
            Self::Write(name, offset, bytes) => {
                let written = open(name)?.write_at(bytes, *offset)?;
                assert_eq!(written, bytes.len(), "a write was cut short");
                Ok(())
            }
            Self::Truncate(name, size) => open(name)?.set_len(*size),
            Self::Sync(name) => open(name)?.sync_all(),
            Self::Rename(from, to) => fs::rename(root.join(from), root.join(to)),
            Self::Remove(name) => fs::remove_file(root.join(name)),
        }
    }

    fn apply_to(&self, model: &mut Model) {
        match self {
            Self::MakeDir(_) | Self::Sync(_) => {}
            Self::Create(name) => {
                model.insert((*name).to_owned(), Vec::new());
            }
            Self::Write(name, offset, bytes) => {
                let content = model.get_mut(*name).unwrap();
                let start = usize::try_from(*offset).unwrap();
                content.resize(content.len().max(start + bytes.len()), 0);
                content[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Self::Truncate(name, size) => {
                let size = usize::try_from(*size).unwrap();
                model.get_mut(*name).unwrap().resize(size, 0);
            }
            Self::Rename(from, to) => {
                let content = model.remove(*from).unwrap();
                model.insert((*to).to_owned(), content);
            }
            Self::Remove(name) => {
                model.remove(*name);
            }
        }
    }

    /// Whether it makes sense in a tree like this, after steps before it have failed.
    fn fits(&self, model: &Model) -> bool {
        match self {
            Self::MakeDir(_) => true,
            Self::Create(name) => !model.contains_key(*name),
            Self::Write(name, ..) | Self::Truncate(name, _) => model.contains_key(*name),
            Self::Sync(name) | Self::Remove(name) | Self::Rename(name, _) => {
                model.contains_key(*name)
            }
        }
    }
}

/// What there is on both sides before.
fn before() -> Model {
    let mut random = Random::of(7);
    let mut model = Model::new();
    for name in ["d/kept", "d/edited", "d/gone", "d/theirs", "d/their-gone"] {
        model.insert(name.to_owned(), random.bytes(5000));
    }
    model
}

fn steps() -> Vec<Step> {
    let mut random = Random::of(8);
    vec![
        Step::MakeDir("new"),
        Step::Create("new/one"),
        Step::Write("new/one", 0, random.bytes(9000)),
        Step::Sync("new/one"),
        Step::Write("new/one", 4000, random.bytes(100)),
        Step::Create("new/draft"),
        Step::Write("new/draft", 0, random.bytes(300_000)),
        Step::Sync("new/draft"),
        Step::Rename("new/draft", "d/edited"),
        Step::Write("d/kept", 5000, random.bytes(700)),
        Step::Truncate("new/one", 6000),
        Step::Remove("d/gone"),
        Step::Create("new/two"),
        Step::Write("new/two", 10_000, random.bytes(50)),
    ]
}

/// What the peer's user does, each by one rename or removal.
fn peer_steps(peer: &Path, outside: &Path, model: &mut Model) {
    let mut random = Random::of(9);
    for (name, size) in [("d/theirs", 6000), ("d/their-new", 70_000)] {
        let content = random.bytes(size);
        let draft = outside.join("draft");
        fs::write(&draft, &content).unwrap();
        fs::rename(&draft, peer.join(name)).unwrap();
        model.insert(name.to_owned(), content);
    }
    fs::remove_file(peer.join("d/their-gone")).unwrap();
    model.remove("d/their-gone");
}

fn contents(root: &Path) -> Model {
    try_contents(root).unwrap()
}

fn try_contents(root: &Path) -> io::Result<Model> {
    let mut model = Model::new();
    for dir in ["d", "new"] {
        let entries = match fs::read_dir(root.join(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = format!("{dir}/{}", entry.file_name().to_str().unwrap());
            model.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(model)
}

/// How a session got out of its fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum WayOut {
    /// Nothing had to be done.
    Itself,
    /// The mount was dead or read-only, and was mounted again.
    MountedAgain,
}

/// The session, on one tree of its own.
struct Session {
    sandbox: Sandbox,
    injector: Injector,
    /// What is known to have happened.
    model: Model,
    /// Every content that a name has ever had.
    versions: BTreeSet<(String, Vec<u8>)>,
    /// A step that was not acknowledged, with nobody left to ask whether it happened.
    doubt: Option<Step>,
}

impl Session {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let model = before();
        for root in [sandbox.tree(), sandbox.peer()] {
            fs::create_dir(root.join("d")).unwrap();
            for (name, content) in &model {
                fs::write(root.join(name), content).unwrap();
            }
        }
        let injector = Injector::new(sandbox.root());
        let mut session = Self {
            sandbox,
            injector,
            model,
            versions: BTreeSet::new(),
            doubt: None,
        };
        session.note_versions();
        session
    }

    fn note_versions(&mut self) {
        let current = self.model.iter();
        self.versions
            .extend(current.map(|(name, content)| (name.clone(), content.clone())));
    }

    fn mount(&self) -> bool {
        let mut mount = self.sandbox.command(self.sandbox.program());
        mount
            .arg("mount")
            .args([self.sandbox.tree(), self.sandbox.peer()]);
        self.injector.attach(&mut mount);
        run(&mut mount, PROMPT).code == 0
    }

    fn flush(&self, patience: &str) -> Outcome {
        let tree = self.sandbox.tree().display().to_string();
        self.sandbox
            .run(["sync", &tree, "--flush", "--timeout", patience])
    }

    /// Mounts, works on both sides, and flushes, with the fault somewhere on the way.
    /// Gives how it got out of it.
    fn run(&mut self) -> WayOut {
        let mut way_out = WayOut::Itself;
        // Edits before the first agreement would be conflicts, and rightly so.
        if !self.mount() || self.flush("5s").code != 0 {
            way_out = way_out.max(self.recover());
        }
        let (tree, peer) = (self.sandbox.tree(), self.sandbox.peer());
        for step in steps() {
            if !step.fits(&self.model) {
                continue;
            }
            let done = step.apply_in(&tree);
            let mut after = self.model.clone();
            step.apply_to(&mut after);
            let versions = after.clone().into_iter();
            self.versions.extend(versions);
            match done {
                Ok(()) => self.model = after,
                Err(_) if self.shows(&after) => self.model = after,
                Err(_) if self.shows(&self.model) => {}
                // A disk that gives nothing any more cannot be asked.
                Err(_) if try_contents(&tree).is_err() => {
                    self.doubt = Some(step);
                    break;
                }
                Err(error) => panic!("neither done nor not done: {error}"),
            }
        }
        peer_steps(&peer, &self.sandbox.outside(), &mut self.model);
        self.note_versions();
        self.flush("5s");
        self.nothing_torn();
        way_out.max(self.recover())
    }

    /// Whether the mount shows this.
    fn shows(&self, model: &Model) -> bool {
        try_contents(&self.sandbox.tree()).is_ok_and(|found| {
            // What the peer's user did may have arrived or not.
            let here = |model: &Model| -> Model {
                let mut model = model.clone();
                model.retain(|name, _| !name.contains("their"));
                model
            };
            here(&found) == here(model)
        })
    }

    /// "No torn files": whatever is cut off at this moment, a name on the peer shows
    /// something that existed.
    fn nothing_torn(&self) {
        for found in contents(&self.sandbox.peer()) {
            assert!(
                self.versions.contains(&found),
                "{} on the peer never existed like this ({} bytes)",
                found.0,
                found.1.len()
            );
        }
    }

    /// The disk is well again: as a user would, looks whether the mount works, mounts
    /// again if it does not, and expects that everything gets to where it belongs.
    fn recover(&mut self) -> WayOut {
        self.injector.stop();
        let probe = self.sandbox.tree().join("probe");
        let alive = self.sandbox.is_mounted()
            && fs::write(&probe, "x").is_ok()
            && fs::remove_file(&probe).is_ok();
        let way_out = if alive {
            WayOut::Itself
        } else {
            if self.sandbox.is_mounted() {
                let outcome = self.sandbox.try_umount();
                assert!(!self.sandbox.is_mounted(), "{outcome}");
            }
            self.sandbox.mount();
            WayOut::MountedAgain
        };
        if let Some(step) = self.doubt.take() {
            let mut done = self.model.clone();
            step.apply_to(&mut done);
            if self.shows(&done) {
                self.model = done;
            }
        }
        self.flush("60s").ok();
        assert_eq!(
            brief(&contents(&self.sandbox.tree())),
            brief(&self.model),
            "what was acknowledged (right) is not what is there (left)"
        );
        assert_same(&self.sandbox.tree(), &self.sandbox.peer());
        let status = self.sandbox.status();
        assert!(status.conflicts.is_empty(), "{status:?}");
        assert!(status.problems.is_empty(), "{status:?}");
        way_out
    }
}

fn brief(model: &Model) -> BTreeMap<&str, (usize, String)> {
    let hash = |content: &[u8]| blake3::hash(content).to_hex()[..8].to_owned();
    let entries = model.iter();
    entries
        .map(|(name, content)| (name.as_str(), (content.len(), hash(content))))
        .collect()
}

/// Runs the session with a fault, or none. Gives what was hit.
fn session(plan: Option<Plan>) -> (Option<String>, WayOut, BTreeMap<Kind, u64>) {
    let mut session = Session::new();
    if let Some(plan) = plan {
        session.injector.plan(plan);
    }
    let way_out = session.run();
    let counts = session.injector.counts();
    let hit = session.injector.hit();
    session.sandbox.umount();
    (hit, way_out, counts)
}

/// What may happen at a call.
const FAULTS: [(&str, Fault); 6] = [
    ("EIO once", Fault::Once(libc::EIO)),
    ("ENOSPC once", Fault::Once(libc::ENOSPC)),
    ("EDQUOT once", Fault::Once(libc::EDQUOT)),
    ("EIO for good", Fault::ForGood(libc::EIO)),
    ("ENOSPC for good", Fault::ForGood(libc::ENOSPC)),
    ("SIGKILL", Fault::Kill),
];

/// Everything that can happen in a session with so many calls.
fn plans(counts: &BTreeMap<Kind, u64>) -> Vec<(String, Plan)> {
    let mut plans = Vec::new();
    for (kind, count) in counts {
        if kind.role == RoleOf::Command {
            continue;
        }
        for n in 1..=*count {
            for (name, fault) in FAULTS {
                // Nobody but the kernel itself lets an answer to a program fail, and a
                // stream has no quota.
                let full = [libc::ENOSPC, libc::EDQUOT];
                let no_room = matches!(fault, Fault::Once(errno) | Fault::ForGood(errno) if full.contains(&errno));
                let applies = match kind.place {
                    _ if no_room && kind.call == "pread64" => false,
                    Place::Answer => fault == Fault::Kill,
                    Place::Stream => matches!(fault, Fault::Kill | Fault::Once(libc::EIO)),
                    _ => true,
                };
                if applies {
                    let plan = Plan {
                        kind: *kind,
                        n,
                        fault,
                    };
                    plans.push((format!("{kind} {n} {name}"), plan));
                }
            }
        }
    }
    plans
}

/// The whole of it under `--long`; in every run as much as fits into half a minute,
/// another part each time. `MIRRORFS_TEST_FAULT` repeats what a failure names.
#[test]
fn every_call_of_a_session_fails_once_for_good_or_kills() {
    let (_, _, counts) = session(None);
    let mut plans = plans(&counts);
    let total = plans.len();
    for (kind, count) in &counts {
        eprintln!("{count:6} {kind}");
    }
    if let Ok(wanted) = std::env::var("MIRRORFS_TEST_FAULT") {
        plans.retain(|(name, _)| name.starts_with(&wanted));
        assert!(!plans.is_empty(), "no such fault: {wanted}");
    }
    let mut random = Random::new("fail the n-th");
    for at in (1..plans.len()).rev() {
        plans.swap(at, random.below(at as u64 + 1) as usize);
    }
    let deadline = Instant::now() + Duration::from_secs(rounds(30, 24 * 3600).into());
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let outcomes = Mutex::new(BTreeMap::<String, u64>::new());
    std::thread::scope(|scope| {
        // A session waits more than it works.
        for _ in 0..4 {
            scope.spawn(|| {
                while Instant::now() < deadline {
                    let Some((name, plan)) = plans.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    // A failure is told in the end, with all others.
                    match std::panic::catch_unwind(|| session(Some(*plan))) {
                        Ok((hit, way_out, _)) => {
                            let outcome = match hit {
                                Some(_) => format!("{way_out:?}"),
                                None => "not reached".to_owned(),
                            };
                            *outcomes.lock().unwrap().entry(outcome).or_default() += 1;
                        }
                        Err(_) => {
                            eprintln!("FAILED: {name}");
                            failed.lock().unwrap().push(name.clone());
                        }
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    eprintln!("{outcomes:?} of {total} faults");
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}
