//! A look at a journal that nobody has open, without beginning a life in it.

use std::path::Path;

use crate::schema::{self, Use};
use crate::{DATABASE, Error, View};

/// Shows what the journal in a directory holds, and leaves it as it is: a start that
/// follows still finds whether the last life ended cleanly. None if there is no journal.
pub fn look(dir: &Path) -> Result<Option<View>, Error> {
    let path = dir.join(DATABASE);
    if !path.exists() {
        return Ok(None);
    }
    let connection = schema::connect(&path, Use::Read)?;
    schema::check_readable(&connection, &path)?;
    // BEGIN alone takes no snapshot in WAL mode; the first read does.
    connection.execute_batch("BEGIN")?;
    View::new(connection).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Durability, Journal};

    #[test]
    fn looking_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(look(dir.path()).unwrap().is_none());
        let (journal, _) = Journal::open(dir.path()).unwrap();
        journal
            .update(Durability::Full, |update| {
                update.add_peer("p", "/p").map(drop)
            })
            .unwrap();
        // Not closed: the stop was not clean.
        drop(journal);
        let view = look(dir.path()).unwrap().unwrap();
        assert_eq!(view.peers().unwrap().len(), 1);
        drop(view);
        let (journal, start) = Journal::open(dir.path()).unwrap();
        assert!(!start.clean);
        journal.close().unwrap();
        drop(look(dir.path()).unwrap());
        let (_journal, start) = Journal::open(dir.path()).unwrap();
        assert!(start.clean);
    }
}
