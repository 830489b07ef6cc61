//! Whether two trees are the same, in everything that is carried.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::program::run;

/// One name of a tree, as far as the other side has to show the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shown {
    kind: &'static str,
    mode: u32,
    /// Modification time of a file, in seconds and nanoseconds.
    mtime: Option<(i64, i64)>,
    /// A digest of the content, or a link's target.
    content: String,
    size: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A tree by path, without the reserved directory in its root.
pub type Tree = BTreeMap<Vec<u8>, Shown>;

/// Reads a whole tree. Fails on anything that cannot be read.
#[track_caller]
pub fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    read_below(root, b"", &mut tree).unwrap_or_else(|error| panic!("{error}"));
    tree
}

/// Reads a tree that may be changing, or gives the error.
pub fn try_read(root: &Path) -> Result<Tree, String> {
    let mut tree = Tree::new();
    read_below(root, b"", &mut tree)?;
    Ok(tree)
}

fn read_below(dir: &Path, prefix: &[u8], tree: &mut Tree) -> Result<(), String> {
    let failed =
        |path: &Path, error: std::io::Error| format!("cannot read {}: {error}", path.display());
    for entry in std::fs::read_dir(dir).map_err(|error| failed(dir, error))? {
        let entry = entry.map_err(|error| failed(dir, error))?;
        if prefix.is_empty() && entry.file_name() == ".mirrorfs" {
            continue;
        }
        let path = entry.path();
        let mut name = prefix.to_vec();
        name.extend_from_slice(entry.file_name().as_bytes());
        let metadata = entry.metadata().map_err(|error| failed(&path, error))?;
        let kind = metadata.file_type();
        let mut shown = Shown {
            kind: "special file",
            // setuid and setgid are never carried.
            mode: metadata.mode() & 0o1777,
            mtime: None,
            content: String::new(),
            size: 0,
            xattrs: BTreeMap::new(),
        };
        if kind.is_symlink() {
            let target = std::fs::read_link(&path).map_err(|error| failed(&path, error))?;
            shown.kind = "symlink";
            shown.content = target.as_os_str().as_bytes().escape_ascii().to_string();
        } else if kind.is_dir() {
            shown.kind = "directory";
            shown.xattrs = xattrs(&path);
        } else if kind.is_file() {
            let content = std::fs::read(&path).map_err(|error| failed(&path, error))?;
            let stable = git_index_as_staged(&content);
            shown.kind = "file";
            shown.mtime = stable
                .is_none()
                .then_some((metadata.mtime(), metadata.mtime_nsec()));
            let shall = stable.as_deref().unwrap_or(&content);
            shown.size = shall.len() as u64;
            shown.content = blake3::hash(shall).to_hex().to_string();
            shown.xattrs = xattrs(&path);
        }
        tree.insert(name.clone(), shown);
        if kind.is_dir() {
            name.push(b'/');
            read_below(&path, &name, tree)?;
        }
    }
    Ok(())
}

/// The extended attributes that are carried.
pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 64 * 1024];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names[..]) else {
        return BTreeMap::new();
    };
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user."))
        .map(|name| {
            let mut value = vec![0; 64 * 1024];
            let length =
                rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap_or(0);
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

/// What a Git index (version 2 or 3) stages, or none if this is no such index: without the
/// stat of the files, and without the extensions that Git derives from the entries. Two that
/// differ in nothing else are equal, so either side may keep its own.
fn git_index_as_staged(content: &[u8]) -> Option<Vec<u8>> {
    let rest = content.strip_prefix(b"DIRC")?;
    let word = |at: usize| {
        rest.get(at..at + 4)
            .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    };
    if !matches!(word(0)?, 2 | 3) {
        return None;
    }
    let mut stable = rest[..8].to_vec();
    let mut at = 8;
    for _ in 0..word(4)? {
        // ctime, mtime, device, inode: 24 bytes; mode; user, group, size: 12 bytes.
        stable.extend_from_slice(rest.get(at + 24..at + 28)?);
        let fixed = rest.get(at + 40..at + 62)?;
        stable.extend_from_slice(fixed);
        let mut name_at = at + 62;
        if fixed[20] & 0x40 != 0 {
            name_at += 2;
        }
        let name_len = rest.get(name_at..)?.iter().position(|byte| *byte == 0)?;
        stable.extend_from_slice(&rest[name_at - 2..=name_at + name_len]);
        // Entries are padded to a multiple of eight bytes, with one NUL at least.
        at += (name_at - at + name_len + 8) & !7;
    }
    // The last 20 bytes are a checksum of everything before.
    let end = rest.len().checked_sub(20)?;
    while at < end {
        let extension_end = at + 8 + word(at + 4)? as usize;
        let extension = rest.get(at..extension_end)?;
        if !matches!(
            &extension[..4],
            b"TREE" | b"UNTR" | b"FSMN" | b"EOIE" | b"IEOT"
        ) {
            stable.extend_from_slice(extension);
        }
        at = extension_end;
    }
    Some(stable)
}

/// What differs between two trees, one line each.
pub fn differences(left: &Tree, right: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, here) in left {
        let name = path.escape_ascii();
        match right.get(path) {
            None => lines.push(format!("only on the left: {name} ({})", here.kind)),
            Some(there) if there != here => {
                lines.push(format!("{name}:\n  left  {here:?}\n  right {there:?}"));
            }
            Some(_) => {}
        }
    }
    for (path, there) in right {
        if !left.contains_key(path) {
            lines.push(format!(
                "only on the right: {} ({})",
                path.escape_ascii(),
                there.kind
            ));
        }
    }
    lines
}

/// Fails unless both trees show the same: to this module's own eyes and to `diff -r`.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path) {
    assert_same_except(left, right, |_| false);
    let outcome = run(
        Command::new("diff")
            .args([
                "-r",
                "--brief",
                "--no-dereference",
                "--exclude=.mirrorfs",
                "--exclude=index",
            ])
            .arg(left)
            .arg(right),
        Duration::from_secs(120),
    );
    assert_eq!(outcome.code, 0, "{outcome}");
}

/// Fails unless both trees show the same apart from the paths that `local` picks.
#[track_caller]
pub fn assert_same_except(left: &Path, right: &Path, local: impl Fn(&str) -> bool) {
    let carried = |root| {
        let mut tree = read(root);
        tree.retain(|path, _| !local(&path.escape_ascii().to_string()));
        tree
    };
    let found = differences(&carried(left), &carried(right));
    assert!(
        found.is_empty(),
        "{} differences between {} (left) and {} (right):\n{}",
        found.len(),
        left.display(),
        right.display(),
        found[..found.len().min(20)].join("\n")
    );
}

/// What differs between two directories right now, for waiting until nothing does.
pub fn compare(left: &Path, right: &Path) -> Result<(), String> {
    let found = differences(&try_read(left)?, &try_read(right)?);
    if found.is_empty() {
        Ok(())
    } else {
        Err(found[..found.len().min(20)].join("\n"))
    }
}
