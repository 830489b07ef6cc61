//! "Life after the VM: the peer's directory is mounted on the host as the new mounted side,
//! with a new, empty VM as its peer; the old VM comes back later."

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::compare::compare;
use crate::support::program::run;
use crate::support::{Outcome, PROMPT, Sandbox, Server, assert_same, eventually};

/// A VM that had a peer's directory on its host, each with a state of its own, and is gone.
struct World {
    sandbox: Sandbox,
    _server: Server,
}

impl World {
    /// What both had agreed on is what `script` makes.
    fn after(script: &str) -> Self {
        let mut sandbox = Sandbox::new();
        let server = Server::start(&mut sandbox);
        sandbox.sh(&sandbox.tree(), script);
        sandbox.mount_with(server.url(&sandbox.peer()));
        sandbox.flush();
        sandbox.umount();
        sandbox.sh(sandbox.root(), "mkdir new");
        Self {
            sandbox,
            _server: server,
        }
    }

    /// Runs a command on the host, where the peer's directory is.
    #[track_caller]
    fn on_host(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.sandbox.command(self.sandbox.program());
        command.env("MIRRORFS_STATE", self.at("agent-state"));
        run(command.args(arguments), Duration::from_secs(180))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.sandbox.root().join(name)
    }
}

/// The mirror that a directory belongs to.
fn mirror(root: &Path) -> String {
    let text = fs::read_to_string(root.join(".mirrorfs/identity")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
    identity["mirror"].as_str().unwrap().to_owned()
}

#[test]
fn the_old_machine_is_met_on_the_grounds_of_what_was_agreed_with_it() {
    let world = World::after(
        "mkdir d; for f in same edited-here edited-there gone-here gone-there both d/x
         do echo $f >$f; done",
    );
    let (old, host, new) = (world.at("tree"), world.at("peer"), world.at("new"));
    let before = mirror(&host);
    // What the old machine did after its last contact.
    world.sandbox.sh(
        &old,
        "rm gone-there; echo there >edited-there; echo there >both; mv d/x d/moved",
    );

    world
        .on_host(&["mount", "peer", "new"])
        .ok()
        .expect_said(&["goes on as the mounted side of its mirror"]);
    world.on_host(&["sync", "peer", "--flush"]).ok();
    assert_eq!(mirror(&new), before);
    world.sandbox.sh(
        &host,
        "rm gone-here; echo here >edited-here; echo here >both",
    );
    world.on_host(&["sync", "peer", "--flush"]).ok();
    assert_same(&host, &new);

    // It comes back, after another mount.
    world.on_host(&["umount", "peer"]).ok();
    world.on_host(&["mount", "peer"]).ok();
    world.on_host(&["peer", "add", "peer", "tree"]).ok();
    world.on_host(&["sync", "peer", "--flush"]).expect_code(3);
    for root in [&host, &old] {
        let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
        assert_eq!(read("same"), "same\n");
        assert_eq!(read("edited-here"), "here\n");
        assert_eq!(read("edited-there"), "there\n");
        assert_eq!(read("d/moved"), "d/x\n");
        for gone in ["gone-here", "gone-there", "d/x"] {
            assert!(!root.join(gone).exists(), "{gone} is back in {root:?}");
        }
    }
    // Only what both have changed is in conflict, and settled like any other.
    let listed = world.on_host(&["conflicts", "list", "peer"]).expect_code(3);
    assert!(listed.stdout.starts_with("both"), "{listed}");
    assert_eq!(listed.stdout.lines().count(), 1, "{listed}");
    world
        .on_host(&["conflicts", "resolve", "peer/both", "--remote"])
        .ok();
    world.on_host(&["sync", "peer", "--flush"]).ok();
    for other in [&old, &new] {
        eventually("all three are the same", PROMPT, || compare(&host, other));
    }
    assert_eq!(fs::read_to_string(host.join("both")).unwrap(), "there\n");
    world.on_host(&["umount", "peer"]).ok();
}
