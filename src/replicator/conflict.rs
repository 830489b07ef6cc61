//! Names and words of a conflict's artefacts.

use jiff::tz::TimeZone;
use mirrorfs_journal::Conflict;

use crate::reconcile::{Plan, Sides};
use crate::replica::late::shortened;
use crate::tree::{BadPath, Content, ContentHash, Entry, RelPath, Timestamp};

/// The peer's side of a conflict, as far as it tells one version from another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RemoteVersion {
    /// Of one name: what is there.
    Entry(Option<Entry>),
    /// Of a Git directory: a digest of what the peer has changed in it.
    Unit(ContentHash),
}

impl RemoteVersion {
    /// The version that is on record.
    pub fn recorded(conflict: &Conflict) -> Self {
        match conflict.unit {
            Some(unit) => Self::Unit(unit),
            None => Self::Entry(conflict.remote.clone()),
        }
    }

    /// The version that a plan is about.
    pub fn planned(plan: &Plan, path: &RelPath, sides: &Sides) -> Self {
        if plan.is_unit_in_conflict(path) {
            Self::Unit(plan.version_of(path))
        } else {
            Self::Entry(sides.remote.clone())
        }
    }
}

/// The two artefacts of a conflict at `path`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Artefacts {
    /// The peer's version: `name.remote.<UTC>.conflict`.
    pub copy: RelPath,
    /// What happened and what to do: `name.<UTC>.conflict-info`.
    pub info: RelPath,
}

impl Artefacts {
    /// The artefacts' paths beside `path`. Where several peers are configured, `peer`
    /// is part of the name. A name that would be too long is shortened.
    pub fn beside(path: &RelPath, peer: Option<&str>, at: Timestamp) -> Result<Self, BadPath> {
        let parent = path.parent().unwrap_or_default();
        let stamp = utc(at);
        let peer = peer.map(|peer| format!(".{}", peer.replace(['/', '\0'], "_")));
        let peer = peer.unwrap_or_default();
        let copy = shortened(path.name(), &format!(".remote{peer}.{stamp}.conflict"));
        let info = shortened(path.name(), &format!("{peer}.{stamp}.conflict-info"));
        Ok(Self {
            copy: parent.join(&copy)?,
            info: parent.join(&info)?,
        })
    }
}

/// Where in `.mirrorfs/conflicts` the peer's version of a conflict is kept that may not
/// lie in the tree.
pub fn kept_name(conflict: &Conflict) -> String {
    let path = conflict.path.to_string().replace('/', "%");
    format!("{}-{path}", utc(conflict.since))
}

/// `yyyymmddThhmmssZ`.
pub fn utc(at: Timestamp) -> String {
    let at = jiff::Timestamp::new(at.secs, i32::try_from(at.nanos).unwrap_or(0))
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    at.to_zoned(TimeZone::UTC)
        .strftime("%Y%m%dT%H%M%SZ")
        .to_string()
}

/// The text of a `.conflict-info`.
pub fn explanation(
    path: &RelPath,
    copy: Option<&RelPath>,
    peer: &str,
    local: Option<&Entry>,
    remote: Option<&Entry>,
    at: Timestamp,
) -> String {
    let kept = match copy {
        Some(copy) => format!(
            "This file was left as it is. The version of {peer} is kept beside it as\n\
             \n    {}\n\n\
             To settle it, make this file what it should be (merge by hand if both are needed),\n\
             then remove the .conflict file: your version then replaces the one on {peer}.\n\
             mirrorfs conflicts resolve knows other ways: --remote, --both.\n",
            String::from_utf8_lossy(copy.name())
        ),
        None => format!(
            "Both were left as they are. Make the two sides equal, or remove the one you do not\n\
             need: the conflict on {peer} then ends by itself.\n"
        ),
    };
    format!(
        "Conflict at {path}, noticed {}\n\n\
         here:     {}\n\
         {peer}: {}\n\n\
         Both sides changed it since they last agreed.\n{kept}",
        utc(at),
        describe(local),
        describe(remote),
    )
}

/// What is put beside the kept version of a Git directory.
pub fn unit_explanation(
    path: &RelPath,
    peer: &str,
    names: &[(RelPath, Entry)],
    at: Timestamp,
) -> String {
    let mut text = format!(
        "Conflict about the Git directory {path}, noticed {}\n\n\
         Here and on {peer} something was changed in it since both last agreed. Neither was\n\
         touched, but for the objects, of which both have all: git show and git merge take the\n\
         commits of either side by their hash. What {peer} has changed is kept here:\n\n",
        utc(at)
    );
    for (name, entry) in names {
        text.push_str(&format!("    {name}: {}\n", describe(Some(entry))));
    }
    text.push_str(&format!(
        "\nTo settle it: mirrorfs conflicts show {path}, merge here if both are needed, then\n\
         mirrorfs conflicts resolve {path} --local (or --remote for the version of {peer}).\n"
    ));
    text
}

fn describe(entry: Option<&Entry>) -> String {
    match entry {
        None => "nothing".to_owned(),
        Some(entry) => match &entry.content {
            Content::Directory => "a directory".to_owned(),
            Content::Symlink { target } => {
                format!("a symbolic link to {}", String::from_utf8_lossy(target))
            }
            Content::File { size, hash } => {
                format!("{size} bytes, changed {}, BLAKE3 {hash}", utc(entry.mtime))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::NAME_MAX;

    const AT: Timestamp = Timestamp {
        secs: 1_700_000_000,
        nanos: 0,
    };

    #[test]
    fn artefacts_stand_beside_the_file() {
        let path = RelPath::new("src/main.rs").unwrap();
        let names = Artefacts::beside(&path, None, AT).unwrap();
        assert_eq!(
            names.copy.to_string(),
            "src/main.rs.remote.20231114T221320Z.conflict"
        );
        assert_eq!(
            names.info.to_string(),
            "src/main.rs.20231114T221320Z.conflict-info"
        );
        let names = Artefacts::beside(&path, Some("host"), AT).unwrap();
        assert_eq!(
            names.copy.to_string(),
            "src/main.rs.remote.host.20231114T221320Z.conflict"
        );
    }

    #[test]
    fn long_names_are_shortened() {
        let path = RelPath::new("ä".repeat(127)).unwrap();
        let names = Artefacts::beside(&path, None, AT).unwrap();
        assert!(names.copy.name().len() <= NAME_MAX);
        assert!(String::from_utf8(names.copy.name().to_vec()).is_ok());
    }
}
