//! A child process that carries a link: an agent on this machine, or the ssh program.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{ConnectError, ConnectOptions, Guard, Link, Tail, TransportKind};

/// How long an agent on this machine may take to end by itself after the link has
/// gone. It may be in the middle of an apply, which takes milliseconds.
const AGENT_GRACE: Duration = Duration::from_millis(1000);

/// A child that is ended and reaped when this is dropped.
pub(super) struct Carrier {
    child: Child,
    pidfd: OwnedFd,
    /// Our duplicate of the caller's end, to cut the link under every copy of it.
    stream: UnixStream,
    /// Our end of its standard error, which grandchildren may hold open.
    stderr: UnixStream,
    reader: Option<JoinHandle<()>>,
    /// What to do first when it shall end.
    grace: Duration,
    signal: Option<Signal>,
}

impl Carrier {
    /// Starts a program with its standard input and output on a socket pair, in a
    /// process group of its own so that a Ctrl-C in the terminal is not its business.
    pub(super) fn spawn(
        mut command: Command,
        grace: Duration,
        signal: Option<Signal>,
    ) -> Result<(UnixStream, Tail, Self), ConnectError> {
        let (ours, theirs) = UnixStream::pair()?;
        // A socket and not a pipe, because shutting our end down also ends the reading
        // thread while somebody still holds the other.
        let (stderr, their_stderr) = UnixStream::pair()?;
        command
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::from(OwnedFd::from(their_stderr)))
            .process_group(0);
        let stream = ours.try_clone()?;
        let program = command.get_program().to_owned();
        let mut child = command.spawn().map_err(|source| ConnectError::Spawn {
            program: program.into(),
            source,
        })?;
        // The command holds their ends of the sockets; as long as it lives we would
        // never see the end of the stream.
        drop(command);
        let tail = Tail::default();
        let guarded = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
            .ok_or_else(|| io::Error::other("the child has no process id"))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?))
            .and_then(|pidfd| {
                let reader = stderr.try_clone()?;
                let tail = tail.clone();
                let reader = thread::Builder::new()
                    .name("peer-stderr".to_owned())
                    .spawn(move || drain(reader, &tail))?;
                Ok((pidfd, reader))
            });
        match guarded {
            Ok((pidfd, reader)) => Ok((
                ours,
                tail,
                Self {
                    child,
                    pidfd,
                    stream,
                    stderr,
                    reader: Some(reader),
                    grace,
                    signal,
                },
            )),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// Waits for the child to end; none if it does not in time.
    pub(super) fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let _ = poll(&mut polled, Timespec::try_from(timeout).ok().as_ref());
        self.child.try_wait().ok().flatten()
    }

    /// Takes in what the child has written to standard error and nobody has read yet.
    /// For after its end; what its own children still write is cut off.
    pub(super) fn settle_stderr(&mut self) {
        // What is queued stays readable after the shutdown.
        let _ = self.stderr.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(signal) = self.signal {
            // Through the descriptor: the number cannot have become another process.
            let _ = pidfd_send_signal(&self.pidfd, signal);
        }
        if self.wait(self.grace).is_none() {
            // Ends a stopped process too. What an agent was doing is finished from its
            // redo record by the next one.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        self.settle_stderr();
    }
}

fn drain(mut stderr: UnixStream, tail: &Tail) {
    let mut buffer = [0; 4096];
    loop {
        match stderr.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => tail.push(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Starts an agent, or what else is asked for, for a directory of this machine.
pub(super) fn local(root: &Path, options: &ConnectOptions) -> Result<Link, ConnectError> {
    let mut command = Command::new(&options.program);
    command
        .arg0("mirrorfs")
        .args([options.serve.command(), "--stdio"])
        .arg(root);
    let (stream, tail, carrier) = Carrier::spawn(command, AGENT_GRACE, None)?;
    Ok(Link {
        stream,
        transport: TransportKind::Local,
        reason: "the peer is a directory of this machine".to_owned(),
        tail,
        _guard: Guard::Child(carrier),
    })
}
