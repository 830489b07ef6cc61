//! An agent that a simulation leads step by step.

use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use inotify::Inotify;

use super::{Done, Engine, Job, Observer, Opened, Parts, Silence};
use crate::agent::watch::{self, Watches};
use crate::agent::{Error, hello};
use crate::wire::frame::{read_magic, read_message, write_magic, write_message};
use crate::wire::message::{MountHello, ToAgent, ToMount};

/// An agent in a session, without its threads.
pub(crate) struct Stepped {
    engine: Engine,
    out: Receiver<ToMount>,
    dones: Receiver<Done>,
    jobs: Receiver<Job>,
    inotify: Inotify,
}

/// How a session began: what was answered, and the agent if it serves.
pub(crate) struct Met {
    pub(crate) answer: Option<ToMount>,
    pub(crate) agent: Result<Stepped, Error>,
}

impl Stepped {
    /// Greets. The session is to be begun by [`Self::begin`].
    pub(crate) fn meet(root: &Path, state: &Path, greeting: &MountHello) -> Met {
        let mut input = Vec::new();
        write_magic(&mut input).unwrap();
        write_message(&mut input, &ToAgent::Hello(greeting.clone())).unwrap();
        let mut output = Vec::new();
        let opened = hello::meet(root, state, None, Cursor::new(input), &mut output);
        let agent = opened.and_then(Self::open);
        let mut output = Cursor::new(output);
        let answer = read_magic(&mut output)
            .and_then(|()| read_message(&mut output))
            .ok()
            .flatten();
        Met { answer, agent }
    }

    fn open<I, O>(opened: Opened<I, O>) -> Result<Self, Error> {
        let Opened {
            served,
            reserved,
            staging,
            index,
            lock,
            mount,
            settled,
            seen,
            late,
            ..
        } = opened;
        let io = |error| Error::io("watch", "a simulated directory", error);
        let (mut watches, inotify) = Watches::unattended().map_err(io)?;
        watches.add_reserved(reserved.dir()).map_err(io)?;
        let (out, to_mount) = unbounded();
        let (done, dones) = unbounded();
        let (looks, jobs) = unbounded();
        let observer = Observer::new(served, reserved, index, Ok(watches), looks)?;
        // The simulation itself cuts links that are silent.
        let silence = Silence::longer_than(Duration::from_secs(u32::MAX.into()));
        let engine = Engine::new(Parts {
            observer,
            staging,
            lock,
            mount,
            settled,
            seen,
            late,
            out,
            done,
            silence,
        });
        Ok(Self {
            engine,
            out: to_mount,
            dones,
            jobs,
            inotify,
        })
    }

    /// Brings the index up to date and reports.
    pub(crate) fn begin(&mut self) -> Result<(), Error> {
        self.engine.start()
    }

    /// A message came in.
    pub(crate) fn message(&mut self, message: ToAgent) -> Result<(), Error> {
        self.engine.message(message)?;
        self.settle()
    }

    /// Reads what the kernel saw, and takes in what other threads did. Says whether there
    /// was anything.
    pub(crate) fn notice(&mut self) -> Result<bool, Error> {
        let mut buffer = vec![0; 64 * 1024];
        let mut any = false;
        while let Ok(events) = watch::read(&mut self.inotify, &mut buffer) {
            if events.is_empty() {
                break;
            }
            any = true;
            self.engine.events(events)?;
        }
        while let Ok(job) = self.jobs.try_recv() {
            any = true;
            let found = job.look();
            self.engine.done(Done::Looked(job.path, found))?;
        }
        while let Ok(done) = self.dones.try_recv() {
            any = true;
            self.engine.done(done)?;
        }
        self.settle()?;
        Ok(any)
    }

    /// Time has gone by.
    pub(crate) fn tick(&mut self) -> Result<(), Error> {
        self.settle()
    }

    /// When time matters next.
    pub(crate) fn due(&self) -> Option<Instant> {
        let due = [
            self.engine.observer.due(),
            self.engine.next_scan,
            self.engine.displaced.due(),
        ];
        due.into_iter().flatten().min()
    }

    /// What goes around the engine's loop after each thing that happens.
    fn settle(&mut self) -> Result<(), Error> {
        self.engine.observe()?;
        self.engine.prepare_fetch()?;
        while let Some(message) = self.engine.next_fetch.take() {
            self.engine.send(message)?;
            self.engine.prepare_fetch()?;
        }
        Ok(())
    }

    /// The next message that it has sent.
    pub(crate) fn sent(&mut self) -> Option<ToMount> {
        self.out.try_recv().ok()
    }
}
