//! The page walk (Intel SDM 3A chapter 5): linear to guest-physical address, permissions, accessed
//! and dirty bits.
#![expect(
    unsafe_code,
    reason = "page tables are guest memory, which other processors change meanwhile"
)]

use crate::mem::memory::{RamPage, SlotTable};
use crate::mem::tlb::Mapping;
use crate::mem::{Int, PAGE_MASK};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code (SDM 3A figure 5-12).
pub(super) mod code {
    pub const PROTECTION: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// Which page tables there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Levels {
    /// CR0.PG is clear: linear addresses are physical.
    #[default]
    None,
    /// 32-bit entries, two levels.
    Legacy,
    /// PAE: 64-bit entries, two levels below four registers.
    Pae,
    /// 4-level paging.
    Four,
}

/// What CR0, CR4 and EFER say about paging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Paging {
    pub levels: Levels,
    /// CR0.WP.
    pub write_protect: bool,
    /// EFER.NXE, where entries have that bit.
    pub no_execute: bool,
    pub smep: bool,
    pub smap: bool,
    /// CR4.PGE.
    pub global: bool,
    /// CR4.PSE.
    pub pse: bool,
    /// CR4.PCIDE.
    pub pcid: bool,
    /// CPUID: 1 GiB pages.
    pub gigabyte: bool,
    /// Bits of guest-physical addresses.
    pub physical_bits: u8,
}

/// What an access asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wants {
    pub write: bool,
    pub fetch: bool,
    pub user: bool,
    /// A supervisor access that SMAP lets through to user pages (RFLAGS.AC).
    pub through_smap: bool,
}

impl Paging {
    /// Whether a page with these rights may be accessed so (SDM 3A §5.6.1).
    pub(super) fn allows(&self, page: &Mapping, wants: Wants) -> bool {
        if wants.user && !page.user {
            return false;
        }
        if !wants.user && page.user {
            let forbidden = if wants.fetch {
                self.smep
            } else {
                self.smap && !wants.through_smap
            };
            if forbidden {
                return false;
            }
        }
        if wants.write && !page.writable && (wants.user || self.write_protect) {
            return false;
        }
        !wants.fetch || page.executable
    }

    /// The part of the error code that comes from the access.
    pub(super) fn error_code(&self, wants: Wants) -> u32 {
        let mut bits = 0;
        if wants.write {
            bits |= code::WRITE;
        }
        if wants.user {
            bits |= code::USER;
        }
        if wants.fetch && (self.smep || self.no_execute) {
            bits |= code::FETCH;
        }
        bits
    }

    fn reserved_address_bits(&self) -> u64 {
        ADDRESS & !((1u64 << self.physical_bits.clamp(32, 52)) - 1)
    }
}

/// An entry as read, and where it can be written back.
struct Slot<'a> {
    page: Option<RamPage<'a>>,
    offset: u64,
    wide: bool,
}

impl<'a> Slot<'a> {
    fn new(slots: &'a SlotTable, address: u64, wide: bool) -> Self {
        let page = slots.page(address);
        if let Some(page) = &page {
            page.state.note_table();
        }
        Self {
            page,
            offset: address & PAGE_MASK,
            wide,
        }
    }

    /// The entry; all ones where there is no memory, as an empty bus reads.
    fn read(&self) -> u64 {
        let Some(page) = &self.page else {
            return u64::MAX;
        };
        let at = page.host + self.offset as usize;
        // SAFETY: within a page of RAM that its slot keeps mapped; entries don't cross pages.
        unsafe {
            if self.wide {
                u64::read(at)
            } else {
                u64::from(u32::read(at))
            }
        }
    }

    /// Sets bits; `false` if the entry is no longer `expected`.
    fn set(&self, expected: u64, bits: u64) -> bool {
        if expected & bits == bits {
            return true;
        }
        let Some(page) = &self.page else {
            return true;
        };
        if page.read_only {
            return true;
        }
        page.log_write();
        let at = page.host + self.offset as usize;
        // SAFETY: as in `read`; the slot is writable.
        let done = unsafe {
            if self.wide {
                u64::compare_exchange(at, expected, expected | bits) == expected
            } else {
                let old = expected as u32;
                u32::compare_exchange(at, old, old | bits as u32) == old
            }
        };
        if page.state.is_code() {
            page.state
                .wrote(self.offset as usize, if self.wide { 8 } else { 4 });
        }
        done
    }
}

/// Where a walk ends.
pub(super) struct Walked {
    pub mapping: Mapping,
    /// Log2 of the page's size.
    pub shift: u32,
}

/// One level's share of a walk.
struct Level {
    /// Lowest bit of the index.
    shift: u32,
    /// Bits that must be clear in any entry.
    reserved: u64,
    /// An entry may map a page here although it isn't the last level.
    may_be_large: bool,
}

enum Step {
    Done(Result<Walked, u32>),
    /// Somebody changed an entry: once more from the root.
    Again,
}

/// Translates; the error is the page fault's error code.
pub(super) fn walk(
    slots: &SlotTable,
    paging: &Paging,
    cr3: u64,
    pdptes: &[u64; 4],
    linear: u64,
    wants: Wants,
) -> Result<Walked, u32> {
    // Every retry means that another processor has made progress.
    loop {
        let step = match paging.levels {
            Levels::None => {
                return Ok(Walked {
                    mapping: Mapping {
                        gpa: linear & ADDRESS,
                        writable: true,
                        user: true,
                        executable: true,
                        dirty: true,
                        global: false,
                    },
                    shift: 12,
                });
            }
            Levels::Legacy => legacy(slots, paging, cr3, linear, wants),
            Levels::Pae => {
                let pdpte = pdptes[(linear >> 30) as usize & 3];
                if pdpte & PRESENT == 0 {
                    return Err(paging.error_code(wants));
                }
                wide(slots, paging, pdpte & ADDRESS, 2, linear, wants)
            }
            Levels::Four => wide(slots, paging, cr3 & ADDRESS, 4, linear, wants),
        };
        if let Step::Done(result) = step {
            return result;
        }
    }
}

fn level(paging: &Paging, number: u32) -> Level {
    let mut reserved = paging.reserved_address_bits();
    if !paging.no_execute {
        reserved |= NO_EXECUTE;
    }
    if paging.levels == Levels::Pae {
        reserved |= 0x7ff0_0000_0000_0000;
    }
    let may_be_large = number == 2 || (number == 3 && paging.gigabyte);
    if number == 4 || (number == 3 && !paging.gigabyte) {
        reserved |= LARGE;
    }
    Level {
        shift: 12 + 9 * (number - 1),
        reserved,
        may_be_large,
    }
}

/// 64-bit entries, from level `number` down.
fn wide(
    slots: &SlotTable,
    paging: &Paging,
    mut table: u64,
    mut number: u32,
    linear: u64,
    wants: Wants,
) -> Step {
    let mut rights = WRITABLE | USER;
    let mut executable = true;
    loop {
        let level = level(paging, number);
        let index = (linear >> level.shift) & 0x1ff;
        let slot = Slot::new(slots, table + index * 8, true);
        let entry = slot.read();
        if entry & PRESENT == 0 {
            return Step::Done(Err(paging.error_code(wants)));
        }
        let large = level.may_be_large && entry & LARGE != 0;
        let mut reserved = level.reserved;
        if large {
            // Between the PAT bit and the page's address (SDM 3A table 5-18).
            reserved |= ((1u64 << level.shift) - 1) & !0x1fff;
        }
        if entry & reserved != 0 {
            let bits = code::PROTECTION | code::RESERVED;
            return Step::Done(Err(paging.error_code(wants) | bits));
        }
        rights &= entry;
        executable &= entry & NO_EXECUTE == 0;
        if number == 1 || large {
            let inside = (1u64 << level.shift) - 1;
            let mapping = Mapping {
                gpa: ((entry & ADDRESS & !inside) | (linear & inside)) & !PAGE_MASK,
                writable: rights & WRITABLE != 0,
                user: rights & USER != 0,
                executable,
                dirty: entry & DIRTY != 0,
                global: paging.global && entry & GLOBAL != 0,
            };
            return finish(paging, &slot, entry, mapping, level.shift, wants);
        }
        if !slot.set(entry, ACCESSED) {
            return Step::Again;
        }
        table = entry & ADDRESS;
        number -= 1;
    }
}

/// 32-bit entries (SDM 3A §5.3).
fn legacy(slots: &SlotTable, paging: &Paging, cr3: u64, linear: u64, wants: Wants) -> Step {
    let not_present = Step::Done(Err(paging.error_code(wants)));
    let directory = (cr3 & 0xffff_f000) | ((linear >> 20) & 0xffc);
    let slot = Slot::new(slots, directory, false);
    let entry = slot.read() & 0xffff_ffff;
    if entry & PRESENT == 0 {
        return not_present;
    }
    let made = |entry: u64, rights: u64, gpa: u64| Mapping {
        gpa: gpa & !PAGE_MASK,
        writable: rights & WRITABLE != 0,
        user: rights & USER != 0,
        executable: true,
        dirty: entry & DIRTY != 0,
        global: paging.global && entry & GLOBAL != 0,
    };
    if entry & LARGE != 0 && paging.pse {
        // PSE-36: bits 13 to 20 are bits 32 to 39 of the address; bit 21 is reserved.
        let high = ((entry >> 13) & 0xff) << 32;
        if entry & (1 << 21) != 0 || high & paging.reserved_address_bits() != 0 {
            let bits = code::PROTECTION | code::RESERVED;
            return Step::Done(Err(paging.error_code(wants) | bits));
        }
        let gpa = high | (entry & 0xffc0_0000) | (linear & 0x003f_ffff);
        return finish(paging, &slot, entry, made(entry, entry, gpa), 22, wants);
    }
    if !slot.set(entry, ACCESSED) {
        return Step::Again;
    }
    let table = (entry & 0xffff_f000) | ((linear >> 10) & 0xffc);
    let slot = Slot::new(slots, table, false);
    let last = slot.read() & 0xffff_ffff;
    if last & PRESENT == 0 {
        return not_present;
    }
    let mapping = made(last, entry & last, last & 0xffff_f000);
    finish(paging, &slot, last, mapping, 12, wants)
}

/// Checks rights, then sets the accessed and dirty bits of the entry that maps the page.
fn finish(
    paging: &Paging,
    slot: &Slot<'_>,
    entry: u64,
    mut mapping: Mapping,
    shift: u32,
    wants: Wants,
) -> Step {
    if !paging.allows(&mapping, wants) {
        return Step::Done(Err(paging.error_code(wants) | code::PROTECTION));
    }
    let bits = if wants.write {
        ACCESSED | DIRTY
    } else {
        ACCESSED
    };
    if !slot.set(entry, bits) {
        return Step::Again;
    }
    mapping.dirty |= wants.write;
    Step::Done(Ok(Walked { mapping, shift }))
}

/// The entries that PAE paging loads into registers with CR3 (SDM 3A §5.4.1); `None` if one is
/// present and has reserved bits set.
pub(super) fn load_pdptes(slots: &SlotTable, paging: &Paging, cr3: u64) -> Option<[u64; 4]> {
    let mut loaded = [0; 4];
    let reserved = paging.reserved_address_bits() | 0xfff0_0000_0000_01e6;
    for (i, pdpte) in loaded.iter_mut().enumerate() {
        *pdpte = Slot::new(slots, (cr3 & 0xffff_ffe0) + i as u64 * 8, true).read();
        if *pdpte & PRESENT != 0 && *pdpte & reserved != 0 {
            return None;
        }
    }
    Some(loaded)
}
