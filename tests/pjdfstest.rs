//! "A program cannot tell the mount from the disk below": pjdfstest, a suite of POSIX
//! tests, in a plain directory and in a mount. What passes there has to pass here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::program::run;
use support::{Outcome, Random, Sandbox, assert_captured, rounds};

/// Longest that one run of the suite may take. On an idle machine it takes four seconds.
const SUITE: Duration = Duration::from_secs(400);

/// What became of one test.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    Failed,
    Skipped,
    Passed,
}

/// The suite's tests by name.
type Verdicts = BTreeMap<String, Verdict>;

/// The suite with its configuration, in a sandbox.
struct Suite<'a> {
    sandbox: &'a Sandbox,
    program: PathBuf,
    configuration: PathBuf,
}

impl<'a> Suite<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let configuration = sandbox.outside().join("pjdfstest.toml");
        // A nap has to be longer than a tick of the kernel's coarse clock. The tests that
        // remount the filesystem are not run on the machine's own disk.
        let text = format!(
            "[features]
             posix_fallocate = {{}}
             rename_ctime = {{}}
             utime_now = {{}}
             utimensat = {{}}
             [settings]
             naptime = 0.02
             [dummy_auth]
             entries = [{}, {}]\n",
            account("nobody"),
            account("daemon"),
        );
        std::fs::write(&configuration, text).unwrap();
        Self {
            sandbox,
            program: sandbox.tool("pjdfstest"),
            configuration,
        }
    }

    fn command(&self, dir: &Path, other: &Path, filter: &[&str]) -> Command {
        // The other users have to get into what the suite makes.
        let mut command = self.sandbox.command("sh");
        command
            .args(["-c", "umask 022; exec \"$@\"", "sh"])
            .arg(&self.program)
            .arg("--configuration-file")
            .arg(&self.configuration)
            .arg("--path")
            .arg(dir)
            .arg("--secondary-fs")
            .arg(other)
            .args(filter);
        command
    }

    /// Runs it in a directory, with another filesystem to refuse links and renames to.
    #[track_caller]
    fn run(&self, dir: &Path, other: &Path, filter: &[&str]) -> (Verdicts, Outcome) {
        let outcome = run(&mut self.command(dir, other, filter), SUITE);
        let verdicts = verdicts(&outcome);
        (verdicts, outcome)
    }
}

/// An account with its group, as the configuration wants it.
fn account(name: &str) -> String {
    let find = |file: &str, field: usize, value: &str| -> Vec<String> {
        let text = std::fs::read_to_string(file).unwrap();
        text.lines()
            .map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>())
            .find(|fields| fields.get(field).is_some_and(|found| found == value))
            .unwrap_or_else(|| panic!("{file} has no {value}"))
    };
    let user = find("/etc/passwd", 0, name);
    let group = find("/etc/group", 2, &user[3]);
    format!("[\"{name}\", \"{}\"]", group[0])
}

/// Reads the lines `NAME VERDICT`, and fails unless they add up to the summary's counts.
#[track_caller]
fn verdicts(outcome: &Outcome) -> Verdicts {
    let mut found = Verdicts::new();
    for line in outcome.stdout.lines() {
        let Some((name, verdict)) = line.split_once(' ') else {
            continue;
        };
        let verdict = match verdict.trim() {
            "ok" => Verdict::Passed,
            "skipped" => Verdict::Skipped,
            "FAILED" => Verdict::Failed,
            _ => continue,
        };
        assert_eq!(found.insert(name.to_owned(), verdict), None, "{outcome}");
    }
    let count = |verdict| found.values().filter(|found| **found == verdict).count();
    let summary = format!(
        "Summary: {} failed, {} skipped, {} passed, 0 expected failures, {} total",
        count(Verdict::Failed),
        count(Verdict::Skipped),
        count(Verdict::Passed),
        found.len()
    );
    assert!(
        outcome.stdout.lines().any(|line| line == summary),
        "expected {summary:?} of {outcome}"
    );
    found
}

/// The tests that may do worse in the mount, each with its reason.
fn exceptions() -> BTreeMap<&'static str, &'static str> {
    include_str!("pjdfstest.exceptions")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (name, reason) = line
                .split_once(' ')
                .unwrap_or_else(|| panic!("an exception without a reason: {line}"));
            (name, reason.trim())
        })
        .collect()
}

/// Runs the suite in a plain directory and in a mount beside it, and compares. At least
/// `enough` tests have to pass on the disk, or too little was compared.
#[track_caller]
fn compare_with_the_disk(sandbox: &Sandbox, enough: usize) {
    let suite = Suite::new(sandbox);
    let disk = sandbox.outside();
    stay(sandbox);
    sandbox.mount();
    let (below, _) = suite.run(&disk, &sandbox.tree(), &[]);
    let (mount, outcome) = suite.run(&sandbox.tree(), &disk, &[]);
    let passed = below.values().filter(|v| **v == Verdict::Passed).count();
    eprintln!("{passed} of {} tests pass on the disk", below.len());
    assert!(passed >= enough, "only {passed} tests pass on the disk");

    let exceptions = exceptions();
    let mut wrong = Vec::new();
    for (name, on_disk) in &below {
        let in_mount = mount[name];
        match exceptions.get(name.as_str()) {
            None if in_mount < *on_disk => {
                wrong.push(format!(
                    "{name}: {on_disk:?} on the disk, {in_mount:?} here"
                ));
            }
            Some(_) if in_mount == Verdict::Passed => {
                wrong.push(format!("{name} passes: it is no exception any more"));
            }
            _ => {}
        }
    }
    for name in exceptions.keys() {
        if !below.contains_key(*name) {
            wrong.push(format!("{name} is an exception, and no test"));
        }
    }
    assert!(wrong.is_empty(), "{}\n{outcome}", wrong.join("\n"));
    assert_captured(sandbox);
}

/// A file that stays. The suite removes what it makes, and to remove all there is counts as
/// emptying the tree, which waits for somebody to say so.
fn stay(sandbox: &Sandbox) {
    std::fs::write(sandbox.tree().join("kept"), "stays").unwrap();
}

/// Every test that passes on the disk passes in a mount that root has made: permissions
/// and owners among several users, links, special files, times, limits of names.
#[test]
fn pjdfstest_as_root() {
    let enough = if rustix::process::geteuid().is_root() {
        380
    } else {
        240
    };
    compare_with_the_disk(&Sandbox::new(), enough);
}

/// The same in the mount of an ordinary user, through fusermount3. The suite leaves out
/// what needs root: changes of the user, device nodes, owners.
#[test]
fn pjdfstest_as_an_ordinary_user() {
    compare_with_the_disk(&Sandbox::of_ordinary_user(), 240);
}

/// A mount that was remounted read-only answers every change with EROFS, and goes on
/// after it was remounted for writing.
#[test]
fn pjdfstest_on_a_read_only_mount() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut sandbox = Sandbox::new();
    // mount(8) would call the helper for FUSE filesystems, which cannot remount any.
    let wrapper = sandbox.root().join("bin/mount");
    std::fs::write(&wrapper, "#!/bin/sh\nexec /bin/mount -i \"$@\"\n").unwrap();
    std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    sandbox.set("PATH", format!("{}/bin:{path}", sandbox.root().display()));
    let suite = Suite::new(&sandbox);
    let text = std::fs::read_to_string(&suite.configuration).unwrap();
    let text = text.replace("[settings]", "[settings]\nallow_remount = true");
    std::fs::write(&suite.configuration, text).unwrap();
    sandbox.mount();
    // By themselves: others leave files open for writing, and then nothing can be
    // remounted, on any filesystem.
    let (verdicts, outcome) = suite.run(&sandbox.tree(), &sandbox.outside(), &["::erofs_"]);
    assert!(verdicts.len() >= 13, "{outcome}");
    assert!(
        verdicts.values().all(|found| *found == Verdict::Passed),
        "{outcome}"
    );
    assert_captured(&sandbox);
}

/// The tests to kill in the middle: all but those of open, of which one makes a file of
/// two gibibytes, and the test would wait for the peer to get it.
const LEAVING_LITTLE: [&str; 11] = [
    "chmod",
    "chown",
    "link",
    "mkdir",
    "mkfifo",
    "mknod",
    "rename",
    "rmdir",
    "symlink",
    "truncate",
    "utimensat",
];

/// The suite removes what it makes, so that little is left to compare. Killed in the
/// middle it leaves links, special files, odd modes and long names behind.
#[test]
fn pjdfstest_leaves_nothing_uncaptured() {
    let sandbox = Sandbox::new();
    let suite = Suite::new(&sandbox);
    let mut random = Random::new("pjdfstest");
    stay(&sandbox);
    sandbox.mount();
    for round in 0..rounds(8, 40) {
        let tests = random.below(250);
        eprintln!("round {round}: killed after {tests} tests");
        let mut child = suite
            .command(&sandbox.tree(), &sandbox.outside(), &LEAVING_LITTLE)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines
            .map(|line| line.unwrap())
            .filter(|line| line.ends_with(" ok"))
            .take(usize::try_from(tests).unwrap())
            .count();
        assert_eq!(told as u64, tests);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_captured(&sandbox);
}
