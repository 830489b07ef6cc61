//! A peer: its directory, the agent that serves it, and the link to that.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::jobs::Owner;
use crate::agent::{self, Stepped};
use crate::wire::frame::{Decoder, encode};
use crate::wire::message::{MAGIC, ToAgent, ToMount};

/// An agent with the number its work goes by.
pub(crate) struct Agent {
    pub(crate) owner: Owner,
    pub(crate) session: Stepped,
}

/// An agent whose link was cut, and which has not come to the end of what it received.
pub(crate) struct Older {
    pub(crate) agent: Agent,
    pub(crate) left: VecDeque<ToAgent>,
}

/// See the module's documentation.
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) root: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) agent: Option<Agent>,
    /// Whether the mounted side has a link to here.
    pub(crate) linked: bool,
    /// Frames that are on their way.
    to_agent: VecDeque<Vec<u8>>,
    to_mount: VecDeque<Vec<u8>>,
    decoders: (Decoder, Decoder),
}

fn decoder() -> Decoder {
    let mut decoder = Decoder::expecting_magic();
    decoder.push(&MAGIC);
    decoder
}

impl Peer {
    pub(crate) fn new(name: &str, root: PathBuf, state: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            root,
            state,
            agent: None,
            linked: false,
            to_agent: VecDeque::new(),
            to_mount: VecDeque::new(),
            decoders: (decoder(), decoder()),
        }
    }

    /// A fresh link.
    pub(crate) fn link(&mut self) {
        self.linked = true;
        self.to_agent.clear();
        self.to_mount.clear();
        self.decoders = (decoder(), decoder());
    }

    /// A frame of the mounted side is on its way.
    pub(crate) fn sent(&mut self, frame: Vec<u8>) {
        self.to_agent.push_back(frame);
    }

    /// A message of the agent is on its way.
    pub(crate) fn answered(&mut self, message: &ToMount) {
        let mut frame = Vec::new();
        encode(message, &mut frame).unwrap();
        self.to_mount.push_back(frame);
    }

    /// How many frames are on their way in each direction.
    pub(crate) fn on_the_way(&self) -> (usize, usize) {
        (self.to_agent.len(), self.to_mount.len())
    }

    /// The next message to come out at the agent's end.
    pub(crate) fn next_for_agent(&mut self) -> Option<ToAgent> {
        let frame = self.to_agent.pop_front()?;
        self.decoders.0.push(&frame);
        self.decoders.0.next().unwrap()
    }

    /// The next message to come out at the mounted side's end.
    pub(crate) fn next_for_mount(&mut self) -> Option<ToMount> {
        let frame = self.to_mount.pop_front()?;
        self.decoders.1.push(&frame);
        self.decoders.1.next().unwrap()
    }

    /// Cuts the link. Returns what was on its way to the agent.
    pub(crate) fn cut(&mut self) -> VecDeque<ToAgent> {
        let mut left = VecDeque::new();
        while !self.to_agent.is_empty() {
            left.extend(self.next_for_agent());
        }
        self.to_mount.clear();
        self.linked = false;
        left
    }
}

/// What of a message matters to somebody who reads a trace, with nothing in it that is
/// random or depends on the machine.
pub(crate) fn to_agent(message: &ToAgent) -> String {
    use crate::wire::message::Op;
    match message {
        ToAgent::Hello(hello) => format!(
            "hello, agreement {:?}, proposed {:?}",
            hello.agreement.map(|agreement| agreement.number),
            hello.proposed.map(|agreement| agreement.number),
        ),
        ToAgent::Offer { ops, .. } => {
            let ops: Vec<String> = ops
                .iter()
                .map(|op| match op {
                    Op::Park { from, .. } => format!("park {from}"),
                    Op::Unpark { to, .. } => format!("unpark {to}"),
                    Op::MakeDir { path, .. } => format!("make {path}"),
                    Op::Put { path, entry, .. } => format!("put {path} {}", content(entry)),
                    Op::SetMeta { path, .. } => format!("set {path}"),
                    Op::Remove { path, .. } => format!("remove {path}"),
                    Op::RemoveDir { path } => format!("rmdir {path}"),
                    Op::KeepConflict { path, entry } => {
                        format!("keep {path} {}", content(entry))
                    }
                    #[allow(unreachable_patterns)]
                    _ => "another step".to_owned(),
                })
                .collect();
            format!("offer: {}", ops.join(", "))
        }
        ToAgent::Data { offset, .. } => format!("data at {offset}"),
        ToAgent::Commit { agreement, .. } => format!("commit {}", agreement.number),
        ToAgent::Reuse { offset, len, .. } => format!("{len} known bytes at {offset}"),
        ToAgent::AskSums { .. } => "asks for sums".to_owned(),
        ToAgent::Sums { sums, .. } => format!("{} bytes of sums", sums.len()),
        ToAgent::Fetch { path, .. } | ToAgent::FetchLike { path, .. } => format!("fetch {path}"),
        ToAgent::Abandon { .. } => "abandon".to_owned(),
        ToAgent::Drain { token } => format!("drain {token}"),
        ToAgent::Ping { token } => format!("ping {token}"),
        ToAgent::Taken { bytes } => format!("taken {bytes}"),
        #[allow(unreachable_patterns)]
        _ => "another message".to_owned(),
    }
}

/// The same for what an agent says.
pub(crate) fn to_mount(message: &ToMount) -> String {
    match message {
        ToMount::Hello(hello) => format!(
            "hello, agreement {:?}, whole {}",
            hello.agreement.map(|agreement| agreement.number),
            hello.whole
        ),
        ToMount::Observed {
            observations,
            complete,
            ..
        } => {
            let seen: Vec<String> = observations
                .iter()
                .map(|seen| match &seen.entry {
                    Some(entry) => format!("{} {}", seen.path, content(entry)),
                    None => format!("no {}", seen.path),
                })
                .collect();
            format!("observed: {}, complete {complete}", seen.join(", "))
        }
        ToMount::Need { wants, .. } => format!("needs {}", wants.len()),
        ToMount::Applied { diverged, .. } => {
            let reasons: Vec<_> = diverged
                .iter()
                // What is kept aside has a random name.
                .filter_map(|diverged| diverged.reason.split(".mirrorfs").next())
                .collect();
            format!("applied, but for: {}", reasons.join(", "))
        }
        ToMount::Durable { .. } => "durable".to_owned(),
        ToMount::Failed { reason, .. } => format!("failed: {reason}"),
        ToMount::Fetched { offset, last, .. } => format!("fetched at {offset}, last {last}"),
        ToMount::Reused { offset, last, .. } => format!("known at {offset}, last {last}"),
        ToMount::AskSums { .. } => "asks for sums".to_owned(),
        ToMount::Sums { sums, .. } => format!("{} bytes of sums", sums.len()),
        ToMount::FetchFailed { reason, .. } => format!("cannot fetch: {reason}"),
        ToMount::Drained { token } => format!("drained {token}"),
        ToMount::Pong { token } => format!("pong {token}"),
        ToMount::Taken { bytes } => format!("taken {bytes}"),
        ToMount::Problems { problems } => format!("{} problems", problems.len()),
        ToMount::Watching { .. } => "watching".to_owned(),
        ToMount::Closing { reason } => format!("closing: {reason}"),
        ToMount::Refused { refusal } => {
            // Some name the directory.
            format!("refused: {}", refusal.to_string().len())
        }
        #[allow(unreachable_patterns)]
        _ => "another message".to_owned(),
    }
}

fn content(entry: &crate::tree::Entry) -> String {
    use crate::tree::Content;
    match &entry.content {
        Content::File { hash, .. } => super::ledger::short(*hash),
        Content::Symlink { target } => {
            format!(
                "link {}",
                super::ledger::short(super::ledger::link_value(target))
            )
        }
        Content::Directory => format!("dir {:o}", entry.mode),
    }
}

/// Whether a session ended as sessions do, and not by a fault of the engine.
pub(crate) fn ended_well(error: &agent::Error) -> bool {
    matches!(
        error,
        agent::Error::Disconnected | agent::Error::Fenced | agent::Error::Refused(_)
    )
}
