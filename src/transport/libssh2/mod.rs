//! SSH in this process, through libssh2.
//!
//! One thread owns the TCP connection, the session and the channel from start to end.
//! It connects, checks the host key, authenticates and starts the command in blocking
//! mode with a timeout, then pumps bytes without blocking ([`pump`]).

mod ciphers;
mod login;
mod pump;

use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use parking_lot::Mutex;

use super::secret::Secret;
use super::ssh_config::Effective;
use super::ssh_program::ended;
use super::startup::{self, Failure};
use super::{ConnectError, ConnectOptions, Deadline, Guard, Link, SshPlace, Tail, TransportKind};

/// How long a healthy connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_millis(200);

/// Why libssh2 did not get through.
pub(super) struct Refusal {
    pub(super) error: ConnectError,
    /// The ssh program knows more algorithms and more ways to authenticate.
    pub(super) program_may_do_better: bool,
    /// Something that, had it been known, would have been tried as well.
    pub(super) wants: Option<Box<Secret>>,
}

impl From<ConnectError> for Refusal {
    fn from(error: ConnectError) -> Self {
        Self {
            error,
            program_may_do_better: false,
            wants: None,
        }
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        ConnectError::from(error).into()
    }
}

/// What the thread and the link's owner share.
#[derive(Default)]
struct Shared {
    /// The link is gone: say goodbye and end.
    stop: AtomicBool,
    /// The connection, to cut it from outside.
    tcp: Mutex<Option<TcpStream>>,
}

impl Shared {
    fn cut(&self) {
        if let Some(tcp) = &*self.tcp.lock() {
            let _ = tcp.shutdown(Shutdown::Both);
        }
    }
}

/// How the connection ended.
struct Outcome {
    /// Exit status of the command, if it ended by itself.
    status: Option<i32>,
    /// What broke the connection.
    broken: Option<String>,
}

/// Ends the thread and the connection when dropped.
pub(super) struct Carrier {
    shared: Arc<Shared>,
    /// Our duplicate of the caller's end; shutting it down wakes the thread.
    stream: UnixStream,
    outcome: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut over = !matches!(
            self.outcome.recv_timeout(GOODBYE),
            Err(RecvTimeoutError::Timeout)
        );
        if !over {
            self.shared.cut();
            over = !matches!(
                self.outcome.recv_timeout(GOODBYE),
                Err(RecvTimeoutError::Timeout)
            );
        }
        // A thread that waits for an ssh-agent or for a name server cannot be woken;
        // it ends as soon as it gets its answer, and nobody needs to wait for that.
        if over && let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects through libssh2.
pub(super) fn connect(
    place: &SshPlace,
    options: &ConnectOptions,
    effective: &Effective,
    deadline: Deadline,
    reason: String,
) -> Result<Link, Refusal> {
    let target = effective.target(place);
    let command = startup::command(options, &place.path)?;
    let (ours, theirs) = UnixStream::pair()?;
    let (ready_sender, ready) = bounded(1);
    let (outcome_sender, outcome) = bounded(1);
    let shared = Arc::new(Shared::default());
    let tail = Tail::default();
    let login = login::Login {
        place: place.clone(),
        options: options.clone(),
        effective: effective.clone(),
        target: target.clone(),
        deadline,
    };
    let thread = thread::Builder::new().name("peer-ssh".to_owned()).spawn({
        let shared = Arc::clone(&shared);
        let tail = tail.clone();
        move || {
            let opened = login.open(&shared, &command);
            let (open, result) = match opened {
                Ok(open) => (Some(open), Ok(())),
                Err(refusal) => (None, Err(refusal)),
            };
            let _ = ready_sender.send(result);
            if let Some(open) = open {
                let outcome = pump::run(open, theirs, &shared, &tail);
                let _ = outcome_sender.send(outcome);
            }
        }
    })?;
    let carrier = Carrier {
        shared,
        stream: ours.try_clone()?,
        outcome,
        thread: Some(thread),
    };
    match ready.recv_timeout(deadline.left()) {
        Ok(result) => result?,
        Err(_) => {
            return Err(ConnectError::Timeout {
                host: target.host,
                port: target.port,
                doing: "connecting and authenticating",
                waited: deadline.allowed,
            }
            .into());
        }
    }
    match startup::await_agent(&ours, &target, options, deadline) {
        Ok(()) => Ok(Link {
            stream: ours,
            transport: TransportKind::Libssh2,
            reason,
            tail,
            _guard: Guard::Libssh2(carrier),
        }),
        Err(Failure::Error(error)) => Err(error.into()),
        Err(Failure::Ended(printed)) => {
            let outcome = carrier.outcome.recv_timeout(deadline.left());
            Err(match outcome {
                Ok(Outcome {
                    broken: Some(detail),
                    ..
                }) => ConnectError::Ssh {
                    host: target.host,
                    port: target.port,
                    detail,
                },
                Ok(Outcome { status, .. }) => ended(&target, status, &printed, &tail.text()),
                Err(_) => ended(&target, None, &printed, &tail.text()),
            }
            .into())
        }
    }
}
