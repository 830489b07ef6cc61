//! Which SSH transport: libssh2, unless the user's configuration asks for something
//! that only the ssh program can do.

use std::fs;

use super::SshPlace;
use super::known_hosts::{KnownHosts, Marker};
use super::ssh_config::Effective;

/// What in the configuration needs the ssh program, as half a sentence; none if
/// libssh2 will do.
pub(super) fn needs_program(effective: &Effective, place: &SshPlace) -> Option<String> {
    let host = &place.host;
    for (key, name) in [
        ("proxyjump", "ProxyJump"),
        ("proxycommand", "ProxyCommand"),
        ("pkcs11provider", "PKCS11Provider"),
        ("certificatefile", "CertificateFile"),
        ("knownhostscommand", "KnownHostsCommand"),
        ("revokedhostkeys", "RevokedHostKeys"),
        ("bindaddress", "BindAddress"),
        ("bindinterface", "BindInterface"),
    ] {
        if effective.get(key).is_some() {
            return Some(format!(
                "the ssh configuration for {host} sets {name}, which libssh2 cannot do"
            ));
        }
    }
    if effective.get("controlpath").is_some()
        && (effective
            .get("controlmaster")
            .is_some_and(|value| value != "false" && value != "no")
            || effective
                .get("controlpath")
                .is_some_and(|path| effective.path(path).exists()))
    {
        return Some(format!(
            "the ssh configuration for {host} shares connections (ControlMaster), which libssh2 cannot do"
        ));
    }
    if !["publickey", "password", "keyboard-interactive"]
        .iter()
        .any(|method| effective.allows(method))
    {
        return Some(format!(
            "the ssh configuration for {host} allows neither keys nor passwords, and libssh2 is used with nothing else"
        ));
    }
    for file in effective.identity_files() {
        if !file.exists() {
            continue;
        }
        let beside = |suffix: &str| {
            let mut name = file.clone().into_os_string();
            name.push(suffix);
            std::path::PathBuf::from(name)
        };
        let hardware = file
            .file_name()
            .is_some_and(|name| name.to_string_lossy().ends_with("_sk"))
            || fs::read_to_string(beside(".pub")).is_ok_and(|key| key.starts_with("sk-"));
        if hardware {
            return Some(format!(
                "the key {} is on a security token, which libssh2 cannot use",
                file.display()
            ));
        }
        if beside("-cert.pub").exists() {
            return Some(format!(
                "the key {} has a certificate, which libssh2 cannot use",
                file.display()
            ));
        }
    }
    let target = effective.target(place);
    let known = KnownHosts::read(effective, &target);
    known
        .entries
        .iter()
        .find(|entry| entry.marker != Marker::None)
        .map(|entry| {
            format!(
                "{} has a {} line for {host}, which is left to the ssh program",
                entry.place,
                if entry.marker == Marker::Revoked {
                    "@revoked"
                } else {
                    "@cert-authority"
                }
            )
        })
}
