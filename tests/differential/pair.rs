//! A mount and a plain directory on the same disk.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::actor::Actor;
use crate::support::channel::without_io_uring;
use crate::support::program::run;
use crate::support::{PROMPT, Sandbox};
use crate::view::{Moment, View, xattrs};

/// A peer that cannot be reached.
pub const NOBODY: &str = "ssh://127.0.0.1:1/nowhere";

/// A mounted tree, and a plain directory for the same work.
pub struct Pair {
    sandbox: Sandbox,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Root's mount, which lets everybody in.
    Everybody,
    /// The same, with a peer that it all goes to.
    Mirrored,
    /// An ordinary user's mount, which lets nobody else in.
    OrdinaryUser,
}

/// What is carried of a node to a peer.
#[derive(PartialEq, Eq, Debug)]
struct Carried {
    file_type: FileType,
    mode: u32,
    mtime: Option<Moment>,
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What is carried of a tree: no special files, no privileges.
fn carried(root: &Path, view: &View) -> BTreeMap<Vec<u8>, Carried> {
    let mut carried = BTreeMap::new();
    for (path, seen) in &view.nodes {
        let file_type = seen.shown.file_type;
        let is_known = file_type.is_file() || file_type.is_dir() || file_type.is_symlink();
        if path.is_empty() || !is_known {
            continue;
        }
        let at = root.join(OsStr::from_bytes(path));
        let content = match file_type {
            FileType::RegularFile => std::fs::read(&at).unwrap(),
            FileType::Symlink => std::fs::read_link(&at).unwrap().into_os_string().into_vec(),
            _ => Vec::new(),
        };
        let node = Carried {
            file_type,
            mode: seen.shown.mode & 0o1777,
            mtime: (!file_type.is_dir()).then_some(seen.mtime),
            content,
            xattrs: xattrs(&at)
                .into_iter()
                .filter(|(name, _)| name.starts_with(b"user."))
                .collect(),
        };
        carried.insert(path.clone(), node);
    }
    carried
}

impl Pair {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// `prepare` fills both directories before the mount. There is no peer that answers:
    /// only programs in the mount act.
    pub fn with(prepare: impl Fn(&Path)) -> Self {
        let pair = Self::prepared(prepare, Kind::Everybody);
        pair.sandbox.mount_with(NOBODY);
        pair
    }

    /// The same, its requests through `/dev/fuse` whatever else the kernel offers.
    pub fn through_the_device() -> Self {
        let pair = Self::prepared(|_| {}, Kind::Everybody);
        let sandbox = &pair.sandbox;
        let mut mount = sandbox.command(sandbox.program());
        mount.arg("mount").arg(sandbox.tree()).arg(NOBODY);
        without_io_uring(&mut mount);
        run(&mut mount, PROMPT).ok();
        let status = sandbox.status();
        let channel = status.mount.channel.as_deref();
        assert!(
            channel.is_some_and(|channel| channel.starts_with("/dev/fuse")),
            "{status:?}"
        );
        pair
    }

    /// With a peer that nobody works on, and that everything goes to meanwhile.
    pub fn mirrored() -> Self {
        let pair = Self::prepared(|_| {}, Kind::Mirrored);
        pair.sandbox.mount();
        pair
    }

    /// An ordinary user's mount and a directory that is his, with what `prepare` fills both
    /// with as root.
    pub fn of_ordinary_user_with(prepare: impl Fn(&Path)) -> Self {
        let pair = Self::prepared(prepare, Kind::OrdinaryUser);
        pair.sandbox.mount_with(NOBODY);
        pair
    }

    /// The ordinary user.
    pub fn user(&self) -> Actor {
        let home = std::fs::metadata(self.sandbox.home()).unwrap();
        Actor {
            name: "user",
            id: home.uid(),
            groups: &[],
        }
    }

    fn prepared(prepare: impl Fn(&Path), kind: Kind) -> Self {
        assert!(
            rustix::process::getuid().is_root(),
            "several users and mounts need root"
        );
        let sandbox = match kind {
            Kind::Everybody | Kind::Mirrored => Sandbox::new(),
            Kind::OrdinaryUser => Sandbox::of_ordinary_user(),
        };
        let pair = Self { sandbox, kind };
        std::fs::create_dir(pair.plain()).unwrap();
        for dir in [pair.mounted(), pair.plain()] {
            std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
            if kind == Kind::OrdinaryUser {
                let user = Some(pair.user().id);
                std::os::unix::fs::chown(&dir, user, user).unwrap();
            }
            prepare(&dir);
        }
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
        if self.kind == Kind::Mirrored {
            self.sandbox.flush();
            assert!(self.sandbox.status().conflicts.is_empty());
            self.sandbox.umount();
            let carried = |root: &Path| carried(root, &View::of_lower(root));
            let (here, there) = (carried(&self.sandbox.tree()), carried(&self.sandbox.peer()));
            for (path, here) in &here {
                let path_text = path.escape_ascii();
                assert_eq!(
                    Some(here),
                    there.get(path),
                    "{path_text} here and on the peer"
                );
            }
            assert_eq!(here.len(), there.len(), "the peer has more");
        } else {
            // 4: the changes are in the journal, and the peer was not there.
            self.sandbox.try_umount().expect_code(4);
            self.sandbox.assert_down();
            self.sandbox.assert_recorded();
        }
        if self.kind == Kind::OrdinaryUser {
            // Also what the user was not let in to compare.
            let carried = |root: &Path| {
                let mut carried = carried(root, &View::of_lower(root));
                carried.values_mut().for_each(|node| node.mtime = None);
                carried
            };
            assert_eq!(carried(&self.mounted()), carried(&self.plain()));
        }
    }
}
