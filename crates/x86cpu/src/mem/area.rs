//! What compiled code finds relative to its stack pointer: a frame, the first-level TLB of one
//! address space and kind of access, and the jump cache that goes with it.
//!
//! ```text
//!  guard │ room for signal handlers │ Frame │ TLB: read, write, addend, gpa │ jumps: tag, code, used
//!                                   ▲ RSP while compiled code runs
//! ```
//! The same code runs on every area, and so needs to know neither address space nor privilege.
#![expect(unsafe_code, reason = "hands out pointers into memory of its own")]

use std::ptr::NonNull;

use crate::flags::rflags;
use crate::mem::home::{Home, Part};
use crate::mem::jumps::JumpKeys;
use crate::mem::{PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};

/// Entries of a first-level TLB: of a processor that begins small, at first, and once they have turned out
/// to be too few.
const FEWEST: usize = 64;
const FEW: usize = 1024;
const MANY: usize = 8192;
/// How often each of fewer may be filled, on the average, before there are more: where two pages that
/// are used in turn have the same index, that is soon.
const PATIENCE: usize = 4;
/// Entries of a jump cache: few enough to stay in the host's, what doesn't fit is in [`super::jumps`].
const JUMPS: usize = 4096;
/// The same for a processor that begins small.
const FEW_JUMPS: usize = 256;
/// Log2 of how many of them are dropped together.
pub(crate) const JUMP_GROUP: u32 = 6;
/// Jumps are told apart by their address plus the same rotated right by so much, so that both the
/// page and the place in it count.
pub(crate) const JUMP_ROTATE: u32 = 12;
/// Pointers that a trace may keep from one of its accesses to the next.
pub(crate) const WINDOWS: usize = 32;

/// Room below the frame for the host's signal handlers (with AVX-512 and AMX state).
const SIGNAL_ROOM: usize = 64 << 10;

/// The part of an area that compiled code and its callers share.
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// Where compiled code pushes what it pushes: its stack pointer is a little behind the frame's
    /// start.
    pub pushed: [u64; 2],
    /// What PEXT takes the page number from, and with it the index in the TLB.
    pub index_mask: u64,
    /// Bits of the distance from a page's start that an access must not have; by alignment.
    pub masks: [u64; 3],
    /// The same for jumps.
    pub jump_mask: u64,
    /// Linear address of the page that the running trace is in.
    pub rip_page: u64,
    /// Address of [`crate::CpuShared::requests`].
    pub requests: u64,
    /// Guest registers that no host register is left for.
    pub r10: u64,
    pub r11: u64,
    pub r15: u64,
    /// Bases of FS and GS.
    pub fs_base: u64,
    pub gs_base: u64,
    /// Not zero if what is in the name can't be used as it is.
    pub sse_away: u8,
    pub avx_away: u8,
    pub x87_away: u8,
    /// Not zero if the guest's vector registers are in the host's.
    pub vectors_live: u8,
    /// Not zero if RFLAGS.DF is set.
    pub backwards: u8,
    /// Not zero if vector instructions are the interpreter's, or those with VEX are.
    pub sse_blocked: u8,
    pub avx_blocked: u8,
    /// Not zero if something waits for RFLAGS.IF, or the privilege level isn't 0.
    pub waiting: u8,
    /// How often a loop may go on with the pointers that it has.
    pub loop_count: u64,
    /// See [`WINDOWS`]. What is up to the first of them has the shortest displacements.
    pub windows: [u64; WINDOWS],
    /// Not zero if the privilege level isn't 0.
    pub not_kernel: u8,
    /// Not zero if STAC or CLAC has something to do.
    pub stac: u8,
    pub clac: u8,
    /// The byte of RFLAGS that has AC.
    pub alignment: u8,
    _pad: [u8; 4],
    /// Not zero if the upper half of some YMM register in the processor's state is not.
    pub uppers: u64,
    /// The frame to run with once RFLAGS.AC is the other way; 0 if that takes more than to change
    /// the frame.
    pub other: u64,
    /// What must agree, beside the address, for an instruction across two pages to be what it was.
    pub cross_key: u64,
    /// RFLAGS.IF, and the bits of a bit's number in a word of 32 and 64 bits: for PEXT.
    pub interrupt_mask: u64,
    pub bit_masks: [u64; 2],
    /// The processor.
    pub cpu: u64,
    pub host_rsp: u64,
    /// Where to go on in compiled code; where it has called from.
    pub resume: u64,
    /// The guest's flags: AH as of LAHF, AL as of SETO.
    pub flags: u32,
    /// The same, from before a division was tried.
    pub divide_flags: u32,
    /// Number of a call.
    pub number: u32,
    _pad2: u32,
    /// Target of an indirect jump.
    pub target: u64,
    /// What was in R11 when the interpreter was called.
    pub missed: u64,
    /// What was added to the registers of a string instruction.
    pub strings: [u64; 2],
    /// The last x87 instruction: its offset in the page, and its opcode from bit 16 on. Bit 32: it
    /// was in the page that the next field names, else in the running one. All ones: none.
    pub x87_note: u64,
    pub x87_page: u64,
    /// Address of its last memory operand.
    pub x87_dp: u64,
    /// Address of the function that replays.
    pub helper: u64,
    /// [`super::jumps::Jumps`], the keys of what counts there, and what its code is relative to.
    pub jumps: u64,
    pub jumps_mask: u64,
    pub jump_keys: JumpKeys,
    pub code_base: u64,
    /// The guest's RAX while that is looked at.
    pub rax: u64,
    /// The guest's flags while a loop looks its pointers up.
    pub loop_flags: u64,
    /// Where instructions are counted: how many may still run, less one; and the bit that tells that it
    /// is less, for PEXT.
    pub left: u64,
    pub sign_mask: u64,
}

/// See the module's text.
#[repr(C)]
pub(crate) struct Area {
    pub frame: Frame,
    /// Which groups of jumps may have any.
    pub jump_used: [u8; JUMPS >> JUMP_GROUP],
    /// How often entries of the TLB have been filled since it was empty.
    fills: usize,
    /// How many it has when it is empty.
    least: usize,
    /// Minus the linear page that may be read; by index.
    pub read: [u64; MANY],
    /// Minus the linear page that may be written.
    pub write: [u64; MANY],
    /// Host address minus linear address.
    pub addend: [u64; MANY],
    /// Guest-physical address of the page; bit 0 is set if all address spaces have it.
    pub gpa: [u64; MANY],
    /// Minus the linear address of a trace.
    pub jump_tag: [u64; JUMPS],
    /// Its code.
    pub jump_code: [u64; JUMPS],
}

/// Bit of [`Area::gpa`].
pub(super) const GLOBAL: u64 = 1;

/// The tag of a page whose index is neither the first nor the last.
const OTHER_PAGE: u64 = (2_u64 << PAGE_SHIFT).wrapping_neg();

/// A tag that no jump finds at `index`: zero again, but for where address 0 is looked for.
const fn no_jump(index: usize) -> u64 {
    if index == 0 { u64::MAX } else { 0 }
}

impl Area {
    fn init(&mut self, small: bool) {
        self.least = if small { FEWEST } else { FEW };
        let jumps = if small { FEW_JUMPS } else { JUMPS };
        self.frame.masks = [!PAGE_MASK, !PAGE_MASK | 15, !PAGE_MASK | 31];
        self.frame.jump_mask = jumps as u64 - 1;
        self.frame.interrupt_mask = rflags::IF;
        self.frame.bit_masks = [31, 63];
        self.frame.sign_mask = 1 << 63;
        self.set_entries(self.least);
        self.jump_tag[0] = no_jump(0);
    }

    /// The index of a jump's target.
    #[inline(always)]
    pub(crate) fn jump_index(&self, linear: u64) -> usize {
        let mask = self.frame.jump_mask as usize & (JUMPS - 1);
        linear.wrapping_add(linear.rotate_right(JUMP_ROTATE)) as usize & mask
    }

    /// Has room for as many jumps as there can be. There must be none yet.
    pub(super) fn grow_jumps(&mut self) {
        self.frame.jump_mask = JUMPS as u64 - 1;
    }

    /// How many entries there are.
    fn entries(&self) -> usize {
        ((self.frame.index_mask >> PAGE_SHIFT) as usize + 1).min(MANY)
    }

    /// Empties the TLB, which has so many entries from here on.
    fn set_entries(&mut self, entries: usize) {
        let most = entries.max(self.entries());
        self.read[..most].fill(0);
        self.write[..most].fill(0);
        self.frame.index_mask = (entries as u64 - 1) << PAGE_SHIFT;
        self.fills = 0;
        for n in [0, entries - 1] {
            self.drop_entry(n);
        }
    }

    /// The index of an address's page.
    #[inline(always)]
    pub(crate) fn index(&self, linear: u64) -> usize {
        ((linear & self.frame.index_mask) >> PAGE_SHIFT) as usize & (MANY - 1)
    }

    /// A tag that no access finds at an index. Zero would do, so that an area of zeros is empty, were it
    /// not the tag of page 0, and found by what wraps around to there.
    fn no_page(&self, index: usize) -> u64 {
        if index == 0 || index == self.entries() - 1 {
            OTHER_PAGE
        } else {
            0
        }
    }

    /// Empties the TLB.
    pub(super) fn drop_all(&mut self) {
        self.set_entries(self.least);
    }

    fn drop_entry(&mut self, n: usize) {
        self.read[n] = self.no_page(n);
        self.write[n] = self.no_page(n);
    }

    pub(super) fn drop_page(&mut self, linear: u64) {
        self.drop_entry(self.index(linear));
    }

    pub(super) fn drop_writes(&mut self) {
        let entries = self.entries();
        self.write[..entries].fill(0);
        for n in [0, entries - 1] {
            self.write[n] = self.no_page(n);
        }
    }

    pub(super) fn drop_writes_to(&mut self, gpa: u64) {
        for n in 0..self.entries() {
            if self.gpa[n] & !GLOBAL == gpa {
                self.write[n] = self.no_page(n);
            }
        }
    }

    /// Takes the pages that all address spaces have from another address space's area; all others go.
    pub(super) fn take_global(&mut self, from: &Self) {
        self.set_entries(self.least);
        for old in 0..from.entries() {
            if from.gpa[old] & GLOBAL == 0 {
                continue;
            }
            let tag = from.read[old];
            let page = tag.wrapping_neg();
            // The tag of an empty entry is that of a page of another index.
            if from.index(page) != old {
                continue;
            }
            let n = self.index(page);
            self.read[n] = tag;
            self.write[n] = if from.write[old] == tag {
                tag
            } else {
                self.no_page(n)
            };
            self.addend[n] = from.addend[old];
            self.gpa[n] = from.gpa[old];
        }
    }

    /// Enters a page for reading, and for writing if `write`; `gpa` as in [`Area::gpa`].
    pub(super) fn fill(&mut self, linear: u64, host: usize, gpa: u64, write: bool) {
        self.fills += 1;
        let entries = self.entries();
        if self.fills > entries * PATIENCE && entries != MANY {
            self.grow(if entries == FEWEST { FEW } else { MANY });
        }
        let page = linear & !PAGE_MASK;
        let tag = page.wrapping_neg();
        let n = self.index(linear);
        let keep = self.read[n] == tag && self.gpa[n] == gpa && self.write[n] == tag;
        self.read[n] = tag;
        self.write[n] = if write || keep { tag } else { self.no_page(n) };
        self.addend[n] = (host as u64).wrapping_sub(page);
        self.gpa[n] = gpa;
    }

    /// Has more entries from here on; what is known stays so. Those beyond the fewer are empty.
    fn grow(&mut self, entries: usize) {
        let before = self.entries();
        self.frame.index_mask = (entries as u64 - 1) << PAGE_SHIFT;
        self.drop_entry(entries - 1);
        for n in 0..before {
            let tag = self.read[n];
            let to = self.index(tag.wrapping_neg());
            // The tag of an empty entry is that of a page of another index.
            if to == n || to % before != n {
                continue;
            }
            self.read[to] = tag;
            if self.write[n] == tag {
                self.write[to] = tag;
            }
            self.addend[to] = self.addend[n];
            self.gpa[to] = self.gpa[n];
            self.drop_entry(n);
        }
    }

    pub(crate) fn enter_jump(&mut self, linear: u64, code: u64) {
        let n = self.jump_index(linear);
        self.jump_tag[n] = linear.wrapping_neg();
        self.jump_code[n] = code;
        self.jump_used[n >> JUMP_GROUP] = 1;
    }

    /// Forgets all jumps.
    pub(crate) fn drop_jumps(&mut self) {
        for (group, used) in self.jump_used.iter_mut().enumerate() {
            if std::mem::take(used) != 0 {
                let first = group << JUMP_GROUP;
                self.jump_tag[first..first + (1 << JUMP_GROUP)].fill(0);
            }
        }
        self.jump_tag[0] = no_jump(0);
    }
}

/// An area in memory of its own.
pub(crate) struct OwnArea {
    area: NonNull<Area>,
    _part: Part,
}

// SAFETY: it owns its memory, like a box.
unsafe impl Send for OwnArea {}

/// Bytes in front of an area: guard and room.
const FRONT: usize = PAGE_SIZE + SIGNAL_ROOM;
/// Bytes of all.
pub(super) const SIZE: usize = FRONT + size_of::<Area>();

impl OwnArea {
    pub(super) fn new() -> Self {
        Self::at(Part::alone(SIZE), false)
    }

    /// A small one.
    pub(super) fn small(home: &mut Home) -> Self {
        Self::at(home.part(SIZE, PAGE_SIZE), true)
    }

    fn at(part: Part, small: bool) -> Self {
        part.guard();
        // SAFETY: within the part, aligned, and all zeros, which make an area.
        let mut area = unsafe { part.base().add(FRONT).cast::<Area>() };
        // SAFETY: as above, and nobody else has it.
        unsafe { area.as_mut() }.init(small);
        Self { area, _part: part }
    }

    pub(crate) fn pointer(&self) -> NonNull<Area> {
        self.area
    }

    /// The area. Not while compiled code runs on it.
    pub(crate) fn get(&mut self) -> &mut Area {
        // SAFETY: within the part, which is this one's; others read it through pointers on the same
        // thread, while no method of this runs.
        unsafe { self.area.as_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_stays_so_when_there_are_more_entries() {
        stays_known(OwnArea::new(), FEW, MANY);
        stays_known(OwnArea::small(&mut Home::new(SIZE)), FEWEST, FEW);
    }

    fn stays_known(mut own: OwnArea, few: usize, many: usize) {
        let area = own.get();
        // Every index of the few, the first and the last too, in pages all over; one in three may be
        // written.
        let page = |n: usize| ((n * 37 % 64 * few + n) as u64) << PAGE_SHIFT;
        for _ in 0..PATIENCE {
            for n in 0..few {
                area.fill(page(n), 0x10_0000 + (n << PAGE_SHIFT), 0, n % 3 == 0);
            }
        }
        assert_eq!(area.entries(), few);
        let more = 5_u64 << 40;
        area.fill(more, 0x10_0000, 0, false);
        assert_eq!(area.entries(), many);
        let mut lost = 0;
        for n in 0..few {
            let tag = page(n).wrapping_neg();
            let at = area.index(page(n));
            if at == area.index(more) {
                lost += 1;
                continue;
            }
            assert_eq!(area.read[at], tag, "{n}");
            assert_eq!(area.write[at] == tag, n % 3 == 0, "{n}");
            let host = page(n).wrapping_add(area.addend[at]);
            assert_eq!(host, 0x10_0000 + ((n as u64) << PAGE_SHIFT), "{n}");
        }
        // Nothing else is found.
        let known = |at: usize| area.index(area.read[at].wrapping_neg()) == at;
        assert_eq!((0..many).filter(|&at| known(at)).count(), few + 1 - lost);
        area.drop_all();
        assert_eq!(area.entries(), few);
        assert!((0..few).all(|at| area.index(area.read[at].wrapping_neg()) != at));
    }

    #[test]
    fn a_small_one_has_room_for_all_jumps_once_it_has_grown() {
        let mut own = OwnArea::small(&mut Home::new(SIZE));
        let area = own.get();
        let find = |area: &Area, linear: u64| {
            let n = area.jump_index(linear);
            (area.jump_tag[n].wrapping_add(linear) == 0).then(|| area.jump_code[n])
        };
        let places = || (0..FEW_JUMPS as u64).map(|n| 0x40_0000 + n * 16);
        let known = |area: &Area| {
            let known = places().filter(|&linear| find(area, linear) == Some(linear + 1));
            known.count()
        };
        places().for_each(|linear| area.enter_jump(linear, linear + 1));
        assert!((1..FEW_JUMPS / 2).contains(&known(area)), "{}", known(area));
        area.drop_jumps();
        area.grow_jumps();
        assert_eq!((known(area), find(area, 0)), (0, None));
        places().for_each(|linear| area.enter_jump(linear, linear + 1));
        assert_eq!(known(area), FEW_JUMPS);
        area.drop_jumps();
        assert_eq!(known(area), 0);
    }
}
