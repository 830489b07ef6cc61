//! Where it is written down which directories of this machine are attached to what.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{AttachState, Attachment};
use crate::daemon::control::{Client, Request, Response};
use crate::daemon::failure::{Failure, OrFail};
use crate::daemon::lock::Lock;
use crate::daemon::mounts;
use crate::daemon::state::StateDir;

/// How long the process that keeps a directory attached may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The state of one attached directory on this machine.
#[derive(Clone, Debug)]
pub struct AttachDir {
    path: PathBuf,
}

/// What is known of an attached directory also when nothing runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The directory.
    pub dir: String,
    /// The mount.
    pub to: String,
    /// What the directory is called over there, once that is known.
    pub name: Option<String>,
}

impl AttachDir {
    /// That of a canonical path.
    pub(super) fn of(state: &StateDir, dir: &Path) -> Self {
        let hash = blake3::hash(dir.as_os_str().as_bytes()).to_hex();
        Self {
            path: state.path().join("attached").join(&hash[..32]),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The lock that the process holds which keeps the directory attached.
    pub fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// What that process prints.
    pub fn log(&self) -> PathBuf {
        self.path.join("attach.log")
    }

    /// What is written down; none if nothing ever was.
    pub fn record(&self) -> Result<Option<Record>, Failure> {
        let path = self.path.join("attach.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Failure::new(format!("cannot read {}", path.display())).because(&error));
            }
        };
        serde_json::from_slice(&text)
            .map(Some)
            .or_fail(|| format!("cannot understand {}", path.display()))
    }

    /// Replaces what is written down as a whole.
    pub(super) fn write(&self, record: &Record) -> Result<(), Failure> {
        let (path, fresh) = (
            self.path.join("attach.json"),
            self.path.join("attach.json.new"),
        );
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&fresh)?;
            serde_json::to_writer_pretty(&mut file, record)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)
        };
        write().or_fail(|| format!("cannot write {}", path.display()))
    }

    /// How the directory is, from the process that keeps it attached, if there is one.
    pub fn status(&self, record: &Record) -> Result<Attachment, Failure> {
        if let Some(mut process) = Client::connect(&self.path)?
            && let Ok(Response::Attachment(attachment)) =
                process.call(Request::Attachment, Some(ANSWER))
        {
            return Ok(*attachment);
        }
        let held = Lock::holder(&self.lock())
            .or_fail(|| format!("cannot look at {}", self.lock().display()))?;
        Ok(Attachment {
            dir: record.dir.clone(),
            to: record.to.clone(),
            name: record.name.clone(),
            state: match held {
                Some(_) => AttachState::Connecting,
                None => AttachState::Detached,
            },
            transport: None,
            transport_reason: None,
            last_error: None,
            pid: held.flatten(),
        })
    }
}

/// What is known of the attached directory at a path, or above it.
pub fn find(state: &StateDir, path: &Path) -> Result<Option<(AttachDir, Record)>, Failure> {
    let Ok(canonical) = mounts::canonical(path) else {
        return Ok(None);
    };
    for above in canonical.ancestors() {
        let dir = AttachDir::of(state, above);
        if let Some(record) = dir.record()? {
            return Ok(Some((dir, record)));
        }
    }
    Ok(None)
}

/// All directories that were ever attached here, by path.
pub fn all(state: &StateDir) -> Result<Vec<(AttachDir, Record)>, Failure> {
    let mut found = Vec::new();
    let Ok(list) = fs::read_dir(state.path().join("attached")) else {
        return Ok(found);
    };
    for entry in list.flatten() {
        let dir = AttachDir { path: entry.path() };
        if let Some(record) = dir.record()? {
            found.push((dir, record));
        }
    }
    found.sort_by(|(_, a), (_, b)| a.dir.cmp(&b.dir));
    Ok(found)
}
