//! What happens to an agent between two renames of a batch.

use std::cell::RefCell;

/// Called before a rename. True cuts the agent off there.
pub(crate) type Hook = Box<dyn FnMut() -> bool>;

thread_local! {
    static NEXT: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Sets what happens in the next batch that is applied.
pub(crate) fn set(hook: Option<Hook>) {
    NEXT.set(hook);
}

/// Takes what was set.
pub(crate) fn take() -> Option<Hook> {
    NEXT.take()
}
