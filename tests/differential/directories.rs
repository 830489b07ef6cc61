//! Large, deep and changing directories, and the names in them.

use crate::pair::Pair;
use crate::support::rounds;

/// A directory of 100,000 entries: listed completely and without doubles, from remembered
/// positions, and while names are removed. Part of the names are there before the mount.
#[test]
fn a_directory_of_100_000_entries() {
    let made = rounds(5_000, 100_000);
    let pair = Pair::with(|dir| {
        std::fs::create_dir(dir.join("large")).unwrap();
        for n in made..100_000 {
            std::fs::File::create(dir.join(format!("large/entry-{n}"))).unwrap();
        }
    });
    let script = r"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.opendir.argtypes = [ctypes.c_char_p]
libc.telldir.restype = ctypes.c_long
for call in (libc.readdir, libc.telldir, libc.closedir, libc.rewinddir): call.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
def name_of(entry): return ctypes.string_at(entry + 19)
COUNT = 100_000
dir = os.open('large', os.O_RDONLY)
for n in range(MADE): os.mknod('entry-%d' % n, dir_fd=dir)
wanted = {'entry-%d' % n for n in range(COUNT)}
for look in range(2):
    listed = os.listdir('large')
    assert len(listed) == COUNT and set(listed) == wanted
# Positions are remembered; what follows one is what followed it.
stream = libc.opendir(b'large')
order, positions = [], {}
while True:
    at = libc.telldir(stream)
    entry = libc.readdir(stream)
    if not entry: break
    if len(order) % 5003 == 0: positions[len(order)] = at
    order.append(name_of(entry))
assert len(order) == COUNT + 2 and len(set(order)) == COUNT + 2
for index, at in sorted(positions.items(), reverse=True):
    libc.seekdir(stream, at)
    follow = [name_of(libc.readdir(stream)) for _ in range(min(100, COUNT + 2 - index))]
    assert follow == order[index:index + 100], index
# From the beginning, with what was made and removed meanwhile.
os.unlink('large/entry-5'); os.mknod('large/new')
libc.rewinddir(stream)
seen = []
while entry := libc.readdir(stream): seen.append(name_of(entry))
assert b'new' in seen and b'entry-5' not in seen and len(seen) == len(set(seen)) == COUNT + 2
libc.closedir(stream)
# Removal while iterating.
seen, removed = [], 0
with os.scandir('large') as entries:
    for entry in entries:
        seen.append(entry.name)
        if len(seen) % (COUNT // MADE) == 0: os.unlink(entry.path); removed += 1
assert len(seen) == len(set(seen)) == COUNT and removed == MADE
assert len(os.listdir(dir)) == COUNT - MADE
os.close(dir)
if MADE == COUNT: os.rmdir('large')
";
    pair.python(&format!("MADE = {made}\n{script}"));
    pair.down();
}

/// While others make and remove entries, everything that stays is listed exactly once.
#[test]
fn what_stays_is_listed_once() {
    let pair = Pair::new();
    pair.python(
        r"
import os, signal
os.mkdir('busy')
stay = {'stays-%d' % n for n in range(1500)}
for name in stay: open('busy/' + name, 'w').close()
children = []
for who in range(2):
    pid = os.fork()
    if pid == 0:
        n = 0
        while True:
            name = 'busy/comes-%d-%d' % (who, n % 700)
            try: os.unlink(name)
            except FileNotFoundError: open(name, 'w').close()
            if n % 11 == 0 and os.path.exists(name): os.rename(name, 'busy/moved-%d-%d' % (who, n % 50))
            n += 1
    children.append(pid)
try:
    for look in range(25):
        seen = [entry.name for entry in os.scandir('busy')]
        kept = [name for name in seen if name.startswith('stays')]
        assert len(kept) == len(set(kept)), [name for name in kept if kept.count(name) > 1]
        assert set(kept) == stay, stay - set(kept)
        # Two at a time, at different speeds.
        with os.scandir('busy') as slow:
            first = [next(slow).name for _ in range(200)]
            quick = [entry.name for entry in os.scandir('busy') if entry.name.startswith('stays')]
            assert sorted(quick) == sorted(stay)
            kept = [name for name in first + [entry.name for entry in slow] if name.startswith('stays')]
            assert sorted(kept) == sorted(stay)
finally:
    for pid in children: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
left = os.listdir('busy')
assert len(left) == len(set(left))
for name in left: assert os.path.lexists('busy/' + name), name
",
    );
    pair.down();
}

/// Names of 255 bytes, names that are no text, and those that no filesystem takes.
#[test]
fn names_are_bytes_up_to_255_of_them() {
    let pair = Pair::new();
    pair.python(
        r"
import errno, os
def attempt(call, *args):
    try: call(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'ok'
long, too_long = b'n' * 255, b'n' * 256
utf8 = ('\u00e9' * 127).encode() + b'x'
names = [long, utf8, b'\xff\xfe', b'\x80' * 255, bytes(range(1, 47)), bytes(range(48, 256)), b'-', b'...', b'\n', b' ', b'\\', b'CASE', b'case', b'nfc-\xc3\xa9', b'nfd-e\xcc\x81', b'.mirrorfs ', b'.Mirrorfs']
for name in names:
    print(name, attempt(os.mkdir, name), attempt(os.mkdir, name))
    print(attempt(os.symlink, name, name + b'/' + name), os.readlink(name + b'/' + name) == name)
    print(attempt(os.rename, name + b'/' + name, name + b'/' + long[:len(name)][::-1]))
print(sorted(os.listdir(b'.')) == sorted(names))
for call, args in [(os.mkdir, (too_long,)), (os.unlink, (too_long,)), (os.stat, (too_long,)), (os.rmdir, (too_long,)),
                   (os.symlink, (b'x', too_long)), (os.link, (b'x', too_long)), (os.rename, (long, too_long)), (os.rename, (too_long, long)),
                   (os.mkfifo, (too_long,)), (os.open, (too_long, os.O_CREAT | os.O_RDWR)), (os.readlink, (too_long,)),
                   (os.setxattr, (too_long, b'user.a', b'')), (os.mkdir, (b'y' * 5000,)), (os.mkdir, (b'',)), (os.mkdir, (b'.',)), (os.mkdir, (b'..',)),
                   (os.rmdir, (b'.',)), (os.rmdir, (b'-/..',)), (os.rename, (b'-', b'-/inside')), (os.rename, (b'-/.', b'z')), (os.unlink, (b'-/',)),
                   (os.symlink, (b'', b'empty')), (os.symlink, (b't' * 4095, b'target')), (os.symlink, (b't' * 4096, b'target2'))]:
    print(call.__name__, attempt(call, *args))
print(len(os.readlink(b'target')), os.lstat(b'target').st_size)
",
    );
    pair.down();
}

/// Paths deeper than PATH_MAX, one component at a time.
#[test]
fn paths_longer_than_path_max() {
    let pair = Pair::new();
    pair.python(
        r"
import os
NAME, DEPTH = 'd' * 200, 60
fds = [os.open('.', os.O_RDONLY)]
for level in range(DEPTH):
    os.mkdir(NAME, dir_fd=fds[-1])
    fds.append(os.open(NAME, os.O_RDONLY, dir_fd=fds[-1]))
deep = fds[-1]
fd = os.open('file', os.O_RDWR | os.O_CREAT, 0o644, dir_fd=deep)
os.write(fd, b'content'); os.link('file', 'link', src_dir_fd=deep, dst_dir_fd=deep)
os.rename('link', 'up', src_dir_fd=deep, dst_dir_fd=fds[DEPTH // 2])
os.setxattr(fd, 'user.deep', b'yes')
print(os.stat('up', dir_fd=fds[DEPTH // 2]).st_nlink, os.listdir(deep), os.pread(fd, 10, 0), os.getxattr(fd, 'user.deep'))
os.chmod('file', 0o600, dir_fd=deep); os.utime('file', ns=(1, 2), dir_fd=deep)
print(oct(os.fstat(fd).st_mode), os.fstat(fd).st_mtime_ns)
os.rename(NAME, 'short', src_dir_fd=fds[0], dst_dir_fd=fds[0])
os.pwrite(fd, b'C', 0); os.mknod('late', dir_fd=deep)
print(sorted(os.listdir(deep)))
for name in os.listdir(deep): os.unlink(name, dir_fd=deep)
os.unlink('up', dir_fd=fds[DEPTH // 2])
while len(fds) > 2:
    os.close(fds.pop()); os.rmdir(NAME, dir_fd=fds[-1])
os.close(fds.pop()); os.rmdir('short')
print(os.listdir('.'))
",
    );
    pair.down();
}

/// A directory that is removed while somebody is in it, or has it open, is empty and takes
/// nothing.
#[test]
fn a_removed_directory_takes_nothing() {
    let pair = Pair::new();
    pair.python(
        r"
import errno, os
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
os.mkdir('d'); fd = os.open('d', os.O_RDONLY); os.chdir('d'); os.rmdir('../d')
print(attempt(os.listdir, fd), attempt(os.listdir, '.'), attempt(os.mkdir, 'x', dir_fd=fd), attempt(open, 'y', 'w'))
print(attempt(os.stat, 'x'), os.fstat(fd).st_nlink, attempt(os.getcwd), attempt(os.symlink, 'a', 'b'))
os.fchmod(fd, 0o700); print(oct(os.fstat(fd).st_mode))
os.chdir('/proc/self/fd/%d/..' % fd)
os.mkdir('d'); print(attempt(os.listdir, fd), os.listdir('d'))
",
    );
    pair.down();
}
