//! Threads for what takes long: a queue of the kernel's, or a thread that reads the
//! device, must not stand still while something is synced.

use std::io;

use crossbeam_channel::{Sender, unbounded};

use super::abi::opcode;

/// More syncs than this at a time gain nothing: the disk does one after the other.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

/// Where long work is put. The threads end with the last of these.
#[derive(Clone, Debug)]
pub(super) struct Slow {
    jobs: Sender<Job>,
}

impl Slow {
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, queue) = unbounded::<Job>();
        for at in 0..THREADS {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("fuse-sync-{at}"))
                .spawn(move || {
                    for job in queue {
                        job();
                    }
                })?;
        }
        Ok(Self { jobs })
    }

    /// Whether requests of this kind are long work. They have no payload.
    pub(super) fn takes(code: u32) -> bool {
        matches!(code, opcode::FSYNC | opcode::FSYNCDIR)
    }

    pub(super) fn put(&self, job: impl FnOnce() + Send + 'static) {
        if let Err(unsent) = self.jobs.send(Box::new(job)) {
            // There is no thread any more; then it takes as long as it takes.
            (unsent.0)();
        }
    }
}
