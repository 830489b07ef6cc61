//! "Only what changed travels": counted in bytes on the link, with everything that ssh and
//! the protocol need for it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;

use crate::support::{PROMPT, Random, Sandbox, Server, rounds, wait_until};

/// What one changed mebibyte in a file of a gibibyte may cost.
const CHANGED_MIB: u64 = 1_363_148;

/// A pair that agrees on what the script makes in the tree.
fn pair(script: &str) -> (Sandbox, Server) {
    let mut sandbox = Sandbox::new();
    let server = Server::start(&mut sandbox);
    sandbox.sh(&sandbox.tree(), script);
    sandbox.sh(sandbox.root(), "mkdir -p peer; cp -a tree/. peer");
    sandbox.mount_with(server.url(&sandbox.peer()));
    // A flush takes a connection that could not be made for an answer.
    sandbox.connected();
    sandbox.flush();
    (sandbox, server)
}

/// A pair that agrees on a large file: 64 MiB, and as large as the promise says under
/// `./test --long`.
fn large() -> (Sandbox, Server) {
    let mebibytes = rounds(64, 1024);
    pair(&format!("head -c {mebibytes}M /dev/urandom >large"))
}

/// How many bytes cross until what `work` does is on both sides.
fn crossed(sandbox: &Sandbox, server: &Server, work: impl FnOnce()) -> u64 {
    let before = server.link.forwarded();
    work();
    sandbox.flush();
    let crossed = server.link.forwarded() - before;
    sandbox.sh(sandbox.root(), "diff -r --exclude=.mirrorfs tree peer");
    crossed
}

/// The same for what is done without a link, so that nothing half done travels.
fn crossed_afterwards(sandbox: &Sandbox, server: &Server, work: impl FnOnce()) -> u64 {
    crossed(sandbox, server, || {
        server.link.refuse();
        sandbox.status_becomes("the link is gone", |status| {
            status.peer().state != "connected"
        });
        work();
        server.link.restore();
        sandbox.connected();
    })
}

/// A mebibyte that begins and ends anywhere.
const IN_PLACE: &str = "dd if=/dev/urandom of=large bs=1M count=1 iflag=fullblock \
    oflag=seek_bytes seek=$(($(stat -c %s large) / 3 + 12345)) conv=notrunc status=none";

/// The whole file is written anew, under another name first.
const REWRITTEN: &str = "cp large ../new; cd ..; dd if=/dev/urandom of=new bs=1M count=1 \
    iflag=fullblock oflag=seek_bytes seek=$(($(stat -c %s new) / 2 + 777)) conv=notrunc \
    status=none; cp new \"$OLDPWD/new\"; rm new; mv \"$OLDPWD/new\" \"$OLDPWD/large\"";

/// "One changed MiB in a 1 GiB file: at most 1.3 MiB on the wire, both through a journaled
/// range and through a rewritten file (block hashes)."
#[test]
fn a_changed_mebibyte_of_a_large_file_is_what_crosses() {
    let (sandbox, server) = large();
    let tree = sandbox.tree();
    let sent = crossed_afterwards(&sandbox, &server, || drop(sandbox.sh(&tree, IN_PLACE)));
    eprintln!("in place: {sent} bytes");
    assert!(sent <= CHANGED_MIB, "{sent} bytes for a range");
    let sent = crossed_afterwards(&sandbox, &server, || drop(sandbox.sh(&tree, REWRITTEN)));
    eprintln!("rewritten: {sent} bytes");
    assert!(sent <= CHANGED_MIB, "{sent} bytes for a rewritten file");
    // The journal knows which page it is: nobody has to look for it.
    let file = fs::File::options().write(true).open(tree.join("large"));
    let file = file.unwrap();
    let page = Random::new("a page").bytes(4096);
    let sent = crossed(&sandbox, &server, || {
        file.write_all_at(&page, 99 * 4096).unwrap()
    });
    eprintln!("a page: {sent} bytes");
    assert!(sent < 16 * 1024, "{sent} bytes for a page");
}

/// The same in the other direction, where nobody has seen what was written.
#[test]
fn a_changed_mebibyte_of_a_peers_large_file_is_what_crosses() {
    let (sandbox, server) = large();
    let peer = sandbox.peer();
    for (how, script) in [("in place", IN_PLACE), ("rewritten", REWRITTEN)] {
        let sent = crossed_afterwards(&sandbox, &server, || drop(sandbox.sh(&peer, script)));
        eprintln!("{how}: {sent} bytes");
        assert!(sent <= CHANGED_MIB, "{sent} bytes {how}");
    }
}

/// "An appended log file costs what was appended", in either direction.
#[test]
fn an_appended_log_costs_what_was_appended() {
    const APPENDED: u64 = 100_000;
    let (sandbox, server) = pair("head -c 16M /dev/urandom >log");
    let mut random = Random::new("log");
    for dir in [sandbox.tree(), sandbox.peer(), sandbox.tree()] {
        let lines = random.bytes(usize::try_from(APPENDED).unwrap());
        let log = fs::File::options().append(true).open(dir.join("log"));
        let mut log = log.unwrap();
        let sent = crossed(&sandbox, &server, || log.write_all(&lines).unwrap());
        eprintln!("{}: {sent} bytes", dir.display());
        assert!(sent < APPENDED + 16 * 1024, "{sent} bytes");
    }
}

/// "A renamed directory with 10,000 files at most 10 KiB", and no more than that with fewer.
#[test]
fn a_renamed_directory_is_one_record() {
    let files = rounds(2_000, 10_000);
    let (sandbox, server) = pair(&format!(
        "mkdir many; cd many; seq {files} | split -l 1 -a 5 -d - file-"
    ));
    let sent = crossed(&sandbox, &server, || {
        fs::rename(sandbox.tree().join("many"), sandbox.tree().join("moved")).unwrap();
    });
    eprintln!("renamed: {sent} bytes");
    assert!(sent <= 10 * 1024, "{sent} bytes");
}

/// "A file that exists elsewhere on the peer under any name is not sent."
#[test]
fn what_the_peer_has_under_another_name_is_not_sent() {
    let (sandbox, server) = pair("mkdir a; head -c 8M /dev/urandom >a/file");
    let sent = crossed_afterwards(&sandbox, &server, || {
        sandbox.sh(
            &sandbox.tree(),
            "mkdir b; cp a/file b/copy; mv a/file c; rmdir a",
        );
    });
    eprintln!("copied and moved: {sent} bytes");
    assert!(sent < 32 * 1024, "{sent} bytes");
}

/// "A cut link resumes at the byte", also where a part is not sent at all.
#[test]
fn a_delta_that_is_cut_resumes() {
    const CHANGED: u64 = 16 << 20;
    let (sandbox, server) = pair("head -c 48M /dev/urandom >large");
    let mut random = Random::new("cut");
    for dir in [sandbox.tree(), sandbox.peer()] {
        // Others each time: what the other side has already does not travel.
        let bytes = random.bytes(usize::try_from(CHANGED).unwrap());
        let sent = crossed(&sandbox, &server, || {
            server.link.refuse();
            sandbox.status_becomes("the link is gone", |status| {
                status.peer().state != "connected"
            });
            let file = fs::File::options().write(true).open(dir.join("large"));
            let (mut at, file) = (777, file.unwrap());
            // Several places, with what is the same between them.
            for piece in bytes.chunks(1 << 20) {
                file.write_all_at(piece, at).unwrap();
                at += 2 << 20;
            }
            let connections = server.link.accepted();
            server.link.restore_for(CHANGED * 3 / 4);
            // All of it has to be compared, and most of it to cross, before that.
            wait_until("the link is cut and made again", PROMPT * 4, || {
                server.link.accepted() > connections + 1
            });
            sandbox.connected();
        });
        eprintln!("{}: {sent} bytes", dir.display());
        // What the link and the agent had taken and not yet stored is sent again.
        assert!(sent < CHANGED * 3 / 2, "{sent} bytes");
    }
}

/// Holes stay holes in what is made of an old content.
#[test]
fn holes_stay_holes_where_only_a_part_changes() {
    let (sandbox, server) = pair("truncate -s 24M sparse; echo x >>sparse; echo end >>sparse");
    let file = fs::File::options()
        .write(true)
        .open(sandbox.tree().join("sparse"));
    let file = file.unwrap();
    crossed(&sandbox, &server, || {
        file.write_all_at(b"changed", 13 << 20).unwrap()
    });
    let blocks = sandbox.sh(&sandbox.peer(), "stat -c %b sparse");
    let blocks: u64 = blocks.trim().parse().unwrap();
    assert!(blocks * 512 < 4 << 20, "{blocks} blocks");
}
