//! `mirrorfs demo`: the main job in a minute, with nothing staged. Each command is run
//! as a user would run it, and what it prints is what is shown.

mod compare;
mod stage;

use std::fs;

use clap::Args;

use super::{complain, print};
use crate::daemon::{Exit, Failure, OrFail, place};
use stage::Stage;

/// How many files the demo writes at once.
const FILES: usize = 500;

/// Show the whole thing in temporary directories: mount, edit, kill, recover, flush, compare
#[derive(Args, Debug)]
pub(super) struct Demo {
    /// Keep the directories, and say where they are
    #[arg(long)]
    keep: bool,
}

impl Demo {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        place::fuse()?;
        let mut stage = Stage::set()?;
        let played = play(&stage);
        if self.keep {
            stage.keep();
        }
        // Cleaned up in any case; a demo that failed says so after that.
        stage.clear()?;
        played.map(|()| Exit::Done)
    }
}

fn play(stage: &Stage) -> Result<(), Failure> {
    let failed = || "the demo cannot work in its directory".to_owned();
    let (web, host) = (stage.tree(), stage.peer());

    say("A project directory, and a directory that stands for another machine:");
    fs::create_dir_all(web.join("src")).or_fail(failed)?;
    fs::write(web.join("README"), "a project\n").or_fail(failed)?;
    fs::write(web.join("src/main.rs"), "fn main() {}\n").or_fail(failed)?;
    stage.run(&["mount", "web", "host"])?;

    say("Edits arrive on the other side by themselves:");
    fs::write(web.join("notes.txt"), "the first note\n").or_fail(failed)?;
    let time = stage.until("the note on the other side", || {
        fs::read(host.join("notes.txt")).is_ok_and(|text| text == b"the first note\n")
    })?;
    print(format_args!("  a note was on the other side after {time}"));
    for number in 0..FILES {
        let path = web.join(format!("src/part{number}.rs"));
        fs::write(path, format!("// part {number}\n")).or_fail(failed)?;
    }
    let last = format!("src/part{}.rs", FILES - 1);
    let time = stage.until("the files on the other side", || host.join(&last).exists())?;
    print(format_args!(
        "  {FILES} new files were there {time} after the last was written"
    ));
    stage.run(&["status", "web"])?;

    say("The daemon is killed in the middle of work:");
    fs::write(web.join("last-words.txt"), "written just before\n").or_fail(failed)?;
    let pid = stage.kill()?;
    print(format_args!("  $ kill -9 {pid}"));
    match fs::read(web.join("notes.txt")) {
        Ok(_) => return Err(Failure::new("the mount answers without its daemon")),
        Err(error) => print(format_args!("  reading web/notes.txt: {error}")),
    }

    say("Mounting again recovers, and nothing that was written is missing:");
    stage.run(&["mount", "web"])?;
    let text = fs::read_to_string(web.join("last-words.txt")).or_fail(failed)?;
    print(format_args!("  web/last-words.txt: {}", text.trim_end()));

    say("The other side may work, too:");
    stage.until("the connection", || stage.is_connected())?;
    fs::write(host.join("reply.txt"), "from the other side\n").or_fail(failed)?;
    let time = stage.until("the reply in the mount", || {
        fs::read(web.join("reply.txt")).is_ok_and(|text| text == b"from the other side\n")
    })?;
    print(format_args!("  its reply was in the mount after {time}"));

    say("Before this machine goes away:");
    fs::write(web.join("notes.txt"), "the last note\n").or_fail(failed)?;
    stage.run(&["sync", "web", "--flush"])?;
    stage.run(&["umount", "web"])?;

    say("Both directories are plain files now. Compared name by name:");
    let result = compare::compare(&web, &host).or_fail(|| "cannot compare the trees".into())?;
    for difference in &result.differences {
        complain(&format_args!("  {difference}"));
    }
    if !result.differences.is_empty() {
        return Err(
            Failure::new("the two sides differ").hint("this must not happen: please report it")
        );
    }
    print(format_args!(
        "  {} names and {} bytes: contents, modes and times are equal",
        result.names, result.bytes
    ));
    Ok(())
}

fn say(text: &str) {
    print(format_args!("\n{text}"));
}
