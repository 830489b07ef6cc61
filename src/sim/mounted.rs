//! The mounted side: a tree, its journal, and a driver for each peer.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirrorfs_journal::{Durability, Journal};

use super::jobs::{self, Owner};
use crate::fs::{Filesystem, FsOptions, Lower};
use crate::reconcile::Policy;
use crate::replica::{Reserved, Staging};
use crate::replicator::{self, Context, LocalTree, Secured, Stepped};
use crate::transport::ConnectError;
use crate::tree::{MirrorId, PeerId};

/// The mounted side while its daemon lives.
pub(crate) struct Life {
    /// A driver for each peer, in the peers' order, with the number its work goes by.
    pub(crate) drivers: Vec<(Owner, Stepped)>,
    pub(crate) filesystem: Arc<Filesystem>,
    pub(crate) journal: Journal,
    /// Up to where the drivers have been told of changes.
    pub(crate) told: u64,
    reserved: Arc<Reserved>,
    secured: Secured,
}

/// Where the mounted side keeps what outlives its daemon.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) tree: PathBuf,
    pub(crate) state: PathBuf,
}

impl Life {
    /// What the daemon does at its start, with what it needs from a mount left out.
    pub(crate) fn begin(
        place: &Place,
        mirror: MirrorId,
        peers: usize,
        owner: &mut dyn FnMut() -> Owner,
        jitter: &mut dyn FnMut() -> u64,
    ) -> Self {
        fs::create_dir_all(&place.state).unwrap();
        let lower = Lower::open(&place.tree).unwrap();
        let (reserved, identity) = Reserved::create(lower.root().as_fd(), mirror).unwrap();
        let (journal, start) = Journal::open(&place.state).unwrap();
        replicator::check_marks(&journal, &reserved).unwrap();
        let filesystem = Filesystem::new(lower, journal.recorder(), FsOptions::default()).unwrap();
        let artefacts = replicator::artefacts(&journal).unwrap();
        let authors = replicator::interrupted(&journal, &filesystem).unwrap();
        filesystem.recover_knowing(&journal, &authors).unwrap();
        replicator::settle_pulls(&journal, &filesystem, &reserved, start.same_boot).unwrap();
        replicator::renew_artefacts(&journal, artefacts).unwrap();
        let known = journal.snapshot().unwrap().peers().unwrap().len();
        journal
            .update(Durability::Full, move |update| {
                for peer in known..peers {
                    update.add_peer(&format!("peer{peer}"), &format!("/simulated/{peer}"))?;
                }
                Ok(())
            })
            .unwrap();
        let reserved = Arc::new(reserved);
        let staging = Staging::new(&reserved).unwrap();
        staging.clean(&|_| false).unwrap();
        let tree = LocalTree {
            filesystem: Arc::clone(&filesystem),
            door: None,
            reserved: Arc::clone(&reserved),
            staging: Arc::new(staging),
            owner: None,
            symlinks: crate::tree::links::Symlinks::All,
        };
        let configured = journal.snapshot().unwrap().peers().unwrap();
        let drivers = configured.iter().map(|peer| {
            let context = Context {
                mirror,
                replica: identity.replica,
                journal: journal.clone(),
                tree: tree.clone(),
                connect: Arc::new(|| {
                    // Asked for by nobody: the simulation makes the links.
                    Err(ConnectError::Io(std::io::ErrorKind::Unsupported.into()))
                }),
                peer: peer.id,
                policy: Policy::TwoWay,
                name_artefacts: Arc::new((peers > 1).into()),
                dry_run: false,
                merge: false,
                contents: None,
                deadline: crate::wire::message::DEADLINE,
            };
            let owner = owner();
            jobs::owner(owner);
            (owner, Stepped::start(context, jitter()))
        });
        let drivers = drivers.collect();
        Self {
            drivers,
            filesystem,
            told: journal.recorder().last(),
            journal,
            reserved,
            secured: Secured::default(),
        }
    }

    /// Syncs lower and marks it with what was agreed on.
    pub(crate) fn secure(&mut self) {
        let secured = &mut self.secured;
        replicator::secure(&self.journal, &self.filesystem, &self.reserved, secured).unwrap();
    }

    /// The peers that are configured.
    pub(crate) fn peers(&self) -> Vec<PeerId> {
        let peers = self.journal.snapshot().unwrap().peers().unwrap();
        peers.iter().map(|peer| peer.id).collect()
    }
}

/// Copies a state directory as a power loss or a kill leaves it: the database, and its
/// log up to `len` bytes.
pub(crate) fn copy_state(from: &Path, to: &Path, database: &str, len: Option<u64>) {
    fs::create_dir_all(to).unwrap();
    let log = format!("{database}-wal");
    for name in [database, log.as_str()] {
        let Ok(mut content) = fs::read(from.join(name)) else {
            continue;
        };
        if name == log
            && let Some(len) = len
        {
            content.truncate(usize::try_from(len).unwrap());
        }
        fs::write(to.join(name), content).unwrap();
    }
}

/// How long the log of a database is.
pub(crate) fn log_len(dir: &Path, database: &str) -> u64 {
    fs::metadata(dir.join(format!("{database}-wal"))).map_or(0, |found| found.len())
}
