//! The exit codes of every command, and which one wins where several hold.

use serde::{Deserialize, Serialize};

/// What a command tells the script that ran it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[repr(u8)]
pub enum Exit {
    /// Done, and nothing is left to say.
    #[default]
    Done = 0,
    /// An error, or a file that could not be mirrored.
    Error = 1,
    /// The command line was wrong.
    Usage = 2,
    /// Conflicts are open.
    Conflicts = 3,
    /// A peer cannot be reached; the changes are safe in the journal.
    Unreachable = 4,
    /// The time is up and changes are pending.
    TimedOut = 5,
    /// A safety brake is engaged.
    Brake = 6,
}

impl Exit {
    /// The number itself.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The one of two that is reported where both hold: 1, 6, 4, 5, 3, 0. A wrong
    /// command line is found before anything else can hold.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if other.rank() < self.rank() {
            other
        } else {
            self
        }
    }

    fn rank(self) -> u8 {
        match self {
            Self::Usage => 0,
            Self::Error => 1,
            Self::Brake => 2,
            Self::Unreachable => 3,
            Self::TimedOut => 4,
            Self::Conflicts => 5,
            Self::Done => 6,
        }
    }
}

impl FromIterator<Exit> for Exit {
    fn from_iter<I: IntoIterator<Item = Self>>(all: I) -> Self {
        all.into_iter().fold(Self::Done, Self::and)
    }
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        exit.code()
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl TryFrom<u8> for Exit {
    type Error = String;
    fn try_from(code: u8) -> Result<Self, String> {
        Ok(match code {
            0 => Self::Done,
            1 => Self::Error,
            2 => Self::Usage,
            3 => Self::Conflicts,
            4 => Self::Unreachable,
            5 => Self::TimedOut,
            6 => Self::Brake,
            other => return Err(format!("no exit code of mirrorfs: {other}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_is_that_of_the_design() {
        // "Where several hold: 1, 6, 4, 5, 3."
        let order = [1, 6, 4, 5, 3, 0].map(|code| Exit::try_from(code).unwrap());
        for (position, winner) in order.iter().enumerate() {
            for other in &order[position..] {
                assert_eq!(winner.and(*other), *winner);
                assert_eq!(other.and(*winner), *winner);
            }
        }
        assert_eq!(Exit::from_iter([]), Exit::Done);
        assert_eq!(
            Exit::from_iter([Exit::Conflicts, Exit::Unreachable, Exit::TimedOut]),
            Exit::Unreachable
        );
    }

    #[test]
    fn codes_survive_json() {
        for code in 0..=6u8 {
            let exit = Exit::try_from(code).unwrap();
            let text = serde_json::to_string(&exit).unwrap();
            assert_eq!(text, code.to_string());
            assert_eq!(serde_json::from_str::<Exit>(&text).unwrap(), exit);
        }
        assert!(serde_json::from_str::<Exit>("7").is_err());
    }
}
