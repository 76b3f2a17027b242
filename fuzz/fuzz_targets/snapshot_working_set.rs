//! Any bytes as the working set of a snapshot.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_snapshot::fuzz::working_set(bytes));
