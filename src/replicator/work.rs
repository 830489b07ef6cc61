//! Where a driver's work is done: on the runtime's threads, or, in a simulation, when
//! that says so and on its own thread.

use std::future::Future;

use tokio::sync::mpsc;
use tokio::task::{spawn, spawn_blocking};

use super::Error;

/// Does something that blocks, off the runtime's thread, and waits for it.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    #[cfg(test)]
    if crate::sim::jobs::is_simulated() {
        return work();
    }
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Worker(error.to_string())),
    }
}

/// Does something that blocks, off the runtime's thread, without waiting for it.
pub(super) fn start(work: impl FnOnce() + Send + 'static) {
    #[cfg(test)]
    let Some(work) = crate::sim::jobs::put_off(work) else {
        return;
    };
    spawn_blocking(work);
}

/// Does something that waits for `room` first, and then blocks.
pub(super) fn start_after<T: Send + 'static>(
    room: impl Future<Output = Option<T>> + Send + 'static,
    work: impl FnOnce(T) + Send + 'static,
) {
    #[cfg(test)]
    let Some((room, work)) = crate::sim::jobs::put_off_until(room, work) else {
        return;
    };
    spawn(async move {
        if let Some(room) = room.await {
            spawn_blocking(move || work(room));
        }
    });
}

/// Where results come in.
pub(super) type Results<T> = (mpsc::UnboundedSender<T>, mpsc::UnboundedReceiver<T>);
