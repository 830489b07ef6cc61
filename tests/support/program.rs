//! Running a program to its end, with what it printed, and never for ever.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What became of a program.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub line: String,
    /// The exit code; 128 plus the signal if it was killed.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Outcome {
    /// Fails unless the program ended with this code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code of {self}");
        self
    }

    /// Fails unless the program succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Both outputs, for what may be said on either.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Fails unless what was said contains all of these.
    #[track_caller]
    pub fn expect_said(self, parts: &[&str]) -> Self {
        let said = self.said().to_lowercase();
        for part in parts {
            assert!(
                said.contains(&part.to_lowercase()),
                "expected {part:?} in what it said: {self}"
            );
        }
        self
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ({:?})\n--- exit code {}\n--- stdout\n{}\n--- stderr\n{}\n---",
            self.line, self.took, self.code, self.stdout, self.stderr
        )
    }
}

/// Runs a command to its end and takes what it prints. Fails if it has not ended by the
/// deadline, and also if something that it started keeps its output open: a script that
/// captures the output of `mirrorfs mount` would hang.
#[track_caller]
pub fn run(command: &mut Command, deadline: Duration) -> Outcome {
    let line = line(command);
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start `{line}`: {error}"));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let Some(status) = wait(&mut child, deadline) else {
        child.kill().ok();
        child.wait().ok();
        let rest = Duration::from_secs(1);
        panic!(
            "`{line}` has not ended after {deadline:?}\n--- stdout\n{}\n--- stderr\n{}",
            stdout.recv_timeout(rest).unwrap_or_default(),
            stderr.recv_timeout(rest).unwrap_or_default(),
        );
    };
    let took = start.elapsed();
    let rest = Duration::from_secs(10);
    let taken = |what: &str, from: mpsc::Receiver<String>| {
        from.recv_timeout(rest).unwrap_or_else(|_| {
            panic!("`{line}` has ended, and something it started still holds its {what} open")
        })
    };
    Outcome {
        code: code(status),
        stdout: taken("standard output", stdout),
        stderr: taken("standard error", stderr),
        line,
        took,
    }
}

/// Waits for a child, at most until the deadline.
pub fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if start.elapsed() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => return None,
        }
    }
}

/// An exit status as a shell shows it.
pub fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

fn drain(from: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            from.read_to_end(&mut bytes).ok();
        }
        sender
            .send(String::from_utf8_lossy(&bytes).into_owned())
            .ok();
    });
    receiver
}
