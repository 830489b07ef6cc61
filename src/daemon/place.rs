//! Whether a directory can be mounted over, and a peer used with it. Every check names
//! the path, the cause and the way out.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::failure::{Failure, OrFail};
use super::holders;
use super::mounts::{self, Mounts};
use super::state::canonical_as_far_as_it_exists;
use crate::tree::RESERVED;

/// Resolves the directory a user named as a tree. It may be a dead mount.
pub fn tree(dir: &Path) -> Result<PathBuf, Failure> {
    let name = dir.display();
    let tree = mounts::canonical(dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::new(format!("{name} does not exist"))
            .hint(format!("create it first: mkdir -p {name}")),
        _ => Failure::new(format!("cannot open {name}")).because(&error),
    })?;
    match fs::metadata(&tree) {
        Ok(found) if found.is_dir() => Ok(tree),
        Ok(_) => Err(Failure::new(format!("{name} is not a directory"))
            .hint("mount a directory; to mirror one file, mount the directory it is in")),
        // A dead mount is a directory, or was.
        Err(error) if mounts::says_dead(&error) => Ok(tree),
        Err(error) => Err(Failure::new(format!("cannot look at {name}")).because(&error)),
    }
}

/// Refuses a tree that other mounts or mirrors overlap with. `tree` is canonical, and
/// dead mounts of ours have been cleared from it.
pub fn alone(tree: &Path, mounts: &Mounts) -> Result<(), Failure> {
    let name = tree.display();
    if tree.parent().is_none() {
        return Err(
            Failure::new("the root of the filesystem cannot be mounted over")
                .hint("mount the directory you work in"),
        );
    }
    if let Some(mount) = mounts.mirror_above(tree) {
        if mount.path == tree {
            let user = match mount.user {
                Some(user) => format!(" by user {user}"),
                None => String::new(),
            };
            return Err(
                Failure::new(format!("{name} is already mounted by mirrorfs{user}"))
                    .hint(format!("see mirrorfs status {name}")),
            );
        }
        return Err(inside_another(tree, &mount.path));
    }
    for above in tree.ancestors().skip(1) {
        if above.join(reserved()).is_dir() {
            return Err(inside_another(tree, above));
        }
    }
    if let Some(mount) = mounts.below(tree) {
        return Err(Failure::new(format!(
            "{} is mounted inside {name}: a mount over {name} would hide it",
            mount.path.display()
        ))
        .hint(format!(
            "unmount {} first, or mirror another directory",
            mount.path.display()
        )));
    }
    Ok(())
}

fn inside_another(tree: &Path, outer: &Path) -> Failure {
    Failure::new(format!(
        "{} lies inside the mirror {}",
        tree.display(),
        outer.display()
    ))
    .hint(format!(
        "it is mirrored already as a part of that; if {} is a mirror no longer, remove {}",
        outer.display(),
        outer.join(reserved()).display()
    ))
}

fn reserved() -> &'static Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(RESERVED))
}

/// Refuses a local peer directory that cannot be one. Returns its path, canonical as
/// far as it exists; its last component may be missing, and the agent creates it.
pub fn local_peer(peer: &Path, tree: &Path) -> Result<PathBuf, Failure> {
    let name = peer.display();
    let path = canonical_as_far_as_it_exists(peer)
        .or_fail(|| format!("cannot resolve the peer {name}"))?;
    match fs::metadata(&path) {
        Ok(found) if !found.is_dir() => {
            return Err(Failure::new(format!("the peer {name} is not a directory"))
                .hint("name a directory, or one that does not exist yet"));
        }
        Ok(found) => {
            // The same directory may be reached by two paths, through a bind mount.
            if let Ok(own) = fs::metadata(tree)
                && (own.dev(), own.ino()) == (found.dev(), found.ino())
            {
                return Err(overlapping(peer, tree, "is"));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().unwrap_or(Path::new("/"));
            if !parent.is_dir() {
                return Err(Failure::new(format!(
                    "the peer {name} cannot be created: {} does not exist",
                    parent.display()
                ))
                .hint(format!(
                    "if it is a disk that is not mounted, mount it; else create it: mkdir -p {}",
                    parent.display()
                )));
            }
        }
        Err(error) => {
            return Err(Failure::new(format!("cannot look at the peer {name}")).because(&error));
        }
    }
    if path == tree {
        Err(overlapping(peer, tree, "is"))
    } else if path.starts_with(tree) {
        Err(overlapping(peer, tree, "lies inside"))
    } else if tree.starts_with(&path) {
        Err(overlapping(peer, tree, "contains"))
    } else {
        Ok(path)
    }
}

fn overlapping(peer: &Path, tree: &Path, how: &str) -> Failure {
    Failure::new(format!(
        "the peer {} {how} the tree {}{}",
        peer.display(),
        tree.display(),
        if how == "is" { " itself" } else { "" },
    ))
    .hint("choose a peer directory elsewhere, best on another disk or machine")
}

/// Checks that FUSE can be used: the device, and what an ordinary user needs to mount.
pub fn fuse() -> Result<(), Failure> {
    fuse_with(
        Path::new("/dev/fuse"),
        rustix::process::geteuid().is_root(),
        std::env::var_os("PATH"),
    )
}

fn fuse_with(device: &Path, root: bool, search: Option<std::ffi::OsString>) -> Result<(), Failure> {
    let name = device.display();
    let fusermount = search.is_some_and(|search| {
        std::env::split_paths(&search).any(|dir| dir.join("fusermount3").is_file())
    });
    if !root && !fusermount {
        return Err(Failure::new(
            "fusermount3 is not installed, and without it only root can mount",
        )
        .hint("install it (Debian, Ubuntu, Fedora: the package fuse3), or mount as root"));
    }
    let usable = fs::metadata(device).and_then(|found| {
        if !found.file_type().is_char_device() {
            return Err(io::Error::other("it is not a device"));
        }
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(device)
            .map(drop)
    });
    if let Err(error) = usable {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "ask the administrator for access to it (mode 0666 is usual)"
            }
            _ => {
                "load the kernel module: modprobe fuse; in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN. Without FUSE, mirrorfs sync DIR PEER still exchanges one round"
            }
        };
        return Err(
            Failure::new(format!("FUSE is not available: cannot open {name}"))
                .because(&error)
                .hint(hint),
        );
    }
    Ok(())
}

/// What is worth knowing before a mount, and does not stand in its way.
pub fn warnings(tree: &Path) -> Vec<String> {
    let mut warnings = Vec::new();
    let repository = tree
        .ancestors()
        .skip(1)
        .find(|above| above.join(".git").exists());
    if let Some(repository) = repository {
        warnings.push(format!(
            "{} is part of the Git repository {}: Git stops at the mount, so run it with GIT_DISCOVERY_ACROSS_FILESYSTEM=1 inside, or mount the whole repository",
            tree.display(),
            repository.display()
        ));
    }
    let holders = holders::of(tree);
    for holder in holders.iter().take(5) {
        let remedy = match holder.hold {
            holders::Hold::WorkingDirectory => {
                "it bypasses the mount until it enters the directory again (cd \"$PWD\")"
            }
            _ => "what it writes there bypasses the mount until it opens the file again",
        };
        warnings.push(format!("{holder}: {remedy}"));
    }
    if holders.len() > 5 {
        warnings.push(format!(
            "and {} more programs that use {}",
            holders.len() - 5,
            tree.display()
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    #[test]
    fn a_tree_is_an_existing_directory() {
        let (_guard, dir) = scratch();
        let failure = tree(&dir.join("missing")).unwrap_err();
        assert!(failure.message.contains("does not exist"), "{failure}");
        assert!(failure.hint.unwrap().contains("mkdir"));
        fs::write(dir.join("file"), "").unwrap();
        let failure = tree(&dir.join("file")).unwrap_err();
        assert!(failure.message.contains("not a directory"), "{failure}");
        std::os::unix::fs::symlink(&dir, dir.join("link")).unwrap();
        assert_eq!(tree(&dir.join("link")).unwrap(), dir);
    }

    #[test]
    fn a_mirror_inside_a_mirror_is_refused() {
        let (_guard, dir) = scratch();
        let mounts = Mounts::default();
        fs::create_dir_all(dir.join("outer/.mirrorfs")).unwrap();
        fs::create_dir_all(dir.join("outer/a/b")).unwrap();
        alone(&dir.join("outer"), &mounts).unwrap();
        let failure = alone(&dir.join("outer/a/b"), &mounts).unwrap_err();
        assert!(
            failure.message.ends_with(&format!(
                "lies inside the mirror {}",
                dir.join("outer").display()
            )),
            "{failure}"
        );
        assert!(alone(Path::new("/"), &mounts).is_err());
    }

    #[test]
    fn a_tree_that_holds_a_mount_is_refused() {
        // /proc is mounted wherever this runs. The tree need not exist for the look.
        let mounts = Mounts::read().unwrap();
        let below = mounts.below(Path::new("/proc"));
        let inner = below.map_or(Path::new("/proc"), |mount| &mount.path);
        let tree = inner.parent().unwrap();
        if tree.parent().is_some() {
            let failure = alone(tree, &mounts).unwrap_err();
            assert!(failure.message.contains("is mounted inside"), "{failure}");
        } else {
            assert!(mounts.below(tree).is_some());
        }
    }

    #[test]
    fn a_peer_is_apart_from_the_tree_and_its_parent_exists() {
        let (_guard, dir) = scratch();
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("deep")).unwrap();
        fs::write(dir.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&tree, dir.join("alias")).unwrap();
        let refused = |peer: &str| local_peer(&dir.join(peer), &tree).unwrap_err();

        assert!(refused("tree").message.ends_with("itself"));
        assert!(refused("alias").message.ends_with("itself"));
        assert!(refused("tree/deep").message.contains("lies inside"));
        assert!(refused("alias/new").message.contains("lies inside"));
        assert!(refused("").message.contains("contains"));
        assert!(refused("file").message.contains("not a directory"));
        let failure = refused("no/such/peer");
        assert!(
            failure
                .message
                .contains(&format!("{} does not exist", dir.join("no/such").display())),
            "{failure}"
        );
        assert!(failure.hint.unwrap().contains("mkdir -p"));
        assert_eq!(
            local_peer(&dir.join("tree2"), &tree).unwrap(),
            dir.join("tree2")
        );
    }

    #[test]
    fn a_missing_fuse_device_or_program_is_named() {
        let (_guard, dir) = scratch();
        let failure = fuse_with(&dir.join("fuse"), true, None).unwrap_err();
        assert!(failure.message.contains("cannot open"), "{failure}");
        assert!(failure.hint.unwrap().contains("modprobe fuse"));
        fs::write(dir.join("plain"), "").unwrap();
        let failure = fuse_with(&dir.join("plain"), true, None).unwrap_err();
        assert!(failure.to_string().contains("not a device"), "{failure}");

        let device = Path::new("/dev/null");
        fuse_with(device, true, None).unwrap();
        let failure = fuse_with(device, false, Some(dir.clone().into())).unwrap_err();
        assert!(failure.message.contains("fusermount3"), "{failure}");
        assert!(failure.hint.unwrap().contains("fuse3"));
        fs::write(dir.join("fusermount3"), "").unwrap();
        fuse_with(device, false, Some(dir.into())).unwrap();
    }

    #[test]
    fn a_larger_repository_is_worth_a_warning() {
        let (_guard, dir) = scratch();
        fs::create_dir_all(dir.join("repo/.git")).unwrap();
        fs::create_dir_all(dir.join("repo/part")).unwrap();
        assert_eq!(warnings(&dir.join("repo")), Vec::<String>::new());
        let found = warnings(&dir.join("repo/part"));
        assert_eq!(found.len(), 1);
        assert!(found[0].contains(&dir.join("repo").display().to_string()));
    }
}
