//! Handing out contents, a stretch at a time and in turn, so that a large file delays
//! neither a small one nor anything else.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use mirrorfs_journal::index::{Fingerprint, PeerIndex};

use crate::replica::Root;
use crate::replica::delta::{Blocks, LEAST, Likeness, Piece, block_size};
use crate::replica::look::fingerprint;
use crate::tree::{Content, ContentHash, RelPath, scan};
use crate::wire::message::ToMount;

/// How many files are open for sending.
const OPEN: usize = 16;
/// How many requests may wait.
const WAITING: usize = 4096;

/// A request for a content.
pub(super) struct Request {
    pub(super) number: u64,
    pub(super) path: RelPath,
    pub(super) hash: ContentHash,
    pub(super) offset: u64,
    /// A content that the other side has and that may be like it, and its size.
    pub(super) old: Option<(ContentHash, u64)>,
}

struct Sending {
    request: u64,
    path: RelPath,
    file: File,
    print: Fingerprint,
    at: u64,
    /// As in the request, until it is known how like it is.
    old: Option<(ContentHash, u64)>,
    likeness: Likeness,
}

/// The contents that are on their way out.
#[derive(Default)]
pub(super) struct Fetches {
    sending: VecDeque<Sending>,
    /// Those for which sums of a content that the other side has were asked for, with the
    /// size of that content, by request.
    asked: HashMap<u64, (Sending, u64)>,
    waiting: VecDeque<Request>,
}

/// What comes next.
pub(super) struct Next {
    /// To be sent.
    pub(super) message: ToMount,
    /// A path that turned out to be something else than was observed.
    pub(super) changed: Option<RelPath>,
}

impl Fetches {
    /// Takes in a request. A refusal is to be sent at once.
    pub(super) fn request(&mut self, request: Request) -> Option<ToMount> {
        if self.waiting.len() >= WAITING {
            return Some(failed(request.number, "too many requests at once"));
        }
        self.waiting.push_back(request);
        None
    }

    /// Whether there is anything to hand out.
    pub(super) fn is_empty(&self) -> bool {
        self.sending.is_empty() && self.waiting.is_empty()
    }

    /// Takes in the sums that were asked for.
    pub(super) fn sums(&mut self, request: u64, block: u32, sums: &[u8]) {
        let Some((mut sending, size)) = self.asked.remove(&request) else {
            return;
        };
        if let Some(blocks) = Blocks::new(size, block, sums) {
            sending.likeness = Likeness::Blocks(blocks);
        }
        self.sending.push_back(sending);
    }

    /// The next stretch of the file whose turn it is, of so many new bytes at most.
    pub(super) fn next(&mut self, root: &Root, index: &PeerIndex, most: usize) -> Option<Next> {
        while self.sending.len() + self.asked.len() < OPEN
            && let Some(request) = self.waiting.pop_front()
        {
            match open(root, index, &request) {
                Ok(sending) => self.sending.push_back(sending),
                Err(reason) => {
                    return Some(Next {
                        message: failed(request.number, &reason),
                        changed: Some(request.path),
                    });
                }
            }
        }
        let mut sending = self.sending.pop_front()?;
        if let Some((old, size)) = sending.old.take() {
            let like = |buffer: &mut [u8], at| sending.file.read_at(buffer, at);
            // What cannot be read is found out with the first stretch.
            match Likeness::appended(old, size, sending.print.size, &like) {
                Ok(Some(appended)) => sending.likeness = appended,
                Ok(None) | Err(_) => {
                    let (request, block) = (sending.request, block_size(size));
                    self.asked.insert(request, (sending, size));
                    return Some(Next {
                        message: ToMount::AskSums { request, block },
                        changed: None,
                    });
                }
            }
        }
        match stretch(&mut sending, most) {
            Ok(message) => {
                if sending.at < sending.print.size {
                    self.sending.push_back(sending);
                }
                Some(Next {
                    message,
                    changed: None,
                })
            }
            Err(reason) => Some(Next {
                message: failed(sending.request, &reason),
                changed: Some(sending.path),
            }),
        }
    }
}

fn open(root: &Root, index: &PeerIndex, request: &Request) -> Result<Sending, String> {
    let path = &request.path;
    let row = index.row(path).map_err(|error| error.to_string())?;
    let observed = row.filter(|row| {
        let content = row.entry.as_ref().map(|entry| &entry.content);
        matches!(content, Some(Content::File { hash, .. }) if *hash == request.hash)
    });
    let Some(row) = observed else {
        return Err(format!("{path} is something else by now"));
    };
    let text = |error: std::io::Error| format!("{path}: {error}");
    let dir = root.parent(path).map_err(text)?;
    let file = scan::open_file(dir.as_fd(), path.name()).map_err(text)?;
    let print = print_of(&file).map_err(text)?;
    if print != row.fingerprint {
        return Err(format!("{path} has changed"));
    }
    if request.offset > print.size {
        return Err(format!("{path} ends at {} bytes", print.size));
    }
    Ok(Sending {
        request: request.number,
        path: path.clone(),
        file,
        print,
        at: request.offset,
        old: request
            .old
            .filter(|(_, size)| *size >= LEAST && print.size >= LEAST),
        likeness: Likeness::None,
    })
}

/// Reads the next stretch. The last one is given only if the file still is what it was
/// when it was observed; the other side compares the hash as well.
fn stretch(sending: &mut Sending, most: usize) -> Result<ToMount, String> {
    let (path, file) = (&sending.path, &sending.file);
    let text = |error: std::io::Error| format!("{path}: {error}");
    let (request, offset, size) = (sending.request, sending.at, sending.print.size);
    let read = |buffer: &mut [u8], at| file.read_at(buffer, at);
    let piece = sending.likeness.next(offset, size, &read).map_err(text)?;
    let mut bytes = Vec::new();
    sending.at += match piece {
        Piece::Old { len, .. } => len,
        Piece::New(len) => {
            bytes.resize(len.min(most), 0);
            file.read_exact_at(&mut bytes, offset).map_err(text)?;
            bytes.len() as u64
        }
    };
    if print_of(file).map_err(text)? != sending.print {
        return Err(format!("{path} has changed"));
    }
    let last = sending.at >= size;
    Ok(match piece {
        Piece::Old { from, len } => ToMount::Reused {
            request,
            offset,
            len,
            from,
            last,
        },
        Piece::New(_) => ToMount::Fetched {
            request,
            offset,
            bytes,
            last,
        },
    })
}

fn print_of(file: &File) -> std::io::Result<Fingerprint> {
    Ok(fingerprint(&rustix::fs::fstat(file.as_fd())?))
}

fn failed(request: u64, reason: &str) -> ToMount {
    ToMount::FetchFailed {
        request,
        reason: reason.to_owned(),
    }
}
