//! Memory for decoded code: taken from the host a stretch at a time, handed out front to back, and
//! given back all at once.
#![expect(unsafe_code, reason = "hands out memory of its own")]

use std::ptr::NonNull;

use crate::mem::home::{Home, Part};
use crate::mem::{HOST_LARGE_PAGE, PAGE_SIZE};

/// What is taken at a time, the least and the most: a fault for each page would take longer than all
/// else that is done for a block. The first of them is for a processor that begins small.
const SHORT_STRETCH: usize = 16 << 10;
const STRETCH: usize = 64 << 10;
const LONGEST_STRETCH: usize = 512 << 10;
/// What is taken before large pages are asked for: to clear one takes longer than to run what most
/// commands run.
const SMALL: usize = 4 * HOST_LARGE_PAGE;
/// What pieces are multiples of, and aligned to: a block starts with a cache line of its own.
pub(super) const UNIT: usize = 64;

/// What may lie in an arena and be had back by its index: any bytes make a value of the type, and it
/// needs no more than [`UNIT`] for its alignment.
pub(super) trait Plain: Copy {}

/// See the module's description.
pub(super) struct Arena {
    base: NonNull<u8>,
    capacity: usize,
    used: usize,
    /// As much has been asked of the host.
    taken: usize,
    /// What is asked for at a time, at least.
    stretch: usize,
    _part: Part,
}

// SAFETY: it owns its memory, like a box; what lies in it stays on the processor's thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Reserves address space for `capacity` bytes, a multiple of [`STRETCH`].
    pub(super) fn new(capacity: usize) -> Self {
        let arena = Self::of(Part::alone(capacity), STRETCH);
        // What has grown beyond that is all over the place, and asked for by address.
        let small = arena.base.align_offset(HOST_LARGE_PAGE) + SMALL;
        if let Some(rest) = capacity.checked_sub(small) {
            let start = arena.base.as_ptr().wrapping_add(small);
            // SAFETY: within the mapping, as just seen; it changes where its bytes are kept, not
            // what they are.
            unsafe { libc::madvise(start.cast(), rest, libc::MADV_HUGEPAGE) };
        }
        arena
    }

    /// A small one in the processor's home.
    pub(super) fn small(home: &mut Home, capacity: usize) -> Self {
        Self::of(home.part(capacity, PAGE_SIZE), SHORT_STRETCH)
    }

    fn of(part: Part, stretch: usize) -> Self {
        Self {
            base: part.base(),
            capacity: part.len(),
            used: 0,
            taken: 0,
            stretch,
            _part: part,
        }
    }

    /// Whether `len` more bytes fit.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.capacity - self.used >= len
    }

    /// Bytes handed out.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Leaves out the first piece, without taking memory for it.
    pub(super) fn skip_first(&mut self) {
        self.used = self.used.max(UNIT);
    }

    /// A piece of `len` bytes that nobody else has, until all is forgotten; `None` if there is no
    /// room for it.
    pub(super) fn take(&mut self, len: usize) -> Option<NonNull<u8>> {
        let len = len.next_multiple_of(UNIT);
        if !self.has_room(len) {
            return None;
        }
        // SAFETY: within the mapping, as just seen.
        let piece = unsafe { self.base.add(self.used) };
        self.used += len;
        if self.used > self.taken {
            self.take_stretch();
        }
        Some(piece)
    }

    #[cold]
    fn take_stretch(&mut self) {
        let more = (self.taken / 4).clamp(self.stretch, LONGEST_STRETCH);
        let end = (self.taken + more)
            .max(self.used)
            .next_multiple_of(self.stretch);
        let end = end.min(self.capacity);
        // SAFETY: the range is within the mapping. If the kernel doesn't know how, pages come as
        // they are touched.
        unsafe {
            libc::madvise(
                self.base.add(self.taken).as_ptr().cast(),
                end - self.taken,
                libc::MADV_POPULATE_WRITE,
            );
        }
        self.taken = end;
    }

    /// Where it starts.
    #[inline(always)]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Where a piece starts, in [`UNIT`]s from the arena's start.
    pub(super) fn index_of(&self, piece: NonNull<u8>) -> u32 {
        ((piece.as_ptr() as usize - self.base.as_ptr() as usize) / UNIT) as u32
    }

    /// The piece that starts there.
    #[inline(always)]
    pub(super) fn at(&self, index: u32) -> NonNull<u8> {
        debug_assert!(index as usize * UNIT < self.used);
        // SAFETY: indices are those of pieces, which lie within the mapping.
        unsafe { self.base.add(index as usize * UNIT) }
    }

    /// Takes a piece for a value, and gives its index.
    pub(super) fn push<T: Plain>(&mut self, value: T) -> Option<u32> {
        const { assert!(align_of::<T>() <= UNIT) };
        let piece = self.take(size_of::<T>())?;
        // SAFETY: the piece is new, large enough, and aligned.
        unsafe { piece.cast().write(value) };
        Some(self.index_of(piece))
    }

    fn place<T: Plain>(&self, index: u32) -> NonNull<T> {
        let end = index as usize * UNIT + size_of::<T>();
        assert!(end <= self.used, "an index of this arena");
        self.at(index).cast()
    }

    /// What lies at an index.
    pub(super) fn get<T: Plain>(&self, index: u32) -> &T {
        // SAFETY: within what was handed out, and any bytes will do.
        unsafe { self.place(index).as_ref() }
    }

    /// The same, to change it. It must have been pushed as such: others rely on what they have put
    /// elsewhere.
    pub(super) fn get_mut<T: Plain>(&mut self, index: u32) -> &mut T {
        // SAFETY: as in `get`.
        unsafe { self.place(index).as_mut() }
    }

    /// Forgets all pieces, and gives back what memory there is beyond `keep` bytes.
    pub(super) fn clear(&mut self, keep: usize) {
        self.used = 0;
        self.give_back_from(keep.next_multiple_of(STRETCH).min(self.capacity));
    }

    /// Forgets all pieces, and gives their memory back to the host.
    pub(super) fn give_back(&mut self) {
        self.used = 0;
        self.give_back_from(0);
    }

    fn give_back_from(&mut self, keep: usize) {
        if self.taken <= keep {
            return;
        }
        // A large page that was taken may go on behind what was asked for.
        // SAFETY: the range is within the mapping, and nothing in it is needed any more.
        unsafe {
            libc::madvise(
                self.base.as_ptr().add(keep).cast(),
                self.capacity - keep,
                libc::MADV_DONTNEED,
            );
        }
        self.taken = keep;
    }
}

/// Has the host provide the memory of a table that zeros were never written to: where pages are first
/// read, then written, that takes two faults each, and the second of them an interrupt for every other
/// processor that runs one of this process's threads.
pub(crate) fn populate<T>(table: &mut [T]) {
    let pages = table.as_mut_ptr().cast::<u8>();
    let ahead = pages.align_offset(PAGE_SIZE);
    let Some(len) = size_of_val(table).checked_sub(ahead) else {
        return;
    };
    // SAFETY: within the table, whose bytes stay what they are. If the kernel doesn't know how, pages come
    // as they are touched.
    unsafe {
        libc::madvise(
            pages.add(ahead).cast(),
            len & !(PAGE_SIZE - 1),
            libc::MADV_POPULATE_WRITE,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_come_back_empty() {
        let mut arena = Arena::new(2 * STRETCH);
        let mut pieces = Vec::new();
        while let Some(piece) = arena.take(100) {
            // SAFETY: the piece is ours alone.
            unsafe { piece.as_ptr().write_bytes(pieces.len() as u8, 100) };
            assert_eq!(arena.at(arena.index_of(piece)), piece);
            pieces.push(piece);
        }
        assert_eq!(pieces.len(), 2 * STRETCH / 100_usize.next_multiple_of(UNIT));
        for (n, piece) in pieces.iter().enumerate() {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(piece.as_ptr(), 100) };
            assert!(bytes.iter().all(|&byte| byte == n as u8));
        }
        assert!(!arena.has_room(STRETCH));
        arena.give_back();
        let again = arena.take(8).expect("room");
        assert_eq!(again, pieces[0]);
        // SAFETY: the first piece again, which is ours.
        assert_eq!(unsafe { again.cast::<u64>().read() }, 0);
        arena.clear(STRETCH);
        assert!(arena.has_room(2 * STRETCH));
    }
}
