//! A small disk of its own, to fill up.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::program::run;

/// A mounted filesystem in a file. Unmounted when dropped. Needs root.
pub struct Disk {
    point: PathBuf,
}

impl Disk {
    /// Makes an ext4 of so many mebibytes in `image` and mounts it at `point`.
    pub fn new(image: &Path, point: &Path, mebibytes: u64) -> Self {
        // No reserved blocks: root shall find it full like anybody else.
        Self::made_by(
            &["mkfs.ext4", "-q", "-F", "-m", "0"],
            image,
            point,
            mebibytes,
        )
    }

    /// The same with whatever a `mkfs` makes.
    pub fn made_by(mkfs: &[&str], image: &Path, point: &Path, mebibytes: u64) -> Self {
        let file = std::fs::File::create(image).unwrap();
        file.set_len(mebibytes << 20).unwrap();
        drop(file);
        let deadline = Duration::from_secs(60);
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(image), deadline).ok();
        let disk = Self::mounted(&["-o", "loop", &image.display().to_string()], point);
        std::fs::remove_dir(point.join("lost+found")).ok();
        disk
    }

    /// What `mount` mounts with these arguments.
    pub fn mounted(arguments: &[&str], point: &Path) -> Self {
        std::fs::create_dir_all(point).unwrap();
        let mut mount = Command::new("mount");
        run(mount.args(arguments).arg(point), Duration::from_secs(60)).ok();
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
