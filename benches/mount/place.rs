//! Where workloads run: a directory on the disk, and a mount on the same disk.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::arguments::Arguments;

/// A directory to work in, with the data that all workloads share beside it.
pub struct Place {
    pub dir: PathBuf,
    /// Made once on this side and used by several workloads and pairs: what is only read,
    /// or written to anywhere.
    shared: PathBuf,
    pub data: PathBuf,
}

impl Place {
    /// Takes away the large files that a workload left. The many small ones stay until the
    /// end: ext4 does not use an inode again for minutes after it was freed, and looks
    /// at each such before it finds another, which would be all that is measured.
    pub fn clear(&self) {
        for entry in fs::read_dir(&self.dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }

    pub fn path(&self, at: &str) -> PathBuf {
        self.dir.join(at)
    }

    /// A path that all pairs share on this side, made by the first who asks.
    pub fn shared(&self, at: &str, make: impl FnOnce(&Path)) -> PathBuf {
        let path = self.shared.join(at);
        if !path.exists() {
            make(&path);
        }
        path
    }

    /// Runs a shell script in the directory; `$DATA` is the shared data.
    pub fn sh(&self, script: &str) {
        let status = Command::new("bash")
            .args(["-euc", script])
            .current_dir(&self.dir)
            .env("DATA", &self.data)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_SYSTEM", "/dev/null")
            .env("GIT_AUTHOR_NAME", "A")
            .env("GIT_AUTHOR_EMAIL", "a@example.org")
            .env("GIT_COMMITTER_NAME", "A")
            .env("GIT_COMMITTER_EMAIL", "a@example.org")
            // Nothing in the background that outlives the measurement.
            .env("GIT_CONFIG_COUNT", "2")
            .env("GIT_CONFIG_KEY_0", "gc.auto")
            .env("GIT_CONFIG_VALUE_0", "0")
            .env("GIT_CONFIG_KEY_1", "maintenance.auto")
            .env("GIT_CONFIG_VALUE_1", "false")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{script}");
    }
}

/// The directories of one run, unmounted and removed at its end.
pub struct Bench {
    root: PathBuf,
    places: Cell<u32>,
}

impl Bench {
    pub fn new(arguments: &Arguments) -> Self {
        let root = arguments
            .dir
            .join(format!("mirrorfs-bench-{}", std::process::id()));
        for dir in ["native", "tree", "peer", "data", "state"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let bench = Self {
            root,
            places: Cell::new(0),
        };
        // Nobody listens on the discard port.
        let nobody = "ssh://nobody@127.0.0.1:9/nowhere".to_owned();
        let peer = match arguments.peer {
            true => bench.root.join("peer").display().to_string(),
            false => nobody,
        };
        bench.mirrorfs(&["mount", &bench.tree(), &peer]);
        bench.place(0).sh(crate::workloads::DATA);
        bench
    }

    /// A fresh directory on the disk, or in the mount.
    pub fn place(&self, at: usize) -> Place {
        let number = self.places.get();
        self.places.set(number + 1);
        let side = self.root.join(["native", "tree"][at]);
        let (dir, shared) = (side.join(number.to_string()), side.join("shared"));
        fs::create_dir(&dir).unwrap();
        fs::create_dir_all(&shared).unwrap();
        Place {
            dir,
            shared,
            data: self.root.join("data"),
        }
    }

    /// How the mount is served, as `mirrorfs status` tells it.
    pub fn channel(&self) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_mirrorfs"))
            .args(["status", &self.tree(), "--json"])
            .env("MIRRORFS_STATE", self.root.join("state"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let mirror = if told.is_array() { &told[0] } else { &told };
        mirror["mount"]["channel"].as_str().unwrap().to_owned()
    }

    fn tree(&self) -> String {
        self.root.join("tree").display().to_string()
    }

    fn mirrorfs(&self, arguments: &[&str]) {
        let status = Command::new(env!("CARGO_BIN_EXE_mirrorfs"))
            .args(arguments)
            .env("MIRRORFS_STATE", self.root.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        // A mirror that could not be flushed is what was asked for without a peer.
        assert!(
            status.success() || arguments[0] == "umount",
            "{arguments:?}"
        );
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.mirrorfs(&["umount", &self.tree()]);
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// Whether a program can be found.
pub fn is_there(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Everything is read from the disk again, in the mount as below it.
pub fn drop_caches() {
    rustix::fs::sync();
    fs::write(Path::new("/proc/sys/vm/drop_caches"), "3").expect("only root can drop the caches");
}
