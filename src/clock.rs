//! What time it is. Everything whose behaviour depends on the time asks here, so that the
//! simulation can have a clock of its own. (What is compared with the times that a kernel
//! gives to files asks the system's clock itself.)

use std::time::Instant;

use crate::tree::Timestamp;

/// The present, for measuring how long something takes.
pub(crate) fn monotonic() -> Instant {
    #[cfg(test)]
    if let Some(now) = crate::sim::clock::monotonic() {
        return now;
    }
    Instant::now()
}

/// The present, for people to read.
pub(crate) fn wall() -> Timestamp {
    #[cfg(test)]
    if let Some(now) = crate::sim::clock::wall() {
        return now;
    }
    Timestamp::now()
}
