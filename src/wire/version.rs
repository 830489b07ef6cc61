//! Which protocol two sides speak with each other, and which optional parts of it.
//!
//! What is read here keeps its layout in every version to come: the magic, the frame, the
//! first three fields of either hello, and the refusal for want of a common protocol. So
//! two versions that cannot work together can still say which of them to upgrade, and a
//! hello may grow at its end.

use serde::{Deserialize, Serialize};

use super::frame::FrameError;
use super::message::{
    AgentHello, DELTAS, LATE, MountHello, PROTOCOL_MAX, PROTOCOL_MIN, Refusal, ToAgent, ToMount,
};
use crate::tree::{Id, MirrorId, ReplicaId};

/// The optional parts of the protocol that this program knows, by name. A part is used
/// where both sides name it.
pub const FEATURES: &[&str] = &[DELTAS, LATE];

/// How either side introduces itself: the beginning of its hello.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Introduction {
    /// Lowest and highest protocol it speaks.
    pub protocol: (u16, u16),
    /// Names of optional parts of the protocol it knows.
    pub features: Vec<String>,
    /// Its program version, for messages to people.
    pub version: String,
}

/// What two sides have in common.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Common {
    /// The highest protocol that both speak.
    pub protocol: u16,
    /// The optional parts that both know.
    pub features: Vec<String>,
}

/// The first message of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum First<M> {
    /// One of this protocol, or of a later one that begins in the same way.
    Message(M),
    /// A hello of a protocol that this program cannot read, as far as that says who spoke.
    Foreign(Introduction),
}

impl Introduction {
    /// How this program introduces itself.
    pub fn own() -> Self {
        Self {
            protocol: (PROTOCOL_MIN, PROTOCOL_MAX),
            features: FEATURES.iter().map(|&name| name.to_owned()).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The hello with which this program begins a session with a peer of which it knows
    /// nothing yet. What is known is filled in from the journal.
    pub fn hello(mirror: MirrorId, replica: ReplicaId, session: Id) -> MountHello {
        let Self {
            protocol,
            features,
            version,
        } = Self::own();
        MountHello {
            protocol,
            features,
            version,
            mirror,
            replica,
            session,
            agreement: None,
            proposed: None,
            seen: None,
            peer: None,
        }
    }

    /// What this side has in common with another; none if they share no protocol.
    pub fn common(&self, other: &Self) -> Option<Common> {
        let lowest = self.protocol.0.max(other.protocol.0);
        let highest = self.protocol.1.min(other.protocol.1);
        let mut features = self.features.clone();
        features.retain(|name| other.features.contains(name));
        (lowest <= highest).then_some(Common {
            protocol: highest,
            features,
        })
    }

    /// Reads the beginning of a hello of whatever version, as one of two kinds of
    /// messages whose first kind is the hello.
    pub(super) fn of_hello(plain: &[u8]) -> Option<Self> {
        let (kind, rest) = postcard::take_from_bytes::<u32>(plain).ok()?;
        let (introduction, _) = postcard::take_from_bytes(rest).ok()?;
        (kind == 0).then_some(introduction)
    }
}

impl From<&MountHello> for Introduction {
    fn from(hello: &MountHello) -> Self {
        Self {
            protocol: hello.protocol,
            features: hello.features.clone(),
            version: hello.version.clone(),
        }
    }
}

impl From<&AgentHello> for Introduction {
    fn from(hello: &AgentHello) -> Self {
        Self {
            protocol: hello.protocol,
            features: hello.features.clone(),
            version: hello.version.clone(),
        }
    }
}

/// Why an agent and a mounted side cannot talk; none if they can.
pub fn mismatch(agent: &Introduction, mount: &Introduction) -> Option<Refusal> {
    match agent.common(mount) {
        Some(_) => None,
        None => Some(Refusal::Protocol {
            agent: agent.protocol,
            mount: mount.protocol,
        }),
    }
}

/// What an agent makes of the first thing it hears: a hello that it can answer, or why it
/// refuses. Anything else is an error.
pub fn greeted(first: First<ToAgent>) -> Result<Result<MountHello, Refusal>, FrameError> {
    let own = Introduction::own();
    match first {
        First::Message(ToAgent::Hello(hello)) => Ok(match mismatch(&own, &(&hello).into()) {
            Some(refusal) => Err(refusal),
            None => Ok(hello),
        }),
        First::Message(_) => Err(FrameError::NoHello),
        First::Foreign(mount) => match mismatch(&own, &mount) {
            Some(refusal) => Ok(Err(refusal)),
            // It says that it speaks a protocol of ours, and does not.
            None => Err(FrameError::NoHello),
        },
    }
}

/// What the mounted side makes of the agent's first message: where they have no protocol
/// in common, the refusal that says which side to upgrade, whoever noticed.
pub fn answered(first: First<ToMount>) -> Result<ToMount, FrameError> {
    let own = Introduction::own();
    let agent = match &first {
        First::Message(ToMount::Hello(hello)) => Some(hello.into()),
        First::Message(_) => None,
        First::Foreign(agent) => Some(agent.clone()),
    };
    match (agent.and_then(|agent| mismatch(&agent, &own)), first) {
        (Some(refusal), _) => Ok(ToMount::Refused { refusal }),
        (None, First::Message(message)) => Ok(message),
        (None, First::Foreign(_)) => Err(FrameError::NoHello),
    }
}

#[cfg(test)]
mod tests;
