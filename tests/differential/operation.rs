//! Operations, and how they are drawn.
//!
//! `O_TMPFILE` is not drawn (`nameless.rs` has it). Nor is, because the mount differs there
//! and `docs/semantics.md` says so, `O_DIRECT`, `RENAME_WHITEOUT`, `chown` to nobody (-1, -1), and `fallocate` with COLLAPSE_RANGE,
//! INSERT_RANGE or UNSHARE_RANGE, which the kernel's FUSE refuses. Times of access are
//! compared only where they are set. See `differences.rs` for what the mount does then.

use rustix::fs::{Access, FallocateFlags, FileType, OFlags, RenameFlags, XattrFlags};

use crate::actor::{ALICE, BOB, STRANGERS, TEAM};
use crate::support::Random;

/// How many descriptors are kept open at a time.
pub const SLOTS: usize = 10;

/// A path, from the root of the tree or from an open directory.
#[derive(Clone, PartialEq, Eq)]
pub struct Name {
    pub base: Option<usize>,
    pub path: Vec<u8>,
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(slot) = self.base {
            write!(f, "#{slot}/")?;
        }
        let path = self.path.escape_ascii().to_string();
        if path.len() > 80 {
            write!(f, "{}...({} bytes)", &path[..20], self.path.len())
        } else {
            write!(f, "{path:?}")
        }
    }
}

/// What an operation on a node works on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// What a path leads to.
    Path(Name),
    /// What a path names itself, be it a link.
    Link(Name),
    /// An open descriptor.
    Open(usize),
}

/// A time to set: present, leave alone, or seconds and nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Time {
    Now,
    Omit,
    At(i64, i64),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    Open(Name, OFlags, u32, usize),
    Close(usize),
    Read(usize, usize),
    ReadAt(usize, u64, usize),
    Write(usize, usize, u8),
    WriteAt(usize, u64, usize, u8),
    Truncate(Target, u64),
    Allocate(usize, FallocateFlags, u64, u64),
    SeekData(usize, u64),
    SeekHole(usize, u64),
    SeekTo(usize, u64),
    SeekEnd(usize, i64),
    CopyRange(usize, u64, usize, u64, usize),
    Sync(usize, bool),
    Rename(Name, Name, RenameFlags),
    Hardlink(Target, Name),
    Unlink(Name),
    Rmdir(Name),
    Symlink(Vec<u8>, Name),
    ReadLink(Name),
    Mkdir(Name, u32),
    Mknod(Name, FileType, u32),
    Chmod(Target, u32),
    Chown(Target, Option<u32>, Option<u32>),
    Times(Target, Time, Time),
    SetXattr(Target, &'static str, Vec<u8>, XattrFlags),
    GetXattr(Target, &'static str),
    ListXattr(Target),
    RemoveXattr(Target, &'static str),
    Access(Name, Access, bool),
    Stat(Target),
    List(Target),
    Statfs(Target),
    /// The kernel forgets every cached entry and node that is not in use.
    Forget,
}

/// Draws operations that often make sense in the tree as it is.
pub struct Source<'a> {
    pub random: &'a mut Random,
    /// What exists at present.
    pub known: &'a [(Vec<u8>, FileType)],
    /// The descriptors that are open, with what they are.
    pub open: &'a [(usize, FileType)],
}

const COMPONENTS: &[&[u8]] = &[b"a", b"b", b"c", b"d", b"e", b"f", b"\xff\xfe odd\n"];
const MODES: &[u32] = &[
    0o644, 0o755, 0o777, 0o777, 0o777, 0o777, 0o666, 0o666, 0o666, 0o600, 0o666, 0o000, 0o444,
    0o4755, 0o2755, 0o6777, 0o2770, 0o1777, 0o2644, 0o4711, 0o070,
];
const XATTRS: &[&str] = &[
    "user.a",
    "user.a",
    "user.a",
    "user.a",
    "user.b",
    "user.long name with spaces",
    "trusted.t",
    "security.note",
    "system.posix_acl_access",
    "system.posix_acl_default",
    "user.",
    "nonsense",
];

impl Source<'_> {
    fn chance(&mut self, percent: u64) -> bool {
        self.random.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        let index = self.random.below(from.len() as u64);
        from[usize::try_from(index).unwrap()].clone()
    }

    /// Mostly one that is open.
    fn slot(&mut self) -> usize {
        self.slot_of(|_| true)
    }

    /// Mostly an open regular file.
    fn file(&mut self) -> usize {
        self.slot_of(FileType::is_file)
    }

    fn slot_of(&mut self, wanted: impl Fn(FileType) -> bool) -> usize {
        let open: Vec<_> = self
            .open
            .iter()
            .filter(|(_, kind)| wanted(*kind))
            .map(|(slot, _)| *slot)
            .collect();
        if open.is_empty() || self.chance(8) {
            self.any_slot()
        } else {
            self.pick(&open)
        }
    }

    fn any_slot(&mut self) -> usize {
        usize::try_from(self.random.below(SLOTS as u64)).unwrap()
    }

    /// The path of something of a kind, if there is any.
    fn existing(&mut self, wanted: impl Fn(FileType) -> bool) -> Option<Vec<u8>> {
        let paths: Vec<_> = self
            .known
            .iter()
            .filter(|(_, kind)| wanted(*kind))
            .map(|(path, _)| path)
            .collect();
        (!paths.is_empty()).then(|| self.pick(&paths).clone())
    }

    /// A path in a directory that exists, three levels deep at most.
    fn fresh(&mut self) -> Vec<u8> {
        let mut path = match self.existing(FileType::is_dir) {
            Some(mut dir) if self.chance(70) => {
                dir.push(b'/');
                dir
            }
            _ => Vec::new(),
        };
        if path.iter().filter(|byte| **byte == b'/').count() > 3 {
            path.clear();
        }
        path.extend(self.pick(COMPONENTS));
        path
    }

    /// What a path ends in that leads astray, now and then.
    fn astray(&mut self, mut path: Vec<u8>) -> Vec<u8> {
        match self.random.below(150) {
            0 | 1 => path.push(b'/'),
            2 => path.extend(b"/."),
            3 => path.extend(b"/.."),
            4 => path.extend(b"/../a"),
            5 => path.extend([&b"/"[..], &[b'n'; 255]].concat()),
            6 => path.extend([&b"/"[..], &[b'n'; 256]].concat()),
            7 if self.chance(30) => path = Vec::new(),
            8 if self.chance(30) => path = b".".to_vec(),
            9 if self.chance(30) => path = vec![b'x'; 4096],
            10 => path.extend(b"//a"),
            11 => path.extend(b"/a/b"),
            _ => {}
        }
        path
    }

    fn name_of(&mut self, path: Vec<u8>) -> Name {
        let dirs = self.open.iter().any(|(_, kind)| kind.is_dir());
        if self.chance(if dirs { 10 } else { 1 }) {
            let base = Some(self.slot_of(FileType::is_dir));
            let path = if self.chance(10) {
                b"..".to_vec()
            } else {
                self.pick(COMPONENTS).to_vec()
            };
            return Name { base, path };
        }
        let path = self.astray(path);
        Name { base: None, path }
    }

    /// A name for something new.
    fn new_name(&mut self) -> Name {
        let path = self.fresh();
        self.name_of(path)
    }

    /// Mostly a name of something that exists, of a kind.
    fn name_like(&mut self, wanted: impl Fn(FileType) -> bool) -> Name {
        let existing = if self.chance(88) {
            self.existing(wanted)
        } else {
            None
        };
        let path = match existing {
            Some(path) => path,
            None => self.fresh(),
        };
        self.name_of(path)
    }

    fn name(&mut self) -> Name {
        self.name_like(|_| true)
    }

    fn target(&mut self) -> Target {
        match self.random.below(10) {
            0..=5 => Target::Path(self.name()),
            6 => Target::Link(self.name()),
            _ => Target::Open(self.slot()),
        }
    }

    fn content(&mut self) -> Target {
        if self.chance(50) {
            Target::Open(self.file())
        } else {
            Target::Path(self.name_like(FileType::is_file))
        }
    }

    fn linkable(&mut self) -> Target {
        match self.random.below(10) {
            0 => Target::Open(self.file()),
            1..=2 => Target::Path(self.name()),
            _ => Target::Link(self.name_like(|kind| !kind.is_dir())),
        }
    }

    fn directory(&mut self) -> Target {
        if self.chance(30) {
            Target::Open(self.slot_of(FileType::is_dir))
        } else {
            Target::Path(self.name_like(FileType::is_dir))
        }
    }

    fn mode(&mut self) -> u32 {
        if self.chance(15) {
            u32::try_from(self.random.below(0o10000)).unwrap()
        } else {
            self.pick(MODES)
        }
    }

    fn offset(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.below(3 << 20),
            1 => u64::from(u32::try_from(self.random.below(64)).unwrap()) * 4096,
            // Beyond what any file can have.
            2 if self.chance(10) => (1 << 62) + self.random.below(1 << 20),
            3 => 0,
            _ => self.random.below(60_000),
        }
    }

    fn length(&mut self) -> usize {
        let length = match self.random.below(20) {
            0 => self.random.below(300_000),
            1 => 0,
            2 => 4096,
            _ => self.random.below(9_000),
        };
        usize::try_from(length).unwrap()
    }

    fn time(&mut self) -> Time {
        match self.random.below(6) {
            0 => Time::Now,
            1 => Time::Omit,
            // Before 1970.
            2 => Time::At(
                -self.random.below(2_000_000_000).cast_signed(),
                self.random.below(1_000_000_000).cast_signed(),
            ),
            3 => Time::At(self.random.below(10).cast_signed() - 5, 999_999_999),
            _ => Time::At(
                self.random.below(4_000_000_000).cast_signed(),
                self.random.below(1_000_000_000).cast_signed(),
            ),
        }
    }

    fn open_flags(&mut self) -> OFlags {
        // Nobody waits for the other end of a FIFO.
        let mut flags = OFlags::NONBLOCK
            | match self.random.below(4) {
                0 if self.chance(50) => OFlags::RDONLY,
                1 if self.chance(50) => OFlags::WRONLY,
                _ => OFlags::RDWR,
            };
        for (flag, percent) in [
            (OFlags::CREATE, 60),
            (OFlags::EXCL, 8),
            (OFlags::TRUNC, 15),
            (OFlags::APPEND, 20),
            (OFlags::DIRECTORY, 3),
            (OFlags::NOFOLLOW, 10),
            (OFlags::DSYNC, 3),
            (OFlags::NOATIME, 2),
            (OFlags::PATH, 3),
        ] {
            if self.chance(percent) {
                flags |= flag;
            }
        }
        flags
    }

    fn xattr_value(&mut self, name: &str) -> Vec<u8> {
        if name.starts_with("system.posix_acl") {
            return if self.chance(90) {
                self.acl()
            } else {
                b"nonsense".to_vec()
            };
        }
        let length = match self.random.below(12) {
            0 => 0,
            1 => 3000,
            2 => 70_000,
            _ => self.random.below(60),
        };
        self.random.bytes(usize::try_from(length).unwrap())
    }

    /// A POSIX ACL as the kernel takes it.
    fn acl(&mut self) -> Vec<u8> {
        let mut entries = vec![(1_u16, None)];
        if self.chance(70) {
            entries.push((2, Some(self.pick(&[ALICE.id, BOB.id]))));
        }
        entries.push((4, None));
        if self.chance(40) {
            entries.push((8, Some(self.pick(&[TEAM, STRANGERS]))));
        }
        if entries.len() > 2 || self.chance(20) {
            entries.push((0x10, None));
        }
        entries.push((0x20, None));
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, id) in entries {
            let permissions = u16::try_from(self.random.below(8)).unwrap();
            acl.extend(tag.to_le_bytes());
            acl.extend(permissions.to_le_bytes());
            acl.extend(id.unwrap_or(u32::MAX).to_le_bytes());
        }
        acl
    }

    /// The next operation.
    pub fn draw(&mut self) -> Operation {
        use Operation as O;
        if self.known.len() < 15 && self.chance(25) {
            // An empty tree gives nothing but ENOENT.
            return if self.chance(30) {
                O::Mkdir(self.new_name(), self.mode() | 0o700)
            } else {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
                O::Open(self.new_name(), flags, self.mode(), self.any_slot())
            };
        }
        if self.known.len() > 50 && self.chance(25) {
            return if self.chance(60) {
                O::Unlink(self.name_like(|kind| !kind.is_dir()))
            } else {
                O::Rmdir(self.name_like(FileType::is_dir))
            };
        }
        match self.random.below(1000) {
            0..=139 => {
                if self.chance(8) {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                    return O::Open(self.name_like(FileType::is_dir), flags, 0, self.any_slot());
                }
                let flags = self.open_flags();
                let name = if flags.contains(OFlags::EXCL) {
                    self.new_name()
                } else {
                    self.name_like(|kind| !kind.is_dir())
                };
                O::Open(name, flags, self.mode(), self.any_slot())
            }
            140..=169 => O::Close(self.slot()),
            170..=189 => O::Read(self.file(), self.length()),
            190..=219 => O::ReadAt(self.file(), self.offset(), self.length()),
            220..=259 => O::Write(self.slot(), self.length(), self.byte()),
            260..=329 => O::WriteAt(self.file(), self.offset(), self.length(), self.byte()),
            330..=359 => O::Truncate(self.content(), self.offset()),
            360..=399 => {
                let mut mode = FallocateFlags::empty();
                for flag in [
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE,
                    FallocateFlags::ZERO_RANGE,
                ] {
                    if self.chance(40) {
                        mode |= flag;
                    }
                }
                O::Allocate(self.file(), mode, self.offset(), self.length() as u64)
            }
            400..=419 => O::SeekData(self.file(), self.offset()),
            420..=439 => O::SeekHole(self.file(), self.offset()),
            // Nor here: any position is one, see `differences.rs`.
            440..=449 => O::SeekTo(self.file(), self.random.below(100_000)),
            450..=459 => O::SeekEnd(self.file(), -self.random.below(5000).cast_signed()),
            460..=479 => O::CopyRange(
                self.file(),
                self.offset(),
                self.file(),
                // Not beyond what lower can hold: to copy nothing there is no error.
                self.random.below(3 << 20),
                self.length(),
            ),
            480..=484 => O::Sync(self.slot(), self.chance(50)),
            485..=554 => {
                let flags = match self.random.below(6) {
                    0 => RenameFlags::NOREPLACE,
                    1 => RenameFlags::EXCHANGE,
                    2 if self.chance(10) => RenameFlags::NOREPLACE | RenameFlags::EXCHANGE,
                    _ => RenameFlags::empty(),
                };
                {
                    let to = if flags.contains(RenameFlags::EXCHANGE) || self.chance(30) {
                        self.name()
                    } else {
                        self.new_name()
                    };
                    O::Rename(self.name(), to, flags)
                }
            }
            555..=594 => O::Hardlink(self.linkable(), self.new_name()),
            595..=634 => O::Unlink(self.name_like(|kind| !kind.is_dir())),
            635..=659 => O::Rmdir(self.name_like(FileType::is_dir)),
            660..=689 => {
                let target = match self.random.below(12) {
                    0 => vec![b't'; 1000],
                    1 => Vec::new(),
                    // Without "..": the two trees have different neighbours.
                    _ => self.fresh(),
                };
                O::Symlink(target, self.new_name())
            }
            690..=699 => O::ReadLink(self.name_like(FileType::is_symlink)),
            700..=754 => O::Mkdir(self.new_name(), self.mode() | 0o700),
            755..=774 => {
                let file_type = self.pick(&[
                    FileType::Fifo,
                    FileType::Socket,
                    FileType::RegularFile,
                    FileType::CharacterDevice,
                ]);
                O::Mknod(self.new_name(), file_type, self.mode())
            }
            775..=819 => O::Chmod(self.target(), self.mode()),
            820..=854 => {
                let ids = [None, Some(0), Some(ALICE.id), Some(BOB.id)];
                let groups = [
                    None,
                    Some(0),
                    Some(ALICE.id),
                    Some(BOB.id),
                    Some(TEAM),
                    Some(STRANGERS),
                ];
                match (self.pick(&ids), self.pick(&groups)) {
                    (None, None) => O::Chown(self.target(), None, Some(TEAM)),
                    (uid, gid) => O::Chown(self.target(), uid, gid),
                }
            }
            855..=879 => O::Times(self.target(), self.time(), self.time()),
            880..=914 => {
                let name = self.pick(XATTRS);
                let flags = match self.random.below(8) {
                    0 => XattrFlags::CREATE,
                    1 => XattrFlags::REPLACE,
                    2 if self.chance(20) => XattrFlags::CREATE | XattrFlags::REPLACE,
                    _ => XattrFlags::empty(),
                };
                O::SetXattr(self.target(), name, self.xattr_value(name), flags)
            }
            915..=924 => O::GetXattr(self.target(), self.pick(XATTRS)),
            925..=934 => O::ListXattr(self.target()),
            935..=944 => O::RemoveXattr(self.target(), self.pick(XATTRS)),
            945..=959 => {
                let access = Access::from_bits_retain(u32::try_from(self.random.below(8)).unwrap());
                O::Access(self.name(), access, self.chance(50))
            }
            960..=974 => O::Stat(self.target()),
            975..=989 => O::List(self.directory()),
            990..=993 => O::Statfs(self.target()),
            _ => O::Forget,
        }
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.random.below(255)).unwrap() + 1
    }
}
