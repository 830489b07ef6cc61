//! The one error that users see: what failed, why, and what to do about it.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::exit::Exit;

/// An error for people. It crosses process borders (the daemon's readiness pipe, the
/// control socket), so it holds text and not the errors themselves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// What could not be done, with the path it is about.
    pub message: String,
    /// Why, the nearest cause first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
    /// The exit code that says so to a script.
    pub exit: Exit,
}

impl Failure {
    /// A failure with exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            causes: Vec::new(),
            hint: None,
            exit: Exit::Error,
        }
    }

    /// Adds a cause with all of its own causes.
    #[must_use]
    pub fn because(mut self, cause: &dyn Error) -> Self {
        let mut next = Some(cause);
        while let Some(error) = next {
            let text = error.to_string();
            // Errors that print their source inside their own message would be
            // said twice.
            if !self.causes.last().is_some_and(|last| last.ends_with(&text)) {
                self.causes.push(text);
            }
            next = error.source();
        }
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the exit code.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mirrorfs: {}", self.message)?;
        for cause in &self.causes {
            write!(f, ": {cause}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl Error for Failure {}

/// Turns an error into a [`Failure`] at the place where it is known what was tried.
pub trait OrFail<T> {
    /// Says what could not be done; the error becomes its cause.
    fn or_fail(self, message: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, message: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(message()).because(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn prints_message_causes_and_hint() {
        let failure = Failure::new("cannot mount /x")
            .because(&Outer(std::io::Error::from_raw_os_error(13)))
            .hint("ask root");
        assert_eq!(
            failure.to_string(),
            "mirrorfs: cannot mount /x: outer: Permission denied (os error 13)\nhint: ask root"
        );
    }

    #[test]
    fn says_nothing_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read: {0}")]
        struct Chatty(#[source] std::io::Error);
        let failure = Failure::new("no").because(&Chatty(std::io::Error::from_raw_os_error(2)));
        assert_eq!(
            failure.to_string(),
            "mirrorfs: no: cannot read: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn survives_json() {
        let failure = Failure::new("m").hint("h").exit(Exit::Brake);
        let text = serde_json::to_string(&failure).unwrap();
        assert_eq!(serde_json::from_str::<Failure>(&text).unwrap(), failure);
    }
}
