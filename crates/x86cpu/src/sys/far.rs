//! Far JMP, CALL and RET: direct, through call gates and task gates (Intel SDM 3A §5.8; 2A/2B
//! "JMP", "CALL", "RET").

use crate::code::Op;
use crate::cpu::{Cpu, reg, seg};
use crate::mem::Access;
use crate::sys::descriptor::{Descriptor, canonical, is_null, system_type};
use crate::sys::operand::{size_of_op, truncate};
use crate::sys::segment::null_stack;
use crate::sys::stack::Stack;
use crate::sys::state::{Segment, attr};
use crate::sys::task::Switch;
use crate::trap::{Trap, vector};

/// A call gate, checked.
struct Gate {
    size: u64,
    selector: u16,
    offset: u64,
    parameters: u64,
}

/// Where the far pointer of a transfer comes from.
fn target(cpu: &mut Cpu, op: &Op) -> Result<(u64, u16), Trap> {
    if op.extra != 0 {
        cpu.load_far(op)
    } else {
        Ok((op.imm, op.aux as u16))
    }
}

/// JMP ptr16:16/32 and m16:16/32/64.
pub(super) fn jmp(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = target(cpu, op)?;
    if !cpu.sys.mode.protected() {
        return cpu.enter_real(selector, offset);
    }
    let d = cpu.far_descriptor(selector)?;
    if d.is_segment() {
        return cpu.jump_to_segment(selector, offset, d);
    }
    match cpu.far_gate_kind(selector, &d)? {
        GateKind::Call => {
            let gate = cpu.call_gate(selector, &d)?;
            let (code, cs_selector) = cpu.gate_target(&gate)?;
            let allowed = if code.is_conforming() {
                code.dpl() <= cpu.cpl
            } else {
                code.dpl() == cpu.cpl
            };
            if !allowed {
                return Err(cpu.selector_fault(vector::GP, cs_selector));
            }
            let cpl = cpu.cpl;
            cpu.enter_code(code, cs_selector, gate.offset, cpl)
        }
        GateKind::Task => cpu.switch_through_gate(selector, &d, Switch::Jump, cpu.next_rip(op)),
        GateKind::Tss => cpu.switch_to_tss(selector, &d, Switch::Jump, cpu.next_rip(op)),
    }
}

/// CALL ptr16:16/32 and m16:16/32/64.
pub(super) fn call(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = target(cpu, op)?;
    let size = size_of_op(op);
    let return_rip = cpu.next_rip(op);
    let cs = cpu.sys.segments[usize::from(seg::CS)].selector;
    if !cpu.sys.mode.protected() {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, size, u64::from(cs))?;
        stack.push(cpu, size, return_rip)?;
        cpu.enter_real(selector, offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    let d = cpu.far_descriptor(selector)?;
    if d.is_segment() {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, size, u64::from(cs))?;
        stack.push(cpu, size, return_rip)?;
        cpu.jump_to_segment(selector, offset, d)?;
        stack.commit(cpu);
        return Ok(());
    }
    match cpu.far_gate_kind(selector, &d)? {
        GateKind::Call => {
            let gate = cpu.call_gate(selector, &d)?;
            cpu.call_through(&gate, return_rip)
        }
        GateKind::Task => cpu.switch_through_gate(selector, &d, Switch::Call, return_rip),
        GateKind::Tss => cpu.switch_to_tss(selector, &d, Switch::Call, return_rip),
    }
}

/// RET far: `imm` bytes are released after the return address.
pub(super) fn ret(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = size_of_op(op);
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    if !cpu.sys.mode.protected() {
        cpu.enter_real(selector, rip)?;
        stack.release(op.imm);
        stack.commit(cpu);
        return Ok(());
    }
    cpu.return_far(selector, rip, size, stack, op.imm)
}

enum GateKind {
    Call,
    Task,
    Tss,
}

impl Cpu {
    /// Real-address and virtual-8086 mode: CS is loaded without looking anything up.
    pub(crate) fn enter_real(&mut self, selector: u16, offset: u64) -> Result<(), Trap> {
        let cs = if self.in_v86() {
            Segment::v86(selector)
        } else {
            self.real_segment(seg::CS, selector)
        };
        if offset > u64::from(cs.limit) {
            return Err(self.gp0());
        }
        self.set_segment(seg::CS, cs);
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    fn far_descriptor(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        self.read_descriptor(selector, vector::GP)
    }

    /// The checks of a direct jump or call to a code segment, and the transfer.
    fn jump_to_segment(&mut self, selector: u16, offset: u64, d: Descriptor) -> Result<(), Trap> {
        let rpl = (selector & 3) as u8;
        let allowed = d.is_code()
            && if d.is_conforming() {
                d.dpl() <= self.cpl
            } else {
                d.dpl() == self.cpl && rpl <= self.cpl
            };
        if !allowed {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let cpl = self.cpl;
        self.enter_code(d, selector, offset, cpl)
    }

    /// Checks the target's offset, marks the segment and goes there at level `cpl`. SS and RSP are
    /// the caller's business.
    pub(crate) fn enter_code(
        &mut self,
        d: Descriptor,
        selector: u16,
        offset: u64,
        cpl: u8,
    ) -> Result<(), Trap> {
        let cs = self.check_code(d, selector, offset, cpl)?;
        self.set_segment(seg::CS, cs);
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// The checks of [`Self::enter_code`], without the transfer.
    pub(crate) fn check_code(
        &mut self,
        mut d: Descriptor,
        selector: u16,
        offset: u64,
        cpl: u8,
    ) -> Result<Segment, Trap> {
        let long_code = self.sys.long_mode() && d.attributes() & attr::L != 0;
        if long_code && d.attributes() & attr::DB != 0 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let in_range = if long_code {
            canonical(offset)
        } else {
            offset <= u64::from(d.limit())
        };
        if !in_range {
            return Err(self.gp0());
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment((selector & !3) | u16::from(cpl)))
    }

    fn far_gate_kind(&mut self, selector: u16, d: &Descriptor) -> Result<GateKind, Trap> {
        use system_type::{CALL16, CALL32, TASK_GATE, TSS16, TSS32};
        let long = self.sys.long_mode();
        match d.kind() {
            CALL32 => Ok(GateKind::Call),
            CALL16 if !long => Ok(GateKind::Call),
            TASK_GATE if !long => Ok(GateKind::Task),
            TSS16 | TSS32 if !long => Ok(GateKind::Tss),
            _ => Err(self.selector_fault(vector::GP, selector)),
        }
    }

    fn call_gate(&mut self, selector: u16, d: &Descriptor) -> Result<Gate, Trap> {
        if d.dpl() < self.cpl.max((selector & 3) as u8) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let mut offset = u64::from(d.gate_offset());
        let size = if self.sys.long_mode() {
            offset |= self.read_descriptor_high(selector, vector::GP)? << 32;
            8
        } else if d.kind() == system_type::CALL32 {
            4
        } else {
            2
        };
        Ok(Gate {
            size,
            selector: d.gate_selector(),
            offset,
            parameters: (d.raw >> 32) & 31,
        })
    }

    /// The code segment that a gate leads to.
    fn gate_target(&mut self, gate: &Gate) -> Result<(Descriptor, u16), Trap> {
        let selector = gate.selector;
        if is_null(selector) {
            return Err(self.gp0());
        }
        let d = self.read_descriptor(selector, vector::GP)?;
        let wrong_size = self.sys.long_mode() && d.attributes() & (attr::L | attr::DB) != attr::L;
        if !d.is_code() || d.dpl() > self.cpl || wrong_size {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        Ok((d, selector))
    }

    fn call_through(&mut self, gate: &Gate, return_rip: u64) -> Result<(), Trap> {
        let (code, selector) = self.gate_target(gate)?;
        let cs = self.sys.segments[usize::from(seg::CS)].selector;
        if code.is_conforming() || code.dpl() == self.cpl {
            let mut stack = if self.sys.long_mode() {
                Stack::flat(self.gpr[usize::from(reg::RSP)], self.cpl)
            } else {
                Stack::current(self)
            };
            stack.push(self, gate.size, u64::from(cs))?;
            stack.push(self, gate.size, return_rip)?;
            let cpl = self.cpl;
            self.enter_code(code, selector, gate.offset, cpl)?;
            stack.commit(self);
            return Ok(());
        }
        let cpl = code.dpl();
        let old_ss = self.sys.segments[usize::from(seg::SS)].selector;
        let old_rsp = self.gpr[usize::from(reg::RSP)];
        let caller = Stack::current(self);
        let (ss, mut stack) = self.inner_stack(cpl, vector::TS)?;
        stack.push(self, gate.size, u64::from(old_ss))?;
        stack.push(self, gate.size, old_rsp)?;
        if gate.size != 8 {
            for n in (0..gate.parameters).rev() {
                let parameter = caller.peek(self, gate.size, n * gate.size)?;
                stack.push(self, gate.size, parameter)?;
            }
        }
        stack.push(self, gate.size, u64::from(cs))?;
        stack.push(self, gate.size, return_rip)?;
        let new_cs = self.check_code(code, selector, gate.offset, cpl)?;
        self.set_segment(seg::CS, new_cs);
        self.set_segment(seg::SS, ss);
        self.rip = gate.offset;
        self.update_mode();
        stack.commit(self);
        Ok(())
    }

    /// The stack that the TSS holds for privilege level `cpl` (SDM 3A §§5.8.5, 8.7).
    pub(crate) fn inner_stack(&mut self, cpl: u8, fault: u8) -> Result<(Segment, Stack), Trap> {
        if self.sys.long_mode() {
            let rsp = self.tss_stack64(4 + 8 * u64::from(cpl))?;
            return Ok((null_stack(u16::from(cpl)), Stack::flat(rsp, cpl)));
        }
        let tr = self.sys.tr;
        let wide = tr.attributes & 8 != 0;
        let (offset, size) = if wide {
            (4 + 8 * u64::from(cpl), 4)
        } else {
            (2 + 4 * u64::from(cpl), 2)
        };
        if offset + size + 2 - 1 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector));
        }
        let at = tr.base.wrapping_add(offset) & 0xffff_ffff;
        let sp = if wide {
            u64::from(self.load_lin::<u32>(at, Access::Supervisor)?)
        } else {
            u64::from(self.load_lin::<u16>(at, Access::Supervisor)?)
        };
        let after = at.wrapping_add(size) & 0xffff_ffff;
        let selector = self.load_lin::<u16>(after, Access::Supervisor)?;
        let ss = self.checked_ss(selector, cpl, fault)?;
        let error = u32::from(selector & 0xfffc);
        Ok((ss, Stack::segmented(ss, sp, cpl, error)))
    }

    /// A stack pointer of the 64-bit TSS, at `offset` in it.
    pub(crate) fn tss_stack64(&mut self, offset: u64) -> Result<u64, Trap> {
        let tr = self.sys.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector));
        }
        let rsp = self.load_lin::<u64>(tr.base.wrapping_add(offset), Access::Supervisor)?;
        if !canonical(rsp) {
            return Err(self.fault(vector::SS, 0));
        }
        Ok(rsp)
    }

    /// RET far in protected mode, `stack` past the return address.
    fn return_far(
        &mut self,
        selector: u16,
        rip: u64,
        size: u64,
        mut stack: Stack,
        release: u64,
    ) -> Result<(), Trap> {
        let rpl = (selector & 3) as u8;
        let d = self.return_descriptor(selector)?;
        if rpl == self.cpl {
            let cpl = self.cpl;
            self.enter_code(d, selector, rip, cpl)?;
            stack.release(release);
            stack.commit(self);
            return Ok(());
        }
        stack.release(release);
        let rsp = stack.pop(self, size)?;
        let ss_selector = stack.pop(self, size)? as u16;
        let ss = self.return_stack_segment(ss_selector, rpl, &d)?;
        let cs = self.check_code(d, selector, rip, rpl)?;
        self.set_segment(seg::CS, cs);
        self.set_segment(seg::SS, ss);
        self.rip = rip;
        self.update_mode();
        self.set_outer_rsp(rsp, size);
        let rsp = Stack::current(self);
        let mut rsp = rsp;
        rsp.release(release);
        rsp.commit(self);
        self.drop_inner_segments();
        Ok(())
    }

    /// RSP as an outer level gets it back: the width of its stack.
    pub(crate) fn set_outer_rsp(&mut self, value: u64, size: u64) {
        let ss = self.sys.segments[usize::from(seg::SS)];
        let slot = &mut self.gpr[usize::from(reg::RSP)];
        *slot = if self.sys.mode.is64() {
            truncate(value, size)
        } else if ss.big() {
            value & 0xffff_ffff
        } else {
            (*slot & !0xffff) | (value & 0xffff)
        };
    }

    /// The code segment to which RET and IRET return, checked but for presence of the stack.
    pub(crate) fn return_descriptor(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        let rpl = (selector & 3) as u8;
        let d = self.read_descriptor(selector, vector::GP)?;
        let allowed = d.is_code()
            && rpl >= self.cpl
            && if d.is_conforming() {
                d.dpl() <= rpl
            } else {
                d.dpl() == rpl
            };
        if !allowed {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        Ok(d)
    }

    /// The stack segment of a return to level `cpl`, whose code segment is `code`: null is allowed
    /// when that is 64-bit code above level 3.
    pub(crate) fn return_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        code: &Descriptor,
    ) -> Result<Segment, Trap> {
        if is_null(selector) {
            let long_code = self.sys.long_mode() && code.attributes() & attr::L != 0;
            if long_code && cpl != 3 && (selector & 3) as u8 == cpl {
                return Ok(null_stack(selector));
            }
            return Err(self.gp0());
        }
        self.checked_ss(selector, cpl, vector::GP)
    }
}
