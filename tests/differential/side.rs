//! One of the two directories: operations are carried out here as an actor.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid};
use rustix::io::{Errno, Result};

use crate::operation::{Name, Operation, SLOTS, Target, Time};
use crate::view::{Moment, Seen, Shown, try_list};

/// What an operation gave, in a form that is the same wherever it was carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Done,
    Number(u64),
    Bytes(Vec<u8>),
    Names(Vec<(Vec<u8>, FileType)>),
    Stat(Shown),
    /// Those times that were set to something definite.
    Times(Option<Moment>, Option<Moment>),
    /// Size of a block, of a fragment, blocks, and longest name.
    Statfs(u64, u64, u64, u64),
}

/// A directory and what is open in it.
pub struct Side {
    pub root: PathBuf,
    dir: OwnedFd,
    open: Vec<Option<OwnedFd>>,
}

impl Side {
    pub fn new(root: &Path) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self {
            root: root.to_owned(),
            dir: rustix::fs::open(root, flags, Mode::empty()).unwrap(),
            open: (0..SLOTS).map(|_| None).collect(),
        }
    }

    /// What stat tells of the open descriptors.
    pub fn open_nodes(&self) -> Vec<Option<Stat>> {
        self.open
            .iter()
            .map(|open| open.as_ref().map(|open| rustix::fs::fstat(open).unwrap()))
            .collect()
    }

    /// The content of an open file, whatever it was opened for; none where its mode forbids
    /// to read it.
    pub fn content(&self, slot: usize) -> Option<Vec<u8>> {
        let file = self.open[slot].as_ref().unwrap();
        std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
    }

    fn slot(&self, slot: usize) -> Result<BorrowedFd<'_>> {
        Ok(self.open[slot].as_ref().ok_or(Errno::BADF)?.as_fd())
    }

    /// Refuses what leads out of the tree: the two have different neighbours.
    fn base(&self, name: &Name) -> Result<BorrowedFd<'_>> {
        let Some(slot) = name.base else {
            return Ok(self.dir.as_fd());
        };
        let base = self.slot(slot)?;
        if name.path == b".." {
            let (base, root) = (rustix::fs::fstat(base)?, rustix::fs::fstat(&self.dir)?);
            if (base.st_dev, base.st_ino) == (root.st_dev, root.st_ino) {
                return Err(Errno::XDEV);
            }
        }
        Ok(base)
    }

    /// For the calls that know no base.
    fn path(&self, name: &Name) -> Result<CString> {
        let base = self.base(name)?;
        let mut path = format!("/proc/self/fd/{}/", base.as_raw_fd()).into_bytes();
        path.extend(&name.path);
        CString::new(path).map_err(|_| Errno::INVAL)
    }

    pub fn carry_out(&mut self, operation: &Operation) -> Result<Answer> {
        use Operation as O;
        match operation {
            O::Open(name, flags, mode, slot) => {
                let opened = rustix::fs::openat(
                    self.base(name)?,
                    os(&name.path),
                    *flags | OFlags::CLOEXEC,
                    Mode::from_raw_mode(*mode),
                )?;
                self.open[*slot] = Some(opened);
                Ok(Answer::Done)
            }
            O::Close(slot) => match self.open[*slot].take() {
                Some(_) => Ok(Answer::Done),
                None => Err(Errno::BADF),
            },
            O::Read(slot, length) => {
                let mut buffer = vec![0; *length];
                let read = rustix::io::read(self.slot(*slot)?, &mut buffer[..])?;
                buffer.truncate(read);
                Ok(Answer::Bytes(buffer))
            }
            O::ReadAt(slot, offset, length) => {
                let mut buffer = vec![0; *length];
                let read = rustix::io::pread(self.slot(*slot)?, &mut buffer[..], *offset)?;
                buffer.truncate(read);
                Ok(Answer::Bytes(buffer))
            }
            O::Write(slot, length, byte) => number(rustix::io::write(
                self.slot(*slot)?,
                &content(*length, *byte),
            )),
            O::WriteAt(slot, offset, length, byte) => number(rustix::io::pwrite(
                self.slot(*slot)?,
                &content(*length, *byte),
                *offset,
            )),
            O::Truncate(target, size) => self.truncate(target, *size),
            O::Allocate(slot, mode, offset, length) => done(rustix::fs::fallocate(
                self.slot(*slot)?,
                *mode,
                *offset,
                *length,
            )),
            O::SeekData(slot, at) => self.seek(*slot, SeekFrom::Data(*at)),
            O::SeekHole(slot, at) => self.seek(*slot, SeekFrom::Hole(*at)),
            O::SeekTo(slot, at) => self.seek(*slot, SeekFrom::Start(*at)),
            O::SeekEnd(slot, by) => self.seek(*slot, SeekFrom::End(*by)),
            O::CopyRange(source, from, target, to, length) => {
                let (mut from, mut to) = (*from, *to);
                number(rustix::fs::copy_file_range(
                    self.slot(*source)?,
                    Some(&mut from),
                    self.slot(*target)?,
                    Some(&mut to),
                    *length,
                ))
            }
            O::Sync(slot, content_only) => done(if *content_only {
                rustix::fs::fdatasync(self.slot(*slot)?)
            } else {
                rustix::fs::fsync(self.slot(*slot)?)
            }),
            O::Rename(from, to, flags) => done(rustix::fs::renameat_with(
                self.base(from)?,
                os(&from.path),
                self.base(to)?,
                os(&to.path),
                *flags,
            )),
            O::Hardlink(target, to) => self.hardlink(target, to),
            O::Unlink(name) => done(rustix::fs::unlinkat(
                self.base(name)?,
                os(&name.path),
                AtFlags::empty(),
            )),
            O::Rmdir(name) => done(rustix::fs::unlinkat(
                self.base(name)?,
                os(&name.path),
                AtFlags::REMOVEDIR,
            )),
            O::Symlink(target, name) => done(rustix::fs::symlinkat(
                os(target),
                self.base(name)?,
                os(&name.path),
            )),
            O::ReadLink(name) => {
                let text = rustix::fs::readlinkat(self.base(name)?, os(&name.path), Vec::new())?;
                Ok(Answer::Bytes(text.into_bytes()))
            }
            O::Mkdir(name, mode) => done(rustix::fs::mkdirat(
                self.base(name)?,
                os(&name.path),
                Mode::from_raw_mode(*mode),
            )),
            O::Mknod(name, file_type, mode) => {
                let device = match file_type {
                    // The one that is always full.
                    FileType::CharacterDevice => rustix::fs::makedev(1, 7),
                    _ => 0,
                };
                done(rustix::fs::mknodat(
                    self.base(name)?,
                    os(&name.path),
                    *file_type,
                    Mode::from_raw_mode(*mode),
                    device,
                ))
            }
            O::Chmod(target, mode) => {
                let mode = Mode::from_raw_mode(*mode);
                done(match target {
                    Target::Path(name) | Target::Link(name) => rustix::fs::chmodat(
                        self.base(name)?,
                        os(&name.path),
                        mode,
                        AtFlags::empty(),
                    ),
                    Target::Open(slot) => rustix::fs::fchmod(self.slot(*slot)?, mode),
                })
            }
            O::Chown(target, uid, gid) => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                done(match target {
                    Target::Open(slot) => rustix::fs::fchown(self.slot(*slot)?, uid, gid),
                    Target::Path(name) | Target::Link(name) => rustix::fs::chownat(
                        self.base(name)?,
                        os(&name.path),
                        uid,
                        gid,
                        nofollow(target),
                    ),
                })
            }
            O::Times(target, accessed, modified) => self.set_times(target, *accessed, *modified),
            O::SetXattr(target, name, value, flags) => done(match target {
                Target::Path(at) => rustix::fs::setxattr(self.path(at)?, *name, value, *flags),
                Target::Link(at) => rustix::fs::lsetxattr(self.path(at)?, *name, value, *flags),
                Target::Open(slot) => {
                    rustix::fs::fsetxattr(self.slot(*slot)?, *name, value, *flags)
                }
            }),
            O::GetXattr(target, name) => {
                let mut buffer = vec![0; 64 << 10];
                let length = match target {
                    Target::Path(at) => {
                        rustix::fs::getxattr(self.path(at)?, *name, &mut buffer[..])
                    }
                    Target::Link(at) => {
                        rustix::fs::lgetxattr(self.path(at)?, *name, &mut buffer[..])
                    }
                    Target::Open(slot) => {
                        rustix::fs::fgetxattr(self.slot(*slot)?, *name, &mut buffer[..])
                    }
                }?;
                buffer.truncate(length);
                Ok(Answer::Bytes(buffer))
            }
            O::ListXattr(target) => {
                let mut buffer = vec![0; 64 << 10];
                let length = match target {
                    Target::Path(at) => rustix::fs::listxattr(self.path(at)?, &mut buffer[..]),
                    Target::Link(at) => rustix::fs::llistxattr(self.path(at)?, &mut buffer[..]),
                    Target::Open(slot) => {
                        rustix::fs::flistxattr(self.slot(*slot)?, &mut buffer[..])
                    }
                }?;
                let mut names: Vec<_> = buffer[..length].split(|byte| *byte == 0).collect();
                names.sort_unstable();
                Ok(Answer::Bytes(names.join(&0)))
            }
            O::RemoveXattr(target, name) => done(match target {
                Target::Path(at) => rustix::fs::removexattr(self.path(at)?, *name),
                Target::Link(at) => rustix::fs::lremovexattr(self.path(at)?, *name),
                Target::Open(slot) => rustix::fs::fremovexattr(self.slot(*slot)?, *name),
            }),
            O::Access(name, access, effective) => done(rustix::fs::accessat(
                self.base(name)?,
                os(&name.path),
                *access,
                if *effective {
                    AtFlags::EACCESS
                } else {
                    AtFlags::empty()
                },
            )),
            O::Stat(target) => Ok(Answer::Stat(Seen::from(&self.stat(target)?).shown)),
            O::List(target) => {
                let opened;
                let dir = match target {
                    Target::Open(slot) => self.open[*slot].as_ref().ok_or(Errno::BADF)?,
                    Target::Path(name) | Target::Link(name) => {
                        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                        opened = rustix::fs::openat(
                            self.base(name)?,
                            os(&name.path),
                            flags,
                            Mode::empty(),
                        )?;
                        &opened
                    }
                };
                let listed = try_list(dir)?;
                let names = listed.into_iter().map(|(name, (kind, _))| (name, kind));
                Ok(Answer::Names(names.collect()))
            }
            O::Statfs(target) => {
                let stat = match target {
                    Target::Open(slot) => rustix::fs::fstatvfs(self.slot(*slot)?),
                    Target::Path(name) | Target::Link(name) => {
                        rustix::fs::statvfs(self.path(name)?)
                    }
                }?;
                assert!(stat.f_bavail <= stat.f_bfree && stat.f_bfree <= stat.f_blocks);
                assert!(stat.f_ffree <= stat.f_files);
                Ok(Answer::Statfs(
                    stat.f_bsize,
                    stat.f_frsize,
                    stat.f_blocks,
                    stat.f_namemax,
                ))
            }
            O::Forget => Ok(Answer::Done),
        }
    }

    fn stat(&self, target: &Target) -> Result<Stat> {
        match target {
            Target::Open(slot) => rustix::fs::fstat(self.slot(*slot)?),
            Target::Path(name) | Target::Link(name) => {
                rustix::fs::statat(self.base(name)?, os(&name.path), nofollow(target))
            }
        }
    }

    fn seek(&self, slot: usize, to: SeekFrom) -> Result<Answer> {
        let file = self.slot(slot)?;
        // A position in a directory is the filesystem's own affair.
        if rustix::fs::fstat(file)
            .is_ok_and(|stat| !FileType::from_raw_mode(stat.st_mode).is_file())
        {
            return Err(Errno::SPIPE);
        }
        Ok(Answer::Number(rustix::fs::seek(file, to)?))
    }

    fn truncate(&self, target: &Target, size: u64) -> Result<Answer> {
        match target {
            Target::Open(slot) => done(rustix::fs::ftruncate(self.slot(*slot)?, size)),
            Target::Path(name) | Target::Link(name) => {
                let path = self.path(name)?;
                // SAFETY: the path is a string with a NUL at its end, which outlives the call.
                let result = unsafe { libc::truncate(path.as_ptr(), size.cast_signed()) };
                if result == 0 {
                    return Ok(Answer::Done);
                }
                let error = std::io::Error::last_os_error();
                Err(Errno::from_io_error(&error).unwrap())
            }
        }
    }

    fn hardlink(&self, target: &Target, to: &Name) -> Result<Answer> {
        let base = self.base(to)?;
        done(match target {
            Target::Path(name) | Target::Link(name) => rustix::fs::linkat(
                self.base(name)?,
                os(&name.path),
                base,
                os(&to.path),
                match target {
                    Target::Path(_) => AtFlags::SYMLINK_FOLLOW,
                    _ => AtFlags::empty(),
                },
            ),
            Target::Open(slot) => {
                let path = format!("/proc/self/fd/{}", self.slot(*slot)?.as_raw_fd());
                rustix::fs::linkat(
                    rustix::fs::CWD,
                    path,
                    base,
                    os(&to.path),
                    AtFlags::SYMLINK_FOLLOW,
                )
            }
        })
    }

    fn set_times(&self, target: &Target, accessed: Time, modified: Time) -> Result<Answer> {
        let times = Timestamps {
            last_access: timespec(accessed),
            last_modification: timespec(modified),
        };
        match target {
            Target::Open(slot) => rustix::fs::futimens(self.slot(*slot)?, &times),
            Target::Path(name) | Target::Link(name) => {
                rustix::fs::utimensat(self.base(name)?, os(&name.path), &times, nofollow(target))
            }
        }?;
        let Ok(stat) = self.stat(target) else {
            return Ok(Answer::Done);
        };
        let definite = |time, shown| matches!(time, Time::At(..)).then_some(shown);
        Ok(Answer::Times(
            definite(accessed, (stat.st_atime, stat.st_atime_nsec.cast_signed())),
            definite(modified, (stat.st_mtime, stat.st_mtime_nsec.cast_signed())),
        ))
    }
}

fn done(result: Result<()>) -> Result<Answer> {
    result.map(|()| Answer::Done)
}

fn number(result: Result<usize>) -> Result<Answer> {
    result.map(|number| Answer::Number(number as u64))
}

fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

fn nofollow(target: &Target) -> AtFlags {
    match target {
        Target::Link(_) => AtFlags::SYMLINK_NOFOLLOW,
        _ => AtFlags::empty(),
    }
}

fn timespec(time: Time) -> Timespec {
    let (tv_sec, tv_nsec) = match time {
        Time::Now => (0, rustix::fs::UTIME_NOW),
        Time::Omit => (0, rustix::fs::UTIME_OMIT),
        Time::At(secs, nanos) => (secs, nanos),
    };
    Timespec { tv_sec, tv_nsec }
}

/// Recognisable content: which write it came from, and where in it.
fn content(length: usize, byte: u8) -> Vec<u8> {
    (0..length)
        .map(|at| byte.wrapping_add(u8::try_from(at / 512 % 64).unwrap()))
        .collect()
}
