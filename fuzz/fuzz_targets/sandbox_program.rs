//! Any bytes as the program of a function sandbox's guest.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: skerry_fuzz::begin_with(&skerry_sandbox::fuzz::program_seed()),
    |bytes: &[u8]| skerry_sandbox::fuzz::program(bytes)
);
