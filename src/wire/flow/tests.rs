//! The flow over links that are modelled: a queue that takes everything, like the buffers
//! of ssh, and drains at a rate.

use std::collections::VecDeque;

use super::*;

const MBIT: f64 = 1_000_000.0 / 8.0;

/// A link and who is at its other end.
#[derive(Clone)]
struct Link {
    /// Bytes a second.
    rate: f64,
    /// From one end to the other.
    way: Duration,
    /// Up to so much longer, at random.
    jitter: Duration,
    /// How much smaller content is on the wire.
    packing: usize,
}

impl Link {
    fn of(mbit: f64, way_ms: u64) -> Self {
        Self {
            rate: mbit * MBIT,
            way: Duration::from_millis(way_ms),
            jitter: Duration::ZERO,
            packing: 1,
        }
    }
}

/// A transfer without end.
struct Transfer {
    link: Link,
    now: Instant,
    flow: Flow,
    /// When the link has sent all that it was given.
    free: Instant,
    /// Acknowledgements on their way back, with when they come.
    acks: VecDeque<(Instant, u64)>,
    random: u64,
    sent: u64,
    crossed: u64,
}

/// What a stretch of time showed.
#[derive(Debug)]
struct Seen {
    /// How much of the link's capacity was used.
    used: f64,
    /// How long the longest wait in the link's queue was.
    wait: Duration,
    /// Most bytes on their way.
    in_flight: u64,
}

impl Transfer {
    fn over(link: Link) -> Self {
        let begin = Instant::now();
        Self {
            link,

            now: begin,
            flow: Flow::new(begin),
            free: begin,
            acks: VecDeque::new(),
            random: 1,
            sent: 0,
            crossed: 0,
        }
    }

    fn jitter(&mut self) -> Duration {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        let share = (self.random >> 33) as f64 / f64::from(u32::MAX >> 1);
        self.link.jitter.mul_f64(share)
    }

    fn send(&mut self, content: usize) {
        let wire = content / self.link.packing + 20;
        self.flow.sent(self.now, content, wire);
        self.sent += content as u64;
        self.free = self.free.max(self.now) + Duration::from_secs_f64(wire as f64 / self.link.rate);
        let arrives = self.free + self.link.way + self.jitter() + self.link.way;
        // In order, whatever the jitter.
        let last = self.acks.back().map_or(arrives, |(at, _)| *at);
        self.acks.push_back((arrives.max(last), self.sent));
    }

    /// Sends as much as is allowed for so long.
    fn run(&mut self, seconds: f64) -> Seen {
        let begin = self.now;
        let end = begin + Duration::from_secs_f64(seconds);
        let before = self.crossed;
        let mut seen = Seen {
            used: 0.0,
            wait: Duration::ZERO,
            in_flight: 0,
        };
        while self.now < end {
            while let Some(content) = self.flow.room(self.now) {
                seen.wait = seen.wait.max(self.free.saturating_duration_since(self.now));
                self.send(content);
                seen.in_flight = seen.in_flight.max(self.flow.in_flight());
            }
            let (at, total) = self.acks.pop_front().expect("it waits for something");
            self.now = self.now.max(at);
            self.crossed = total;
            self.flow.taken(self.now, total).unwrap();
        }
        let took = (self.now - begin).as_secs_f64();
        let crossed = (self.crossed - before) as f64 / self.link.packing as f64;
        seen.used = crossed / (took * self.link.rate);
        seen
    }
}

/// "Small first": over 20 Mbit/s nothing waits for long behind a large file, and the large
/// file uses the link.
#[test]
fn a_slow_link_is_filled_and_its_buffers_are_not() {
    for way in [0, 1, 10, 40, 150] {
        let mut transfer = Transfer::over(Link::of(20.0, way));
        let first = transfer.run(2.0);
        assert!(first.wait < Duration::from_millis(150), "{way}: {first:?}");
        let seen = transfer.run(60.0);
        assert!(seen.used > 0.88, "{way} ms: {seen:?}");
        // After the way was measured, all that may be on it is sent at once.
        let most = Duration::from_millis(90 + 5 * way / 2);
        assert!(seen.wait < most, "{way} ms: {seen:?}");
    }
}

#[test]
fn a_fast_and_a_long_link_are_filled() {
    for (mbit, way) in [(100.0, 20), (400.0, 30), (1000.0, 0), (1000.0, 15)] {
        let mut transfer = Transfer::over(Link::of(mbit, way));
        transfer.run(3.0);
        let seen = transfer.run(30.0);
        assert!(seen.used > 0.9, "{mbit} Mbit/s, {way} ms: {seen:?}");
    }
}

/// A very slow link holds a second and a half at the most.
#[test]
fn a_crawling_link_holds_little() {
    let mut transfer = Transfer::over(Link::of(0.2, 50));
    transfer.run(10.0);
    let seen = transfer.run(60.0);
    assert!(seen.used > 0.9, "{seen:?}");
    assert!(seen.wait < Duration::from_millis(1600), "{seen:?}");
}

/// Answers that come late now and then are not taken for a full link.
#[test]
fn jitter_does_not_starve_it() {
    let mut link = Link::of(50.0, 5);
    link.jitter = Duration::from_millis(60);
    let mut transfer = Transfer::over(link);
    transfer.run(3.0);
    let seen = transfer.run(60.0);
    assert!(seen.used > 0.8, "{seen:?}");
}

#[test]
fn it_follows_a_link_that_changes() {
    let mut transfer = Transfer::over(Link::of(200.0, 5));
    transfer.run(5.0);
    transfer.link = Link::of(5.0, 5);
    transfer.run(5.0);
    let slow = transfer.run(10.0);
    assert!(slow.used > 0.9, "{slow:?}");
    assert!(slow.wait < Duration::from_millis(150), "{slow:?}");
    transfer.link = Link::of(200.0, 5);
    transfer.run(2.0);
    let fast = transfer.run(10.0);
    assert!(fast.used > 0.9, "{fast:?}");
    // The way becomes a longer one: another network, a tunnel.
    transfer.link = Link::of(200.0, 80);
    transfer.run(15.0);
    let far = transfer.run(30.0);
    assert!(far.used > 0.85, "{far:?}");
}

/// What packs well is sent in larger messages, and what is in flight is counted packed.
#[test]
fn sizes_count_as_they_are_on_the_wire() {
    let mut link = Link::of(20.0, 10);
    link.packing = 20;
    let mut transfer = Transfer::over(link);
    transfer.run(2.0);
    let seen = transfer.run(10.0);
    assert!(seen.used > 0.9, "{seen:?}");
    assert_eq!(transfer.flow.room(transfer.now), Some(LARGEST));
    // From one message to the next it packs no more.
    transfer.link.packing = 1;
    let seen = transfer.run(10.0);
    assert!(seen.wait < Duration::from_millis(300), "{seen:?}");
}

/// A stalled link is given no more than it would carry in a moment, whatever it would take.
#[test]
fn nothing_is_added_to_a_link_that_stalls() {
    let mut transfer = Transfer::over(Link::of(20.0, 1));
    transfer.run(5.0);
    let mut given = 0;
    for _ in 0..100 {
        transfer.now += Duration::from_millis(100);
        while let Some(content) = transfer.flow.room(transfer.now) {
            given += content;
            transfer.send(content);
        }
    }
    assert!(given < 256 * 1024, "{given} more bytes");
    assert!(transfer.flow.in_flight() < 512 * 1024);
}

/// An empty file is no content: no acknowledgement can tell that it has arrived, and waiting
/// for one would stop everything after it.
#[test]
fn a_message_without_content_holds_nothing_up() {
    let mut now = Instant::now();
    let mut flow = Flow::new(now);
    flow.sent(now, 100, 120);
    flow.taken(now, 100).unwrap();
    flow.sent(now, 0, 60);
    assert_eq!(flow.in_flight(), 0);
    // The way is measured anew.
    now += PROBE_EVERY * 2;
    assert!(flow.room(now).is_some());
}

#[test]
fn what_was_never_sent_cannot_be_acknowledged() {
    let now = Instant::now();
    let mut flow = Flow::new(now);
    flow.sent(now, 100, 120);
    assert_eq!(
        flow.taken(now, 101),
        Err(NeverSent {
            taken: 101,
            sent: 100
        })
    );
    flow.taken(now, 100).unwrap();
    // An older number says nothing new.
    flow.taken(now, 40).unwrap();
    assert_eq!(flow.in_flight(), 0);
}
