//! Several users: whose files are made, and what each of them may do.

use crate::pair::Pair;

/// Every script here acts as one user after the other: `as_user(work, uid, gid, groups)`
/// calls it in a process of that user.
const USERS: &str = r"
import errno, os, socket, struct, sys, traceback
ALICE, BOB, TEAM, OTHERS = 61201, 61202, 61300, 61301
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
def as_user(work, uid, gid=None, groups=(), umask=0o022):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.umask(umask); os.setgroups(groups); os.setgid(uid if gid is None else gid); os.setuid(uid)
            work(); sys.stdout.flush(); os._exit(0)
        except BaseException:
            traceback.print_exc(); os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
def shown(*paths):
    for path in paths:
        stat = os.lstat(path); print(path, oct(stat.st_mode), stat.st_uid, stat.st_gid)
def make(where, mode=0o666):
    os.close(os.open(where + '/file', os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode)); os.mkdir(where + '/dir', mode | 0o111)
    os.mkfifo(where + '/fifo', mode); os.mknod(where + '/plain', mode); os.symlink('x', where + '/link')
    socket.socket(socket.AF_UNIX).bind(where + '/socket')
def made(where): shown(*[where + '/' + name for name in ('file', 'dir', 'fifo', 'plain', 'link', 'socket')])
os.umask(0)
";

#[track_caller]
fn python(pair: &Pair, script: &str) {
    pair.python(&format!("{USERS}{script}"));
}

/// What somebody makes is his, with his umask; a setgid directory passes its group on,
/// and itself to directories.
#[test]
fn whose_files_are_made() {
    let pair = Pair::new();
    python(
        &pair,
        r"
for name in ('open', 'team', 'foreign'): os.mkdir(name, 0o777)
os.chown('team', 0, TEAM); os.chmod('team', 0o2777); os.chown('foreign', 0, OTHERS); os.chmod('foreign', 0o2777)
for where in ('open', 'team', 'foreign'):
    for number, umask in enumerate((0o022, 0o077, 0, 0o777)):
        os.mkdir('%s/%d' % (where, number), 0o777); os.chmod('%s/%d' % (where, number), 0o777 | os.stat(where).st_mode & 0o2000)
        as_user(lambda: make('%s/%d' % (where, number)), ALICE, groups=[TEAM], umask=umask)
        made('%s/%d' % (where, number))
# setgid asked for at creation: only where the maker belongs to the group.
def with_bits(where):
    for mode in (0o6777, 0o2777, 0o2770, 0o2666, 0o4711, 0o1777):
        os.close(os.open('%s/bits-%o' % (where, mode), os.O_CREAT | os.O_WRONLY, mode)); os.mkdir('%s/dir-%o' % (where, mode), mode)
        os.mknod('%s/node-%o' % (where, mode), mode)
    shown(*['%s/%s' % (where, name) for name in sorted(os.listdir(where)) if '-' in name])
for where in ('open', 'team', 'foreign'):
    for number, (uid, groups) in enumerate(((ALICE, [TEAM]), (BOB, []), (0, []))):
        os.mkdir('%s/b%d' % (where, number)); os.chmod('%s/b%d' % (where, number), 0o777 | os.stat(where).st_mode & 0o2000)
        as_user(lambda: with_bits('%s/b%d' % (where, number)), uid, groups=groups, umask=0)
# A primary group that is not the user's own number.
as_user(lambda: os.close(os.open('open/primary', os.O_CREAT)), ALICE, gid=TEAM, groups=[OTHERS]); shown('open/primary')
# Written to at once although its mode forbids it.
def forbidden():
    fd = os.open('open/object', os.O_CREAT | os.O_RDWR | os.O_EXCL, 0); os.write(fd, b'object'); print(os.pread(fd, 10, 0), attempt(os.open, 'open/object', os.O_RDONLY))
as_user(forbidden, ALICE)
",
    );
    pair.down();
}

/// Rights from supplementary groups, sticky directories, and everything that is refused
/// with EACCES or EPERM.
#[test]
fn who_may_do_what() {
    let pair = Pair::new();
    python(
        &pair,
        r"
def prepare():
    os.mkdir('team'); os.chown('team', 0, TEAM); os.chmod('team', 0o770)
    os.mkdir('sticky'); os.chmod('sticky', 0o1777)
    os.mkdir('closed'); os.chmod('closed', 0o711); open('closed/readable', 'w').write('r'); open('closed/secret', 'w').write('s'); os.chmod('closed/secret', 0o600)
    os.mkdir('listed'); os.chmod('listed', 0o744); open('listed/f', 'w').close()
    open('team/f', 'w').write('x'); os.chown('team/f', 0, TEAM); os.chmod('team/f', 0o660)
    for who in (ALICE, BOB): open('sticky/%d' % who, 'w').close(); os.chown('sticky/%d' % who, who, who); os.chmod('sticky/%d' % who, 0o666)
prepare()
def work(me, other):
    print('group', attempt(lambda: open('team/f').read()), attempt(lambda: open('team/f', 'a').write('y')), attempt(os.mkdir, 'team/%d' % me), attempt(os.listdir, 'team'))
    print('closed', attempt(os.listdir, 'closed'), attempt(lambda: open('closed/readable').read()), attempt(lambda: open('closed/secret').read()), attempt(open, 'closed/new', 'w'), attempt(os.stat, 'closed/missing'))
    print('listed', attempt(os.listdir, 'listed'), attempt(os.stat, 'listed/f'), attempt(os.chdir, 'listed'))
    print('sticky', attempt(os.unlink, 'sticky/%d' % other), attempt(os.rename, 'sticky/%d' % other, 'sticky/x'), attempt(os.rename, 'sticky/%d' % me, 'sticky/%d' % other), attempt(os.unlink, 'sticky/%d' % me))
    print('others', attempt(os.chmod, 'sticky/%d' % other, 0o600), attempt(os.chown, 'sticky/%d' % other, me, me), attempt(os.utime, 'sticky/%d' % other, (1, 2)), attempt(os.utime, 'sticky/%d' % other), attempt(os.truncate, 'sticky/%d' % other, 5))
    print('xattr', attempt(os.setxattr, 'sticky/%d' % other, 'user.a', b'1'), attempt(os.setxattr, 'closed/readable', 'user.a', b'1'), attempt(os.setxattr, 'sticky/%d' % other, 'trusted.a', b'1'), attempt(os.getxattr, 'closed/secret', 'user.a'), attempt(os.setxattr, 'sticky', 'user.a', b'1'))
    print('access', [attempt(os.access, path, mode, effective_ids=e) for path in ('team/f', 'closed/readable', 'closed/secret', 'closed', 'listed') for mode in (4, 2, 1) for e in (False, True)])
    print('link', attempt(os.link, 'closed/secret', 'sticky/hard'), attempt(os.link, 'closed/readable', 'sticky/hard'))
    print('device', attempt(os.mknod, 'sticky/device', 0o20666, os.makedev(1, 3)), attempt(os.rmdir, 'team'), attempt(os.rename, 'closed', 'sticky/closed'))
    fd = os.open('closed/readable', os.O_RDONLY); print('descriptor', attempt(os.fchmod, fd, 0o777), attempt(os.ftruncate, fd, 0), attempt(os.write, fd, b'x'), attempt(os.fchown, fd, me, me))
for me, other, groups in ((ALICE, BOB, [TEAM]), (BOB, ALICE, []), (61203, ALICE, [OTHERS, TEAM])):
    as_user(lambda: work(me, other), me, groups=groups)
# Groups given away by their owner.
open('mine', 'w').close(); os.chown('mine', ALICE, ALICE)
as_user(lambda: print(attempt(os.chown, 'mine', -1, TEAM), attempt(os.chown, 'mine', -1, OTHERS), attempt(os.chown, 'mine', BOB, -1), attempt(os.chown, 'mine', ALICE, ALICE)), ALICE, groups=[TEAM]); shown('mine')
# A mode changed takes effect at once, also where the other has looked before.
open('late', 'w').write('x'); os.chmod('late', 0o644)
as_user(lambda: print(open('late').read()), BOB); os.chmod('late', 0o600); as_user(lambda: print(attempt(open, 'late')), BOB)
os.chown('late', BOB, -1); as_user(lambda: print(open('late').read()), BOB)
os.mkdir('way'); open('way/f', 'w').write('in'); as_user(lambda: print(open('way/f').read()), BOB); os.chmod('way', 0o700); as_user(lambda: print(attempt(open, 'way/f')), BOB)
",
    );
    pair.down();
}

/// setuid and setgid go when somebody without privileges writes to, truncates or changes
/// the owner of a file, and stay where they may stay.
#[test]
fn setuid_and_setgid_are_cleared() {
    let pair = Pair::new();
    python(
        &pair,
        r"
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True); libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
source = os.open('source', os.O_RDWR | os.O_CREAT, 0o666); os.write(source, b's' * 100)
def mapped(path):
    with open(path, 'r+b') as f:
        with mmap.mmap(f.fileno(), 0) as view: view[0:1] = b'm'; view.flush()
def opened(path, work):
    fd = os.open(path, os.O_RDWR); work(fd); os.close(fd)
def copied(path):
    fd = os.open('source', os.O_RDONLY); opened(path, lambda to: os.copy_file_range(fd, to, 10, 0, 0))
WAYS = {
    'write': lambda p: opened(p, lambda fd: os.write(fd, b'w')),
    'append': lambda p: open(p, 'a').write('w'),
    'truncate': lambda p: os.truncate(p, 3),
    'same size': lambda p: os.truncate(p, os.stat(p).st_size),
    'ftruncate': lambda p: opened(p, lambda fd: os.ftruncate(fd, 2)),
    'open trunc': lambda p: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)),
    'fallocate': lambda p: opened(p, lambda fd: libc.fallocate(fd, 0, 0, 5000)),
    'punch': lambda p: opened(p, lambda fd: libc.fallocate(fd, 3, 0, 5000)),
    'copy': copied,
    'mapped': mapped,
    'nothing': lambda p: opened(p, lambda fd: os.write(fd, b'')),
    'chown group': lambda p: attempt(os.chown, p, -1, TEAM),
    'chown same': lambda p: attempt(os.chown, p, os.stat(p).st_uid, os.stat(p).st_gid),
    'chmod': lambda p: attempt(os.chmod, p, 0o6777),
    'utime': lambda p: attempt(os.utime, p),
    'rename': lambda p: (os.rename(p, p + '.x'), os.rename(p + '.x', p)),
    'read': lambda p: open(p).read(),
}
os.chmod('.', 0o777)
for way, work in WAYS.items():
    for owner, group in ((ALICE, ALICE), (0, 0), (ALICE, TEAM), (0, TEAM)):
        for mode in (0o4777, 0o6777, 0o2777, 0o2767, 0o6766, 0o7777):
            for who in (ALICE, BOB, 0):
                path = '%s-%d-%d-%o-%d' % (way, owner, group, mode, who)
                with open(path, 'w') as f: f.write('content')
                os.chown(path, owner, group); os.chmod(path, mode)
                if path.startswith('mapped'): os.stat(path)
                as_user(lambda: work(path), who, groups=[TEAM] if who == ALICE else [])
                print(path, oct(os.stat(path).st_mode), os.stat(path).st_gid)
                os.unlink(path)
# File capabilities go as well.
CAPABILITY = bytes.fromhex('0100000200040000000000000000000000000000')
for way in ('write', 'truncate', 'open trunc', 'chown same', 'fallocate'):
    for who in (ALICE, 0):
        with open('capable', 'w') as f: f.write('content')
        os.chown('capable', ALICE, ALICE); os.chmod('capable', 0o777); os.setxattr('capable', 'security.capability', CAPABILITY)
        as_user(lambda: WAYS[way]('capable'), who); print(way, who, attempt(os.getxattr, 'capable', 'security.capability'))
# Whoever has just written to a program does not run it as its owner. Nobody asks for its
# mode in between.
import shutil, subprocess
shutil.copy('/usr/bin/id', 'program'); os.chown('program', 0, 0); os.chmod('program', 0o4777); os.stat('program')
def changed_and_run():
    print('before', subprocess.check_output(['./program', '-u']))
    fd = os.open('program', os.O_WRONLY | os.O_APPEND); os.write(fd, b'x'); os.close(fd)
    print('after', subprocess.check_output(['./program', '-u']))
as_user(changed_and_run, BOB)
# A directory keeps its bits whoever works in it.
os.mkdir('dir'); os.chown('dir', ALICE, TEAM); os.chmod('dir', 0o6777)
as_user(lambda: (open('dir/f', 'w').close(), os.chown('dir', ALICE, TEAM)), ALICE, groups=[TEAM]); shown('dir')
",
    );
    pair.down();
}

/// POSIX ACLs: access, masks, what chmod does to them, and what is inherited.
#[test]
fn acls_are_followed_and_inherited() {
    let pair = Pair::new();
    python(
        &pair,
        r"
ACCESS, DEFAULT = 'system.posix_acl_access', 'system.posix_acl_default'
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 0x10, 0x20
def acl(*entries):
    return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', tag, bits, 0xffffffff if who is None else who) for tag, bits, who in entries)
def told(path, name):
    value = attempt(os.getxattr, path, name)
    return value if isinstance(value, str) else [struct.unpack_from('<HHI', value, at) for at in range(4, len(value), 8)]
def full(*paths):
    for path in paths: shown(path); print('   ', told(path, ACCESS), told(path, DEFAULT) if os.path.isdir(path) else '')
def tries(path):
    print([attempt(lambda: os.close(os.open(path, flags))) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)], [os.access(path, mode) for mode in (4, 2, 1)])
open('f', 'w').write('x')
os.setxattr('f', ACCESS, acl((USER_OBJ, 6, None), (USER, 6, ALICE), (GROUP_OBJ, 0, None), (GROUP, 4, TEAM), (MASK, 6, None), (OTHER, 0, None))); full('f')
for who, groups in ((ALICE, []), (BOB, [TEAM]), (BOB, []), (61203, [OTHERS])): as_user(lambda: tries('f'), who, groups=groups)
os.chmod('f', 0o640); full('f'); as_user(lambda: tries('f'), ALICE)
os.chmod('f', 0o604); full('f'); as_user(lambda: tries('f'), BOB, groups=[TEAM])
print(attempt(os.setxattr, 'f', ACCESS, b'nonsense'), attempt(os.setxattr, 'f', ACCESS, acl((USER_OBJ, 6, None))), attempt(os.setxattr, 'f', DEFAULT, acl((USER_OBJ, 6, None), (GROUP_OBJ, 0, None), (OTHER, 0, None))))
as_user(lambda: print(attempt(os.setxattr, 'f', ACCESS, acl((USER_OBJ, 7, None), (GROUP_OBJ, 7, None), (OTHER, 7, None))), attempt(os.removexattr, 'f', ACCESS)), ALICE)
os.removexattr('f', ACCESS); full('f')
os.setxattr('f', ACCESS, acl((USER_OBJ, 6, None), (GROUP_OBJ, 4, None), (OTHER, 4, None))); full('f'); print(os.listxattr('f'))
# setgid goes with an ACL set by somebody outside the group.
for group, groups in ((TEAM, [TEAM]), (TEAM, []), (OTHERS, [TEAM])):
    open('g', 'w').close(); os.chown('g', ALICE, group); os.chmod('g', 0o2755)
    as_user(lambda: print(attempt(os.setxattr, 'g', ACCESS, acl((USER_OBJ, 6, None), (GROUP_OBJ, 5, None), (OTHER, 5, None)))), ALICE, groups=groups); full('g'); os.unlink('g')
# Defaults are inherited in place of the umask.
os.mkdir('d', 0o777); os.setxattr('d', DEFAULT, acl((USER_OBJ, 7, None), (USER, 7, BOB), (GROUP_OBJ, 5, None), (MASK, 7, None), (OTHER, 0, None)))
os.mkdir('plain', 0o777); os.setxattr('plain', DEFAULT, acl((USER_OBJ, 7, None), (GROUP_OBJ, 7, None), (OTHER, 0, None)))
for where in ('d', 'plain'):
    for number, umask in enumerate((0, 0o022, 0o077)):
        os.mkdir('%s/%d' % (where, number)); os.chmod('%s/%d' % (where, number), 0o777)
        for mode in (0o666, 0o600, 0o644):
            os.mkdir('%s/%d/%o' % (where, number, mode)); os.chmod('%s/%d/%o' % (where, number, mode), 0o777)
            as_user(lambda: make('%s/%d/%o' % (where, number, mode), mode), ALICE, umask=umask)
            full(*['%s/%d/%o/%s' % (where, number, mode, name) for name in ('file', 'dir', 'fifo', 'plain', 'socket')])
as_user(lambda: print(attempt(lambda: open('d/0/666/file', 'a').write('b')), attempt(os.mkdir, 'd/0/666/dir/new')), BOB)
os.removexattr('d', DEFAULT); os.umask(0o022); os.mkdir('d/later'); full('d', 'd/later')
# A setgid directory with defaults: its group, the bit and the ACL go down together, into
# what is made by members and by others, and into what is made in that.
os.umask(0)
for number, (uid, groups) in enumerate(((ALICE, [TEAM]), (BOB, []), (0, []))):
    top = 'shared%d' % number; os.mkdir(top); os.chown(top, 0, TEAM); os.chmod(top, 0o2777)
    os.setxattr(top, DEFAULT, acl((USER_OBJ, 7, None), (USER, 7, BOB), (GROUP_OBJ, 7, None), (GROUP, 5, OTHERS), (MASK, 7, None), (OTHER, 7, None)))
    for umask, mode in ((0o077, 0o666), (0o022, 0o2666), (0, 0o2640)):
        where = ['%s/%o' % (top, mode)]; where += [where[0] + '/dir', where[0] + '/dir/dir']
        as_user(lambda: [(os.mkdir(where[0], 0o777 | mode & 0o2000))] + [attempt(make, at, mode) for at in where], uid, groups=groups, umask=umask)
        full(top, where[0], *['%s/%s' % (at, name) for at in where for name in ('file', 'dir', 'fifo', 'plain', 'socket')])
",
    );
    pair.down();
}

/// Modes and ACLs mean the same in the mount of an ordinary user, whose daemon is held to them
/// as well: ACLs that he sets, and those by which others let him in; the right to list without
/// that to search, and to write without that to read.
#[test]
fn modes_and_acls_in_the_mount_of_an_ordinary_user() {
    let pair = Pair::of_ordinary_user_with(|dir| {
        let script = "
            umask 077; for name in given closed; do echo theirs >$name; chown 61201:61201 $name; done
            mkdir shared; chown 61201:61201 shared; echo in >shared/in
            setfacl -m u:nobody:rw given; setfacl -m u:nobody:rwx shared; setfacl -m u:61202:rw closed";
        let mut shell = std::process::Command::new("sh");
        let done = shell.args(["-ec", script]).current_dir(dir).status();
        assert!(done.unwrap().success());
    });
    pair.python(
        r"
import errno, os, subprocess
def attempt(call, *args, **more):
    try: return call(*args, **more)
    except OSError as error: return errno.errorcode[error.errno]
def append(path):
    with open(path, 'a') as f: return f.write('mine')
def shown(*paths):
    for path in paths:
        stat = os.stat(path); print(path, oct(stat.st_mode), stat.st_uid, stat.st_gid)
        print(subprocess.run(['getfacl', '-cnp', path], capture_output=True, text=True).stdout)
print([attempt(append, path) for path in ('given', 'closed', 'shared/in', 'shared/mine')], attempt(open, 'closed'), open('given').read(), attempt(os.listdir, 'shared'))
print([os.access(path, mode) for path in ('given', 'closed', 'shared') for mode in (4, 2, 1)])
shown('given', 'closed', 'shared', 'shared/mine')
os.umask(0o022); open('f', 'w').close(); shown('f')
subprocess.check_call(['setfacl', '-m', 'u:61202:rwx', 'f']); shown('f')
os.chmod('f', 0o640); shown('f'); os.chmod('f', 0o600); shown('f')
subprocess.check_call(['setfacl', '-m', 'm::r', 'f']); shown('f')
subprocess.check_call(['setfacl', '-b', 'f']); shown('f')
os.mkdir('d'); subprocess.check_call(['setfacl', '-d', '-m', 'u:61202:rwx,o::-', 'd']); shown('d')
os.umask(0o077); open('d/f', 'w').close(); os.mkdir('d/e'); open('d/e/f', 'w').close(); shown('d/f', 'd/e', 'd/e/f')
subprocess.check_call(['setfacl', '-k', 'd']); open('d/g', 'w').close(); shown('d', 'd/g')
# A directory that may be listed and not searched, and a file that may only be written to.
os.mkdir('listed'); open('listed/in', 'w').close(); os.chmod('listed', 0o400); print(os.listdir('listed'), attempt(os.stat, 'listed/in')); os.chmod('listed', 0o700)
open('deaf', 'w').close(); os.chmod('deaf', 0o200); print(attempt(os.setxattr, 'deaf', 'user.a', b'1'), attempt(os.getxattr, 'deaf', 'user.a'), attempt(append, 'deaf'), oct(os.stat('deaf').st_mode))
os.chmod('deaf', 0o600); print(os.getxattr('deaf', 'user.a'), open('deaf').read())
# What takes away his own right.
subprocess.check_call(['setfacl', '-m', 'u::-', 'f']); print(attempt(open, 'f')); os.chmod('f', 0o600); print(attempt(append, 'f'))
",
    );
    pair.down();
}
