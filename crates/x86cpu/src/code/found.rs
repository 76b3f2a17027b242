//! What was found under a key last: a table beside the lists of blocks, which takes one look.
use std::cell::Cell;

use super::arena::populate;
use super::cache::KEY_SHIFT;
use super::directory::granule;
use crate::mem::PAGE_SHIFT;
use crate::mem::home::{Home, Table, Zeroed};

/// Entries of the table; of a processor that begins small.
const ENTRIES: usize = 1 << 16;
const FEW: usize = 1 << 8;

/// What was found under a key, or will be: all zeros is nothing.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Entry {
    key: u64,
    /// Index in the arena.
    block: u32,
    /// Offset in the buffer of the code for jumps to the block; 0 if none is known. What is there leads on
    /// though the trace is gone, as what the jump caches have does.
    code: u32,
}

const _: () = assert!(size_of::<Entry>() == 16);

// SAFETY: zeros are key 0, and no block.
#[expect(unsafe_code, reason = "a table of it begins as zeros")]
unsafe impl Zeroed for Cell<Entry> {}

/// Blocks and their code by key, each where its key's hash says.
pub(super) struct Found(Table<Cell<Entry>>);

impl Found {
    /// Bytes of a small one.
    pub(super) const FEW_BYTES: usize = FEW * size_of::<Entry>();

    /// Empty: small, in the processor's home, if it has one. It takes memory as it is touched.
    pub(super) fn new(home: Option<&mut Home>) -> Self {
        let entries = if home.is_some() { FEW } else { ENTRIES };
        Self(Table::new(home, entries))
    }

    pub(super) fn clear(&mut self) {
        self.0.all_mut().fill(Cell::default());
    }

    /// Takes the memory for all of it.
    pub(super) fn populate(&mut self) {
        populate(self.0.all_mut());
    }

    #[inline(always)]
    fn slot(&self, key: u64) -> &Cell<Entry> {
        self.0.at(index(key))
    }

    /// The block under a key.
    #[inline(always)]
    pub(super) fn block(&self, key: u64) -> Option<u32> {
        let entry = self.slot(key).get();
        (entry.key == key && entry.block != 0).then_some(entry.block)
    }

    /// Takes note of a block.
    pub(super) fn note(&self, key: u64, block: u32) {
        let code = 0;
        self.slot(key).set(Entry { key, block, code });
    }

    /// The code for jumps to the block under a key.
    pub(super) fn code(&self, key: u64) -> Option<u32> {
        let entry = self.slot(key).get();
        (entry.key == key && entry.code != 0).then_some(entry.code)
    }

    /// Takes note of it, if the block is here.
    pub(super) fn note_code(&self, key: u64, code: u32) {
        let slot = self.slot(key);
        let entry = slot.get();
        if entry.key == key && entry.block != 0 {
            slot.set(Entry { code, ..entry });
        }
    }

    /// Forgets all code, but not the blocks.
    pub(super) fn forget_codes(&self) {
        for slot in self.0.all() {
            let entry = slot.get();
            if entry.code != 0 {
                slot.set(Entry { code: 0, ..entry });
            }
        }
    }
}

/// Blocks of one granule are in one cache line, and those of one page in as much as a page: who asks for
/// one asks for its neighbours next.
#[inline(always)]
fn index(key: u64) -> usize {
    let gpa = key >> KEY_SHIFT;
    let hash = (gpa >> PAGE_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let line = hash ^ granule(gpa) as u64;
    (line << 2 | gpa >> 4 & 3) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_found_until_another_takes_its_place() {
        let mut found = Found::new(None);
        let key = |n: u64| (0x1000_0000 + n * 0x11) << KEY_SHIFT | 3;
        for n in 0..1000 {
            found.note_code(key(n), 5);
            assert_eq!((found.block(key(n)), found.code(key(n))), (None, None));
            found.note(key(n), n as u32 + 1);
            assert_eq!(found.block(key(n)), Some(n as u32 + 1));
            assert_eq!(found.code(key(n)), None);
            found.note_code(key(n), 7);
        }
        // Most are there still, and none is another's.
        let kept = (0..1000).filter(|&n| found.block(key(n)) == Some(n as u32 + 1));
        let kept: Vec<u64> = kept.collect();
        assert!(kept.len() > 900, "{}", kept.len());
        assert!(kept.iter().all(|&n| found.code(key(n)) == Some(7)));
        assert_eq!(found.block(key(kept[0]) ^ 1), None);
        found.forget_codes();
        assert!(
            kept.iter()
                .all(|&n| found.code(key(n)).is_none() && found.block(key(n)).is_some())
        );
        found.clear();
        assert!(kept.iter().all(|&n| found.block(key(n)).is_none()));
    }
}
