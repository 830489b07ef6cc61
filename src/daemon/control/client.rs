//! The calling side.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Call, LINE_MAX, Request, Response, SOCKET, VERSION};
use crate::daemon::failure::{Failure, OrFail};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    dir: PathBuf,
}

/// Does something with a path to the socket that is short enough for a socket address
/// (108 bytes), however deep the state directory lies: the kernel resolves the
/// descriptor's link without looking at the directory's own path.
pub(super) fn at_socket<T>(dir: &Path, run: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let dir = File::open(dir)?;
    run(Path::new(&format!(
        "/proc/self/fd/{}/{SOCKET}",
        dir.as_raw_fd()
    )))
}

impl Client {
    /// Connects to the daemon of the mirror whose state is in `dir`; none if no daemon
    /// listens there.
    pub fn connect(dir: &Path) -> Result<Option<Self>, Failure> {
        match at_socket(dir, |path| UnixStream::connect(path)) {
            Ok(stream) => Ok(Some(Self {
                stream: BufReader::new(stream),
                dir: dir.to_path_buf(),
            })),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(Failure::new(format!(
                "cannot reach the daemon through {}",
                dir.join(SOCKET).display()
            ))
            .because(&error)),
        }
    }

    /// Speaks over a connection that leads to a daemon elsewhere, called `name` in errors.
    pub fn over(stream: UnixStream, name: &str) -> Self {
        Self {
            // Byte for byte: what follows an answer may be somebody else's.
            stream: BufReader::with_capacity(1, stream),
            dir: PathBuf::from(name),
        }
    }

    /// A connection to the daemon of the mirror whose state is in `dir`, for somebody
    /// else to speak over; none if no daemon listens there.
    pub fn raw(dir: &Path) -> Result<Option<UnixStream>, Failure> {
        Ok(Self::connect(dir)?.map(|client| client.stream.into_inner()))
    }

    /// Gives the connection back, for what follows the last answer. Nothing may have come
    /// after that yet.
    pub fn into_stream(self) -> Option<UnixStream> {
        self.stream
            .buffer()
            .is_empty()
            .then(|| self.stream.into_inner())
    }

    /// Sends a request and waits for the answer, for as long as `patience` if given.
    pub fn call(
        &mut self,
        request: Request,
        patience: Option<Duration>,
    ) -> Result<Response, Failure> {
        let name = self.dir.join(SOCKET);
        let lost = || format!("the daemon behind {} did not answer", name.display());
        let call = Call {
            version: VERSION,
            request,
        };
        let mut line = serde_json::to_vec(&call).or_fail(|| "cannot write a request".into())?;
        line.push(b'\n');
        let stream = self.stream.get_mut();
        stream.set_read_timeout(patience).or_fail(lost)?;
        stream.write_all(&line).or_fail(lost)?;
        let mut answer = Vec::new();
        let read = (&mut self.stream)
            .take(LINE_MAX)
            .read_until(b'\n', &mut answer)
            .or_fail(lost)
            .map_err(|failure| failure.hint(self.look_into_log()))?;
        if read == 0 || answer.last() != Some(&b'\n') {
            return Err(Failure::new(lost())
                .because(&io::Error::from(io::ErrorKind::UnexpectedEof))
                .hint(self.look_into_log()));
        }
        let response = serde_json::from_slice(&answer).or_fail(|| {
            format!(
                "cannot understand the daemon behind {}: it is another version of mirrorfs",
                name.display()
            )
        })?;
        match response {
            Response::Failed(failure) => Err(failure),
            response => Ok(response),
        }
    }

    fn look_into_log(&self) -> String {
        format!(
            "its last words are in {}",
            self.dir.join("daemon.log").display()
        )
    }
}
