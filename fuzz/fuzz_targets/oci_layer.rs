//! Any bytes as a layer: decompression, tar, merging, and the image that comes of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| skerry_oci::fuzz::oci_layer(bytes));
