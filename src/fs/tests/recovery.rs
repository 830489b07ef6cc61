//! After any work behind the filesystem's back, recovery makes the recorded tree
//! equal to lower.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Timespec, Timestamps};

use super::{Fixture, path};
use crate::fs::FsOptions;

fn recovered(t: &Fixture) -> crate::fs::RecoveryReport {
    let report = t.fs.recover(&t.journal).unwrap();
    t.assert_captured();
    report
}

#[test]
fn a_tree_is_adopted() {
    let t = Fixture::with(FsOptions::default(), |tree| {
        std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
        std::fs::write(tree.join("a/b/f"), "content").unwrap();
        std::fs::hard_link(tree.join("a/b/f"), tree.join("g")).unwrap();
        symlink("nowhere", tree.join("a/link")).unwrap();
        std::fs::write(tree.join(".mirrorfs/staging/x"), "not mirrored").unwrap();
    });
    t.assert_captured();
    let again = recovered(&t);
    assert_eq!((again.created, again.changed, again.removed), (0, 0, 0));
    assert_eq!(again.scanned, 6);
}

#[test]
fn what_happened_behind_the_back_is_found() {
    let t = Fixture::new();
    let dir = t.mkdir(t.root(), "dir");
    let f = t.create(dir, "f", b"content");
    t.create(dir, "g", b"content");
    t.mkdir(dir, "sub");
    // The same size and modification time: only the change time tells.
    let at = t.tree.join("dir/f");
    let mtime = std::fs::metadata(&at).unwrap().modified().unwrap();
    std::fs::write(&at, "CONTENT").unwrap();
    std::fs::File::options()
        .write(true)
        .open(&at)
        .unwrap()
        .set_modified(mtime)
        .unwrap();
    std::fs::remove_file(t.tree.join("dir/g")).unwrap();
    std::fs::rename(t.tree.join("dir/sub"), t.tree.join("elsewhere")).unwrap();
    let before = t
        .journal
        .snapshot()
        .unwrap()
        .node_by_ino(f)
        .unwrap()
        .unwrap();
    let report = recovered(&t);
    assert_eq!((report.created, report.changed, report.removed), (1, 1, 2));
    let after = t
        .journal
        .snapshot()
        .unwrap()
        .node_by_ino(f)
        .unwrap()
        .unwrap();
    assert_eq!(after.id, before.id);
    assert!(after.content_n > before.content_n);
    // Kinds change places.
    std::fs::remove_dir(t.tree.join("elsewhere")).unwrap();
    std::fs::write(t.tree.join("elsewhere"), "now a file").unwrap();
    recovered(&t);
}

#[test]
fn renames_through_the_filesystem_are_no_changes_of_content() {
    let t = Fixture::new();
    let own = crate::fs::Caller::own();
    let f = t.create(t.root(), "f", b"content");
    t.fs.rename(
        &own,
        t.root(),
        b"f",
        t.root(),
        b"g",
        rustix::fs::RenameFlags::empty(),
    )
    .unwrap();
    t.fs.link(f, t.root(), b"h").unwrap();
    t.fs.unlink(&own, t.root(), b"g").unwrap();
    let report = recovered(&t);
    assert_eq!(report.changed, 0);
}

#[test]
fn a_name_that_comes_or_goes_changes_no_link_and_no_special_file() {
    let t = Fixture::new();
    let own = crate::fs::Caller::own();
    let symlink =
        t.fs.symlink(&own, t.root(), b"symlink", b"nowhere")
            .unwrap();
    let fifo =
        t.fs.mknod(&own, t.root(), b"fifo", FileType::Fifo, 0o644, 0, 0)
            .unwrap();
    for (found, name) in [(symlink, b"symlink".as_slice()), (fifo, b"fifo")] {
        let further = [name, b"-2"].concat();
        let before = found.attributes.ctime;
        // Until lower's clock has moved on, which ticks every few milliseconds.
        while t.fs.getattr(found.attributes.ino).unwrap().ctime == before {
            t.fs.link(found.attributes.ino, t.root(), &further).unwrap();
            t.fs.unlink(&own, t.root(), &further).unwrap();
        }
    }
    let report = recovered(&t);
    assert_eq!((report.created, report.changed, report.removed), (0, 0, 0));
    // What does say something is found: another owner, mode or time.
    std::fs::set_permissions(t.tree.join("fifo"), Permissions::from_mode(0o600)).unwrap();
    let (later, at) = (
        Timespec {
            tv_sec: 1_700_000_000,
            tv_nsec: 0,
        },
        t.tree.join("symlink"),
    );
    let times = Timestamps {
        last_access: later,
        last_modification: later,
    };
    rustix::fs::utimensat(CWD, &at, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    assert_eq!(recovered(&t).changed, 2);
    assert_eq!(recovered(&t).changed, 0);
}

#[test]
fn what_cannot_be_read_is_not_deleted() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // Root reads everything, so the obstacle is another filesystem on top.
    let t = Fixture::new();
    let dir = t.mkdir(t.root(), "dir");
    t.create(dir, "f", b"content");
    let at = t.tree.join("dir");
    rustix::mount::mount(
        "none",
        &at,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None::<&std::ffi::CStr>,
    )
    .unwrap();
    let report = t.fs.recover(&t.journal);
    let looked_up =
        t.fs.lookup(&crate::fs::Caller::own(), t.root(), b"dir")
            .err();
    rustix::mount::unmount(&at, rustix::mount::UnmountFlags::empty()).unwrap();
    let report = report.unwrap();
    assert_eq!(report.removed, 0);
    assert_eq!(report.unreadable.len(), 1);
    assert_eq!(report.unreadable[0].0, path("dir"));
    assert_eq!(looked_up, Some(rustix::io::Errno::XDEV));
    t.assert_captured();
}

/// A figure for the eye: `cargo test --release -- --ignored --nocapture adoption`.
#[test]
#[ignore = "takes a while and asserts nothing"]
fn adoption_of_a_hundred_thousand_files() {
    let start = std::cell::Cell::new(std::time::Instant::now());
    let t = Fixture::with(FsOptions::default(), |tree| {
        for dir in 0..1000 {
            let dir = tree.join(format!("d{}/e{dir}", dir % 30));
            std::fs::create_dir_all(&dir).unwrap();
            for file in 0..100 {
                std::fs::write(dir.join(format!("f{file}")), "content").unwrap();
            }
        }
        start.set(std::time::Instant::now());
    });
    println!("adopted in {:?}", start.get().elapsed());
    let again = std::time::Instant::now();
    let report = t.fs.recover(&t.journal).unwrap();
    println!("scanned {} in {:?}", report.scanned, again.elapsed());
}

#[derive(Clone, Debug)]
enum Step {
    Write(u8, u8),
    Mkdir(u8),
    Remove(u8),
    Rename(u8, u8),
    Link(u8, u8),
    Symlink(u8, u8),
    Chmod(u8, u8),
    Recover,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0..12u8;
    let step = prop_oneof![
        4 => (name.clone(), any::<u8>()).prop_map(|(a, b)| Step::Write(a, b)),
        3 => name.clone().prop_map(Step::Mkdir),
        2 => name.clone().prop_map(Step::Remove),
        4 => (name.clone(), name.clone()).prop_map(|(a, b)| Step::Rename(a, b)),
        2 => (name.clone(), name.clone()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => (name.clone(), any::<u8>()).prop_map(|(a, b)| Step::Symlink(a, b)),
        1 => (name, any::<u8>()).prop_map(|(a, b)| Step::Chmod(a, b)),
        1 => Just(Step::Recover),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Twelve places, nested: some are only there if others are directories.
fn place(number: u8) -> String {
    match number {
        0..=3 => format!("{number}"),
        4..=7 => format!("{}/{number}", number - 4),
        _ => format!("{}/{}/{number}", number - 8, number - 4),
    }
}

fn outside(tree: &Path, step: &Step) {
    // Whatever is impossible at the moment is skipped.
    let at = |number: &u8| tree.join(place(*number));
    let _ = match step {
        Step::Write(name, byte) => std::fs::write(at(name), vec![*byte; *byte as usize]),
        Step::Mkdir(name) => std::fs::create_dir(at(name)),
        Step::Remove(name) => {
            std::fs::remove_file(at(name)).or_else(|_| std::fs::remove_dir_all(at(name)))
        }
        Step::Rename(from, to) => std::fs::rename(at(from), at(to)),
        Step::Link(from, to) => std::fs::hard_link(at(from), at(to)),
        Step::Symlink(name, target) => symlink(format!("{target}"), at(name)),
        Step::Chmod(name, mode) => {
            std::fs::symlink_metadata(at(name)).and_then(|found| match found.is_symlink() {
                true => Ok(()),
                false => std::fs::set_permissions(
                    at(name),
                    std::fs::Permissions::from_mode(found.mode() & 0o700 | u32::from(*mode) & 0o77),
                ),
            })
        }
        Step::Recover => Ok(()),
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn recovery_finds_everything(steps in steps()) {
        let t = Fixture::new();
        for step in &steps {
            outside(&t.tree, step);
            if matches!(step, Step::Recover) {
                recovered(&t);
            }
        }
        recovered(&t);
        let again = recovered(&t);
        prop_assert_eq!((again.created, again.changed, again.removed), (0, 0, 0));
    }
}
