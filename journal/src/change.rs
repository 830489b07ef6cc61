//! A change of the tree, as the filesystem or a scan reports it.

use crate::{Attr, Ino, PeerId, Xattrs};

/// Who made a change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// A program on this machine, through the mount.
    Local,
    /// A peer, through the door.
    Peer(PeerId),
    /// Nobody was seen making it: a scan found it.
    Scan,
}

/// A change that has taken effect. Inode numbers are as the filesystem knows them;
/// the journal's writer maps them to node ids in the order of the records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The tree's root has this inode number and these attributes. The first record
    /// of a fresh journal; harmless if repeated.
    Root {
        /// The root.
        ino: Ino,
        /// Its attributes.
        attr: Attr,
    },
    /// A new node of any kind, under its first name. Also a node without a name that
    /// got one again (`linkat` of an unlinked file).
    Create {
        /// The directory.
        parent: Ino,
        /// The name in it.
        name: Vec<u8>,
        /// The new node.
        ino: Ino,
        /// Its attributes.
        attr: Attr,
        /// A symbolic link's text.
        target: Option<Vec<u8>>,
    },
    /// A further name of a node.
    Link {
        /// The directory.
        parent: Ino,
        /// The new name in it.
        name: Vec<u8>,
        /// The node.
        ino: Ino,
    },
    /// A name is gone (`unlink` or `rmdir`).
    Unlink {
        /// The directory.
        parent: Ino,
        /// The name that was in it.
        name: Vec<u8>,
        /// The node it named.
        ino: Ino,
        /// No other name keeps the node.
        last: bool,
    },
    /// A name moved. Of a directory, with everything below it.
    Rename {
        /// The directory it was in.
        parent: Ino,
        /// The name it had.
        name: Vec<u8>,
        /// The directory it is in.
        new_parent: Ino,
        /// The name it has.
        new_name: Vec<u8>,
        /// The node.
        ino: Ino,
        /// The node that had the new name, and whether that was its last name.
        replaced: Option<(Ino, bool)>,
    },
    /// Two names changed places.
    Exchange {
        /// The first name's directory.
        parent: Ino,
        /// The first name.
        name: Vec<u8>,
        /// The node that had the first name and has the second.
        ino: Ino,
        /// The second name's directory.
        new_parent: Ino,
        /// The second name.
        new_name: Vec<u8>,
        /// The node that had the second name and has the first.
        other: Ino,
    },
    /// Bytes of a file changed (write, fallocate, punched hole, target of a copied
    /// range).
    Write {
        /// The file.
        ino: Ino,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Attributes after it.
        attr: Attr,
    },
    /// A file's size was set.
    Truncate {
        /// The file.
        ino: Ino,
        /// Attributes after it.
        attr: Attr,
    },
    /// Mode, owner or times were set.
    Attr {
        /// The node.
        ino: Ino,
        /// Attributes after it.
        attr: Attr,
    },
    /// Extended attributes were set or removed.
    Xattrs {
        /// The node.
        ino: Ino,
        /// Attributes after it.
        attr: Attr,
        /// All `user.` attributes after it.
        xattrs: Xattrs,
    },
    /// The content is another, nobody knows how: a scan found it.
    Content {
        /// The file.
        ino: Ino,
        /// Attributes as found.
        attr: Attr,
    },
    /// The node was synced to disk.
    Sync {
        /// The node.
        ino: Ino,
    },
}

impl Change {
    /// The kind as the `change` table stores it. Never renumbered.
    pub(crate) fn code(&self) -> i64 {
        match self {
            Self::Root { .. } => 0,
            Self::Create { .. } => 1,
            Self::Link { .. } => 2,
            Self::Unlink { .. } => 3,
            Self::Rename { .. } => 4,
            Self::Exchange { .. } => 5,
            Self::Write { .. } => 6,
            Self::Truncate { .. } => 7,
            Self::Attr { .. } => 8,
            Self::Xattrs { .. } => 9,
            Self::Content { .. } => 10,
            Self::Sync { .. } => 11,
        }
    }

    /// The nodes (not directories) that the change names.
    pub(crate) fn nodes(&self) -> [Option<Ino>; 2] {
        match self {
            Self::Root { ino, .. }
            | Self::Create { ino, .. }
            | Self::Link { ino, .. }
            | Self::Unlink { ino, .. }
            | Self::Write { ino, .. }
            | Self::Truncate { ino, .. }
            | Self::Attr { ino, .. }
            | Self::Xattrs { ino, .. }
            | Self::Content { ino, .. }
            | Self::Sync { ino } => [Some(*ino), None],
            Self::Rename { ino, replaced, .. } => [Some(*ino), replaced.map(|(ino, _)| ino)],
            Self::Exchange { ino, other, .. } => [Some(*ino), Some(*other)],
        }
    }
}

/// What a change has done to the content of a file that it names.
pub(crate) enum Effect {
    /// Nothing.
    Name,
    /// Some of its bytes are others, and there may be more of them.
    Bytes,
    /// It may be another.
    Content,
}

/// The effect of a change by its code in the `change` table.
pub(crate) fn effect(code: i64) -> Effect {
    match code {
        // Names and attributes.
        2..=5 | 8 | 9 | 11 | DISPLACED => Effect::Name,
        6 => Effect::Bytes,
        _ => Effect::Content,
    }
}

/// The code in the `change` table of a node that lost its last name by another's
/// change: it was replaced, or the record had to be repaired.
pub(crate) const DISPLACED: i64 = 20;

impl Origin {
    pub(crate) fn code(self) -> i64 {
        match self {
            Self::Local => 0,
            Self::Scan => -1,
            Self::Peer(PeerId(id)) => id,
        }
    }

    pub(crate) fn of_code(code: i64) -> Self {
        match code {
            0 => Self::Local,
            -1 => Self::Scan,
            peer => Self::Peer(PeerId(peer)),
        }
    }
}
