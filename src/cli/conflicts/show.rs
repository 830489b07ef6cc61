//! A conflict for people.

use crate::cli::render::{Rows, bytes};
use crate::daemon::conflicts::{Copy, Detail, Version};
use crate::tree::Timestamp;

/// What happened, both versions, where the artefacts are, and what to do.
pub(super) fn detail(detail: &Detail) -> String {
    if detail.late {
        return late(detail);
    }
    let (path, peer) = (&detail.path, &detail.peer);
    let mut rows = Rows::default();
    rows.row("conflict", path.to_string());
    rows.row(
        "happened",
        format!(
            "here and on {peer} it was changed since both last agreed; noticed {}",
            moment(detail.since)
        ),
    );
    rows.row("here", version(&detail.local));
    rows.row(&format!("on {peer}"), version(&detail.remote));
    if let Some(newer) = &detail.newer {
        rows.row("by now", format!("{} (not fetched yet)", version(newer)));
    }
    rows.row("agreed on", version(&detail.base));
    if let Some(unit) = &detail.unit {
        for (side, changed) in [
            ("here".to_owned(), &unit.here),
            (format!("on {peer}"), &unit.there),
        ] {
            for changed in changed {
                let name = &changed.name;
                rows.row(
                    &side,
                    match &changed.says {
                        Some(says) => format!("{name}: {says}"),
                        None => name.to_string(),
                    },
                );
            }
        }
        rows.row(
            "objects",
            "both sides have all of both: git show and git merge find them".into(),
        );
    }
    if let Some((copy, state)) = &detail.copy {
        let state = match state {
            Copy::Unedited => "the version of the peer",
            Copy::Edited => "edited here since it was put there",
            Copy::Missing => "gone, which means that this side's version wins",
        };
        rows.row("copy", format!("{copy}: {state}"));
    }
    if let Some(kept) = &detail.kept {
        rows.row("copy", format!("{kept}, to be seen while unmounted"));
    }
    if let Some(info) = &detail.info {
        rows.row("explained", info.to_string());
    }
    rows.row(
        "kept",
        format!("this side's version is also in .mirrorfs/conflicts on {peer}"),
    );
    if matches!(detail.copy, Some((_, Copy::Unedited | Copy::Edited))) {
        rows.row("next", format!("mirrorfs conflicts diff {path}"));
    }
    let ways = match detail.unit {
        Some(_) => "--local|--remote",
        None => "--local|--remote|--both|--merged",
    };
    rows.row("next", format!("mirrorfs conflicts resolve {path} {ways}"));
    rows.print()
}

fn late(detail: &Detail) -> String {
    let path = &detail.path;
    let (here, other) = match detail.peer.as_str() {
        "" => ("here".to_owned(), "a peer"),
        peer => (format!("on {peer}"), "this side"),
    };
    let mut rows = Rows::default();
    rows.row("conflict", path.to_string());
    rows.row(
        "happened",
        format!(
            "a program {here} went on writing to it after a change of {other} had taken its place; noticed {}",
            moment(detail.since)
        ),
    );
    rows.row("now", version(&detail.local));
    rows.row("written", version(&detail.remote));
    if let Some((copy, _)) = &detail.copy {
        rows.row("copy", format!("{copy}, on both sides"));
        rows.row("next", format!("mirrorfs conflicts diff {path}"));
    }
    if let Some(kept) = &detail.kept {
        rows.row("copy", format!("{kept}, {here}"));
    }
    let ways = match detail.kept {
        Some(_) => "--local",
        None => "--local|--remote|--both|--merged",
    };
    rows.row("next", format!("mirrorfs conflicts resolve {path} {ways}"));
    rows.print()
}

fn version(version: &Version) -> String {
    match version {
        Version::Nothing => "nothing".to_owned(),
        Version::File { size, mtime, hash } => format!(
            "{} ({size} bytes), changed {}, BLAKE3 {hash}",
            bytes(*size),
            moment(*mtime)
        ),
        Version::Directory => "a directory".to_owned(),
        Version::GitDirectory => "a Git directory, changed".to_owned(),
        Version::Symlink { target } => format!("a symbolic link to {target}"),
        Version::Unknown { reason } => format!("cannot be looked at: {reason}"),
    }
}

fn moment(at: Timestamp) -> String {
    jiff::Timestamp::from_second(at.secs).map_or_else(|_| "at no time".into(), |at| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::RelPath;

    #[test]
    fn says_what_happened_and_what_to_do() {
        let file = |hash: &str| Version::File {
            size: 1536,
            mtime: Timestamp {
                secs: 1_700_000_000,
                nanos: 5,
            },
            hash: hash.to_owned(),
        };
        let text = detail(&Detail {
            path: RelPath::new("dir/notes").unwrap(),
            peer: "host".into(),
            since: Timestamp {
                secs: 1_700_000_100,
                nanos: 0,
            },
            base: Version::Nothing,
            local: file("aa"),
            remote: file("bb"),
            newer: None,
            copy: Some((RelPath::new("dir/notes.copy").unwrap(), Copy::Edited)),
            kept: None,
            unit: None,
            info: Some(RelPath::new("dir/notes.info").unwrap()),
            late: false,
        });
        let expected = "\
conflict   dir/notes
happened   here and on host it was changed since both last agreed; noticed 2023-11-14T22:15:00Z
here       1.5 KiB (1536 bytes), changed 2023-11-14T22:13:20Z, BLAKE3 aa
on host    1.5 KiB (1536 bytes), changed 2023-11-14T22:13:20Z, BLAKE3 bb
agreed on  nothing
copy       dir/notes.copy: edited here since it was put there
explained  dir/notes.info
kept       this side's version is also in .mirrorfs/conflicts on host
next       mirrorfs conflicts diff dir/notes
next       mirrorfs conflicts resolve dir/notes --local|--remote|--both|--merged
";
        assert_eq!(text, expected);
    }
}
