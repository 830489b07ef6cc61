//! "Unequal versions that share a protocol work together, and those that do not say which
//! side to upgrade": hellos as other versions sent or will send them, from `hellos/`, against
//! the built program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use mirrorfs::wire::frame::{read_magic, read_message};
use mirrorfs::wire::message::ToMount;

use crate::support::{Sandbox, Server, assert_same};

fn recorded(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/end_to_end/hellos")
        .join(name)
}

/// What the agent answers to a recorded hello.
fn agent_answers(sandbox: &Sandbox, hello: &str) -> ToMount {
    let output = sandbox
        .command(sandbox.program())
        .args(["agent", "--stdio"])
        .arg(sandbox.peer())
        .stdin(Stdio::from(fs::File::open(recorded(hello)).unwrap()))
        .output()
        .unwrap();
    let mut said = output.stdout.as_slice();
    read_magic(&mut said).unwrap();
    read_message(&mut said).unwrap().unwrap()
}

#[test]
fn an_agent_answers_a_mounted_side_of_any_version() {
    let sandbox = Sandbox::new();
    for name in ["mount-0.0.9", "mount-3.1.0"] {
        let ToMount::Refused { refusal } = agent_answers(&sandbox, name) else {
            panic!("{name} was taken in");
        };
        let side = if name == "mount-0.0.9" {
            "mounted"
        } else {
            "peer's"
        };
        let text = refusal.to_string();
        assert!(
            text.contains(&format!("upgrade mirrorfs on the {side} side")),
            "{name}: {text}"
        );
    }
    let answer = agent_answers(&sandbox, "mount-0.1.0");
    assert!(matches!(answer, ToMount::Hello(_)), "{answer:?}");
}

#[test]
fn a_mounted_side_says_which_version_of_the_agent_it_needs() {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), "echo x >file");
    sandbox.mount_with(server.url(&sandbox.peer()));
    sandbox.flush();
    let (agent, honest) = (
        sandbox.root().join("bin/agent"),
        sandbox.root().join("bin/honest"),
    );
    fs::copy(&agent, &honest).unwrap();
    for (name, side) in [("agent-0.0.9", "peer's"), ("agent-3.1.0", "mounted")] {
        let script = format!(
            "#!/bin/sh\ncat '{}'\nexec cat >/dev/null\n",
            recorded(name).display()
        );
        let new = sandbox.root().join("bin/other");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &agent).unwrap();
        server.link.cut();
        let said = format!("upgrade mirrorfs on the {side} side");
        sandbox.status_becomes(&said, |status| {
            let reason = status.peer().halt_reason.as_deref();
            reason.is_some_and(|reason| reason.contains(&said))
        });
    }
    sandbox.sh(&sandbox.tree(), "echo meanwhile >>file");
    // Upgraded, it goes on by itself.
    fs::rename(&honest, &agent).unwrap();
    sandbox.connected();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
}
