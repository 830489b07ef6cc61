//! `mirrorfs trash`.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::status::{reach, unexpected};
use super::{complain, duration, print, render};
use crate::daemon::control::{Client, Request, Response, TRASH_PAGE};
use crate::daemon::state::StateDir;
use crate::daemon::trash::{NOT_THERE, Plain, Restored};
use crate::daemon::{Exit, Failure, OrFail, locate};
use crate::replica::trash::{Kept, Removed};
use crate::tree::{Kind, RelPath, Timestamp};

/// List, bring back or remove what changes of the other side have displaced
///
/// What a change of the other side replaces or deletes is kept for 30 days, or for as long
/// as all of it takes no more than a tenth of the disk. DIR is a tree, mounted or not, or a
/// peer's directory; the working directory by default.
#[derive(Args, Debug)]
pub(super) struct Trash {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List what is in the trash, the latest first
    List {
        /// The trash of this directory
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Bring things back, to where nothing is
    ///
    /// Of several versions of a path the latest is brought back; an older one is named by
    /// its "id" in mirrorfs trash list --json. A directory stands for all that was below it.
    #[command(override_usage = "mirrorfs trash restore [OPTIONS] [DIR] <PATH>...")]
    Restore {
        /// The trash of DIR, if the first is the root of a tree; then what to bring back, by
        /// the paths that mirrorfs trash list prints
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Bring it back under this path instead
        #[arg(long = "as", value_name = "NEWPATH")]
        to: Option<PathBuf>,
    },
    /// Remove things for good
    Empty {
        /// The trash of this directory
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Only what was put there longer ago than this, such as 7d
        #[arg(long, value_name = "TIME", value_parser = duration::parse, default_value = "0")]
        older_than: Duration,
    },
}

impl Trash {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.action {
            Action::List { dir, json } => list(&dir, json),
            Action::Restore { paths, to } => restore(paths, to.as_deref()),
            Action::Empty { dir, older_than } => empty(&dir, older_than),
        }
    }
}

/// Whoever can reach a trash.
enum Holder {
    /// The daemon of a mounted tree.
    Daemon(Box<Client>),
    /// This process, in a directory that is not mounted. Whether it is a tree of this
    /// machine, which could be mounted meanwhile.
    Plain { is_tree: bool },
}

/// A trash, found by a directory of its tree.
struct Found {
    root: PathBuf,
    holder: Holder,
}

impl Found {
    fn by(dir: &Path) -> Result<Self, Failure> {
        let state = StateDir::find()?;
        if let Some((mirror, record)) = locate::find(&state, dir)? {
            let holder = match reach(&mirror, &record)? {
                Some(daemon) => Holder::Daemon(Box::new(daemon)),
                None => Holder::Plain { is_tree: true },
            };
            return Ok(Self {
                root: record.tree,
                holder,
            });
        }
        match Plain::root_of(dir)? {
            Some(root) => Ok(Self {
                root,
                holder: Holder::Plain { is_tree: false },
            }),
            None => Err(locate::require(&state, dir)
                .err()
                .unwrap_or_else(|| Failure::new(format!("{} has no trash", dir.display())))),
        }
    }

    fn list(&mut self) -> Result<Vec<Kept>, Failure> {
        let daemon = match &mut self.holder {
            // To look is possible also while somebody works in it.
            Holder::Plain { .. } => return Plain::open(&self.root, false)?.list(),
            Holder::Daemon(daemon) => daemon,
        };
        let mut all = Vec::new();
        loop {
            match daemon.call(Request::Trash { skip: all.len() }, None)? {
                Response::Trash { kept } => {
                    let last = kept.len() < TRASH_PAGE;
                    all.extend(kept);
                    if last {
                        return Ok(all);
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    fn restore(
        &mut self,
        paths: Vec<RelPath>,
        to: Option<RelPath>,
    ) -> Result<Vec<Restored>, Failure> {
        match &mut self.holder {
            Holder::Plain { is_tree } => {
                Plain::open(&self.root, *is_tree)?.restore(&paths, to.as_ref())
            }
            Holder::Daemon(daemon) => match daemon.call(Request::Restore { paths, to }, None)? {
                Response::Restored { restored } => Ok(restored),
                other => Err(unexpected(&other)),
            },
        }
    }

    fn empty(&mut self, older_than: Duration) -> Result<Removed, Failure> {
        match &mut self.holder {
            Holder::Plain { is_tree } => Plain::open(&self.root, *is_tree)?.empty(older_than),
            Holder::Daemon(daemon) => {
                let older_than_ms = duration::millis(older_than);
                match daemon.call(Request::Empty { older_than_ms }, None)? {
                    Response::Emptied(removed) => Ok(removed),
                    other => Err(unexpected(&other)),
                }
            }
        }
    }

    /// Whether a path is the root of a tree or of a peer's directory.
    fn is_root(path: &Path) -> bool {
        path.canonicalize()
            .is_ok_and(|canonical| Self::by(path).is_ok_and(|found| found.root == canonical))
    }

    /// A path below the root, from what a person wrote.
    fn path(&self, text: &Path) -> Result<RelPath, Failure> {
        let below = if text.is_absolute() {
            text.strip_prefix(&self.root)
                .or_fail(|| format!("{} is not in {}", text.display(), self.root.display()))?
        } else {
            text
        };
        // What a shell completes for a directory ends in a slash.
        let bytes = below.as_os_str().as_bytes();
        let bytes = bytes.strip_suffix(b"/").unwrap_or(bytes);
        let bytes = bytes.strip_prefix(b"./").unwrap_or(bytes);
        RelPath::new(bytes)
            .ok()
            .filter(|path| !path.is_root())
            .ok_or_else(|| {
                Failure::new(format!("{} is no path in the tree", text.display())).hint(format!(
                    "name it from the root of the tree, as mirrorfs trash list {} prints it",
                    self.root.display()
                ))
            })
    }
}

/// How scripts see what is in the trash.
#[derive(Serialize)]
struct Line {
    when: String,
    path: String,
    size: u64,
    kind: &'static str,
    id: String,
}

fn list(dir: &Path, json: bool) -> Result<Exit, Failure> {
    let kept = Found::by(dir)?.list()?;
    if json {
        let lines: Vec<Line> = kept
            .iter()
            .map(|kept| Line {
                when: when(kept.since),
                path: kept.path.to_string(),
                size: kept.size,
                kind: match kept.kind {
                    Kind::File => "file",
                    Kind::Symlink => "symlink",
                    Kind::Directory => "directory",
                    Kind::Special => "special",
                },
                id: kept.at.to_string(),
            })
            .collect();
        let text =
            serde_json::to_string_pretty(&lines).or_fail(|| "cannot print the list".into())?;
        print(text);
    } else {
        for kept in &kept {
            print(format_args!(
                "{}  {:>10}  {}",
                when(kept.since),
                render::bytes(kept.size),
                kept.path
            ));
        }
    }
    Ok(Exit::Done)
}

fn when(at: Timestamp) -> String {
    jiff::Timestamp::from_second(at.secs).map_or_else(|_| "?".into(), |at| at.to_string())
}

fn restore(mut paths: Vec<PathBuf>, to: Option<&Path>) -> Result<Exit, Failure> {
    // The root of a tree lies in no other tree, so that nothing else can be meant by it.
    let dir = if paths.len() > 1 && Found::is_root(&paths[0]) {
        paths.remove(0)
    } else {
        PathBuf::from(".")
    };
    if to.is_some() && paths.len() > 1 {
        return Err(Failure::new("--as takes one PATH").exit(Exit::Usage));
    }
    let mut found = Found::by(&dir)?;
    let wanted = paths
        .iter()
        .map(|path| found.path(path))
        .collect::<Result<Vec<_>, _>>()?;
    let to = to.map(|to| found.path(to)).transpose()?;
    let mut exit = Exit::Done;
    for Restored { path, to, error } in found.restore(wanted, to)? {
        let Some(error) = error else {
            match to {
                Some(to) => print(format_args!("{path} is back as {to}")),
                None => print(format_args!("{path} is back")),
            }
            continue;
        };
        exit = exit.and(Exit::Error);
        let failure = if error == NOT_THERE {
            Failure::new(format!("cannot bring {path} back: {error}")).hint(format!(
                "mirrorfs trash list {} shows what is there",
                found.root.display()
            ))
        } else {
            let place = to.as_ref().unwrap_or(&path);
            let place = if *place == path {
                format!("cannot bring {path} back: {error}")
            } else {
                format!("cannot bring {path} back as {place}: {error}")
            };
            Failure::new(place).hint(format!(
                "it stays in the trash; mirrorfs trash restore {} {path} --as NEWPATH brings it back under another path",
                found.root.display()
            ))
        };
        complain(&failure);
    }
    Ok(exit)
}

fn empty(dir: &Path, older_than: Duration) -> Result<Exit, Failure> {
    let Removed {
        files,
        bytes,
        in_use,
    } = Found::by(dir)?.empty(older_than)?;
    let noun = if files == 1 { "thing" } else { "things" };
    print(format_args!(
        "removed {files} {noun}, {} on the disk",
        render::bytes(bytes)
    ));
    if in_use > 0 {
        print(format_args!(
            "{in_use} stayed: open for writing in programs that had opened them before"
        ));
    }
    Ok(Exit::Done)
}
