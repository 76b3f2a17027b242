//! Loops: traces that lead back to where they begin.
//!
//! ```text
//!   from elsewhere ─▶ gate: requests? a pointer for each window, and for how many turns they are good
//!                      ▲ ▲   │ all windows are in pages         │ one isn't, or the TLB hasn't got it
//!        no turns left │ │   ▼                                  ▼
//!                      └─┼─ warm: pointers ── a look missed ──▶ cold: every access has its own look
//!                        └──────────────────────────────────────┘ after one turn
//! ```
//! Accesses whose addresses change by a constant in each turn, or not at all, are looked up for many
//! turns at once. Nothing that could change the TLB happens between warm turns: only the interpreter
//! does that, and it comes back to the cold ones; what other processors and devices ask for is looked
//! at in the gate, and the turns between two looks are few.

use std::mem::offset_of;

use super::access::{columns, entry};
use super::asm::{Mem, Near, R11, RAX, RCX, Rm};
use super::classify::Align;
use super::compile::Compiler;
use super::ready::{Branch, Ready};
use super::registers::{Address, HOST, Part, slot};
use super::trace::Step;
use super::windows::{Base, Carried};
use crate::mem::PAGE_MASK;
use crate::mem::area::Frame;

/// Warm turns between looks at requests, at most.
const TURNS: i32 = 256;

/// Instructions of a loop that is there twice, at most.
const LONGEST: usize = 96;

/// Which copy of a loop is being emitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Copies {
    /// The trace is there once.
    Once,
    Warm,
    Cold,
}

/// Whether a trace is a loop that may have pointers carried through it: it ends with a branch to its
/// head, and nothing in it is the interpreter's.
pub(super) fn goes_round(steps: &[Step], ready: &[Ready]) -> bool {
    let (Some(first), Some(last), Some(end)) = (steps.first(), steps.last(), ready.last()) else {
        return false;
    };
    let back = match end {
        Ready::Branch(Branch::Conditional { target, .. } | Branch::Jump { target }) => {
            *target == i64::from(first.at)
        }
        _ => false,
    };
    let other = |ready: &Ready| ready.is_interpreted() || matches!(ready, Ready::System(_));
    // Calls find their way back within 32 KiB.
    let short = steps.len() <= LONGEST;
    short && back && last.follow.is_none() && !ready.iter().any(other)
}

const CONDITION_A: u8 = 7;
const CONDITION_AE: u8 = 3;
const CONDITION_NE: u8 = 5;

fn count() -> Mem {
    Mem::frame(offset_of!(Frame, loop_count))
}

impl Compiler<'_> {
    /// Compiles a loop.
    pub(super) fn rounds(
        &mut self,
        steps: &[Step],
        ready: &[Ready],
        bytes: &[u8],
        carried: &[Carried],
    ) {
        self.enter_page();
        self.direct = self.asm.at();
        self.poll(i64::from(self.head));
        let failed = self.gate(ready, carried);
        self.copies = Copies::Warm;
        self.warm = self.asm.at();
        self.body(steps, ready, bytes);
        for from in failed {
            self.asm.bind_here(from);
        }
        self.restore_flags();
        self.copies = Copies::Cold;
        self.went_back = false;
        (self.sse, self.avx, self.x87) = (false, false, false);
        self.shares.fill([None; 2]);
        self.held = None;
        self.body(steps, ready, bytes);
        for (from, step) in std::mem::take(&mut self.falls) {
            self.asm.bind(from, self.cold[step]);
        }
    }

    /// Warm turns go on as long as the pointers are good.
    pub(super) fn next_turn(&mut self) {
        self.asm.load(RCX, count());
        let none = self.asm.jrcxz();
        self.asm.lea(RCX, Mem::base(RCX, -1));
        self.asm.store(count(), RCX);
        if self.request.counted {
            let goes_on = self.budget();
            let gate = self.asm.jmp();
            self.asm.bind(gate, self.direct);
            self.asm.here(goes_on);
        }
        let again = self.asm.jmp();
        self.asm.bind(again, self.warm);
        self.asm.here(none);
        let gate = self.asm.jmp();
        self.asm.bind(gate, self.direct);
    }

    /// Looks all windows up, with the guest's flags put aside. Gives the jumps for what can't be warm;
    /// the flags are still to be restored there.
    fn gate(&mut self, ready: &[Ready], carried: &[Carried]) -> Vec<Near> {
        let asm = &mut self.asm;
        asm.mov(R11, RAX);
        asm.store_flags(Mem::frame(offset_of!(Frame, loop_flags)));
        asm.mov(RAX, R11);
        let mut failed = Vec::new();
        self.units(ready, &mut failed);
        self.asm.store_constant(count(), TURNS);
        for window in carried {
            self.window(window, &mut failed);
        }
        self.restore_flags();
        failed
    }

    /// The vector and x87 registers that are used have to be where copied instructions find them.
    fn units(&mut self, ready: &[Ready], failed: &mut Vec<Near>) {
        for ready in ready {
            let Ready::Copy(copy) = ready else {
                continue;
            };
            let Some((known, field)) = self.unit(copy.class) else {
                continue;
            };
            if std::mem::replace(known, true) {
                continue;
            }
            // CMP byte, 0.
            self.asm.op32(0x80, 7, Rm::Mem(Mem::frame(field)));
            self.asm.byte(0);
            failed.push(self.asm.jcc(CONDITION_NE));
        }
    }

    fn restore_flags(&mut self) {
        let asm = &mut self.asm;
        asm.mov(R11, RAX);
        asm.load_flags(Mem::frame(offset_of!(Frame, loop_flags)));
        asm.mov(RAX, R11);
    }

    /// An operation of R11 or RCX with a constant.
    fn constant(&mut self, wide: bool, operation: u8, register: u8, value: i32) {
        self.operation(wide, 0x81, operation, Rm::Reg(register));
        self.asm.dword(value);
    }

    /// Looks one window up.
    fn window(&mut self, window: &Carried, failed: &mut Vec<Near>) {
        const AND: u8 = 4;
        const SUB: u8 = 5;
        const XOR: u8 = 6;
        const CMP: u8 = 7;
        const SHR: u8 = 5;
        let within = PAGE_MASK as i32;
        let span = window.high - window.low;
        let base = window.base.and_then(|base| match base {
            Base::Page => Some(Part::Frame(Mem::frame(offset_of!(Frame, rip_page)))),
            Base::Register(guest) => held_in(guest),
        });
        let index = window
            .index
            .and_then(|(guest, scale)| Some((held_in(guest)?, scale)));
        let segment = Address::segment(window.segment);
        let address = Address {
            segment,
            base,
            index,
            disp: window.low,
        };
        self.address(&address, true);
        let (at, align) = window.align;
        if align != Align::None {
            self.asm.lea(RCX, Mem::base(R11, at - window.low));
            self.constant(false, AND, RCX, align.bytes() - 1);
            failed.push(self.asm.jcc(CONDITION_NE));
        }
        let (tags, addend) = columns(window.write);
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        let asm = &mut self.asm;
        asm.pext(RCX, R11, index_mask);
        asm.load(RCX, entry(RCX, tags));
        // Where in the page the last byte is, if it is the page: the entry is the first byte's.
        asm.lea(RCX, Mem::indexed(RCX, R11, 0, span - 1));
        self.constant(true, CMP, RCX, within);
        failed.push(self.asm.jcc(CONDITION_A));
        if window.stride != 0 {
            // Bytes to the page's end, or from its start; turns of at least so many bytes.
            if window.stride > 0 {
                self.constant(false, XOR, RCX, within);
            } else {
                self.constant(false, SUB, RCX, span - 1);
            }
            let shift = window
                .stride
                .unsigned_abs()
                .next_power_of_two()
                .trailing_zeros();
            self.operation(false, 0xc1, SHR, Rm::Reg(RCX));
            self.asm.byte(shift as u8);
            self.operation(false, 0x3b, RCX, Rm::Mem(count()));
            let more = self.asm.jcc(CONDITION_AE);
            self.asm.store32(count(), RCX);
            self.asm.bind_here(more);
        }
        let asm = &mut self.asm;
        asm.pext(RCX, R11, index_mask);
        asm.load(RCX, entry(RCX, addend));
        match base {
            Some(_) if window.moves => asm.mov(R11, RCX),
            Some(Part::Host(base)) => asm.lea(R11, Mem::indexed(RCX, base, 0, 0)),
            Some(Part::Frame(at)) => {
                asm.load(R11, at);
                asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
            }
            None => asm.mov(R11, RCX),
        }
        if let Some(segment) = segment {
            asm.load(RCX, segment);
            asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
        }
        asm.store(
            Mem::frame(offset_of!(Frame, windows) + 8 * window.window),
            R11,
        );
    }

    /// The operand of an access in a window whose base is another in each turn.
    pub(super) fn moving(&mut self, address: &Address) -> Mem {
        let base = match address.base {
            Some(Part::Host(base)) => base,
            Some(Part::Frame(at)) => {
                self.asm.load(RCX, at);
                RCX
            }
            // It has one, or it would not move.
            None => return Mem::base(R11, address.disp),
        };
        match address.index {
            None if base != RCX => Mem::indexed(R11, base, 0, address.disp),
            None => {
                self.held = None;
                self.asm.lea(R11, Mem::indexed(R11, base, 0, address.disp));
                Mem::base(R11, 0)
            }
            Some((index, scale)) => {
                self.held = None;
                self.asm.lea(R11, Mem::indexed(R11, base, 0, 0));
                match index {
                    Part::Host(index) => Mem::indexed(R11, index, scale, address.disp),
                    Part::Frame(at) => {
                        self.asm.load(RCX, at);
                        let whole = Mem::indexed(R11, RCX, scale, address.disp);
                        self.asm.lea(R11, whole);
                        Mem::base(R11, 0)
                    }
                }
            }
        }
    }
}

/// Where a guest register is.
pub(super) fn held_in(guest: u8) -> Option<Part> {
    let host = HOST.get(usize::from(guest))?;
    Some(host.map_or(Part::Frame(slot(guest)), Part::Host))
}
