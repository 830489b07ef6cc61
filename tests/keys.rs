//! Logging in over a real sshd: keys with a passphrase, passwords, who is asked for them,
//! and what is said where nobody is there. What keys and host keys need beside that is in
//! `transport.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    unreachable_pub,
    reason = "what is in support/ is used by several tests"
)]
#![cfg(feature = "libssh2")]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sshd::Sshd;

const PATIENCE: Duration = Duration::from_secs(60);
const SECRET: &str = "three \"small' words";

/// A server, and a tree to be sent there by `mirrorfs sync`.
struct Case {
    server: Sshd,
}

impl Case {
    fn new(config: &str) -> Self {
        let server = Sshd::with_config(config);
        fs::create_dir(server.path("tree")).unwrap();
        fs::write(server.path("tree/file"), "content").unwrap();
        Self { server }
    }

    /// A server that lets nobody in but by a password.
    fn with_password(how: &str) -> Self {
        let case = Self::new(&format!(
            "{how}\nPubkeyAuthentication no\nPermitRootLogin yes"
        ));
        case.server.set_password(SECRET);
        case
    }

    /// A server with a client key that has a passphrase.
    fn with_passphrase() -> Self {
        let case = Self::new("");
        let done = Command::new("ssh-keygen")
            .args(["-q", "-p", "-P", "", "-N", SECRET, "-f"])
            .arg(case.server.path("client_key"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        case
    }

    fn arrived(&self) -> bool {
        self.server.path("peer/file").exists()
    }

    /// `mirrorfs ARGUMENTS`, with nobody to ask.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .envs(self.server.environment())
            .env("MIRRORFS_STATE", self.server.path("state"))
            .env("MIRRORFS_AGENT", env!("CARGO_BIN_EXE_mirrorfs"))
            .env_remove("SSH_ASKPASS")
            .env_remove("SSH_ASKPASS_REQUIRE")
            .env_remove("SSH_AUTH_SOCK")
            .env_remove("MIRRORFS_TRANSPORT")
            .stdin(Stdio::null());
        command
    }

    fn arguments(&self) -> [String; 3] {
        [
            "sync".to_owned(),
            self.server.path("tree").to_str().unwrap().to_owned(),
            self.server.url(self.server.path("peer")),
        ]
    }

    /// One round without a terminal.
    fn sync(&self, environment: &[(&str, &Path)]) -> Output {
        self.command("setsid")
            .args(["--wait", env!("CARGO_BIN_EXE_mirrorfs")])
            .args(self.arguments())
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    /// A program that answers, and counts the questions.
    fn askpass(&self, answers: &str) -> PathBuf {
        let log = self.server.path("asked");
        self.server.script(
            "askpass",
            &format!("echo \"$1\" >>'{}'\n{answers}", log.display()),
        )
    }

    fn asked(&self) -> Vec<String> {
        let asked = fs::read_to_string(self.server.path("asked")).unwrap_or_default();
        asked.lines().map(str::to_owned).collect()
    }

    /// One round at a terminal of its own, at which `answers` are typed, each after a
    /// question. Says what the terminal showed.
    fn at_a_terminal(&self, arguments: &[String], answers: &[&str]) -> (bool, String) {
        let words: Vec<String> = std::iter::once(env!("CARGO_BIN_EXE_mirrorfs").to_owned())
            .chain(arguments.iter().cloned())
            .map(|word| format!("'{word}'"))
            .collect();
        let mut child = self
            .command("script")
            .args(["--quiet", "--return", "--command", &words.join(" ")])
            .arg("/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut output = child.stdout.take().unwrap();
        let (sender, pieces) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut piece) {
                let _ = sender.send(piece[..length].to_vec());
            }
        });
        let mut shown = String::new();
        let mut answered = 0;
        let deadline = Instant::now() + PATIENCE;
        while let Ok(piece) = pieces.recv_timeout(deadline - Instant::now()) {
            shown.push_str(&String::from_utf8_lossy(&piece));
            let questions = shown.matches("': ").count() + shown.matches("password: ").count();
            if questions > answered && answered < answers.len() {
                writeln!(input, "{}", answers[answered]).unwrap();
                answered += 1;
            }
        }
        let success = child.wait().unwrap().success();
        reader.join().unwrap();
        drop(input);
        (success, shown)
    }
}

#[test]
fn a_passphrase_is_asked_for_by_askpass() {
    let case = Case::with_passphrase();
    let askpass = case.askpass(&format!("cat <<'E'\n{SECRET}\nE"));
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(output.status.success(), "{output:?}");
    assert!(case.arrived());
    // Once, though the round makes two connections.
    let [asked] = case.asked().try_into().unwrap();
    assert!(
        asked.contains("passphrase") && asked.contains("client_key"),
        "{asked}"
    );
}

#[test]
fn a_passphrase_that_nobody_gives_is_explained() {
    let case = Case::with_passphrase();
    let output = case.sync(&[]);
    assert!(!output.status.success() && !case.arrived());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("has a passphrase") && said.contains("ssh-add"),
        "{said}"
    );
    // Whoever cancels is not asked again.
    let askpass = case.askpass("exit 1");
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(!output.status.success());
    assert_eq!(case.asked().len(), 1);
}

#[test]
fn a_wrong_answer_is_asked_for_again() {
    let case = Case::with_passphrase();
    let askpass = case.askpass(&format!(
        "if [ -e '{0}' ]; then cat <<'E'\n{SECRET}\nE\nelse touch '{0}'; echo wrong; fi",
        case.server.path("second").display()
    ));
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(case.asked().len(), 2);

    let case = Case::with_passphrase();
    let askpass = case.askpass("echo wrong");
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(!output.status.success());
    assert_eq!(case.asked().len(), 3, "and not for ever");
}

#[test]
fn a_passphrase_is_asked_for_at_the_terminal() {
    let case = Case::with_passphrase();
    let (success, shown) = case.at_a_terminal(&case.arguments(), &["wrong", SECRET]);
    assert!(success && case.arrived(), "{shown}");
    assert_eq!(shown.matches("Enter passphrase").count(), 2, "{shown}");
    assert!(
        !shown.contains(SECRET) && !shown.contains("wrong"),
        "{shown}"
    );
}

#[test]
fn a_mount_asks_where_it_was_called() {
    let case = Case::with_passphrase();
    let mut arguments = case.arguments();
    arguments[0] = "mount".to_owned();
    let tree = case.server.path("tree");
    let (success, shown) = case.at_a_terminal(&arguments, &[SECRET]);
    let umount = case
        .command(env!("CARGO_BIN_EXE_mirrorfs"))
        .args(["umount".as_ref(), tree.as_os_str()])
        .output()
        .unwrap();
    assert!(success, "{shown}");
    assert!(umount.status.success(), "{umount:?}");
    assert!(
        case.arrived(),
        "umount flushes, by the link that the passphrase made"
    );
    assert!(!shown.contains(SECRET), "{shown}");
}

#[test]
fn a_password_is_asked_for() {
    let case = Case::with_password("PasswordAuthentication yes");
    let output = case.sync(&[]);
    assert!(!output.status.success() && !case.arrived());
    let (success, shown) = case.at_a_terminal(&case.arguments(), &["wrong", SECRET]);
    assert!(success && case.arrived(), "{shown}\n{}", case.server.log());
    let question = format!(
        "{}@127.0.0.1:{}'s password: ",
        case.server.user(),
        case.server.port()
    );
    assert_eq!(shown.matches(&question).count(), 2, "{shown}");
    assert!(!shown.contains(SECRET), "{shown}");
}

#[test]
fn a_key_that_gets_in_is_enough() {
    let case = Case::new("PasswordAuthentication yes\nPermitRootLogin yes");
    case.server.set_password(SECRET);
    let askpass = case.askpass("echo wrong");
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(case.asked().len(), 0);
}

#[test]
fn what_the_configuration_forbids_is_not_asked_for() {
    let case = Case::with_password("PasswordAuthentication yes");
    case.server.write_client_config("PasswordAuthentication no");
    let askpass = case.askpass("echo wrong");
    let output = case.sync(&[("SSH_ASKPASS", &askpass)]);
    assert!(!output.status.success());
    assert_eq!(case.asked().len(), 0);
}

/// A certificate is nothing for libssh2: `auto` goes through ssh, and `doctor` says why.
#[test]
fn a_key_that_libssh2_cannot_use_goes_through_ssh() {
    let case = Case::new("");
    let server = &case.server;
    sshd::keygen(&server.path("authority"));
    let done = Command::new("ssh-keygen")
        .args(["-q", "-s"])
        .arg(server.path("authority"))
        .args(["-I", "test", "-n", server.user()])
        .arg(server.path("client_key.pub"))
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let authority = fs::read_to_string(server.path("authority.pub")).unwrap();
    fs::write(
        server.path("authorized_keys"),
        format!("cert-authority {authority}"),
    )
    .unwrap();
    let output = case.sync(&[]);
    assert!(output.status.success(), "{output:?}\n{}", server.log());
    assert!(case.arrived());
    let doctor = case
        .command(env!("CARGO_BIN_EXE_mirrorfs"))
        .arg("doctor")
        .arg(server.path("tree"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(
        said.contains("by ssh") && said.contains("certificate"),
        "{said}"
    );
}
