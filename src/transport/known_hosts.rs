//! What the user's known_hosts files say about one host.
//!
//! libssh2's own check knows neither patterns nor markers nor key types, so the files
//! are read here, as sshd(8) describes them.

use std::fs;

use super::ssh_config::Effective;
use super::startup::Target;

/// What a line says apart from the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Marker {
    /// The host has this key.
    None,
    /// Certificates signed with this key are good.
    CertAuthority,
    /// This key must never be accepted.
    Revoked,
}

/// A line that speaks of the host.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) marker: Marker,
    /// Such as `ssh-ed25519`.
    pub(super) key_type: String,
    /// The key in base64.
    pub(super) key: String,
    /// `file:line`, for messages.
    pub(super) place: String,
}

/// Every line that speaks of one host.
#[derive(Debug, Default)]
pub(super) struct KnownHosts {
    pub(super) entries: Vec<Known>,
}

/// The outcome of a comparison with what is known.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// The key is the one on record.
    Match,
    /// Nothing is on record.
    Unknown,
    /// Another key is on record, there.
    Changed(String),
    /// The key is marked as revoked, there.
    Revoked(String),
}

impl KnownHosts {
    /// Reads the files that the configuration names. A file that cannot be read knows
    /// nobody, as with ssh.
    pub(super) fn read(effective: &Effective, target: &Target) -> Self {
        let name = effective.recorded_name(target);
        let mut known = Self::default();
        let mut plain = Self::default();
        for file in effective.known_hosts_files() {
            let Ok(text) = fs::read(&file) else {
                continue;
            };
            let text = String::from_utf8_lossy(&text);
            known.take_lines(&text, &name, &file.display().to_string());
            // An entry without a port vouches for the key at any port, as with ssh;
            // but that another key is shown at another port is no change.
            if name.starts_with('[') && effective.get("hostkeyalias").is_none() {
                plain.take_lines(
                    &text,
                    &target.host.to_lowercase(),
                    &file.display().to_string(),
                );
            }
        }
        if known
            .entries
            .iter()
            .all(|entry| entry.marker != Marker::None)
        {
            known
                .entries
                .extend(plain.entries.into_iter().map(|entry| Known {
                    place: format!("{} (for another port)", entry.place),
                    ..entry
                }));
        }
        known
    }

    fn take_lines(&mut self, text: &str, name: &str, file: &str) {
        for (number, line) in text.lines().enumerate() {
            let mut fields = line.split_whitespace();
            let Some(mut first) = fields.next() else {
                continue;
            };
            let marker = match first {
                "@cert-authority" => Marker::CertAuthority,
                "@revoked" => Marker::Revoked,
                comment if comment.starts_with('#') => continue,
                _ => Marker::None,
            };
            if marker != Marker::None {
                match fields.next() {
                    Some(names) => first = names,
                    None => continue,
                }
            }
            let (Some(key_type), Some(key)) = (fields.next(), fields.next()) else {
                continue;
            };
            if names_match(first, name) {
                self.entries.push(Known {
                    marker,
                    key_type: key_type.to_owned(),
                    key: key.to_owned(),
                    place: format!("{file}:{}", number + 1),
                });
            }
        }
    }

    /// The algorithms to propose for the host key: those with which a known key signs
    /// come first, so that a host with several keys shows the one on record. No
    /// certificates, and not SHA-1 (`ssh-rsa` as an algorithm).
    pub(super) fn preference(&self) -> String {
        const ALL: [(&str, &str); 5] = [
            ("ssh-ed25519", "ssh-ed25519"),
            ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256"),
            ("ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384"),
            ("ecdsa-sha2-nistp521", "ecdsa-sha2-nistp521"),
            ("ssh-rsa", "rsa-sha2-512,rsa-sha2-256"),
        ];
        let is_known = |key_type: &str| {
            self.entries
                .iter()
                .any(|entry| entry.marker == Marker::None && entry.key_type == key_type)
        };
        let (first, last): (Vec<_>, Vec<_>) = ALL
            .into_iter()
            .partition(|(key_type, _)| is_known(key_type));
        first
            .into_iter()
            .chain(last)
            .map(|(_, algorithms)| algorithms)
            .collect::<Vec<_>>()
            .join(",")
    }

    /// Compares the key that the host shows, in base64.
    pub(super) fn verdict(&self, key: &str) -> Verdict {
        let same = |marker: Marker| {
            self.entries
                .iter()
                .find(|entry| entry.marker == marker && entry.key == key)
        };
        if let Some(entry) = same(Marker::Revoked) {
            return Verdict::Revoked(entry.place.clone());
        }
        if same(Marker::None).is_some() {
            return Verdict::Match;
        }
        match self.entries.iter().find(|entry| {
            entry.marker == Marker::None && !entry.place.ends_with("(for another port)")
        }) {
            Some(entry) => Verdict::Changed(entry.place.clone()),
            None => Verdict::Unknown,
        }
    }
}

/// Whether the first field of a line names the host: patterns divided by commas, a
/// match of a negated one rules the line out; or one hashed name.
fn names_match(field: &str, name: &str) -> bool {
    if field.starts_with("|1|") {
        return hashed_match(field, name);
    }
    let mut matched = false;
    for pattern in field.split(',') {
        match pattern.strip_prefix('!') {
            Some(pattern) if glob(pattern.to_lowercase().as_bytes(), name.as_bytes()) => {
                return false;
            }
            Some(_) => {}
            None => matched |= glob(pattern.to_lowercase().as_bytes(), name.as_bytes()),
        }
    }
    matched
}

/// `*` and `?` as in ssh's patterns.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    // Back to the last star on a mismatch; that is enough, and never exponential.
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// Whether a hashed name (`|1|salt|hash`) is the host's. libssh2 computes the HMAC:
/// given a list of this one line, a key that cannot be right is a mismatch exactly if
/// the name is.
fn hashed_match(field: &str, name: &str) -> bool {
    let check = || -> Result<bool, ssh2::Error> {
        let session = ssh2::Session::new()?;
        let mut hosts = session.known_hosts()?;
        let line = format!("{field} ssh-ed25519 AAAAAAAAAAAAAAAAAAAAAAAA");
        hosts.read_str(&line, ssh2::KnownHostFileKind::OpenSSH)?;
        Ok(!name.contains('\0')
            && matches!(
                hosts.check(name, b"no key"),
                ssh2::CheckResult::Mismatch | ssh2::CheckResult::Match
            ))
    };
    check().unwrap_or(false)
}

/// Base64 as known_hosts has it; fingerprints go without the padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut value = 0_u32;
        for index in 0..3 {
            value = value << 8 | u32::from(group.get(index).copied().unwrap_or(0));
        }
        for index in 0..4 {
            if index <= group.len() {
                let digit = value >> (18 - 6 * index) & 63;
                text.push(char::from(DIGITS[digit as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(text: &str, name: &str) -> KnownHosts {
        let mut known = KnownHosts::default();
        known.take_lines(text, name, "file");
        known
    }

    #[test]
    fn lines_are_found_by_name_pattern_and_port() {
        let text = "# comment\n\nhost,10.0.0.1 ssh-ed25519 AAA one\n*.example.com,!bad.example.com ssh-rsa BBB\n[host]:2222 ssh-rsa CCC\nshort\n";
        assert_eq!(known(text, "host").entries[0].key, "AAA");
        assert_eq!(known(text, "10.0.0.1").entries[0].place, "file:3");
        assert_eq!(known(text, "a.example.com").entries[0].key, "BBB");
        assert!(known(text, "bad.example.com").entries.is_empty());
        assert_eq!(known(text, "[host]:2222").entries[0].key, "CCC");
        assert!(known(text, "other").entries.is_empty());
    }

    #[test]
    fn verdicts() {
        let known = known("host ssh-ed25519 AAA\n@revoked host ssh-rsa BAD\n", "host");
        assert_eq!(known.verdict("AAA"), Verdict::Match);
        assert_eq!(known.verdict("XXX"), Verdict::Changed("file:1".to_owned()));
        assert_eq!(known.verdict("BAD"), Verdict::Revoked("file:2".to_owned()));
        assert_eq!(KnownHosts::default().verdict("AAA"), Verdict::Unknown);
    }

    #[test]
    fn globs_match_as_ssh_has_them() {
        for (pattern, name, matches) in [
            ("*", "", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbb", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*.*.x", "a.b.c.x", true),
            ("", "a", false),
        ] {
            assert_eq!(
                glob(pattern.as_bytes(), name.as_bytes()),
                matches,
                "{pattern}"
            );
        }
    }

    #[test]
    fn hashed_names_are_recognised() {
        // Made with `ssh-keygen -H` for [127.0.0.1]:2222.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("known");
        std::fs::write(
            &file,
            "[127.0.0.1]:2222 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl\n",
        )
        .unwrap();
        let made = std::process::Command::new("ssh-keygen")
            .args(["-q", "-H", "-f"])
            .arg(&file)
            .output()
            .expect("ssh-keygen runs (Debian: openssh-client)");
        assert!(made.status.success());
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("|1|"), "{text}");
        assert_eq!(known(&text, "[127.0.0.1]:2222").entries.len(), 1);
        assert!(known(&text, "127.0.0.1").entries.is_empty());
        assert!(known(&text, "[127.0.0.1]:2223").entries.is_empty());
    }

    #[test]
    fn base64_pads() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"f"), "Zg==");
        assert_eq!(base64(b"fo"), "Zm8=");
        assert_eq!(base64(b"foobar"), "Zm9vYmFy");
    }
}
