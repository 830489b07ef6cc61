//! Lower on every filesystem that people have below their projects.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::support::disk::Disk;
use crate::support::{PROMPT, Sandbox, assert_same, eventually};

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

/// As on a system that was started from an image: the layers are on different filesystems,
/// and files have other device numbers than directories, and the same inode numbers. With
/// `xino=on` they are one filesystem to whoever looks.
#[test]
fn lower_on_overlayfs_of_different_filesystems() {
    let sandbox = Sandbox::new();
    let (image, layers) = (sandbox.root().join("image"), sandbox.root().join("layers"));
    let _disk = Disk::mounted(&["-t", "tmpfs", "none"], &layers);
    sandbox.sh(&layers, "mkdir upper work");
    sandbox.sh(
        sandbox.root(),
        "mkdir -p image/lib; echo old >image/lib/file",
    );
    let options = format!(
        "lowerdir={},upperdir={}/upper,workdir={}/work",
        image.display(),
        layers.display(),
        layers.display()
    );
    let mixed = format!("xino=off,{options}");
    let overlay = Disk::mounted(&["-t", "overlay", "-o", &mixed, "none"], &sandbox.tree());
    sandbox
        .try_mount(sandbox.peer())
        .expect_code(1)
        .expect_said(&["overlay", "xino=on"]);
    assert_eq!(
        fs::read_dir(sandbox.tree()).unwrap().count(),
        1,
        "untouched"
    );
    drop(overlay);
    let one = format!("xino=on,{options}");
    let _overlay = Disk::mounted(&["-t", "overlay", "-o", &one, "none"], &sandbox.tree());
    works(&sandbox);
    assert_eq!(
        fs::read_to_string(sandbox.peer().join("lib/file")).unwrap(),
        "old\n"
    );
}

/// What shows another device inside the tree is no mount, and all the same another
/// filesystem: a subvolume of btrfs is said not to be mirrored, nobody gets into it, and
/// whatever becomes of the directory around it, it stays as it is.
#[test]
fn a_subvolume_inside_the_tree_is_left_alone() {
    let sandbox = Sandbox::new();
    let (tree, image) = (sandbox.tree(), sandbox.root().join("image"));
    let _disk = Disk::made_by(&["mkfs.btrfs", "-q", "-f"], &image, &tree, 200);
    sandbox.sh(
        &tree,
        "mkdir a; echo x >a/file; btrfs -q subvolume create a/inner; echo own >a/inner/file",
    );
    sandbox
        .mount()
        .expect_said(&["a/inner is not mirrored", "another filesystem"]);
    // 1: not everything is mirrored.
    sandbox.try_flush().expect_code(1);
    assert!(sandbox.peer().join("a/file").exists());
    assert!(!sandbox.peer().join("a/inner").exists());
    let status = sandbox.status();
    let problems = status.problems.iter();
    let told: Vec<_> = problems.filter(|told| told.path == "a/inner").collect();
    assert_eq!(told.len(), 1, "{:?}", status.problems);
    sandbox.sh(
        &tree,
        "for way in 'cat a/inner/file' 'touch a/inner/new' 'rmdir a/inner' 'mv a/inner b' 'rm -r a'; do
             $way 2>/dev/null && exit 1; done; mkdir -p a; echo again >a/file",
    );
    sandbox.sh(&sandbox.peer(), "echo theirs >other");
    eventually("the rest is mirrored", PROMPT, || {
        let here = fs::read_to_string(tree.join("other")).unwrap_or_default();
        let there = fs::read_to_string(sandbox.peer().join("a/file")).unwrap_or_default();
        match (here.as_str(), there.as_str()) {
            ("theirs\n", "again\n") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    sandbox.sh(&sandbox.peer(), "rm -r a; echo last >other");
    eventually("the deletion has been taken in", PROMPT, || {
        let other = fs::read_to_string(tree.join("other")).unwrap_or_default();
        if other == "last\n" && !tree.join("a/file").exists() {
            Ok(())
        } else {
            Err(other)
        }
    });
    sandbox.try_umount().expect_code(1);
    let inner = fs::read_to_string(tree.join("a/inner/file")).unwrap();
    assert_eq!(inner, "own\n");
}

/// "Mounts inside the tree are refused": one that is there before.
#[test]
fn a_filesystem_inside_the_tree_is_refused() {
    let sandbox = Sandbox::new();
    let inside = sandbox.tree().join("a/mounted");
    let _disk = Disk::mounted(&["-t", "tmpfs", "none"], &inside);
    let path = inside.display().to_string();
    sandbox
        .try_mount(sandbox.peer())
        .expect_code(1)
        .expect_said(&["is mounted inside", &path]);
    assert!(!sandbox.tree().join(".mirrorfs").exists());
    sandbox.assert_down();
}

/// One that comes later lies on the mount, and is none of its business: nobody works
/// through it, and what the peer changes below it is said not to be done.
#[test]
fn a_filesystem_mounted_inside_later_is_not_touched() {
    let sandbox = Sandbox::new();
    sandbox.sh(
        &sandbox.tree(),
        "mkdir a; echo below >a/file; echo x >other",
    );
    sandbox.mount();
    sandbox.flush();
    let inside = sandbox.tree().join("a");
    let disk = Disk::mounted(&["-t", "tmpfs", "none"], &inside);
    sandbox.sh(&inside, "echo covering >file; echo covering >more");
    sandbox.sh(&sandbox.peer(), "echo theirs >a/new; echo theirs >other");
    eventually("the rest arrives", PROMPT, || {
        match fs::read_to_string(sandbox.tree().join("other")) {
            Ok(text) if text == "theirs\n" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    sandbox.sh(&sandbox.tree(), "echo mine >third");
    assert_eq!(sandbox.sh(&inside, "ls"), "file\nmore\n");
    let status = sandbox.status_becomes("the cover is reported", |status| {
        status
            .problems
            .iter()
            .any(|problem| problem.path == "a/new")
    });
    eprintln!("{:?}", status.problems);
    assert!(!sandbox.peer().join("a/more").exists());
    drop(disk);
    // Uncovered, everything goes on.
    sandbox.flush();
    assert_same(&sandbox.tree(), &sandbox.peer());
    assert_eq!(sandbox.sh(&inside, "cat file new"), "below\ntheirs\n");
    sandbox.umount();
}
