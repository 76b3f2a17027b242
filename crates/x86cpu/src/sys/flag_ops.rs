//! Instructions that move or change RFLAGS as a whole, and the interrupt flag (Intel SDM 2A "CLI",
//! 2B "POPF", "PUSHF", "STI"; 3B §21.3 for virtual-8086 mode extensions).

use crate::code::Op;
use crate::cpu::Cpu;
use crate::flags::rflags;
use crate::sys::operand::size_of_op;
use crate::sys::stack::Stack;
use crate::sys::state::cr4;
use crate::trap::Trap;

/// What governs IF at the current level.
enum InterruptFlag {
    /// IF itself.
    Real,
    /// VIF in its place (VME or PVI).
    Virtual,
    /// #GP.
    Forbidden,
}

impl Cpu {
    fn interrupt_flag(&self) -> InterruptFlag {
        if self.cpl <= self.iopl() {
            InterruptFlag::Real
        } else if self.in_v86() && self.sys.cr4 & cr4::VME != 0
            || self.cpl == 3 && !self.in_v86() && self.sys.cr4 & cr4::PVI != 0
        {
            InterruptFlag::Virtual
        } else {
            InterruptFlag::Forbidden
        }
    }

    /// After an instruction that raised IF or changed flags that need attention at once: leaves
    /// the block if there is something to do.
    fn flags_changed(&mut self, op: &Op) -> Result<(), Trap> {
        if self.must_leave_block() {
            self.rip = self.next_rip(op);
            // It is complete, and whoever ran it takes it off with the rest of its block.
            self.instructions += 1;
            return Err(self.resume());
        }
        Ok(())
    }
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    match cpu.interrupt_flag() {
        InterruptFlag::Real => cpu.rflags &= !rflags::IF,
        InterruptFlag::Virtual => cpu.rflags &= !rflags::VIF,
        InterruptFlag::Forbidden => return Err(cpu.gp0()),
    }
    Ok(())
}

/// STI. With nothing waiting the block goes on, and the next instruction is out of the shadow
/// before anything is looked at; else the shadow is kept, one instruction runs, and what waits has
/// its turn before a CLI behind it.
pub(super) fn sti(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    match cpu.interrupt_flag() {
        InterruptFlag::Real => {
            if cpu.rflags & rflags::IF == 0 {
                cpu.rflags |= rflags::IF;
                cpu.sys.events.sti_shadow = true;
                cpu.sys.events.shadow_rip = cpu.next_rip(op);
                cpu.want_events_if_pending();
                return cpu.flags_changed(op);
            }
        }
        InterruptFlag::Virtual => {
            if cpu.rflags & rflags::VIP != 0 {
                return Err(cpu.gp0());
            }
            cpu.rflags |= rflags::VIF;
        }
        InterruptFlag::Forbidden => return Err(cpu.gp0()),
    }
    Ok(())
}

/// PUSHF.
pub(super) fn pushf(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = size_of_op(op);
    let mut flags = cpu.rflags_full() & !(rflags::RF | rflags::VM);
    if cpu.in_v86() && cpu.iopl() < 3 {
        if cpu.sys.cr4 & cr4::VME == 0 || size != 2 {
            return Err(cpu.gp0());
        }
        flags = (flags & !rflags::IF) | rflags::IOPL;
        if flags & rflags::VIF != 0 {
            flags |= rflags::IF;
        }
    }
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, flags)?;
    stack.commit(cpu);
    Ok(())
}

/// POPF.
pub(super) fn popf(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    const ALWAYS: u64 =
        rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    let size = size_of_op(op);
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    let mut mask = ALWAYS;
    let mut virtual_flag = None;
    if cpu.in_v86() && cpu.iopl() < 3 {
        if cpu.sys.cr4 & cr4::VME == 0 || size != 2 {
            return Err(cpu.gp0());
        }
        let enables = image & rflags::IF != 0;
        if image & rflags::TF != 0 || enables && cpu.rflags & rflags::VIP != 0 {
            return Err(cpu.gp0());
        }
        virtual_flag = Some(enables);
    } else {
        if cpu.cpl <= cpu.iopl() {
            mask |= rflags::IF;
        }
        if cpu.cpl == 0 {
            mask |= rflags::IOPL;
        }
    }
    stack.commit(cpu);
    let old = cpu.rflags;
    cpu.rflags &= !rflags::RF;
    cpu.restore_flags(image, size, mask);
    if let Some(enables) = virtual_flag {
        cpu.rflags &= !rflags::VIF;
        if enables {
            cpu.rflags |= rflags::VIF;
        }
    }
    let urgent = rflags::TF | rflags::IF | rflags::AC;
    if (old ^ cpu.rflags) & urgent != 0 {
        cpu.flags_changed(op)
    } else {
        Ok(())
    }
}

/// CLAC (`imm` 0), STAC (1).
pub(super) fn set_ac(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    let flags = cpu.rflags_full() & !rflags::AC;
    cpu.set_rflags(flags | if op.imm != 0 { rflags::AC } else { 0 });
    Ok(())
}
