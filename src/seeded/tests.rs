//! Each bug is caught, and by what. `docs/testing.md` has the same table for people.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Bug, switch};
use crate::{agent, replica, replicator, sim};

/// A bug with a test that fails where it is built in.
struct Caught {
    bug: Bug,
    by: &'static str,
    test: fn(),
}

macro_rules! caught {
    ($($bug:ident by $($test:ident)::+;)*) => {
        [$(Caught {
            bug: Bug::$bug,
            by: stringify!($($test)::+),
            test: $($test)::+,
        }),*]
    };
}

const ALL: [Caught; 8] = caught! {
    AcknowledgesBeforeTheCommit by sim::tests::one_peer_agrees_and_nothing_is_lost;
    IgnoresTheExpectedState by replica::apply::tests::what_the_user_changed_diverges_and_the_rest_goes_on;
    NewestWins by replicator::round::tests::what_both_have_changed_is_a_conflict_whatever_the_clocks_say;
    NoRedoRecord by replica::apply::tests::a_batch_that_is_cut_off_anywhere_is_completed;
    ForgetsTheBase by sim::tests::one_peer_agrees_and_nothing_is_lost;
    NoSyncOfStaged by replica::apply::tests::what_is_put_in_place_was_synced_before;
    MarkerLeads by replica::apply::tests::the_tree_is_marked_after_it_was_synced;
    NoFence by agent::lock::tests::a_newer_session_waits_until_the_older_has_let_go;
};

/// Fails unless the bug's test, which succeeds by itself, fails with the bug.
fn is_caught(bug: Bug) {
    let caught = ALL.iter().find(|caught| caught.bug == bug).unwrap();
    switch::set(Some(bug));
    let outcome = catch_unwind(AssertUnwindSafe(caught.test));
    switch::set(None);
    assert!(outcome.is_err(), "{bug:?} is not caught by {}", caught.by);
}

/// One test for each, so that they run beside each other.
macro_rules! each {
    ($($name:ident: $bug:ident;)*) => {
        $(#[test]
        fn $name() {
            is_caught(Bug::$bug);
        })*
    };
}

each! {
    an_acknowledgement_before_the_commit_is_caught: AcknowledgesBeforeTheCommit;
    ignoring_the_expected_state_is_caught: IgnoresTheExpectedState;
    letting_the_newest_win_is_caught: NewestWins;
    skipping_the_redo_record_is_caught: NoRedoRecord;
    forgetting_the_base_is_caught: ForgetsTheBase;
    not_syncing_what_is_staged_is_caught: NoSyncOfStaged;
    a_marker_that_leads_is_caught: MarkerLeads;
    a_missing_fence_is_caught: NoFence;
}

#[test]
fn the_page_about_testing_names_them() {
    let page = include_str!("../../docs/testing.md");
    for caught in &ALL {
        // Long paths are broken into lines.
        let by: String = caught.by.split_whitespace().collect();
        let row = format!("| `{:?}` | `{by}` |", caught.bug);
        assert!(page.contains(&row), "docs/testing.md lacks: {row}");
    }
}
