//! What an agent may say, and when. It serves somebody else's machine and is not trusted:
//! what a session lets in is checked here before anything is made of it. (That a frame is
//! bounded and that a path stays in the tree is checked when it is decoded.)
//!
//! A breach ends the session, with a reason that says what was wrong. What merely comes too
//! late (the rest of a content that is not wanted any more) is none, and is dropped.

use mirrorfs_journal::LINKS_MAX;

use crate::tree::scan::XATTRS_MAX;
use crate::tree::{Content, Entry, Epoch, RESERVED, RelPath};
use crate::wire::message::{Observation, Revision, ToMount, row_weight};

/// How many bytes the names and attributes of a whole tree may take: some five million
/// files. They are held in memory until the tree has been reported.
const LISTING: usize = 512 << 20;
/// The longest path.
const PATH: usize = 16 * 1024;
/// The longest text of a symbolic link that Linux takes.
const TARGET: usize = 4095;
/// All attributes of a file.
const XATTRS: usize = XATTRS_MAX;
/// The longest chain: what is remembered, and what was added since it was last cut short.
const LINKS: u64 = 2 * LINKS_MAX;
/// Beyond this no revision or size has ever been counted.
const FUTURE: u64 = i64::MAX as u64;

/// What one session has said so far.
#[derive(Default)]
pub(super) struct Expected {
    hello: Option<Hello>,
    /// The first report has ended.
    reported: bool,
    /// Bytes of names and attributes listed so far, until then.
    listed: usize,
    /// Agreements of the chain.
    links: usize,
    rev: u64,
}

struct Hello {
    epoch: Epoch,
    settled: bool,
}

impl Expected {
    /// Says what is wrong with the next message of the session, if anything.
    pub(super) fn check(&mut self, message: &ToMount) -> Result<(), String> {
        let Some(hello) = &self.hello else {
            return match message {
                ToMount::Hello(hello) => {
                    self.hello = Some(Hello {
                        epoch: hello.epoch,
                        settled: hello.settled,
                    });
                    Ok(())
                }
                ToMount::Refused { .. } | ToMount::Closing { .. } => Ok(()),
                _ => Err("the agent did not begin with a hello".to_owned()),
            };
        };
        match message {
            ToMount::Hello(_) | ToMount::Refused { .. } => {
                Err("the agent said hello a second time".to_owned())
            }
            ToMount::Chain { links, .. } => {
                if hello.settled {
                    return Err("the agent sent agreements that nobody asked for".to_owned());
                }
                self.links += links.len();
                if self.links as u64 > LINKS {
                    return Err(format!("the agent lists more than {LINKS} agreements"));
                }
                Ok(())
            }
            ToMount::Base { rows, .. } => {
                for (path, entry) in rows {
                    path_of(path)?;
                    entry_of(path, entry)?;
                    self.list(row_weight(path, Some(entry)))?;
                }
                Ok(())
            }
            ToMount::Observed {
                observations,
                complete,
                upto,
            } => {
                self.revision(*upto)?;
                if self.reported && !complete {
                    return Err("the agent began a second report of its tree".to_owned());
                }
                for observation in observations {
                    observed(observation, *upto)?;
                    if !self.reported {
                        let entry = observation.entry.as_ref();
                        self.list(row_weight(&observation.path, entry))?;
                    }
                }
                self.reported |= complete;
                Ok(())
            }
            ToMount::Applied { upto, .. } => self.revision(*upto),
            ToMount::Late {
                path, copy, kept, ..
            } => [Some(path), copy.as_ref(), kept.as_ref()]
                .into_iter()
                .flatten()
                .try_for_each(path_of),
            _ => Ok(()),
        }
    }

    fn list(&mut self, bytes: usize) -> Result<(), String> {
        self.listed += bytes;
        if self.listed > LISTING {
            return Err(format!(
                "the agent lists a tree without end: more than {} MiB of names",
                LISTING >> 20
            ));
        }
        Ok(())
    }

    fn revision(&mut self, upto: Revision) -> Result<(), String> {
        if self
            .hello
            .as_ref()
            .is_some_and(|hello| hello.epoch != upto.epoch)
        {
            return Err("the agent reports from another time than its hello".to_owned());
        }
        if upto.rev > FUTURE {
            return Err("the agent reports from the future".to_owned());
        }
        if upto.rev < self.rev {
            return Err("the agent counts its reports backwards".to_owned());
        }
        self.rev = upto.rev;
        Ok(())
    }
}

fn observed(observation: &Observation, upto: Revision) -> Result<(), String> {
    let path = &observation.path;
    path_of(path)?;
    if observation.rev > upto.rev {
        return Err(format!("{path}: the agent reports it from the future"));
    }
    match &observation.entry {
        Some(entry) => entry_of(path, entry),
        None => Ok(()),
    }
}

fn path_of(path: &RelPath) -> Result<(), String> {
    if path.components().next() == Some(RESERVED) {
        return Err(format!("{path}: the agent reports what is reserved"));
    }
    if path.as_bytes().len() > PATH {
        return Err(format!(
            "the agent reports a path of more than {PATH} bytes"
        ));
    }
    Ok(())
}

fn entry_of(path: &RelPath, entry: &Entry) -> Result<(), String> {
    let fits = match &entry.content {
        Content::Directory => true,
        Content::File { size, .. } => *size <= FUTURE,
        Content::Symlink { target } => {
            !target.is_empty() && target.len() <= TARGET && !target.contains(&0)
        }
    };
    let xattrs = entry.xattrs.iter();
    let bytes: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
    let names = |name: &Vec<u8>| name.starts_with(b"user.") && !name.contains(&0);
    let fits = fits
        && entry.mode <= 0o7777
        && entry.mtime.nanos < 1_000_000_000
        && bytes <= XATTRS
        && entry.xattrs.keys().all(names);
    if fits {
        Ok(())
    } else {
        Err(format!("{path}: the agent reports what no file can be"))
    }
}

#[cfg(test)]
mod tests;
