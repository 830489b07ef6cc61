//! The beginning of a session: who speaks, whether they get along, and what the agent
//! last knew.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use mirrorfs_journal::index::{Durable, PeerIndex, is_copied};
use mirrorfs_journal::{ChainLink, Marked};

use super::lock::Lock;
use super::root::Served;
use super::{Error, applier, index_dir, open_index, renew};
use crate::replica::apply::Answer;
use crate::replica::{Latest, Marks, Moment, Reserved, Staging, Time};
use crate::scratch::Scratch;
use crate::tree::ReplicaId;
use crate::wire::frame::{read_first, read_magic, write_magic, write_message};
use crate::wire::message::{AgentHello, LATE, MountHello, Refusal, Revision, ToAgent, ToMount};
use crate::wire::version::{Introduction, greeted};

/// How many bytes the list of diverged steps may take in a hello.
const DIVERGED_MAX: usize = 512 * 1024;

/// A session that both sides agreed to.
pub(super) struct Opened<I, O> {
    pub(super) input: I,
    pub(super) output: O,
    pub(super) served: Served,
    pub(super) reserved: Reserved,
    pub(super) staging: Staging,
    pub(super) index: PeerIndex,
    pub(super) lock: Lock,
    /// Who is at the other end.
    pub(super) mount: ReplicaId,
    /// Whether both sides know from which agreement on they go on.
    pub(super) settled: bool,
    /// From where on changes are to be reported; none for everything.
    pub(super) seen: Option<Revision>,
    /// Whether the other side wants to hear of late versions.
    pub(super) late: bool,
}

/// Greets, checks, takes the lock, completes what was interrupted, and answers.
pub(super) fn meet<I: Read, O: Write>(
    root: &Path,
    state: &Path,
    scratch: Option<&Scratch>,
    mut input: I,
    mut output: O,
) -> Result<Opened<I, O>, Error> {
    write_magic(&mut output)?;
    read_magic(&mut input)?;
    let first = read_first::<ToAgent>(&mut input)?.ok_or(Error::Disconnected)?;
    let hello = greeted(first)?.map_err(Error::Refused);
    let opened = hello.and_then(|hello| Ok((open(root, state, scratch, &hello)?, hello)));
    match opened {
        Ok(((answer, served, reserved, staging, index, lock), hello)) => {
            let seen = hello.seen.filter(|_| !answer.whole);
            let (settled, mount) = (answer.settled, hello.replica);
            let late = hello.features.iter().any(|name| name == LATE);
            write_message(&mut output, &ToMount::Hello(answer))?;
            Ok(Opened {
                input,
                output,
                served,
                reserved,
                staging,
                index,
                lock,
                mount,
                settled,
                seen,
                late,
            })
        }
        Err(error) => {
            let refusal = match &error {
                Error::Refused(refusal) => refusal.clone(),
                other => Refusal::Failed {
                    reason: other.to_string(),
                },
            };
            write_message(&mut output, &ToMount::Refused { refusal })?;
            Err(error)
        }
    }
}

/// Why a peer that was met before cannot be served, and the two ways on.
pub(super) fn gone(root: &Path, what: &str) -> String {
    format!(
        "{} {what}: nothing is exchanged until it is back (is its disk mounted?); if it is gone \
         for good, mirrorfs resume fills a new one",
        root.display()
    )
}

/// Two trees take turns as one replica.
fn copied(root: &Path, replica: ReplicaId) -> Error {
    let reason = format!(
        "two trees with the same identity (replica {replica}) have {} as their peer, so one of \
         them is a copy: remove .mirrorfs from the one that is to be a mirror of its own, and \
         mount the other one again",
        root.display()
    );
    Error::Refused(Refusal::Root { reason })
}

type Parts = (AgentHello, Served, Reserved, Staging, PeerIndex, Lock);

fn open(
    root: &Path,
    state: &Path,
    scratch: Option<&Scratch>,
    hello: &MountHello,
) -> Result<Parts, Error> {
    // What stands in for a directory that was here before is not taken for it, and not
    // given an identity: the disk below may not be mounted.
    let known = hello.peer.is_some();
    let mut served = match scratch {
        Some(scratch) if !known => Served::open_for_a_look(root, state, scratch)?,
        _ => Served::open(root, state, !known)?,
    };
    let found = served.check_identity(hello.mirror, hello.replica)?;
    if known && found.is_none() {
        return Err(Error::Refused(Refusal::Root {
            reason: gone(root, "is not the directory it was (it has no .mirrorfs)"),
        }));
    }
    // A directory without an identity gets none by being looked at.
    let aside = match scratch {
        Some(scratch) if found.is_none() => {
            let fail = |error| Error::io("create", scratch.path().display(), error);
            served.aside = true;
            Some((scratch.dir("reserved").map_err(fail)?, scratch.path()))
        }
        _ => None,
    };
    let (home, state) = match &aside {
        Some((home, state)) => (home.as_fd(), *state),
        None => (served.root.fd(), state),
    };
    let (reserved, own) = Reserved::create(home, hello.mirror)?;
    // Before whoever is being served is told to give way.
    if is_copied(&index_dir(state, own.replica), hello.replica, hello.life()) {
        return Err(copied(root, hello.replica));
    }
    let lock = Lock::take(&reserved)?;
    // Once more under the lock: two first sessions may have made an identity each.
    let (reserved, identity) = Reserved::create(home, hello.mirror)?;
    let mut index = open_index(&served, state, identity.replica)?;
    if !index.begin_life(hello.replica, hello.life())? {
        return Err(copied(root, hello.replica));
    }
    let staging = Staging::new(&reserved)?;
    if let Some(outcome) = applier(&served, &reserved, &staging, &mut index).recover()? {
        tracing::info!(batch = %outcome.batch, "completed an interrupted batch");
        renew(&mut index, &outcome)?;
    }
    distrust_staged(&reserved, &staging, &mut index)?;
    // The tree says itself which agreement it holds. It and the index differ if one of
    // the two was restored from a copy, or the index was lost.
    let mount = hello.replica;
    compare_times(&reserved, &mut index, mount)?;
    if let Some(seen) = hello.seen
        && seen.epoch == index.epoch()
        && seen.rev > index.rev()
    {
        // A power loss took revisions back that were already reported.
        index.renew_epoch()?;
    }
    let (last, diverged) = last_answer(&index, mount)?;
    let agreement = last.map(|last| last.agreement);
    // Without an agreement in common the other side forgets what it knew of this one, so
    // that news since then would be taken for everything there is.
    let settled = last.is_some_and(|last| last.based)
        && [hello.agreement, hello.proposed].contains(&agreement)
        && !index.rejoins(mount)?;
    let forgotten = index.forgotten()?;
    let whole = !settled
        || hello
            .seen
            .is_none_or(|seen| seen.epoch != index.epoch() || seen.rev < forgotten);
    // Deletions that the other side knows of, or learns of from a report of everything.
    let known = match hello.seen {
        Some(seen) if !whole => seen.rev,
        _ => index.rev(),
    };
    index.forget_tombstones(known)?;
    let Introduction {
        protocol,
        features,
        version,
    } = Introduction::own();
    let answer = AgentHello {
        protocol,
        features,
        version,
        replica: identity.replica,
        mirror: found.map(|identity| identity.mirror),
        agreement,
        diverged,
        epoch: index.epoch(),
        whole,
        settled,
    };
    Ok((answer, served, reserved, staging, index, lock))
}

/// Takes up what the tree itself says it has gone through.
fn compare_times(
    reserved: &Reserved,
    index: &mut PeerIndex,
    mount: ReplicaId,
) -> Result<(), Error> {
    let marks = Marks::of(reserved)?;
    let told = Latest::of(reserved)?;
    let recorded = Moment::decode(index.moment()?);
    let moment = told.as_ref().map(|told| told.moment().clone());
    let time = Latest::time(reserved, told.as_ref(), recorded.as_ref());
    if time != Time::Other {
        let found = index.take_mark(mount, marks.with(mount).as_ref())?;
        if found != Marked::Last {
            tracing::warn!(?found, "the directory is of another time than its index");
            index.renew_epoch()?;
        }
        if moment != recorded {
            let moment = moment.map(|moment| moment.encode());
            index.set_moment(moment.as_deref())?;
        }
        return Ok(());
    }
    tracing::warn!("the directory is of another time than its index");
    index.renew_epoch()?;
    index.transaction(Durable::PowerLoss, |index| {
        let mut mounts = index.mounted()?;
        if !mounts.contains(&mount) {
            mounts.push(mount);
        }
        for mount in mounts {
            let chain = index.chain(mount)?;
            let at = Latest::stands_at(told.as_ref(), mount, &chain, marks.with(mount));
            index.take_mark(mount, at.as_ref())?;
            // Whatever was told of the other tree is to be forgotten over there.
            index.set_rejoins(mount, true)?;
        }
        let moment = moment.map(|moment| moment.encode());
        Ok(index.set_moment(moment.as_deref())?)
    })
}

/// Drops what was staged in another life of the machine. Contents are synced with the batch
/// that needs them, and what had arrived before a power loss may be anything by now, under
/// its name and with its size. Called once no batch is under way any more.
fn distrust_staged(
    reserved: &Reserved,
    staging: &Staging,
    index: &mut PeerIndex,
) -> Result<(), Error> {
    let boot = reserved.boot().map(str::as_bytes);
    if boot.is_some() && index.boot()?.as_deref() == boot {
        return Ok(());
    }
    staging.clean(&|_| false)?;
    if let Some(boot) = boot {
        index.transaction(Durable::Process, |index| index.set_boot(boot))?;
    }
    Ok(())
}

type LastAnswer = (Option<ChainLink>, Vec<crate::wire::message::Divergence>);

/// The last agreement, with what the batch that made it did not carry out. Where that
/// does not fit into a frame there is no agreement: both sides then go back to the one
/// before, which is always right.
fn last_answer(index: &PeerIndex, mount: ReplicaId) -> Result<LastAnswer, Error> {
    let last = index.last_agreement(mount)?;
    let Some(bytes) = index.applied()? else {
        return Ok((last, Vec::new()));
    };
    let Ok(mut answer) = postcard::from_bytes::<Answer>(&bytes) else {
        return Ok((None, Vec::new()));
    };
    if bytes.len() > DIVERGED_MAX {
        for divergence in &mut answer.diverged {
            divergence.reason.clear();
        }
        if answer.diverged.len() * 8 > DIVERGED_MAX {
            return Ok((None, Vec::new()));
        }
    }
    Ok((last, answer.diverged))
}
