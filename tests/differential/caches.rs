//! "What the kernel has cached is right, because nothing changes the tree except through
//! the mount": whoever changes a file, the mount shows what is in lower, at once.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Random, Role, Sandbox, assert_same, rounds};
use crate::view::{View, xattrs};

/// A mount, and the directory below it by a descriptor that was opened before.
struct Covered {
    sandbox: Sandbox,
    lower: File,
}

impl Covered {
    fn new(script: &str) -> Self {
        let sandbox = Sandbox::new();
        sandbox.sh(&sandbox.tree(), script);
        let lower = File::open(sandbox.tree()).unwrap();
        sandbox.mount();
        sandbox.flush();
        Self { sandbox, lower }
    }

    fn lower(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.lower.as_raw_fd()).into()
    }

    /// Runs a shell script in the mount.
    fn here(&self, script: &str) {
        self.sandbox.sh(&self.sandbox.tree(), script);
    }

    /// Runs a shell script in the peer's directory, and waits until all of it is in the
    /// mount.
    fn there(&self, script: &str) {
        self.sandbox.sh(&self.sandbox.peer(), script);
        self.sandbox.converges();
        self.sandbox.flush();
    }

    /// Fails unless the mount shows exactly what is in lower. Afterwards the kernel has
    /// everything cached, and some names as missing.
    #[track_caller]
    fn check(&self) {
        let (tree, lower) = (self.sandbox.tree(), self.lower());
        for missing in ["none", "new", "later", "d/new", "d/later", "moved"] {
            let path = |root: &Path| root.join(missing).symlink_metadata().is_ok();
            assert_eq!(
                path(&tree),
                path(&lower),
                "{missing} in the mount and in lower"
            );
        }
        let (mounted, below) = (View::of(&tree, []), View::of_lower(&lower));
        let names = |view: &View| view.nodes.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&mounted), names(&below));
        for (path, shown) in &mounted.nodes {
            let name = path.escape_ascii();
            let real = &below.nodes[path];
            // The root's own count of links includes the reserved directory in lower.
            if !path.is_empty() {
                assert!(
                    shown.shown.is_like(&real.shown),
                    "{name}:\n  mount {:?}\n  lower {:?}",
                    shown.shown,
                    real.shown
                );
            }
            assert_eq!(
                (shown.ino, shown.mtime, shown.ctime),
                (real.ino, real.mtime, real.ctime),
                "number, mtime and ctime of {name} in the mount (left) and in lower"
            );
            let at = |root: &Path| root.join(OsStr::from_bytes(path));
            let (shown_at, real_at) = (at(&tree), at(&lower));
            if path.is_empty() {
                continue;
            }
            assert_eq!(xattrs(&shown_at), xattrs(&real_at), "attributes of {name}");
            if real.shown.file_type.is_file() {
                let read = |path| std::fs::read(path).unwrap();
                assert!(read(&shown_at) == read(&real_at), "content of {name}");
            } else if real.shown.file_type.is_symlink() {
                let read = |path| std::fs::read_link(path).unwrap();
                assert_eq!(read(&shown_at), read(&real_at), "target of {name}");
            }
        }
    }

    /// Ends as every test of the filesystem does.
    fn down(self) {
        assert!(self.sandbox.status().conflicts.is_empty());
        drop(self.lower);
        self.sandbox.umount();
    }
}

const TREE: &str = "mkdir -p d/sub e; for i in $(seq 30); do echo \"content $i\" >d/f$i; done
    head -c 300000 /dev/zero | tr '\\0' a >large; echo one >replaced; echo one >edited
    ln -s one link; ln edited hard; setfattr -n user.note -v one edited";

/// The daemon, standing still until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(sandbox: &Sandbox) -> Self {
        let daemon = sandbox.processes_of(Role::Daemon)[0].pid;
        let daemon = Pid::from_raw(daemon.cast_signed()).unwrap();
        kill_process(daemon, Signal::STOP).unwrap();
        Self(daemon)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).ok();
    }
}

/// "Reads never leave the kernel once warm": what is known can be walked, opened, read,
/// mapped and closed, and what is known to be missing missed, while nobody answers.
#[test]
fn what_is_known_costs_no_request() {
    let covered = Covered::new(TREE);
    let look = "timeout -s KILL 30 python3 -c \"
import hashlib, mmap, os
seen = hashlib.sha256()
def note(*what): seen.update(repr(what).encode())
for dir, dirs, names in os.walk('.'):
    dirs.sort(); note(dir, dirs, sorted(names), os.stat(dir))
    for name in sorted(names):
        path = os.path.join(dir, name); note(path, os.lstat(path))
        if os.path.islink(path): note(os.readlink(path)); continue
        # Not open(): that asks whether it is a terminal, and ioctl always asks the daemon.
        f = os.open(path, os.O_RDONLY)
        note(os.read(f, 1 << 20))
        if os.fstat(f).st_size: note(mmap.mmap(f, 0, prot=mmap.PROT_READ)[:100])
        os.close(f)
    for missing in ('none', 'none.lock'):
        try: os.stat(os.path.join(dir, missing))
        except FileNotFoundError: note('missing')
print(seen.hexdigest())\"";
    let run = || covered.sandbox.sh(&covered.sandbox.tree(), look);
    let before = run();
    // What the first look has made known by asking is known at the second.
    assert_eq!(run(), before);
    let stopped = Stopped::new(&covered.sandbox);
    assert_eq!(run(), before);
    drop(stopped);
    covered.check();
    covered.down();
}

/// Changes by the peer: of everything that the kernel has cached.
#[test]
fn what_the_peer_changes_shows() {
    let covered = Covered::new(TREE);
    covered.check();
    for (what, change) in [
        ("a replaced file", "echo two >t; mv t replaced"),
        (
            "an edit in place",
            "echo two >>edited; printf X | dd of=large bs=1 seek=200000 conv=notrunc status=none",
        ),
        (
            "names that were missing",
            "echo x >new; echo x >d/new; mkdir later; echo x >later/in",
        ),
        ("removals", "rm d/f1 d/f2; rmdir e"),
        ("a shorter file", "truncate -s 10 large; truncate -s 0 d/f3"),
        (
            "modes and times",
            "chmod 600 d/f4; chmod 700 d; touch -d 2001-02-03 d/f5",
        ),
        (
            "attributes",
            "setfattr -n user.note -v two edited; setfattr -x user.note edited; setfattr -n user.new -v x d/f6",
        ),
        ("a link elsewhere", "ln -sfn two link"),
        ("a moved directory", "mv d moved"),
        (
            "a file in place of a directory",
            "rm -r later; echo file >later",
        ),
        (
            "a directory in place of a file",
            "rm new; mkdir new; echo in >new/in",
        ),
        ("a swap", "mv replaced t; mv large replaced; mv t large"),
        (
            "a longer file",
            "truncate -s 400000 large; printf end >>large",
        ),
    ] {
        eprintln!("{what}");
        covered.there(change);
        covered.check();
    }
    covered.down();
}

/// A program that holds a file open or mapped when the peer replaces it keeps the old one;
/// its name shows the new one, and the old one is not in the new one's caches.
#[test]
fn what_is_open_when_the_peer_replaces_it() {
    let covered = Covered::new(TREE);
    covered.check();
    let open = File::open(covered.sandbox.tree().join("replaced")).unwrap();
    let large = File::open(covered.sandbox.tree().join("large")).unwrap();
    covered
        .there("echo two >t; mv t replaced; head -c 300000 /dev/zero | tr '\\0' b >t; mv t large");
    covered.check();
    assert_eq!(std::io::read_to_string(&open).unwrap(), "one\n");
    assert_eq!(
        std::io::read_to_string(&large).unwrap(),
        "a".repeat(300_000)
    );
    assert_eq!(
        std::os::unix::fs::MetadataExt::nlink(&open.metadata().unwrap()),
        0
    );
    covered.check();
    drop((open, large));
    covered.down();
}

/// Stores through mappings, with and without a sync, by processes that end well and that
/// are killed.
#[test]
fn what_is_stored_through_mappings_shows() {
    let covered = Covered::new(TREE);
    covered.check();
    for (what, end) in [
        ("synced", "view.flush()"),
        ("unmapped", "view.close()"),
        ("closed", "os.close(os.open('large', os.O_RDONLY))"),
        ("exit", "os._exit(0)"),
        ("killed", "os.kill(os.getpid(), 9)"),
    ] {
        eprintln!("{what}");
        covered.here(&format!(
            "python3 -c \"
import mmap, os
fd = os.open('large', os.O_RDWR); size = os.fstat(fd).st_size
view = mmap.mmap(fd, size)
for at in range(0, size, 4096): view[at:at + 6] = b'{what}'[:6].ljust(6)
os.pwrite(fd, b'written', 10)
{end}
\" || true"
        ));
        // The end of a mapping waits for what was stored through it.
        covered.check();
        let content = std::fs::read(covered.sandbox.tree().join("large")).unwrap();
        assert!(content[8192..].starts_with(&what.as_bytes()[..6.min(what.len())]));
    }
    covered.sandbox.flush();
    covered.check();
    covered.down();
}

/// "Files below the mount changed behind its back are found at the next recovery scan": by
/// a program that was inside before, or through another way to the disk.
#[test]
fn what_changes_behind_the_mount_is_found_by_the_next() {
    let mut covered = Covered::new(TREE);
    covered.check();
    let lower = covered.lower();
    std::fs::write(lower.join("d/f1"), "behind").unwrap();
    std::fs::remove_file(lower.join("d/f2")).unwrap();
    std::fs::rename(lower.join("d/f3"), lower.join("e/f3")).unwrap();
    std::fs::create_dir(lower.join("later")).unwrap();
    std::fs::write(lower.join("later/in"), "behind").unwrap();
    std::fs::write(lower.join("t"), "behind").unwrap();
    std::fs::rename(lower.join("t"), lower.join("replaced")).unwrap();
    // Meanwhile somebody works in the mount, on other files and on one of these.
    covered.here("echo more >>d/f4; echo more >>d/f1; mv d/f5 d/f6");
    covered.sandbox.try_umount().ok();
    covered.sandbox.assert_down();
    covered.lower = File::open(covered.sandbox.tree()).unwrap();
    covered
        .sandbox
        .mount()
        .expect_said(&["new", "changed", "removed"]);
    covered.check();
    covered.sandbox.flush();
    assert_same(&covered.sandbox.tree(), &covered.sandbox.peer());
    let content = std::fs::read_to_string(covered.sandbox.peer().join("d/f1")).unwrap();
    // Appended to what the kernel took for the end: of this nobody can be warned in time.
    assert_eq!(content, "behind\0\0\0\0more\n");
    covered.down();
}

/// Several processes in the mount at once, the peer meanwhile on files of its own, and
/// the daemon stopped, killed and started again in between.
#[test]
fn what_everybody_changes_at_once_shows() {
    let mut random = Random::new("caches");
    let mut covered = Covered::new(TREE);
    covered.here("mkdir here there");
    for round in 0..rounds(4, 40) {
        let work = |seed: u64, dir: &str| {
            format!(
                "python3 -c \"
import mmap, os, random
random.seed({seed}); names = ['{dir}/n%d' % n for n in range(25)]
for step in range(150):
    a, b = random.choice(names), random.choice(names)
    try:
        what = random.randrange(11)
        if what < 4:
            with open(a, 'r+b' if os.path.exists(a) else 'wb') as f:
                f.seek(random.randrange(9000)); f.write(bytes([65 + step % 26]) * random.randrange(6000))
        elif what == 4: os.rename(a, b)
        elif what == 5: os.unlink(a)
        elif what == 6: os.truncate(a, random.randrange(10000))
        elif what == 7: os.chmod(a, random.choice([0o644, 0o600, 0o755]))
        elif what == 8: os.setxattr(a, 'user.x', b'%d' % step)
        elif what == 9: os.utime(a, ns=(step, step * 1000000007))
        else:
            with open(a, 'r+b') as f, mmap.mmap(f.fileno(), 0) as view: view[0:1] = b'm'
    except (FileNotFoundError, ValueError, FileExistsError): pass
\""
            )
        };
        let seeds: Vec<u64> = (0..4).map(|_| random.below(1 << 30)).collect();
        std::thread::scope(|scope| {
            let covered = &covered;
            for seed in &seeds[..3] {
                scope.spawn(move || covered.here(&work(*seed, "here")));
            }
            scope.spawn(|| {
                covered
                    .sandbox
                    .sh(&covered.sandbox.peer(), &work(seeds[3], "there"))
            });
        });
        covered.sandbox.flush();
        covered.sandbox.converges();
        covered.check();
        match round % 3 {
            0 => {
                covered.sandbox.umount();
            }
            1 => covered.sandbox.kill_daemon(),
            _ => continue,
        }
        eprintln!("starting again");
        if round % 3 == 1 {
            covered
                .sandbox
                .run(["umount".as_ref(), covered.sandbox.tree().as_os_str()]);
        }
        covered.lower = File::open(covered.sandbox.tree()).unwrap();
        covered.sandbox.mount();
        covered.check();
        covered.sandbox.flush();
        covered.check();
    }
    covered.down();
}
