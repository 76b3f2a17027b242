//! Delivery of exceptions and interrupts through the IDT or the interrupt vector table (Intel SDM
//! 3A §§7.10–7.15, 21.3; 2A "INT n").

use crate::code::Op;
use crate::cpu::{Cpu, reg, seg};
use crate::exit::CpuExit;
use crate::flags::rflags;
use crate::mem::Access;
use crate::sys::descriptor::{Descriptor, is_null, system_type};
use crate::sys::events::dr6;
use crate::sys::segment::null_stack;
use crate::sys::stack::Stack;
use crate::sys::state::{Activity, Segment, attr, cr4};
use crate::sys::task::Switch;
use crate::trap::{Trap, TrapKind, vector};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// From outside, or an exception: EXT is set in error codes of faults on the way.
    External,
    /// INT n: gates' DPL counts.
    Software,
    /// INT3, INTO: as INT n, but virtual-8086 mode's IOPL does not count.
    SoftwareException,
}

/// An event on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    pub(crate) source: Source,
    pub(crate) error_code: Option<u32>,
    /// RIP to push.
    pub(crate) return_rip: u64,
    /// Set RF in the pushed flags: the fault's instruction runs again.
    pub(crate) resume_flag: bool,
}

/// A gate of the IDT, checked.
struct Gate {
    selector: u16,
    offset: u64,
    /// Size of what is pushed: 2, 4 or 8 bytes.
    size: u64,
    /// Interrupt rather than trap gate: clears IF.
    interrupt: bool,
    ist: u64,
}

/// The code that handles an event.
struct Handler {
    descriptor: Descriptor,
    selector: u16,
    cpl: u8,
}

fn contributory(vector: u8) -> bool {
    matches!(
        vector,
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP
    )
}

/// What comes of a fault while `first` is delivered (SDM 3A table 7-5).
fn combine(first: u8, second: u8, error_code: Option<u32>) -> (u8, Option<u32>) {
    let double = contributory(first) && contributory(second)
        || first == vector::PF && (second == vector::PF || contributory(second));
    if double {
        (vector::DF, Some(0))
    } else {
        (second, error_code)
    }
}

impl Cpu {
    /// Delivers a fault of the instruction at RIP (page faults have their address in
    /// `self.trap.address`), through double fault up to shutdown.
    pub fn deliver_exception(&mut self, vector: u8, error_code: Option<u32>) -> Option<CpuExit> {
        let resume_flag = vector != vector::DB;
        // Its data breakpoints are met again when it runs again.
        self.sys.events.pending_debug &= !dr6::BREAKPOINTS;
        self.deliver_chain(vector, error_code, resume_flag)
    }

    /// As [`Self::deliver_exception`], for traps: the instruction is done, RF is not set.
    pub(crate) fn deliver_trap(&mut self, vector: u8) -> Option<CpuExit> {
        self.deliver_chain(vector, None, false)
    }

    fn deliver_chain(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
        resume_flag: bool,
    ) -> Option<CpuExit> {
        let (mut vector, mut error_code) = (vector, error_code);
        if vector == vector::PF {
            self.sys.cr2 = self.trap.address;
        }
        loop {
            let event = Event {
                vector,
                source: Source::External,
                error_code,
                return_rip: self.rip,
                resume_flag,
            };
            let (second, code) = self.try_deliver(&event)?;
            if vector == vector::DF {
                return Some(self.shutdown());
            }
            (vector, error_code) = combine(vector, second, code);
        }
    }

    /// Delivers an external interrupt or NMI at an instruction boundary.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Option<CpuExit> {
        let event = Event {
            vector,
            source: Source::External,
            error_code: None,
            return_rip: self.rip,
            resume_flag: false,
        };
        match self.try_deliver(&event) {
            None => None,
            // A fault on the way of a benign event is delivered in its place.
            Some((second, code)) => self.deliver_chain(second, code, true),
        }
    }

    /// `None` if it went through, else the fault on the way.
    fn try_deliver(&mut self, event: &Event) -> Option<(u8, Option<u32>)> {
        match self.deliver_event(event) {
            Ok(()) => {
                self.event_delivered();
                None
            }
            Err(Trap) => match std::mem::take(&mut self.trap.kind) {
                TrapKind::Fault { vector, error_code } => {
                    if vector == vector::PF {
                        self.sys.cr2 = self.trap.address;
                    }
                    let selector_error =
                        matches!(vector, vector::TS | vector::NP | vector::SS | vector::GP);
                    let ext = u32::from(selector_error);
                    Some((vector, error_code.map(|c| c | ext)))
                }
                // Tables or stack in device memory: nothing a machine does with that is useful.
                _ => Some((vector::DF, Some(0))),
            },
        }
    }

    fn event_delivered(&mut self) {
        let events = &mut self.sys.events;
        events.sti_shadow = false;
        events.mov_ss_shadow = false;
        events.step = None;
        self.sys.activity = Activity::Running;
    }

    fn shutdown(&mut self) -> CpuExit {
        self.sys.activity = Activity::Shutdown;
        CpuExit::Shutdown
    }

    /// INT n, INT3, INTO, INT1 as instructions: faults are the instruction's.
    pub(crate) fn software_interrupt(
        &mut self,
        op: &Op,
        vector: u8,
        source: Source,
    ) -> Result<(), Trap> {
        let event = Event {
            vector,
            source,
            error_code: None,
            return_rip: self.next_rip(op),
            resume_flag: false,
        };
        self.deliver_event(&event)?;
        // The single-step trap of an INT instruction is lost (SDM 3B §18.3.1.4).
        self.sys.events.step = None;
        Ok(())
    }

    pub(crate) fn deliver_event(&mut self, event: &Event) -> Result<(), Trap> {
        if !self.sys.protected() {
            return self.deliver_real(event, 0);
        }
        if self.in_v86() && event.source == Source::Software {
            if self.sys.cr4 & cr4::VME != 0 && !self.redirected(event.vector)? {
                return self.deliver_vme(event);
            }
            if self.iopl() < 3 {
                return Err(self.gp0());
            }
        }
        self.deliver_protected(event)
    }

    /// Real-address mode: IP and CS from the vector table. `base` is its linear address.
    fn deliver_real(&mut self, event: &Event, flags_mask: u64) -> Result<(), Trap> {
        let entry = u64::from(event.vector) * 4;
        let idt = self.sys.idt;
        let v86 = self.in_v86();
        if !v86 && entry + 3 > u64::from(idt.limit) {
            return Err(self.fault(vector::GP, u32::from(event.vector) * 8 + 2));
        }
        let base = if v86 { 0 } else { idt.base };
        let at = base.wrapping_add(entry) & 0xffff_ffff;
        let target = self.load_lin::<u32>(at, Access::Supervisor)?;
        let (ip, selector) = (u64::from(target & 0xffff), (target >> 16) as u16);
        let mut flags = self.rflags_full();
        if flags_mask != 0 {
            // VME with IOPL below 3: the program sees VIF as IF, and IOPL 3.
            flags = (flags & !rflags::IF) | rflags::IOPL;
            if self.rflags & rflags::VIF != 0 {
                flags |= rflags::IF;
            }
        }
        let cs = self.sys.segments[usize::from(seg::CS)].selector;
        let mut stack = Stack::current(self);
        stack.push(self, 2, flags)?;
        stack.push(self, 2, u64::from(cs))?;
        stack.push(self, 2, event.return_rip)?;
        self.enter_real(selector, ip)?;
        stack.commit(self);
        let cleared = if flags_mask != 0 {
            flags_mask
        } else {
            rflags::IF
        };
        let flags = self.rflags_full() & !(cleared | rflags::TF | rflags::AC | rflags::RF);
        self.set_rflags(flags);
        Ok(())
    }

    /// Virtual-8086 mode with VME: through the program's own vector table (SDM 3B §21.3).
    fn deliver_vme(&mut self, event: &Event) -> Result<(), Trap> {
        let mask = if self.iopl() == 3 {
            0
        } else {
            rflags::VIF | rflags::NT
        };
        self.deliver_real(event, mask)
    }

    /// Whether the TSS's bit map sends a software interrupt of virtual-8086 mode to the monitor.
    fn redirected(&mut self, vector: u8) -> Result<bool, Trap> {
        let tr = self.sys.tr;
        let limit = u64::from(tr.limit);
        if limit < 0x67 {
            return Ok(true);
        }
        let at = tr.base.wrapping_add(0x66) & 0xffff_ffff;
        let io_map = u64::from(self.load_lin::<u16>(at, Access::Supervisor)?);
        let Some(byte) = (io_map + u64::from(vector / 8)).checked_sub(32) else {
            return Ok(true);
        };
        if byte > limit {
            return Ok(true);
        }
        let at = tr.base.wrapping_add(byte) & 0xffff_ffff;
        let bits = self.load_lin::<u8>(at, Access::Supervisor)?;
        Ok(bits & (1 << (vector & 7)) != 0)
    }

    fn deliver_protected(&mut self, event: &Event) -> Result<(), Trap> {
        let (d, gate_address) = self.idt_gate(event)?;
        if d.kind() == system_type::TASK_GATE && !self.sys.long_mode() {
            self.switch_by_gate_selector(d.gate_selector(), Switch::Call, event.return_rip)?;
            if let Some(error) = event.error_code {
                self.push_task_error(error)?;
            }
            return Ok(());
        }
        let gate = self.interrupt_gate(&d, gate_address)?;
        let handler = self.handler_code(&gate)?;
        if self.sys.long_mode() {
            self.enter_handler_long(event, &gate, &handler)
        } else {
            self.enter_handler_legacy(event, &gate, &handler)
        }
    }

    /// The IDT's entry, with the checks that don't depend on its kind.
    fn idt_gate(&mut self, event: &Event) -> Result<(Descriptor, u64), Trap> {
        use system_type::{INTERRUPT16, INTERRUPT32, TASK_GATE, TRAP16, TRAP32};
        let long = self.sys.long_mode();
        let size = if long { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        let error = u32::from(event.vector) * 8 + 2;
        if offset + size - 1 > u64::from(self.sys.idt.limit) {
            return Err(self.fault(vector::GP, error));
        }
        let address = self.table_address(self.sys.idt.base.wrapping_add(offset));
        let raw = self.load_lin::<u64>(address, Access::Supervisor)?;
        let d = Descriptor { address, raw };
        let known = match d.kind() {
            INTERRUPT32 | TRAP32 => true,
            INTERRUPT16 | TRAP16 | TASK_GATE => !long,
            _ => false,
        };
        let software = event.source != Source::External;
        if d.is_segment() || !known || software && d.dpl() < self.cpl {
            return Err(self.fault(vector::GP, error));
        }
        if !d.present() {
            return Err(self.fault(vector::NP, error));
        }
        Ok((d, address))
    }

    fn interrupt_gate(&mut self, d: &Descriptor, address: u64) -> Result<Gate, Trap> {
        let long = self.sys.long_mode();
        let mut offset = u64::from(d.gate_offset());
        let mut ist = 0;
        if long {
            let high = self.load_lin::<u32>(address.wrapping_add(8), Access::Supervisor)?;
            offset |= u64::from(high) << 32;
            ist = (d.raw >> 32) & 7;
        }
        let size = match (long, d.kind() & 8 != 0) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        };
        Ok(Gate {
            selector: d.gate_selector(),
            offset,
            size,
            interrupt: d.kind() & 1 == 0,
            ist,
        })
    }

    fn handler_code(&mut self, gate: &Gate) -> Result<Handler, Trap> {
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
        let cpl = if d.is_conforming() { self.cpl } else { d.dpl() };
        if self.in_v86() && cpl != 0 {
            return Err(self.selector_fault(vector::GP, selector));
        }
        Ok(Handler {
            descriptor: d,
            selector,
            cpl,
        })
    }

    fn pushed_flags(&self, event: &Event) -> u64 {
        let flags = self.rflags_full();
        if event.resume_flag {
            flags | rflags::RF
        } else {
            flags
        }
    }

    /// Flags of the handler.
    fn clear_handler_flags(&mut self, gate: &Gate) {
        let mut cleared = rflags::TF | rflags::NT | rflags::VM | rflags::RF;
        if gate.interrupt {
            cleared |= rflags::IF;
        }
        let flags = self.rflags_full() & !cleared;
        self.set_rflags(flags);
    }

    /// IA-32e mode: the stack is aligned, and SS:RSP is always pushed (SDM 3A §7.14).
    fn enter_handler_long(
        &mut self,
        event: &Event,
        gate: &Gate,
        handler: &Handler,
    ) -> Result<(), Trap> {
        let old_rsp = self.gpr[usize::from(reg::RSP)];
        let inner = handler.cpl < self.cpl;
        let rsp = if gate.ist != 0 {
            self.tss_stack64(0x24 + 8 * (gate.ist - 1))?
        } else if inner {
            self.tss_stack64(4 + 8 * u64::from(handler.cpl))?
        } else {
            old_rsp
        };
        let mut stack = Stack::flat(rsp & !15, handler.cpl);
        let ss = self.sys.segments[usize::from(seg::SS)].selector;
        let cs = self.sys.segments[usize::from(seg::CS)].selector;
        let flags = self.pushed_flags(event);
        stack.push(self, 8, u64::from(ss))?;
        stack.push(self, 8, old_rsp)?;
        stack.push(self, 8, flags)?;
        stack.push(self, 8, u64::from(cs))?;
        stack.push(self, 8, event.return_rip)?;
        if let Some(error) = event.error_code {
            stack.push(self, 8, u64::from(error))?;
        }
        let cs = self.check_code(
            handler.descriptor,
            handler.selector,
            gate.offset,
            handler.cpl,
        )?;
        self.set_segment(seg::CS, cs);
        if inner {
            self.set_segment(seg::SS, null_stack(u16::from(handler.cpl)));
        }
        self.rip = gate.offset;
        self.gpr[usize::from(reg::RSP)] = stack.pointer;
        self.clear_handler_flags(gate);
        self.update_mode();
        Ok(())
    }

    fn enter_handler_legacy(
        &mut self,
        event: &Event,
        gate: &Gate,
        handler: &Handler,
    ) -> Result<(), Trap> {
        let size = gate.size;
        let segments = self.sys.segments;
        let selector = |index: u8| u64::from(segments[usize::from(index)].selector);
        let old_rsp = self.gpr[usize::from(reg::RSP)];
        let v86 = self.in_v86();
        let inner = handler.cpl < self.cpl;
        let (ss, mut stack) = if inner {
            let (ss, stack) = self.inner_stack(handler.cpl, vector::TS)?;
            (Some(ss), stack)
        } else {
            (None, Stack::current(self))
        };
        if v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(self, size, selector(index))?;
            }
        }
        if inner {
            stack.push(self, size, selector(seg::SS))?;
            stack.push(self, size, old_rsp)?;
        }
        let flags = self.pushed_flags(event);
        stack.push(self, size, flags)?;
        stack.push(self, size, selector(seg::CS))?;
        stack.push(self, size, event.return_rip)?;
        if let Some(error) = event.error_code {
            stack.push(self, size, u64::from(error))?;
        }
        let cs = self.check_code(
            handler.descriptor,
            handler.selector,
            gate.offset,
            handler.cpl,
        )?;
        self.set_segment(seg::CS, cs);
        if let Some(ss) = ss {
            self.set_segment(seg::SS, ss);
        }
        if v86 {
            for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.set_segment(index, Segment::null(0));
            }
        }
        self.rip = gate.offset;
        self.clear_handler_flags(gate);
        self.update_mode();
        stack.commit(self);
        Ok(())
    }
}

/// INT n.
pub(super) fn int_n(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.software_interrupt(op, op.imm as u8, Source::Software)
}

/// INT3.
pub(super) fn int3(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.software_interrupt(op, vector::BP, Source::SoftwareException)
}

/// INT1: a #DB as from outside, without a bit of its own in DR6; no gate DPL check. Breakpoints
/// that MOV SS held back come with it.
pub(super) fn int1(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.software_interrupt(op, vector::DB, Source::External)?;
    let held = std::mem::take(&mut cpu.sys.events.pending_debug);
    if held != 0 {
        cpu.sys.dr6 = (cpu.sys.dr6 & !dr6::BREAKPOINTS) | held;
    }
    Ok(())
}

/// INTO.
pub(super) fn into(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.flags.of() {
        cpu.software_interrupt(op, vector::OF, Source::SoftwareException)
    } else {
        cpu.rip = cpu.next_rip(op);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_fault_table() {
        assert_eq!(combine(vector::GP, vector::NP, Some(8)).0, vector::DF);
        assert_eq!(combine(vector::PF, vector::PF, Some(2)).0, vector::DF);
        assert_eq!(combine(vector::PF, vector::TS, Some(8)).0, vector::DF);
        assert_eq!(
            combine(vector::GP, vector::PF, Some(2)),
            (vector::PF, Some(2))
        );
        assert_eq!(
            combine(vector::UD, vector::GP, Some(8)),
            (vector::GP, Some(8))
        );
        assert_eq!(
            combine(vector::DB, vector::PF, Some(0)),
            (vector::PF, Some(0))
        );
        assert_eq!(
            combine(vector::DE, vector::SS, Some(0)),
            (vector::DF, Some(0))
        );
    }
}
