//! Any bytes as the name of an image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_oci::fuzz::image_ref(bytes));
