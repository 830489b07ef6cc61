//! "Failing clearly, each with a cause, the path, and what to do." A refusal also leaves
//! no mount, no process and no damage behind.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::program::run;
use crate::support::{Outcome, Sandbox, Server, assert_same};

/// Tries to mount `tree` with `peer` and expects to be refused in these words. `mount`
/// may also succeed and show the peer as refused, if the tree itself can be worked in;
/// that is not for the cases that use this.
#[track_caller]
fn refused(sandbox: &Sandbox, tree: &Path, peer: impl AsRef<OsStr>, words: &[&str]) -> Outcome {
    let outcome = sandbox.run([OsStr::new("mount"), tree.as_ref(), peer.as_ref()]);
    assert!(outcome.code != 0, "not refused: {outcome}");
    let outcome = outcome.expect_said(words);
    assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    outcome
}

#[test]
fn a_usage_error_is_2() {
    let sandbox = Sandbox::new();
    sandbox.run(["mount"]).expect_code(2);
    sandbox.run(["nonsense"]).expect_code(2);
    sandbox
        .run(["sync", "--flush", "--timeout", "soon"])
        .expect_code(2);
    sandbox
        .run(["--help"])
        .ok()
        .expect_said(&["mount", "status", "sync", "umount"]);
}

#[test]
fn what_is_no_directory_is_refused() {
    let sandbox = Sandbox::new();
    let file = sandbox.root().join("file");
    fs::write(&file, "x").unwrap();
    let path = file.display().to_string();
    refused(&sandbox, &file, sandbox.peer(), &[&path, "not a directory"]).expect_code(1);
    let missing = sandbox.root().join("missing");
    let path = missing.display().to_string();
    refused(&sandbox, &missing, sandbox.peer(), &[&path]).expect_code(1);
    sandbox.assert_down();
}

#[test]
fn a_peer_path_without_its_parent_is_refused() {
    let sandbox = Sandbox::new();
    let peer = sandbox.root().join("no/such/dir");
    let parent = sandbox.root().join("no/such").display().to_string();
    refused(&sandbox, &sandbox.tree(), &peer, &[&parent]);
    assert!(!sandbox.root().join("no").exists());
    sandbox.assert_down();
}

#[test]
fn a_peer_path_without_its_parent_is_refused_behind_ssh() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let peer = sandbox.root().join("no/such/dir");
    let parent = sandbox.root().join("no/such").display().to_string();
    refused(&sandbox, &sandbox.tree(), server.url(&peer), &[&parent]);
    sandbox.assert_down();
}

#[test]
fn a_tree_inside_a_mounted_one_is_refused() {
    let sandbox = Sandbox::new();
    let inner = sandbox.tree().join("inner");
    fs::create_dir(&inner).unwrap();
    sandbox.mount();
    let tree = sandbox.tree().display().to_string();
    let other = sandbox.root().join("other-peer");
    refused(&sandbox, &inner, &other, &[&tree]);
    assert!(!other.exists());
    sandbox.flush();
}

#[test]
fn a_state_directory_inside_the_tree_is_refused() {
    let mut sandbox = Sandbox::new();
    let state = sandbox.tree().join("state");
    sandbox.set("MIRRORFS_STATE", &state);
    let path = state.display().to_string();
    refused(
        &sandbox,
        &sandbox.tree(),
        sandbox.peer(),
        &[&path, "MIRRORFS_STATE"],
    );
    assert!(!sandbox.is_mounted());
}

#[test]
fn a_peer_that_is_the_tree_itself_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file; mkdir sub");
    let tree = sandbox.tree();
    refused(&sandbox, &tree, &tree, &[&tree.display().to_string()]);
    let sub = tree.join("sub");
    refused(&sandbox, &tree, &sub, &[&sub.display().to_string()]);
    refused(
        &sandbox,
        &tree,
        sandbox.root(),
        &[&sandbox.root().display().to_string()],
    );
    sandbox.assert_down();
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "x\n");
}

#[test]
fn without_dev_fuse_it_says_so() {
    let sandbox = Sandbox::new();
    let script = format!(
        "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && chmod 666 /dev/null &&
         exec {} mount {} {}",
        sandbox.program().display(),
        sandbox.tree().display(),
        sandbox.peer().display()
    );
    let outcome = run(
        sandbox.command("unshare").args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
        ]),
        Duration::from_secs(60),
    );
    outcome.expect_code(1).expect_said(&["/dev/fuse"]);
    assert!(sandbox.processes().is_empty(), "{:?}", sandbox.processes());
}

/// "A second mount of the same tree (says which process holds it)."
#[test]
fn a_second_mount_of_the_same_tree_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.mount();
    let pid = sandbox.processes_of(crate::support::process::Role::Daemon)[0]
        .pid
        .to_string();
    refused(&sandbox, &sandbox.tree(), sandbox.peer(), &[&pid]).expect_code(1);
    // The first goes on.
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.flush();
    sandbox.umount();
    sandbox.mount();
}

/// Many at once: exactly one wins, and it works.
#[test]
fn of_many_mounts_at_once_one_wins() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let codes: Vec<i32> = std::thread::scope(|scope| {
        let attempts: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| sandbox.try_mount(sandbox.peer()).code))
            .collect();
        attempts
            .into_iter()
            .map(|attempt| attempt.join().unwrap())
            .collect()
    });
    let winners = codes.iter().filter(|code| **code == 0).count();
    assert_eq!(winners, 1, "{codes:?}");
    assert_eq!(
        crate::support::process::mounts_below(&sandbox.tree()).len(),
        1
    );
    sandbox.flush();
    sandbox.umount();
}

/// "A peer directory belongs to one mirror."
#[test]
fn a_directory_of_another_mirror_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.mount();
    sandbox.flush();
    let stranger = Sandbox::new();
    stranger.sh(&stranger.tree(), "echo y >other");
    let outcome = stranger.try_mount(sandbox.peer());
    if outcome.code == 0 {
        // The tree can be worked in; the peer is what is refused.
        let status = stranger.status_becomes("the peer is refused", |status| {
            status.peer().state == "halted"
        });
        let reason = status.peer().halt_reason.clone().unwrap_or_default();
        assert!(
            reason.contains("another mirror") || reason.contains("belongs to mirror"),
            "{reason}"
        );
        assert_ne!(stranger.try_flush().code, 0);
    } else {
        outcome.expect_said(&["belongs to"]);
    }
    assert!(!sandbox.peer().join("other").exists());
    assert!(!stranger.tree().join("file").exists());
    sandbox.sh(&sandbox.tree(), "echo z >more");
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// "Unknown host key (never accepted silently)."
#[test]
fn an_unknown_host_key_is_never_accepted() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let url = server.url(&sandbox.peer());
    for transport in ["libssh2", "ssh"] {
        sandbox.set("MIRRORFS_TRANSPORT", transport);
        server.know_host(false);
        refused(&sandbox, &sandbox.tree(), &url, &["host key", "127.0.0.1"]).expect_code(1);
        assert_eq!(fs::read_to_string(server.known_hosts()).unwrap(), "");
        server.know_another_key();
        refused(&sandbox, &sandbox.tree(), &url, &["key", "changed"]).expect_code(1);
    }
    assert_eq!(fs::read_dir(sandbox.peer()).unwrap().count(), 0);
    assert!(!sandbox.home().join(".ssh/known_hosts").exists());
    sandbox.assert_down();
    server.know_host(true);
    sandbox.mount_with(&url);
    sandbox.flush();
}

/// A host whose key changes between two connections: the mount goes on, nothing is sent,
/// and status says why.
#[test]
fn a_host_key_that_changes_later_stops_the_link() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    server.know_another_key();
    server.link.cut();
    sandbox.sh(&sandbox.tree(), "echo x >file");
    let status = sandbox.status_becomes("the key is refused", |status| {
        let peer = status.peer();
        [&peer.last_error, &peer.halt_reason]
            .into_iter()
            .flatten()
            .any(|text| text.to_lowercase().contains("key of 127.0.0.1"))
    });
    assert_ne!(status.peer().state, "connected");
    assert!([4, 6, 1].contains(&sandbox.try_flush().code));
    assert!(!sandbox.peer().join("file").exists());
}

/// "Wrong user."
#[test]
fn a_user_who_may_not_log_in_is_reported() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url = server.url_of("nosuchuser", &sandbox.peer());
    refused(&sandbox, &sandbox.tree(), url, &["nosuchuser"]).expect_code(1);
    sandbox.assert_down();
}

/// "Agent of another protocol", a program that is no agent, and one that is not there.
#[test]
fn what_is_no_agent_of_ours_is_reported() {
    use std::os::unix::fs::PermissionsExt;
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let url = server.url(&sandbox.peer());
    let agent = sandbox.root().join("bin/other-agent");
    sandbox.set("MIRRORFS_AGENT", &agent);
    refused(&sandbox, &sandbox.tree(), &url, &["other-agent"]).expect_code(1);
    for (script, words) in [
        (
            "echo 'Welcome to this machine!'; cat >/dev/null",
            "mirrorfs",
        ),
        ("printf 'mfs\\377'; cat >/dev/null", "protocol"),
        (
            "echo 'the disk is on fire' >&2; exit 1",
            "the disk is on fire",
        ),
    ] {
        fs::write(&agent, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        refused(&sandbox, &sandbox.tree(), &url, &[words]).expect_code(1);
    }
    sandbox.assert_down();
}

/// The agent believes nobody: what is no session ends it with an error, at once.
#[test]
fn an_agent_fed_with_garbage_ends() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.peer().join("file"), "x").unwrap();
    for garbage in [
        "",
        "GET / HTTP/1.1\\r\\n\\r\\n",
        "mfs\\001\\377\\377\\377\\377garbage",
        "mfs\\001\\0\\0\\0\\0",
    ] {
        let script = format!(
            "printf '{garbage}' | timeout 30 {} agent --stdio {}",
            sandbox.program().display(),
            sandbox.peer().display()
        );
        let outcome = run(
            sandbox.command("sh").args(["-c", &script]),
            Duration::from_secs(60),
        );
        assert!(outcome.code != 124, "it waits for ever: {outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    }
    assert_eq!(
        fs::read_to_string(sandbox.peer().join("file")).unwrap(),
        "x"
    );
}
