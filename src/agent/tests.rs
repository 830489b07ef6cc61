//! Sessions over a socket pair, with a user at work in the directory.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use mirrorfs_journal::BaseChange;

use super::*;
use crate::tree::{
    Agreement, Content, ContentHash, Entry, Id, MirrorId, RelPath, Timestamp, Xattrs,
};
use crate::wire::frame::{read_magic, read_message, write_magic, write_message};
use crate::wire::message::{
    AgentHello, Agreed, BaseFrom, BatchId, Divergence, Expect, MountHello, Op, PROTOCOL_MAX,
    Revision, ToAgent, ToMount,
};
use crate::wire::version::Introduction;

/// Serves, and makes all symbolic links.
fn serve(
    root: &Path,
    state: &Path,
    deadline: Duration,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), Error> {
    super::serve(root, state, deadline, Symlinks::All, input, output)
}

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(30);
/// For sessions in which this side has nothing to say for as long as a test takes.
const NEVER: Duration = Duration::from_secs(3600);
const MIRROR: MirrorId = Id([1; 16]);
const MOUNT: ReplicaId = Id([2; 16]);

struct Peer {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Peer {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            state: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, at: &str) -> PathBuf {
        self.dir.path().join(at)
    }

    fn write(&self, at: &str, content: impl AsRef<[u8]>) {
        let path = self.path(at);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn read(&self, at: &str) -> String {
        fs::read_to_string(self.path(at)).unwrap()
    }

    fn dial(&self, hello: MountHello) -> Mount {
        let (root, state) = (self.dir.path().to_owned(), self.state.path().to_owned());
        self.dial_with(hello, move |input, output| {
            serve(&root, &state, NEVER, input, output)
        })
    }

    fn dial_with(
        &self,
        hello: MountHello,
        serve: impl FnOnce(UnixStream, UnixStream) -> Result<(), Error> + Send + 'static,
    ) -> Mount {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let input = theirs.try_clone().unwrap();
        let agent = std::thread::spawn(move || serve(input, theirs));
        let mut stream = ours.try_clone().unwrap();
        let (sender, messages) = unbounded();
        std::thread::spawn(move || {
            read_magic(&mut stream).unwrap();
            while let Ok(Some(message)) = read_message::<ToMount>(&mut stream) {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut mount = Mount {
            stream: ours,
            messages,
            agent: Some(agent),
            seen: BTreeMap::new(),
            upto: None,
            reports: 0,
            problems: Vec::new(),
            degraded: None,
            other: Vec::new(),
            taken: 0,
        };
        write_magic(&mut mount.stream).unwrap();
        mount.send(ToAgent::Hello(hello));
        mount
    }

    /// Has the agent's index say that the machine was started anew since.
    fn boot_anew(&self) {
        let (root, state) = (self.dir.path(), self.state.path());
        let served = root::Served::open(root, state, false).unwrap();
        let (_, identity) = Reserved::open(served.root.fd()).unwrap().unwrap();
        let mut index = open_index(&served, state, identity.replica).unwrap();
        index
            .transaction::<_, IndexError>(mirrorfs_journal::index::Durable::Process, |index| {
                index.set_boot(b"an earlier one")
            })
            .unwrap();
    }

    /// A session up to the end of the first report.
    fn meet(&self, seen: Option<Revision>) -> (Mount, AgentHello) {
        self.meet_as(hello(seen))
    }

    /// Meets as somebody who has an agreement with the peer.
    fn meet_again(&self, seen: Option<Revision>, number: u8) -> (Mount, AgentHello) {
        self.meet_as(MountHello {
            agreement: Some(agreement(number)),
            ..hello(seen)
        })
    }

    fn meet_as(&self, hello: MountHello) -> (Mount, AgentHello) {
        let at = hello.agreement;
        let mut mount = self.dial(hello);
        let ToMount::Hello(answer) = mount.next() else {
            panic!("no hello");
        };
        if !answer.settled {
            mount.rejoin(at);
        }
        mount.until(|mount| mount.reports > 0);
        (mount, answer)
    }
}

fn hello(seen: Option<Revision>) -> MountHello {
    MountHello {
        seen,
        ..Introduction::hello(MIRROR, MOUNT, Id::random().unwrap())
    }
}

/// The mounted side of a session, which believes everything it is told.
struct Mount {
    stream: UnixStream,
    messages: Receiver<ToMount>,
    agent: Option<JoinHandle<Result<(), Error>>>,
    seen: BTreeMap<String, Entry>,
    upto: Option<Revision>,
    /// How many complete reports have come.
    reports: u32,
    problems: Vec<(RelPath, String)>,
    degraded: Option<String>,
    other: Vec<ToMount>,
    /// Bytes of content that came in.
    taken: u64,
}

impl Mount {
    fn send(&mut self, message: ToAgent) {
        write_message(&mut self.stream, &message).unwrap();
    }

    /// Goes on where the agent has been; or as on first contact.
    fn rejoin(&mut self, at: Option<Agreement>) {
        match at {
            None => self.send(ToAgent::Rejoin {
                at,
                base: BaseFrom::Both,
            }),
            Some(_) => {
                self.send(ToAgent::Rejoin {
                    at,
                    base: BaseFrom::Mount,
                });
                let (rows, more) = (Vec::new(), false);
                self.send(ToAgent::Base { rows, more });
            }
        }
    }

    fn next(&mut self) -> ToMount {
        let message = self.messages.recv_timeout(PATIENCE).unwrap();
        if let ToMount::Fetched { bytes, .. } = &message {
            self.taken += bytes.len() as u64;
            self.send(ToAgent::Taken { bytes: self.taken });
        }
        message
    }

    /// Takes one message in.
    fn take(&mut self) {
        match self.next() {
            ToMount::Observed {
                observations,
                complete,
                upto,
            } => {
                for observation in observations {
                    let path = observation.path.to_string();
                    match observation.entry {
                        Some(entry) => self.seen.insert(path, entry),
                        None => self.seen.remove(&path),
                    };
                }
                self.upto = Some(upto);
                self.reports += u32::from(complete);
            }
            ToMount::Problems { problems } => self.problems = problems,
            ToMount::Watching { degraded } => self.degraded = degraded,
            other => self.other.push(other),
        }
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            self.take();
        }
    }

    fn answer<T>(&mut self, pick: impl Fn(&ToMount) -> Option<T>) -> T {
        loop {
            if let Some(at) = self
                .other
                .iter()
                .position(|message| pick(message).is_some())
            {
                return pick(&self.other.remove(at)).unwrap();
            }
            self.take();
        }
    }

    fn content(&self, at: &str) -> Option<ContentHash> {
        match self.seen.get(at)?.content {
            Content::File { hash, .. } => Some(hash),
            _ => None,
        }
    }

    fn shows(&self, at: &str, content: &str) -> bool {
        self.content(at) == Some(ContentHash::of(content.as_bytes()))
    }

    fn drain(&mut self) {
        let token = 77;
        self.send(ToAgent::Drain { token });
        self.answer(|message| match message {
            ToMount::Drained { token: 77 } => Some(()),
            _ => None,
        });
    }

    fn offer(&mut self, batch: BatchId, ops: &[Op]) -> Vec<crate::wire::message::Want> {
        let mut pieces = ops.chunks(100).peekable();
        if ops.is_empty() {
            return Vec::new();
        }
        while let Some(piece) = pieces.next() {
            self.send(ToAgent::Offer {
                batch,
                ops: piece.to_vec(),
                more: pieces.peek().is_some(),
            });
        }
        self.answer(|message| match message {
            ToMount::Need {
                batch: b, wants, ..
            } if *b == batch => Some(wants.clone()),
            _ => None,
        })
    }

    fn data(&mut self, hash: ContentHash, have: u64, content: &[u8]) {
        let mut offset = have;
        for bytes in content[have as usize..].chunks(100_000) {
            self.send(ToAgent::Data {
                hash,
                offset,
                bytes: bytes.to_vec(),
            });
            offset += bytes.len() as u64;
        }
    }

    fn commit(&mut self, batch: BatchId, number: u8) -> Result<Vec<Divergence>, String> {
        self.send(ToAgent::Commit {
            batch,
            agreement: agreement(number),
            seen: self.upto.unwrap(),
        });
        self.answer(|message| match message {
            ToMount::Applied {
                batch: b, diverged, ..
            } if *b == batch => Some(Ok(diverged.clone())),
            ToMount::Failed { batch: b, reason } if *b == batch => Some(Err(reason.clone())),
            _ => None,
        })
    }

    fn durable(&mut self, batch: BatchId) {
        self.answer(|message| match message {
            ToMount::Durable { batch: b } if *b == batch => Some(()),
            _ => None,
        });
    }

    /// A whole batch; gives what diverged.
    fn apply(&mut self, number: u8, ops: &[Op], contents: &[&[u8]]) -> Vec<Divergence> {
        let batch = Id([number; 16]);
        let contents: HashMap<ContentHash, &[u8]> =
            contents.iter().map(|c| (ContentHash::of(c), *c)).collect();
        for want in self.offer(batch, ops) {
            self.data(want.hash, want.have, contents[&want.hash]);
        }
        let diverged = self.commit(batch, number).unwrap();
        self.durable(batch);
        diverged
    }

    fn closing(&mut self) -> String {
        self.answer(|message| match message {
            ToMount::Closing { reason } => Some(reason.clone()),
            _ => None,
        })
    }

    fn hang_up(mut self) -> Result<(), Error> {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.agent.take().unwrap().join().unwrap()
    }
}

fn agreement(number: u8) -> Agreement {
    Agreement {
        number: number.into(),
        nonce: Id([number; 16]),
        previous: None,
    }
}

fn path(at: &str) -> RelPath {
    RelPath::new(at).unwrap()
}

fn file(content: &[u8]) -> Entry {
    Entry {
        content: Content::File {
            size: content.len() as u64,
            hash: ContentHash::of(content),
        },
        mode: 0o644,
        mtime: Timestamp {
            secs: 1_500_000_000,
            nanos: 987_654_321,
        },
        xattrs: Xattrs::new(),
    }
}

fn directory() -> Entry {
    Entry {
        content: Content::Directory,
        mode: 0o755,
        mtime: Timestamp::default(),
        xattrs: Xattrs::new(),
    }
}

fn put(at: &str, content: &str) -> Op {
    Op::Put {
        path: path(at),
        entry: file(content.as_bytes()),
        expect: Expect::Absent,
    }
}

#[test]
fn a_first_fill_arrives_whole_and_comes_back_as_no_change() {
    let peer = Peer::new();
    let (mut mount, answer) = peer.meet(None);
    assert_eq!((answer.mirror, answer.agreement), (None, None));
    let mut ops = Vec::new();
    let mut contents = Vec::new();
    for dir in 0..20 {
        ops.push(Op::MakeDir {
            path: path(&format!("d{dir}")),
            entry: directory(),
        });
        for name in 0..100 {
            let content = format!("content {dir} {name}");
            ops.push(put(&format!("d{dir}/f{name}"), &content));
            contents.push(content);
        }
    }
    let slices: Vec<&[u8]> = contents.iter().map(String::as_bytes).collect();
    let reports = mount.reports;
    assert!(mount.apply(1, &ops, &slices).is_empty());
    mount.drain();
    assert_eq!(mount.reports, reports, "an echo: {:?}", mount.seen.keys());
    assert_eq!(peer.read("d7/f42"), "content 7 42");
    mount.hang_up().unwrap();
    // Nothing is hashed again, and nothing has changed for the next session either.
    let (mount, answer) = peer.meet_again(None, 1);
    assert_eq!(answer.mirror, Some(MIRROR));
    assert_eq!(answer.agreement, Some(agreement(1)));
    assert_eq!(mount.seen.len(), 2020);
    assert!(mount.seen["d7/f42"] == file(b"content 7 42"));
    let upto = mount.upto;
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet_again(upto, 1);
    assert!(!answer.whole);
    assert!(mount.seen.is_empty(), "{:?}", mount.seen);
    mount.hang_up().unwrap();
    // Without an agreement in common, everything is told again.
    let (mount, answer) = peer.meet(upto);
    assert!(answer.whole);
    mount.hang_up().unwrap();
}

#[test]
fn what_the_user_does_is_reported() {
    let peer = Peer::new();
    peer.write("before", "b");
    peer.write("dir/sub/x", "x");
    let (mut mount, answer) = peer.meet(None);
    assert!(answer.whole);
    assert!(mount.shows("before", "b") && mount.shows("dir/sub/x", "x"));
    peer.write("created", "1");
    mount.until(|m| m.shows("created", "1"));
    peer.write("created", "edited in place");
    mount.until(|m| m.shows("created", "edited in place"));
    peer.write("created~", "saved");
    fs::rename(peer.path("created~"), peer.path("created")).unwrap();
    mount.until(|m| m.shows("created", "saved") && !m.seen.contains_key("created~"));
    fs::set_permissions(peer.path("created"), fs::Permissions::from_mode(0o600)).unwrap();
    mount.until(|m| m.seen["created"].mode == 0o600);
    symlink("/etc/passwd", peer.path("link")).unwrap();
    mount.until(|m| {
        m.seen.get("link").is_some_and(|entry| {
            entry.content
                == Content::Symlink {
                    target: b"/etc/passwd".to_vec(),
                }
        })
    });
    // Directories and their files faster than any watch can be added.
    for at in 0..50 {
        peer.write(&format!("fast/a{at}/b/c/file"), format!("{at}"));
    }
    mount.drain();
    for at in 0..50 {
        assert!(mount.shows(&format!("fast/a{at}/b/c/file"), &format!("{at}")));
    }
    // A moved directory, and a change in it under its new name.
    fs::rename(peer.path("dir"), peer.path("moved")).unwrap();
    mount.until(|m| m.shows("moved/sub/x", "x") && !m.seen.contains_key("dir/sub/x"));
    assert!(!mount.seen.contains_key("dir"));
    peer.write("moved/sub/x", "y");
    mount.until(|m| m.shows("moved/sub/x", "y"));
    // Out of the tree and in again.
    let outside = tempfile::tempdir_in(peer.dir.path().parent().unwrap()).unwrap();
    fs::rename(peer.path("moved"), outside.path().join("moved")).unwrap();
    mount.until(|m| !m.seen.keys().any(|path| path.starts_with("moved")));
    fs::write(outside.path().join("moved/sub/x"), "outside").unwrap();
    fs::rename(outside.path().join("moved"), peer.path("back")).unwrap();
    mount.until(|m| m.shows("back/sub/x", "outside"));
    fs::remove_dir_all(peer.path("back")).unwrap();
    mount.until(|m| !m.seen.keys().any(|path| path.starts_with("back")));
    // And the whole is what is there.
    let seen = mount.seen.clone();
    mount.hang_up().unwrap();
    let (mount, _) = peer.meet(None);
    assert_eq!(mount.seen, seen);
    mount.hang_up().unwrap();
}

/// Deletions are remembered for as long as somebody has to be told of them. Who comes back
/// from an older state than that (restored from a copy, say) is told everything.
#[test]
fn deletions_that_were_told_are_forgotten() {
    let peer = Peer::new();
    peer.write("stays", "s");
    peer.write("goes", "g");
    let (mut mount, _) = peer.meet(None);
    assert!(mount.apply(1, &[], &[]).is_empty());
    let before = mount.upto;
    mount.hang_up().unwrap();
    fs::remove_file(peer.path("goes")).unwrap();
    let (mount, answer) = peer.meet_again(before, 1);
    assert!(!answer.whole);
    let after = mount.upto;
    mount.hang_up().unwrap();
    // The deletion has been taken in. Nobody needs it any more.
    let (mount, answer) = peer.meet_again(after, 1);
    assert!(!answer.whole);
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet_again(before, 1);
    assert!(answer.whole, "the deletion would never be told");
    assert_eq!(mount.seen.keys().collect::<Vec<_>>(), ["stays"]);
    mount.hang_up().unwrap();
}

#[test]
fn what_happened_meanwhile_is_reported_on_return() {
    let peer = Peer::new();
    for at in 0..5 {
        peer.write(&format!("f{at}"), "old");
    }
    let (mut mount, _) = peer.meet(None);
    assert!(mount.apply(1, &[], &[]).is_empty());
    let (seen, upto) = (mount.seen.clone(), mount.upto);
    mount.hang_up().unwrap();
    fs::remove_file(peer.path("f0")).unwrap();
    peer.write("f1", "new");
    peer.write("f9", "created");
    let (mount, answer) = peer.meet_again(upto, 1);
    assert!(!answer.whole);
    assert_eq!(mount.seen.len(), 2, "{:?}", mount.seen.keys());
    assert!(mount.shows("f1", "new") && mount.shows("f9", "created"));
    assert_ne!(mount.seen["f1"], seen["f1"]);
    let upto = mount.upto;
    mount.hang_up().unwrap();
    // A cursor of another life is of no use.
    let mut other = upto.unwrap();
    other.epoch.0 ^= 1;
    let (mount, answer) = peer.meet(Some(other));
    assert!(answer.whole);
    assert_eq!(mount.seen.len(), 5);
    mount.hang_up().unwrap();
    // One that is ahead neither: a power loss took revisions back.
    let mut ahead = upto.unwrap();
    ahead.rev += 10;
    let (mount, answer) = peer.meet(Some(ahead));
    assert!(answer.whole && answer.epoch != ahead.epoch);
    mount.hang_up().unwrap();
}

#[test]
fn steps_and_divergences_over_the_wire() {
    let peer = Peer::new();
    peer.write("edit", "old");
    peer.write("gone", "bye");
    peer.write("theirs", "old");
    peer.write("dir/x", "x");
    let (mut mount, _) = peer.meet(None);
    let seen = mount.seen.clone();
    let replace = |at: &str, content: &str| Op::Put {
        path: path(at),
        entry: file(content.as_bytes()),
        expect: Expect::Entry(seen[at].clone()),
    };
    // The user is faster.
    peer.write("theirs", "the user's");
    let ops = [
        Op::Park {
            from: path("dir"),
            slot: 0,
            expect: seen["dir"].clone(),
        },
        Op::Unpark {
            slot: 0,
            to: path("moved"),
        },
        replace("edit", "new"),
        replace("theirs", "new"),
        Op::Remove {
            path: path("gone"),
            expect: seen["gone"].clone(),
        },
    ];
    let diverged = mount.apply(1, &ops, &[b"new"]);
    assert_eq!(diverged.len(), 1);
    assert_eq!(diverged[0].op, 3);
    assert!(
        mount.shows("theirs", "the user's"),
        "told before it was applied"
    );
    assert_eq!(peer.read("edit"), "new");
    assert_eq!(peer.read("moved/x"), "x");
    assert_eq!(peer.read("theirs"), "the user's");
    mount.drain();
    assert!(!mount.seen.contains_key("moved/x"), "an echo");
    // The watch went along with the directory.
    peer.write("moved/x", "edited");
    mount.until(|m| m.shows("moved/x", "edited"));
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet(None);
    assert_eq!(answer.agreement, Some(agreement(1)));
    assert_eq!(answer.diverged.len(), 1, "repeated for a lost answer");
    let names: Vec<&str> = mount.seen.keys().map(String::as_str).collect();
    assert_eq!(names, ["edit", "moved", "moved/x", "theirs"]);
    mount.hang_up().unwrap();
}

#[test]
fn a_batch_is_answered_again_and_dropped_for_good() {
    let peer = Peer::new();
    let (mut mount, _) = peer.meet(None);
    mount.apply(1, &[put("a", "1")], &[b"1"]);
    assert_eq!(mount.commit(Id([1; 16]), 1), Ok(Vec::new()), "again");
    // A wrong content fails the batch; what was offered is not applied later either.
    let batch = Id([2; 16]);
    let wants = mount.offer(batch, &[put("b", "right")]);
    mount.send(ToAgent::Data {
        hash: wants[0].hash,
        offset: 0,
        bytes: b"wrong".to_vec(),
    });
    let failed = mount.commit(batch, 2).unwrap_err();
    assert!(failed.contains("arrived as"), "{failed}");
    let failed = mount.commit(batch, 2).unwrap_err();
    assert!(failed.contains("dropped"), "{failed}");
    // One that was offered in part, or lacks contents.
    let batch = Id([3; 16]);
    mount.offer(batch, &[put("b", "right")]);
    assert!(mount.commit(batch, 3).is_err());
    assert!(!peer.path("b").exists());
    // Without steps only the agreement moves.
    assert_eq!(mount.commit(Id([4; 16]), 4), Ok(Vec::new()));
    mount.durable(Id([4; 16]));
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet(None);
    assert_eq!(answer.agreement, Some(agreement(4)));
    mount.hang_up().unwrap();
}

#[test]
fn contents_go_on_where_they_stopped_and_known_ones_do_not_travel() {
    let peer = Peer::new();
    peer.write("known", "known content");
    let large: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut mount, _) = peer.meet(None);
    let ops = [
        put("copy", "known content"),
        put("empty", ""),
        Op::Put {
            path: path("large"),
            entry: file(&large),
            expect: Expect::Absent,
        },
    ];
    let wants = mount.offer(Id([1; 16]), &ops);
    assert_eq!(wants.len(), 1);
    assert_eq!((wants[0].hash, wants[0].have), (ContentHash::of(&large), 0));
    mount.data(wants[0].hash, 0, &large[..1_000_000]);
    // All of it has been taken in once the agent answers.
    mount.drain();
    mount.hang_up().unwrap();
    let (mut mount, _) = peer.meet(None);
    let wants = mount.offer(Id([2; 16]), &ops);
    assert_eq!(wants.len(), 1);
    assert_eq!(wants[0].have, 1_000_000);
    mount.data(wants[0].hash, wants[0].have, &large);
    assert_eq!(mount.commit(Id([2; 16]), 2), Ok(Vec::new()));
    mount.durable(Id([2; 16]));
    assert_eq!(fs::read(peer.path("large")).unwrap(), large);
    assert_eq!(peer.read("copy"), "known content");
    assert_eq!(peer.read("empty"), "");
    mount.hang_up().unwrap();
    let staging = peer.path(".mirrorfs/staging");
    assert_eq!(fs::read_dir(staging).unwrap().count(), 0);
}

/// design.md, "Power loss proves nothing": a peer does the same with what it had not synced,
/// and asks for it again.
#[test]
fn what_was_staged_before_a_power_loss_is_asked_for_again() {
    let peer = Peer::new();
    let (half, whole) = (vec![7; 300_000], vec![8; 100_000]);
    let ops = [("half", &half), ("whole", &whole)].map(|(at, content)| Op::Put {
        path: path(at),
        entry: file(content),
        expect: Expect::Absent,
    });
    let names = [
        format!("{}.part", ContentHash::of(&half)),
        ContentHash::of(&whole).to_string(),
    ];
    let staged = names.map(|name| peer.path(".mirrorfs/staging").join(name));
    let (mut mount, _) = peer.meet(None);
    mount.offer(Id([1; 16]), &ops);
    mount.data(ContentHash::of(&half), 0, &half[..200_000]);
    mount.data(ContentHash::of(&whole), 0, &whole);
    mount.drain();
    mount.hang_up().unwrap();
    // In the same life of the machine it goes on where it stopped.
    let (mut mount, _) = peer.meet(None);
    let wants = mount.offer(Id([2; 16]), &ops);
    assert_eq!(
        wants.iter().map(|want| want.have).collect::<Vec<_>>(),
        [200_000]
    );
    mount.drain();
    mount.hang_up().unwrap();
    // The power fails: of what was written the sizes are left.
    for staged in &staged {
        let size = fs::metadata(staged).unwrap().len();
        fs::write(staged, vec![0; usize::try_from(size).unwrap()]).unwrap();
    }
    peer.boot_anew();
    let (mut mount, _) = peer.meet(None);
    let wants = mount.offer(Id([3; 16]), &ops);
    let mut asked: Vec<_> = wants.iter().map(|want| (want.hash, want.have)).collect();
    asked.sort();
    let mut all = [(ContentHash::of(&half), 0), (ContentHash::of(&whole), 0)];
    all.sort();
    assert_eq!(asked, all);
    mount.data(ContentHash::of(&half), 0, &half);
    mount.data(ContentHash::of(&whole), 0, &whole);
    assert_eq!(mount.commit(Id([3; 16]), 3), Ok(Vec::new()));
    mount.durable(Id([3; 16]));
    assert_eq!(fs::read(peer.path("half")).unwrap(), half);
    assert_eq!(fs::read(peer.path("whole")).unwrap(), whole);
    mount.hang_up().unwrap();
}

/// A content that is told by another one is verified as a whole: what does not come out as
/// it should is never placed, and can be sent whole afterwards.
#[test]
fn contents_are_made_of_what_is_here_and_verified() {
    let peer = Peer::new();
    let old: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    peer.write("large", &old);
    let mut new = old.clone();
    new.splice(500_000..500_000, *b"more");
    let (mut mount, _) = peer.meet(None);
    let ops = [Op::Put {
        path: path("large"),
        entry: file(&new),
        expect: Expect::Entry(mount.seen["large"].clone()),
    }];
    let (hash, known) = (ContentHash::of(&new), ContentHash::of(&old));
    let sums = |mount: &mut Mount, old, block| {
        mount.send(ToAgent::AskSums { hash, old, block });
        mount.answer(|message| match message {
            ToMount::Sums { hash: of, sums } if *of == hash => Some(sums.len()),
            _ => None,
        })
    };
    let reuse = |mount: &mut Mount, offset, len, old, from| {
        mount.send(ToAgent::Reuse {
            hash,
            offset,
            len,
            old,
            from,
        });
    };
    mount.offer(Id([1; 16]), &ops);
    assert_eq!(sums(&mut mount, known, 8192), 98 * 12);
    assert_eq!(sums(&mut mount, known, 1), 0, "too many");
    assert_eq!(sums(&mut mount, ContentHash::of(b"none"), 8192), 0);
    // Nothing of that name is here.
    reuse(&mut mount, 0, 10, ContentHash::of(b"none"), 0);
    let failed = mount.commit(Id([1; 16]), 2).unwrap_err();
    assert!(failed.contains("not here"), "{failed}");
    // It ends before that.
    mount.offer(Id([2; 16]), &ops);
    reuse(&mut mount, 0, 700_000, known, 500_000);
    assert!(mount.commit(Id([2; 16]), 2).is_err());
    // Something else than was meant.
    let wants = mount.offer(Id([3; 16]), &ops);
    let have = wants[0].have;
    reuse(&mut mount, have, new.len() as u64 - have, known, 0);
    let failed = mount.commit(Id([3; 16]), 2).unwrap_err();
    assert!(failed.contains("arrived as"), "{failed}");
    assert!(fs::read(peer.path("large")).unwrap() == old);
    let wants = mount.offer(Id([4; 16]), &ops);
    assert_eq!(wants[0].have, 0, "what was wrong is not gone on with");
    reuse(&mut mount, 0, 500_000, known, 0);
    mount.send(ToAgent::Data {
        hash,
        offset: 500_000,
        bytes: b"more".to_vec(),
    });
    reuse(&mut mount, 500_004, 300_000, known, 500_000);
    assert_eq!(mount.commit(Id([4; 16]), 2), Ok(Vec::new()));
    mount.durable(Id([4; 16]));
    assert!(fs::read(peer.path("large")).unwrap() == new);
    mount.hang_up().unwrap();
}

/// What is fetched is told by what the mounted side has: what was appended to it at once,
/// anything else by its sums; without them it comes whole.
#[test]
fn fetched_contents_are_told_by_what_the_mounted_side_has() {
    use crate::replica::delta;
    let peer = Peer::new();
    let old: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut new = old.clone();
    new.extend_from_slice(b"appended");
    let mut changed = new.clone();
    changed[123_456] ^= 1;
    peer.write("appended", &new);
    peer.write("changed", &changed);
    let (mut mount, _) = peer.meet(None);
    let mut fetch = |request, at: &str, content: &[u8], sums: bool| {
        mount.send(ToAgent::FetchLike {
            request,
            path: path(at),
            hash: ContentHash::of(content),
            offset: 0,
            old: ContentHash::of(&old),
            size: old.len() as u64,
        });
        let (mut built, mut sent) = (Vec::new(), 0);
        loop {
            match mount.next() {
                ToMount::AskSums { block, .. } => {
                    let read = |buffer: &mut [u8], at| {
                        let from = usize::try_from(at).unwrap();
                        buffer.copy_from_slice(&old[from..from + buffer.len()]);
                        Ok(buffer.len())
                    };
                    let known = delta::sums(old.len() as u64, block, &read)
                        .unwrap()
                        .unwrap();
                    let sums = if sums { known } else { Vec::new() };
                    mount.send(ToAgent::Sums {
                        request,
                        block,
                        sums,
                    });
                }
                ToMount::Reused {
                    len, from, last, ..
                } => {
                    let from = usize::try_from(from).unwrap();
                    built.extend_from_slice(&old[from..from + usize::try_from(len).unwrap()]);
                    if last {
                        break;
                    }
                }
                ToMount::Fetched { bytes, last, .. } => {
                    sent += bytes.len();
                    built.extend(bytes);
                    if last {
                        break;
                    }
                }
                _ => {}
            }
        }
        assert!(built == content, "{at}");
        sent
    };
    assert_eq!(fetch(1, "appended", &new, true), 8);
    assert!(fetch(2, "changed", &changed, true) < 10_000);
    assert_eq!(fetch(3, "changed", &changed, false), changed.len());
    mount.hang_up().unwrap();
}

#[test]
fn contents_are_fetched_in_turn_and_never_of_another_version() {
    let peer = Peer::new();
    let large: Vec<u8> = (0..2_000_000_u32).flat_map(u32::to_le_bytes).collect();
    peer.write("large", &large);
    peer.write("small", "small");
    let (mut mount, _) = peer.meet(None);
    let fetch = |request, at: &str, content: &[u8], offset| ToAgent::Fetch {
        request,
        path: path(at),
        hash: ContentHash::of(content),
        offset,
    };
    mount.send(fetch(1, "large", &large, 5));
    mount.send(fetch(2, "small", b"small", 0));
    mount.send(ToAgent::Ping { token: 9 });
    let mut got = Vec::new();
    let mut order = Vec::new();
    while order.len() < 3 {
        match mount.next() {
            ToMount::Fetched {
                request: 1,
                offset,
                bytes,
                last,
            } => {
                assert_eq!(offset, 5 + got.len() as u64);
                got.extend(bytes);
                if last {
                    order.push("large");
                }
            }
            ToMount::Fetched {
                request: 2,
                bytes,
                last: true,
                ..
            } => {
                assert_eq!(bytes, b"small");
                order.push("small");
            }
            ToMount::Pong { token: 9 } => order.push("pong"),
            _ => {}
        }
    }
    assert_eq!(order.last(), Some(&"large"), "{order:?}");
    assert_eq!(got, large[5..]);
    let failed = |mount: &mut Mount, request: u64| {
        mount.answer(|message| match message {
            ToMount::FetchFailed { request: r, reason } if *r == request => Some(reason.clone()),
            _ => None,
        })
    };
    for (request, at, offset) in [
        (3, "large", 0),
        (4, "none", 0),
        (5, ".mirrorfs/identity", 0),
    ] {
        mount.send(fetch(request, at, b"another version", offset));
        failed(&mut mount, request);
    }
    mount.send(fetch(6, "small", b"small", 6));
    assert!(failed(&mut mount, 6).contains("ends at"));
    // A version that is gone: the new one is reported before the fetch fails.
    peer.write("small", "other");
    mount.send(fetch(7, "small", b"small", 0));
    failed(&mut mount, 7);
    assert!(mount.shows("small", "other"));
    mount.hang_up().unwrap();
}

#[test]
fn what_is_not_mirrored_is_listed() {
    let peer = Peer::new();
    peer.write("file", "x");
    let (mut mount, _) = peer.meet(None);
    let fifo = peer.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    mount.until(|m| m.problems.iter().any(|(path, _)| path.name() == b"fifo"));
    assert!(mount.problems[0].1.contains("special file"));
    assert!(!mount.seen.contains_key("fifo"));
    // A file that becomes special is gone as a file.
    fs::rename(&fifo, peer.path("file")).unwrap();
    mount.until(|m| !m.seen.contains_key("file") && m.problems[0].0 == path("file"));
    fs::remove_file(peer.path("file")).unwrap();
    mount.until(|m| m.problems.is_empty());
    mount.hang_up().unwrap();
}

#[test]
fn a_file_that_never_holds_still_is_a_problem_and_does_not_hold_up_a_drain() {
    let peer = Peer::new();
    let (mut mount, _) = peer.meet(None);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (busy, stopped) = (peer.path("busy"), stop.clone());
    fs::write(&busy, vec![1; 3 << 20]).unwrap();
    let writer = std::thread::spawn(move || {
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().write(true).open(busy).unwrap();
        let mut at = 0_u64;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            file.write_all_at(&at.to_le_bytes(), at % (3 << 20))
                .unwrap();
            at += 8;
        }
    });
    peer.write("calm", "calm");
    mount.until(|m| m.problems.iter().any(|(p, _)| *p == path("busy")));
    mount.drain();
    assert!(mount.shows("calm", "calm"));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
    let hash = ContentHash::of(&fs::read(peer.path("busy")).unwrap());
    mount.until(|m| m.content("busy") == Some(hash) && m.problems.is_empty());
    mount.hang_up().unwrap();
}

#[test]
fn a_large_file_is_read_aside_and_waited_for() {
    let peer = Peer::new();
    let (mut mount, _) = peer.meet(None);
    let large = vec![7; 40 << 20];
    peer.write("large", &large);
    mount.drain();
    assert_eq!(mount.content("large"), Some(ContentHash::of(&large)));
    mount.hang_up().unwrap();
}

#[test]
fn a_newer_session_takes_over() {
    let peer = Peer::new();
    let (mut older, _) = peer.meet(None);
    let (mut newer, _) = peer.meet(None);
    assert!(older.closing().contains("newer session"));
    assert!(matches!(
        older.agent.take().unwrap().join().unwrap(),
        Err(Error::Fenced)
    ));
    peer.write("file", "x");
    newer.until(|m| m.shows("file", "x"));
    assert!(matches!(
        recover(peer.dir.path(), peer.state.path()),
        Err(Error::Locked { pid: Some(_) })
    ));
    newer.hang_up().unwrap();
    assert!(!recover(peer.dir.path(), peer.state.path()).unwrap());
}

#[test]
fn an_older_agent_that_does_not_answer_is_ended() {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    let peer = Peer::new();
    let (mount, _) = peer.meet(None);
    mount.hang_up().unwrap();
    let lock = peer.path(".mirrorfs/lock");
    // Holds the lock as an agent would whose link hangs.
    let mut stuck = std::process::Command::new("flock")
        .arg("--no-fork")
        .arg(&lock)
        .args(["sh", "-c", "echo held; read forever"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut held = [0; 5];
    let stdout = stuck.stdout.as_mut().unwrap();
    stdout.read_exact(&mut held).unwrap();
    fs::write(&lock, format!("{}\n", stuck.id())).unwrap();
    let (mount, _) = peer.meet(None);
    assert_eq!(stuck.wait().unwrap().signal(), Some(libc::SIGTERM));
    mount.hang_up().unwrap();
}

#[test]
fn without_a_watch_the_directory_is_scanned() {
    let peer = Peer::new();
    peer.write("file", "old");
    let (root, state) = (peer.dir.path().to_owned(), peer.state.path().to_owned());
    let mut mount = peer.dial_with(hello(None), move |input, output| {
        let opened = hello::meet(&root, &state, None, input, output)?;
        let none = std::io::Error::from_raw_os_error(libc::EMFILE);
        session::run_watching(opened, NEVER, Err(none))
    });
    mount.rejoin(None);
    mount.until(|m| m.reports > 0);
    let degraded = mount.degraded.clone().unwrap();
    assert!(degraded.contains("cannot be watched"), "{degraded}");
    peer.write("file", "new");
    peer.write("sub/created", "x");
    mount.drain();
    assert!(mount.shows("file", "new") && mount.shows("sub/created", "x"));
    // And without anybody asking.
    fs::remove_dir_all(peer.path("sub")).unwrap();
    mount.until(|m| !m.seen.contains_key("sub"));
    mount.hang_up().unwrap();
}

#[test]
fn a_root_that_vanishes_is_no_deletion() {
    let above = tempfile::tempdir().unwrap();
    let mut peer = Peer::new();
    let root = above.path().join("root");
    fs::create_dir(&root).unwrap();
    peer.dir = tempfile::tempdir_in(&root).unwrap();
    peer.write("a/b", "x");
    let (mut mount, _) = peer.meet(None);
    let seen = mount.seen.clone();
    fs::rename(&root, above.path().join("elsewhere")).unwrap();
    let moved = above
        .path()
        .join("elsewhere")
        .join(peer.dir.path().file_name().unwrap());
    fs::remove_dir_all(moved.join("a")).unwrap();
    let reason = mount.closing();
    assert!(reason.contains("unmounted"), "{reason}");
    assert_eq!(mount.seen, seen);
    assert!(matches!(
        mount.agent.take().unwrap().join().unwrap(),
        Err(Error::RootGone { .. })
    ));
    fs::rename(above.path().join("elsewhere"), &root).unwrap();
}

#[test]
fn refusals_say_what_to_do() {
    let refusal = |peer: &Peer, hello: MountHello| {
        let mut mount = peer.dial(hello);
        let ToMount::Refused { refusal } = mount.next() else {
            panic!("not refused");
        };
        assert!(mount.agent.take().unwrap().join().unwrap().is_err());
        refusal
    };
    let peer = Peer::new();
    let mut newer = hello(None);
    newer.protocol = (PROTOCOL_MAX + 1, PROTOCOL_MAX + 2);
    let text = refusal(&peer, newer).to_string();
    assert!(
        text.contains("upgrade mirrorfs on the peer's side"),
        "{text}"
    );
    assert_eq!(
        fs::read_dir(peer.dir.path()).unwrap().count(),
        0,
        "untouched"
    );
    let (mount, answer) = peer.meet(None);
    mount.hang_up().unwrap();
    let mut other = hello(None);
    other.mirror = Id([9; 16]);
    assert_eq!(
        refusal(&peer, other),
        Refusal::OtherMirror { found: MIRROR }
    );
    let mut same = hello(None);
    same.replica = answer.replica;
    assert_eq!(refusal(&peer, same.clone()), Refusal::SameReplica);
    // Inside the mounted tree, and inside another replica.
    let inside = tempfile::tempdir_in(peer.dir.path()).unwrap();
    let nested = Peer {
        dir: inside,
        state: tempfile::tempdir().unwrap(),
    };
    assert_eq!(refusal(&nested, same), Refusal::SameReplica);
    let text = refusal(&nested, hello(None)).to_string();
    assert!(text.contains("lies inside"), "{text}");
    // A root that is missing is made, one whose parent is missing is not.
    let root = peer.state.path().join("made");
    let (input, _output) = UnixStream::pair().unwrap();
    let served = super::root::Served::open(&root, peer.dir.path(), true);
    assert!(served.is_ok() && root.is_dir());
    drop(input);
    let text = match super::root::Served::open(&root.join("no/way"), peer.dir.path(), true) {
        Err(Error::Refused(Refusal::Root { reason })) => reason,
        _ => panic!("accepted"),
    };
    assert!(text.contains("neither does its parent"), "{text}");
    fs::write(root.join("file"), "").unwrap();
    let text = match super::root::Served::open(&root.join("file"), peer.dir.path(), true) {
        Err(Error::Refused(Refusal::Root { reason })) => reason,
        _ => panic!("accepted"),
    };
    assert!(text.contains("not a directory"), "{text}");
    let state = root.join("state");
    fs::create_dir(&state).unwrap();
    let text = match super::root::Served::open(&root, &state, true) {
        Err(Error::Refused(Refusal::Root { reason })) => reason,
        _ => panic!("accepted"),
    };
    assert!(text.contains("MIRRORFS_STATE"), "{text}");
}

#[test]
fn a_tree_of_another_time_than_its_index_is_compared_in_full() {
    let peer = Peer::new();
    let (mut mount, first) = peer.meet(None);
    mount.apply(1, &[put("a", "1")], &[b"1"]);
    let marks = [".mirrorfs/agreements", ".mirrorfs/latest"];
    let copies = marks.map(|mark| fs::read(peer.path(mark)).unwrap());
    mount.apply(2, &[put("b", "2")], &[b"2"]);
    let upto = mount.upto;
    mount.hang_up().unwrap();
    // The directory comes back from a copy; the state of the agent does not.
    for (mark, copy) in marks.iter().zip(copies) {
        fs::write(peer.path(mark), copy).unwrap();
    }
    fs::remove_file(peer.path("b")).unwrap();
    let (mount, answer) = peer.meet_again(upto, 1);
    assert_eq!(answer.agreement, Some(agreement(1)));
    assert!(!answer.settled, "what it told of the other tree is to go");
    assert!(answer.whole && answer.epoch != first.epoch);
    let names: Vec<&str> = mount.seen.keys().map(String::as_str).collect();
    assert_eq!(names, ["a"]);
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet_again(upto, 1);
    assert!(answer.settled, "it knows the base of the earlier one too");
    mount.hang_up().unwrap();
    // And the other way round: the tree without the state.
    fs::remove_dir_all(peer.state.path().join("agents")).unwrap();
    let (mount, answer) = peer.meet_again(upto, 1);
    assert_eq!(answer.agreement, Some(agreement(1)));
    assert!(answer.whole && !answer.settled, "it knows no base of it");
    mount.hang_up().unwrap();
    let (mount, answer) = peer.meet_again(upto, 1);
    assert!(answer.settled, "by now it does");
    mount.hang_up().unwrap();
}

/// A mounted side of an earlier time, and one that has lost its state.
#[test]
fn both_go_on_from_an_agreement_that_both_have_gone_through() {
    let peer = Peer::new();
    let (mut mount, _) = peer.meet(None);
    let base = |at: &str, content: &str| BaseChange::Put {
        path: RelPath::new(at).unwrap(),
        node: None,
        entry: file(content.as_bytes()),
    };
    let agree = |mount: &mut Mount, number: u8, at: &str, content: &str| {
        let batch = Id([number; 16]);
        for want in mount.offer(batch, &[put(at, content)]) {
            mount.data(want.hash, want.have, content.as_bytes());
        }
        // One by its step, one that the peer had already.
        let seen = Agreed::Other(base(&format!("{at} there"), "x"), Vec::new());
        let changes = vec![Agreed::Step(0), seen];
        mount.send(ToAgent::Agreed { batch, changes });
        assert_eq!(mount.commit(batch, number), Ok(Vec::new()));
        mount.durable(batch);
    };
    for number in 1..=3 {
        agree(&mut mount, number, &format!("f{number}"), "content");
    }
    mount.hang_up().unwrap();
    let named = |agreement| MountHello {
        agreement,
        ..hello(None)
    };
    let meet = |hello: MountHello, at, from| {
        let mut mount = peer.dial(hello);
        let ToMount::Hello(answer) = mount.next() else {
            panic!("no hello");
        };
        assert!(answer.whole && !answer.settled);
        let ToMount::Chain { links, more: false } = mount.next() else {
            panic!("no chain");
        };
        mount.send(ToAgent::Rejoin { at, base: from });
        let numbers: Vec<u64> = links.iter().map(|link| link.agreement.number).collect();
        assert!(links.iter().all(|link| link.based));
        (mount, numbers)
    };
    // Without its state it is given the base, as it was then.
    let (mut mount, numbers) = meet(named(None), Some(agreement(2)), BaseFrom::Agent);
    assert_eq!(numbers, [3, 2, 1]);
    let ToMount::Base { rows, more: false } = mount.next() else {
        panic!("no base");
    };
    let paths: Vec<String> = rows.iter().map(|(path, _)| path.to_string()).collect();
    assert_eq!(paths, ["f1", "f1 there", "f2", "f2 there"]);
    assert_eq!(rows[0].1, file(b"content"));
    mount.until(|mount| mount.reports > 0);
    assert!(mount.shows("f3", "content"), "the tree is what it was");
    mount.hang_up().unwrap();
    // The agent has gone back as well, and goes on from there.
    let (mut mount, numbers) = meet(
        named(Some(agreement(1))),
        Some(agreement(1)),
        BaseFrom::Both,
    );
    assert_eq!(numbers, [2, 1]);
    mount.until(|mount| mount.reports > 0);
    agree(&mut mount, 9, "f9", "content");
    mount.hang_up().unwrap();
    // Nobody goes on from where the agent has never been.
    let (mut mount, numbers) = meet(named(None), Some(agreement(3)), BaseFrom::Both);
    assert_eq!(numbers, [9, 1]);
    let ended = mount.agent.take().unwrap().join().unwrap();
    assert!(matches!(ended, Err(Error::Protocol(_))), "{ended:?}");
}

#[test]
fn nonsense_ends_the_session_and_nothing_else() {
    let peer = Peer::new();
    for nonsense in [&b"ssh: welcome"[..], b"mfs\x01\xff\xff\xff\xff\xff"] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (root, state) = (peer.dir.path().to_owned(), peer.state.path().to_owned());
        let input = theirs.try_clone().unwrap();
        let agent = std::thread::spawn(move || serve(&root, &state, NEVER, input, theirs));
        use std::io::Write;
        ours.write_all(nonsense).unwrap();
        drop(ours);
        assert!(agent.join().unwrap().is_err());
    }
    let (mut mount, _) = peer.meet(None);
    mount.send(ToAgent::Data {
        hash: ContentHash([0; 32]),
        offset: u64::MAX,
        bytes: vec![1; 10],
    });
    mount.offer(Id([1; 16]), &[put("x", "content")]);
    mount.send(ToAgent::Data {
        hash: ContentHash::of(b"content"),
        offset: u64::MAX - 1,
        bytes: vec![1; 10],
    });
    let failed = mount.commit(Id([1; 16]), 1).unwrap_err();
    assert!(failed.contains("do not continue"), "{failed}");
    mount.send(ToAgent::Hello(hello(None)));
    assert!(mount.closing().contains("second hello"));
}

/// A mounted side that says nothing any more, on a link that nobody closes, is given up,
/// also while this side has more to say than the link takes; one whose message takes its
/// time is not.
#[test]
fn a_silent_mounted_side_is_given_up() {
    let deadline = Duration::from_millis(400);
    let peer = Peer::new();
    for number in 0..3 {
        peer.write(&format!("file{number}"), "content");
    }
    let (root, state) = (peer.dir.path().to_owned(), peer.state.path().to_owned());
    let mut mount = peer.dial_with(hello(None), move |input, output| {
        serve(&root, &state, deadline, input, output)
    });
    mount.rejoin(None);
    mount.until(|mount| mount.reports > 0);
    let mut slow = Vec::new();
    crate::wire::frame::encode(&ToAgent::Drain { token: 77 }, &mut slow).unwrap();
    for byte in slow {
        std::thread::sleep(deadline / 4);
        std::io::Write::write_all(&mut mount.stream, &[byte]).unwrap();
    }
    mount.answer(|message| matches!(message, ToMount::Drained { token: 77 }).then_some(()));
    let ended = mount.agent.take().unwrap().join().unwrap();
    assert!(matches!(ended, Err(Error::Silent)), "{ended:?}");

    // Nobody reads either: the pipe is full, and the engine waits for room in it.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let input = theirs.try_clone().unwrap();
    let (root, state) = (peer.dir.path().to_owned(), peer.state.path().to_owned());
    let agent = std::thread::spawn(move || serve(&root, &state, deadline, input, theirs));
    write_magic(&mut &ours).unwrap();
    write_message(&mut &ours, &ToAgent::Hello(hello(None))).unwrap();
    let first_contact = ToAgent::Rejoin {
        at: None,
        base: BaseFrom::Both,
    };
    write_message(&mut &ours, &first_contact).unwrap();
    let fetch = ToAgent::Fetch {
        request: 1,
        path: path(&"x".repeat(250)),
        hash: ContentHash::of(b"nothing"),
        offset: 0,
    };
    ours.set_write_timeout(Some(deadline)).unwrap();
    // Each has an answer, until neither side takes any more.
    while write_message(&mut &ours, &fetch).is_ok() {}
    let ended = agent.join().unwrap();
    assert!(matches!(ended, Err(Error::Silent)), "{ended:?}");
}

/// A frame around what a mounted side must not send.
fn raw(flag: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    frame.push(flag);
    frame.extend_from_slice(payload);
    frame
}

/// "The agent trusts nobody": what a malicious mounted side sends ends the session with an
/// error, and changes nothing in the directory or beside it.
#[test]
fn a_hostile_mounted_side_gets_an_error_and_nothing_else() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("inside"), "inside").unwrap();
    fs::write(above.path().join("victim"), "victim").unwrap();
    let state = tempfile::tempdir().unwrap();
    // The same message with another path of the same length in it.
    let offer = |path_in_it: &[u8; 9]| {
        let entry = Entry {
            content: Content::Directory,
            mode: 0o755,
            mtime: Timestamp::default(),
            xattrs: Xattrs::new(),
        };
        let message = ToAgent::Offer {
            batch: Id([7; 16]),
            ops: vec![Op::MakeDir {
                path: path("xx/victim"),
                entry,
            }],
            more: false,
        };
        let mut plain = postcard::to_stdvec(&message).unwrap();
        let at = plain.windows(9).position(|part| part == b"xx/victim");
        let at = at.unwrap();
        plain[at..at + 9].copy_from_slice(path_in_it);
        raw(0, &plain)
    };
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("a giant length", vec![0xff; 5]),
        ("an unknown flag", raw(2, b"x")),
        ("a decompression bomb", raw(1, &bomb)),
        ("an unknown message", raw(0, &[0x7f, 0, 0])),
        ("a message with more after it", raw(0, &[8, 1, 1])),
        ("the directory above", offer(b"../victim")),
        ("the directory itself", offer(b"x/./vicim")),
        ("an absolute path", offer(b"/x/victim")),
        ("an empty component", offer(b"xx//victi")),
        ("a NUL", offer(b"xx/vict\0m")),
        ("a second hello", {
            let mut frame = Vec::new();
            let hello = ToAgent::Hello(hello(None));
            crate::wire::frame::encode(&hello, &mut frame).unwrap();
            frame
        }),
    ];
    for (what, bytes) in hostile {
        let peer_state = state.path().to_owned();
        let served = root.clone();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let input = theirs.try_clone().unwrap();
        let agent = std::thread::spawn(move || serve(&served, &peer_state, NEVER, input, theirs));
        write_magic(&mut &ours).unwrap();
        write_message(&mut &ours, &ToAgent::Hello(hello(None))).unwrap();
        std::io::Write::write_all(&mut &ours, &bytes).unwrap();
        let ended = agent.join().unwrap();
        assert!(
            matches!(ended, Err(Error::Frame(_) | Error::Protocol(_))),
            "{what}: {ended:?}"
        );
        let names = |dir: &std::path::Path| {
            let mut names: Vec<_> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(&root), [".mirrorfs", "inside"], "{what}");
        assert_eq!(names(above.path()), ["root", "victim"], "{what}");
    }
}

/// Numbers from the future are nobody's: they neither break a session nor make the agent
/// forget anything.
#[test]
fn numbers_from_the_future_change_nothing() {
    let peer = Peer::new();
    peer.write("kept", "kept");
    let (mut mount, answer) = peer.meet(None);
    let future = Revision {
        epoch: answer.epoch,
        rev: u64::MAX,
    };
    mount.send(ToAgent::Commit {
        batch: Id([5; 16]),
        agreement: agreement(1),
        seen: future,
    });
    mount.answer(|message| matches!(message, ToMount::Durable { .. }).then_some(()));
    fs::remove_file(peer.path("kept")).unwrap();
    mount.until(|mount| !mount.seen.contains_key("kept"));
    mount.hang_up().unwrap();
    // The next session is told everything, because nobody can have seen that.
    peer.write("after", "after");
    let (mount, answer) = peer.meet_again(Some(future), 1);
    assert!(answer.whole && mount.shows("after", "after"));
    mount.hang_up().unwrap();
}

mod hostile;
