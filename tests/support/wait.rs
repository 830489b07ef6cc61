//! Waiting for conditions. Nothing here waits blindly: each wait ends when its condition
//! holds, and fails with what was seen last when its deadline passes.

use std::time::{Duration, Instant};

/// Far longer than anything ordinary takes on a busy machine of two slow cores. A test
/// that needs it all has failed; one that passes does not wait for it.
pub const PROMPT: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(20);

/// Waits until the condition holds, or fails.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    eventually(what, deadline, || {
        condition().then_some(()).ok_or_else(String::new)
    });
}

/// Waits until the attempt succeeds, and gives its value back; fails with its last error.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if start.elapsed() > deadline => {
                panic!("waited {deadline:?} for: {what}\n{error}")
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}
