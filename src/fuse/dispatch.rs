//! From a request to the filesystem and back: which operation it is, and how long the
//! kernel may believe what it is told.

use std::sync::Arc;

use rustix::fs::{FallocateFlags, FileType, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::abi::{self, fattr};
use super::convert::{Ids, attr, device, set_time, statx};
use super::reply::{Answer, FOR_EVER, Listing, Name};
use super::request::{Operation, Request};
use crate::fs::{Caller, Changes, Filesystem, Found};
use crate::tree::Ino;

/// What a listing reads from lower at a time.
const LISTING: usize = 16 << 10;

/// What INIT agreed on, as far as requests look different by it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Agreed {
    /// SETXATTR has its long form.
    pub(super) setxattr_ext: bool,
    /// The kernel tells with each write and truncation whether setuid and setgid go.
    pub(super) killpriv: bool,
}

/// Serves requests, whatever way they come.
#[derive(Debug)]
pub(super) struct Dispatch {
    pub(super) filesystem: Arc<Filesystem>,
    pub(super) ids: Ids,
    pub(super) agreed: Agreed,
}

/// Where the parts of a request are. Its payload is at the beginning of the buffer,
/// which takes the answer's content afterwards.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming<'a> {
    pub(super) header: &'a abi::InHeader,
    pub(super) head: &'a [u8],
    /// Bytes of the buffer that belong to the request.
    pub(super) payload: usize,
}

impl Dispatch {
    /// Serves one request.
    pub(super) fn serve(&self, incoming: &Incoming<'_>, buffer: &mut [u8]) -> Answer {
        let request = Request {
            header: incoming.header,
            head: incoming.head,
            payload: buffer.get(..incoming.payload).unwrap_or_default(),
        };
        match Operation::decode(&request, self.agreed.setxattr_ext) {
            Ok(operation) => {
                let header = incoming.header;
                let asked = Asked {
                    to: self,
                    caller: Caller {
                        uid: header.uid,
                        gid: header.gid,
                        pid: header.pid,
                    },
                    ino: self.ids.ino(header.nodeid),
                };
                match operation {
                    // These need the buffer, of which their request has nothing.
                    Operation::Read { offset, size } => asked.read(offset, size, buffer),
                    Operation::Readdir { offset, size, plus } => {
                        asked.readdir(offset, size, plus, buffer)
                    }
                    Operation::Readlink => match self.filesystem.readlink(asked.ino) {
                        Ok(target) => Answer::content(&target, buffer),
                        Err(error) => Answer::Failed(error),
                    },
                    // The name has been used when the buffer is filled.
                    Operation::Getxattr { name, size } => {
                        match self.filesystem.getxattr(asked.ino, name) {
                            Ok(value) => Answer::value(&value, size, buffer),
                            Err(error) => Answer::Failed(error),
                        }
                    }
                    Operation::Listxattr { size } => {
                        match self.filesystem.listxattr(&asked.caller, asked.ino) {
                            Ok(names) => Answer::value(&names, size, buffer),
                            Err(error) => Answer::Failed(error),
                        }
                    }
                    other => asked.serve(other).unwrap_or_else(Answer::Failed),
                }
            }
            Err(malformed) => {
                tracing::warn!("{malformed}");
                Answer::Failed(Errno::IO)
            }
        }
    }

    fn entry(&self, found: &Found) -> abi::EntryOut {
        abi::EntryOut {
            nodeid: self.ids.id(found.attributes.ino),
            // Node ids are lower's inode numbers, and a number in the node table cannot
            // be taken over: the table keeps the inode.
            generation: 0,
            entry_valid: if found.cacheable { FOR_EVER } else { 0 },
            attr_valid: FOR_EVER,
            attr: attr(&found.attributes),
            ..abi::EntryOut::default()
        }
    }
}

/// One request, decoded.
struct Asked<'a> {
    to: &'a Dispatch,
    caller: Caller,
    ino: Ino,
}

type Served = Result<Answer, Errno>;

impl Asked<'_> {
    #[allow(clippy::too_many_lines)] // one arm per operation
    fn serve(&self, operation: Operation<'_>) -> Served {
        let (fs, caller, ino) = (&self.to.filesystem, &self.caller, self.ino);
        match operation {
            Operation::Lookup { name } => return self.lookup(name),
            Operation::Forget { lookups } => {
                fs.forget(ino, lookups);
                return Ok(Answer::Silence);
            }
            Operation::BatchForget(forgets) => {
                for (node, lookups) in forgets {
                    fs.forget(self.to.ids.ino(node), lookups);
                }
                return Ok(Answer::Silence);
            }
            Operation::Getattr => {
                let attributes = fs.getattr(ino)?;
                return Ok(Answer::attributes(attr(&attributes)));
            }
            Operation::Statx => {
                let (attributes, birth) = fs.getattr_with_birth(ino)?;
                return Ok(Answer::of(&abi::StatxOut {
                    attr_valid: FOR_EVER,
                    stat: statx(&attributes, birth),
                    ..abi::StatxOut::default()
                }));
            }
            Operation::Setattr(wanted) => {
                let attributes = fs.setattr(caller, ino, &self.changes(&wanted))?;
                return Ok(Answer::attributes(attr(&attributes)));
            }
            Operation::Symlink { name, target } => {
                return self.made(fs.symlink(caller, ino, name, target));
            }
            Operation::Mknod {
                name,
                mode,
                umask,
                rdev,
            } => {
                let file_type = FileType::from_raw_mode(mode);
                let device = device(rdev);
                return self.made(fs.mknod(
                    caller,
                    ino,
                    name,
                    file_type,
                    mode & 0o7777,
                    umask,
                    device,
                ));
            }
            Operation::Mkdir { name, mode, umask } => {
                return self.made(fs.mkdir(caller, ino, name, mode & 0o7777, umask));
            }
            Operation::Link { node, new_name } => {
                return self.made(fs.link(self.to.ids.ino(node), ino, new_name));
            }
            Operation::Create {
                name,
                mode,
                umask,
                exclusive,
            } => {
                let found = fs.create(caller, ino, name, mode & 0o7777, umask, exclusive)?;
                return Ok(self.opened(&found));
            }
            Operation::Tmpfile {
                mode,
                umask,
                exclusive,
            } => {
                let found = fs.make_nameless(caller, ino, mode & 0o7777, umask, exclusive)?;
                return Ok(self.opened(&found));
            }
            Operation::Write {
                offset,
                content,
                kill_suidgid,
            } => {
                let unprivileged = kill_suidgid.then_some(caller);
                let written = fs.write(ino, offset, content, unprivileged)?;
                return Ok(Answer::written(written));
            }
            Operation::CopyFileRange {
                source_offset,
                target,
                target_offset,
                len,
                wide,
            } => {
                let target = self.to.ids.ino(target);
                let copied =
                    fs.copy_file_range(caller, ino, source_offset, target, target_offset, len)?;
                return Ok(if wide {
                    Answer::of(&abi::CopyFileRangeOut {
                        bytes_copied: copied as u64,
                    })
                } else {
                    Answer::written(copied)
                });
            }
            Operation::Lseek { offset, whence } => {
                let to = match i32::try_from(whence) {
                    Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
                    Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
                    _ => return Err(Errno::INVAL),
                };
                // The kernel sends on what does not fit a signed offset.
                i64::try_from(offset).map_err(|_| Errno::INVAL)?;
                let offset = fs.seek(ino, to)?;
                return Ok(Answer::of(&abi::LseekOut { offset }));
            }
            Operation::Statfs => return Ok(Answer::statfs(&fs.statfs()?)),
            Operation::Unlink { name } => fs.unlink(caller, ino, name)?,
            Operation::Rmdir { name } => fs.rmdir(caller, ino, name)?,
            Operation::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => {
                let new_parent = self.to.ids.ino(new_parent);
                let flags = RenameFlags::from_bits_retain(flags);
                fs.rename(caller, ino, name, new_parent, new_name, flags)?;
            }
            Operation::Fsync { content_only } => fs.fsync(ino, content_only)?,
            Operation::Setxattr {
                name,
                value,
                flags,
                kill_sgid,
            } => {
                let flags = XattrFlags::from_bits_retain(flags);
                fs.setxattr(caller, ino, name, value, flags, kill_sgid)?;
            }
            Operation::Removexattr { name } => fs.removexattr(caller, ino, name)?,
            Operation::Fallocate { offset, len, mode } => {
                let mode = FallocateFlags::from_bits_retain(mode);
                fs.fallocate(caller, ino, offset, len, mode)?;
            }
            Operation::Release | Operation::Destroy => {}
            // OPEN, OPENDIR and FLUSH are among them. They are never asked again: from
            // here on opening, reading and closing what the kernel knows costs no
            // request, and it caches listings of its own accord.
            Operation::Unknown
            | Operation::Read { .. }
            | Operation::Readdir { .. }
            | Operation::Readlink
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. } => return Ok(Answer::NOT_IMPLEMENTED),
        }
        Ok(Answer::DONE)
    }

    fn lookup(&self, name: &[u8]) -> Served {
        let fs = &self.to.filesystem;
        match fs.lookup(&self.caller, self.ino, name) {
            // Node id 0 with a time: the absence is remembered.
            Err(Errno::NOENT) if fs.absence_is_cacheable(self.ino, name) => {
                Ok(Answer::of(&abi::EntryOut {
                    entry_valid: FOR_EVER,
                    ..abi::EntryOut::default()
                }))
            }
            found => self.made(found),
        }
    }

    fn made(&self, found: Result<Found, Errno>) -> Served {
        Ok(Answer::of(&self.to.entry(&found?)))
    }

    /// A file that was made, and is open.
    fn opened(&self, found: &Found) -> Answer {
        let open = abi::OpenOut {
            open_flags: abi::FOPEN_KEEP_CACHE,
            ..abi::OpenOut::default()
        };
        Answer::of_two(&self.to.entry(found), &open)
    }

    fn changes(&self, wanted: &abi::SetattrIn) -> Changes {
        let time = |field, now, secs: u64, nanos| {
            (wanted.valid & field != 0).then(|| set_time(wanted.valid & now != 0, secs, nanos))
        };
        Changes {
            mode: wanted.mode(),
            uid: wanted.uid(),
            gid: wanted.gid(),
            size: wanted.size(),
            atime: time(
                fattr::ATIME,
                fattr::ATIME_NOW,
                wanted.atime,
                wanted.atimensec,
            ),
            mtime: time(
                fattr::MTIME,
                fattr::MTIME_NOW,
                wanted.mtime,
                wanted.mtimensec,
            ),
            kill_suidgid: self
                .to
                .agreed
                .killpriv
                .then_some(wanted.valid & fattr::KILL_SUIDGID != 0),
        }
    }

    fn read(&self, offset: u64, size: usize, buffer: &mut [u8]) -> Answer {
        let size = size.min(buffer.len());
        let Some(buffer) = buffer.get_mut(..size) else {
            return Answer::Failed(Errno::IO);
        };
        match self.to.filesystem.read(self.ino, offset, buffer) {
            Ok(read) => Answer::Filled(read),
            Err(error) => Answer::Failed(error),
        }
    }

    fn readdir(&self, offset: u64, size: usize, plus: bool, buffer: &mut [u8]) -> Answer {
        let fs = &self.to.filesystem;
        let mut listing = Listing::new(buffer, size);
        let listed = if plus {
            fs.readdirplus(self.ino, offset, LISTING, |plus| {
                // Without a node id the kernel lists the name only, and looks it up when
                // somebody wants to know more.
                let entry = plus
                    .attributes
                    .map_or_else(abi::EntryOut::default, |found| {
                        self.to.entry(&Found {
                            attributes: found,
                            cacheable: true,
                        })
                    });
                listing.add(Some(&entry), name(&plus.listed))
            })
        } else {
            fs.readdir(self.ino, offset, LISTING, |listed| {
                listing.add(None, name(&listed))
            })
        };
        match listed {
            Ok(()) => Answer::Filled(listing.filled()),
            Err(error) => Answer::Failed(error),
        }
    }
}

fn name<'a>(listed: &crate::fs::Listed<'a>) -> Name<'a> {
    Name {
        ino: listed.ino.0,
        next: listed.next,
        file_type: listed.file_type,
        name: listed.name,
    }
}
