//! Address space for memory that is to be on huge pages of the host: decoded and compiled code of a
//! large guest is more than the host's TLB has places for page by page.
#![expect(unsafe_code, reason = "reserves address space")]

use std::ptr::{NonNull, null_mut};

/// Bytes of a huge page. Nothing is on one until it takes more than this.
pub(crate) const HUGE: usize = 2 << 20;

/// Reserves `size` bytes, in whole pages, to be mapped over: from the start of a huge page on if they are
/// more than one. `None` if the host refuses.
pub(crate) fn reserve(size: usize) -> Option<NonNull<u8>> {
    let spare = if size > HUGE { HUGE } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice, without access.
    let room = unsafe {
        libc::mmap(
            null_mut(),
            size.checked_add(spare)?,
            libc::PROT_NONE,
            flags,
            -1,
            0,
        )
    };
    if room == libc::MAP_FAILED {
        return None;
    }
    let before = match spare {
        0 => 0,
        _ => room.align_offset(HUGE).min(spare),
    };
    // SAFETY: what is given back is within the mapping just made, and nobody has its address.
    unsafe {
        let start = room.byte_add(before);
        if before > 0 {
            libc::munmap(room, before);
        }
        if before < spare {
            libc::munmap(start.byte_add(size), spare - before);
        }
        NonNull::new(start.cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_large_starts_on_a_huge_page() {
        for size in [4096, HUGE, HUGE + 4096, 5 * HUGE] {
            let start = reserve(size).expect("address space");
            assert!(size <= HUGE || (start.as_ptr() as usize).is_multiple_of(HUGE));
            // SAFETY: as reserved; each page of it is mapped, or this fails.
            let given_back = unsafe {
                libc::madvise(start.as_ptr().cast(), size, libc::MADV_NORMAL) == 0
                    && libc::munmap(start.as_ptr().cast(), size) == 0
            };
            assert!(given_back, "{size}");
        }
    }
}
