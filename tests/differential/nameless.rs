//! Files without a name (`O_TMPFILE`), until they get one and after.

use crate::pair::Pair;
use crate::support::Sandbox;

const NAMELESS: &str = r"
import ctypes, errno, mmap, os, struct, sys, traceback
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
def name(fd, path):
    if libc.linkat(-100, b'/proc/self/fd/%d' % fd, -100, path.encode(), 0x400): return errno.errorcode[ctypes.get_errno()]
def nameless(where='.', mode=0o666, more=0): return os.open(where, os.O_TMPFILE | os.O_RDWR | more, mode)
def shown(of): stat = os.stat(of); return oct(stat.st_mode), stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_size
";

#[track_caller]
fn python(pair: &Pair, script: &str) {
    pair.python(&format!("{NAMELESS}{script}"));
}

/// It can be used like any other file, and is nowhere in the tree. What gets a name has it
/// for good, is recorded, and arrives on the peer with what was written before and after.
#[test]
fn a_file_without_a_name_is_a_file_and_may_get_one() {
    let pair = Pair::mirrored();
    python(
        &pair,
        r"
os.mkdir('d'); os.mkdir('e'); open('there', 'w').write('there')
fd = nameless('d'); print(shown(fd), os.listdir('d'), os.fstat(fd).st_dev == os.stat('d').st_dev)
os.write(fd, b'written ' * 50000); os.pwrite(fd, b'first', 1 << 20); os.ftruncate(fd, 1 << 19); os.posix_fallocate(fd, 0, 600000)
with mmap.mmap(fd, 0) as view: view[8:14] = b'mapped'; view.flush()
os.fchmod(fd, 0o640); os.utime(fd, ns=(5, 6)); os.setxattr(fd, 'user.a', b'before'); os.fsync(fd)
again = os.open('/proc/self/fd/%d' % fd, os.O_RDWR); os.pwrite(again, b'again', 40); print(os.pread(fd, 50, 0), shown(again), os.fstat(again).st_mtime_ns > 6)
# It gets a name in another directory, and more.
print(name(fd, 'there'), name(fd, 'missing/x'), name(fd, 'e/named'), shown(fd), shown('e/named'), os.path.samefile('e/named', '/proc/self/fd/%d' % fd))
print(os.getxattr('e/named', 'user.a'), open('e/named').read(50), os.listdir('d'))
os.write(fd, b'later'); os.setxattr('e/named', 'user.b', b'after'); print(name(fd, 'd/second'), name(fd, 'd/second'), shown('d/second'))
os.rename('e/named', 'moved'); os.unlink('d/second'); print(shown(fd), shown('moved'), os.pread(fd, 5, 400000), sorted(os.listdir('.')))
kept = nameless(); os.setxattr(kept, 'user.only', b'before'); print(name(kept, 'kept'), os.listxattr('kept'))
# What has lost its last name gets none again.
gone = nameless(); print(name(gone, 'short')); os.unlink('short'); print(shown(gone), name(gone, 'short'), os.path.exists('short'))
# What shall never get one does not.
closed = nameless(more=os.O_EXCL); os.write(closed, b'x'); print(name(closed, 'closed'), shown(closed), os.listdir('e'))
# Many at once, some of which are closed without a name.
many = [nameless('e') for n in range(100)]
for n, fd in enumerate(many): os.write(fd, b'%d' % n)
for n, fd in enumerate(many): n % 2 or name(fd, 'e/%d' % n); os.close(fd)
print([open('e/%d' % n).read() for n in range(0, 100, 2)], len(os.listdir('e')))
# Each has a number of its own.
print(len({os.fstat(nameless()).st_ino for n in range(20)}))
# Its directory goes.
os.mkdir('f'); there = os.open('f', os.O_RDONLY); fd = nameless('f'); os.rmdir('f'); os.write(fd, b'homeless'); print(name(fd, 'home'), open('home').read(), attempt(nameless, '/proc/self/fd/%d' % there))
print(attempt(nameless, 'there'), attempt(nameless, 'nowhere'), attempt(os.open, '.', os.O_TMPFILE | os.O_RDONLY))
# For reading and writing, whatever its mode.
for mode in (0, 0o400, 0o200): fd = nameless(mode=mode); os.write(fd, b'own'); print(os.pread(fd, 9, 0), shown(fd), name(fd, 'mode-%o' % mode), shown('mode-%o' % mode)); os.chmod('mode-%o' % mode, 0o600)
",
    );
    pair.down();
}

/// It belongs to who made it, with his umask, the group of a setgid directory, or what a
/// default ACL says.
#[test]
fn whose_it_is() {
    let pair = Pair::new();
    python(
        &pair,
        r"
ALICE, BOB, TEAM = 61201, 61202, 61300
def as_user(work, uid, groups=(), umask=0o022):
    sys.stdout.flush(); pid = os.fork()
    if pid == 0:
        try: os.umask(umask); os.setgroups(groups); os.setgid(uid); os.setuid(uid); work(); sys.stdout.flush(); os._exit(0)
        except BaseException: traceback.print_exc(); os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
os.umask(0)
for where in ('open', 'team', 'acl'): os.mkdir(where); os.chmod(where, 0o777)
os.chown('team', 0, TEAM); os.chmod('team', 0o2777)
acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', tag, bits, who) for tag, bits, who in ((1, 7, 0xffffffff), (2, 6, BOB), (4, 5, 0xffffffff), (16, 7, 0xffffffff), (32, 0, 0xffffffff)))
os.setxattr('acl', 'system.posix_acl_default', acl)
def work(where, tag):
    for mode in (0o666, 0o600, 0o4755, 0o2775, 0):
        fd = nameless(where, mode); path = '%s/%s-%o' % (where, tag, mode)
        print(shown(fd), name(fd, path), shown(path), attempt(os.getxattr, path, 'system.posix_acl_access')); os.write(fd, b'x'); print(shown(path))
for where in ('open', 'team', 'acl'):
    for tag, uid, groups, umask in (('a', ALICE, [TEAM], 0o022), ('b', BOB, [], 0o077), ('r', 0, [], 0o027)): as_user(lambda: work(where, tag), uid, groups, umask)
os.mkdir('closed'); os.chmod('closed', 0o755); as_user(lambda: print(attempt(nameless, 'closed')), ALICE)
",
    );
    pair.down();
}

/// "The unprivileged mount does the same job": also where its mode keeps everybody out, and
/// when its descriptor has long left the cache.
#[test]
fn in_the_mount_of_an_ordinary_user() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.mount();
    let script = format!(
        r#"{NAMELESS}
made = {{mode: nameless(mode=mode) for mode in (0o644, 0o400, 0)}}
for n in range(3000): open('file%d' % n, 'w').write('x')
for mode, fd in made.items():
    os.write(fd, b'content'); assert os.pread(fd, 9, 0) == b'content'; assert name(fd, 'named-%o' % mode) is None
    os.write(fd, b' and more'); assert os.stat('named-%o' % mode).st_mode & 0o777 == mode
    os.chmod('named-%o' % mode, 0o600); assert open('named-%o' % mode).read() == 'content and more'
"#
    );
    let program = sandbox.outside().join("program.py");
    std::fs::write(&program, script).unwrap();
    sandbox.sh(
        &sandbox.tree(),
        &format!("umask 0; python3 {}", program.display()),
    );
    sandbox.flush();
    sandbox.umount();
    sandbox.assert_recorded();
    crate::support::assert_same(&sandbox.tree(), &sandbox.peer());
}
