//! Operations: what they do to lower, and that the journal has all of it.

use std::os::fd::AsFd;

use mirrorfs_journal::{Origin, PeerId};
use rustix::fs::{FallocateFlags, FileType, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::{Fixture, path};
use crate::fs::descriptors::Use;
use crate::fs::{Caller, Changes, DoorOp, DoorResult, Expect, SetTime, StagedName};
use crate::replica::Reserved;
use crate::replica::trash::Trash;
use crate::replica::trash::tests::check_bounds;
use crate::sim::clock;
use crate::tree::{Id, Timestamp};

#[test]
fn every_kind_of_change_is_captured() {
    let t = Fixture::new();
    let fs = &t.fs;
    let own = Caller::own();
    let dir = t.mkdir(t.root(), "dir");
    let a = t.create(dir, "a", b"hello world");
    fs.write(a, 6, b"there", None).unwrap();
    t.assert_captured();
    fs.write(a, 100, b"sparse", None).unwrap();
    let size = Changes {
        size: Some(50),
        ..Changes::default()
    };
    assert_eq!(fs.setattr(&own, a, &size).unwrap().size, 50);
    t.assert_captured();
    let meta = Changes {
        mode: Some(0o600),
        mtime: Some(SetTime::To(Timestamp {
            secs: -5,
            nanos: 250,
        })),
        atime: Some(SetTime::Now),
        ..Changes::default()
    };
    let after = fs.setattr(&own, a, &meta).unwrap();
    assert_eq!(
        (after.mode, after.mtime.secs, after.mtime.nanos),
        (0o600, -5, 250)
    );
    t.assert_captured();
    fs.symlink(&own, dir, b"link", b"../elsewhere").unwrap();
    fs.mknod(&own, dir, b"fifo", FileType::Fifo, 0o640, 0o022, 0)
        .unwrap();
    fs.mknod(&own, dir, b"plain", FileType::RegularFile, 0o640, 0o022, 0)
        .unwrap();
    fs.link(a, t.root(), b"second").unwrap();
    t.assert_captured();
    fs.unlink(&own, dir, b"a").unwrap();
    t.assert_captured();
    let b = t.create(t.root(), "b", b"bbb");
    fs.rename(
        &own,
        t.root(),
        b"b",
        t.root(),
        b"second",
        RenameFlags::empty(),
    )
    .unwrap();
    t.assert_captured();
    assert_eq!(t.find("second"), b);
    let other = t.mkdir(t.root(), "other");
    t.create(other, "in", b"x");
    fs.rename(
        &own,
        t.root(),
        b"other",
        dir,
        b"moved",
        RenameFlags::empty(),
    )
    .unwrap();
    t.assert_captured();
    fs.rename(
        &own,
        dir,
        b"moved",
        t.root(),
        b"second",
        RenameFlags::EXCHANGE,
    )
    .unwrap();
    t.assert_captured();
    assert_eq!(
        fs.rename(&own, dir, b"moved", dir, b"link", RenameFlags::NOREPLACE),
        Err(Errno::EXIST)
    );
    assert_eq!(
        fs.rename(&own, dir, b"moved", dir, b"w", RenameFlags::WHITEOUT),
        Err(Errno::INVAL)
    );
    fs.setxattr(&own, b, b"user.k", b"v", XattrFlags::empty(), None)
        .unwrap();
    fs.setxattr(&own, b, b"user.l", b"w", XattrFlags::CREATE, None)
        .unwrap();
    fs.removexattr(&own, b, b"user.k").unwrap();
    assert_eq!(fs.getxattr(b, b"user.l").unwrap(), b"w");
    assert_eq!(fs.listxattr(&own, b).unwrap(), b"user.l\0");
    t.assert_captured();
    let target = t.create(t.root(), "copy", b"");
    assert_eq!(fs.copy_file_range(&own, b, 1, target, 10, 2).unwrap(), 2);
    fs.fallocate(&own, target, 0, 4096, FallocateFlags::empty())
        .unwrap();
    fs.fallocate(
        &own,
        target,
        11,
        1,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
    )
    .unwrap();
    let content = t.read(target);
    assert_eq!((content.len(), &content[9..13]), (4096, &b"\0b\0\0"[..]));
    assert_eq!(
        fs.seek(target, SeekFrom::Hole(4096)).err(),
        Some(Errno::NXIO)
    );
    t.assert_captured();
    fs.unlink(&own, t.root(), b"copy").unwrap();
    assert_eq!(fs.rmdir(&own, t.root(), b"second"), Err(Errno::NOTEMPTY));
    let second = t.find("second");
    fs.unlink(&own, second, b"in").unwrap();
    fs.rmdir(&own, t.root(), b"second").unwrap();
    t.assert_captured();
    fs.fsync(dir, false).unwrap();
    fs.fsync(b, true).unwrap();
}

/// "A whole directory is one record."
#[test]
fn a_directory_moves_in_one_record() {
    let t = Fixture::new();
    let dir = t.mkdir(t.root(), "dir");
    for number in 0..100 {
        let sub = t.mkdir(dir, &format!("d{number}"));
        t.create(sub, "f", b"content");
    }
    let (own, root, flags) = (Caller::own(), t.root(), RenameFlags::empty());
    let before = t.journal.recorder().last();
    t.fs.rename(&own, root, b"dir", root, b"moved", flags)
        .unwrap();
    assert_eq!(t.journal.recorder().last() - before, 1);
    t.assert_captured();
}

/// "Writes with their byte range": what was written, and nothing beside it.
#[test]
fn what_is_written_is_recorded_with_its_range() {
    let t = Fixture::new();
    let own = Caller::own();
    let (from, ino) = (
        t.create(t.root(), "from", &[1; 5000]),
        t.create(t.root(), "f", &[1; 20_000]),
    );
    // What is on record already is not joined with what follows.
    drop(t.journal.snapshot().unwrap());
    let before = t.journal.recorder().last();
    for (at, len) in [(100, 50), (150, 50), (9000, 1)] {
        t.fs.write(ino, at, &vec![2; len], None).unwrap();
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    t.fs.fallocate(&own, ino, 4096, 512, punch).unwrap();
    t.fs.copy_file_range(&own, from, 7, ino, 12_000, 300)
        .unwrap();
    let view = t.journal.snapshot().unwrap();
    let node = view.node_by_ino(ino).unwrap().unwrap();
    let mut written = view.written(node.id, before).unwrap().unwrap();
    written.sort_by_key(|range| range.start);
    // Adjacent ones may have been told as one.
    written.dedup_by(|next, range| {
        let adjacent = range.end == next.start;
        if adjacent {
            range.end = next.end;
        }
        adjacent
    });
    assert_eq!(written, [100..200, 4096..4608, 9000..9001, 12_000..12_300]);
    t.assert_captured();
}

#[test]
fn odd_names_are_names() {
    let t = Fixture::new();
    let own = Caller::own();
    let long = vec![b'n'; 255];
    for name in [&b"\xff\xfe not utf-8"[..], b"a\nb", b"\\", &long] {
        t.fs.create(&own, t.root(), name, 0o644, 0, true).unwrap();
    }
    let too_long = vec![b'n'; 256];
    assert_eq!(
        t.fs.create(&own, t.root(), &too_long, 0o644, 0, true).err(),
        Some(Errno::NAMETOOLONG)
    );
    t.assert_captured();
    let mut listed = Vec::new();
    t.fs.readdir(t.root(), 0, 4096, |entry| {
        listed.push(entry.name.to_vec());
        true
    })
    .unwrap();
    assert_eq!(
        listed.len(),
        6,
        "four and the two dots, .mirrorfs is hidden"
    );
}

#[test]
fn the_reserved_directory_is_not_there() {
    let t = Fixture::new();
    let own = Caller::own();
    assert_eq!(
        t.fs.lookup(&Caller::own(), t.root(), b".mirrorfs").err(),
        Some(Errno::NOENT)
    );
    assert_eq!(
        t.fs.mkdir(&own, t.root(), b".mirrorfs", 0o755, 0).err(),
        Some(Errno::PERM)
    );
    assert_eq!(t.fs.rmdir(&own, t.root(), b".mirrorfs"), Err(Errno::PERM));
    t.create(t.root(), "f", b"");
    assert!(
        t.fs.rename(
            &own,
            t.root(),
            b"f",
            t.root(),
            b".mirrorfs",
            RenameFlags::empty()
        )
        .is_err()
    );
    // Only in the root.
    let dir = t.mkdir(t.root(), "d");
    t.create(dir, ".mirrorfs", b"mine");
    t.assert_captured();
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten() {
    let t = Fixture::new();
    let own = Caller::own();
    let ino = t.create(t.root(), "f", b"content");
    let before = t.fs.known_nodes();
    t.fs.unlink(&own, t.root(), b"f").unwrap();
    assert_eq!(t.read(ino), b"content");
    t.fs.write(ino, 0, b"C", None).unwrap();
    assert_eq!(t.fs.getattr(ino).unwrap().nlink, 0);
    assert_eq!(t.read(ino), b"Content");
    t.assert_captured();
    assert_eq!(t.fs.link(ino, t.root(), b"again").err(), Some(Errno::NOENT));
    t.fs.forget(ino, 1);
    assert_eq!(t.fs.getattr(ino).err(), Some(Errno::STALE));
    assert_eq!(t.fs.known_nodes(), before - 1);
    // Nor does anything keep its space.
    assert!(t.fs.descriptors.get(ino, Use::Write).is_none());
}

#[test]
fn few_descriptors_are_enough() {
    let options = crate::fs::FsOptions {
        descriptors: 2,
        ..Default::default()
    };
    let t = Fixture::with(options, |_| {});
    let mut dir = t.root();
    let mut files = Vec::new();
    for depth in 0..20 {
        dir = t.mkdir(dir, "d");
        files.push(t.create(dir, "f", format!("{depth}").as_bytes()));
    }
    for (depth, ino) in files.iter().enumerate() {
        assert_eq!(t.read(*ino), format!("{depth}").as_bytes());
        t.fs.write(*ino, 0, b"x", None).unwrap();
    }
    t.assert_captured();
}

#[test]
fn setuid_goes_when_somebody_else_writes() {
    let t = Fixture::new();
    let own = Caller::own();
    let user = Caller {
        uid: 12345,
        gid: 12345,
        pid: 0,
    };
    let ino = t.create(t.root(), "f", b"x");
    let suid = Changes {
        mode: Some(0o6755),
        ..Changes::default()
    };
    let (told, stale) = crossbeam_channel::unbounded();
    t.fs.on_stale_attributes(Some(Box::new(move |ino| told.send(ino).unwrap())));
    t.fs.setattr(&own, ino, &suid).unwrap();
    t.fs.write(ino, 0, b"y", None).unwrap();
    assert_eq!(t.fs.getattr(ino).unwrap().mode, 0o6755);
    t.fs.write(ino, 0, b"y", Some(&user)).unwrap();
    assert_eq!(t.fs.getattr(ino).unwrap().mode, 0o755);
    assert_eq!(stale.try_recv(), Ok(ino));
    t.fs.setattr(&own, ino, &suid).unwrap();
    let truncate = Changes {
        size: Some(0),
        ..Changes::default()
    };
    assert_eq!(t.fs.setattr(&user, ino, &truncate).unwrap().mode, 0o755);
    t.assert_captured();
    // Without group execution it goes for those outside the group only.
    let group = |gid| Changes {
        mode: Some(0o2646),
        gid: Some(gid),
        ..Changes::default()
    };
    t.fs.setattr(&own, ino, &group(user.gid)).unwrap();
    t.fs.write(ino, 0, b"z", Some(&user)).unwrap();
    assert_eq!(t.fs.getattr(ino).unwrap().mode, 0o2646);
    t.fs.setattr(&own, ino, &group(0)).unwrap();
    t.fs.write(ino, 0, b"z", Some(&user)).unwrap();
    assert_eq!(t.fs.getattr(ino).unwrap().mode, 0o646);
    t.assert_captured();
}

#[test]
fn trusted_attributes_are_listed_to_root_only() {
    let t = Fixture::new();
    let own = Caller::own();
    let ino = t.create(t.root(), "f", b"x");
    for name in [&b"user.a"[..], b"trusted.b"] {
        match t
            .fs
            .setxattr(&own, ino, name, b"v", XattrFlags::empty(), None)
        {
            // Needs CAP_SYS_ADMIN.
            Err(Errno::PERM) if name == b"trusted.b" => return,
            result => result.unwrap(),
        }
    }
    let listed = |caller: &Caller| {
        let names = t.fs.listxattr(caller, ino).unwrap();
        let mut names: Vec<_> = names.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        names.retain(|name| !name.is_empty());
        names.sort();
        names
    };
    assert_eq!(listed(&own), [&b"trusted.b"[..], b"user.a"]);
    let user = Caller {
        uid: 12345,
        gid: 12345,
        pid: 0,
    };
    assert_eq!(listed(&user), [b"user.a"]);
}

#[test]
fn listings_go_on_where_they_stopped() {
    let t = Fixture::new();
    for number in 0..300 {
        t.create(t.root(), &format!("file-{number}"), b"");
    }
    let mut names = std::collections::BTreeSet::new();
    let mut from = 0;
    loop {
        let mut taken = 0;
        let before = from;
        t.fs.readdirplus(t.root(), from, 4096, |entry| {
            if taken == 7 {
                return false;
            }
            taken += 1;
            from = entry.listed.next;
            assert!(names.insert(entry.listed.name.to_vec()), "twice");
            true
        })
        .unwrap();
        if before != 0 && taken > 0 {
            // Somebody works meanwhile, on names that were listed and on others.
            let name = format!("file-{}", 0);
            let _ = t.fs.unlink(&Caller::own(), t.root(), name.as_bytes());
        }
        if taken == 0 {
            break;
        }
    }
    let listed = names
        .iter()
        .filter(|name| name.starts_with(b"file-"))
        .count();
    assert!(listed >= 299, "{listed}");
}

/// The kernel asks for what comes after the last name, and the descriptor that had told
/// of the others has been closed in favour of others meanwhile. (On ext4 that descriptor
/// would show an empty directory from then on.)
#[test]
fn a_listing_that_ends_on_a_fresh_descriptor_does_not_empty_the_directory() {
    let t = Fixture::new();
    let dir = t.mkdir(t.root(), "dir");
    let list = |from: u64| {
        let mut listed = Vec::new();
        t.fs.readdir(dir, from, 4096, |entry| {
            listed.push((entry.name.to_vec(), entry.next));
            true
        })
        .unwrap();
        listed
    };
    t.create(dir, "one", b"");
    t.create(dir, "two", b"");
    let all = list(0);
    assert_eq!(all.len(), 4, "{all:?}");
    t.fs.descriptors.remove(dir);
    let end = all.last().unwrap().1;
    assert!(list(end).is_empty());
    assert_eq!(list(0), all);
}

fn stage(t: &Fixture, content: &[u8]) -> StagedName {
    let staged = StagedName::random().unwrap();
    std::fs::write(
        t.tree.join(".mirrorfs/staging").join(staged.as_str()),
        content,
    )
    .unwrap();
    staged
}

fn trash(t: &Fixture) -> Vec<Vec<u8>> {
    let mut contents = Vec::new();
    for slot in std::fs::read_dir(t.tree.join(".mirrorfs/trash")).unwrap() {
        for file in std::fs::read_dir(slot.unwrap().path()).unwrap() {
            contents.push(std::fs::read(file.unwrap().path()).unwrap());
        }
    }
    contents.sort();
    contents
}

/// What the door does, without it: its calls as the kernel passes them on.
fn place(t: &Fixture, staged: &StagedName, to: &str) -> Result<(), Errno> {
    let target = path(to);
    let parent = t.find(target.parent().unwrap().to_string().trim_start_matches('.'));
    let name = staged.door_name();
    let found = t.fs.lookup(&Caller::own(), t.root(), name.as_bytes())?;
    assert!(!found.cacheable);
    let result = t.fs.rename(
        &Caller::own(),
        t.root(),
        name.as_bytes(),
        parent,
        target.name(),
        RenameFlags::empty(),
    );
    t.fs.forget(found.attributes.ino, 1);
    result
}

#[test]
fn the_door_places_what_was_expected_and_nothing_else() {
    let t = Fixture::new();
    let origin = Origin::Peer(PeerId(7));
    let staged = stage(&t, b"new");
    assert_eq!(place(&t, &staged, "f"), Err(Errno::NOENT), "not registered");
    let op = |staged: &StagedName, expect| DoorOp::Place {
        staged: staged.clone(),
        path: path("f"),
        expect,
        agreed: false,
    };
    let ticket = t.fs.register(op(&staged, Expect::Absent), origin);
    place(&t, &staged, "f").unwrap();
    let Some(DoorResult::Done { n, ino }) = ticket.result() else {
        panic!("{:?}", ticket.result());
    };
    assert_eq!(ino, t.find("f"));
    assert_eq!(t.read(ino), b"new");
    t.assert_captured();
    drop(ticket);

    // Something is there.
    let second = stage(&t, b"second");
    let ticket = t.fs.register(op(&second, Expect::Absent), origin);
    assert_eq!(place(&t, &second, "f"), Err(Errno::STALE));
    assert!(matches!(ticket.result(), Some(DoorResult::Refused { .. })));
    drop(ticket);

    // It changed after the decision.
    t.fs.write(ino, 0, b"N", None).unwrap();
    let expect = Expect::Node {
        ino,
        unchanged_since: n,
    };
    let ticket = t.fs.register(op(&second, expect), origin);
    assert_eq!(place(&t, &second, "f"), Err(Errno::STALE));
    assert_eq!(t.read(ino), b"New");
    drop(ticket);
    assert!(trash(&t).is_empty());

    // It is what was decided on.
    let expect = Expect::Node {
        ino,
        unchanged_since: t.journal.recorder().last(),
    };
    let ticket = t.fs.register(op(&second, expect), origin);
    place(&t, &second, "f").unwrap();
    assert!(matches!(ticket.result(), Some(DoorResult::Done { .. })));
    assert_eq!(t.read(t.find("f")), b"second");
    assert_eq!(trash(&t), [b"New"]);
    t.assert_captured();

    // The displaced file is still open somewhere. Its mode is nothing that was written.
    assert_eq!(t.fs.getattr(ino).unwrap().nlink, 0);
    let mode = Changes {
        mode: Some(0o600),
        ..Changes::default()
    };
    t.fs.setattr(&Caller::own(), ino, &mode).unwrap();
    assert_eq!(trash(&t), [b"New"]);
    // What is written to it leaves the trash, and whoever listens is told, once.
    let told = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let tell = told.clone();
    let told = move || told.load(std::sync::atomic::Ordering::Relaxed);
    t.fs.on_late(Some(Box::new(move || {
        tell.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    })));
    t.fs.write(ino, 3, b"er", None).unwrap();
    t.fs.write(ino, 5, b"er", None).unwrap();
    assert!(trash(&t).is_empty());
    assert_eq!(told(), 1);
    let mut slots = std::fs::read_dir(t.tree.join(".mirrorfs/late")).unwrap();
    let late = slots.next().unwrap().unwrap().path().join("f");
    assert_eq!(std::fs::read(&late).unwrap(), b"Newerer");
    t.assert_captured();

    // It cannot be put where something is, and waits as before.
    let again = StagedName::random().unwrap();
    let staged = t.tree.join(".mirrorfs/staging").join(again.as_str());
    std::fs::rename(&late, &staged).unwrap();
    let ticket = t.fs.register(op(&again, Expect::Absent), Origin::Local);
    assert_eq!(place(&t, &again, "f"), Err(Errno::STALE));
    drop(ticket);
    t.fs.not_placed(&again, ino, &path("f")).unwrap();
    std::fs::rename(&staged, &late).unwrap();
    t.fs.write(ino, 7, b"!", None).unwrap();
    assert_eq!(told(), 1);
    assert_eq!(std::fs::read(&late).unwrap(), b"Newerer!");
    assert_eq!(t.fs.getattr(ino).unwrap().nlink, 0);

    // In the tree again it is a file like any other.
    std::fs::rename(&late, &staged).unwrap();
    let beside = DoorOp::Place {
        staged: again.clone(),
        path: path("f.late"),
        expect: Expect::Absent,
        agreed: false,
    };
    let ticket = t.fs.register(beside, Origin::Local);
    place(&t, &again, "f.late").unwrap();
    drop(ticket);
    assert_eq!(t.fs.getattr(ino).unwrap().nlink, 1);
    t.fs.write(ino, 8, b"!", None).unwrap();
    assert_eq!(t.read(t.find("f.late")), b"Newerer!!");
    assert!(t.fs.problems().is_empty(), "{:?}", t.fs.problems());
    t.assert_captured();
}

#[test]
fn the_door_is_known_by_its_number() {
    let t = Fixture::new();
    let origin = Origin::Peer(PeerId(7));
    let door = Caller {
        pid: 4_000_001,
        ..Caller::own()
    };
    let greeting = t.fs.expect_door().unwrap().door_name();
    let met = t.fs.lookup(&door, t.root(), greeting.as_bytes());
    assert_eq!(met.err(), Some(crate::fs::GREETED));
    let ino = t.create(t.root(), "f", b"content");
    let expect = Expect::Node {
        ino,
        unchanged_since: t.journal.recorder().last(),
    };
    let op = DoorOp::SetMeta {
        path: path("f"),
        expect,
        mode: Some(0o600),
        mtime: None,
        xattrs: None,
    };
    let ticket = t.fs.register(op, origin);
    let mode = Changes {
        mode: Some(0o600),
        ..Changes::default()
    };
    t.fs.setattr(&door, ino, &mode).unwrap();
    assert!(matches!(ticket.result(), Some(DoorResult::Done { .. })));
    // Its own change is no reason to refuse the next call of the same operation.
    t.fs.setxattr(&door, ino, b"user.x", b"1", XattrFlags::empty(), None)
        .unwrap();
    // Somebody else's is.
    t.fs.setxattr(
        &Caller::own(),
        ino,
        b"user.y",
        b"1",
        XattrFlags::empty(),
        None,
    )
    .unwrap();
    assert_eq!(t.fs.setattr(&door, ino, &mode).err(), Some(Errno::STALE));
    drop(ticket);

    let op = DoorOp::Remove {
        path: path("f"),
        expect,
        agreed: false,
    };
    let ticket = t.fs.register(op, origin);
    assert_eq!(t.fs.unlink(&door, t.root(), b"f"), Err(Errno::STALE));
    assert!(t.tree.join("f").exists());
    drop(ticket);
    let expect = Expect::Node {
        ino,
        unchanged_since: t.journal.recorder().last(),
    };
    let op = DoorOp::Remove {
        path: path("f"),
        expect,
        agreed: false,
    };
    let ticket = t.fs.register(op, origin);
    t.fs.unlink(&door, t.root(), b"f").unwrap();
    assert!(matches!(ticket.result(), Some(DoorResult::Done { .. })));
    assert_eq!(trash(&t), [b"content"]);
    t.assert_captured();
}

/// In the trash a file lies below the directories it had, so that it can be brought back.
#[test]
fn what_is_displaced_keeps_its_directories() {
    let t = Fixture::new();
    let (d, origin) = (t.mkdir(t.root(), "d"), Origin::Peer(PeerId(1)));
    let e = t.mkdir(d, "e");
    let expect = |ino| Expect::Node {
        ino,
        unchanged_since: t.journal.recorder().last(),
    };
    let replaced = t.create(e, "f", b"replaced");
    let staged = stage(&t, b"removed");
    let op = DoorOp::Place {
        staged: staged.clone(),
        path: path("d/e/f"),
        expect: expect(replaced),
        agreed: false,
    };
    let _placing = t.fs.register(op, origin);
    place(&t, &staged, "d/e/f").unwrap();
    let op = DoorOp::Remove {
        path: path("d/e/f"),
        expect: expect(t.find("d/e/f")),
        agreed: false,
    };
    assert!(matches!(
        t.fs.carry_out(op, origin),
        DoorResult::Done { .. }
    ));
    let mut kept: Vec<_> = std::fs::read_dir(t.tree.join(".mirrorfs/trash"))
        .unwrap()
        .map(|slot| std::fs::read(slot.unwrap().path().join("d/e/f")).unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, [b"removed".as_slice(), b"replaced"]);
    t.assert_captured();
}

/// The mounted side's trash, which the changes of peers fill.
#[test]
fn versions_agreed_on_are_kept_hourly_and_go_first() {
    let t = Fixture::new();
    let root = std::fs::File::open(&t.tree).unwrap();
    let (reserved, _) = Reserved::create(root.as_fd(), Id([1; 16])).unwrap();
    t.create(t.root(), "f", b"old");
    let mut removes = true;
    check_bounds(&reserved, |version, agreed| {
        let expect = |ino| Expect::Node {
            ino,
            unchanged_since: t.journal.recorder().last(),
        };
        let staged = stage(&t, version.as_bytes());
        let here = expect(t.find("f"));
        // Replaced, or removed and made anew.
        removes = !removes;
        let removal = removes.then(|| DoorOp::Remove {
            path: path("f"),
            expect: here,
            agreed,
        });
        let placing = DoorOp::Place {
            staged,
            path: path("f"),
            expect: if removes { Expect::Absent } else { here },
            agreed: agreed && !removes,
        };
        for op in removal.into_iter().chain([placing]) {
            let done = t.fs.carry_out(op, Origin::Peer(PeerId(1)));
            assert!(matches!(done, DoorResult::Done { .. }), "{done:?}");
        }
    });
    t.assert_captured();
}

/// A version that a program still has open, and may write to, is not thinned out.
#[test]
fn what_is_open_stays_in_the_trash() {
    let t = Fixture::new();
    let root = std::fs::File::open(&t.tree).unwrap();
    let (reserved, _) = Reserved::create(root.as_fd(), Id([1; 16])).unwrap();
    clock::start();
    let replace = |version: &[u8]| {
        clock::advance(std::time::Duration::from_secs(60));
        let ino = t.find("f");
        let op = DoorOp::Place {
            staged: stage(&t, version),
            path: path("f"),
            expect: Expect::Node {
                ino,
                unchanged_since: t.journal.recorder().last(),
            },
            agreed: true,
        };
        let done = t.fs.carry_out(op, Origin::Peer(PeerId(1)));
        assert!(matches!(done, DoorResult::Done { .. }), "{done:?}");
        t.fs.forget(ino, 1);
    };
    let looked_up = t.create(t.root(), "f", b"1");
    t.fs.forget(looked_up, 1);
    replace(b"2");
    let open = t.fs.lookup(&Caller::own(), t.root(), b"f").unwrap();
    let open = open.attributes.ino;
    for version in [b"3", b"4", b"5"] {
        replace(version);
    }
    let filesystem = t.fs.clone();
    let expire = || {
        let trash = Trash::of(&reserved).unwrap();
        let filesystem = filesystem.clone();
        let trash = trash.sparing(move |ino| filesystem.is_displaced(ino));
        trash.expire(crate::clock::wall()).unwrap();
    };
    expire();
    // Of an hour the first, the latest, and what is open.
    let mut kept = trash(&t);
    kept.sort();
    assert_eq!(kept, [b"1", b"2", b"4"]);
    t.fs.write(open, 0, b"late", None).unwrap();
    let mut kept = trash(&t);
    kept.sort();
    assert_eq!(kept, [b"1", b"4"]);
    assert!(t.fs.problems().is_empty(), "{:?}", t.fs.problems());
    clock::stop();
    t.assert_captured();
}

#[test]
fn the_trash_is_no_hard_link() {
    let t = Fixture::new();
    let ino = t.create(t.root(), "f", b"content");
    t.fs.link(ino, t.root(), b"g").unwrap();
    let staged = stage(&t, b"new");
    let op = DoorOp::Place {
        staged: staged.clone(),
        path: path("f"),
        expect: Expect::Node {
            ino,
            unchanged_since: t.journal.recorder().last(),
        },
        agreed: false,
    };
    let _ticket = t.fs.register(op, Origin::Peer(PeerId(1)));
    place(&t, &staged, "f").unwrap();
    t.fs.write(ino, 0, b"CONTENT", None).unwrap();
    assert_eq!(trash(&t), [b"content"]);
    assert_eq!(t.fs.getattr(ino).unwrap().nlink, 1);
    t.assert_captured();
}

#[test]
fn a_file_with_names_that_nobody_looked_up_stays_captured() {
    let t = Fixture::with(crate::fs::FsOptions::default(), |tree| {
        std::fs::write(tree.join("a"), "content").unwrap();
        std::fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
        std::fs::hard_link(tree.join("a"), tree.join("c")).unwrap();
    });
    let own = Caller::own();
    let ino = t.find("a");
    let cut = t.fs.open_cut().unwrap();
    t.fs.unlink(&own, t.root(), b"a").unwrap();
    t.fs.write(ino, 0, b"CONTENT", None).unwrap();
    t.assert_captured();
    let mut old = [0; 7];
    cut.open(ino, &path("a"))
        .unwrap()
        .read_at(&mut old, 0)
        .unwrap();
    assert_eq!(&old, b"content");
    t.fs.link(ino, t.root(), b"d").unwrap();
    t.assert_captured();
    for name in ["b", "c", "d"] {
        t.find(name);
        t.fs.unlink(&own, t.root(), name.as_bytes()).unwrap();
        t.assert_captured();
    }
    t.fs.write(ino, 0, b"unnamed", None).unwrap();
    assert_eq!(t.read(ino), b"unnamed");
    t.assert_captured();
}

/// The door has opened a directory, which somebody moves before the door changes what is in
/// it: that is not where the change was to be made, and nothing happens.
#[test]
fn the_door_changes_nothing_where_a_directory_was_moved_to() {
    let t = Fixture::new();
    let (own, root, flags) = (Caller::own(), t.root(), RenameFlags::empty());
    let door = Caller {
        pid: 4_000_001,
        ..own
    };
    let greeting = t.fs.expect_door().unwrap().door_name();
    let met = t.fs.lookup(&door, root, greeting.as_bytes());
    assert_eq!(met.err(), Some(crate::fs::GREETED));
    let dir = t.mkdir(root, "d");
    let (f, sub) = (t.create(dir, "f", b"mine"), t.mkdir(dir, "sub"));
    let expect = |ino| Expect::Node {
        ino,
        unchanged_since: t.journal.recorder().last(),
    };
    let staged = stage(&t, b"theirs");
    let ops = [
        DoorOp::Place {
            staged: staged.clone(),
            path: path("d/new"),
            expect: Expect::Absent,
            agreed: false,
        },
        DoorOp::Remove {
            path: path("d/f"),
            expect: expect(f),
            agreed: false,
        },
        DoorOp::RemoveDir {
            path: path("d/sub"),
            expect: expect(sub),
        },
        DoorOp::SetMeta {
            path: path("d/f"),
            expect: expect(f),
            mode: Some(0o600),
            mtime: None,
            xattrs: None,
        },
    ];
    let tickets = ops.map(|op| t.fs.register(op, Origin::Peer(PeerId(7))));
    t.fs.rename(&own, root, b"d", root, b"moved", flags)
        .unwrap();
    let before = t.journal.recorder().last();
    assert_eq!(place(&t, &staged, "moved/new"), Err(Errno::STALE));
    assert_eq!(t.fs.unlink(&door, dir, b"f"), Err(Errno::STALE));
    assert_eq!(t.fs.rmdir(&door, dir, b"sub"), Err(Errno::STALE));
    let mode = Changes {
        mode: Some(0o600),
        ..Changes::default()
    };
    assert_eq!(t.fs.setattr(&door, f, &mode).err(), Some(Errno::STALE));
    let set =
        t.fs.setxattr(&door, f, b"user.a", b"1", XattrFlags::empty(), None);
    assert_eq!(set, Err(Errno::STALE));
    assert_eq!(t.journal.recorder().last(), before);
    assert!(trash(&t).is_empty());
    for ticket in &tickets {
        assert!(!matches!(ticket.result(), Some(DoorResult::Done { .. })));
    }
    t.assert_captured();
}

/// Somebody put another file in the place of one in the covered directory: what is done with
/// the one is not done with the other, and that is said.
#[test]
fn what_was_replaced_behind_the_mount_is_not_taken_for_what_it_was() {
    let t = Fixture::new();
    let ino = t.create(t.root(), "f", b"known");
    t.fs.descriptors.remove(ino);
    std::fs::write(t.tree.join("other"), "other").unwrap();
    std::fs::rename(t.tree.join("other"), t.tree.join("f")).unwrap();
    assert_eq!(t.fs.write(ino, 0, b"x", None), Err(Errno::STALE));
    assert_eq!(t.fs.getattr(ino).err(), Some(Errno::STALE));
    assert_eq!(std::fs::read(t.tree.join("f")).unwrap(), b"other");
    assert!(t.fs.problems().iter().any(|(at, _)| *at == path("f")));
}
