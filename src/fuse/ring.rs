//! FUSE over io_uring: the kernel puts a request into memory that it was given, and the
//! answer takes the same way back, together with the wish for the next request.
//!
//! The kernel has a queue per processor and puts each request into that of its caller. A
//! thread that stays on that processor serves it, so that nobody has to wake another
//! processor: in a virtual machine that is most of what a request costs. FORGET,
//! notifications and interruptions still go through the device.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use crossbeam_channel::{Receiver, Sender, unbounded};
use io_uring::squeue::Entry128;
use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, cqueue, opcode};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::abi::{self, InHeader, OutHeader, RingCommand, RingHeader};
use super::device::{Device, MAX_CONTENT};
use super::dispatch::{Dispatch, Incoming};
use super::reply::Answer;
use super::seats::{Seat, Seats};
use super::slow::Slow;

/// Requests of one queue that can be handed over at a time; further ones wait in the
/// kernel. Memory for their content is taken when it is first needed.
const DEPTH: usize = 8;

/// An io_uring and the queues that one thread serves with it.
pub(super) struct Ring {
    // Closed before the memory goes that the kernel was given.
    uring: IoUring<Entry128, cqueue::Entry>,
    /// A slot is away while one of the threads for long work has it.
    slots: Vec<Option<Slot>>,
    slow: Slow,
    away: Away,
    /// What was completed while the slots were being given to the kernel.
    early: VecDeque<cqueue::Entry>,
    seat: Seat,
}

/// Makes a ring for each seat, which together serve the queues of all processors that
/// the machine can have: the kernel waits until every one of them is served.
pub(super) fn prepare(device: &Device, seats: &Seats, slow: &Slow) -> io::Result<Vec<Ring>> {
    let possible = possible_processors()?;
    let seats: Vec<Seat> = seats.all().collect();
    let mut queues = vec![Vec::new(); seats.len()];
    for queue in 0..possible {
        let own = seats.iter().position(|seat| seat.is_on(queue.into()));
        let at = own.unwrap_or(usize::from(queue) % seats.len());
        if let Some(of_seat) = queues.get_mut(at) {
            of_seat.extend([queue; DEPTH]);
        }
    }
    seats
        .into_iter()
        .zip(queues)
        .filter(|(_, queues)| !queues.is_empty())
        .map(|(seat, queues)| Ring::new(device, seat, &queues, slow.clone()))
        .collect()
}

/// One more than the highest processor number that may ever be in use.
fn possible_processors() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    last_of_list(&text)
        .and_then(|last| last.checked_add(1))
        .ok_or_else(|| io::Error::other(format!("which processors are possible: {text:?}")))
}

/// The last number of a list as the kernel writes it: `0-3,8-11`.
fn last_of_list(text: &str) -> Option<u16> {
    text.trim().rsplit([',', '-']).next()?.parse().ok()
}

impl Ring {
    fn new(device: &Device, seat: Seat, queues: &[u16], slow: Slow) -> io::Result<Self> {
        // One for each slot, and one to hear of those that come back.
        let entries = (queues.len() + 1).next_power_of_two();
        let entries = u32::try_from(entries).map_err(io::Error::other)?;
        // The kernel hands a request over when this thread next waits for one, instead of
        // interrupting it. That takes a ring of one thread's, which is not the one that
        // makes it: it is enabled by the thread that serves.
        let uring = IoUring::<Entry128, cqueue::Entry>::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)?;
        uring
            .submitter()
            .register_files(&[device.as_fd().as_raw_fd()])?;
        Ok(Self {
            uring,
            slots: queues.iter().map(|queue| Some(Slot::new(*queue))).collect(),
            slow,
            away: Away::new()?,
            early: VecDeque::new(),
            seat,
        })
    }

    /// Serves requests until the connection is over. Whether the kernel took the queues is
    /// told first; if it did not, requests come through the device.
    pub(super) fn serve(
        mut self,
        dispatch: &Arc<Dispatch>,
        taken: &SyncSender<Result<(), Errno>>,
    ) -> Result<(), Errno> {
        self.seat.take();
        let registered = self.enable().and_then(|()| self.register());
        // Nobody listens any more if an earlier one failed.
        let _ = taken.send(registered);
        if registered.is_err() {
            return Ok(());
        }
        let mut live = self.slots.len();
        let mut result = Ok(());
        self.listen()?;
        while live > 0 {
            let wait = usize::from(self.early.is_empty());
            match self.uring.submit_and_wait(wait) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
            while let Some((slot, outcome)) = self.completed() {
                if slot == BACK {
                    for (at, slot) in self.away.back() {
                        self.put_back(at, slot)?;
                    }
                    self.listen()?;
                    continue;
                }
                match outcome {
                    Ok(()) => {
                        self.serve_slot(slot, dispatch)?;
                        if !self.uring.completion().is_empty() {
                            // This answer does not wait for the next request.
                            let _ = self.uring.submit();
                        }
                    }
                    Err(Errno::INTR | Errno::AGAIN) => self.push(slot)?,
                    // Unmounted, or aborted.
                    Err(Errno::NOTCONN | Errno::CONNABORTED) => live -= 1,
                    Err(error) => {
                        tracing::error!(%error, "the kernel did not take an answer");
                        live -= 1;
                        result = Err(error);
                    }
                }
            }
        }
        result
    }

    fn serve_slot(&mut self, at: usize, dispatch: &Arc<Dispatch>) -> Result<(), Errno> {
        let Some(mut slot) = self.slots.get_mut(at).and_then(Option::take) else {
            return Err(Errno::INVAL);
        };
        if Slow::takes(slot.opcode()) {
            let dispatch = Arc::clone(dispatch);
            let home = self.away.home();
            self.slow.put(move || {
                slot.serve(&dispatch);
                home.send(at, slot);
            });
            return Ok(());
        }
        slot.serve(dispatch);
        self.put_back(at, slot)
    }

    /// The slot's answer is ready.
    fn put_back(&mut self, at: usize, slot: Slot) -> Result<(), Errno> {
        if let Some(place) = self.slots.get_mut(at) {
            *place = Some(slot);
        }
        self.push(at)
    }

    /// Has the ring wake up when a slot comes back.
    fn listen(&mut self) -> Result<(), Errno> {
        let command = opcode::PollAdd::new(
            Fd(self.away.bell.as_raw_fd()),
            u32::from(libc::POLLIN.cast_unsigned()),
        )
        .build()
        .user_data(BACK as u64);
        // SAFETY: the command names no memory.
        unsafe { self.uring.submission().push(&command.into()) }.map_err(|_| Errno::NOBUFS)
    }

    /// Makes the calling thread the one that the ring belongs to.
    fn enable(&mut self) -> Result<(), Errno> {
        let enabled = self.uring.submitter().register_enable_rings();
        enabled.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Gives all slots to the kernel. What it refuses it refuses at once.
    fn register(&mut self) -> Result<(), Errno> {
        for slot in 0..self.slots.len() {
            self.push(slot)?;
        }
        self.uring
            .submit()
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        // Requests may be among them, if this was the last ring that was missing.
        self.early.extend(self.uring.completion());
        match self.early.iter().find(|completion| completion.result() < 0) {
            Some(refused) => Err(Errno::from_raw_os_error(-refused.result())),
            None => Ok(()),
        }
    }

    fn completed(&mut self) -> Option<(usize, Result<(), Errno>)> {
        let completion = match self.early.pop_front() {
            Some(early) => early,
            None => self.uring.completion().next()?,
        };
        let slot = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
        let outcome = match completion.result() {
            0.. => Ok(()),
            error => Err(Errno::from_raw_os_error(-error)),
        };
        Some((slot, outcome))
    }

    /// Puts a slot's next command into the submission queue, which has room for all of
    /// them: each slot has one command at a time.
    fn push(&mut self, slot: usize) -> Result<(), Errno> {
        let Some(Some(found)) = self.slots.get(slot) else {
            return Err(Errno::INVAL);
        };
        let command = found.command(slot);
        // SAFETY: the memory that the command names belongs to the slot, which outlives
        // the ring, and is not touched before the kernel has completed the command.
        unsafe { self.uring.submission().push(&command) }.map_err(|_| Errno::NOBUFS)
    }
}

/// Stands where a completion has the number of a slot: one has come back.
const BACK: usize = usize::MAX;

/// The way back for slots that are away.
struct Away {
    sender: Sender<(usize, Slot)>,
    receiver: Receiver<(usize, Slot)>,
    /// An eventfd.
    bell: Arc<OwnedFd>,
}

struct Home {
    sender: Sender<(usize, Slot)>,
    bell: Arc<OwnedFd>,
}

impl Away {
    fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(rustix::event::eventfd(0, flags)?);
        let (sender, receiver) = unbounded();
        Ok(Self {
            sender,
            receiver,
            bell,
        })
    }

    fn home(&self) -> Home {
        Home {
            sender: self.sender.clone(),
            bell: Arc::clone(&self.bell),
        }
    }

    fn back(&self) -> impl Iterator<Item = (usize, Slot)> + use<> {
        // First the bell: whoever comes from here on rings it again.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        let receiver = self.receiver.clone();
        std::iter::from_fn(move || receiver.try_recv().ok())
    }
}

impl Home {
    fn send(self, at: usize, slot: Slot) {
        // The ring waits for all of its slots.
        let _ = self.sender.send((at, slot));
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// Memory for one request at a time.
struct Slot {
    queue: u16,
    header: NonNull<RingHeader>,
    payload: NonNull<[u8]>,
    /// Where both are, as the kernel is told when it takes the slot.
    memory: Box<[libc::iovec; 2]>,
    /// Which request the next command answers; none before the first.
    commit: Option<u64>,
}

// SAFETY: a slot owns what it points to, and nothing else points there but the kernel.
unsafe impl Send for Slot {}

impl Slot {
    fn new(queue: u16) -> Self {
        let header = Box::new(RingHeader::new_zeroed());
        // Zeroed by the kernel when it is touched.
        let payload = vec![0; MAX_CONTENT].into_boxed_slice();
        let (header, payload) = (Box::leak(header), Box::leak(payload));
        let memory = Box::new([
            libc::iovec {
                iov_base: (&raw mut *header).cast(),
                iov_len: size_of::<RingHeader>(),
            },
            libc::iovec {
                iov_base: payload.as_mut_ptr().cast(),
                iov_len: payload.len(),
            },
        ]);
        Self {
            queue,
            header: NonNull::from(header),
            payload: NonNull::from(payload),
            memory,
            commit: None,
        }
    }

    /// What the request that the kernel has put here asks for.
    fn opcode(&self) -> u32 {
        // SAFETY: as in `serve`.
        let header = unsafe { self.header.as_ref() };
        InHeader::read_from_prefix(&header.in_out).map_or(0, |(request, _)| request.opcode)
    }

    /// Serves the request that the kernel has put here, and leaves the answer in its place.
    fn serve(&mut self, dispatch: &Dispatch) {
        // SAFETY: it was allocated as this type, and the kernel has completed its command:
        // until the next one is submitted the memory is ours alone.
        let header = unsafe { self.header.as_mut() };
        // SAFETY: as above.
        let payload = unsafe { self.payload.as_mut() };
        self.commit = Some(header.entry.commit_id);
        let Ok((request, _)) = InHeader::read_from_prefix(&header.in_out) else {
            return;
        };
        let incoming = Incoming {
            header: &request,
            head: &header.head,
            payload: header.entry.payload_sz as usize,
        };
        let answer = dispatch.serve(&incoming, payload);
        let (error, len) = match &answer {
            Answer::Silence => (0, 0),
            Answer::Failed(error) => (-error.raw_os_error(), 0),
            Answer::Filled(len) => (0, *len),
            Answer::Small(small) => {
                let bytes = small.bytes();
                if let Some(space) = payload.get_mut(..bytes.len()) {
                    space.copy_from_slice(bytes);
                }
                (0, bytes.len())
            }
        };
        let len = u32::try_from(len).unwrap_or(0);
        header.entry.payload_sz = len;
        let answer = OutHeader {
            len,
            error,
            unique: request.unique,
        };
        if let Some(space) = header.in_out.get_mut(..size_of::<OutHeader>()) {
            space.copy_from_slice(answer.as_bytes());
        }
    }

    /// What the kernel is to do with the slot next.
    fn command(&self, slot: usize) -> Entry128 {
        let mut area = [0; 80];
        let command = RingCommand {
            commit_id: self.commit.unwrap_or(0),
            qid: self.queue,
            ..RingCommand::default()
        };
        if let Some(space) = area.get_mut(..size_of::<RingCommand>()) {
            space.copy_from_slice(command.as_bytes());
        }
        let code = match self.commit {
            None => abi::RING_REGISTER,
            Some(_) => abi::RING_COMMIT_AND_FETCH,
        };
        let mut entry = opcode::UringCmd80::new(Fixed(0), code)
            .cmd(area)
            .build()
            .user_data(slot as u64);
        if self.commit.is_none() {
            point_to(&mut entry, &self.memory);
        }
        entry
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and the ring that the kernel reached it by is closed.
        drop(unsafe { Box::from_raw(self.header.as_ptr()) });
        // SAFETY: likewise.
        drop(unsafe { Box::from_raw(self.payload.as_ptr()) });
    }
}

/// Sets `addr` and `len` of a submission queue entry, for which a command has no setter.
fn point_to(entry: &mut Entry128, memory: &[libc::iovec; 2]) {
    /// Where `struct io_uring_sqe` has them.
    const ADDR: usize = 16;
    const LEN: usize = 24;
    let start = (&raw mut *entry).cast::<u8>();
    // SAFETY: the entry is a `struct io_uring_sqe` of 128 bytes, which ADDR is inside of.
    let addr = unsafe { start.add(ADDR) }.cast::<u64>();
    // SAFETY: as above.
    let len = unsafe { start.add(LEN) }.cast::<u32>();
    // SAFETY: the field is 8 bytes, writable through the exclusive reference.
    unsafe { addr.write_unaligned(memory.as_ptr().addr() as u64) };
    // SAFETY: the field is 4 bytes, likewise.
    unsafe { len.write_unaligned(2) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_have_a_last_one() {
        for (text, last) in [
            ("0\n", Some(0)),
            ("0-127\n", Some(127)),
            ("0-3,8\n", Some(8)),
        ] {
            assert_eq!(last_of_list(text), last);
        }
        assert_eq!(last_of_list("\n"), None);
    }
}
