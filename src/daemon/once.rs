//! One round of replication without a mount: scan, exchange, done.

use std::time::{Duration, Instant};

use mirrorfs_journal::Durability;

use super::announce::{Announce, Announcement};
use super::control::Flushed;
use super::exit::Exit;
use super::failure::{Failure, OrFail};
use super::late::LateComers;
use super::peers::Peers;
use super::service;
use super::site::{Order, Site, local_tree};
use super::state::Mode;
use super::trash;
use crate::replicator::Resume;
use crate::tree::Timestamp;

/// How often a dry run looks whether its plan is ready.
const LOOK: Duration = Duration::from_millis(5);

/// How a round is to be done.
#[derive(Clone, Debug)]
pub struct Round {
    /// Which changes travel; the mirror's mode if none.
    pub mode: Option<Mode>,
    /// How long it may take.
    pub timeout: Duration,
    /// Only tell what would be done.
    pub dry_run: bool,
    /// Compare everything anew, whatever is recorded.
    pub force: bool,
    /// What is meant where a brake holds something back.
    pub resume: Option<Resume>,
}

/// What a round did, or would do.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The lines of a dry run.
    pub plan: Vec<String>,
    /// What was reached; none in a dry run.
    pub flushed: Option<Flushed>,
    /// The exit code.
    pub exit: Exit,
}

/// Takes the tree, exchanges one round with its peers (or the one that is ordered), and
/// leaves it.
pub fn run(order: &Order, round: &Round, say: &mut dyn Announce) -> Result<Report, Failure> {
    let mut site = Site::open(order, say, |_| Ok(()))?;
    if let Some(mode) = round.mode {
        // For this round only: what is on record stays.
        site.record.mode = mode;
    }
    if site.peers()?.is_empty() {
        return Err(
            Failure::new(format!("{} has no peer", site.tree().display()))
                .hint("name one: mirrorfs sync DIR PEER"),
        );
    }
    if round.force {
        forget(&site)?;
    }
    if !round.dry_run {
        trash::of(&site.reserved)?
            .expire(Timestamp::now())
            .or_fail(|| "cannot remove from the trash what is too old".into())?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .or_fail(|| "cannot start the runtime".into())?;
    let exchanged = runtime.block_on(exchange(&site, round));
    runtime.shutdown_timeout(Duration::from_secs(5));
    let secured = if round.dry_run { Ok(()) } else { site.secure() };
    let closed = match &secured {
        Ok(()) => site
            .journal
            .close()
            .or_fail(|| "the journal could not be closed: the next start scans the tree".into()),
        // Left as after a crash: lower need not be on disk.
        Err(_) => Ok(()),
    };
    let report = exchanged?;
    secured?;
    closed?;
    if round.dry_run && report.plan.is_empty() && report.exit == Exit::Done {
        say.announce(Announcement::Note("there is nothing to do".into()));
    }
    Ok(report)
}

/// Has everything compared anew: what is agreed on stays, and what the peers said is
/// asked for again.
fn forget(site: &Site) -> Result<(), Failure> {
    let only = site.ordered;
    site.journal
        .update(Durability::Full, move |update| {
            for peer in update.peers()? {
                if only.is_none_or(|only| only == peer.id) {
                    update.set_cursor(peer.id, 0)?;
                    update.forget_seen(peer.id)?;
                }
            }
            Ok(())
        })
        .or_fail(|| "cannot reset the peers in the journal".into())
}

async fn exchange(site: &Site, round: &Round) -> Result<Report, Failure> {
    let tree = local_tree(site, None)?;
    if !round.dry_run {
        // Left by a daemon that was killed.
        LateComers::new(tree.clone(), site.journal.clone()).bring_in()?;
    }
    let peers = Peers::start_some(site, &tree, site.ordered, round.dry_run)?;
    if let Some(resume) = round.resume {
        let (_, wiped) = peers.resume(None, resume);
        if resume == Resume::Refill
            && let Err(failure) = trash::bring_back(&tree, &wiped)
        {
            peers.stop().await;
            return Err(failure);
        }
    }
    let report = if round.dry_run {
        preview(&peers, round.timeout).await
    } else {
        let n = site.journal.recorder().last();
        let outcomes = peers.flush(None, n, round.timeout).await;
        service::outcome(site, n, &peers.statuses(), outcomes).map(|flushed| Report {
            exit: flushed.exit(),
            flushed: Some(flushed),
            plan: Vec::new(),
        })
    };
    peers.stop().await;
    report
}

/// Waits until every peer has told its plan, or cannot.
async fn preview(peers: &Peers, patience: Duration) -> Result<Report, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let told = peers.statuses();
        let late = Instant::now() >= deadline;
        if !late && told.iter().any(|told| told.undecided()) {
            // The plan comes from another thread, which tells nobody that it is done.
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let several = told.len() > 1;
        let mut report = Report::default();
        for told in &told {
            match told.plan() {
                Ok(lines) if several => report
                    .plan
                    .extend(lines.map(|line| format!("{}: {line}", told.name()))),
                Ok(lines) => report.plan.extend(lines),
                Err(outcome) => report.exit = report.exit.and(outcome.exit()),
            }
        }
        return Ok(report);
    }
}
