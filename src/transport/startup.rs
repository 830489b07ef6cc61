//! What happens on a peer between the login and the agent: finding mirrorfs, or
//! installing it, in a dialogue with a few lines of shell.
//!
//! The script says where it is in lines that start with [`MARK`], each after a line
//! break of its own, so that whatever a login shell prints first is told apart and
//! skipped. Everything goes through the one channel that the agent then inherits: no
//! second login, and the same code for both SSH transports.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{ConnectError, ConnectOptions, Deadline};
use crate::wire::frame::printable;

/// What the script's own lines start with.
const MARK: &str = "mirrorfs-agent:";

/// The most that is skipped of what a login shell prints.
const GREETING: usize = 64 << 10;

/// How long one piece of an upload may take. A slow link takes as long as it takes.
const UPLOAD_STALL: Duration = Duration::from_secs(30);

/// For `sh -c SCRIPT sh AGENT COMMAND ROOT`. No line breaks, which a C shell would not take
/// inside quotes. `exec` replaces the shell, so that the agent is what sshd ends.
const SCRIPT: &str = concat!(
    r#"set -f; a=$1; v=$2; r=$3; "#,
    r#"say() { printf "\nmirrorfs-agent:%s\n" "$1"; }; "#,
    r#"run() { say start; exec "$@" "$v" --stdio "$r"; }; "#,
    r#"if [ -n "$a" ]; then "#,
    r#"if command -v "${a%% *}" >/dev/null 2>&1; then run $a; fi; "#,
    r#"say absent; exit 127; fi; "#,
    // A non-interactive shell often has a shorter PATH than the user is used to.
    r#"for p in mirrorfs "$HOME/.local/bin/mirrorfs" "$HOME/.cargo/bin/mirrorfs" /usr/local/bin/mirrorfs; do "#,
    r#"if command -v "$p" >/dev/null 2>&1; then run "$p"; fi; done; "#,
    r#"say "missing $(uname -sm)"; "#,
    r#"read -r name size sum || exit 127; "#,
    r#"d=$HOME/.local/share/mirrorfs/agent; f=$d/$name; t=; "#,
    r#"fail() { say "failed $1"; exit 1; }; "#,
    // SHA-256 of a file, by whichever program can tell.
    r#"digest() { if command -v sha256sum >/dev/null; then sha256sum; elif command -v shasum >/dev/null; then shasum -a 256; elif command -v openssl >/dev/null; then openssl dgst -sha256 -r; fi <"$1" 2>/dev/null | cut -d ' ' -f 1; }; "#,
    // What bears the name of an agent of ours, is a file of this user's, and is run by
    // nobody. What cannot be looked at counts as not running: Linux lets it run on.
    r#"ours() { [ -f "$1" ] && [ ! -L "$1" ] && [ -O "$1" ]; }; "#,
    r#"runs() { for p in /proc/[0-9]*/exe; do if [ "$p" -ef "$1" ]; then return 0; fi; done; return 1; }; "#,
    r#"tidy() { set +f; for o in "$d"/mirrorfs-*-????????????????; do "#,
    r#"case ${o##*-} in *[!0-9a-f]*) continue;; esac; "#,
    r#"if [ "$o" != "$f" ] && ours "$o" && ! runs "$o"; then rm -f "$o"; fi; done; "#,
    // What an upload that was killed has left; one that is under way has just been written to.
    r#"find "$d" -name '.mirrorfs-*' -type f -mmin +60 -exec rm -f {} + 2>/dev/null; set -f; }; "#,
    r#"start() { tidy; run "$f"; }; "#,
    r#"if [ -e "$f" ] || [ -L "$f" ]; then ours "$f" || fail "$f is not a file of mirrorfs: move it away"; "#,
    r#"if [ -x "$f" ] && [ "$(digest "$f")" = "$sum" ]; then start; fi; fi; "#,
    r#"(umask 077; mkdir -p "$d") || fail "the directory cannot be made"; "#,
    r#"[ -n "$(digest /dev/null)" ] || fail "there is none of sha256sum, shasum and openssl to verify it with"; "#,
    // Also where the connection ends amid the upload: then the next line cannot be said.
    r#"trap 'rm -f "$t"' EXIT; trap 'exit 1' HUP INT PIPE TERM; "#,
    r#"t=$(mktemp "$d/.$name.XXXXXX") || fail "the directory cannot be written to"; "#,
    r#"say send; "#,
    // The whole upload is read also where it cannot be stored, or both would hang.
    r#"head -c "$size" >"$t" || cat >/dev/null; "#,
    r#"n=$(($(wc -c <"$t"))); "#,
    r#"[ "$n" = "$size" ] || fail "$n of $size bytes were stored"; "#,
    r#"[ "$(digest "$t")" = "$sum" ] || fail "the upload was damaged on the way"; "#,
    r#"chmod 700 "$t" || fail "it cannot be made executable"; "#,
    r#""$t" --version </dev/null >/dev/null || fail "the program of this machine does not run there"; "#,
    r#"sync "$t" 2>/dev/null || sync; "#,
    r#"mv "$t" "$f" || fail "it cannot be put into place"; "#,
    r#"start"#,
);

/// Who is being talked to, for messages.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) user: String,
}

/// How the dialogue failed.
pub(super) enum Failure {
    /// The stream ended; whoever carries it knows why. Holds what was printed first.
    Ended(String),
    /// It is clear what is wrong.
    Error(ConnectError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Error(error.into())
    }
}

/// Quotes a word so that any shell's user may have as login shell takes it literally:
/// single quotes, with those characters outside that some shell treats in its own way
/// inside them.
pub(super) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut quoted = String::with_capacity(word.len() + 2);
    let mut inside = false;
    for c in word.chars() {
        let literal = !matches!(c, '\'' | '\\' | '!');
        if literal != inside {
            quoted.push('\'');
            inside = literal;
        }
        if !literal {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    if inside {
        quoted.push('\'');
    }
    if quoted.is_empty() {
        quoted.push_str("''");
    }
    quoted
}

/// The command line for the peer's login shell.
pub(super) fn command(options: &ConnectOptions, root: &str) -> Result<String, ConnectError> {
    let agent = options.agent.as_deref().unwrap_or_default().trim();
    if root.contains('\n') || agent.contains('\n') {
        return Err(ConnectError::Path {
            path: root.to_owned(),
        });
    }
    // A relative root is relative to the home directory, where sshd starts commands.
    let root = match root.strip_prefix('-') {
        Some(_) => format!("./{root}"),
        None => root.to_owned(),
    };
    Ok(format!(
        "exec sh -c {} sh {} {} {}",
        quote(SCRIPT),
        quote(agent),
        options.serve.command(),
        quote(&root)
    ))
}

/// Talks with the script until the agent runs.
pub(super) fn await_agent(
    stream: &UnixStream,
    target: &Target,
    options: &ConnectOptions,
    deadline: Deadline,
) -> Result<(), Failure> {
    let mut lines = Lines {
        stream,
        target,
        deadline,
        greeting: Vec::new(),
    };
    let missing = |detail: String| {
        Failure::Error(ConnectError::AgentMissing {
            host: target.host.clone(),
            port: target.port,
            detail,
        })
    };
    let mut offered: Option<Program> = None;
    loop {
        let word = lines.next()?;
        match word.split_once(' ').unwrap_or((word.as_str(), "")) {
            ("start", _) => break,
            ("absent", _) => {
                return Err(missing(format!(
                    "MIRRORFS_AGENT is {:?}, and there is no such command there",
                    options.agent.as_deref().unwrap_or_default()
                )));
            }
            ("missing", system) => {
                let own = own_system();
                if system != own {
                    return Err(missing(format!(
                        "it cannot be installed from here, because this machine is {own} and that one {system}. What it needs is mirrorfs {} for {system}, as mirrorfs in the PATH of {}, or in ~/.local/bin there",
                        env!("CARGO_PKG_VERSION"),
                        target.user
                    )));
                }
                let program = offered.insert(Program::open(&options.program)?);
                stream.set_write_timeout(Some(UPLOAD_STALL))?;
                let offer = format!("{} {} {}\n", program.name, program.size, program.sum);
                let mut output = stream;
                output.write_all(offer.as_bytes())?;
                lines.deadline = Deadline::after(options.timeout);
            }
            ("send", _) if offered.is_some() => {
                if let Some(program) = offered.take() {
                    program.send(stream)?;
                }
                lines.deadline = Deadline::after(options.timeout);
            }
            ("failed", detail) => {
                return Err(Failure::Error(ConnectError::Install {
                    host: target.host.clone(),
                    port: target.port,
                    detail: detail.to_owned(),
                }));
            }
            (_, _) => {
                return Err(Failure::Error(ConnectError::Startup {
                    host: target.host.clone(),
                    port: target.port,
                    detail: format!("it said {word:?}, which means nothing here"),
                }));
            }
        }
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(())
}

/// The script's lines as they arrive.
struct Lines<'a> {
    stream: &'a UnixStream,
    target: &'a Target,
    deadline: Deadline,
    /// What came that was not the script's.
    greeting: Vec<u8>,
}

impl Lines<'_> {
    /// The next line of the script, without its mark.
    fn next(&mut self) -> Result<String, Failure> {
        let mut line = Vec::new();
        let mut input = self.stream;
        loop {
            if self.deadline.passed() {
                return Err(self.timeout());
            }
            self.stream.set_read_timeout(Some(self.deadline.left()))?;
            // Byte for byte: what follows the last line is the agent's.
            let mut byte = [0];
            match input.read(&mut byte) {
                Ok(0) => {
                    self.greeting.append(&mut line);
                    return Err(Failure::Ended(printable(&self.greeting)));
                }
                Ok(_) if byte[0] == b'\n' => {
                    if let Some(word) = std::str::from_utf8(&line)
                        .ok()
                        .and_then(|line| line.strip_prefix(MARK))
                    {
                        return Ok(word.trim_end().to_owned());
                    }
                    if !line.is_empty() {
                        self.greeting.append(&mut line);
                        self.greeting.push(b'\n');
                    }
                }
                Ok(_) => line.push(byte[0]),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted
                            | io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                    ) => {}
                // The child is gone with unread input: the same as an end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Failure::Ended(printable(&self.greeting)));
                }
                Err(error) => return Err(error.into()),
            }
            if self.greeting.len() + line.len() > GREETING {
                self.greeting.append(&mut line);
                return Err(Failure::Error(self.noise()));
            }
        }
    }

    fn noise(&self) -> ConnectError {
        ConnectError::Startup {
            host: self.target.host.clone(),
            port: self.target.port,
            detail: format!(
                "the peer's shell printed {:?} and did not come to the agent: make .bashrc (or what prints this) silent for non-interactive shells",
                printable(&self.greeting)
            ),
        }
    }

    fn timeout(&self) -> Failure {
        Failure::Error(if self.greeting.is_empty() {
            ConnectError::Timeout {
                host: self.target.host.clone(),
                port: self.target.port,
                doing: "connecting and starting the agent",
                waited: self.deadline.allowed,
            }
        } else {
            self.noise()
        })
    }
}

/// This machine as `uname -sm` prints it.
fn own_system() -> String {
    let uname = rustix::system::uname();
    format!(
        "{} {}",
        uname.sysname().to_string_lossy(),
        uname.machine().to_string_lossy()
    )
}

/// The program to install on a peer.
struct Program {
    file: File,
    /// Contains version and content hash, so that it is never mistaken for another.
    name: String,
    size: u64,
    /// SHA-256 in hexadecimal, which the peer can compute before it has mirrorfs.
    sum: String,
}

impl Program {
    fn open(path: &Path) -> Result<Self, io::Error> {
        let mut file = File::open(path)?;
        let mut hash = Sha256::new();
        let mut size = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = file.read(&mut buffer)?;
            if length == 0 {
                break;
            }
            hash.update(&buffer[..length]);
            size += length as u64;
        }
        let sum: String = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Self {
            file,
            name: format!("mirrorfs-{}-{}", env!("CARGO_PKG_VERSION"), &sum[..16]),
            size,
            sum,
        })
    }

    fn send(mut self, mut stream: &UnixStream) -> Result<(), io::Error> {
        use std::io::{Seek, SeekFrom};
        self.file.seek(SeekFrom::Start(0))?;
        let sent = io::copy(&mut (&mut self.file).take(self.size), &mut stream)?;
        if sent == self.size {
            Ok(())
        } else {
            Err(io::Error::other(
                "the mirrorfs program changed while it was uploaded",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn quoted_words_reach_programs_as_they_are() {
        for word in [
            "plain/word-1.2",
            "",
            "a b",
            "it's",
            "''",
            "\\n\\\\",
            "$HOME `id` $(id)",
            "!!",
            "*?[a]{b,c}~#&|;<>()",
            "\"é\u{1f600}\"",
            "'\\!'",
        ] {
            for shell in ["sh", "bash"] {
                let output = Command::new(shell)
                    .arg("-c")
                    .arg(format!("printf %s {}", quote(word)))
                    .output()
                    .unwrap();
                assert_eq!(String::from_utf8(output.stdout).unwrap(), word, "{shell}");
            }
        }
    }

    #[test]
    fn a_root_never_looks_like_an_option_and_has_no_line_breaks() {
        let command = |agent: Option<&str>, root| {
            let options = ConnectOptions {
                agent: agent.map(str::to_owned),
                ..ConnectOptions::default()
            };
            super::command(&options, root)
        };
        assert!(command(None, "-x").unwrap().ends_with(" agent ./-x"));
        assert!(command(None, "/a\nb").is_err());
        assert!(!command(Some("a b"), "/a").unwrap().contains('\n'));
    }
}
