//! Files and names that break tools: what is carried arrives exactly, what is not is
//! listed, and nothing odd stops the rest.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{
    PROMPT, Random, Sandbox, Server, assert_same, assert_same_except, wait_until,
};

/// "FIFOs, sockets and devices stay local and are listed."
#[test]
fn special_files_stay_local_and_are_listed() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir dir; mkfifo dir/before; echo x >dir/file",
    );
    sandbox.mount();
    sandbox.sh(
        &sandbox.tree(),
        "mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'",
    );
    sandbox.flush();
    let status = sandbox.status();
    let mut held: Vec<_> = status
        .held_back
        .iter()
        .map(|item| item.path.as_str())
        .collect();
    held.sort_unstable();
    assert_eq!(held, ["dir/before", "fifo", "socket"], "{status:?}");
    assert!(status.held_back.iter().all(|item| !item.rule.is_empty()));
    for name in ["dir/before", "fifo", "socket"] {
        assert!(!sandbox.peer().join(name).exists());
    }
    // They work.
    sandbox.sh(
        &sandbox.tree(),
        "echo through >fifo & read line <fifo; [ \"$line\" = through ]",
    );
    // Held-back files are never deleted by a deletion from the other side.
    sandbox.sh(&sandbox.peer(), "rm -r dir");
    wait_until("the deletion arrives", PROMPT, || {
        !sandbox.tree().join("dir/file").exists()
    });
    sandbox.flush();
    assert!(sandbox.tree().join("dir/before").exists());
    sandbox.sh(&sandbox.tree(), "rm fifo socket; rm -r dir");
    sandbox.flush();
    assert!(sandbox.status().held_back.is_empty());
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// A FIFO here is nothing to the peer, and still it is not replaced by what the peer puts
/// under its name: that waits until somebody makes room.
#[test]
fn a_special_file_is_not_replaced_by_what_the_peer_has() {
    use std::os::unix::fs::FileTypeExt;
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "mkfifo pipe; echo x >file");
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.peer(), "echo theirs >pipe");
    sandbox
        .try_flush()
        .expect_code(1)
        .expect_said(&["pipe", "in the way", "move it elsewhere"]);
    let kind = fs::symlink_metadata(sandbox.tree().join("pipe")).unwrap();
    assert!(kind.file_type().is_fifo());
    sandbox.sh(&sandbox.tree(), "mv pipe elsewhere");
    wait_until("the peer's file arrives", PROMPT, || {
        fs::read(sandbox.tree().join("pipe")).is_ok_and(|content| content == b"theirs\n")
    });
    sandbox.flush();
    assert!(sandbox.status().problems.is_empty());
    sandbox.umount();
}

/// "Ignored or held-back files are never deleted by a deletion from the other side; a
/// directory left with nothing else counts as absent and is not brought back."
#[test]
fn a_directory_left_with_what_stays_local_is_not_brought_back() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir -p d/sub; mkfifo d/sub/pipe; echo x >d/x; echo x >d/sub/x",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&peer, "rm -r d");
    sandbox.flush();
    assert_eq!(sandbox.sh(&tree, "find d | sort"), "d\nd/sub\nd/sub/pipe\n");
    assert!(!peer.join("d").exists());
}

/// A special file on the peer stays there, and does not come in.
#[test]
fn special_files_of_the_peer_stay_there() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    sandbox.sh(&sandbox.peer(), "mkfifo fifo; echo x >file");
    wait_until("the file arrives", PROMPT, || {
        sandbox.tree().join("file").exists()
    });
    sandbox.try_flush();
    assert!(fs::symlink_metadata(sandbox.tree().join("fifo")).is_err());
    assert!(fs::symlink_metadata(sandbox.peer().join("fifo")).is_ok());
    // The name is taken there: a file here cannot silently replace it.
    fs::write(sandbox.tree().join("fifo"), "a file").unwrap();
    let outcome = sandbox.try_flush();
    assert_ne!(outcome.code, 0, "{outcome}");
    assert_eq!(
        fs::read_to_string(sandbox.tree().join("fifo")).unwrap(),
        "a file"
    );
    // 1: not everything is mirrored.
    sandbox.try_umount().expect_code(1);
    sandbox.assert_recorded();
}

fn odd_names() -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = [
        &b"\xff\xfe not UTF-8"[..],
        b"new\nline",
        b"tab\tand \x1b[31m escape",
        b" leading and trailing ",
        b"-rf",
        b"\\backslash\\",
        b"quote'\"`$(touch x)",
        b"...",
        b".hidden",
        b"*?[glob]",
        b"a.remote.20200101T000000Z.conflict",
        b"a.20200101T000000Z.conflict-info",
        b"CASE",
        b"case",
        b"nfc-\xc3\xa9",
        b"nfd-e\xcc\x81",
        b".mirrorfs.0123456789abcdef0123456789abcdef",
        b".fuse_hidden0000000000000001",
        b"aux",
        b"colon:name",
    ]
    .iter()
    .map(|name| name.to_vec())
    .collect();
    names.push(vec![b'n'; 255]);
    names.push([vec![b'm'; 253], b"\xc3\xa9".to_vec()].concat());
    names
}

fn make_odd_names(dir: &Path) {
    for (number, name) in odd_names().into_iter().enumerate() {
        let name = OsStr::from_bytes(&name);
        fs::write(dir.join(name), format!("{number}")).unwrap();
        let inner = dir.join("dirs").join(name);
        fs::create_dir_all(&inner).unwrap();
        std::os::unix::fs::symlink(name, inner.join(name)).unwrap();
    }
}

/// "Names are bytes, not UTF-8", up to 255 of them, and compared exactly. Made before the
/// mount, in the mount, and on the peer.
#[test]
fn odd_names_travel_both_ways() {
    let sandbox = Sandbox::new();
    for name in ["before", "inside", "there"] {
        fs::create_dir(sandbox.tree().join(name)).unwrap();
    }
    make_odd_names(&sandbox.tree().join("before"));
    sandbox.mount();
    sandbox.flush();
    make_odd_names(&sandbox.tree().join("inside"));
    make_odd_names(&sandbox.peer().join("there"));
    sandbox.flush();
    sandbox.converges();
    assert_same(&sandbox.tree(), &sandbox.peer());
    for dir in ["before", "inside", "there"] {
        assert!(
            crate::support::compare::differences(
                &crate::support::compare::read(&sandbox.tree().join(dir)),
                &crate::support::compare::read(&sandbox.tree().join("before")),
            )
            .iter()
            .all(|difference| !difference.starts_with("only on"))
        );
    }
    let status = sandbox.status();
    assert!(
        status.conflicts.is_empty() && status.problems.is_empty(),
        "{status:?}"
    );
    // Replaced and removed by their exact names.
    for name in odd_names() {
        let name = OsStr::from_bytes(&name);
        fs::write(sandbox.tree().join("there").join(name), "changed").unwrap();
        fs::remove_file(sandbox.peer().join("inside").join(name)).unwrap();
    }
    sandbox.flush();
    sandbox.converges();
    assert_eq!(
        fs::read_dir(sandbox.tree().join("inside")).unwrap().count(),
        1
    );
    sandbox.umount();
}

/// Deeper than a path may be long: only directories relative to directories get there.
#[test]
fn paths_longer_than_the_system_takes_at_once() {
    let sandbox = Sandbox::new();
    let script = "
import os
os.chdir(os.environ['WHERE'])
for level in range(60):
    os.mkdir('d' * 100)
    os.chdir('d' * 100)
    open(f'file{level}', 'w').write(str(level))
";
    let check = "
import os, sys
os.chdir(os.environ['WHERE'])
for level in range(60):
    os.chdir('d' * 100)
    assert open(f'file{level}').read() == str(level), level
";
    let run = |dir: &Path, script: &str| {
        let outcome = crate::support::program::run(
            sandbox
                .command("python3")
                .args(["-c", script])
                .env("WHERE", dir),
            PROMPT,
        );
        outcome.ok();
    };
    sandbox.mount();
    run(&sandbox.tree(), script);
    sandbox.sh(&sandbox.tree(), "echo x >shallow");
    sandbox.flush();
    run(&sandbox.peer(), check);
    fs::rename(
        sandbox.tree().join("d".repeat(100)),
        sandbox.tree().join("e".repeat(100)),
    )
    .unwrap();
    sandbox.flush();
    assert!(sandbox.peer().join("e".repeat(100)).join("file0").exists());
    assert!(!sandbox.peer().join("d".repeat(100)).exists());
    sandbox.umount();
}

/// Holes: the content is equal to the byte, and a hole does not become a disk full of
/// zeros.
#[test]
fn a_large_sparse_file_stays_sparse() {
    const SIZE: u64 = 300 << 20;
    let sandbox = Sandbox::new();
    let make = |path: &Path| {
        let file = File::create(path).unwrap();
        file.set_len(SIZE).unwrap();
        for at in [0, 70 << 20, (150 << 20) + 4097, SIZE - 5] {
            file.write_all_at(b"data!", at).unwrap();
        }
    };
    make(&sandbox.tree().join("before"));
    sandbox.mount();
    make(&sandbox.tree().join("inside"));
    make(&sandbox.peer().join("there"));
    sandbox.flush();
    for name in ["before", "inside", "there"] {
        let (here, there) = (sandbox.tree().join(name), sandbox.peer().join(name));
        sandbox.sh(
            sandbox.root(),
            &format!("cmp {} {}", here.display(), there.display()),
        );
        for path in [here, there] {
            let blocks = fs::metadata(&path).unwrap().blocks() * 512;
            assert!(blocks < 8 << 20, "{} takes {blocks} bytes", path.display());
        }
    }
    sandbox.umount();
}

/// "No torn files: a name on a peer shows complete content that existed on the other side."
/// A file that is rewritten in place all the time, faster than it can be sent.
#[test]
fn a_file_rewritten_while_it_is_sent_shows_only_whole_versions() {
    const SIZE: usize = 3 << 20;
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.mount_with(server.url(&sandbox.peer()));
    server.link.limit(4 << 20);
    let done = AtomicBool::new(false);
    let path = sandbox.tree().join("versions");
    let seen = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut version = 0u8;
            let mut file = 0;
            while !done.load(Ordering::Relaxed) {
                // A whole version appears by one rename, in the way of editors.
                version = version % 250 + 1;
                file += 1;
                let new = sandbox.tree().join(format!("new{}", file % 2));
                fs::write(&new, vec![version; SIZE]).unwrap();
                fs::rename(&new, &path).unwrap();
            }
        });
        let mut versions = std::collections::BTreeSet::new();
        wait_until("three versions have shown on the peer", PROMPT * 2, || {
            if let Ok(content) = fs::read(sandbox.peer().join("versions")) {
                assert_eq!(content.len(), SIZE, "a torn file");
                let first = content[0];
                assert!(content.iter().all(|byte| *byte == first), "a mixed file");
                versions.insert(first);
            }
            versions.len() >= 3
        });
        done.store(true, Ordering::Relaxed);
        versions.len()
    });
    assert!(seen >= 3);
    server.link.restore();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// The same, written in place: what shows on the peer is a moment of the file, in which
/// each earlier write is there if a later one is.
#[test]
fn a_file_appended_to_all_the_time_shows_its_moments() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    // The kernel hands a write over in two where it crosses from a page that is not cached
    // whole into the next: the tree does have a moment between them.
    const PAGE: usize = 4096;
    let done = AtomicBool::new(false);
    let line = |number: u64| format!("line {number:020}\n");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (first, second) = (
                File::create(sandbox.tree().join("first")).unwrap(),
                File::create(sandbox.tree().join("second")).unwrap(),
            );
            let mut number = 0;
            while !done.load(Ordering::Relaxed) {
                // The second file never leads the first.
                let text = line(number);
                let at = number * text.len() as u64;
                first.write_all_at(text.as_bytes(), at).unwrap();
                second.write_all_at(text.as_bytes(), at).unwrap();
                number += 1;
            }
        });
        // Also if what follows fails: or else the writer would never end.
        let _end = End(&done);
        let mut moments = std::collections::BTreeSet::new();
        wait_until("twenty moments have shown", PROMPT * 2, || {
            let peer = sandbox.peer();
            // The second is read before the first: it may only be shorter.
            let second = fs::read_to_string(peer.join("second")).unwrap_or_default();
            let first = fs::read_to_string(peer.join("first")).unwrap_or_default();
            for (number, text) in (0..).zip(second.split_inclusive('\n')) {
                let whole = line(number);
                let half = !text.ends_with('\n') && second.len().is_multiple_of(PAGE);
                assert!(
                    text == whole || half && whole.starts_with(text),
                    "{text:?} in place of {whole:?}, {} bytes",
                    second.len()
                );
            }
            assert!(
                second.len() <= first.len(),
                "the second file leads the first"
            );
            moments.insert(second.len());
            moments.len() >= 20
        });
    });
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// Tells a writer to end once it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A writer that never pauses starves neither flush nor the rest of the tree.
#[test]
fn a_writer_that_never_pauses_does_not_starve_flush() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::create(sandbox.tree().join("busy")).unwrap();
            let mut random = Random::new("busy");
            while !done.load(Ordering::Relaxed) {
                let at = random.below(1 << 20);
                file.write_all_at(&random.next().to_le_bytes(), at).unwrap();
            }
        });
        for round in 0..5 {
            let name = format!("quiet{round}");
            fs::write(sandbox.tree().join(&name), "x").unwrap();
            sandbox.flush();
            assert!(sandbox.peer().join(&name).exists());
        }
        done.store(true, Ordering::Relaxed);
    });
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// Modes and times at their limits; files that even their owner may not touch.
#[test]
fn modes_and_times_at_their_limits() {
    let sandbox = Sandbox::new();
    let make = |dir: &Path| {
        sandbox.sh(
            dir,
            "for mode in 000 111 444 200 777 644; do echo $mode >f$mode; chmod $mode f$mode; done
             mkdir closed; echo x >closed/x; chmod 500 closed; mkdir sticky; chmod 1777 sticky
             touch -d '1969-12-31 23:59:58.5' old; touch -d '1901-12-14 01:02:03.999999999' older
             touch -d '2200-01-01 00:00:00.000000001' future; touch -d '1970-01-01 00:00:00' zero",
        );
    };
    fs::create_dir(sandbox.tree().join("before")).unwrap();
    make(&sandbox.tree().join("before"));
    sandbox.mount();
    for dir in ["inside", "there"] {
        fs::create_dir(sandbox.tree().join(dir)).unwrap();
    }
    sandbox.flush();
    make(&sandbox.tree().join("inside"));
    make(&sandbox.peer().join("there"));
    sandbox.flush();
    sandbox.converges();
    assert_same(&sandbox.tree(), &sandbox.peer());
    for (name, time) in [("old", (-2, 500_000_000)), ("future", (7_258_118_400, 1))] {
        for dir in ["before", "inside", "there"] {
            let metadata = fs::metadata(sandbox.tree().join(dir).join(name)).unwrap();
            assert_eq!(
                (metadata.mtime(), metadata.mtime_nsec()),
                time,
                "{dir}/{name}"
            );
        }
    }
    sandbox.umount();
}

/// Both names of a hard link arrive, and go on showing the same when one is written to.
#[test]
fn hard_links_keep_showing_the_same() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "mkdir d; echo 1 >a; ln a b; ln a d/c");
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(&sandbox.tree(), "echo 2 >>b; ln a later; rm a");
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    for name in ["b", "d/c", "later"] {
        assert_eq!(
            fs::read_to_string(sandbox.peer().join(name)).unwrap(),
            "1\n2\n"
        );
    }
    sandbox.umount();
}

/// A symlink is data: it is never followed, wherever it points, not even to delete or to
/// write behind it.
#[test]
fn a_directory_swapped_for_a_link_deletes_nothing_behind_it() {
    let sandbox = Sandbox::new();
    let outside = sandbox.outside();
    fs::write(outside.join("precious"), "x").unwrap();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir dir; echo 1 >dir/precious; echo 2 >dir/b",
    );
    sandbox.mount();
    sandbox.flush();
    let link = format!("rm -r dir; ln -s {} dir", outside.display());
    sandbox.sh(&sandbox.peer(), &link);
    wait_until("the link arrives", PROMPT, || {
        sandbox.tree().join("dir").is_symlink()
    });
    sandbox.flush();
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "x");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    sandbox.sh(&sandbox.tree(), "rm dir; mkdir dir; echo 3 >dir/precious");
    sandbox.flush();
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "x");
    assert_same_except(&sandbox.tree(), &sandbox.peer(), |_| false);
    sandbox.umount();
}

/// Open and unlinked files, renames over open files: the programs that hold them notice
/// nothing, also when it is the peer's change that removes the name.
#[test]
fn an_open_file_outlives_its_name() {
    use std::io::{Read, Seek, Write};
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo old >file");
    sandbox.mount();
    sandbox.flush();
    let mut held = File::open(sandbox.tree().join("file")).unwrap();
    sandbox.sh(&sandbox.peer(), "rm file");
    wait_until("the deletion arrives", PROMPT, || {
        !sandbox.tree().join("file").exists()
    });
    let mut text = String::new();
    held.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old\n");
    let path = sandbox.tree().join("unlinked");
    let mut own = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    fs::remove_file(&path).unwrap();
    own.write_all(&vec![7; 100_000]).unwrap();
    own.rewind().unwrap();
    let mut back = Vec::new();
    own.read_to_end(&mut back).unwrap();
    assert_eq!(back, vec![7; 100_000]);
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    drop((held, own));
    sandbox.umount();
}
