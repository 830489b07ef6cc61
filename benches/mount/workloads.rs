//! The workloads, each with how it is set up, what is timed, and the ratio aimed at.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::place::Place;

/// One row of the table.
pub struct Workload {
    pub name: &'static str,
    /// At most so many times native.
    pub goal: f64,
    /// Programs that it runs.
    pub needs: &'static [&'static str],
    /// The caches are dropped after `prepare`.
    pub cold: bool,
    /// It takes so long that it is run only where the filter names it.
    pub only_named: bool,
    pub prepare: fn(&Place),
    pub run: fn(&Place) -> Duration,
}

/// Made once, on the disk: a repository with two branches that are far apart, and an
/// archive of small files.
pub const DATA: &str = r#"
cd "$DATA"
git init -q -b main repo
cd repo
for d in $(seq 50); do
    mkdir -p "src/d$d"
    for f in $(seq 100); do
        printf 'line %s of %s\n' $(seq 60) "$d/$f" >"src/d$d/f$f.c"
    done
done
git add -A; git commit -qm first
git switch -qc far
for d in $(seq 25); do
    git mv "src/d$d" "src/moved$d"
    for f in $(seq 2 2 100); do echo changed >>"src/moved$d/f$f.c"; done
done
git commit -qam far
git switch -q main
cd ..
mkdir small
for d in $(seq 200); do
    mkdir "small/d$d"
    for f in $(seq 100); do echo "$d $f" >"small/d$d/f$f"; done
done
tar cf small.tar small
rm -r small
"#;

/// The sources of this project, and what cargo has already downloaded. Two of the larger
/// packages are built, not all: a pair of whole builds takes a quarter of an hour.
fn project(place: &Place) {
    place.sh(concat!(
        "mkdir project; tar c -C '",
        env!("CARGO_MANIFEST_DIR"),
        "' --exclude=./target --exclude=./.git . | tar x -C project"
    ));
}

/// A build, whose products do not stay: those of all pairs would fill the disk.
fn built(place: &Place, what: &str) -> Duration {
    let build =
        format!("cd project; CARGO_TARGET_DIR=target cargo build -q --offline --locked {what}");
    let took = timed(|| place.sh(&build));
    place.sh("rm -r project/target");
    took
}

/// Packages with deep trees, from a cache that is filled once. Without the addresses in the
/// lock file, which a user's configuration may leave out, `npm ci` asks the registry.
fn npm_project(place: &Place) {
    place.sh(
        "if [ ! -e \"$DATA/npm/package-lock.json\" ]; then
             mkdir -p \"$DATA/npm\"; cd \"$DATA/npm\"; npm init -y
             npm install --cache \"$DATA/npm-cache\" --omit-lockfile-registry-resolved=false --no-audit --no-fund \
                 express@4 typescript@5 eslint@8
             rm -rf node_modules; cd -
         fi
         mkdir app; cp \"$DATA\"/npm/package*.json app",
    );
}

const MIB: usize = 1 << 20;
/// Bytes of the large file.
const LARGE: usize = 256 * MIB;

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn nothing(_: &Place) {}

fn repository(place: &Place) {
    place.sh("git clone -q --no-hardlinks \"$DATA/repo\" repo; cd repo; git switch -q far; git switch -q main; git status");
}

fn small_files(place: &Place) {
    place.sh("tar xf \"$DATA/small.tar\"");
}

/// 50,000 names.
fn many(place: &Place) -> PathBuf {
    place.shared("many", |many| {
        for dir in 0..100 {
            let dir = many.join(format!("d{dir}"));
            fs::create_dir_all(&dir).unwrap();
            for file in 0..500 {
                File::create(dir.join(format!("f{file}"))).unwrap();
            }
        }
    })
}

fn many_files(place: &Place) {
    walk(&many(place));
}

fn walk(dir: &Path) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        sum += metadata.size();
        if metadata.is_dir() {
            sum += walk(&entry.path());
        }
    }
    sum
}

fn make_large(path: &Path) {
    let block = vec![7_u8; MIB];
    let mut file = File::create(path).unwrap();
    for _ in 0..LARGE / MIB {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
}

/// A file to read from.
fn large(place: &Place) -> PathBuf {
    place.shared("large", make_large)
}

/// A file to write into.
fn changed(place: &Place) -> PathBuf {
    place.shared("changed", make_large)
}

fn warm_large(place: &Place) {
    read_all(place, MIB);
}

fn read_all(place: &Place, block: usize) {
    let mut file = File::open(large(place)).unwrap();
    let mut buffer = vec![0; block];
    while file.read(&mut buffer).unwrap() > 0 {}
}

/// The same positions each time, all over the file.
fn positions(count: u64, block: u64) -> impl Iterator<Item = u64> {
    let blocks = LARGE as u64 / block;
    (0..count).map(move |at| at * 7_919 % blocks * block)
}

fn write_all(place: &Place, block: usize) {
    let buffer = vec![9; block];
    let mut file = File::create(place.path("written")).unwrap();
    for _ in 0..64 * MIB / block {
        file.write_all(&buffer).unwrap();
    }
}

fn map_all(place: &Place) {
    let script = "import mmap, sys\nf = open(sys.argv[1], 'rb')\nm = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n\
                  s = 0\nfor at in range(0, len(m), 4096): s += m[at]\n";
    place.sh(&format!(
        "python3 -c \"{script}\" '{}'",
        large(place).display()
    ));
}

fn create_many(place: &Place, count: usize) {
    let dir = place.path("created");
    fs::create_dir(&dir).unwrap();
    for file in 0..count {
        let mut file = File::create(dir.join(format!("f{file}"))).unwrap();
        file.write_all(&[b'x'; 1000]).unwrap();
    }
}

fn created(place: &Place) {
    create_many(place, 2000);
}

/// Every workload, in the order of the table.
#[allow(clippy::too_many_lines)]
pub fn all() -> Vec<Workload> {
    let plain = Workload {
        name: "",
        goal: 1.15,
        needs: &[],
        cold: false,
        only_named: false,
        prepare: nothing,
        run: |_| Duration::ZERO,
    };
    let git: &[&str] = &["git"];
    vec![
        Workload {
            name: "stat walk, warm (50,000)",
            prepare: many_files,
            run: |place| timed(|| assert!(walk(&many(place)) > 0)),
            ..plain
        },
        Workload {
            name: "git status",
            needs: git,
            prepare: repository,
            run: |place| timed(|| place.sh("cd repo; git status")),
            ..plain
        },
        Workload {
            name: "ripgrep",
            needs: &["git", "rg"],
            prepare: |place| {
                repository(place);
                place.sh("rg -c 'line 5' repo");
            },
            run: |place| timed(|| place.sh("rg -c 'line 5' repo")),
            ..plain
        },
        Workload {
            name: "sequential read 1 MiB, warm",
            prepare: warm_large,
            run: |place| timed(|| read_all(place, MIB)),
            ..plain
        },
        Workload {
            name: "sequential read 4 KiB, warm",
            prepare: warm_large,
            run: |place| timed(|| read_all(place, 4096)),
            ..plain
        },
        Workload {
            name: "random read 1 MiB, warm",
            prepare: warm_large,
            run: |place| {
                let file = File::open(large(place)).unwrap();
                let mut buffer = vec![0; MIB];
                timed(|| {
                    for at in positions(512, MIB as u64) {
                        file.read_exact_at(&mut buffer, at).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "random read 4 KiB, warm",
            prepare: warm_large,
            run: |place| {
                let file = File::open(large(place)).unwrap();
                let mut buffer = [0; 4096];
                timed(|| {
                    for at in positions(50_000, 4096) {
                        file.read_exact_at(&mut buffer, at).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "mmap read, warm (256 MiB)",
            needs: &["python3"],
            prepare: |place| {
                warm_large(place);
                map_all(place);
            },
            run: |place| timed(|| map_all(place)),
            ..plain
        },
        Workload {
            name: "git checkout, far branch",
            goal: 1.3,
            needs: git,
            prepare: repository,
            run: |place| timed(|| place.sh("cd repo; git switch -q far")),
            ..plain
        },
        Workload {
            name: "cargo build, clap and tokio",
            goal: 1.3,
            needs: &["cargo", "tar"],
            prepare: project,
            run: |place| built(place, "-p clap -p tokio"),
            ..plain
        },
        Workload {
            name: "cargo build, this project",
            goal: 1.3,
            needs: &["cargo", "tar"],
            only_named: true,
            prepare: project,
            run: |place| built(place, ""),
            ..plain
        },
        Workload {
            name: "npm ci, warm cache",
            goal: 1.3,
            needs: &["npm"],
            prepare: npm_project,
            run: |place| {
                timed(|| {
                    place.sh(
                        "cd app; npm ci --offline --cache \"$DATA/npm-cache\" --no-audit --no-fund",
                    );
                })
            },
            ..plain
        },
        Workload {
            name: "git clone",
            goal: 2.0,
            needs: git,
            run: |place| timed(|| place.sh("git clone -q --no-hardlinks \"$DATA/repo\" clone")),
            ..plain
        },
        Workload {
            name: "tar x (20,000 files)",
            goal: 2.0,
            needs: &["tar"],
            run: |place| timed(|| small_files(place)),
            ..plain
        },
        Workload {
            name: "create, write, close (10,000)",
            goal: 2.0,
            run: |place| timed(|| create_many(place, 10_000)),
            ..plain
        },
        Workload {
            name: "rewrite with O_TRUNC (2,000)",
            goal: 2.0,
            prepare: created,
            run: |place| {
                timed(|| {
                    for file in 0..2000 {
                        fs::write(place.path(&format!("created/f{file}")), [b'y'; 900]).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "atomic save (2,000)",
            goal: 2.0,
            prepare: created,
            run: |place| {
                timed(|| {
                    for file in 0..2000 {
                        let path = place.path(&format!("created/f{file}"));
                        let beside = place.path("created/new");
                        fs::write(&beside, [b'y'; 900]).unwrap();
                        fs::rename(&beside, &path).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "stat walk, cold (50,000)",
            goal: 4.0,
            cold: true,
            prepare: many_files,
            run: |place| timed(|| assert!(walk(&many(place)) > 0)),
            ..plain
        },
        Workload {
            name: "sequential write 1 MiB (64 MiB)",
            goal: 1.5,
            run: |place| timed(|| write_all(place, MIB)),
            ..plain
        },
        Workload {
            name: "sequential write 4 KiB (64 MiB)",
            goal: 1.5,
            run: |place| timed(|| write_all(place, 4096)),
            ..plain
        },
        Workload {
            name: "sequential read, cold (256 MiB)",
            goal: 1.5,
            cold: true,
            prepare: |place| drop(large(place)),
            run: |place| timed(|| read_all(place, MIB)),
            ..plain
        },
        Workload {
            name: "random write 4 KiB",
            goal: 20.0,
            prepare: |place| drop(changed(place)),
            run: |place| {
                let file = OpenOptions::new().write(true).open(changed(place)).unwrap();
                timed(|| {
                    for at in positions(20_000, 4096) {
                        file.write_all_at(&[3; 4096], at).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "random write 1 MiB",
            goal: 1.5,
            prepare: |place| drop(changed(place)),
            run: |place| {
                let file = OpenOptions::new().write(true).open(changed(place)).unwrap();
                let buffer = vec![3; MIB];
                timed(|| {
                    for at in positions(128, MIB as u64) {
                        file.write_all_at(&buffer, at).unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "append 4 KiB with fsync (200)",
            goal: 1.5,
            run: |place| {
                let mut file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o644)
                    .open(place.path("log"))
                    .unwrap();
                timed(|| {
                    for _ in 0..200 {
                        file.write_all(&[b'l'; 4096]).unwrap();
                        file.sync_data().unwrap();
                    }
                })
            },
            ..plain
        },
        Workload {
            name: "rm -rf (20,000 files)",
            goal: 4.0,
            prepare: small_files,
            run: |place| timed(|| place.sh("rm -rf small")),
            ..plain
        },
    ]
}
