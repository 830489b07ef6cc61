//! A Git repository of the size of a real project, the same each time and made without a
//! network.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use super::sandbox::Sandbox;

/// Files on `main`.
pub const FILES: usize = 5_400;
/// Commits of `topic` that are not on `main`.
pub const TOPIC_COMMITS: usize = 25;

/// Makes a bare repository with these branches:
/// * `main`: 5,400 files in 180 directories, 40 commits;
/// * `wide`: from the middle of `main`, changes every third file, adds 400 and removes 300;
/// * `topic`: from the middle of `main`, 25 small commits that do not conflict with the
///   rest of it, for rebasing.
pub fn generate(sandbox: &Sandbox, at: &Path) {
    let shown = at.display();
    sandbox.sh(
        sandbox.root(),
        &format!("git init -q --bare -b main '{shown}'"),
    );
    let mut import = sandbox
        .command("git")
        .arg("-C")
        .arg(at)
        .args(["fast-import", "--quiet"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stream = import.stdin.take().unwrap();
    stream.write_all(history().as_bytes()).unwrap();
    drop(stream);
    assert!(import.wait().unwrap().success(), "git fast-import");
}

fn path(number: usize) -> String {
    let dir = number % 180;
    let ending = ["rs", "c", "md", "json", "txt"][number % 5];
    format!(
        "{}/part{:02}/module_{number:04}.{ending}",
        ["src", "lib", "docs", "tests"][dir % 4],
        dir / 4,
    )
}

/// A text that compresses like source code does, different for each file and version.
fn text(number: usize, version: usize) -> String {
    let mut text = format!("// module {number}, version {version}\n");
    for line in 0..(8 + number * 7 % 90) {
        let value = (number * 31 + line * 17 + version * 7) % 9973;
        writeln!(
            text,
            "pub fn item_{line}(input: u64) -> u64 {{ input * {value} + {line} }}"
        )
        .unwrap();
    }
    text
}

struct Stream {
    text: String,
    mark: usize,
}

impl Stream {
    fn commit(&mut self, branch: &str, message: &str, from: Option<usize>) -> usize {
        self.mark += 1;
        let Self { text, mark } = self;
        let time = 1_600_000_000 + *mark * 3600;
        write!(
            text,
            "commit refs/heads/{branch}\nmark :{mark}\n\
             committer Tester <tester@example.org> {time} +0000\n\
             data {}\n{message}\n",
            message.len()
        )
        .unwrap();
        if let Some(from) = from {
            writeln!(text, "from :{from}").unwrap();
        }
        *mark
    }

    fn file(&mut self, path: &str, content: &str) {
        let mode = if path.ends_with(".c") {
            "100755"
        } else {
            "100644"
        };
        writeln!(
            self.text,
            "M {mode} inline {path}\ndata {}\n{content}",
            content.len()
        )
        .unwrap();
    }
}

fn history() -> String {
    let mut stream = Stream {
        text: String::new(),
        mark: 0,
    };
    let mut middle = 0;
    for commit in 0..40 {
        let mark = stream.commit("main", &format!("Work on the project, part {commit}"), None);
        if commit == 0 {
            for number in 0..FILES {
                stream.file(&path(number), &text(number, 0));
            }
            stream
                .text
                .push_str("M 120000 inline latest\ndata 4\ndocs\n");
        }
        // Even numbers change on main, odd ones on topic.
        for step in 0..40 {
            let number = (commit * 40 + step) * 2 % FILES;
            stream.file(&path(number), &text(number, commit + 1));
        }
        if commit == 20 {
            middle = mark;
        }
    }
    stream.commit("wide", "Change a lot at once", Some(middle));
    for number in (0..FILES).step_by(3) {
        stream.file(&path(number), &text(number, 1000));
    }
    for number in 0..400 {
        stream.file(
            &format!("added/{}/file_{number}.txt", number % 13),
            &text(number, 1),
        );
    }
    for number in (1..900).step_by(3) {
        writeln!(stream.text, "D {}", path(number)).unwrap();
    }
    for commit in 0..TOPIC_COMMITS {
        let from = (commit == 0).then_some(middle);
        stream.commit("topic", &format!("Topic, step {commit}"), from);
        for step in 0..12 {
            let number = ((commit * 12 + step) * 2 + 1) % FILES;
            stream.file(&path(number), &text(number, 2000 + commit));
        }
    }
    stream.text
}
