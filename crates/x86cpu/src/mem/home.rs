//! Memory for a processor's tables: zeros, which take memory as they are touched.
//!
//! ```text
//! small    guard │ room │ area │ asids │ second level │ … │ jumps │ found │ arena     one mapping
//! full     guard │ room │ area      asids      second level     …     arena          a mapping each
//! ```
//! A processor that begins small has all of its tables in one mapping, so that making one takes two system
//! calls, and ten thousand of them fit into a process. What grows moves out into a mapping of its own.
#![expect(
    unsafe_code,
    reason = "maps memory, and hands out parts of it as tables"
)]

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::mem::PAGE_SIZE;

/// A type of which zeros are a value.
///
/// # Safety
///
/// They are, and it has no destructor.
pub(crate) unsafe trait Zeroed {}

// SAFETY: any bytes are a value of these.
unsafe impl Zeroed for u8 {}
// SAFETY: as above.
unsafe impl Zeroed for u16 {}
// SAFETY: as above.
unsafe impl Zeroed for u64 {}
// SAFETY: as above.
unsafe impl Zeroed for (u64, u64) {}

/// A mapping of zeros.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, like a box; who has parts of it keeps to them.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize) -> Self {
        let len = len.next_multiple_of(PAGE_SIZE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let base = Some(base).filter(|&base| base != libc::MAP_FAILED);
        match base.and_then(|base| NonNull::new(base.cast())) {
            Some(base) => Self { base, len },
            None => handle_alloc_error(
                Layout::from_size_align(len, PAGE_SIZE).unwrap_or(Layout::new::<u64>()),
            ),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; whoever has a part holds a reference to this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Part of a mapping that nobody else has.
pub(crate) struct Part {
    base: NonNull<u8>,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: it owns its part of the mapping, like a box.
unsafe impl Send for Part {}

impl Part {
    /// A mapping of its own.
    pub(crate) fn alone(len: usize) -> Self {
        Home::new(len).part(len, PAGE_SIZE)
    }

    /// Where it starts.
    #[inline(always)]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Makes the page at its start one that nobody can touch.
    pub(crate) fn guard(&self) {
        if self.base.as_ptr().align_offset(PAGE_SIZE) == 0 && self.len >= PAGE_SIZE {
            // SAFETY: a page of its own. If it fails there is no guard, and all else works.
            unsafe { libc::mprotect(self.base.as_ptr().cast(), PAGE_SIZE, libc::PROT_NONE) };
        }
    }
}

/// A mapping that is handed out in parts.
pub(crate) struct Home {
    mapping: Arc<Mapping>,
    used: usize,
}

impl Home {
    /// One of so many bytes.
    pub(crate) fn new(len: usize) -> Self {
        Self {
            mapping: Arc::new(Mapping::new(len)),
            used: 0,
        }
    }

    /// The next part, aligned as told (up to a page). One that doesn't fit is a mapping of its own.
    pub(crate) fn part(&mut self, len: usize, align: usize) -> Part {
        let start = self.used.next_multiple_of(align);
        if start + len > self.mapping.len {
            return Self::new(len).part(len, align);
        }
        self.used = start + len;
        Part {
            // SAFETY: within the mapping, as just seen.
            base: unsafe { self.mapping.base.add(start) },
            len,
            _mapping: self.mapping.clone(),
        }
    }
}

/// A table of `2^n` entries; indices wrap around.
pub(crate) struct Table<T> {
    first: NonNull<T>,
    mask: usize,
    _part: Part,
    _entries: PhantomData<T>,
}

// SAFETY: it owns its entries, like a box.
unsafe impl<T: Send> Send for Table<T> {}

impl<T: Zeroed> Table<T> {
    /// A table of zeros: in the processor's home if there is one, else in a mapping of its own. `entries`
    /// is rounded up to a power of two.
    pub(crate) fn new(home: Option<&mut Home>, entries: usize) -> Self {
        const { assert!(!std::mem::needs_drop::<T>() && align_of::<T>() <= PAGE_SIZE) };
        let entries = entries.next_power_of_two();
        let len = entries * size_of::<T>();
        let part = match home {
            // So that few entries are in few pages.
            Some(home) => home.part(len, len.min(PAGE_SIZE)),
            None => Part::alone(len),
        };
        Self {
            first: part.base().cast(),
            mask: entries - 1,
            _part: part,
            _entries: PhantomData,
        }
    }

    /// One less than there are entries.
    #[inline(always)]
    pub(crate) fn mask(&self) -> usize {
        self.mask
    }

    /// An entry.
    #[inline(always)]
    pub(crate) fn at(&self, index: usize) -> &T {
        // SAFETY: within the table, whose entries were zeros, which are values, or have been written as
        // values.
        unsafe { self.first.add(index & self.mask).as_ref() }
    }

    /// An entry, to change it.
    #[inline(always)]
    pub(crate) fn at_mut(&mut self, index: usize) -> &mut T {
        // SAFETY: as in `at`.
        unsafe { self.first.add(index & self.mask).as_mut() }
    }

    /// All of it.
    pub(crate) fn all(&self) -> &[T] {
        // SAFETY: as in `at`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.mask + 1) }
    }

    /// All of it, to change it.
    pub(crate) fn all_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `at`.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.mask + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_outlive_their_home() {
        let mut home = Home::new(3 * PAGE_SIZE);
        let guarded = home.part(PAGE_SIZE + 8, PAGE_SIZE);
        guarded.guard();
        let mut words = Table::<u64>::new(Some(&mut home), 100);
        let mut bytes = Table::<u8>::new(Some(&mut home), 64);
        // No room is left for these.
        let mut many = Table::<u64>::new(Some(&mut home), 4096);
        drop(home);
        assert_eq!((words.mask(), bytes.all().len()), (127, 64));
        assert!(words.all().iter().chain(many.all()).all(|&word| word == 0));
        words.all_mut().fill(1);
        bytes.all_mut().fill(2);
        many.all_mut().fill(3);
        assert!(words.all().iter().all(|&word| word == 1));
        assert!(bytes.all().iter().all(|&byte| byte == 2));
        *words.at_mut(128) = 5;
        assert_eq!((*words.at(0), *many.at(4095)), (5, 3));
        assert_eq!(guarded.len(), PAGE_SIZE + 8);
        // SAFETY: behind the guard, in the part.
        assert_eq!(unsafe { guarded.base().add(PAGE_SIZE).read() }, 0);
    }
}
