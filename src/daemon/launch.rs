//! Starting a daemon in the background, from both ends of the readiness pipe.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::announce::{Announce, Announcement, Ready};
use super::failure::{Failure, OrFail};
use crate::transport;

/// A log of more bytes is set aside at the next start.
const LOG_MAX: u64 = 8 << 20;

/// Starts `mirrorfs daemon ARGUMENTS`, and returns once its mount is usable. What it
/// says until then is passed on.
pub fn start(arguments: Vec<OsString>, say: &mut dyn Announce) -> Result<Ready, Failure> {
    match spawn("daemon", arguments, say)? {
        Announcement::Ready(ready) => Ok(ready),
        other => Err(Failure::new(format!("the daemon said {other:?}"))),
    }
}

/// Starts `mirrorfs COMMAND ARGUMENTS` in the background, and returns with the last thing
/// that it says through the readiness pipe. What it says before is passed on.
pub fn spawn(
    command: &str,
    arguments: Vec<OsString>,
    say: &mut dyn Announce,
) -> Result<Announcement, Failure> {
    // Also after an upgrade has replaced the file that this process was started from.
    let mut daemon = Command::new("/proc/self/exe")
        .arg0("mirrorfs")
        .arg(command)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .or_fail(|| "cannot start the daemon".into())?;
    let Some(pipe) = daemon.stdout.take() else {
        return Err(Failure::new("the daemon has no readiness pipe"));
    };
    let mut answers = daemon.stdin.take();
    for line in BufReader::new(pipe).lines() {
        let line = line.or_fail(|| "cannot hear the daemon".into())?;
        match serde_json::from_str(&line).or_fail(|| format!("the daemon said {line:?}"))? {
            last @ (Announcement::Ready(_) | Announcement::Attached(_)) => return Ok(last),
            Announcement::Failed(failure) => {
                // It ends by itself; no zombie of it shall stay.
                let _ = daemon.wait();
                return Err(failure);
            }
            Announcement::Ask(prompt) => {
                if let Some(answers) = &mut answers {
                    let answer = json_line(&transport::ask(&prompt))?;
                    // One that has ended does not wait for it.
                    let _ = answers.write_all(&answer);
                }
            }
            other => say.announce(other),
        }
    }
    let status = daemon
        .wait()
        .or_fail(|| "cannot wait for the daemon".into())?;
    Err(
        Failure::new(format!("the daemon ended before it was ready ({status})"))
            .hint("run the command with --foreground to see what it says"),
    )
}

/// The daemon's end of the readiness pipe, which was its standard output.
#[derive(Debug)]
pub struct Pipe {
    pipe: Option<File>,
}

impl Pipe {
    /// Makes this process a daemon: a session of its own, no inherited descriptors, and
    /// standard output kept as the readiness pipe. To be called first of all.
    pub fn detach() -> Result<Self, Failure> {
        // A lock or a pipe of the caller's must not live as long as the mount.
        close_inherited();
        // Fails only for a process group's leader, which is detached by whoever made
        // it one, such as systemd or a shell's job control.
        let _ = rustix::process::setsid();
        let pipe = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)
            .or_fail(|| "cannot keep the readiness pipe".into())?;
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .or_fail(|| "cannot open /dev/null".into())?;
        rustix::stdio::dup2_stdout(&null).or_fail(|| "cannot close standard output".into())?;
        let pipe = File::from(pipe);
        let mut questions = pipe
            .try_clone()
            .or_fail(|| "cannot keep the readiness pipe".into())?;
        // As long as somebody waits for this process, its questions are put there.
        transport::ask_by(Some(Box::new(move |prompt| {
            let question = json_line(&Announcement::Ask(prompt.to_owned())).ok()?;
            questions.write_all(&question).ok()?;
            let mut answer = String::new();
            std::io::stdin().read_line(&mut answer).ok()?;
            serde_json::from_str(&answer).ok()?
        })));
        Ok(Self { pipe: Some(pipe) })
    }
}

impl Announce for Pipe {
    fn announce(&mut self, announcement: Announcement) {
        let Some(pipe) = &mut self.pipe else { return };
        let last = matches!(
            announcement,
            Announcement::Ready(_) | Announcement::Attached(_) | Announcement::Failed(_)
        );
        let written =
            json_line(&announcement).and_then(|line| pipe.write_all(&line).or_fail(String::new));
        if let Err(error) = written {
            tracing::debug!(%error, "nobody listens at the readiness pipe");
        }
        if last {
            // The caller returns now.
            self.pipe = None;
            transport::ask_by(None);
        }
    }
}

fn json_line(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    let mut line = serde_json::to_vec(value).or_fail(|| "cannot write JSON".into())?;
    line.push(b'\n');
    Ok(line)
}

fn close_inherited() {
    // SAFETY: nothing has been opened yet by this process above the standard
    // descriptors, so no owner of a descriptor loses it.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
}

/// Sends standard output and error to the log from here on.
pub fn log_to(path: &Path) -> Result<(), Failure> {
    let message = || format!("cannot write the log {}", path.display());
    if std::fs::metadata(path).is_ok_and(|found| found.len() > LOG_MAX) {
        std::fs::rename(path, path.with_extension("log.old")).or_fail(message)?;
    }
    let log: OwnedFd = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .or_fail(message)?
        .into();
    rustix::stdio::dup2_stdout(log.as_fd()).or_fail(message)?;
    rustix::stdio::dup2_stderr(log.as_fd()).or_fail(message)
}
