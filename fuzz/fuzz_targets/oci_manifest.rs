//! Any bytes as the JSON documents of an image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_oci::fuzz::oci_manifest(bytes));
