//! Snapshots through the crate's front door: written, damaged, killed, carried about.

mod chains;
mod common;
mod corruption;
mod killed;
mod round_trip;
mod store;
