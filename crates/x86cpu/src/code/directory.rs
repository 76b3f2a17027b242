//! Which pages have blocks: lists of them by page and granule of 64 bytes, so that what lies together
//! in guest memory does so here.

use crate::code::arena::{Arena, Plain};

/// Log2 of the bytes of code that share a list.
const GRANULE_SHIFT: u32 = 6;
const LISTS: usize = 4096 >> GRANULE_SHIFT;
/// Slots at first, a power of two.
const SLOTS: usize = 32;

/// The blocks of a granule.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct List {
    /// Bit per byte at which one starts: most lookups end here.
    pub(super) starts: u64,
    /// The first, by its index in the arena; 0 for none.
    pub(super) first: u32,
    _pad: u32,
}

impl List {
    /// The bit of a guest-physical address.
    pub(super) fn bit(gpa: u64) -> u64 {
        1 << (gpa & ((1 << GRANULE_SHIFT) - 1))
    }
}

/// The lists of a page.
pub(super) type Lists = [List; LISTS];

impl Plain for Lists {}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Number of the page plus one; 0 for none.
    page: u64,
    /// Its lists, by their index in the arena.
    lists: u32,
}

/// See the module's description.
pub(super) struct Directory {
    /// Open addressing, at most half full.
    slots: Box<[Slot]>,
    used: usize,
}

/// Which list of its page is that of the block at a guest-physical address.
pub(super) fn granule(gpa: u64) -> usize {
    (gpa >> GRANULE_SHIFT) as usize & (LISTS - 1)
}

impl Directory {
    pub(super) fn new() -> Self {
        Self {
            slots: vec![Slot::default(); SLOTS].into_boxed_slice(),
            used: 0,
        }
    }

    /// The slot of a page, or that where it would be.
    fn slot(&self, page: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & mask;
        loop {
            let found = self.slots[at].page;
            if found == 0 || found == page + 1 {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// Where the lists of a page are in the arena.
    pub(super) fn find(&self, page: u64) -> Option<u32> {
        let slot = &self.slots[self.slot(page)];
        (slot.page != 0).then_some(slot.lists)
    }

    /// The same; takes some of the arena if the page has none. `None` if that is full.
    pub(super) fn of(&mut self, page: u64, arena: &mut Arena) -> Option<u32> {
        if let Some(lists) = self.find(page) {
            return Some(lists);
        }
        if (self.used + 1) * 2 > self.slots.len() {
            self.grow();
        }
        let lists = arena.push::<Lists>([List::default(); LISTS])?;
        let at = self.slot(page);
        self.slots[at] = Slot {
            page: page + 1,
            lists,
        };
        self.used += 1;
        Some(lists)
    }

    fn grow(&mut self) {
        let slots = vec![Slot::default(); self.slots.len() * 2].into_boxed_slice();
        for old in std::mem::replace(&mut self.slots, slots) {
            if let Some(page) = old.page.checked_sub(1) {
                let at = self.slot(page);
                self.slots[at] = old;
            }
        }
    }

    /// Forgets all, as the arena has done.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_among_many() {
        let mut arena = Arena::new(8 << 20);
        let mut directory = Directory::new();
        let page = |n: u64| n * 0x1001 % 0x000f_ffff_ffff;
        assert!(directory.find(0).is_none());
        for n in 0..3000 {
            let lists = directory.of(page(n), &mut arena).expect("room");
            let lists = arena.get_mut::<Lists>(lists);
            lists[granule(n << 6)].first = n as u32 + 1;
        }
        for n in 0..3000 {
            let lists = arena.get::<Lists>(directory.find(page(n)).expect("entered"));
            assert_eq!(lists[(n & 63) as usize].first, n as u32 + 1);
            assert_eq!(lists.iter().filter(|list| list.first != 0).count(), 1);
            assert!(directory.find(page(n) + 1).is_none());
        }
        while directory
            .of(arena.used() as u64 + (1 << 40), &mut arena)
            .is_some()
        {}
        arena.clear(0);
        directory.clear();
        assert!(directory.find(page(1)).is_none());
    }
}
