//! System instructions that are frequent enough to be compiled: those that look at or change a little
//! of the processor's state.
//!
//! What they find in the frame tells whether all is as the short way has it: the privilege is the
//! kernel's, and nothing waits for what the instruction allows. Else they are the interpreter's.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Register};

use super::access::{columns, entry};
use super::asm::{Mem, Near, R11, RAX, RCX, Rm, Short};
use super::classify::Align;
use super::compile::{Compiler, Work};
use super::registers::{Address, GUEST_RSP, HOST, slot};
use super::trace::Step;
use crate::cpu::{Cpu, seg};
use crate::cpuid::Features;
use crate::flags::rflags;
use crate::mem::area::Frame;
use crate::sys::state::{EventState, Msrs, Segment, SystemState};

/// What is compiled of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum System {
    Cli,
    Sti,
    Cld,
    Pushf,
    Stac,
    Clac,
    Swapgs,
    /// From a field of the processor's state into a register; only at level 0.
    Control {
        at: usize,
        to: u8,
    },
    /// From a segment register.
    Selector {
        at: usize,
        to: u8,
    },
    /// BT, BTS, BTR, BTC of memory, with a register that reaches past the operand.
    Bit(Bit),
}

/// See [`System::Bit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bit {
    /// The opcode after 0x0f.
    opcode: u8,
    writes: bool,
    lock: bool,
    wide: bool,
    index: u8,
}

const fn sys(field: usize) -> usize {
    offset_of!(Cpu, sys) + field
}

const fn event(field: usize) -> usize {
    sys(offset_of!(SystemState, events)) + field
}

const fn segment(n: u8, field: usize) -> usize {
    sys(offset_of!(SystemState, segments)) + n as usize * size_of::<Segment>() + field
}

const KERNEL_GS_BASE: usize = sys(offset_of!(SystemState, msr)) + offset_of!(Msrs, kernel_gs_base);

impl System {
    /// What an instruction is, of those that are compiled here.
    pub(super) fn of(i: &Instruction, features: &Features) -> Option<Self> {
        if !features.has_all(i.cpuid_features()) {
            return None;
        }
        let register = || i.op0_register().number() as u8;
        Some(match i.code() {
            Code::Cli => Self::Cli,
            Code::Sti => Self::Sti,
            Code::Cld => Self::Cld,
            Code::Pushfq => Self::Pushf,
            Code::Stac => Self::Stac,
            Code::Clac => Self::Clac,
            Code::Swapgs => Self::Swapgs,
            Code::Mov_r64_cr if !i.has_lock_prefix() => {
                let field = match i.op1_register() {
                    Register::CR0 => offset_of!(SystemState, cr0),
                    Register::CR2 => offset_of!(SystemState, cr2),
                    Register::CR3 => offset_of!(SystemState, cr3),
                    Register::CR4 => offset_of!(SystemState, cr4),
                    _ => return None,
                };
                Self::Control {
                    at: sys(field),
                    to: register(),
                }
            }
            Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
                if i.op0_register().is_gpr32() || i.op0_register().is_gpr64() =>
            {
                let from = i.op1_register().number() as u8;
                if from > seg::GS {
                    return None;
                }
                Self::Selector {
                    at: segment(from, offset_of!(Segment, selector)),
                    to: register(),
                }
            }
            _ => Self::Bit(Bit::of(i)?),
        })
    }
}

impl Bit {
    fn of(i: &Instruction) -> Option<Self> {
        let (opcode, wide) = match i.code() {
            Code::Bt_rm32_r32 => (0xa3, false),
            Code::Bt_rm64_r64 => (0xa3, true),
            Code::Bts_rm32_r32 => (0xab, false),
            Code::Bts_rm64_r64 => (0xab, true),
            Code::Btr_rm32_r32 => (0xb3, false),
            Code::Btr_rm64_r64 => (0xb3, true),
            Code::Btc_rm32_r32 => (0xbb, false),
            Code::Btc_rm64_r64 => (0xbb, true),
            _ => return None,
        };
        if i.op0_kind() != iced_x86::OpKind::Memory {
            return None;
        }
        Address::new(i)?;
        Some(Self {
            opcode,
            writes: opcode != 0xa3,
            lock: i.has_lock_prefix(),
            wide,
            index: i.op1_register().number() as u8,
        })
    }

    fn bytes(self) -> usize {
        if self.wide { 8 } else { 4 }
    }
}

impl Compiler<'_> {
    /// A field of the processor, whose address is in R11.
    fn field(at: usize) -> Mem {
        Mem::base(R11, at as i32)
    }

    fn load_cpu(&mut self, to: u8) {
        self.asm.load(to, Mem::frame(offset_of!(Frame, cpu)));
    }

    /// Goes on only if a byte of the frame is zero; else the instruction is the interpreter's.
    fn only_if_zero(&mut self, field: usize, call: usize) {
        self.asm.load_byte(RCX, Mem::frame(field));
        self.unless_zero(call);
    }

    /// The same of RCX.
    fn unless_zero(&mut self, call: usize) {
        let zero = self.asm.jrcxz();
        let from = self.asm.call();
        self.asm.here(zero);
        self.aside(from, call);
    }

    fn aside(&mut self, from: Near, call: usize) {
        self.slow(from, call, None);
    }

    /// RFLAGS into R11, and a jump if IF is clear.
    fn if_clear(&mut self) -> Short {
        self.load_cpu(R11);
        self.asm.load(R11, Self::field(offset_of!(Cpu, rflags)));
        self.asm
            .pext(RCX, R11, Mem::frame(offset_of!(Frame, interrupt_mask)));
        self.asm.jrcxz()
    }

    /// Emits one of these.
    pub(super) fn system(&mut self, n: usize, step: &Step, system: System) {
        match system {
            System::Pushf => return self.pushf(n),
            System::Bit(bit) => return self.bit(n, step, bit),
            _ => self.held = None,
        }
        let call = self.call(Work::Run, n, false);
        let not_kernel = offset_of!(Frame, not_kernel);
        match system {
            System::Cli => {
                self.only_if_zero(not_kernel, call);
                let done = self.if_clear();
                self.load_cpu(RCX);
                let at = Mem::base(R11, -(rflags::IF as i32));
                self.asm.lea(R11, at);
                self.asm
                    .store(Mem::base(RCX, offset_of!(Cpu, rflags) as i32), R11);
                self.asm.here(done);
            }
            System::Sti => self.sti(step, call),
            System::Cld => self.only_if_zero(offset_of!(Frame, backwards), call),
            System::Stac | System::Clac => {
                let field = if system == System::Stac {
                    offset_of!(Frame, stac)
                } else {
                    offset_of!(Frame, clac)
                };
                self.asm.load_byte(RCX, Mem::frame(field));
                let done = self.asm.jrcxz();
                self.asm.load(RCX, Mem::frame(offset_of!(Frame, other)));
                let none = self.asm.jrcxz();
                let from = self.asm.call();
                self.bind_glue(from, self.request.glue.switch);
                let over = self.asm.jmp();
                self.asm.here(none);
                let from = self.asm.call();
                self.aside(from, call);
                self.asm.bind_here(over);
                self.asm.here(done);
            }
            System::Swapgs => {
                self.only_if_zero(not_kernel, call);
                let base = offset_of!(Frame, gs_base);
                self.load_cpu(R11);
                self.asm.load(RCX, Self::field(KERNEL_GS_BASE));
                // PUSH, for want of a register.
                self.asm.op32(0xff, 6, Rm::Mem(Mem::frame(base)));
                self.asm.store(Mem::frame(base + 8), RCX);
                let own = offset_of!(Cpu, seg_base) + 8 * usize::from(seg::GS);
                self.asm.store(Self::field(own), RCX);
                let own = segment(seg::GS, offset_of!(Segment, base));
                self.asm.store(Self::field(own), RCX);
                self.asm.op32(0x8f, 0, Rm::Mem(Self::field(KERNEL_GS_BASE)));
            }
            System::Control { at, to } => {
                self.only_if_zero(not_kernel, call);
                self.load_cpu(R11);
                self.load_guest(to, Self::field(at));
            }
            System::Selector { at, to } => {
                self.load_cpu(R11);
                self.asm.load_word(RCX, Self::field(at));
                match HOST[usize::from(to & 15)] {
                    Some(host) => self.asm.mov(host, RCX),
                    None => self.asm.store(slot(to), RCX),
                }
            }
            System::Pushf | System::Bit(_) => {}
        }
    }

    /// STI. What the shadow covers is told, as whoever looks at requests next may be ahead of it.
    fn sti(&mut self, step: &Step, call: usize) {
        self.only_if_zero(offset_of!(Frame, waiting), call);
        let clear = self.if_clear();
        let done = self.asm.jmp();
        self.asm.here(clear);
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, requests)));
        self.asm.load32(RCX, Mem::base(RCX, 0));
        self.unless_zero(call);
        self.load_cpu(RCX);
        let cpu = |at: usize| Mem::base(RCX, at as i32);
        self.asm.lea(R11, Mem::base(R11, rflags::IF as i32));
        self.asm.store(cpu(offset_of!(Cpu, rflags)), R11);
        self.asm
            .store_byte(cpu(event(offset_of!(EventState, sti_shadow))), 1);
        let after = i32::from(step.at) + step.instruction.len() as i32;
        self.asm.load(R11, Mem::frame(offset_of!(Frame, rip_page)));
        self.asm.lea(R11, Mem::base(R11, after));
        self.asm
            .store(cpu(event(offset_of!(EventState, shadow_rip))), R11);
        self.asm.bind_here(done);
    }

    fn pushf(&mut self, n: usize) {
        let call = self.call(Work::Run, n, true);
        let to = Address::of(GUEST_RSP, -8);
        let to = self.access(n, &to, 8, Align::None, true, call);
        let kept = Mem::frame(offset_of!(Frame, target));
        self.asm.store(kept, RAX);
        self.asm.take_flags();
        // MOVZX ECX, AH, MOVZX EAX, AL.
        self.asm.put(&[0x0f, 0xb6, 0xcc, 0x0f, 0xb6, 0xc0]);
        // OF to its place.
        self.asm.rorx(RAX, RAX, 64 - 11);
        self.asm.lea(RCX, Mem::indexed(RCX, RAX, 0, 0));
        self.load_cpu(RAX);
        self.asm
            .load(RAX, Mem::base(RAX, offset_of!(Cpu, rflags) as i32));
        // Both have the bit that is always set.
        let fixed = -(rflags::FIXED as i32);
        self.asm.lea(RCX, Mem::indexed(RCX, RAX, 0, fixed));
        self.asm.load(RAX, kept);
        self.asm.store(to, RCX);
        self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
    }

    /// The word that has the bit is looked up, and its bit of it is tested.
    fn bit(&mut self, n: usize, step: &Step, bit: Bit) {
        let Some(address) = Address::new(&step.instruction) else {
            return;
        };
        let call = self.call(Work::Run, n, true);
        self.address(&address, true);
        let (shift, scale, mask) = if bit.wide {
            (6, 3, offset_of!(Frame, bit_masks) + 8)
        } else {
            (5, 2, offset_of!(Frame, bit_masks))
        };
        let index = match HOST[usize::from(bit.index & 15)] {
            Some(host) => Rm::Reg(host),
            None => Rm::Mem(slot(bit.index)),
        };
        self.asm.constant32(RCX, shift);
        self.asm.sarx(bit.wide, RCX, index, RCX);
        if !bit.wide {
            // MOVSXD.
            self.asm.op64(0x63, RCX, Rm::Reg(RCX));
        }
        self.asm.lea(R11, Mem::indexed(R11, RCX, scale, 0));
        let (tags, addend) = columns(bit.writes);
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        self.asm.pext(RCX, R11, index_mask);
        let last = Mem::indexed(RCX, R11, 0, bit.bytes() as i32 - 1);
        let miss = self.compare(RCX, tags, last, Align::None);
        self.aside(miss, call);
        self.asm.pext(RCX, R11, index_mask);
        self.asm.load(RCX, entry(RCX, addend));
        self.asm.lea(R11, Mem::indexed(R11, RCX, 0, 0));
        if self.request.hardened {
            self.fence();
        }
        let index = self.value(bit.index, RCX);
        self.asm.pext(RCX, index, Mem::frame(mask));
        if bit.lock {
            self.asm.byte(0xf0);
        }
        let place = Rm::Mem(Mem::base(R11, 0));
        self.asm.two_byte(bit.wide, bit.opcode, RCX, place);
        self.held = None;
    }
}

/// PUSH of what is in memory: two accesses.
impl Compiler<'_> {
    pub(super) fn push_memory(&mut self, n: usize, address: &Address) {
        let kept = Mem::frame(offset_of!(Frame, target));
        let call = self.call(Work::Run, n, true);
        let from = self.access(n, address, 8, Align::None, false, call);
        self.asm.load(RCX, from);
        self.asm.store(kept, RCX);
        // Not through a window: it would be opened here, and who misses the operand doesn't come by.
        let to = Address::of(GUEST_RSP, -8);
        self.held = None;
        let to = self.look_up(n, &to, 8, Align::None, true, call);
        self.asm.load(RCX, kept);
        self.asm.store(to, RCX);
        self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
    }
}
