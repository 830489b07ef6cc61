//! "A displaced inode stays watched until its last user is gone: a late write to it makes a
//! conflict copy." On either side, by whatever call, and whoever is killed meanwhile.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::inject::{Fault, Injector, Plan, RoleOf};
use crate::support::program::run;
use crate::support::{Outcome, PROMPT, Role, Sandbox, assert_same, eventually, rounds};

/// A program that works in the mount and does one thing for each line. It opens files for
/// reading, so that they can be replaced, and anew through `/proc` to write to them.
const PROGRAM: &str = "
import mmap, os, sys
os.chdir(sys.argv[1])
held, maps = {}, {}
def anew(name, flags): return os.open(f'/proc/self/fd/{held[name]}', flags)
for line in sys.stdin:
    word, name, *rest = line.split()
    try:
        if word == 'hold': held[name] = os.open(name, os.O_RDONLY)
        elif word == 'write':
            file = anew(name, os.O_WRONLY | os.O_APPEND)
            os.write(file, (rest[0] + '\\n').encode())
            os.close(file)
        elif word == 'touch': os.close(anew(name, os.O_RDWR))
        elif word == 'map':
            file = anew(name, os.O_RDWR)
            maps[name] = mmap.mmap(file, 0)
            os.close(file)
        elif word == 'store': maps[name][0:len(rest[0])] = rest[0].encode()
        elif word == 'unmap': maps.pop(name).close()
        elif word == 'links': print(os.fstat(held[name]).st_nlink, end=' ')
        elif word == 'close': os.close(held.pop(name))
        print('ok', flush=True)
    except OSError as error:
        print(error, flush=True)
";

struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(sandbox: &Sandbox) -> Self {
        let mut child = sandbox
            .command("python3")
            .args(["-c", PROGRAM])
            .arg(sandbox.tree())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Has something done, and gives the answer.
    fn ask(&mut self, what: &str) -> String {
        writeln!(self.input.as_mut().unwrap(), "{what}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    #[track_caller]
    fn tell(&mut self, what: &str) {
        assert_eq!(self.ask(what), "ok", "{what}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.input.take());
        self.child.wait().ok();
    }
}

/// The late copies in a directory, as whoever may look into it sees them, with their content.
fn copies(sandbox: &Sandbox, dir: &Path) -> BTreeMap<String, String> {
    let find = "find . -path ./.mirrorfs -prune -o -name '*.late.*.conflict' -printf '%P\\n'";
    let names = sandbox.sh(dir, find);
    names
        .lines()
        .map(|name| (name.to_owned(), sandbox.sh(dir, &format!("cat '{name}'"))))
        .collect()
}

/// The only late copy on both sides, with its content.
#[track_caller]
fn the_copy(sandbox: &Sandbox) -> (String, String) {
    let (here, there) = (
        copies(sandbox, &sandbox.tree()),
        copies(sandbox, &sandbox.peer()),
    );
    assert_eq!(here, there);
    assert_eq!(here.len(), 1, "{here:?}");
    here.into_iter().next().unwrap()
}

fn conflicts(sandbox: &Sandbox, arguments: &[&str]) -> Outcome {
    let mut command = sandbox.command(sandbox.program());
    command
        .arg("conflicts")
        .args(arguments)
        .current_dir(sandbox.root());
    run(&mut command, PROMPT)
}

/// A mirror of some files, each with its name as content.
fn mirror(sandbox: &Sandbox, files: &str) {
    sandbox.sh(
        &sandbox.peer(),
        &format!("mkdir -p d; for f in {files}; do echo $f >$f; done"),
    );
    sandbox.mount();
    sandbox.flush();
}

/// The peer's user replaces files, each with `theirs`.
fn replace(sandbox: &Sandbox, files: &str) {
    let draft = sandbox.outside().join("draft");
    let draft = draft.display();
    sandbox.sh(
        &sandbox.peer(),
        &format!("for f in {files}; do echo theirs >{draft}; mv {draft} $f; done"),
    );
    sandbox.flush();
}

#[test]
fn what_is_written_here_to_what_a_peer_has_replaced_is_a_conflict_copy() {
    let sandbox = Sandbox::new();
    mirror(&sandbox, "d/notes d/gone d/quiet d/mapped d/second");
    let mut program = Program::start(&sandbox);
    for name in ["d/notes", "d/gone", "d/quiet", "d/mapped", "d/second"] {
        program.tell(&format!("hold {name}"));
    }
    replace(&sandbox, "d/notes d/quiet d/mapped d/second");
    sandbox.sh(&sandbox.peer(), "rm d/gone");
    sandbox.flush();

    // Who writes nothing makes no copy.
    program.tell("touch d/quiet");
    program.tell("close d/quiet");
    sandbox.flush();
    assert!(copies(&sandbox, &sandbox.tree()).is_empty());

    // What he writes is beside the file that took its place, on both sides.
    program.tell("write d/notes one");
    let said = sandbox.try_flush().expect_code(3);
    said.expect_said(&["d/notes"]);
    let (copy, content) = the_copy(&sandbox);
    assert!(copy.starts_with("d/notes.late."), "{copy}");
    assert_eq!(content, "d/notes\none\n");
    assert_eq!(sandbox.sh(&sandbox.tree(), "cat d/notes"), "theirs\n");
    assert_eq!(program.ask("links d/notes"), "1 ok");

    // He goes on, and it goes on there: nothing comes twice.
    program.tell("write d/notes two");
    sandbox.try_flush().expect_code(3);
    assert_eq!(
        the_copy(&sandbox),
        (copy.clone(), "d/notes\none\ntwo\n".into())
    );

    // It is a conflict like any other to whoever looks.
    let listed = conflicts(&sandbox, &["list", "tree"]).expect_code(3);
    listed.expect_said(&["d/notes", &copy]);
    let shown = conflicts(&sandbox, &["show", "tree/d/notes"]).ok();
    shown.expect_said(&["went on writing", "here", &copy, "resolve"]);
    let status = sandbox.status();
    assert_eq!(status.conflicts.len(), 1, "{status:?}");
    conflicts(&sandbox, &["diff", "tree/d/notes"])
        .ok()
        .expect_said(&["+two"]);
    program.tell("close d/notes");
    conflicts(&sandbox, &["resolve", "tree/d/notes", "--both"]).ok();
    assert_eq!(
        sandbox.sh(&sandbox.peer(), "cat d/notes d/notes.theirs"),
        "theirs\nd/notes\none\ntwo\n"
    );
    assert!(copies(&sandbox, &sandbox.tree()).is_empty());
    sandbox.flush();

    // What the peer had removed; the late version wins.
    program.tell("write d/gone more");
    sandbox.try_flush().expect_code(3);
    assert_eq!(the_copy(&sandbox).1, "d/gone\nmore\n");
    program.tell("close d/gone");
    conflicts(&sandbox, &["resolve", "tree/d/gone", "--remote"]).ok();
    assert_eq!(sandbox.sh(&sandbox.peer(), "cat d/gone"), "d/gone\nmore\n");
    sandbox.flush();

    // What is stored through a mapping arrives with the flush.
    program.tell("map d/mapped");
    program.tell("store d/mapped STORED");
    sandbox.try_flush().expect_code(3);
    assert_eq!(the_copy(&sandbox).1, "STOREDed\n");
    program.tell("unmap d/mapped");
    program.tell("close d/mapped");
    conflicts(&sandbox, &["resolve", "tree/d/mapped", "--local"]).ok();
    sandbox.flush();

    // Or by hand.
    program.tell("write d/second one");
    sandbox.try_flush().expect_code(3);
    program.tell("close d/second");
    sandbox.sh(&sandbox.tree(), "rm d/*.conflict");
    sandbox.flush();
    assert!(copies(&sandbox, &sandbox.peer()).is_empty());
    assert!(sandbox.status().conflicts.is_empty());
    drop(program);
    assert_same(&sandbox.tree(), &sandbox.peer());
    sandbox.umount();
}

/// Whoever is killed at whichever rename, an acknowledged write is in the tree once there is
/// a mount again.
#[test]
fn a_late_write_survives_the_daemon() {
    let session = || {
        let sandbox = Sandbox::new();
        sandbox.sh(&sandbox.peer(), "mkdir d; echo old >d/notes");
        let injector = Injector::new(sandbox.root());
        let mut mount = sandbox.command(sandbox.program());
        mount.arg("mount").args([sandbox.tree(), sandbox.peer()]);
        injector.attach(&mut mount);
        run(&mut mount, PROMPT).ok();
        sandbox.flush();
        let mut program = Program::start(&sandbox);
        program.tell("hold d/notes");
        sandbox.sh(&sandbox.peer(), "echo theirs >t; mv t d/notes");
        sandbox.flush();
        (sandbox, injector, program)
    };
    let (sandbox, injector, mut program) = session();
    let before = injector.counts();
    program.tell("write d/notes late");
    sandbox.try_flush().expect_code(3);
    let mut plans = Vec::new();
    for (kind, count) in injector.counts() {
        let count = count - before.get(&kind).copied().unwrap_or(0);
        let here = matches!(kind.role, RoleOf::Daemon | RoleOf::Door);
        if here && kind.call.starts_with("rename") {
            plans.extend((1..=count).map(|n| Plan {
                kind,
                n,
                fault: Fault::Kill,
            }));
        }
    }
    drop(program);
    drop(sandbox);
    assert!(plans.len() >= 3, "{plans:?}");
    let mut hits = 0;
    for plan in plans {
        let (sandbox, injector, mut program) = session();
        injector.plan(plan);
        let acknowledged = program.ask("write d/notes late") == "ok";
        let _ = sandbox.try_flush();
        hits += u32::from(injector.hit().is_some());
        injector.stop();
        drop(program);
        if sandbox.processes_of(Role::Daemon).is_empty() {
            sandbox.mount();
        }
        let found = eventually("the late version, once", PROMPT, || {
            let flushed = sandbox.try_flush();
            let found = copies(&sandbox, &sandbox.tree());
            if found.len() == usize::from(acknowledged) || (!acknowledged && found.len() == 1) {
                return Ok((found, flushed.code));
            }
            Err(format!("{plan:?}: {found:?} {flushed}"))
        });
        for content in found.0.values() {
            assert_eq!(content, "old\nlate\n", "{plan:?}");
            assert_eq!(found.1, 3, "{plan:?}");
        }
        assert_eq!(copies(&sandbox, &sandbox.peer()), found.0);
        let left = sandbox.sh(&sandbox.tree(), "ls -A d | sort");
        assert_eq!(left.lines().count(), 1 + found.0.len(), "{left}");
        sandbox.try_umount();
        for place in ["late", "staging"] {
            let left = sandbox.reserved_contents(&sandbox.tree(), place);
            assert!(left.is_empty(), "{plan:?}: {place}: {left:?}");
        }
    }
    eprintln!("{hits} killed");
    assert!(hits > 0);
}

/// What a daemon that was killed has left waits for no mount.
#[test]
fn what_waits_is_brought_in_without_a_mount() {
    let sandbox = Sandbox::new();
    mirror(&sandbox, "d/notes");
    sandbox.umount();
    sandbox.sh(
        &sandbox.tree().join(".mirrorfs/late"),
        "mkdir -p 20231114T221320Z-0f/d; echo late >20231114T221320Z-0f/d/notes",
    );
    let (tree, peer) = (sandbox.tree(), sandbox.peer());
    let sync = [OsStr::new("sync"), tree.as_ref(), peer.as_ref()];
    sandbox.run(sync).expect_code(3).expect_said(&["d/notes"]);
    assert_eq!(the_copy(&sandbox).1, "late\n");
    let left = sandbox.reserved_contents(&sandbox.tree(), "late");
    assert!(left.is_empty(), "{left:?}");
}

/// A peer whose agent cannot have leases of some files: they belong to somebody else.
struct Shared {
    sandbox: Sandbox,
}

impl Shared {
    /// None where the tests do not run as root, who alone can give files away.
    fn new(files: &str) -> Option<Self> {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: not root");
            return None;
        }
        let sandbox = Sandbox::of_ordinary_user();
        mirror(&sandbox, files);
        let shared = Self { sandbox };
        for file in files.split(' ') {
            chown(shared.sandbox.peer().join(file), Some(0), Some(0)).unwrap();
        }
        Some(shared)
    }

    fn open(&self, file: &str) -> File {
        let mut options = OpenOptions::new();
        options.read(true).append(true);
        options.open(self.sandbox.peer().join(file)).unwrap()
    }

    /// The user of the mount replaces files.
    fn replace(&self, files: &str) {
        let script = format!("for f in {files}; do echo mine >t; mv t $f; done");
        self.sandbox.sh(&self.sandbox.tree(), &script);
    }
}

#[test]
fn what_is_written_on_a_peer_to_what_a_batch_has_replaced_is_a_conflict_copy() {
    let Some(shared) = Shared::new("d/notes d/gone d/quiet d/away d/mapped") else {
        return;
    };
    let sandbox = &shared.sandbox;
    let [mut notes, mut gone, quiet, mut away, mapped] =
        ["d/notes", "d/gone", "d/quiet", "d/away", "d/mapped"].map(|file| shared.open(file));
    shared.replace("d/notes d/quiet d/away d/mapped");
    sandbox.sh(&sandbox.tree(), "rm d/gone");
    sandbox.flush();
    let peer = sandbox.peer();
    assert_eq!(fs::read_to_string(peer.join("d/notes")).unwrap(), "mine\n");

    // Who writes nothing makes no copy.
    drop(quiet);
    sandbox.flush();
    assert!(copies(sandbox, &peer).is_empty());

    // By itself, without a flush.
    writeln!(notes, "one").unwrap();
    eventually("the copy on the mounted side", PROMPT, || {
        let found = copies(sandbox, &sandbox.tree());
        let content = found.into_values().next();
        if content.as_deref() == Some("d/notes\none\n") {
            Ok(())
        } else {
            Err(format!("{content:?}"))
        }
    });
    sandbox.try_flush().expect_code(3);
    let (copy, _) = the_copy(sandbox);
    writeln!(notes, "two").unwrap();
    sandbox.try_flush().expect_code(3);
    assert_eq!(
        the_copy(sandbox),
        (copy.clone(), "d/notes\none\ntwo\n".into())
    );
    let listed = conflicts(sandbox, &["list", "tree"]).expect_code(3);
    listed.expect_said(&["d/notes", &copy]);
    let shown = conflicts(sandbox, &["show", "tree/d/notes"]).ok();
    shown.expect_said(&["on peer", "went on writing", &copy]);
    drop(notes);
    conflicts(sandbox, &["resolve", "tree/d/notes", "--merged"]).ok();
    sandbox.flush();
    assert!(copies(sandbox, &peer).is_empty());

    // While no agent is there, to what had been removed.
    sandbox.umount();
    writeln!(gone, "more").unwrap();
    sandbox.mount();
    sandbox.try_flush().expect_code(3);
    let (copy, content) = the_copy(sandbox);
    assert!(copy.starts_with("d/gone.late."), "{copy}");
    assert_eq!(content, "d/gone\nmore\n");
    drop(gone);
    conflicts(sandbox, &["resolve", "tree/d/gone", "--local"]).ok();
    sandbox.flush();

    // The agent is killed.
    sandbox.kill_agents();
    writeln!(away, "meanwhile").unwrap();
    eventually("the copy", PROMPT, || {
        let flushed = sandbox.try_flush();
        if flushed.code == 3 {
            Ok(())
        } else {
            Err(flushed.to_string())
        }
    });
    assert_eq!(the_copy(sandbox).1, "d/away\nmeanwhile\n");
    drop(away);
    sandbox.sh(&sandbox.tree(), "rm d/*.conflict");
    sandbox.flush();
    assert!(copies(sandbox, &peer).is_empty());

    // A store through a mapping is told by no event, and found by a flush.
    store(&mapped, "STORED");
    sandbox.try_flush().expect_code(3);
    assert_eq!(the_copy(sandbox).1, "STOREDed\n");
    drop(mapped);
    sandbox.sh(&sandbox.tree(), "rm d/*.conflict");
    sandbox.flush();
    sandbox.sh(
        sandbox.root(),
        "diff -r --no-dereference --exclude=.mirrorfs tree peer",
    );
    sandbox.umount();
}

/// Stores at the beginning of a file through a shared mapping, by another process.
fn store(file: &File, text: &str) {
    let (pid, fd) = (std::process::id(), file.as_raw_fd());
    let script = "
import mmap, sys
with open(sys.argv[1], 'r+b') as file:
    mapped = mmap.mmap(file.fileno(), 0)
mapped[0:len(sys.argv[2])] = sys.argv[2].encode()
";
    let mut python = std::process::Command::new("python3");
    python.args(["-c", script, &format!("/proc/{pid}/fd/{fd}"), text]);
    run(&mut python, PROMPT).ok();
}

/// A Git directory gets no files that are not its own.
#[test]
fn what_is_written_late_in_a_git_directory_is_kept_outside() {
    let Some(shared) = Shared::new("d/x") else {
        return;
    };
    let sandbox = &shared.sandbox;
    sandbox.sh(
        &sandbox.tree(),
        "git init -q repo; cd repo; echo one >x; git add x; git commit -qm one",
    );
    sandbox.flush();
    let log = sandbox.peer().join("repo/.git/logs/HEAD");
    chown(&log, Some(0), Some(0)).unwrap();
    let mut late = OpenOptions::new().append(true).open(&log).unwrap();
    sandbox.sh(&sandbox.tree(), "cd repo; echo two >x; git commit -qam two");
    sandbox.flush();
    writeln!(late, "late").unwrap();
    let said = sandbox.try_flush().expect_code(3);
    said.expect_said(&["repo/.git/logs/HEAD"]);
    let kept = sandbox.reserved_contents(&sandbox.peer(), "conflicts");
    assert_eq!(kept.len(), 1);
    assert!(kept[0].ends_with(b"late\n"));
    assert!(copies(sandbox, &sandbox.peer()).is_empty());
    let path = "tree/repo/.git/logs/HEAD";
    conflicts(sandbox, &["show", path])
        .ok()
        .expect_said(&[".mirrorfs/conflicts/", "on peer"]);
    conflicts(sandbox, &["resolve", path, "--both"])
        .expect_code(1)
        .expect_said(&["--local"]);
    conflicts(sandbox, &["resolve", path, "--local"]).ok();
    sandbox.flush();
    sandbox.umount();
}

/// Works while nothing of it is noticed on the other side.
fn unnoticed(sandbox: &Sandbox, work: impl FnOnce()) {
    sandbox.connected();
    let agents = sandbox.processes_of(Role::Agent);
    for agent in &agents {
        agent.signal(Signal::STOP);
    }
    work();
    for agent in &agents {
        agent.signal(Signal::CONT);
    }
}

/// Nothing is left to be done but to decide.
fn comes_to_rest(sandbox: &Sandbox) {
    eventually("rest", PROMPT, || {
        let flushed = sandbox.try_flush();
        if [0, 3].contains(&flushed.code) {
            Ok(())
        } else {
            Err(flushed.to_string())
        }
    });
}

/// With conflicts open.
fn comes_down(sandbox: &Sandbox) {
    sandbox.try_umount().expect_code(3);
    sandbox.assert_down();
    sandbox.assert_recorded();
}

fn assert_kept(written: &[String], text: &str) {
    let kept: HashSet<&str> = text.split([';', '\n']).collect();
    let lost: Vec<_> = written
        .iter()
        .filter(|value| !kept.contains(value.as_str()))
        .collect();
    let some = &lost[..lost.len().min(5)];
    assert!(
        lost.is_empty(),
        "{} of {} lost: {some:?}",
        lost.len(),
        written.len()
    );
}

/// How often files are written to while they are being replaced.
const TURNS: u32 = 20;

/// Every value that programs write on the peer while batches replace and remove the same
/// files is in the trees afterwards, whoever is killed in between.
#[test]
fn no_value_is_lost_while_batches_replace_what_is_written_to() {
    const FILES: usize = 20;
    let Some(shared) = Shared::new("d/x") else {
        return;
    };
    let sandbox = &shared.sandbox;
    let rounds = rounds(4, 200) as usize;
    let mut written = Vec::new();
    for round in 0..rounds {
        let names: Vec<String> = (0..FILES).map(|at| format!("d/r{round}-{at}")).collect();
        let make = format!("for f in {}; do echo base >$f; done", names.join(" "));
        sandbox.sh(&sandbox.peer(), &make);
        comes_to_rest(sandbox);
        let mut files = Vec::new();
        for name in &names {
            chown(sandbox.peer().join(name), Some(0), Some(0)).unwrap();
            files.push((name.clone(), shared.open(name)));
        }
        let (replaced, removed) = names.split_at(FILES / 2);
        std::thread::scope(|scope| {
            let files = &mut files;
            let mut handle = None;
            unnoticed(sandbox, || {
                shared.replace(&replaced.join(" "));
                let remove = format!("rm {}", removed.join(" "));
                sandbox.sh(&sandbox.tree(), &remove);
                handle = Some(scope.spawn(move || {
                    let mut values = Vec::new();
                    for turn in 0..TURNS {
                        for (name, file) in files.iter_mut().step_by(2) {
                            let value = format!("{name}-{turn}");
                            write!(file, "{value};").unwrap();
                            values.push(value);
                        }
                        // While the batch is on its way.
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    values
                }));
            });
            if round % 3 == 1 {
                sandbox.kill_agents();
            }
            written.extend(handle.unwrap().join().unwrap());
        });
        comes_to_rest(sandbox);
        for (name, file) in &mut files {
            // The others have all been replaced or removed by now.
            let value = format!("{name}-last");
            write!(file, "{value};").unwrap();
            written.push(value);
        }
    }
    comes_to_rest(sandbox);
    let late = copies(sandbox, &sandbox.peer()).len();
    eprintln!("{} values, {late} late versions", written.len());
    assert_kept(&written, &sandbox.sh(&sandbox.peer(), "cat d/*"));
    assert_kept(&written, &sandbox.sh(&sandbox.tree(), "cat d/*"));
    assert!(late >= rounds * FILES / 2, "{late}");
    comes_down(sandbox);
}

/// The same with a program in the mount, and a peer's user who saves by renames and removes.
#[test]
fn no_value_is_lost_while_a_peer_replaces_what_is_written_to_here() {
    const FILES: usize = 20;
    let sandbox = Sandbox::new();
    mirror(&sandbox, "d/x");
    let rounds = rounds(4, 200) as usize;
    let mut program = Program::start(&sandbox);
    let (mut written, mut late) = (Vec::new(), 0);
    for round in 0..rounds {
        let names: Vec<String> = (0..FILES).map(|at| format!("d/r{round}-{at}")).collect();
        let make = format!("for f in {}; do echo base >$f; done", names.join(" "));
        sandbox.sh(&sandbox.tree(), &make);
        comes_to_rest(&sandbox);
        for name in &names {
            program.tell(&format!("hold {name}"));
        }
        let (replaced, removed) = names.split_at(FILES / 2);
        std::thread::scope(|scope| {
            let (program, names) = (&mut program, &names);
            let writer = move || {
                let mut values = Vec::new();
                for turn in 0..TURNS {
                    for name in names.iter().step_by(2) {
                        let value = format!("{name}-{turn}");
                        program.tell(&format!("write {name} {value}"));
                        values.push(value);
                    }
                }
                values
            };
            let mut handle = None;
            unnoticed(&sandbox, || {
                let draft = sandbox.outside().join("draft");
                for name in replaced {
                    fs::write(&draft, format!("theirs-{name}\n")).unwrap();
                    fs::rename(&draft, sandbox.peer().join(name)).unwrap();
                    written.push(format!("theirs-{name}"));
                }
                for name in removed {
                    fs::remove_file(sandbox.peer().join(name)).unwrap();
                }
                handle = Some(scope.spawn(writer));
            });
            written.extend(handle.unwrap().join().unwrap());
        });
        comes_to_rest(&sandbox);
        for name in &names {
            // The others have all been replaced or removed by now.
            let value = format!("{name}-last");
            program.tell(&format!("write {name} {value}"));
            written.push(value);
            program.tell(&format!("close {name}"));
        }
        comes_to_rest(&sandbox);
        late = copies(&sandbox, &sandbox.tree()).len();
    }
    drop(program);
    eprintln!("{} values, {late} late versions", written.len());
    assert!(late >= rounds * FILES / 2, "{late}");
    assert_kept(&written, &sandbox.sh(&sandbox.tree(), "cat d/*"));
    comes_down(&sandbox);
}
