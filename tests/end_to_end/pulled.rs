//! "After a crash the redo record decides by a look at lower what the helper's last call
//! did": a peer's change that was brought in and not yet agreed on is no edit of this side,
//! whoever dies in between, and at whichever call.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::compare::read;
use crate::support::inject::{Fault, Injector, Kind, Plan, RoleOf};
use crate::support::program::run;
use crate::support::{PROMPT, Random, Role, Sandbox, assert_same, rounds, wait_until};

/// What there is on both sides before.
const BEFORE: &str = "
    put kept kept; put gone gone; put mode mode; put kind kind
    mkdir old shape; put old/file old; put shape/file shape
";

/// What the peer's user does at first: something of each kind of step.
const FIRST: &str = "
    put made 'made by the peer'
    put kept 'replaced by the peer'
    rm gone
    chmod 600 mode
    mkdir -p new/deep; put new/deep/file 'in a new directory'
    mkdir closed; put closed/file 'where nobody may write'; chmod 500 closed
    rm -r old
    rm kind; mkdir kind; put kind/file 'was a file'
    rm -r shape; put shape 'was a directory'
";

/// What he does next: whatever would turn an edit that nobody made into a conflict, or
/// bring back what he has removed.
const NEXT: &str = "
    rm made
    put kept 'replaced again'
    put gone 'back again'
    chmod 640 mode
    rm -r new
    chmod 700 closed; rm -r closed
    mkdir old; put old/file 'another one'
    put kind/file 'and edited'
    rm shape
";

/// A tree of its own, in which nobody works: all changes are the peer's.
struct Session {
    sandbox: Sandbox,
    injector: Injector,
}

impl Session {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let injector = Injector::new(sandbox.root());
        let session = Self { sandbox, injector };
        session.peer(BEFORE);
        let mut mount = session.sandbox.command(session.sandbox.program());
        mount
            .arg("mount")
            .args([session.sandbox.tree(), session.sandbox.peer()]);
        session.injector.attach(&mut mount);
        run(&mut mount, PROMPT).ok();
        session.sandbox.flush();
        session
    }

    /// The peer's user at work. Files come into being by a rename.
    fn peer(&self, script: &str) {
        let draft = self.sandbox.outside().join("draft");
        let draft = draft.display();
        let put = format!("put() {{ printf %s \"$2\" > {draft}; mv {draft} \"$1\"; }}\n");
        self.sandbox.sh(&self.sandbox.peer(), &(put + script));
    }

    /// Brings the first changes in and counts the calls that this takes.
    fn count(&self) -> BTreeMap<Kind, u64> {
        let before = self.injector.counts();
        self.peer(FIRST);
        self.sandbox.flush();
        let mut counts = self.injector.counts();
        for (kind, count) in &mut counts {
            *count -= before.get(kind).copied().unwrap_or(0);
        }
        counts
    }

    /// Brings them in, with somebody killed on the way, or not if the call does not come
    /// this time. Then the peer's user goes on, and so does the mirror. Gives what was hit.
    fn interrupt(&self, plan: Plan) -> Option<String> {
        self.injector.plan(plan);
        self.peer(FIRST);
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| self.sandbox.try_flush());
            wait_until("a kill, or the end", Duration::from_secs(200), || {
                self.injector.hit().is_some() || flush.is_finished()
            });
            if self.injector.hit().is_some() && plan.kind.role == RoleOf::Daemon {
                wait_until("the daemon is gone", PROMPT, || {
                    self.sandbox.processes_of(Role::Daemon).is_empty()
                });
            }
            // While the flush goes on, if it does.
            self.peer(NEXT);
            let flushed = flush.join().unwrap();
            assert!(
                self.injector.hit().is_some() || flushed.code == 0,
                "{flushed}"
            );
        });
        self.injector.stop();
        let hit = self.injector.hit();
        let (tree, peer) = (self.sandbox.tree(), self.sandbox.peer());
        let left = read(&peer);
        if self.sandbox.processes_of(Role::Daemon).is_empty() {
            self.sandbox.mount();
        }
        self.sandbox.flush();
        let status = self.sandbox.status();
        assert!(status.conflicts.is_empty(), "{status:?}");
        assert!(status.problems.is_empty(), "{status:?}");
        assert_same(&tree, &peer);
        // Nothing came to the peer, because nobody has made anything here.
        assert_eq!(left, read(&peer), "right is what this side made of it");
        self.sandbox.umount();
        hit
    }
}

/// Every call under `--long`; in every run so many of them, spread over all that there are,
/// others each time. `MIRRORFS_TEST_FAULT` repeats what a failure names.
#[test]
fn whoever_is_killed_while_a_peers_change_comes_in_no_edit_is_made_of_it() {
    let session = Session::new();
    let counts = session.count();
    session.sandbox.umount();
    let mut plans = Vec::new();
    for (kind, count) in counts {
        if kind.role == RoleOf::Command {
            continue;
        }
        eprintln!("{count:6} {kind}");
        plans.extend((1..=count).map(|n| {
            let fault = Fault::Kill;
            (format!("{kind} {n}"), Plan { kind, n, fault })
        }));
    }
    let total = plans.len();
    if let Ok(wanted) = std::env::var("MIRRORFS_TEST_FAULT") {
        plans.retain(|(name, _)| *name == wanted);
        assert!(!plans.is_empty(), "no such call: {wanted}");
    } else {
        let wanted = rounds(12, u32::MAX) as usize;
        let stride = total.div_ceil(wanted);
        let first = Random::new("whoever is killed").below(stride as u64);
        let first = usize::try_from(first).unwrap();
        plans = plans.into_iter().skip(first).step_by(stride).collect();
    }
    let next = AtomicUsize::new(0);
    let (hits, failed) = (Mutex::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        // A session waits more than it works.
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((name, plan)) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let session = AssertUnwindSafe(Session::new);
                    match catch_unwind(|| session().interrupt(*plan)) {
                        Ok(hit) => *hits.lock().unwrap() += u32::from(hit.is_some()),
                        Err(_) => {
                            eprintln!("FAILED: {name}");
                            failed.lock().unwrap().push(name.clone());
                        }
                    }
                }
            });
        }
    });
    let hits = hits.into_inner().unwrap();
    eprintln!("{hits} of {} tried, {total} in all", plans.len());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
    assert!(hits > 0, "nobody was killed");
}
