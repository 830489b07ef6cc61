//! The task behind one peer: feeds the state machine with what happens and carries its
//! commands out.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mirrorfs_journal::ChainLink;
use tokio::sync::{mpsc, oneshot};

use crate::replica::keep::remove_tree;
use crate::replica::{Marks, Partial, Staging};
use crate::transport::{ConnectError, Link};
use crate::tree::{Agreement, ContentHash, Id, RelPath, ReplicaId};
use crate::wire::message::{AgentHello, BaseFrom, DELTAS, MountHello, Refusal, ToAgent, ToMount};
use crate::wire::version::Introduction;

use super::apply::{UNIT_INFO, apply, apply_merged};
use super::deltas::{Deltas, Stretch, counterpart, counterpart_sums, next_stretch};
use super::handle::{Context, Control, FlushOutcome, PeerState, PeerStatus, Preview};
use super::late::{self, Late};
use super::link::Session;
use super::machine::{Command, Event, LinkState, Machine, Planned};
use super::round::{Orders, Resolution, Resume, Round, plan};
use super::work::{Results, blocking, start, start_after};
use super::{Error, merge, store};

#[cfg(test)]
pub(crate) mod simulated;

/// How many things a batch makes on the peer. What there is beyond that goes as further
/// ones.
const MOST: usize = 50_000;

/// Deletions within this time are taken together by the brake.
const LATELY: Duration = Duration::from_secs(30);

/// What a worker thread hands back.
enum Finished {
    Connected(Result<Link, ConnectError>),
    Planned(Box<Result<(Round, Planned), Error>>),
    Applied {
        round: Box<Round>,
        result: Result<Vec<(RelPath, String)>, Error>,
    },
    Sent {
        stretch: Result<ToAgent, String>,
        next: Option<u64>,
    },
    /// Something that is to be sent, and that no stretch of a content waits for.
    Said(ToAgent),
}

/// A stretch of a content that is being fetched.
enum Fetched {
    /// The bytes themselves.
    Bytes(Vec<u8>),
    /// A stretch of what this side has in its place.
    Reused { from: u64, len: u64 },
}

/// How far both sides are with finding out where they stand.
enum Joining {
    /// The agent's chain is coming in, of this replica.
    Chain(ReplicaId, Vec<ChainLink>),
    /// The base of this agreement is coming in.
    Base(Agreement),
    Done,
}

/// What a worker thread hands back, with the number of the link or round it is for.
type Numbered = (u64, Finished);

type Problems = Vec<(RelPath, String)>;

pub(super) struct Driver {
    context: Context,
    machine: Machine,
    started: Instant,
    status: Arc<Mutex<PeerStatus>>,
    session: Option<Session>,
    /// Counts links and rounds, so that what belongs to an older one is recognised.
    link_number: u64,
    round_number: u64,
    round: Option<Arc<Mutex<Round>>>,
    /// The paths of a report of the whole tree, while it is coming in.
    whole: Option<HashSet<RelPath>>,
    joining: Joining,
    incoming: HashMap<ContentHash, Partial>,
    deltas: Deltas,
    flushes: HashMap<u64, oneshot::Sender<FlushOutcome>>,
    next_flush: u64,
    resolutions: HashMap<RelPath, Resolution>,
    resume: Option<Resume>,
    /// Why a brake holds something back, if one does and nobody has said what to do.
    braked: Option<String>,
    /// See [`plan`].
    reports: Arc<Mutex<()>>,
    /// The round that may change the tree. Held while it does, also by one that is given up
    /// meanwhile.
    applying: Arc<Mutex<u64>>,
    finished: Results<Numbered>,
    last_stderr: Option<String>,
    /// What the last round could not do, and what the agent says it cannot.
    problems: (Problems, Problems),
    /// When rounds have deleted files here, and which.
    deleted: Vec<(Instant, Vec<RelPath>)>,
    /// When rounds have made the base grow or shrink, and by how many files.
    grown: Vec<(Instant, isize)>,
    /// The files that rounds have made here lately. If they go again, as what programs
    /// write and rename does, nothing is being wiped.
    created: HashMap<RelPath, Instant>,
    /// Deletions that wait for more of them.
    gathering: Option<usize>,
    /// The local steps that the last round was refused, each by itself.
    balked: BTreeSet<RelPath>,
    /// A simulation is to make a link.
    #[cfg(test)]
    dials: bool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    pub(super) fn new(context: Context, machine: Machine, status: Arc<Mutex<PeerStatus>>) -> Self {
        let braked = lock(&status).halt_reason.clone();
        Self {
            braked,
            context,
            machine,
            started: crate::clock::monotonic(),
            status,
            session: None,
            link_number: 0,
            round_number: 0,
            round: None,
            whole: None,
            joining: Joining::Done,
            incoming: HashMap::new(),
            deltas: Deltas::default(),
            flushes: HashMap::new(),
            next_flush: 1,
            resolutions: HashMap::new(),
            resume: None,
            finished: mpsc::unbounded_channel(),
            reports: Arc::default(),
            applying: Arc::default(),
            last_stderr: None,
            problems: Default::default(),
            gathering: None,
            balked: BTreeSet::new(),
            deleted: Vec::new(),
            grown: Vec::new(),
            created: HashMap::new(),
            #[cfg(test)]
            dials: false,
        }
    }

    pub(super) async fn run(mut self, mut controls: mpsc::UnboundedReceiver<Control>) {
        self.feed(Event::Tick).await;
        loop {
            self.publish();
            let deadline = self
                .machine
                .deadline()
                .map_or(Duration::from_secs(3600), |deadline| {
                    deadline
                        .saturating_sub(self.elapsed())
                        .min(Duration::from_secs(3600))
                });
            let event = tokio::select! {
                // What has come in counts before the time that has gone by: this task may
                // have been busy for longer than a peer may be silent.
                biased;
                control = controls.recv() => match control {
                    Some(Control::Stop) | None => break,
                    Some(control) => self.control(control),
                },
                Some((number, finished)) = self.finished.1.recv() => {
                    self.finished(number, finished)
                }
                message = next_message(&mut self.session) => match message {
                    Ok(Some(message)) => {
                        self.message(message).await;
                        None
                    }
                    Ok(None) => Some(Event::Heard),
                    Err(reason) => Some(Event::LinkLost(self.explain(reason))),
                },
                () = tokio::time::sleep(deadline) => Some(Event::Tick),
            };
            if let Some(event) = event {
                self.feed(event).await;
            }
        }
        for (_, answer) in self.flushes.drain() {
            let _ = answer.send(FlushOutcome::Stopped);
        }
    }

    /// The agent has said something.
    async fn message(&mut self, message: ToMount) {
        let expected = self.session.as_mut().map(|session| &mut session.expected);
        if let Some(Err(reason)) = expected.map(|expected| expected.check(&message)) {
            self.feed(Event::LinkLost(reason)).await;
            return;
        }
        self.note(&message);
        let content = match &message {
            ToMount::Fetched { bytes, .. } => Some(bytes.len()),
            _ => None,
        };
        self.feed(Event::Message(message)).await;
        // Stored, or of no use any more.
        if let (Some(bytes), Some(session)) = (content, &mut self.session)
            && let Err(reason) = session.take(bytes)
        {
            self.feed(Event::LinkLost(reason)).await;
        }
    }

    fn control(&mut self, control: Control) -> Option<Event> {
        match control {
            Control::Wake(n) => Some(Event::LocalChanged(n)),
            Control::RetryNow => Some(Event::RetryNow),
            Control::Redial => Some(Event::Redial),
            Control::Resolve { path, resolution } => {
                self.resolutions.insert(path, resolution);
                Some(Event::Stored {
                    news: true,
                    complete: false,
                })
            }
            Control::Resume(resume) => {
                self.resume = Some(resume);
                self.braked = None;
                lock(&self.status).halt_reason = None;
                // A halted link is tried again; one that is up looks at everything again.
                Some(match self.machine.state() {
                    LinkState::Halted => Event::RetryNow,
                    _ => Event::Stored {
                        news: true,
                        complete: false,
                    },
                })
            }
            Control::Flush { n, answer } => {
                if lock(&self.status).halt_reason.is_some() {
                    let _ = answer.send(FlushOutcome::Halted);
                    return None;
                }
                let id = self.next_flush;
                self.next_flush += 1;
                self.flushes.insert(id, answer);
                Some(Event::Flush { id, n })
            }
            Control::Stop => None,
        }
    }

    /// Feeds an event to the machine, carries its commands out, and feeds what comes of
    /// them, until nothing is left.
    async fn feed(&mut self, event: Event) {
        self.carry_out(event).await;
        // Somebody who stopped waiting does not hold anything up.
        let gone: Vec<u64> = self
            .flushes
            .iter()
            .filter(|(_, answer)| answer.is_closed())
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.flushes.remove(&id);
            self.carry_out(Event::FlushCancelled(id)).await;
        }
    }

    /// The machine's time.
    fn elapsed(&self) -> Duration {
        crate::clock::monotonic().duration_since(self.started)
    }

    async fn carry_out(&mut self, event: Event) {
        let mut commands: VecDeque<Command> = self.machine.handle(self.elapsed(), event).into();
        while let Some(command) = commands.pop_front() {
            let event = match self.execute(command).await {
                Ok(event) => event,
                Err(error) => Some(Event::RoundFailed(error.to_string())),
            };
            if let Some(event) = event {
                commands.extend(self.machine.handle(self.elapsed(), event));
            }
        }
    }

    async fn execute(&mut self, command: Command) -> Result<Option<Event>, Error> {
        let journal = self.context.journal.clone();
        let peer = self.context.peer;
        match command {
            Command::Connect => self.connect(),
            Command::Disconnect => {
                self.session = None;
                self.link_number += 1;
                self.whole = None;
            }
            Command::SendHello => {
                let hello = self.hello()?;
                let applying = Arc::clone(&self.applying);
                let hello = blocking(move || {
                    // What the last link's round does to the tree comes to its end, or to
                    // nothing: from the base that it leaves the peer's reports are told.
                    *lock(&applying) = 0;
                    store::hello(&journal, peer, hello)
                });
                let mut hello = hello.await?;
                if self.resume.is_some() {
                    // Whoever is there now is the peer.
                    hello.peer = None;
                }
                return Ok(self.send(&ToAgent::Hello(hello)));
            }
            Command::Send(message) => return Ok(self.send(&message)),
            Command::Meet(hello) => return Ok(self.meet(*hello).await),
            Command::Rejoin { links, more } => {
                return Ok(Some(match self.rejoin(links, more).await {
                    Ok(None) => return Ok(None),
                    Ok(Some(event)) => event,
                    Err(error) => Event::LinkLost(error.to_string()),
                }));
            }
            Command::StoreBase { rows, more } => {
                let Joining::Base(at) = self.joining else {
                    let reason = "the agent sent a base that nobody asked for".to_owned();
                    return Ok(Some(Event::LinkLost(reason)));
                };
                let complete = (!more).then_some(at);
                let stored = blocking(move || store::take_base(&journal, peer, rows, complete));
                return Ok(match stored.await {
                    Ok(()) if more => None,
                    Ok(()) => Some(self.joined()),
                    Err(error) => Some(Event::LinkLost(error.to_string())),
                });
            }
            Command::Store {
                observations,
                complete,
                upto,
            } => {
                if !matches!(self.joining, Joining::Done) {
                    let reason = "the agent reports before it is known from where on";
                    return Ok(Some(Event::LinkLost(reason.to_owned())));
                }
                if let Some(whole) = &mut self.whole {
                    whole.extend(
                        observations
                            .iter()
                            .map(|observation| observation.path.clone()),
                    );
                }
                let absent_but = if complete { self.whole.take() } else { None };
                let upto = complete.then_some(upto);
                let in_round = self.machine.in_round();
                let reports = Arc::clone(&self.reports);
                let stored = blocking(move || {
                    let _reports = lock(&reports);
                    store::observe(&journal, peer, observations, absent_but, upto, in_round)
                });
                return Ok(Some(match stored.await {
                    Ok(news) => Event::Stored { news, complete },
                    // What could not be stored is reported again by the next session.
                    Err(error) => Event::LinkLost(error.to_string()),
                }));
            }
            Command::NoteLate { path, at, since } => {
                let on = Some(peer);
                let late = Late {
                    on,
                    path,
                    at,
                    since,
                };
                blocking(move || late::told(&journal, late)).await?;
            }
            Command::Plan { agree } => self.plan(agree),
            Command::StoreFetched {
                request,
                hash,
                offset,
                bytes,
                last,
            } => {
                let stretch = Fetched::Bytes(bytes);
                let result = self.store_fetched(hash, offset, stretch, last).await;
                return Ok(Some(Event::FetchStored { request, result }));
            }
            Command::StoreReused {
                request,
                hash,
                offset,
                len,
                from,
                last,
            } => {
                let stretch = Fetched::Reused { from, len };
                let result = self.store_fetched(hash, offset, stretch, last).await;
                return Ok(Some(Event::FetchStored { request, result }));
            }
            Command::SendSums {
                request,
                hash,
                block,
            } => return Ok(self.send_sums(request, hash, block)),
            Command::FetchFailed(hash) => {
                self.incoming.remove(&hash);
                if let Some(round) = &self.round {
                    let mut round = lock(round);
                    round.missing.insert(hash);
                    if round.fetched_like.contains_key(&hash) {
                        self.deltas.failed(hash);
                    }
                }
            }
            Command::ApplyLocal => self.apply_local()?,
            Command::SendContent { hash, offset } => return Ok(self.send_content(hash, offset)),
            Command::TakeSums { hash, offset, sums } => {
                let round = self.current_round()?;
                let old = lock(&round).olds.get(&hash).cloned();
                if self.deltas.answered(hash, old.as_ref(), &sums) {
                    return Ok(self.send_content(hash, offset));
                }
            }
            Command::Propose(_) => {
                let round = self.current_round()?;
                let reserved = Arc::clone(&self.context.tree.reserved);
                let agreed = blocking(move || {
                    let mut round = lock(&round);
                    round.advanced = store::propose(&journal, reserved, &round)?;
                    Ok(round.agreed())
                })
                .await?;
                for piece in &agreed {
                    if let Some(lost) = self.send(piece) {
                        return Ok(Some(lost));
                    }
                }
                return Ok(Some(Event::Proposed));
            }
            Command::Accept { diverged, upto } => {
                let round = self.current_round()?;
                let filesystem = Arc::clone(&self.context.tree.filesystem);
                let n = blocking(move || {
                    let mut round = lock(&round);
                    let released = store::accept(&journal, &mut round, &diverged, upto)?;
                    record_again(&filesystem, &released);
                    Ok(round.covered)
                })
                .await;
                // Without the base the session cannot go on: the next one finds out by
                // the agreement what was applied.
                return Ok(Some(match n {
                    Ok(n) => self.accepted(n),
                    Err(error) => Event::LinkLost(error.to_string()),
                }));
            }
            Command::Advance => {
                let round = self.current_round()?;
                let filesystem = Arc::clone(&self.context.tree.filesystem);
                let n = blocking(move || {
                    let mut round = lock(&round);
                    let released = store::advance(&journal, &mut round)?;
                    record_again(&filesystem, &released);
                    Ok(round.covered)
                })
                .await?;
                return Ok(Some(self.accepted(n)));
            }
            Command::EndRound => {
                self.round = None;
                self.round_number += 1;
                self.incoming.clear();
                self.deltas.end();
                lock(&self.status).pending_bytes = 0;
            }
            Command::Durable(n) => {
                blocking(move || store::durable(&journal, peer, n)).await?;
            }
            Command::FlushDone { id, reached } => {
                if let Some(answer) = self.flushes.remove(&id) {
                    let halted = lock(&self.status).halt_reason.is_some();
                    let outcome = match (reached, halted) {
                        (_, true) => FlushOutcome::Halted,
                        (true, false) => FlushOutcome::Durable,
                        (false, false) => FlushOutcome::Unreachable,
                    };
                    let _ = answer.send(outcome);
                }
            }
        }
        Ok(None)
    }

    fn connect(&mut self) {
        self.link_number += 1;
        #[cfg(test)]
        if crate::sim::jobs::is_simulated() {
            self.dials = true;
            return;
        }
        let number = self.link_number;
        let (connect, finished) = (self.context.connect.clone(), self.finished.0.clone());
        start(move || {
            let _ = finished.send((number, Finished::Connected(connect())));
        });
    }

    fn hello(&self) -> Result<MountHello, Error> {
        let session = Id::random().map_err(|_| Error::Random)?;
        let Context {
            mirror, replica, ..
        } = self.context;
        Ok(Introduction::hello(mirror, replica, session))
    }

    async fn meet(&mut self, hello: AgentHello) -> Option<Event> {
        let (journal, peer) = (self.context.journal.clone(), self.context.peer);
        let expected = {
            let journal = journal.clone();
            blocking(move || store::expected(&journal, peer, hello.replica)).await
        };
        let expected = match expected {
            Ok((expected, None)) => Ok(expected),
            Ok((_, Some(other))) => {
                let reason = format!(
                    "the directory at the peer's place is that of the peer {other} already: \
                     remove one of the two with mirrorfs peer remove"
                );
                lock(&self.status).halt_reason = Some(reason.clone());
                return Some(Event::Halted(reason));
            }
            Err(error) => Err(error),
        };
        match expected {
            Ok(Some(expected)) if expected != hello.replica && self.resume.is_none() => {
                let reason = format!(
                    "another directory is at the peer's place (replica {}, expected {expected}): \
                     nothing is exchanged until you say so with mirrorfs resume",
                    hello.replica
                );
                lock(&self.status).halt_reason = Some(reason.clone());
                return Some(Event::Halted(reason));
            }
            Ok(_) => {}
            Err(error) => return Some(Event::LinkLost(error.to_string())),
        }
        self.whole = hello.whole.then(HashSet::new);
        let common = Introduction::own().common(&(&hello).into());
        self.deltas.on =
            common.is_some_and(|common| common.features.iter().any(|name| name == DELTAS));
        self.joining = Joining::Chain(hello.replica, Vec::new());
        match blocking(move || store::meet(&journal, peer, &hello)).await {
            Ok(Some(standing)) => {
                self.joining = Joining::Done;
                Some(Event::Met {
                    cursor: standing.cursor,
                    durable: standing.durable,
                    anew: false,
                })
            }
            Ok(None) => None,
            Err(error) => Some(Event::LinkLost(error.to_string())),
        }
    }

    /// Takes in a piece of the agent's chain; after the last one both sides begin again at
    /// the last agreement that they share.
    async fn rejoin(&mut self, links: Vec<ChainLink>, more: bool) -> Result<Option<Event>, Error> {
        let Joining::Chain(replica, chain) = &mut self.joining else {
            return Err(Error::Unsettled);
        };
        chain.extend(links);
        if more {
            return Ok(None);
        }
        let (replica, chain) = (*replica, std::mem::take(chain));
        let (journal, peer) = (self.context.journal.clone(), self.context.peer);
        let reserved = Arc::clone(&self.context.tree.reserved);
        let (at, base, pieces) = blocking(move || {
            let mark = Marks::of(&reserved)?.with(replica);
            let (at, base) = store::rejoin(&journal, peer, chain, mark)?;
            if at.is_none() {
                Marks::write(&reserved, [(replica, None)])?;
            }
            let pieces = match base {
                BaseFrom::Mount => store::base_pieces(&journal, peer)?,
                BaseFrom::Both | BaseFrom::Agent => Vec::new(),
            };
            Ok((at, base, pieces))
        })
        .await?;
        for message in std::iter::once(&ToAgent::Rejoin { at, base }).chain(&pieces) {
            if let Some(lost) = self.send(message) {
                return Ok(Some(lost));
            }
        }
        if let (BaseFrom::Agent, Some(at)) = (base, at) {
            self.joining = Joining::Base(at);
            return Ok(None);
        }
        Ok(Some(self.joined()))
    }

    fn joined(&mut self) -> Event {
        self.joining = Joining::Done;
        Event::Met {
            cursor: 0,
            durable: 0,
            anew: true,
        }
    }

    fn send(&mut self, message: &ToAgent) -> Option<Event> {
        let session = self.session.as_ref()?;
        session.send(message).err().map(Event::LinkLost)
    }

    fn plan(&mut self, agree: bool) {
        self.round_number += 1;
        let number = self.round_number;
        let now = crate::clock::monotonic();
        self.deleted
            .retain(|(at, files)| !files.is_empty() && now.duration_since(*at) < LATELY);
        self.grown
            .retain(|(at, files)| *files != 0 && now.duration_since(*at) < LATELY);
        self.created
            .retain(|_, at| now.duration_since(*at) < LATELY);
        let orders = Orders {
            policy: self.context.policy,
            resume: self.resume,
            deletions_before: self.gathering,
            deleted_lately: self
                .deleted
                .iter()
                .flat_map(|(_, files)| files.clone())
                .collect(),
            grown_lately: self.grown.iter().map(|(_, files)| *files).collect(),
            resolutions: self.resolutions.clone(),
            balked: self.balked.clone(),
            agree,
            name_artefacts: self.context.name_artefacts.load(Ordering::Relaxed),
            most: Some(MOST),
            like: self.deltas.orders(),
        };
        let (context, finished) = (self.context.clone(), self.finished.0.clone());
        let reports = Arc::clone(&self.reports);
        start(move || {
            let mut planned = plan(
                &context.journal,
                &context.tree.filesystem,
                context.peer,
                &orders,
                &reports,
            );
            if let Ok((round, planned)) = &mut planned {
                go_on(&context.tree.staging, round, planned);
            }
            let _ = finished.send((number, Finished::Planned(Box::new(planned))));
        });
    }

    fn current_round(&self) -> Result<Arc<Mutex<Round>>, Error> {
        self.round
            .clone()
            .ok_or_else(|| Error::Worker("no round is under way".to_owned()))
    }

    /// A round has come to its end: what was ordered for it is done.
    fn accepted(&mut self, n: u64) -> Event {
        if let Some(round) = &self.round {
            let round = lock(round);
            self.gathering = round.gathering;
            let now = crate::clock::monotonic();
            let old = round
                .deleted()
                .filter(|path| !self.created.contains_key(*path));
            self.deleted.push((now, old.cloned().collect()));
            self.grown.push((now, round.growth()));
            self.created
                .extend(round.created().map(|path| (path.clone(), now)));
            let mut status = lock(&self.status);
            self.braked = round.braked();
            status.halt_reason.clone_from(&self.braked);
            status.wiped = round.brakes.wiped().to_vec();
            self.problems.0.clone_from(&round.problems);
            status.problems = self.problems();
            // An order that came while the round was under way is for the next one.
            self.resolutions.retain(|path, resolution| {
                round.resolutions.get(path) != Some(resolution)
                    || !round.plan.decisions.contains_key(path)
            });
            if self.braked.is_none() && round.gathering.is_none() && round.resume == self.resume {
                self.resume = None;
            }
        }
        self.forget_staged();
        self.forget_kept();
        self.keep_contents();
        Event::Accepted(n)
    }

    /// What was brought into staging for the round, and is in the tree by now, goes. (What
    /// a round that failed has fetched stays for the next one.)
    fn forget_staged(&self) {
        let Some(round) = &self.round else { return };
        let hashes = lock(round).staged_contents();
        if hashes.is_empty() {
            return;
        }
        let staging = Arc::clone(&self.context.tree.staging);
        start(move || {
            for hash in hashes {
                // Another peer's round may be about to use it: then that one fetches it.
                if let Err(error) = staging.forget(hash) {
                    tracing::warn!(%error, "a content stays in staging until the next mount");
                    return;
                }
            }
        });
    }

    /// Small texts that both sides have just agreed on are kept, so that what becomes of
    /// them can be told and merged in a conflict.
    fn keep_contents(&self) {
        let (Some(round), Some(contents)) = (&self.round, &self.context.contents) else {
            return;
        };
        let worth = merge::worth_keeping(&lock(round));
        if worth.is_empty() {
            return;
        }
        let (tree, contents) = (self.context.tree.clone(), Arc::clone(contents));
        start(move || {
            if let Err(error) = merge::keep(&tree, &contents, worth) {
                tracing::warn!(%error, "the content of a base is not kept");
            }
        });
    }

    /// What was kept of a peer's Git directory goes when its conflict is over, or when a
    /// newer version is kept.
    fn forget_kept(&self) {
        let Some(round) = &self.round else { return };
        let outdated = lock(round).outdated();
        if outdated.is_empty() {
            return;
        }
        let reserved = Arc::clone(&self.context.tree.reserved);
        start(move || {
            for name in outdated {
                for name in [format!("{name}{UNIT_INFO}"), name] {
                    if let Err(error) = remove_tree(reserved.conflicts(), name.as_bytes()) {
                        tracing::warn!(%error, name, "stays in .mirrorfs/conflicts");
                    }
                }
            }
        });
    }

    fn apply_local(&mut self) -> Result<(), Error> {
        let round = self.round.take();
        let number = self.round_number;
        let (tree, journal) = (self.context.tree.clone(), self.context.journal.clone());
        let finished = self.finished.0.clone();
        let Some(round) = round.and_then(Arc::into_inner) else {
            return Err(Error::Worker("the round is in use".to_owned()));
        };
        let mut round = Box::new(round.into_inner().unwrap_or_else(PoisonError::into_inner));
        let contents = self.context.contents.clone().filter(|_| self.context.merge);
        let applying = Arc::clone(&self.applying);
        *lock(&applying) = number;
        start(move || {
            let applying = lock(&applying);
            if *applying != number {
                return;
            }
            let merged = match contents {
                Some(contents) => apply_merged(&tree, &journal, &mut round, &contents),
                None => Ok(Vec::new()),
            };
            let result = merged.and_then(|mut unfinished| {
                store::announce_artefacts(&journal, &round)?;
                unfinished.extend(apply(&tree, &journal, &mut round)?);
                store::open_conflicts(&journal, &round)?;
                Ok(unfinished)
            });
            let _ = finished.send((number, Finished::Applied { round, result }));
        });
        Ok(())
    }

    async fn store_fetched(
        &mut self,
        hash: ContentHash,
        offset: u64,
        stretch: Fetched,
        last: bool,
    ) -> Result<bool, String> {
        let round = self.round.clone();
        let size = match &round {
            Some(round) => lock(round).incoming.get(&hash).copied(),
            None => None,
        };
        let (Some(size), Some(round)) = (size, round) else {
            return Err("nobody asked for this content".to_owned());
        };
        let partial = self.incoming.remove(&hash);
        let staging = self.context.tree.staging.clone();
        let store = move || {
            let mut incoming = match partial {
                Some(partial) => staging.resume(partial),
                None => staging.begin(hash, size)?,
            };
            // Another peer's round may have brought more of it meanwhile.
            let known = incoming.have().saturating_sub(offset);
            match stretch {
                Fetched::Bytes(bytes) => {
                    let skip = usize::try_from(known)
                        .unwrap_or(usize::MAX)
                        .min(bytes.len());
                    incoming.append(offset + skip as u64, &bytes[skip..])?;
                }
                Fetched::Reused { from, len } => {
                    let skip = known.min(len);
                    let (file, _) = counterpart(&lock(&round), hash)?;
                    let old = |buffer: &mut [u8], at| file.read_at(buffer, at);
                    let from = from.saturating_add(skip);
                    incoming.append_from(offset.saturating_add(skip), &old, from, len - skip)?;
                }
            }
            if last {
                incoming.finish()?;
                return Ok(None);
            }
            Ok::<_, crate::replica::Error>(Some(incoming.set_aside()))
        };
        let stored = blocking(move || Ok(store()))
            .await
            .map_err(|error| error.to_string())?;
        match stored.map_err(|error| error.to_string())? {
            Some(partial) => {
                self.incoming.insert(hash, partial);
                Ok(false)
            }
            None => Ok(true),
        }
    }

    /// Reads a stretch as it was at the cut and hands it over once there is room.
    fn send_content(&mut self, hash: ContentHash, offset: u64) -> Option<Event> {
        let (Some(round), Some(session)) = (self.round.clone(), &self.session) else {
            return Some(Event::ContentGone("the round is over".to_owned()));
        };
        let (contents, finished) = (session.contents(), self.finished.0.clone());
        let number = self.round_number;
        let known = self.deltas.known();
        start_after(async move { contents.room().await }, move |room| {
            let (stretch, next) = match next_stretch(&round, &known, hash, offset, room) {
                Ok(Stretch::Next(message, next)) => (Ok(message), next),
                Ok(Stretch::Ask(question)) => {
                    let _ = finished.send((number, Finished::Said(question)));
                    return;
                }
                Err(reason) => (Err(reason), None),
            };
            let _ = finished.send((number, Finished::Sent { stretch, next }));
        });
        None
    }

    /// Tells the agent the sums of what this side has in place of what it fetches.
    fn send_sums(&mut self, request: u64, hash: Option<ContentHash>, block: u32) -> Option<Event> {
        let (Some(round), Some(hash)) = (self.round.clone(), hash) else {
            return self.send(&ToAgent::Sums {
                request,
                block,
                sums: Vec::new(),
            });
        };
        let (finished, number) = (self.finished.0.clone(), self.round_number);
        start(move || {
            let sums = counterpart_sums(&round, request, hash, block);
            let _ = finished.send((number, Finished::Said(sums)));
        });
        None
    }

    fn finished(&mut self, number: u64, finished: Finished) -> Option<Event> {
        match finished {
            Finished::Connected(_) if number != self.link_number => None,
            Finished::Connected(Ok(link)) => {
                lock(&self.status).transport =
                    Some((link.transport.to_string(), link.reason.clone()));
                match Session::start(link, self.context.deadline) {
                    Ok(session) => {
                        self.session = Some(session);
                        Some(Event::Connected)
                    }
                    Err(error) => Some(Event::LinkLost(error.to_string())),
                }
            }
            Finished::Connected(Err(error)) => Some(Event::LinkLost(error.to_string())),
            _ if number != self.round_number => None,
            Finished::Planned(planned) => match *planned {
                Ok((round, _)) if self.context.dry_run => {
                    lock(&self.status).preview = Some(round.preview());
                    None
                }
                Ok((round, planned)) => {
                    if tracing::enabled!(tracing::Level::DEBUG) {
                        for Preview {
                            action,
                            change,
                            path,
                        } in round.preview()
                        {
                            tracing::debug!("{action} {change} {path}");
                        }
                    }
                    lock(&self.status).pending_bytes = planned
                        .ops
                        .iter()
                        .filter_map(|op| op.content())
                        .map(|(_, size)| size)
                        .sum();
                    self.round = Some(Arc::new(Mutex::new(round)));
                    Some(Event::Planned(planned))
                }
                Err(error) => Some(Event::RoundFailed(error.to_string())),
            },
            Finished::Applied { round, result } => {
                self.balked.clone_from(&round.balked);
                self.round = Some(Arc::new(Mutex::new(*round)));
                Some(match result {
                    Ok(refused) => Event::LocalApplied {
                        refused,
                        agree: true,
                    },
                    Err(error) => Event::RoundFailed(error.to_string()),
                })
            }
            Finished::Sent { stretch, next } => match stretch {
                Ok(message) => {
                    let (len, bytes) = match &message {
                        ToAgent::Data { bytes, .. } => (bytes.len() as u64, bytes.len()),
                        ToAgent::Reuse { len, .. } => (*len, 0),
                        _ => (0, 0),
                    };
                    self.deltas.sends(&message);
                    let session = self.session.as_ref()?;
                    let mut status = lock(&self.status);
                    status.pending_bytes = status.pending_bytes.saturating_sub(len);
                    match session.contents().send(&message, bytes) {
                        Ok(()) => Some(Event::ContentSent { next }),
                        Err(reason) => Some(Event::LinkLost(reason)),
                    }
                }
                Err(reason) => Some(Event::ContentGone(reason)),
            },
            Finished::Said(message) => {
                self.deltas.sends(&message);
                self.send(&message)
            }
        }
    }

    /// What a message says to people rather than to the machine.
    fn note(&mut self, message: &ToMount) {
        match message {
            ToMount::Problems { problems } => {
                self.problems.1.clone_from(problems);
                lock(&self.status).problems = self.problems();
            }
            ToMount::Failed { .. } => self.deltas.batch_failed(),
            ToMount::Watching { degraded } => lock(&self.status).degraded.clone_from(degraded),
            ToMount::Refused { refusal } if !matches!(refusal, Refusal::Failed { .. }) => {
                lock(&self.status).halt_reason = Some(refusal.to_string());
            }
            ToMount::Hello(hello) => {
                // What another agent could not do is not this one's problem: its list
                // begins empty, and it tells only of changes.
                self.problems.1.clear();
                let problems = self.problems();
                let mut status = lock(&self.status);
                status.halt_reason.clone_from(&self.braked);
                status.problems = problems;
                status.version = Some(hello.version.clone());
            }
            _ => {}
        }
    }

    /// What this side and the agent could not do.
    fn problems(&self) -> Problems {
        let mut all = self.problems.0.clone();
        all.extend(self.problems.1.iter().cloned());
        all
    }

    /// Adds what the transport printed to the reason why a link ended.
    fn explain(&mut self, reason: String) -> String {
        let stderr = self.session.as_ref().map(Session::stderr_tail);
        self.last_stderr = stderr.filter(|text| !text.trim().is_empty());
        match &self.last_stderr {
            Some(text) => format!("{reason} ({})", text.trim()),
            None => reason,
        }
    }

    fn publish(&self) {
        let (applied, durable) = self.machine.positions();
        let mut status = lock(&self.status);
        status.applied_seq = applied;
        status.durable_seq = durable;
        status.settled = self.machine.is_settled();
        status.last_error = self.machine.last_error().map(str::to_owned);
        status.state = match self.machine.state() {
            LinkState::Halted => PeerState::Halted,
            _ if status.halt_reason.is_some() => PeerState::Halted,
            LinkState::Connected => PeerState::Connected,
            LinkState::Connecting => PeerState::Connecting,
            LinkState::Unreachable => PeerState::Unreachable,
        };
    }
}

/// Contents of which an earlier session brought a part are asked for from there on.
fn go_on(staging: &Staging, round: &Round, planned: &mut Planned) {
    for fetch in &mut planned.fetches {
        let size = round.incoming.get(&fetch.hash).copied().unwrap_or(0);
        // What cannot be looked at is asked for in full, and what is too long is no part.
        fetch.have = staging
            .held(fetch.hash)
            .ok()
            .filter(|held| *held <= size)
            .unwrap_or(0);
    }
}

async fn next_message(session: &mut Option<Session>) -> Result<Option<ToMount>, String> {
    match session {
        Some(session) => match session.incoming.recv().await {
            Some(message) => message,
            None => Err("the connection to the agent ended".to_owned()),
        },
        None => std::future::pending().await,
    }
}

/// Wakes everybody for artefacts that are files like any other now. What is not there any
/// more is no matter.
fn record_again(filesystem: &crate::fs::Filesystem, released: &[RelPath]) {
    for path in released {
        if let Err(error) = filesystem.record_again(path) {
            tracing::debug!(%path, ?error, "not recorded again");
        }
    }
}
