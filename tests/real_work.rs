//! Real input: a Git repository of thousands of files, mirrored over a real sshd on
//! loopback while someone works in the mount.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use support::process::Role;
use support::program::run;
use support::repository::{self, TOPIC_COMMITS};
use support::{PROMPT, Random, Sandbox, Server, assert_same, rounds, wait_until};

/// A sandbox whose tree is mounted with a peer behind a link, and a repository to clone.
struct Desk {
    sandbox: Sandbox,
    server: Server,
    origin: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let mut sandbox = Sandbox::new();
        let server = Server::start(&mut sandbox);
        let origin = sandbox.outside().join("origin.git");
        repository::generate(&sandbox, &origin);
        sandbox.mount_with(server.url(&sandbox.peer()));
        Self {
            sandbox,
            server,
            origin,
        }
    }

    fn clone_origin(&self) {
        let script = format!("git clone -q 'file://{}' repo", self.origin.display());
        self.sandbox.sh(&self.sandbox.tree(), &script);
    }

    fn repo(&self) -> PathBuf {
        self.sandbox.tree().join("repo")
    }

    /// `git fsck --strict` on the peer's copy, which must not write to it.
    #[track_caller]
    fn fsck_peer(&self) {
        let outcome = run(
            self.sandbox
                .command("git")
                .env("GIT_OPTIONAL_LOCKS", "0")
                .arg("-C")
                .arg(self.sandbox.peer().join("repo"))
                .args(["fsck", "--strict", "--no-dangling"]),
            PROMPT * 2,
        );
        // Git takes a directory that it does not like for no repository.
        assert!(
            !outcome.said().contains("not a git repository"),
            "{outcome}"
        );
        outcome.ok();
    }
}

/// A SQLite writer in WAL mode that commits two rows after the other until it is stopped. The
/// last [`KEPT`] transactions stay, so that a machine which is fast does not end with a
/// database of a gigabyte.
struct Database {
    writer: Child,
    stop: PathBuf,
}

/// How many transactions before the last one the database keeps: some 30 MB.
const KEPT: u64 = 20_000;

impl Database {
    fn start(sandbox: &Sandbox, dir: &Path) -> Self {
        let stop = sandbox.outside().join("stop-writing");
        let script = "
import os, sqlite3, sys
base = sqlite3.connect('work.db', isolation_level=None)
assert base.execute('PRAGMA journal_mode=WAL').fetchone()[0] == 'wal'
base.execute('PRAGMA synchronous=NORMAL')
base.execute('PRAGMA wal_autocheckpoint=50')
base.execute('CREATE TABLE row(n INTEGER PRIMARY KEY, previous INTEGER, filling BLOB)')
n = 0
while not os.path.exists(sys.argv[1]):
    n += 1
    base.execute('BEGIN')
    base.execute('INSERT INTO row VALUES(?, ?, randomblob(700))', (2 * n, 2 * n - 1))
    base.execute('INSERT INTO row VALUES(?, ?, randomblob(700))', (2 * n + 1, 2 * n))
    base.execute('DELETE FROM row WHERE n < ?', (2 * (n - int(sys.argv[2])),))
    base.execute('COMMIT')
print(n)
";
        let writer = sandbox
            .command("python3")
            .args(["-c", script])
            .arg(&stop)
            .arg(KEPT.to_string())
            .current_dir(dir)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("the database is there", PROMPT, || {
            dir.join("work.db-wal").exists()
        });
        Self { writer, stop }
    }

    /// Ends the writer, and gives the number of its transactions.
    fn stop(mut self) -> u64 {
        std::fs::write(&self.stop, "").unwrap();
        let mut printed = String::new();
        std::io::Read::read_to_string(self.writer.stdout.as_mut().unwrap(), &mut printed).unwrap();
        assert!(
            self.writer.wait().unwrap().success(),
            "the database's writer failed"
        );
        printed.trim().parse().unwrap()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.writer.kill().ok();
        self.writer.wait().ok();
    }
}

/// Opens a copy of a database and its log, as after a power cut, and gives the number of
/// transactions up to its last. Each must be whole, and none of those before it missing that
/// are kept.
#[track_caller]
fn transactions(sandbox: &Sandbox, dir: &Path) -> u64 {
    let script = "
import sqlite3, sys
base = sqlite3.connect('work.db')
assert base.execute('PRAGMA integrity_check').fetchall() == [('ok',)]
if not base.execute(\"SELECT 1 FROM sqlite_master WHERE name = 'row'\").fetchall():
    print(0)
else:
    count, least, most = base.execute('SELECT count(*), min(n), max(n) FROM row').fetchone()
    done = (most or 1) // 2
    first = max(done - int(sys.argv[1]), 1)
    assert count == 0 or (most % 2, least, count) == (1, 2 * first, most - least + 1), (count, least, most)
    print(done)
";
    let copy = sandbox.outside().join("database");
    std::fs::remove_dir_all(&copy).ok();
    std::fs::create_dir(&copy).unwrap();
    for name in ["work.db", "work.db-wal"] {
        if let Err(error) = std::fs::copy(dir.join(name), copy.join(name)) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
    }
    let outcome = run(
        sandbox
            .command("python3")
            .args(["-c", script])
            .arg(KEPT.to_string())
            .current_dir(&copy),
        PROMPT,
    );
    outcome.ok().stdout.trim().parse().unwrap()
}

/// A day of work, then one flush: clone, branches, a rebase, a build, an editor, a
/// database. Afterwards both sides are the same in everything that is carried.
#[test]
fn real_work_for_a_day() {
    let desk = Desk::new();
    let sandbox = &desk.sandbox;
    let step = |what: &str, dir: &Path, script: &str| {
        let start = Instant::now();
        sandbox.sh(dir, script);
        eprintln!("{what}: {:?}", start.elapsed());
    };
    let start = Instant::now();
    desk.clone_origin();
    eprintln!("git clone: {:?}", start.elapsed());
    let (tree, repo) = (sandbox.tree(), desk.repo());
    let files = sandbox.sh(&repo, "git ls-files | wc -l");
    assert!(files.trim().parse::<usize>().unwrap() >= 5_000, "{files}");

    step(
        "branch switches",
        &repo,
        "git switch -q wide; git switch -q main; git switch -q topic; git switch -q wide
         [ -z \"$(git status --porcelain)\" ]",
    );
    step(
        "rebase",
        &repo,
        "git switch -q topic; git rebase -q main; [ -z \"$(git status --porcelain)\" ]",
    );
    step(
        "commits",
        &repo,
        "for i in 1 2 3; do echo $i >>src/part00/module_0000.rs; mkdir -p new; echo $i >new/$i
         git add -A; git commit -qm \"work $i\"; done; git gc -q; git branch -m topic done",
    );
    cargo_build(sandbox, &tree);
    step("an editor", &repo, EDITOR);
    let database = Database::start(sandbox, &tree);
    // Someone works on the peer too.
    sandbox.sh(
        &sandbox.peer(),
        "mkdir from-the-host; for i in $(seq 50); do echo $i >from-the-host/$i; done",
    );
    step(
        "a large file and its copy",
        &tree,
        "head -c 30000000 /dev/urandom >large; cp large copy; rm large",
    );
    wait_until("the host's work arrives", PROMPT, || {
        tree.join("from-the-host/50").exists()
    });
    let written = database.stop();
    for process in sandbox.processes() {
        let open =
            std::fs::read_dir(format!("/proc/{}/fd", process.pid)).map_or(0, Iterator::count);
        eprintln!(
            "{:?} {}: {open} descriptors, {} KiB",
            process.role,
            process.pid,
            memory(process.pid)
        );
        // "Do without a descriptor per node."
        assert!(open < 3_000, "{process:?} has {open} descriptors");
    }

    let flush = sandbox.flush();
    eprintln!("flush: {:?}", flush.took);
    assert_same(&tree, &sandbox.peer());
    desk.fsck_peer();
    assert_eq!(transactions(sandbox, &sandbox.peer()), written);
    let log = "git log --oneline | wc -l; git status --porcelain";
    assert_eq!(
        sandbox.sh(&repo, log),
        sandbox.sh(
            &sandbox.peer().join("repo"),
            &format!("export GIT_OPTIONAL_LOCKS=0; {log}")
        )
    );
    let status = sandbox.status();
    assert!(
        status.conflicts.is_empty() && status.problems.is_empty() && status.held_back.is_empty(),
        "{status:?}"
    );
    sandbox.umount();
    assert_same(&tree, &sandbox.peer());
    // "Work goes on in the peer's directory."
    sandbox.sh(
        &sandbox.peer().join("repo"),
        "git commit -qam edited; git switch -q main; echo x >x; git add x; git commit -qm x; git fsck --strict --no-dangling",
    );
}

/// The resident memory of a process in KiB.
fn memory(pid: u32) -> u64 {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_default()
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

/// Saves as editors do: a new file, synced, moved over the old one; a backup; a lock.
const EDITOR: &str = r#"python3 -c '
import glob, os
names = sorted(glob.glob("src/part0*/*.rs"))[:60]
assert len(names) > 20
for name in names:
    text = open(name).read()
    lock = os.path.join(os.path.dirname(name), ".#" + os.path.basename(name))
    os.symlink("tester@host.1", lock)
    if os.path.exists(name + "~"):
        os.unlink(name + "~")
    os.link(name, name + "~")
    with open(name + ".swp", "w") as new:
        new.write(text + "// edited\n")
        new.flush()
        os.fsync(new.fileno())
    os.chmod(name + ".swp", os.stat(name).st_mode)
    os.rename(name + ".swp", name)
    os.unlink(name + "~")
    os.unlink(lock)
    assert open(name).read().endswith("// edited\n")
'"#;

/// A real build of a crate without dependencies, twice: the second finds nothing to do.
fn cargo_build(sandbox: &Sandbox, tree: &Path) {
    let start = Instant::now();
    let project = tree.join("project");
    std::fs::create_dir_all(project.join("src")).unwrap();
    std::fs::write(
        project.join("Cargo.toml"),
        "[package]\nname = \"tiny\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n",
    )
    .unwrap();
    std::fs::write(
        project.join("src/lib.rs"),
        "//! Tiny.\n/// Adds.\npub fn add(a: u64, b: u64) -> u64 { a + b }\n",
    )
    .unwrap();
    std::fs::write(
        project.join("src/main.rs"),
        "fn main() { println!(\"{}\", tiny::add(40, 2)); }\n",
    )
    .unwrap();
    // Not the proxy of rustup, which would look for toolchains in the sandbox's home.
    let cargo = PathBuf::from(std::env::var_os("CARGO").expect("CARGO, which cargo sets"));
    let build = || {
        run(
            sandbox
                .command(&cargo)
                .env("RUSTC", cargo.with_file_name("rustc"))
                .args(["build", "--offline"])
                .current_dir(&project),
            PROMPT * 3,
        )
        .ok()
    };
    assert!(build().stderr.contains("Compiling tiny"));
    let again = build();
    assert!(!again.stderr.contains("Compiling"), "{again}");
    let built = run(&mut Command::new(project.join("target/debug/tiny")), PROMPT);
    assert_eq!(built.ok().stdout, "42\n");
    eprintln!("cargo build, twice: {:?}", start.elapsed());
}

/// "The peer's copy passes `git fsck` also when the link is cut at twenty random moments of
/// a rebase." And a database next to its log is a crash image, not a mixture.
#[test]
fn real_work_cut_at_twenty_moments_of_a_rebase() {
    let desk = Desk::new();
    let sandbox = &desk.sandbox;
    desk.clone_origin();
    let repo = desk.repo();
    sandbox.sh(&repo, "git switch -q topic; git switch -q main");
    let rebase = || {
        sandbox.sh(&repo, "git switch -qC work topic; git rebase -q main");
    };
    let start = Instant::now();
    rebase();
    let took = start.elapsed();
    sandbox.flush();
    desk.fsck_peer();
    let mut random = Random::new("cuts during a rebase");
    let mut seen = std::collections::BTreeSet::new();
    let database = Database::start(sandbox, &sandbox.tree());
    let mut transactions_before = 0;

    for round in 1..=rounds(20, 200) {
        let moment = Duration::from_micros(random.below(took.as_micros() as u64 * 3 / 2));
        std::thread::scope(|scope| {
            let work = scope.spawn(rebase);
            std::thread::sleep(moment);
            desk.server.link.refuse();
            // What the agent was applying, it finishes; then it finds its input ended.
            wait_until("the agent ends without its link", PROMPT, || {
                sandbox.processes_of(Role::Agent).is_empty()
            });
            desk.fsck_peer();
            let count = transactions(sandbox, &sandbox.peer());
            assert!(
                count >= transactions_before,
                "the peer's database went back"
            );
            transactions_before = count;
            let peer = sandbox.peer().join("repo");
            let head = sandbox.sh(&peer, "git rev-parse HEAD; git stash list; cat .git/HEAD");
            eprintln!(
                "round {round}, cut after {moment:?}: {}",
                head.trim().replace('\n', " ")
            );
            seen.insert(head);
            desk.server.link.restore();
            work.join().unwrap();
        });
        if round % 5 == 0 {
            sandbox.flush();
            assert_eq!(
                sandbox.sh(&repo, "git rev-parse HEAD"),
                sandbox.sh(&sandbox.peer().join("repo"), "git rev-parse HEAD")
            );
        }
    }
    let written = database.stop();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    desk.fsck_peer();
    assert_eq!(transactions(sandbox, &sandbox.peer()), written);
    assert!(sandbox.status().conflicts.is_empty());
    let commits = sandbox.sh(
        &sandbox.peer().join("repo"),
        "git log --oneline main..work | wc -l",
    );
    assert_eq!(commits.trim().parse::<usize>().unwrap(), TOPIC_COMMITS);
    // Twenty cuts that all showed the same would have tested nothing.
    assert!(seen.len() > 2, "{seen:?}");
    sandbox.umount();
}

/// `npm install` of packages with deep trees, links and scripts' modes.
#[track_caller]
fn npm_install(sandbox: &Sandbox) {
    sandbox.sh(
        &sandbox.tree(),
        "mkdir app; cd app; npm init -y >/dev/null
         npm install --no-audit --no-fund --loglevel=error express@4 typescript@5 eslint@8 >&2
         node -e 'require(\"express\")'; npx --no-install tsc --version",
    );
    sandbox.flush();
    sandbox.sh(
        &sandbox.peer().join("app"),
        "node -e 'require(\"express\")'; npx --no-install tsc --version",
    );
    sandbox.sh(&sandbox.tree(), "cp -r app second; rm -rf app/node_modules");
    sandbox.flush();
    sandbox.umount();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

#[test]
#[ignore = "needs npm and its registry: ./test --npm"]
fn real_work_npm_install() {
    npm_install(&Desk::new().sandbox);
}

#[test]
#[ignore = "needs npm and its registry: ./test --npm"]
fn real_work_npm_install_as_an_ordinary_user() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.mount();
    npm_install(&sandbox);
}
