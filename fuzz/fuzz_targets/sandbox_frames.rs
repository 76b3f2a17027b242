//! Any bytes as what a guest leaves on its control page, in its output and its log.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_sandbox::fuzz::frames(bytes));
