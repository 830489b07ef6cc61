//! `mirrorfs sync`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::status::{reach, unexpected};
use super::{Terminal, complain, duration, print, render};
use crate::daemon::attach::{self, AttachDir, AttachState};
use crate::daemon::control::{Client, Flushed, Request, Response};
use crate::daemon::once::{self, Round};
use crate::daemon::site::Order;
use crate::daemon::state::{MirrorDir, Mode, Record, StateDir};
use crate::daemon::status::Status;
use crate::daemon::{Exit, Failure, OrFail, locate};
use crate::transport::PeerUrl;
use crate::tree::links::Symlinks;

/// How long a directory that is not attached just now may take to be attached again, and
/// how often that is looked at.
const ATTACHING: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(20);

/// Exchange all changes with the peers
///
/// On a mount, or in a directory that is attached to one elsewhere, waits until everything
/// that is known on both sides has been exchanged.
/// Without one, exchanges one round by scanning the directory. Exit code 0 means that the
/// peers durably hold everything.
#[derive(Args, Debug)]
pub(super) struct Sync {
    /// Synchronise this directory; by default the mirror of the working directory
    dir: Option<PathBuf>,
    /// Exchange with this peer only: its name, or its place if DIR is not mounted
    peer: Option<String>,
    /// The same, by the peer's name
    #[arg(long = "peer", value_name = "NAME", conflicts_with = "peer")]
    only: Option<String>,
    /// Have everything that was changed before the call durable on the peers
    #[arg(long)]
    flush: bool,
    /// Give up after this time
    #[arg(long, value_parser = duration::parse, default_value = "60s")]
    timeout: Duration,
    /// Print what would be done, and do nothing (without a mount)
    #[arg(long)]
    dry_run: bool,
    /// Send changes and take none in (without a mount)
    #[arg(long, conflicts_with = "pull_only")]
    push_only: bool,
    /// Take changes in and send none (without a mount)
    #[arg(long)]
    pull_only: bool,
    /// Choose which symbolic links of the peers are taken in: all, or those that stay in the
    /// tree; remembered (without a mount)
    #[arg(long, value_enum)]
    symlinks: Option<Symlinks>,
    /// Compare everything anew, whatever is recorded (without a mount)
    #[arg(long)]
    force: bool,
    /// Say more about what is done
    #[arg(long, short)]
    pub(super) verbose: bool,
}

impl Sync {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let dir = self.dir.clone().unwrap_or_else(|| PathBuf::from("."));
        let found = locate::find(&state, &dir)?;
        if found.is_none()
            && self.peer.is_none()
            && let Some((place, record)) = attach::find(&state, &dir)?
        {
            return self.attached(&place, &record);
        }
        let found = match found {
            None if self.peer.is_none() => Some(locate::require(&state, &dir)?),
            found => found,
        };
        if let Some((mirror, record)) = &found
            && let Some(daemon) = reach(mirror, record)?
        {
            return self.mounted(daemon, mirror, record);
        }
        if let Some((_, record)) = &found
            && self.flush
            && self.peer.is_none()
        {
            let tree = record.tree.display();
            return Err(Failure::new(format!(
                "{tree} is not mounted: there is nothing to flush"
            ))
            .hint(format!(
                "mirrorfs mount {tree} first; mirrorfs sync {tree}, without --flush, exchanges a round without a mount"
            )));
        }
        // From anywhere inside a mirror, the mirror is meant.
        let tree = match &found {
            Some((_, record)) if self.peer.is_none() => record.tree.clone(),
            _ => dir,
        };
        let peer = match (&found, &self.only) {
            (Some((mirror, record)), Some(name)) => Some(place_of(mirror, record, name)?),
            _ => self.peer.clone(),
        };
        self.unmounted(tree, peer)
    }

    /// The directory is a peer of a mount elsewhere: the daemon there is asked, for this
    /// peer only.
    fn attached(&self, place: &AttachDir, record: &attach::Record) -> Result<Exit, Failure> {
        let (dir, to) = (&record.dir, &record.to);
        let away = |why: Option<String>| Failure {
            causes: why.into_iter().collect(),
            ..Failure::new(format!("{dir} is not attached to {to} now")).exit(Exit::Unreachable)
        };
        let Some(mut process) = Client::connect(place.path())? else {
            return Err(away(None).hint(format!("mirrorfs attach {to} {dir}")));
        };
        let url = PeerUrl::parse(to).or_fail(|| "cannot use the mount".into())?;
        let deadline = Instant::now() + self.timeout.min(ATTACHING);
        loop {
            let name = Self::attaching(&mut process, deadline)?.map_err(away)?;
            let (mut daemon, _link) = attach::call(&url)?;
            let request = Request::Flush {
                peer: Some(name),
                timeout_ms: duration::millis(self.timeout),
            };
            match daemon.call(request, Some(patience(self.timeout)))? {
                // The link has broken, and this side has not noticed yet.
                Response::Flushed(flushed)
                    if flushed.exit() == Exit::Unreachable && Instant::now() < deadline =>
                {
                    std::thread::sleep(LOOK);
                }
                Response::Flushed(flushed) => return Ok(say(&flushed)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Waits until a directory is attached; its name over there, or why it is not.
    fn attaching(
        process: &mut Client,
        deadline: Instant,
    ) -> Result<Result<String, Option<String>>, Failure> {
        let mut told = false;
        loop {
            let now = match process.call(Request::Attachment, None)? {
                Response::Attachment(now) => *now,
                other => return Err(unexpected(&other)),
            };
            match (now.state, now.name) {
                (AttachState::Attached, Some(name)) => return Ok(Ok(name)),
                _ if Instant::now() >= deadline => return Ok(Err(now.last_error)),
                // What it has put off is tried at once.
                (AttachState::Unreachable, _) if !told => {
                    told = true;
                    process.call(Request::Retry, None)?;
                }
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    fn mounted(
        &self,
        mut daemon: Client,
        mirror: &MirrorDir,
        record: &Record,
    ) -> Result<Exit, Failure> {
        for (given, option) in [
            (self.dry_run, "--dry-run"),
            (self.push_only, "--push-only"),
            (self.pull_only, "--pull-only"),
            (self.force, "--force"),
            (self.symlinks.is_some(), "--symlinks"),
        ] {
            if given {
                return Err(Failure::new(format!(
                    "{option} is for a directory that is not mounted, and {} is",
                    record.tree.display()
                ))
                .hint(format!(
                    "unmount it first: mirrorfs umount {}",
                    record.tree.display()
                )));
            }
        }
        let only = match self.peer.as_ref().or(self.only.as_ref()) {
            Some(wanted) => Some(peer_named(&super::status::of(mirror, record)?, wanted)?),
            None => None,
        };
        // Peers that wait for their next attempt are tried now.
        daemon.call(Request::Retry, None)?;
        let request = Request::Flush {
            peer: only,
            timeout_ms: duration::millis(self.timeout),
        };
        match daemon.call(request, Some(patience(self.timeout)))? {
            Response::Flushed(flushed) if flushed.peers.is_empty() => {
                let tree = record.tree.display();
                Err(Failure::new(format!(
                    "{tree} has no peer: its changes are in the journal on this machine and nowhere else"
                ))
                .hint(format!("add one: mirrorfs peer add {tree} PEER")))
            }
            Response::Flushed(flushed) => Ok(say(&flushed)),
            other => Err(unexpected(&other)),
        }
    }

    fn unmounted(&self, dir: PathBuf, peer: Option<String>) -> Result<Exit, Failure> {
        let mode = match (self.push_only, self.pull_only) {
            (true, _) => Some(Mode::PushOnly),
            (_, true) => Some(Mode::PullOnly),
            _ => None,
        };
        let order = Order {
            dir,
            peer,
            symlinks: self.symlinks,
            dry_run: self.dry_run,
            ..Order::default()
        };
        let round = Round {
            mode,
            timeout: self.timeout,
            dry_run: self.dry_run,
            force: self.force,
            resume: None,
        };
        let report = once::run(&order, &round, &mut Terminal)?;
        for line in &report.plan {
            print(line);
        }
        match &report.flushed {
            Some(flushed) => Ok(say(flushed)),
            None => Ok(report.exit),
        }
    }
}

/// Tells what was reached.
pub(super) fn say(flushed: &Flushed) -> Exit {
    let exit = flushed.exit();
    let text = render::flushed(flushed);
    // What went wrong is for people, also where a script takes the output.
    if exit == Exit::Done {
        print(text.trim_end());
    } else {
        complain(&text.trim_end());
    }
    exit
}

/// How long the daemon may take to answer a request that takes up to `timeout`.
pub(super) fn patience(timeout: Duration) -> Duration {
    timeout.saturating_add(Duration::from_secs(30))
}

/// The place of the peer that a user means by a name or a place, of a tree that is not
/// mounted.
pub(super) fn place_of(
    mirror: &MirrorDir,
    record: &Record,
    wanted: &str,
) -> Result<String, Failure> {
    let status = super::status::of(mirror, record)?;
    let name = peer_named(&status, wanted)?;
    let peer = status.peers.into_iter().find(|peer| peer.name == name);
    Ok(peer.map_or_else(|| wanted.to_owned(), |peer| peer.url))
}

/// The name of the peer that a user means by a name or a place.
fn peer_named(status: &Status, wanted: &str) -> Result<String, Failure> {
    let absolute = std::path::absolute(wanted).ok();
    status
        .peers
        .iter()
        .find(|peer| {
            peer.name == wanted
                || peer.url == wanted
                || absolute.as_deref() == Some(std::path::Path::new(&peer.url))
        })
        .map(|peer| peer.name.clone())
        .ok_or_else(|| {
            let tree = &status.mirror.tree;
            Failure::new(format!("{wanted} is not a peer of {tree}"))
                .hint(format!("mirrorfs peer list {tree} lists the peers, mirrorfs peer add {tree} {wanted} adds one"))
        })
}
