//! Whether everything that happened in a mount was captured.

use std::os::unix::fs::FileTypeExt;

use super::compare::assert_same_except;
use super::sandbox::Sandbox;

/// Fails unless the journal says of every name what the tree shows, and the peer shows
/// what the tree does. FIFOs, sockets and devices stay local.
///
/// After a kill the next mount compares all of lower with the recorded tree, in every
/// attribute, and tells what it had to correct: that has to be nothing.
#[track_caller]
pub fn assert_captured(sandbox: &Sandbox) {
    sandbox.flush();
    sandbox.kill_daemon();
    super::recorded::assert_exact(&sandbox.state());
    sandbox
        .mount()
        .expect_said(&["did not end cleanly", "found 0 new, 0 changed, 0 removed"]);
    sandbox.flush();
    sandbox.umount();
    let tree = sandbox.tree();
    assert_same_except(&tree, &sandbox.peer(), |path| {
        std::fs::symlink_metadata(tree.join(path)).is_ok_and(|found| {
            let kind = found.file_type();
            kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device()
        })
    });
}
