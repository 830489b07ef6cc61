//! Which programs use a directory: by their working directory, their open files,
//! their mappings. Read from `/proc`, so of other users' programs only root sees all.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How a program holds on to a directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hold {
    /// Its working directory is there.
    WorkingDirectory,
    /// Its root directory is there.
    Root,
    /// It has a file open there.
    OpenFile,
    /// It has a file mapped there, or runs it.
    Mapping,
}

/// A program that uses a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// How it holds on, the strongest reason first.
    pub hold: Hold,
    /// What it holds.
    pub path: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.hold {
            Hold::WorkingDirectory => "has its working directory in",
            Hold::Root => "has its root directory in",
            Hold::OpenFile => "has open",
            Hold::Mapping => "has mapped",
        };
        write!(f, "{} (pid {}) {how} {}", self.name, self.pid, self.path)
    }
}

/// The programs that use what lies at or below a canonical path, this one excepted.
/// The comparison is by path: nothing is asked of the filesystem there, which may be
/// dead or busy.
pub fn of(tree: &Path) -> Vec<Holder> {
    let Ok(list) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found = BTreeMap::new();
    for entry in list.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        // Processes come and go, and those of others cannot be read: no answer is no
        // holder.
        if let Some((hold, path)) = hold(&entry.path(), tree) {
            let name = fs::read(entry.path().join("comm")).unwrap_or_default();
            found.insert(
                pid,
                Holder {
                    pid,
                    name: String::from_utf8_lossy(&name).trim_end().to_owned(),
                    hold,
                    path,
                },
            );
        }
    }
    found.into_values().collect()
}

/// The parent of a process, while it lives.
pub fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

fn hold(process: &Path, tree: &Path) -> Option<(Hold, String)> {
    let link = |path: &Path| {
        let target = fs::read_link(path).ok()?;
        inside(target.as_os_str().as_bytes(), tree)
    };
    if let Some(path) = link(&process.join("cwd")) {
        return Some((Hold::WorkingDirectory, path));
    }
    if let Some(path) = link(&process.join("root")) {
        return Some((Hold::Root, path));
    }
    for descriptor in fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if let Some(path) = link(&descriptor.path()) {
            return Some((Hold::OpenFile, path));
        }
    }
    // address perms offset device inode path
    let maps = fs::read(process.join("maps")).ok()?;
    maps.split(|byte| *byte == b'\n').find_map(|line| {
        let path = line.iter().position(|byte| *byte == b'/')?;
        Some((Hold::Mapping, inside(&line[path..], tree)?))
    })
}

/// The path as text if it is `tree` or below it.
fn inside(path: &[u8], tree: &Path) -> Option<String> {
    let rest = path.strip_prefix(tree.as_os_str().as_bytes())?;
    let below = rest.is_empty() || rest.starts_with(b"/") || rest == b" (deleted)";
    below.then(|| String::from_utf8_lossy(path).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn finds_working_directories_and_open_files() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().canonicalize().unwrap();
        assert_eq!(of(&tree), []);
        let mut inside = Command::new("cat")
            .current_dir(&tree)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(tree.join("open"), "").unwrap();
        let mut opened = Command::new("cat")
            .arg("-")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(fs::File::create(tree.join("open")).unwrap())
            .spawn()
            .unwrap();
        let holders = of(&tree);
        // A program elsewhere whose path merely starts alike is none.
        let alike = of(Path::new(&format!("{}x", tree.display())));
        for child in [&mut inside, &mut opened] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let by = |pid: u32| holders.iter().find(|holder| holder.pid == pid).unwrap();
        assert_eq!(by(inside.id()).hold, Hold::WorkingDirectory);
        assert_eq!(by(inside.id()).name, "cat");
        assert_eq!(by(opened.id()).hold, Hold::OpenFile);
        assert!(by(opened.id()).to_string().contains("has open"));
        assert_eq!(
            parent(std::process::id()),
            Some(std::os::unix::process::parent_id())
        );
        assert_eq!(holders.len(), 2, "{holders:?}");
        assert_eq!(alike, []);
    }
}
