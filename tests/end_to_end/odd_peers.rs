//! "A peer on a filesystem that cannot hold something gets the rest, and the file is listed
//! as a problem, not clobbered." "What a peer cannot hold is probed, masked from its
//! reports, and never comes back as an edit."

use std::fs;
use std::path::Path;

use crate::support::disk::Disk;
use crate::support::{Sandbox, assert_same, assert_same_except};

/// A disk whose blocks take link targets and attributes of less than a kibibyte. Inodes of
/// 128 bytes have whole seconds.
fn small(sandbox: &Sandbox, point: &Path, inode: &str) -> Disk {
    let mkfs = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-m",
        "0",
        "-b",
        "1024",
        "-I",
        inode,
    ];
    Disk::made_by(&mkfs, &sandbox.root().join("image"), point, 32)
}

/// One link too long for the peer: everything else of its batch arrives, it is listed, and
/// comes to nobody's harm; shortened, it arrives.
#[test]
fn a_link_that_the_peer_cannot_hold_stops_nothing_else() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let _disk = small(&sandbox, &peer, "256");
    sandbox.mount();
    sandbox.sh(
        &tree,
        "mkdir -p d/e; echo 1 >d/one; echo 2 >two; ln -s short d/short
         ln -s $(printf 'x%.0s' $(seq 1500)) d/long; echo 3 >d/e/three",
    );
    let outcome = sandbox.try_flush();
    assert_eq!(outcome.code, 1, "{outcome}");
    assert_same_except(&tree, &peer, |path| path == "d/long");
    assert!(fs::symlink_metadata(peer.join("d/long")).is_err());
    let status = sandbox.status();
    let [problem] = status.problems.as_slice() else {
        panic!("{:?}", status.problems);
    };
    assert_eq!(problem.path, "d/long");
    assert!(problem.error.contains("cannot hold"), "{problem:?}");

    // Later batches come through as well, and the link is still here.
    sandbox.sh(&tree, "echo 4 >d/four; rm two");
    assert_eq!(sandbox.try_flush().code, 1);
    assert_same_except(&tree, &peer, |path| path == "d/long");
    assert_eq!(
        fs::read_link(tree.join("d/long"))
            .unwrap()
            .as_os_str()
            .len(),
        1500
    );

    sandbox.sh(&tree, "ln -sfn short d/long");
    sandbox.flush();
    assert_same(&tree, &peer);
    assert!(sandbox.status().problems.is_empty());
}

/// What a file carries beside its content and the peer's inodes have no room for: the peer
/// shows less, and nothing of that comes back, not even with an edit of the content.
#[test]
fn what_the_peer_cannot_hold_of_a_file_does_not_come_back_as_an_edit() {
    let sandbox = Sandbox::new();
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let _disk = small(&sandbox, &peer, "128");
    sandbox.sh(
        &tree,
        "echo 1 >file; touch -d '2020-02-02 02:02:02.123456789' file
         setfattr -n user.long -v $(printf 'x%.0s' $(seq 2000)) file",
    );
    sandbox.mount();
    sandbox.flush();
    let carried = || sandbox.sh(&tree, "getfattr -d file; stat -c '%y %a' file; cat file");
    let before = carried();
    assert!(
        before.contains("user.long") && before.contains("02.123456789"),
        "{before}"
    );
    let held = sandbox.sh(&peer, "getfattr -d file; stat -c %y file");
    assert!(
        !held.contains("user.long") && held.contains("02.000000000"),
        "{held}"
    );

    // A look at everything: an agent that starts anew, and a change beside it.
    sandbox.kill_agents();
    sandbox.sh(&peer, "echo 2 >beside");
    sandbox.flush();
    assert_eq!(carried(), before);

    // An edit of the content over there brings its time, and leaves the attribute.
    sandbox.sh(&peer, "echo 2 >file");
    sandbox.flush();
    let after = carried();
    assert!(
        after.ends_with("2\n") && after.contains("user.long"),
        "{after}"
    );
    sandbox.umount();
    let after = carried();
    assert!(after.contains("user.long"), "{after}");
}
