//! The thin layer between fuser and the filesystem: decoding, encoding, and how
//! long the kernel may believe what it is told.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, FileType, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::convert::{Ids, absent, device, errno, file_type, set_time};
use super::seats::Seats;
use crate::fs::{Caller, Changes, Filesystem, Found};

/// Nothing changes the tree but this mount, so the kernel may keep what it knows.
/// (Ten years: a Duration that every kernel can turn into its own units.)
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Largest write in one request.
const MAX_WRITE: u32 = 1 << 20;
/// Node ids are lower's inode numbers, and a number in the node table cannot be
/// taken over: the table keeps the inode.
const GENERATION: Generation = Generation(0);
/// What a listing reads from lower at a time.
const LISTING: usize = 16 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
pub(super) struct Adaptor {
    pub(super) filesystem: Arc<Filesystem>,
    pub(super) ids: Ids,
    pub(super) privileged: bool,
    pub(super) seats: Seats,
}

fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        pid: request.pid(),
    }
}

impl Adaptor {
    fn entry(&self, reply: ReplyEntry, found: Result<Found, Errno>) {
        match found {
            Ok(found) => {
                let entry_time = if found.cacheable {
                    FOR_EVER
                } else {
                    Duration::ZERO
                };
                reply.entry_with_ttls(
                    &FOR_EVER,
                    &entry_time,
                    &self.ids.entry(&found.attributes),
                    GENERATION,
                );
            }
            Err(error) => reply.error(errno(error)),
        }
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Err(error) => reply.error(errno(error)),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len <= size => reply.data(&value),
            _ => reply.error(fuser::Errno::ERANGE),
        },
    }
}

impl fuser::Filesystem for Adaptor {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_MAX_PAGES
            // Lower applies the caller's umask, or a default ACL in its place.
            | InitFlags::FUSE_DONT_MASK;
        if self.privileged {
            wanted |= InitFlags::FUSE_POSIX_ACL;
        }
        for flag in wanted.iter() {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "this kernel does not offer it");
            }
        }
        // ENOSYS for OPEN is what the whole caching rests on. The flag only says that
        // the kernel takes it; every kernel since 3.16 does.
        config
            .set_max_write(MAX_WRITE)
            .map_err(|most| io::Error::other(format!("max_write is at most {most}")))?;
        if let Err(most) = config.set_max_readahead(MAX_WRITE) {
            config
                .set_max_readahead(most)
                .map_err(|_| io::Error::other("max_readahead"))?;
        }
        config
            .set_max_background(64)
            .map_err(|_| io::Error::other("max_background"))?;
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.seats.take();
        let parent = self.ids.ino(parent);
        let name = name.as_bytes();
        match self.filesystem.lookup(&caller(request), parent, name) {
            // Node id 0 with a time: the absence is remembered.
            Err(Errno::NOENT) if self.filesystem.absence_is_cacheable(parent, name) => {
                reply.entry_with_ttls(&FOR_EVER, &FOR_EVER, &absent(), GENERATION);
            }
            found => self.entry(reply, found),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.filesystem.forget(self.ids.ino(ino), lookups);
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.seats.take();
        match self.filesystem.getattr(self.ids.ino(ino)) {
            Ok(attributes) => reply.attr(&FOR_EVER, &self.ids.attributes(&attributes)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
        };
        let result = self
            .filesystem
            .setattr(&caller(request), self.ids.ino(ino), &changes);
        match result {
            Ok(attributes) => reply.attr(&FOR_EVER, &self.ids.attributes(&attributes)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.filesystem.readlink(self.ids.ino(ino)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let made = self.filesystem.mknod(
            &caller(request),
            self.ids.ino(parent),
            name.as_bytes(),
            FileType::from_raw_mode(mode),
            mode & 0o7777,
            umask,
            device(rdev),
        );
        self.entry(reply, made);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.filesystem.mkdir(
            &caller(request),
            self.ids.ino(parent),
            name.as_bytes(),
            mode & 0o7777,
            umask,
        );
        self.entry(reply, made);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.ids.ino(parent);
        empty(
            reply,
            self.filesystem
                .unlink(&caller(request), parent, name.as_bytes()),
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.ids.ino(parent);
        empty(
            reply,
            self.filesystem
                .rmdir(&caller(request), parent, name.as_bytes()),
        );
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let made = self.filesystem.symlink(
            &caller(request),
            self.ids.ino(parent),
            name.as_bytes(),
            target.as_os_str().as_bytes(),
        );
        self.entry(reply, made);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let result = self.filesystem.rename(
            &caller(request),
            self.ids.ino(parent),
            name.as_bytes(),
            self.ids.ino(new_parent),
            new_name.as_bytes(),
            rustix::fs::RenameFlags::from_bits_retain(flags.bits()),
        );
        empty(reply, result);
    }

    fn link(
        &self,
        _request: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let made = self.filesystem.link(
            self.ids.ino(ino),
            self.ids.ino(new_parent),
            new_name.as_bytes(),
        );
        self.entry(reply, made);
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Never asked again: from here on opening, reading and closing what the
        // kernel knows costs no request.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match self
                .filesystem
                .read(self.ids.ino(ino), offset, &mut buffer[..size])
            {
                Ok(read) => reply.data(&buffer[..read]),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        content: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.seats.take();
        let caller = caller(request);
        let unprivileged = write_flags
            .contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID)
            .then_some(&caller);
        match self
            .filesystem
            .write(self.ids.ino(ino), offset, content, unprivileged)
        {
            Ok(written) => reply.written(u32::try_from(written).unwrap_or(u32::MAX)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        empty(reply, self.filesystem.fsync(self.ids.ino(ino), datasync));
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Likewise; the kernel caches listings of its own accord then.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let result = self
            .filesystem
            .readdir(self.ids.ino(ino), offset, LISTING, |listed| {
                !reply.add(
                    INodeNo(listed.ino.0),
                    listed.next,
                    file_type(listed.file_type),
                    OsStr::from_bytes(listed.name),
                )
            });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self
            .filesystem
            .readdirplus(self.ids.ino(ino), offset, LISTING, |entry| {
                let listed = entry.listed;
                let attributes = match entry.attributes {
                    Some(attributes) => self.ids.entry(&attributes),
                    // Without a node id the kernel lists the name only, and looks it
                    // up when somebody wants to know more. For the two dots it
                    // ignores the id, and programs want a number.
                    None => FileAttr {
                        ino: match listed.name {
                            b"." | b".." => INodeNo(listed.ino.0),
                            _ => INodeNo(0),
                        },
                        kind: file_type(listed.file_type),
                        ..absent()
                    },
                };
                !reply.add(
                    attributes.ino,
                    listed.next,
                    OsStr::from_bytes(listed.name),
                    &FOR_EVER,
                    &attributes,
                    GENERATION,
                )
            });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        empty(reply, self.filesystem.fsync(self.ids.ino(ino), datasync));
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        match self.filesystem.statfs() {
            Ok(stat) => reply.statfs(
                stat.f_blocks,
                stat.f_bfree,
                stat.f_bavail,
                stat.f_files,
                stat.f_ffree,
                narrow(stat.f_bsize),
                narrow(stat.f_namemax),
                narrow(stat.f_frsize),
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let flags = XattrFlags::from_bits_retain(flags.cast_unsigned());
        let result = self.filesystem.setxattr(
            &caller(request),
            self.ids.ino(ino),
            name.as_bytes(),
            value,
            flags,
        );
        empty(reply, result);
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let value = self.filesystem.getxattr(self.ids.ino(ino), name.as_bytes());
        xattr(reply, size, value);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self
            .filesystem
            .listxattr(&caller(request), self.ids.ino(ino));
        xattr(reply, size, names);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let ino = self.ids.ino(ino);
        empty(
            reply,
            self.filesystem
                .removexattr(&caller(request), ino, name.as_bytes()),
        );
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.seats.take();
        let made = self.filesystem.create(
            &caller(request),
            self.ids.ino(parent),
            name.as_bytes(),
            mode & 0o7777,
            umask,
            flags & libc::O_EXCL != 0,
        );
        match made {
            Ok(found) => reply.created(
                &FOR_EVER,
                &self.ids.entry(&found.attributes),
                GENERATION,
                FileHandle(0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let result = self.filesystem.fallocate(
            &caller(request),
            self.ids.ino(ino),
            offset,
            length,
            FallocateFlags::from_bits_retain(mode.cast_unsigned()),
        );
        empty(reply, result);
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let to = match (u64::try_from(offset), whence) {
            (Ok(offset), libc::SEEK_DATA) => SeekFrom::Data(offset),
            (Ok(offset), libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        match self.filesystem.seek(self.ids.ino(ino), to) {
            Ok(offset) => reply.offset(offset.cast_signed()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        source: INodeNo,
        _source_handle: FileHandle,
        source_offset: u64,
        target: INodeNo,
        _target_handle: FileHandle,
        target_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let copied = self.filesystem.copy_file_range(
            &caller(request),
            self.ids.ino(source),
            source_offset,
            self.ids.ino(target),
            target_offset,
            len,
        );
        match copied {
            Ok(copied) => reply.written(u32::try_from(copied).unwrap_or(u32::MAX)),
            Err(error) => reply.error(errno(error)),
        }
    }
}
