//! A directory for what has to be written down and is not to stay.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::tree::Id;

/// A fresh directory among the temporary files, for this user's eyes only. It goes with
/// everything in it when this is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes one.
    pub(crate) fn new() -> io::Result<Self> {
        let id = Id::random().map_err(|error| io::Error::other(error.to_string()))?;
        let path = std::env::temp_dir().join(format!("mirrorfs-{id}"));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and opens an empty directory in it.
    pub(crate) fn dir(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        fs::create_dir(&path)?;
        File::open(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "temporary files are left");
        }
    }
}
