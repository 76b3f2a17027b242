//! Memory accesses of compiled code: the look into the TLB, once for each or for several.

use std::mem::offset_of;

use super::asm::{Mem, Near, R11, RCX, RSP, Reg};
use super::classify::Align;
use super::compile::{Compiler, Slow, Work};
use super::registers::{Address, Part};
use crate::mem::area::{Area, Frame};

impl Compiler {
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
            return self.look_up(address, size, align, write, call);
        };
        let slot = Mem::frame(offset_of!(Frame, windows) + 8 * share.window);
        if let Some((low, high)) = share.opens {
            self.held = None;
            self.open(n, address, (low, high), write, share.added, slot);
        } else if self.held != Some(share.window) {
            self.asm.load(R11, slot);
        }
        self.held = Some(share.window);
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

    /// Looks a whole window up: the bytes from `low` up to `high`, relative to the address. The
    /// pointer to what its base register once held is in R11 afterwards, and in its slot.
    pub(super) fn open(
        &mut self,
        n: usize,
        address: &Address,
        (low, high): (i32, i32),
        write: bool,
        added: i32,
        slot: Mem,
    ) {
        let again = self.asm.at();
        self.address(address, true);
        if low != 0 {
            self.asm.lea(R11, Mem::base(R11, low));
        }
        let (tags, addend) = columns(write);
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        self.asm.pext(RCX, R11, index_mask);
        let last = Mem::indexed(RCX, R11, 0, high - low - 1);
        let from = self.compare(RCX, tags, last, Align::None);
        let call = self.call(
            Work::Window {
                bytes: (high - low) as u16,
                write,
            },
            n,
            true,
        );
        self.slow.push(Slow {
            from,
            call,
            resume: Some(again),
        });
        self.asm.pext(RCX, R11, index_mask);
        self.asm.load(RCX, entry(RCX, addend));
        if address.index.is_none() {
            // The address is at hand: from it, back to the origin.
            let back = -(low + address.disp + added);
            self.asm.lea(R11, Mem::indexed(R11, RCX, 0, back));
        } else {
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
        self.asm.store(slot, R11);
        if self.request.hardened {
            self.fence();
        }
    }

    /// Compares where an access ends with the entry of the TLB whose index is in a register. The entry's
    /// tag, which is minus its page, comes to RCX, and `last` adds the address of the last byte to it.
    /// Gives the call for a miss.
    pub(super) fn compare(&mut self, index: Reg, tags: i32, last: Mem, align: Align) -> Near {
        let mask = Mem::frame(offset_of!(Frame, masks) + 8 * align as usize);
        self.asm.load(RCX, entry(index, tags));
        self.asm.lea(RCX, last);
        self.asm.pext(RCX, RCX, mask);
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
        let simple = match *address {
            Address {
                segment: None,
                base: Some(Part::Host(base)),
                index: None,
                disp,
            } => Some((base, disp)),
            _ => None,
        };
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        let asm = &mut self.asm;
        let (index, base, disp) = match simple {
            Some((base, 0)) => {
                asm.pext(R11, base, index_mask);
                (R11, base, 0)
            }
            Some((base, disp)) => {
                asm.lea(RCX, Mem::base(base, disp));
                asm.pext(R11, RCX, index_mask);
                (R11, base, disp)
            }
            None => {
                self.address(address, true);
                self.asm.pext(RCX, R11, index_mask);
                (RCX, R11, 0)
            }
        };
        let last = Mem::indexed(RCX, base, 0, disp + last);
        let miss = self.compare(index, tags, last, align);
        let asm = &mut self.asm;
        let operand = if simple.is_some() {
            asm.load(R11, entry(R11, addend));
            Mem::indexed(R11, base, 0, disp)
        } else {
            asm.pext(RCX, R11, index_mask);
            asm.load(RCX, entry(RCX, addend));
            asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
            Mem::base(R11, 0)
        };
        if self.request.hardened {
            self.fence();
        }
        self.slow.push(Slow {
            from: miss,
            call,
            resume: None,
        });
        operand
    }
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
    Mem::indexed(RSP, index, 3, column)
}
