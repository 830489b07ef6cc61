//! Work beside a thread that must not wait for it.

/// Runs `work` on a thread of its own; in a simulation, when that says so.
pub(crate) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    #[cfg(test)]
    let Some(work) = crate::sim::jobs::put_off(work) else {
        return Ok(());
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(|_| ())
}
