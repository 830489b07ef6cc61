//! "Nothing is overwritten unseen": a side is replaced only where it is what the base
//! says; anything else is a conflict that keeps both.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{
    PROMPT, Sandbox, Server, assert_same, assert_same_except, eventually, wait_until,
};

/// A mounted tree with a peer behind a link, both the same: `notes` and `other`.
pub(crate) struct Pair {
    pub(crate) sandbox: Sandbox,
    pub(crate) server: Server,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let mut sandbox = Sandbox::new();
        let server = Server::start(&mut sandbox);
        sandbox.sh(
            &sandbox.tree(),
            "mkdir dir; echo base >dir/notes; echo other >dir/other; chmod 644 dir/notes",
        );
        sandbox.mount_with(server.url(&sandbox.peer()));
        sandbox.flush();
        Self { sandbox, server }
    }

    /// Runs a script on each side while neither hears of the other.
    pub(crate) fn apart(&self, here: &str, there: &str) {
        self.server.link.refuse();
        self.sandbox.sh(&self.sandbox.tree(), here);
        self.sandbox.sh(&self.sandbox.peer(), there);
        self.server.link.restore();
    }

    pub(crate) fn here(&self, path: &str) -> PathBuf {
        self.sandbox.tree().join(path)
    }

    pub(crate) fn there(&self, path: &str) -> PathBuf {
        self.sandbox.peer().join(path)
    }

    pub(crate) fn copies(&self) -> Vec<PathBuf> {
        self.sandbox.conflict_copies(&self.here("dir"))
    }
}

pub(crate) fn text(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether this is `notes.remote.<UTC yyyymmddThhmmssZ>.conflict`.
fn is_copy_name(name: &str) -> bool {
    let Some(stamp) = name
        .strip_prefix("notes.remote.")
        .and_then(|rest| rest.strip_suffix(".conflict"))
    else {
        return false;
    };
    stamp.len() == 16
        && stamp.bytes().enumerate().all(|(at, byte)| match at {
            8 => byte == b'T',
            15 => byte == b'Z',
            _ => byte.is_ascii_digit(),
        })
}

/// Both sides edit one file while the link is cut. The local file stays, the remote
/// version lies beside it with an explanation, the peer's file stays, the local version
/// is also safe on the peer; flush says 3, and status lists it.
#[test]
fn both_edited_keeps_both_on_both_sides() {
    let pair = Pair::new();
    let sandbox = &pair.sandbox;
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    sandbox.try_flush().expect_code(3);

    assert_eq!(text(pair.here("dir/notes")), "mine\n");
    assert_eq!(text(pair.there("dir/notes")), "theirs\n");
    let copies = pair.copies();
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(text(&copies[0]), "theirs\n");
    let name = copies[0].file_name().unwrap().to_str().unwrap();
    assert!(is_copy_name(name), "{name}");
    let explanations = sandbox.names_ending(&pair.here("dir"), ".conflict-info");
    assert_eq!(explanations.len(), 1, "{explanations:?}");
    let explanation = text(&explanations[0]);
    for part in ["notes", name] {
        assert!(explanation.contains(part), "{part} in: {explanation}");
    }

    // "Both artefacts are local, never mirrored."
    let left: Vec<_> = fs::read_dir(pair.there("dir"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // "The local version is also stored in the peer's .mirrorfs/conflicts/."
    let kept = sandbox.reserved_contents(&sandbox.peer(), "conflicts");
    assert!(kept.contains(&b"mine\n".to_vec()), "{kept:?}");

    let status = sandbox.status();
    assert_eq!(status.conflicts.len(), 1, "{status:?}");
    assert_eq!(status.conflicts[0].path, "dir/notes");
    assert_eq!(
        status.conflicts[0].copy.as_deref(),
        Some(format!("dir/{name}").as_str())
    );
    // The rest goes on.
    sandbox.sh(&sandbox.tree(), "echo new >dir/other; echo one >dir/more");
    sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.there("dir/other")), "new\n");
    assert_eq!(text(pair.there("dir/more")), "one\n");
    assert_eq!(text(pair.there("dir/notes")), "theirs\n");
    assert_same_except(&sandbox.tree(), &sandbox.peer(), |path| {
        path.starts_with("dir/notes")
    });
}

/// "Removing the .conflict file while mounted means: local wins." What it beats is still
/// in the peer's trash.
#[test]
fn removing_the_copy_resolves_for_the_local_version() {
    let pair = Pair::new();
    let sandbox = &pair.sandbox;
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    sandbox.try_flush().expect_code(3);
    fs::remove_file(&pair.copies()[0]).unwrap();
    sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
    assert!(sandbox.status().conflicts.is_empty());
    let trash = sandbox.reserved_contents(&sandbox.peer(), "trash");
    assert!(trash.contains(&b"theirs\n".to_vec()), "{trash:?}");
    assert_eq!(pair.copies(), [] as [PathBuf; 0]);
    // From here on it is a file like any other.
    sandbox.sh(&sandbox.peer(), "echo next >dir/notes");
    wait_until("the peer's next edit arrives", PROMPT, || {
        text(pair.here("dir/notes")) == "next\n"
    });
}

/// Someone merges by hand: the local file gets the merged text, the copy is removed.
#[test]
fn a_merge_by_hand_reaches_the_peer() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair.sandbox.sh(
        &pair.here("dir"),
        "cat notes notes.remote.*.conflict >merged; mv merged notes; rm notes.remote.*.conflict",
    );
    pair.sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\ntheirs\n");
}

/// "Sides that become equal resolve it."
#[test]
fn sides_that_become_equal_resolve_the_conflict() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair.sandbox.sh(&pair.there("dir"), "echo mine >notes");
    eventually("the conflict is over", PROMPT, || {
        let status = pair.sandbox.status();
        (status.conflicts.is_empty())
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    });
    pair.sandbox.flush();
}

/// The same edit on both sides is no conflict.
#[test]
fn the_same_edit_on_both_sides_agrees() {
    let pair = Pair::new();
    pair.apart(
        "echo same >dir/notes; mkdir d; echo x >d/x",
        "echo same >dir/notes; mkdir d; echo x >d/x",
    );
    pair.sandbox.flush();
    assert!(pair.copies().is_empty());
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// Separate fields merge: content here, mode there.
#[test]
fn content_here_and_mode_there_merge() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "chmod 600 dir/notes");
    pair.sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(pair.here("dir/notes"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// "Keep the edit: push X, note it."
#[test]
fn deleted_there_and_edited_here_keeps_the_edit() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "rm dir/notes");
    pair.sandbox.flush();
    assert_eq!(text(pair.here("dir/notes")), "mine\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// "Keep the edit: pull Y, note it."
#[test]
fn deleted_here_and_edited_there_keeps_the_edit() {
    let pair = Pair::new();
    pair.apart("rm dir/notes", "echo theirs >dir/notes");
    pair.sandbox.flush();
    assert_eq!(text(pair.here("dir/notes")), "theirs\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// "A directory deleted on one side loses only what the other side left unchanged; what
/// was edited there stays, with its parents."
#[test]
fn a_directory_deleted_there_keeps_what_was_edited_here() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "rm -r dir");
    pair.sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
    assert!(!pair.here("dir/other").exists());
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// The same the other way round.
#[test]
fn a_directory_deleted_here_keeps_what_was_edited_there() {
    let pair = Pair::new();
    pair.apart("rm -r dir", "echo theirs >dir/notes");
    pair.sandbox.flush();
    assert_eq!(text(pair.here("dir/notes")), "theirs\n");
    assert!(!pair.there("dir/other").exists());
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// Both sides make a file of the same name with other content.
#[test]
fn the_same_new_name_on_both_sides_is_a_conflict() {
    let pair = Pair::new();
    pair.apart("echo mine >fresh", "echo theirs >fresh");
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("fresh")), "mine\n");
    assert_eq!(text(pair.there("fresh")), "theirs\n");
    let copies = pair.sandbox.conflict_copies(&pair.sandbox.tree());
    assert_eq!(copies.len(), 1);
    assert_eq!(text(&copies[0]), "theirs\n");
}

/// "File against directory is a conflict at that name": both survive somewhere.
#[test]
fn a_file_against_a_directory_loses_neither() {
    let pair = Pair::new();
    pair.apart("echo mine >fresh", "mkdir fresh; echo theirs >fresh/in");
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("fresh")), "mine\n");
    assert_eq!(text(pair.there("fresh/in")), "theirs\n");
    assert_eq!(pair.sandbox.status().conflicts.len(), 1);
}

/// "A new remote version replaces an artefact nobody edited, else adds one."
#[test]
fn a_newer_remote_version_replaces_the_copy_unless_it_was_edited() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair.sandbox
        .sh(&pair.there("dir"), "echo 'theirs again' >notes");
    eventually("the copy is the newer version", PROMPT, || {
        let copies = pair.copies();
        match copies.as_slice() {
            [copy] if text(copy) == "theirs again\n" => Ok(()),
            _ => Err(format!("{copies:?}")),
        }
    });
    fs::write(&pair.copies()[0], "a note of mine\n").unwrap();
    pair.sandbox.sh(&pair.there("dir"), "echo 'a third' >notes");
    eventually("another copy appears", PROMPT, || {
        let mut texts: Vec<_> = pair.copies().iter().map(text).collect();
        texts.sort();
        (texts == ["a note of mine\n", "a third\n"])
            .then_some(())
            .ok_or_else(|| format!("{texts:?}"))
    });
    pair.sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.here("dir/notes")), "mine\n");
}

/// A conflict outlives the daemon: after a crash, and after an unmount.
#[test]
fn a_conflict_survives_crash_and_remount() {
    let pair = Pair::new();
    let sandbox = &pair.sandbox;
    let url = pair.server.url(&sandbox.peer());
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    sandbox.try_flush().expect_code(3);
    sandbox.kill_daemon();
    sandbox.mount_with(&url);
    sandbox.try_flush().expect_code(3);
    sandbox.try_umount();
    sandbox.assert_down();
    sandbox.mount_with(&url);
    sandbox.try_flush().expect_code(3);
    let copies = pair.copies();
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(text(&copies[0]), "theirs\n");
    assert_eq!(text(pair.here("dir/notes")), "mine\n");
    assert_eq!(text(pair.there("dir/notes")), "theirs\n");
    fs::remove_file(&copies[0]).unwrap();
    sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
}

/// "An artefact found missing by a scan resolves nothing."
#[test]
fn a_copy_removed_while_unmounted_resolves_nothing() {
    let pair = Pair::new();
    let sandbox = &pair.sandbox;
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    sandbox.try_flush().expect_code(3);
    sandbox.try_umount();
    sandbox.assert_down();
    fs::remove_file(&pair.copies()[0]).unwrap();
    sandbox.mount_with(pair.server.url(&sandbox.peer()));
    sandbox.try_flush().expect_code(3);
    assert_eq!(text(pair.there("dir/notes")), "theirs\n");
}

/// A name of the greatest length has room for the artefacts' endings too.
#[test]
fn a_conflict_of_the_longest_name_keeps_both() {
    let pair = Pair::new();
    let name = "n".repeat(255);
    pair.apart(
        &format!("echo mine >{name}"),
        &format!("echo theirs >{name}"),
    );
    pair.sandbox.try_flush().expect_code(3);
    let copies = pair.sandbox.conflict_copies(&pair.sandbox.tree());
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(text(&copies[0]), "theirs\n");
    assert_eq!(text(pair.here(&name)), "mine\n");
}

/// Taking the peer's version the way one would with any two files: the copy is moved over
/// the file, and edited further. It is the file from then on, and not an artefact that
/// stays local and that the peer's version would replace.
#[test]
fn moving_the_copy_over_the_file_takes_the_peers_version() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair.apart(
        "cd dir; mv notes.remote.*.conflict notes; echo more >>notes",
        "true",
    );
    pair.sandbox.flush();
    assert_eq!(text(pair.here("dir/notes")), "theirs\nmore\n");
    assert_eq!(text(pair.there("dir/notes")), "theirs\nmore\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// Keeping both by hand: under another name the copy is a file like any other.
#[test]
fn a_copy_under_another_name_is_mirrored() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    pair.sandbox
        .sh(&pair.here("dir"), "mv notes.remote.*.conflict second");
    pair.sandbox.flush();
    assert_eq!(text(pair.there("dir/notes")), "mine\n");
    assert_eq!(text(pair.there("dir/second")), "theirs\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// What somebody wrote into a copy is not left behind unmirrored when the conflict ends.
#[test]
fn an_edited_copy_outlives_its_conflict_as_a_file() {
    let pair = Pair::new();
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    pair.sandbox.try_flush().expect_code(3);
    let copy = pair.copies().remove(0);
    fs::write(&copy, "a note of mine\n").unwrap();
    pair.sandbox.sh(&pair.there("dir"), "echo mine >notes");
    let there = pair.there("dir").join(copy.file_name().unwrap());
    eventually("the edited copy arrives on the peer", PROMPT, || {
        let status = pair.sandbox.status();
        (status.conflicts.is_empty() && there.exists())
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    });
    pair.sandbox.flush();
    assert_eq!(text(&there), "a note of mine\n");
    assert_same(&pair.sandbox.tree(), &pair.sandbox.peer());
}

/// A conflict goes along when its directory gets another name: the artefacts are still the
/// ones on record, and settle it.
#[test]
fn a_conflict_goes_along_with_its_directory() {
    let pair = Pair::new();
    let sandbox = &pair.sandbox;
    pair.apart("echo mine >dir/notes", "echo theirs >dir/notes");
    sandbox.try_flush().expect_code(3);
    let before = pair.copies();
    sandbox.sh(&sandbox.tree(), "mv dir moved");
    sandbox.try_flush().expect_code(3);
    let copies = sandbox.conflict_copies(&pair.here("moved"));
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(copies[0].file_name(), before[0].file_name());
    let status = sandbox.status();
    assert_eq!(status.conflicts.len(), 1, "{status:?}");
    assert_eq!(status.conflicts[0].path, "moved/notes");
    let copy = pair.here(status.conflicts[0].copy.as_deref().unwrap());
    assert_eq!(copy, copies[0]);
    assert_eq!(text(pair.there("moved/notes")), "theirs\n");
    fs::remove_file(copy).unwrap();
    sandbox.flush();
    assert_eq!(text(pair.there("moved/notes")), "mine\n");
    assert_same(&sandbox.tree(), &sandbox.peer());
}
