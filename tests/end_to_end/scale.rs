//! Much of everything: more files than descriptors, and more than fit into a glance.

use std::ffi::OsStr;
use std::time::Duration;

use crate::support::program::run;
use crate::support::{Role, Sandbox, assert_same};

/// Mounts with so many descriptors for the daemon and whatever it starts.
#[track_caller]
fn mount_with_descriptors(sandbox: &Sandbox, descriptors: u32) {
    let mut command = sandbox.command("prlimit");
    command
        .arg(format!("--nofile={descriptors}:{descriptors}"))
        .arg(sandbox.program())
        .args([OsStr::new("mount"), sandbox.tree().as_ref()])
        .arg(sandbox.peer());
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
for mode, fd in made.items(): os.ftruncate(fd, 8); os.fsync(fd); os.close(fd)
# The agent is an ordinary user as well, and may not read its copy.
os.chmod("object-0", 0o600)
'
git init -q repo; cd repo; for i in $(seq 100); do mkdir -p d$((i % 20)); echo $i >d$((i % 20))/$i; done
git add .; git commit -qm one; git rm -qr d1 d2; git commit -qm two; git checkout -q HEAD~1
git gc -q; git fsck --strict"#;

#[track_caller]
fn works_with_few_descriptors(sandbox: &Sandbox) {
    mount_with_descriptors(sandbox, 160);
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
