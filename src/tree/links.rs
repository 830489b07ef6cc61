//! Where symbolic links lead.

use serde::{Deserialize, Serialize};

use super::{Content, Entry, RelPath};

/// Which symbolic links are taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Symlinks {
    /// All, as they are.
    #[default]
    All,
    /// Those that stay in the tree, whatever other links of this kind they lead over.
    Safe,
}

impl std::fmt::Display for Symlinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Safe => "safe",
        })
    }
}

impl Symlinks {
    /// Why an entry is not taken in at a path; none if it is.
    pub fn refuse(self, path: &RelPath, entry: &Entry) -> Option<String> {
        match &entry.content {
            Content::Symlink { target } if self == Self::Safe && leaves(path, target) => Some(
                "a symbolic link that leads out of the tree is held back (--symlinks all lets it through)"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// Whether a link leads out of the tree, or might. From its directory, which is reached over
/// no link, it may go up as far as to the root, and then only down: a `..` behind a name
/// would go up from wherever that name leads.
fn leaves(path: &RelPath, target: &[u8]) -> bool {
    let depth = path.components().count().saturating_sub(1);
    if target.starts_with(b"/") {
        return true;
    }
    let mut up = 0;
    let mut down = false;
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if down => return true,
            b".." => up += 1,
            _ => down = true,
        }
    }
    up > depth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_safe_link_stays_in_the_tree() {
        let leaves = |path: &str, target: &str| {
            super::leaves(&RelPath::new(path).unwrap(), target.as_bytes())
        };
        for (path, target) in [
            ("l", "x"),
            ("l", "a/./b//c/"),
            ("l", "."),
            ("a/b/l", "../../x/y"),
            ("a/b/l", ".././..//x"),
            ("a/l", "..x/...y"),
        ] {
            assert!(!leaves(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("l", "/etc/passwd"),
            ("l", "//x"),
            ("l", ".."),
            ("l", "../x"),
            ("a/b/l", "../../../x"),
            ("a/l", ".././../x"),
            // `b` may lead anywhere in the tree, to its root for one.
            ("a/l", "b/../x"),
        ] {
            assert!(leaves(path, target), "{path} -> {target}");
        }
    }
}
