//! An ELF file from anybody: every accepted segment lies inside the file and in 64 bits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skerry_boot::elf;

fuzz_target!(|data: &[u8]| {
    if let Ok(elf) = elf::parse(data) {
        assert!(!elf.segments.is_empty());
        for segment in &elf.segments {
            assert!(segment.offset + segment.file_size <= data.len() as u64);
            assert!(segment.target.end > segment.target.start);
            assert!(segment.target.len() >= segment.file_size);
        }
    }
});
