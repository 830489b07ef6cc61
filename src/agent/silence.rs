//! How long the mounted side has been silent. It sends something every few seconds, so
//! that a link which broke without a word is told from one on which nothing happens.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The time since the last byte came in, shared between threads.
#[derive(Clone)]
pub(super) struct Silence {
    begin: Instant,
    /// Milliseconds from `begin` to the last byte.
    heard: Arc<AtomicU64>,
    deadline: Duration,
}

impl Silence {
    /// Begins now, and [lasts](Self::lasts) once it is longer than `deadline`.
    pub(super) fn longer_than(deadline: Duration) -> Self {
        Self {
            begin: Instant::now(),
            heard: Arc::default(),
            deadline,
        }
    }

    fn end(&self) {
        let now = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
    }

    /// When it has lasted for too long, unless something comes in before.
    pub(super) fn due(&self) -> Instant {
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        self.begin + heard + self.deadline
    }

    /// Whether it has lasted for too long.
    pub(super) fn lasts(&self) -> bool {
        Instant::now() >= self.due()
    }
}

/// An input that breaks the silence with every byte, whether or not a message is whole.
pub(super) struct Heard<'a, I> {
    pub(super) input: I,
    pub(super) silence: &'a Silence,
}

impl<I: Read> Read for Heard<'_, I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.input.read(buffer)?;
        self.silence.end();
        Ok(length)
    }
}
