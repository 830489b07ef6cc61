//! The user's effective ssh configuration, as `ssh -G` prints it: Match, Include and
//! most tokens are resolved there and nowhere else.

use std::path::{Path, PathBuf};

use super::startup::{Target, quote};
use super::{ConnectError, ConnectOptions, SshPlace, ssh_program};

/// The configuration for one host.
#[derive(Clone, Debug, Default)]
pub(super) struct Effective {
    /// Keyword in lower case, and the rest of the line.
    lines: Vec<(String, String)>,
    home: PathBuf,
}

impl Effective {
    /// Asks the ssh program.
    pub(super) fn query(place: &SshPlace, options: &ConnectOptions) -> Result<Self, ConnectError> {
        Ok(Self::parse(&ssh_program::print_configuration(
            place, options,
        )?))
    }

    /// What holds where there is no ssh program: the URL, the options and the defaults.
    #[cfg(feature = "libssh2")]
    pub(super) fn without_program(place: &SshPlace, options: &ConnectOptions) -> Self {
        let mut lines = vec![
            ("hostname".to_owned(), place.host.clone()),
            ("port".to_owned(), place.port.unwrap_or(22).to_string()),
        ];
        if let Some(user) = &place.user {
            lines.push(("user".to_owned(), user.clone()));
        }
        let mut push = |key: &str, value: String| lines.push((key.to_owned(), value));
        match &options.identity {
            Some(file) => {
                push("identityfile", file.to_string_lossy().into_owned());
                push("identityagent", "none".to_owned());
                push("identitiesonly", "yes".to_owned());
            }
            None => {
                for name in ["id_ed25519", "id_ecdsa", "id_rsa"] {
                    push("identityfile", format!("~/.ssh/{name}"));
                }
            }
        }
        match &options.known_hosts {
            Some(file) => push("userknownhostsfile", file.to_string_lossy().into_owned()),
            None => {
                push("userknownhostsfile", "~/.ssh/known_hosts".to_owned());
                push(
                    "globalknownhostsfile",
                    "/etc/ssh/ssh_known_hosts".to_owned(),
                );
            }
        }
        Self {
            lines,
            home: home(),
        }
    }

    fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(key, value)| (key.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Self {
            lines,
            home: home(),
        }
    }

    /// The value of a keyword; none if it is unset or `none`.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = self.lines.iter().find(|(name, _)| name == key)?;
        (!value.is_empty() && !value.eq_ignore_ascii_case("none")).then_some(value)
    }

    /// The first value of a keyword as it stands, `none` included.
    #[cfg(feature = "libssh2")]
    pub(super) fn raw<'a>(&'a self, key: &'a str) -> Option<&'a str> {
        self.all(key).next()
    }

    fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.lines
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// Whether a keyword is `yes` or `true`.
    #[cfg(feature = "libssh2")]
    pub(super) fn is_set(&self, key: &str) -> bool {
        matches!(self.get(key), Some("yes" | "true"))
    }

    /// Whether a way to authenticate is to be used.
    #[cfg(feature = "libssh2")]
    pub(super) fn allows(&self, method: &str) -> bool {
        let keyword = match method {
            "publickey" => "pubkeyauthentication",
            "password" => "passwordauthentication",
            _ => "kbdinteractiveauthentication",
        };
        !matches!(self.get(keyword), Some("no" | "false"))
            && self
                .get("preferredauthentications")
                .is_none_or(|methods| methods.split(',').any(|allowed| allowed == method))
    }

    /// Host, port and user that ssh would use.
    pub(super) fn target(&self, place: &SshPlace) -> Target {
        Target {
            host: self.get("hostname").unwrap_or(&place.host).to_owned(),
            port: self
                .get("port")
                .and_then(|port| port.parse().ok())
                .or(place.port)
                .unwrap_or(22),
            user: self
                .get("user")
                .map(str::to_owned)
                .or_else(|| place.user.clone())
                .or_else(|| std::env::var("USER").ok())
                .unwrap_or_else(|| "root".to_owned()),
        }
    }

    /// The private keys to offer, in order. Not all need exist.
    pub(super) fn identity_files(&self) -> Vec<PathBuf> {
        self.all("identityfile")
            .filter(|value| !value.eq_ignore_ascii_case("none"))
            .map(|value| self.path(value))
            .collect()
    }

    /// The files that host keys are looked for in, the user's first.
    pub(super) fn known_hosts_files(&self) -> Vec<PathBuf> {
        ["userknownhostsfile", "globalknownhostsfile"]
            .iter()
            .flat_map(|key| self.all(key))
            .flat_map(words)
            .filter(|word| !word.eq_ignore_ascii_case("none") && word != "/dev/null")
            .map(|word| self.path(&word))
            .collect()
    }

    /// A path of the configuration, with `~` and `%d` resolved, which `-G` leaves.
    pub(super) fn path(&self, value: &str) -> PathBuf {
        let value = value.trim_matches('"');
        let value = match value.strip_prefix("%d/") {
            Some(below) => return self.home.join(below),
            None => value.replace("%%", "%"),
        };
        match value.strip_prefix("~/") {
            Some(below) => self.home.join(below),
            None => PathBuf::from(value),
        }
    }

    /// The keys that a login would offer, for messages.
    pub(super) fn keys_in_words(&self) -> String {
        let present: Vec<_> = self
            .identity_files()
            .into_iter()
            .filter(|file| file.exists())
            .map(|file| file.display().to_string())
            .collect();
        let agent = self
            .get("identityagent")
            .map_or_else(|| std::env::var_os("SSH_AUTH_SOCK").is_some(), |_| true)
            && self.all("identityagent").next() != Some("none");
        let mut words = match present.as_slice() {
            [] => "no key file present".to_owned(),
            present => format!("key files {}", present.join(", ")),
        };
        words.push_str(if agent {
            ", and what ssh-agent holds"
        } else {
            ", no ssh-agent"
        });
        words
    }

    /// The name under which the host's key is recorded.
    pub(super) fn recorded_name(&self, target: &Target) -> String {
        match self.get("hostkeyalias") {
            Some(alias) => alias.to_owned(),
            None if target.port == 22 => target.host.to_lowercase(),
            None => format!("[{}]:{}", target.host.to_lowercase(), target.port),
        }
    }

    /// The file to which an accepted key is added.
    fn first_known_hosts(&self) -> PathBuf {
        self.known_hosts_files()
            .into_iter()
            .next()
            .unwrap_or_else(|| self.home.join(".ssh/known_hosts"))
    }

    /// What to run to accept the host's key.
    pub(super) fn accept_command(
        &self,
        place: &SshPlace,
        options: &ConnectOptions,
        target: &Target,
        key_type: &str,
    ) -> String {
        let direct = ["proxyjump", "proxycommand", "hostkeyalias"]
            .iter()
            .all(|key| self.get(key).is_none());
        if !direct {
            return ssh_program::printed_command(place, options);
        }
        let kind = match key_type {
            "ssh-ed25519" => "ed25519",
            "ssh-rsa" | "rsa-sha2-256" | "rsa-sha2-512" => "rsa",
            kind if kind.starts_with("ecdsa-") => "ecdsa",
            _ => "ed25519,ecdsa,rsa",
        };
        format!(
            "ssh-keyscan -t {kind} -p {} {} >> {}",
            target.port,
            quote(&target.host),
            quote(&self.first_known_hosts().to_string_lossy())
        )
    }

    /// What to run to forget the host's key.
    pub(super) fn forget_command(&self, file: impl AsRef<Path>, target: &Target) -> String {
        format!(
            "ssh-keygen -f {} -R {}",
            quote(&file.as_ref().to_string_lossy()),
            quote(&self.recorded_name(target))
        )
    }

    /// What to run to see the login fail in a terminal.
    pub(super) fn login_command(&self, place: &SshPlace, options: &ConnectOptions) -> String {
        ssh_program::printed_command(place, options)
    }
}

fn home() -> PathBuf {
    std::env::home_dir().unwrap_or_else(|| PathBuf::from("/root"))
}

/// Splits a configuration value into words; quotes hold one together.
fn words(value: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in value.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_ssh_is_understood() {
        let mut effective = Effective::parse(
            "user me\nhostname 10.0.0.1\nport 2222\nproxyjump none\nidentityfile ~/.ssh/a\nidentityfile \"/b c\"\nuserknownhostsfile ~/.ssh/known \"/x y\"\nglobalknownhostsfile /dev/null\nidentitiesonly yes\nhostkeyalias Alias\n",
        );
        effective.home = PathBuf::from("/home/me");
        let place = SshPlace {
            user: None,
            host: "web".to_owned(),
            port: None,
            path: "x".to_owned(),
        };
        let target = effective.target(&place);
        assert_eq!(
            (target.host.as_str(), target.port, target.user.as_str()),
            ("10.0.0.1", 2222, "me")
        );
        assert_eq!(effective.get("proxyjump"), None);
        assert_eq!(
            effective.identity_files(),
            [PathBuf::from("/home/me/.ssh/a"), PathBuf::from("/b c")]
        );
        assert_eq!(
            effective.known_hosts_files(),
            [PathBuf::from("/home/me/.ssh/known"), PathBuf::from("/x y")]
        );
        assert_eq!(effective.recorded_name(&target), "Alias");
    }
}
