//! Installing the agent on a peer that has none, over a real sshd: what is verified, what
//! is left alone, and that nothing is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    unreachable_pub,
    reason = "what is in support/ is used by several tests"
)]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use mirrorfs::transport::{Choice, ConnectError, ConnectOptions, Link, PeerUrl, connect};
use sshd::Sshd;

#[cfg(feature = "libssh2")]
const TRANSPORTS: [Choice; 2] = [Choice::Ssh, Choice::Libssh2];
#[cfg(not(feature = "libssh2"))]
const TRANSPORTS: [Choice; 1] = [Choice::Ssh];

const PATIENCE: Duration = Duration::from_secs(60);

/// A server whose user has `bin/` before everything else in the PATH.
fn server() -> Sshd {
    let server = Sshd::with_config(
        "ForceCommand PATH=\"$HOME/bin:$PATH\"; export PATH; eval \"$SSH_ORIGINAL_COMMAND\"",
    );
    fs::create_dir(server.home().join("bin")).unwrap();
    server
}

/// Puts a script into that directory.
fn replace(server: &Sshd, name: &str, body: &str) {
    let path = server.home().join("bin").join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn options(server: &Sshd, choice: Choice) -> ConnectOptions {
    ConnectOptions {
        choice,
        ssh_config: Some(server.path("ssh_config")),
        known_hosts: Some(server.path("known_hosts")),
        identity: Some(server.path("client_key")),
        program: server.script(
            "program",
            &format!(
                "[ \"$1\" = --version ] && exit 0\nexec cat\n{}",
                "# filler\n".repeat(100_000)
            ),
        ),
        timeout: PATIENCE,
        ..ConnectOptions::default()
    }
}

fn open(server: &Sshd, options: &ConnectOptions) -> Result<Link, ConnectError> {
    connect(&PeerUrl::parse(&server.url("/peer")).unwrap(), options)
}

/// Connects, and sees that the agent runs.
fn installs(server: &Sshd, options: &ConnectOptions) -> Link {
    let mut link = open(server, options).unwrap_or_else(|e| panic!("{e}\n{}", server.log()));
    link.stream.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    link.stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    link
}

fn refused(server: &Sshd, options: &ConnectOptions) -> ConnectError {
    match open(server, options) {
        Ok(link) => panic!("{link:?}"),
        Err(error) => error,
    }
}

fn place(server: &Sshd) -> PathBuf {
    server.home().join(".local/share/mirrorfs/agent")
}

/// What is in the directory of agents, by name.
fn agents(server: &Sshd) -> Vec<String> {
    let Ok(entries) = fs::read_dir(place(server)) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The name that a program is installed under.
fn name_of(program: &Path) -> String {
    let output = Command::new("sha256sum").arg(program).output().unwrap();
    let sum = String::from_utf8(output.stdout).unwrap();
    format!("mirrorfs-{}-{}", env!("CARGO_PKG_VERSION"), &sum[..16])
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_is_installed_once_and_verified_each_time() {
    for choice in TRANSPORTS {
        let server = server();
        let options = options(&server, choice);
        let name = name_of(&options.program);
        installs(&server, &options);
        assert_eq!(agents(&server), std::slice::from_ref(&name));
        let installed = place(&server).join(&name);
        let inode = || fs::metadata(&installed).unwrap().ino();
        let first = inode();
        installs(&server, &options);
        assert_eq!(inode(), first, "it is used again");
        // Damage that neither name nor size tells.
        let whole = fs::read(&installed).unwrap();
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(&installed, &damaged).unwrap();
        installs(&server, &options);
        assert_eq!(fs::read(&installed).unwrap(), whole);
        assert_eq!(agents(&server), [name]);
    }
}

#[test]
fn what_arrived_damaged_is_not_put_into_place() {
    for choice in TRANSPORTS {
        let server = server();
        replace(&server, "head", "/usr/bin/head \"$@\" | tr f g");
        let error = refused(&server, &options(&server, choice));
        assert!(matches!(error, ConnectError::Install { .. }), "{error}");
        assert!(error.to_string().contains("damaged"), "{error}");
        wait_for("the piece is removed", || agents(&server).is_empty());
    }
}

#[test]
fn a_program_that_does_not_run_on_the_peer_is_not_installed() {
    let server = server();
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        options.program = server.script("broken", "echo 'libfoo.so: wrong version' >&2; exit 1");
        let error = refused(&server, &options);
        assert!(matches!(error, ConnectError::Install { .. }), "{error}");
        wait_for("the piece is removed", || agents(&server).is_empty());
    }
}

#[test]
fn an_upload_that_is_cut_leaves_nothing() {
    for choice in TRANSPORTS {
        let server = server();
        let amid = server.path("amid");
        replace(
            &server,
            "head",
            &format!(
                "/usr/bin/head -c 1000; touch '{}'; exec cat",
                amid.display()
            ),
        );
        let options = options(&server, choice);
        thread::scope(|scope| {
            let attempt = scope.spawn(|| refused(&server, &options));
            wait_for("the upload has begun", || amid.exists());
            assert_eq!(agents(&server).len(), 1, "under a temporary name");
            assert!(agents(&server)[0].starts_with(".mirrorfs-"));
            server.cut();
            attempt.join().unwrap();
        });
        wait_for("the piece is removed", || agents(&server).is_empty());
    }
}

#[test]
fn pieces_of_uploads_that_were_killed_are_removed_later() {
    let server = server();
    fs::create_dir_all(place(&server)).unwrap();
    let stale = place(&server).join(".mirrorfs-0.0.1-0123456789abcdef.abcdef");
    let fresh = place(&server).join(".mirrorfs-0.0.1-0123456789abcdef.ghijkl");
    for path in [&stale, &fresh] {
        fs::write(path, "a piece").unwrap();
    }
    let past = SystemTime::now() - Duration::from_secs(2 * 3600);
    fs::File::open(&stale).unwrap().set_modified(past).unwrap();
    installs(&server, &options(&server, TRANSPORTS[0]));
    assert!(!stale.exists());
    assert!(fresh.exists(), "somebody may be writing to it");
}

#[test]
fn older_versions_are_removed_unless_they_run() {
    let server = server();
    let options = options(&server, TRANSPORTS[0]);
    let name = name_of(&options.program);
    let at = |name: &str| place(&server).join(name);
    fs::create_dir_all(place(&server)).unwrap();
    let (old, running) = (
        "mirrorfs-0.0.1-0123456789abcdef",
        "mirrorfs-0.0.2-00000000ffffffff",
    );
    fs::write(at(old), "an older one").unwrap();
    fs::copy("/usr/bin/sleep", at(running)).unwrap();
    let mut process = Command::new(at(running)).arg("600").spawn().unwrap();
    let exe = PathBuf::from(format!("/proc/{}/exe", process.id()));
    wait_for("it runs", || {
        fs::read_link(&exe).is_ok_and(|exe| exe.ends_with(running))
    });
    // What only looks like ours.
    let others = [
        "mirrorfs-0.0.3-0123456789abcdeg",
        "mirrorfs-0.0.3-0123456789abcdef.bak",
        "mirrorfs-notes",
        "notes",
    ];
    for other in others {
        fs::write(at(other), "not an agent").unwrap();
    }
    let (dir, link) = (
        "mirrorfs-0.0.4-0123456789abcdef",
        "mirrorfs-0.0.5-0123456789abcdef",
    );
    fs::create_dir(at(dir)).unwrap();
    symlink(at("notes"), at(link)).unwrap();

    let mut expected: Vec<_> = others.map(str::to_owned).into();
    expected.extend([dir, link, running, &name].map(str::to_owned));
    expected.sort();
    installs(&server, &options);
    assert_eq!(agents(&server), expected);

    process.kill().unwrap();
    process.wait().unwrap();
    installs(&server, &options);
    expected.retain(|name| name != running);
    assert_eq!(agents(&server), expected);
}

#[test]
fn what_is_not_ours_is_not_replaced() {
    for choice in TRANSPORTS {
        let server = server();
        let options = options(&server, choice);
        let path = place(&server).join(name_of(&options.program));
        fs::create_dir_all(&path).unwrap();
        let precious = server.path("precious");
        fs::write(&precious, "mine").unwrap();
        let refused = || {
            let error = refused(&server, &options);
            assert!(matches!(error, ConnectError::Install { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()), "{text}");
        };
        refused();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        fs::remove_dir(&path).unwrap();
        for target in [precious.as_path(), Path::new("/nowhere")] {
            symlink(target, &path).unwrap();
            refused();
            assert_eq!(fs::read_link(&path).unwrap(), target);
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read_to_string(&precious).unwrap(), "mine");
    }
}

#[test]
fn a_machine_of_another_kind_is_told_what_to_install() {
    for choice in TRANSPORTS {
        let server = server();
        replace(&server, "uname", "echo Linux riscv64");
        let error = refused(&server, &options(&server, choice));
        assert!(
            matches!(error, ConnectError::AgentMissing { .. }),
            "{error}"
        );
        let text = error.to_string();
        let wanted = format!("mirrorfs {} for Linux riscv64", env!("CARGO_PKG_VERSION"));
        assert!(text.contains(&wanted), "{text}");
        assert!(!place(&server).exists());
    }
}

/// Whatever of the three a peer has; the shell finds nothing but what is listed here.
#[test]
fn any_program_that_knows_sha_256_will_do() {
    let tools = [
        "sh", "cat", "cut", "chmod", "find", "head", "mkdir", "mktemp", "mv", "rm", "sync",
        "uname", "wc",
    ];
    for (program, also) in [
        ("sha256sum", None),
        ("shasum", Some("perl")),
        ("openssl", None),
        ("nothing", None),
    ] {
        let server = Sshd::with_config(
            "ForceCommand PATH=\"$HOME/bin\"; export PATH; eval \"$SSH_ORIGINAL_COMMAND\"",
        );
        let bin = server.home().join("bin");
        fs::create_dir(&bin).unwrap();
        for tool in tools.into_iter().chain([program]).chain(also) {
            let place = ["/usr/bin", "/bin"]
                .map(|dir| Path::new(dir).join(tool))
                .into_iter()
                .find(|path| path.exists());
            if let Some(place) = place {
                symlink(place, bin.join(tool)).unwrap();
            }
        }
        let options = options(&server, TRANSPORTS[0]);
        if program == "nothing" {
            let text = refused(&server, &options).to_string();
            assert!(text.contains("sha256sum"), "{text}");
            assert!(agents(&server).is_empty());
        } else {
            installs(&server, &options);
            assert_eq!(agents(&server), [name_of(&options.program)], "{program}");
            installs(&server, &options);
        }
    }
}

#[test]
fn a_round_with_a_peer_that_had_no_mirrorfs() {
    let server = server();
    let (tree, peer) = (server.path("tree"), server.path("peer"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_mirrorfs"));
    let output = Command::new(program)
        .arg("sync")
        .args([tree.to_str().unwrap(), &server.url(&peer)])
        .envs(server.environment())
        .env("MIRRORFS_STATE", server.path("state"))
        .env_remove("MIRRORFS_AGENT")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}\n{}", server.log());
    assert_eq!(fs::read(peer.join("file")).unwrap(), b"content");
    assert_eq!(agents(&server), [name_of(program)]);
}
