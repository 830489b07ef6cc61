//! The clock of a simulation. It stands still until the simulation moves it.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::tree::Timestamp;

/// When a simulated world begins, in seconds since 1970.
const BEGINNING: i64 = 1_700_000_000;

thread_local! {
    static NOW: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
}

/// Starts the clock of this thread at zero.
pub(crate) fn start() {
    NOW.set(Some((Instant::now(), Duration::ZERO)));
}

/// Gives this thread the system's clock back.
pub(crate) fn stop() {
    NOW.set(None);
}

/// Moves the clock on.
pub(crate) fn advance(by: Duration) {
    if let Some((start, now)) = NOW.get() {
        NOW.set(Some((start, now + by)));
    }
}

/// The time since the beginning.
pub(crate) fn elapsed() -> Duration {
    NOW.get().map_or(Duration::ZERO, |(_, now)| now)
}

/// See [`crate::clock::monotonic`].
pub(crate) fn monotonic() -> Option<Instant> {
    NOW.get().map(|(start, now)| start + now)
}

/// See [`crate::clock::wall`].
pub(crate) fn wall() -> Option<Timestamp> {
    NOW.get().map(|(_, now)| Timestamp {
        secs: BEGINNING + now.as_secs().cast_signed(),
        nanos: now.subsec_nanos(),
    })
}
