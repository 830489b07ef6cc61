//! Stores through shared mappings. They reach the filesystem when the kernel writes
//! the page back, and opening and closing the file makes it do so, and waits.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::process::{describe, open_beneath};
use super::protocol::Settled;
use crate::tree::{RelPath, reach};

/// A shared mapping of a file in the mount.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    inode: u64,
    range: String,
    path: PathBuf,
}

pub(super) fn settle(
    root: BorrowedFd<'_>,
    dir: &Path,
    device: u64,
    everybody: bool,
    paths: Option<&[RelPath]>,
) -> Settled {
    let mut settled = Settled::default();
    match paths {
        Some(paths) => {
            for path in paths {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK;
                match reach::open_beneath(root, path, flags) {
                    Ok(file) => {
                        drop(file);
                        settled.files += 1;
                    }
                    // Removed meanwhile, or moved: then it is nobody's to carry, or known
                    // by its new path the next time.
                    Err(Errno::NOENT | Errno::NOTDIR) => {}
                    // Most of these were never mapped: its mode keeps everybody out.
                    Err(Errno::ACCESS) => {}
                    Err(error) => settled.failed.push((path.to_string(), describe(error))),
                }
            }
        }
        None => settle_all(root, dir, device, everybody, &mut settled),
    }
    settled
}

fn settle_all(
    root: BorrowedFd<'_>,
    dir: &Path,
    device: u64,
    everybody: bool,
    settled: &mut Settled,
) {
    // One mapping of each file is enough.
    let mut files: BTreeMap<u64, (String, Mapping)> = BTreeMap::new();
    let Ok(processes) = std::fs::read_dir("/proc") else {
        settled
            .failed
            .push(("/proc".into(), "cannot be read".into()));
        return;
    };
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        match std::fs::read(process.path().join("maps")) {
            Ok(maps) => {
                for line in maps.split(|byte| *byte == b'\n') {
                    if let Some(mapping) = parse(line, device) {
                        files
                            .entry(mapping.inode)
                            .or_insert_with(|| (pid.clone(), mapping));
                    }
                }
            }
            // It ended meanwhile, and so did its mappings.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(_) if may_be_inside(&process.path(), everybody) => settled.unseen += 1,
            Err(_) => {}
        }
    }
    for (pid, mapping) in files.into_values() {
        match open_mapped(root, dir, &pid, &mapping) {
            Ok(()) => settled.files += 1,
            Err(error) => settled
                .failed
                .push((mapping.path.display().to_string(), describe(error))),
        }
    }
}

/// Whether a process whose mappings cannot be seen may have any in the mount. One that an
/// ordinary user made lets in who has his ids only, in every respect.
fn may_be_inside(process: &Path, everybody: bool) -> bool {
    let Ok(status) = std::fs::read_to_string(process.join("status")) else {
        return everybody;
    };
    let own = rustix::process::getuid().as_raw();
    let is_own = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .is_some_and(|ids| ids.split_ascii_whitespace().any(|id| id.parse() == Ok(own)));
    everybody || is_own
}

/// A line of `maps`: range, permissions, offset, device, inode, path. Shared mappings
/// only, and also those that are not writable any more: they may have been.
fn parse(line: &[u8], device: u64) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ').map(<[u8]>::trim_ascii);
    let range = std::str::from_utf8(fields.next()?).ok()?;
    let permissions = fields.next()?;
    let text = |field: Option<&[u8]>| {
        field.and_then(|field| std::str::from_utf8(field).ok().map(str::to_owned))
    };
    fields.next()?;
    let mapped_device = text(fields.next())?;
    let inode = text(fields.next())?;
    let path = fields.next()?;
    if permissions.get(3) != Some(&b's') {
        return None;
    }
    let (major, minor) = mapped_device.split_once(':')?;
    let number = rustix::fs::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    (number == device).then_some(Mapping {
        inode: inode.parse().ok()?,
        range: range.to_owned(),
        path: PathBuf::from(OsStr::from_bytes(path)),
    })
}

fn open_mapped(
    root: BorrowedFd<'_>,
    dir: &Path,
    pid: &str,
    mapping: &Mapping,
) -> Result<(), Errno> {
    if let Ok(beneath) = mapping.path.strip_prefix(dir)
        && let Ok(file) = open_beneath(root, beneath, OFlags::RDONLY | OFlags::NONBLOCK)
        && rustix::fs::fstat(&file)?.st_ino == mapping.inode
    {
        return Ok(());
    }
    // Removed or renamed, an odd name, or seen through another mount: by the mapping
    // itself, which takes privileges.
    let by_mapping = rustix::fs::open(
        format!("/proc/{pid}/map_files/{}", mapping.range),
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    );
    match by_mapping {
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        // Without a name it is nobody's to carry.
        Err(_) if mapping.path.as_os_str().as_bytes().ends_with(b" (deleted)") => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn only_shared_mappings_of_the_mount_count() {
        let device = rustix::fs::makedev(0, 0x2f);
        let line = b"7f1000-7f2000 rw-s 00000000 00:2f 1234                       /m/a b";
        let mapping = parse(line, device).unwrap();
        assert_eq!(mapping.inode, 1234);
        assert_eq!(mapping.path, Path::new("/m/a b"));
        assert_eq!(mapping.range, "7f1000-7f2000");
        assert_eq!(parse(line, rustix::fs::makedev(0, 1)), None);
        let private = b"7f1000-7f2000 rw-p 00000000 00:2f 1234       /m/a";
        assert_eq!(parse(private, device), None);
        assert_eq!(parse(b"", device), None);
    }
}
