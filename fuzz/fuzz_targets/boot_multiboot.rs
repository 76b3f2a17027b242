//! A multiboot kernel from anybody: every accepted segment lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skerry_boot::multiboot;

fuzz_target!(|data: &[u8]| {
    if let Ok(Some(kernel)) = multiboot::parse(data) {
        for segment in &kernel.segments {
            assert!(segment.offset + segment.file_size <= data.len() as u64);
            assert!(segment.target.len() >= segment.file_size);
        }
    }
});
