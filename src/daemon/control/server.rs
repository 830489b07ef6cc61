//! The answering side.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::client::at_socket;
use super::{Call, LINE_MAX, Request, Response, SOCKET, VERSION};
use crate::daemon::failure::Failure;

/// Takes a connection after the answer to the call that asked for it.
pub type HandOver = dyn FnOnce(std::os::unix::net::UnixStream) + Send;

/// Whoever answers the calls.
pub trait Serve: Send + Sync + 'static {
    /// Answers one call. Dropped when the caller goes away.
    fn answer(&self, request: Request) -> impl Future<Output = Response> + Send;

    /// Answers one call whose connection becomes something else after the answer.
    fn take_over(
        &self,
        request: Request,
    ) -> impl Future<Output = Result<(Response, Box<HandOver>), Failure>> + Send {
        std::future::ready(Err(Failure::new(format!(
            "this process does not take connections over: {request:?}"
        ))))
    }

    /// Hears that an answer has been written, or that nobody was there to read it.
    fn answered(&self, _response: &Response) {}
}

/// A socket that is being listened at. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    listener: tokio::net::UnixListener,
    socket: std::path::PathBuf,
}

impl Server {
    /// Binds the socket in a mirror's state directory. The caller holds the mirror's
    /// lock, so a socket found there is a dead daemon's. To be called in a runtime.
    pub fn bind(dir: &Path) -> io::Result<Self> {
        let socket = dir.join(SOCKET);
        match fs::remove_file(&socket) {
            Ok(()) => (),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Err(error) => return Err(error),
        }
        let listener = at_socket(dir, |path| UnixListener::bind(path))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: tokio::net::UnixListener::from_std(listener)?,
            socket,
        })
    }

    /// Answers calls until it is dropped.
    pub async fn serve(&self, service: Arc<impl Serve>) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let service = Arc::clone(&service);
                    tokio::spawn(async move {
                        if let Err(error) = converse(stream, service.as_ref()).await {
                            tracing::debug!(%error, "a control connection ended");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely. Accepting again at once would
                    // only spin.
                    tracing::warn!(%error, "cannot accept a control connection");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A socket left behind does no harm: nobody listens at it.
        let _ = fs::remove_file(&self.socket);
    }
}

async fn converse(stream: UnixStream, service: &impl Serve) -> io::Result<()> {
    let caller = stream.peer_cred()?.uid();
    let (input, mut output) = stream.into_split();
    if caller != 0 && caller != rustix::process::geteuid().as_raw() {
        let refusal = Failure::new(format!(
            "the mount belongs to user {}, not to user {caller}",
            rustix::process::geteuid().as_raw()
        ))
        .hint("run the command as that user or as root");
        return output.write_all(&line(&Response::Failed(refusal))?).await;
    }
    let mut input = BufReader::new(input);
    loop {
        let mut text = Vec::new();
        (&mut input)
            .take(LINE_MAX)
            .read_until(b'\n', &mut text)
            .await?;
        if text.is_empty() {
            return Ok(());
        }
        let response = match understand(&text) {
            Ok(request @ Request::Attach { .. }) => {
                let taken = service.take_over(request).await;
                let (response, hand_over) = match taken {
                    Ok((response, hand_over)) => (response, Some(hand_over)),
                    Err(failure) => (Response::Failed(failure), None),
                };
                output.write_all(&line(&response)?).await?;
                // Whoever sends before the answer cannot be understood after it.
                if let (Some(hand_over), []) = (hand_over, input.buffer()) {
                    let whole = input.into_inner().reunite(output);
                    let stream = whole.map_err(io::Error::other)?.into_std()?;
                    hand_over(stream);
                }
                return Ok(());
            }
            Ok(request) => {
                // A caller that hangs up is no longer interested in the answer: the
                // flush it waited for ends with it.
                tokio::select! {
                    response = service.answer(request) => response,
                    gone = input.fill_buf() => {
                        let early = gone.map(<[u8]>::len)?;
                        tracing::debug!(early, "the caller did not wait for the answer");
                        return Ok(());
                    }
                }
            }
            Err(failure) => Response::Failed(failure),
        };
        let written = output.write_all(&line(&response)?).await;
        service.answered(&response);
        written?;
    }
}

fn understand(text: &[u8]) -> Result<Request, Failure> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let wrong = |error: serde_json::Error| {
        Failure::new("the daemon does not understand the request").because(&error)
    };
    let Version { version } = serde_json::from_slice(text).map_err(wrong)?;
    if version != VERSION {
        return Err(Failure::new(format!(
            "the daemon is mirrorfs {} and speaks version {VERSION} of its control protocol, this command version {version}",
            env!("CARGO_PKG_VERSION")
        ))
        .hint("unmount with the program that mounted, or send the daemon SIGTERM, and mount again"));
    }
    Ok(serde_json::from_slice::<Call>(text).map_err(wrong)?.request)
}

fn line(response: &Response) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::super::Client;
    use super::*;
    use std::io::{Read, Write};

    struct Echo(tokio::sync::mpsc::UnboundedSender<&'static str>);

    /// Says that a flush was given up.
    struct GivenUp(tokio::sync::mpsc::UnboundedSender<&'static str>);
    impl Drop for GivenUp {
        fn drop(&mut self) {
            let _ = self.0.send("given up");
        }
    }

    impl Serve for Echo {
        async fn answer(&self, request: Request) -> Response {
            match request {
                Request::Ping => Response::Pong {
                    pid: 1,
                    version: "test".into(),
                },
                Request::Flush { .. } => {
                    let _guard = GivenUp(self.0.clone());
                    let _ = self.0.send("flushing");
                    std::future::pending().await
                }
                other => Response::Failed(Failure::new(format!("{other:?}"))),
            }
        }
    }

    fn deep_dir() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket address.
        let deep = dir.path().join("x".repeat(120));
        fs::create_dir(&deep).unwrap();
        (dir, deep)
    }

    fn run<T: Send + 'static>(
        client: impl FnOnce(std::path::PathBuf) -> T + Send + 'static,
    ) -> (T, Vec<&'static str>) {
        let (_guard, dir) = deep_dir();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (events, mut seen) = tokio::sync::mpsc::unbounded_channel();
            let server = Server::bind(&dir).unwrap();
            let socket = dir.join(SOCKET);
            let path = dir.clone();
            let serving = tokio::spawn(async move { server.serve(Arc::new(Echo(events))).await });
            let value = tokio::task::spawn_blocking(move || client(path))
                .await
                .unwrap();
            let mut all = Vec::new();
            // A flush that was begun is given up, sooner or later.
            while let Ok(event) = seen.try_recv() {
                all.push(event);
            }
            if all == ["flushing"] {
                all.extend(seen.recv().await);
            }
            serving.abort();
            assert!(serving.await.unwrap_err().is_cancelled());
            assert!(!socket.exists(), "the socket goes with the server");
            (value, all)
        })
    }

    #[test]
    fn answers_call_after_call() {
        let (_, _) = run(|dir| {
            let mut client = Client::connect(&dir).unwrap().unwrap();
            for _ in 0..2 {
                assert_eq!(
                    client.call(Request::Ping, None).unwrap(),
                    Response::Pong {
                        pid: 1,
                        version: "test".into()
                    }
                );
            }
            let failure = client.call(Request::Retry, None).unwrap_err();
            assert_eq!(failure.message, "Retry");
        });
    }

    #[test]
    fn gives_up_what_nobody_waits_for() {
        let (failure, events) = run(|dir| {
            let mut client = Client::connect(&dir).unwrap().unwrap();
            client
                .call(
                    Request::Flush {
                        peer: None,
                        timeout_ms: 1,
                    },
                    Some(std::time::Duration::from_millis(200)),
                )
                .unwrap_err()
        });
        assert!(failure.message.contains("did not answer"), "{failure}");
        assert_eq!(events, ["flushing", "given up"]);
    }

    #[test]
    fn refuses_nonsense_and_other_versions() {
        let (answers, _) = run(|dir| {
            let mut stream =
                at_socket(&dir, |path| std::os::unix::net::UnixStream::connect(path)).unwrap();
            stream
                .write_all(b"hello\n{\"version\":99,\"request\":\"dance\"}\n{\"version\":1,\"request\":\"dance\"}\n")
                .unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        let answers: Vec<_> = answers.lines().collect();
        assert_eq!(answers.len(), 3, "{answers:?}");
        assert!(answers[0].contains("does not understand"));
        assert!(answers[1].contains("version 99"));
        assert!(answers[2].contains("does not understand"));
    }

    #[test]
    fn nobody_listening_is_no_error() {
        let (_guard, dir) = deep_dir();
        assert!(Client::connect(&dir).unwrap().is_none());
        // A dead daemon's socket.
        drop(at_socket(&dir, |path| UnixListener::bind(path)).unwrap());
        assert!(Client::connect(&dir).unwrap().is_none());
        // It is in nobody's way.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        drop(Server::bind(&dir).unwrap());
        assert!(!dir.join(SOCKET).exists());
    }
}
