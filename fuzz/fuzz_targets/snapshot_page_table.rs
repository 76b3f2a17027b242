//! Any bytes as the table of a page image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_snapshot::fuzz::page_table(bytes));
