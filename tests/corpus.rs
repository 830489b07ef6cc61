//! "A committed corpus that `./test` replays": every file in `fuzz/corpus` goes through the
//! function that its fuzz target calls. What a fuzzer finds is put there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

use mirrorfs::wire::probe::WAYS;

#[test]
fn the_corpus_goes_through() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, way) in WAYS {
        let mut files: Vec<_> = fs::read_dir(corpus.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(files.len() > 5, "{name} has a corpus");
        for file in files {
            let bytes = fs::read(&file).unwrap();
            println!("{}", file.display());
            way(&bytes);
            // What is cut off or damaged is what a fuzzer tries first.
            for length in 0..bytes.len().min(200) {
                way(&bytes[..length]);
            }
            for at in 0..bytes.len().min(200) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0xff;
                way(&damaged);
            }
        }
    }
}
