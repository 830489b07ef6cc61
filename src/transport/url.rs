//! Where a peer is: the text a user writes, checked once.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What the place of a peer starts with that comes by itself.
const ATTACHED: &str = "attached://";

/// A peer's place, as the user wrote it. Displays as exactly that.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PeerUrl {
    text: String,
    place: Place,
}

/// What a [`PeerUrl`] stands for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// A directory on this machine.
    Local(PathBuf),
    /// A directory on a machine that is reached by SSH.
    Ssh(SshPlace),
    /// A directory whose machine reaches this one: `host/path`, for people.
    Attached(String),
}

/// A directory on another machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SshPlace {
    /// The user, if the URL names one.
    pub user: Option<String>,
    /// The host name or address, an IPv6 address without its brackets, or a name from
    /// the user's ssh configuration. Never starts with `-`.
    pub host: String,
    /// The port, if the URL names one.
    pub port: Option<u16>,
    /// The directory: absolute, or relative to the user's home.
    pub path: String,
}

/// A text that names no peer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a peer: {why}. A peer is a directory (/path, ./path), user@host:path, or ssh://user@host:port/path"
)]
pub struct UrlError {
    text: String,
    why: &'static str,
}

impl PeerUrl {
    /// Reads a peer's place.
    ///
    /// * `ssh://user@host:port/path`: the path is absolute, or after `/~/` relative to
    ///   the home directory; `%XX` stands for a byte, as in every URL.
    /// * `user@host:path`, `host:path`, as scp has it: a colon before the first slash
    ///   makes it a host. An IPv6 address stands in brackets.
    /// * `attached://host/path`: whoever has the directory comes by itself
    ///   (`mirrorfs attach`).
    /// * Everything else is a path on this machine. One that contains a colon is
    ///   written with a slash before it: `./a:b`. A leading `~` is the shell's
    ///   business and not expanded.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let place = parse_place(text).map_err(|why| UrlError {
            text: text.to_owned(),
            why,
        })?;
        Ok(Self {
            text: text.to_owned(),
            place,
        })
    }

    /// The place of a directory of the machine `host`, which comes by itself.
    pub fn attached(host: &str, dir: &Path) -> Result<Self, UrlError> {
        Self::parse(&format!("{ATTACHED}{host}{}", dir.display()))
    }

    /// What it stands for.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The directory, if the peer is on this machine.
    pub fn local_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            Place::Ssh(_) | Place::Attached(_) => None,
        }
    }

    /// The same peer for a process with another working directory: a relative local
    /// path is taken from `base`. Fails only if the result is not valid UTF-8.
    pub fn resolved_against(&self, base: &Path) -> Result<Self, UrlError> {
        let Place::Local(path) = &self.place else {
            return Ok(self.clone());
        };
        if path.is_absolute() {
            return Ok(self.clone());
        }
        let relative = path.strip_prefix(".").unwrap_or(path);
        let path = base.join(relative);
        match path.to_str() {
            Some(text) => Ok(Self {
                text: text.to_owned(),
                place: Place::Local(path),
            }),
            None => Err(UrlError {
                text: path.display().to_string(),
                why: "its full path is not valid UTF-8",
            }),
        }
    }
}

impl fmt::Display for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for PeerUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        Self::parse(text)
    }
}

fn parse_place(text: &str) -> Result<Place, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.contains('\0') {
        return Err("it contains a NUL");
    }
    if let Some(rest) = text.strip_prefix("ssh://") {
        return parse_ssh(rest).map(Place::Ssh);
    }
    if let Some(rest) = text.strip_prefix(ATTACHED) {
        return if rest.split('/').next().is_some_and(|host| !host.is_empty()) {
            Ok(Place::Attached(rest.to_owned()))
        } else {
            Err("it names no host")
        };
    }
    if let Some((scheme, _)) = text.split_once("://")
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '+')
    {
        return Err("this kind of URL is not supported");
    }
    match split_scp(text)? {
        Some((authority, path)) => {
            let (user, host) = parse_authority(authority)?;
            Ok(Place::Ssh(SshPlace {
                user,
                host,
                port: None,
                path: home_relative(path)?,
            }))
        }
        None if text.starts_with('-') => {
            Err("it starts with a dash (write ./ before a directory of such a name)")
        }
        None => Ok(Place::Local(PathBuf::from(text))),
    }
}

/// Splits `host:path` at its colon; none if the text is a path.
fn split_scp(text: &str) -> Result<Option<(&str, &str)>, &'static str> {
    // The colon after a bracketed address, or the first one before any slash.
    let head = text.find('/').unwrap_or(text.len());
    let bracket = text[..head]
        .find('[')
        .filter(|at| *at == 0 || text.as_bytes().get(at.wrapping_sub(1)) == Some(&b'@'));
    let colon = match bracket {
        Some(open) => match text[open..].find("]:") {
            Some(close) => Some(open + close + 1),
            None if text[open..head].contains(':') => {
                return Err("the bracketed address is not followed by a colon and a path");
            }
            None => None,
        },
        None => text[..head].find(':'),
    };
    Ok(colon.map(|colon| (&text[..colon], &text[colon + 1..])))
}

fn parse_ssh(rest: &str) -> Result<SshPlace, &'static str> {
    let slash = rest.find('/').ok_or("it names no directory")?;
    let (authority, path) = rest.split_at(slash);
    let path = percent_decode(path)?;
    let path = match path.strip_prefix("/~") {
        Some("") => home_relative("~")?,
        Some(below) if below.starts_with('/') => home_relative(&path[1..])?,
        Some(_) => return Err("the home of another user (~user) is not supported"),
        None => path,
    };
    // The port follows the last colon outside of brackets.
    let after_bracket = authority.rfind(']').map_or(0, |at| at + 1);
    let (authority, port) = match authority[after_bracket..].rfind(':') {
        Some(colon) => {
            let (authority, port) = authority.split_at(after_bracket + colon);
            let port = port[1..]
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or("the port is not a number from 1 to 65535")?;
            (authority, Some(port))
        }
        None => (authority, None),
    };
    let (user, host) = parse_authority(authority)?;
    Ok(SshPlace {
        user,
        host,
        port,
        path,
    })
}

/// Takes `~` and `~/x` as what the user means by them; nothing else may start with `~`.
fn home_relative(path: &str) -> Result<String, &'static str> {
    if path.is_empty() {
        return Err("it names no directory");
    }
    let Some(below) = path.strip_prefix('~') else {
        return Ok(path.to_owned());
    };
    if !below.is_empty() && !below.starts_with('/') {
        return Err("the home of another user (~user) is not supported");
    }
    let below = below.trim_start_matches('/');
    Ok(if below.is_empty() { "." } else { below }.to_owned())
}

/// Splits `user@host` and checks both. They reach ssh's command line and a user's
/// `ProxyCommand`, so neither may look like an option or like shell syntax.
fn parse_authority(authority: &str) -> Result<(Option<String>, String), &'static str> {
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    if let Some(user) = user {
        if user.is_empty() || user.starts_with('-') {
            return Err("the user name is empty or starts with a dash");
        }
        if user
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || "'`\"$\\;&<>|(){}".contains(c))
        {
            return Err("the user name contains characters that are not allowed");
        }
    }
    let bracketed = host
        .strip_prefix('[')
        .map(|rest| rest.strip_suffix(']').ok_or("a bracket is not closed"))
        .transpose()?;
    let (name, extra) = match bracketed {
        Some(address) => (address, "-._:%"),
        None => (host, "-._"),
    };
    if name.is_empty() {
        return Err("the host name is empty");
    }
    if name.starts_with('-') {
        return Err("the host name starts with a dash");
    }
    if !name
        .chars()
        .all(|c| c.is_alphanumeric() || extra.contains(c))
    {
        return Err("the host name contains characters that are not allowed");
    }
    Ok((user.map(str::to_owned), name.to_owned()))
}

fn percent_decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, tail) = rest
            .split_first_chunk::<2>()
            .ok_or("a % is not followed by two hexadecimal digits")?;
        let value = std::str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.chars().all(|c| c.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .ok_or("a % is not followed by two hexadecimal digits")?;
        if value == 0 {
            return Err("it contains a NUL");
        }
        bytes.push(value);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| "its path is not valid UTF-8")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ssh(user: Option<&str>, host: &str, port: Option<u16>, path: &str) -> Place {
        Place::Ssh(SshPlace {
            user: user.map(str::to_owned),
            host: host.to_owned(),
            port,
            path: path.to_owned(),
        })
    }

    #[test]
    fn peers_are_read_as_their_users_mean_them() {
        let local = |path: &str| Place::Local(PathBuf::from(path));
        for (text, place) in [
            ("/srv/web", local("/srv/web")),
            ("web", local("web")),
            ("./a:b", local("./a:b")),
            ("/a:b", local("/a:b")),
            ("a/b:c", local("a/b:c")),
            ("~/web", local("~/web")),
            ("../x", local("../x")),
            ("host:web", ssh(None, "host", None, "web")),
            ("host:/srv/a b:c", ssh(None, "host", None, "/srv/a b:c")),
            ("me@host:/srv", ssh(Some("me"), "host", None, "/srv")),
            ("host:~/web", ssh(None, "host", None, "web")),
            ("host:~", ssh(None, "host", None, ".")),
            ("me@[::1]:web", ssh(Some("me"), "::1", None, "web")),
            ("[fe80::1%eth0]:/w", ssh(None, "fe80::1%eth0", None, "/w")),
            ("ssh://host/srv", ssh(None, "host", None, "/srv")),
            (
                "ssh://me@host:2222/srv",
                ssh(Some("me"), "host", Some(2222), "/srv"),
            ),
            (
                "ssh://me@[::1]:22/srv",
                ssh(Some("me"), "::1", Some(22), "/srv"),
            ),
            ("ssh://[::1]/srv", ssh(None, "::1", None, "/srv")),
            ("ssh://host/~/web", ssh(None, "host", None, "web")),
            ("ssh://host/~", ssh(None, "host", None, ".")),
            (
                "attached://host/srv/a b",
                Place::Attached("host/srv/a b".to_owned()),
            ),
            ("ssh://host/a%20b", ssh(None, "host", None, "/a b")),
            (
                "ssh://a@corp@host/x",
                ssh(Some("a@corp"), "host", None, "/x"),
            ),
        ] {
            let url = PeerUrl::parse(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(url.place(), &place, "{text}");
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_peer_is_refused_with_what_would_be() {
        for text in [
            "",
            "-oProxyCommand=x:path",
            "ssh://-oProxyCommand=x/path",
            "ssh://me@-host/path",
            "-l@host:path",
            "-dir",
            "host:",
            ":path",
            "@host:path",
            "ssh://host",
            "attached://",
            "attached:///srv",
            "ssh://host:0/x",
            "ssh://host:70000/x",
            "ssh://host:/x",
            "ssh:///x",
            "ssh://host/~other/x",
            "host:~other",
            "ssh://[::1/x",
            "[::1]",
            "http://host/x",
            "file:///x",
            "ho st:x",
            "a;b:x",
            "$(x)@host:x",
            "ssh://host/%zz",
            "ssh://host/%00",
            "a\0b",
        ] {
            match PeerUrl::parse(text) {
                Ok(url) => panic!("{text:?} gave {:?}", url.place()),
                Err(error) => assert!(error.to_string().contains("user@host:path"), "{error}"),
            }
        }
    }

    #[test]
    fn relative_paths_are_taken_from_a_directory() {
        let base = Path::new("/home/me");
        for (text, resolved) in [
            ("./a:b", "/home/me/a:b"),
            ("a", "/home/me/a"),
            ("/a", "/a"),
            ("host:a", "host:a"),
        ] {
            let url = PeerUrl::parse(text)
                .unwrap()
                .resolved_against(base)
                .unwrap();
            assert_eq!(url.to_string(), resolved);
            assert_eq!(PeerUrl::parse(resolved).unwrap(), url);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            if let Ok(url) = PeerUrl::parse(&text) {
                prop_assert_eq!(url.to_string(), text);
                if let Place::Ssh(place) = url.place() {
                    prop_assert!(!place.host.starts_with('-'));
                    prop_assert!(!place.path.is_empty());
                }
            }
        }

        #[test]
        fn urls_in_parts(text in "(ssh://)?[-a-z@:\\[\\]/~%]{0,12}") {
            let _ = PeerUrl::parse(&text);
        }
    }
}
