//! Links over a real sshd and to local children: that bytes arrive, that errors say
//! what to do, and that a link ends when it is dropped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    unreachable_pub,
    reason = "what is in support/ is used by several tests"
)]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use mirrorfs::transport::{
    Choice, ConnectError, ConnectOptions, Link, PeerUrl, TransportKind, connect,
};
use mirrorfs::wire::frame::{FrameError, read_magic};
use sshd::Sshd;

#[cfg(feature = "libssh2")]
const TRANSPORTS: [Choice; 2] = [Choice::Ssh, Choice::Libssh2];
#[cfg(not(feature = "libssh2"))]
const TRANSPORTS: [Choice; 1] = [Choice::Ssh];

/// The longest that ending a link may take.
const PROMPT: Duration = Duration::from_secs(3);

fn options(server: &Sshd, choice: Choice) -> ConnectOptions {
    ConnectOptions {
        choice,
        ssh_config: Some(server.path("ssh_config")),
        known_hosts: Some(server.path("known_hosts")),
        identity: Some(server.path("client_key")),
        agent: Some(
            server
                .script("echo-agent", "exec cat")
                .to_str()
                .unwrap()
                .to_owned(),
        ),
        ..ConnectOptions::default()
    }
}

fn open(server: &Sshd, options: &ConnectOptions) -> Result<Link, ConnectError> {
    connect(&PeerUrl::parse(&server.url("/peer")).unwrap(), options)
}

fn opened(server: &Sshd, options: &ConnectOptions) -> Link {
    open(server, options).unwrap_or_else(|error| panic!("{error}\n{}", server.log()))
}

fn refused(server: &Sshd, options: &ConnectOptions) -> ConnectError {
    match open(server, options) {
        Ok(link) => panic!("{link:?}"),
        Err(error) => error,
    }
}

fn says(link: &mut Link, text: &str) {
    link.stream.write_all(text.as_bytes()).unwrap();
    let mut answer = vec![0; text.len()];
    link.stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text.as_bytes());
}

/// A stream of bytes that does not compress and does not repeat.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends `total` bytes through an echoing agent and compares what comes back.
fn echo(link: &mut Link, total: usize) {
    let mut sender = link.stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let mut noise = Noise(1);
        let mut buffer = vec![0; 1 << 16];
        for _ in 0..total / buffer.len() {
            noise.fill(&mut buffer);
            sender.write_all(&buffer).unwrap();
        }
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut noise = Noise(1);
    let mut expected = vec![0; 1 << 16];
    let mut found = expected.clone();
    for piece in 0..total / expected.len() {
        noise.fill(&mut expected);
        link.stream.read_exact(&mut found).unwrap();
        assert!(expected == found, "piece {piece} differs");
    }
    assert_eq!(link.stream.read(&mut found).unwrap(), 0, "the end arrives");
    writer.join().unwrap();
}

#[test]
fn both_directions_at_once_through_key_exchanges() {
    // OpenSSH's own default, sntrup761, takes some 0.2 s each time.
    let server = Sshd::with_config("RekeyLimit 256K\nKexAlgorithms curve25519-sha256");
    for choice in TRANSPORTS {
        let mut link = opened(&server, &options(&server, choice));
        let start = Instant::now();
        echo(&mut link, 64 << 20);
        println!("{}: {:?}", link.transport, start.elapsed());
    }
}

#[test]
fn an_agent_that_hangs_on_either_side_of_the_stream_does_not_stop_the_other() {
    // Writes 8 MiB before it reads anything, while this side does the same.
    let server = Sshd::start();
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        let script = server.script(
            "greedy",
            "head -c 4194304 /dev/zero; head -c 4194304 /dev/zero >&2; exec wc -c",
        );
        options.agent = Some(script.to_str().unwrap().to_owned());
        let mut link = opened(&server, &options);
        let mut sender = link.stream.try_clone().unwrap();
        let writer = thread::spawn(move || {
            sender.write_all(&vec![7; 8 << 20]).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut zeros = vec![1; 4 << 20];
        link.stream.read_exact(&mut zeros).unwrap();
        assert!(zeros.iter().all(|byte| *byte == 0));
        let mut count = String::new();
        link.stream.read_to_string(&mut count).unwrap();
        assert_eq!(count.trim(), (8 << 20).to_string());
        writer.join().unwrap();
    }
}

#[test]
fn the_path_reaches_the_agent_as_it_is() {
    let server = Sshd::start();
    let path = "/a b/c'd\"$HOME`x`\\n!*;&|#é";
    let script = server.script("args", "printf '%s|' \"$@\"");
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        options.agent = Some(script.to_str().unwrap().to_owned());
        let url = format!("{}@127.0.0.1:{path}", server.user());
        server.write_client_config(&format!("Port {}", server.port()));
        let mut link = connect(&PeerUrl::parse(&url).unwrap(), &options).unwrap();
        let mut said = String::new();
        link.stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("agent|--stdio|{path}|"));
    }
}

#[test]
fn an_unknown_host_key_is_refused_and_the_command_in_the_message_accepts_it() {
    let server = Sshd::start();
    let fingerprint = Command::new("ssh-keygen")
        .arg("-lf")
        .arg(server.path("host_key.pub"))
        .output()
        .unwrap();
    let fingerprint = String::from_utf8(fingerprint.stdout).unwrap();
    let fingerprint = fingerprint.split_whitespace().nth(1).unwrap();
    for choice in TRANSPORTS.into_iter().chain([Choice::Auto]) {
        let options = options(&server, choice);
        fs::write(server.path("known_hosts"), "").unwrap();
        let error = refused(&server, &options);
        assert!(error.needs_user());
        let text = error.to_string();
        let ConnectError::HostKeyUnknown { key, command, .. } = error else {
            panic!("{text}");
        };
        assert!(key.contains(fingerprint), "{key}: {fingerprint}");
        assert!(
            text.contains(&command) && text.contains(fingerprint),
            "{text}"
        );
        // Nothing was accepted on the way.
        assert_eq!(fs::read(server.path("known_hosts")).unwrap(), b"");
        let done = Command::new("sh").args(["-c", &command]).output().unwrap();
        assert!(done.status.success(), "{command}: {done:?}");
        says(&mut opened(&server, &options), "hello");
    }
}

#[test]
fn a_changed_host_key_is_refused_and_the_message_names_the_line() {
    let server = Sshd::start();
    sshd::keygen(&server.path("other_key"));
    let other = fs::read_to_string(server.path("other_key.pub")).unwrap();
    for choice in TRANSPORTS.into_iter().chain([Choice::Auto]) {
        let known = server.path("known_hosts");
        fs::write(
            &known,
            format!("# first line\n[127.0.0.1]:{} {other}", server.port()),
        )
        .unwrap();
        let options = options(&server, choice);
        let error = refused(&server, &options);
        let text = error.to_string();
        let ConnectError::HostKeyChanged {
            recorded, command, ..
        } = error
        else {
            panic!("{text}");
        };
        assert_eq!(recorded, format!("{}:2", known.display()));
        let done = Command::new("sh").args(["-c", &command]).output().unwrap();
        assert!(done.status.success(), "{command}: {done:?}");
        let after = refused(&server, &options);
        assert!(
            matches!(after, ConnectError::HostKeyUnknown { .. }),
            "{after}"
        );
    }
}

#[test]
fn a_hashed_known_hosts_file_works() {
    let server = Sshd::start();
    let hashed = Command::new("ssh-keygen")
        .args(["-q", "-H", "-f"])
        .arg(server.path("known_hosts"))
        .output()
        .unwrap();
    assert!(hashed.status.success(), "{hashed:?}");
    for choice in TRANSPORTS {
        says(&mut opened(&server, &options(&server, choice)), "hello");
    }
}

#[test]
fn a_revoked_host_key_is_refused() {
    let server = Sshd::start();
    let key = fs::read_to_string(server.path("host_key.pub")).unwrap();
    fs::write(server.path("known_hosts"), format!("@revoked * {key}")).unwrap();
    for choice in TRANSPORTS {
        let error = refused(&server, &options(&server, choice));
        assert!(
            matches!(error, ConnectError::HostKeyRevoked { .. }),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_user_is_told_which_user_and_which_key() {
    let server = Sshd::start();
    let url = server.url("/peer").replace(server.user(), "nobody-here");
    for choice in TRANSPORTS.into_iter().chain([Choice::Auto]) {
        let options = options(&server, choice);
        let error = connect(&PeerUrl::parse(&url).unwrap(), &options).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ConnectError::Auth { .. }), "{text}");
        assert!(
            text.contains("nobody-here") && text.contains("client_key"),
            "{text}"
        );
    }
}

#[test]
fn a_missing_agent_is_told_apart_from_everything_else() {
    let server = Sshd::start();
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        options.agent = Some("/nowhere/mirrorfs".to_owned());
        let error = refused(&server, &options);
        assert!(
            matches!(error, ConnectError::AgentMissing { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("/nowhere/mirrorfs"), "{error}");
    }
}

#[test]
fn an_agent_of_another_kind_is_quoted() {
    let server = Sshd::start();
    let script = server.script(
        "junk",
        "echo 'Welcome to the machine'; echo oops >&2; exit 3",
    );
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        options.agent = Some(script.to_str().unwrap().to_owned());
        let mut link = opened(&server, &options);
        match read_magic(&mut link.stream) {
            Err(error @ FrameError::NotMirrorfs { .. }) => {
                assert!(
                    error.to_string().contains("Welcome to the machine"),
                    "{error}"
                );
            }
            other => panic!("{other:?}"),
        }
        let mut rest = Vec::new();
        link.stream.read_to_end(&mut rest).unwrap();
        wait_for(|| link.stderr_tail().contains("oops"));
    }
}

#[test]
fn what_a_login_shell_prints_first_is_skipped() {
    let server = Sshd::with_config(
        "ForceCommand printf 'Welcome!\\nno line break'; eval \"$SSH_ORIGINAL_COMMAND\"",
    );
    for choice in TRANSPORTS {
        says(&mut opened(&server, &options(&server, choice)), "hello");
    }
}

#[test]
fn an_account_without_a_shell_is_explained() {
    let server = Sshd::with_config("ForceCommand echo 'This account is for mail only'");
    for choice in TRANSPORTS {
        let error = refused(&server, &options(&server, choice));
        assert!(matches!(error, ConnectError::Startup { .. }), "{error}");
        assert!(error.to_string().contains("for mail only"), "{error}");
    }
}

/// An sshd that is about to stop, or has too many connections, says so and hangs up, or
/// hangs up at once.
#[test]
fn somebody_hanging_up_before_ssh_has_begun() {
    let server = Sshd::start();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut says = ["", "Exceeded MaxStartups\r\n"].into_iter().cycle();
        while let (Ok((mut client, _)), Some(words)) = (listener.accept(), says.next()) {
            client.write_all(words.as_bytes()).ok();
        }
    });
    let url = PeerUrl::parse(&format!("ssh://127.0.0.1:{port}/peer")).unwrap();
    for choice in TRANSPORTS {
        for _ in 0..2 {
            let error = connect(&url, &options(&server, choice)).unwrap_err();
            assert!(matches!(error, ConnectError::HungUp { .. }), "{error}");
            assert!(error.is_away() && error.to_string().contains(&port.to_string()));
        }
    }
}

#[test]
fn nobody_listening_and_nobody_answering() {
    let server = Sshd::start();
    let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let closed = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let closed_port = closed.local_addr().unwrap().port();
    drop(closed);
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        let at = |port| PeerUrl::parse(&format!("ssh://127.0.0.1:{port}/peer")).unwrap();
        let error = connect(&at(closed_port), &options).unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
        assert!(error.is_away());
        assert!(error.to_string().contains(&closed_port.to_string()));
        options.timeout = Duration::from_secs(1);
        let start = Instant::now();
        let error = connect(&at(silent.local_addr().unwrap().port()), &options).unwrap_err();
        assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
        assert!(error.is_away());
        assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
        let name = PeerUrl::parse("no-such-host.invalid:/peer").unwrap();
        options.timeout = Duration::from_secs(30);
        let error = connect(&name, &options).unwrap_err();
        assert!(matches!(error, ConnectError::UnknownHost { .. }), "{error}");
        assert!(error.is_away());
    }
}

#[test]
fn dropping_a_link_to_a_stopped_server_returns() {
    let server = Sshd::start();
    for choice in TRANSPORTS {
        let mut link = opened(&server, &options(&server, choice));
        says(&mut link, "hello");
        server.pause();
        // Fill whatever there is between here and there.
        link.stream
            .set_write_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let block = vec![0; 1 << 20];
        loop {
            match link.stream.write(&block) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let start = Instant::now();
        drop(link);
        assert!(
            start.elapsed() < PROMPT,
            "{choice:?}: {:?}",
            start.elapsed()
        );
        server.resume();
    }
    wait_for(|| server.connections() == 0);
}

#[test]
fn a_cut_connection_ends_the_stream() {
    let server = Sshd::start();
    for choice in TRANSPORTS {
        let mut link = opened(&server, &options(&server, choice));
        says(&mut link, "hello");
        server.cut();
        let start = Instant::now();
        let mut rest = Vec::new();
        // An error would do as well; what matters is that it does not wait.
        let _ = link.stream.read_to_end(&mut rest);
        assert!(start.elapsed() < PROMPT, "{choice:?}");
        wait_for(|| !link.stderr_tail().is_empty());
    }
}

#[test]
fn an_agent_that_ends_with_its_input_ends_the_server_too() {
    let server = Sshd::start();
    for choice in TRANSPORTS {
        let link = opened(&server, &options(&server, choice));
        assert_eq!(server.connections(), 1);
        drop(link);
        wait_for(|| server.connections() == 0);
    }
}

#[test]
fn auto_takes_libssh2_unless_the_configuration_needs_ssh() {
    let server = Sshd::start();
    let mut options = options(&server, Choice::Auto);
    // As a user has it: everything in the configuration file.
    options.known_hosts = None;
    options.identity = None;
    let link = opened(&server, &options);
    if cfg!(feature = "libssh2") {
        assert_eq!(link.transport, TransportKind::Libssh2, "{}", link.reason);
    }
    drop(link);
    let jump = format!("{}@localhost:{}", server.user(), server.port());
    let known = fs::read_to_string(server.path("known_hosts")).unwrap();
    fs::write(
        server.path("known_hosts"),
        format!("{known}{}", known.replace("127.0.0.1", "localhost")),
    )
    .unwrap();
    server.write_client_config(&format!("Host 127.0.0.1\nProxyJump {jump}"));
    let mut link = opened(&server, &options);
    assert_eq!(link.transport, TransportKind::Ssh);
    if cfg!(feature = "libssh2") {
        assert!(link.reason.contains("ProxyJump"), "{}", link.reason);
    }
    says(&mut link, "through the other host");
    drop(link);
    wait_for(|| server.connections() == 0);
}

#[cfg(feature = "libssh2")]
#[test]
fn auto_falls_back_to_ssh_where_libssh2_does_not_get_through() {
    // A key exchange that libssh2 does not have.
    let server = Sshd::with_config("KexAlgorithms sntrup761x25519-sha512@openssh.com");
    let mut link = opened(&server, &options(&server, Choice::Auto));
    assert_eq!(link.transport, TransportKind::Ssh);
    assert!(link.reason.contains("libssh2"), "{}", link.reason);
    says(&mut link, "hello");
    let error = refused(&server, &options(&server, Choice::Libssh2));
    assert!(matches!(error, ConnectError::Ssh { .. }), "{error}");
}

#[test]
fn keys_of_an_ssh_agent_are_all_tried() {
    let server = Sshd::start();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent");
    let mut agent = Command::new("ssh-agent")
        .arg("-D")
        .arg("-a")
        .arg(&socket)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for(|| socket.exists());
    sshd::keygen(&dir.path().join("other"));
    for key in [dir.path().join("other"), server.path("client_key")] {
        let added = Command::new("ssh-add")
            .arg("-q")
            .arg(key)
            .env("SSH_AUTH_SOCK", &socket)
            .output()
            .unwrap();
        assert!(added.status.success(), "{added:?}");
    }
    fs::write(
        server.path("ssh_config"),
        format!(
            "Host *\nIdentityFile /nowhere/key\nIdentityAgent {}\n",
            socket.display()
        ),
    )
    .unwrap();
    for choice in TRANSPORTS {
        let mut options = options(&server, choice);
        options.identity = None;
        says(&mut opened(&server, &options), "hello");
    }
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_local_agent_is_a_child_that_ends_with_the_link() {
    let dir = tempfile::tempdir().unwrap();
    let program = script(
        dir.path(),
        "agent",
        &format!(
            "echo $$ > {}/pid; echo \"$@\" >&2; exec cat",
            dir.path().display()
        ),
    );
    let options = ConnectOptions {
        program,
        ..ConnectOptions::default()
    };
    let url = PeerUrl::parse("./some:dir").unwrap();
    let mut link = connect(&url, &options).unwrap();
    assert_eq!(link.transport, TransportKind::Local);
    says(&mut link, "hello");
    wait_for(|| link.stderr_tail() == "agent --stdio ./some:dir");
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    drop(link);
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

#[test]
fn a_local_agent_that_hangs_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let program = script(
        dir.path(),
        "agent",
        &format!("echo $$ > {0}/pid; kill -STOP $$", dir.path().display()),
    );
    let options = ConnectOptions {
        program,
        ..ConnectOptions::default()
    };
    let link = connect(&PeerUrl::parse("/peer").unwrap(), &options).unwrap();
    let file = dir.path().join("pid");
    wait_for(|| fs::read_to_string(&file).is_ok_and(|pid| pid.ends_with('\n')));
    let pid = fs::read_to_string(&file).unwrap();
    let start = Instant::now();
    drop(link);
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

fn script(dir: &Path, name: &str, body: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Waits for a condition that another process brings about.
fn wait_for(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it did not happen"
        );
        thread::yield_now();
    }
}
