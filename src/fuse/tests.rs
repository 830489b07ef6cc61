//! Real mounts. Whatever works inside one is another process: this one holds the
//! FUSE descriptor, and could not be killed while it waited for itself.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Channel, Mount, MountError, MountOptions, NoRing, clear_dead_mount, mount};
use crate::fs::tests::{Fixture, assert_captured};
use crate::fs::{Filesystem, FsOptions, Lower, LowerError};

/// A mounted fixture, unmounted at the end whatever happens.
pub(crate) struct Mounted {
    pub(crate) t: Fixture,
    pub(crate) mount: Option<Mount>,
    options: MountOptions,
}

/// The kernel offers FUSE over io_uring to whoever mounts while this lives: its parameter
/// is on. Only one process at a time, so that each puts back what it found.
struct UringOn {
    was: String,
    _turn: std::fs::File,
}

impl UringOn {
    const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

    fn new() -> Option<Self> {
        let turn = std::fs::File::create(std::env::temp_dir().join("mirrorfs-test-uring")).ok()?;
        turn.lock().ok()?;
        let was = std::fs::read_to_string(Self::PARAMETER).ok()?;
        std::fs::write(Self::PARAMETER, "Y").ok()?;
        Some(Self { was, _turn: turn })
    }
}

impl Drop for UringOn {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::PARAMETER, self.was.trim());
    }
}

impl Mounted {
    /// None where this process may not mount.
    pub(crate) fn new() -> Option<Self> {
        Self::with(MountOptions::default())
    }

    /// Served through the device, whatever else the kernel offers.
    fn through_the_device() -> Option<Self> {
        let mounted = Self::with(MountOptions {
            io_uring: false,
            ..MountOptions::default()
        })?;
        let channel = mounted.mount.as_ref().unwrap().channel();
        assert_eq!(*channel, Channel::Device(NoRing::NotWanted));
        Some(mounted)
    }

    /// Served over io_uring. None where the kernel does not know how.
    fn over_io_uring() -> Option<Self> {
        let parameter = UringOn::new()?;
        let mounted = Self::with(MountOptions::default())?;
        drop(parameter);
        assert_eq!(*mounted.mount.as_ref().unwrap().channel(), Channel::IoUring);
        Some(mounted)
    }

    fn with(options: MountOptions) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            return None;
        }
        let t = Fixture::new();
        let mut mounted = Self {
            t,
            mount: None,
            options,
        };
        mounted.up();
        Some(mounted)
    }

    fn up(&mut self) {
        let up = mount(self.t.fs.clone(), &self.t.tree, self.options.clone()).unwrap();
        self.mount = Some(up);
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.t.tree
    }

    pub(crate) fn device(&self) -> u64 {
        self.mount.as_ref().unwrap().device()
    }

    /// Runs a shell script in the mount and returns what it prints.
    pub(crate) fn sh(&self, script: &str) -> String {
        self.run("sh", &["-ec", script])
    }

    pub(crate) fn python(&self, script: &str) -> String {
        self.run("python3", &["-c", script])
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new("sh")
            .args(["-c", "cd \"$0\" && exec \"$@\""])
            .arg(self.dir())
            .arg(program)
            .args(arguments)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_SYSTEM", "/dev/null")
            // Nothing that goes on in the background and keeps the mount busy.
            .env("GIT_CONFIG_COUNT", "2")
            .env("GIT_CONFIG_KEY_0", "gc.auto")
            .env("GIT_CONFIG_VALUE_0", "0")
            .env("GIT_CONFIG_KEY_1", "maintenance.auto")
            .env("GIT_CONFIG_VALUE_1", "false")
            .env("GIT_AUTHOR_NAME", "A")
            .env("GIT_AUTHOR_EMAIL", "a@example.org")
            .env("GIT_COMMITTER_NAME", "A")
            .env("GIT_COMMITTER_EMAIL", "a@example.org")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?}\n{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// Unmounts and compares the journal with the plain directory.
    pub(crate) fn down(&mut self) {
        self.mount.as_ref().unwrap().unmount().unwrap();
        self.mount = None;
        self.t.assert_captured();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take()
            && mount.unmount().is_err()
        {
            let _ = mount.abort();
            let _ = super::mount::detach(&self.t.tree, true);
        }
    }
}

#[test]
fn git_works_through_the_device() {
    if let Some(m) = Mounted::through_the_device() {
        git_works(m);
    }
}

#[test]
fn git_works_over_io_uring() {
    if let Some(m) = Mounted::over_io_uring() {
        git_works(m);
    }
}

fn git_works(mut m: Mounted) {
    m.sh("git init -q repo && cd repo
         for i in $(seq 60); do mkdir -p d$((i % 7)); echo $i > d$((i % 7))/f$i; done
         git add . && git commit -qm one
         git checkout -qb side && git rm -q d1/f1 && echo changed > d2/f2
         chmod +x d3/f3 && ln -s f4 d4/link && git add . && git commit -qm two
         git checkout -q - && test -e d1/f1 && git merge -q side
         git gc -q && git fsck --strict --no-dangling
         test -z \"$(git status --porcelain)\"
         cd .. && git clone -q repo copy && cd copy && git fsck --strict
         git rebase -q HEAD~1 && test -z \"$(git status --porcelain)\"");
    m.down();
}

#[test]
fn sqlite_works_with_its_log() {
    let Some(mut m) = Mounted::new() else { return };
    m.python(
        "
import sqlite3
a = sqlite3.connect('db'); b = sqlite3.connect('db')
assert a.execute('pragma journal_mode=wal').fetchone()[0] == 'wal'
a.execute('create table t(x)')
for n in range(200):
    a.execute('insert into t values(?)', (n,)); a.commit()
    assert b.execute('select count(*) from t').fetchone()[0] == n + 1
assert b.execute('pragma integrity_check').fetchone()[0] == 'ok'
a.close(); b.close()
",
    );
    m.down();
}

#[test]
fn files_are_what_posix_says_through_the_device() {
    if let Some(m) = Mounted::through_the_device() {
        files_are_what_posix_says(m);
    }
}

#[test]
fn files_are_what_posix_says_over_io_uring() {
    if let Some(m) = Mounted::over_io_uring() {
        files_are_what_posix_says(m);
    }
}

#[allow(clippy::too_many_lines)] // one script
fn files_are_what_posix_says(mut m: Mounted) {
    m.python(
        r"
import os, mmap, errno
# Stores through a mapping, and what another descriptor sees of them.
with open('mapped', 'w+b') as f:
    f.truncate(20000)
    with mmap.mmap(f.fileno(), 0) as view:
        view[5000:5005] = b'store'
        assert os.pread(f.fileno(), 5, 5000) == b'store'
        view.flush()
assert open('mapped','rb').read()[5000:5005] == b'store'
# Truncated on opening, then shorter.
for content in (b'long content', b'short'):
    with open('trunc', 'wb') as f: f.write(content)
assert open('trunc','rb').read() == b'short' and os.stat('trunc').st_size == 5
# Appending through two descriptors.
a = os.open('log', os.O_WRONLY|os.O_APPEND|os.O_CREAT); b = os.open('log', os.O_WRONLY|os.O_APPEND)
for n in range(50): os.write(a, b'a'); os.write(b, b'b')
os.close(a); os.close(b)
assert open('log','rb').read() == b'ab' * 50
# Replaced while open.
old = open('trunc', 'rb'); open('new', 'wb').write(b'newer'); os.rename('new', 'trunc')
assert old.read() == b'short' and open('trunc','rb').read() == b'newer'
assert os.fstat(old.fileno()).st_nlink == 0
old.close()
# Links.
os.link('trunc', 'second'); assert os.stat('trunc').st_nlink == 2
os.unlink('trunc'); assert os.stat('second').st_nlink == 1
# Unlinked and still open.
f = open('gone', 'w+b'); os.unlink('gone'); f.write(b'x' * 100000); f.flush(); f.seek(0)
assert f.read() == b'x' * 100000 and os.fstat(f.fileno()).st_nlink == 0
f.close()
# A read-only file that its maker writes to.
fd = os.open('object', os.O_RDWR|os.O_CREAT|os.O_EXCL, 0o444); os.write(fd, b'object'); os.close(fd)
# Names.
for name in (b'n' * 255, b'\xff\xfe', b'a\nb', ' '.encode()):
    open(name, 'wb').close()
    assert name in os.listdir(b'.')
assert '.mirrorfs' not in os.listdir('.') and not os.path.exists('.mirrorfs')
try: os.mkdir('.mirrorfs'); assert False
except PermissionError: pass
# Listing while the directory changes.
os.mkdir('many')
for n in range(1000): open(f'many/{n}', 'w').close()
seen = []
with os.scandir('many') as entries:
    for n, entry in enumerate(entries):
        seen.append(entry.name)
        if n % 3 == 0: os.unlink(f'many/{entry.name}')
assert len(seen) == len(set(seen)) == 1000
assert len(os.listdir('many')) == 666
# Sparse.
with open('sparse', 'wb') as f: f.seek(1 << 20); f.write(b'end')
fd = os.open('sparse', os.O_RDONLY)
assert os.lseek(fd, 0, os.SEEK_DATA) > 0
os.close(fd)
with open('sparse', 'r+b') as f: os.posix_fallocate(f.fileno(), 0, 4096)
# Copying inside.
src = os.open('sparse', os.O_RDONLY); dst = os.open('copied', os.O_WRONLY|os.O_CREAT, 0o600)
while os.copy_file_range(src, dst, 1 << 20): pass
os.close(src); os.close(dst)
assert open('copied','rb').read() == open('sparse','rb').read()
# Attributes.
os.setxattr('copied', 'user.a', b'1'); assert os.listxattr('copied') == ['user.a']
os.utime('copied', ns=(1, -1_200_000_000)); assert os.stat('copied').st_mtime_ns == -1_200_000_000
os.mkfifo('fifo'); os.symlink('x' * 300, 'symlink'); assert len(os.readlink('symlink')) == 300
# Durable.
fd = os.open('log', os.O_WRONLY|os.O_DSYNC); os.write(fd, b'!'); os.fsync(fd); os.close(fd)
fd = os.open('.', os.O_RDONLY); os.fsync(fd); os.close(fd)
# Locks stay the kernel's.
import fcntl
f = open('log'); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); f.close()
",
    );
    m.down();
}

#[test]
fn many_callers_at_once_through_the_device() {
    if let Some(m) = Mounted::through_the_device() {
        many_callers_at_once(m);
    }
}

#[test]
fn many_callers_at_once_over_io_uring() {
    if let Some(m) = Mounted::over_io_uring() {
        many_callers_at_once(m);
    }
}

/// More callers than slots, with contents larger than a request, syncing meanwhile.
fn many_callers_at_once(mut m: Mounted) {
    m.python(
        "
import concurrent.futures, os, random
def work(n):
    os.sched_setaffinity(0, {n % os.cpu_count()})
    content = random.Random(n).randbytes((3 << 20) + n)
    name = f'f{n}'
    with open(name, 'wb') as f:
        f.write(content)
        os.fsync(f.fileno())
    fd = os.open(name, os.O_RDONLY | os.O_DIRECT)
    read = b''
    while piece := os.pread(fd, 1 << 20, len(read)): read += piece
    os.close(fd)
    os.rename(name, f'g{n}')
    return read == content
with concurrent.futures.ProcessPoolExecutor(24) as pool:
    assert all(pool.map(work, range(48)))
assert len(os.listdir()) == 48
",
    );
    m.down();
}

#[test]
fn what_the_protocol_cannot_carry_is_refused_and_nothing_happens() {
    let Some(mut m) = Mounted::new() else { return };
    m.python(
        "
import errno, fcntl, os, subprocess
content = os.urandom(16384)
with open('f', 'wb') as f: f.write(content)
def allocate(*how):
    return subprocess.run(['fallocate', *how, 'f'], env={**os.environ, 'LC_ALL': 'C'},
                          capture_output=True, text=True)
# Allocating, with and without a new size, punching, zeroing.
for how in [['-l', '20000'], ['-n', '-l', '30000'], ['-p', '-o', '4096', '-l', '4096'],
            ['-z', '-o', '8192', '-l', '100'], ['-z', '-n', '-o', '20000', '-l', '1']]:
    done = allocate(*how)
    assert done.returncode == 0, done
content = (content[:4096] + bytes(4096) + bytes(100) + content[8292:]).ljust(20000, b'\\0')
assert open('f', 'rb').read() == content
# Taking a range out, and putting one in.
for how in ['-c', '-i']:
    done = allocate(how, '-o', '4096', '-l', '4096')
    assert 'not supported' in done.stderr, done
assert open('f', 'rb').read() == content
def refused(error, call):
    try: call()
    except OSError as refusal: assert refusal.errno == error, refusal
    else: assert False
# FS_IOC_GETFLAGS, as lsattr asks.
refused(errno.ENOTTY, lambda: fcntl.ioctl(os.open('f', os.O_RDONLY), 0x80086601, bytes(8)))
",
    );
    m.down();
}

#[test]
fn inode_numbers_and_times_survive_a_remount() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("mkdir -p a/b && echo x > a/b/f && ln a/b/f a/g; touch -d '1931-05-04 03:02:01.25' a/b");
    let stat = "stat -c '%n %i %h %.Y %Z %.W %a %s' . a a/b a/b/f a/g; stat -c %a .";
    let before = m.sh(stat);
    assert!(before.contains("a/b "), "{before}");
    assert!(before.contains(" -1220129878.75"), "{before}");
    let births = m.sh("stat -c '%n %.W' a a/b a/b/f");
    m.sh("ls -lR > /dev/null; echo 2 > /proc/sys/vm/drop_caches");
    assert_eq!(m.sh(stat), before, "after the kernel forgot");
    m.down();
    m.t.reopen();
    m.up();
    assert_eq!(m.sh(stat), before, "after a remount");
    m.down();
    assert_eq!(
        m.sh("stat -c '%n %.W' a a/b a/b/f"),
        births,
        "as lower has it"
    );
}

#[test]
fn other_users_make_files_of_their_own() {
    let Some(mut m) = Mounted::new() else { return };
    let dir = m.dir().to_path_buf();
    // The temporary directory around the tree is closed to others.
    std::fs::set_permissions(dir.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
    let text = m.sh(
        "mkdir open team acl && chmod 1777 open && chown :4242 team && chmod 2775 team
         cp /bin/true open/suid && chmod 6755 open/suid && chmod o+w open/suid
         as='setpriv --reuid 65534 --regid 65534 --groups 4242'
         $as sh -ec 'umask 027; cd open; echo x > file; mkdir dir; mkfifo fifo; ln -s a link
                     cd ../team; umask 002; echo y > shared; mkdir sub'
         stat -c '%n %u %g %a' open/file open/dir open/fifo open/link team/shared team/sub
         $as sh -c 'echo x >> open/suid'; stat -c '%n %u %g %a' open/suid
         $as sh -c '! rm open/suid 2>/dev/null && ! echo z > acl/f 2>/dev/null'
         chmod 777 acl; setfacl -d -m u::rwx,g::rwx,o::- acl
         $as sh -c 'umask 077; echo z > acl/f'; stat -c '%n %a' acl/f",
    );
    assert_eq!(
        text,
        "open/file 65534 65534 640\nopen/dir 65534 65534 750\nopen/fifo 65534 65534 640\n\
         open/link 65534 65534 777\nteam/shared 65534 4242 664\nteam/sub 65534 4242 2775\n\
         open/suid 0 0 757\nacl/f 660\n"
    );
    m.down();
}

#[test]
fn a_busy_mount_stays() {
    let Some(mut m) = Mounted::new() else { return };
    m.sh("echo x > f");
    let mut child = Command::new("sh")
        .arg("-c")
        .arg("cd \"$0\" && echo in && read line")
        .arg(m.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 3];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    let mount = m.mount.as_ref().unwrap();
    assert!(matches!(mount.unmount(), Err(MountError::Busy { .. })));
    assert!(!mount.ended());
    assert!(matches!(Lower::open(m.dir()), Err(LowerError::Fuse { .. })));
    drop(child.stdin.take());
    child.wait().unwrap();
    m.down();
}

/// The other process of the tests below: serves a mount until its standard input is
/// closed. As a test of its own it does nothing.
#[test]
fn child_serves() {
    let Some(base) = std::env::var_os("MIRRORFS_TEST_SERVE").map(PathBuf::from) else {
        return;
    };
    let mut parent = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let tree = base.join("tree");
    let (journal, _) = mirrorfs_journal::Journal::open(&base.join("state")).unwrap();
    let fs = Filesystem::new(
        Lower::open(&tree).unwrap(),
        journal.recorder(),
        FsOptions::default(),
    )
    .unwrap();
    fs.recover(&journal).unwrap();
    let options = MountOptions {
        io_uring: std::env::var_os("MIRRORFS_TEST_DEVICE").is_none(),
        ..MountOptions::default()
    };
    let up = mount(fs, &tree, options).unwrap();
    parent.write_all(b"!").unwrap();
    // Ends with the other side.
    let _ = parent.read(&mut [0]);
    up.unmount().unwrap();
    assert_captured(&journal, &tree);
    journal.close().unwrap();
}

/// Starts [`child_serves`] on a base directory and waits until it has mounted.
fn serve(base: &Path, mut command: Command) -> (Child, UnixStream) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let child = command
        .args(["--exact", "fuse::tests::child_serves", "--nocapture"])
        .env("MIRRORFS_TEST_SERVE", base)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // It holds the other end, and a child that fails could not be told from a slow one.
    drop(command);
    let mut ready = [0];
    ours.read_exact(&mut ready)
        .expect("the child did not mount");
    (child, ours)
}

fn base() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(base.path().join("tree/.mirrorfs/staging")).unwrap();
    std::fs::create_dir(base.path().join("tree/.mirrorfs/trash")).unwrap();
    std::fs::create_dir(base.path().join("state")).unwrap();
    base
}

#[test]
fn a_killed_daemon_leaves_a_dead_mount_and_every_write_through_the_device() {
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.env("MIRRORFS_TEST_DEVICE", "1");
    a_killed_daemon_leaves_a_dead_mount_and_every_write(own);
}

#[test]
fn a_killed_daemon_leaves_a_dead_mount_and_every_write_over_io_uring() {
    let Some(_on) = UringOn::new() else { return };
    let own = Command::new(std::env::current_exe().unwrap());
    a_killed_daemon_leaves_a_dead_mount_and_every_write(own);
}

fn a_killed_daemon_leaves_a_dead_mount_and_every_write(daemon: Command) {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return;
    }
    let base = base();
    let tree = base.path().join("tree");
    let own = || Command::new(std::env::current_exe().unwrap());
    let (mut child, _socket) = serve(base.path(), daemon);
    let wrote = Command::new("sh")
        .args(["-ec", "cd \"$0\"; echo one > a; mkdir d; echo two > d/b"])
        .arg(&tree)
        .status()
        .unwrap();
    assert!(wrote.success());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(Lower::open(&tree), Err(LowerError::Dead { .. })));
    assert!(clear_dead_mount(&tree).unwrap());
    assert!(!clear_dead_mount(&tree).unwrap());
    assert_eq!(std::fs::read(tree.join("d/b")).unwrap(), b"two\n");
    let (mut child, socket) = serve(base.path(), own());
    drop(socket);
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return;
    }
    let found = Command::new("sh")
        .args(["-c", "command -v fusermount3 && command -v setpriv"])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    if !found.success() {
        return;
    }
    let base = base();
    let program = base.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let chown = Command::new("chown")
        .args(["-R", "65534:65534"])
        .arg(base.path())
        .status()
        .unwrap();
    assert!(chown.success());
    let tree = base.path().join("tree");
    // Where udev does not run the device is open to root only: in a mount namespace of
    // its own the user finds one as udev makes it.
    let device = "d=\"$0\"; mkdir \"$d/dev\"; mount -t tmpfs none \"$d/dev\"
        mknod \"$d/dev/fuse\" c 10 229; chmod 666 \"$d/dev/fuse\"
        mount --bind \"$d/dev/fuse\" /dev/fuse; exec \"$@\"";
    let user = [
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--",
    ];
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--propagation", "private", "sh", "-ec", device])
        .arg(base.path())
        .args(user)
        .arg(&program);
    let (mut child, socket) = serve(base.path(), command);
    let pid = child.id().to_string();
    let inside = || {
        let mut command = Command::new("nsenter");
        command.args(["-m", "-t", &pid]);
        command
    };
    let script = "cd \"$0\"; umask 022; echo one > a; mkdir d; mv a d/a; ln d/a d/b; rm d/a
        git init -q repo; cd repo; git config user.email a@b; git config user.name a
        for i in $(seq 30); do echo $i > f$i; done; git add .; git commit -qm one
        rm f1; git checkout -q f1; git fsck --strict; test \"$(stat -c %u f1)\" = 65534
        exec 3> ro; chmod 444 ro; echo late >&3; test \"$(cat ro)\" = late";
    let worked = inside()
        .args(user)
        .args(["sh", "-ec", script])
        .arg(&tree)
        .env("HOME", base.path())
        .output()
        .unwrap();
    // Nobody else is let in, not even root.
    let others = inside().arg("ls").arg(&tree).output().unwrap();
    drop(socket);
    let status = child.wait().unwrap();
    assert!(
        worked.status.success(),
        "{}",
        String::from_utf8_lossy(&worked.stderr)
    );
    assert!(!others.status.success());
    assert!(status.success());
    assert!(tree.join("repo/f30").exists(), "a plain directory again");
}
