//! `mirrorfs doctor`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::print;
use super::status::of;
use crate::daemon::doctor::{self, Check, Verdict};
use crate::daemon::state::StateDir;
use crate::daemon::{Exit, Failure, OrFail, locate};

/// Check what a mirror needs, and say what to do about what is missing
///
/// Looks at this machine, at a directory that is mounted or may be, and at peers: whether
/// each can be reached, by which transport, and why by that one. Changes nothing, but that
/// mirrorfs is installed on a peer that has none. The exit code is the gravest thing found:
/// see mirrorfs --help.
#[derive(Args, Debug)]
pub(super) struct Doctor {
    /// Look at this directory, and at the peers it has if it is a mirror; by default the
    /// working directory, if it is in one
    dir: Option<PathBuf>,
    /// Look at this peer as well: a path, user@host:path, or ssh://user@host:port/path
    peer: Option<String>,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut checks = doctor::machine();
        // Without a state directory, which is among the checks, there is no mirror.
        if let Ok(state) = StateDir::find() {
            let here = self.dir.as_deref().unwrap_or(Path::new("."));
            match (locate::find(&state, here), &self.dir) {
                (Ok(Some((dir, record))), _) => checks.extend(doctor::mirror(&of(&dir, &record)?)),
                // Also one that is not there: that is said like all else.
                (_, Some(dir)) => checks.extend(doctor::new_tree(dir)),
                (found, None) => drop(found?),
            }
        }
        if let (Some(peer), Some(dir)) = (&self.peer, &self.dir) {
            checks.push(doctor::new_peer(peer, dir));
        }
        if self.json {
            let text = serde_json::to_string_pretty(&checks);
            print(text.or_fail(|| "cannot print what was found".into())?);
        } else {
            for check in &checks {
                print(line(check));
            }
        }
        Ok(checks.iter().map(|check| check.exit).collect())
    }
}

fn line(check: &Check) -> String {
    let verdict = match check.verdict {
        Verdict::Good => "ok",
        Verdict::Note => "note",
        Verdict::Bad => "BAD",
    };
    let hint = check
        .hint
        .as_ref()
        .map_or_else(String::new, |hint| format!("\n      hint: {hint}"));
    format!("{verdict:<5} {}: {}{hint}", check.about, check.finding)
}
