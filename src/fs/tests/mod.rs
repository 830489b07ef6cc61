//! Tests of the filesystem without a mount, on a real lower directory and a real
//! journal.

mod cuts;
mod doubts;
mod ops;
mod recovery;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirrorfs_journal::{Journal, NodeId};

use super::{Caller, Filesystem, FsOptions, Lower};
use crate::tree::{Ino, Kind, RelPath};

/// A tree with its journal, in a directory of its own.
pub(crate) struct Fixture {
    _dir: tempfile::TempDir,
    pub(crate) tree: PathBuf,
    pub(crate) journal: Journal,
    pub(crate) fs: Arc<Filesystem>,
}

/// What is compared between lower and the recorded tree.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Shown {
    kind: Kind,
    mode: u32,
    size: u64,
    mtime: i64,
    mtime_nanos: u32,
    ino: u64,
    target: Option<Vec<u8>>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(crate) fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

impl Filesystem {
    /// While this is held, whatever changes a name waits.
    pub(crate) fn hold_names(&self) -> parking_lot::RwLockReadGuard<'_, ()> {
        self.namespace.read()
    }

    /// Whether something waits to change a name.
    pub(crate) fn names_are_waited_for(&self) -> bool {
        self.namespace.try_read().is_none()
    }
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(FsOptions::default(), |_| {})
    }

    /// `prepare` fills the tree before it is adopted.
    pub(crate) fn with(options: FsOptions, prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let state = dir.path().join("state");
        std::fs::create_dir(&tree).unwrap();
        std::fs::create_dir(&state).unwrap();
        for reserved in ["staging", "trash"] {
            std::fs::create_dir_all(tree.join(".mirrorfs").join(reserved)).unwrap();
        }
        prepare(&tree);
        let (journal, _) = Journal::open(&state).unwrap();
        let fs = Filesystem::new(Lower::open(&tree).unwrap(), journal.recorder(), options).unwrap();
        fs.recover(&journal).unwrap();
        Self {
            _dir: dir,
            tree,
            journal,
            fs,
        }
    }

    /// A second life on the same tree and journal.
    pub(crate) fn reopen(&mut self) {
        self.fs = Filesystem::new(
            Lower::open(&self.tree).unwrap(),
            self.journal.recorder(),
            FsOptions::default(),
        )
        .unwrap();
        self.fs.recover(&self.journal).unwrap();
    }

    pub(crate) fn root(&self) -> Ino {
        self.fs.root()
    }

    /// Looks a path up as the kernel would.
    pub(crate) fn find(&self, text: &str) -> Ino {
        let mut current = self.root();
        for name in path(text).components() {
            current = self
                .fs
                .lookup(&Caller::own(), current, name)
                .unwrap()
                .attributes
                .ino;
        }
        current
    }

    pub(crate) fn create(&self, parent: Ino, name: &str, content: &[u8]) -> Ino {
        let ino = self
            .fs
            .create(&Caller::own(), parent, name.as_bytes(), 0o644, 0o022, true)
            .unwrap()
            .attributes
            .ino;
        if !content.is_empty() {
            assert_eq!(self.fs.write(ino, 0, content, None).unwrap(), content.len());
        }
        ino
    }

    pub(crate) fn mkdir(&self, parent: Ino, name: &str) -> Ino {
        self.fs
            .mkdir(&Caller::own(), parent, name.as_bytes(), 0o755, 0o022)
            .unwrap()
            .attributes
            .ino
    }

    pub(crate) fn read(&self, ino: Ino) -> Vec<u8> {
        let size = self.fs.getattr(ino).unwrap().size;
        let mut content = vec![0; size as usize + 1];
        let read = self.fs.read(ino, 0, &mut content).unwrap();
        content.truncate(read);
        content
    }

    /// The journal says exactly what lower shows.
    pub(crate) fn assert_captured(&self) {
        assert_captured(&self.journal, &self.tree);
    }
}

pub(crate) fn assert_captured(journal: &Journal, tree: &Path) {
    let (recorded, links) = recorded(journal);
    let shown = scan(tree);
    for (path, shown) in &shown {
        assert_eq!(recorded.get(path), Some(shown), "{path:?}");
    }
    for path in recorded.keys() {
        assert!(shown.contains_key(path), "{path:?} is recorded only");
    }
    let mut names: BTreeMap<u64, Vec<RelPath>> = BTreeMap::new();
    for (path, shown) in shown {
        names.entry(shown.ino).or_default().push(path);
    }
    let mut names: Vec<_> = names.into_values().collect();
    names.sort();
    assert_eq!(links, names, "hard links");
}

fn recorded(journal: &Journal) -> (BTreeMap<RelPath, Shown>, Vec<Vec<RelPath>>) {
    let mut all = BTreeMap::new();
    let mut nodes: BTreeMap<NodeId, Vec<RelPath>> = BTreeMap::new();
    journal
        .snapshot()
        .unwrap()
        .walk(&mut |path: &RelPath, node: &mirrorfs_journal::Node| {
            if path.is_root() {
                return Ok(());
            }
            let is_dir = node.attr.kind == Kind::Directory;
            all.insert(
                path.clone(),
                Shown {
                    kind: node.attr.kind,
                    mode: node.attr.mode,
                    size: if is_dir { 0 } else { node.attr.size },
                    mtime: if is_dir { 0 } else { node.attr.mtime.secs },
                    mtime_nanos: if is_dir { 0 } else { node.attr.mtime.nanos },
                    ino: node.ino.0,
                    target: node.target.clone(),
                    xattrs: node.xattrs.clone().into_iter().collect(),
                },
            );
            nodes.entry(node.id).or_default().push(path.clone());
            Ok(())
        })
        .unwrap();
    let mut links: Vec<_> = nodes
        .into_values()
        .map(|mut paths| {
            paths.sort();
            paths
        })
        .collect();
    links.sort();
    (all, links)
}

pub(crate) fn scan(tree: &Path) -> BTreeMap<RelPath, Shown> {
    let mut all = BTreeMap::new();
    let mut pending = vec![RelPath::ROOT];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(tree.join(dir.as_os_path())).unwrap() {
            let entry = entry.unwrap();
            let name =
                std::os::unix::ffi::OsStrExt::as_bytes(entry.file_name().as_os_str()).to_vec();
            if dir.is_root() && name == b".mirrorfs" {
                continue;
            }
            let path = dir.join(&name).unwrap();
            let at = entry.path();
            let attributes = super::Attributes::from(&rustix::fs::lstat(&at).unwrap());
            let kind = attributes.kind();
            let is_dir = kind == Kind::Directory;
            if is_dir {
                pending.push(path.clone());
            }
            let xattrs = if matches!(kind, Kind::File | Kind::Directory) {
                super::user_xattrs(&at).unwrap()
            } else {
                Default::default()
            };
            all.insert(
                path,
                Shown {
                    kind,
                    mode: attributes.mode,
                    size: if is_dir { 0 } else { attributes.size },
                    mtime: if is_dir { 0 } else { attributes.mtime.secs },
                    mtime_nanos: if is_dir { 0 } else { attributes.mtime.nanos },
                    ino: attributes.ino.0,
                    target: (kind == Kind::Symlink).then(|| {
                        std::os::unix::ffi::OsStrExt::as_bytes(
                            std::fs::read_link(&at).unwrap().as_os_str(),
                        )
                        .to_vec()
                    }),
                    xattrs: xattrs.into_iter().collect(),
                },
            );
        }
    }
    all
}
