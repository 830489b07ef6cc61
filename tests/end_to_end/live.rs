//! "Changes on either side arrive on the other without a command."

use std::fs;
use std::time::Duration;

use crate::first_contact::PROJECT;
use crate::support::{PROMPT, Sandbox, Server, assert_same, wait_until};

/// Every kind of change that is carried, as a user makes it. Each works on what the ones
/// before have left.
const CHANGES: &[(&str, &str)] = &[
    ("creation", "mkdir -p new/dir; echo hello >new/dir/file"),
    (
        "an edit in place",
        "echo more >>docs/long; printf X | dd of=docs/long bs=1 seek=7 conv=notrunc status=none",
    ),
    (
        "a truncation",
        "truncate -s 100 docs/long; truncate -s 5000 new/dir/file",
    ),
    (
        "a save through rename",
        "echo saved >src/.main.tmp; mv src/.main.tmp src/main.rs",
    ),
    ("a mode", "chmod 640 src/main.rs; chmod 711 docs"),
    (
        "a time",
        "touch -d '1999-12-31 23:59:59.987654321' src/main.rs",
    ),
    ("a rename", "mv docs/nothing src/something"),
    (
        "a directory's rename",
        "mv src/deep moved; echo inside >moved/er/late",
    ),
    ("a rename over another file", "mv src/something src/main.rs"),
    (
        "symbolic links",
        "ln -s x new/link; ln -sfn elsewhere dangling; ln -s 'a b' 'name with spaces'",
    ),
    ("empty directories", "mkdir -p hollow/a hollow/b"),
    (
        "extended attributes",
        "setfattr -n user.one -v 1 src/main.rs; setfattr -x user.note docs/long",
    ),
    (
        "a file that becomes a directory",
        "rm src/main.rs; mkdir src/main.rs; echo in >src/main.rs/x",
    ),
    (
        "a directory that becomes a link",
        "rm -r hollow/a; ln -s ../docs hollow/a",
    ),
    (
        "a swap of two names",
        "mv new/dir/file t; mv docs/long new/dir/file; mv t docs/long",
    ),
    ("a change of case", "mv docs DOCS"),
    ("deletions", "rm -r moved; rm absolute"),
    (
        "a tree made at once",
        "for i in $(seq 200); do mkdir -p many/$((i%7)); echo $i >many/$((i%7))/$i; done",
    ),
    // Not so much of the tree that deletions found on a peer would brake.
    ("a part of it gone at once", "rm -r many/0 many/1"),
];

/// Each kind of change made in the mount shows on the peer.
#[test]
fn changes_in_the_mount_arrive_on_the_peer() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount();
    sandbox.converges();
    for (what, change) in CHANGES {
        eprintln!("{what}");
        sandbox.sh(&sandbox.tree(), change);
        sandbox.converges();
    }
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    let status = sandbox.status();
    assert!(
        status.conflicts.is_empty() && status.problems.is_empty(),
        "{status:?}"
    );
    sandbox.umount();
    for side in [sandbox.tree(), sandbox.peer()] {
        let left = sandbox.reserved_contents(&side, "staging");
        assert!(left.is_empty(), "{} files left in staging", left.len());
    }
}

/// Each kind of change made on the peer shows in the mount.
#[test]
fn changes_on_the_peer_arrive_in_the_mount() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.peer(), PROJECT);
    sandbox.mount();
    sandbox.converges();
    for (what, change) in CHANGES {
        eprintln!("{what}");
        sandbox.sh(&sandbox.peer(), change);
        sandbox.converges();
        // Not undone by an echo.
        sandbox.flush();
        sandbox.converges();
    }
    assert_same(&sandbox.tree(), &sandbox.peer());
    let status = sandbox.status();
    assert!(
        status.conflicts.is_empty() && status.problems.is_empty(),
        "{status:?}"
    );
    sandbox.umount();
    for side in [sandbox.tree(), sandbox.peer()] {
        let left = sandbox.reserved_contents(&side, "staging");
        assert!(left.is_empty(), "{} files left in staging", left.len());
    }
}

/// A change on the peer is in the mount with its content at once when its name is: no
/// program in the mount sees a half-written file, and inotify watchers there are told.
#[test]
fn a_watcher_in_the_mount_sees_the_peers_change_whole() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.tree().join("watched"), vec![b'a'; 100_000]).unwrap();
    sandbox.mount();
    sandbox.flush();
    let script = "
import ctypes, os, struct, sys, select
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, b'.', 0x80 | 0x100 | 0x8 | 0x2) >= 0
print('ready', flush=True)
while True:
    if not select.select([fd], [], [], 60)[0]:
        sys.exit('no event')
    os.read(fd, 65536)
    content = open('watched').read()
    assert set(content) in ({'a'}, {'b'}) and len(content) == 100000, 'torn'
    if content[0] == 'b':
        print('seen')
        break
";
    let mut watcher = sandbox
        .command("python3")
        .args(["-c", script])
        .current_dir(sandbox.tree())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut lines = std::io::BufReader::new(watcher.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut lines, &mut said).unwrap();
    assert_eq!(said, "ready\n");
    fs::write(sandbox.peer().join("new"), vec![b'b'; 100_000]).unwrap();
    fs::rename(sandbox.peer().join("new"), sandbox.peer().join("watched")).unwrap();
    std::io::BufRead::read_line(&mut lines, &mut said).unwrap();
    assert_eq!(said, "ready\nseen\n");
    assert!(watcher.wait().unwrap().success());
    sandbox.umount();
}

/// A watcher of the directory and of the file itself is told when the peer's change is
/// there, not later; what was open stays the old file, as with a local rename.
#[test]
fn a_watcher_of_a_file_is_told_when_the_peer_replaces_it() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo old >watched; echo old >removed");
    sandbox.mount();
    sandbox.flush();
    let script = r"
import ctypes, os, select, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
ATTRIB, MOVED_TO, DELETE, DELETE_SELF = 0x4, 0x80, 0x200, 0x400
watch = libc.inotify_init()
names = {libc.inotify_add_watch(watch, name, mask): name.decode() for name, mask in (
    (b'.', MOVED_TO | DELETE), (b'watched', ATTRIB | DELETE_SELF), (b'removed', ATTRIB | DELETE_SELF))}
assert len(names) == 3 and -1 not in names
held = {name: open(name) for name in ('watched', 'removed')}
seen = {}
def look():
    # When a program without a watch sees it.
    while open('watched').read() != 'new\n': pass
    seen['watched'] = time.monotonic()
    while os.path.exists('removed'): pass
    seen['removed'] = time.monotonic()
looker = threading.Thread(target=look, daemon=True); looker.start()
print('ready', flush=True)
told, deadline = {}, time.monotonic() + 60
def wait_for(*wanted):
    while not all(one in told for one in wanted):
        assert select.select([watch], [], [], max(0, deadline - time.monotonic()))[0], told
        events = os.read(watch, 65536)
        while events:
            wd, mask, cookie, length = struct.unpack_from('iIII', events)
            name = events[16:16 + length].rstrip(b'\0').decode()
            for bit in (ATTRIB, MOVED_TO, DELETE, DELETE_SELF):
                if mask & bit: told.setdefault((names[wd], bit, name), time.monotonic())
            events = events[16 + length:]
wait_for(('.', MOVED_TO, 'watched'), ('watched', ATTRIB, ''), ('.', DELETE, 'removed'), ('removed', ATTRIB, ''))
looker.join(60)
for name, event in (('watched', ('.', MOVED_TO, 'watched')), ('removed', ('.', DELETE, 'removed'))):
    late = told[event] - seen[name]
    print(name, 'told', round(late * 1000, 1), 'ms after it was there', file=sys.stderr)
    assert late < 30, late
for name, file in held.items():
    assert file.read() == 'old\n' and os.fstat(file.fileno()).st_nlink == 0, name
assert ('watched', DELETE_SELF, '') not in told
for file in held.values(): file.close()
# The file itself ends with its last user.
wait_for(('watched', DELETE_SELF, ''), ('removed', DELETE_SELF, ''))
print('seen')
";
    let mut watcher = sandbox
        .command("python3")
        .args(["-c", script])
        .current_dir(sandbox.tree())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut lines = std::io::BufReader::new(watcher.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut lines, &mut said).unwrap();
    assert_eq!(said, "ready\n");
    sandbox.sh(
        &sandbox.peer(),
        "echo new >../outside/t; mv ../outside/t watched; rm removed",
    );
    std::io::BufRead::read_line(&mut lines, &mut said).unwrap();
    assert_eq!(said, "ready\nseen\n");
    assert!(watcher.wait().unwrap().success());
    sandbox.umount();
}

/// What a user of the peer deletes the moment it arrives, before the agent has looked at
/// what it placed, is deleted here too, and does not stay unnoticed for ever.
#[test]
fn what_is_deleted_as_soon_as_it_arrives_is_deleted() {
    let sandbox = Sandbox::new();
    // Enough of them for the deletions not to be taken for a wipe.
    sandbox.sh(
        &sandbox.tree(),
        "for i in $(seq 400); do echo k >keep$i; done",
    );
    sandbox.mount();
    sandbox.flush();
    let tree = sandbox.tree();
    for i in 0..100 {
        let (here, there) = (
            tree.join(format!("f{i}")),
            sandbox.peer().join(format!("f{i}")),
        );
        // At once with its content: an edit of what was deleted would be kept.
        fs::write(tree.join("new"), "x").unwrap();
        fs::rename(tree.join("new"), &here).unwrap();
        let begin = std::time::Instant::now();
        while fs::remove_file(&there).is_err() {
            assert!(begin.elapsed() < PROMPT, "{} never came", there.display());
        }
    }
    sandbox.flush();
    let left = |dir: &std::path::Path| -> usize {
        let names = fs::read_dir(dir).unwrap().flatten();
        names
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"f"))
            .count()
    };
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert_eq!(left(&tree), left(&sandbox.peer()));
}

/// "Own changes bounced back as if they were the other side's (echo)": once both sides
/// are the same, nothing but pings crosses the link, and no number moves.
#[test]
fn nothing_bounces_back() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.sh(&sandbox.tree(), "echo 1 >>docs/long");
    sandbox.flush();
    sandbox.sh(&sandbox.peer(), "echo 2 >>docs/long; mv src/deep deeper");
    sandbox.converges();
    sandbox.flush();
    let before = (sandbox.status().journal.seq, server.link.forwarded());
    // The one thing here that has to take its time: that nothing happens in it.
    std::thread::sleep(Duration::from_secs(5));
    let after = (sandbox.status().journal.seq, server.link.forwarded());
    assert_eq!(before.0, after.0, "the journal moved by itself");
    assert!(
        after.1 - before.1 < 20_000,
        "{} bytes crossed an idle link",
        after.1 - before.1
    );
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// Edits of different files on both sides at the same time all arrive, and none is undone
/// by a stale report.
#[test]
fn both_sides_work_at_once() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "for i in $(seq 60); do echo 0 >f$i; done");
    sandbox.mount();
    sandbox.flush();
    let work = |parity: u32| {
        format!(
            "for round in $(seq 15); do for i in $(seq {parity} 2 60); do
               echo $round >f$i.tmp; mv f$i.tmp f$i; done; done"
        )
    };
    std::thread::scope(|scope| {
        scope.spawn(|| sandbox.sh(&sandbox.tree(), &work(1)));
        scope.spawn(|| sandbox.sh(&sandbox.peer(), &work(2)));
    });
    sandbox.flush();
    sandbox.converges();
    for i in 1..=60 {
        for side in [sandbox.tree(), sandbox.peer()] {
            let content = fs::read_to_string(side.join(format!("f{i}"))).unwrap();
            assert_eq!(content, "15\n", "f{i} in {}", side.display());
        }
    }
    assert!(sandbox.status().conflicts.is_empty());
    sandbox.umount();
}

/// A mount, an unmount, changes on both sides of a plain directory, and a mount again:
/// the scan finds them with the right base.
#[test]
fn changes_made_while_unmounted_are_found() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount();
    sandbox.umount();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.sh(
        &sandbox.tree(),
        "rm docs/nothing; echo here >>docs/long; mkdir made-here",
    );
    sandbox.sh(
        &sandbox.peer(),
        "rm src/main.rs; echo there >>src/deep/er/noise; mkdir made-there",
    );
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(!sandbox.tree().join("src/main.rs").exists());
    assert!(!sandbox.peer().join("docs/nothing").exists());
    assert!(sandbox.tree().join("made-there").is_dir());
    assert!(sandbox.peer().join("made-here").is_dir());
    assert!(sandbox.status().conflicts.is_empty());
}

/// What a peer's change deletes or replaces goes to the trash.
#[test]
fn what_the_peer_deletes_goes_to_the_trash() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "echo precious >deleted; echo older >replaced; echo keep >other",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.sh(
        &sandbox.peer(),
        "rm deleted; echo newer >../outside/t; mv ../outside/t replaced",
    );
    wait_until("the peer's changes arrive", PROMPT, || {
        !sandbox.tree().join("deleted").exists()
            && fs::read_to_string(sandbox.tree().join("replaced")).unwrap() == "newer\n"
    });
    // Nothing is truncated: a version that was cut before its write would be one, too.
    sandbox.sh(
        &sandbox.tree(),
        "echo newest >new; mv new replaced; rm other",
    );
    sandbox.flush();
    sandbox.umount();
    let mut here = sandbox.reserved_contents(&sandbox.tree(), "trash");
    here.sort();
    assert_eq!(here, [b"older\n".to_vec(), b"precious\n".to_vec()]);
    let mut there = sandbox.reserved_contents(&sandbox.peer(), "trash");
    // A cut may have fallen between the making of `new` and what was written to it: that
    // was a version as well.
    there.retain(|content| !content.is_empty());
    there.sort();
    assert_eq!(there, [b"keep\n".to_vec(), b"newer\n".to_vec()]);
}
