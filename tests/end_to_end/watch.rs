//! "The agent watches its directory (and falls back to scanning where watching is impossible,
//! saying so), reports changes, and they arrive in the mount."

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use crate::support::{PROMPT, Sandbox, Server, assert_same, wait_until};

/// A mount whose agent lives in a user namespace with a limit of its own.
fn mounted_under(limit: &str, value: u32) -> (Sandbox, Server) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let agent = sandbox.root().join("bin/limited");
    let script = format!(
        "#!/bin/sh\nexport MIRRORFS_STATE='{}'\n\
         exec unshare --user --map-root-user sh -c 'echo {value} >/proc/sys/user/{limit} && exec \"$0\" \"$@\"' '{}' \"$@\"\n",
        sandbox.root().join("agent-state").display(),
        sandbox.program().display()
    );
    fs::write(&agent, script).unwrap();
    fs::set_permissions(&agent, Permissions::from_mode(0o755)).unwrap();
    sandbox.set("MIRRORFS_AGENT", agent);
    sandbox.sh(
        &sandbox.tree(),
        "for i in $(seq 60); do mkdir -p many/d$i; echo $i >many/d$i/file; done",
    );
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    (sandbox, server)
}

/// What happens where nothing watches arrives all the same.
fn changes_arrive(sandbox: &Sandbox) {
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &peer,
        "for i in $(seq 60); do echo changed >many/d$i/file; done
         rm many/d7/file; mkdir many/d8/new; echo x >many/d8/new/x; mv many/d9 many/d10/moved",
    );
    wait_until("the changes arrive without a command", PROMPT, || {
        let shows = |path: &str, text: &str| {
            fs::read_to_string(tree.join(path)).is_ok_and(|found| found == text)
        };
        (1..=60)
            .filter(|i| ![7, 9].contains(i))
            .all(|i| shows(&format!("many/d{i}/file"), "changed\n"))
            && shows("many/d8/new/x", "x\n")
            && shows("many/d10/moved/file", "changed\n")
            && !tree.join("many/d7/file").exists()
            && !tree.join("many/d9").exists()
    });
    sandbox.flush();
    assert_same(&tree, &peer);
}

#[test]
fn where_watches_run_out_it_is_scanned_and_status_says_so() {
    let (sandbox, _server) = mounted_under("max_inotify_watches", 20);
    let why = sandbox.status().peer().scanned_because.clone().unwrap();
    assert!(why.contains("max_user_watches"), "{why}");
    changes_arrive(&sandbox);
    // With fewer directories there are enough again.
    sandbox.sh(&sandbox.tree(), "rm -r many/d[1-5]*");
    sandbox.flush();
    sandbox.status_becomes("it is watched again", |status| {
        status.peer().scanned_because.is_none()
    });
    sandbox.sh(&sandbox.peer(), "echo again >many/d6/file");
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

#[test]
fn where_nothing_can_be_watched_it_is_scanned_and_status_says_so() {
    let (sandbox, _server) = mounted_under("max_inotify_instances", 0);
    let why = sandbox.status().peer().scanned_because.clone().unwrap();
    assert!(why.contains("inotify") || why.contains("watch"), "{why}");
    changes_arrive(&sandbox);
}

/// Each directory is full before anybody can have watched it.
#[test]
fn directories_filled_faster_than_they_are_watched_lose_nothing() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.mount();
    sandbox.sh(
        &peer,
        "for w in 1 2 3; do (
           for i in $(seq 60); do
             mkdir -p w$w/d$i/a/b/c; echo $i >w$w/d$i/a/b/c/f; mv w$w/d$i/a w$w/d$i/z; echo $i >w$w/d$i/z/b/g
           done) & done; wait",
    );
    wait_until("all of it arrives without a command", PROMPT, || {
        ["w1", "w2", "w3"].iter().all(|writer| {
            (1..=60).all(|i| {
                let dir = tree.join(format!("{writer}/d{i}/z/b"));
                dir.join("c/f").exists() && dir.join("g").exists()
            })
        })
    });
    sandbox.flush();
    assert_same(&tree, &peer);
}

/// A directory that moves out takes its watch with it, and one that moves in brings none.
#[test]
fn directories_that_move_in_and_out_are_watched_where_they_are() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let away = sandbox.root().join("away");
    fs::create_dir(&away).unwrap();
    sandbox.mount();
    sandbox.sh(&peer, "mkdir -p d/sub; echo 1 >d/sub/f; echo 1 >stays");
    wait_until("it arrives", PROMPT, || tree.join("d/sub/f").exists());
    for round in 0..10 {
        sandbox.sh(&peer, "mv d ../away/d");
        wait_until("it goes", PROMPT, || !tree.join("d").exists());
        // Nobody's business any more.
        sandbox.sh(
            &away,
            &format!("echo {round} >d/sub/f; mkdir d/outside{round}"),
        );
        sandbox.sh(&peer, "mv ../away/d d");
        wait_until("it comes back as it is", PROMPT, || {
            fs::read_to_string(tree.join("d/sub/f")).is_ok_and(|text| text == format!("{round}\n"))
                && tree.join(format!("d/outside{round}")).exists()
        });
        // And what happens in it from now on is seen.
        sandbox.sh(
            &peer,
            &format!("echo in{round} >d/sub/f; echo x >d/outside{round}/new"),
        );
        wait_until("it is watched again", PROMPT, || {
            fs::read_to_string(tree.join("d/sub/f"))
                .is_ok_and(|text| text == format!("in{round}\n"))
                && tree.join(format!("d/outside{round}/new")).exists()
        });
    }
    sandbox.flush();
    assert_same(&tree, &peer);
}
