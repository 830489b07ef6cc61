//! L2 and "no silence": what `mirrorfs sync --flush` answers, and what `mirrorfs status`
//! shows, in every state.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::first_contact::PROJECT;
use crate::support::{PROMPT, Sandbox, Server, assert_same, wait_until};

fn pair() -> (Sandbox, Server) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    (sandbox, server)
}

/// 0: everything made before the call is on the peer, each time, at once after the change.
#[test]
fn flush_covers_every_change_made_before_it() {
    let (sandbox, server) = pair();
    sandbox.mount_with(server.url(&sandbox.peer()));
    for round in 0..25 {
        let content = format!("{round}").repeat(1000 * round);
        fs::write(sandbox.tree().join("file"), &content).unwrap();
        fs::create_dir(sandbox.tree().join(format!("dir{round}"))).unwrap();
        sandbox.flush();
        assert_eq!(
            fs::read_to_string(sandbox.peer().join("file")).unwrap(),
            content
        );
        assert!(sandbox.peer().join(format!("dir{round}")).is_dir());
    }
}

/// Flush also brings in what was changed on the peer before it was called.
#[test]
fn flush_takes_in_what_changed_on_the_peer_before_it() {
    let (sandbox, server) = pair();
    sandbox.mount_with(server.url(&sandbox.peer()));
    for round in 0..15 {
        fs::write(sandbox.peer().join(format!("f{round}")), "x").unwrap();
        sandbox.flush();
        assert!(
            sandbox.tree().join(format!("f{round}")).exists(),
            "round {round}"
        );
    }
}

/// Flush covers pages of a shared mapping that nobody has written back yet.
#[test]
fn flush_covers_mapped_pages() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "head -c 1000000 /dev/zero >mapped");
    sandbox.mount();
    let script = "
import mmap, sys
file = open('mapped', 'r+b')
pages = mmap.mmap(file.fileno(), 0)
file.close()
for at in range(0, 1000000, 4096):
    pages[at:at + 6] = b'stored'
print('stored', flush=True)
sys.stdin.read()
";
    let mut mapper = sandbox
        .command("python3")
        .args(["-c", script])
        .current_dir(sandbox.tree())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = std::io::BufReader::new(mapper.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
    assert_eq!(line, "stored\n");
    sandbox.flush();
    let there = fs::read(sandbox.peer().join("mapped")).unwrap();
    for at in (0..1_000_000).step_by(4096) {
        assert_eq!(&there[at..at + 6], b"stored", "at {at}");
    }
    drop(mapper.stdin.take());
    mapper.wait().unwrap();
}

/// 4: "peer unreachable (changes are safe in the journal)", soon, and not for ever; 0 once
/// it is back.
#[test]
fn flush_to_an_unreachable_peer_says_4() {
    let (sandbox, server) = pair();
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.link.refuse();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let outcome = sandbox.try_flush().expect_code(4);
    assert!(outcome.took < Duration::from_secs(90), "{outcome}");
    assert!(!outcome.stderr.is_empty(), "{outcome}");
    assert!(!sandbox.peer().join("file").exists());
    server.link.restore();
    sandbox.connected();
    sandbox.flush();
    assert!(sandbox.peer().join("file").exists());
}

/// 4 also when the peer's machine is gone in the middle of the flush.
#[test]
fn flush_whose_peer_goes_away_ends() {
    let (sandbox, server) = pair();
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.link.limit(100_000);
    // A moment at which only the beginning was written may well be there before.
    sandbox.sh(
        &sandbox.tree(),
        "head -c 8000000 /dev/urandom >part; mv part large",
    );
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| sandbox.try_flush());
        let before = server.link.forwarded();
        crate::support::wait_until("it is being sent", Duration::from_secs(60), || {
            server.link.forwarded() > before + 300_000
        });
        server.link.refuse();
        let outcome = flush.join().unwrap();
        assert_eq!(outcome.code, 4, "{outcome}");
    });
    assert!(!sandbox.peer().join("large").exists());
}

/// 5: "timed out with changes pending", at the time that was asked for.
#[test]
fn flush_over_a_link_too_slow_says_5() {
    let (sandbox, server) = pair();
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.link.limit(50_000);
    sandbox.sh(&sandbox.tree(), "head -c 20000000 /dev/urandom >large");
    let tree = sandbox.tree().display().to_string();
    let start = Instant::now();
    sandbox
        .run(["sync", &tree, "--flush", "--timeout", "3s"])
        .expect_code(5);
    let took = start.elapsed();
    assert!(
        took >= Duration::from_secs(3) && took < Duration::from_secs(20),
        "{took:?}"
    );
    let status = sandbox.status();
    assert!(status.peer().pending_changes > 0, "{status:?}");
    assert!(status.peer().pending_bytes > 0, "{status:?}");
    server.link.restore();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// Without a mount flush says so, or does what it promises; it never only pretends.
#[test]
fn flush_without_a_mount_does_not_pretend() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.try_flush().expect_code(1);
    sandbox.mount();
    sandbox.umount();
    sandbox.sh(&sandbox.tree(), "echo y >more; rm file");
    let outcome = sandbox.try_flush();
    sandbox.assert_down();
    if outcome.code == 0 {
        assert_same(&sandbox.tree(), &sandbox.peer());
    } else {
        outcome.expect_code(1).expect_said(&["not mounted"]);
    }
}

/// "`status --json` prints one object. Scripts will depend on it": the same keys with the
/// same types in every state.
#[test]
fn the_status_has_its_shape_in_every_state() {
    let (sandbox, server) = pair();
    let url = server.url(&sandbox.peer());
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(&url);
    sandbox.flush();
    let shape = || {
        let outcome = sandbox.status_json();
        let value: Value = serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|error| panic!("not one object: {error}: {outcome}"));
        check_shape(&value);
        value
    };

    let value = shape();
    assert_eq!(value["mount"]["state"], "mounted");
    assert_eq!(
        value["mirror"]["tree"],
        sandbox.tree().display().to_string()
    );
    assert_eq!(value["mirror"]["mode"], "two-way");
    let peer = &value["peers"][0];
    assert_eq!(peer["state"], "connected", "{peer}");
    assert_eq!(peer["url"], url.as_str(), "{peer}");
    assert_eq!(peer["transport"], "libssh2", "{peer}");
    assert_eq!(peer["pending_changes"], 0, "{peer}");
    assert_eq!(peer["pending_bytes"], 0, "{peer}");
    assert!(peer["last_error"].is_null(), "{peer}");
    assert!(peer["halt_reason"].is_null(), "{peer}");
    assert_eq!(peer["applied_seq"], peer["durable_seq"], "{peer}");
    let id = value["mirror"]["id"].as_str().unwrap().to_owned();
    assert!(
        id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{id}"
    );

    server.link.refuse();
    sandbox.sh(&sandbox.tree(), "echo local >docs/long; mkfifo fifo");
    sandbox.sh(&sandbox.peer(), "echo remote >docs/long");
    sandbox.status_becomes("the peer is unreachable", |status| {
        status.peer().state == "unreachable"
    });
    let value = shape();
    assert!(
        value["journal"]["pending_changes"].as_u64().unwrap() > 0,
        "{value}"
    );
    assert!(!value["peers"][0]["last_error"].is_null(), "{value}");

    server.link.restore();
    sandbox.connected();
    sandbox.try_flush().expect_code(3);
    let value = shape();
    assert_eq!(value["conflicts"].as_array().unwrap().len(), 1, "{value}");
    assert_eq!(value["held_back"][0]["path"], "fifo", "{value}");

    sandbox.try_umount();
    sandbox.assert_down();
    let value = shape();
    assert_eq!(value["mount"]["state"], "unmounted");
    assert_eq!(value["mirror"]["id"], id.as_str());
}

fn check_shape(value: &Value) {
    let is = |value: &Value, path: &str, wanted: &str| {
        let pointer = format!("/{}", path.replace('.', "/"));
        let found = value
            .pointer(&pointer)
            .unwrap_or_else(|| panic!("no {path} in {value:#}"));
        let fits = match wanted {
            "text" => found.is_string(),
            "text or null" => found.is_string() || found.is_null(),
            "number" => found.is_u64(),
            "list" => found.is_array(),
            _ => true,
        };
        assert!(fits, "{path} is {found}, not {wanted}");
    };
    for (path, wanted) in [
        ("mirror.id", "text"),
        ("mirror.name", "text"),
        ("mirror.tree", "text"),
        ("mirror.mode", "text"),
        ("mount.state", "text"),
        ("mount.reason", "text or null"),
        ("journal.seq", "anything"),
        ("journal.pending_changes", "number"),
        ("journal.pending_bytes", "number"),
        ("peers", "list"),
        ("conflicts", "list"),
        ("held_back", "list"),
        ("problems", "list"),
    ] {
        is(value, path, wanted);
    }
    for peer in value["peers"].as_array().unwrap() {
        for (path, wanted) in [
            ("name", "text"),
            ("url", "text"),
            ("state", "text"),
            ("transport", "text or null"),
            ("applied_seq", "anything"),
            ("durable_seq", "anything"),
            ("pending_changes", "number"),
            ("pending_bytes", "number"),
            ("last_error", "text or null"),
            ("halt_reason", "text or null"),
        ] {
            is(peer, path, wanted);
        }
        let state = peer["state"].as_str().unwrap();
        let states = ["connected", "connecting", "unreachable", "paused", "halted"];
        assert!(states.contains(&state), "{peer}");
    }
    let state = value["mount"]["state"].as_str().unwrap();
    assert!(["mounted", "unmounted"].contains(&state), "{value}");
    for (list, keys) in [
        ("conflicts", ["path", "copy"]),
        ("held_back", ["path", "rule"]),
        ("problems", ["path", "error"]),
    ] {
        for item in value[list].as_array().unwrap() {
            is(item, keys[0], "text");
            is(item, keys[1], "text or null");
        }
    }
}

/// The status for people names the tree, the peer and its state.
#[test]
fn the_status_for_people_says_what_matters() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount();
    sandbox.flush();
    let tree = sandbox.tree().display().to_string();
    let peer = sandbox.peer().display().to_string();
    let outcome = sandbox.run(["status", &tree]).ok();
    outcome.expect_said(&[&tree, &peer, "mounted", "connected"]);
    // Inside the tree no directory needs to be named.
    let inside = crate::support::program::run(
        sandbox
            .command(sandbox.program())
            .arg("status")
            .current_dir(sandbox.tree().join("docs")),
        Duration::from_secs(60),
    );
    inside.ok().expect_said(&[&tree]);
}

/// "`umount` flushes what it can, says what it could not, leaves plain files." What it
/// could not ship arrives after the next mount.
#[test]
fn umount_says_what_it_could_not_ship() {
    let (sandbox, server) = pair();
    let url = server.url(&sandbox.peer());
    sandbox.sh(&sandbox.tree(), PROJECT);
    sandbox.mount_with(&url);
    sandbox.sh(&sandbox.tree(), "echo shipped >shipped");
    sandbox.umount();
    assert!(sandbox.peer().join("shipped").exists());

    sandbox.mount_with(&url);
    sandbox.connected();
    server.link.refuse();
    sandbox.sh(&sandbox.tree(), "echo x >unshipped; rm docs/nothing");
    let outcome = sandbox.try_umount().expect_code(4);
    assert!(!outcome.said().trim().is_empty(), "{outcome}");
    sandbox.assert_down();
    assert_eq!(
        fs::read_to_string(sandbox.tree().join("unshipped")).unwrap(),
        "x\n"
    );
    assert!(!sandbox.tree().join("docs/nothing").exists());

    server.link.restore();
    sandbox.mount_with(&url);
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert!(sandbox.peer().join("unshipped").exists());
    assert!(!sandbox.peer().join("docs/nothing").exists());
}

/// A tree in use is not taken away from under its user, and umount says so; afterwards
/// everything is as before.
#[test]
fn umount_of_a_tree_in_use_says_so() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.mount();
    let user = fs::File::open(sandbox.tree().join("file")).unwrap();
    let outcome = sandbox.try_umount();
    assert_ne!(outcome.code, 0, "{outcome}");
    assert!(sandbox.is_mounted());
    sandbox.sh(&sandbox.tree(), "echo y >more");
    sandbox.flush();
    assert!(sandbox.peer().join("more").exists());
    drop(user);
    sandbox.umount();
}

/// "`mirrorfs demo`: mounts, edits, shows the peer catching up, kills the daemon, recovers,
/// flushes, compares; cleans up."
#[test]
fn the_demo_runs_and_cleans_up() {
    let mut sandbox = Sandbox::new();
    let temporary = sandbox.outside();
    sandbox.set("TMPDIR", &temporary);
    let outcome = sandbox.run(["demo"]).ok();
    assert!(outcome.stdout.lines().count() > 5, "{outcome}");
    let left: Vec<_> = fs::read_dir(&temporary)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    sandbox.assert_down();
}

/// "--foreground stays", and ends as `umount` does when it is asked to by a signal.
#[test]
fn a_mount_in_the_foreground_ends_cleanly_on_a_signal() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let mut foreground = sandbox
        .command(sandbox.program())
        .args(["mount", "--foreground"])
        .args([sandbox.tree(), sandbox.peer()])
        .spawn()
        .unwrap();
    wait_until("it is mounted", PROMPT, || sandbox.is_mounted());
    sandbox.sh(&sandbox.tree(), "echo y >more");
    assert!(
        foreground.try_wait().unwrap().is_none(),
        "it has not stayed"
    );
    let pid = rustix::process::Pid::from_child(&foreground);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = crate::support::program::wait(&mut foreground, PROMPT).expect("it ends");
    assert_eq!(crate::support::program::code(status), 0);
    sandbox.assert_down();
    assert!(sandbox.peer().join("more").exists());
}
