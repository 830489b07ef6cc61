//! The operations that the door may make, as the filesystem knows them beforehand.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use mirrorfs_journal::Origin;
use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::attributes::Attributes;
use super::{Caller, Filesystem, Result};
use crate::tree::{Id, Ino, RESERVED, RelPath, Timestamp, Xattrs};

/// The name of something in `.mirrorfs/staging`: 32 hexadecimal digits that nobody
/// can guess.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct StagedName(String);

impl StagedName {
    /// Checks a name.
    pub fn new(name: &str) -> Option<Self> {
        is_token(name.as_bytes()).then(|| Self(name.to_owned()))
    }

    /// Draws a fresh name.
    pub fn random() -> std::result::Result<Self, getrandom::Error> {
        Ok(Self(Id::random()?.to_string()))
    }

    /// The name in the staging directory.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in the root of the mount under which the door finds it.
    pub fn door_name(&self) -> String {
        format!(".mirrorfs.{}", self.0)
    }
}

/// The answer to the door's greeting: an error that no look-up gives otherwise.
pub const GREETED: Errno = Errno::ALREADY;

fn is_token(name: &[u8]) -> bool {
    name.len() == 32
        && name
            .iter()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte))
}

/// The token of a name in the root that stands for something staged.
pub(super) fn placed_token(name: &[u8]) -> Option<&[u8]> {
    name.strip_prefix(RESERVED)?
        .strip_prefix(b".")
        .filter(|token| is_token(token))
}

/// Whether a name in the root is ours.
pub(super) fn is_reserved(name: &[u8]) -> bool {
    name == RESERVED || placed_token(name).is_some()
}

/// What an operation expects at its path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Expect {
    /// Nothing.
    Absent,
    /// This node, with neither content nor attributes changed since.
    Node {
        /// The node.
        ino: Ino,
        /// The last change that the decision took into account.
        unchanged_since: u64,
    },
}

/// A change of a peer that is to be made in the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DoorOp {
    /// Moves something staged to its place. What it replaces goes to the trash.
    Place {
        /// Its name in the staging directory.
        staged: StagedName,
        /// Where it goes.
        path: RelPath,
        /// What is there.
        expect: Expect,
        /// Whether both sides had agreed on what is there.
        agreed: bool,
    },
    /// Removes anything but a directory. It goes to the trash.
    Remove {
        /// What.
        path: RelPath,
        /// What is there.
        expect: Expect,
        /// Whether both sides had agreed on what is there.
        agreed: bool,
    },
    /// Removes an empty directory.
    RemoveDir {
        /// Which.
        path: RelPath,
        /// What is there.
        expect: Expect,
    },
    /// Sets metadata.
    SetMeta {
        /// Of what.
        path: RelPath,
        /// What is there.
        expect: Expect,
        /// Permission bits, unless they stay.
        mode: Option<u32>,
        /// Modification time, unless it stays.
        mtime: Option<Timestamp>,
        /// All `user.` attributes, unless they stay.
        xattrs: Option<Xattrs>,
    },
}

impl DoorOp {
    /// The path it is about.
    pub fn path(&self) -> &RelPath {
        match self {
            Self::Place { path, .. }
            | Self::Remove { path, .. }
            | Self::RemoveDir { path, .. }
            | Self::SetMeta { path, .. } => path,
        }
    }

    /// Whether both sides had agreed on what it displaces.
    pub fn agreed(&self) -> bool {
        match self {
            Self::Place { agreed, .. } | Self::Remove { agreed, .. } => *agreed,
            Self::RemoveDir { .. } | Self::SetMeta { .. } => false,
        }
    }

    /// What it expects there.
    pub fn expect(&self) -> &Expect {
        match self {
            Self::Place { expect, .. }
            | Self::Remove { expect, .. }
            | Self::RemoveDir { expect, .. }
            | Self::SetMeta { expect, .. } => expect,
        }
    }
}

/// What became of an operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DoorResult {
    /// It took effect.
    Done {
        /// The number of its last record.
        n: u64,
        /// The node it was about.
        ino: Ino,
    },
    /// It did not.
    Refused {
        /// Why, for the user.
        reason: String,
    },
}

#[derive(Debug)]
struct Registered {
    op: DoorOp,
    origin: Origin,
    /// Moves on with the operation's own records.
    expect: Expect,
    result: Option<DoorResult>,
}

/// The registered operations.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// The door's thread id as requests carry it; 0 while there is none.
    door: AtomicU32,
    greeting: Mutex<Option<StagedName>>,
    next: AtomicU64,
    count: AtomicUsize,
    registered: Mutex<HashMap<u64, Registered>>,
}

/// A registered operation that a request turned out to belong to.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) id: u64,
    pub(super) origin: Origin,
    pub(super) expect: Expect,
    pub(super) path: RelPath,
    /// Whether both sides had agreed on what is displaced.
    pub(super) agreed: bool,
}

/// Keeps an operation registered until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    id: u64,
    registry: Arc<Registry>,
}

impl Ticket {
    /// What became of the operation, once its system call was answered.
    pub fn result(&self) -> Option<DoorResult> {
        self.registry
            .registered
            .lock()
            .get(&self.id)?
            .result
            .clone()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.registry.registered.lock().remove(&self.id).is_some() {
            self.registry.count.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Registry {
    fn find(&self, matches: impl Fn(&DoorOp) -> bool) -> Option<Claim> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.registered
            .lock()
            .iter()
            .find(|(_, registered)| matches(&registered.op))
            .map(|(id, registered)| Claim {
                id: *id,
                origin: registered.origin,
                expect: registered.expect,
                path: registered.op.path().clone(),
                agreed: registered.op.agreed(),
            })
    }

    pub(super) fn is_placing(&self, token: &[u8]) -> bool {
        self.placing(token).is_some()
    }

    pub(super) fn placing(&self, token: &[u8]) -> Option<Claim> {
        self.find(
            |op| matches!(op, DoorOp::Place { staged, .. } if staged.as_str().as_bytes() == token),
        )
    }

    /// Whether a look-up is the door's greeting. Nobody else was told the name, so the
    /// caller is the door.
    pub(super) fn greeted(&self, caller: &Caller, token: &[u8]) -> bool {
        let mut greeting = self.greeting.lock();
        let expected = greeting
            .as_ref()
            .is_some_and(|expected| expected.as_str().as_bytes() == token);
        if !expected || caller.pid == 0 {
            return false;
        }
        self.door.store(caller.pid, Ordering::Release);
        *greeting = None;
        true
    }

    /// Takes a number for the door's where there is no door process.
    pub(super) fn be(&self, pid: u32) {
        self.door.store(pid, Ordering::Release);
    }

    fn is_door(&self, caller: &Caller) -> bool {
        caller.pid != 0 && caller.pid == self.door.load(Ordering::Acquire)
    }

    fn finish(&self, id: u64, result: DoorResult) {
        if let Some(registered) = self.registered.lock().get_mut(&id) {
            if let (
                DoorResult::Done { n, .. },
                Expect::Node {
                    unchanged_since, ..
                },
            ) = (&result, &mut registered.expect)
            {
                *unchanged_since = *n;
            }
            registered.result = Some(result);
        }
    }
}

impl Filesystem {
    /// Draws the name by which the door makes itself known: it looks
    /// [`StagedName::door_name`] up in the root, and is answered [`GREETED`]. From then
    /// on requests with the same thread id are its own, whatever number it has in its
    /// own namespace. It must be a child that is not waited for before
    /// [`Filesystem::door_gone`], so that nobody else can have its number.
    pub fn expect_door(&self) -> std::result::Result<StagedName, getrandom::Error> {
        let name = StagedName::random()?;
        self.door_gone();
        *self.door.greeting.lock() = Some(name.clone());
        Ok(name)
    }

    /// Forgets the door's number.
    pub fn door_gone(&self) {
        *self.door.greeting.lock() = None;
        self.door.door.store(0, Ordering::Release);
    }

    /// Announces an operation of the door.
    pub fn register(&self, op: DoorOp, origin: Origin) -> Ticket {
        let id = self.door.next.fetch_add(1, Ordering::AcqRel);
        let expect = *op.expect();
        self.door.registered.lock().insert(
            id,
            Registered {
                op,
                origin,
                expect,
                result: None,
            },
        );
        self.door.count.fetch_add(1, Ordering::AcqRel);
        Ticket {
            id,
            registry: self.door.clone(),
        }
    }

    /// Whether what an operation expects has changed since it was decided on, as far as that
    /// is known without a look. The handlers find out the rest.
    pub fn is_overtaken(&self, op: &DoorOp) -> bool {
        match op.expect() {
            Expect::Absent => false,
            Expect::Node {
                ino,
                unchanged_since,
            } => self.last_change(*ino) > *unchanged_since,
        }
    }

    /// What became of an operation whose calls all succeeded. If there was nothing
    /// left to do, no request told, and the expectation is checked here.
    pub fn settle(&self, ticket: &Ticket) -> DoorResult {
        if let Some(result) = ticket.result() {
            return result;
        }
        let Some(claim) = self.door.find_id(ticket.id) else {
            return DoorResult::Refused {
                reason: "the operation is not registered any more".into(),
            };
        };
        let _namespace = self.namespace.write();
        let found = match self.pin_path(&claim.path) {
            Ok(node) => {
                let found = self.stat(&node);
                self.close(self.table.unpin(node.ino));
                found
            }
            Err(error) => Err(error),
        };
        let found = match found {
            Ok(found) => Some(found),
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(error) => {
                return DoorResult::Refused {
                    reason: std::io::Error::from(error).to_string(),
                };
            }
        };
        match (self.expect(&claim, found.as_ref()), found) {
            (Ok(()), Some(found)) => DoorResult::Done {
                n: self.recorder.last(),
                ino: found.ino,
            },
            (Ok(()), None) => DoorResult::Refused {
                reason: "there is nothing at its path".into(),
            },
            (Err(_), _) => ticket.result().unwrap_or(DoorResult::Refused {
                reason: "the tree changed meanwhile".into(),
            }),
        }
    }

    /// The registered SetMeta that a request on a node belongs to, its expectation
    /// checked. To be called with the node's lock held. The door does nothing but what is
    /// registered: where the node has another path by now, it is not done.
    pub(super) fn claim_meta(&self, caller: &Caller, ino: Ino) -> Result<Option<Claim>> {
        if !self.door.is_door(caller) {
            return Ok(None);
        }
        let paths = self.table.paths(ino);
        let claim = self
            .door
            .find(|op| matches!(op, DoorOp::SetMeta { path, .. } if paths.contains(path)));
        if let Some(claim) = &claim {
            let node = self.node(ino)?;
            let found = self.stat(&node)?;
            self.expect(claim, Some(&found))?;
        }
        claim.map(Some).ok_or(Errno::STALE)
    }

    /// The registered removal that a request belongs to. As with [`Self::claim_meta`], the
    /// door removes nothing else: its directory may have been moved meanwhile.
    pub(super) fn claim_removal(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        directory: bool,
    ) -> Result<Option<Claim>> {
        if !self.door.is_door(caller) {
            return Ok(None);
        }
        let removed = self.child_path(parent, name).ok_or(Errno::STALE)?;
        let claim = self.door.find(|op| match op {
            DoorOp::Remove { path, .. } => !directory && *path == removed,
            DoorOp::RemoveDir { path, .. } => directory && *path == removed,
            _ => false,
        });
        claim.map(Some).ok_or(Errno::STALE)
    }

    /// Checks what is at an operation's path, under the lock that keeps it there.
    pub(super) fn expect(&self, claim: &Claim, found: Option<&Attributes>) -> Result<()> {
        let reason = match (&claim.expect, found) {
            (Expect::Absent, None) => return Ok(()),
            (Expect::Absent, Some(_)) => "something was made there meanwhile",
            (Expect::Node { .. }, None) => "it was removed or moved meanwhile",
            (
                Expect::Node {
                    ino,
                    unchanged_since,
                },
                Some(found),
            ) => {
                if found.ino != *ino {
                    "another file was put there meanwhile"
                } else if self.last_change(*ino) > *unchanged_since {
                    "it was changed meanwhile"
                } else {
                    return Ok(());
                }
            }
        };
        self.refuse(claim, reason);
        Err(Errno::STALE)
    }

    pub(super) fn refuse(&self, claim: &Claim, reason: &str) {
        self.door.finish(
            claim.id,
            DoorResult::Refused {
                reason: reason.to_owned(),
            },
        );
    }

    pub(super) fn claim_done(&self, claim: Option<&Claim>, ino: Ino, n: u64) {
        if let Some(claim) = claim {
            self.door.finish(claim.id, DoorResult::Done { n, ino });
        }
    }
}

impl Registry {
    fn find_id(&self, id: u64) -> Option<Claim> {
        let registered = self.registered.lock();
        let registered = registered.get(&id)?;
        Some(Claim {
            id,
            origin: registered.origin,
            expect: registered.expect,
            path: registered.op.path().clone(),
            agreed: registered.op.agreed(),
        })
    }
}
