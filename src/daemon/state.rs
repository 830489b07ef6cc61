//! Where state lives outside the trees: one directory per mirror, and what it says
//! about itself.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::{Failure, OrFail};
use super::lock::Lock;
use crate::tree::links::Symlinks;
use crate::tree::{MirrorId, ReplicaId};

/// The state directory of this user.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// The part of the environment that decides where state lives.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `MIRRORFS_STATE`.
    pub state: Option<PathBuf>,
    /// `XDG_STATE_HOME`.
    pub xdg_state_home: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// Whether the effective user is root.
    pub root: bool,
}

impl Environment {
    /// That of this process. Empty variables count as unset.
    pub fn of_process() -> Self {
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        Self {
            state: variable("MIRRORFS_STATE"),
            xdg_state_home: variable("XDG_STATE_HOME"),
            home: variable("HOME"),
            root: rustix::process::geteuid().is_root(),
        }
    }
}

impl StateDir {
    /// The state directory of this process's user; it need not exist yet.
    pub fn find() -> Result<Self, Failure> {
        Self::resolve(&Environment::of_process())
    }

    /// `$MIRRORFS_STATE`, else `$XDG_STATE_HOME/mirrorfs`, else `/var/lib/mirrorfs` for
    /// root and `~/.local/state/mirrorfs` for others. Root's does not follow `HOME`,
    /// which `sudo` may leave pointing into another user's home.
    pub fn resolve(environment: &Environment) -> Result<Self, Failure> {
        if let Some(path) = &environment.state {
            let path = std::path::absolute(path)
                .or_fail(|| format!("MIRRORFS_STATE={} is no path", path.display()))?;
            return Ok(Self { path });
        }
        // The XDG specification: a relative path is invalid and to be ignored.
        let xdg = environment
            .xdg_state_home
            .as_ref()
            .filter(|path| path.is_absolute());
        if let Some(xdg) = xdg {
            return Ok(Self {
                path: xdg.join("mirrorfs"),
            });
        }
        if environment.root {
            return Ok(Self {
                path: PathBuf::from("/var/lib/mirrorfs"),
            });
        }
        match environment.home.as_ref().filter(|home| home.is_absolute()) {
            Some(home) => Ok(Self {
                path: home.join(".local/state/mirrorfs"),
            }),
            None => Err(Failure::new("there is no place for mirrorfs's state")
                .hint("set HOME, or MIRRORFS_STATE to a directory on a local disk")),
        }
    }

    /// One at another place, for a dry run.
    pub(super) fn aside(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Copies what is known of a mirror from another state directory. Nobody may be writing
    /// to it.
    pub(super) fn copy_mirror(&self, from: &MirrorDir) -> Result<(), Failure> {
        let message = || format!("cannot copy {}", from.path.display());
        let Some(name) = from.path.file_name() else {
            return Err(Failure::new(message()));
        };
        let to = self.mirrors().join(name);
        self.create(&to)?;
        for entry in fs::read_dir(&from.path).or_fail(message)? {
            let entry = entry.or_fail(message)?;
            // No sockets, and no lock of somebody else's.
            if entry.file_type().or_fail(message)?.is_file() && entry.file_name() != "lock" {
                fs::copy(entry.path(), to.join(entry.file_name())).or_fail(message)?;
            }
        }
        Ok(())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the mirrors are.
    fn mirrors(&self) -> PathBuf {
        self.path.join("mirrors")
    }

    /// Where the agent that serves a replica on this machine keeps its state.
    pub fn agent(&self, replica: ReplicaId) -> PathBuf {
        self.path.join("agents").join(replica.to_string())
    }

    /// Creates what is missing of a directory below the state directory, for this
    /// user's eyes only.
    pub(super) fn create(&self, dir: &Path) -> Result<(), Failure> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .or_fail(|| format!("cannot create the state directory {}", dir.display()))
            .map_err(|failure| {
                failure.hint("set MIRRORFS_STATE to a directory that you can write to")
            })?;
        let found = fs::metadata(&self.path)
            .or_fail(|| format!("cannot look at {}", self.path.display()))?;
        if found.uid() != rustix::process::geteuid().as_raw() {
            return Err(Failure::new(format!(
                "the state directory {} belongs to user {}",
                self.path.display(),
                found.uid()
            ))
            .hint("run mirrorfs as that user, or set MIRRORFS_STATE to a directory of your own"));
        }
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700)).or_fail(|| {
                format!(
                    "cannot close {} to other users, who must not read a journal",
                    self.path.display()
                )
            })?;
        }
        Ok(())
    }

    /// Refuses a state directory that lies in the tree, and a tree that lies in the
    /// state directory. `tree` is canonical.
    pub fn keep_apart(&self, tree: &Path) -> Result<(), Failure> {
        let state = canonical_as_far_as_it_exists(&self.path)
            .or_fail(|| format!("cannot resolve {}", self.path.display()))?;
        let (what, inner, outer) = if state.starts_with(tree) {
            ("the state directory", &state, tree)
        } else if tree.starts_with(&state) {
            ("the tree", &tree.to_path_buf(), state.as_path())
        } else {
            return Ok(());
        };
        Err(Failure::new(format!(
            "{what} {} lies inside {}: the journal would record its own writes",
            inner.display(),
            outer.display()
        ))
        .hint("set MIRRORFS_STATE to a directory outside the tree"))
    }

    /// The directory of a replica's mirror, created if need be. It is named after the
    /// mirror; a second replica of one mirror on one machine gets its replica's id
    /// appended, because a journal belongs to one tree.
    pub fn claim(&self, mirror: MirrorId, replica: ReplicaId) -> Result<MirrorDir, Failure> {
        let plain = MirrorDir {
            path: self.mirrors().join(mirror.to_string()),
        };
        let dir = match plain.record()? {
            Some(record) if record.replica != replica => MirrorDir {
                path: self.mirrors().join(format!("{mirror}.{replica}")),
            },
            _ => plain,
        };
        self.create(&dir.path)?;
        Ok(dir)
    }

    /// The directory of a replica's mirror, if it has one here.
    pub fn known(
        &self,
        mirror: MirrorId,
        replica: ReplicaId,
    ) -> Result<Option<MirrorDir>, Failure> {
        for name in [mirror.to_string(), format!("{mirror}.{replica}")] {
            let dir = MirrorDir {
                path: self.mirrors().join(name),
            };
            if dir.record()?.is_some_and(|found| found.replica == replica) {
                return Ok(Some(dir));
            }
        }
        Ok(None)
    }

    /// Every mirror with state here, by name.
    pub fn all(&self) -> Result<Vec<(MirrorDir, Record)>, Failure> {
        let dir = self.mirrors();
        let list = match fs::read_dir(&dir) {
            Ok(list) => list,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(Failure::new(format!("cannot list {}", dir.display())).because(&error));
            }
        };
        let mut mirrors = Vec::new();
        for entry in list {
            let entry = entry.or_fail(|| format!("cannot list {}", dir.display()))?;
            let mirror = MirrorDir { path: entry.path() };
            if let Some(record) = mirror.record()? {
                mirrors.push((mirror, record));
            }
        }
        mirrors.sort_by(|(_, a), (_, b)| (&a.name, &a.tree).cmp(&(&b.name, &b.tree)));
        Ok(mirrors)
    }
}

/// The state of one mirror's tree on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MirrorDir {
    path: PathBuf,
}

impl MirrorDir {
    /// Its path; the journal lives here.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The lock that its live owner holds.
    pub fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// What the daemon prints.
    pub fn log(&self) -> PathBuf {
        self.path.join("daemon.log")
    }

    /// When its record was written last; none if that cannot be told.
    pub(super) fn taken_at(&self) -> Option<std::time::SystemTime> {
        let record = fs::metadata(self.path.join("mirror.json")).ok()?;
        record.modified().ok()
    }

    /// Whether a process owns the mirror, and which.
    pub fn owner(&self) -> Result<Option<Option<u32>>, Failure> {
        Lock::holder(&self.lock()).or_fail(|| format!("cannot look at {}", self.lock().display()))
    }

    /// What the mirror says about itself; none before its first mount.
    pub fn record(&self) -> Result<Option<Record>, Failure> {
        let path = self.path.join("mirror.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(Failure::new(format!("cannot read {}", path.display())).because(&error));
            }
        };
        let record = serde_json::from_slice(&text)
            .or_fail(|| format!("cannot understand {}", path.display()))
            .map_err(|failure| {
                failure.hint("it was damaged, or written by a newer mirrorfs: remove it, and the next mount writes it anew")
            })?;
        Ok(Some(record))
    }

    /// Replaces the record as a whole, so that no reader sees a part of it.
    pub fn write_record(&self, record: &Record) -> Result<(), Failure> {
        let path = self.path.join("mirror.json");
        let fresh = self.path.join("mirror.json.new");
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(record)?;
            text.push(b'\n');
            let mut file = fs::File::create(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)
        };
        write().or_fail(|| format!("cannot write {}", path.display()))
    }
}

/// Which changes travel in which direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Both ways.
    #[default]
    TwoWay,
    /// Changes made here are sent; changes made there are not taken in.
    PushOnly,
    /// Changes made there are taken in; changes made here are not sent.
    PullOnly,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TwoWay => "two-way",
            Self::PushOnly => "push-only",
            Self::PullOnly => "pull-only",
        })
    }
}

/// What becomes of a file that both sides have edited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnConflict {
    /// Both versions are kept, and somebody decides.
    #[default]
    Keep,
    /// Text that was edited in different places is merged; else as above.
    Merge,
}

/// `mirror.json`: what must be known of a mirror while its tree is covered by the
/// mount, or gone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The mirror.
    pub id: MirrorIdText,
    /// The replica that this state belongs to.
    #[serde(with = "id_text")]
    pub replica: ReplicaId,
    /// What people call it.
    pub name: String,
    /// Canonical path of the tree at its last mount.
    #[serde(with = "path_bytes")]
    pub tree: PathBuf,
    /// Which changes travel.
    #[serde(default)]
    pub mode: Mode,
    /// What becomes of a file that both sides have edited.
    #[serde(default)]
    pub conflict: OnConflict,
    /// Which symbolic links of the peers are taken in.
    #[serde(default)]
    pub symlinks: Symlinks,
    /// Device number of the live mount. Stale unless the lock is held.
    #[serde(default)]
    pub device: Option<u64>,
}

/// A mirror's id, written in JSON as it is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MirrorIdText(#[serde(with = "id_text")] pub MirrorId);

mod id_text {
    use crate::tree::Id;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &Id, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Id, D::Error> {
        let text = String::deserialize(from)?;
        Id::parse(&text).ok_or_else(|| D::Error::custom(format!("not an id: {text}")))
    }
}

/// Paths are bytes: as text where they are UTF-8, as a list of bytes where not.
mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => to.serialize_str(text),
            None => path.as_os_str().as_bytes().serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Form::deserialize(from)? {
            Form::Text(text) => PathBuf::from(text),
            Form::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes)),
        })
    }
}

/// Resolves symbolic links in the part of a path that exists, and keeps the rest. A
/// path with `..` behind a missing name has no meaning and is an error.
pub(crate) fn canonical_as_far_as_it_exists(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let mut missing = Vec::new();
    let mut rest = path.as_path();
    loop {
        match fs::canonicalize(rest) {
            Ok(mut found) => {
                found.extend(missing.iter().rev());
                return Ok(found);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (Some(name), Some(parent)) = (rest.file_name(), rest.parent()) else {
                    return Err(error);
                };
                if name.as_bytes() == b".." {
                    return Err(error);
                }
                missing.push(name.to_owned());
                rest = parent;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Id;

    fn environment(state: &str, xdg: &str, home: &str, root: bool) -> Environment {
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        Environment {
            state: path(state),
            xdg_state_home: path(xdg),
            home: path(home),
            root,
        }
    }

    fn resolved(environment: &Environment) -> PathBuf {
        StateDir::resolve(environment).unwrap().path
    }

    #[test]
    fn the_state_directory_follows_the_environment_in_order() {
        assert_eq!(
            resolved(&environment("/s", "/x", "/h", true)),
            Path::new("/s")
        );
        assert_eq!(
            resolved(&environment("", "/x", "/h", false)),
            Path::new("/x/mirrorfs")
        );
        assert_eq!(
            resolved(&environment("", "relative", "/h", false)),
            Path::new("/h/.local/state/mirrorfs")
        );
        assert_eq!(
            resolved(&environment("", "", "/h", true)),
            Path::new("/var/lib/mirrorfs")
        );
        let failure = StateDir::resolve(&environment("", "", "", false)).unwrap_err();
        assert!(failure.hint.unwrap().contains("MIRRORFS_STATE"));
    }

    #[test]
    fn refuses_state_in_the_tree_and_the_tree_in_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let tree = root.join("tree");
        fs::create_dir_all(tree.join("deep")).unwrap();
        // A link outside that leads into the tree must not hide that.
        std::os::unix::fs::symlink(tree.join("deep"), root.join("link")).unwrap();
        let state = |path: PathBuf| StateDir { path };

        for inside in [
            tree.clone(),
            tree.join("deep/not/yet"),
            root.join("link/state"),
        ] {
            let failure = state(inside.clone()).keep_apart(&tree).unwrap_err();
            assert!(
                failure.message.contains("the state directory"),
                "{inside:?}: {failure}"
            );
        }
        let failure = state(root.clone()).keep_apart(&tree).unwrap_err();
        assert!(failure.message.starts_with("the tree"), "{failure}");
        state(root.join("tree-state")).keep_apart(&tree).unwrap();
    }

    fn record(tree: &Path, replica: u8) -> Record {
        Record {
            id: MirrorIdText(Id([1; 16])),
            replica: Id([replica; 16]),
            name: "web".into(),
            tree: tree.to_path_buf(),
            mode: Mode::PushOnly,
            conflict: OnConflict::Keep,
            symlinks: Symlinks::All,
            device: Some(77),
        }
    }

    #[test]
    fn each_replica_has_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir {
            path: dir.path().join("state"),
        };
        let (mirror, first, second) = (Id([1; 16]), Id([2; 16]), Id([3; 16]));
        assert!(state.all().unwrap().is_empty());
        assert_eq!(state.known(mirror, first).unwrap(), None);

        let one = state.claim(mirror, first).unwrap();
        assert_eq!(
            fs::metadata(&state.path).unwrap().mode() & 0o7777,
            0o700,
            "nobody else reads a journal"
        );
        one.write_record(&record(Path::new("/a"), 2)).unwrap();
        let two = state.claim(mirror, second).unwrap();
        two.write_record(&record(Path::new("/b"), 3)).unwrap();
        assert_ne!(one, two);
        assert_eq!(state.claim(mirror, first).unwrap(), one);
        assert_eq!(state.claim(mirror, second).unwrap(), two);
        assert_eq!(state.known(mirror, second).unwrap(), Some(two));
        assert_eq!(state.all().unwrap().len(), 2);
    }

    #[test]
    fn the_record_survives_with_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = MirrorDir {
            path: dir.path().to_path_buf(),
        };
        for path in [&b"/plain"[..], b"/not \xff utf-8"] {
            let record = record(Path::new(std::ffi::OsStr::from_bytes(path)), 2);
            mirror.write_record(&record).unwrap();
            assert_eq!(mirror.record().unwrap(), Some(record));
        }
    }

    #[test]
    fn a_damaged_record_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = MirrorDir {
            path: dir.path().to_path_buf(),
        };
        fs::write(dir.path().join("mirror.json"), "{").unwrap();
        let failure = mirror.record().unwrap_err();
        assert!(failure.message.contains("mirror.json"), "{failure}");
        assert!(failure.hint.is_some());
    }
}
