//! A mounted tree with many files, and its peer behind an sshd.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::arguments::Arguments;
use crate::sshd::Sshd;

/// How many files lie in one directory.
const IN_ONE: usize = 1_000;

/// The directories of one run, unmounted and removed at its end.
pub struct Place {
    root: PathBuf,
    files: usize,
    server: Sshd,
}

impl Place {
    /// Both sides hold the files when this returns.
    pub fn new(arguments: &Arguments) -> Self {
        let root = arguments
            .dir
            .join(format!("mirrorfs-bench-{}", std::process::id()));
        for dir in ["tree", "peer", "state"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let place = Self {
            root,
            files: arguments.files,
            server: Sshd::start(),
        };
        place.server.script(
            "agent",
            &format!(
                "MIRRORFS_STATE='{}' exec '{}' \"$@\"",
                place.root.join("agent-state").display(),
                env!("CARGO_BIN_EXE_mirrorfs")
            ),
        );
        for dir in 0..place.directories() {
            fs::create_dir(place.tree().join(dir.to_string())).unwrap();
        }
        for file in 0..place.files {
            fs::write(
                place.tree().join(place.file(file)),
                format!("file {file}\n"),
            )
            .unwrap();
        }
        let peer = place.server.url(place.peer());
        place.mirrorfs(&["mount", &place.tree().display().to_string(), &peer]);
        let tree = place.tree().display().to_string();
        place.mirrorfs(&["sync", &tree, "--flush", "--timeout", "1h"]);
        place
    }

    pub fn tree(&self) -> PathBuf {
        self.root.join("tree")
    }

    pub fn peer(&self) -> PathBuf {
        self.root.join("peer")
    }

    pub fn files(&self) -> usize {
        self.files
    }

    /// How many directories hold them: each is called by its number.
    pub fn directories(&self) -> usize {
        self.files.div_ceil(IN_ONE)
    }

    /// The path of a file below the root of either side.
    pub fn file(&self, number: usize) -> PathBuf {
        PathBuf::from(format!("{}/file-{number}", number / IN_ONE))
    }

    fn mirrorfs(&self, arguments: &[&str]) {
        let status = Command::new(env!("CARGO_BIN_EXE_mirrorfs"))
            .args(arguments)
            .env("MIRRORFS_STATE", self.root.join("state"))
            .env("MIRRORFS_AGENT", self.server.path("agent"))
            .envs(self.server.environment())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{arguments:?}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.mirrorfs(&["umount", &self.tree().display().to_string()]);
        let _ = fs::remove_dir_all(&self.root);
    }
}
