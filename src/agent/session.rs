//! A session once both sides have greeted: four threads around one engine.
//!
//! The reader answers pings itself, so that a long scan or a slow disk is not taken for
//! a dead agent; everything else it hands to the engine. The writer takes what is to be
//! sent from a bounded queue: what holds it up holds up the engine, never memory. The
//! watch hands on the kernel's events. A fourth thread reads large files. A fifth keeps
//! the trash in bounds, beside the session.

mod batches;
mod late;
mod rejoin;
mod reports;
#[cfg(test)]
pub(crate) mod simulated;

use std::collections::{HashMap, VecDeque};
use std::io::{BufReader, BufWriter, Read, Write};
use std::time::{Duration, Instant};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, Select, SendTimeoutError, Sender, TryRecvError, bounded, never,
    unbounded,
};

use mirrorfs_journal::{LINKS_MAX, UNDO_MAX};

use super::Error;
use super::fetch::{Fetches, Next, Request};
use super::hello::Opened;
use super::lock::Lock;
use super::observer::{COOKIE, Job, Observer, Signal};
use super::offer::{Offer, Reuse};
use super::silence::{Heard, Silence};
use super::watch::{Watched, Watches};
use crate::background;
use crate::replica::Staging;
use crate::replica::look::Look;
use crate::replica::trash::Trash;
use crate::replica::trash::bounds::{self, Bounds};
use crate::tree::{Agreement, RelPath, ReplicaId, Timestamp};
use crate::wire::flow::Flow;
use crate::wire::frame::{FrameError, read_message, write_message};
use crate::wire::message::{BatchId, Revision, SIGN_OF_LIFE, ToAgent, ToMount};
use late::Displacements;
use rejoin::Joining;

/// How many messages may wait for the engine; of at most a frame each.
const INCOMING: usize = 16;
/// How many may wait to be written.
const OUTGOING: usize = 16;
/// How often a directory that cannot be watched is scanned: every two seconds, or ten
/// times as long as the scan took.
const SCAN_EVERY: Duration = Duration::from_secs(2);
const SCAN_SHARE: u32 = 10;
/// After how many revisions deletions that the other side knows of are forgotten. At the
/// beginning of a session they are in any case.
const FORGET_EVERY: u64 = 50_000;
/// For how many seconds agreements are remembered: 30 days.
const PAST: i64 = 30 * 24 * 3600;
/// How long the last words may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What other threads of the session did.
enum Done {
    Looked(RelPath, std::io::Result<Look>),
    Synced(BatchId, std::io::Result<()>),
    /// Something of the trash is about to go for good: whoever asks waits until what was
    /// written to late has left it.
    Expiring(Sender<()>),
}

/// Somebody waits until everything up to now has been reported.
struct Drain {
    token: u64,
    /// The cookie whose event has not come yet.
    cookie: Option<Vec<u8>>,
    /// Large files that are still being looked at, and how often that was in vain.
    large: HashMap<RelPath, u32>,
}

/// What an engine is made of when both sides have greeted.
struct Parts {
    observer: Observer,
    staging: Staging,
    lock: Lock,
    mount: ReplicaId,
    /// Whether both sides know from which agreement on they go on.
    settled: bool,
    /// From where on changes are to be reported; none for everything.
    seen: Option<Revision>,
    /// Whether the other side wants to hear of late versions.
    late: bool,
    out: Sender<ToMount>,
    done: Sender<Done>,
    silence: Silence,
}

struct Engine {
    observer: Observer,
    staging: Staging,
    _lock: Lock,
    mount: ReplicaId,
    /// What has to be heard before both sides know from where on they go on. Until then
    /// nothing is reported and nothing else taken.
    joining: Option<Joining>,
    /// The batch whose changes of the base have been written down.
    agreed: Option<BatchId>,
    out: Sender<ToMount>,
    done: Sender<Done>,
    fetches: Fetches,
    next_fetch: Option<ToMount>,
    /// What of the fetched contents is on its way.
    flow: Flow,
    /// How many bytes of the contents that were sent here are done with.
    taken: u64,
    offer: Option<Offer>,
    dropped: VecDeque<BatchId>,
    /// The batch whose names are being synced, and a commit that waits for it.
    syncing: Option<BatchId>,
    waiting: Option<(BatchId, Agreement, Revision)>,
    drains: Vec<Drain>,
    cookies: u64,
    /// What somebody may still write to in the trash.
    displaced: Displacements,
    /// Up to where everything has been reported, and whether that was in this session.
    reported: u64,
    whole: bool,
    degraded: Option<String>,
    next_scan: Option<Instant>,
    silence: Silence,
}

/// Runs the session to its end. A mounted side that is silent for longer than `deadline`
/// is gone.
pub(super) fn run<I, O>(opened: Opened<I, O>, deadline: Duration) -> Result<(), Error>
where
    I: Read + Send + 'static,
    O: Write + Send + 'static,
{
    run_watching(opened, deadline, Watches::start())
}

/// The same with a watch that was started before, or could not be.
pub(super) fn run_watching<I, O>(
    opened: Opened<I, O>,
    deadline: Duration,
    watches: std::io::Result<(Watches, Receiver<Watched>)>,
) -> Result<(), Error>
where
    I: Read + Send + 'static,
    O: Write + Send + 'static,
{
    let Opened {
        input,
        output,
        served,
        reserved,
        staging,
        index,
        lock,
        mount,
        settled,
        seen,
        late,
    } = opened;
    let spawn = |error| Error::io("start", "a thread", error);
    let (out, to_write) = bounded(OUTGOING);
    let (to_engine, incoming) = bounded(INCOMING);
    let (done, dones) = unbounded();
    let (jobs, to_look) = unbounded::<Job>();
    let (written, end_of_writer) = bounded::<()>(1);
    let pongs = out.clone();
    let silence = Silence::longer_than(deadline);
    let listening = silence.clone();
    background::start("read", move || {
        read(input, &listening, &to_engine, &pongs);
    })
    .map_err(spawn)?;
    background::start("write", move || {
        write(output, &to_write, SIGN_OF_LIFE.min(deadline / 4));
        drop(written);
    })
    .map_err(spawn)?;
    let trash = Bounds::of(Trash::of(&reserved)?);
    let (looked, expiring) = (done.clone(), done.clone());
    background::start("look", move || {
        for job in to_look {
            let found = job.look();
            if looked.send(Done::Looked(job.path, found)).is_err() {
                return;
            }
        }
    })
    .map_err(spawn)?;
    let (watches, events) = match watches {
        Ok((mut watches, events)) => match watches.add_reserved(reserved.dir()) {
            Ok(()) => (Ok(watches), events),
            Err(error) => (Err(no_watch(&error)), never()),
        },
        Err(error) => (Err(no_watch(&error)), never()),
    };
    let observer = Observer::new(served, reserved, index, watches, jobs)?;
    let mut engine = Engine::new(Parts {
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
    let (session, ended) = bounded::<()>(0);
    background::start("trash", move || keep_in_bounds(trash, &expiring, &ended)).map_err(spawn)?;
    let ended = engine
        .start()
        .and_then(|()| engine.all(&incoming, &events, &dones));
    if let Err(error) = &ended
        && !matches!(error, Error::Disconnected)
    {
        let reason = error.to_string();
        let _ = engine
            .out
            .send_timeout(ToMount::Closing { reason }, LAST_WORDS);
    }
    drop(session);
    // The lock goes with the engine, before anybody is told that the session is over.
    drop(engine);
    drop(incoming);
    let _ = end_of_writer.recv_timeout(LAST_WORDS);
    match ended {
        Err(Error::Disconnected) => Ok(()),
        other => other,
    }
}

/// Removes from the trash what is not to be kept, until the session is over.
fn keep_in_bounds(mut trash: Bounds, engine: &Sender<Done>, ended: &Receiver<()>) {
    loop {
        let (ready, looked) = bounded(0);
        // The engine is gone only with the session.
        let _ = engine.send(Done::Expiring(ready));
        let _ = looked.recv();
        if ended.try_recv() == Err(TryRecvError::Disconnected) {
            return;
        }
        if let Err(error) = trash.keep(crate::clock::wall()) {
            tracing::warn!(%error, "cannot keep the trash in bounds");
        }
        match ended.recv_timeout(bounds::EVERY) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn no_watch(error: &std::io::Error) -> String {
    format!("the directory cannot be watched ({error})")
}

type Incoming = Result<ToAgent, FrameError>;

fn read(input: impl Read, silence: &Silence, engine: &Sender<Incoming>, pongs: &Sender<ToMount>) {
    let input = Heard { input, silence };
    let mut input = BufReader::with_capacity(64 * 1024, input);
    loop {
        let message = match read_message::<ToAgent>(&mut input) {
            Ok(Some(message)) => Ok(message),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let failed = message.is_err();
        let sent = match message {
            Ok(ToAgent::Ping { token }) => pongs.send(ToMount::Pong { token }).is_ok(),
            other => engine.send(other).is_ok(),
        };
        if failed || !sent {
            return;
        }
    }
}

fn write(output: impl Write, messages: &Receiver<ToMount>, sign_every: Duration) {
    let mut output = BufWriter::with_capacity(64 * 1024, output);
    loop {
        let message = match messages.recv_timeout(sign_every) {
            Ok(message) => message,
            // A ping may be waiting behind much else that is being sent here.
            Err(RecvTimeoutError::Timeout) => ToMount::Pong { token: 0 },
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // The reader notices the end of the link as well; here nothing can be said.
        if write_message(&mut output, &message).is_err() {
            return;
        }
    }
}

impl Engine {
    fn new(parts: Parts) -> Self {
        let Parts {
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
        } = parts;
        Self {
            observer,
            staging,
            _lock: lock,
            mount,
            joining: (!settled).then_some(Joining::Chain),
            agreed: None,
            out,
            done,
            fetches: Fetches::default(),
            next_fetch: None,
            flow: Flow::new(crate::clock::monotonic()),
            taken: 0,
            offer: None,
            dropped: VecDeque::new(),
            syncing: None,
            waiting: None,
            drains: Vec::new(),
            cookies: 0,
            displaced: Displacements::telling(late),
            reported: seen.map_or(0, |seen| seen.rev),
            whole: seen.is_none(),
            degraded: None,
            next_scan: None,
            silence,
        }
    }

    /// Brings the index up to date and reports what the other side has not seen.
    fn start(&mut self) -> Result<(), Error> {
        self.remove_cookies()?;
        if self.observer.index.redo()?.is_none() {
            // Contents that are not complete are worth keeping for the next offer.
            self.staging.clean(&|_| true)?;
        }
        self.load_displaced()?;
        self.scan()?;
        self.check_root()?;
        self.observer.commit()?;
        if self.joining.is_some() {
            return self.tell_chain();
        }
        self.joined()
    }

    /// Both sides know where they stand: everything can be told.
    fn joined(&mut self) -> Result<(), Error> {
        let old = Timestamp {
            secs: Timestamp::now().secs - PAST,
            nanos: 0,
        };
        let index = &mut self.observer.index;
        index.prune_chains(old, UNDO_MAX, LINKS_MAX)?;
        self.report(true)?;
        self.tell_late()
    }

    fn all(
        &mut self,
        incoming: &Receiver<Incoming>,
        events: &Receiver<Watched>,
        dones: &Receiver<Done>,
    ) -> Result<(), Error> {
        let mut broken_watch = false;
        let out = self.out.clone();
        loop {
            self.prepare_fetch()?;
            let mut select = Select::new();
            let from_mount = select.recv(incoming);
            let from_threads = select.recv(dones);
            if !broken_watch {
                select.recv(events);
            }
            let to_mount = self.next_fetch.is_some().then(|| select.send(&out));
            if self.silence.lasts() {
                return Err(Error::Silent);
            }
            let due = [
                self.observer.due(),
                self.next_scan,
                self.displaced.due(),
                Some(self.silence.due()),
            ];
            let ready = match due.into_iter().flatten().min() {
                Some(due) => select.select_deadline(due).ok(),
                None => Some(select.select()),
            };
            match ready {
                None => {}
                Some(ready) if ready.index() == from_mount => match ready.recv(incoming) {
                    Ok(message) => self.message(message?)?,
                    Err(_) => return Err(Error::Disconnected),
                },
                Some(ready) if ready.index() == from_threads => {
                    if let Ok(done) = ready.recv(dones) {
                        self.done(done)?;
                    }
                }
                Some(ready) if Some(ready.index()) == to_mount => {
                    // Takes what was prepared above; the branch exists only with it.
                    let Some(message) = self.next_fetch.take() else {
                        return Err(Error::Disconnected);
                    };
                    let sent = ready.send(&out, message);
                    sent.map_err(|_| Error::Disconnected)?;
                }
                Some(ready) => match ready.recv(events) {
                    Ok(Watched::Events(events)) => self.events(events)?,
                    Ok(Watched::Failed(error)) => {
                        broken_watch = true;
                        self.degrade(no_watch(&error))?;
                    }
                    Err(_) => broken_watch = true,
                },
            }
            self.observe()?;
        }
    }

    fn send(&self, mut message: ToMount) -> Result<(), Error> {
        loop {
            match self.out.send_deadline(message, self.silence.due()) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Disconnected(_)) => return Err(Error::Disconnected),
                Err(SendTimeoutError::Timeout(_)) if self.silence.lasts() => {
                    return Err(Error::Silent);
                }
                Err(SendTimeoutError::Timeout(unsent)) => message = unsent,
            }
        }
    }

    fn message(&mut self, message: ToAgent) -> Result<(), Error> {
        match message {
            ToAgent::Hello(_) => Err(Error::Protocol("a second hello".to_owned())),
            ToAgent::Ping { token } => self.send(ToMount::Pong { token }),
            ToAgent::Rejoin { at, base } => self.rejoin(at, base),
            ToAgent::Base { rows, more } => self.take_base(&rows, more),
            _ if self.joining.is_some() => {
                let what = "it did not say where to go on";
                Err(Error::Protocol(what.to_owned()))
            }
            ToAgent::Agreed { batch, changes } => self.agreed(batch, changes),
            ToAgent::Offer { batch, ops, more } => self.offer(batch, ops, more),
            ToAgent::Data {
                hash,
                offset,
                bytes,
            } => {
                self.data(hash, offset, &bytes)?;
                self.taken += bytes.len() as u64;
                self.send(ToMount::Taken { bytes: self.taken })
            }
            ToAgent::Abandon { batch } => {
                if self
                    .offer
                    .as_ref()
                    .is_some_and(|offer| offer.batch == batch)
                {
                    self.drop_offer();
                }
                Ok(())
            }
            ToAgent::Commit {
                batch,
                agreement,
                seen,
            } => {
                let index = &mut self.observer.index;
                if seen.epoch == index.epoch()
                    && seen.rev <= index.rev()
                    && seen.rev >= index.forgotten()? + FORGET_EVERY
                {
                    self.observer.commit()?;
                    self.observer.index.forget_tombstones(seen.rev)?;
                }
                self.commit(batch, agreement, seen)
            }
            ToAgent::Fetch {
                request,
                path,
                hash,
                offset,
            } => self.fetch(Request {
                number: request,
                path,
                hash,
                offset,
                old: None,
            }),
            ToAgent::FetchLike {
                request,
                path,
                hash,
                offset,
                old,
                size,
            } => self.fetch(Request {
                number: request,
                path,
                hash,
                offset,
                old: Some((old, size)),
            }),
            ToAgent::Sums {
                request,
                block,
                sums,
            } => {
                self.fetches.sums(request, block, &sums);
                Ok(())
            }
            ToAgent::Reuse {
                hash,
                offset,
                len,
                old,
                from,
            } => self.reuse(&Reuse {
                hash,
                offset,
                len,
                old,
                from,
            }),
            ToAgent::AskSums { hash, old, block } => self.sums(hash, old, block),
            ToAgent::Drain { token } => self.drain(token),
            ToAgent::Taken { bytes } => {
                let taken = self.flow.taken(crate::clock::monotonic(), bytes);
                taken.map_err(|error| Error::Protocol(error.to_string()))
            }
        }
    }

    fn fetch(&mut self, request: Request) -> Result<(), Error> {
        match self.fetches.request(request) {
            Some(refusal) => self.send(refusal),
            None => Ok(()),
        }
    }

    fn prepare_fetch(&mut self) -> Result<(), Error> {
        if self.next_fetch.is_some() || self.fetches.is_empty() {
            return Ok(());
        }
        let now = crate::clock::monotonic();
        let Some(room) = self.flow.room(now) else {
            return Ok(());
        };
        let Observer { served, index, .. } = &self.observer;
        let Some(Next { message, changed }) = self.fetches.next(&served.root, index, room) else {
            return Ok(());
        };
        if let ToMount::Fetched { bytes, .. } = &message {
            // They are packed by the writer only: here they count as they are.
            self.flow.sent(now, bytes.len(), bytes.len());
        }
        if let Some(path) = changed {
            // Whatever it is now, the other side is told before the fetch fails.
            self.observer.look(&path, false)?;
            self.report(false)?;
        }
        self.next_fetch = Some(message);
        Ok(())
    }

    fn events(&mut self, events: Vec<super::watch::Event>) -> Result<(), Error> {
        let mut signals = Vec::new();
        let events = self.displaced_events(events)?;
        self.observer.take(events, &mut signals);
        for signal in signals {
            match signal {
                Signal::Fence => return Err(Error::Fenced),
                Signal::Cookie(name) => self.cookie(&name)?,
            }
        }
        Ok(())
    }

    /// Looks at what is due, reports it, and answers those who waited for it.
    fn observe(&mut self) -> Result<(), Error> {
        let now = crate::clock::monotonic();
        if self.next_scan.is_some_and(|at| at <= now) {
            self.scan()?;
        }
        if self.observer.due().is_some_and(|due| due <= now) {
            self.observer.process(false)?;
        }
        if self.degraded.is_none() && self.observer.unwatched().is_some() {
            // The watches have just run out: what happened since in what got none is seen
            // by nothing but a scan, and from now on there is one now and then.
            self.scan()?;
        }
        if self.displaced.due().is_some_and(|due| due <= now) {
            self.check_displaced()?;
        }
        self.report(false)?;
        self.answer_drains()
    }

    fn scan(&mut self) -> Result<(), Error> {
        let begin = crate::clock::monotonic();
        self.observer.scan()?;
        self.observer.commit()?;
        let degraded = self.observer.unwatched().map(str::to_owned);
        self.next_scan = degraded
            .is_some()
            .then(|| crate::clock::monotonic() + SCAN_EVERY.max(begin.elapsed() * SCAN_SHARE));
        if degraded != self.degraded {
            self.degraded = degraded.clone();
            self.send(ToMount::Watching { degraded })?;
        }
        Ok(())
    }

    fn degrade(&mut self, reason: String) -> Result<(), Error> {
        self.observer.stop_watching(reason);
        self.scan()
    }

    fn check_root(&self) -> Result<(), Error> {
        let served = &self.observer.served;
        if served.is_in_place(&self.observer.reserved) {
            return Ok(());
        }
        Err(Error::RootGone {
            path: served.path.clone(),
        })
    }

    /// Removes the cookies of a session that was cut off.
    fn remove_cookies(&self) -> Result<(), Error> {
        let reserved = &self.observer.reserved;
        let names = crate::tree::scan::names(reserved.dir())
            .map_err(|error| Error::io("list", ".mirrorfs", error))?;
        for name in names {
            if let Ok(name) = String::from_utf8(name)
                && name.starts_with(COOKIE)
            {
                reserved.remove_file(&name)?;
            }
        }
        Ok(())
    }
}
