//! The error that all devices share when a saved state is put back.

/// A saved state that no device of this kind can be in, or that was saved from another configuration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("The saved state of device `{device}` cannot be restored: {problem}; take a new snapshot")]
pub struct StateError {
    device: &'static str,
    problem: String,
}

impl StateError {
    /// An error about `device`; `problem` completes the sentence.
    pub fn new(device: &'static str, problem: impl Into<String>) -> Self {
        Self {
            device,
            problem: problem.into(),
        }
    }
}

/// Refuses with `problem` unless `ok`.
pub(crate) fn require(ok: bool, device: &'static str, problem: &str) -> Result<(), StateError> {
    if ok {
        Ok(())
    } else {
        Err(StateError::new(device, problem))
    }
}
