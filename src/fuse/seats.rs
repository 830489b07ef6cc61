//! Which thread serves on which processor.
//!
//! A request is two wake-ups: of a thread that serves, and of the caller. The kernel wakes
//! the threads in turn and the scheduler then spreads them over whatever processors are
//! idle, each of which has to be woken as well; in a virtual machine that costs more than
//! the request. A thread that stays on one processor is often found where the caller is,
//! or where the one before it was: measured on two processors, that makes metadata
//! requests between 1.6 and 1.9 times as fast.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// More threads than this have not been measured.
const MOST: usize = 8;

/// The processors that this process may use, one for each thread that serves.
#[derive(Debug)]
pub(super) struct Seats {
    seats: Vec<Seat>,
}

/// Where one thread serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seat {
    /// None where the processors cannot be told: the thread goes where it is sent.
    processor: Option<usize>,
}

impl Seats {
    /// For as many threads as there are processors, and no more than `threads`.
    pub(super) fn new(threads: usize) -> Self {
        let mut seats: Vec<_> = sched_getaffinity(None)
            .map(|allowed| {
                (0..CpuSet::MAX_CPU)
                    .filter(|processor| allowed.is_set(*processor))
                    .take(threads.clamp(1, MOST))
                    .map(|processor| Seat {
                        processor: Some(processor),
                    })
                    .collect()
            })
            .unwrap_or_default();
        if seats.is_empty() {
            seats.push(Seat { processor: None });
        }
        Self { seats }
    }

    /// One after the other.
    pub(super) fn all(&self) -> impl Iterator<Item = Seat> {
        self.seats.iter().copied()
    }
}

impl Seat {
    pub(super) fn is_on(self, processor: usize) -> bool {
        self.processor == Some(processor)
    }

    /// Keeps the calling thread here.
    pub(super) fn take(self) {
        let Some(processor) = self.processor else {
            return;
        };
        let mut set = CpuSet::new();
        set.set(processor);
        // The thread serves wherever it is.
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::debug!(%error, "a serving thread has no processor of its own");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_stays_on_a_processor_of_its_own() {
        let seated = |seat: Seat| {
            seat.take();
            sched_getaffinity(None).unwrap()
        };
        let sets = std::thread::scope(|scope| {
            let threads: Vec<_> = Seats::new(2)
                .all()
                .map(|seat| scope.spawn(move || seated(seat)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert!(sets.iter().all(|set| set.count() == 1), "{sets:?}");
        for (at, set) in sets.iter().enumerate() {
            assert!(!sets[..at].contains(set), "{sets:?}");
        }
    }
}
