//! Read transactions, and the connections they use.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;

use crate::schema::{self, Use};
use crate::{Error, View};

/// How many idle connections are kept.
const IDLE: usize = 4;

/// Connections for reading, opened as needed and used again.
#[derive(Clone)]
pub(crate) struct Pool {
    path: PathBuf,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Pool {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            idle: Arc::default(),
        }
    }

    /// Opens a read transaction that shows everything committed so far.
    pub(crate) fn snapshot(&self) -> Result<Snapshot, Error> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let connection = match idle {
            Some(connection) => connection,
            None => schema::connect(&self.path, Use::Read)?,
        };
        // BEGIN alone takes no snapshot in WAL mode; the first read does.
        connection.execute_batch("BEGIN")?;
        let view = View::new(connection)?;
        Ok(Snapshot {
            view: Some(view),
            pool: self.clone(),
        })
    }

    /// Closes the idle connections.
    pub(crate) fn clear(&self) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// The journal as it was at one position. While it lives the write-ahead log cannot
/// shrink, so drop it when done.
pub struct Snapshot {
    /// Only none while being dropped.
    view: Option<View>,
    pool: Pool,
}

impl Deref for Snapshot {
    type Target = View;

    fn deref(&self) -> &View {
        match &self.view {
            Some(view) => view,
            None => unreachable!("a snapshot loses its view only in drop"),
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let Some(connection) = self.view.take().map(View::into_connection) else {
            return;
        };
        if connection.execute_batch("ROLLBACK").is_err() {
            return;
        }
        let mut idle = self
            .pool
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE {
            idle.push(connection);
        }
    }
}
