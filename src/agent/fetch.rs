//! Handing out contents, a stretch at a time and in turn, so that a large file delays
//! neither a small one nor anything else.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use mirrorfs_journal::index::{Fingerprint, PeerIndex};

use crate::replica::Root;
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
}

struct Sending {
    request: u64,
    path: RelPath,
    file: File,
    print: Fingerprint,
    at: u64,
}

/// The contents that are on their way out.
#[derive(Default)]
pub(super) struct Fetches {
    sending: VecDeque<Sending>,
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

    /// The next stretch of the file whose turn it is, of so many bytes at most.
    pub(super) fn next(&mut self, root: &Root, index: &PeerIndex, most: usize) -> Option<Next> {
        while self.sending.len() < OPEN
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
        match stretch(&mut sending, most) {
            Ok((offset, bytes)) => {
                let last = sending.at >= sending.print.size;
                let message = ToMount::Fetched {
                    request: sending.request,
                    offset,
                    bytes,
                    last,
                };
                if !last {
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
    })
}

/// Reads the next stretch. The last one is given only if the file still is what it was
/// when it was observed; the other side compares the hash as well.
fn stretch(sending: &mut Sending, most: usize) -> Result<(u64, Vec<u8>), String> {
    let path = &sending.path;
    let text = |error: std::io::Error| format!("{path}: {error}");
    let offset = sending.at;
    let left = sending.print.size - offset;
    let mut bytes = vec![0; usize::try_from(left).unwrap_or(most).min(most)];
    sending
        .file
        .read_exact_at(&mut bytes, offset)
        .map_err(text)?;
    sending.at += bytes.len() as u64;
    if print_of(&sending.file).map_err(text)? != sending.print {
        return Err(format!("{path} has changed"));
    }
    Ok((offset, bytes))
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
