//! Beginning again where one of the sides turned out to be of another time: the agent tells
//! its chain of agreements, hears which of them is the last that both have gone through,
//! and gives or takes the base of it.

use mirrorfs_journal::index::Durable;

use super::{Engine, Error};
use crate::replica::Marks;
use crate::tree::{Agreement, Entry, RelPath};
use crate::wire::message::{BaseFrom, PIECE, ToMount, row_weight};

/// How many agreements go into one message.
const LINKS: usize = 10_000;
/// How many rows of the base are read at once.
const ROWS: u32 = 512;

/// What a session waits for before both sides know from where on they go on.
pub(super) enum Joining {
    /// The other side has the chain, and is to say where it ends.
    Chain,
    /// The base of this agreement is coming in; whether some of it has come.
    Base(Agreement, bool),
}

impl Engine {
    pub(super) fn tell_chain(&self) -> Result<(), Error> {
        let links = self.observer.index.chain(self.mount)?;
        let mut pieces = links.chunks(LINKS).peekable();
        loop {
            let links = pieces.next().unwrap_or_default().to_vec();
            let more = pieces.peek().is_some();
            self.send(ToMount::Chain { links, more })?;
            if !more {
                return Ok(());
            }
        }
    }

    /// The other side says from where on both go on, and who has the base of it.
    pub(super) fn rejoin(&mut self, at: Option<Agreement>, base: BaseFrom) -> Result<(), Error> {
        if !matches!(self.joining, Some(Joining::Chain)) {
            return Err(unasked());
        }
        let mount = self.mount;
        self.observer.commit()?;
        let index = &mut self.observer.index;
        let chain = index.chain(mount)?;
        let link = at.and_then(|at| chain.iter().find(|link| link.agreement == at));
        let ours = link.is_some_and(|link| link.based);
        match (base, at) {
            (BaseFrom::Both, None) => {}
            (BaseFrom::Both | BaseFrom::Agent, Some(_)) if ours => {}
            (BaseFrom::Mount, Some(_)) if link.is_some() => {}
            _ => {
                let what = "it wants to go on where the agent has never been";
                return Err(Error::Protocol(what.to_owned()));
            }
        }
        index.transaction(Durable::PowerLoss, |index| index.rejoin(mount, at.as_ref()))?;
        match (base, at) {
            (BaseFrom::Mount, Some(at)) => {
                self.joining = Some(Joining::Base(at, false));
                return Ok(());
            }
            (BaseFrom::Agent, _) => self.tell_base()?,
            _ => {}
        }
        self.rejoined(at)
    }

    fn tell_base(&self) -> Result<(), Error> {
        let mut after = None;
        let (mut rows, mut bytes) = (Vec::new(), 0);
        loop {
            let index = &self.observer.index;
            let page = index.base_page(self.mount, after.as_ref(), ROWS)?;
            let end = page.len() < ROWS as usize;
            after = page.last().map(|(path, _)| path.clone());
            for (path, entry) in page {
                let weight = row_weight(&path, Some(&entry));
                if bytes + weight > PIECE && !rows.is_empty() {
                    let rows = std::mem::take(&mut rows);
                    self.send(ToMount::Base { rows, more: true })?;
                    bytes = 0;
                }
                bytes += weight;
                rows.push((path, entry));
            }
            if end {
                return self.send(ToMount::Base { rows, more: false });
            }
        }
    }

    /// A piece of the base came in. Only the last one puts an agreement into the chain: with
    /// some of the pieces the next session finds none but the tree's mark, whose base is not
    /// known here, and asks for all of them again.
    pub(super) fn take_base(&mut self, rows: &[(RelPath, Entry)], more: bool) -> Result<(), Error> {
        let Some(Joining::Base(at, begun)) = self.joining else {
            return Err(unasked());
        };
        let mount = self.mount;
        let durable = if more {
            Durable::Process
        } else {
            Durable::PowerLoss
        };
        self.observer.commit()?;
        let index = &mut self.observer.index;
        index.transaction(durable, |index| {
            index.fill_base(mount, !begun, rows)?;
            if more {
                return Ok(());
            }
            index.end_base(mount, &at)
        })?;
        self.joining = Some(Joining::Base(at, true));
        if more {
            return Ok(());
        }
        self.rejoined(Some(at))
    }

    fn rejoined(&mut self, at: Option<Agreement>) -> Result<(), Error> {
        self.observer.index.set_rejoins(self.mount, false)?;
        // The tree has gone through it, so that it may say so at once.
        Marks::write(&self.observer.reserved, [(self.mount, at)])?;
        self.joining = None;
        self.joined()
    }
}

fn unasked() -> Error {
    Error::Protocol("a base that nobody asked for".to_owned())
}
