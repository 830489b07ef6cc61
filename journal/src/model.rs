//! The vocabulary of the journal: what is known of a tree, and how it is numbered.
//!
//! These types are shared by every module. They hold what was observed, never
//! what is to be done about it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The BLAKE3 digest of a file's whole content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContentHash(pub [u8; 32]);

impl ContentHash {
    /// Hashes a content held in memory.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// Parses the form that [`Display`](fmt::Display) prints.
    pub fn parse(text: &str) -> Option<Self> {
        let hash = blake3::Hash::from_hex(text).ok()?;
        Some(Self(*hash.as_bytes()))
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0, f)
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0[..4], f)
    }
}

/// A 128-bit random identity, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// Draws a fresh identity from the kernel's random source.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Parses the form that [`Display`](fmt::Display) prints.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.trim_end().as_bytes();
        if digits.len() != 32 {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16)?;
            let low = char::from(pair[1]).to_digit(16)?;
            *byte = u8::try_from(high * 16 + low).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0, f)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0, f)
    }
}

/// The identity of a mirror: the same on every replica of one tree.
pub type MirrorId = Id;

/// The identity of one replica of a tree, kept in its `.mirrorfs`.
pub type ReplicaId = Id;

/// A local key for a configured peer. Never leaves this journal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PeerId(pub i64);

/// The random part of a sequence number, drawn anew at each start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// A sequence number. `n` grows for as long as one journal lives; the epoch tells
/// two journals apart that counted the same `n`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Seq {
    /// The start of the journal that issued the number.
    pub epoch: Epoch,
    /// Its position.
    pub n: u64,
}

/// An inode number as the mount shows it. The root is whatever number the lower
/// directory has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Ino(pub u64);

/// A node of the recorded tree. Unlike an inode number it is never used twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct NodeId(pub i64);

impl NodeId {
    /// The root of the tree.
    pub const ROOT: Self = Self(1);
}

/// A point in time, in seconds and nanoseconds since 1970, possibly before it.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
pub struct Timestamp {
    /// Whole seconds, rounded towards the past.
    pub secs: i64,
    /// Nanoseconds past `secs`, below 1,000,000,000.
    pub nanos: u32,
}

impl Timestamp {
    /// The present, by the system's clock.
    pub fn now() -> Self {
        let (secs, nanos) = match std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)
        {
            Ok(since) => (
                i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                since.subsec_nanos(),
            ),
            Err(_) => (0, 0),
        };
        Self { secs, nanos }
    }
}

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, socket or device. Stays local and is listed as held back.
    Special,
}

/// Extended attributes by full name, such as `user.comment`.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What the journal records of a node's attributes after a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attr {
    /// The node's kind.
    pub kind: Kind,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change to the content.
    pub mtime: Timestamp,
    /// Time of the last change to anything, as lower keeps it.
    pub ctime: Timestamp,
}

/// What a name shows, as both sides compare it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Content {
    /// A directory; its names are entries of their own.
    Directory,
    /// A regular file.
    File {
        /// Size in bytes.
        size: u64,
        /// The digest of the whole content.
        hash: ContentHash,
    },
    /// A symbolic link, carried as it is and never followed.
    Symlink {
        /// The link's text.
        target: Vec<u8>,
    },
}

impl Content {
    /// The kind of this content.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Directory => Kind::Directory,
            Self::File { .. } => Kind::File,
            Self::Symlink { .. } => Kind::Symlink,
        }
    }
}

/// One name of a tree with everything that is carried to the other side.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Kind, content and link target: what the three-way table compares.
    pub content: Content,
    /// Permission bits. Meaningless for a symbolic link, where it is 0o777.
    pub mode: u32,
    /// Modification time. Not carried for directories, where it is zero.
    pub mtime: Timestamp,
    /// The `user.` attributes. Empty for symbolic links.
    pub xattrs: Xattrs,
}

/// A path below the root of a tree: bytes, no empty, `.` or `..` component, no NUL,
/// components joined by `/`. The root itself is the empty path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct RelPath(Vec<u8>);

/// A byte string that is no [`RelPath`].
#[derive(Debug, thiserror::Error)]
#[error("not a path below a tree's root: {}", .0.escape_ascii())]
pub struct BadPath(pub Vec<u8>);

/// Longest name that Linux filesystems take, in bytes.
pub const NAME_MAX: usize = 255;

fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name != b"."
        && name != b".."
        && name.len() <= NAME_MAX
        && !name.contains(&0)
        && !name.contains(&b'/')
}

impl RelPath {
    /// The root of the tree.
    pub const ROOT: Self = Self(Vec::new());

    /// Checks a byte string.
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, BadPath> {
        let path = path.into();
        if path.is_empty() || path.split(|byte| *byte == b'/').all(is_name) {
            Ok(Self(path))
        } else {
            Err(BadPath(path))
        }
    }

    /// The path's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The path of a name in this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, BadPath> {
        if !is_name(name) {
            return Err(BadPath(name.to_vec()));
        }
        let mut path = Vec::with_capacity(self.0.len() + 1 + name.len());
        path.extend_from_slice(&self.0);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Ok(Self(path))
    }

    /// The directory that holds this path; none for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => Some(Self(self.0[..slash].to_vec())),
            None => Some(Self::ROOT),
        }
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => &self.0[slash + 1..],
            None => &self.0,
        }
    }

    /// The components from the root downwards.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
    }

    /// How many components the path has.
    pub fn depth(&self) -> usize {
        self.components().count()
    }

    /// Whether this path is `ancestor` or lies below it.
    pub fn starts_with(&self, ancestor: &Self) -> bool {
        ancestor.is_root()
            || (self.0.starts_with(&ancestor.0)
                && matches!(self.0.get(ancestor.0.len()), None | Some(b'/')))
    }

    /// This path with the prefix `from` replaced by `to`; none if it does not lie there.
    pub fn rebase(&self, from: &Self, to: &Self) -> Option<Self> {
        if !self.starts_with(from) {
            return None;
        }
        let rest = if from.is_root() {
            self.0.as_slice()
        } else {
            &self.0[from.0.len()..]
        };
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        let mut path = to.0.clone();
        if !rest.is_empty() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(rest);
        }
        Some(Self(path))
    }

    /// The path as the operating system takes it, relative to the root of the tree.
    pub fn as_os_path(&self) -> &std::path::Path {
        use std::os::unix::ffi::OsStrExt;
        std::path::Path::new(std::ffi::OsStr::from_bytes(if self.is_root() {
            b"."
        } else {
            &self.0
        }))
    }
}

impl TryFrom<Vec<u8>> for RelPath {
    type Error = BadPath;
    fn try_from(path: Vec<u8>) -> Result<Self, BadPath> {
        Self::new(path)
    }
}

impl From<RelPath> for Vec<u8> {
    fn from(path: RelPath) -> Self {
        path.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str(".");
        }
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// A numbered point at which both sides hold the same base.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Agreement {
    /// Its position in the chain, from 1.
    pub number: u64,
    /// Drawn at random, so that two histories that counted alike are told apart.
    pub nonce: Id,
    /// The agreement before it; none for the first.
    pub previous: Option<Id>,
}

fn fmt_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in bytes {
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        match RelPath::new(text) {
            Ok(path) => path,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn refuses_what_leaves_the_tree() {
        for bad in ["/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "nul\0"] {
            assert!(RelPath::new(bad).is_err(), "{bad:?}");
        }
        assert!(RelPath::new(vec![b'x'; 256]).is_err());
        assert!(RelPath::new(vec![0xff, b'/', 0xfe]).is_ok());
        assert!(RelPath::ROOT.join(b"a/b").is_err());
    }

    #[test]
    fn takes_paths_apart_and_together() {
        assert_eq!(path("a/b/c").parent(), Some(path("a/b")));
        assert_eq!(path("a").parent(), Some(RelPath::ROOT));
        assert_eq!(RelPath::ROOT.parent(), None);
        assert_eq!(path("a/b").name(), b"b");
        assert!(path("a/b").starts_with(&path("a")));
        assert!(!path("ab").starts_with(&path("a")));
        assert_eq!(
            path("a/b").rebase(&path("a"), &path("x/y")),
            Some(path("x/y/b"))
        );
        assert_eq!(path("a").rebase(&path("a"), &path("z")), Some(path("z")));
        assert_eq!(
            path("a").rebase(&RelPath::ROOT, &path("z")),
            Some(path("z/a"))
        );
        assert_eq!(
            path("a/b").rebase(&path("a"), &RelPath::ROOT),
            Some(path("b"))
        );
    }

    #[test]
    fn identities_survive_printing() {
        let id = Id([7; 16]);
        assert_eq!(Id::parse(&id.to_string()), Some(id));
        assert_eq!(Id::parse("0123"), None);
    }
}
