//! A journal that an older mirrorfs has written is brought up to date and loses nothing.
//!
//! `schemas/` holds a database of each schema there has been, with data in every table, as
//! SQL. Whoever adds a migration records the schema it leads to:
//! `MIRRORFS_RECORD_SCHEMA=1 cargo nextest run -p mirrorfs-journal --test migrations`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use mirrorfs_journal::*;
use rusqlite::Connection;

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn file(content: &str) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content.as_bytes()),
        },
        mode: 0o644,
        mtime: Timestamp { secs: -1, nanos: 5 },
        xattrs: Xattrs::from([(b"user.a".to_vec(), b"b".to_vec())]),
    }
}

fn attr(kind: Kind, size: u64) -> Attr {
    Attr {
        kind,
        mode: 0o640,
        uid: 1000,
        gid: 100,
        size,
        mtime: Timestamp { secs: 77, nanos: 7 },
        ctime: Timestamp { secs: 78, nanos: 8 },
    }
}

const AGREEMENT: Agreement = Agreement {
    number: 4,
    nonce: Id([4; 16]),
    previous: Some(Id([3; 16])),
};

/// Something in every table.
fn fill(journal: &Journal) {
    let recorder = journal.recorder();
    let changes = [
        Change::Root {
            ino: Ino(1),
            attr: attr(Kind::Directory, 0),
        },
        Change::Create {
            parent: Ino(1),
            name: b"dir".to_vec(),
            ino: Ino(10),
            attr: attr(Kind::Directory, 0),
            target: None,
        },
        Change::Create {
            parent: Ino(10),
            name: b"caf\xe9".to_vec(),
            ino: Ino(11),
            attr: attr(Kind::File, 0),
            target: None,
        },
        Change::Write {
            ino: Ino(11),
            offset: 3,
            len: 9,
            attr: attr(Kind::File, 12),
        },
        Change::Xattrs {
            ino: Ino(11),
            attr: attr(Kind::File, 12),
            xattrs: Xattrs::from([(b"user.k".to_vec(), b"v".to_vec())]),
        },
        Change::Create {
            parent: Ino(1),
            name: b"link".to_vec(),
            ino: Ino(12),
            attr: attr(Kind::Symlink, 3),
            target: Some(b"dir".to_vec()),
        },
        Change::Sync { ino: Ino(11) },
    ];
    for change in changes {
        recorder.record(Origin::Local, change).unwrap();
    }
    journal
        .update(Durability::Full, |update| {
            let at = path("dir");
            let peer = update.add_peer("host", "me@host:web")?;
            let node = update.at(&RelPath::new(b"dir/caf\xe9".to_vec()).unwrap())?;
            let node = node.unwrap();
            update.set_hash(node.id, node.content_n, ContentHash([9; 32]))?;
            update.set_peer_replica(peer, Id([8; 16]))?;
            let put = BaseChange::Put {
                path: at.clone(),
                node: Some(NodeId(2)),
                entry: file("agreed"),
            };
            update.apply_base(peer, std::slice::from_ref(&put))?;
            update.end_base(peer, &AGREEMENT)?;
            update.set_seen(peer, Epoch(5), 6)?;
            update.set_cursor(peer, 6)?;
            update.set_durable(peer, 5)?;
            update.observe(peer, &at, Some(&file("theirs")))?;
            update.observe(peer, &path("gone"), None)?;
            update.open_conflict(&conflict(peer))?;
            update.propose(
                peer,
                &Proposal {
                    agreement: Agreement {
                        number: 5,
                        nonce: Id([5; 16]),
                        previous: Some(AGREEMENT.nonce),
                    },
                    cursor: 7,
                    batch: Id([6; 16]),
                    seen: Some((Epoch(5), 6)),
                    changes: vec![put],
                },
            )?;
            update.set_setting("key", b"value")
        })
        .unwrap();
}

fn conflict(peer: PeerId) -> Conflict {
    Conflict {
        id: 1,
        peer,
        path: path("dir"),
        base: None,
        local: Some(file("mine")),
        remote: Some(file("theirs")),
        copy: Some(path("dir.copy")),
        info: None,
        since: Timestamp { secs: 9, nanos: 1 },
        unit: None,
    }
}

/// All that [`fill`] has put there is there.
fn check(journal: &Journal) {
    let view = journal.snapshot().unwrap();
    assert_eq!(view.n(), 7);
    let node = view
        .at(&RelPath::new(b"dir/caf\xe9".to_vec()).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(node.ino, Ino(11));
    assert_eq!(node.attr, attr(Kind::File, 12));
    assert_eq!(node.xattrs[&b"user.k"[..]], b"v");
    assert_eq!(node.hash, Some(ContentHash([9; 32])));
    assert_eq!((node.content_n, node.changed_n, node.synced_n), (4, 5, 7));
    let link = view.at(&path("link")).unwrap().unwrap();
    assert_eq!(link.target.as_deref(), Some(&b"dir"[..]));
    assert_eq!(view.touched(4).unwrap().len(), 2);

    let peers = view.peers().unwrap();
    let [peer] = peers.as_slice() else {
        panic!("{peers:?}")
    };
    assert_eq!(
        (peer.name.as_str(), peer.url.as_str()),
        ("host", "me@host:web")
    );
    assert_eq!(peer.replica, Some(Id([8; 16])));
    assert_eq!((peer.cursor, peer.durable), (6, 5));
    assert_eq!(peer.seen, Some((Epoch(5), 6)));
    assert_eq!(peer.agreement, Some(AGREEMENT));
    let chain = view.chain(peer.id).unwrap();
    assert_eq!((chain.len(), chain[0].agreement), (1, AGREEMENT));
    assert!(chain[0].based);
    let proposal = view.proposal(peer.id).unwrap().unwrap();
    assert_eq!((proposal.cursor, proposal.batch), (7, Id([6; 16])));
    assert_eq!(proposal.changes.len(), 1);
    let base = view.base_at(peer.id, &path("dir")).unwrap().unwrap();
    assert_eq!((base.node, base.entry), (Some(NodeId(2)), file("agreed")));
    let pending = view.remote_pending(peer.id).unwrap();
    // Nothing is where nothing was agreed on: that is no news.
    assert_eq!(pending, [(path("dir"), Some(file("theirs")))]);
    assert_eq!(view.conflicts().unwrap(), [conflict(peer.id)]);
    assert_eq!(view.setting("key").unwrap().as_deref(), Some(&b"value"[..]));
}

fn schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemas")
}

/// A database as SQL that makes it.
fn dump(connection: &Connection) -> String {
    let texts = |sql: &str| -> Vec<String> {
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let mut lines: Vec<String> = texts(
        "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL
         AND name NOT LIKE 'sqlite_%' ORDER BY rowid",
    );
    for table in texts("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY rowid") {
        if table == "sqlite_stat1" {
            continue;
        }
        let columns = texts(&format!("SELECT name FROM pragma_table_info('{table}')"));
        let columns: Vec<_> = columns
            .iter()
            .map(|name| format!("quote({name})"))
            .collect();
        let values = columns.join(" || ', ' || ");
        lines.extend(texts(&format!(
            "SELECT 'INSERT INTO {table} VALUES (' || {values} || ')' FROM {table}"
        )));
    }
    let version = version(connection);
    lines.push(format!("PRAGMA user_version = {version}"));
    lines.join(";\n") + ";\n"
}

fn version(connection: &Connection) -> i64 {
    connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .unwrap()
}

fn tables(connection: &Connection) -> Vec<(String, Vec<String>)> {
    let mut statement = connection
        .prepare(
            "SELECT t.name, group_concat(c.name || ' ' || c.type || c.\"notnull\" || c.pk, ', ')
             FROM sqlite_schema t JOIN pragma_table_info(t.name) c
             WHERE t.name NOT LIKE 'sqlite_%' GROUP BY t.name ORDER BY t.name",
        )
        .unwrap();
    let rows = statement.query_map([], |row| {
        let columns: String = row.get(1)?;
        Ok((
            row.get(0)?,
            columns.split(", ").map(str::to_owned).collect(),
        ))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

#[test]
fn every_older_schema_is_brought_up_to_date() {
    let fresh = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(fresh.path()).unwrap();
    fill(&journal);
    check(&journal);
    journal.close().unwrap();
    let newest = Connection::open(fresh.path().join(DATABASE)).unwrap();
    let known = version(&newest);
    if std::env::var_os("MIRRORFS_RECORD_SCHEMA").is_some() {
        fs::write(schemas().join(format!("{known}.sql")), dump(&newest)).unwrap();
    }
    for number in 1..=known {
        let recorded = schemas().join(format!("{number}.sql"));
        let sql = fs::read_to_string(&recorded).unwrap_or_else(|error| {
            panic!("{}: {error}: see the top of this file", recorded.display())
        });
        let dir = tempfile::tempdir().unwrap();
        let old = Connection::open(dir.path().join(DATABASE)).unwrap();
        old.execute_batch(&sql).unwrap();
        assert_eq!(version(&old), number);
        drop(old);
        // Nothing is migrated by looking, and who looks is told.
        if number < known {
            let refused = look(dir.path()).err().unwrap().to_string();
            assert!(refused.contains("older mirrorfs"), "{refused}");
        }
        let (journal, start) = Journal::open(dir.path()).unwrap();
        assert!(start.clean && start.reason.is_none(), "{number}: {start:?}");
        check(&journal);
        journal.close().unwrap();
        let migrated = Connection::open(dir.path().join(DATABASE)).unwrap();
        assert_eq!(version(&migrated), known);
        assert_eq!(tables(&migrated), tables(&newest), "from schema {number}");
    }
}
