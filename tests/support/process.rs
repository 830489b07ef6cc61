//! Finding and killing the processes of one sandbox, and nobody else's.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::process::{Pid, Signal};

/// What a process of mirrorfs is there for, by its first argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The process behind a mount.
    Daemon,
    /// The helper that works through the mount.
    Door,
    /// The process that serves a peer directory.
    Agent,
    /// Anything else, such as a command.
    Other,
}

/// A process of mirrorfs that belongs to a sandbox.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: u32,
    pub role: Role,
    pub arguments: Vec<OsString>,
}

impl Process {
    /// Ends it at once, as a crash would.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            rustix::process::kill_process(pid, signal).ok();
        }
    }

    /// Whether any thread of it still runs: until the last one has ended it holds its
    /// locks, also when the first one is a zombie already.
    pub fn alive(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid));
        threads.into_iter().flatten().flatten().any(|thread| {
            std::fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| {
                stat.rsplit(')')
                    .next()
                    .is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']))
            })
        })
    }
}

/// The processes of mirrorfs whose state directory lies below `root`. Every sandbox has
/// a root of its own, so these are its own processes whoever else runs mirrorfs here.
pub fn below(root: &Path) -> Vec<Process> {
    let marker = [b"MIRRORFS_STATE=", root.as_os_str().as_encoded_bytes()].concat();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let read = |name| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let ours = read("environ").split(|byte| *byte == 0).any(|variable| {
            variable
                .strip_prefix(marker.as_slice())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        });
        if !ours || !is_mirrorfs(&entry.path()) {
            continue;
        }
        let arguments: Vec<OsString> = read("cmdline")
            .split(|byte| *byte == 0)
            .map(|argument| OsString::from_vec(argument.to_vec()))
            .collect();
        let role = match arguments.get(1).and_then(|argument| argument.to_str()) {
            Some("daemon" | "mount") => Role::Daemon,
            Some("door") => Role::Door,
            Some("agent") => Role::Agent,
            _ => Role::Other,
        };
        let process = Process {
            pid,
            role,
            arguments,
        };
        if process.alive() {
            found.push(process);
        }
    }
    found
}

/// The processes that a process has started and that are still its own.
pub fn children_of(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    children.split_whitespace().flat_map(str::parse).collect()
}

/// What a process calls itself.
pub fn name_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

/// The most memory that a process has used so far, in bytes.
pub fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.unwrap().trim().parse::<u64>().unwrap() * 1024
}

fn is_mirrorfs(process: &Path) -> bool {
    std::fs::read_link(process.join("exe")).is_ok_and(|program| {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        name == "mirrorfs" || name == "mirrorfs (deleted)"
    })
}

/// The mounts at or below `root`, innermost first, with their device numbers.
pub fn mounts_below(root: &Path) -> Vec<(std::path::PathBuf, String)> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.nth(2)?;
            let point = fields.nth(1)?.replace("\\040", " ");
            Path::new(&point)
                .starts_with(root)
                .then(|| (point.into(), device.to_owned()))
        })
        .collect();
    mounts.reverse();
    mounts
}
