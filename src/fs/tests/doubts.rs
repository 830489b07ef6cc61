//! What is in doubt after a power loss: what had changed since lower was synced, unless its
//! program had synced it or it holds what is recorded, and what the scan finds to differ.

use crate::fs::{Caller, Missing, Recorded, Suspect, Suspects};
use crate::tree::{Content, ContentHash};

use super::Fixture;

/// What is in doubt after `damage`, when lower was synced at a change.
fn after(t: &mut Fixture, synced: u64, damage: &str) -> Suspects {
    let before = t.journal.snapshot().unwrap();
    let status = std::process::Command::new("sh")
        .args(["-ec", damage])
        .current_dir(&t.tree)
        .status()
        .unwrap();
    assert!(status.success());
    t.reopen();
    let was = Recorded {
        before: &before,
        synced,
        scanned_from: before.n(),
        times_tell: false,
    };
    t.fs.suspects(&t.journal, &was).unwrap()
}

fn unlink(t: &Fixture, parent: crate::tree::Ino, name: &str) {
    t.fs.unlink(&Caller::own(), parent, name.as_bytes())
        .unwrap();
}

fn now(t: &Fixture) -> u64 {
    t.journal.snapshot().unwrap().n()
}

/// By path, as far as it has one.
fn named<'a>(t: &Fixture, found: &'a Suspects, name: &str) -> Option<&'a Suspect> {
    let node = t
        .journal
        .snapshot()
        .unwrap()
        .at(&super::path(name))
        .unwrap()?;
    found.present.iter().find(|suspect| suspect.node == node.id)
}

fn missing(found: &Suspects) -> Vec<String> {
    let name = |missing: &Missing| missing.path.as_ref().map(ToString::to_string);
    let mut names: Vec<_> = found
        .missing
        .iter()
        .map(|missing| name(missing).unwrap_or_else(|| "removed".to_owned()))
        .collect();
    names.sort();
    names
}

/// Writes down what a file is known to hold, as a round does.
fn hashed(t: &Fixture, name: &str, content: &[u8]) -> Content {
    let node = t
        .journal
        .snapshot()
        .unwrap()
        .at(&super::path(name))
        .unwrap()
        .unwrap();
    let hash = ContentHash::of(content);
    t.journal
        .update(mirrorfs_journal::Durability::Normal, move |update| {
            update.set_hash(node.id, node.content_n, hash)
        })
        .unwrap();
    Content::File {
        size: content.len() as u64,
        hash,
    }
}

#[test]
fn what_holds_what_is_recorded_is_not_in_doubt() {
    let mut t = Fixture::new();
    let root = t.root();
    t.create(root, "known", b"content");
    t.create(root, "unknown", b"content");
    t.create(root, "empty", b"");
    hashed(&t, "known", b"content");
    assert_eq!(after(&mut t, 0, ":"), Suspects::default());
}

#[test]
fn what_differs_from_the_record_is() {
    let mut t = Fixture::new();
    let root = t.root();
    for name in ["empty", "zeros", "other", "gone"] {
        t.create(root, name, b"content");
    }
    let dir = t.mkdir(root, "dir");
    t.create(dir, "in", b"content");
    let known = hashed(&t, "empty", b"content");
    let synced = now(&t);
    let found = after(
        &mut t,
        synced,
        ": >empty; head -c 7 /dev/zero >zeros; echo >other; rm -r gone dir
         echo new >new; : >blank",
    );
    assert_eq!(missing(&found), ["dir", "dir/in", "gone"]);
    for name in ["empty", "zeros", "other", "blank"] {
        assert!(named(&t, &found, name).unwrap().torn, "{name}");
    }
    assert_eq!(named(&t, &found, "empty").unwrap().last, Some(known));
    let new = named(&t, &found, "new").unwrap();
    assert!(!new.torn && !new.gone && new.last.is_none());
}

/// Times and sizes are those on record: the disk had the inode, and not the content.
#[test]
fn a_content_that_never_came_is_found_by_reading() {
    let mut t = Fixture::new();
    let root = t.root();
    t.create(root, "older", b"content");
    t.create(root, "known", b"content");
    t.create(root, "unknown", &[0; 5000]);
    hashed(&t, "known", b"not what is there");
    hashed(&t, "older", b"not what is there");
    let older = t.find("older");
    t.fs.fsync(older, false).unwrap();
    let found = after(&mut t, 0, ":");
    assert!(named(&t, &found, "known").unwrap().torn);
    assert!(named(&t, &found, "unknown").unwrap().torn);
    assert!(
        named(&t, &found, "older").is_none(),
        "its program had synced it"
    );
    assert_eq!(found.present.len(), 2);
}

#[test]
fn what_was_synced_before_is_as_it_was_meant() {
    let mut t = Fixture::new();
    let root = t.root();
    t.create(root, "zeros", &[0; 5000]);
    t.create(root, "removed", b"content");
    unlink(&t, root, "removed");
    let synced = now(&t);
    assert_eq!(after(&mut t, synced, ":"), Suspects::default());
}

#[test]
fn a_removal_counts_only_once_it_is_on_the_disk() {
    let mut t = Fixture::new();
    let root = t.root();
    let dir = t.mkdir(root, "dir");
    for parent in [root, dir] {
        t.create(parent, "a", b"content");
    }
    let synced = now(&t);
    unlink(&t, root, "a");
    unlink(&t, dir, "a");
    t.fs.fsync(dir, false).unwrap();
    let found = after(&mut t, synced, ":");
    assert_eq!(missing(&found), ["removed"], "the directory was synced");
}

/// The record knows better than the disk: what comes back by itself was meant to go.
#[test]
fn what_came_back_is_known_for_it() {
    let mut t = Fixture::new();
    let root = t.root();
    let dir = t.mkdir(root, "dir");
    t.create(dir, "in", b"content");
    t.create(root, "moved", b"content");
    let synced = now(&t);
    unlink(&t, dir, "in");
    t.fs.rmdir(&Caller::own(), root, b"dir").unwrap();
    let flags = rustix::fs::RenameFlags::empty();
    t.fs.rename(&Caller::own(), root, b"moved", root, b"there", flags)
        .unwrap();
    let found = after(
        &mut t,
        synced,
        "mkdir dir; echo content >dir/in; mv there moved; echo new >dir/new",
    );
    for name in ["dir", "dir/in", "moved"] {
        assert!(named(&t, &found, name).unwrap().gone, "{name}");
    }
    assert!(!named(&t, &found, "dir/new").unwrap().gone);
    assert!(missing(&found).contains(&"there".to_owned()));
}
