//! One name: base, local and remote make one result or a conflict.

use crate::tree::{Content, Entry, Timestamp, Xattrs};

/// What the three legs show at one path.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sides {
    /// What both sides last agreed on.
    pub base: Option<Entry>,
    /// What the mounted side shows.
    pub local: Option<Entry>,
    /// What the peer shows.
    pub remote: Option<Entry>,
}

/// Something the rules did that a person may want to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note {
    /// Deleted on the peer, edited here: the edit was kept.
    KeptLocalEdit,
    /// Deleted here, edited on the peer: the edit was kept.
    KeptRemoteEdit,
    /// Mode or attributes were changed on both sides; the local ones stand.
    LocalMetadataWon,
}

impl Note {
    /// The note in words. `peer` is what people call the other side.
    pub fn tell(self, peer: &str) -> String {
        match self {
            Self::KeptLocalEdit => format!("deleted on {peer}, edited here: the edit was kept"),
            Self::KeptRemoteEdit => format!("deleted here, edited on {peer}: the edit was kept"),
            Self::LocalMetadataWon => format!(
                "mode or attributes were changed here and on {peer}: those of this side stand"
            ),
        }
    }
}

/// The outcome for one name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Merge {
    /// Both sides shall show this, and it becomes the base.
    Agreed(Option<Entry>, Option<Note>),
    /// Both changed the content differently: both stay as they are, and so does the base.
    Conflict,
    /// All three mean the same without being the same. Each side keeps its own.
    Alike,
}

/// Applies the table of three-way rules to one name.
///
/// | B | L | R | decision |
/// |---|---|---|---|
/// | any | X | X | agree |
/// | none | X | none | push |
/// | none | none | X | pull |
/// | A | none | A | delete remote |
/// | A | A | none | delete local |
/// | A | X | A | push |
/// | A | A | X | pull |
/// | A | A | A | skip |
/// | A | none | none | forget |
/// | A | X | none | keep the edit |
/// | A | none | Y | keep the edit |
/// | any | X | Y | conflict |
///
/// `=` compares kind, content and link target. Mode and attributes are then merged by
/// the same table as fields of their own, and the modification time follows the content
/// that won.
pub fn merge(sides: &Sides) -> Merge {
    merge_by(sides, &|one, other| one == other)
}

/// The same, where more than equal contents may count as the same.
pub(super) fn merge_by(sides: &Sides, same: &dyn Fn(&Content, &Content) -> bool) -> Merge {
    let base = sides.base.as_ref();
    let (local, remote) = match (sides.local.as_ref(), sides.remote.as_ref()) {
        (None, None) => return Merge::Agreed(None, None),
        (Some(local), None) => {
            return match base {
                None => Merge::Agreed(Some(local.clone()), None),
                Some(base) if same(&base.content, &local.content) => Merge::Agreed(None, None),
                Some(_) => Merge::Agreed(Some(local.clone()), Some(Note::KeptLocalEdit)),
            };
        }
        (None, Some(remote)) => {
            return match base {
                None => Merge::Agreed(Some(remote.clone()), None),
                Some(base) if same(&base.content, &remote.content) => Merge::Agreed(None, None),
                Some(_) => Merge::Agreed(Some(remote.clone()), Some(Note::KeptRemoteEdit)),
            };
        }
        (Some(local), Some(remote)) => (local, remote),
    };
    let unchanged = |side: &Content| base.is_some_and(|base| same(&base.content, side));
    let (content, mtime) = if local.content == remote.content {
        let unchanged = base.is_some_and(|base| base.content == local.content);
        let mtime = merge_mtime(base.filter(|_| unchanged), local, remote);
        (&local.content, mtime)
    } else {
        match (unchanged(&local.content), unchanged(&remote.content)) {
            (true, true) => return Merge::Alike,
            (true, false) => (&remote.content, remote.mtime),
            (false, true) => (&local.content, local.mtime),
            (false, false) if same(&local.content, &remote.content) => {
                (&local.content, local.mtime)
            }
            (false, false) => return Merge::Conflict,
        }
    };
    // A name that changed its kind has the metadata of what it now is.
    let (mode, mode_note, xattrs, xattrs_note) = if local.content.kind() != remote.content.kind() {
        let winner = if *content == local.content {
            local
        } else {
            remote
        };
        (winner.mode, None, winner.xattrs.clone(), None)
    } else {
        let (mode, mode_note) = merge_field(base.map(|base| &base.mode), &local.mode, &remote.mode);
        let (xattrs, xattrs_note) = merge_xattrs(base, local, remote);
        (*mode, mode_note, xattrs, xattrs_note)
    };
    let entry = Entry {
        content: content.clone(),
        mode,
        mtime,
        xattrs,
    };
    Merge::Agreed(Some(entry), mode_note.or(xattrs_note))
}

/// The table for one field that both sides have. Where both changed it, local stands.
fn merge_field<'a, T: PartialEq>(
    base: Option<&T>,
    local: &'a T,
    remote: &'a T,
) -> (&'a T, Option<Note>) {
    if local == remote || base == Some(remote) {
        (local, None)
    } else if base == Some(local) {
        (remote, None)
    } else {
        (local, base.map(|_| Note::LocalMetadataWon))
    }
}

/// The time of a content that both sides hold. Touching a file is a change like any
/// other; directories carry no time.
fn merge_mtime(base: Option<&Entry>, local: &Entry, remote: &Entry) -> Timestamp {
    if local.content == Content::Directory {
        return Timestamp::default();
    }
    *merge_field(base.map(|base| &base.mtime), &local.mtime, &remote.mtime).0
}

fn merge_xattrs(base: Option<&Entry>, local: &Entry, remote: &Entry) -> (Xattrs, Option<Note>) {
    if local.xattrs == remote.xattrs {
        return (local.xattrs.clone(), None);
    }
    let mut merged = Xattrs::new();
    let mut note = None;
    for name in local.xattrs.keys().chain(remote.xattrs.keys()) {
        // On first contact there is no base to tell an addition from a removal: union.
        let base = base.map(|base| base.xattrs.get(name));
        let (left, right) = (local.xattrs.get(name), remote.xattrs.get(name));
        let (value, field_note) = match base {
            None => (left.or(right), None),
            Some(base) => {
                let (value, note) = merge_field(Some(&base), &left, &right);
                (*value, note)
            }
        };
        if let Some(value) = value {
            merged.insert(name.clone(), value.clone());
        }
        note = note.or(field_note);
    }
    (merged, note)
}
