//! Several processes on one file: appending, mapping, locking.

use crate::pair::Pair;

/// Writers with `O_APPEND` never overwrite each other: every record is there once and
/// whole, and each writer's own are in order.
#[test]
fn two_writers_append() {
    let pair = Pair::new();
    pair.python(
        r"
import os
COUNT = 400
def write(who):
    fd = os.open('log', os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for n in range(COUNT):
        record = b'%s %06d %s\n' % (who, n, who * (n % 97))
        assert os.write(fd, record) == len(record)
    os._exit(0)
children = []
for who in (b'a', b'b', b'c'):
    pid = os.fork()
    if pid == 0: write(who)
    children.append(pid)
for pid in children: assert os.waitpid(pid, 0)[1] == 0
lines = open('log', 'rb').read().split(b'\n')
assert lines.pop() == b'' and len(lines) == 3 * COUNT
for who in (b'a', b'b', b'c'):
    mine = [line for line in lines if line[:1] == who]
    assert mine == [b'%s %06d %s' % (who, n, who * (n % 97)) for n in range(COUNT)]
# The position moves to the end, wherever it was.
a = os.open('log', os.O_RDWR | os.O_APPEND)
os.lseek(a, 0, os.SEEK_SET)
os.write(a, b'end'); size = os.fstat(a).st_size
assert os.lseek(a, 0, os.SEEK_CUR) == size
# pwrite appends as well, whatever it says, on Linux.
os.pwrite(a, b'too', 0); assert os.fstat(a).st_size == size + 3
assert os.pread(a, 6, size - 3) == b'endtoo'
# Truncated by another one in between.
os.truncate('log', 10); os.write(a, b'x')
print(os.fstat(a).st_size, os.pread(a, 11, 10))
",
    );
    pair.down();
}

/// A store in a shared mapping is seen by other processes' mappings and reads at once, a
/// write by the mappings, and after `munmap` the file holds it.
#[test]
fn a_shared_mapping_is_the_file() {
    let pair = Pair::new();
    pair.python(
        r"
import mmap, os, signal, socket
PAGE = 4096
fd = os.open('mapped', os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, 40 * PAGE + 100)
view = mmap.mmap(fd, 40 * PAGE + 100)
here, there = socket.socketpair()
pid = os.fork()
if pid == 0:
    # A mapping of its own, through a descriptor of its own.
    mine = os.open('mapped', os.O_RDWR)
    other = mmap.mmap(mine, 40 * PAGE + 100)
    def expect(message, condition):
        assert there.recv(100) == message
        assert condition(), message
        there.send(b'.')
    expect(b'store', lambda: other[5 * PAGE:5 * PAGE + 5] == b'store' and os.pread(mine, 5, 5 * PAGE) == b'store')
    expect(b'write', lambda: other[7 * PAGE:7 * PAGE + 5] == b'write')
    assert there.recv(100) == b'yours'
    other[9 * PAGE:9 * PAGE + 5] = b'yours'
    there.send(b'.')
    expect(b'truncated', lambda: os.fstat(mine).st_size == PAGE)
    expect(b'grown', lambda: other[5 * PAGE:5 * PAGE + 5] == bytes(5))
    os._exit(0)
def tell(message):
    here.send(message); assert here.recv(1) == b'.', message
view[5 * PAGE:5 * PAGE + 5] = b'store'
assert os.pread(fd, 5, 5 * PAGE) == b'store'
tell(b'store')
os.pwrite(fd, b'write', 7 * PAGE)
assert view[7 * PAGE:7 * PAGE + 5] == b'write'
tell(b'write')
tell(b'yours')
assert view[9 * PAGE:9 * PAGE + 5] == b'yours'
view.flush()
# What is beyond the end of the file is not part of it.
view[40 * PAGE + 50:40 * PAGE + 100] = b'z' * 50
os.ftruncate(fd, PAGE)
tell(b'truncated')
os.ftruncate(fd, 40 * PAGE + 100)
tell(b'grown')
assert view[7 * PAGE:40 * PAGE + 100] == bytes(33 * PAGE + 100)
assert os.waitpid(pid, 0)[1] == 0
# Stores and writes next to each other on one page.
for n in range(200):
    at = 3 * PAGE + n * 8
    view[at:at + 4] = b'%04d' % n
    os.pwrite(fd, b'%04d' % n, at + 4)
wanted = b''.join(b'%04d%04d' % (n, n) for n in range(200))
assert view[3 * PAGE:3 * PAGE + 1600] == wanted
view.close(); os.close(fd)
content = open('mapped', 'rb').read()
assert content[3 * PAGE:3 * PAGE + 1600] == wanted and content.count(0) == len(content) - 1600
# Private stores stay private.
fd = os.open('mapped', os.O_RDWR)
private = mmap.mmap(fd, 8 * PAGE, flags=mmap.MAP_PRIVATE)
private[0:4] = b'mine'
assert os.pread(fd, 4, 0) == bytes(4)
private.close()
# A mapping holds the file without a descriptor and without a name.
view = mmap.mmap(fd, 8 * PAGE); os.close(fd); os.unlink('mapped')
view[0:5] = b'still'; view.flush(); assert view[0:5] == b'still'; view.close()
# A store moves the time of modification, at the latest when it is synced.
fd = os.open('time', os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, PAGE); os.utime(fd, ns=(0, 0))
view = mmap.mmap(fd, PAGE); view[0:1] = b'x'; view.flush()
assert os.fstat(fd).st_mtime_ns > 0
view.close()
# Beyond the last page there is nothing.
pid = os.fork()
if pid == 0:
    view = mmap.mmap(fd, PAGE); os.ftruncate(fd, 0)
    view[0]
    os._exit(0)
assert os.waitpid(pid, 0)[1] & 0x7f == signal.SIGBUS
",
    );
    pair.down();
}

/// `flock`, POSIX and OFD locks: who conflicts with whom, what `F_GETLK` tells, and that
/// closing and dying release.
#[test]
fn locks_hold_between_processes() {
    let pair = Pair::new();
    pair.python(
        r"
import errno, fcntl, os, socket, struct
F_OFD_GETLK, F_OFD_SETLK = 36, 37
def lock(kind, start=0, length=0, whence=0, pid=0):
    return struct.pack('hhqqi4x', kind, whence, start, length, pid)
def told(answer):
    kind, whence, start, length, pid = struct.unpack('hhqqi4x', answer)
    return kind, start, length, pid
def attempt(call, *args):
    try: call(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'ok'
class Other:
    'Another process, which does what it is told.'
    def __init__(self):
        self.near, far = socket.socketpair()
        self.pid = os.fork()
        if self.pid: far.close(); return
        self.near.close(); files = {}
        while True:
            order = far.recv(1000).decode()
            if not order: os._exit(0)
            far.send(str(eval(order, globals(), {'f': files})).encode() + b' ')
    def do(self, order):
        self.near.send(order.encode()); return self.near.recv(1000).decode().strip()
    def end(self):
        self.near.close(); assert os.waitpid(self.pid, 0)[1] == 0
    def kill(self):
        os.kill(self.pid, 9); os.waitpid(self.pid, 0); self.near.close()
open('file', 'w').write('x' * 100)
def opened(other): other.do('f.__setitem__(0, os.open(\'file\', os.O_RDWR))')

# flock: belongs to the open file, not to the process.
other = Other(); opened(other)
mine = os.open('file', os.O_RDWR); second = os.open('file', os.O_RDWR)
NB = fcntl.LOCK_NB
print('flock shared', other.do('attempt(fcntl.flock, f[0], fcntl.LOCK_SH|fcntl.LOCK_NB)'), attempt(fcntl.flock, mine, fcntl.LOCK_SH | NB))
print('flock upgrade', attempt(fcntl.flock, mine, fcntl.LOCK_EX | NB))
print('flock other open', attempt(fcntl.flock, second, fcntl.LOCK_EX | NB))
other.do('fcntl.flock(f[0], fcntl.LOCK_UN)')
fcntl.flock(mine, fcntl.LOCK_UN)
print('flock free', attempt(fcntl.flock, mine, fcntl.LOCK_EX | NB))
copy = os.dup(mine)
os.close(mine)
print('flock held by a duplicate', other.do('attempt(fcntl.flock, f[0], fcntl.LOCK_EX|fcntl.LOCK_NB)'))
os.close(copy)
print('flock released by close', other.do('attempt(fcntl.flock, f[0], fcntl.LOCK_EX|fcntl.LOCK_NB)'))
print('flock held there', attempt(fcntl.flock, second, fcntl.LOCK_SH | NB))
other.kill()
print('flock released by death', attempt(fcntl.flock, second, fcntl.LOCK_EX | NB))
os.close(second)

# POSIX: belongs to the process, by range, released by any close.
other = Other(); opened(other)
mine = os.open('file', os.O_RDWR)
print('posix', attempt(fcntl.lockf, mine, fcntl.LOCK_EX | NB, 10, 20))
print('posix range', other.do('attempt(fcntl.lockf, f[0], fcntl.LOCK_EX|fcntl.LOCK_NB, 10, 25)'))
print('posix beside', other.do('attempt(fcntl.lockf, f[0], fcntl.LOCK_EX|fcntl.LOCK_NB, 10, 30)'))
asked = eval(other.do('told(fcntl.fcntl(f[0], fcntl.F_GETLK, lock(fcntl.F_WRLCK)))'))
assert asked == (fcntl.F_WRLCK, 20, 10, os.getpid()), asked
asked = told(fcntl.fcntl(mine, fcntl.F_GETLK, lock(fcntl.F_RDLCK, 32, 1)))
assert asked == (fcntl.F_WRLCK, 30, 10, other.pid), asked
free = told(fcntl.fcntl(mine, fcntl.F_GETLK, lock(fcntl.F_RDLCK, 50, 1)))
print('posix free', free)
print('posix own', attempt(fcntl.lockf, mine, fcntl.LOCK_EX | NB, 5, 22))
os.close(os.open('file', os.O_RDONLY))
print('posix released by any close', other.do('attempt(fcntl.lockf, f[0], fcntl.LOCK_EX|fcntl.LOCK_NB)'))
other.kill()
print('posix released by death', attempt(fcntl.lockf, mine, fcntl.LOCK_EX | NB))
pid = os.fork()
if pid == 0: os._exit(7 if attempt(fcntl.lockf, mine, fcntl.LOCK_EX | NB) == 'EAGAIN' else 0)
print('posix not inherited', os.waitpid(pid, 0)[1] >> 8)
os.close(mine)
reader = os.open('file', os.O_RDONLY)
print('posix needs writing', attempt(fcntl.lockf, reader, fcntl.LOCK_EX | NB))
# Waiting for one.
other = Other(); opened(other)
mine = os.open('file', os.O_RDWR)
fcntl.lockf(mine, fcntl.LOCK_EX)
other.near.send(b'attempt(fcntl.lockf, f[0], fcntl.LOCK_EX)')
while '-> POSIX  ADVISORY  WRITE %d ' % other.pid not in open('/proc/locks').read(): pass
fcntl.lockf(mine, fcntl.LOCK_UN)
print('posix waited', other.near.recv(100).decode())
other.end()

# OFD: by range like POSIX, belongs to the open file like flock.
a, b = os.open('file', os.O_RDWR), os.open('file', os.O_RDWR)
print('ofd', attempt(fcntl.fcntl, a, F_OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10)))
print('ofd conflict', attempt(fcntl.fcntl, b, F_OFD_SETLK, lock(fcntl.F_RDLCK, 5, 10)))
print('ofd told', told(fcntl.fcntl(b, F_OFD_GETLK, lock(fcntl.F_RDLCK, 5, 10))))
print('ofd with posix', attempt(fcntl.lockf, b, fcntl.LOCK_EX | NB, 5, 0))
os.close(os.open('file', os.O_RDONLY))
print('ofd survives another close', attempt(fcntl.fcntl, b, F_OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10)))
copy = os.dup(a); os.close(a)
print('ofd held by a duplicate', attempt(fcntl.fcntl, b, F_OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10)))
os.close(copy)
print('ofd released', attempt(fcntl.fcntl, b, F_OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10)))
# An unlinked file has locks as well, and another file of its name has others.
os.unlink('file'); open('file', 'w').close()
print('another file', attempt(fcntl.lockf, os.open('file', os.O_RDWR), fcntl.LOCK_EX | NB))
",
    );
    pair.down();
}
