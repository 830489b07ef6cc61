//! Random operations by several users, compared after each.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::actor::{ALICE, Actor, BOB, ROOT};
use crate::operation::{Operation, Source};
use crate::pair::Pair;
use crate::side::{Answer, Side};
use crate::support::{Random, rounds};
use crate::view::{View, try_xattrs};

/// Root at work as often as the others together.
const SEVERAL: [Actor; 6] = [ROOT, ROOT, ROOT, ALICE, ALICE, BOB];
/// How many operations a failure shows.
const SHOWN: usize = 40;
/// After so many operations everything is compared, contents and attributes too.
const WHOLE: usize = 100;

/// Names, stat, content, attributes and errors are those of the disk below, whoever does
/// what in whichever order.
#[test]
fn random_operations_do_what_they_do_on_the_disk_below() {
    let mut random = Random::new("differential");
    for round in 0..rounds(5, 100) {
        eprintln!("round {round}");
        let pair = Pair::new();
        run(&pair, &mut random, 1500, &SEVERAL);
        pair.down();
    }
}

/// The same where requests do not come over io_uring.
#[test]
fn random_operations_through_the_device() {
    let mut random = Random::new("device");
    for round in 0..rounds(1, 20) {
        eprintln!("round {round}");
        let pair = Pair::through_the_device();
        run(&pair, &mut random, 1500, &SEVERAL);
        pair.down();
    }
}

/// The same while everything goes to a peer: cuts are taken all the time, and nothing but
/// the programs in the mount changes anything there. No conflict arises, nothing comes
/// back, and in the end the peer has what is mirrored.
#[test]
fn random_operations_are_mirrored_meanwhile() {
    let mut random = Random::new("mirrored");
    for round in 0..rounds(3, 40) {
        eprintln!("round {round}");
        let pair = Pair::mirrored();
        run(&pair, &mut random, 700, &SEVERAL);
        pair.down();
    }
}

/// One after the other on both sides.
struct Both {
    mounted: Side,
    plain: Side,
    before: (View, View),
    done: Vec<String>,
    /// How often each kind of operation succeeded (0) and failed, by errno.
    outcomes: BTreeMap<String, BTreeMap<i32, u32>>,
    exact_times: bool,
}

fn run(pair: &Pair, random: &mut Random, operations: usize, actors: &[Actor]) {
    let (mounted, plain) = (pair.mounted(), pair.plain());
    let mut both = Both {
        before: (View::of(&mounted, []), View::of(&plain, [])),
        mounted: Side::new(&mounted),
        plain: Side::new(&plain),
        done: Vec::new(),
        outcomes: BTreeMap::new(),
        exact_times: times_are_exact(&plain),
    };
    for number in 0..operations {
        let known: Vec<_> = both
            .before
            .1
            .nodes
            .iter()
            .filter(|(path, _)| !path.is_empty())
            .map(|(path, seen)| (path.clone(), seen.shown.file_type))
            .collect();
        let open: Vec<_> = both
            .plain
            .open_nodes()
            .iter()
            .enumerate()
            .filter_map(|(slot, stat)| {
                Some((slot, FileType::from_raw_mode(stat.as_ref()?.st_mode)))
            })
            .collect();
        let operation = Source {
            random,
            known: &known,
            open: &open,
        }
        .draw();
        let actor = actors[usize::try_from(random.below(actors.len() as u64)).unwrap()];
        let umask = [0o022, 0o022, 0o002, 0o077, 0][usize::try_from(random.below(5)).unwrap()];
        both.step(actor, umask, &operation);
        if (number + 1) % WHOLE == 0 {
            both.compare_contents(|_| true);
        }
    }
    both.compare_contents(|_| true);
    eprintln!("outcomes by errno: {:?}", both.outcomes);
}

impl Both {
    fn step(&mut self, actor: Actor, umask: u32, operation: &Operation) {
        if !self.exact_times {
            wait_for_the_clock();
        }
        self.done
            .push(format!("{} ({umask:03o}): {operation:?}", actor.name));
        if *operation == Operation::Forget && rustix::process::geteuid().is_root() {
            std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        }
        let acting = actor.act(umask);
        let mounted = self.mounted.carry_out(operation);
        let plain = self.plain.carry_out(operation);
        drop(acting);
        let same = match operation {
            Operation::SeekData(slot, _) | Operation::SeekHole(slot, _) if mounted != plain => {
                // From one position again.
                let again = Operation::SeekTo(*slot, 0);
                let back = (self.mounted.carry_out(&again), self.plain.carry_out(&again));
                back.0 == back.1
                    && is_true(&self.mounted, operation, &mounted)
                    && is_true(&self.plain, operation, &plain)
            }
            _ => same(&mounted, &plain),
        };
        if !same {
            self.fail(&format!(
                "result:\n  mount {}\n  plain {}",
                brief(&mounted),
                brief(&plain)
            ));
        }
        let errno = plain.as_ref().err().map_or(0, |error| error.raw_os_error());
        if let Some(last) = self.done.last_mut() {
            let result = plain.map_or_else(
                |error| std::io::Error::from(error).to_string(),
                |_| "ok".into(),
            );
            last.push_str(&format!(" -> {result}"));
        }
        let kind = format!("{operation:?}");
        let kind = kind.split('(').next().unwrap_or_default().to_owned();
        let outcomes = self.outcomes.entry(kind).or_default();
        *outcomes.entry(errno).or_default() += 1;
        self.compare();
    }

    fn compare(&mut self) {
        let open = (self.mounted.open_nodes(), self.plain.open_nodes());
        let now = (
            View::of(&self.mounted.root, open.0.iter().flatten().copied()),
            View::of(&self.plain.root, open.1.iter().flatten().copied()),
        );
        let before = std::mem::replace(&mut self.before, now);
        let now = &self.before;
        let mut wrong = Vec::new();
        let mut numbers: HashMap<u64, u64> = HashMap::new();
        for (path, mounted) in &now.0.nodes {
            let name = path.escape_ascii();
            let Some(plain) = now.1.nodes.get(path) else {
                wrong.push(format!("{name} is in the mount only"));
                continue;
            };
            if !mounted.shown.is_like(&plain.shown) {
                wrong.push(format!(
                    "{name}:\n  mount {:?}\n  plain {:?}",
                    mounted.shown, plain.shown
                ));
            }
            if *numbers.entry(mounted.ino).or_insert(plain.ino) != plain.ino {
                wrong.push(format!("{name} is a link to something else"));
            }
            let moved = (
                now.0.moved(&before.0, mounted.ino),
                now.1.moved(&before.1, plain.ino),
            );
            if moved.0 != moved.1 {
                wrong.push(format!(
                    "{name}: (mtime, ctime) moved: mount {:?}, plain {:?}",
                    moved.0, moved.1
                ));
            }
        }
        for path in now.1.nodes.keys() {
            if !now.0.nodes.contains_key(path) {
                wrong.push(format!("{} is not in the mount", path.escape_ascii()));
            }
        }
        for (slot, pair) in open.0.iter().zip(&open.1).enumerate() {
            let (Some(mounted), Some(plain)) = pair else {
                assert!(pair.0.is_none() && pair.1.is_none());
                continue;
            };
            let seen = (
                crate::view::Seen::from(mounted),
                crate::view::Seen::from(plain),
            );
            let moved = (
                now.0.moved(&before.0, seen.0.ino),
                now.1.moved(&before.1, seen.1.ino),
            );
            if !seen.0.shown.is_like(&seen.1.shown) || moved.0 != moved.1 {
                wrong.push(format!(
                    "open {slot}:\n  mount {:?} {:?}\n  plain {:?} {:?}",
                    seen.0.shown, moved.0, seen.1.shown, moved.1
                ));
            }
        }
        if !wrong.is_empty() {
            self.fail(&wrong.join("\n"));
        }
        let changed: Vec<Vec<u8>> = now
            .1
            .nodes
            .iter()
            .filter(|(_, seen)| now.1.moved(&before.1, seen.ino) != Some((false, false)))
            .map(|(path, _)| path.clone())
            .collect();
        self.compare_contents(|path| changed.iter().any(|changed| changed == path));
    }

    /// Compares content, link target and extended attributes.
    fn compare_contents(&self, wanted: impl Fn(&[u8]) -> bool) {
        for (path, seen) in &self.before.1.nodes {
            if !wanted(path) {
                continue;
            }
            let at = |root: &Path| root.join(std::ffi::OsStr::from_bytes(path));
            let (mounted, plain) = (at(&self.mounted.root), at(&self.plain.root));
            let name = path.escape_ascii();
            let attributes = (try_xattrs(&mounted), try_xattrs(&plain));
            if attributes.0 != attributes.1 {
                self.fail(&format!("attributes of {name}: {attributes:?}"));
            }
            if seen.shown.file_type.is_file() {
                let content = |path| std::fs::read(path).map_err(|error| error.kind());
                let found = match (content(&mounted), content(&plain)) {
                    (Ok(mounted), Ok(plain)) => difference(&mounted, &plain),
                    (mounted, plain) => (mounted != plain).then(|| {
                        let kind = |content: Result<Vec<u8>, _>| content.map(|_| "readable");
                        format!("{:?} {:?}", kind(mounted), kind(plain))
                    }),
                };
                if let Some(found) = found {
                    self.fail(&format!("content of {name}: {found}"));
                }
            } else if seen.shown.file_type.is_symlink() {
                let target = |path| std::fs::read_link(path).unwrap();
                if target(&mounted) != target(&plain) {
                    self.fail(&format!("target of {name}"));
                }
            }
        }
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.done.len().saturating_sub(SHOWN);
        for (number, step) in self.done.iter().enumerate().skip(from) {
            eprintln!("{number:5} {step}");
        }
        panic!("after operation {}: {what}", self.done.len() - 1);
    }
}

fn same(mounted: &Result<Answer, Errno>, plain: &Result<Answer, Errno>) -> bool {
    match (mounted, plain) {
        (Ok(Answer::Stat(mounted)), Ok(Answer::Stat(plain))) => mounted.is_like(plain),
        (mounted, plain) => mounted == plain,
    }
}

/// Whether an answer to a search for data or a hole is right for the content. Which part
/// of a preallocated range counts as data depends on what the disk's cache happens to hold,
/// so that two right answers may differ.
fn is_true(side: &Side, operation: &Operation, answer: &Result<Answer, Errno>) -> bool {
    let (Operation::SeekData(slot, at) | Operation::SeekHole(slot, at)) = operation else {
        return false;
    };
    let Some(content) = side.content(*slot) else {
        return true;
    };
    let end = content.len() as u64;
    let is_zero = |to: u64| {
        let range = usize::try_from(*at).unwrap()..usize::try_from(to).unwrap();
        content[range].iter().all(|byte| *byte == 0)
    };
    match (operation, answer) {
        (Operation::SeekData(..), Ok(Answer::Number(to))) => at <= to && *to < end && is_zero(*to),
        (Operation::SeekData(..), Err(Errno::NXIO)) => *at >= end || is_zero(end),
        (_, Ok(Answer::Number(to))) => at <= to && *to <= end,
        (_, Err(Errno::NXIO)) => *at >= end,
        _ => false,
    }
}

fn brief(result: &impl std::fmt::Debug) -> String {
    let text = format!("{result:?}");
    if text.len() > 600 {
        format!("{}... ({} characters)", &text[..600], text.len())
    } else {
        text
    }
}

/// The first difference of two contents.
fn difference(mounted: &[u8], plain: &[u8]) -> Option<String> {
    if mounted == plain {
        return None;
    }
    let at = mounted.iter().zip(plain).position(|(a, b)| a != b);
    Some(format!(
        "{} bytes in the mount, {} on disk, first difference {:?}",
        mounted.len(),
        plain.len(),
        at.map(|at| (at, mounted[at], plain[at]))
    ))
}

/// Whether the filesystem tells two changes apart that somebody looked between. Since
/// Linux 6.13 most do, whatever the tick of the clock.
fn times_are_exact(dir: &Path) -> bool {
    let path = dir.parent().unwrap().join("clock");
    let file = std::fs::File::create(path).unwrap();
    let mut seen = BTreeMap::new();
    for size in 1..=50 {
        file.set_len(size).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        seen.insert((stat.st_ctime, stat.st_ctime_nsec), size);
    }
    seen.len() == 50
}

/// Until a change gets a time that none had before.
fn wait_for_the_clock() {
    let now = || rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let before = now();
    while now() == before {
        std::thread::yield_now();
    }
}
