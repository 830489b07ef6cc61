//! How much content may be on its way to the other side: as much as the link carries in a
//! short time, whatever its buffers would hold.
//!
//! Everything goes over one stream, in order. So what was handed to the link and has not
//! come out at its other end is what a small message, a ping or an edit of one line waits
//! for; and the buffers of ssh and of the network hold megabytes, which on a slow link are
//! many seconds. The receiver therefore acknowledges content once it is done with it
//! (`Taken`), and the sender keeps no more unacknowledged than the measured rate gives in a
//! round trip and `DELAY`.
//!
//! Sizes are counted as they are on the wire, compressed. It does no I/O and knows no clock
//! but the one it is told.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a message may have to wait for content that was sent before it, beyond what
/// the way itself takes. It also has to cover what the other side takes to answer.
const DELAY: Duration = Duration::from_millis(60);
/// The least that a rate is measured over.
const EPOCH: Duration = Duration::from_millis(40);
/// How many of the last rates count; the greatest of them does.
const EPOCHS: usize = 3;
/// After this time the round trip is measured anew, with nothing else on the way: its
/// shortest time tells how long the way is, and the way may have become a longer one.
const PROBE_EVERY: Duration = Duration::from_secs(10);

/// What may be on its way before anything is known of the link, in bytes.
const FIRST: u64 = 64 * 1024;
/// Least and most that may be on its way.
const LEAST: u64 = 32 * 1024;
const MOST: u64 = 8 << 20;

/// Least and most bytes of content in one message.
const SMALLEST: usize = 4 * 1024;
const LARGEST: usize = 256 * 1024;

/// The other side acknowledges what was never sent to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the peer acknowledges {taken} bytes of content where {sent} were sent")]
pub struct NeverSent {
    /// What it says it has taken.
    pub taken: u64,
    /// What was sent.
    pub sent: u64,
}

/// What is on its way in one direction of a session.
#[derive(Debug)]
pub struct Flow {
    /// What was sent and is not acknowledged, the oldest first.
    under_way: VecDeque<Stretch>,
    /// Bytes of content since the beginning.
    sent: u64,
    taken: u64,
    /// Bytes on the wire that are not acknowledged.
    in_flight: u64,
    /// Bytes on the wire that were acknowledged, and when that was last news.
    arrived: (u64, Instant),
    /// Since when that is none.
    empty_since: Option<Instant>,
    window: u64,
    /// How much shorter content is on the wire.
    packing: f64,
    /// The shortest round trip, and when it was measured.
    way: Option<(Duration, Instant)>,
    /// Nothing is sent until the way is empty.
    probing: bool,
    epoch: Epoch,
    rates: VecDeque<f64>,
}

#[derive(Debug)]
struct Stretch {
    /// The content sent with it and before it.
    end: u64,
    wire: u64,
    at: Instant,
    /// What had arrived when it was sent.
    after: (u64, Instant),
    /// Nothing else was on its way.
    alone: bool,
}

/// A time over which the rate is measured.
#[derive(Debug)]
struct Epoch {
    begin: Instant,
    /// Bytes acknowledged in it.
    wire: u64,
    /// Whether there was more to send than was allowed.
    limited: bool,
}

impl Flow {
    /// Of a link that was just made.
    pub fn new(now: Instant) -> Self {
        Self {
            under_way: VecDeque::new(),
            sent: 0,
            taken: 0,
            in_flight: 0,
            arrived: (0, now),
            empty_since: Some(now),
            window: FIRST,
            packing: 1.0,
            way: None,
            probing: false,
            epoch: Epoch {
                begin: now,
                wire: 0,
                limited: false,
            },
            rates: VecDeque::new(),
        }
    }

    /// How many bytes of content may be sent now in one message. None: not before more has
    /// been [taken](Self::taken).
    pub fn room(&mut self, now: Instant) -> Option<usize> {
        let old = |(_, at): (Duration, Instant)| now.duration_since(at) > PROBE_EVERY;
        self.probing |= self.way.is_some_and(old);
        if self.probing && self.in_flight == 0 {
            return Some(SMALLEST);
        }
        if self.probing || self.in_flight >= self.window {
            self.epoch.limited |= !self.probing;
            return None;
        }
        // Several messages at a time, so that the link never waits for the next.
        let content = (self.window / 4) as f64 * self.packing;
        Some((content as usize).clamp(SMALLEST, LARGEST))
    }

    /// A message with so many bytes of content has been handed to the link, of this size on
    /// the wire.
    pub fn sent(&mut self, now: Instant, content: usize, wire: usize) {
        if content == 0 {
            // No acknowledgement would tell that it has arrived.
            return;
        }
        self.sent += content as u64;
        let wire = wire.max(1) as u64;
        self.packing = (content as f64 / wire as f64).max(1.0);
        let alone = self.in_flight == 0;
        if alone {
            self.arrived.1 = now;
        }
        self.under_way.push_back(Stretch {
            end: self.sent,
            wire,
            at: now,
            after: self.arrived,
            alone,
        });
        self.in_flight += wire;
        // While nothing was on its way nothing was measured.
        let idle = self.empty_since.take();
        self.epoch.begin += idle.map_or(Duration::ZERO, |since| now.duration_since(since));
    }

    /// The other side is done with so many bytes of content since the beginning.
    pub fn taken(&mut self, now: Instant, total: u64) -> Result<(), NeverSent> {
        if total > self.sent {
            return Err(NeverSent {
                taken: total,
                sent: self.sent,
            });
        }
        if total <= self.taken {
            return Ok(());
        }
        self.taken = total;
        let mut last = None;
        while let Some(stretch) = self.under_way.pop_front_if(|next| next.end <= self.taken) {
            self.in_flight -= stretch.wire;
            self.epoch.wire += stretch.wire;
            self.arrived = (self.arrived.0 + stretch.wire, now);
            self.measure_way(now, &stretch);
            last = Some(stretch);
        }
        if self.in_flight == 0 {
            self.empty_since.get_or_insert(now);
        }
        if let Some(stretch) = last {
            self.measure_rate(now, &stretch);
        }
        Ok(())
    }

    /// How many bytes are on their way, as they are on the wire.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    fn begin_epoch(&mut self, now: Instant) {
        self.epoch = Epoch {
            begin: now,
            wire: 0,
            limited: false,
        };
    }

    fn measure_way(&mut self, now: Instant, stretch: &Stretch) {
        let took = now.duration_since(stretch.at);
        let probed = self.probing && stretch.alone;
        if probed || self.way.is_none_or(|(shortest, _)| took <= shortest) {
            self.way = Some((took, now));
        }
        if probed {
            self.probing = false;
            self.begin_epoch(now);
        }
    }

    fn measure_rate(&mut self, now: Instant, stretch: &Stretch) {
        let Some((way, _)) = self.way else { return };
        let took = now.duration_since(self.epoch.begin);
        if took < EPOCH.max(way) || self.probing {
            return;
        }
        let rate = self.epoch.wire as f64 / took.as_secs_f64();
        // Answers that were held up and come all at once make the link no faster: what
        // has arrived since the stretch was sent took since then.
        let (before, since) = stretch.after;
        let took = now.duration_since(since).max(Duration::from_micros(1));
        let rate = rate.min((self.arrived.0 - before) as f64 / took.as_secs_f64());
        let known = self.rates.iter().copied().fold(0.0, f64::max);
        // What was never held up tells only that the link is at least that fast.
        if self.epoch.limited || rate > known {
            self.rates.push_back(rate);
            if self.rates.len() > EPOCHS {
                self.rates.pop_front();
            }
        }
        let rate = self.rates.iter().copied().fold(0.0, f64::max);
        if rate > 0.0 {
            let wanted = rate * (way.mul_f64(1.25) + DELAY).as_secs_f64();
            self.window = (wanted as u64).clamp(LEAST, MOST);
        }
        self.begin_epoch(now);
    }
}

#[cfg(test)]
mod tests;
