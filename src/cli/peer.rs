//! `mirrorfs peer`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::status::{of, reach, unexpected};
use super::{Terminal, complain, print, render};
use crate::daemon::control::{Request, Response};
use crate::daemon::site::{self, Order, Site};
use crate::daemon::state::{MirrorDir, Record, StateDir};
use crate::daemon::{Exit, Failure, OrFail, locate};

/// List the peers of a mirror, add one, or remove one
///
/// A mounted tree stays mounted meanwhile.
#[derive(Args, Debug)]
pub(super) struct Peer {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    List(List),
    Add(Add),
    Remove(Remove),
}

/// List the peers: name, state, place
#[derive(Args, Debug)]
struct List {
    /// List those of the mirror of this directory
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Mirror to a further peer
#[derive(Args, Debug)]
struct Add {
    /// Add to the mirror of this directory
    dir: PathBuf,
    /// Mirror to this place: a path, user@host:path, or ssh://user@host:port/path
    peer: String,
    /// Call the peer by this name; by default that of its host or directory. Under a name
    /// that is known, the same peer is from now on at this place
    #[arg(long)]
    name: Option<String>,
}

/// Mirror to a peer no longer
///
/// Its directory stays as it is. What was agreed with it is forgotten: if it is added
/// again, both sides are compared in full, and what was deleted on one of them meanwhile
/// comes back.
#[derive(Args, Debug)]
struct Remove {
    /// Remove from the mirror of this directory
    dir: PathBuf,
    /// Remove the peer of this name
    name: String,
    /// Also while conflicts with it are open; the copies of its versions stay
    #[arg(long)]
    force: bool,
}

impl Peer {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        match self.action {
            Action::List(list) => {
                let (dir, record) = locate::require(&state, &list.dir)?;
                list.run(&dir, &record)
            }
            Action::Add(add) => {
                let (dir, record) = locate::require(&state, &add.dir)?;
                add.run(&dir, &record)
            }
            Action::Remove(remove) => {
                let (dir, record) = locate::require(&state, &remove.dir)?;
                remove.run(&dir, &record)
            }
        }
    }
}

impl List {
    fn run(self, dir: &MirrorDir, record: &Record) -> Result<Exit, Failure> {
        let peers = of(dir, record)?.peers;
        if self.json {
            let text = serde_json::to_string_pretty(&peers);
            print(text.or_fail(|| "cannot print the peers".into())?);
        } else {
            for peer in &peers {
                print(render::peer_line(peer));
            }
        }
        Ok(Exit::Done)
    }
}

impl Add {
    fn run(self, dir: &MirrorDir, record: &Record) -> Result<Exit, Failure> {
        let tree = record.tree.display();
        let url = site::peer_at(&self.peer, &record.tree)?.to_string();
        let Some(mut daemon) = reach(dir, record)? else {
            let order = Order {
                dir: record.tree.clone(),
                peer: Some(url.clone()),
                peer_name: self.name,
                ..Order::default()
            };
            let site = Site::open(&order, &mut Terminal, |_| Ok(()))?;
            close(&site)?;
            print(format_args!(
                "{url} is a peer of {tree} from the next mount on"
            ));
            return Ok(Exit::Done);
        };
        let request = Request::AddPeer {
            url: url.clone(),
            name: self.name,
        };
        match daemon.call(request, None)? {
            Response::PeerAdded { name, warnings } => {
                for warning in warnings {
                    complain(&format_args!("warning: {warning}"));
                }
                print(format_args!("{tree} is mirrored to {name} ({url})"));
                Ok(Exit::Done)
            }
            other => Err(unexpected(&other)),
        }
    }
}

impl Remove {
    fn run(self, dir: &MirrorDir, record: &Record) -> Result<Exit, Failure> {
        let tree = record.tree.display();
        let conflicts = match reach(dir, record)? {
            Some(mut daemon) => {
                let request = Request::RemovePeer {
                    name: self.name.clone(),
                    force: self.force,
                };
                match daemon.call(request, None)? {
                    Response::PeerRemoved { conflicts } => conflicts,
                    other => return Err(unexpected(&other)),
                }
            }
            None => {
                let order = Order {
                    dir: record.tree.clone(),
                    ..Order::default()
                };
                let site = Site::open(&order, &mut Terminal, |_| Ok(()))?;
                let removed = site.remove_peer(&self.name, self.force);
                close(&site)?;
                removed?
            }
        };
        print(format_args!(
            "{tree} is no longer mirrored to {}",
            self.name
        ));
        if conflicts > 0 {
            print(format_args!(
                "{conflicts} conflicts with it were open: the copies of its versions stay in the tree, on this machine only"
            ));
        }
        Ok(Exit::Done)
    }
}

fn close(site: &Site) -> Result<(), Failure> {
    site.journal
        .close()
        .or_fail(|| "the journal could not be closed: the next start scans the tree".into())
}
