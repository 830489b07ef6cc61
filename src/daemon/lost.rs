//! A journal that is lost or damaged: what is kept beside it, so that the mirror goes on.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use mirrorfs_journal::{Durability, Error, Journal, Start, View};
use serde::{Deserialize, Serialize};

use super::failure::{Failure, OrFail};
use super::site::add_peer;
use super::state::MirrorDir;
use crate::transport::PeerUrl;

/// A peer, as far as it must be known without the journal.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    name: String,
    url: String,
}

fn path(dir: &MirrorDir) -> PathBuf {
    dir.path().join("peers.json")
}

/// Writes down beside the journal which peers it has, if that has changed.
pub(super) fn remember_peers(dir: &MirrorDir, journal: &Journal) -> Result<(), Failure> {
    let path = path(dir);
    let message = || format!("cannot write {}", path.display());
    let peers = journal.snapshot().and_then(|snapshot| snapshot.peers());
    let known: Vec<Known> = peers
        .or_fail(message)?
        .into_iter()
        .map(|peer| Known {
            name: peer.name,
            url: peer.url,
        })
        .collect();
    let text = serde_json::to_vec_pretty(&known).or_fail(message)?;
    if fs::read(&path).is_ok_and(|written| written == text) {
        return Ok(());
    }
    let fresh = path.with_extension("json.new");
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&fresh)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)
    };
    write().or_fail(message)
}

/// Begins anew where a journal was: with the peers it had. Returns what a person should
/// know, which [`told`] says as long as it matters.
pub(super) fn begin_anew(
    dir: &MirrorDir,
    journal: &Journal,
    start: &Start,
) -> Result<Option<String>, Failure> {
    let known: Vec<Known> = match fs::read(path(dir)) {
        Ok(text) if start.fresh => serde_json::from_slice(&text).unwrap_or_default(),
        _ => return Ok(start.reason.clone()),
    };
    for peer in &known {
        match PeerUrl::parse(&peer.url) {
            Ok(url) => drop(add_peer(journal, &url, Some(&peer.name), None)?),
            Err(error) => tracing::warn!(%error, name = peer.name, "a peer is not taken over"),
        }
    }
    let reason = start.reason.clone().unwrap_or_else(|| {
        format!(
            "the journal in {} is gone and a fresh one was started: the tree is scanned, and files that were deleted while it was lost may come back",
            dir.path().display()
        )
    });
    let text = reason.clone();
    journal
        .update(Durability::Full, move |update| {
            update.set_setting(LOST, text.as_bytes())
        })
        .or_fail(|| "cannot write to the journal".into())?;
    Ok(Some(reason))
}

const LOST: &str = "lost";

/// That the journal had to begin anew, until every peer has agreed with this side again.
pub(super) fn told(view: &View) -> Result<Option<String>, Error> {
    if view.peers()?.iter().all(|peer| peer.agreement.is_some()) {
        return Ok(None);
    }
    Ok(view
        .setting(LOST)?
        .map(|text| String::from_utf8_lossy(&text).into_owned()))
}
