//! What a Git index says, apart from what is known of one machine's disk only.
//!
//! An index repeats for each entry what `stat` last said of the file: times, device, inode,
//! owner, size. Any `git status` may write it anew for the sake of those, and they mean
//! nothing on another machine. The format is described in Git's `gitformat-index`.

use crate::tree::ContentHash;

/// Larger files are not looked into, in bytes.
pub const LARGEST: u64 = 64 * 1024 * 1024;

/// Times, device and inode of an entry come before its mode, owner and size after it.
const BEFORE_MODE: usize = 24;
const AFTER_MODE: usize = 12;

/// A digest of what an index means: two with the same digest stage the same. None for what
/// is no index, or one that this does not understand to the last byte.
pub fn meaning(bytes: &[u8]) -> Option<ContentHash> {
    // An index does not say how long its object names are: SHA-1 or SHA-256. Read with the
    // wrong length it does not come to its end.
    [20, 32].into_iter().find_map(|name| read(bytes, name))
}

fn read(bytes: &[u8], object_name: usize) -> Option<ContentHash> {
    let body = bytes.len().checked_sub(object_name)?;
    // The checksum at the end covers what is left out here.
    let mut rest = Rest {
        bytes: bytes.get(..body)?,
        at: 0,
    };
    if rest.take(4)? != b"DIRC" {
        return None;
    }
    let version = rest.number()?;
    if !(2..=4).contains(&version) {
        return None;
    }
    let count = rest.number()?;
    let mut digest = blake3::Hasher::new();
    digest.update(b"git index");
    let mut previous = Vec::new();
    for _ in 0..count {
        let start = rest.at;
        rest.take(BEFORE_MODE)?;
        let mode = rest.take(4)?;
        rest.take(AFTER_MODE)?;
        let object = rest.take(object_name)?;
        let flags = rest.take(2)?;
        let extended = flags.first()? & 0x40 != 0;
        if extended && version < 3 {
            return None;
        }
        let more = if extended { rest.take(2)? } else { &[] };
        let name = if version == 4 {
            // As much of the name before stays, and this follows.
            let dropped = rest.varint()?;
            previous.truncate(previous.len().checked_sub(dropped)?);
            previous.extend_from_slice(rest.until_nul()?);
            previous.as_slice()
        } else {
            let name = rest.until_nul()?;
            // Ends with one to eight NUL, so that the entry's length is a multiple of eight.
            let padding = 7 - (rest.at - start - 1) % 8;
            if rest.take(padding)?.iter().any(|byte| *byte != 0) {
                return None;
            }
            name
        };
        digest.update(mode);
        digest.update(object);
        // But for the length of the name, which says nothing that the name does not.
        digest.update(&[flags.first()? & 0xf0]);
        digest.update(&(more.len() as u64).to_le_bytes());
        digest.update(more);
        digest.update(&(name.len() as u64).to_le_bytes());
        digest.update(name);
    }
    while rest.at < body {
        let signature = rest.take(4)?;
        let length = usize::try_from(rest.number()?).ok()?;
        let content = rest.take(length)?;
        match signature {
            // Derived from the entries and the disk: trees, what is untracked, what a
            // monitor saw, and where the parts of the index are.
            b"TREE" | b"UNTR" | b"FSMN" | b"EOIE" | b"IEOT" => {}
            // A further index holds a part of the entries, so that this one alone says
            // little.
            b"link" => return None,
            _ => {
                digest.update(signature);
                digest.update(&(content.len() as u64).to_le_bytes());
                digest.update(content);
            }
        }
    }
    Some(ContentHash(*digest.finalize().as_bytes()))
}

struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn number(&mut self) -> Option<u32> {
        let bytes: [u8; 4] = self.take(4)?.try_into().ok()?;
        Some(u32::from_be_bytes(bytes))
    }

    /// The variable length of pack files: seven bits a byte, the highest first, and one is
    /// added for each byte that follows.
    fn varint(&mut self) -> Option<usize> {
        let mut byte = *self.take(1)?.first()?;
        let mut value = usize::from(byte & 0x7f);
        while byte & 0x80 != 0 {
            byte = *self.take(1)?.first()?;
            value = value.checked_add(1)?.checked_mul(128)?;
            value = value.checked_add(usize::from(byte & 0x7f))?;
        }
        Some(value)
    }

    /// What comes before the next NUL, which is taken too.
    fn until_nul(&mut self) -> Option<&'a [u8]> {
        let length = self
            .bytes
            .get(self.at..)?
            .iter()
            .position(|byte| *byte == 0)?;
        let taken = self.take(length)?;
        self.take(1)?;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn git(dir: &Path, arguments: &[&str]) {
        let output = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@t"])
            .args(arguments)
            .current_dir(dir)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "git {arguments:?}: {output:?}");
    }

    fn index(dir: &Path) -> Vec<u8> {
        std::fs::read(dir.join(".git/index")).unwrap()
    }

    /// A repository with staged and committed files, some of them with a common prefix.
    fn repository(init: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        git(dir.path(), &[&["init", "-q"], init].concat());
        std::fs::create_dir(dir.path().join("src")).unwrap();
        for name in [
            "a",
            "src/main.rs",
            "src/mine",
            "src/machine with a longer name.rs",
        ] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        git(dir.path(), &["add", "."]);
        git(dir.path(), &["commit", "-q", "-m", "one"]);
        dir
    }

    /// Git writes the index anew because every file has other times and inodes: other
    /// bytes, the same meaning. Staging something else is another meaning.
    #[test]
    fn only_what_is_staged_counts() {
        for init in [&[][..], &["--object-format=sha256"]] {
            for version in ["2", "3", "4"] {
                let repository = repository(init);
                let dir = repository.path();
                git(dir, &["update-index", "--index-version", version]);
                if version == "3" {
                    // Only an entry with extended flags makes Git write that version.
                    std::fs::write(dir.join("later"), "x").unwrap();
                    git(dir, &["add", "-N", "later"]);
                }
                let before = index(dir);
                assert_eq!(before[7].to_string(), version);
                let first = meaning(&before).unwrap();
                for name in ["a", "src/main.rs"] {
                    let (path, aside) = (dir.join(name), dir.join("aside"));
                    std::fs::copy(&path, &aside).unwrap();
                    std::fs::rename(aside, path).unwrap();
                }
                git(dir, &["status"]);
                let after = index(dir);
                assert_ne!(before, after, "git status has refreshed it");
                assert_eq!(meaning(&after), Some(first), "{init:?} version {version}");

                std::fs::write(dir.join("a"), "another").unwrap();
                git(dir, &["add", "a"]);
                let staged = meaning(&index(dir)).unwrap();
                assert_ne!(staged, first);
                git(dir, &["update-index", "--chmod=+x", "a"]);
                let executable = meaning(&index(dir)).unwrap();
                assert_ne!(executable, staged);
                git(dir, &["update-index", "--assume-unchanged", "a"]);
                assert_ne!(meaning(&index(dir)).unwrap(), executable);
            }
        }
    }

    #[test]
    fn a_merge_in_progress_and_caches_are_understood() {
        let repository = repository(&[]);
        let dir = repository.path();
        git(dir, &["update-index", "--untracked-cache"]);
        git(dir, &["status"]);
        assert!(meaning(&index(dir)).is_some());
        git(dir, &["checkout", "-q", "-b", "other"]);
        std::fs::write(dir.join("a"), "theirs").unwrap();
        git(dir, &["commit", "-qam", "theirs"]);
        git(dir, &["checkout", "-q", "-"]);
        std::fs::write(dir.join("a"), "mine").unwrap();
        git(dir, &["commit", "-qam", "mine"]);
        let before = meaning(&index(dir)).unwrap();
        let merge = Command::new("git")
            .args([
                "-c",
                "user.name=t",
                "-c",
                "user.email=t@t",
                "merge",
                "other",
            ])
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(!merge.status.success(), "it conflicts");
        let unmerged = meaning(&index(dir)).unwrap();
        assert_ne!(unmerged, before);
        // How a conflict was resolved is remembered in an extension.
        git(dir, &["add", "a"]);
        assert_ne!(meaning(&index(dir)).unwrap(), unmerged);
    }

    #[test]
    fn an_index_in_parts_is_not_compared() {
        let repository = repository(&[]);
        git(repository.path(), &["update-index", "--split-index"]);
        assert_eq!(meaning(&index(repository.path())), None);
    }

    #[test]
    fn what_is_no_index_has_no_meaning() {
        for bytes in [&b""[..], b"DIRC", b"<html>index</html>", &[0; 100]] {
            assert_eq!(meaning(bytes), None);
        }
        let repository = repository(&[]);
        let whole = index(repository.path());
        let entries = whole.windows(4).position(|four| four == b"TREE").unwrap();
        for length in 0..entries + 20 {
            assert_eq!(meaning(&whole[..length]), None, "cut at {length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            version in 0..6_u8,
            count in 0..4_u32,
            bytes in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut index = b"DIRC\0\0\0".to_vec();
            index.push(version);
            index.extend(count.to_be_bytes());
            index.extend(&bytes);
            let _ = meaning(&index);
        }

        /// A real one with a few bytes changed.
        #[test]
        fn no_damage_makes_it_panic(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            static WHOLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
            let mut index = WHOLE.get_or_init(|| index(repository(&[]).path())).clone();
            for (at, byte) in damage {
                let at = at.index(index.len());
                index[at] = byte;
            }
            let _ = meaning(&index);
        }
    }
}
