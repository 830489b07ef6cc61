//! The outside test suites that `./test` installs.

use std::path::{Path, PathBuf};

/// Where `./test` has installed a program: in `tools/bin` of the target directory that the
/// program under test was built in.
#[track_caller]
pub fn installed(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_mirrorfs"));
    let target = built.ancestors().nth(2).unwrap();
    let tool = target.join("tools/bin").join(name);
    assert!(
        tool.exists(),
        "{} is not there: run ./test, which installs it",
        tool.display()
    );
    tool
}
