//! Faults in the system calls of real processes: the n-th call of a kind fails, all calls
//! from the n-th on fail, or the process is killed there.
//!
//! A filter (seccomp) in the process and all its descendants hands every call that changes
//! something to a thread of the test, which counts it and lets it go on, answers it with
//! an error, or kills the caller. Nothing of this is in the program under test.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, Signal};

/// What a system call works on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    /// A database of SQLite: the journal, or an agent's index.
    Database,
    /// A file of the state directory besides.
    State,
    /// The staging directory of a tree.
    Staging,
    /// A reserved directory besides.
    Reserved,
    /// A file or directory of a tree.
    Tree,
    /// The stream to the other side, or to the door.
    Stream,
    /// An answer to a program that works in the mount.
    Answer,
}

/// One kind of system call, as counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Kind {
    pub role: RoleOf,
    pub place: Place,
    pub call: &'static str,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?} {}", self.role, self.place, self.call)
    }
}

/// Whose call it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RoleOf {
    Daemon,
    Door,
    Agent,
    Command,
}

/// What happens at a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It fails, once.
    Once(i32),
    /// It fails, and so does each later one of the same process at the same place.
    ForGood(i32),
    /// The process is killed instead.
    Kill,
}

/// A fault at the n-th call of a kind, from 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    pub kind: Kind,
    pub n: u64,
    pub fault: Fault,
}

#[derive(Default)]
struct State {
    counts: BTreeMap<Kind, u64>,
    plan: Option<Plan>,
    /// What the fault hit, once it did.
    hit: Option<String>,
    /// How many calls have failed or killed.
    hits: u64,
    counting: bool,
}

/// Watches over the processes that are started under it.
#[derive(Clone)]
pub struct Injector {
    root: PathBuf,
    state: Arc<Mutex<State>>,
}

impl Injector {
    /// An injector for what lies below `root`. It counts, and lets everything go on.
    pub fn new(root: &Path) -> Self {
        let state = State {
            counting: true,
            ..State::default()
        };
        Self {
            root: root.to_owned(),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Has a fault happen, counted from now on.
    pub fn plan(&self, plan: Plan) {
        let mut state = self.state.lock().unwrap();
        state.counts.clear();
        state.plan = Some(plan);
    }

    /// Nothing fails from now on.
    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap();
        state.plan = None;
        state.counting = false;
    }

    /// How many calls of each kind there have been.
    pub fn counts(&self) -> BTreeMap<Kind, u64> {
        self.state.lock().unwrap().counts.clone()
    }

    /// What the fault hit first, if it has happened.
    pub fn hit(&self) -> Option<String> {
        self.state.lock().unwrap().hit.clone()
    }

    /// Puts a command, and what it starts, under this injector.
    pub fn attach(&self, command: &mut Command) {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let filter = filter();
        let child = move || {
            let listener = install(&filter)?;
            send_descriptor(theirs.as_fd(), listener.as_fd())
        };
        // SAFETY: between fork and exec it makes system calls only, on memory that was
        // allocated before.
        unsafe { command.pre_exec(child) };
        let injector = self.clone();
        std::thread::spawn(move || {
            // None if the command could not be started.
            if let Some(listener) = receive_descriptor(&ours) {
                injector.serve(&listener);
            }
        });
    }

    /// Answers the calls of one family of processes, until the last has ended.
    fn serve(&self, listener: &OwnedFd) {
        let mut roles = HashMap::new();
        loop {
            let mut polled = [PollFd::new(listener, PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) if polled[0].revents().contains(PollFlags::IN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                _ => return,
            }
            // SAFETY: the kernel wants it zeroed, and zero is a value of each field.
            let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the argument is what this request writes to.
            let received = unsafe {
                libc::ioctl(
                    listener.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_RECV,
                    &raw mut call,
                )
            };
            if received != 0 {
                // The caller was killed before anybody looked.
                continue;
            }
            let verdict = self.judge(&call, &mut roles);
            let mut answer = libc::seccomp_notif_resp {
                id: call.id,
                val: 0,
                error: 0,
                flags: 0,
            };
            match verdict {
                None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
                Some(errno) => answer.error = -errno,
            }
            // SAFETY: the argument is what this request reads. It fails if the caller has
            // been killed, which is as good.
            unsafe {
                libc::ioctl(
                    listener.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_SEND,
                    &raw mut answer,
                );
            }
        }
    }

    /// The error that a call is to be answered with, if it is.
    fn judge(&self, call: &libc::seccomp_notif, roles: &mut HashMap<u32, RoleOf>) -> Option<i32> {
        let name = name_of(i64::from(call.data.nr))?;
        let mut state = self.state.lock().unwrap();
        if !state.counting {
            return None;
        }
        let (place, target) = self.place(call, name)?;
        let role = *roles.entry(call.pid).or_insert_with(|| role_of(call.pid));
        let kind = Kind {
            role,
            place,
            call: name,
        };
        let count = state.counts.entry(kind).or_default();
        *count += 1;
        let count = *count;
        let plan = state.plan?;
        let first = plan.kind == kind && plan.n == count;
        // From a full disk one can still read.
        let later = match plan.fault {
            Fault::ForGood(errno) => errno == libc::EIO || name != "pread64",
            Fault::Once(_) | Fault::Kill => false,
        };
        let later =
            later && state.hit.is_some() && (plan.kind.role, plan.kind.place) == (role, place);
        if !first && !later {
            return None;
        }
        state.hits += 1;
        if state.hit.is_none() {
            state.hit = Some(format!("{kind} number {count}, on {}", target.display()));
        }
        match plan.fault {
            Fault::Once(errno) | Fault::ForGood(errno) => Some(errno),
            Fault::Kill => {
                kill(call.pid);
                Some(libc::EINTR)
            }
        }
    }

    /// What a call works on, by the kernel's name for its descriptor.
    fn place(&self, call: &libc::seccomp_notif, name: &str) -> Option<(Place, PathBuf)> {
        // Of two names the second is where something arrives.
        let target = match name {
            "unlink" | "mkdir" => at_path(call.pid, libc::AT_FDCWD, call.data.args[0])?,
            "rename" => at_path(call.pid, libc::AT_FDCWD, call.data.args[1])?,
            "openat" | "mkdirat" | "mknodat" | "unlinkat" | "fchmodat" | "fchownat"
            | "utimensat" => at_path(call.pid, call.data.args[0] as i32, call.data.args[1])?,
            "symlinkat" => at_path(call.pid, call.data.args[1] as i32, call.data.args[2])?,
            "renameat" | "renameat2" | "linkat" => {
                at_path(call.pid, call.data.args[2] as i32, call.data.args[3])?
            }
            "copy_file_range" => descriptor(call.pid, call.data.args[2] as i32)?,
            _ => descriptor(call.pid, call.data.args[0] as i32)?,
        };
        let text = target.to_string_lossy();
        if text.starts_with("socket:") {
            // What is said on standard error matters to nobody.
            return (call.data.args[0] as i32 != 2).then_some((Place::Stream, target.clone()));
        }
        if text == "/dev/fuse" {
            return Some((Place::Answer, target.clone()));
        }
        let below = target.strip_prefix(&self.root).ok()?;
        let below = below.to_string_lossy();
        let file = target.file_name().unwrap_or_default().to_string_lossy();
        let place = if below.starts_with("state") || below.starts_with("agent-state") {
            if file.ends_with(".log") {
                return None;
            }
            if file.contains(".db") {
                Place::Database
            } else {
                Place::State
            }
        } else if below.contains(".mirrorfs/staging") {
            Place::Staging
        } else if below.contains(".mirrorfs") {
            Place::Reserved
        } else {
            Place::Tree
        };
        Some((place, target.clone()))
    }
}

/// The kernel's name for a descriptor of a process.
fn descriptor(pid: u32, fd: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()
}

/// What a path in the memory of a process names, seen from a directory. An empty path
/// names what the descriptor does.
fn at_path(pid: u32, fd: i32, address: u64) -> Option<PathBuf> {
    let path = text_of(pid, address).unwrap_or_default();
    if path.is_absolute() {
        return match path.strip_prefix("/proc/self/fd") {
            Ok(fd) => descriptor(pid, fd.to_str()?.parse().ok()?),
            Err(_) => Some(path),
        };
    }
    let dir = match fd {
        libc::AT_FDCWD => std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?,
        fd => descriptor(pid, fd)?,
    };
    Some(if path.as_os_str().is_empty() {
        dir
    } else {
        dir.join(path)
    })
}

/// A text in the memory of a process, up to its NUL.
fn text_of(pid: u32, address: u64) -> Option<PathBuf> {
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let mut text = Vec::new();
    while text.len() < 4096 {
        // Not beyond the end of a page, after which there may be nothing.
        let at = address + text.len() as u64;
        let mut bytes = vec![0; 256.min(4096 - (at % 4096) as usize)];
        memory.read_exact_at(&mut bytes, at).ok()?;
        if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
            text.extend_from_slice(&bytes[..end]);
            return Some(OsString::from_vec(text).into());
        }
        text.extend_from_slice(&bytes);
    }
    None
}

fn role_of(pid: u32) -> RoleOf {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    match line.split(|byte| *byte == 0).nth(1) {
        Some(b"daemon") => RoleOf::Daemon,
        Some(b"door") => RoleOf::Door,
        Some(b"agent") => RoleOf::Agent,
        _ => RoleOf::Command,
    }
}

/// Kills the process of a thread.
fn kill(thread: u32) {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let process = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .and_then(|number| number.trim().parse().ok())
        .and_then(Pid::from_raw);
    if let Some(process) = process {
        rustix::process::kill_process(process, Signal::KILL).ok();
    }
}

/// The calls that change something, and those that promise that it stays.
const CALLS: &[(i64, &str)] = &[
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_pwritev2, "pwritev2"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_syncfs, "syncfs"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_mknodat, "mknodat"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_fchmodat, "fchmodat"),
    (libc::SYS_fchownat, "fchownat"),
    (libc::SYS_utimensat, "utimensat"),
    (libc::SYS_fsetxattr, "fsetxattr"),
];

fn name_of(number: i64) -> Option<&'static str> {
    if number == libc::SYS_openat {
        return Some("openat");
    }
    let mut calls = CALLS.iter();
    Some(calls.find(|(known, _)| *known == number)?.1)
}

/// A program for the kernel: the calls of the list go to the listener.
fn filter() -> Vec<libc::sock_filter> {
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let set = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    let number = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    // The lower half of the third argument, which holds the flags of openat.
    let flags = (std::mem::offset_of!(libc::seccomp_data, args) + 16) as u32;
    let mut program = vec![
        step(load, 0, 0, number),
        // Of the many openat those that may create something.
        step(equal, 0, 3, libc::SYS_openat as u32),
        step(load, 0, 0, flags),
        step(
            set,
            u8::try_from(CALLS.len() + 2).unwrap(),
            0,
            libc::O_CREAT as u32,
        ),
        step(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    for (at, (number, _)) in CALLS.iter().enumerate() {
        let to_the_end = u8::try_from(CALLS.len() - at).unwrap();
        program.push(step(equal, to_the_end, 0, *number as u32));
    }
    program.push(step(give, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(step(give, 0, 0, libc::SECCOMP_RET_USER_NOTIF));
    program
}

/// Installs the filter in this process and gives the descriptor that hears of its calls.
fn install(filter: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its instructions live as long as the call.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for this process, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}

/// `sendmsg` is not filtered: nobody answers before the descriptor has arrived.
fn send_descriptor(to: BorrowedFd<'_>, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let bytes = [IoSlice::new(b"!")];
    sendmsg(to, &bytes, &mut ancillary, SendFlags::empty())?;
    Ok(())
}

fn receive_descriptor(from: &OwnedFd) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}
