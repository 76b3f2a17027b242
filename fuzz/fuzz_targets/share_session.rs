//! Any bytes as requests to the server of a shared folder.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_share::fuzz::share_session(bytes));
