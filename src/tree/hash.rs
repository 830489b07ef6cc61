//! Content hashes of files, in constant memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::ContentHash;

/// How much is read at once, in bytes.
const STRETCH: usize = 256 * 1024;

/// A hash that grows with the content.
#[derive(Clone, Default)]
pub struct Hasher {
    inner: blake3::Hasher,
    len: u64,
}

impl Hasher {
    /// The hash of nothing, to begin with.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.inner.update(bytes);
        self.len += bytes.len() as u64;
    }

    /// How many bytes have been taken in.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been taken in yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The digest of what has been taken in.
    pub fn digest(&self) -> ContentHash {
        ContentHash(*self.inner.finalize().as_bytes())
    }

    /// Takes in the bytes of `file` from where this hash stands up to `end`, or to the
    /// end of the file if that comes first.
    pub fn read_to(&mut self, file: &File, end: u64) -> io::Result<()> {
        let mut buffer = vec![0; STRETCH.min(usize::try_from(end).unwrap_or(STRETCH).max(1))];
        while self.len < end {
            let want = usize::try_from(end - self.len)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let got = match file.read_at(&mut buffer[..want], self.len) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.update(&buffer[..got]);
        }
        Ok(())
    }
}

/// Hashes a file from its beginning to its end, wherever its cursor stands, and says
/// how many bytes that were. The file may change meanwhile: compare its times.
pub fn hash_file(file: &File) -> io::Result<(ContentHash, u64)> {
    let mut hasher = Hasher::new();
    let mut end = file.metadata()?.len();
    loop {
        hasher.read_to(file, end)?;
        let now = file.metadata()?.len();
        if hasher.len() < end || now <= hasher.len() {
            return Ok((hasher.digest(), hasher.len()));
        }
        end = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_like_blake3_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        for len in [0, 1, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH + 17] {
            let content: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            let path = dir.path().join("file");
            std::fs::write(&path, &content).unwrap();
            let found = hash_file(&File::open(&path).unwrap()).unwrap();
            assert_eq!(found, (ContentHash::of(&content), len as u64));
        }
    }

    #[test]
    fn goes_on_from_a_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"hello world").unwrap();
        let mut hasher = Hasher::new();
        hasher.read_to(&File::open(&path).unwrap(), 5).unwrap();
        assert_eq!(hasher.len(), 5);
        hasher.update(b" world");
        assert_eq!(hasher.digest(), ContentHash::of(b"hello world"));
    }
}
