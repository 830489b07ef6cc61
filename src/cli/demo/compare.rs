//! Comparing two trees, file by file.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::tree::RESERVED;

/// What was compared, and what differs.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// How many names.
    pub(super) names: u64,
    /// How many bytes of content.
    pub(super) bytes: u64,
    /// Paths that differ, and in what.
    pub(super) differences: Vec<String>,
}

/// Compares two trees: names, kinds, contents, link targets, modes, and the modification
/// times of files. What lies in `.mirrorfs` belongs to each side alone.
pub(super) fn compare(one: &Path, other: &Path) -> io::Result<Comparison> {
    let mut comparison = Comparison::default();
    let mut pending = vec![PathBuf::new()];
    while let Some(dir) = pending.pop() {
        let mut names = names(&one.join(&dir))?;
        names.extend(self::names(&other.join(&dir))?);
        for name in names {
            if dir.as_os_str().is_empty() && name.as_encoded_bytes() == RESERVED {
                continue;
            }
            let path = dir.join(name);
            comparison.names += 1;
            match difference(&one.join(&path), &other.join(&path), &mut comparison.bytes)? {
                Some(what) => {
                    let line = format!("{}: {what}", path.display());
                    comparison.differences.push(line);
                }
                None if one.join(&path).symlink_metadata()?.is_dir() => pending.push(path),
                None => {}
            }
        }
    }
    Ok(comparison)
}

fn names(dir: &Path) -> io::Result<BTreeSet<OsString>> {
    fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect()
}

fn difference(one: &Path, other: &Path, bytes: &mut u64) -> io::Result<Option<&'static str>> {
    let (Some(a), Some(b)) = (look(one)?, look(other)?) else {
        return Ok(Some("on one side only"));
    };
    if a.file_type() != b.file_type() {
        return Ok(Some("of different kinds"));
    }
    if a.is_symlink() {
        return Ok((fs::read_link(one)? != fs::read_link(other)?).then_some("different targets"));
    }
    if a.mode() != b.mode() {
        return Ok(Some("different modes"));
    }
    if !a.is_file() {
        return Ok(None);
    }
    let (left, right) = (fs::read(one)?, fs::read(other)?);
    *bytes += a.len();
    Ok(if left != right {
        Some("different contents")
    } else if (a.mtime(), a.mtime_nsec()) != (b.mtime(), b.mtime_nsec()) {
        Some("different modification times")
    } else {
        None
    })
}

fn look(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match path.symlink_metadata() {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::time::SystemTime;

    #[test]
    fn every_kind_of_difference_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for side in [&a, &b] {
            fs::create_dir_all(side.join("d/e")).unwrap();
            for name in ["same", "content", "mode", "time", "d/e/deep"] {
                fs::write(side.join(name), "text").unwrap();
                let file = fs::File::options()
                    .write(true)
                    .open(side.join(name))
                    .unwrap();
                file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }
            symlink("x", side.join("link")).unwrap();
        }
        fs::create_dir(a.join(".mirrorfs")).unwrap();
        let equal = compare(&a, &b).unwrap();
        assert_eq!(equal.differences, Vec::<String>::new());
        assert_eq!((equal.names, equal.bytes), (8, 20));

        fs::write(b.join("content"), "test").unwrap();
        fs::set_permissions(b.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(a.join("mode"), fs::Permissions::from_mode(0o644)).unwrap();
        let file = fs::File::options()
            .write(true)
            .open(b.join("time"))
            .unwrap();
        file.set_modified(SystemTime::now()).unwrap();
        fs::remove_file(b.join("link")).unwrap();
        symlink("y", b.join("link")).unwrap();
        fs::remove_file(b.join("d/e/deep")).unwrap();
        fs::create_dir(b.join("d/e/deep")).unwrap();
        fs::write(b.join("extra"), "").unwrap();
        let mut found = compare(&a, &b).unwrap().differences;
        found.sort();
        assert_eq!(
            found,
            [
                "content: different contents",
                "d/e/deep: of different kinds",
                "extra: on one side only",
                "link: different targets",
                "mode: different modes",
                "time: different modification times",
            ]
        );
    }
}
