//! PID 1 of a Skerry guest.
fn main() {}
