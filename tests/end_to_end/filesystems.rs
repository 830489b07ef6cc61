//! Lower on every filesystem that people have below their projects.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::support::disk::Disk;
use crate::support::{Sandbox, assert_same};

/// A project, as far as filesystems differ over one.
const PROJECT: &str = "
    git init -q -b main repo; cd repo
    for i in $(seq 40); do mkdir -p src/d$((i%4)); seq $i >src/d$((i%4))/f$i; done
    ln src/d1/f1 linked; ln -s src/d1/f1 pointer
    git add -A; git commit -qm one; cd ..
    mkdir -p kept/below; echo x >kept/below/file
    setfattr -n user.note -v attribute kept/below/file
    truncate -s 3M sparse; printf end >>sparse
    touch -d '2001-02-03 04:05:06.123456789' kept/below/file
    printf once >readonly; chmod 400 readonly";

/// Work on it that the mount has to get right.
const WORK: &str = "
    cd repo; git switch -qc topic; git mv src/d2 src/moved; echo more >>src/moved/f2
    git commit -qam two; git switch -q main; git merge -q topic; cd ..
    echo edited >>kept/below/file; mkdir other; echo y >other/y; mv other/y kept/
    rmdir other; echo saved >new; mv new readonly; rm -r repo/src/d3
    exec 5>kept/gone; echo unseen >&5; rm kept/gone; echo still >&5; exec 5>&-
    python3 - <<'PYTHON'
import mmap
with open('sparse', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 0)
    m[1000:1004] = b'mmap'
    m.flush()
PYTHON";

/// Everything that makes or breaks a project on some filesystem, from the first contact
/// to the plain files at the end.
fn works(sandbox: &Sandbox) {
    let tree = sandbox.tree();
    sandbox.sh(&tree, PROJECT);
    sandbox.mount();
    sandbox.flush();
    assert_same(&tree, &sandbox.peer());
    sandbox.sh(&tree, WORK);
    // Taken in from the peer, through the door.
    sandbox.sh(&sandbox.peer(), "echo theirs >kept/theirs; rm repo/linked");
    sandbox.flush();
    assert_same(&tree, &sandbox.peer());
    assert_eq!(
        fs::read_to_string(tree.join("kept/theirs")).unwrap(),
        "theirs\n"
    );
    sandbox.sh(&sandbox.peer().join("repo"), "git fsck --strict");

    // "They must survive FORGET and remount, or Git reads every file again."
    let inode = || fs::metadata(tree.join("repo/src/d1/f1")).unwrap().ino();
    sandbox.sh(&tree.join("repo"), "git checkout -q .; git status");
    let before = inode();
    sandbox.kill_daemon();
    sandbox.mount();
    assert_eq!(inode(), before);
    let status = sandbox.sh(&tree.join("repo"), "git status --porcelain");
    assert!(status.is_empty(), "{status}");
    sandbox.flush();
    assert_same(&tree, &sandbox.peer());

    // What is mounted there then is the disk.
    sandbox.try_umount().ok();
    sandbox.assert_recorded();
    assert_same(&tree, &sandbox.peer());
    sandbox.sh(&tree.join("repo"), "git fsck --strict");
}

#[test]
fn lower_on_xfs() {
    let sandbox = Sandbox::new();
    let image = sandbox.root().join("image");
    // 300 MiB is the smallest that xfs can be.
    let _disk = Disk::made_by(&["mkfs.xfs", "-q", "-f"], &image, &sandbox.tree(), 310);
    works(&sandbox);
}

#[test]
fn lower_on_btrfs() {
    let sandbox = Sandbox::new();
    let image = sandbox.root().join("image");
    let _disk = Disk::made_by(&["mkfs.btrfs", "-q", "-f"], &image, &sandbox.tree(), 200);
    works(&sandbox);
}

#[test]
fn lower_on_ext4() {
    let sandbox = Sandbox::new();
    let _disk = Disk::new(&sandbox.root().join("image"), &sandbox.tree(), 64);
    works(&sandbox);
}

#[test]
fn lower_on_tmpfs() {
    let sandbox = Sandbox::new();
    let _disk = Disk::mounted(&["-t", "tmpfs", "none"], &sandbox.tree());
    works(&sandbox);
}

/// As in a container: some files come from an image below.
#[test]
fn lower_on_overlayfs() {
    let sandbox = Sandbox::new();
    let layers = sandbox.root().join("layers");
    let _disk = Disk::mounted(&["-t", "tmpfs", "none"], &layers);
    sandbox.sh(
        &layers,
        "mkdir image upper work; mkdir -p image/lib/sub; echo old >image/lib/sub/file
         echo image >image/lib/untouched; echo image >image/lib/other",
    );
    let dir = layers.display();
    let options = format!("lowerdir={dir}/image,upperdir={dir}/upper,workdir={dir}/work");
    let _overlay = Disk::mounted(&["-t", "overlay", "-o", &options, "none"], &sandbox.tree());
    sandbox.mount();
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.sh(
        &sandbox.tree(),
        "echo new >>lib/sub/file; echo more >>lib/other; mv lib moved; rm moved/untouched",
    );
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.try_umount().ok();
    sandbox.assert_recorded();
    works(&sandbox);
}
