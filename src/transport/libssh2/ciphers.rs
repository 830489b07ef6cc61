//! Which cipher is asked for first: throughput is mostly that of the cipher.

/// What libssh2 knows and is sound, the fastest first where the processor helps with AES:
/// OpenSSL computes AES-GCM with it, while libssh2's own ChaCha20 is portable C.
const WITH_AES: [&str; 6] = [
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
];

/// The preference, among the ciphers that the ssh configuration allows.
pub(super) fn preference(allowed: Option<&str>) -> String {
    order(allowed, has_aes())
}

fn order(allowed: Option<&str>, aes: bool) -> String {
    let mut ciphers = WITH_AES.to_vec();
    if !aes {
        ciphers.sort_by_key(|cipher| !cipher.starts_with("chacha20"));
    }
    if let Some(allowed) = allowed {
        ciphers.retain(|cipher| allowed.split(',').any(|name| name == *cipher));
        if ciphers.is_empty() {
            // libssh2 says that it knows none of them.
            return allowed.to_owned();
        }
    }
    ciphers.join(",")
}

#[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_decides_which_and_the_processor_in_which_order() {
        assert!(order(None, true).starts_with("aes128-gcm@openssh.com,"));
        assert!(order(None, false).starts_with("chacha20-poly1305@openssh.com,aes128-gcm"));
        let allowed = Some("aes256-ctr,aes256-gcm@openssh.com,3des-cbc");
        assert_eq!(order(allowed, true), "aes256-gcm@openssh.com,aes256-ctr");
        assert_eq!(order(Some("3des-cbc"), true), "3des-cbc");
    }
}
