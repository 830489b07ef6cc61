//! The device: requests are read from `/dev/fuse`, and answers written to it.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, opcode};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InHeader, OutHeader};
use super::dispatch::{Dispatch, Incoming};
use super::reply::Answer;
use super::slow::Slow;

/// Where it is.
pub(super) const PATH: &str = "/dev/fuse";
/// Largest content of one request, of a write as of a read.
pub(super) const MAX_CONTENT: usize = 1 << 20;
/// Room for what stands before the content: the kernel asks for 80 bytes and a page.
const ROOM: usize = 8 << 10;
/// A descriptor of the device takes part in the connection of another one.
const CLONE: Opcode = opcode::read::<u32>(229, 0);

/// One descriptor of a FUSE connection.
#[derive(Debug)]
pub(super) struct Device {
    fd: OwnedFd,
}

/// A request as it was read.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) header: InHeader,
    /// Bytes that were read, the header among them.
    pub(super) len: usize,
}

impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the device anew, part of no connection yet.
pub(super) fn open() -> Result<OwnedFd, Errno> {
    rustix::fs::open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// A buffer for [`Device::receive`].
pub(super) fn buffer() -> Vec<u8> {
    vec![0; MAX_CONTENT + ROOM]
}

impl Device {
    /// A further descriptor for the same connection. Each has a queue of its own for what
    /// is under way, so that threads do not share a lock.
    pub(super) fn another(&self) -> Result<Self, Errno> {
        let fd = open()?;
        let ours: RawFd = self.fd.as_raw_fd();
        // SAFETY: FUSE_DEV_IOC_CLONE reads one 32-bit descriptor number through the
        // pointer that it is given, and the setter points it to one.
        let clone = unsafe { Setter::<CLONE, u32>::new(ours.cast_unsigned()) };
        // SAFETY: the ioctl neither keeps the pointer nor touches other memory, and on a
        // descriptor that is not the device it only fails.
        unsafe { rustix::ioctl::ioctl(&fd, clone) }?;
        Ok(Self { fd })
    }

    /// Waits for the next request. None once the connection is over.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, Errno> {
        loop {
            let len = match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => len,
                // ENOENT: the request was interrupted while it was handed over.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(Errno::NODEV) => return Ok(None),
                Err(error) => return Err(error),
            };
            let read = buffer.get(..len).unwrap_or_default();
            match InHeader::read_from_prefix(read) {
                Ok((header, _)) => return Ok(Some(Received { header, len })),
                Err(_) => tracing::warn!(len, "the kernel sent less than a request"),
            }
        }
    }

    /// Answers a request.
    pub(super) fn answer(&self, unique: u64, answer: &Answer, buffer: &[u8]) {
        let (error, body) = match answer {
            Answer::Silence => return,
            Answer::Failed(error) => (-error.raw_os_error(), &[][..]),
            Answer::Small(small) => (0, small.bytes()),
            Answer::Filled(len) => (0, buffer.get(..*len).unwrap_or_default()),
        };
        match self.send(unique, error, body) {
            // ENOENT: nobody waits for it any more. ENODEV: the mount is over.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::warn!(unique, %error, "the kernel did not take an answer"),
        }
    }

    /// Tells the kernel that what it knows of a node's attributes is wrong. Pages and
    /// entries it keeps, and it waits for nothing: a handler may tell it.
    pub(super) fn attributes_changed(&self, id: u64) -> Result<(), Errno> {
        let stale = abi::NotifyInvalInodeOut {
            ino: id,
            // A negative offset means attributes only.
            off: -1,
            len: 0,
        };
        self.send(0, abi::NOTIFY_INVAL_INODE, stale.as_bytes())
    }

    fn send(&self, unique: u64, error: i32, body: &[u8]) -> Result<(), Errno> {
        let len = size_of::<OutHeader>() + body.len();
        let header = OutHeader {
            len: u32::try_from(len).map_err(|_| Errno::INVAL)?,
            error,
            unique,
        };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body)];
        loop {
            match rustix::io::writev(&self.fd, &parts) {
                Err(Errno::INTR) => {}
                other => return other.map(drop),
            }
        }
    }

    /// Serves requests until the connection is over.
    pub(super) fn serve(
        self: &Arc<Self>,
        dispatch: &Arc<Dispatch>,
        slow: &Slow,
    ) -> Result<(), Errno> {
        let mut buffer = buffer();
        let mut head = [0; abi::RING_HEAD];
        while let Some(Received { header, len }) = self.receive(&mut buffer)? {
            // The head is copied out of the way: the buffer takes the answer.
            let head_len = abi::head_len(header.opcode, dispatch.agreed.setxattr_ext);
            let at = (size_of::<InHeader>() + head_len).min(len);
            let given = buffer.get(size_of::<InHeader>()..at).unwrap_or_default();
            let head = head.get_mut(..given.len()).unwrap_or_default();
            head.copy_from_slice(given);
            if Slow::takes(header.opcode) {
                let (device, dispatch) = (Arc::clone(self), Arc::clone(dispatch));
                let head = head.to_vec();
                slow.put(move || {
                    let incoming = Incoming {
                        header: &header,
                        head: &head,
                        payload: 0,
                    };
                    let answer = dispatch.serve(&incoming, &mut []);
                    device.answer(header.unique, &answer, &[]);
                });
                continue;
            }
            let incoming = Incoming {
                header: &header,
                head,
                payload: len - at,
            };
            let space = buffer.get_mut(at..).unwrap_or_default();
            let answer = dispatch.serve(&incoming, space);
            self.answer(header.unique, &answer, space);
        }
        Ok(())
    }
}
