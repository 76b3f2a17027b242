//! Task switches by JMP, CALL, interrupt and IRET, outside of IA-32e mode (Intel SDM 3A chapter 8).

use crate::cpu::{Cpu, reg, seg};
use crate::flags::rflags;
use crate::mem::Access;
use crate::sys::descriptor::{Descriptor, is_null, system_type};
use crate::sys::segment::BUSY;
use crate::sys::stack::Stack;
use crate::sys::state::{Segment, cr0};
use crate::trap::{Trap, vector};

/// What causes the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    /// JMP: the old task is no longer busy.
    Jump,
    /// CALL or an event: nested, linked back.
    Call,
    /// IRET with NT set.
    Return,
}

/// The fields that a switch saves and loads.
#[derive(Clone, Copy, Debug, Default)]
struct Task {
    cr3: u32,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

const LINK: u64 = 0;
const LIMIT32: u32 = 0x67;
const LIMIT16: u32 = 0x2b;

impl Cpu {
    /// Switch through a task gate.
    pub(crate) fn switch_through_gate(
        &mut self,
        selector: u16,
        gate: &Descriptor,
        cause: Switch,
        return_rip: u64,
    ) -> Result<(), Trap> {
        if gate.dpl() < self.cpl.max((selector & 3) as u8) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !gate.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.switch_by_gate_selector(gate.gate_selector(), cause, return_rip)
    }

    /// The TSS that a task gate names must be global and available.
    pub(crate) fn switch_by_gate_selector(
        &mut self,
        selector: u16,
        cause: Switch,
        return_rip: u64,
    ) -> Result<(), Trap> {
        if selector & 4 != 0 || is_null(selector) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let d = self.read_descriptor(selector, vector::GP)?;
        let available = matches!(d.kind(), system_type::TSS16 | system_type::TSS32);
        if d.is_segment() || !available {
            return Err(self.selector_fault(vector::GP, selector));
        }
        self.task_switch(selector, &d, cause, return_rip)
    }

    /// Switch to a TSS named directly.
    pub(crate) fn switch_to_tss(
        &mut self,
        selector: u16,
        d: &Descriptor,
        cause: Switch,
        return_rip: u64,
    ) -> Result<(), Trap> {
        if selector & 4 != 0 || d.dpl() < self.cpl.max((selector & 3) as u8) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        self.task_switch(selector, d, cause, return_rip)
    }

    /// IRET with NT: back to the task that the link names.
    pub(crate) fn return_from_task(&mut self, return_rip: u64) -> Result<(), Trap> {
        let base = self.sys.tr.base;
        let link = self.load_lin::<u16>(
            self.table_address(base.wrapping_add(LINK)),
            Access::Supervisor,
        )?;
        if link & 4 != 0 || is_null(link) {
            return Err(self.selector_fault(vector::TS, link));
        }
        let d = self.read_descriptor(link, vector::TS)?;
        let busy = matches!(d.kind(), system_type::TSS16_BUSY | system_type::TSS32_BUSY);
        if d.is_segment() || !busy {
            return Err(self.selector_fault(vector::TS, link));
        }
        self.task_switch(link, &d, Switch::Return, return_rip)
    }

    fn task_switch(
        &mut self,
        selector: u16,
        target: &Descriptor,
        cause: Switch,
        return_rip: u64,
    ) -> Result<(), Trap> {
        let mut target = *target;
        let wide = target.kind() & 8 != 0;
        if !target.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        if target.limit() < if wide { LIMIT32 } else { LIMIT16 } {
            return Err(self.selector_fault(vector::TS, selector));
        }
        let base = target.base();
        // Everything that may fault before the commit point comes first (SDM 3A §8.3).
        let task = self.read_task(base, wide)?;
        self.save_task(return_rip, cause)?;
        if cause != Switch::Call {
            self.clear_busy()?;
        }
        if cause == Switch::Call {
            let old = self.sys.tr.selector;
            self.store_lin::<u16>(
                base.wrapping_add(LINK) & 0xffff_ffff,
                old,
                Access::Supervisor,
            )?;
        }
        if cause != Switch::Return {
            self.mark_descriptor(&mut target, BUSY)?;
        }
        // Committed: from here on faults are the new task's.
        let mut tr = target.segment(selector);
        tr.attributes |= BUSY as u16;
        self.sys.tr = tr;
        self.sys.cr0 |= cr0::TS;
        self.load_task(&task, wide, cause)
    }

    fn clear_busy(&mut self) -> Result<(), Trap> {
        let selector = self.sys.tr.selector;
        let d = self.read_descriptor(selector, vector::TS)?;
        let byte = ((d.raw >> 40) & !BUSY) as u8;
        self.store_lin::<u8>(d.address.wrapping_add(5), byte, Access::Supervisor)
    }

    fn read_task(&mut self, base: u64, wide: bool) -> Result<Task, Trap> {
        let mut task = Task::default();
        let word = |cpu: &mut Self, at: u64| {
            cpu.load_lin::<u16>(base.wrapping_add(at) & 0xffff_ffff, Access::Supervisor)
        };
        if wide {
            let long = |cpu: &mut Self, at: u64| {
                cpu.load_lin::<u32>(base.wrapping_add(at) & 0xffff_ffff, Access::Supervisor)
            };
            task.cr3 = long(self, 0x1c)?;
            task.eip = long(self, 0x20)?;
            task.eflags = long(self, 0x24)?;
            for (n, slot) in task.gpr.iter_mut().enumerate() {
                *slot = long(self, 0x28 + 4 * n as u64)?;
            }
            for (n, slot) in task.segments.iter_mut().enumerate() {
                *slot = word(self, 0x48 + 4 * n as u64)?;
            }
            task.ldt = word(self, 0x60)?;
            task.trap = word(self, 0x64)? & 1 != 0;
        } else {
            task.eip = u32::from(word(self, 0x0e)?);
            task.eflags = u32::from(word(self, 0x10)?);
            for (n, slot) in task.gpr.iter_mut().enumerate() {
                *slot = u32::from(word(self, 0x12 + 2 * n as u64)?) | 0xffff_0000;
            }
            for (n, slot) in task.segments[..4].iter_mut().enumerate() {
                *slot = word(self, 0x22 + 2 * n as u64)?;
            }
            task.ldt = word(self, 0x2a)?;
        }
        Ok(task)
    }

    fn save_task(&mut self, return_rip: u64, cause: Switch) -> Result<(), Trap> {
        let (base, wide) = (self.sys.tr.base, self.sys.tr.attributes & 8 != 0);
        let mut flags = self.rflags_full() as u32;
        if cause == Switch::Return {
            flags &= !(rflags::NT as u32);
        }
        let selectors = self.sys.segments.map(|s| s.selector);
        let at = |offset: u64| base.wrapping_add(offset) & 0xffff_ffff;
        if wide {
            self.store_lin::<u32>(at(0x20), return_rip as u32, Access::Supervisor)?;
            self.store_lin::<u32>(at(0x24), flags, Access::Supervisor)?;
            for n in 0..8u64 {
                let value = self.gpr[n as usize] as u32;
                self.store_lin::<u32>(at(0x28 + 4 * n), value, Access::Supervisor)?;
            }
            for (n, selector) in selectors.iter().enumerate() {
                self.store_lin::<u16>(at(0x48 + 4 * n as u64), *selector, Access::Supervisor)?;
            }
        } else {
            self.store_lin::<u16>(at(0x0e), return_rip as u16, Access::Supervisor)?;
            self.store_lin::<u16>(at(0x10), flags as u16, Access::Supervisor)?;
            for n in 0..8u64 {
                let value = self.gpr[n as usize] as u16;
                self.store_lin::<u16>(at(0x12 + 2 * n), value, Access::Supervisor)?;
            }
            for (n, selector) in selectors[..4].iter().enumerate() {
                self.store_lin::<u16>(at(0x22 + 2 * n as u64), *selector, Access::Supervisor)?;
            }
        }
        Ok(())
    }

    fn load_task(&mut self, task: &Task, wide: bool, cause: Switch) -> Result<(), Trap> {
        if wide && self.sys.cr0 & cr0::PG != 0 {
            self.load_cr3(u64::from(task.cr3), false)?;
        }
        let mut flags = u64::from(task.eflags) & FLAGS_LOADED | rflags::FIXED;
        if cause == Switch::Call {
            flags |= rflags::NT;
        }
        for (n, value) in task.gpr.iter().enumerate() {
            self.gpr[n] = u64::from(*value);
        }
        self.rip = u64::from(task.eip);
        // Selectors first, unusable: a fault while they are loaded is taken in the new task.
        for (n, selector) in task.segments.iter().enumerate() {
            self.set_segment(n as u8, Segment::null(*selector));
        }
        let cpl = if flags & rflags::VM != 0 {
            3
        } else {
            (task.segments[usize::from(seg::CS)] & 3) as u8
        };
        self.sys.segments[usize::from(seg::SS)].attributes = u16::from(cpl) << 5;
        self.set_rflags(flags);
        self.update_mode();
        self.sys.dr7 &= !0x155;
        self.load_task_segments(task, cpl)?;
        if self.rip > u64::from(self.sys.segments[usize::from(seg::CS)].limit) {
            return Err(self.gp0());
        }
        if task.trap {
            self.sys.events.pending_debug |= 1 << 15;
            self.want_events();
        }
        Ok(())
    }

    fn load_task_segments(&mut self, task: &Task, cpl: u8) -> Result<(), Trap> {
        self.load_ldt(task.ldt, vector::TS)?;
        if self.in_v86() {
            for (n, selector) in task.segments.iter().enumerate() {
                self.set_segment(n as u8, Segment::v86(*selector));
            }
            self.update_mode();
            return Ok(());
        }
        let selector = task.segments[usize::from(seg::SS)];
        let ss = self.checked_ss(selector, cpl, vector::TS)?;
        self.set_segment(seg::SS, ss);
        let selector = task.segments[usize::from(seg::CS)];
        if is_null(selector) {
            return Err(self.selector_fault(vector::TS, selector));
        }
        let mut d = self.read_descriptor(selector, vector::TS)?;
        let allowed = d.is_code()
            && if d.is_conforming() {
                d.dpl() <= cpl
            } else {
                d.dpl() == cpl
            };
        if !allowed {
            return Err(self.selector_fault(vector::TS, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut d)?;
        self.set_segment(seg::CS, d.segment(selector));
        self.update_mode();
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = task.segments[usize::from(index)];
            self.load_task_data_segment(index, selector)?;
        }
        Ok(())
    }

    fn load_task_data_segment(&mut self, index: u8, selector: u16) -> Result<(), Trap> {
        if is_null(selector) {
            return Ok(());
        }
        let mut d = self.read_descriptor(selector, vector::TS)?;
        let rpl = (selector & 3) as u8;
        if !d.is_readable() || !d.is_conforming() && d.dpl() < self.cpl.max(rpl) {
            return Err(self.selector_fault(vector::TS, selector));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut d)?;
        self.set_segment(index, d.segment(selector));
        Ok(())
    }

    /// Pushes the error code of an exception that came through a task gate, on the new stack.
    pub(crate) fn push_task_error(&mut self, error: u32) -> Result<(), Trap> {
        let size = if self.sys.tr.attributes & 8 != 0 {
            4
        } else {
            2
        };
        let mut stack = Stack::current(self);
        stack.push(self, size, u64::from(error))?;
        stack.commit(self);
        Ok(())
    }
}

/// Flags that a TSS can set.
const FLAGS_LOADED: u64 = rflags::ARITHMETIC
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::VIF
    | rflags::VIP
    | rflags::ID;

const _: () = assert!(reg::RDI == 7);
