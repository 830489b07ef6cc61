//! Bugs that are built in on purpose, to see that the tests find them. Only in test
//! builds can one be switched on, and only for a thread; elsewhere every question is
//! answered by a constant, and nothing of them is compiled in.

/// A bug. Each is one that such a program could have, and that loses or overwrites work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    /// The agent says that a batch is applied and durable before it has committed it.
    AcknowledgesBeforeTheCommit,
    /// The agent applies a step without looking at what it replaces.
    IgnoresTheExpectedState,
    /// Where both sides changed a file, the one with the newer time wins.
    NewestWins,
    /// The agent begins to apply without a redo record.
    NoRedoRecord,
    /// The mounted side does not write down the base of an agreement.
    ForgetsTheBase,
    /// The agent does not sync what it staged.
    NoSyncOfStaged,
    /// The tree is marked with an agreement before it holds it.
    MarkerLeads,
    /// An agent does not wait for an older one to let go of the directory.
    NoFence,
}

/// Whether a bug is switched on.
#[cfg(test)]
pub(crate) fn has(bug: Bug) -> bool {
    switch::get() == Some(bug)
}

/// Whether a bug is switched on: never, outside tests.
#[cfg(not(test))]
#[inline]
pub(crate) const fn has(_: Bug) -> bool {
    false
}

#[cfg(test)]
pub(crate) mod switch {
    //! The switch, of this thread.

    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static ON: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    pub(crate) fn get() -> Option<Bug> {
        ON.get()
    }

    pub(crate) fn set(bug: Option<Bug>) {
        ON.set(bug);
    }
}

#[cfg(test)]
mod tests;
