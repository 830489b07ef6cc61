//! Frames, messages and version negotiation between the mounted side and an agent.

pub mod flow;
pub mod frame;
pub mod message;
pub mod probe;
pub mod version;
