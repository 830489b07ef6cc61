//! `mirrorfs log`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use mirrorfs_journal::{Event, EventKind, Origin, Peer, What, look};
use serde::Serialize;

use super::duration;
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail, locate};
use crate::tree::{RelPath, Timestamp};

/// Show what changed, when, on which side, and how far it got
///
/// The latest comes first. A change is journaled when it survives the death of every
/// process here, applied when a peer shows it, durable when it survives a power loss there.
/// What is older than 30 days, or more than a million changes ago, is forgotten once every
/// peer has it.
#[derive(Args, Debug)]
pub(super) struct Log {
    /// Only what happened at this path or below it, which need not be there any more
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Only what is no longer ago than this, such as 2h or 7d
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    since: Option<Duration>,
    /// Show so many at most; 0 for all
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 1000)]
    limit: usize,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// A line of the log, in the shape that scripts depend on.
#[derive(Debug, PartialEq, Serialize)]
struct Line {
    /// The number of the change; of a note, that of the last change before it.
    seq: u64,
    /// When, as in RFC 3339, in UTC.
    at: String,
    /// `local`, `scan`, or the name of the peer that it came from.
    side: String,
    /// A word for what happened; `note` for a decision.
    change: &'static str,
    /// Where; none if that is not on record any more.
    path: Option<String>,
    /// Of something that moved: where it was.
    from: Option<String>,
    /// Of what was written: the first byte, and how many.
    offset: Option<u64>,
    length: Option<u64>,
    /// Of a note: what was decided.
    note: Option<String>,
    /// How far the change got on each peer.
    peers: Vec<Reached>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Reached {
    name: String,
    /// `journaled`, `applied` or `durable`; `source` where it came from.
    state: &'static str,
}

impl Log {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = StateDir::find()?;
        let path = std::path::absolute(&self.path)
            .or_fail(|| format!("no path: {}", self.path.display()))?;
        // What is asked about may be gone, and its directory too.
        let there = path
            .ancestors()
            .find(|above| above.is_dir())
            .unwrap_or(Path::new("/"));
        let (mirror, record) = locate::require(&state, there)?;
        let real = std::fs::canonicalize(there)
            .or_fail(|| format!("cannot find the directory {}", there.display()))?;
        let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
        let below = if rest.as_os_str().is_empty() {
            real
        } else {
            real.join(rest)
        };
        let below = below
            .strip_prefix(&record.tree)
            .or_fail(|| format!("{} is not in {}", path.display(), record.tree.display()))?;
        let below = std::os::unix::ffi::OsStrExt::as_bytes(below.as_os_str());
        let below = RelPath::new(below).or_fail(|| format!("no path: {}", path.display()))?;
        let message = || format!("cannot read the journal in {}", mirror.path().display());
        let Some(view) = look(mirror.path()).or_fail(message)? else {
            return Ok(Exit::Done);
        };
        let peers = view.peers().or_fail(message)?;
        let since = self.since.map(|since| before_now(since, Timestamp::now()));
        let mut left = if self.limit == 0 {
            usize::MAX
        } else {
            self.limit
        };
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        let mut failed = None;
        view.history(since, |event| {
            if !concerns(&event, &below) {
                return true;
            }
            let line = line(&event, &peers);
            let text = if self.json {
                match serde_json::to_string(&line) {
                    Ok(text) => text,
                    Err(error) => {
                        failed = Some(error);
                        return false;
                    }
                }
            } else {
                line.print()
            };
            left -= 1;
            // That nobody reads it any more (`| head`) is no error, and the end of it.
            writeln!(out, "{text}").is_ok() && left > 0
        })
        .or_fail(message)?;
        match failed {
            Some(error) => Err(Failure::new("cannot print the log").because(&error)),
            None => {
                let _ = out.flush();
                Ok(Exit::Done)
            }
        }
    }
}

fn before_now(since: Duration, now: Timestamp) -> Timestamp {
    Timestamp {
        secs: now
            .secs
            .saturating_sub(i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
        nanos: now.nanos,
    }
}

/// Whether something happened at or below a path, or moved away from there.
fn concerns(event: &Event, below: &RelPath) -> bool {
    let from = match &event.kind {
        EventKind::Change { from, .. } => from.as_ref(),
        EventKind::Note { .. } => None,
    };
    let mut places = event.path.iter().chain(from);
    below.is_root() || places.any(|path| path.starts_with(below))
}

fn line(event: &Event, peers: &[Peer]) -> Line {
    let text = |path: &Option<RelPath>| path.as_ref().map(ToString::to_string);
    let named = |id| {
        let peer = peers.iter().find(|peer| peer.id == id);
        peer.map_or_else(|| "a former peer".to_owned(), |peer| peer.name.clone())
    };
    let mut line = Line {
        seq: event.n,
        at: jiff::Timestamp::new(event.at.secs, event.at.nanos.cast_signed())
            .map_or_else(|_| "at no time".into(), |at| format!("{at:.3}")),
        side: "local".into(),
        change: "note",
        path: text(&event.path),
        from: None,
        offset: None,
        length: None,
        note: None,
        peers: Vec::new(),
    };
    match &event.kind {
        EventKind::Note { peer, what } => {
            line.side = named(*peer);
            line.note = Some(what.clone());
        }
        EventKind::Change {
            origin,
            what,
            from,
            range,
        } => {
            line.change = word(*what);
            line.from = text(from);
            line.offset = range.map(|(offset, _)| offset);
            line.length = range.map(|(_, length)| length);
            line.side = match origin {
                Origin::Local => "local".into(),
                Origin::Scan => "scan".into(),
                Origin::Peer(id) => named(*id),
            };
            line.peers = peers
                .iter()
                .map(|peer| Reached {
                    name: peer.name.clone(),
                    state: match origin {
                        Origin::Peer(id) if *id == peer.id => "source",
                        _ if event.n <= peer.durable => "durable",
                        _ if event.n <= peer.cursor => "applied",
                        _ => "journaled",
                    },
                })
                .collect();
        }
    }
    line
}

fn word(what: What) -> &'static str {
    match what {
        What::Root => "root",
        What::Created => "created",
        What::Linked => "linked",
        What::Removed => "removed",
        What::Renamed => "renamed",
        What::Exchanged => "exchanged",
        What::Written => "written",
        What::Truncated => "truncated",
        What::Attributes => "attributes",
        What::Xattrs => "xattrs",
        What::Found => "found changed",
        What::Replaced => "replaced",
    }
}

impl Line {
    fn print(&self) -> String {
        let path = self.path.as_deref().unwrap_or("(a name that is forgotten)");
        let mut text = format!("{}  {:>6}  ", self.at, self.seq);
        if let Some(note) = &self.note {
            text.push_str(&format!("note        {path}: {note}"));
            return text;
        }
        text.push_str(&format!("{:<10}  {path}", self.change));
        if let Some(from) = &self.from {
            text.push_str(&format!(" (from {from})"));
        }
        if let (Some(offset), Some(length)) = (self.offset, self.length) {
            text.push_str(&format!(" ({length} bytes at {offset})"));
        }
        match self.side.as_str() {
            "local" => {}
            "scan" => text.push_str(", found by a scan"),
            peer => text.push_str(&format!(", by {peer}")),
        }
        for reached in &self.peers {
            match reached.state {
                "source" => {}
                "journaled" => text.push_str(&format!(", not on {} yet", reached.name)),
                state => text.push_str(&format!(", {state} on {}", reached.name)),
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, id: i64, cursor: u64, durable: u64) -> Peer {
        Peer {
            id: crate::tree::PeerId(id),
            name: name.into(),
            url: String::new(),
            replica: None,
            cursor,
            seen: None,
            agreement: None,
            proposed: None,
            durable,
        }
    }

    /// Scripts depend on every name in here.
    #[test]
    fn a_line_tells_how_far_a_change_got() {
        let peers = [peer("host", 1, 7, 5), peer("disk", 2, 9, 9)];
        let event = |n, origin| Event {
            n,
            at: Timestamp {
                secs: 1_700_000_000,
                nanos: 5_000_000,
            },
            path: Some(RelPath::new("dir/new").unwrap()),
            kind: EventKind::Change {
                origin,
                what: What::Renamed,
                from: Some(RelPath::new("dir/old").unwrap()),
                range: None,
            },
        };
        let json = serde_json::to_string(&line(&event(6, Origin::Local), &peers)).unwrap();
        assert_eq!(
            json,
            r#"{"seq":6,"at":"2023-11-14T22:13:20.005Z","side":"local","change":"renamed","path":"dir/new","from":"dir/old","offset":null,"length":null,"note":null,"peers":[{"name":"host","state":"applied"},{"name":"disk","state":"durable"}]}"#
        );
        assert_eq!(
            line(&event(8, Origin::Peer(crate::tree::PeerId(2))), &peers).print(),
            "2023-11-14T22:13:20.005Z       8  renamed     dir/new (from dir/old), by disk, \
             not on host yet"
        );
        let below = |path: &str| RelPath::new(path).unwrap();
        for (path, is) in [("dir", true), ("dir/old", true), ("di", false), ("", true)] {
            assert_eq!(
                concerns(&event(1, Origin::Local), &below(path)),
                is,
                "{path}"
            );
        }
    }
}
