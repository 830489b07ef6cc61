//! A small disk of its own, to fill up.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::program::run;

/// A mounted ext4 in a file. Unmounted when dropped. Needs root.
pub struct Disk {
    point: PathBuf,
}

impl Disk {
    /// Makes a disk of so many mebibytes in `image` and mounts it at `point`.
    pub fn new(image: &Path, point: &Path, mebibytes: u64) -> Self {
        let file = std::fs::File::create(image).unwrap();
        file.set_len(mebibytes << 20).unwrap();
        drop(file);
        let deadline = Duration::from_secs(60);
        // No reserved blocks: root shall find it full like anybody else.
        run(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-m", "0"])
                .arg(image),
            deadline,
        )
        .ok();
        std::fs::create_dir_all(point).unwrap();
        run(
            Command::new("mount")
                .args(["-o", "loop"])
                .arg(image)
                .arg(point),
            deadline,
        )
        .ok();
        std::fs::remove_dir(point.join("lost+found")).ok();
        Self {
            point: point.to_owned(),
        }
    }

    /// Unmounts it, whoever still uses it.
    pub fn vanish(&self) {
        run(
            Command::new("umount").arg("-l").arg(&self.point),
            Duration::from_secs(60),
        )
        .ok();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount")
            .arg("-l")
            .arg(&self.point)
            .stderr(std::process::Stdio::null())
            .status()
            .ok();
    }
}
