//! The whole engine in one thread, from one seed. See `docs/testing.md`.

pub(crate) mod clock;
mod hands;
pub(crate) mod hook;
pub(crate) mod jobs;
mod ledger;
mod mounted;
mod peer;
mod random;
mod shown;
pub(crate) mod tests;
mod world;
