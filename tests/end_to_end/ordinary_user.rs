//! "As root and as an ordinary user (through fusermount3)."

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::first_contact::PROJECT;
use crate::support::compare::{compare, differences, read};
use crate::support::disk::Disk;
use crate::support::{PROMPT, Sandbox, assert_same, eventually, wait_until};

/// The whole day of an ordinary user: mount, work, flush, a crash, unmount.
#[test]
fn an_ordinary_user_mounts_works_and_unmounts() {
    let sandbox = Sandbox::of_ordinary_user();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    sandbox.sh(&tree, PROJECT);
    sandbox.mount();
    // Root is not let in by default, so the tests look through the user's eyes.
    sandbox.sh(
        &tree,
        "echo new >made; mkdir d; mv docs/nothing d/; chmod 400 made; git init -q repo
         cd repo; echo x >x; git add x; git commit -qm x; git fsck --strict",
    );
    sandbox.flush();
    // Either side keeps its own index where both stage the same; what it stages is compared
    // at the end.
    let same = || {
        sandbox.sh(
            sandbox.root(),
            "diff -r --no-dereference --exclude=.mirrorfs --exclude=index tree peer",
        )
    };
    same();
    assert_eq!(
        fs::metadata(peer.join("made")).unwrap().uid(),
        fs::metadata(sandbox.home()).unwrap().uid()
    );
    sandbox.sh(&peer, "echo there >from-there");
    sandbox.flush();
    assert_eq!(sandbox.sh(&tree, "cat from-there"), "there\n");

    sandbox.sh(&tree, "echo before-the-crash >crash");
    sandbox.kill_daemon();
    // "A dead daemon must leave ENOTCONN, not an empty directory": nor the covered one. The
    // others come first, while the kernel takes down what the daemon had.
    assert!(sandbox.is_mounted(), "the mount went with its daemon");
    sandbox.sh(
        sandbox.root(),
        "! cat tree/crash 2>outside/said
         grep -e 'not connected' -e 'connection abort' -e 'canceled' outside/said",
    );
    sandbox.mount();
    assert_eq!(sandbox.sh(&tree, "cat crash"), "before-the-crash\n");
    sandbox.flush();
    same();
    sandbox.umount();
    let found = differences(&read(&tree), &read(&peer));
    assert!(found.is_empty(), "{found:?}");
}

/// Programs of other users look at what all mounts are made from, as mkfs.btrfs does.
/// They must not be led to a path in a mount that lets nobody else in.
#[test]
fn the_mount_does_not_get_in_other_users_way() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.mount();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let tree = sandbox.tree().display().to_string();
    let sources: Vec<_> = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields[1] == tree)
        .map(|fields| fields[0])
        .collect();
    assert_eq!(sources, ["mirrorfs"]);
    sandbox.umount();
}

/// "A read-only file that its creator still writes to (Git's objects) must work for an
/// unprivileged daemon too."
#[test]
fn a_read_only_file_can_be_written_by_who_made_it() {
    let sandbox = Sandbox::of_ordinary_user();
    sandbox.mount();
    sandbox.sh(
        &sandbox.tree(),
        r#"python3 -c '
import os
made = os.open("read-only", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o444)
for piece in range(50):
    os.write(made, b"x" * 1000)
os.ftruncate(made, 40000)
os.fsync(made)
os.close(made)
assert os.stat("read-only").st_size == 40000
'"#,
    );
    sandbox.flush();
    assert_eq!(
        fs::metadata(sandbox.peer().join("read-only"))
            .unwrap()
            .len(),
        40_000
    );
    sandbox.umount();
}

/// "The unprivileged mount does the same job: Git, cargo and npm work in it." (npm needs
/// its registry: `tests/real_work.rs`.)
#[test]
fn git_and_cargo_work_in_the_mount_of_an_ordinary_user() {
    let sandbox = Sandbox::of_ordinary_user();
    // The toolchain may lie in a home that is closed to others.
    let cargo = PathBuf::from(std::env::var_os("CARGO").expect("CARGO, which cargo sets"));
    let sysroot = cargo.ancestors().nth(2).unwrap();
    let toolchain = sandbox.root().join("toolchain");
    let _bound = if rustix::process::getuid().is_root() {
        Some(Disk::mounted(
            &["--bind", &sysroot.display().to_string()],
            &toolchain,
        ))
    } else {
        std::os::unix::fs::symlink(sysroot, &toolchain).unwrap();
        None
    };
    sandbox.mount();
    sandbox.sh(
        &sandbox.tree(),
        r#"PATH="$PWD/../toolchain/bin:$PATH"; umask 022
        cargo new --quiet --lib made; cd made
        echo 'fn main() { println!("cargo:rustc-env=BUILT=yes"); }' >build.rs
        mkdir src/bin; echo 'fn main() { println!("{} {}", made::add(40, 2), env!("BUILT")); }' >src/bin/say.rs
        [ "$(cargo run --quiet --offline)" = "42 yes" ]
        cargo test --quiet --offline >/dev/null
        cargo build --offline 2>&1 | grep -q Compiling && exit 1
        touch src/lib.rs; cargo build --offline 2>&1 | grep -q Compiling
        git add .; git commit -qm one; git gc -q; git fsck --strict; cd ..
        git clone -q made copy; cd copy; git switch -qc topic; git mv src lib; git commit -qam two
        git switch -q -; git merge -q topic; [ -z "$(git status --porcelain)" ]
        cd ../made; git clean -qfdx; [ -z "$(git status --porcelain)" ]"#,
    );
    sandbox.flush();
    sandbox.umount();
    assert_same(&sandbox.tree(), &sandbox.peer());
}

/// What the user may not read is listed, and does not stop the rest.
#[test]
fn what_cannot_be_read_is_listed_and_stops_nothing() {
    let sandbox = Sandbox::of_ordinary_user();
    let secret = sandbox.tree().join("root-only");
    sandbox.sh(&sandbox.tree(), "echo x >file");
    if !rustix::process::getuid().is_root() {
        // Only root can give a file away; elsewhere the user's own modes have to do.
        sandbox.sh(&sandbox.tree(), "echo s >root-only; chmod 000 root-only");
    } else {
        fs::write(&secret, "s").unwrap();
        sandbox.sh(sandbox.root(), "true");
        std::os::unix::fs::chown(&secret, Some(0), Some(0)).unwrap();
        fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    sandbox.mount();
    sandbox.try_flush().expect_code(1);
    assert!(sandbox.peer().join("file").exists());
    let status = sandbox.status();
    assert!(
        status
            .problems
            .iter()
            .any(|problem| problem.path == "root-only"),
        "{status:?}"
    );
    // 1: not everything is mirrored.
    sandbox.try_umount().expect_code(1);
    sandbox.assert_recorded();
}

/// Files of several users, worked on by several users in a mount that root has made: each
/// keeps its rights, and files belong to who made them.
#[test]
fn several_users_work_in_the_mount_of_root() {
    let sandbox = Sandbox::new();
    let tree = sandbox.tree();
    sandbox.sh(
        &tree,
        "mkdir shared private; chmod 1777 shared; chmod 700 private; echo s >private/s; echo r >shared/roots",
    );
    sandbox.mount();
    let as_nobody = |script: &str| {
        sandbox.sh(
            &tree,
            &format!("setpriv --reuid=nobody --regid=nogroup --clear-groups -- sh -ec '{script}'"),
        )
    };
    as_nobody(
        "echo mine >shared/mine; ! cat private/s 2>/dev/null; ! rm -f shared/roots 2>/dev/null
         ! sh -c \"echo x >shared/roots\" 2>/dev/null; mkdir shared/dir; echo x >shared/dir/x",
    );
    let nobody = fs::metadata(tree.join("shared/mine")).unwrap().uid();
    assert_ne!(nobody, 0);
    assert_eq!(
        fs::metadata(tree.join("shared/dir/x")).unwrap().uid(),
        nobody
    );
    assert_eq!(fs::metadata(tree.join("shared/roots")).unwrap().uid(), 0);
    sandbox.flush();
    eventually("the peer is the same", PROMPT, || {
        compare(&tree, &sandbox.peer())
    });
    wait_until("nothing is pending", PROMPT, || {
        sandbox.status().peer().pending_changes == 0
    });
    sandbox.umount();
}
