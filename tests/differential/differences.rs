//! Where a program can tell the mount from the disk below: each difference stands in
//! `docs/semantics.md` with its reason, and here with what happens instead.

use crate::pair::Pair;

/// What is refused is refused with the errno that programs fall back on, and changes
/// nothing; what differs does so as it is written down.
#[test]
fn the_differences_are_those_written_down() {
    let pair = Pair::new();
    pair.python_in_mount(
        r"
import ctypes, errno, fcntl, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
def refused(wanted, call, *args):
    try: call(*args)
    except OSError as error: assert error.errno == wanted, (wanted, error)
    else: assert False, wanted
def check(result):
    if result == -1: raise OSError(ctypes.get_errno(), '')
fd = os.open('f', os.O_RDWR | os.O_CREAT, 0o644); os.write(fd, b'x' * 16384)
# RENAME_WHITEOUT
refused(errno.EINVAL, lambda: check(libc.renameat2(-100, b'f', -100, b'g', 4)))
refused(errno.EINVAL, lambda: check(libc.renameat2(-100, b'f', -100, b'g', 5)))
assert os.listdir('.') == ['f']
# COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE
for mode in (8, 32, 64): refused(errno.EOPNOTSUPP, lambda: check(libc.fallocate(fd, mode, 0, 4096)))
assert os.fstat(fd).st_size == 16384
# Reflinks and file attributes of the disk
other = os.open('other', os.O_RDWR | os.O_CREAT)
refused(errno.EOPNOTSUPP, fcntl.ioctl, other, 0x40049409, fd)
refused(errno.ENOTTY, fcntl.ioctl, fd, 0x80086601, bytes(8))
os.unlink('other')
# chown to nobody
os.chmod('f', 0o4755); before = os.stat('f')
os.chown('f', -1, -1); after = os.stat('f')
assert (after.st_mode, after.st_ctime_ns) == (before.st_mode, before.st_ctime_ns)
# A position beyond what lower can hold is a position, and nothing can be written there.
assert os.lseek(fd, 1 << 62, os.SEEK_SET) == 1 << 62
refused(errno.EFBIG, os.write, fd, b'x')
# Reads do not move the time of access.
os.utime('f', ns=(1, 2)); assert os.pread(fd, 10, 0) == b'x' * 10 and os.stat('f').st_atime_ns == 1
# What passes through a FIFO does not move its times.
os.mkfifo('p'); before = os.stat('p')
p = os.open('p', os.O_RDWR); os.write(p, b'through'); assert os.read(p, 10) == b'through'
assert os.stat('p').st_mtime_ns == before.st_mtime_ns
# O_DIRECT asks for no alignment, and sees what is cached.
direct = os.open('f', os.O_RDWR | os.O_DIRECT)
os.pwrite(fd, b'cached', 5); assert os.pread(direct, 6, 5) == b'cached'
os.pwrite(direct, b'direct', 5); assert os.pread(fd, 6, 5) == b'direct'
",
    );
    pair.down();
}
