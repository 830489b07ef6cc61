CREATE TABLE progress (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    last_n      INTEGER NOT NULL,  -- the last number whose record is in the tables
    compacted_n INTEGER NOT NULL,  -- changes up to here may be missing from `change`
    inexact     INTEGER NOT NULL,  -- a record did not fit the tree: scan at the next start
    barrier     INTEGER NOT NULL   -- counts commits that only had to be durable
) STRICT;
CREATE TABLE life (
    id      INTEGER PRIMARY KEY,
    epoch   INTEGER NOT NULL,
    first_n INTEGER NOT NULL,      -- the first number it could issue
    started INTEGER NOT NULL,
    boot    TEXT NOT NULL,
    clean   INTEGER NOT NULL       -- it was closed
) STRICT;
CREATE TABLE node (
    id          INTEGER PRIMARY KEY,
    ino         INTEGER UNIQUE,
    kind        INTEGER NOT NULL,
    mode        INTEGER NOT NULL,
    uid         INTEGER NOT NULL,
    gid         INTEGER NOT NULL,
    size        INTEGER NOT NULL,
    mtime       INTEGER NOT NULL,
    mtime_nanos INTEGER NOT NULL,
    ctime       INTEGER NOT NULL,
    ctime_nanos INTEGER NOT NULL,
    target      BLOB,
    xattrs      BLOB,
    content_n   INTEGER NOT NULL,
    changed_n   INTEGER NOT NULL,
    synced_n    INTEGER NOT NULL,
    hash        BLOB,
    hash_n      INTEGER NOT NULL,  -- the content_n that the hash was computed at
    artefact    INTEGER NOT NULL
) STRICT;
CREATE TABLE entry (
    parent INTEGER NOT NULL,
    name   BLOB NOT NULL,
    node   INTEGER NOT NULL,
    PRIMARY KEY (parent, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX entry_node ON entry (node);
CREATE TABLE change (
    n      INTEGER NOT NULL,
    node   INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    life   INTEGER NOT NULL,
    origin INTEGER NOT NULL,       -- 0 local, -1 scan, else the peer
    kind   INTEGER NOT NULL,
    start  INTEGER,                -- bytes written, from and how many
    length INTEGER,
    name   BLOB, parent INTEGER,                   -- the name it has, or had if it is gone
    PRIMARY KEY (n, node)
) STRICT, WITHOUT ROWID;
CREATE TABLE peer (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    name               TEXT NOT NULL UNIQUE,
    url                TEXT NOT NULL,
    replica            BLOB,
    cursor             INTEGER NOT NULL,
    durable            INTEGER NOT NULL,
    seen_epoch         INTEGER,
    seen_rev           INTEGER,
    agreement          BLOB
) STRICT;
CREATE TABLE base (
    peer  INTEGER NOT NULL,
    path  BLOB NOT NULL,
    node  INTEGER,
    entry BLOB NOT NULL,
    PRIMARY KEY (peer, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX base_node ON base (peer, node);
CREATE TABLE remote (
    peer  INTEGER NOT NULL,
    path  BLOB NOT NULL,
    entry BLOB,
    PRIMARY KEY (peer, path)
) STRICT, WITHOUT ROWID;
CREATE TABLE conflict (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    peer        INTEGER NOT NULL,
    path        BLOB NOT NULL,
    base        BLOB,
    local       BLOB,
    remote      BLOB,
    copy        BLOB,
    info        BLOB,
    since       INTEGER NOT NULL,
    since_nanos INTEGER NOT NULL, unit BLOB,
    UNIQUE (peer, path)
) STRICT;
CREATE TABLE proposal (
    peer       INTEGER PRIMARY KEY,
    agreement  BLOB NOT NULL,
    cursor     INTEGER NOT NULL,
    batch      BLOB NOT NULL,
    seen_epoch INTEGER,
    seen_rev   INTEGER
) STRICT;
CREATE TABLE proposed_change (
    peer     INTEGER NOT NULL,
    position INTEGER NOT NULL,
    change   BLOB NOT NULL,
    PRIMARY KEY (peer, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE setting (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE meaning (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    content BLOB NOT NULL UNIQUE,
    meaning BLOB NOT NULL
) STRICT;
CREATE TABLE note (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,
    n    INTEGER NOT NULL,  -- the last change before it
    at   INTEGER NOT NULL,
    peer INTEGER NOT NULL,
    path BLOB NOT NULL,
    what TEXT NOT NULL
) STRICT;
CREATE TABLE agreed (
    peer      INTEGER NOT NULL,
    position  INTEGER NOT NULL,
    agreement BLOB NOT NULL,
    based     INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    PRIMARY KEY (peer, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE base_undo (
    peer     INTEGER NOT NULL,
    path     BLOB NOT NULL,
    position INTEGER NOT NULL,
    node     INTEGER,
    entry    BLOB,
    PRIMARY KEY (peer, path, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX base_undo_position ON base_undo (peer, position);
INSERT INTO progress VALUES (1, 7, 0, 0, 0);
INSERT INTO life VALUES (1, -5039217920183094211, 1, 1795594702829, 'bf726c4b-5d67-43a7-874d-0bad7032a10c', 1);
INSERT INTO node VALUES (1, 1, 1, 416, 1000, 100, 0, 77, 7, 78, 8, NULL, NULL, 0, 1, 0, NULL, 0, 0);
INSERT INTO node VALUES (3, 10, 1, 416, 1000, 100, 0, 77, 7, 78, 8, NULL, NULL, 2, 2, 0, NULL, 0, 0);
INSERT INTO node VALUES (4, 11, 0, 416, 1000, 100, 12, 77, 7, 78, 8, NULL, X'0106757365722E6B0176', 4, 5, 7, X'0909090909090909090909090909090909090909090909090909090909090909', 4, 0);
INSERT INTO node VALUES (7, 12, 2, 416, 1000, 100, 3, 77, 7, 78, 8, X'646972', NULL, 6, 6, 0, NULL, 0, 0);
INSERT INTO entry VALUES (1, X'646972', 3);
INSERT INTO entry VALUES (3, X'636166E9', 4);
INSERT INTO entry VALUES (1, X'6C696E6B', 7);
INSERT INTO change VALUES (1, 1, 1795594702861, 1, 0, 0, NULL, NULL, NULL, NULL);
INSERT INTO change VALUES (2, 3, 1795594702861, 1, 0, 1, NULL, NULL, X'646972', 1);
INSERT INTO change VALUES (3, 4, 1795594702861, 1, 0, 1, NULL, NULL, X'636166E9', 3);
INSERT INTO change VALUES (4, 4, 1795594702861, 1, 0, 6, 3, 9, NULL, NULL);
INSERT INTO change VALUES (5, 4, 1795594702861, 1, 0, 9, NULL, NULL, NULL, NULL);
INSERT INTO change VALUES (6, 7, 1795594702861, 1, 0, 1, NULL, NULL, X'6C696E6B', 1);
INSERT INTO peer VALUES (1, 'host', 'me@host:web', X'08080808080808080808080808080808', 6, 5, 5, 6, X'04040404040404040404040404040404040103030303030303030303030303030303');
INSERT INTO sqlite_sequence VALUES ('peer', 1);
INSERT INTO sqlite_sequence VALUES ('conflict', 1);
INSERT INTO base VALUES (1, X'646972', 2, X'0106F73057ED8181A4310E91D0A0F6A8302E656CD91B28EBE9E5F3E325B0A0F0C483A40301050106757365722E610162');
INSERT INTO remote VALUES (1, X'646972', X'0106A92D7DD9A46E618535539ACD96358A90BA19EF14A3065E745C817C294ECBA78FA40301050106757365722E610162');
INSERT INTO remote VALUES (1, X'676F6E65', NULL);
INSERT INTO conflict VALUES (1, 1, X'646972', NULL, X'0104EB3C4771AA8569B685DFDC9ABD26EFA43B2F0F0686E3FE3D8EA40475C14F3F5BA40301050106757365722E610162', X'0106A92D7DD9A46E618535539ACD96358A90BA19EF14A3065E745C817C294ECBA78FA40301050106757365722E610162', X'6469722E636F7079', NULL, 9, 1, NULL);
INSERT INTO proposal VALUES (1, X'05050505050505050505050505050505050104040404040404040404040404040404', 7, X'06060606060606060606060606060606', 5, 6);
INSERT INTO proposed_change VALUES (1, 0, X'000364697201040106F73057ED8181A4310E91D0A0F6A8302E656CD91B28EBE9E5F3E325B0A0F0C483A40301050106757365722E610162');
INSERT INTO setting VALUES ('key', X'76616C7565');
INSERT INTO agreed VALUES (1, 4, X'04040404040404040404040404040404040103030303030303030303030303030303', 1, 1795594702862);
PRAGMA user_version = 4;
