//! Messages over a connected stream: two tasks, a bounded queue inwards, and outwards no
//! more content than the link carries in a short time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::driver::lock;
use super::expected::Expected;
use crate::clock::monotonic;
use crate::transport::Link;
use crate::wire::flow::{Flow, NeverSent};
use crate::wire::frame::{Decoder, encode};
use crate::wire::message::{MAGIC, SIGN_OF_LIFE, ToAgent, ToMount};
use crate::wire::version::answered;

/// A session's stream with its two tasks. Dropping it ends the session.
pub(super) struct Session {
    /// Messages from the agent; none for a part of one that is still coming in; an error
    /// ends the session.
    pub(super) incoming: mpsc::Receiver<Result<Option<ToMount>, String>>,
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
    contents: Arc<Contents>,
    /// How many bytes of content this side is done with.
    taken: u64,
    /// What the agent may say.
    pub(super) expected: Expected,
    tasks: Vec<JoinHandle<()>>,
    /// Keeps the transport alive; tells why it ended. None in a simulation.
    link: Option<Link>,
}

/// Where contents are handed over, as many as may be on their way.
pub(super) struct Contents {
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
    /// None once the session is over.
    flow: Mutex<Option<Flow>>,
    changed: Notify,
}

impl Session {
    /// Starts a session on a link that was just made, within the current runtime. Neither
    /// side gives it up before it has been silent for `deadline`.
    pub(super) fn start(link: Link, deadline: Duration) -> std::io::Result<Self> {
        let stream = link.stream.try_clone()?;
        stream.set_nonblocking(true)?;
        let (mut reader, mut writer) = UnixStream::from_std(stream)?.into_split();
        let (to_driver, incoming) = mpsc::channel(64);
        let (outgoing, mut frames) = mpsc::unbounded_channel::<Vec<u8>>();
        let contents = Arc::new(Contents::over(outgoing.clone()));
        let flowing = Arc::clone(&contents);
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
                        Ok(Some(ToMount::Taken { bytes })) => {
                            if let Err(error) = flowing.acknowledged(bytes) {
                                let _ = to_driver.send(Err(error.to_string())).await;
                                return;
                            }
                        }
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
                    Ok(Some(frame)) => frame,
                    Ok(None) => return,
                    // Whatever the machine is waiting for, the agent shall not take this
                    // side for gone.
                    Err(_) => sign_of_life.clone(),
                };
                // What breaks here ends the reading side too, which tells the reason.
                if writer.write_all(&frame).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            incoming,
            outgoing,
            contents,
            taken: 0,
            expected: Expected::default(),
            tasks: vec![reading, writing],
            link: Some(link),
        })
    }

    /// Queues a message.
    pub(super) fn send(&self, message: &ToAgent) -> Result<(), String> {
        let frame = framed(message)?;
        // A writer that is gone has ended the reader too, which tells why.
        let _ = self.outgoing.send(frame);
        Ok(())
    }

    /// This side is done with a stretch of content that came in.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), String> {
        self.taken += bytes as u64;
        self.send(&ToAgent::Taken { bytes: self.taken })
    }

    /// Where contents are handed over.
    pub(super) fn contents(&self) -> Arc<Contents> {
        Arc::clone(&self.contents)
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
    pub(super) fn simulated() -> (Self, mpsc::UnboundedReceiver<Vec<u8>>) {
        let (_, incoming) = mpsc::channel(1);
        let (outgoing, frames) = mpsc::unbounded_channel();
        let session = Self {
            incoming,
            contents: Arc::new(Contents::over(outgoing.clone())),
            outgoing,
            taken: 0,
            expected: Expected::default(),
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
        self.contents.end();
    }
}

impl Contents {
    fn over(outgoing: mpsc::UnboundedSender<Vec<u8>>) -> Self {
        Self {
            outgoing,
            flow: Mutex::new(Some(Flow::new(monotonic()))),
            changed: Notify::new(),
        }
    }

    /// Waits until another stretch may be on its way, and says of how many bytes; none
    /// once the session is over.
    pub(super) async fn room(&self) -> Option<usize> {
        loop {
            let room = match lock(&self.flow).as_mut() {
                Some(flow) => flow.room(monotonic()).map(Some),
                None => Some(None),
            };
            if let Some(room) = room {
                // Who waits here for a round that is over does not keep the news to itself.
                self.changed.notify_one();
                return room;
            }
            self.changed.notified().await;
        }
    }

    /// Queues a stretch after its room has been waited for.
    pub(super) fn send(&self, message: &ToAgent, bytes: usize) -> Result<(), String> {
        let frame = framed(message)?;
        if let Some(flow) = lock(&self.flow).as_mut() {
            flow.sent(monotonic(), bytes, frame.len());
        }
        let _ = self.outgoing.send(frame);
        Ok(())
    }

    /// The agent is done with so many bytes since the beginning.
    pub(super) fn acknowledged(&self, bytes: u64) -> Result<(), NeverSent> {
        if let Some(flow) = lock(&self.flow).as_mut() {
            flow.taken(monotonic(), bytes)?;
        }
        self.changed.notify_one();
        Ok(())
    }

    fn end(&self) {
        *lock(&self.flow) = None;
        self.changed.notify_one();
    }
}

fn framed(message: &ToAgent) -> Result<Vec<u8>, String> {
    let mut frame = Vec::new();
    encode(message, &mut frame).map_err(|error| error.to_string())?;
    Ok(frame)
}
