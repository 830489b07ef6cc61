//! "Power loss proves nothing": what a power loss left is neither a deletion nor an edit.
//! What the peer had acknowledged comes back from it, and what is left goes to the trash;
//! where it had not, what is here stands, and stays here while it may be torn.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::compare::read;
use crate::support::disk::Disk;
use crate::support::program::run;
use crate::support::{PROMPT, Role, Sandbox, Server, assert_same, wait_until};

/// The setting that names the machine's life, for a test.
const BOOT: &str = "MIRRORFS_BOOT_ID";

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes the dead mount away, as a reboot does.
fn take_away_the_mount(sandbox: &Sandbox) {
    let mut umount = Command::new("umount");
    run(umount.arg("-l").arg(sandbox.tree()), PROMPT).ok();
}

/// Makes the journal durable up to here, with a sync of something that is not looked at.
fn settle_the_journal(sandbox: &Sandbox) {
    let script = "import os; os.mkdir('synced'); os.fsync(os.open('synced', os.O_RDONLY))";
    let mut python = sandbox.command("python3");
    run(
        python.args(["-c", script]).current_dir(sandbox.tree()),
        PROMPT,
    )
    .ok();
}

fn text(path: PathBuf) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The files that a power loss leaves, each made by hand, with the machine's next life.
#[test]
fn what_a_power_loss_left_is_neither_a_deletion_nor_an_edit() {
    let mut sandbox = Sandbox::new();
    sandbox.set(BOOT, "the first");
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir -p acked/dir edited
         for f in same empty zeros gone dir/gone; do echo agreed >acked/$f; done
         for f in same empty short gone back; do echo agreed >edited/$f; done",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    // What follows does not get to the peer before the power fails.
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.run(["mount", tree.to_str().unwrap()]);
    sandbox.sh(
        &tree,
        "mkdir new
         for f in same empty short gone back; do echo 'edited since' >edited/$f; done
         for f in same empty short gone; do echo 'made since' >new/$f; done
         : >new/meant",
    );
    settle_the_journal(&sandbox);
    sandbox.kill_daemon();
    take_away_the_mount(&sandbox);
    // The disk as it is afterwards.
    sandbox.sh(
        &tree,
        "rm -r acked/dir; rm acked/gone edited/gone new/gone
         for f in acked/empty edited/empty new/empty; do : >$f; done
         head -c 7 /dev/zero >acked/zeros
         printf edi >edited/short; printf mad >new/short
         echo agreed >edited/back",
    );
    sandbox.sh(sandbox.root(), "mv away peer");
    sandbox.set(BOOT, "the second");
    sandbox
        .run(["mount", tree.to_str().unwrap()])
        .expect_said(&["the machine went down"]);
    let flushed = sandbox.try_flush().expect_code(1);

    for file in ["same", "empty", "zeros", "gone", "dir/gone"] {
        for side in [&tree, &peer] {
            let found = text(side.join("acked").join(file));
            assert_eq!(found.as_deref(), Some("agreed\n"), "{file}: {flushed}");
        }
    }
    let edited = |side: &Path, file: &str| text(side.join("edited").join(file)).unwrap();
    let new = |side: &Path, file: &str| text(side.join("new").join(file));
    for side in [&tree, &peer] {
        assert_eq!(edited(side, "same"), "edited since\n");
        assert_eq!(edited(side, "gone"), "agreed\n");
        assert_eq!(edited(side, "back"), "agreed\n");
        assert_eq!(new(side, "same").as_deref(), Some("made since\n"));
        assert_eq!(new(side, "meant").as_deref(), Some(""));
        assert_eq!(new(side, "gone"), None);
    }
    // What is torn and nobody has a better version of stands, and does not travel.
    assert_eq!(
        (edited(&tree, "empty"), edited(&tree, "short")),
        (String::new(), "edi".into())
    );
    assert_eq!(
        (edited(&peer, "empty"), edited(&peer, "short")),
        ("agreed\n".into(), "agreed\n".into())
    );
    assert_eq!(new(&tree, "empty").as_deref(), Some(""));
    assert_eq!((new(&peer, "empty"), new(&peer, "short")), (None, None));
    let problems = sandbox.status().problems;
    let mut listed: Vec<_> = problems
        .iter()
        .map(|problem| problem.path.as_str())
        .collect();
    listed.sort_unstable();
    let torn = ["edited/empty", "edited/short", "new/empty", "new/short"];
    assert_eq!(listed, torn, "{problems:?}");
    assert!(sandbox.conflict_copies(&tree.join("edited")).is_empty());

    // It stays so, also in another life of the daemon.
    sandbox.kill_daemon();
    sandbox.run(["mount", tree.to_str().unwrap()]);
    sandbox.try_flush().expect_code(1);
    assert_eq!(edited(&peer, "empty"), "agreed\n");
    // Somebody looks after them: what is right travels, what is not is put right, or goes.
    sandbox.sh(
        &tree,
        "touch edited/empty new/short; echo again >edited/short; rm new/empty",
    );
    sandbox.flush();
    assert_eq!(edited(&peer, "empty"), "");
    assert_eq!(edited(&peer, "short"), "again\n");
    assert_eq!(new(&peer, "short").as_deref(), Some("mad"));
    assert_same(&tree, &peer);
    sandbox.umount();
    // The remnants of what came back; the peer has lost nothing but what was edited since.
    let trash = sandbox.reserved_contents(&tree, "trash");
    for remnant in [&b""[..], &[0; 7]] {
        assert!(trash.iter().any(|kept| kept == remnant), "{trash:?}");
    }
}

/// The peer's user has worked on as well: both versions are kept.
#[test]
fn an_edit_of_the_peer_beside_what_is_torn_is_a_conflict() {
    let mut sandbox = Sandbox::new();
    sandbox.set(BOOT, "the first");
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "for f in acked torn missing; do echo agreed >$f; done",
    );
    sandbox.mount();
    sandbox.flush();
    sandbox.umount();
    sandbox.sh(sandbox.root(), "mv peer away");
    sandbox.run(["mount", tree.to_str().unwrap()]);
    sandbox.sh(
        &tree,
        "for f in torn missing; do echo 'edited since' >$f; done",
    );
    settle_the_journal(&sandbox);
    sandbox.kill_daemon();
    take_away_the_mount(&sandbox);
    sandbox.sh(&tree, ": >torn; : >acked; rm missing");
    sandbox.sh(sandbox.root(), "mv away peer");
    sandbox.sh(
        &peer,
        "for f in acked torn missing; do echo theirs >$f; done",
    );
    sandbox.set(BOOT, "the second");
    sandbox.run(["mount", tree.to_str().unwrap()]);
    sandbox.try_flush().expect_code(3);
    for side in [&tree, &peer] {
        assert_eq!(text(side.join("acked")).as_deref(), Some("theirs\n"));
        assert_eq!(text(side.join("missing")).as_deref(), Some("theirs\n"));
    }
    assert_eq!(text(tree.join("torn")).as_deref(), Some(""));
    assert_eq!(text(peer.join("torn")).as_deref(), Some("theirs\n"));
    let copies = sandbox.conflict_copies(&tree);
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(text(copies[0].clone()).as_deref(), Some("theirs\n"));
    sandbox.try_umount();
}

/// A tree and its state on a disk in a file, with a peer on another machine. What is in the
/// file has reached the disk.
struct Machine {
    sandbox: Sandbox,
    server: Server,
    mounts: Vec<Disk>,
}

impl Machine {
    fn start(image: &str, sandbox: Sandbox, server: Server) -> Self {
        let root = sandbox.root().to_owned();
        let point = root.join("disk");
        // The disk is not synced by itself meanwhile.
        let image = root.join(image).display().to_string();
        let disk = Disk::mounted(&["-o", "loop,commit=600", &image], &point);
        let bound = |name: &str| {
            fs::create_dir_all(point.join(name)).unwrap();
            let from = point.join(name).display().to_string();
            Disk::mounted(&["--bind", &from], &root.join(name))
        };
        let mounts = vec![bound("tree"), bound("state"), disk];
        Self {
            sandbox,
            server,
            mounts,
        }
    }

    fn mount(&self) {
        self.sandbox
            .mount_with(self.server.url(&self.sandbox.peer()));
    }

    /// Cuts the power, and starts with what had reached the disk.
    fn cut_the_power(mut self) -> Self {
        let root = self.sandbox.root().to_owned();
        // The daemon writes nothing while the disk is copied: it has left every system call.
        for daemon in self.sandbox.processes_of(Role::Daemon) {
            let pid = daemon.pid.to_string();
            run(Command::new("kill").args(["-STOP", &pid]), PROMPT).ok();
            wait_until("the daemon stands still", PATIENCE, || has_stopped(&pid));
        }
        self.sandbox.sh(&root, "cp --sparse=always image copy");
        self.sandbox.kill_daemon();
        wait_until("nothing of it runs", PATIENCE, || {
            self.sandbox.processes().is_empty()
        });
        take_away_the_mount(&self.sandbox);
        for disk in self.mounts.drain(..) {
            disk.vanish();
        }
        self.sandbox.set(BOOT, "the next");
        Self::start("copy", self.sandbox, self.server)
    }
}

/// Whether no thread of a process runs, or is in the kernel.
fn has_stopped(pid: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().all(|thread| {
        fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| {
            let state = stat.rsplit(')').next().unwrap_or_default();
            // Those that work for io_uring are the kernel's, and are not stopped.
            state.trim_start().starts_with('T') || stat.contains("(iou-")
        })
    })
}

/// Everything was acknowledged, and some of it had reached the disk: none of it is lost.
#[test]
fn what_the_peer_had_comes_back_after_a_power_cut() {
    let mut sandbox = Sandbox::new();
    sandbox.set(BOOT, "the first");
    let server = Server::start(&mut sandbox);
    let root = sandbox.root().to_owned();
    drop(Disk::new(&root.join("image"), &root.join("disk"), 48));
    let machine = Machine::start("image", sandbox, server);
    let sandbox = &machine.sandbox;
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(
        &tree,
        "mkdir -p old/dir; for n in $(seq 20); do echo $n >old/$n; echo $n >old/dir/$n; done",
    );
    machine.mount();
    sandbox.flush();
    sandbox.sh(&root, "sync -f disk");
    sandbox.sh(
        &tree,
        "for n in 1 2 3; do echo again >old/$n; echo saved >t; mv t old/1$n; rm old/dir/$n; done
         mv old/4 old/moved; mv old/dir renamed; ln -s target link
         mkdir -p new/dir; for n in $(seq 20); do head -c 9000 /dev/urandom >new/dir/$n; done
         git init -q repo; cd repo; cp ../old/1 .; git add .; git commit -qm one",
    );
    sandbox.flush();
    let before = read(&peer);
    let machine = machine.cut_the_power();
    let sandbox = &machine.sandbox;
    machine.mount();
    sandbox.flush();
    let after = read(&peer);
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    assert!(before == after, "the peer has changed");
    assert_same(&tree, &peer);
    sandbox.sh(
        &tree.join("repo"),
        "git fsck --strict && git status --short",
    );
    let status = sandbox.status();
    assert!(
        status.conflicts.is_empty() && status.problems.is_empty(),
        "{status:?}"
    );
    sandbox.try_umount().ok();
    sandbox.assert_recorded();
}
