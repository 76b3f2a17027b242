//! The second level of jump caches: where compiled code has the jumps of all address spaces. It looks
//! itself, before the interpreter is asked.

use crate::mem::home::{Home, Table, Zeroed};

/// Entries, a power of two; of a processor that begins small.
const JUMPS: usize = 1 << 15;
const FEW: usize = 1 << 8;
/// Bits of a key below the epoch.
const SPACE_BITS: u32 = 13;

/// How an address is turned into an index: it, and it shifted right by so much, one to the other.
pub(crate) const SHIFT: u32 = 15;
/// An odd number: one address space's jumps come so far from the next one's.
const SPREAD: u32 = 0x9e5;

fn index(linear: u64, keys: JumpKeys) -> usize {
    ((linear ^ linear >> SHIFT) as u32 ^ keys.salt) as usize
}

/// One jump: what must agree, and where it leads.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Jump {
    pub linear: u64,
    pub key: u32,
    /// Distance from the start of the code buffer.
    pub code: u32,
}

const _: () = assert!(size_of::<Jump>() == 16);

// SAFETY: numbers all of it.
#[expect(unsafe_code, reason = "a table of it begins as zeros")]
unsafe impl Zeroed for Jump {}

/// What must agree beside the address: for a page of the current address space, and for one of all.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct JumpKeys {
    pub own: u32,
    pub global: u32,
    /// What the index is XORed with: processes that run the same program aren't in each other's way, while
    /// the kernel's code is in one place for all.
    pub salt: u32,
}

/// See the module's text.
pub(crate) struct Jumps {
    entries: Table<Jump>,
    /// Counts how often all were dropped. What of it is in a key is never 0, which empty entries have.
    epoch: u64,
}

impl Jumps {
    /// Bytes of a small one.
    pub(super) const FEW_BYTES: usize = FEW * size_of::<Jump>();

    /// Empty: small, in the processor's home, if it has one.
    pub(super) fn new(home: Option<&mut Home>) -> Self {
        let entries = if home.is_some() { FEW } else { JUMPS };
        Self {
            entries: Table::new(home, entries),
            epoch: 1,
        }
    }

    /// What an index is cut down to.
    pub(super) fn mask(&self) -> u32 {
        self.entries.mask() as u32
    }

    /// The key for code of an address space and privilege: of all that there have been, no other has it.
    pub(super) fn key(&self, asid: u16, user: bool) -> u64 {
        self.epoch << SPACE_BITS | u64::from(user) << (SPACE_BITS - 1) | u64::from(asid)
    }

    /// The keys for its jumps.
    pub(super) fn keys(&self, asid: u16, user: bool) -> JumpKeys {
        JumpKeys {
            own: self.key(asid, user) as u32,
            global: self.key(0, user) as u32,
            salt: u32::from(user) * u32::from(asid) * SPREAD,
        }
    }

    /// Where it is.
    pub(super) fn base(&self) -> u64 {
        self.entries.all().as_ptr() as u64
    }

    /// Has jumps to a linear address, which is on a page of all address spaces if `everywhere`, go to
    /// `code`.
    pub(super) fn enter(&mut self, linear: u64, keys: JumpKeys, everywhere: bool, code: u32) {
        let key = if everywhere { keys.global } else { keys.own };
        *self.entries.at_mut(index(linear, keys)) = Jump { linear, key, code };
    }

    /// The code of a jump, as compiled code looks for it.
    pub(super) fn find(&self, linear: u64, keys: JumpKeys) -> Option<u32> {
        let entry = self.entries.at(index(linear, keys));
        let known = entry.key == keys.own || entry.key == keys.global;
        (entry.linear == linear && known).then_some(entry.code)
    }

    /// Drops all.
    pub(super) fn clear(&mut self) {
        self.epoch += 1;
        if (self.epoch << SPACE_BITS) as u32 == 0 {
            self.entries.all_mut().fill(Jump::default());
            self.epoch += 1;
        }
    }

    /// Takes the memory for all of it.
    pub(super) fn populate(&mut self) {
        crate::code::populate(self.entries.all_mut());
    }

    /// Drops all, and gives the memory back; what was small has its full size from here on.
    pub(super) fn give_back(&mut self) {
        self.entries = Table::new(None, JUMPS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_privileges_and_epochs_are_apart() {
        let mut jumps = Jumps::new(None);
        let kernel = jumps.keys(7, false);
        assert_eq!(jumps.find(0, kernel), None, "an empty table has nothing");
        jumps.enter(0x1234, kernel, false, 1);
        jumps.enter(0x5678, kernel, true, 2);
        assert_eq!(jumps.find(0x1234, kernel), Some(1));
        assert_eq!(jumps.find(0x1234, jumps.keys(8, false)), None);
        assert_eq!(jumps.find(0x1234, jumps.keys(7, true)), None);
        assert_eq!(jumps.find(0x5678, jumps.keys(8, false)), Some(2));
        assert_eq!(jumps.find(0x5678, jumps.keys(8, true)), None);
        let first = jumps.key(7, false);
        // So often that the epochs start over in the table's keys.
        for _ in 0..1_u32 << (u32::BITS - SPACE_BITS) {
            jumps.clear();
            assert_eq!(jumps.find(0x1234, jumps.keys(7, false)), None);
            assert_ne!(jumps.key(7, false), first);
        }
    }
}
