//! Exit statuses that are skerry's own.

/// The time limit passed, as `timeout` has it.
pub const TIMED_OUT: u8 = 124;
/// Skerry itself failed.
pub const FAILED: u8 = 125;
/// `skerry boot`: the guest crashed (triple fault, or it reported a panic).
pub const GUEST_CRASHED: u8 = 123;
/// A signal ended it: this and the signal's number.
pub const SIGNALLED: u8 = 128;
