//! A mount and a plain directory on the same disk.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::captured::assert_captured;
use crate::support::Sandbox;

/// A peer that cannot be reached.
const NOBODY: &str = "ssh://127.0.0.1:1/nowhere";

/// A mounted tree, and a plain directory for the same work.
pub struct Pair {
    pub sandbox: Sandbox,
}

impl Pair {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// `prepare` fills both directories before the mount.
    pub fn with(prepare: impl Fn(&Path)) -> Self {
        assert!(
            rustix::process::getuid().is_root(),
            "several users and mounts need root"
        );
        let sandbox = Sandbox::new();
        let pair = Self { sandbox };
        std::fs::create_dir(pair.plain()).unwrap();
        for dir in [pair.mounted(), pair.plain()] {
            std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
            prepare(&dir);
        }
        // Nobody answers there: in these tests only programs in the mount act.
        pair.sandbox.mount_with(NOBODY);
        pair
    }

    pub fn mounted(&self) -> PathBuf {
        self.sandbox.tree()
    }

    pub fn plain(&self) -> PathBuf {
        self.sandbox.outside().join("plain")
    }

    /// Runs the same Python program in both directories. What it asserts has to hold in
    /// both, and what it prints has to be the same.
    #[track_caller]
    pub fn python(&self, script: &str) {
        let plain = self.run(&self.plain(), script);
        let mounted = self.python_in_mount(script);
        let differing: Vec<_> = mounted
            .lines()
            .zip(plain.lines())
            .filter(|(mounted, plain)| mounted != plain)
            .take(20)
            .map(|(mounted, plain)| format!("mount {mounted}\nplain {plain}"))
            .collect();
        assert!(differing.is_empty(), "{}", differing.join("\n"));
        assert_eq!(mounted.lines().count(), plain.lines().count(), "lines");
    }

    /// Runs a Python program in the mount only. Gives what it prints.
    #[track_caller]
    pub fn python_in_mount(&self, script: &str) -> String {
        self.run(&self.mounted(), script)
    }

    #[track_caller]
    fn run(&self, dir: &Path, script: &str) -> String {
        let program = self.sandbox.outside().join("program.py");
        std::fs::write(&program, script).unwrap();
        let command = format!("python3 {}", program.display());
        self.sandbox.sh(dir, &command)
    }

    /// Unmounts, and compares what the journal recorded with what is there.
    #[track_caller]
    pub fn down(self) {
        // 4: the changes are in the journal, and the peer was not there.
        self.sandbox.try_umount().expect_code(4);
        self.sandbox.assert_down();
        assert_captured(&self.sandbox.state(), &self.sandbox.tree());
    }
}
