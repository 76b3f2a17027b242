//! Bulk work of the string instructions on host memory that the TLB has vouched for.
#![expect(
    unsafe_code,
    reason = "string instructions run on host pointers, a page at a time"
)]

use std::ptr::NonNull;

/// A stretch of guest RAM within one page: where it is mapped, and how many bytes there are.
#[derive(Clone, Copy)]
pub(super) struct Run {
    start: NonNull<u8>,
    len: usize,
}

impl Run {
    /// # Safety
    ///
    /// `len` bytes at `start` are mapped, readable (writable, if it will be written), and stay so
    /// until the current instruction ends.
    pub(super) unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies `bytes` forward, in elements of `element` bytes, as if one element at a time; `bytes`
    /// is a multiple of `element` and within both runs. Returns how many were copied: fewer where
    /// the destination starts inside the source, so that the caller comes back for the rest.
    pub(super) fn copy_from(&self, source: Run, bytes: usize, element: usize) -> usize {
        let bytes = bytes.min(self.len).min(source.len);
        let distance = (self.start.as_ptr() as usize).wrapping_sub(source.start.as_ptr() as usize);
        let bytes = if distance < bytes && distance != 0 {
            distance - distance % element
        } else {
            bytes
        };
        // SAFETY: both runs have `bytes` valid bytes (`Run::new`); `copy` allows overlap.
        unsafe { std::ptr::copy(source.start.as_ptr(), self.start.as_ptr(), bytes) };
        bytes
    }

    /// Fills `bytes` with the low `element` bytes of `value`, repeated.
    pub(super) fn fill(&self, value: u64, bytes: usize, element: usize) {
        let bytes = bytes.min(self.len);
        let pattern = value.to_le_bytes();
        let uniform = pattern[..element].iter().all(|b| *b == pattern[0]);
        let at = self.start.as_ptr();
        if uniform {
            // SAFETY: `bytes` bytes at `start` are valid for writing (`Run::new`).
            unsafe { std::ptr::write_bytes(at, pattern[0], bytes) };
            return;
        }
        for offset in (0..bytes - bytes % element).step_by(element) {
            // SAFETY: `offset + element <= bytes`, all valid for writing; `pattern` has 8 bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(pattern.as_ptr(), at.add(offset), element);
            }
        }
    }

    /// Copies out the first `into.len()` bytes, which the run must have.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.len);
        // SAFETY: the range is within the run (checked), which is valid for reading (`Run::new`);
        // other processors may write it meanwhile: the bytes are copied before they are looked at.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().add(offset),
                into.as_mut_ptr(),
                into.len(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(bytes: &mut [u8]) -> Run {
        let len = bytes.len();
        // SAFETY: the slice outlives its use in each test.
        unsafe { Run::new(NonNull::new(bytes.as_mut_ptr()).unwrap(), len) }
    }

    #[test]
    fn overlapping_copy_repeats_the_pattern() {
        let mut bytes = *b"abcdefgh........";
        let whole = run(&mut bytes);
        let (source, dest) = (Run { len: 12, ..whole }, run(&mut bytes[3..]));
        let mut done = 0;
        let mut step = 0;
        while done < 9 {
            step += 1;
            assert!(step < 10);
            let s = Run {
                // SAFETY: stays within the array.
                start: unsafe { source.start.add(done) },
                len: 12 - done,
            };
            let d = Run {
                // SAFETY: stays within the array.
                start: unsafe { dest.start.add(done) },
                len: 12 - done,
            };
            done += d.copy_from(s, 9 - done, 1);
        }
        assert_eq!(&bytes[..12], b"abcabcabcabc");
    }

    #[test]
    fn fill_repeats_the_element() {
        let mut bytes = [0u8; 10];
        run(&mut bytes).fill(0x0403_0201, 9, 4);
        assert_eq!(bytes, [1, 2, 3, 4, 1, 2, 3, 4, 0, 0]);
    }
}
