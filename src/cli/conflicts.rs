//! `mirrorfs conflicts`.

mod show;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, Subcommand};

use super::print;
use super::status::{of, reach, unexpected};
use crate::daemon::conflicts::{self, Choice, Copy, Detail, Version};
use crate::daemon::control::{Outcome, Request, Response};
use crate::daemon::state::{MirrorDir, Record, StateDir};
use crate::daemon::{Exit, Failure, OrFail, locate};
use crate::replica::Root;
use crate::tree::{ContentHash, Id, RelPath};

/// List open conflicts, look at one, or settle it
#[derive(Args, Debug)]
pub(super) struct Conflicts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List the conflicts that are open
    List {
        /// Of the mirror of this directory
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show what happened, both versions, and where the artefacts are
    Show {
        /// The file in conflict
        path: PathBuf,
    },
    /// Compare this side's version with the copy of the peer's
    ///
    /// Shows what either side has changed since both last agreed, where that is still known:
    /// of text up to 256 KiB. Else it compares the two. Runs diff -u; or the command in
    /// MIRRORFS_DIFF with the two files, and with what both had agreed on in MIRRORFS_BASE.
    Diff {
        /// The file in conflict
        path: PathBuf,
    },
    /// Settle the conflict at a path; what is replaced goes to the trash
    Resolve {
        /// The file in conflict
        path: PathBuf,
        #[command(flatten)]
        how: How,
        /// With --local or --remote: a copy that was edited goes to the trash
        #[arg(long, conflicts_with_all = ["both", "merged"])]
        discard_edits: bool,
    },
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct How {
    /// This side's version wins over the version of the peer that is on record
    #[arg(long)]
    local: bool,
    /// The peer's version wins
    #[arg(long)]
    remote: bool,
    /// This side's version stays, and the peer's becomes a file of its own beside it
    #[arg(long)]
    both: bool,
    /// The file as it is now is the result; the copy goes, edited or not
    #[arg(long)]
    merged: bool,
}

impl How {
    fn choice(&self) -> Choice {
        match self {
            Self { remote: true, .. } => Choice::Remote,
            Self { both: true, .. } => Choice::Both,
            Self { merged: true, .. } => Choice::Merged,
            _ => Choice::Local,
        }
    }
}

impl Conflicts {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.action {
            Action::List { dir, json } => list(&dir, json),
            Action::Show { path } => show(&path),
            Action::Diff { path } => diff(&path),
            Action::Resolve {
                path,
                how,
                discard_edits,
            } => resolve(&path, how.choice(), discard_edits),
        }
    }
}

fn list(dir: &Path, json: bool) -> Result<Exit, Failure> {
    let state = StateDir::find()?;
    let (mirror, record) = locate::require(&state, dir)?;
    let conflicts = of(&mirror, &record)?.conflicts;
    if json {
        let text = serde_json::to_string_pretty(&conflicts)
            .or_fail(|| "cannot print the conflicts".into())?;
        print(text);
    } else {
        for conflict in &conflicts {
            match &conflict.copy {
                Some(copy) => print(format_args!("{}  (theirs: {copy})", conflict.path)),
                None => print(&conflict.path),
            }
        }
    }
    Ok(if conflicts.is_empty() {
        Exit::Done
    } else {
        Exit::Conflicts
    })
}

/// A file of this command's own, removed when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn with(bytes: &[u8]) -> std::io::Result<Self> {
        let id = Id::random().map_err(std::io::Error::other)?;
        let path = std::env::temp_dir().join(format!("mirrorfs-base-{id}"));
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&path)?;
        let scratch = Self(path);
        file.write_all(bytes)?;
        Ok(scratch)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A path of a mirror, as a person wrote it.
struct Place {
    mirror: MirrorDir,
    record: Record,
    path: RelPath,
}

impl Place {
    fn find(path: &Path) -> Result<Self, Failure> {
        let state = StateDir::find()?;
        let path = std::path::absolute(path).or_fail(|| format!("no path: {}", path.display()))?;
        let (name, parent) = match (path.file_name(), path.parent()) {
            (Some(name), Some(parent)) => (name, parent),
            _ => return Err(Failure::new(format!("{} names no file", path.display()))),
        };
        // The file itself may be gone; the directory it is in tells the mirror.
        let (mirror, record) = locate::require(&state, parent)?;
        let parent = std::fs::canonicalize(parent)
            .or_fail(|| format!("cannot find the directory {}", parent.display()))?;
        let below = parent.join(name);
        let below = below
            .strip_prefix(&record.tree)
            .or_fail(|| format!("{} is not in {}", path.display(), record.tree.display()))?;
        let below = std::os::unix::ffi::OsStrExt::as_bytes(below.as_os_str());
        let below = RelPath::new(below).or_fail(|| format!("no path: {}", path.display()))?;
        Ok(Self {
            mirror,
            record,
            path: below,
        })
    }

    /// What is known of the conflicts there: from the daemon, or else from the journal.
    fn details(&self) -> Result<Vec<Detail>, Failure> {
        let path = self.path.clone();
        if let Some(mut daemon) = reach(&self.mirror, &self.record)? {
            return match daemon.call(Request::Conflict { path }, None)? {
                Response::Conflicts { conflicts } => Ok(conflicts),
                other => Err(unexpected(&other)),
            };
        }
        let tree = &self.record.tree;
        let root = File::open(tree).or_fail(|| format!("cannot open {}", tree.display()))?;
        let journal = self.mirror.path();
        let view = mirrorfs_journal::look(journal)
            .or_fail(|| format!("cannot read the journal in {}", journal.display()))?
            .ok_or_else(|| Failure::new(format!("there is no conflict at {path}")))?;
        conflicts::details(&view, &Root::new(root.into()), &path)
    }

    /// What both sides had agreed on, in a file, if that is still known.
    fn base(&self, detail: &Detail) -> Result<Option<Scratch>, Failure> {
        let Version::File { hash, .. } = &detail.base else {
            return Ok(None);
        };
        let message = || format!("cannot tell what was agreed on of {}", detail.path);
        let hash = ContentHash::parse(hash).ok_or_else(|| Failure::new(message()))?;
        match mirrorfs_journal::kept_content(self.mirror.path(), hash).or_fail(message)? {
            Some(bytes) => Scratch::with(&bytes).or_fail(message).map(Some),
            None => Ok(None),
        }
    }

    fn file(&self, path: &RelPath) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.record
            .tree
            .join(std::ffi::OsStr::from_bytes(path.as_bytes()))
    }
}

fn show(path: &Path) -> Result<Exit, Failure> {
    for (position, detail) in Place::find(path)?.details()?.iter().enumerate() {
        if position > 0 {
            print("");
        }
        print(show::detail(detail).trim_end());
    }
    Ok(Exit::Done)
}

fn diff(path: &Path) -> Result<Exit, Failure> {
    let place = Place::find(path)?;
    for detail in place.details()? {
        let copy = match &detail.copy {
            Some((copy, Copy::Unedited | Copy::Edited)) => place.file(copy),
            Some((copy, Copy::Missing)) => {
                return Err(
                    Failure::new(format!("the copy {copy} is gone")).hint(format!(
                        "that means that your version wins; see mirrorfs conflicts show {}",
                        detail.path
                    )),
                );
            }
            None => return Err(no_copy(&place, &detail)),
        };
        let local = match detail.local {
            Version::Nothing => PathBuf::from("/dev/null"),
            _ => place.file(&detail.path),
        };
        let wanted = std::env::var_os("MIRRORFS_DIFF").filter(|command| !command.is_empty());
        let base = place.base(&detail)?;
        if let (None, Some(base)) = (&wanted, &base) {
            let here = format!("{} (here)", detail.path);
            let there = format!("{} (on {})", detail.path, detail.peer);
            let agreed = format!("{} (agreed on)", detail.path);
            three_ways(base.path(), &agreed, [(&local, &here), (&copy, &there)])?;
            continue;
        }
        let mut command = match &wanted {
            // By the shell, so that it may have arguments of its own.
            Some(wanted) => {
                let mut script = wanted.clone();
                script.push(" \"$@\"");
                let mut command = Command::new("sh");
                command.arg("-c").arg(script).arg("mirrorfs");
                command
            }
            None => {
                let mut command = Command::new("diff");
                command.arg("-u");
                command
            }
        };
        let name = wanted.map_or_else(
            || "diff -u".to_owned(),
            |wanted| wanted.to_string_lossy().into_owned(),
        );
        if let Some(base) = &base {
            command.env("MIRRORFS_BASE", base.path());
        }
        let status = command
            .arg(local)
            .arg(copy)
            .status()
            .or_fail(|| format!("cannot run {name}"))
            .map_err(|failure| failure.hint("install it, or set MIRRORFS_DIFF to another"))?;
        // diff says 1 when the files differ.
        if !matches!(status.code(), Some(0 | 1)) {
            return Err(Failure::new(format!("{name} failed: {status}")));
        }
    }
    Ok(Exit::Done)
}

/// What each side has changed.
fn three_ways(base: &Path, agreed: &str, sides: [(&PathBuf, &String); 2]) -> Result<(), Failure> {
    for (side, label) in sides {
        let status = Command::new("diff")
            .args(["-u", "--label", agreed, "--label", label])
            .arg(base)
            .arg(side)
            .status()
            .or_fail(|| "cannot run diff -u".into())
            .map_err(|failure| failure.hint("install it, or set MIRRORFS_DIFF to another"))?;
        if !matches!(status.code(), Some(0 | 1)) {
            return Err(Failure::new(format!("diff -u failed: {status}")));
        }
    }
    Ok(())
}

fn no_copy(place: &Place, detail: &Detail) -> Failure {
    let (path, tree) = (&detail.path, place.record.tree.display());
    let failure = Failure::new(format!(
        "the version of {} of {path} is not in the tree",
        detail.peer
    ));
    match &detail.kept {
        Some(kept) => failure.hint(format!(
            "it is kept as {kept}, which can be seen while {tree} is not mounted"
        )),
        None => failure.hint(format!(
            "mirrorfs conflicts show {path} tells what each side has"
        )),
    }
}

fn resolve(path: &Path, choice: Choice, discard_edits: bool) -> Result<Exit, Failure> {
    let place = Place::find(path)?;
    let Some(mut daemon) = reach(&place.mirror, &place.record)? else {
        let tree = place.record.tree.display();
        return Err(Failure::new(format!("{tree} is not mounted"))
            .hint(format!("mirrorfs mount {tree} mounts it")));
    };
    let request = Request::Resolve {
        path: place.path,
        choice,
        discard_edits,
    };
    match daemon.call(request, None)? {
        Response::Resolved { outcome, beside } => {
            print(match choice {
                Choice::Local | Choice::Merged => {
                    "this side's version wins over the peer's version on record, which goes to the trash there".to_owned()
                }
                Choice::Remote => {
                    "the peer's version wins; this side's goes to the trash here".to_owned()
                }
                Choice::Both => {
                    let names: Vec<String> = beside.iter().map(ToString::to_string).collect();
                    format!(
                        "this side's version stays; the peer's is now {}, a file like any other",
                        names.join(" and ")
                    )
                }
            });
            if outcome != Outcome::Durable {
                print(
                    "the peer has yet to be told: that is done once it can be reached, while the tree stays mounted",
                );
            }
            Ok(outcome.exit())
        }
        other => Err(unexpected(&other)),
    }
}
