//! Runs of the simulation.
//!
//! Every test takes seeds of its own from a number that is the same each time, so that a
//! change is judged by itself; with `MIRRORFS_TEST_LONG` there are more of them, from
//! `MIRRORFS_TEST_SEED`. `MIRRORFS_SIM_SEED` repeats one; `MIRRORFS_SIM_SEEDS=1-500` runs a
//! stretch of them and tells which go wrong.

use super::world::{Fate, Run, run};

/// One peer, links that break, and processes that are killed.
fn one_peer() -> Fate {
    Fate {
        steps: 1500,
        peers: 1,
        cut_every: 120,
        kill_every: 400,
        turn_back_every: usize::MAX,
    }
}

/// The same with several peers.
fn several_peers() -> Fate {
    Fate {
        peers: 3,
        steps: 3000,
        ..one_peer()
    }
}

/// One peer, and either side is brought back from a copy now and then.
fn brought_back() -> Fate {
    Fate {
        turn_back_every: 150,
        ..one_peer()
    }
}

/// The same with several peers.
fn several_brought_back() -> Fate {
    Fate {
        turn_back_every: 150,
        ..several_peers()
    }
}

/// Runs one seed, and says how to see it again if it goes wrong.
fn check(seed: u64, fate: &Fate) -> Run {
    let run = run(seed, fate);
    if let Some(wrong) = &run.wrong {
        for line in &run.tail {
            eprintln!("{line}");
        }
        panic!(
            "MIRRORFS_SIM_SEED={seed} after {} steps: {wrong}\n(MIRRORFS_SIM_TRACE=1 shows all of them)",
            run.steps
        );
    }
    run
}

/// Runs all seeds of a stretch, and tells which of them go wrong.
fn tell(seeds: &str, fate: &Fate) {
    let (first, last) = seeds.split_once('-').unwrap();
    let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
    for seed in first..=last {
        match std::panic::catch_unwind(|| run(seed, fate)) {
            Ok(run) => {
                if let Some(wrong) = run.wrong {
                    eprintln!("seed {seed} after {} steps: {wrong}", run.steps);
                }
            }
            Err(_) => eprintln!("seed {seed} panicked"),
        }
    }
    eprintln!("seeds {first} to {last} are through");
}

/// Runs seeds until so many steps have been made.
fn steps(first: u64, fate: &Fate, steps: u64) {
    if let Ok(seed) = std::env::var("MIRRORFS_SIM_SEED") {
        check(seed.parse().unwrap(), fate);
        return;
    }
    if let Ok(seeds) = std::env::var("MIRRORFS_SIM_SEEDS") {
        return tell(&seeds, fate);
    }
    let long = std::env::var_os("MIRRORFS_TEST_LONG").is_some();
    let (first, steps) = match std::env::var("MIRRORFS_TEST_SEED") {
        Ok(seed) if long => (seed.parse::<u64>().unwrap() << 20 | first, steps * 5),
        _ if long => (first, steps * 5),
        _ => (first, steps),
    };
    let (mut seed, mut made, mut values) = (first, 0, (0, 0));
    while made < steps {
        let run = check(seed, fate);
        made += run.steps;
        values.0 += run.values.0;
        values.1 += run.values.1;
        seed += 1;
    }
    eprintln!(
        "seeds {first} to {}: {made} steps, {} values written, {} to be found at the end",
        seed - 1,
        values.0,
        values.1
    );
}

// A million steps in all, in shares that run at the same time.

#[test]
pub(crate) fn one_peer_agrees_and_nothing_is_lost() {
    steps(1, &one_peer(), 130_000);
}

#[test]
fn one_peer_agrees_and_nothing_is_lost_2() {
    steps(1001, &one_peer(), 130_000);
}

#[test]
fn one_peer_agrees_and_nothing_is_lost_3() {
    steps(2001, &one_peer(), 130_000);
}

#[test]
fn several_peers_agree_and_nothing_is_lost() {
    steps(4001, &several_peers(), 110_000);
}

#[test]
fn several_peers_agree_and_nothing_is_lost_2() {
    steps(5001, &several_peers(), 110_000);
}

#[test]
fn what_is_brought_back_overwrites_nothing() {
    steps(8001, &brought_back(), 110_000);
}

#[test]
fn what_is_brought_back_overwrites_nothing_2() {
    steps(9001, &brought_back(), 110_000);
}

#[test]
fn with_several_peers_what_is_brought_back_overwrites_nothing() {
    steps(12001, &several_brought_back(), 90_000);
}

#[test]
fn with_several_peers_what_is_brought_back_overwrites_nothing_2() {
    steps(13001, &several_brought_back(), 90_000);
}

#[test]
fn a_seed_gives_the_same_trace_twice() {
    for (seed, fate) in [
        (1, one_peer()),
        (2, several_peers()),
        (3, several_brought_back()),
    ] {
        let (once, twice) = (run(seed, &fate), run(seed, &fate));
        let differs = once
            .tail
            .iter()
            .zip(&twice.tail)
            .find(|(once, twice)| once != twice);
        assert_eq!(
            (once.steps, once.trace),
            (twice.steps, twice.trace),
            "seed {seed}: {differs:?}"
        );
    }
}
