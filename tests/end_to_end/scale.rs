//! Much of everything: more files than descriptors, and more than fit into a glance.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::disk::Disk;
use crate::support::program::run;
use crate::support::{PROMPT, Role, Sandbox, assert_same, eventually, rounds};

/// A peer that cannot be reached.
const NOBODY: &str = "ssh://127.0.0.1:1/nowhere";

/// Mounts with so many descriptors for the daemon and whatever it starts.
#[track_caller]
fn mount_with_descriptors(sandbox: &Sandbox, descriptors: u32, peer: impl AsRef<OsStr>) {
    let mut command = sandbox.command("prlimit");
    command
        .arg(format!("--nofile={descriptors}:{descriptors}"))
        .arg(sandbox.program())
        .args([OsStr::new("mount"), sandbox.tree().as_ref()])
        .arg(peer);
    run(&mut command, Duration::from_secs(60)).ok();
}

/// More files than descriptors; files whose mode forbids opening them again, which their
/// maker goes on writing to when they have long left the cache; removed files that are
/// still open.
const WORK: &str = r#"python3 -c '
import os
made = {}
for mode in (0o444, 0o400, 0o200, 0):
    made[mode] = os.open("object-%o" % mode, os.O_CREAT | os.O_RDWR | os.O_EXCL, mode)
    os.write(made[mode], b"begun ")
def files():
    for n in range(500): yield "many/%d/%d" % (n % 50, n)
for n in range(50): os.makedirs("many/%d" % n)
for name in files(): open(name, "w").write(name)
gone = []
for n in range(40):
    gone.append(os.open("gone-%d" % n, os.O_CREAT | os.O_RDWR)); os.write(gone[-1], b"x" * n)
    os.unlink("gone-%d" % n)
for name in files():
    with open(name, "r+") as f: assert f.read() == name; f.write(" again")
for round in range(2):
    for mode, fd in made.items():
        os.write(fd, b"later "); assert os.pread(fd, 100, 0) == b"begun " + b"later " * (round + 1)
        assert os.fstat(fd).st_mode & 0o777 == mode, oct(os.fstat(fd).st_mode)
    for name in files(): assert open(name).read() == name + " again"
for n, fd in enumerate(gone):
    os.pwrite(fd, b"end", n); assert os.pread(fd, 100, 0) == b"x" * n + b"end"
for mode, fd in made.items(): os.ftruncate(fd, 8); os.fsync(fd)
for name in files(): assert open(name).read() == name + " again"
# Read from the disk, by nobody but the one who has it open.
for mode, fd in made.items():
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); assert os.pread(fd, 100, 0) == b"begun la"
    os.close(fd)
# The agent is an ordinary user as well, and may not read its copy.
os.chmod("object-0", 0o600)
'
git init -q repo; cd repo; for i in $(seq 100); do mkdir -p d$((i % 20)); echo $i >d$((i % 20))/$i; done
git add .; git commit -qm one; git rm -qr d1 d2; git commit -qm two; git checkout -q HEAD~1
git gc -q; git fsck --strict"#;

#[track_caller]
fn works_with_few_descriptors(sandbox: &Sandbox) {
    mount_with_descriptors(sandbox, 160, sandbox.peer());
    sandbox.sh(&sandbox.tree(), WORK);
    let daemon = sandbox.processes_of(Role::Daemon)[0].pid;
    let open = std::fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
    let open = open.count();
    eprintln!("{open} descriptors");
    assert!(open < 160, "{open} descriptors");
    sandbox.flush();
    let status = sandbox.status();
    assert!(status.problems.is_empty(), "{status:?}");
    sandbox.umount();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "A mount keeps working at 1,000,000 files; memory per known node is measured and stated;
/// no descriptor per node beyond a bounded cache." A million under `./test --long`.
#[test]
fn a_mount_of_very_many_files() {
    let directories = rounds(20, 1000);
    let sandbox = Sandbox::new();
    let tree = sandbox.tree();
    sandbox.sh(
        &tree,
        &format!(
            "python3 -c \"
import os
for d in range({directories}):
    os.mkdir('d%d' % d); fd = os.open('d%d' % d, os.O_RDONLY)
    for n in range(1000): os.mknod('file-%d-%d.rs' % (d, n), dir_fd=fd)
    os.close(fd)\""
        ),
    );
    let nodes = u64::from(directories) * 1001;
    let walk = || {
        let started = Instant::now();
        let count = sandbox.sh(&tree, "find . -mindepth 1 -printf '%s\n' | wc -l");
        assert_eq!(count.trim().parse(), Ok(nodes));
        started.elapsed()
    };
    let outcome = sandbox.mount_with(NOBODY);
    let before = memory(&sandbox);
    let (cold, warm) = (walk(), walk());
    let per_node = memory(&sandbox).saturating_sub(before) / nodes;
    let daemon = sandbox.processes_of(Role::Daemon)[0].pid;
    let descriptors = std::fs::read_dir(format!("/proc/{daemon}/fd"));
    let descriptors = descriptors.unwrap().count();
    eprintln!(
        "{nodes} nodes: mounted in {:?}, walked in {cold:?} and {warm:?}, {per_node} bytes each, {descriptors} descriptors",
        outcome.took
    );
    assert!(descriptors < 2_200, "{descriptors} descriptors");
    // With few nodes it is mostly something else.
    assert!(directories < 1000 || per_node < 200, "{per_node} bytes");
    sandbox.sh(
        &tree,
        &format!(
            "python3 -c \"
import os
for d in range({directories}):
    os.rename('d%d/file-%d-1.rs' % (d, d), 'd%d/moved' % d); os.unlink('d%d/file-%d-2.rs' % (d, d))
    with open('d%d/file-%d-3.rs' % (d, d), 'w') as f: f.write('content')
    os.link('d%d/moved' % d, 'link%d' % d)
os.rename('d7', 'elsewhere'); os.mkdir('d7'); os.rename('elsewhere', 'd7/inside')\""
        ),
    );
    sandbox.try_umount().expect_code(4);
    sandbox.assert_down();
    sandbox.assert_recorded();
}

/// "No descriptor per node beyond a bounded cache", and the bound follows what the system
/// allows.
#[test]
fn more_files_than_descriptors() {
    works_with_few_descriptors(&Sandbox::new());
}

/// "A file created read-only is written to by its creator, also when the descriptor cache
/// is full": the daemon of an ordinary user may not open it again either.
#[test]
fn more_files_than_descriptors_of_an_ordinary_user() {
    works_with_few_descriptors(&Sandbox::of_ordinary_user());
}

/// What is removed and still open has a descriptor each, which no cache gives up: when none is
/// left for another file, the cache does with fewer.
#[test]
fn the_cache_gives_way_to_files_that_are_removed_and_open() {
    let sandbox = Sandbox::new();
    mount_with_descriptors(&sandbox, 160, NOBODY);
    sandbox.sh(
        &sandbox.tree(),
        r#"python3 -c '
import os
for n in range(80): open("file%d" % n, "w").write("x")
gone = []
for n in range(100):
    gone.append(os.open("gone", os.O_CREAT | os.O_RDWR)); os.unlink("gone")
    with open("file%d" % (n % 80), "a") as f: f.write("more")
for fd in gone: os.write(fd, b"still"); assert os.pread(fd, 9, 0) == b"still"
'"#,
    );
    sandbox.try_umount().expect_code(4);
    sandbox.assert_down();
    sandbox.assert_recorded();
}

/// Where the daemon of an ordinary user has to open a file whose mode forbids it, the time of
/// its change moves: the mount shows the time that lower has, although nobody in it did
/// anything.
#[test]
fn a_file_that_is_opened_again_shows_the_time_of_that() {
    let sandbox = Sandbox::of_ordinary_user();
    let tree = sandbox.tree();
    sandbox.sh(&tree, "echo content >object; chmod 200 object");
    let lower = std::fs::File::open(&tree).unwrap();
    sandbox.mount_with(NOBODY);
    let shown = || sandbox.sh(&tree, "stat -c %.9Z object").trim().to_owned();
    let before = shown();
    // The first contact with a peer reads it.
    let arguments = [
        OsStr::new("peer"),
        "add".as_ref(),
        tree.as_ref(),
        sandbox.peer().as_ref(),
        "--name".as_ref(),
        "second".as_ref(),
    ]
    .map(OsStr::to_owned);
    sandbox.run(arguments).ok();
    let flush = [
        "sync".as_ref(),
        tree.as_os_str(),
        "--flush".as_ref(),
        "--peer".as_ref(),
        "second".as_ref(),
    ];
    sandbox.run(flush).ok();
    let there = rustix::fs::statat(&lower, "object", rustix::fs::AtFlags::empty()).unwrap();
    let there = format!("{}.{:09}", there.st_ctime, there.st_ctime_nsec);
    assert_eq!(
        shown(),
        there,
        "in the mount (left) and below; before: {before}"
    );
    drop(lower);
    sandbox.try_umount().expect_code(4);
    sandbox.assert_down();
    sandbox.assert_recorded();
}

/// A filesystem that takes no writes: whoever makes one waits. Until it is dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn new(point: &Path) -> Self {
        run(Command::new("fsfreeze").arg("-f").arg(point), PROMPT).ok();
        Self(point.to_owned())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        Command::new("fsfreeze")
            .arg("-u")
            .arg(&self.0)
            .status()
            .ok();
    }
}

/// Memory of the daemon in bytes.
fn memory(sandbox: &Sandbox) -> u64 {
    let daemon = sandbox.processes_of(Role::Daemon)[0].pid;
    let status = std::fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kilobytes.parse::<u64>().unwrap() << 10
}

/// "A journal that cannot keep up slows writers down instead of growing without bound": the
/// disk under the journal stands still. The writer waits with what the queue holds, and
/// goes on where it was when the disk does. Nothing is lost on the way.
#[test]
fn a_journal_that_cannot_keep_up_slows_writers_down() {
    const QUEUE: u64 = 65_536;
    const WRITES: u64 = 90_000;
    let sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox.root().join("image"), &sandbox.state(), 64);
    sandbox.mount_with(NOBODY);
    let before = memory(&sandbox);
    let frozen = Frozen::new(&sandbox.state());
    let script = format!(
        "import os
fd = os.open('written', os.O_CREAT | os.O_WRONLY); told = os.open('../outside/progress', os.O_CREAT | os.O_WRONLY)
for n in range({WRITES}):
    os.pwrite(fd, b'x', n)
    if n % 64 == 0: os.pwrite(told, b'%010d' % n, 0)
os.pwrite(told, b'%010d' % {WRITES}, 0)"
    );
    let mut writer = sandbox
        .command("python3")
        .args(["-c", &script])
        .current_dir(sandbox.tree())
        .spawn()
        .unwrap();
    let progress = || -> u64 {
        let told = std::fs::read_to_string(sandbox.outside().join("progress"));
        told.ok().and_then(|told| told.parse().ok()).unwrap_or(0)
    };
    let mut last = (0, Instant::now());
    let stopped = eventually("the writer waits", PROMPT * 2, || {
        let now = progress();
        if now != last.0 || now == 0 {
            last = (now, Instant::now());
        }
        if last.1.elapsed() > Duration::from_secs(2) && now + 1000 > QUEUE {
            Ok(now)
        } else {
            Err(format!("{now} writes"))
        }
    });
    // Beside the queue there is what the journal's writer has in hand, a group of 8,192.
    assert!(stopped < QUEUE + 8_192 + 1_000, "{stopped} writes went on");
    assert!(writer.try_wait().unwrap().is_none());
    let grown = memory(&sandbox).saturating_sub(before);
    eprintln!("waits after {stopped} writes, {} KiB more", grown >> 10);
    assert!(grown < 48 << 20, "{grown} bytes for a queue that is full");
    drop(frozen);
    assert!(writer.wait().unwrap().success());
    assert_eq!(progress(), WRITES);
    sandbox.try_umount().expect_code(4);
    sandbox.assert_down();
    sandbox.assert_recorded();
    drop(disk);
}
