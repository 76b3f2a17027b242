//! Any bytes as the documents of a function sandbox's snapshot.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: skerry_fuzz::begin_with(&skerry_sandbox::fuzz::saved_seed()),
    |bytes: &[u8]| skerry_sandbox::fuzz::saved(bytes)
);
