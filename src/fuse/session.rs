//! A connection with the kernel, from INIT to its end, and the threads that serve it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::abi::{self, InHeader, InitIn, InitOut, init, opcode};
use super::convert::Ids;
use super::device::{self, Device, MAX_CONTENT, Received};
use super::dispatch::{Agreed, Dispatch};
use super::reply::Answer;
use super::ring::{self, Ring};
use super::seats::Seats;
use super::slow::Slow;
use crate::fs::Filesystem;

/// Requests that nobody waits for (reading ahead, above all) and that may be under way
/// at a time.
const MAX_BACKGROUND: u16 = 64;

/// How requests reach the daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Channel {
    /// Over io_uring, each on the processor of its caller.
    IoUring,
    /// Through `/dev/fuse`.
    Device(NoRing),
}

/// Why requests do not come over io_uring.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoRing {
    /// It was not to be tried.
    NotWanted,
    /// The kernel's FUSE does not know it (Linux 6.14 and later do).
    NotKnown,
    /// The parameter of the kernel's module is off.
    SwitchedOff,
    /// The system did not let us have it.
    Refused(String),
}

/// Whether the kernel's module speaks FUSE over io_uring: `Y` or `N`.
const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// A connection whose INIT has been answered.
pub(super) struct Session {
    device: Arc<Device>,
    agreed: Agreed,
    rings: Result<Vec<Ring>, NoRing>,
    slow: Slow,
}

/// The threads that serve a connection.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) threads: Vec<JoinHandle<Result<(), Errno>>>,
    pub(super) channel: Channel,
}

impl Session {
    /// Takes a descriptor that was just mounted and answers the kernel's first request.
    /// `ring` is whether io_uring shall be used where that is possible.
    pub(super) fn establish(fuse: OwnedFd, ring: bool, seats: &Seats) -> io::Result<Self> {
        let device = Device::from(fuse);
        let slow = Slow::start()?;
        let mut buffer = device::buffer();
        loop {
            let Some(Received { header, len }) = device.receive(&mut buffer)? else {
                return Err(io::Error::other("it was unmounted again at once"));
            };
            let body = buffer.get(size_of::<InHeader>()..len).unwrap_or_default();
            let offered = Offer::read(header.opcode, body)?;
            if offered.major > abi::MAJOR {
                // The kernel asks again with a version that both know.
                let ours = InitOut {
                    major: abi::MAJOR,
                    minor: abi::MINOR,
                    ..InitOut::default()
                };
                device.answer(header.unique, &Answer::of(&ours), &[]);
                continue;
            }
            if (offered.major, offered.minor) < (abi::MAJOR, abi::LEAST_MINOR) {
                device.answer(header.unique, &Answer::Failed(Errno::PROTO), &[]);
                return Err(io::Error::other(format!(
                    "this kernel speaks version {}.{} of the protocol, and 7.{} is the least",
                    offered.major,
                    offered.minor,
                    abi::LEAST_MINOR
                )));
            }
            let mut flags = offered.flags & WANTED;
            // Before the answer: what it promises has to be there.
            let rings = match (ring, offered.flags & init::OVER_IO_URING) {
                (false, _) => Err(NoRing::NotWanted),
                (true, 0) => Err(not_offered()),
                (true, _) => ring::prepare(&device, seats, &slow)
                    .map_err(|error| NoRing::Refused(error.to_string())),
            };
            if rings.is_ok() {
                flags |= init::OVER_IO_URING;
            }
            device.answer(header.unique, &Answer::of(&offered.answer(flags)), &[]);
            return Ok(Self {
                device: Arc::new(device),
                agreed: Agreed {
                    setxattr_ext: flags & init::SETXATTR_EXT != 0,
                    killpriv: flags & init::HANDLE_KILLPRIV_V2 != 0,
                },
                rings,
                slow,
            });
        }
    }

    /// What notifications go through.
    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Serves the filesystem on threads of its own.
    pub(super) fn serve(
        self,
        filesystem: Arc<Filesystem>,
        ids: Ids,
        seats: &Seats,
    ) -> io::Result<Serving> {
        let dispatch = Arc::new(Dispatch {
            filesystem,
            ids,
            agreed: self.agreed,
        });
        let mut threads = Vec::new();
        let channel = match self.rings {
            Err(why) => Channel::Device(why),
            Ok(rings) => match serve_rings(rings, &dispatch, &mut threads)? {
                Ok(()) => Channel::IoUring,
                Err(error) => Channel::Device(NoRing::Refused(error.to_string())),
            },
        };
        // With rings only what nobody waits for comes through the device.
        let seats = match channel {
            Channel::IoUring => vec![None],
            Channel::Device(_) => seats.all().map(Some).collect(),
        };
        for (at, seat) in seats.into_iter().enumerate() {
            // A further descriptor needs the device itself, which the user of a set-uid
            // fusermount3 may not be allowed to open.
            let device = match at {
                0 => Arc::clone(&self.device),
                _ => self
                    .device
                    .another()
                    .map_or_else(|_| Arc::clone(&self.device), Arc::new),
            };
            let (dispatch, slow) = (Arc::clone(&dispatch), self.slow.clone());
            let thread = std::thread::Builder::new()
                .name(format!("fuse-{at}"))
                .spawn(move || {
                    if let Some(seat) = seat {
                        seat.take();
                    }
                    device.serve(&dispatch, &slow)
                })?;
            threads.push(thread);
        }
        Ok(Serving { threads, channel })
    }
}

/// Starts a thread for each ring. The inner error is why the kernel did not take one of
/// them: then it uses none.
fn serve_rings(
    rings: Vec<Ring>,
    dispatch: &Arc<Dispatch>,
    threads: &mut Vec<JoinHandle<Result<(), Errno>>>,
) -> io::Result<Result<(), Errno>> {
    let count = rings.len();
    let (taken, answers) = mpsc::sync_channel(count);
    for (at, ring) in rings.into_iter().enumerate() {
        let dispatch = Arc::clone(dispatch);
        let taken = taken.clone();
        let thread = std::thread::Builder::new()
            .name(format!("fuse-ring-{at}"))
            .spawn(move || ring.serve(&dispatch, &taken))?;
        threads.push(thread);
    }
    drop(taken);
    // Each says it once, or ends without a word.
    Ok(answers.iter().take(count).collect())
}

/// How the requests of a mount that is made now would come, as far as the kernel says so
/// beforehand.
pub fn expected_channel() -> Channel {
    match std::fs::read_to_string(PARAMETER).as_deref().map(str::trim) {
        Ok("Y") => Channel::IoUring,
        Ok("N") => Channel::Device(NoRing::SwitchedOff),
        _ => Channel::Device(NoRing::NotKnown),
    }
}

/// Why the kernel has not offered it.
fn not_offered() -> NoRing {
    match expected_channel() {
        Channel::Device(why) => why,
        Channel::IoUring => NoRing::NotKnown,
    }
}

impl std::fmt::Display for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::IoUring => f.write_str("io_uring"),
            Self::Device(why) => {
                write!(f, "{}", device::PATH)?;
                match why {
                    NoRing::NotWanted => Ok(()),
                    NoRing::NotKnown => {
                        f.write_str(" (FUSE over io_uring, which is faster, needs Linux 6.14)")
                    }
                    NoRing::SwitchedOff => write!(
                        f,
                        " (io_uring would be faster: as root `echo Y > {PARAMETER}`, or \
                         `options fuse enable_uring=1` in /etc/modprobe.d, and mount again)"
                    ),
                    NoRing::Refused(error) => {
                        write!(f, " (io_uring would be faster, but: {error})")
                    }
                }
            }
        }
    }
}

/// What is asked for, as far as this kernel has it.
///
/// ATOMIC_O_TRUNC is not: with OPEN never asked, nobody would truncate. Nor is
/// WRITEBACK_CACHE: an acknowledged write would die with the daemon.
const WANTED: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::PARALLEL_DIROPS
    | init::DO_READDIRPLUS
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::NO_OPEN_SUPPORT
    | init::NO_OPENDIR_SUPPORT
    | init::EXPLICIT_INVAL_DATA
    | init::MAX_PAGES
    | init::SETXATTR_EXT
    | init::INIT_EXT
    // Also where an ordinary user mounts: an ACL lets him in, and changes a mode.
    | init::POSIX_ACL
    // Lower applies the caller's umask, or a default ACL in its place.
    | init::DONT_MASK;

/// What the kernel offers.
#[derive(Clone, Copy, Debug)]
struct Offer {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Offer {
    fn read(code: u32, body: &[u8]) -> io::Result<Self> {
        let no_init = || io::Error::other("the kernel did not begin with INIT");
        if code != opcode::INIT {
            return Err(no_init());
        }
        let (offer, rest) = InitIn::read_from_prefix(body).map_err(|_| no_init())?;
        let mut flags = u64::from(offer.flags);
        if flags & init::INIT_EXT != 0
            && let Ok((more, _)) = u32::read_from_prefix(rest)
        {
            flags |= u64::from(more) << 32;
        }
        Ok(Self {
            major: offer.major,
            minor: offer.minor,
            max_readahead: offer.max_readahead,
            flags,
        })
    }

    /// The answer that agrees on these flags.
    fn answer(&self, flags: u64) -> InitOut {
        let [low, high] = [flags, flags >> 32].map(|word| (word & u64::from(u32::MAX)) as u32);
        // Page sizes differ; more than the kernel's limit is cut down by the kernel.
        let pages = MAX_CONTENT / page_size();
        let most = u32::try_from(MAX_CONTENT).unwrap_or(u32::MAX);
        InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR.min(self.minor),
            max_readahead: self.max_readahead.min(most),
            flags: low,
            flags2: high,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: most,
            // Times are kept as finely as lower keeps them.
            time_gran: 1,
            max_pages: u16::try_from(pages).unwrap_or(u16::MAX),
            ..InitOut::default()
        }
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf reads no memory of ours and knows this name everywhere.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size)
        .ok()
        .filter(|size| *size > 0)
        .unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn bytes(flags: u64) -> Vec<u8> {
        let offer = InitIn {
            major: 7,
            minor: 45,
            max_readahead: 131_072,
            flags: (flags & u64::from(u32::MAX)) as u32,
        };
        let high = (flags >> 32) as u32;
        [offer.as_bytes(), &high.to_ne_bytes(), &[0; 44]].concat()
    }

    #[test]
    fn only_what_is_offered_and_wanted_is_agreed_on() {
        let offered = init::INIT_EXT | init::BIG_WRITES | init::OVER_IO_URING | 1 << 3;
        let offer = Offer::read(opcode::INIT, &bytes(offered)).unwrap();
        assert_eq!(offer.flags, offered);
        let flags = offer.flags & WANTED;
        assert_eq!(flags, init::INIT_EXT | init::BIG_WRITES);
        let answer = offer.answer(flags | init::OVER_IO_URING);
        assert_eq!(u64::from(answer.flags2), init::OVER_IO_URING >> 32);
        assert_eq!(answer.max_readahead, 131_072);
    }

    #[test]
    fn an_offer_without_an_end_is_refused() {
        let whole = bytes(0);
        for len in 0..16 {
            assert!(Offer::read(opcode::INIT, &whole[..len]).is_err());
        }
        // Old kernels send nothing after the first word of flags.
        assert!(Offer::read(opcode::INIT, &whole[..16]).is_ok());
        assert!(Offer::read(opcode::LOOKUP, &whole).is_err());
    }
}
