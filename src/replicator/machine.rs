//! The replication state machine of one peer: events in, commands out. It does no I/O,
//! knows no clock but the one it is told, and draws no random numbers, so that a test
//! can run both ends from one seed.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use mirrorfs_journal::ChainLink;

use super::late::At;
use crate::tree::{Agreement, ContentHash, Entry, Id, RelPath, Timestamp};
use crate::wire::message::{
    AgentHello, DEADLINE, Divergence, Observation, Op, Refusal, Revision, ToAgent, ToMount, Want,
};

/// How often a silent peer is asked whether it is there, at the least.
const PING_EVERY: Duration = Duration::from_millis(3750);
/// Changes are collected until nothing has happened for this long ...
const QUIET: Duration = Duration::from_millis(4);
/// ... but a batch is not put off for longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How many contents are asked for at once.
const FETCHES: usize = 32;
/// First and longest pause before a connection is tried again, without the up to a quarter
/// more that makes it different for each peer and attempt: from 1 to 30 seconds in all.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(24));
/// How often a peer that waits for a person is looked at.
const HALTED: Duration = Duration::from_secs(5);
/// First and longest pause before work that could not be done is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A flush does not wait for what has been tried until the pause was this long, which is
/// after about three seconds.
const HOPELESS: Duration = Duration::from_millis(1600);

/// How often something is looked at again that could not be read.
const RELOOK: Duration = Duration::from_secs(10);

/// Time since the machine was made.
pub type Now = Duration;

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The link is up and both sides have shown their magic.
    Connected,
    /// There is no link, or no longer.
    LinkLost(String),
    /// The link cannot come up without somebody's help.
    Halted(String),
    /// Part of a message has come in: the peer is there, and its link is slow.
    Heard,
    /// The agent spoke.
    Message(ToMount),
    /// Both sides know where they stand: the cursor, and up to where the peer holds local
    /// changes durably. `anew` if everything has to be compared.
    Met {
        /// Local changes up to here are in the base.
        cursor: u64,
        /// Up to here they are durable on the peer.
        durable: u64,
        /// Whether one of the sides turned out to be of another time.
        anew: bool,
    },
    /// Observations have been stored; whether any of them is news.
    Stored {
        /// Whether something differs from the base.
        news: bool,
        /// Whether this completed the report of a whole tree or its end.
        complete: bool,
    },
    /// The tree has changed, up to this number.
    LocalChanged(u64),
    /// A round was planned.
    Planned(Planned),
    /// A fetched stretch has been stored.
    FetchStored {
        /// The request it belongs to.
        request: u64,
        /// Whether the content is complete and verified; an error ends the request.
        result: Result<bool, String>,
    },
    /// The local steps have been carried out.
    LocalApplied {
        /// Steps that must wait, with their cause.
        refused: Vec<(RelPath, String)>,
        /// Whether anything is left to agree on.
        agree: bool,
    },
    /// The base that is to hold has been written down as proposed.
    Proposed,
    /// The base holds, and the cursor stands at this number.
    Accepted(u64),
    /// A stretch of content has been handed to the link.
    ContentSent {
        /// Where the next stretch starts; none if that was the last.
        next: Option<u64>,
    },
    /// A content cannot be read as it was at the cut.
    ContentGone(String),
    /// Something local failed; the round is over.
    RoundFailed(String),
    /// Somebody wants everything up to `n` to be durable on the peer.
    Flush {
        /// Names the answer.
        id: u64,
        /// The last change that counts.
        n: u64,
    },
    /// Nobody waits for that flush any more.
    FlushCancelled(u64),
    /// Try at once what was put off.
    RetryNow,
    /// The peer has made a new link: whatever there is of an older one is dead.
    Redial,
    /// A deadline passed.
    Tick,
}

/// What is to be done, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Open a link.
    Connect,
    /// Give the link up.
    Disconnect,
    /// Say hello, as what is stored has it.
    SendHello,
    /// Send a message.
    Send(ToAgent),
    /// Take up what the agent's hello says about agreements; the base may be forgotten.
    Meet(Box<AgentHello>),
    /// Find out from a piece of the agent's chain from where on both sides go on.
    Rejoin {
        /// The agreements of the piece.
        links: Vec<ChainLink>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// Store a piece of the base.
    StoreBase {
        /// Its rows.
        rows: Vec<(RelPath, Entry)>,
        /// Whether further pieces follow.
        more: bool,
    },
    /// Put a late version that lies on the peer on record.
    NoteLate {
        /// Where the file was.
        path: RelPath,
        /// Where it is now.
        at: At,
        /// When that was noticed.
        since: Timestamp,
    },
    /// Store what the agent saw, then answer with [`Event::Stored`].
    Store {
        /// The observations.
        observations: Vec<Observation>,
        /// Whether the report is complete with them.
        complete: bool,
        /// Up to where it goes.
        upto: Revision,
    },
    /// Take a cut, look at all three sides and decide.
    Plan {
        /// Agree even on nothing: what the peer holds is not known to be durable.
        agree: bool,
    },
    /// Store a stretch of fetched content.
    StoreFetched {
        /// The request.
        request: u64,
        /// The content it belongs to.
        hash: ContentHash,
        /// Where the stretch starts.
        offset: u64,
        /// The stretch.
        bytes: Vec<u8>,
        /// Whether it is the last.
        last: bool,
    },
    /// A content that was asked for cannot be had in this round.
    FetchFailed(ContentHash),
    /// The same for a stretch of the content that this side has and that the fetched one
    /// is told by.
    StoreReused {
        /// The request.
        request: u64,
        /// The content it belongs to.
        hash: ContentHash,
        /// Where the stretch starts.
        offset: u64,
        /// Its length.
        len: u64,
        /// Where it starts in the content that this side has.
        from: u64,
        /// Whether it is the last.
        last: bool,
    },
    /// Tell the sums of the content that this side has and that the fetched one is like.
    SendSums {
        /// The request.
        request: u64,
        /// The content that is fetched; none if it is not fetched any more.
        hash: Option<ContentHash>,
        /// The size of the blocks.
        block: u32,
    },
    /// Carry out the local steps.
    ApplyLocal,
    /// Read a stretch of content as it was at the cut and send it.
    SendContent {
        /// The content.
        hash: ContentHash,
        /// From which byte on.
        offset: u64,
    },
    /// The agent tells the sums of a content that it has: go on sending the one that was
    /// to be told by it.
    TakeSums {
        /// The content that is being sent.
        hash: ContentHash,
        /// From which byte on.
        offset: u64,
        /// The sums.
        sums: Vec<u8>,
    },
    /// Write down the base that holds once the agent has committed.
    Propose(Agreement),
    /// The agent has committed: the base holds but for the steps that diverged.
    Accept {
        /// What was not carried out.
        diverged: Vec<Divergence>,
        /// The agent's own changes up to here are known.
        upto: Revision,
    },
    /// Nothing needs an agreement: only move the cursor.
    Advance,
    /// The cut is not needed any more.
    EndRound,
    /// Everything up to this number is durable on the peer.
    Durable(u64),
    /// A flush has ended.
    FlushDone {
        /// Which.
        id: u64,
        /// Whether the peer holds everything; if not, it could not be reached.
        reached: bool,
    },
}

/// A round as far as the machine has to know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    /// The cut.
    pub n: u64,
    /// Contents to be had from the peer, with where they were seen.
    pub fetches: Vec<Fetch>,
    /// Whether there is anything to do on the mounted side.
    pub local: bool,
    /// The steps on the peer.
    pub ops: Vec<Op>,
    /// Whether the base changes even without a step.
    pub agree: bool,
    /// A fresh batch identity.
    pub batch: Id,
    /// The agreement that the round makes.
    pub agreement: Agreement,
    /// The reports that the round has taken into account.
    pub seen: Revision,
    /// Changes that wait for something, so that another round is due soon.
    pub waiting: bool,
    /// Something could not be looked at, and is worth another look some time.
    pub unreadable: bool,
    /// There was too much for one batch: another round goes on with the rest at once.
    pub more: bool,
}

/// A content to be had from the peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// Where it was seen.
    pub path: RelPath,
    /// The content.
    pub hash: ContentHash,
    /// How many bytes of it are already here.
    pub have: u64,
    /// A content of this side that it may be like, and its size.
    pub old: Option<(ContentHash, u64)>,
}

#[derive(Debug)]
enum Link {
    Down { until: Now },
    Connecting,
    Greeting,
    Reporting,
    Up,
    Halted { until: Now },
}

#[derive(Debug)]
enum Round {
    Idle,
    Planning,
    Fetching {
        planned: Planned,
        queue: VecDeque<Fetch>,
        open: Vec<(u64, ContentHash)>,
    },
    Applying {
        planned: Planned,
    },
    Offering {
        planned: Planned,
        wants: VecDeque<Want>,
    },
    Sending {
        planned: Planned,
        wants: VecDeque<Want>,
    },
    Proposing {
        planned: Planned,
    },
    Committing {
        planned: Planned,
    },
    Accepting,
}

#[derive(Debug)]
struct Flush {
    id: u64,
    n: u64,
    token: u64,
    drained: bool,
    /// The news that counts: everything that was stored when it began, and when its drain
    /// was answered.
    news: u64,
    /// Once its changes and news have gone through a round: how many batches had been
    /// applied by then. All of those must be durable.
    batches: Option<u64>,
    /// How many more lost links it lives through.
    attempts: u32,
}

/// What a person sees of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// In session.
    Connected,
    /// Trying.
    Connecting,
    /// Tried and failed; trying again later.
    Unreachable,
    /// Waits for somebody's decision.
    Halted,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Machine {
    now: Now,
    link: Link,
    round: Round,
    attempts: u32,
    /// Once the attempt that is under way has failed, the next one follows at once.
    again: bool,
    jitter: u64,
    /// How long nothing may be heard from the peer before its link is given up.
    deadline: Duration,
    heard: Now,
    asked: Now,
    /// The first ping since the peer was last heard.
    unanswered: Option<Now>,
    next_token: u64,
    next_request: u64,
    /// Newest local change, and the cursor: what the last round covered.
    newest: u64,
    cursor: u64,
    durable: u64,
    /// Since when there is something to look at, and when that was last confirmed.
    dirty: Option<(Now, Now)>,
    /// How many times there was news beside local changes; how many of those the round that
    /// is under way takes in, and how many went through a round that ended well.
    news: u64,
    news_planned: u64,
    news_done: u64,
    retry: Option<(Now, Duration)>,
    /// When to look again at what could not be read. Nobody waits for that.
    relook: Option<Now>,
    /// Batches that were applied and are not yet durable, with their cuts.
    undurable: VecDeque<(Id, u64)>,
    /// How many batches were applied so far.
    applied: u64,
    /// The round that is under way leaves something for another one.
    more: bool,
    /// One of the sides was of another time, and no round has ended well since.
    anew: bool,
    flushes: Vec<Flush>,
    last_error: Option<String>,
    commands: Vec<Command>,
}

impl Machine {
    /// A machine for a peer whose cursor and durable number are known. `jitter` spreads
    /// reconnects of several peers.
    pub fn new(cursor: u64, durable: u64, newest: u64, jitter: u64) -> Self {
        Self {
            now: Duration::ZERO,
            link: Link::Down {
                until: Duration::ZERO,
            },
            round: Round::Idle,
            attempts: 0,
            again: false,
            jitter,
            deadline: DEADLINE,
            heard: Duration::ZERO,
            asked: Duration::ZERO,
            unanswered: None,
            next_token: 1,
            next_request: 1,
            newest,
            cursor,
            durable,
            dirty: None,
            news: 0,
            news_planned: 0,
            news_done: 0,
            retry: None,
            relook: None,
            undurable: VecDeque::new(),
            applied: 0,
            more: false,
            anew: false,
            flushes: Vec::new(),
            last_error: None,
            commands: Vec::new(),
        }
    }

    /// The same with another deadline than the usual one.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn ping_every(&self) -> Duration {
        PING_EVERY.min(self.deadline / 4)
    }

    /// The link as a person sees it.
    pub fn state(&self) -> LinkState {
        match self.link {
            Link::Up => LinkState::Connected,
            Link::Halted { .. } => LinkState::Halted,
            Link::Down { .. } if self.attempts > 0 => LinkState::Unreachable,
            Link::Connecting | Link::Greeting if self.attempts > 1 => LinkState::Unreachable,
            _ => LinkState::Connecting,
        }
    }

    /// The last change that the peer is known to hold, and to hold durably.
    pub fn positions(&self) -> (u64, u64) {
        (self.cursor, self.durable)
    }

    /// Why the last thing that failed did so; none once things go well again.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// Whether a round is under way.
    pub fn in_round(&self) -> bool {
        !matches!(self.round, Round::Idle)
    }

    /// Whether nothing is under way and nothing is known to be left to do.
    pub fn is_settled(&self) -> bool {
        matches!(self.link, Link::Up)
            && matches!(self.round, Round::Idle)
            && self.dirty.is_none()
            && self.retry.is_none()
            && self.cursor >= self.newest
            && self.undurable.is_empty()
    }

    /// When [`Event::Tick`] is due next.
    pub fn deadline(&self) -> Option<Now> {
        let mut deadlines = Vec::new();
        match self.link {
            Link::Down { until } | Link::Halted { until } => deadlines.push(until),
            Link::Greeting | Link::Reporting | Link::Up => {
                deadlines.extend(self.given_up());
                deadlines.push(self.heard.max(self.asked) + self.ping_every());
            }
            Link::Connecting => {}
        }
        if matches!((&self.link, &self.round), (Link::Up, Round::Idle)) {
            deadlines.extend(self.round_due());
        }
        deadlines.into_iter().min()
    }

    /// When the link is given up if nothing is heard. Only what was asked can be left
    /// unanswered: this side may have been busy itself, and not have asked in time.
    fn given_up(&self) -> Option<Now> {
        self.unanswered
            .map(|asked| asked + self.deadline.saturating_sub(self.ping_every()))
    }

    fn round_due(&self) -> Option<Now> {
        let dirty = self.dirty.map(|(first, last)| {
            if self.flushes.is_empty() {
                (last + QUIET).min(first + LONGEST_WAIT)
            } else {
                first
            }
        });
        let retry = self.retry.map(|(at, _)| at);
        [dirty, retry, self.relook].into_iter().flatten().min()
    }

    /// Takes an event at its time and says what is to be done. All of it has to be done:
    /// the machine goes on from there.
    #[must_use]
    pub fn handle(&mut self, now: Now, event: Event) -> Vec<Command> {
        self.now = self.now.max(now);
        self.react(event);
        self.run();
        std::mem::take(&mut self.commands)
    }

    fn react(&mut self, event: Event) {
        match event {
            Event::Connected => {
                self.again = false;
                self.link = Link::Greeting;
                self.heard = self.now;
                self.asked = self.now;
                self.unanswered = None;
                self.commands.push(Command::SendHello);
            }
            Event::LinkLost(reason) => self.lose(reason),
            Event::Halted(reason) => self.halt(reason),
            Event::Heard => self.hear(),
            Event::Message(message) => {
                self.hear();
                self.message(message);
            }
            Event::Met {
                cursor,
                durable,
                anew,
            } => {
                self.cursor = cursor;
                self.durable = self.durable.min(durable);
                self.anew |= anew;
            }
            Event::Stored { news, complete } => {
                if news {
                    self.take_news();
                }
                if complete && matches!(self.link, Link::Reporting) {
                    self.link = Link::Up;
                    self.attempts = 0;
                    self.last_error = None;
                    self.take_news();
                    for flush in 0..self.flushes.len() {
                        self.drain(flush);
                    }
                }
            }
            Event::LocalChanged(n) => {
                if n > self.newest {
                    self.newest = n;
                    self.touch();
                }
            }
            Event::Planned(planned) => self.planned(planned),
            Event::FetchStored { request, result } => self.fetched(request, result),
            Event::LocalApplied { refused, agree } => self.applied_locally(refused, agree),
            Event::Proposed => {
                if let Round::Proposing { planned } = self.take_round() {
                    self.commands.push(Command::Send(ToAgent::Commit {
                        batch: planned.batch,
                        agreement: planned.agreement,
                        seen: planned.seen,
                    }));
                    self.round = Round::Committing { planned };
                }
            }
            Event::Accepted(n) => {
                if matches!(self.round, Round::Accepting) {
                    self.round = Round::Idle;
                    self.anew = false;
                    self.news_done = self.news_planned;
                    self.advance(n);
                    self.commands.push(Command::EndRound);
                    if std::mem::take(&mut self.more) {
                        self.take_news();
                    }
                }
            }
            Event::ContentSent { next } => {
                if let Round::Sending { wants, .. } = &mut self.round {
                    match (next, wants.front_mut()) {
                        (Some(next), Some(want)) => want.have = next,
                        _ => drop(wants.pop_front()),
                    }
                    self.send_next();
                }
            }
            Event::ContentGone(reason) => {
                if let Round::Sending { planned, .. } = &self.round {
                    let batch = planned.batch;
                    self.commands
                        .push(Command::Send(ToAgent::Abandon { batch }));
                    self.fail_round(reason);
                }
            }
            Event::RoundFailed(reason) => {
                if !matches!(self.round, Round::Idle) {
                    self.fail_round(reason);
                }
            }
            Event::Flush { id, n } => {
                self.newest = self.newest.max(n);
                if n > self.cursor {
                    self.touch();
                }
                // A link that breaks under a flush is worth another try; one that
                // could not be made is an answer.
                let attempts = if matches!(self.link, Link::Up) { 1 } else { 0 };
                self.flushes.push(Flush {
                    id,
                    n,
                    token: 0,
                    drained: false,
                    news: self.news,
                    batches: None,
                    attempts,
                });
                self.retry_now();
                if matches!(self.link, Link::Up) {
                    self.drain(self.flushes.len() - 1);
                }
            }
            Event::FlushCancelled(id) => self.flushes.retain(|flush| flush.id != id),
            Event::RetryNow => {
                self.retry_now();
            }
            Event::Redial => self.redial(),
            Event::Tick => {}
        }
    }

    fn hear(&mut self) {
        self.heard = self.now;
        self.unanswered = None;
    }

    /// Does whatever is due by now.
    fn run(&mut self) {
        match self.link {
            Link::Down { until } | Link::Halted { until } if until <= self.now => {
                self.link = Link::Connecting;
                self.attempts += 1;
                self.commands.push(Command::Connect);
            }
            Link::Greeting | Link::Reporting | Link::Up => {
                if self.given_up().is_some_and(|due| due <= self.now) {
                    let seconds = self.deadline.as_secs_f32();
                    self.lose(format!(
                        "nothing was heard from the peer for {seconds} seconds"
                    ));
                } else if self.now >= self.heard.max(self.asked) + self.ping_every() {
                    self.asked = self.now;
                    self.unanswered.get_or_insert(self.now);
                    let token = self.token();
                    self.commands.push(Command::Send(ToAgent::Ping { token }));
                }
            }
            _ => {}
        }
        if matches!(self.link, Link::Up) {
            self.finish_flushes();
        }
        if matches!((&self.link, &self.round), (Link::Up, Round::Idle))
            && self.round_due().is_some_and(|due| due <= self.now)
        {
            self.dirty = None;
            self.relook = None;
            self.retry = self
                .retry
                .filter(|(at, _)| *at > self.now)
                .or(self.retry.map(|(_, pause)| (Duration::MAX, pause)));
            self.news_planned = self.news;
            self.round = Round::Planning;
            // A tree that was brought back may not be on its disk yet either.
            let unsure = self.anew || self.durable < self.cursor;
            let agree = unsure && self.undurable.is_empty();
            self.commands.push(Command::Plan { agree });
        }
    }

    fn message(&mut self, message: ToMount) {
        match message {
            ToMount::Hello(hello) => {
                if matches!(self.link, Link::Greeting) {
                    self.link = Link::Reporting;
                    self.commands.push(Command::Meet(Box::new(hello)));
                }
            }
            ToMount::Chain { links, more } => {
                if matches!(self.link, Link::Reporting) {
                    self.commands.push(Command::Rejoin { links, more });
                }
            }
            ToMount::Base { rows, more } => {
                if matches!(self.link, Link::Reporting) {
                    self.commands.push(Command::StoreBase { rows, more });
                }
            }
            ToMount::Refused { refusal } => match refusal {
                Refusal::Failed { .. } => self.lose(refusal.to_string()),
                _ => self.halt(refusal.to_string()),
            },
            ToMount::Observed {
                observations,
                complete,
                upto,
            } => {
                self.commands.push(Command::Store {
                    observations,
                    complete,
                    upto,
                });
            }
            ToMount::Need { batch, wants, more } => {
                let Round::Offering {
                    planned,
                    wants: known,
                } = &mut self.round
                else {
                    return;
                };
                if planned.batch != batch {
                    return;
                }
                // One for each content at the most, whatever the agent says.
                let room = planned.ops.len().saturating_sub(known.len());
                known.extend(wants.into_iter().take(room));
                if !more && let Round::Offering { planned, wants } = self.take_round() {
                    let offered: HashSet<ContentHash> = planned
                        .ops
                        .iter()
                        .filter_map(Op::content)
                        .map(|(hash, _)| hash)
                        .collect();
                    let wants = wants
                        .into_iter()
                        .filter(|want| offered.contains(&want.hash));
                    self.round = Round::Sending {
                        wants: wants.collect(),
                        planned,
                    };
                    self.send_next();
                }
            }
            ToMount::Applied {
                batch,
                diverged,
                upto,
            } => {
                if let Round::Committing { planned } = &self.round
                    && planned.batch == batch
                {
                    self.undurable.push_back((batch, planned.n));
                    self.applied += 1;
                    if !diverged.is_empty() {
                        self.last_error = diverged.first().map(|first| first.reason.clone());
                        self.put_off();
                    }
                    self.round = Round::Accepting;
                    self.commands.push(Command::Accept { diverged, upto });
                }
            }
            ToMount::Durable { batch } => {
                let at = self.undurable.iter().position(|(known, _)| *known == batch);
                let last = at.and_then(|at| self.undurable.drain(..=at).next_back());
                if let Some((_, n)) = last {
                    let n = if self.undurable.is_empty() {
                        n.max(self.cursor)
                    } else {
                        n
                    };
                    self.make_durable(n);
                }
            }
            ToMount::Failed { batch, reason } => {
                let current = match &self.round {
                    Round::Offering { planned, .. }
                    | Round::Sending { planned, .. }
                    | Round::Proposing { planned }
                    | Round::Committing { planned } => planned.batch == batch,
                    _ => false,
                };
                if current {
                    self.fail_round(reason);
                }
            }
            // Of an earlier round or session, an answer may come late.
            ToMount::Fetched { request, .. } | ToMount::FetchFailed { request, .. }
                if request >= self.next_request =>
            {
                self.lose("the agent sent a content that nobody asked for".to_owned());
            }
            ToMount::Fetched {
                request,
                offset,
                bytes,
                last,
            } => {
                if let Some(hash) = self.fetching(request) {
                    self.commands.push(Command::StoreFetched {
                        request,
                        hash,
                        offset,
                        bytes,
                        last,
                    });
                }
            }
            ToMount::Reused {
                request,
                offset,
                len,
                from,
                last,
            } => {
                if let Some(hash) = self.fetching(request) {
                    self.commands.push(Command::StoreReused {
                        request,
                        hash,
                        offset,
                        len,
                        from,
                        last,
                    });
                }
            }
            ToMount::AskSums { request, block } => {
                let hash = self.fetching(request);
                self.commands.push(Command::SendSums {
                    request,
                    hash,
                    block,
                });
            }
            ToMount::Sums { hash, sums } => {
                if let Round::Sending { wants, .. } = &self.round
                    && let Some(want) = wants.front()
                    && want.hash == hash
                {
                    let offset = want.have;
                    self.commands.push(Command::TakeSums { hash, offset, sums });
                }
            }
            ToMount::FetchFailed { request, reason } => self.fetched(request, Err(reason)),
            ToMount::Drained { token } => {
                // What the agent reported before has been stored by now.
                for flush in &mut self.flushes {
                    if flush.token == token {
                        flush.drained = true;
                        flush.news = self.news;
                    }
                }
            }
            ToMount::Closing { reason } => {
                self.commands.push(Command::Disconnect);
                self.lose(reason);
            }
            ToMount::Late {
                path,
                copy,
                kept,
                since,
            } => {
                let at = match (copy, kept) {
                    (Some(copy), _) => Some(At::Tree(copy)),
                    (None, Some(kept)) => Some(At::Kept(kept)),
                    (None, None) => None,
                };
                let late = at.map(|at| Command::NoteLate { path, at, since });
                self.commands.extend(late);
            }
            // Shown by the driver, or for the link.
            ToMount::Pong { .. }
            | ToMount::Problems { .. }
            | ToMount::Watching { .. }
            | ToMount::Taken { .. } => {}
        }
    }

    fn planned(&mut self, planned: Planned) {
        if !matches!(self.round, Round::Planning) {
            return;
        }
        if planned.waiting {
            self.put_off();
        }
        self.relook = planned.unreadable.then(|| self.now + RELOOK);
        self.more = planned.more;
        let queue: VecDeque<Fetch> = planned.fetches.iter().cloned().collect();
        self.round = Round::Fetching {
            planned,
            queue,
            open: Vec::new(),
        };
        self.fetch_more();
    }

    fn fetch_more(&mut self) {
        let Round::Fetching { queue, open, .. } = &mut self.round else {
            return;
        };
        while open.len() < FETCHES
            && let Some(fetch) = queue.pop_front()
        {
            let request = self.next_request;
            self.next_request += 1;
            open.push((request, fetch.hash));
            let (path, hash, offset) = (fetch.path, fetch.hash, fetch.have);
            self.commands.push(Command::Send(match fetch.old {
                Some((old, size)) => ToAgent::FetchLike {
                    request,
                    path,
                    hash,
                    offset,
                    old,
                    size,
                },
                None => ToAgent::Fetch {
                    request,
                    path,
                    hash,
                    offset,
                },
            }));
        }
        if open.is_empty()
            && let Round::Fetching { planned, .. } = self.take_round()
        {
            let local = planned.local;
            self.round = Round::Applying { planned };
            if local {
                self.commands.push(Command::ApplyLocal);
            } else {
                self.applied_locally(Vec::new(), true);
            }
        }
    }

    /// The content that an open request is for.
    fn fetching(&self, request: u64) -> Option<ContentHash> {
        let Round::Fetching { open, .. } = &self.round else {
            return None;
        };
        let open = open.iter().find(|(open, _)| *open == request);
        open.map(|(_, hash)| *hash)
    }

    fn fetched(&mut self, request: u64, result: Result<bool, String>) {
        let Round::Fetching { open, .. } = &mut self.round else {
            return;
        };
        let Some(at) = open.iter().position(|(open, _)| *open == request) else {
            return;
        };
        match result {
            Ok(false) => return,
            Ok(true) => {}
            Err(reason) => {
                let (_, hash) = open[at];
                self.commands.push(Command::FetchFailed(hash));
                self.last_error = Some(reason);
                self.put_off();
            }
        }
        if let Round::Fetching { open, .. } = &mut self.round {
            open.swap_remove(at);
        }
        self.fetch_more();
    }

    fn applied_locally(&mut self, refused: Vec<(RelPath, String)>, agree: bool) {
        let Round::Applying { planned } = self.take_round() else {
            return;
        };
        if let Some((path, reason)) = refused.first() {
            self.last_error = Some(format!("{path}: {reason}"));
            self.put_off();
        }
        if planned.ops.is_empty() {
            if planned.agree && agree {
                self.propose(planned);
            } else {
                self.round = Round::Accepting;
                self.commands.push(Command::Advance);
            }
            return;
        }
        // Pieces stay well below the largest frame.
        let mut pieces = planned.ops.chunks(500).peekable();
        while let Some(piece) = pieces.next() {
            self.commands.push(Command::Send(ToAgent::Offer {
                batch: planned.batch,
                ops: piece.to_vec(),
                more: pieces.peek().is_some(),
            }));
        }
        self.round = Round::Offering {
            planned,
            wants: VecDeque::new(),
        };
    }

    fn send_next(&mut self) {
        let Round::Sending { wants, .. } = &self.round else {
            return;
        };
        if let Some(want) = wants.front() {
            self.commands.push(Command::SendContent {
                hash: want.hash,
                offset: want.have,
            });
        } else if let Round::Sending { planned, .. } = self.take_round() {
            self.propose(planned);
        }
    }

    fn propose(&mut self, planned: Planned) {
        self.commands.push(Command::Propose(planned.agreement));
        self.round = Round::Proposing { planned };
    }

    fn advance(&mut self, n: u64) {
        self.cursor = self.cursor.max(n);
        self.newest = self.newest.max(n);
        // A pause that was used up and not asked for again has served its purpose.
        self.retry = self.retry.filter(|(at, _)| *at < Duration::MAX);
        if self.retry.is_none() {
            self.last_error = None;
        }
        if self.undurable.is_empty() {
            self.make_durable(self.cursor);
        }
    }

    fn make_durable(&mut self, n: u64) {
        if n > self.durable {
            self.durable = n;
            self.commands.push(Command::Durable(n));
        }
    }

    /// Answers the flushes whose changes and news have gone through a round, and whose
    /// batches are durable. Nothing that came later holds one up.
    fn finish_flushes(&mut self) {
        // What has been tried in vain for a while is a problem, which is reported, and
        // nothing to wait for. What is being tried again is waited for.
        let retrying = self
            .retry
            .is_some_and(|(at, pause)| at == Duration::MAX || at <= self.now || pause < HOPELESS);
        let durable_batches = self.applied - self.undurable.len() as u64;
        let (cursor, durable, news) = (self.cursor, self.durable, self.news_done);
        for flush in &mut self.flushes {
            let settled = flush.drained && cursor >= flush.n && news >= flush.news && !retrying;
            if settled {
                flush.batches.get_or_insert(self.applied);
            }
        }
        let done = |flush: &Flush| {
            let batches = flush.batches;
            durable >= flush.n && batches.is_some_and(|batches| durable_batches >= batches)
        };
        for flush in self.flushes.iter().filter(|flush| done(flush)) {
            self.commands.push(Command::FlushDone {
                id: flush.id,
                reached: true,
            });
        }
        self.flushes.retain(|flush| !done(flush));
    }

    fn drain(&mut self, flush: usize) {
        let token = self.token();
        if let Some(flush) = self.flushes.get_mut(flush) {
            flush.token = token;
            flush.drained = false;
            flush.batches = None;
            self.commands.push(Command::Send(ToAgent::Drain { token }));
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Something is to be looked at that no number of a local change tells of.
    fn take_news(&mut self) {
        self.news += 1;
        self.touch();
    }

    fn touch(&mut self) {
        let first = self.dirty.map_or(self.now, |(first, _)| first);
        self.dirty = Some((first, self.now));
    }

    /// Another round is due after a pause that grows.
    fn put_off(&mut self) {
        let pause = match self.retry {
            Some((Duration::MAX, pause)) => (pause * 2).min(RETRY.1),
            Some((_, pause)) => pause,
            None => RETRY.0,
        };
        self.retry = Some((self.now + pause, pause));
    }

    fn redial(&mut self) {
        self.attempts = 0;
        match self.link {
            Link::Down { .. } | Link::Halted { .. } => self.retry_now(),
            // The attempt that is under way may have come too early for the new link.
            Link::Connecting => self.again = true,
            Link::Greeting | Link::Reporting | Link::Up => {
                // Nobody's flush is to end because of it.
                for flush in &mut self.flushes {
                    flush.attempts = flush.attempts.saturating_add(1);
                }
                self.lose("the peer has connected anew".to_owned());
                self.retry_now();
            }
        }
    }

    fn retry_now(&mut self) {
        if let Link::Down { until } | Link::Halted { until } = &mut self.link {
            *until = self.now;
        }
        if let Some((at, _)) = &mut self.retry {
            *at = self.now;
        }
    }

    fn fail_round(&mut self, reason: String) {
        self.round = Round::Idle;
        self.last_error = Some(reason);
        self.put_off();
        self.commands.push(Command::EndRound);
    }

    fn lose(&mut self, reason: String) {
        if !matches!(self.round, Round::Idle) {
            self.round = Round::Idle;
            self.commands.push(Command::EndRound);
        }
        if !matches!(self.link, Link::Down { .. } | Link::Halted { .. }) {
            self.commands.push(Command::Disconnect);
        }
        if let Some((_, n)) = self.undurable.front() {
            // Whether these became durable will never be told: the next agreement tells.
            self.durable = self.durable.min(n.saturating_sub(1));
        }
        self.undurable.clear();
        self.dirty = None;
        self.retry = None;
        self.relook = None;
        self.last_error = Some(reason);
        let pause = BACKOFF.0 * 2_u32.saturating_pow(self.attempts.saturating_sub(1).min(6));
        let pause = pause.min(BACKOFF.1);
        let spread = self.jitter.wrapping_mul(u64::from(self.attempts) * 2 + 1) % 250;
        let mut until = self.now + pause + pause.mul_f64(spread as f64 / 1000.0);
        if std::mem::take(&mut self.again) {
            until = self.now;
        }
        for flush in &mut self.flushes {
            flush.drained = false;
            flush.batches = None;
            match flush.attempts.checked_sub(1) {
                Some(left) => {
                    flush.attempts = left;
                    until = self.now;
                }
                None => self.commands.push(Command::FlushDone {
                    id: flush.id,
                    reached: false,
                }),
            }
        }
        let commands = &self.commands;
        self.flushes.retain(|flush| {
            !commands
                .iter()
                .any(|command| matches!(command, Command::FlushDone { id, .. } if *id == flush.id))
        });
        self.link = Link::Down { until };
    }

    /// Only a person can put this right; but that may be done over there (a disk is
    /// mounted again), so it is looked at from time to time.
    fn halt(&mut self, reason: String) {
        self.lose(reason);
        self.link = Link::Halted {
            until: self.now + HALTED,
        };
    }

    fn take_round(&mut self) -> Round {
        std::mem::replace(&mut self.round, Round::Idle)
    }
}

#[cfg(test)]
mod tests;
