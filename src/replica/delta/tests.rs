use proptest::prelude::*;

use super::*;

fn reader(bytes: &[u8]) -> impl Fn(&mut [u8], u64) -> io::Result<usize> + '_ {
    |buffer, offset| {
        let from = bytes.len().min(usize::try_from(offset).unwrap());
        // Not all at once, as a read may.
        let len = buffer.len().min(bytes.len() - from).min(100_000);
        buffer[..len].copy_from_slice(&bytes[from..from + len]);
        Ok(len)
    }
}

/// What the receiver makes of it, and how many of its bytes were sent.
fn rebuilt(likeness: &mut Likeness, old: &[u8], new: &[u8], from: usize) -> (Vec<u8>, usize) {
    let mut built = new[..from].to_vec();
    let mut sent = 0;
    while built.len() < new.len() {
        let at = built.len();
        match likeness
            .next(at as u64, new.len() as u64, &reader(new))
            .unwrap()
        {
            Piece::Old { from, len } => {
                assert!(len > 0 && len <= REUSED + (1 << 20));
                let from = usize::try_from(from).unwrap();
                built.extend_from_slice(&old[from..from + usize::try_from(len).unwrap()]);
            }
            Piece::New(len) => {
                assert!(len > 0 && len <= STRETCH);
                // A slow link takes less at a time.
                let len = len.min(70_000);
                built.extend_from_slice(&new[at..at + len]);
                sent += len;
            }
        }
    }
    (built, sent)
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

fn blocks(old: &[u8]) -> Likeness {
    let (size, block) = (old.len() as u64, block_size(old.len() as u64));
    let sums = sums(size, block, &reader(old)).unwrap().unwrap();
    Likeness::Blocks(Blocks::new(size, block, &sums).unwrap())
}

#[test]
fn a_changed_mebibyte_of_a_gibibyte_costs_little_more() {
    let size = 1_u64 << 30;
    let block = u64::from(block_size(size));
    let sums = size.div_ceil(block) * SUM as u64;
    // A change that begins and ends within a block.
    let sent = (1 << 20) + block;
    assert!(sums + sent < 1_363_148, "{sums} and {sent}");
    for size in [1, LEAST, 1 << 40, u64::MAX / 16] {
        let block = u64::from(block_size(size));
        assert!(size.div_ceil(block) <= BLOCKS || block == 1 << 31, "{size}");
    }
}

#[test]
fn what_was_put_in_or_taken_out_is_found_wherever_the_rest_has_moved() {
    let old = random(1, 3_000_001);
    let mut new = old.clone();
    new.splice(1_000_003..1_000_003, *b"a few bytes more");
    new.drain(2_000_000..2_000_777);
    let (built, sent) = rebuilt(&mut blocks(&old), &old, &new, 0);
    assert!(built == new);
    assert!(sent < 4 * block_size(3_000_001) as usize, "{sent} sent");
}

#[test]
fn what_is_the_same_everywhere_is_found_at_once() {
    let old = vec![0; 2_000_000];
    let mut new = vec![0; 2_500_000];
    new[1_234_567] = 1;
    let (built, sent) = rebuilt(&mut blocks(&old), &old, &new, 0);
    assert!(built == new);
    assert!(sent < 3 * block_size(2_000_000) as usize, "{sent} sent");
}

#[test]
fn what_is_appended_is_all_that_is_sent() {
    let old = random(2, 1_000_000);
    let mut new = old.clone();
    new.extend_from_slice(b"one more line\n");
    let hash = ContentHash::of(&old);
    let size = new.len() as u64;
    let found = Likeness::appended(hash, 1_000_000, size, &reader(&new)).unwrap();
    let mut found = found.unwrap();
    assert_eq!(found.new_bytes(), Some(14));
    assert_eq!(rebuilt(&mut found, &old, &new, 0), (new.clone(), 14));
    new[0] ^= 1;
    let found = Likeness::appended(hash, 1_000_000, size, &reader(&new)).unwrap();
    assert!(found.is_none());
    let found = Likeness::appended(hash, 1_000_000, 999_999, &reader(&new)).unwrap();
    assert!(found.is_none());
}

#[test]
fn sums_that_do_not_fit_the_content_are_no_likeness() {
    let size = 1_000_000;
    let block = block_size(size);
    assert!(Blocks::new(size, block, &[]).is_none());
    assert!(Blocks::new(size, block, &[0; SUM]).is_none());
    assert!(Blocks::new(size, 0, &[0; SUM]).is_none());
    let old = vec![1; 1_000_000];
    assert!(sums(size, 1, &reader(&old)).unwrap().is_none());
    assert!(sums(size, u32::MAX, &reader(&old)).unwrap().is_none());
    assert!(sums(size + 1, block, &reader(&old)).is_err());
}

/// A database or a writer that never pauses changes a few bytes in thousands of places: each
/// as a message of its own made a round take minutes.
#[test]
fn what_was_written_close_together_is_one_piece() {
    let writes = (0..10_000).map(|n| n * 100..n * 100 + 8).collect();
    let likeness = Likeness::written(writes, 1_000_000, 1_000_000);
    let Likeness::Ranges(ranges) = likeness else {
        panic!("{likeness:?}");
    };
    assert_eq!(ranges, std::iter::once(0..999_908).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_changed_the_content_is_rebuilt(
        seed in any::<u64>(),
        len in 0..400_000_usize,
        edits in prop::collection::vec((any::<usize>(), 0..5000_usize, 0..5000_usize), 0..5),
        from in any::<usize>(),
    ) {
        let old = random(seed, len + 1);
        let mut new = old.clone();
        for (at, gone, more) in edits {
            let at = at % (new.len() + 1);
            let end = (at + gone).min(new.len());
            new.splice(at..end, random(seed ^ at as u64, more));
        }
        // A transfer that was cut goes on from any byte.
        let from = from % (new.len() + 1);
        let (built, _) = rebuilt(&mut blocks(&old), &old, &new, from);
        prop_assert!(built == new);
    }

    #[test]
    fn what_was_written_is_sent_and_nothing_else(
        seed in any::<u64>(),
        writes in prop::collection::vec((0..400_000_u64, 0..50_000_u64), 0..6),
        from in any::<usize>(),
    ) {
        let old = random(seed, 300_000);
        let mut new = old.clone();
        let mut touched = vec![false; 500_000];
        for (at, len) in &writes {
            let end = usize::try_from(at + len).unwrap();
            if *len > 0 && new.len() < end {
                touched[new.len()..end].fill(true);
                new.resize(end, 0);
            }
            if *len > 0 {
                let at = usize::try_from(*at).unwrap();
                new[at..end].copy_from_slice(&random(seed ^ *len, end - at));
                touched[at..end].fill(true);
            }
        }
        let ranges = writes.iter().map(|(at, len)| *at..at + len).collect();
        let mut likeness = Likeness::written(ranges, 300_000, new.len() as u64);
        // Short gaps between what was touched travel with it.
        let touched = (0_u64..).zip(touched).filter_map(|(at, touched)| touched.then_some(at));
        let (mut sent, mut last) = (0, None);
        for at in touched {
            let gap = last.map_or(0, |last| at - last - 1);
            sent += 1 + if gap < APART { gap } else { 0 };
            last = Some(at);
        }
        prop_assert_eq!(likeness.new_bytes(), Some(sent));
        let from = from % (new.len() + 1);
        let (built, _) = rebuilt(&mut likeness, &old, &new, from);
        prop_assert!(built == new);
    }
}
