//! Carries bytes between the socket pair and the channel, without ever blocking on
//! either.
//!
//! Every round tries each direction once, and only if none moved anything waits for
//! the sockets. libssh2 has its own rules:
//!
//! * A write that would block must be repeated with the same slice, since a packet may
//!   be half sent. Until then whatever else wants to send gets "would block" from the
//!   libssh2 that `libssh2-sys` 0.3.4 brings (`transport_send_existing`; older ones fail),
//!   so trying the other operations meanwhile is harmless.
//! * A read may have to send (window adjustments, new keys), a write may have to
//!   receive. `block_directions` tells what is waited for, and sometimes nothing.
//! * Standard error shares the window with standard output: if nobody drains it, both
//!   stop.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use ssh2::BlockDirections;

use super::login::Open;
use super::{GOODBYE, Outcome, Shared, Tail};

/// Room for bytes on their way, in each direction.
const ROOM: usize = 256 << 10;

/// The longest wait when libssh2 does not say what it waits for.
const UNSURE: Duration = Duration::from_millis(50);

/// Bytes that have been taken from one side and not yet by the other.
struct Transit {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Transit {
    fn new() -> Self {
        Self {
            buffer: vec![0; ROOM].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Fills the buffer once; gives the number of bytes, none if it would block.
    fn fill(&mut self, from: &mut impl Read) -> io::Result<Option<usize>> {
        let got = unblocked(from.read(&mut self.buffer))?;
        self.start = 0;
        self.end = got.unwrap_or(0);
        Ok(got)
    }

    /// Hands on what is there. The slice stays where it is until it has been taken.
    fn drain(&mut self, to: &mut impl Write) -> io::Result<bool> {
        match unblocked(to.write(&self.buffer[self.start..self.end]))? {
            Some(taken) => {
                self.start += taken;
                Ok(taken > 0)
            }
            None => Ok(false),
        }
    }
}

fn unblocked<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Pumps until either side has ended.
pub(super) fn run(open: Open, local: UnixStream, shared: &Shared, tail: &Tail) -> Outcome {
    let mut pump = Pump {
        open,
        local,
        incoming: Transit::new(),
        outgoing: Transit::new(),
        local_eof: false,
        eof_sent: false,
        remote_eof: false,
        unsure: false,
    };
    let outcome = match pump.pump(shared, tail) {
        Ok(status) => Outcome {
            status,
            broken: None,
        },
        Err(error) => {
            let broken = format!("the SSH connection broke: {error}");
            if !shared.stop.load(Ordering::Acquire) {
                tail.push(format!("{broken}\n").as_bytes());
            }
            Outcome {
                status: None,
                broken: Some(broken),
            }
        }
    };
    let _ = pump.local.shutdown(Shutdown::Both);
    pump.goodbye();
    outcome
}

struct Pump {
    open: Open,
    local: UnixStream,
    /// From the peer.
    incoming: Transit,
    /// To the peer.
    outgoing: Transit,
    /// The caller will write no more.
    local_eof: bool,
    /// The peer knows.
    eof_sent: bool,
    /// The agent will write no more.
    remote_eof: bool,
    /// The last wait gave libssh2 nothing to do.
    unsure: bool,
}

impl Pump {
    /// Pumps until the command has ended or the link is gone; gives the exit status.
    fn pump(&mut self, shared: &Shared, tail: &Tail) -> io::Result<Option<i32>> {
        self.open.session.set_blocking(false);
        self.local.set_nonblocking(true)?;
        loop {
            if shared.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            let mut moved = self.receive(tail)?;
            moved |= self.send()?;
            if self.remote_eof && self.incoming.is_empty() {
                // The status comes after the end of the output, with the close.
                match unblocked(self.open.channel.wait_close().map_err(io::Error::from)) {
                    Ok(Some(())) => return Ok(self.open.channel.exit_status().ok()),
                    Ok(None) => {}
                    Err(error) => return Err(error),
                }
            }
            if moved {
                self.unsure = false;
            } else {
                self.wait()?;
            }
        }
    }

    /// From the peer to the caller.
    fn receive(&mut self, tail: &Tail) -> io::Result<bool> {
        let mut moved = false;
        if self.incoming.is_empty() && !self.remote_eof {
            match self.incoming.fill(&mut self.open.channel)? {
                // Without data this is an end only if the channel says so.
                Some(0) if self.open.channel.eof() => {
                    self.remote_eof = true;
                    moved = true;
                }
                Some(length) => moved |= length > 0,
                None => {}
            }
            let mut buffer = [0; 4096];
            if let Some(length) = unblocked(self.open.channel.stderr().read(&mut buffer))? {
                tail.push(&buffer[..length]);
                moved |= length > 0;
            }
        }
        if !self.incoming.is_empty() {
            moved |= self.incoming.drain(&mut self.local)?;
        }
        if moved && self.remote_eof && self.incoming.is_empty() {
            let _ = self.local.shutdown(Shutdown::Write);
        }
        Ok(moved)
    }

    /// From the caller to the peer.
    fn send(&mut self) -> io::Result<bool> {
        let mut moved = false;
        if self.outgoing.is_empty() && !self.local_eof {
            match self.outgoing.fill(&mut self.local)? {
                Some(0) => {
                    self.local_eof = true;
                    moved = true;
                }
                Some(_) => moved = true,
                None => {}
            }
        }
        if !self.outgoing.is_empty() {
            match self.outgoing.drain(&mut self.open.channel) {
                Ok(taken) => moved |= taken,
                // The agent has gone; what it still said is worth reading.
                Err(_) if self.open.channel.eof() => {
                    self.outgoing.start = self.outgoing.end;
                    self.local_eof = true;
                    self.eof_sent = true;
                }
                Err(error) => return Err(error),
            }
        } else if self.local_eof && !self.eof_sent {
            let sent = self.open.channel.send_eof().map_err(io::Error::from);
            self.eof_sent = unblocked(sent)?.is_some();
            moved |= self.eof_sent;
        }
        Ok(moved)
    }

    /// Waits until one of the sockets may have something to do.
    fn wait(&mut self) -> io::Result<()> {
        let blocked_on = self.open.session.block_directions();
        let mut timeout = None;
        let mut remote = match blocked_on {
            BlockDirections::Inbound => PollFlags::IN,
            BlockDirections::Outbound | BlockDirections::Both => PollFlags::IN | PollFlags::OUT,
            BlockDirections::None => {
                timeout = Some(UNSURE);
                // A socket that can be written to would end the wait at once; asking
                // for that a second time without anything moved is a busy loop.
                if self.unsure {
                    PollFlags::IN
                } else {
                    PollFlags::IN | PollFlags::OUT
                }
            }
        };
        self.unsure = timeout.is_some();
        if !self.incoming.is_empty() && self.outgoing.is_empty() {
            // Nobody wants to read what the peer sends right now.
            remote -= PollFlags::IN;
        }
        let mut local = PollFlags::empty();
        if self.outgoing.is_empty() && !self.local_eof {
            local |= PollFlags::IN;
        }
        if !self.incoming.is_empty() {
            local |= PollFlags::OUT;
        }
        let mut polled = [
            PollFd::new(&self.open.tcp, remote),
            PollFd::new(&self.local, local),
        ];
        // A closed socket ends every wait, whatever was asked for, so the caller's end
        // is left out while nothing is expected of it, and `stop` looked at by the clock.
        let polled = if local.is_empty() {
            timeout = Some(UNSURE);
            &mut polled[..1]
        } else {
            &mut polled[..]
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Closes the channel and the session in good order if the peer answers quickly,
    /// and in any case leaves nothing that could block when they are freed.
    fn goodbye(&mut self) {
        let until = Instant::now() + GOODBYE;
        let Open {
            channel,
            session,
            tcp,
        } = &mut self.open;
        let step = |operation: &mut dyn FnMut() -> Result<(), ssh2::Error>| loop {
            match unblocked(operation().map_err(io::Error::from)) {
                Ok(Some(())) | Err(_) => return,
                Ok(None) => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let mut polled = [PollFd::new(&*tcp, PollFlags::IN)];
            let wait = Timespec::try_from(left.min(UNSURE)).ok();
            let _ = poll(&mut polled, wait.as_ref());
        };
        step(&mut || channel.close());
        step(&mut || session.disconnect(None, "done", None));
        // Freeing sends what was not sent yet; on a closed socket that fails at once.
        let _ = tcp.shutdown(Shutdown::Both);
    }
}
