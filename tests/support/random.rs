//! Random choices that a failure can be repeated with.

/// A generator (SplitMix64) whose seed is printed, and taken from `MIRRORFS_TEST_SEED`
/// where that is set.
pub struct Random(u64);

impl Random {
    /// Starts a generator of its own for each purpose.
    pub fn new(purpose: &str) -> Self {
        let seed = match std::env::var("MIRRORFS_TEST_SEED") {
            Ok(seed) => seed.parse().expect("MIRRORFS_TEST_SEED is a number"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| u64::from(since.subsec_nanos())),
        };
        eprintln!("{purpose}: MIRRORFS_TEST_SEED={seed}");
        let mut generator = Self(seed);
        for byte in purpose.bytes() {
            generator.0 = generator.next() ^ u64::from(byte);
        }
        generator
    }

    /// A generator whose numbers are the same in each run.
    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number from `low` up to, and not, `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    /// So many bytes that do not compress.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}
