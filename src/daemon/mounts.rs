//! What is mounted where, from `/proc/self/mountinfo`. Reading it asks no filesystem
//! anything, so it works however dead a mount is.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountPoint {
    /// Where.
    pub path: PathBuf,
    /// Its device number, as `stat` shows it.
    pub device: u64,
    /// The filesystem's type, such as `fuse.mirrorfs`.
    pub kind: String,
    /// What the filesystem says it shows.
    pub source: Vec<u8>,
    /// The user that mounted a FUSE filesystem.
    pub user: Option<u32>,
}

impl MountPoint {
    /// Whether it is one of ours.
    pub fn is_mirrorfs(&self) -> bool {
        self.kind == "fuse.mirrorfs" || (self.kind == "fuse" && self.source == b"mirrorfs")
    }
}

/// All mounts, later ones after those they cover.
#[derive(Clone, Debug, Default)]
pub struct Mounts(Vec<MountPoint>);

impl Mounts {
    /// Those that this process sees.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    fn parse(table: &[u8]) -> Self {
        Self(
            table
                .split(|byte| *byte == b'\n')
                .filter_map(line)
                .collect(),
        )
    }

    /// What is mounted exactly at a canonical path, uppermost.
    pub fn at(&self, path: &Path) -> Option<&MountPoint> {
        self.0.iter().rev().find(|mount| mount.path == path)
    }

    /// The mount of ours that a canonical path lies in, if it does.
    pub fn mirror_above(&self, path: &Path) -> Option<&MountPoint> {
        let mount = path.ancestors().find_map(|above| self.at(above))?;
        mount.is_mirrorfs().then_some(mount)
    }

    /// The first mount strictly below a canonical path.
    pub fn below(&self, path: &Path) -> Option<&MountPoint> {
        self.0
            .iter()
            .find(|mount| mount.path != path && mount.path.starts_with(path))
    }
}

/// `36 35 98:0 /root /mount/point options [optional fields] - type source options`,
/// described in proc_pid_mountinfo(5).
fn line(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|byte| *byte == b' ');
    let numbers = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = numbers.split_once(':')?;
    let path = unescape(fields.nth(1)?);
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let options = fields.next().unwrap_or_default();
    let user = options
        .split(|byte| *byte == b',')
        .find_map(|option| option.strip_prefix(b"user_id="))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    Some(MountPoint {
        path: PathBuf::from(OsString::from_vec(path)),
        device: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
        kind,
        source,
        user,
    })
}

/// Blanks, tabs, newlines and backslashes appear as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        match digits {
            Some(code) => {
                plain.push(code);
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

/// Resolves a path whose last component may be the mount point of a dead filesystem,
/// which answers nothing any more.
pub fn canonical(path: &Path) -> io::Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Err(error) if says_dead(&error) => {
            let path = std::path::absolute(path)?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error);
            };
            if name.as_bytes() == b".." {
                return Err(error);
            }
            Ok(std::fs::canonicalize(parent)?.join(name))
        }
        found => found,
    }
}

/// Whether a FUSE mount without a daemon covers a path.
pub fn is_dead(path: &Path) -> bool {
    // Unlike stat, statfs is never answered from a cache.
    rustix::fs::statfs(path).is_err_and(|error| says_dead(&error.into()))
}

/// Whether an error says that a FUSE mount has lost its daemon: ENOTCONN, or, for a
/// request that was under way when that happened, ECONNABORTED. For some milliseconds
/// after the end of a daemon that served over io_uring, while the kernel takes that down,
/// it is ECANCELED.
pub fn says_dead(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:21 / /proc rw - proc proc rw
61 22 0:55 / /home/me/my\\040web rw,nosuid shared:3 master:1 - fuse.mirrorfs mirrorfs rw,user_id=1000,group_id=1000
70 61 0:56 / /home/me/my\\040web/tmp rw - tmpfs tmpfs rw
71 22 0:57 / /srv rw - fuse.sshfs host: rw,user_id=0
";

    #[test]
    fn finds_mirrors_above_and_mounts_below() {
        let mounts = Mounts::parse(TABLE);
        let web = Path::new("/home/me/my web");
        let at = mounts.at(web).unwrap();
        assert!(at.is_mirrorfs());
        assert_eq!(at.user, Some(1000));
        assert_eq!(at.device, rustix::fs::makedev(0, 55));
        assert_eq!(
            mounts.mirror_above(&web.join("src/deep")).unwrap().path,
            web
        );
        assert_eq!(mounts.mirror_above(&web.join("tmp/x")), None);
        assert_eq!(mounts.mirror_above(Path::new("/home/me")), None);
        assert_eq!(mounts.mirror_above(Path::new("/srv/x")), None);
        assert_eq!(mounts.below(web).unwrap().path, web.join("tmp"));
        assert_eq!(mounts.below(Path::new("/srv")), None);
        assert_eq!(mounts.below(Path::new("/home/me/my")), None);
    }

    #[test]
    fn escapes_are_undone_and_nothing_panics() {
        assert_eq!(unescape(b"a\\040b\\134\\"), b"a b\\\\");
        assert_eq!(unescape(b"\\99x\\777"), b"\\99x\\777");
        assert!(
            Mounts::parse(b"\n1 2\nx y z\n1 2 a:b / / - e s o\n")
                .0
                .is_empty()
        );
        Mounts::read().unwrap().at(Path::new("/")).unwrap();
    }
}
