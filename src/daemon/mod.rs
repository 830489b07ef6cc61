//! The process behind a mount: how it starts and stops, what it says about itself, and
//! how commands talk to it.

mod adopt;
pub mod announce;
pub mod attach;
pub mod conflicts;
pub mod control;
pub mod doctor;
pub mod exit;
pub mod failure;
mod gone;
pub mod holders;
mod late;
pub mod launch;
pub mod locate;
pub mod lock;
mod lost;
pub mod mounts;
pub mod once;
pub mod peers;
pub mod place;
mod put;
pub mod report;
pub mod run;
pub mod service;
pub mod site;
pub mod state;
pub mod status;
mod takeover;
pub mod trash;
mod upkeep;

pub use exit::Exit;
pub use failure::{Failure, OrFail};
