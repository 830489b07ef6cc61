//! The `ssh` program as a transport: everything the user's configuration can say works.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::child::Carrier;
use super::ssh_config::Effective;
use super::startup::{self, Failure, Target, quote};
use super::{ConnectError, ConnectOptions, Deadline, Guard, Link, SshPlace, TransportKind};

/// How long ssh may take to end when asked to. It has nothing to finish.
const SSH_GRACE: Duration = Duration::from_millis(200);

/// The arguments that make ssh read the right configuration, for `ssh -G` too.
/// Options on the command line win over every file.
pub(super) fn configuration(place: &SshPlace, options: &ConnectOptions) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut option = |name: &str, value: OsString| {
        let mut text = OsString::from(format!("-o{name}="));
        text.push(value);
        arguments.push(text);
    };
    if let Some(file) = &options.known_hosts {
        option("UserKnownHostsFile", config_word(file));
        option("GlobalKnownHostsFile", "/dev/null".into());
    }
    if let Some(file) = &options.identity {
        option("IdentityFile", config_word(file));
        option("IdentitiesOnly", "yes".into());
        option("IdentityAgent", "none".into());
    }
    if let Some(file) = &options.ssh_config {
        arguments.push("-F".into());
        arguments.push(file.into());
    }
    if let Some(port) = place.port {
        arguments.push("-p".into());
        arguments.push(port.to_string().into());
    }
    if let Some(user) = &place.user {
        arguments.push("-l".into());
        arguments.push(user.into());
    }
    arguments
}

/// A path as one word of ssh's configuration language.
fn config_word(path: &Path) -> OsString {
    // Percent signs would be taken for tokens, and spaces for the end of the word.
    let text = path.to_string_lossy().replace('%', "%%");
    format!("\"{text}\"").into()
}

/// The arguments of a connection that can neither ask questions nor surprise anybody.
fn arguments(place: &SshPlace, options: &ConnectOptions, deadline: Deadline) -> Vec<OsString> {
    let mut arguments = configuration(place, options);
    let timeout = format!("-oConnectTimeout={}", deadline.left().as_secs().max(1));
    for option in [
        "-oBatchMode=yes",
        "-oStrictHostKeyChecking=yes",
        "-oUpdateHostKeys=no",
        // A master of ours would outlive the link; one that exists is used.
        "-oControlMaster=no",
        "-oClearAllForwardings=yes",
        "-oForwardAgent=no",
        "-oForwardX11=no",
        "-oPermitLocalCommand=no",
        "-oRemoteCommand=none",
        "-oRequestTTY=no",
        "-oEscapeChar=none",
        "-oServerAliveInterval=15",
        "-oServerAliveCountMax=4",
        timeout.as_str(),
    ] {
        arguments.push(option.into());
    }
    arguments
}

fn ssh() -> Command {
    let mut command = Command::new("ssh");
    // Its messages are read below, so they must not be translated.
    command.env_remove("LC_ALL").env("LC_MESSAGES", "C");
    command
}

/// Connects through the ssh program.
pub(super) fn connect(
    place: &SshPlace,
    options: &ConnectOptions,
    effective: &Effective,
    deadline: Deadline,
    reason: String,
) -> Result<Link, ConnectError> {
    let target = effective.target(place);
    let remote = startup::command(options, &place.path)?;
    let mut command = ssh();
    command
        .args(arguments(place, options, deadline))
        .arg("--")
        .arg(&place.host)
        .arg(remote);
    let (stream, tail, mut carrier) =
        Carrier::spawn(command, SSH_GRACE, Some(Signal::TERM)).map_err(no_ssh)?;
    match startup::await_agent(&stream, &target, options, deadline) {
        Ok(()) => Ok(Link {
            stream,
            transport: TransportKind::Ssh,
            reason,
            tail,
            _guard: Guard::Child(carrier),
        }),
        Err(Failure::Error(error)) => Err(error),
        Err(Failure::Ended(printed)) => {
            let status = carrier.wait(deadline.left());
            carrier.settle_stderr();
            drop(carrier);
            let said = tail.text();
            let code = status.and_then(|status| status.code());
            if code == Some(255) {
                let failed = Failed {
                    place,
                    options,
                    effective,
                    target,
                };
                return Err(failed.explain(&said, deadline));
            }
            Err(ended(&target, code, &printed, &said))
        }
    }
}

/// The login worked, and what ran then ended before the agent.
pub(super) fn ended(
    target: &Target,
    code: Option<i32>,
    printed: &str,
    stderr: &str,
) -> ConnectError {
    let mut detail = match code {
        Some(code) => format!("the command ended with status {code}"),
        None => "the command was ended".to_owned(),
    };
    for said in [printed, stderr] {
        if !said.is_empty() {
            detail.push_str(&format!(", saying {said:?}"));
        }
    }
    detail.push_str(
        ". The account needs a shell that can run `sh`, and nothing that replaces its commands",
    );
    ConnectError::Startup {
        host: target.host.clone(),
        port: target.port,
        detail,
    }
}

fn no_ssh(error: ConnectError) -> ConnectError {
    match error {
        ConnectError::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            ConnectError::NoTransport {
                detail: "there is no ssh program: install OpenSSH's client (Debian: openssh-client), or use MIRRORFS_TRANSPORT=libssh2".to_owned(),
            }
        }
        error => error,
    }
}

/// A connection that ssh itself gave up.
struct Failed<'a> {
    place: &'a SshPlace,
    options: &'a ConnectOptions,
    effective: &'a Effective,
    target: Target,
}

impl Failed<'_> {
    /// Finds the cause in what ssh has printed.
    fn explain(self, said: &str, deadline: Deadline) -> ConnectError {
        let host = self.target.host.clone();
        let port = self.target.port;
        let last = |needle: &str| {
            said.lines()
                .rev()
                .find(|line| line.contains(needle))
                .map(|line| line.trim().to_owned())
        };
        if let Some(detail) = last("Could not resolve hostname") {
            return ConnectError::UnknownHost { host, detail };
        }
        if said.contains("REVOKED HOST KEY") {
            return ConnectError::HostKeyRevoked {
                host,
                port,
                fingerprint: find_fingerprint(said).unwrap_or_else(|| "unknown".to_owned()),
                recorded: "the known_hosts files".to_owned(),
            };
        }
        if said.contains("REMOTE HOST IDENTIFICATION HAS CHANGED") {
            let (key_type, fingerprint) = self.shown_key(deadline);
            let recorded = said
                .lines()
                .find_map(|line| line.trim().strip_prefix("Offending "))
                .and_then(|line| line.split_once(" in "))
                .map_or_else(|| "known_hosts".to_owned(), |(_, place)| place.to_owned());
            let file = recorded
                .rsplit_once(':')
                .map_or(recorded.as_str(), |(file, _)| file);
            return ConnectError::HostKeyChanged {
                command: self.effective.forget_command(file, &self.target),
                host,
                port,
                key: format!("{fingerprint} ({key_type})"),
                recorded,
            };
        }
        if said.contains("Host key verification failed") || said.contains("host key is known for") {
            let (key_type, fingerprint) = self.shown_key(deadline);
            return ConnectError::HostKeyUnknown {
                command: self.effective.accept_command(
                    self.place,
                    self.options,
                    &self.target,
                    &key_type,
                ),
                host,
                port,
                key: format!("{fingerprint} ({key_type})"),
            };
        }
        if let Some(denied) =
            last("Permission denied").or_else(|| last("Too many authentication failures"))
        {
            return ConnectError::Auth {
                host,
                port,
                user: self.target.user.clone(),
                tried: format!("{}; ssh said: {denied}", self.effective.keys_in_words()),
                command: self.effective.login_command(self.place, self.options),
            };
        }
        if said.contains("Connection refused") {
            return ConnectError::Refused { host, port };
        }
        if said.contains("timed out") {
            return ConnectError::Timeout {
                host,
                port,
                doing: "connecting",
                waited: deadline.allowed,
            };
        }
        // What ssh says until both have told which version they speak.
        if let Some(detail) = last("kex_exchange_identification: ") {
            return ConnectError::HungUp { host, port, detail };
        }
        if let Some(detail) = last("No route to host").or_else(|| last("Network is unreachable")) {
            return ConnectError::Unreachable { host, port, detail };
        }
        ConnectError::Ssh {
            host,
            port,
            detail: if said.is_empty() {
                "ssh ended with status 255 and said nothing".to_owned()
            } else {
                said.to_owned()
            },
        }
    }

    /// Type and fingerprint of the key that the host shows. ssh tells only when it is
    /// verbose, and the way to the host may lead over others, so ssh is asked again.
    fn shown_key(&self, deadline: Deadline) -> (String, String) {
        let mut command = ssh();
        command
            .args(arguments(self.place, self.options, deadline))
            .args(["-v", "--"])
            .arg(&self.place.host)
            .arg("true");
        let mut said = String::new();
        if let Ok((_stream, tail, mut carrier)) =
            Carrier::spawn(command, SSH_GRACE, Some(Signal::TERM))
            && carrier.wait(deadline.left()).is_some()
        {
            carrier.settle_stderr();
            said = tail.text();
        }
        said.lines()
            .rev()
            .find_map(|line| line.split_once("Server host key: "))
            .and_then(|(_, key)| key.trim().split_once(' '))
            .map_or_else(
                || ("unknown type".to_owned(), "fingerprint unknown".to_owned()),
                |(kind, fingerprint)| (kind.to_owned(), fingerprint.to_owned()),
            )
    }
}

fn find_fingerprint(said: &str) -> Option<String> {
    said.split_whitespace()
        .find(|word| word.starts_with("SHA256:"))
        .map(|word| word.trim_end_matches('.').to_owned())
}

/// A command line for people to run, in ssh's own words.
pub(super) fn printed_command(place: &SshPlace, options: &ConnectOptions) -> String {
    let mut words = vec!["ssh".to_owned()];
    for argument in configuration(place, options) {
        words.push(quote(&argument.to_string_lossy()));
    }
    words.push(quote(&place.host));
    words.join(" ")
}

/// Runs `ssh -G` and gives what it prints.
pub(super) fn print_configuration(
    place: &SshPlace,
    options: &ConnectOptions,
) -> Result<String, ConnectError> {
    let output = ssh()
        .args(configuration(place, options))
        .args(["-G", "--"])
        .arg(&place.host)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| {
            no_ssh(ConnectError::Spawn {
                program: "ssh".into(),
                source,
            })
        })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(ConnectError::Ssh {
        host: place.host.clone(),
        port: place.port.unwrap_or(22),
        detail: format!(
            "ssh does not accept its configuration: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    })
}
