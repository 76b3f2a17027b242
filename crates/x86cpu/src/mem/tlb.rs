//! The software TLBs: a direct-mapped first level per kind of access, one second level behind.
#![expect(
    unsafe_code,
    reason = "the first level is reached through a pointer in the processor's hot part"
)]

use std::ptr::NonNull;

use crate::mem::{PAGE_MASK, PAGE_SHIFT};

/// Entries of each first-level table.
const FIRST: usize = 1024;
/// Entries of the second level.
const SECOND: usize = 4096;
/// Matches no address: there is no address space 0. Tables of it needn't be written when they are made.
const NEVER: u64 = 0;
/// Numbers of address spaces: 1 to this.
pub(super) const LAST_ASID: u16 = 0xffe;

/// A page that the first level translates. The JIT will read it too: 32 bytes, this order.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Entry {
    /// Linear page address and address space, if reads may go ahead.
    pub read: u64,
    /// The same for writes.
    pub write: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Guest-physical address of the page.
    pub gpa: u64,
}

const EMPTY: Entry = Entry {
    read: NEVER,
    write: NEVER,
    addend: 0,
    gpa: 0,
};

/// What the fast path needs: the table in use and the tag of the current address space.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TlbView {
    table: NonNull<Entry>,
    asid: u64,
}

// SAFETY: the pointer is to a table that the same `Cpu` owns and moves with it; nobody else has it.
unsafe impl Send for TlbView {}

impl TlbView {
    /// Translates a read of `size` bytes that stays within one page of RAM.
    #[inline(always)]
    pub(crate) fn read(&self, linear: u64, size: usize) -> Option<usize> {
        // SAFETY: the index is within the table, which lives as long as the processor.
        let entry = unsafe { self.table.add(index(linear)).as_ref() };
        if entry.read == self.tag(linear, size) {
            Some(linear.wrapping_add(entry.addend) as usize)
        } else {
            None
        }
    }

    /// The same for a write.
    #[inline(always)]
    pub(crate) fn write(&self, linear: u64, size: usize) -> Option<usize> {
        // SAFETY: as in `read`.
        let entry = unsafe { self.table.add(index(linear)).as_ref() };
        if entry.write == self.tag(linear, size) {
            Some(linear.wrapping_add(entry.addend) as usize)
        } else {
            None
        }
    }

    /// The tag of the page of the access's last byte: an access that crosses into the next page
    /// finds the entry of the page before, and misses.
    #[inline(always)]
    fn tag(&self, linear: u64, size: usize) -> u64 {
        (linear.wrapping_add(size as u64 - 1) & !PAGE_MASK) | self.asid
    }
}

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear >> PAGE_SHIFT) as usize & (FIRST - 1)
}

/// Which first-level table serves an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// Supervisor; user pages are out of bounds under SMAP.
    Supervisor = 0,
    /// User.
    User = 1,
    /// Supervisor with RFLAGS.AC set.
    SupervisorAc = 2,
    /// Stays empty: every access takes the slow path.
    Slow = 3,
}

/// The first level.
pub(super) struct FirstLevel {
    tables: NonNull<[[Entry; FIRST]; 4]>,
}

// SAFETY: it owns its memory, like a box.
unsafe impl Send for FirstLevel {}

impl FirstLevel {
    pub(super) fn new() -> Self {
        // SAFETY: entries of zeros are `EMPTY`.
        let tables = unsafe { Box::<[[Entry; FIRST]; 4]>::new_zeroed().assume_init() };
        Self {
            // Kept as a pointer, because views of it are around.
            tables: NonNull::from(Box::leak(tables)),
        }
    }

    fn table(&mut self, table: Table) -> &mut [Entry; FIRST] {
        // SAFETY: allocated in `new`, freed in `drop` only; views read it on the same thread, while
        // no method of this runs.
        unsafe { &mut self.tables.as_mut()[table as usize] }
    }

    pub(super) fn view(&self, table: Table, asid: u16) -> TlbView {
        TlbView {
            // SAFETY: within the allocation: there are four tables.
            table: unsafe { self.tables.cast::<Entry>().add(table as usize * FIRST) },
            asid: u64::from(asid),
        }
    }

    /// Enters a page for reading, and for writing if `write`.
    pub(super) fn fill(
        &mut self,
        table: Table,
        asid: u16,
        linear: u64,
        host: usize,
        gpa: u64,
        write: bool,
    ) {
        let page = linear & !PAGE_MASK;
        let tag = page | u64::from(asid);
        let entry = &mut self.table(table)[index(linear)];
        let keep = entry.read == tag && entry.gpa == gpa;
        *entry = Entry {
            read: tag,
            write: if write || (keep && entry.write == tag) {
                tag
            } else {
                NEVER
            },
            addend: (host as u64).wrapping_sub(page),
            gpa,
        };
    }

    /// Drops a linear page, whatever its address space.
    pub(super) fn drop_page(&mut self, linear: u64) {
        for table in [Table::Supervisor, Table::User, Table::SupervisorAc] {
            self.table(table)[index(linear)] = EMPTY;
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        for table in [Table::Supervisor, Table::User, Table::SupervisorAc] {
            self.table(table).fill(EMPTY);
        }
    }

    /// Makes every write take the slow path once more.
    pub(super) fn drop_writes(&mut self) {
        for table in [Table::Supervisor, Table::User, Table::SupervisorAc] {
            for entry in self.table(table) {
                entry.write = NEVER;
            }
        }
    }

    /// Makes writes to one guest-physical page take the slow path.
    pub(super) fn drop_writes_to(&mut self, gpa: u64) {
        for table in [Table::Supervisor, Table::User, Table::SupervisorAc] {
            for entry in self.table(table) {
                if entry.gpa == gpa {
                    entry.write = NEVER;
                }
            }
        }
    }
}

impl Drop for FirstLevel {
    fn drop(&mut self) {
        // SAFETY: from `Box::leak` in `new`; views of it are not used any more.
        drop(unsafe { Box::from_raw(self.tables.as_ptr()) });
    }
}

/// What a page walk found out about a 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// All levels allow writes.
    pub writable: bool,
    /// All levels allow user accesses.
    pub user: bool,
    /// No level forbids execution.
    pub executable: bool,
    /// The dirty bit is set (or there is none).
    pub dirty: bool,
    /// Survives a change of address space.
    pub global: bool,
}

const WRITABLE: u64 = 1 << 0;
const USER: u64 = 1 << 1;
const EXECUTABLE: u64 = 1 << 2;
const DIRTY: u64 = 1 << 3;
const GLOBAL: u64 = 1 << 4;

/// The second level: the outcome of walks, for all kinds of access.
pub(super) struct SecondLevel {
    entries: Box<[(u64, u64)]>,
}

impl SecondLevel {
    pub(super) fn new() -> Self {
        Self {
            entries: vec![(NEVER, 0); SECOND].into_boxed_slice(),
        }
    }

    fn slot(linear: u64, asid: u16) -> usize {
        let page = linear >> PAGE_SHIFT;
        // User and kernel stacks and text tend to agree in their low bits, and so do the pages of
        // several processes.
        (page ^ (page >> 12) ^ (u64::from(asid) * 0x9e5)) as usize & (SECOND - 1)
    }

    fn value(&self, linear: u64, asid: u16) -> Option<u64> {
        let (tag, value) = self.entries[Self::slot(linear, asid)];
        (tag == (linear & !PAGE_MASK) | u64::from(asid)).then_some(value)
    }

    /// Finds a page in address space `asid` or among the global ones, which are under `global`.
    pub(super) fn find(&self, linear: u64, asid: u16, global: u16) -> Option<Mapping> {
        let value = self
            .value(linear, asid)
            .or_else(|| self.value(linear, global))?;
        Some(Mapping {
            gpa: value & !PAGE_MASK,
            writable: value & WRITABLE != 0,
            user: value & USER != 0,
            executable: value & EXECUTABLE != 0,
            dirty: value & DIRTY != 0,
            global: value & GLOBAL != 0,
        })
    }

    /// Enters a page.
    pub(super) fn fill(&mut self, linear: u64, asid: u16, mapping: &Mapping) {
        let pick = |on: bool, bit: u64| if on { bit } else { 0 };
        let value = mapping.gpa
            | pick(mapping.writable, WRITABLE)
            | pick(mapping.user, USER)
            | pick(mapping.executable, EXECUTABLE)
            | pick(mapping.dirty, DIRTY)
            | pick(mapping.global, GLOBAL);
        self.entries[Self::slot(linear, asid)] = ((linear & !PAGE_MASK) | u64::from(asid), value);
    }

    /// Drops a linear page of an address space.
    pub(super) fn drop_page(&mut self, linear: u64, asid: u16) {
        let entry = &mut self.entries[Self::slot(linear, asid)];
        if entry.0 == (linear & !PAGE_MASK) | u64::from(asid) {
            entry.0 = NEVER;
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.entries.fill((NEVER, 0));
    }
}
