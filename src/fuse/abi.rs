//! The structures and numbers of the kernel's FUSE protocol 7.45, as `linux/fuse.h`
//! lays them out. Fields keep the kernel's names; what this server never looks at is
//! there for the layout only.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The version that this server speaks.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 45;
/// With 7.23 (Linux 3.15) the answer to INIT took the form it has here.
pub(super) const LEAST_MINOR: u32 = 23;
/// The node id of the root.
pub(super) const ROOT_ID: u64 = 1;

/// What a request asks for.
pub(super) mod opcode {
    pub(in crate::fuse) const LOOKUP: u32 = 1;
    pub(in crate::fuse) const FORGET: u32 = 2;
    pub(in crate::fuse) const GETATTR: u32 = 3;
    pub(in crate::fuse) const SETATTR: u32 = 4;
    pub(in crate::fuse) const READLINK: u32 = 5;
    pub(in crate::fuse) const SYMLINK: u32 = 6;
    pub(in crate::fuse) const MKNOD: u32 = 8;
    pub(in crate::fuse) const MKDIR: u32 = 9;
    pub(in crate::fuse) const UNLINK: u32 = 10;
    pub(in crate::fuse) const RMDIR: u32 = 11;
    pub(in crate::fuse) const RENAME: u32 = 12;
    pub(in crate::fuse) const LINK: u32 = 13;
    pub(in crate::fuse) const READ: u32 = 15;
    pub(in crate::fuse) const WRITE: u32 = 16;
    pub(in crate::fuse) const STATFS: u32 = 17;
    pub(in crate::fuse) const RELEASE: u32 = 18;
    pub(in crate::fuse) const FSYNC: u32 = 20;
    pub(in crate::fuse) const SETXATTR: u32 = 21;
    pub(in crate::fuse) const GETXATTR: u32 = 22;
    pub(in crate::fuse) const LISTXATTR: u32 = 23;
    pub(in crate::fuse) const REMOVEXATTR: u32 = 24;
    pub(in crate::fuse) const INIT: u32 = 26;
    pub(in crate::fuse) const READDIR: u32 = 28;
    pub(in crate::fuse) const RELEASEDIR: u32 = 29;
    pub(in crate::fuse) const FSYNCDIR: u32 = 30;
    pub(in crate::fuse) const CREATE: u32 = 35;
    pub(in crate::fuse) const DESTROY: u32 = 38;
    pub(in crate::fuse) const BATCH_FORGET: u32 = 42;
    pub(in crate::fuse) const FALLOCATE: u32 = 43;
    pub(in crate::fuse) const READDIRPLUS: u32 = 44;
    pub(in crate::fuse) const RENAME2: u32 = 45;
    pub(in crate::fuse) const LSEEK: u32 = 46;
    pub(in crate::fuse) const COPY_FILE_RANGE: u32 = 47;
    pub(in crate::fuse) const TMPFILE: u32 = 51;
    pub(in crate::fuse) const STATX: u32 = 52;
    pub(in crate::fuse) const COPY_FILE_RANGE_64: u32 = 53;
}

/// What INIT negotiates, both of its words in one.
pub(super) mod init {
    pub(in crate::fuse) const ASYNC_READ: u64 = 1;
    pub(in crate::fuse) const BIG_WRITES: u64 = 1 << 5;
    pub(in crate::fuse) const DONT_MASK: u64 = 1 << 6;
    pub(in crate::fuse) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in crate::fuse) const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub(in crate::fuse) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in crate::fuse) const POSIX_ACL: u64 = 1 << 20;
    pub(in crate::fuse) const MAX_PAGES: u64 = 1 << 22;
    pub(in crate::fuse) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in crate::fuse) const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub(in crate::fuse) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(in crate::fuse) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(in crate::fuse) const SETXATTR_EXT: u64 = 1 << 29;
    /// The second word of flags is there.
    pub(in crate::fuse) const INIT_EXT: u64 = 1 << 30;
    pub(in crate::fuse) const OVER_IO_URING: u64 = 1 << 41;
}

/// Which fields of [`SetattrIn`] count.
pub(super) mod fattr {
    pub(in crate::fuse) const MODE: u32 = 1;
    pub(in crate::fuse) const UID: u32 = 1 << 1;
    pub(in crate::fuse) const GID: u32 = 1 << 2;
    pub(in crate::fuse) const SIZE: u32 = 1 << 3;
    pub(in crate::fuse) const ATIME: u32 = 1 << 4;
    pub(in crate::fuse) const MTIME: u32 = 1 << 5;
    pub(in crate::fuse) const ATIME_NOW: u32 = 1 << 7;
    pub(in crate::fuse) const MTIME_NOW: u32 = 1 << 8;
    pub(in crate::fuse) const KILL_SUIDGID: u32 = 1 << 11;
}

/// In [`WriteIn::write_flags`]: the caller may not keep setuid and setgid.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// In [`SetxattrIn::setxattr_flags`]: the caller may not keep setgid.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// In [`FsyncIn::fsync_flags`]: as fdatasync.
pub(super) const FSYNC_FDATASYNC: u32 = 1;
/// In [`OpenOut::open_flags`]: pages that are cached stay.
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// A notification's code stands where an answer has its error.
pub(super) const NOTIFY_INVAL_INODE: i32 = 2;

/// Bytes that the ring has for the structure a request begins with; every one is
/// smaller.
pub(super) const RING_HEAD: usize = 128;

/// Gives the kernel a slot of a ring.
pub(super) const RING_REGISTER: u32 = 1;
/// Answers the request in a slot and asks for the next.
pub(super) const RING_COMMIT_AND_FETCH: u32 = 2;

/// Declares structures that are nothing but their bytes.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }
    )*};
}

plain! {
    /// What each request begins with.
    InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// What each answer begins with.
    OutHeader {
        len: u32,
        error: i32,
        unique: u64,
    }
    InitIn {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
    }
    InitOut {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }
    SxTime {
        tv_sec: i64,
        tv_nsec: u32,
        reserved: i32,
    }
    Statx {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: u16,
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: SxTime,
        btime: SxTime,
        ctime: SxTime,
        mtime: SxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }
    StatxOut {
        attr_valid: u64,
        attr_valid_nsec: u32,
        flags: u32,
        spare: [u64; 2],
        stat: Statx,
    }
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    ForgetIn {
        nlookup: u64,
    }
    BatchForgetIn {
        count: u32,
        dummy: u32,
    }
    ForgetOne {
        nodeid: u64,
        nlookup: u64,
    }
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    MknodIn {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }
    MkdirIn {
        mode: u32,
        umask: u32,
    }
    RenameIn {
        newdir: u64,
    }
    Rename2In {
        newdir: u64,
        flags: u32,
        padding: u32,
    }
    LinkIn {
        oldnodeid: u64,
    }
    CreateIn {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }
    OpenOut {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }
    ReadIn {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteIn {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteOut {
        size: u32,
        padding: u32,
    }
    FsyncIn {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }
    /// The whole of it comes with [`init::SETXATTR_EXT`] only.
    SetxattrIn {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }
    SetxattrShortIn {
        size: u32,
        flags: u32,
    }
    GetxattrIn {
        size: u32,
        padding: u32,
    }
    GetxattrOut {
        size: u32,
        padding: u32,
    }
    FallocateIn {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }
    LseekIn {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }
    LseekOut {
        offset: u64,
    }
    CopyFileRangeIn {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    CopyFileRangeOut {
        bytes_copied: u64,
    }
    /// A name of a listing follows it, and zeros up to a multiple of 8.
    Dirent {
        ino: u64,
        off: u64,
        namelen: u32,
        kind: u32,
    }
    /// What a slot of a ring tells beside request or answer.
    RingEntry {
        flags: u64,
        commit_id: u64,
        payload_sz: u32,
        padding: u32,
        reserved: u64,
    }
    /// What stands in the command area of a submission queue entry.
    RingCommand {
        flags: u64,
        commit_id: u64,
        qid: u16,
        padding: [u8; 6],
    }
    NotifyInvalInodeOut {
        ino: u64,
        off: i64,
        len: i64,
    }
}

/// What a slot of a ring has besides the payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingHeader {
    /// [`InHeader`], and for the answer [`OutHeader`].
    pub(super) in_out: [u8; 128],
    pub(super) head: [u8; RING_HEAD],
    pub(super) entry: RingEntry,
}

/// Bytes of the structure that a request begins with after its header; names and
/// contents follow. `extended` is whether [`init::SETXATTR_EXT`] was agreed on.
pub(super) fn head_len(code: u32, extended: bool) -> usize {
    fn of<T>() -> usize {
        size_of::<T>()
    }
    match code {
        // Its fields are flags and a handle, which nobody here looks at.
        opcode::GETATTR => 16,
        opcode::STATX => 24,
        opcode::FORGET => of::<ForgetIn>(),
        opcode::BATCH_FORGET => of::<BatchForgetIn>(),
        opcode::SETATTR => of::<SetattrIn>(),
        opcode::MKNOD => of::<MknodIn>(),
        opcode::MKDIR => of::<MkdirIn>(),
        opcode::RENAME => of::<RenameIn>(),
        opcode::RENAME2 => of::<Rename2In>(),
        opcode::LINK => of::<LinkIn>(),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => of::<ReadIn>(),
        opcode::WRITE => of::<WriteIn>(),
        opcode::FSYNC | opcode::FSYNCDIR => of::<FsyncIn>(),
        opcode::SETXATTR if extended => of::<SetxattrIn>(),
        opcode::SETXATTR => of::<SetxattrShortIn>(),
        opcode::GETXATTR | opcode::LISTXATTR => of::<GetxattrIn>(),
        opcode::CREATE | opcode::TMPFILE => of::<CreateIn>(),
        opcode::FALLOCATE => of::<FallocateIn>(),
        opcode::LSEEK => of::<LseekIn>(),
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => of::<CopyFileRangeIn>(),
        _ => 0,
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    /// The sizes that `linux/fuse.h` gives for 7.45.
    #[test]
    fn the_layout_is_the_kernels() {
        for (ours, kernels) in [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<InitOut>(), 64),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<Statx>(), 256),
            (size_of::<StatxOut>(), 288),
            (size_of::<StatfsOut>(), 80),
            (size_of::<SetattrIn>(), 88),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<SetxattrIn>(), 16),
            (size_of::<FallocateIn>(), 32),
            (size_of::<CopyFileRangeIn>(), 56),
            (size_of::<Dirent>(), 24),
            (size_of::<RingHeader>(), 288),
            (size_of::<RingCommand>(), 24),
        ] {
            assert_eq!(ours, kernels);
        }
    }
}
