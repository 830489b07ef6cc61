//! Putting a mirror's status together from its journal.

use std::collections::HashSet;

use mirrorfs_journal::{Error, View};

use super::failure::{Failure, OrFail};
use super::state::{MirrorDir, Record};
use super::status::{
    Conflict, HeldBack, Journal, Mirror, Mount, MountState, Peer, PeerState, Problem, Status,
};
use crate::replicator::late::At;
use crate::tree::{Kind, NodeId, PeerId, RelPath};

/// The identity part of a status.
pub fn mirror(record: &Record) -> Mirror {
    Mirror {
        id: record.id.0.to_string(),
        name: record.name.clone(),
        tree: record.tree.display().to_string(),
        mode: record.mode,
    }
}

/// The conflicts that are open.
pub fn conflicts(view: &View) -> Result<Vec<Conflict>, Error> {
    let mut conflicts: Vec<_> = view
        .conflicts()?
        .into_iter()
        .map(|conflict| Conflict {
            path: conflict.path.to_string(),
            copy: conflict.copy.map(|copy| copy.to_string()),
        })
        .collect();
    conflicts.extend(
        crate::replicator::late(view)?
            .into_iter()
            .map(|late| Conflict {
                path: late.path.to_string(),
                copy: match late.at {
                    At::Tree(at) => Some(at.to_string()),
                    At::Kept(_) => None,
                },
            }),
    );
    conflicts.sort_by(|a, b| (&a.path, &a.copy).cmp(&(&b.path, &b.copy)));
    Ok(conflicts)
}

/// What a peer lacks durably: how many nodes, and how many bytes their contents have.
pub fn pending(view: &View, peer: PeerId, since: u64) -> Result<(u64, u64), Error> {
    let (mut changes, mut bytes) = (0, 0);
    for id in view.touched(since)? {
        match view.node(id)? {
            // Neither conflict copies nor special files travel.
            Some(node) if node.artefact || node.attr.kind == Kind::Special => {}
            Some(node) => {
                changes += 1;
                if node.attr.kind == Kind::File && node.content_n > since {
                    bytes += node.attr.size;
                }
            }
            // Gone. If the peer never had it, there is nothing to tell.
            None if view.base_of(peer, id)?.is_empty() => {}
            None => changes += 1,
        }
    }
    Ok((changes, bytes))
}

/// Keeps track of the special files of a tree, which stay local, without walking the
/// tree each time it is asked.
#[derive(Debug, Default)]
pub struct Specials {
    known: HashSet<NodeId>,
    upto: Option<u64>,
}

impl Specials {
    /// The paths that are held back in the tree as `view` shows it.
    pub fn held_back(&mut self, view: &View) -> Result<Vec<HeldBack>, Error> {
        match self.upto {
            None => view.walk(|_, node| {
                if node.attr.kind == Kind::Special {
                    self.known.insert(node.id);
                }
                Ok(())
            })?,
            Some(upto) => {
                for id in view.touched(upto)? {
                    match view.node(id)? {
                        Some(node) if node.attr.kind == Kind::Special => self.known.insert(id),
                        _ => self.known.remove(&id),
                    };
                }
            }
        }
        self.upto = Some(view.n());
        let mut paths = Vec::new();
        for id in &self.known {
            paths.extend(view.paths(*id)?);
        }
        paths.sort();
        let held_back = paths.into_iter().map(|path| HeldBack {
            path: path.to_string(),
            rule: "sockets, FIFOs and devices stay local".into(),
        });
        Ok(held_back.collect())
    }
}

/// Problems, by path, each said once.
pub fn problems(all: impl IntoIterator<Item = (RelPath, String)>) -> Vec<Problem> {
    let mut all: Vec<_> = all.into_iter().collect();
    all.sort();
    all.dedup();
    all.into_iter()
        .map(|(path, error)| Problem {
            path: path.to_string(),
            error,
        })
        .collect()
}

/// The status of a mirror that is not mounted, from its journal.
pub fn unmounted(dir: &MirrorDir, record: &Record) -> Result<Status, Failure> {
    let reason = if super::mounts::is_dead(&record.tree) {
        Some("the daemon died: mount again, which recovers".into())
    } else if !record.tree.is_dir() {
        Some(format!("the tree {} is missing", record.tree.display()))
    } else {
        None
    };
    let mut status = Status {
        mirror: mirror(record),
        mount: Mount {
            state: MountState::Unmounted,
            reason,
            channel: None,
        },
        journal: Journal::default(),
        peers: Vec::new(),
        conflicts: Vec::new(),
        held_back: Vec::new(),
        problems: Vec::new(),
    };
    let message = || format!("cannot read the journal in {}", dir.path().display());
    let Some(view) = mirrorfs_journal::look(dir.path()).or_fail(message)? else {
        return Ok(status);
    };
    fill(&mut status, &view).or_fail(message)?;
    if let Some(reason) = super::gone::told(dir, record) {
        for peer in &mut status.peers {
            peer.state = PeerState::Halted;
            peer.halt_reason.get_or_insert_with(|| reason.clone());
        }
    }
    Ok(status)
}

fn fill(status: &mut Status, view: &View) -> Result<(), Error> {
    status.conflicts = conflicts(view)?;
    status.held_back = Specials::default().held_back(view)?;
    for peer in view.peers()? {
        let (pending_changes, pending_bytes) = pending(view, peer.id, peer.durable)?;
        let halt_reason = crate::replicator::braked(view, &peer)?;
        status.peers.push(Peer {
            name: peer.name,
            url: peer.url,
            state: match halt_reason {
                Some(_) => PeerState::Halted,
                None => PeerState::Paused,
            },
            transport: None,
            transport_reason: None,
            version: None,
            scanned_because: None,
            applied_seq: peer.cursor,
            durable_seq: peer.durable,
            pending_changes,
            pending_bytes,
            last_error: None,
            halt_reason,
        });
    }
    status.journal = journal(view, view.n(), &status.peers)?;
    Ok(())
}

/// The journal's part of a status: what some peer still lacks.
pub fn journal(view: &View, seq: u64, peers: &[Peer]) -> Result<Journal, Error> {
    let most = |of: fn(&Peer) -> u64| peers.iter().map(of).max().unwrap_or(0);
    Ok(Journal {
        reason: super::lost::told(view)?,
        seq,
        pending_changes: most(|peer| peer.pending_changes),
        pending_bytes: most(|peer| peer.pending_bytes),
    })
}
