//! The operating system's part.

mod linux;

pub(crate) use linux::{active, confine, enter, probe};
