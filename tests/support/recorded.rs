//! The equation that every test of the filesystem ends with: the tree that the journal
//! recorded is the tree that a look at the plain directory shows, and no record had to be
//! bent to fit into it.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use mirrorfs_journal::{Kind, RelPath, View};

use super::compare::xattrs;

/// What is compared. Sizes and times of directories are lower's own affair.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Shown {
    kind: Kind,
    ino: u64,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
    target: Option<Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Fails unless the equation holds for the only journal below `state` and an unmounted tree.
#[track_caller]
pub fn assert_recorded(state: &Path, tree: &Path) {
    assert_exact(state);
    assert_shown(state, tree);
}

/// Fails unless the only journal below `state` says what an unmounted tree shows. Where one
/// tree was put in place of another, the numbers of the one may be those of the other, and the
/// scan that finds it has records bent to fit.
#[track_caller]
pub fn assert_shown(state: &Path, tree: &Path) {
    let (recorded, links) = recorded(&journal(state));
    let mut shown = BTreeMap::new();
    look(tree, &RelPath::ROOT, &mut shown);
    for (path, shown) in &shown {
        assert_eq!(
            recorded.get(path),
            Some(shown),
            "{path}: recorded (left) and there (right)"
        );
    }
    for path in recorded.keys() {
        assert!(shown.contains_key(path), "{path} is recorded only");
    }
    let mut names: BTreeMap<u64, Vec<RelPath>> = BTreeMap::new();
    for (path, shown) in shown {
        names.entry(shown.ino).or_default().push(path);
    }
    let mut names: Vec<_> = names.into_values().collect();
    names.sort();
    assert_eq!(links, names, "hard links");
}

/// Fails if a record of the last life of the only journal below `state` did not fit the
/// tree, so that the journal had to guess: what it then shows may be right by chance.
#[track_caller]
pub fn assert_exact(state: &Path) {
    assert!(
        journal(state).is_exact().unwrap(),
        "a record did not fit the recorded tree, see the daemon's log"
    );
}

fn journal(state: &Path) -> View {
    let mut found: Vec<_> = std::fs::read_dir(state.join("mirrors"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join(mirrorfs_journal::DATABASE).exists())
        .collect();
    assert_eq!(found.len(), 1, "journals: {found:?}");
    mirrorfs_journal::look(&found.remove(0)).unwrap().unwrap()
}

fn recorded(journal: &View) -> (BTreeMap<RelPath, Shown>, Vec<Vec<RelPath>>) {
    let mut all = BTreeMap::new();
    let mut nodes: BTreeMap<_, Vec<RelPath>> = BTreeMap::new();
    journal
        .walk(&mut |path: &RelPath, node: &mirrorfs_journal::Node| {
            if path.is_root() {
                return Ok(());
            }
            let attr = &node.attr;
            let is_file = attr.kind == Kind::File;
            let time = |time: mirrorfs_journal::Timestamp| (time.secs, time.nanos.into());
            let shown = Shown {
                kind: attr.kind,
                ino: node.ino.0,
                mode: attr.mode,
                owner: (attr.uid, attr.gid),
                size: if is_file { attr.size } else { 0 },
                mtime: if is_file { time(attr.mtime) } else { (0, 0) },
                ctime: if is_file { time(attr.ctime) } else { (0, 0) },
                target: node.target.clone(),
                xattrs: node.xattrs.clone(),
            };
            all.insert(path.clone(), shown);
            nodes.entry(node.id).or_default().push(path.clone());
            Ok(())
        })
        .unwrap();
    let mut links: Vec<_> = nodes.into_values().collect();
    for paths in &mut links {
        paths.sort();
    }
    links.sort();
    (all, links)
}

/// Looks at what a directory shows, which `at` leads to.
fn look(at: &Path, dir: &RelPath, all: &mut BTreeMap<RelPath, Shown>) {
    // By its descriptor: the paths of a tree may be longer than a system call takes.
    let open = std::fs::File::open(at).unwrap();
    let open_at = Path::new("/proc/self/fd").join(open.as_raw_fd().to_string());
    for entry in std::fs::read_dir(&open_at).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if dir.is_root() && name == ".mirrorfs" {
            continue;
        }
        let (path, at) = (dir.join(name.as_bytes()).unwrap(), entry.path());
        let found = entry.metadata().unwrap();
        let file_type = found.file_type();
        let kind = if file_type.is_dir() {
            look(&at, &path, all);
            Kind::Directory
        } else if file_type.is_symlink() {
            Kind::Symlink
        } else if file_type.is_file() {
            Kind::File
        } else {
            assert!(
                file_type.is_fifo()
                    || file_type.is_socket()
                    || file_type.is_char_device()
                    || file_type.is_block_device(),
                "{path}"
            );
            Kind::Special
        };
        let is_file = kind == Kind::File;
        let shown = Shown {
            kind,
            ino: found.ino(),
            mode: found.mode() & 0o7777,
            owner: (found.uid(), found.gid()),
            size: if is_file { found.size() } else { 0 },
            mtime: if is_file {
                (found.mtime(), found.mtime_nsec())
            } else {
                (0, 0)
            },
            ctime: if is_file {
                (found.ctime(), found.ctime_nsec())
            } else {
                (0, 0)
            },
            target: (kind == Kind::Symlink).then(|| {
                std::fs::read_link(&at)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            }),
            xattrs: if matches!(kind, Kind::File | Kind::Directory) {
                xattrs(&at)
            } else {
                BTreeMap::new()
            },
        };
        all.insert(path, shown);
    }
}
