//! The machine against a world that is played by hand.

use super::*;
use crate::tree::{Content, Entry, Epoch, Timestamp, Xattrs};
use crate::wire::message::Expect;

const REVISION: Revision = Revision {
    epoch: Epoch(1),
    rev: 1,
};

/// A machine with the rest of the world played by hand.
struct World {
    machine: Machine,
    now: Now,
    /// Commands that nobody has taken yet.
    commands: VecDeque<Command>,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new(0, 0, 0, 1);
        Self {
            machine,
            now: Duration::ZERO,
            commands: VecDeque::new(),
        }
    }

    fn tell(&mut self, event: Event) {
        self.commands.extend(self.machine.handle(self.now, event));
    }

    fn say(&mut self, message: ToMount) {
        self.tell(Event::Message(message));
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.tell(Event::Tick);
    }

    fn take(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    #[track_caller]
    fn expect(&mut self, command: Command) {
        assert_eq!(self.take(), Some(command));
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        assert_eq!(self.take(), None);
    }

    fn hello() -> AgentHello {
        AgentHello {
            protocol: (1, 1),
            features: Vec::new(),
            version: String::new(),
            replica: Id([1; 16]),
            mirror: None,
            agreement: None,
            diverged: Vec::new(),
            epoch: Epoch(1),
            whole: true,
            settled: true,
        }
    }

    /// Up to the end of the agent's first report.
    fn connect(&mut self) {
        self.tell(Event::Connected);
        self.expect(Command::SendHello);
        self.say(ToMount::Hello(Self::hello()));
        self.expect(Command::Meet(Box::new(Self::hello())));
        self.tell(Event::Stored {
            news: false,
            complete: true,
        });
    }

    fn connected() -> Self {
        let mut world = Self::new();
        world.tell(Event::Tick);
        world.expect(Command::Connect);
        world.connect();
        world.wait(QUIET);
        world.expect(Command::Plan { agree: false });
        world.plan(0, Vec::new());
        world.expect(Command::Advance);
        world.tell(Event::Accepted(0));
        world.expect(Command::EndRound);
        world.expect_nothing();
        world
    }

    fn plan(&mut self, n: u64, ops: Vec<Op>) {
        self.tell(Event::Planned(planned(n, ops)));
    }

    /// A batch of one file, up to the point where the agent has answered `Need`.
    fn send_one(&mut self, n: u64) {
        self.tell(Event::LocalChanged(n));
        self.wait(QUIET);
        assert!(matches!(self.take(), Some(Command::Plan { .. })));
        self.offer_one(n);
    }

    fn offer_one(&mut self, n: u64) {
        self.plan(n, vec![put()]);
        assert!(matches!(
            self.take(),
            Some(Command::Send(ToAgent::Offer { .. }))
        ));
        let wants = vec![Want {
            hash: ContentHash::of(b"x"),
            have: 0,
        }];
        self.say(ToMount::Need {
            batch: BATCH,
            wants,
            more: false,
        });
        self.expect(Command::SendContent {
            hash: ContentHash::of(b"x"),
            offset: 0,
        });
    }

    fn commit(&mut self, n: u64) {
        self.tell(Event::ContentSent { next: None });
        self.expect(Command::Propose(AGREEMENT));
        self.tell(Event::Proposed);
        assert!(matches!(
            self.take(),
            Some(Command::Send(ToAgent::Commit { .. }))
        ));
        self.say(ToMount::Applied {
            batch: BATCH,
            diverged: Vec::new(),
            upto: REVISION,
        });
        self.expect(Command::Accept {
            diverged: Vec::new(),
            upto: REVISION,
        });
        self.tell(Event::Accepted(n));
        self.expect(Command::EndRound);
    }
}

fn planned(n: u64, ops: Vec<Op>) -> Planned {
    Planned {
        n,
        fetches: Vec::new(),
        local: false,
        agree: !ops.is_empty(),
        ops,
        batch: BATCH,
        agreement: AGREEMENT,
        seen: REVISION,
        waiting: false,
        unreadable: false,
        more: false,
    }
}

const BATCH: Id = Id([9; 16]);
const AGREEMENT: Agreement = Agreement {
    number: 1,
    nonce: Id([8; 16]),
    previous: None,
};

fn put() -> Op {
    Op::Put {
        path: RelPath::new("x").unwrap(),
        entry: Entry {
            content: Content::File {
                size: 1,
                hash: ContentHash::of(b"x"),
            },
            mode: 0o644,
            mtime: Timestamp::default(),
            xattrs: Xattrs::new(),
        },
        expect: Expect::Absent,
    }
}

#[test]
fn a_change_travels_once_things_are_quiet() {
    let mut world = World::connected();
    world.tell(Event::LocalChanged(1));
    world.expect_nothing();
    world.now += QUIET / 2;
    world.tell(Event::LocalChanged(2));
    world.wait(QUIET / 2);
    world.expect_nothing();
    assert_eq!(world.machine.deadline(), Some(world.now + QUIET / 2));
    world.send_one(3);
    world.commit(3);
    assert_eq!(world.machine.positions(), (3, 0));
    assert!(!world.machine.is_settled());
    world.say(ToMount::Durable { batch: BATCH });
    world.expect(Command::Durable(3));
    assert!(world.machine.is_settled());
}

#[test]
fn a_writer_that_never_pauses_is_served() {
    let mut world = World::connected();
    let start = world.now;
    let mut n = 0;
    while world.commands.is_empty() {
        n += 1;
        world.tell(Event::LocalChanged(n));
        world.wait(Duration::from_millis(1));
    }
    assert!(world.now - start <= LONGEST_WAIT + Duration::from_millis(2));
}

#[test]
fn a_flush_waits_for_what_is_durable_and_drained() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 1, n: 5 });
    let Some(Command::Send(ToAgent::Drain { token })) = world.take() else {
        panic!()
    };
    world.expect(Command::Plan { agree: false });
    world.offer_one(5);
    world.commit(5);
    world.say(ToMount::Drained { token });
    world.expect_nothing();
    world.say(ToMount::Durable { batch: BATCH });
    world.expect(Command::Durable(5));
    world.expect(Command::FlushDone {
        id: 1,
        reached: true,
    });
}

/// "It does not wait for changes made later."
#[test]
fn a_flush_ends_beside_a_writer_that_never_pauses() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 1, n: 5 });
    let Some(Command::Send(ToAgent::Drain { token })) = world.take() else {
        panic!()
    };
    world.expect(Command::Plan { agree: false });
    world.tell(Event::LocalChanged(6));
    world.offer_one(5);
    world.tell(Event::LocalChanged(7));
    world.commit(5);
    world.expect(Command::Plan { agree: false });
    world.say(ToMount::Drained { token });
    world.tell(Event::LocalChanged(8));
    world.expect_nothing();
    world.say(ToMount::Durable { batch: BATCH });
    world.expect(Command::Durable(5));
    world.expect(Command::FlushDone {
        id: 1,
        reached: true,
    });
}

/// "After its agent has drained its watch and its changes have come in": what was reported
/// before the answer to the drain goes through a round first, and what that round sent is
/// durable.
#[test]
fn a_flush_waits_for_the_news_of_its_drain() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 1, n: 0 });
    let Some(Command::Send(ToAgent::Drain { token })) = world.take() else {
        panic!()
    };
    world.tell(Event::Stored {
        news: true,
        complete: true,
    });
    world.expect(Command::Plan { agree: false });
    // Too late for that round.
    world.tell(Event::Stored {
        news: true,
        complete: true,
    });
    world.say(ToMount::Drained { token });
    world.plan(0, Vec::new());
    world.expect(Command::Advance);
    world.tell(Event::Accepted(0));
    world.expect(Command::EndRound);
    world.expect(Command::Plan { agree: false });
    world.offer_one(0);
    world.commit(0);
    world.expect_nothing();
    world.say(ToMount::Durable { batch: BATCH });
    world.expect(Command::FlushDone {
        id: 1,
        reached: true,
    });
}

/// What an agent needs may take several frames, and what does not fit into one batch goes
/// in another one.
#[test]
fn a_large_batch_comes_in_pieces_and_goes_on() {
    let mut world = World::connected();
    world.tell(Event::LocalChanged(9));
    world.wait(QUIET);
    world.expect(Command::Plan { agree: false });
    world.tell(Event::Planned(Planned {
        more: true,
        ..planned(0, vec![put()])
    }));
    assert!(matches!(
        world.take(),
        Some(Command::Send(ToAgent::Offer { .. }))
    ));
    let want = Want {
        hash: ContentHash::of(b"x"),
        have: 0,
    };
    for (wants, more) in [(vec![want], true), (Vec::new(), false)] {
        world.expect_nothing();
        world.say(ToMount::Need {
            batch: BATCH,
            wants,
            more,
        });
    }
    world.expect(Command::SendContent {
        hash: ContentHash::of(b"x"),
        offset: 0,
    });
    world.commit(0);
    world.wait(QUIET);
    world.expect(Command::Plan { agree: false });
}

#[test]
fn a_flush_is_not_done_before_the_peer_has_drained_its_watch() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 1, n: 0 });
    let Some(Command::Send(ToAgent::Drain { token })) = world.take() else {
        panic!()
    };
    world.wait(Duration::from_secs(1));
    world.expect_nothing();
    world.tell(Event::Stored {
        news: true,
        complete: true,
    });
    world.say(ToMount::Drained { token });
    world.expect(Command::Plan { agree: false });
    world.plan(0, Vec::new());
    world.expect(Command::Advance);
    world.tell(Event::Accepted(0));
    world.expect(Command::EndRound);
    world.expect(Command::FlushDone {
        id: 1,
        reached: true,
    });
}

#[test]
fn a_flush_does_not_wait_for_what_is_hopeless() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 1, n: 0 });
    let Some(Command::Send(ToAgent::Drain { token })) = world.take() else {
        panic!()
    };
    let start = world.now;
    world.tell(Event::Stored {
        news: true,
        complete: true,
    });
    world.say(ToMount::Drained { token });
    loop {
        match world.take() {
            Some(Command::Plan { .. }) => {
                world.plan(0, vec![put()]);
                let refused = vec![(RelPath::new("x").unwrap(), "in use".to_owned())];
                world.commands.clear();
                world.machine.round = Round::Applying {
                    planned: planned(0, Vec::new()),
                };
                world.tell(Event::LocalApplied {
                    refused,
                    agree: false,
                });
            }
            Some(Command::Advance) => world.tell(Event::Accepted(0)),
            Some(Command::FlushDone { reached, .. }) => break assert!(reached),
            Some(_) => {}
            None => {
                world.now = world.machine.deadline().unwrap();
                world.say(ToMount::Pong { token: 0 });
            }
        }
    }
    assert!(
        world.now - start >= Duration::from_secs(1),
        "{:?}",
        world.now - start
    );
    assert!(
        world.now - start < Duration::from_secs(10),
        "{:?}",
        world.now - start
    );
}

#[test]
fn a_lost_link_ends_the_round_and_comes_back() {
    let mut world = World::connected();
    world.send_one(1);
    world.tell(Event::LinkLost("cut".to_owned()));
    world.expect(Command::EndRound);
    world.expect(Command::Disconnect);
    assert_eq!(world.machine.last_error(), Some("cut"));
    let due = world.machine.deadline().unwrap();
    assert!(due >= world.now + BACKOFF.0 && due <= world.now + BACKOFF.0 * 2);
    world.now = due;
    world.tell(Event::Tick);
    world.expect(Command::Connect);
    world.connect();
    world.wait(QUIET);
    world.expect(Command::Plan { agree: false });
}

#[test]
fn what_was_applied_and_never_reported_durable_is_asked_for_again() {
    let mut world = World::connected();
    world.send_one(1);
    world.commit(1);
    world.tell(Event::LinkLost("cut".to_owned()));
    world.tell(Event::RetryNow);
    while world.take() != Some(Command::Connect) {}
    world.connect();
    world.wait(QUIET);
    world.expect(Command::Plan { agree: true });
}

#[test]
fn back_off_grows_and_a_flush_learns_that_nobody_is_there() {
    let mut world = World::new();
    world.tell(Event::Tick);
    let mut pauses = Vec::new();
    for _ in 0..12 {
        world.expect(Command::Connect);
        world.tell(Event::LinkLost("refused".to_owned()));
        world.expect(Command::Disconnect);
        let due = world.machine.deadline().unwrap();
        pauses.push(due - world.now);
        world.now = due;
        world.tell(Event::Tick);
    }
    // "Exponential back-off and jitter (1 s to 30 s)".
    for (pause, seconds) in pauses
        .iter()
        .zip([1, 2, 4, 8, 16, 24, 24, 24, 24, 24, 24, 24])
    {
        let least = Duration::from_secs(seconds);
        assert!((least..least * 5 / 4).contains(pause), "{pauses:?}");
    }
    let last: HashSet<_> = pauses[6..].iter().collect();
    assert!(last.len() > 3, "no jitter: {pauses:?}");
    world.expect(Command::Connect);
    assert_eq!(world.machine.state(), LinkState::Unreachable);
    world.tell(Event::Flush { id: 7, n: 1 });
    world.tell(Event::LinkLost("refused".to_owned()));
    world.expect(Command::Disconnect);
    world.expect(Command::FlushDone {
        id: 7,
        reached: false,
    });
}

/// "At once on request", however long the pause is by then; and the next ones begin anew
/// only after a session.
#[test]
fn a_link_is_tried_at_once_on_request() {
    let mut world = World::new();
    world.tell(Event::Tick);
    for _ in 0..8 {
        world.expect(Command::Connect);
        world.tell(Event::LinkLost("refused".to_owned()));
        world.expect(Command::Disconnect);
        world.expect_nothing();
        world.tell(Event::RetryNow);
    }
    world.expect(Command::Connect);
    // One attempt is enough at a time.
    world.tell(Event::RetryNow);
    world.expect_nothing();
    world.tell(Event::LinkLost("refused".to_owned()));
    let pause = world.machine.deadline().unwrap() - world.now;
    assert!(pause >= BACKOFF.1, "{pause:?}");
}

#[test]
fn a_peer_that_falls_silent_is_asked_and_then_given_up() {
    let mut world = World::connected();
    world.wait(PING_EVERY);
    assert!(matches!(
        world.take(),
        Some(Command::Send(ToAgent::Ping { .. }))
    ));
    let mut waited = PING_EVERY;
    while world.machine.state() == LinkState::Connected {
        world.commands.clear();
        world.wait(Duration::from_millis(100));
        waited += Duration::from_millis(100);
    }
    assert!(waited <= DEADLINE + Duration::from_millis(200));
    assert!(world.commands.contains(&Command::Disconnect));
}

/// A peer that was not asked has not failed to answer: this side may have been busy for
/// longer than a peer may be silent.
#[test]
fn a_peer_that_was_not_asked_is_not_given_up() {
    let mut world = World::connected();
    world.wait(DEADLINE * 2);
    assert!(matches!(
        world.take(),
        Some(Command::Send(ToAgent::Ping { .. }))
    ));
    world.expect_nothing();
    world.say(ToMount::Pong { token: 0 });
    assert_eq!(world.machine.state(), LinkState::Connected);
}

#[test]
fn a_round_that_fails_is_tried_again_after_growing_pauses() {
    let mut world = World::connected();
    let mut pauses = Vec::new();
    world.tell(Event::LocalChanged(1));
    for _ in 0..5 {
        while world.commands.is_empty() {
            let due = world.machine.deadline().unwrap();
            world.now = due;
            world.say(ToMount::Pong { token: 0 });
        }
        assert!(matches!(world.take(), Some(Command::Plan { .. })));
        world.plan(1, vec![put()]);
        world.commands.clear();
        let before = world.now;
        world.say(ToMount::Failed {
            batch: BATCH,
            reason: "disk full".to_owned(),
        });
        world.expect(Command::EndRound);
        pauses.push(world.machine.retry.unwrap().0 - before);
    }
    assert_eq!(pauses[0], RETRY.0);
    assert!(
        pauses.windows(2).all(|pair| pair[0] < pair[1]),
        "{pauses:?}"
    );
    assert_eq!(world.machine.last_error(), Some("disk full"));
}

/// "Either side dials": a link that the peer makes anew replaces one that seems to be up,
/// and an attempt that came too early for it is repeated at once. A flush lives through it.
#[test]
fn a_peer_that_connects_anew_is_taken_at_once() {
    let mut world = World::connected();
    world.tell(Event::Flush { id: 7, n: 0 });
    assert!(matches!(
        world.take(),
        Some(Command::Send(ToAgent::Drain { .. }))
    ));
    world.commands.clear();
    world.tell(Event::Redial);
    world.expect(Command::Disconnect);
    world.expect(Command::Connect);
    world.expect_nothing();
    world.tell(Event::Redial);
    world.expect_nothing();
    world.tell(Event::LinkLost("nobody is attached".to_owned()));
    let commands: Vec<Command> = world.commands.drain(..).collect();
    assert!(commands.contains(&Command::Connect), "{commands:?}");
    world.connect();
    assert_eq!(world.machine.state(), LinkState::Connected);
}
