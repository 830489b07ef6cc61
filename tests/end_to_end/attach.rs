//! "Either side dials: `mirrorfs attach VM:DIR LOCALDIR`, run on the host, reaches into the
//! VM and makes the host's directory a peer of the mount there." The tree stands for the
//! VM, the directory `host` for the host; they have state directories of their own, and
//! only the host has a key.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::first_contact::PROJECT;
use crate::peers::become_same;
use crate::support::program::run;
use crate::support::{Outcome, PROMPT, Sandbox, Server, assert_same, wait_until};

/// A host beside the sandbox's VM.
pub struct Host {
    dir: PathBuf,
    state: PathBuf,
    relay: PathBuf,
    url: String,
}

impl Host {
    pub fn of(sandbox: &Sandbox, server: &Server) -> Self {
        let at = |name: &str| sandbox.root().join(name);
        let relay = at("bin/relay");
        let script = format!(
            "#!/bin/sh\nexport MIRRORFS_STATE='{}'\nexec '{}' \"$@\"\n",
            sandbox.state().display(),
            sandbox.program().display()
        );
        fs::write(&relay, script).unwrap();
        fs::set_permissions(&relay, PermissionsExt::from_mode(0o755)).unwrap();
        Self {
            dir: at("host"),
            state: at("host-state"),
            relay,
            url: server.url(&sandbox.tree()),
        }
    }

    fn command(&self, sandbox: &Sandbox) -> Command {
        let mut command = sandbox.command(sandbox.program());
        command
            .env("MIRRORFS_STATE", &self.state)
            .env("MIRRORFS_AGENT", &self.relay);
        command
    }

    fn run<A: AsRef<OsStr>>(
        &self,
        sandbox: &Sandbox,
        arguments: impl IntoIterator<Item = A>,
    ) -> Outcome {
        let mut command = self.command(sandbox);
        run(command.args(arguments), Duration::from_secs(120))
    }

    pub fn attach(&self, sandbox: &Sandbox) -> Outcome {
        self.attach_with(sandbox, &["--symlinks=all"])
    }

    fn attach_with(&self, sandbox: &Sandbox, flags: &[&str]) -> Outcome {
        let dir = self.dir.display().to_string();
        let named = ["attach", "--detach", "--name", "host", &self.url, &dir];
        self.run(sandbox, named.iter().chain(flags))
    }

    fn flush(&self, sandbox: &Sandbox) -> Outcome {
        let dir = self.dir.display().to_string();
        self.run(sandbox, ["sync", &dir, "--flush", "--timeout", "60s"])
    }

    fn at_dir(&self, sandbox: &Sandbox, command: &str) -> Outcome {
        self.run(sandbox, [command, &self.dir.display().to_string()])
    }

    fn pid(&self, sandbox: &Sandbox) -> i32 {
        let dir = self.dir.display().to_string();
        let status = self.run(sandbox, ["status", "--json", &dir]).stdout;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["pid"].as_i64().unwrap().try_into().unwrap()
    }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn vm() -> (Sandbox, Server, Host) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    let host = Host::of(&sandbox, &server);
    sandbox.sh(&sandbox.tree(), PROJECT);
    (sandbox, server, host)
}

fn mount(sandbox: &Sandbox) {
    sandbox
        .run([OsStr::new("mount"), sandbox.tree().as_ref()])
        .ok();
}

/// A machine that is worked in is trusted less than the one that keeps the copy: links that
/// lead out of the directory are not made there unless somebody says so.
#[test]
fn links_that_leave_the_directory_are_held_back_on_the_host() {
    let (sandbox, _server, host) = vm();
    sandbox.sh(
        &sandbox.tree(),
        "ln -s /etc/passwd out; ln -s .. up; ln -s docs in; echo x >last",
    );
    mount(&sandbox);
    host.attach_with(&sandbox, &[]).ok();
    let is_there = |name: &str| fs::symlink_metadata(host.dir.join(name)).is_ok();
    wait_until("the rest arrives", PROMPT, || is_there("last"));
    assert_eq!(host.flush(&sandbox).code, 1);
    assert!(is_there("in") && !is_there("out") && !is_there("up"));
    let problems = sandbox.status().problems;
    for name in ["out", "up"] {
        let of_it = problems.iter().find(|problem| problem.path == name);
        assert!(
            of_it.is_some_and(|it| it.error.contains("--symlinks")),
            "{problems:?}"
        );
    }
    // Nor does one come to lead out by being moved.
    sandbox.sh(
        &sandbox.tree(),
        "rm out up; mkdir -p deep/er/still; ln -s ../../../last deep/er/still/link",
    );
    host.flush(&sandbox);
    assert!(is_there("deep/er/still/link"));
    sandbox.sh(&sandbox.tree(), "mv deep/er/still still; echo x >later");
    assert_eq!(host.flush(&sandbox).code, 1);
    assert!(is_there("later") && !is_there("still/link"));
    sandbox.sh(&sandbox.tree(), "ln -s /etc/passwd out; ln -s .. up");

    host.at_dir(&sandbox, "detach").ok();
    host.attach(&sandbox).ok();
    wait_until("all links are made", PROMPT, || {
        is_there("out") && is_there("up")
    });
    assert_eq!(host.flush(&sandbox).code, 0);
    assert_same(&sandbox.tree(), &host.dir);
    host.at_dir(&sandbox, "detach").ok();
    sandbox.try_umount();
}

/// Changes go both ways; a flush run on either side gives L2; a cut link is made again by
/// the host; when the host goes away the mount goes on, and what was changed meanwhile
/// arrives when it is back, as the same peer.
#[test]
fn a_host_attaches_its_directory_to_a_mount() {
    let (sandbox, server, host) = vm();
    let tree = sandbox.tree();
    let refused = host.attach(&sandbox);
    assert_ne!(refused.code, 0);
    mount(&sandbox);

    let said = host.attach(&sandbox).ok();
    assert!(said.stdout.contains("as its peer host"), "{said}");
    assert_ne!(host.attach(&sandbox).code, 0, "attached twice");
    host.flush(&sandbox).ok();
    assert_same(&tree, &host.dir);
    let status = sandbox.connected();
    assert_eq!(status.peer().name, "host");
    assert_eq!(status.peer().transport.as_deref(), Some("attached"));
    let told = host.at_dir(&sandbox, "status").ok().stdout;
    assert!(
        told.contains("attached") && told.contains("libssh2"),
        "{told}"
    );

    sandbox.sh(&tree, "echo vm >>docs/long; mv src/deep moved");
    sandbox.sh(&host.dir, "echo host >>docs/nothing; rm src/main.rs");
    sandbox.flush();
    assert_same(&tree, &host.dir);

    let connections = server.link.accepted();
    server.link.cut();
    sandbox.sh(&tree, "echo after the cut >>docs/long");
    host.flush(&sandbox).ok();
    assert!(server.link.accepted() > connections);
    assert_same(&tree, &host.dir);

    // The host goes away without a word.
    kill(host.pid(&sandbox));
    sandbox.sh(&tree, "echo alone >alone; rm docs/second-name");
    sandbox.try_flush().expect_code(4);
    host.flush(&sandbox).expect_code(4);
    host.at_dir(&sandbox, "status").expect_code(4);
    let error = sandbox.status().peer().last_error.clone().unwrap();
    assert!(error.contains("mirrorfs attach"), "{error}");
    sandbox.sh(&host.dir, "echo meanwhile >meanwhile");
    host.attach(&sandbox).ok();
    host.flush(&sandbox).ok();
    assert_same(&tree, &host.dir);
    assert!(tree.join("meanwhile").exists() && !host.dir.join("docs/second-name").exists());
    assert_eq!(sandbox.status().peers.len(), 1);

    // The mount goes away, and comes back.
    sandbox.try_umount().ok();
    sandbox.sh(&tree, "echo unmounted >unmounted");
    mount(&sandbox);
    host.flush(&sandbox).ok();
    assert_same(&tree, &host.dir);

    host.at_dir(&sandbox, "detach").ok();
    assert_ne!(host.at_dir(&sandbox, "detach").code, 0);
    sandbox.try_flush().expect_code(4);
    assert!(sandbox.status().conflicts.is_empty());
}

/// A link that falls silent without being closed is noticed by both sides and made anew.
#[test]
fn a_silent_link_is_made_anew_by_the_host() {
    let (mut sandbox, server, host) = vm();
    sandbox.set("MIRRORFS_DEADLINE", "2");
    mount(&sandbox);
    host.attach(&sandbox).ok();
    host.flush(&sandbox).ok();
    let agent = sandbox.processes_of(crate::support::Role::Agent);
    assert_eq!(agent.len(), 1, "{agent:?}");
    server.link.freeze();
    wait_until("the host has given the agent up", PROMPT, || {
        agent.iter().all(|agent| !agent.alive())
    });
    sandbox.sh(&sandbox.tree(), "echo x >file");
    become_same(&sandbox.tree(), &host.dir);
    sandbox.flush();
    host.at_dir(&sandbox, "detach").ok();
}

/// "A mount with three peers (local, ssh, attached), one of them down for an hour of
/// changes; changes from one reach the others; no echo; removing a peer and adding it
/// again."
#[test]
fn three_peers_of_three_kinds() {
    let (sandbox, server, host) = vm();
    let tree = sandbox.tree();
    let (local, remote) = (sandbox.peer(), sandbox.outside().join("remote"));
    sandbox.mount();
    let add = |place: &str| {
        let arguments = ["peer", "add", &tree.display().to_string(), place].map(str::to_owned);
        sandbox.run(arguments).ok();
    };
    // A server of its own for the peer that is going to be down.
    let place = server.url(&remote);
    add(&place);
    host.attach(&sandbox).ok();
    sandbox.flush();
    let sides = [&local, &remote, &host.dir];
    for side in sides {
        assert_same(&tree, side);
    }
    // From each to all the others, and not back.
    for (number, side) in sides.into_iter().enumerate() {
        sandbox.sh(
            side,
            &format!("echo {number} >>docs/long; echo {number} >n{number}"),
        );
        for other in sides {
            become_same(side, other);
        }
    }
    sandbox.flush();
    let before = sandbox.status().journal.seq;
    // The one thing here that has to take its time: that nothing happens in it.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(sandbox.status().journal.seq, before, "an echo");

    // The attached one is away, while the others work.
    host.at_dir(&sandbox, "detach").ok();
    for round in 0..30 {
        sandbox.sh(
            &tree,
            &format!(
                "mkdir -p work/{round}; for i in $(seq 20); do echo {round} >work/{round}/$i; done
                 rm -rf work/$(({round} - 5)); echo {round} >>docs/long"
            ),
        );
        sandbox.sh(&local, &format!("echo {round} >local{round}"));
        sandbox.sh(
            &remote,
            &format!("rm -f local$(({round} - 3)); echo {round} >remote"),
        );
    }
    sandbox.sh(&host.dir, "echo away >away; rm docs/nothing");
    for name in ["peer", "127.0.0.1"] {
        let tree = tree.display().to_string();
        let arguments = ["sync", &tree, "--flush", "--peer", name].map(str::to_owned);
        sandbox.run(arguments).ok();
    }
    sandbox.try_flush().expect_code(4);
    become_same(&tree, &local);
    become_same(&local, &remote);
    host.attach(&sandbox).ok();
    host.flush(&sandbox).ok();
    sandbox.flush();
    for side in sides {
        assert_same(&tree, side);
    }
    assert!(local.join("away").exists() && !remote.join("docs/nothing").exists());
    let status = sandbox.status();
    assert_eq!(status.peers.len(), 3);
    assert!(status.conflicts.is_empty(), "{status:?}");
    host.at_dir(&sandbox, "detach").ok();
}
