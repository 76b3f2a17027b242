//! Instructions that are emitted with other operands, or in another form.

use std::mem::offset_of;

use iced_x86::{Instruction, OpKind};

use super::access::{columns, entry};
use super::asm::{Mem, Near, R11, RAX, RCX, RDX, Reg, Rm};
use super::classify::{Align, Class, writes_count};
use super::compile::{Compiler, Work};
use super::loops::held_in;
use super::ready::{Copy, Spill, Strings};
use super::registers::{Address, GUEST_RCX, GUEST_RSP, HOST, Part, slot};
use super::trace::Step;
use crate::cpu::reg;
use crate::mem::area::Frame;

impl Compiler<'_> {
    /// Whether it is known that the registers of a class are where copied instructions find them, and
    /// the field that says so.
    pub(super) fn unit(&mut self, class: Class) -> Option<(&mut bool, usize)> {
        match class {
            Class::Sse => Some((&mut self.sse, offset_of!(Frame, sse_away))),
            Class::Avx => Some((&mut self.avx, offset_of!(Frame, avx_away))),
            Class::X87 | Class::Mmx => Some((&mut self.x87, offset_of!(Frame, x87_away))),
            _ => None,
        }
    }

    /// Makes sure that the vector or x87 registers are where copied instructions find them.
    pub(super) fn ready(&mut self, n: usize, class: Class) {
        let work = match class {
            Class::Sse => Work::Sse,
            Class::Avx => Work::Avx,
            _ => Work::X87,
        };
        let Some((known, field)) = self.unit(class) else {
            return;
        };
        if std::mem::replace(known, true) {
            return;
        }
        self.asm.load_byte(RCX, Mem::frame(field));
        let ready = self.asm.jrcxz();
        let call = self.call(work, n, false);
        let from = self.asm.call();
        self.slow(from, call, Some(self.asm.at()));
        self.asm.here(ready);
        // Whoever comes back from there has nothing in it.
        self.held = None;
    }

    /// Emits an instruction.
    pub(super) fn copy(&mut self, n: usize, step: &Step, copy: &Copy, bytes: &[u8]) {
        let i = &step.instruction;
        let class = copy.class;
        match class {
            Class::Nothing => return,
            Class::Push if let Some(address) = copy.address(i) => {
                return self.push_memory(n, &address);
            }
            Class::Push | Class::Pop | Class::Leave => return self.stack(n, i, class),
            Class::Divide { signed } => return self.divide(n, i, copy, signed),
            Class::Strings => {
                self.held = None;
                self.store_noted();
                self.strings(n, i);
                return;
            }
            _ => {}
        }
        let Some(encoding) = &copy.encoding else {
            return;
        };
        self.ready(n, class);
        let mut operands = copy.plan.operands;
        let address = copy.address(i);
        if let Some(address) = &address {
            let operand = if class == Class::Lea {
                address.plain().unwrap_or_else(|| {
                    self.held = None;
                    self.address(address, false);
                    Mem::base(R11, 0)
                })
            } else {
                let call = self.call(Work::Run, n, true);
                self.access(n, address, copy.size, copy.align, copy.write, call)
            };
            operands.rm = Some(Rm::Mem(operand));
        }
        if copy.plan.count {
            self.asm.mov(RCX, GUEST_RCX);
        }
        for spill in copy.plan.spills() {
            if spill.temporary == R11 {
                self.held = None;
            }
            self.bring(spill);
        }
        encoding.emit(&mut self.asm, &operands);
        if writes_count(i) {
            self.asm.mov(GUEST_RCX, RCX);
        }
        for spill in copy.plan.spills().filter(|spill| spill.written) {
            self.take(spill);
        }
        if class == Class::X87 {
            self.note_x87(step, bytes, address.as_ref());
        }
    }

    /// Brings a guest register into its temporary.
    fn bring(&mut self, spill: Spill) {
        match HOST[usize::from(spill.guest & 15)] {
            Some(host) if spill.high => self.asm.rorx(spill.temporary, host, 8),
            _ => self.asm.load(spill.temporary, slot(spill.guest)),
        }
    }

    /// Takes what its temporary holds back into a guest register. The flags stay.
    fn take(&mut self, spill: Spill) {
        match HOST[usize::from(spill.guest & 15)] {
            Some(host) if spill.high => {
                self.asm.rorx(host, host, 8);
                // MOV of bytes; neither is one of those that need REX for that.
                self.asm.op32(0x88, spill.temporary, Rm::Reg(host));
                self.asm.rorx(host, host, 56);
            }
            _ => self.asm.store(slot(spill.guest), spill.temporary),
        }
    }

    /// FIP, FOP and FDP, which the host's unit has for its own addresses. The address is told
    /// relative to the page; what leaves the trace makes it whole.
    pub(super) fn note_x87(&mut self, step: &Step, bytes: &[u8], address: Option<&Address>) {
        let opcode = bytes
            .iter()
            .skip_while(|b| !(0xd8..=0xdf).contains(*b))
            .take(2)
            .fold(0, |opcode, &b| opcode << 8 | u16::from(b))
            & 0x7ff;
        if let Some(address) = address {
            self.noted.operand = Some(*address);
            if !self.is_handy(address) {
                self.store_operand();
            }
        }
        self.noted.note = Some(u32::from(opcode) << 16 | u32::from(step.at));
        self.noted_x87 = true;
    }

    /// Whether an address can be computed with RCX alone.
    fn is_handy(&self, address: &Address) -> bool {
        let parts = [address.base, address.index.map(|(index, _)| index)];
        let in_frame = |part: &&Option<Part>| matches!(part, Some(Part::Frame(_)));
        parts.iter().filter(in_frame).count() < 2
    }

    /// Before an instruction that changes registers of the last x87 operand's address.
    pub(super) fn keep_operand(&mut self, changed: u16) {
        let Some(address) = self.noted.operand else {
            return;
        };
        let index = address.index.map(|(index, _)| index);
        let changed = (0..16)
            .filter(|guest| changed >> guest & 1 != 0)
            .any(|guest| {
                let part = held_in(guest);
                part == address.base || part == index
            });
        if changed {
            self.store_operand();
        }
    }

    /// Stores the address of the last x87 operand, but for the segment.
    fn store_operand(&mut self) {
        let Some(address) = self.noted.operand.take() else {
            return;
        };
        let to = Mem::frame(offset_of!(Frame, x87_dp));
        if !self.is_handy(&address) {
            self.address(&address, false);
            self.asm.store(to, R11);
            return;
        }
        let mut host = |part: Part| match part {
            Part::Host(host) => host,
            Part::Frame(slot) => {
                self.asm.load(RCX, slot);
                RCX
            }
        };
        let base = address.base.map(&mut host);
        let index = address.index.map(|(index, scale)| (host(index), scale));
        let disp = address.disp;
        self.asm.lea(RCX, Mem { base, index, disp });
        self.asm.store(to, RCX);
    }

    /// Stores what is known of the last x87 instruction, for somebody may look.
    pub(super) fn store_noted(&mut self) {
        self.store_operand();
        if let Some(note) = self.noted.note.take() {
            self.asm
                .store_constant(Mem::frame(offset_of!(Frame, x87_note)), note as i32);
        }
    }

    /// Before the page is left: keeps which one the last x87 instruction was in.
    pub(super) fn settle_x87(&mut self) {
        if !self.noted_x87 {
            return;
        }
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, rip_page)));
        self.asm.store(Mem::frame(offset_of!(Frame, x87_page)), RCX);
        self.asm
            .store_constant32(Mem::frame(offset_of!(Frame, x87_note) + 4), 1);
    }

    /// PUSH, POP of registers and constants; LEAVE.
    pub(super) fn stack(&mut self, n: usize, i: &Instruction, class: Class) {
        let call = self.call(Work::Run, n, true);
        match class {
            Class::Push => {
                let to = Address::of(GUEST_RSP, -8);
                let to = self.access(n, &to, 8, Align::None, true, call);
                match i.op0_kind() {
                    OpKind::Immediate8to64 => {
                        self.asm.store_constant(to, i.immediate8to64() as i32);
                    }
                    OpKind::Immediate32to64 => {
                        self.asm.store_constant(to, i.immediate32to64() as i32);
                    }
                    _ => {
                        let source = self.value(i.op0_register().number() as u8, RCX);
                        self.asm.store(to, source);
                    }
                }
                self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
            }
            Class::Pop => {
                let guest = i.op0_register().number() as u8;
                let from = Address::of(GUEST_RSP, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                self.load_guest(guest, from);
                if guest != reg::RSP {
                    self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, 8));
                }
            }
            _ => {
                // LEAVE with a 64-bit stack.
                let rbp = 5;
                let from = Address::of(rbp, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                self.asm.load(RCX, from);
                self.asm.lea(GUEST_RSP, Mem::base(rbp, 8));
                self.asm.mov(rbp, RCX);
            }
        }
    }

    /// String instructions with REP that are within a page each way: MOVS and STOS. Else, and with
    /// DF set, the interpreter's.
    pub(super) fn strings(&mut self, n: usize, i: &Instruction) {
        let Some(strings) = Strings::of(i) else {
            return;
        };
        let call = self.call(Work::Run, n, true);
        let (rsi, rdi) = (6, 7);
        let asm = &mut self.asm;
        asm.load_byte(RCX, Mem::frame(offset_of!(Frame, backwards)));
        let forwards = asm.jrcxz();
        let from = asm.call();
        asm.here(forwards);
        // A count with which no address wraps around.
        asm.pext(RCX, GUEST_RCX, Mem::frame(offset_of!(Frame, masks)));
        let few = asm.jrcxz();
        let many = asm.call();
        asm.here(few);
        let mut slow = vec![from, many];
        let sides: &[(Reg, bool)] = if strings.moves {
            &[(rdi, true), (rsi, false)]
        } else {
            &[(rdi, true)]
        };
        let index_mask = Mem::frame(offset_of!(Frame, index_mask));
        for &(register, write) in sides {
            let (tags, _) = columns(write);
            let asm = &mut self.asm;
            asm.lea(R11, Mem::indexed(register, GUEST_RCX, strings.scale, -1));
            asm.pext(RCX, register, index_mask);
            let last = Mem::indexed(RCX, R11, 0, 0);
            slow.push(self.compare(RCX, tags, last, Align::None));
        }
        if self.request.hardened {
            self.fence();
        }
        let saved = |n: usize| Mem::frame(offset_of!(Frame, strings) + 8 * n);
        for (n, &(register, write)) in sides.iter().enumerate() {
            let (_, addend) = columns(write);
            let asm = &mut self.asm;
            asm.pext(RCX, register, index_mask);
            asm.load(RCX, entry(RCX, addend));
            asm.store(saved(n), RCX);
            asm.lea(register, Mem::indexed(register, RCX, 0, 0));
        }
        let asm = &mut self.asm;
        asm.mov(RCX, GUEST_RCX);
        asm.put(strings.bytes());
        for (n, &(register, _)) in sides.iter().enumerate() {
            // What was added comes off again, without a trace in the flags: ~x = -x - 1.
            asm.load(R11, saved(n));
            asm.op64(0xf7, 2, Rm::Reg(R11));
            asm.lea(register, Mem::indexed(register, R11, 0, 1));
        }
        asm.mov(GUEST_RCX, RCX);
        for from in slow {
            self.slow(from, call, None);
        }
    }

    /// A register that holds the guest's: its own, or `temporary`, into which it is loaded.
    pub(super) fn value(&mut self, guest: u8, temporary: Reg) -> Reg {
        match HOST[usize::from(guest & 15)] {
            Some(host) => host,
            None => {
                if temporary == R11 {
                    self.held = None;
                }
                self.asm.load(temporary, slot(guest));
                temporary
            }
        }
    }

    /// Loads a guest register, by RCX if it is in the frame.
    pub(super) fn load_guest(&mut self, guest: u8, from: Mem) {
        match HOST[usize::from(guest & 15)] {
            Some(host) => self.asm.load(host, from),
            None => {
                self.asm.load(RCX, from);
                self.asm.store(slot(guest), RCX);
            }
        }
    }

    /// DIV and IDIV of 32 and 64 bits, where no #DE can come of it; else the interpreter's.
    pub(super) fn divide(&mut self, n: usize, i: &Instruction, copy: &Copy, signed: bool) {
        let wide = copy.size == 8;
        if let Some(address) = &copy.address(i) {
            let call = self.call(Work::Run, n, true);
            let from = self.access(n, address, copy.size, Align::None, false, call);
            self.operation(wide, 0x8b, RCX, Rm::Mem(from));
        } else {
            let guest = i.op0_register().full_register().number() as u8;
            let from = self.value(guest, RCX);
            self.operation(wide, 0x8b, RCX, Rm::Reg(from));
        }
        self.held = None;
        // All flags are undefined after a division, so that these may change them; but it may turn
        // out that there is an exception instead.
        self.asm.mov(R11, RAX);
        let flags = Mem::frame(offset_of!(Frame, divide_flags));
        self.asm.store_flags(flags);
        self.asm.mov(RAX, R11);
        if signed {
            // What is divided is a sign-extended number, and the divisor is neither 0 nor -1.
            self.operation(wide, 0x8b, R11, Rm::Reg(RAX));
            self.operation(wide, 0xc1, 7, Rm::Reg(R11));
            self.asm.byte(if wide { 63 } else { 31 });
            self.operation(wide, 0x3b, R11, Rm::Reg(RDX));
            let odd = self.asm.call_if(5);
            self.slow_from(odd, n);
            self.operation(wide, 0x8d, R11, Rm::Mem(Mem::base(RCX, 1)));
            self.operation(wide, 0x83, 7, Rm::Reg(R11));
            self.asm.byte(1);
            let odd = self.asm.call_if(6);
            self.slow_from(odd, n);
        } else {
            // The quotient fits if the upper half is less than the divisor.
            self.operation(wide, 0x3b, RDX, Rm::Reg(RCX));
            let odd = self.asm.call_if(3);
            self.slow_from(odd, n);
        }
        self.operation(wide, 0xf7, if signed { 7 } else { 6 }, Rm::Reg(RCX));
    }

    pub(super) fn slow_from(&mut self, from: Near, n: usize) {
        let call = self.call(Work::Divide, n, false);
        self.slow(from, call, None);
    }

    pub(super) fn operation(&mut self, wide: bool, opcode: u8, reg: Reg, rm: Rm) {
        if wide {
            self.asm.op64(opcode, reg, rm);
        } else {
            self.asm.op32(opcode, reg, rm);
        }
    }
}
