//! Contents, exercised: fsx changes one file at random, through calls and mappings, and
//! compares every byte that it reads with what it knows to have written. Meanwhile the
//! peer follows.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod support;

use std::time::Duration;

use support::program::run;
use support::{Random, Sandbox, assert_captured, rounds};

/// Operations of one run of fsx. Few, because what it did last is what shows whether it
/// was captured; and because it never unmaps what it mapped for reading: where the file is
/// cut short the kernel goes through all of that for each page, so that in 10,000
/// operations each takes three times as long as in 2,500.
const RUN: u32 = 2_500;
/// Runs in one mount, 50,000 operations.
const RUNS: u32 = 20;
/// Longest that a run may take on a busy machine of two slow cores.
const DEADLINE: Duration = Duration::from_secs(120);

/// Whether the peer has the file as it is now. Nobody but its user may look into a user's
/// mount.
const SAME: &str = "cmp tree/exercised peer/exercised
    diff <(stat -c '%s bytes, modified %y' tree/exercised) \\
         <(stat -c '%s bytes, modified %y' peer/exercised)";

/// How a store through a mapping reaches the file.
#[derive(Clone, Copy, Debug)]
enum Mapped {
    /// By `msync` right after it.
    Synced,
    /// When the kernel writes the page back.
    LeftToTheKernel,
}

fn configuration(mapped: Mapped) -> String {
    let leave = matches!(mapped, Mapped::LeftToTheKernel);
    format!(
        "nomsyncafterwrite = {leave}
         [opsize]
         min = 1
         max = 65536
         [weights]
         close_open = 1
         invalidate = 1
         read = 10
         write = 10
         mapread = 10
         mapwrite = 10
         truncate = 10
         posix_fallocate = 5
         punch_hole = 5
         copy_file_range = 5
         sendfile = 5
         posix_fadvise = 2
         fsync = 1
         fdatasync = 1\n"
    )
}

/// 100,000 operations from one seed, a million under `./test --long`.
#[track_caller]
fn exercise(purpose: &str, sandbox: fn() -> Sandbox, mapped: Mapped) {
    let mut random = Random::new(purpose);
    for mount in 0..rounds(2, 20) {
        let sandbox = sandbox();
        let program = sandbox.tool("fsx");
        let settings = sandbox.outside().join("fsx.toml");
        std::fs::write(&settings, configuration(mapped)).unwrap();
        sandbox.mount();
        for _ in 0..RUNS {
            let seed = random.next();
            eprintln!("mount {mount}: fsx -S {seed}");
            let mut command = sandbox.command(&program);
            command
                .args(["-S", &seed.to_string(), "-N", &RUN.to_string(), "-f"])
                .arg(&settings)
                .arg("-P")
                .arg(sandbox.outside())
                .arg(sandbox.tree().join("exercised"));
            run(&mut command, DEADLINE)
                .ok()
                .expect_said(&["All operations completed"]);
            sandbox.flush();
            sandbox.sh(sandbox.root(), SAME);
        }
        assert_captured(&sandbox);
    }
}

#[test]
fn fsx_as_root() {
    exercise("fsx as root", Sandbox::new, Mapped::Synced);
}

#[test]
fn fsx_as_root_with_pages_left_to_the_kernel() {
    exercise(
        "fsx as root, unsynced",
        Sandbox::new,
        Mapped::LeftToTheKernel,
    );
}

#[test]
fn fsx_as_an_ordinary_user() {
    exercise(
        "fsx as an ordinary user",
        Sandbox::of_ordinary_user,
        Mapped::Synced,
    );
}

#[test]
fn fsx_as_an_ordinary_user_with_pages_left_to_the_kernel() {
    exercise(
        "fsx as an ordinary user, unsynced",
        Sandbox::of_ordinary_user,
        Mapped::LeftToTheKernel,
    );
}
