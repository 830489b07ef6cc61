//! What is mounted where, from `/proc/self/mountinfo`: unlike a look at the path it
//! asks no filesystem, and so cannot hang on a dead one.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount of this namespace.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    pub(super) device: u64,
    pub(super) dir: PathBuf,
    pub(super) fs_type: String,
}

/// The topmost mount at exactly this directory.
pub(super) fn topmost(dir: &Path) -> io::Result<Option<Mounted>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .rfind(|mounted| mounted.dir == dir))
}

fn parse(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let dir = unescape(fields.nth(1)?);
    let fs_type = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mounted {
        device: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
        dir: PathBuf::from(OsString::from_vec(dir)),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line = b"36 35 0:45 / /home/a\\040b rw,relatime shared:1 - fuse.mirrorfs /x rw";
        assert_eq!(
            parse(line),
            Some(Mounted {
                device: rustix::fs::makedev(0, 45),
                dir: PathBuf::from("/home/a b"),
                fs_type: "fuse.mirrorfs".into(),
            })
        );
        assert_eq!(parse(b"nonsense"), None);
    }
}
