//! From nothing to a running command: connecting, host key, authentication.
//!
//! Everything here blocks, each call for no longer than what is left until the deadline.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt;
use ssh2::{Channel, ErrorCode, KeyboardInteractivePrompt, MethodType, Prompt, Session};

use super::super::known_hosts::{KnownHosts, Verdict, base64};
use super::super::secret::Secret;
use super::super::ssh_config::Effective;
use super::super::startup::Target;
use super::super::{ConnectError, ConnectOptions, Deadline, SshPlace};
use super::{Refusal, Shared, ciphers};

/// libssh2's error codes that are told apart, from libssh2.h.
const KEX_FAILURE: i32 = -5;
/// The socket failed, or was closed at the other end.
const SOCKET: [i32; 3] = [-7, -13, -43];
const KEY_EXCHANGE_FAILURE: i32 = -8;
const TIMEOUT: i32 = -9;
const METHOD_NOT_SUPPORTED: i32 = -33;
const NOT_DECRYPTED: i32 = -16;

/// How much the peer may send ahead. At 50 ms of round trip it allows 160 MB/s, and it
/// bounds what libssh2 holds for a reader that does not read.
const WINDOW: u32 = 8 << 20;
const PACKET: u32 = 32 << 10;

/// How long the kernel goes on with data that the peer does not acknowledge.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// Everything that an attempt needs to know.
pub(super) struct Login {
    pub(super) place: SshPlace,
    pub(super) options: ConnectOptions,
    pub(super) effective: Effective,
    pub(super) target: Target,
    pub(super) deadline: Deadline,
}

/// A connection with a running command. Fields drop in this order, and the channel
/// must go before the session.
pub(super) struct Open {
    pub(super) channel: Channel,
    pub(super) session: Session,
    pub(super) tcp: TcpStream,
}

impl Login {
    /// Connects, authenticates and starts the command.
    pub(super) fn open(&self, shared: &Shared, command: &str) -> Result<Open, Refusal> {
        let tcp = self.dial()?;
        *shared.tcp.lock() = Some(tcp.try_clone()?);
        let mut session = Session::new().map_err(|error| self.failed(&error, "starting"))?;
        let known = KnownHosts::read(&self.effective, &self.target);
        session
            .method_pref(MethodType::HostKey, &known.preference())
            .map_err(|error| self.failed(&error, "choosing algorithms"))?;
        let ciphers = ciphers::preference(self.effective.get("ciphers"));
        for direction in [MethodType::CryptCs, MethodType::CryptSc] {
            session
                .method_pref(direction, &ciphers)
                .map_err(|error| self.failed(&error, "choosing algorithms"))?;
        }
        session.set_tcp_stream(tcp.try_clone()?);
        self.limit(&session);
        session.handshake().map_err(|error| self.shaken(&error))?;
        self.check_host_key(&session, &known)?;
        self.authenticate(&session)?;
        self.limit(&session);
        let mut channel = session
            .channel_open("session", WINDOW, PACKET, None)
            .map_err(|error| self.failed(&error, "opening a channel"))?;
        self.limit(&session);
        channel
            .exec(command)
            .map_err(|error| self.failed(&error, "starting the agent"))?;
        Ok(Open {
            channel,
            session,
            tcp,
        })
    }

    /// Sets how long the next call may block.
    fn limit(&self, session: &Session) {
        let left = self.deadline.left().as_millis();
        session.set_timeout(u32::try_from(left).unwrap_or(u32::MAX));
    }

    fn dial(&self) -> Result<TcpStream, ConnectError> {
        let Target { host, port, .. } = &self.target;
        let family = self.effective.get("addressfamily");
        let addresses: Vec<SocketAddr> = (host.as_str(), *port)
            .to_socket_addrs()
            .map_err(|error| ConnectError::UnknownHost {
                host: host.clone(),
                detail: error.to_string(),
            })?
            .filter(|address| match family {
                Some("inet") => address.is_ipv4(),
                Some("inet6") => address.is_ipv6(),
                _ => true,
            })
            .collect();
        let mut last = None;
        for address in addresses {
            match TcpStream::connect_timeout(&address, self.deadline.left()) {
                Ok(tcp) => {
                    tcp.set_nodelay(true)?;
                    sockopt::set_socket_keepalive(&tcp, true).map_err(io::Error::from)?;
                    sockopt::set_tcp_keepidle(&tcp, Duration::from_secs(15))
                        .map_err(io::Error::from)?;
                    sockopt::set_tcp_keepintvl(&tcp, Duration::from_secs(15))
                        .map_err(io::Error::from)?;
                    let unacknowledged = u32::try_from(UNACKNOWLEDGED.as_millis());
                    sockopt::set_tcp_user_timeout(&tcp, unacknowledged.unwrap_or(60_000))
                        .map_err(io::Error::from)?;
                    return Ok(tcp);
                }
                Err(error) => last = Some(error),
            }
        }
        let (host, port) = (host.clone(), *port);
        Err(match last {
            None => ConnectError::UnknownHost {
                host,
                detail: "it has no address of the family asked for".to_owned(),
            },
            Some(error) if error.kind() == ErrorKind::ConnectionRefused => {
                ConnectError::Refused { host, port }
            }
            Some(error) if error.kind() == ErrorKind::TimedOut => ConnectError::Timeout {
                host,
                port,
                doing: "connecting",
                waited: self.deadline.allowed,
            },
            Some(error) => ConnectError::Unreachable {
                host,
                port,
                detail: error.to_string(),
            },
        })
    }

    /// Compares the key that the host shows with the one on record; never accepts
    /// another.
    fn check_host_key(&self, session: &Session, known: &KnownHosts) -> Result<(), ConnectError> {
        let shown = session
            .host_key()
            .zip(session.host_key_hash(ssh2::HashType::Sha256));
        let Some(((blob, _), hash)) = shown else {
            return Err(self.ssh("the host showed no key".to_owned()));
        };
        let key_type = blob_type(blob);
        let fingerprint = format!("SHA256:{}", base64(hash).trim_end_matches('='));
        let (host, port) = (self.target.host.clone(), self.target.port);
        match known.verdict(&base64(blob)) {
            Verdict::Match => Ok(()),
            Verdict::Unknown => Err(ConnectError::HostKeyUnknown {
                command: self.effective.accept_command(
                    &self.place,
                    &self.options,
                    &self.target,
                    &key_type,
                ),
                host,
                port,
                key: format!("{fingerprint} ({key_type})"),
            }),
            Verdict::Changed(recorded) => {
                let file = recorded
                    .rsplit_once(':')
                    .map_or(recorded.as_str(), |(file, _)| file);
                Err(ConnectError::HostKeyChanged {
                    command: self.effective.forget_command(file, &self.target),
                    host,
                    port,
                    key: format!("{fingerprint} ({key_type})"),
                    recorded,
                })
            }
            Verdict::Revoked(recorded) => Err(ConnectError::HostKeyRevoked {
                host,
                port,
                fingerprint,
                recorded,
            }),
        }
    }

    /// Offers keys until one is taken: those that ssh-agent holds, then the key files; then
    /// a password, if one is known.
    fn authenticate(&self, session: &Session) -> Result<(), Refusal> {
        let user = &self.target.user;
        self.limit(session);
        let offered = match session.auth_methods(user) {
            Ok(methods) => methods.to_owned(),
            // "none" was enough: an account that lets everybody in.
            Err(_) if session.authenticated() => return Ok(()),
            Err(error) => return Err(self.failed(&error, "authenticating")),
        };
        let takes = |method: &str| {
            offered.split(',').any(|offered| offered == method) && self.effective.allows(method)
        };
        let mut tried = Tried::default();
        if takes("publickey")
            && (self.try_agent(session, &mut tried)? || self.try_files(session, &mut tried)?)
        {
            return Ok(());
        }
        if (takes("password") || takes("keyboard-interactive"))
            && self.try_password(session, takes("password"), &mut tried)?
        {
            return Ok(());
        }
        if tried.names.is_empty() {
            tried.names.push(if takes("publickey") {
                "no keys to offer: no ssh-agent and no key file".to_owned()
            } else {
                format!("the host takes {offered}, and nothing of that is to be used")
            });
        }
        Err(self.denied(tried))
    }

    /// Offers the password that was asked for, if it was: as such, or as the answer to the
    /// one hidden question of a host that asks.
    fn try_password(
        &self,
        session: &Session,
        plain: bool,
        tried: &mut Tried,
    ) -> Result<bool, Refusal> {
        let Target { host, port, user } = &self.target;
        let secret = Secret::password(user, host, *port);
        let Some(password) = secret.answer() else {
            tried
                .names
                .push("a password, which nobody was there to give".to_owned());
            tried.wants(secret);
            return Ok(false);
        };
        self.limit(session);
        let result = if plain {
            session.userauth_password(user, &password)
        } else {
            session.userauth_keyboard_interactive(user, &mut Answers(&password))
        };
        match result {
            Ok(()) => {
                secret.was_right();
                Ok(true)
            }
            Err(error) => {
                secret.forget();
                tried.wants(secret);
                self.note(&error, "the password".to_owned(), tried)?;
                Ok(false)
            }
        }
    }

    fn try_agent(&self, session: &Session, tried: &mut Tried) -> Result<bool, Refusal> {
        let socket = match self.effective.raw("identityagent") {
            Some("none") => return Ok(false),
            None | Some("SSH_AUTH_SOCK") => std::env::var_os("SSH_AUTH_SOCK").map(PathBuf::from),
            Some(value) => match value.strip_prefix('$') {
                Some(name) => std::env::var_os(name).map(PathBuf::from),
                None => Some(self.effective.path(value)),
            },
        };
        let Some(socket) = socket.filter(|socket| !socket.as_os_str().is_empty()) else {
            return Ok(false);
        };
        let opened = || -> Result<_, ssh2::Error> {
            let mut agent = session.agent()?;
            agent.set_identity_path(&socket)?;
            agent.connect()?;
            agent.list_identities()?;
            let identities = agent.identities()?;
            Ok((agent, identities))
        };
        let (agent, mut identities) = match opened() {
            Ok(opened) => opened,
            Err(error) => {
                tried.names.push(format!(
                    "the ssh-agent at {} does not answer ({})",
                    socket.display(),
                    error.message()
                ));
                return Ok(false);
            }
        };
        // Keys that the configuration names first: a host closes the connection after
        // some failures (six by default).
        let named: Vec<String> = self
            .effective
            .identity_files()
            .iter()
            .filter_map(|file| public_half(file))
            .collect();
        let is_named = |blob: &[u8]| named.contains(&base64(blob));
        if self.effective.is_set("identitiesonly") {
            identities.retain(|identity| is_named(identity.blob()));
        }
        identities.sort_by_key(|identity| !is_named(identity.blob()));
        for identity in identities {
            let kind = blob_type(identity.blob());
            let name = format!("{} from ssh-agent", identity.comment());
            if kind.starts_with("sk-") || kind.contains("-cert-") {
                tried
                    .names
                    .push(format!("{name}: libssh2 cannot use {kind}"));
                continue;
            }
            self.limit(session);
            match agent.userauth(&self.target.user, &identity) {
                Ok(()) => return Ok(true),
                Err(error) => self.note(&error, name, tried)?,
            }
        }
        Ok(false)
    }

    fn try_files(&self, session: &Session, tried: &mut Tried) -> Result<bool, Refusal> {
        for file in self.effective.identity_files() {
            let Ok(key) = fs::read_to_string(&file) else {
                if self.options.identity.is_some() {
                    tried
                        .names
                        .push(format!("{} cannot be read", file.display()));
                }
                continue;
            };
            let name = file.display().to_string();
            let secret = is_encrypted(&key).then(|| Secret::passphrase(&file));
            let passphrase = secret.as_ref().and_then(Secret::answer);
            if let (Some(secret), None) = (&secret, &passphrase) {
                tried.names.push(format!(
                    "{name} has a passphrase, which nobody was there to give: load it with ssh-add {name}"
                ));
                tried.wants(secret.clone());
                continue;
            }
            self.limit(session);
            let user = &self.target.user;
            match session.userauth_pubkey_file(user, None, &file, passphrase.as_deref()) {
                Ok(()) => {
                    if let Some(secret) = secret {
                        secret.was_right();
                    }
                    return Ok(true);
                }
                Err(error) => {
                    if let Some(secret) = secret
                        && error.code() == ErrorCode::Session(NOT_DECRYPTED)
                    {
                        secret.forget();
                        tried.wants(secret);
                    }
                    self.note(&error, name, tried)?;
                }
            }
        }
        Ok(false)
    }

    /// Notes a key that was not taken; gives up if it was not about the key.
    fn note(&self, error: &ssh2::Error, name: String, tried: &mut Tried) -> Result<(), Refusal> {
        if matches!(error.code(), ErrorCode::Session(code) if code == TIMEOUT || SOCKET.contains(&code))
        {
            if tried.names.is_empty() {
                return Err(self.failed(error, "authenticating"));
            }
            // The host hangs up after too many keys.
            tried.names.push(format!("{name}: {}", error.message()));
            return Err(self.denied(std::mem::take(tried)));
        }
        let why = match error.code() {
            // -18: authentication failed; -19: public key not accepted.
            ErrorCode::Session(-18 | -19) => "not accepted".to_owned(),
            _ => error.message().to_owned(),
        };
        tried.names.push(format!("{name}: {why}"));
        Ok(())
    }

    fn denied(&self, tried: Tried) -> Refusal {
        Refusal {
            error: ConnectError::Auth {
                host: self.target.host.clone(),
                port: self.target.port,
                user: self.target.user.clone(),
                tried: tried.names.join("; "),
                command: self.effective.login_command(&self.place, &self.options),
            },
            program_may_do_better: true,
            wants: tried.wants.map(Box::new),
        }
    }

    fn ssh(&self, detail: String) -> ConnectError {
        ConnectError::Ssh {
            host: self.target.host.clone(),
            port: self.target.port,
            detail,
        }
    }

    /// Why the connection did not come to be one by SSH.
    fn shaken(&self, error: &ssh2::Error) -> Refusal {
        match error.code() {
            ErrorCode::Session(code) if SOCKET.contains(&code) && !self.deadline.passed() => {
                ConnectError::HungUp {
                    host: self.target.host.clone(),
                    port: self.target.port,
                    detail: error.message().to_owned(),
                }
                .into()
            }
            _ => self.failed(error, "negotiating"),
        }
    }

    fn failed(&self, error: &ssh2::Error, doing: &'static str) -> Refusal {
        let code = match error.code() {
            ErrorCode::Session(code) | ErrorCode::SFTP(code) => code,
        };
        if code == TIMEOUT || self.deadline.passed() {
            return ConnectError::Timeout {
                host: self.target.host.clone(),
                port: self.target.port,
                doing,
                waited: self.deadline.allowed,
            }
            .into();
        }
        Refusal {
            error: self.ssh(format!("libssh2 failed {doing}: {}", error.message())),
            program_may_do_better: matches!(
                code,
                KEX_FAILURE | KEY_EXCHANGE_FAILURE | METHOD_NOT_SUPPORTED
            ),
            wants: None,
        }
    }
}

/// What was offered to the host in vain.
#[derive(Default)]
struct Tried {
    /// In words.
    names: Vec<String>,
    wants: Option<Secret>,
}

impl Tried {
    /// Something could be offered that is not known yet; the first is asked for first.
    fn wants(&mut self, secret: Secret) {
        if self.wants.is_none() && secret.may_be_asked() {
            self.wants = Some(secret);
        }
    }
}

/// Answers a host's questions: the hidden ones with the password, others with nothing.
struct Answers<'a>(&'a str);

impl KeyboardInteractivePrompt for Answers<'_> {
    fn prompt(&mut self, _: &str, _: &str, prompts: &[Prompt<'_>]) -> Vec<String> {
        let answer = |prompt: &Prompt<'_>| match prompt.echo {
            true => String::new(),
            false => self.0.to_owned(),
        };
        prompts.iter().map(answer).collect()
    }
}

/// The type that a key in SSH's binary form names first.
fn blob_type(blob: &[u8]) -> String {
    let named = || {
        let (length, rest) = blob.split_first_chunk::<4>()?;
        rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)
    };
    String::from_utf8_lossy(named().unwrap_or(b"unknown type")).into_owned()
}

/// The public key beside a private one, in base64.
fn public_half(file: &Path) -> Option<String> {
    let mut name = file.as_os_str().to_owned();
    name.push(".pub");
    let text = fs::read_to_string(name).ok()?;
    text.split_whitespace().nth(1).map(str::to_owned)
}

/// Whether a private key is protected by a passphrase.
fn is_encrypted(key: &str) -> bool {
    // In OpenSSH's own format the name of the cipher comes first; this is "none".
    const PLAIN: &str = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU";
    if key.contains("BEGIN OPENSSH PRIVATE KEY") {
        return !key.lines().any(|line| line.starts_with(PLAIN));
    }
    key.contains("ENCRYPTED")
}
