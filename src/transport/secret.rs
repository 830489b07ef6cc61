//! Passphrases and passwords: who is asked, and that the answers are remembered.
//!
//! A login never waits for a person. One that lacks a secret fails and says which; it is
//! asked for with no connection open, and the login is tried again. Answers stay in the
//! memory of this process, because a link that breaks is made again with nobody there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use parking_lot::Mutex;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// The longest answer that is taken, in bytes.
const LONGEST: usize = 1024;

/// Whoever is asked.
type Ask = dyn FnMut(&str) -> Option<String> + Send;

static ASKED: Mutex<Option<Box<Ask>>> = Mutex::new(None);

/// Has all questions of this process put by `ask`; with none, by its terminal, else by the
/// program that `SSH_ASKPASS` names.
pub fn ask_by(ask: Option<Box<Ask>>) {
    *ASKED.lock() = ask;
}

/// Asks for something secret. None if there is nobody to ask, or no answer.
pub fn ask(prompt: &str) -> Option<String> {
    // Held while the question is open: one at a time.
    let mut asked = ASKED.lock();
    let answer = match &mut *asked {
        Some(ask) => ask(prompt),
        None => ask_here(prompt),
    };
    answer.filter(|answer| !answer.is_empty())
}

/// As ssh does: the terminal, unless the environment prefers the program.
fn ask_here(prompt: &str) -> Option<String> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let wish = variable("SSH_ASKPASS_REQUIRE");
    let is = |word: &str| wish.as_ref().is_some_and(|wish| wish == word);
    let program = variable("SSH_ASKPASS").filter(|_| !is("never"));
    let program_first = is("force") || is("prefer");
    if !program_first && let Ok(terminal) = terminal() {
        return ask_at(&terminal, prompt).ok().flatten();
    }
    let output = Command::new(program?)
        .arg(prompt)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let answer = String::from_utf8(output.stdout).ok()?;
    answer.lines().next().map(str::to_owned)
}

fn terminal() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/tty")
}

/// Reads a line without showing it.
fn ask_at(mut terminal: &File, prompt: &str) -> io::Result<Option<String>> {
    let silent = Silent::new(terminal)?;
    terminal.write_all(prompt.as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    let answered = loop {
        match terminal.read(&mut byte) {
            Ok(0) => break false,
            Ok(_) if byte[0] == b'\n' => break true,
            // Ctrl-C, which is no signal just now.
            Ok(_) if byte[0] == 3 || line.len() == LONGEST => break false,
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    drop(silent);
    terminal.write_all(b"\n")?;
    Ok(answered.then(|| String::from_utf8(line).ok()).flatten())
}

/// A terminal that shows nothing and raises no signals until this is dropped.
struct Silent<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Silent<'a> {
    fn new(terminal: &'a File) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut silent = before.clone();
        silent.local_modes -= LocalModes::ECHO | LocalModes::ISIG;
        tcsetattr(terminal, OptionalActions::Drain, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, OptionalActions::Drain, &self.before);
    }
}

#[cfg(feature = "libssh2")]
pub(super) use known::Secret;

#[cfg(feature = "libssh2")]
mod known {
    use std::collections::BTreeMap;
    use std::path::Path;

    use parking_lot::Mutex;

    /// How often one secret is asked for before nobody seems to know it.
    const ATTEMPTS: u32 = 3;

    static KNOWN: Mutex<BTreeMap<Secret, Answer>> = Mutex::new(BTreeMap::new());

    #[derive(Default)]
    struct Answer {
        is: Option<String>,
        asked: u32,
    }

    /// Something that only a person knows, named by the question for it.
    #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
    pub(in crate::transport) struct Secret(String);

    impl Secret {
        pub(in crate::transport) fn passphrase(file: &Path) -> Self {
            Self(format!("Enter passphrase for key '{}': ", file.display()))
        }

        pub(in crate::transport) fn password(user: &str, host: &str, port: u16) -> Self {
            Self(match port {
                22 => format!("{user}@{host}'s password: "),
                port => format!("{user}@{host}:{port}'s password: "),
            })
        }

        /// What was answered, if anything was.
        pub(in crate::transport) fn answer(&self) -> Option<String> {
            KNOWN.lock().get(self)?.is.clone()
        }

        /// Whether asking may still help.
        pub(in crate::transport) fn may_be_asked(&self) -> bool {
            let known = KNOWN.lock();
            known.get(self).is_none_or(|answer| answer.asked < ATTEMPTS)
        }

        /// Asks, and says whether there was an answer. Where nobody answers nobody is
        /// asked again.
        pub(in crate::transport) fn ask(&self) -> bool {
            let answer = super::ask(&self.0);
            let mut known = KNOWN.lock();
            let entry = known.entry(self.clone()).or_default();
            entry.asked = match answer {
                Some(_) => entry.asked + 1,
                None => ATTEMPTS,
            };
            entry.is = answer;
            entry.is.is_some()
        }

        /// Forgets an answer that was wrong.
        pub(in crate::transport) fn forget(&self) {
            if let Some(answer) = KNOWN.lock().get_mut(self) {
                answer.is = None;
            }
        }

        /// Remembers that an answer was right: should the link break, and the answer be
        /// wrong by then, it is asked for again.
        pub(in crate::transport) fn was_right(&self) {
            if let Some(answer) = KNOWN.lock().get_mut(self) {
                answer.asked = 0;
            }
        }
    }
}
