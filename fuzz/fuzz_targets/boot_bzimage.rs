//! The setup header of a bzImage from anybody: parsed or refused, the payload inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skerry_boot::bzimage;

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = bzimage::parse(data) {
        assert!(data.as_ptr_range().contains(&image.payload.as_ptr()) || image.payload.is_empty());
        assert!(image.payload.len() <= data.len());
    }
});
