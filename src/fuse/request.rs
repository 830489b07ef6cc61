//! What the kernel asks for, taken out of the bytes of a request. Nothing in here
//! trusts a length: bytes that make no sense are an error, never a panic.

use zerocopy::FromBytes;

use super::abi::{self, InHeader, fattr, opcode};

/// A request that is too short for what it claims to be, or not what it claims.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("request {opcode} of the kernel cannot be read")]
pub(super) struct Malformed {
    pub(super) opcode: u32,
}

/// The three parts of a request. Both channels deliver them apart: over io_uring they
/// are apart in memory, and what is read from the device is cut at `abi::head_len`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub(super) header: &'a InHeader,
    /// At least the structure that belongs to the opcode.
    pub(super) head: &'a [u8],
    /// Names and contents.
    pub(super) payload: &'a [u8],
}

/// One operation, its names and contents still in the request. Names are bytes without
/// the NUL.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation<'a> {
    Lookup {
        name: &'a [u8],
    },
    Forget {
        lookups: u64,
    },
    BatchForget(Forgets<'a>),
    Getattr,
    /// Attributes with the time of birth.
    Statx,
    Setattr(abi::SetattrIn),
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        name: &'a [u8],
        mode: u32,
        umask: u32,
        rdev: u32,
    },
    Mkdir {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_parent: u64,
        new_name: &'a [u8],
        flags: u32,
    },
    /// A further name, in the directory that the request is about.
    Link {
        node: u64,
        new_name: &'a [u8],
    },
    Read {
        offset: u64,
        size: usize,
    },
    Write {
        offset: u64,
        content: &'a [u8],
        /// The caller may not keep setuid and setgid.
        kill_suidgid: bool,
    },
    Statfs,
    /// Nothing is held per open file or directory.
    Release,
    Fsync {
        content_only: bool,
    },
    Setxattr {
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
        /// The caller may not keep setgid; none where the kernel does not tell.
        kill_sgid: Option<bool>,
    },
    Getxattr {
        name: &'a [u8],
        /// What the caller has room for; 0 asks for the size.
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Readdir {
        offset: u64,
        size: usize,
        /// With attributes.
        plus: bool,
    },
    Create {
        name: &'a [u8],
        mode: u32,
        umask: u32,
        exclusive: bool,
    },
    /// A file without a name, in the filesystem of the directory that the request is about.
    Tmpfile {
        mode: u32,
        umask: u32,
        /// It is never to get a name.
        exclusive: bool,
    },
    Fallocate {
        offset: u64,
        len: u64,
        mode: u32,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    CopyFileRange {
        source_offset: u64,
        target: u64,
        target_offset: u64,
        len: u64,
        /// The answer has 64 bits.
        wide: bool,
    },
    Destroy,
    /// OPEN, OPENDIR and FLUSH among them: not implemented on purpose.
    Unknown,
}

impl<'a> Operation<'a> {
    /// Takes a request apart. `extended` is whether SETXATTR_EXT was agreed on.
    #[allow(clippy::too_many_lines)] // one arm per request
    pub(super) fn decode(request: &Request<'a>, extended: bool) -> Result<Self, Malformed> {
        let code = request.header.opcode;
        let malformed = Malformed { opcode: code };
        let mut body = Body {
            rest: request.payload,
            malformed,
        };
        let head = Head {
            bytes: request.head,
            malformed,
        };
        Ok(match code {
            opcode::LOOKUP => Self::Lookup { name: body.name()? },
            opcode::FORGET => Self::Forget {
                lookups: head.read::<abi::ForgetIn>()?.nlookup,
            },
            opcode::BATCH_FORGET => {
                let count = head.read::<abi::BatchForgetIn>()?.count;
                Self::BatchForget(Forgets {
                    bytes: body.rest,
                    left: count,
                })
            }
            opcode::GETATTR => Self::Getattr,
            opcode::STATX => Self::Statx,
            opcode::SETATTR => Self::Setattr(head.read()?),
            opcode::READLINK => Self::Readlink,
            opcode::SYMLINK => Self::Symlink {
                name: body.name()?,
                target: body.name()?,
            },
            opcode::MKNOD => {
                let abi::MknodIn {
                    mode, rdev, umask, ..
                } = head.read()?;
                Self::Mknod {
                    name: body.name()?,
                    mode,
                    umask,
                    rdev,
                }
            }
            opcode::MKDIR => {
                let abi::MkdirIn { mode, umask } = head.read()?;
                Self::Mkdir {
                    name: body.name()?,
                    mode,
                    umask,
                }
            }
            opcode::UNLINK => Self::Unlink { name: body.name()? },
            opcode::RMDIR => Self::Rmdir { name: body.name()? },
            opcode::RENAME => Self::Rename {
                new_parent: head.read::<abi::RenameIn>()?.newdir,
                flags: 0,
                name: body.name()?,
                new_name: body.name()?,
            },
            opcode::RENAME2 => {
                let abi::Rename2In { newdir, flags, .. } = head.read()?;
                Self::Rename {
                    new_parent: newdir,
                    flags,
                    name: body.name()?,
                    new_name: body.name()?,
                }
            }
            opcode::LINK => Self::Link {
                node: head.read::<abi::LinkIn>()?.oldnodeid,
                new_name: body.name()?,
            },
            opcode::READ => {
                let abi::ReadIn { offset, size, .. } = head.read()?;
                Self::Read {
                    offset,
                    size: size as usize,
                }
            }
            opcode::READDIR | opcode::READDIRPLUS => {
                let abi::ReadIn { offset, size, .. } = head.read()?;
                Self::Readdir {
                    offset,
                    size: size as usize,
                    plus: code == opcode::READDIRPLUS,
                }
            }
            opcode::WRITE => {
                let abi::WriteIn {
                    offset,
                    size,
                    write_flags,
                    ..
                } = head.read()?;
                Self::Write {
                    offset,
                    content: body.take(size)?,
                    kill_suidgid: write_flags & abi::WRITE_KILL_SUIDGID != 0,
                }
            }
            opcode::STATFS => Self::Statfs,
            opcode::RELEASE | opcode::RELEASEDIR => Self::Release,
            opcode::FSYNC | opcode::FSYNCDIR => Self::Fsync {
                content_only: head.read::<abi::FsyncIn>()?.fsync_flags & abi::FSYNC_FDATASYNC != 0,
            },
            opcode::SETXATTR => {
                let abi::SetxattrShortIn { size, flags } = head.read()?;
                let kill_sgid = if extended {
                    let abi::SetxattrIn { setxattr_flags, .. } = head.read()?;
                    Some(setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0)
                } else {
                    None
                };
                Self::Setxattr {
                    name: body.name()?,
                    value: body.take(size)?,
                    flags,
                    kill_sgid,
                }
            }
            opcode::GETXATTR => Self::Getxattr {
                size: head.read::<abi::GetxattrIn>()?.size,
                name: body.name()?,
            },
            opcode::LISTXATTR => Self::Listxattr {
                size: head.read::<abi::GetxattrIn>()?.size,
            },
            opcode::REMOVEXATTR => Self::Removexattr { name: body.name()? },
            opcode::CREATE => {
                let abi::CreateIn {
                    flags, mode, umask, ..
                } = head.read()?;
                Self::Create {
                    name: body.name()?,
                    mode,
                    umask,
                    exclusive: flags & libc::O_EXCL.cast_unsigned() != 0,
                }
            }
            // The name that comes with it stands for none.
            opcode::TMPFILE => {
                let abi::CreateIn {
                    flags, mode, umask, ..
                } = head.read()?;
                Self::Tmpfile {
                    mode,
                    umask,
                    exclusive: flags & libc::O_EXCL.cast_unsigned() != 0,
                }
            }
            opcode::DESTROY => Self::Destroy,
            opcode::FALLOCATE => {
                let abi::FallocateIn {
                    offset,
                    length,
                    mode,
                    ..
                } = head.read()?;
                Self::Fallocate {
                    offset,
                    len: length,
                    mode,
                }
            }
            opcode::LSEEK => {
                let abi::LseekIn { offset, whence, .. } = head.read()?;
                Self::Lseek { offset, whence }
            }
            opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => {
                let copy: abi::CopyFileRangeIn = head.read()?;
                Self::CopyFileRange {
                    source_offset: copy.off_in,
                    target: copy.nodeid_out,
                    target_offset: copy.off_out,
                    len: copy.len,
                    wide: code == opcode::COPY_FILE_RANGE_64,
                }
            }
            _ => Self::Unknown,
        })
    }
}

/// The nodes of a BATCH_FORGET: id, and how many references go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forgets<'a> {
    bytes: &'a [u8],
    left: u32,
}

impl Iterator for Forgets<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let (one, rest) = abi::ForgetOne::read_from_prefix(self.bytes).ok()?;
        self.bytes = rest;
        Some((one.nodeid, one.nlookup))
    }
}

/// What a SETATTR sets, field by field.
impl abi::SetattrIn {
    fn given<T>(&self, field: u32, value: T) -> Option<T> {
        (self.valid & field != 0).then_some(value)
    }

    pub(super) fn mode(&self) -> Option<u32> {
        self.given(fattr::MODE, self.mode)
    }

    pub(super) fn uid(&self) -> Option<u32> {
        self.given(fattr::UID, self.uid)
    }

    pub(super) fn gid(&self) -> Option<u32> {
        self.given(fattr::GID, self.gid)
    }

    pub(super) fn size(&self) -> Option<u64> {
        self.given(fattr::SIZE, self.size)
    }
}

#[derive(Clone, Copy)]
struct Head<'a> {
    bytes: &'a [u8],
    malformed: Malformed,
}

impl Head<'_> {
    fn read<T: FromBytes>(self) -> Result<T, Malformed> {
        match T::read_from_prefix(self.bytes) {
            Ok((read, _)) => Ok(read),
            Err(_) => Err(self.malformed),
        }
    }
}

struct Body<'a> {
    rest: &'a [u8],
    malformed: Malformed,
}

impl<'a> Body<'a> {
    fn name(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.rest.iter().position(|byte| *byte == 0);
        let (name, rest) = end
            .and_then(|end| self.rest.split_at_checked(end))
            .ok_or(self.malformed)?;
        self.rest = rest.get(1..).unwrap_or_default();
        Ok(name)
    }

    fn take(&mut self, len: u32) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len as usize)
            .ok_or(self.malformed)?;
        self.rest = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn decode<'a>(header: &'a InHeader, bytes: &'a [u8]) -> Result<Operation<'a>, Malformed> {
        let at = abi::head_len(header.opcode, true).min(bytes.len());
        let (head, payload) = bytes.split_at(at);
        let request = Request {
            header,
            head,
            payload,
        };
        Operation::decode(&request, true)
    }

    fn header(opcode: u32) -> InHeader {
        InHeader {
            opcode,
            ..InHeader::default()
        }
    }

    #[test]
    fn a_rename_is_two_names_and_a_directory() {
        let head = abi::Rename2In {
            newdir: 77,
            flags: 1,
            padding: 0,
        };
        let bytes = [head.as_bytes(), b"old\0new\0"].concat();
        let header = header(opcode::RENAME2);
        let Ok(Operation::Rename {
            name,
            new_parent,
            new_name,
            flags,
        }) = decode(&header, &bytes)
        else {
            panic!("not a rename");
        };
        assert_eq!((name, new_name), (&b"old"[..], &b"new"[..]));
        assert_eq!((new_parent, flags), (77, 1));
    }

    #[test]
    fn a_write_has_exactly_the_content_it_says() {
        let head = abi::WriteIn {
            offset: 5,
            size: 3,
            write_flags: abi::WRITE_KILL_SUIDGID,
            ..abi::WriteIn::default()
        };
        let bytes = [head.as_bytes(), b"abcd"].concat();
        let header = header(opcode::WRITE);
        let Ok(Operation::Write {
            offset: 5,
            content: b"abc",
            kill_suidgid: true,
        }) = decode(&header, &bytes)
        else {
            panic!("not the write");
        };
        let short = &bytes[..bytes.len() - 2];
        let malformed = Malformed {
            opcode: opcode::WRITE,
        };
        assert_eq!(decode(&header, short).err(), Some(malformed));
    }

    #[test]
    fn forgets_end_with_the_bytes_or_with_the_count() {
        let one = |nodeid| abi::ForgetOne { nodeid, nlookup: 1 };
        for (count, expected) in [(1, vec![(8, 1)]), (9, vec![(8, 1), (9, 1)])] {
            let head = abi::BatchForgetIn { count, dummy: 0 };
            let bytes = [head.as_bytes(), one(8).as_bytes(), one(9).as_bytes(), b"x"].concat();
            let header = header(opcode::BATCH_FORGET);
            let Ok(Operation::BatchForget(forgets)) = decode(&header, &bytes) else {
                panic!("not a forget");
            };
            assert_eq!(forgets.collect::<Vec<_>>(), expected);
        }
    }

    proptest! {
        /// Whatever comes is decoded or refused.
        #[test]
        fn any_bytes_are_decoded_or_refused(
            opcode in prop_oneof![0..60_u32, any::<u32>()],
            bytes in prop::collection::vec(any::<u8>(), 0..256),
            extended in any::<bool>(),
            apart in any::<bool>(),
        ) {
            let header = header(opcode);
            // As the device and as the ring deliver it.
            let at = if apart { 128 } else { abi::head_len(opcode, extended) };
            let (head, payload) = bytes.split_at(at.min(bytes.len()));
            let request = Request { header: &header, head, payload };
            if let Ok(Operation::BatchForget(forgets)) = Operation::decode(&request, extended) {
                prop_assert!(forgets.count() <= bytes.len());
            }
        }

        /// A request that was cut short anywhere in its names is refused.
        #[test]
        fn a_request_without_its_end_is_refused(cut in 1..12_usize) {
            let head = abi::Rename2In::default();
            let bytes = [head.as_bytes(), b"first\0later\0"].concat();
            let header = header(opcode::RENAME2);
            prop_assert!(decode(&header, &bytes).is_ok());
            prop_assert!(decode(&header, &bytes[..bytes.len() - cut]).is_err());
        }
    }
}
