//! IRET in all its forms (Intel SDM 2A "IRET").

use crate::code::Op;
use crate::cpu::{Cpu, reg, seg};
use crate::flags::rflags;
use crate::sys::operand::size_of_op;
use crate::sys::stack::Stack;
use crate::sys::state::{Segment, cr4};
use crate::trap::Trap;

/// Flags that IRET always restores.
const ALWAYS: u64 = rflags::ARITHMETIC
    | rflags::TF
    | rflags::DF
    | rflags::NT
    | rflags::RF
    | rflags::AC
    | rflags::ID;

pub(super) fn iret(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = size_of_op(op);
    if !cpu.sys.protected() {
        cpu.iret_real(size)?;
    } else if cpu.in_v86() {
        cpu.iret_v86(size)?;
    } else if cpu.rflags & rflags::NT != 0 {
        if cpu.sys.long_mode() {
            return Err(cpu.gp0());
        }
        let next = cpu.next_rip(op);
        cpu.return_from_task(next)?;
    } else {
        cpu.iret_protected(size)?;
    }
    if std::mem::take(&mut cpu.sys.events.nmi_masked) && cpu.sys.events.nmis_pending != 0 {
        cpu.want_events();
    }
    Ok(())
}

impl Cpu {
    fn iret_real(&mut self, size: u64) -> Result<(), Trap> {
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        self.enter_real(selector, rip)?;
        stack.commit(self);
        self.restore_flags(flags, size, ALWAYS | rflags::IF | rflags::IOPL);
        Ok(())
    }

    fn iret_v86(&mut self, size: u64) -> Result<(), Trap> {
        if self.iopl() == 3 {
            let mut stack = Stack::current(self);
            let rip = stack.pop(self, size)?;
            let selector = stack.pop(self, size)? as u16;
            let flags = stack.pop(self, size)?;
            self.enter_real(selector, rip)?;
            stack.commit(self);
            self.restore_flags(flags, size, ALWAYS | rflags::IF);
            return Ok(());
        }
        if self.sys.cr4 & cr4::VME == 0 || size != 2 {
            return Err(self.gp0());
        }
        // VME: IF stands for VIF.
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        let enables = flags & rflags::IF != 0;
        if flags & rflags::TF != 0 || enables && self.rflags & rflags::VIP != 0 {
            return Err(self.gp0());
        }
        self.enter_real(selector, rip)?;
        stack.commit(self);
        self.restore_flags(flags, size, ALWAYS);
        self.rflags = (self.rflags & !rflags::VIF) | if enables { rflags::VIF } else { 0 };
        Ok(())
    }

    fn iret_protected(&mut self, size: u64) -> Result<(), Trap> {
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        let to_v86 = flags & rflags::VM != 0 && self.cpl == 0 && size == 4;
        if to_v86 && !self.sys.long_mode() {
            return self.iret_to_v86(rip, selector, flags, stack);
        }
        let d = self.return_descriptor(selector)?;
        let cpl = (selector & 3) as u8;
        let mut mask = ALWAYS;
        if self.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.cpl == 0 {
            mask |= rflags::IOPL | rflags::VIF | rflags::VIP;
        }
        let from64 = self.sys.mode.is64();
        if cpl == self.cpl && !from64 {
            self.enter_code(d, selector, rip, cpl)?;
            stack.commit(self);
            self.restore_flags(flags, size, mask);
            return Ok(());
        }
        // An outer level, or 64-bit mode, which always pops SS:RSP.
        let rsp = stack.pop(self, size)?;
        let ss_selector = stack.pop(self, size)? as u16;
        let ss = self.return_stack_segment(ss_selector, cpl, &d)?;
        let cs = self.check_code(d, selector, rip, cpl)?;
        self.set_segment(seg::CS, cs);
        self.set_segment(seg::SS, ss);
        self.rip = rip;
        self.update_mode();
        self.set_outer_rsp(rsp, size);
        self.restore_flags(flags, size, mask);
        self.drop_inner_segments();
        Ok(())
    }

    fn iret_to_v86(
        &mut self,
        rip: u64,
        selector: u16,
        flags: u64,
        mut stack: Stack,
    ) -> Result<(), Trap> {
        let rsp = stack.pop(self, 4)?;
        let mut selectors = [0; 5];
        for slot in &mut selectors {
            *slot = stack.pop(self, 4)? as u16;
        }
        if rip > 0xffff {
            return Err(self.gp0());
        }
        let [ss, es, ds, fs, gs] = selectors;
        for (index, selector) in [
            (seg::CS, selector),
            (seg::SS, ss),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ] {
            self.set_segment(index, Segment::v86(selector));
        }
        self.rip = rip;
        self.gpr[usize::from(reg::RSP)] = rsp & 0xffff_ffff;
        let all = ALWAYS | rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP;
        self.restore_flags(flags, 4, all);
        self.update_mode();
        Ok(())
    }

    /// Replaces the flags in `mask`; a 16-bit image reaches the low sixteen only.
    pub(crate) fn restore_flags(&mut self, image: u64, size: u64, mask: u64) {
        let mask = if size == 2 { mask & 0xffff } else { mask };
        let flags = (self.rflags_full() & !mask) | (image & mask);
        self.set_rflags(flags);
    }
}
