//! Reports for people: compact, aligned, and with what to do next.

use std::fmt::Write;

use crate::daemon::attach::{AttachState, Attachment};
use crate::daemon::control::{Flushed, Outcome};
use crate::daemon::status::{Conflict, MountState, Peer, PeerState, Status};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How many paths of one kind are listed; the JSON has them all.
const LISTED: usize = 20;

/// The status of one mirror.
pub(super) fn status(status: &Status) -> String {
    let mut rows = Rows::default();
    let mirror = &status.mirror;
    rows.row(
        "mirror",
        format!("{} ({}, id {})", mirror.name, mirror.mode, mirror.id),
    );
    rows.row("tree", mirror.tree.clone());
    let state = match status.mount.state {
        MountState::Mounted => "mounted",
        MountState::Unmounted => "unmounted",
    };
    rows.row("mount", with_reason(state, status.mount.reason.as_deref()));
    if let Some(channel) = &status.mount.channel {
        rows.row("", format!("served through {channel}"));
    }
    let journal = &status.journal;
    rows.row(
        "journal",
        format!(
            "change {}, {}",
            journal.seq,
            pending(journal.pending_changes, journal.pending_bytes)
        ),
    );
    if let Some(reason) = &journal.reason {
        rows.row("", reason.clone());
    }
    for peer in &status.peers {
        self::peer(&mut rows, peer);
    }
    if status.peers.is_empty() {
        rows.row("peers", "none".into());
    }
    rows.list(
        "conflicts",
        status
            .conflicts
            .iter()
            .map(|conflict| match &conflict.copy {
                Some(copy) => format!("{} (theirs: {copy})", conflict.path),
                None => conflict.path.clone(),
            }),
    );
    rows.list(
        "held back",
        status
            .held_back
            .iter()
            .map(|held| format!("{}: {}", held.path, held.rule)),
    );
    rows.list(
        "problems",
        status
            .problems
            .iter()
            .map(|problem| format!("{}: {}", problem.path, problem.error)),
    );
    for step in next_steps(status) {
        rows.row("next", step);
    }
    rows.print()
}

/// One peer in one line.
pub(super) fn peer_line(peer: &Peer) -> String {
    format!("{}  {}", peer.name, told(peer))
}

fn told(peer: &Peer) -> String {
    let through = match (&peer.transport, peer.state) {
        (Some(transport), PeerState::Connected) => format!(" ({transport})"),
        _ => String::new(),
    };
    format!(
        "{}{through}, {}, {}",
        peer.state.word(),
        pending(peer.pending_changes, peer.pending_bytes),
        peer.url
    )
}

/// A directory that is attached to a mount elsewhere.
pub(super) fn attachment(attachment: &Attachment) -> String {
    let mut rows = Rows::default();
    rows.row("directory", attachment.dir.clone());
    let name = attachment.name.as_ref();
    let name = name.map_or_else(String::new, |name| format!(", its peer {name}"));
    rows.row(
        attachment.state.word(),
        format!("to {}{name}", attachment.to),
    );
    if let (Some(transport), Some(reason)) = (&attachment.transport, &attachment.transport_reason) {
        rows.row("", format!("by {transport}: {reason}"));
    }
    if let Some(error) = &attachment.last_error {
        rows.row("", error.clone());
    }
    match attachment.state {
        AttachState::Unreachable => {
            rows.row("next", "nothing: it is tried again by itself".into());
        }
        AttachState::Detached => rows.row(
            "next",
            format!("mirrorfs attach {} {}", attachment.to, attachment.dir),
        ),
        AttachState::Attached | AttachState::Connecting => {}
    }
    rows.print()
}

fn peer(rows: &mut Rows, peer: &Peer) {
    rows.row(&format!("peer {}", peer.name), told(peer));
    // That a path is served by a child process surprises nobody.
    if let (Some(transport), Some(reason)) = (&peer.transport, &peer.transport_reason)
        && transport != "local"
    {
        rows.row("", format!("by {transport}: {reason}"));
    }
    if let Some(version) = peer.version.as_ref().filter(|found| *found != VERSION) {
        rows.row(
            "",
            format!("mirrorfs {version} over there, mirrorfs {VERSION} here"),
        );
    }
    if let Some(why) = &peer.scanned_because {
        rows.row("", format!("scanned now and then: {why}"));
    }
    for text in [&peer.halt_reason, &peer.last_error].into_iter().flatten() {
        rows.row("", text.clone());
    }
}

fn next_steps(status: &Status) -> Vec<String> {
    let tree = &status.mirror.tree;
    let mut steps = Vec::new();
    if status.peers.is_empty() {
        steps.push(format!(
            "mirrorfs peer add {tree} PEER, to have changes carried somewhere"
        ));
    } else if status.mount.state == MountState::Unmounted {
        steps.push(format!("mirrorfs mount {tree}"));
    }
    let beside = |conflict: &Conflict| conflict.copy.is_some();
    if status.conflicts.iter().any(beside) {
        steps.push(
            "merge each conflict into the file, then remove its .conflict file in the mount; mirrorfs conflicts show PATH tells more".into(),
        );
    }
    // A Git directory, or a file against a directory: there is no file to remove.
    if let Some(conflict) = status.conflicts.iter().find(|conflict| !beside(conflict)) {
        steps.push(format!(
            "mirrorfs conflicts show {} tells what both sides have, and how to settle it",
            conflict.path
        ));
    }
    if status
        .peers
        .iter()
        .any(|peer| peer.state == PeerState::Unreachable)
    {
        steps.push("nothing: unreachable peers are tried again by themselves, and changes are safe in the journal".into());
    }
    steps
}

/// What a flush reached, for `mirrorfs sync` and `mirrorfs umount`.
pub(super) fn flushed(flushed: &Flushed) -> String {
    let mut rows = Rows::default();
    for peer in &flushed.peers {
        let word = match peer.outcome {
            Outcome::Durable => "durable",
            Outcome::Unreachable => "unreachable, changes are safe in the journal",
            Outcome::TimedOut => "timed out",
            Outcome::Halted => "halted",
            Outcome::Failed => "failed",
        };
        let left = if peer.outcome == Outcome::Durable {
            format!("up to change {}", flushed.seq)
        } else {
            pending(peer.pending_changes, peer.pending_bytes)
        };
        rows.row(&format!("peer {}", peer.name), format!("{word}, {left}"));
        if let Some(error) = &peer.error {
            rows.row("", error.clone());
        }
    }
    if flushed.peers.is_empty() {
        rows.row(
            "peers",
            "none: the changes are in the journal and nowhere else".into(),
        );
    }
    rows.list(
        "conflicts",
        flushed
            .conflicts
            .iter()
            .map(|conflict| conflict.path.clone()),
    );
    rows.list(
        "problems",
        flushed
            .problems
            .iter()
            .map(|problem| format!("{}: {}", problem.path, problem.error)),
    );
    rows.print()
}

fn with_reason(state: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("{state}: {reason}"),
        None => state.to_owned(),
    }
}

fn pending(changes: u64, bytes: u64) -> String {
    match changes {
        0 => "nothing pending".into(),
        1 => format!("1 change pending ({})", self::bytes(bytes)),
        _ => format!("{changes} changes pending ({})", self::bytes(bytes)),
    }
}

/// A number of bytes in at most four characters and a unit.
pub(super) fn bytes(bytes: u64) -> String {
    let mut whole = bytes;
    let mut rest = 0;
    let mut units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        if whole < 1024 {
            break;
        }
        rest = whole % 1024;
        whole /= 1024;
        unit = next;
    }
    if unit == "bytes" || whole >= 100 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{} {unit}", rest * 10 / 1024)
    }
}

/// Labels and texts in two columns. A text without label continues the one above.
#[derive(Default)]
pub(super) struct Rows(Vec<(String, String)>);

impl Rows {
    pub(super) fn row(&mut self, label: &str, text: String) {
        self.0.push((label.to_owned(), text));
    }

    fn list(&mut self, label: &str, items: impl ExactSizeIterator<Item = String>) {
        let count = items.len();
        let mut label = label;
        for item in items.take(LISTED) {
            self.row(label, item);
            label = "";
        }
        if count > LISTED {
            self.row(
                "",
                format!("and {} more: see status --json", count - LISTED),
            );
        }
    }

    pub(super) fn print(&self) -> String {
        let width = self.0.iter().map(|(label, _)| label.chars().count()).max();
        let width = width.unwrap_or(0) + 2;
        let mut text = String::new();
        for (label, content) in &self.0 {
            for (position, line) in content.lines().enumerate() {
                let label = if position == 0 { label.as_str() } else { "" };
                // Writing to a string cannot fail.
                let _ = writeln!(text, "{}", format!("{label:width$}{line}").trim_end());
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::PeerFlushed;
    use crate::daemon::status::tests::example;

    #[test]
    fn a_status_reads_like_this() {
        let mut shown = example();
        assert_eq!(
            status(&shown),
            "\
mirror     web (two-way, id 0123456789abcdef0123456789abcdef)
tree       /home/me/web
mount      mounted
           served through io_uring
journal    change 4120, 3 changes pending (8.0 KiB)
peer host  connected (libssh2), 3 changes pending (8.0 KiB), me@host:web
           by libssh2: libssh2 was asked for
conflicts  a.txt (theirs: a.txt.remote.20260101T000000Z.conflict)
held back  run.sock: a socket stays local
problems   b: Permission denied (os error 13)
next       merge each conflict into the file, then remove its .conflict file in the mount; mirrorfs conflicts show PATH tells more
"
        );
        shown.conflicts[0].path = "repo/.git".into();
        shown.conflicts[0].copy = None;
        let text = status(&shown);
        let next = "next       mirrorfs conflicts show repo/.git tells what both sides have, and how to settle it\n";
        assert!(text.ends_with(next), "{text}");
        shown.peers[0].state = PeerState::Unreachable;
        shown.peers[0].last_error = Some("connection refused".into());
        let text = status(&shown);
        assert!(text.contains("\n           connection refused\n"), "{text}");
        assert!(text.contains("tried again by themselves"), "{text}");
    }

    #[test]
    fn long_lists_are_cut_and_say_so() {
        let mut shown = example();
        shown.problems = vec![shown.problems[0].clone(); LISTED + 5];
        assert!(status(&shown).contains("and 5 more"));
    }

    #[test]
    fn a_flush_says_what_was_reached() {
        let result = Flushed {
            seq: 9,
            peers: vec![
                PeerFlushed {
                    name: "a".into(),
                    outcome: Outcome::Durable,
                    pending_changes: 0,
                    pending_bytes: 0,
                    error: None,
                },
                PeerFlushed {
                    name: "b".into(),
                    outcome: Outcome::TimedOut,
                    pending_changes: 1,
                    pending_bytes: 5,
                    error: Some("slow".into()),
                },
            ],
            ..Flushed::default()
        };
        assert_eq!(
            flushed(&result),
            "\
peer a  durable, up to change 9
peer b  timed out, 1 change pending (5 bytes)
        slow
"
        );
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (150 * 1024, "150 KiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(super::bytes(bytes), text);
        }
    }
}
