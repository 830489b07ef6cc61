//! Taking possession of a mirror's tree: everything that a mount, and a round without
//! one, need before they can work.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorfs_journal::{Contents, Durability, Journal, Peer, Start};
use rustix::fs::{FlockOperation, Mode as FileMode, OFlags};

use super::adopt::{self, Met};
use super::announce::{Announce, Announcement};
use super::control::Identity as Attached;
use super::failure::{Failure, OrFail};
use super::lock::{Attempt, DYING, Lock};
use super::mounts::Mounts;
use super::state::{MirrorDir, MirrorIdText, Mode, OnConflict, Record, StateDir};
use super::{gone, locate, lost, place, takeover};
use crate::door::Door;
use crate::fs::{Filesystem, FsOptions, Lower, RecoveryReport, raise_descriptor_limit};
use crate::replica::{Identity, Owner, Reserved, Staging};
use crate::replicator::{LocalTree, Secured};
use crate::scratch::Scratch;
use crate::transport::{PeerUrl, Serve};
use crate::tree::links::Symlinks;
use crate::tree::{Id, MirrorId, PeerId, RESERVED, ReplicaId, scan};
use parking_lot::Mutex;

/// What a user asks for.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The tree.
    pub dir: PathBuf,
    /// A peer to add, if it is not configured yet.
    pub peer: Option<String>,
    /// What to call that peer.
    pub peer_name: Option<String>,
    /// What to call the mirror.
    pub name: Option<String>,
    /// Which changes travel; as before if none.
    pub mode: Option<Mode>,
    /// What becomes of a file that both sides have edited; as before if none.
    pub conflict: Option<OnConflict>,
    /// Which symbolic links of the peers are taken in; as before if none.
    pub symlinks: Option<Symlinks>,
    /// Whether FUSE will be needed.
    pub mount: bool,
    /// An empty directory is filled from the peers where a tree was before.
    pub refill: bool,
    /// Nothing is to change, here or on the peer: what has to be written down is written
    /// elsewhere, and goes with the site.
    pub dry_run: bool,
}

/// A tree in this process's possession, recorded and up to date.
///
/// The fields are dropped in this order: the lock goes last.
pub struct Site {
    /// The filesystem on the tree, not mounted.
    pub filesystem: Arc<Filesystem>,
    /// The tree's `.mirrorfs`.
    pub reserved: Arc<Reserved>,
    /// Who the tree is.
    pub identity: Identity,
    /// The journal.
    pub journal: Journal,
    /// Small texts as both sides agreed on them, if they can be kept.
    pub contents: Option<Arc<Contents>>,
    /// How the journal was found.
    pub start: Start,
    /// The peer that was ordered, among those configured.
    pub ordered: Option<PeerId>,
    /// What is written about the mirror in its directory.
    pub record: Record,
    /// The mirror's state.
    pub dir: MirrorDir,
    _tree_lock: Lock,
    _lock: Lock,
    scratch: Option<Scratch>,
}

impl Site {
    /// Takes a tree: checks it, gives it an identity if it has none, opens its journal
    /// and brings the record of the tree up to date. Changes nothing in the tree but
    /// `.mirrorfs`. `claimed` hears of the mirror's directory as soon as it is ours.
    pub fn open(
        order: &Order,
        say: &mut dyn Announce,
        claimed: impl FnOnce(&MirrorDir) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let mut state = StateDir::find()?;
        let tree = match place::tree(&order.dir) {
            Ok(tree) => tree,
            Err(failure) => return Err(gone::missing(&state, &order.dir)?.unwrap_or(failure)),
        };
        let name = tree.display();

        let cleared = crate::fuse::clear_dead_mount(&tree)
            .or_fail(|| format!("cannot clear the dead mount at {name}"))
            .map_err(|failure| failure.hint(format!("unmount it by hand: umount -l {name}")))?;
        if cleared {
            say.announce(Announcement::Note(format!(
                "cleared the mount of a daemon that had died at {name}"
            )));
        }
        // A daemon that was killed holds its lock until its last thread has ended.
        let patience = Instant::now() + if cleared { DYING } else { Duration::ZERO };
        while let Err(refused) = refuse_mounted(&state, &tree) {
            if Instant::now() >= patience {
                return Err(refused);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let mounts = Mounts::read().or_fail(|| "cannot read /proc/self/mountinfo".into())?;
        place::alone(&tree, &mounts)?;
        state.keep_apart(&tree)?;
        let peer = order
            .peer
            .as_deref()
            .map(|peer| peer_at(peer, &tree))
            .transpose()?;
        if order.mount {
            place::fuse()?;
            for warning in place::warnings(&tree) {
                say.announce(Announcement::Warning(warning));
            }
        }

        let lower = Lower::open(&tree).or_fail(|| format!("cannot use {name}"))?;
        let scratch = order
            .dry_run
            .then(Scratch::new)
            .transpose()
            .or_fail(|| "cannot make a directory for temporary files".into())?;
        let (reserved, identity, met) = {
            let _one_at_a_time = lock_root(&lower)?;
            identify(&lower, &state, order, peer.as_ref(), scratch.as_ref(), say)?
        };
        if let Some(scratch) = &scratch {
            let aside = StateDir::aside(&scratch.path().join("state"));
            if let Some(known) = state.known(identity.mirror, identity.replica)? {
                // Looked at and not taken: its file would show that somebody was here.
                if let Some(pid) = known.owner()? {
                    return Err(held(&tree, pid));
                }
                aside.copy_mirror(&known)?;
            }
            state = aside;
        }
        let dir = state.claim(identity.mirror, identity.replica)?;
        let lock = take_lock(&dir, &tree)?;
        if scratch.is_none() {
            takeover::finish(&state, &tree, identity.replica)?;
        }
        let tree_lock = take_tree_lock(&reserved, &tree)?;
        claimed(&dir)?;
        let record = describe(order, &dir, identity, &tree)?;
        dir.write_record(&record)?;

        let (journal, start) = Journal::open(dir.path())
            .or_fail(|| format!("cannot open the journal in {}", dir.path().display()))?;
        let contents = match Contents::open(dir.path()) {
            Ok(contents) => Some(Arc::new(contents)),
            Err(error) => {
                let text = format!("conflicts cannot be shown three ways, nor merged: {error}");
                say.announce(Announcement::Warning(text));
                None
            }
        };
        if let Some(reason) = lost::begin_anew(&dir, &journal, &start)? {
            say.announce(Announcement::Warning(reason));
        }
        let taken_over = takeover::take_over(&state, &journal, identity.replica)?;
        if taken_over {
            say.announce(Announcement::Note(format!(
                "{name} was a peer's directory: it goes on as the mounted side of its mirror"
            )));
        }
        raise_descriptor_limit();
        let news = crate::replicator::check_marks(&journal, &reserved)
            .or_fail(|| format!("cannot compare the journal with what is in {name}/.mirrorfs"))?;
        for warning in news {
            say.announce(Announcement::Warning(warning));
        }
        let filesystem = Filesystem::new(lower, journal.recorder(), FsOptions::default())
            .or_fail(|| format!("cannot serve {name}"))?;
        let power_loss = crate::replicator::power_loss(&journal, &start)
            .or_fail(|| format!("cannot tell whether the machine went down under {name}"))?;
        let conflicts = || format!("cannot go through the conflicts of {name}");
        let artefacts = crate::replicator::artefacts(&journal).or_fail(conflicts)?;
        let broken_off = || format!("cannot tell what the last mount of {name} had brought in");
        let authors = crate::replicator::interrupted(&journal, &filesystem).or_fail(broken_off)?;
        let disk = scan::filesystem_of(filesystem.lower().root().as_fd())
            .or_fail(|| format!("cannot look at {name}"))?;
        let elsewhere = crate::replicator::found_on(&journal, disk)
            .or_fail(|| "cannot write to the journal".into())?;
        let recovery = filesystem
            .recover_knowing(&journal, &authors)
            .or_fail(|| format!("cannot scan {name}"))?;
        crate::replicator::scanned_on(&journal, disk)
            .or_fail(|| "cannot write to the journal".into())?;
        if elsewhere {
            say.announce(Announcement::Warning(format!(
                "{name} is on another disk than before: what is missing on it is not deleted from the peers before somebody says so; mirrorfs status tells whether anything is"
            )));
        }
        if taken_over {
            takeover::bind(&journal)?;
        }
        crate::replicator::settle_pulls(&journal, &filesystem, &reserved, start.same_boot)
            .or_fail(broken_off)?;
        crate::replicator::settle_late(&journal, &filesystem, &reserved).or_fail(broken_off)?;
        if let Some(power_loss) = power_loss {
            let doubts = power_loss
                .doubt(&journal, &filesystem)
                .or_fail(|| format!("cannot tell what a power loss has done to {name}"))?;
            if doubts > 0 {
                say.announce(Announcement::Warning(format!(
                    "the machine went down when {doubts} names had just been changed: they are neither sent nor deleted elsewhere as they are, and what a peer has of them comes back from there"
                )));
            }
        }
        crate::replicator::renew_artefacts(&journal, artefacts).or_fail(conflicts)?;
        if let Some(note) = recovered(&start, &recovery, cleared) {
            say.announce(Announcement::Note(note));
        }
        for (path, error) in recovery.unreadable.iter().take(5) {
            say.announce(Announcement::Warning(format!(
                "{path} is not mirrored: {error}"
            )));
        }
        let ordered = peer
            .map(|peer| add_peer(&journal, &peer, order.peer_name.as_deref(), met))
            .transpose()?;
        lost::remember_peers(&dir, &journal)?;
        Ok(Self {
            filesystem,
            reserved: Arc::new(reserved),
            identity,
            journal,
            contents,
            start,
            ordered,
            record,
            dir,
            _tree_lock: tree_lock,
            _lock: lock,
            scratch,
        })
    }

    /// Makes what was recorded and agreed on so far durable in lower, and marks the tree.
    pub fn secure(&self) -> Result<(), Failure> {
        crate::replicator::secure(
            &self.journal,
            &self.filesystem,
            &self.reserved,
            &mut Secured::default(),
        )
        .or_fail(|| format!("cannot sync {}", self.tree().display()))
    }

    /// Whether this is for a dry run only.
    pub fn is_dry(&self) -> bool {
        self.scratch.is_some()
    }

    /// The tree's path, for messages and for mounting only.
    pub fn tree(&self) -> &Path {
        &self.record.tree
    }

    /// Forgets a peer, by its name, and everything agreed with it. Returns how many
    /// conflicts with it were open. Nobody may be serving it.
    pub fn remove_peer(&self, name: &str, force: bool) -> Result<usize, Failure> {
        let peer = peer_named(&self.journal, name)?;
        removable(&self.journal, &peer, force)?;
        remove_peer(&self.journal, &self.reserved, peer.id)
    }

    /// The peers that are configured.
    pub fn peers(&self) -> Result<Vec<Peer>, Failure> {
        self.journal
            .snapshot()
            .and_then(|snapshot| snapshot.peers())
            .or_fail(|| "cannot read the peers from the journal".into())
    }
}

/// The tree as the replicator changes it.
pub fn local_tree(site: &Site, door: Option<Arc<Mutex<Door>>>) -> Result<LocalTree, Failure> {
    let message = || {
        format!(
            "cannot use {}",
            site.tree().join(".mirrorfs/staging").display()
        )
    };
    // Only root can give files away, and what comes from a peer belongs to whom the
    // tree belongs to.
    let owner = if rustix::process::geteuid().is_root() {
        let root = site.filesystem.lower().root();
        let found = rustix::fs::fstat(root).or_fail(message)?;
        Some(Owner {
            uid: found.st_uid,
            gid: found.st_gid,
        })
    } else {
        None
    };
    let staging = Staging::new(&site.reserved).or_fail(message)?;
    if !site.is_dry() {
        // What an earlier life left there is of no use to this one.
        staging.clean(&|_| false).or_fail(message)?;
    }
    Ok(LocalTree {
        filesystem: Arc::clone(&site.filesystem),
        door,
        staging: Arc::new(staging),
        reserved: Arc::clone(&site.reserved),
        owner,
        symlinks: site.record.symlinks,
    })
}

/// A second mount of one tree is refused in the name of the first.
fn refuse_mounted(state: &StateDir, tree: &Path) -> Result<(), Failure> {
    match locate::find(state, tree)? {
        Some((dir, record)) if record.tree == tree => match dir.owner()? {
            Some(pid) => Err(held(tree, pid)),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn held(tree: &Path, pid: Option<u32>) -> Failure {
    let who = match pid {
        Some(pid) => format!("by the process {pid}"),
        None => "by a process that is just starting".into(),
    };
    Failure::new(format!("{} is already mounted, {who}", tree.display())).hint(format!(
        "see mirrorfs status {0}; mirrorfs umount {0} ends it",
        tree.display()
    ))
}

fn take_lock(dir: &MirrorDir, tree: &Path) -> Result<Lock, Failure> {
    match Lock::take_from_the_dying(&dir.lock())
        .or_fail(|| format!("cannot lock {}", dir.lock().display()))?
    {
        Attempt::Taken(lock) => Ok(lock),
        Attempt::Held(pid) => {
            // The same replica under another path is a copy of the tree or a second
            // way to it.
            let other = dir
                .record()?
                .map_or_else(|| tree.to_path_buf(), |known| known.tree);
            Err(held(&other, pid))
        }
    }
}

/// Lets only one process at a time find out, or decide, who a tree is. Released when the
/// descriptor is dropped.
fn lock_root(lower: &Lower) -> Result<OwnedFd, Failure> {
    let message = || format!("cannot lock {}", lower.dir().display());
    let root = rustix::fs::openat(
        lower.root(),
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        FileMode::empty(),
    )
    .or_fail(message)?;
    rustix::fs::flock(&root, FlockOperation::LockExclusive).or_fail(message)?;
    Ok(root)
}

/// Takes the lock that an agent takes as well: a tree is worked in by one process,
/// whatever its state directory is.
pub(super) fn take_tree_lock(reserved: &Reserved, tree: &Path) -> Result<Lock, Failure> {
    let message = || format!("cannot lock {}", tree.join(".mirrorfs/lock").display());
    let file = rustix::fs::openat(
        reserved.dir(),
        "lock",
        OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        FileMode::RUSR | FileMode::WUSR,
    )
    .or_fail(message)?;
    match Lock::take_file(file.into()).or_fail(message)? {
        Attempt::Taken(lock) => Ok(lock),
        Attempt::Held(pid) => {
            let who = pid.map_or_else(String::new, |pid| format!(", process {pid},"));
            Err(Failure::new(format!(
                "another mirrorfs{who} works in {}",
                tree.display()
            ))
            .hint("it is an agent that serves the directory as somebody's peer, or a mount with another state directory: end that first"))
        }
    }
}

/// Reads a peer's place, and refuses a local one that cannot be a peer of the tree.
pub fn peer_at(text: &str, tree: &Path) -> Result<PeerUrl, Failure> {
    let here = std::env::current_dir().or_fail(|| "there is no working directory".into())?;
    let url = PeerUrl::parse(text)
        .and_then(|url| url.resolved_against(&here))
        .or_fail(|| "cannot use the peer".into())?;
    if let crate::transport::Place::Attached(place) = url.place() {
        return Err(Failure::new(format!("{place} comes by itself"))
            .hint("run mirrorfs attach on that machine, with this tree's place as it sees it"));
    }
    let Some(path) = url.local_path() else {
        return Ok(url);
    };
    let path = place::local_peer(path, tree)?;
    let Some(text) = path.to_str() else {
        return Err(Failure::new(format!(
            "the path of the peer {} is not valid UTF-8",
            path.display()
        ))
        .hint("choose a peer directory with a plain name"));
    };
    PeerUrl::parse(text).or_fail(|| "cannot use the peer".into())
}

/// The tree's identity: its own, else one in the mirror that the peer belongs to, else
/// one in a mirror of its own. With the replica that was met at a peer that is new.
fn identify(
    lower: &Lower,
    state: &StateDir,
    order: &Order,
    peer: Option<&PeerUrl>,
    scratch: Option<&Scratch>,
    say: &mut dyn Announce,
) -> Result<(Reserved, Identity, Option<ReplicaId>), Failure> {
    let reserved = lower.dir().join(".mirrorfs");
    let message = || format!("cannot prepare {}", reserved.display());
    let root = lower.root().as_fd();
    let mut own = Reserved::open(root).or_fail(message)?;
    if own.is_none()
        && is_empty(lower)?
        && let Some(record) = gone::known_at(state, lower.dir())?
    {
        if !order.refill {
            return Err(gone::emptied(&record));
        }
        own = Some(Reserved::create_again(root, record.identity()).or_fail(message)?);
    }
    let met = match peer {
        Some(peer) if !is_known(state, own.as_ref().map(|(_, identity)| identity), peer)? => {
            let mirror = own.as_ref().map(|(_, identity)| identity.mirror);
            let serve = match scratch {
                Some(_) => Serve::Look,
                None => Serve::Agent,
            };
            Some(adopt::meet(peer, mirror, is_empty(lower)?, serve)?)
        }
        _ => None,
    };
    if let (Some(Met::Away(why)), Some(peer)) = (&met, peer) {
        say.announce(Announcement::Warning(away(peer, why)));
        if own.is_none() {
            say.announce(Announcement::Warning(format!(
                "it is not known whether {peer} belongs to a mirror already; if it turns out to, unmount, remove {} and mount again",
                reserved.display()
            )));
        }
    }
    let replica = match &met {
        Some(Met::Mirror(_, replica)) => *replica,
        _ => None,
    };
    if let Some((reserved, identity)) = own {
        return Ok((reserved, identity, replica));
    }
    let mirror = match met {
        Some(Met::Mirror(mirror, _) | Met::Claimed(mirror)) => mirror,
        _ => Id::random().or_fail(|| "there are no random numbers".into())?,
    };
    if let Some(scratch) = scratch {
        let home = scratch.dir("reserved").or_fail(message)?;
        let (reserved, identity) = Reserved::create(home.as_fd(), mirror).or_fail(message)?;
        return Ok((reserved, identity, replica));
    }
    let (reserved, identity) =
        Reserved::create(root, mirror)
            .or_fail(message)
            .map_err(|failure| {
                failure.hint(
                    "this user must be able to write to the directory, and the disk must have room",
                )
            })?;
    Ok((reserved, identity, replica))
}

/// Whether a tree holds nothing but, perhaps, a `.mirrorfs`.
fn is_empty(lower: &Lower) -> Result<bool, Failure> {
    let message = || format!("cannot list {}", lower.dir().display());
    for entry in std::fs::read_dir(lower.dir()).or_fail(message)? {
        if entry.or_fail(message)?.file_name().as_encoded_bytes() != RESERVED {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a peer is configured already, as far as the journal can tell before it is
/// opened.
fn is_known(
    state: &StateDir,
    identity: Option<&Identity>,
    peer: &PeerUrl,
) -> Result<bool, Failure> {
    let Some(identity) = identity else {
        return Ok(false);
    };
    let Some(dir) = state.known(identity.mirror, identity.replica)? else {
        return Ok(false);
    };
    let text = peer.to_string();
    Ok(mirrorfs_journal::look(dir.path())
        .ok()
        .flatten()
        .and_then(|view| view.peers().ok())
        .is_some_and(|peers| peers.iter().any(|peer| peer.url == text)))
}

/// What to write down about the mirror.
fn describe(
    order: &Order,
    dir: &MirrorDir,
    identity: Identity,
    tree: &Path,
) -> Result<Record, Failure> {
    let known = dir.record()?;
    if let Some(known) = &known
        && known.tree != tree
        && locate::identity(&known.tree).is_some_and(|there| there == identity)
    {
        return Err(Failure::new(format!(
            "{} is a copy of the mirror {}: both carry the same identity",
            tree.display(),
            known.tree.display()
        ))
        .hint(format!(
            "to make the copy a mirror of its own, remove {}",
            tree.join(".mirrorfs").display()
        )));
    }
    let name = order
        .name
        .clone()
        .or_else(|| known.as_ref().map(|known| known.name.clone()))
        .or_else(|| {
            tree.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        })
        .unwrap_or_else(|| "mirror".into());
    Ok(Record {
        id: MirrorIdText(identity.mirror),
        replica: identity.replica,
        name,
        tree: tree.to_path_buf(),
        mode: order
            .mode
            .or(known.as_ref().map(|known| known.mode))
            .unwrap_or_default(),
        conflict: order
            .conflict
            .or(known.as_ref().map(|known| known.conflict))
            .unwrap_or_default(),
        symlinks: order
            .symlinks
            .or(known.as_ref().map(|known| known.symlinks))
            .unwrap_or_default(),
        device: None,
    })
}

/// One line about what the scan found, where it is worth one.
fn recovered(start: &Start, report: &RecoveryReport, cleared: bool) -> Option<String> {
    let RecoveryReport {
        scanned,
        created,
        changed,
        removed,
        ..
    } = report;
    if start.fresh {
        return (*scanned > 0).then(|| format!("took in {scanned} existing names"));
    }
    let found = format!(
        "scanned {scanned} names, found {created} new, {changed} changed, {removed} removed"
    );
    if !start.clean || cleared {
        let why = if start.same_boot {
            "the last mount did not end cleanly"
        } else {
            "the machine went down under the last mount"
        };
        Some(format!("{why}: {found}"))
    } else {
        (created + changed + removed > 0)
            .then(|| format!("the tree was changed while it was not mounted: {found}"))
    }
}

/// Looks at a peer that is to be added to a mirror: an error if only a person can put
/// right what is wrong with it. Returns what that person should know, and which replica was
/// met.
pub(super) fn look_at_new(
    url: &PeerUrl,
    mirror: MirrorId,
) -> Result<(Vec<String>, Option<ReplicaId>), Failure> {
    match adopt::meet(url, Some(mirror), false, Serve::Agent)? {
        Met::Away(why) => Ok((vec![away(url, &why)], None)),
        Met::Mirror(_, replica) => Ok((Vec::new(), replica)),
        Met::Free | Met::Claimed(_) => Ok((Vec::new(), None)),
    }
}

fn away(peer: &PeerUrl, why: &str) -> String {
    format!(
        "the peer {peer} cannot be reached ({why}): changes are kept in the journal and sent when it can be"
    )
}

/// The configured peer of that name or place.
pub(super) fn peer_named(journal: &Journal, name: &str) -> Result<Peer, Failure> {
    let peers = journal.snapshot().and_then(|snapshot| snapshot.peers());
    let peers = peers.or_fail(|| "cannot read the peers from the journal".into())?;
    let found = peers
        .into_iter()
        .find(|peer| peer.name == name || peer.url == name);
    found.ok_or_else(|| {
        Failure::new(format!("there is no peer named {name:?}"))
            .hint("mirrorfs peer list lists the peers")
    })
}

/// Refuses to forget a peer as long as its versions of files wait for a decision.
pub(super) fn removable(journal: &Journal, peer: &Peer, force: bool) -> Result<(), Failure> {
    let open = open_with(journal, peer.id)?;
    if open == 0 || force {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{open} conflicts with the peer {} are open",
        peer.name
    ))
    .hint("settle them first (mirrorfs conflicts list), or use --force: the copies of its versions then stay as they are, on this machine only")
    .exit(super::exit::Exit::Conflicts))
}

fn open_with(journal: &Journal, peer: PeerId) -> Result<usize, Failure> {
    let conflicts = journal.snapshot().and_then(|snapshot| snapshot.conflicts());
    let conflicts = conflicts.or_fail(|| "cannot read the conflicts from the journal".into())?;
    Ok(conflicts
        .iter()
        .filter(|conflict| conflict.peer == peer)
        .count())
}

/// Forgets a peer and everything agreed with it. Returns how many conflicts with it were
/// open.
pub(super) fn remove_peer(
    journal: &Journal,
    reserved: &Reserved,
    peer: PeerId,
) -> Result<usize, Failure> {
    let open = open_with(journal, peer)?;
    crate::replicator::forget_peer(journal, reserved, peer)
        .or_fail(|| "cannot remove the peer from the journal".into())?;
    Ok(open)
}

/// The peer that a directory is which attaches itself: the one of that replica, the one
/// of that name or place, or a new one.
pub(super) fn attached(
    site: &Site,
    url: &PeerUrl,
    name: Option<&str>,
    identity: Option<Attached>,
) -> Result<Peer, Failure> {
    let tree = site.tree().display();
    if let Some(identity) = identity {
        let (found, own) = (identity.mirror.0, site.identity.mirror);
        if found != own {
            return Err(Failure::new(format!(
                "the directory belongs to mirror {found}, and {tree} to mirror {own}"
            ))
            .hint("attach another directory, or remove its .mirrorfs if that mirror is gone"));
        }
        if identity.replica.0 == site.identity.replica {
            return Err(Failure::new(format!("the directory is {tree} itself")));
        }
    }
    let replica = identity.map(|identity| identity.replica.0);
    let known = site.peers()?.into_iter().find(|peer| {
        replica.is_some() && peer.replica == replica && name.is_none_or(|name| name == peer.name)
    });
    let id = match known {
        Some(peer) => {
            let (id, text) = (peer.id, url.to_string());
            if peer.url != text {
                site.journal
                    .update(Durability::Full, move |update| {
                        update.set_peer_url(id, &text)
                    })
                    .or_fail(|| format!("cannot change the place of the peer {}", peer.name))?;
            }
            id
        }
        None => add_peer(&site.journal, url, name, replica)?,
    };
    let found = site.peers()?.into_iter().find(|peer| peer.id == id);
    found.ok_or_else(|| Failure::new("the peer was removed meanwhile"))
}

/// Configures a peer unless it is configured already. A peer is known by the `replica` that
/// is there, if that could be told: at another place it is the same, and under its name
/// there is no other.
pub(super) fn add_peer(
    journal: &Journal,
    url: &PeerUrl,
    name: Option<&str>,
    replica: Option<ReplicaId>,
) -> Result<PeerId, Failure> {
    let peers = journal.snapshot().and_then(|snapshot| snapshot.peers());
    let peers = peers.or_fail(|| "cannot read the peers from the journal".into())?;
    let text = url.to_string();
    let same = replica
        .map(|replica| recognised(&peers, url, &text, name, replica))
        .transpose()?
        .flatten();
    let wanted = name.map(str::to_owned);
    let fallback = peer_name(url);
    journal
        .update(Durability::Full, move |update| {
            let peers = update.peers()?;
            if let Some(wanted) = &wanted
                && let Some(peer) = peers.iter().find(|peer| peer.name == *wanted)
            {
                // The same peer at another place: its directory moved, or its address.
                update.set_peer_url(peer.id, &text)?;
                return Ok(peer.id);
            }
            if let Some(peer) = same {
                update.set_peer_url(peer, &text)?;
                return Ok(peer);
            }
            if let Some(peer) = peers.iter().find(|peer| peer.url == text) {
                return Ok(peer.id);
            }
            let taken = |name: &String| peers.iter().any(|peer| peer.name == *name);
            let name = wanted.unwrap_or_else(|| {
                std::iter::once(fallback.clone())
                    .chain((2..).map(|number: u32| format!("{fallback}-{number}")))
                    .find(|name| !taken(name))
                    .unwrap_or(fallback)
            });
            update.add_peer(&name, &text)
        })
        .or_fail(|| format!("cannot add the peer {url}"))
}

/// Which of the peers the directory at `url` is, whose identity is known; none if it is new.
/// An error where it is not what it is called, or not where that peer still is.
fn recognised(
    peers: &[Peer],
    url: &PeerUrl,
    text: &str,
    name: Option<&str>,
    replica: ReplicaId,
) -> Result<Option<PeerId>, Failure> {
    let same = peers.iter().find(|peer| peer.replica == Some(replica));
    let meant = peers.iter().find(|peer| match name {
        Some(name) => peer.name == name,
        None => peer.url == text,
    });
    match (same, meant) {
        (Some(same), Some(meant)) if same.id != meant.id => Err(Failure::new(format!(
            "the directory at {url} is that of the peer {}, and not of {}",
            same.name, meant.name
        ))
        .hint(format!(
            "remove {} first if it is gone: mirrorfs peer remove DIR {}",
            meant.name, meant.name
        ))),
        (Some(same), None) if name.is_some() => {
            Err(Failure::new(format!("{url} is the peer {} already", same.name)).hint(format!(
                "without a name, or with --name {}, it is taken for that peer at another place",
                same.name
            )))
        }
        (Some(same), _) => {
            if let Some(original) = copied_from(same, url, replica) {
                return Err(Failure::new(format!(
                    "{url} is a copy of the peer {} at {}: both carry the same identity",
                    same.name,
                    original.display()
                ))
                .hint("to make the copy a peer of its own, remove its .mirrorfs; to have it in place of the original, move that away, or remove the .mirrorfs there"));
            }
            Ok(Some(same.id))
        }
        (None, Some(meant)) if meant.replica.is_some() => Err(Failure::new(format!(
            "{url} is another directory than the peer {}",
            meant.name
        ))
        .hint(format!(
            "give it another name and place, or remove that peer first: mirrorfs peer remove DIR {}",
            meant.name
        ))),
        _ => Ok(None),
    }
}

/// Where a peer is still that has another place on this machine than `url`. A directory that
/// is reached by two ways is no copy.
fn copied_from(known: &Peer, url: &PeerUrl, replica: ReplicaId) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let known = PeerUrl::parse(&known.url).ok()?;
    let (original, copy) = (known.local_path()?, url.local_path()?);
    let (root, found) = (
        std::fs::File::open(original).ok()?,
        std::fs::metadata(copy).ok()?,
    );
    let there = Reserved::identity_of(root.as_fd()).ok()??;
    let here = root.metadata().ok()?;
    (there.replica == replica && (here.dev(), here.ino()) != (found.dev(), found.ino()))
        .then(|| original.to_path_buf())
}

/// What to call a peer that nobody named: its host, or the last part of its path.
fn peer_name(url: &PeerUrl) -> String {
    match url.place() {
        crate::transport::Place::Ssh(place) => place.host.clone(),
        crate::transport::Place::Attached(place) => place
            .split('/')
            .next()
            .filter(|host| !host.is_empty())
            .unwrap_or("peer")
            .to_owned(),
        crate::transport::Place::Local(path) => path
            .file_name()
            .map_or_else(|| "peer".into(), |name| name.to_string_lossy().into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        (dir, journal)
    }

    fn peers(journal: &Journal) -> Vec<(String, String)> {
        let peers = journal.snapshot().unwrap().peers().unwrap();
        peers
            .into_iter()
            .map(|peer| (peer.name, peer.url))
            .collect()
    }

    #[test]
    fn a_peer_is_added_once_and_gets_a_name_of_its_own() {
        let (_dir, journal) = journal();
        let add = |url: &str, name: Option<&str>| {
            add_peer(&journal, &PeerUrl::parse(url).unwrap(), name, None).unwrap();
        };
        add("/mnt/backup", None);
        add("/mnt/backup", None);
        add("/srv/backup", None);
        add("me@host:web", None);
        let list = peers(&journal);
        let expected = [
            ("backup", "/mnt/backup"),
            ("backup-2", "/srv/backup"),
            ("host", "me@host:web"),
        ];
        assert_eq!(list, expected.map(|(name, url)| (name.into(), url.into())));
        // Under its name, the same peer may be found elsewhere.
        add("me@elsewhere:web", Some("host"));
        assert_eq!(
            peers(&journal)[2],
            ("host".into(), "me@elsewhere:web".into())
        );
    }

    #[test]
    fn an_unclean_stop_is_said_in_one_line() {
        let report = RecoveryReport {
            scanned: 10,
            created: 1,
            changed: 2,
            removed: 3,
            ..RecoveryReport::default()
        };
        let start = |fresh, clean, same_boot| Start {
            epoch: crate::tree::Epoch(1),
            last: 0,
            clean,
            same_boot,
            fresh,
            reason: None,
        };
        let line = recovered(&start(false, false, true), &report, true).unwrap();
        assert!(
            line.contains("did not end cleanly") && !line.contains('\n'),
            "{line}"
        );
        let line = recovered(&start(false, false, false), &report, false).unwrap();
        assert!(line.contains("machine went down"), "{line}");
        let line = recovered(&start(false, true, true), &report, false).unwrap();
        assert!(line.contains("while it was not mounted"), "{line}");
        let quiet = RecoveryReport::default();
        assert_eq!(recovered(&start(false, true, true), &quiet, false), None);
        assert_eq!(recovered(&start(true, false, false), &quiet, false), None);
    }
}
