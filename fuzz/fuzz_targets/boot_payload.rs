//! A compressed kernel payload from anybody: decompressed or refused, never without bound.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skerry_boot::decompress;

fuzz_target!(|data: &[u8]| {
    if let Ok(kernel) = decompress::payload(data) {
        assert!(kernel.len() as u64 <= decompress::MAX_KERNEL);
    }
});
