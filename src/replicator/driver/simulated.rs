//! A driver that a simulation leads step by step.

use tokio::sync::{mpsc, oneshot};

use super::super::link::Session;
use super::{Driver, Event, FlushOutcome, PeerStatus};
use crate::replicator::{Context, Resume};
use crate::sim::jobs;
use crate::wire::message::ToMount;

/// One peer's task, without the task.
pub(crate) struct Stepped {
    driver: Driver,
    frames: Option<mpsc::UnboundedReceiver<Vec<u8>>>,
}

impl Stepped {
    /// As [`super::super::Handle::spawn`], with the jitter given.
    pub(crate) fn start(context: Context, jitter: u64) -> Self {
        let (driver, _) = super::super::handle::prepare(context, jitter).unwrap();
        let mut stepped = Self {
            driver,
            frames: None,
        };
        stepped.tick();
        stepped
    }

    fn feed(&mut self, event: Event) {
        jobs::run(self.driver.feed(event));
        self.driver.publish();
    }

    /// Time has gone by.
    pub(crate) fn tick(&mut self) {
        self.feed(Event::Tick);
    }

    /// When time matters next, since the driver was made.
    pub(crate) fn deadline(&self) -> Option<std::time::Duration> {
        self.driver.machine.deadline()
    }

    /// The driver's time.
    pub(crate) fn elapsed(&self) -> std::time::Duration {
        self.driver.elapsed()
    }

    /// The journal has committed up to a number.
    pub(crate) fn wake(&mut self, n: u64) {
        self.feed(Event::LocalChanged(n));
    }

    /// Whether it waits for a link to be made.
    pub(crate) fn dials(&self) -> bool {
        self.driver.dials
    }

    /// The link is there.
    pub(crate) fn connected(&mut self) {
        self.driver.dials = false;
        let (session, frames) = Session::simulated();
        self.driver.session = Some(session);
        self.frames = Some(frames);
        self.feed(Event::Connected);
    }

    /// The link cannot be made, or is cut.
    pub(crate) fn lost(&mut self, reason: &str) {
        self.driver.dials = false;
        self.feed(Event::LinkLost(reason.to_owned()));
        self.frames = None;
    }

    /// Whether it holds the link that was made for it.
    pub(crate) fn holds_link(&self) -> bool {
        self.driver.session.is_some()
    }

    /// A message came in.
    pub(crate) fn message(&mut self, message: ToMount) {
        if let (ToMount::Taken { bytes }, Some(session)) = (&message, &self.driver.session) {
            session.contents().acknowledged(*bytes).unwrap();
        }
        jobs::run(self.driver.message(message));
        self.driver.publish();
    }

    /// Takes in what a piece of its work has led to. Says whether there was any.
    pub(crate) fn take_result(&mut self) -> bool {
        let Ok((number, finished)) = self.driver.finished.1.try_recv() else {
            return false;
        };
        if let Some(event) = self.driver.finished(number, finished) {
            self.feed(event);
        }
        true
    }

    /// The next frame that it has sent.
    pub(crate) fn frame(&mut self) -> Option<Vec<u8>> {
        self.frames.as_mut()?.try_recv().ok()
    }

    /// As [`super::super::Handle::flush`].
    pub(crate) fn flush(&mut self, n: u64) -> oneshot::Receiver<FlushOutcome> {
        let (answer, outcome) = oneshot::channel();
        let control = super::Control::Flush { n, answer };
        if let Some(event) = self.driver.control(control) {
            self.feed(event);
        }
        outcome
    }

    /// Goes on where a brake is engaged.
    pub(crate) fn resume(&mut self, resume: Resume) {
        if let Some(event) = self.driver.control(super::Control::Resume(resume)) {
            self.feed(event);
        }
    }

    /// What a person sees of it.
    pub(crate) fn status(&self) -> PeerStatus {
        super::lock(&self.driver.status).clone()
    }

    /// Whether a round is under way.
    pub(crate) fn in_round(&self) -> bool {
        self.driver.machine.in_round()
    }
}
