//! Messages over a connected stream: two tasks, a bounded queue inwards, and a budget
//! for the bytes of contents outwards.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::transport::Link;
use crate::wire::frame::{Decoder, encode};
use crate::wire::message::{MAGIC, SIGN_OF_LIFE, ToAgent, ToMount};
use crate::wire::version::answered;

/// How many stretches of content may wait to be written. What is in flight beyond that
/// is up to the transport.
const STRETCHES: usize = 4;

/// A session's stream with its two tasks. Dropping it ends the session.
pub(super) struct Session {
    /// Messages from the agent; none for a part of one that is still coming in; an error
    /// ends the session.
    pub(super) incoming: mpsc::Receiver<Result<Option<ToMount>, String>>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    budget: Arc<Semaphore>,
    tasks: Vec<JoinHandle<()>>,
    /// Keeps the transport alive; tells why it ended. None in a simulation.
    link: Option<Link>,
}

/// A frame, as it waits to be written.
pub(super) struct Outgoing {
    pub(super) frame: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Where contents are handed over, within the budget.
#[derive(Clone)]
pub(super) struct ContentSender {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    budget: Arc<Semaphore>,
}

impl Session {
    /// Starts a session on a link that was just made, within the current runtime. Neither
    /// side gives it up before it has been silent for `deadline`.
    pub(super) fn start(link: Link, deadline: Duration) -> std::io::Result<Self> {
        let stream = link.stream.try_clone()?;
        stream.set_nonblocking(true)?;
        let (mut reader, mut writer) = UnixStream::from_std(stream)?.into_split();
        let (to_driver, incoming) = mpsc::channel(64);
        let (outgoing, mut frames) = mpsc::unbounded_channel::<Outgoing>();
        let reading = tokio::spawn(async move {
            let mut decoder = Decoder::expecting_magic();
            let mut met = false;
            let mut buffer = vec![0; 256 * 1024];
            loop {
                let read = match reader.read(&mut buffer).await {
                    Ok(0) => Err("the agent ended the connection".to_owned()),
                    Ok(read) => Ok(read),
                    Err(error) => Err(format!("the connection to the agent broke: {error}")),
                };
                let bytes = match read {
                    Ok(read) => &buffer[..read],
                    Err(reason) => {
                        let reason = decoder
                            .finish()
                            .map_or_else(|error| error.to_string(), |()| reason);
                        let _ = to_driver.send(Err(reason)).await;
                        return;
                    }
                };
                decoder.push(bytes);
                let mut whole = false;
                loop {
                    let next = if met {
                        decoder.next::<ToMount>()
                    } else {
                        let first = decoder.first::<ToMount>();
                        first.and_then(|first| first.map(answered).transpose())
                    };
                    met |= matches!(next, Ok(Some(_)));
                    match next {
                        Ok(Some(message)) => {
                            whole = true;
                            if to_driver.send(Ok(Some(message))).await.is_err() {
                                return;
                            }
                        }
                        Ok(None) => break,
                        Err(error) => {
                            let _ = to_driver.send(Err(error.to_string())).await;
                            return;
                        }
                    }
                }
                // If the driver is busy it has no need of it.
                if !whole {
                    let _ = to_driver.try_send(Ok(None));
                }
            }
        });
        let sign_every = SIGN_OF_LIFE.min(deadline / 4);
        let sign_of_life = framed(&ToAgent::Ping { token: 0 }).map_err(std::io::Error::other)?;
        let writing = tokio::spawn(async move {
            if writer.write_all(&MAGIC).await.is_err() {
                return;
            }
            loop {
                let frame = match timeout(sign_every, frames.recv()).await {
                    Ok(Some(outgoing)) => outgoing,
                    Ok(None) => return,
                    // Whatever the machine is waiting for, the agent shall not take this
                    // side for gone.
                    Err(_) => Outgoing {
                        frame: sign_of_life.clone(),
                        _permit: None,
                    },
                };
                // What breaks here ends the reading side too, which tells the reason.
                if writer.write_all(&frame.frame).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            incoming,
            outgoing,
            budget: Arc::new(Semaphore::new(STRETCHES)),
            tasks: vec![reading, writing],
            link: Some(link),
        })
    }

    /// Queues a message.
    pub(super) fn send(&self, message: &ToAgent) -> Result<(), String> {
        let frame = framed(message)?;
        // A writer that is gone has ended the reader too, which tells why.
        let _ = self.outgoing.send(Outgoing {
            frame,
            _permit: None,
        });
        Ok(())
    }

    /// Where contents are handed over.
    pub(super) fn contents(&self) -> ContentSender {
        ContentSender {
            outgoing: self.outgoing.clone(),
            budget: self.budget.clone(),
        }
    }

    /// The last that the transport printed.
    pub(super) fn stderr_tail(&self) -> String {
        self.link
            .as_ref()
            .map(Link::stderr_tail)
            .unwrap_or_default()
    }

    /// A session without a stream: frames are taken from the receiver, and messages
    /// brought in by whoever made it.
    #[cfg(test)]
    pub(super) fn simulated() -> (Self, mpsc::UnboundedReceiver<Outgoing>) {
        let (_, incoming) = mpsc::channel(1);
        let (outgoing, frames) = mpsc::unbounded_channel();
        let session = Self {
            incoming,
            outgoing,
            budget: Arc::new(Semaphore::new(STRETCHES)),
            tasks: Vec::new(),
            link: None,
        };
        (session, frames)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl ContentSender {
    /// Waits until there is room for another stretch.
    pub(super) async fn room(&self) -> Option<OwnedSemaphorePermit> {
        self.budget.clone().acquire_owned().await.ok()
    }

    /// Queues a stretch in the room that was waited for.
    pub(super) fn send(&self, message: &ToAgent, room: OwnedSemaphorePermit) -> Result<(), String> {
        let frame = framed(message)?;
        let _ = self.outgoing.send(Outgoing {
            frame,
            _permit: Some(room),
        });
        Ok(())
    }
}

fn framed(message: &ToAgent) -> Result<Vec<u8>, String> {
    let mut frame = Vec::new();
    encode(message, &mut frame).map_err(|error| error.to_string())?;
    Ok(frame)
}
