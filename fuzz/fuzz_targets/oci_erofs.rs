//! Any bytes as an EROFS image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_oci::fuzz::erofs(bytes));
