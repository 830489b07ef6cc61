//! Hard links, sparse files, times, extended attributes.

use crate::pair::Pair;

/// Hard links: counts, the removal of one name, renames over another name of the same
/// file, links to what is open, and errors.
#[test]
fn hard_links_are_one_file() {
    let pair = Pair::new();
    pair.python(
        r"
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
def link(path, to):
    'What a link leads to gets a name, as follow_symlinks does not do before Python 3.12.'
    if libc.linkat(-100, path.encode(), -100, to.encode(), 0x400): return errno.errorcode[ctypes.get_errno()]
def rename(a, b, flags):
    if libc.renameat2(-100, a, -100, b, flags): return errno.errorcode[ctypes.get_errno()]
os.mkdir('d'); open('a', 'w').write('one')
os.link('a', 'b'); os.link('b', 'd/c')
same = {os.stat(name).st_ino for name in ('a', 'b', 'd/c')}
print(len(same), [os.stat(name).st_nlink for name in ('a', 'b', 'd/c')])
open('b', 'a').write(' two'); os.chmod('d/c', 0o640); os.setxattr('a', 'user.x', b'1')
print(open('a').read(), oct(os.stat('a').st_mode), os.getxattr('d/c', 'user.x'), os.stat('d/c').st_size)
# Over another name of the same file: nothing happens, both names stay.
before = os.stat('a')
os.rename('a', 'b'); print(sorted(os.listdir('.')), os.stat('b').st_nlink)
os.rename('a', 'd/c'); print(sorted(os.listdir('d')), os.stat('d/c').st_nlink)
print(rename(b'a', b'b', 1), rename(b'a', b'b', 2), os.stat('a').st_nlink)
print(os.stat('a').st_ctime_ns == before.st_ctime_ns)
# Over a name of another file.
open('other', 'w').write('other'); os.link('other', 'other2')
before = os.stat('other2').st_ctime_ns
os.rename('a', 'other'); print(os.stat('other2').st_nlink, os.stat('other').st_nlink, open('other').read())
print(os.stat('other2').st_ctime_ns > before)
# One name goes, the others stay.
fd = os.open('b', os.O_RDONLY); before = os.fstat(fd).st_ctime_ns
os.unlink('b'); print(os.fstat(fd).st_nlink, os.fstat(fd).st_ctime_ns > before)
os.unlink('other'); os.unlink('d/c'); print(os.fstat(fd).st_nlink, os.read(fd, 10))
print(link('/proc/self/fd/%d' % fd, 'back'))
# To what is open, to links, to directories, to itself.
fd = os.open('other2', os.O_RDONLY); print(link('/proc/self/fd/%d' % fd, 'by-descriptor'))
print(os.fstat(fd).st_nlink)
os.symlink('other2', 's'); os.link('s', 't', follow_symlinks=False)
print(os.readlink('t'), os.lstat('s').st_nlink, os.stat('s').st_nlink)
print(link('s', 'u'), os.stat('u').st_nlink)
print(attempt(os.link, 'd', 'e'), attempt(os.link, 's', 's'), attempt(os.link, 'missing', 'e'), attempt(os.link, 's', 'd/x/y'))
os.mkfifo('p'); os.link('p', 'q'); print(os.stat('q').st_nlink)
# Through a rename of the directory that a name is in.
os.link('other2', 'd/in'); os.rename('d', 'e'); print(os.stat('e/in').st_nlink); os.unlink('other2'); print(os.stat('e/in').st_nlink, open('e/in').read())
# Many.
open('many', 'w').close()
for n in range(300): os.link('many', 'e/%d' % n)
print(os.stat('many').st_nlink)
for n in range(0, 300, 2): os.unlink('e/%d' % n)
print(os.stat('e/1').st_nlink, os.stat('many').st_nlink)
",
    );
    pair.down();
}

/// Holes stay holes: what is told of them, and what they cost.
#[test]
fn sparse_files_are_sparse() {
    let pair = Pair::new();
    pair.python(
        r"
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
def fallocate(fd, mode, offset, length):
    return errno.errorcode[ctypes.get_errno()] if libc.fallocate(fd, mode, offset, length) else 'ok'
def map(fd):
    'Data and holes, to the end.'
    found, at, end = [], 0, os.fstat(fd).st_size
    while at < end:
        try: data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error: found.append(errno.errorcode[error.errno]); break
        hole = os.lseek(fd, data, os.SEEK_HOLE); found.append((data, hole)); at = hole
    return end, os.fstat(fd).st_blocks, found
fd = os.open('sparse', os.O_RDWR | os.O_CREAT, 0o644)
print(map(fd))
os.ftruncate(fd, 1 << 30); print(map(fd))
os.pwrite(fd, b'x', 1 << 20); os.pwrite(fd, b'y' * 10000, 5 << 20); print(map(fd))
os.fsync(fd); print(map(fd))
KEEP, PUNCH, ZERO = 1, 2, 16
print(fallocate(fd, KEEP | PUNCH, (5 << 20) + 100, 8192), map(fd), os.pread(fd, 10, (5 << 20) + 95))
print(fallocate(fd, PUNCH, 0, 4096), fallocate(fd, KEEP | PUNCH, 0, 0), fallocate(fd, KEEP | PUNCH, -1, 5))
print(fallocate(fd, 0, 10 << 20, 50000), os.fstat(fd).st_size, os.pread(fd, 5, 10 << 20))
print(fallocate(fd, KEEP, 1 << 30, 65536), os.fstat(fd).st_size)
print(fallocate(fd, ZERO | KEEP, 5 << 20, 4096), os.pread(fd, 4096, 5 << 20) == bytes(4096))
print(fallocate(fd, 0, 1 << 30, 4096), os.fstat(fd).st_size)
os.fsync(fd)
for at in (0, 1 << 20, (1 << 30) + 4096, 1 << 40, 1 << 62):
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        try: print(at, whence, os.lseek(fd, at, whence))
        except OSError as error: print(at, whence, errno.errorcode[error.errno])
os.ftruncate(fd, 3 << 20); print(map(fd)); os.ftruncate(fd, 0); print(map(fd))
# Beyond what a file can have.
for size in (1 << 62, (1 << 63) - 1):
    for call in (lambda: os.ftruncate(fd, size), lambda: os.pwrite(fd, b'x', size - 1)):
        try: call(); print('ok')
        except OSError as error: print(errno.errorcode[error.errno])
print(fallocate(os.open('sparse', os.O_RDONLY), 0, 0, 10), fallocate(os.open('.', os.O_RDONLY), 0, 0, 10))
# Copied with its holes.
os.ftruncate(fd, 8 << 20); os.pwrite(fd, b'middle', 4 << 20)
to = os.open('copy', os.O_RDWR | os.O_CREAT, 0o644)
done = 0
while done < 8 << 20: done += os.copy_file_range(fd, to, (8 << 20) - done, done, done)
print(os.pread(to, 6, 4 << 20), os.fstat(to).st_size, open('copy', 'rb').read() == open('sparse', 'rb').read())
",
    );
    pair.down();
}

/// Times to the nanosecond, before 1970 too, and who moves which.
#[test]
fn times_are_exact() {
    let pair = Pair::new();
    pair.python(
        r"
import os
fd = os.open('f', os.O_RDWR | os.O_CREAT, 0o644); os.mkdir('d'); os.symlink('f', 's')
for path in ('f', 'd', 's'):
    for moment in (0, 1, 999_999_999, -1, -999_999_999, -1_000_000_000, -1_000_000_001, -1_500_000_000, 1 << 60, 4_294_967_296_123_456_789, -2_000_000_000_123_456_789):
        os.utime(path, ns=(moment, moment - 7), follow_symlinks=False)
        stat = os.stat(path, follow_symlinks=False)
        print(path, moment, stat.st_atime_ns, stat.st_mtime_ns)
def moved(change, *paths):
    before = [os.lstat(path) for path in paths]; change(); after = [os.lstat(path) for path in paths]
    return [(a.st_mtime_ns != b.st_mtime_ns, a.st_ctime_ns != b.st_ctime_ns) for a, b in zip(after, before)]
print('write', moved(lambda: os.write(fd, b'x'), 'f', 'd', '.'))
print('write nothing', moved(lambda: os.write(fd, b''), 'f'))
print('ftruncate', moved(lambda: os.ftruncate(fd, 1), 'f'))
print('truncate', moved(lambda: os.truncate('f', 100), 'f'))
print('open trunc', moved(lambda: os.close(os.open('f', os.O_WRONLY | os.O_TRUNC)), 'f'))
print('open trunc empty', moved(lambda: os.close(os.open('f', os.O_WRONLY | os.O_TRUNC)), 'f'))
print('fallocate', moved(lambda: os.posix_fallocate(fd, 0, 5000), 'f'))
print('chmod', moved(lambda: os.chmod('f', 0o600), 'f', '.'))
print('chmod same', moved(lambda: os.chmod('f', 0o600), 'f'))
print('chown', moved(lambda: os.chown('f', 0, 0), 'f'))
print('setxattr', moved(lambda: os.setxattr('f', 'user.a', b'1'), 'f'))
print('removexattr', moved(lambda: os.removexattr('f', 'user.a'), 'f'))
print('create', moved(lambda: os.close(os.open('d/n', os.O_CREAT)), 'd', '.'))
print('open existing', moved(lambda: os.close(os.open('d/n', os.O_CREAT)), 'd', 'd/n'))
print('link', moved(lambda: os.link('d/n', 'd/m'), 'd', 'd/n'))
print('rename', moved(lambda: os.rename('d/m', 'l'), 'd', '.', 'd/n'))
print('mkdir', moved(lambda: os.mkdir('d/e'), 'd', '.'))
print('rename dir', moved(lambda: os.rename('d/e', 'd/x'), 'd'))
print('rmdir', moved(lambda: os.rmdir('d/x'), 'd'))
print('unlink', moved(lambda: os.unlink('d/n'), 'd', 'l'))
print('read', moved(lambda: os.pread(fd, 10, 0), 'f'))
print('list', moved(lambda: os.listdir('d'), 'd'))
print('fsync', moved(lambda: os.fsync(fd), 'f'))
print('utime now', moved(lambda: os.utime('f'), 'f'))
",
    );
    pair.down();
}

/// Programs, scripts and libraries run from the tree; what runs is not written to, and what
/// is written to does not run.
#[test]
fn programs_run() {
    let pair = Pair::new();
    pair.python(
        r"
import ctypes, errno, os, shutil, subprocess
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
shutil.copy('/bin/cat', 'cat'); shutil.copymode('/bin/cat', 'cat')
running = subprocess.Popen(['./cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
running.stdin.write(b'x'); running.stdin.flush(); print(running.stdout.read1(1))
print('running', attempt(os.open, 'cat', os.O_WRONLY), attempt(os.open, 'cat', os.O_RDWR | os.O_TRUNC), attempt(os.truncate, 'cat', 5), attempt(os.chmod, 'cat', 0o700))
os.rename('cat', 'moved'); os.unlink('moved'); print('unlinked', running.communicate(b'still')[0], running.returncode)
shutil.copy('/bin/true', 'true'); os.chmod('true', 0o755)
writer = os.open('true', os.O_WRONLY); print('written to', attempt(subprocess.call, ['./true'])); os.close(writer)
print('closed', attempt(subprocess.call, ['./true']))
os.chmod('true', 0o644); print('no program', attempt(subprocess.call, ['./true']))
with open('script', 'w') as f: f.write('#!/bin/sh\necho script $1 $0\n')
os.chmod('script', 0o755); print(attempt(subprocess.check_output, ['./script', 'argument']))
with open('script', 'w') as f: f.write('#!./missing\n')
print('no interpreter', attempt(subprocess.call, ['./script']))
library = next(line.split()[5] for line in open('/proc/self/maps') if '/libc.so' in line or '/libc-' in line)
shutil.copy(library, 'library.so'); print('library', ctypes.CDLL('./library.so').abs(-5))
",
    );
    pair.down();
}

/// FIFOs, sockets and device nodes connect the programs on this machine.
#[test]
fn special_files_connect() {
    let pair = Pair::new();
    pair.python(
        r"
import errno, os, select, socket
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
os.mkfifo('fifo')
print('nobody reads', attempt(os.open, 'fifo', os.O_WRONLY | os.O_NONBLOCK))
pid = os.fork()
if pid == 0:
    fd = os.open('fifo', os.O_WRONLY); os.write(fd, b'through'); os._exit(0)
fd = os.open('fifo', os.O_RDONLY); os.waitpid(pid, 0); print(os.read(fd, 99), os.read(fd, 99)); os.close(fd)
server = socket.socket(socket.AF_UNIX); server.bind('stream'); server.listen()
pid = os.fork()
if pid == 0:
    client = socket.socket(socket.AF_UNIX); client.connect('stream'); client.sendall(b'hello'); assert client.recv(9) == b'answer'; os._exit(0)
there = server.accept()[0]; print(there.recv(9)); there.sendall(b'answer'); print(os.waitpid(pid, 0)[1])
print('bound twice', attempt(socket.socket(socket.AF_UNIX).bind, 'stream'), attempt(open, 'stream'))
os.rename('stream', 'moved'); client = socket.socket(socket.AF_UNIX); client.connect('moved')
server.close(); print('nobody listens', attempt(socket.socket(socket.AF_UNIX).connect, 'moved')); os.unlink('moved')
print('gone', attempt(socket.socket(socket.AF_UNIX).connect, 'moved'))
mine = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); mine.bind('datagrams')
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'message', 'datagrams'); print(mine.recv(99))
for name, minor in (('null', 3), ('zero', 5), ('full', 7)): os.mknod(name, 0o20666, os.makedev(1, minor))
fd = os.open('zero', os.O_RDONLY); print(os.read(fd, 5), os.fstat(fd).st_rdev, attempt(os.write, os.open('full', os.O_WRONLY), b'x'), os.write(os.open('null', os.O_WRONLY), b'gone'))
os.mknod('block', 0o60600, os.makedev(259, 70000)); print(os.stat('block').st_rdev, oct(os.stat('block').st_mode))
",
    );
    pair.down();
}

/// A file that has lost its name can be used like any other.
#[test]
fn an_unlinked_file_is_a_file() {
    let pair = Pair::new();
    pair.python(
        r"
import os
fd = os.open('f', os.O_RDWR | os.O_CREAT, 0o644); os.write(fd, b'content'); other = os.open('f', os.O_RDONLY)
os.unlink('f'); open('f', 'w').write('another')
os.pwrite(fd, b'C', 0); os.fchmod(fd, 0o600); os.fchown(fd, 61201, 61202); os.utime(fd, ns=(5, 6)); os.setxattr(fd, 'user.a', b'b')
stat = os.fstat(other)
print(oct(stat.st_mode), stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_size, stat.st_mtime_ns, os.listxattr(other), os.pread(other, 10, 0))
os.ftruncate(fd, 3); os.posix_fallocate(fd, 0, 8); os.fsync(fd); print(os.fstat(other).st_size, os.pread(other, 10, 0), os.lseek(other, 0, os.SEEK_HOLE))
again = os.open('/proc/self/fd/%d' % fd, os.O_RDWR | os.O_APPEND); os.write(again, b'end'); print(os.pread(fd, 20, 0))
os.close(fd); os.close(again); print(os.pread(other, 20, 0), open('f').read())
# Replaced rather than removed.
fd = os.open('f', os.O_RDWR); open('g', 'w').write('g'); os.rename('g', 'f')
os.write(fd, b'old'); print(os.fstat(fd).st_nlink, os.pread(fd, 10, 0), open('f').read())
os.mkdir('d'); os.mkdir('e'); dir = os.open('d', os.O_RDONLY); os.rename('e', 'd'); print(os.fstat(dir).st_nlink, os.listdir(dir), os.listdir('d'))
",
    );
    pair.down();
}
