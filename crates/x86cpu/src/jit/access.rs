//! Memory accesses of compiled code: the look into the TLB, once for each or for several.

use std::mem::offset_of;

use super::asm::{BIAS, Mem, Near, R11, RCX, RSP, Reg};
use super::classify::Align;
use super::compile::{Compiler, Work};
use super::loops::Copies;
use super::registers::{Address, Part};
use super::windows::Opening;
use crate::mem::area::{Area, Frame};

impl Compiler<'_> {
    /// Computes an address within its segment (and adds the segment's base if `linear`) into R11.
    pub(super) fn address(&mut self, address: &Address, linear: bool) {
        self.held = None;
        let disp = address.disp;
        let index = match address.index {
            Some((Part::Host(index), scale)) => Some((index, scale)),
            Some((Part::Frame(slot), scale)) => {
                self.asm.load(RCX, slot);
                Some((RCX, scale))
            }
            None => None,
        };
        let base = match address.base {
            Some(Part::Host(base)) => Some(base),
            Some(Part::Frame(slot)) => {
                self.asm.load(R11, slot);
                Some(R11)
            }
            None => None,
        };
        self.asm.lea(R11, Mem { base, index, disp });
        if let Some(segment) = address.segment
            && linear
        {
            self.asm.load(RCX, segment);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
        }
    }

    /// An access of the instruction: its window's pointer, or a look into the TLB.
    pub(super) fn access(
        &mut self,
        n: usize,
        address: &Address,
        size: usize,
        align: Align,
        write: bool,
        call: usize,
    ) -> Mem {
        let which = self.made;
        self.made += 1;
        let share = self.shares[n][which.min(1)];
        let Some(share) = share else {
            self.held = None;
            return self.look_up(n, address, size, align, write, call);
        };
        let slot = Mem::frame(offset_of!(Frame, windows) + 8 * share.window);
        if let Some(opening) = share.opens {
            self.held = None;
            self.open(n, address, opening, write, share.added, slot);
        } else if self.held != Some(share.window) {
            self.asm.load(R11, slot);
        }
        self.held = Some(share.window);
        if share.moves {
            return self.moving(address);
        }
        match address.index {
            None => Mem::base(R11, share.distance),
            Some((part, scale)) => {
                let index = match part {
                    Part::Host(index) => index,
                    Part::Frame(slot) => {
                        self.asm.load(RCX, slot);
                        // RCX has to be free.
                        let at = Mem::indexed(R11, RCX, scale, share.added + address.disp);
                        self.asm.lea(R11, at);
                        self.held = None;
                        return Mem::base(R11, 0);
                    }
                };
                Mem::indexed(R11, index, scale, share.added + address.disp)
            }
        }
    }

    /// Looks a whole window up. The pointer to what its base register once held is in R11 afterwards,
    /// and in its slot.
    pub(super) fn open(
        &mut self,
        n: usize,
        address: &Address,
        opening: Opening,
        write: bool,
        added: i32,
        slot: Mem,
    ) {
        let again = self.asm.at();
        let Opening { low, high, align } = opening;
        let bytes = (high - low) as u16;
        let work = Work::Window {
            bytes,
            write,
            align,
        };
        let call = self.call(work, n, true);
        let (tags, addend) = columns(write);
        self.address(address, true);
        if low != 0 {
            self.asm.lea(R11, Mem::base(R11, low));
        }
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        self.asm.pext(RCX, R11, index_mask);
        // The last that may be accessed, as far as it is known to be aligned.
        let last = high - low - align.bytes();
        let last = Mem::indexed(RCX, R11, 0, last);
        let from = self.compare(RCX, tags, last, align);
        self.missed(n, from, call, Some(again));
        self.asm.pext(RCX, R11, index_mask);
        self.asm.load(RCX, entry(RCX, addend));
        self.origin(address, low, added);
        self.asm.store(slot, R11);
        if self.request.hardened {
            self.fence();
        }
    }

    /// From what is added to the page, in RCX, and a window's first address, in R11, to its pointer.
    fn origin(&mut self, address: &Address, low: i32, added: i32) {
        if address.index.is_none() {
            // The address is at hand: from it, back to the origin.
            let back = -(low + address.disp + added);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, back));
            return;
        }
        match address.base {
            Some(Part::Host(base)) => {
                self.asm.lea(R11, Mem::indexed(RCX, base, 0, -added));
            }
            Some(Part::Frame(slot)) => {
                self.asm.load(R11, slot);
                self.asm.lea(R11, Mem::indexed(R11, RCX, 0, -added));
            }
            None => self.asm.mov(R11, RCX),
        }
        if let Some(segment) = address.segment {
            self.asm.load(RCX, segment);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
        }
    }

    /// Looks for the page of an address that can be had again, and whether `last` bytes on it still is
    /// that page. The index in the TLB is in R11 afterwards. Gives the jump for a miss.
    fn probe(&mut self, first: Mem, tags: i32, last: i32, align: Align) -> Near {
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        let asm = &mut self.asm;
        match first {
            Mem {
                base: Some(base),
                index: None,
                disp: 0,
            } => asm.pext(R11, base, index_mask),
            _ => {
                asm.lea(RCX, first);
                asm.pext(R11, RCX, index_mask);
            }
        }
        asm.load(RCX, entry(R11, tags));
        // Only one of the two has the constant part.
        let mut rest = first.disp + last;
        if let Some(base) = first.base {
            asm.lea(RCX, Mem::indexed(RCX, base, 0, rest));
            rest = 0;
        }
        if let Some((index, scale)) = first.index {
            asm.lea(RCX, Mem::indexed(RCX, index, scale, rest));
        }
        self.decide(align)
    }

    /// Compares where an access ends with the entry of the TLB whose index is in a register. The entry's
    /// tag, which is minus its page, comes to RCX, and `last` adds the address of the last byte to it.
    /// Gives the call for a miss.
    pub(super) fn compare(&mut self, index: Reg, tags: i32, last: Mem, align: Align) -> Near {
        self.asm.load(RCX, entry(index, tags));
        self.asm.lea(RCX, last);
        self.decide(align)
    }

    /// Whether what is in RCX, a distance from where a page starts, is in that page and aligned. Gives
    /// the jump for a miss.
    fn decide(&mut self, align: Align) -> Near {
        if align == Align::None {
            self.asm.page_number(RCX, RCX);
        } else {
            let mask = Mem::frame(offset_of!(Frame, masks) + 8 * align as usize);
            self.asm.pext(RCX, RCX, mask);
        }
        let hit = self.asm.jrcxz();
        let miss = self.asm.call();
        self.asm.here(hit);
        miss
    }

    /// Nothing is read ahead of the comparison before this (SDM 2A, LFENCE).
    pub(super) fn fence(&mut self) {
        self.asm.put(&[0x0f, 0xae, 0xe8]);
    }

    /// Looks an address up in the TLB. What is returned is good for one access of `size` bytes and
    /// uses R11 and guest registers; RCX is free.
    pub(super) fn look_up(
        &mut self,
        n: usize,
        address: &Address,
        size: usize,
        align: Align,
        write: bool,
        call: usize,
    ) -> Mem {
        let (tags, addend) = columns(write);
        let last = if align == Align::None {
            size as i32 - 1
        } else {
            0
        };
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        let (miss, operand) = if let Some(plain) = again_at_hand(address) {
            let miss = self.probe(plain, tags, last, align);
            self.asm.load(R11, entry(R11, addend));
            (miss, self.beside(plain))
        } else {
            self.address(address, true);
            self.asm.pext(RCX, R11, index_mask);
            let last = Mem::indexed(RCX, R11, 0, last);
            let miss = self.compare(RCX, tags, last, align);
            self.asm.pext(RCX, R11, index_mask);
            self.asm.load(RCX, entry(RCX, addend));
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
            (miss, Mem::base(R11, 0))
        };
        if self.request.hardened {
            self.fence();
        }
        self.missed(n, miss, call, None);
        operand
    }

    /// An operand with what is in R11 added.
    fn beside(&mut self, plain: Mem) -> Mem {
        match (plain.base, plain.index) {
            (Some(base), None) => Mem::indexed(R11, base, 0, plain.disp),
            (Some(base), Some((index, scale))) => {
                self.asm.lea(R11, Mem::indexed(R11, base, 0, 0));
                Mem::indexed(R11, index, scale, plain.disp)
            }
            (None, Some((index, scale))) => Mem::indexed(R11, index, scale, plain.disp),
            (None, None) => Mem::base(R11, plain.disp),
        }
    }

    /// Where to go if an access of an instruction misses the TLB, with nothing done of it yet. Warm
    /// turns of a loop leave that to the cold ones.
    fn missed(&mut self, n: usize, from: Near, call: usize, resume: Option<usize>) {
        if self.copies == Copies::Warm {
            self.asm.make_jump(from);
            self.falls.push((from, n));
        } else {
            self.slow(from, call, resume);
        }
    }
}

/// An address that instructions can have again and again: it is all in registers.
fn again_at_hand(address: &Address) -> Option<Mem> {
    let plain = address.plain()?;
    let some = plain.base.is_some() || plain.index.is_some();
    (address.segment.is_none() && some).then_some(plain)
}

/// The columns of the TLB for reads or writes: tags, and what is added.
pub(super) fn columns(write: bool) -> (i32, i32) {
    let tags = if write {
        offset_of!(Area, write)
    } else {
        offset_of!(Area, read)
    };
    (tags as i32, offset_of!(Area, addend) as i32)
}

/// An entry of a column.
pub(super) fn entry(index: Reg, column: i32) -> Mem {
    Mem::indexed(RSP, index, 3, column - BIAS)
}
