//! What `mirrorfs doctor` looks at: whether this machine can mount, and whether a peer can
//! be reached and how. It changes nothing, here or there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::Access;
use serde::Serialize;

use super::exit::Exit;
use super::failure::Failure;
use super::mounts::{self, Mounts};
use super::place;
use super::site;
use super::state::StateDir;
use super::status::{self, PeerState};
use crate::fuse;
use crate::transport::{self, ConnectOptions, PeerUrl};

/// With less room than this the state directory is worth a word, in bytes.
const LITTLE_ROOM: u64 = 1 << 30;

/// With fewer inotify watches than this an agent on this machine is likely to run out of
/// them: one directory takes one.
const FEW_WATCHES: u64 = 65_536;

/// Filesystems, by `f_type` of statfs(2) as in `linux/magic.h`, on which a journal is not
/// where it should be.
const UNFIT: [(u64, &str); 7] = [
    (0x0102_1994, "tmpfs: it is gone when the machine stops"),
    (0x8584_58f6, "ramfs: it is gone when the machine stops"),
    (
        0x6969,
        "NFS: SQLite's locks and syncs are not to be relied on there",
    ),
    (
        0xff53_4d42,
        "CIFS: SQLite's locks and syncs are not to be relied on there",
    ),
    (
        0xfe53_4d42,
        "SMB: SQLite's locks and syncs are not to be relied on there",
    ),
    (
        0x0102_1997,
        "9p: SQLite's locks and syncs are not to be relied on there",
    ),
    (
        0x6573_5546,
        "FUSE: it lasts no longer than the program that serves it",
    ),
];

/// How something was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, and something about it is worth knowing.
    Note,
    /// It stands in the way.
    Bad,
}

/// Something that was looked at. The names of the fields and the lower-case words are an
/// interface for scripts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// What: a word, or `peer` and its name.
    pub about: String,
    /// How it was found.
    pub verdict: Verdict,
    /// What was found, in a sentence.
    pub finding: String,
    /// What to do about it; none if there is nothing to do.
    pub hint: Option<String>,
    /// What it adds to the exit code.
    #[serde(skip)]
    pub exit: Exit,
}

impl Check {
    fn good(about: &str, finding: impl Into<String>) -> Self {
        Self {
            about: about.to_owned(),
            verdict: Verdict::Good,
            finding: finding.into(),
            hint: None,
            exit: Exit::Done,
        }
    }

    fn note(about: &str, finding: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Note,
            ..Self::good(about, finding)
        }
    }

    fn bad(about: &str, finding: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Bad,
            exit: Exit::Error,
            ..Self::good(about, finding)
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn failed(about: &str, failure: &Failure) -> Self {
        let mut finding = failure.message.clone();
        for cause in &failure.causes {
            finding.push_str(": ");
            finding.push_str(cause);
        }
        Self {
            hint: failure.hint.clone(),
            exit: failure.exit,
            ..Self::bad(about, finding)
        }
    }
}

/// Whether this machine has what every mirror needs.
pub fn machine() -> Vec<Check> {
    let mut checks = vec![fuse_device(), channel()];
    checks.push(match StateDir::find() {
        Ok(state) => state_directory(state.path()),
        Err(failure) => Check::failed("state", &failure),
    });
    checks.push(watches(Path::new("/proc/sys/fs/inotify/max_user_watches")));
    checks.push(ssh_program("ssh"));
    checks
}

fn fuse_device() -> Check {
    match place::fuse() {
        Ok(()) if rustix::process::geteuid().is_root() => {
            Check::good("fuse", "/dev/fuse can be used, and root mounts by itself")
        }
        Ok(()) => Check::good(
            "fuse",
            "/dev/fuse can be used, and fusermount3 mounts for this user",
        ),
        Err(failure) => Check::failed("fuse", &failure),
    }
}

fn channel() -> Check {
    let channel = fuse::expected_channel();
    let finding = format!("requests come through {channel}");
    match channel {
        fuse::Channel::IoUring => Check::good("channel", finding),
        fuse::Channel::Device(_) => Check::note("channel", finding),
    }
}

/// `path` need not exist yet: it is made where the first directory above it is.
fn state_directory(path: &Path) -> Check {
    const ABOUT: &str = "state";
    let name = path.display();
    let choose = "set MIRRORFS_STATE to a directory on a local disk";
    let Some(there) = path.ancestors().find(|above| above.exists()) else {
        return Check::bad(ABOUT, format!("{name} cannot be made")).hint(choose);
    };
    let place = there.display();
    if !there.is_dir() {
        return Check::bad(ABOUT, format!("{place} is not a directory")).hint(choose);
    }
    if let Err(error) = rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK) {
        return Check::bad(ABOUT, format!("{place} cannot be written to: {error}")).hint(choose);
    }
    let (system, room) = match (rustix::fs::statfs(there), rustix::fs::statvfs(there)) {
        (Ok(system), Ok(room)) => (system, room),
        (Err(error), _) | (_, Err(error)) => {
            return Check::bad(
                ABOUT,
                format!("{place} does not say what it is on: {error}"),
            );
        }
    };
    // A magic number of 32 bits, in a field that is as wide as a word and may be signed.
    let kind = u64::from(system.f_type as u32);
    if let Some((_, why)) = UNFIT.iter().find(|(magic, _)| *magic == kind) {
        return Check::note(ABOUT, format!("{name} is on {why}")).hint(choose);
    }
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    let mib = free >> 20;
    if free < LITTLE_ROOM {
        return Check::note(ABOUT, format!("{name} has {mib} MiB left"))
            .hint("make room: without it the journal stops, and with it every change");
    }
    Check::good(
        ABOUT,
        format!("{name} can be written to, {mib} MiB are free"),
    )
}

/// For the peers of others that are on this machine, and local ones.
fn watches(limit: &Path) -> Check {
    const ABOUT: &str = "watches";
    let found = fs::read_to_string(limit)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match found {
        None => Check::note(ABOUT, "this kernel does not say how many inotify watches there are"),
        Some(found) if found < FEW_WATCHES => Check::note(
            ABOUT,
            format!("a user has {found} inotify watches: a peer here with more directories is scanned now and then instead of being watched"),
        )
        .hint("as root: sysctl fs.inotify.max_user_watches=524288, and the same in /etc/sysctl.d"),
        Some(found) => Check::good(ABOUT, format!("a user has {found} inotify watches")),
    }
}

fn ssh_program(program: &str) -> Check {
    const ABOUT: &str = "ssh";
    let built_in = cfg!(feature = "libssh2");
    let asked = Command::new(program)
        .arg("-V")
        .stdin(Stdio::null())
        .output();
    match asked {
        // It says so on standard error.
        Ok(output) if output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr);
            let version = said.trim();
            Check::good(
                ABOUT,
                if built_in {
                    format!("libssh2 is built in, and the ssh program is {version}")
                } else {
                    format!("the ssh program is {version}")
                },
            )
        }
        _ if built_in => Check::note(
            ABOUT,
            "there is no ssh program: libssh2 reads no ssh configuration then, and what it cannot do (jump hosts, certificates, security tokens) cannot be done",
        )
        .hint("install it (Debian, Ubuntu: the package openssh-client)"),
        _ => Check::bad(
            ABOUT,
            "there is no ssh program, and this mirrorfs was built without libssh2: no peer on another machine can be reached",
        )
        .hint("install it (Debian, Ubuntu: the package openssh-client)"),
    }
}

/// Whether a directory that is no mirror yet can be mounted.
pub fn new_tree(dir: &Path) -> Vec<Check> {
    const ABOUT: &str = "tree";
    let checked = place::tree(dir).and_then(|tree| {
        let mounts = Mounts::read().map_err(|error| {
            Failure::new("cannot read the mounts of this machine").because(&error)
        })?;
        place::alone(&tree, &mounts)?;
        Ok(tree)
    });
    match checked {
        Err(failure) => vec![Check::failed(ABOUT, &failure)],
        Ok(tree) => std::iter::once(Check::good(
            ABOUT,
            format!("{} can be mounted", tree.display()),
        ))
        .chain(noted(&tree))
        .collect(),
    }
}

fn noted(tree: &Path) -> impl Iterator<Item = Check> {
    place::warnings(tree)
        .into_iter()
        .map(|warning| Check::note("tree", warning))
}

/// How a mirror is, as its status tells.
pub fn mirror(status: &status::Status) -> Vec<Check> {
    const ABOUT: &str = "tree";
    let tree = PathBuf::from(&status.mirror.tree);
    let name = tree.display();
    let mut checks = Vec::new();
    match status.mount.state {
        status::MountState::Mounted => checks.push(Check::good(
            ABOUT,
            format!(
                "{name} is mounted{}",
                status
                    .mount
                    .channel
                    .as_ref()
                    .map_or_else(String::new, |channel| format!(
                        ", requests come through {channel}"
                    ))
            ),
        )),
        status::MountState::Unmounted if mounts::is_dead(&tree) => checks.push(
            Check::bad(ABOUT, format!("{name} is a mount whose daemon has ended"))
                .hint(format!("mirrorfs mount {name} clears it and mounts again")),
        ),
        status::MountState::Unmounted => {
            let why = status
                .mount
                .reason
                .as_ref()
                .map_or_else(String::new, |reason| format!(": {reason}"));
            checks.push(
                Check::note(ABOUT, format!("{name} is not mounted{why}"))
                    .hint(format!("mirrorfs mount {name} mounts it")),
            );
            checks.extend(noted(&tree));
        }
    }
    if let Some(reason) = &status.journal.reason {
        checks.push(Check::note("journal", reason));
    }
    for peer in &status.peers {
        checks.push(known_peer(peer));
    }
    checks
}

/// A peer that a mirror has. What the daemon says of one that it is connected to is enough:
/// a second agent would take the first one's place.
fn known_peer(peer: &status::Peer) -> Check {
    let about = format!("peer {}", peer.name);
    if let Some(reason) = &peer.halt_reason {
        return Check {
            exit: Exit::Brake,
            ..Check::bad(&about, reason)
        };
    }
    if peer.state == PeerState::Connected {
        let transport = peer.transport.as_deref().unwrap_or("some link");
        let mut finding = format!("{} is connected by {transport}", peer.url);
        if let Some(reason) = &peer.transport_reason {
            finding.push_str(&format!(" ({reason})"));
        }
        if let Some(version) = &peer.version {
            finding.push_str(&format!(", mirrorfs {version} is there"));
        }
        return match &peer.scanned_because {
            Some(why) => Check::note(
                &about,
                format!("{finding}; its directory is scanned now and then: {why}"),
            ),
            None => Check::good(&about, finding),
        };
    }
    let about = about.as_str();
    match PeerUrl::parse(&peer.url) {
        Ok(url) => reached(about, &url),
        Err(error) => Check::bad(about, format!("{}: {error}", peer.url)),
    }
}

/// Whether a place can be a peer of a directory, can be reached, and how.
pub fn new_peer(text: &str, dir: &Path) -> Check {
    const ABOUT: &str = "peer";
    match place::tree(dir).and_then(|tree| site::peer_at(text, &tree)) {
        Ok(url) => reached(ABOUT, &url),
        Err(failure) => Check::failed(ABOUT, &failure),
    }
}

/// Starts an agent there and says nothing to it, so that nothing changes. One that is
/// missing is installed, as mounting would do.
fn reached(about: &str, url: &PeerUrl) -> Check {
    let options = match ConnectOptions::from_env() {
        Ok(options) => options,
        Err(error) => return Check::bad(about, error.to_string()),
    };
    match transport::connect(url, &options) {
        Ok(link) => Check::good(
            about,
            format!(
                "{url} can be reached by {} ({})",
                link.transport, link.reason
            ),
        ),
        Err(error) if error.is_away() => Check {
            exit: Exit::Unreachable,
            ..Check::bad(about, format!("{url}: {error}"))
        },
        Err(error) => Check::bad(about, format!("{url}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_watches_are_worth_a_word() {
        let dir = tempfile::tempdir().unwrap();
        let limit = dir.path().join("limit");
        assert_eq!(watches(&limit).verdict, Verdict::Note);
        fs::write(&limit, "8192\n").unwrap();
        let check = watches(&limit);
        assert_eq!(check.verdict, Verdict::Note);
        assert!(check.finding.contains("8192"), "{check:?}");
        fs::write(&limit, "1048576\n").unwrap();
        assert_eq!(watches(&limit).verdict, Verdict::Good);
    }

    #[test]
    fn a_missing_ssh_program_is_found_missing() {
        let check = ssh_program("/nowhere/ssh");
        assert_ne!(check.verdict, Verdict::Good);
        assert!(check.hint.unwrap().contains("openssh-client"));
    }

    #[test]
    fn a_state_directory_in_memory_is_worth_a_word() {
        let check = state_directory(Path::new("/dev/shm/mirrorfs/not/there/yet"));
        assert_eq!(check.verdict, Verdict::Note, "{check:?}");
        assert!(check.finding.contains("tmpfs"), "{check:?}");
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_to_stands_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let check = state_directory(&file.join("state"));
        assert_eq!(check.verdict, Verdict::Bad, "{check:?}");
        assert!(check.hint.unwrap().contains("MIRRORFS_STATE"));
    }
}
