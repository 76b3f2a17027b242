//! The stack of a far transfer or event: read and written before any register changes.

use crate::cpu::{Cpu, reg, seg};
use crate::mem::Access;
use crate::sys::descriptor::canonical;
use crate::sys::state::Segment;
use crate::trap::{Trap, vector};

/// A stack in the making: the pointer moves here, and goes to RSP when all is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    /// `None` in 64-bit mode: flat.
    segment: Option<Segment>,
    /// Error code of stack faults: the selector of a new stack, 0 for the current one.
    error: u32,
    access: Access,
    mask: u64,
    /// Stack pointer.
    pub(crate) pointer: u64,
}

impl Stack {
    /// A 64-bit stack, accessed at privilege level `cpl`.
    pub(crate) fn flat(pointer: u64, cpl: u8) -> Self {
        Self {
            segment: None,
            error: 0,
            access: access_at(cpl),
            mask: u64::MAX,
            pointer,
        }
    }

    /// A stack in `segment`; its faults carry `error`.
    pub(crate) fn segmented(segment: Segment, pointer: u64, cpl: u8, error: u32) -> Self {
        let mask = if segment.big() { 0xffff_ffff } else { 0xffff };
        Self {
            segment: Some(segment),
            error,
            access: access_at(cpl),
            mask,
            pointer: pointer & mask,
        }
    }

    /// The current stack.
    pub(crate) fn current(cpu: &Cpu) -> Self {
        let rsp = cpu.gpr[usize::from(reg::RSP)];
        if cpu.sys.mode.is64() {
            Self::flat(rsp, cpu.cpl)
        } else {
            let ss = cpu.sys.segments[usize::from(seg::SS)];
            Self::segmented(ss, rsp, cpu.cpl, 0)
        }
    }

    fn linear(&self, cpu: &mut Cpu, offset: u64, size: u64) -> Result<u64, Trap> {
        match &self.segment {
            None => {
                if canonical(offset) && canonical(offset.wrapping_add(size - 1)) {
                    Ok(offset)
                } else {
                    Err(cpu.fault(vector::SS, self.error))
                }
            }
            Some(segment) => {
                if segment.unusable || !segment.contains(offset, size) {
                    Err(cpu.fault(vector::SS, self.error))
                } else {
                    Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
                }
            }
        }
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Result<(), Trap> {
        let to = self.pointer.wrapping_sub(size) & self.mask;
        let linear = self.linear(cpu, to, size)?;
        match size {
            2 => cpu.store_lin::<u16>(linear, value as u16, self.access)?,
            4 => cpu.store_lin::<u32>(linear, value as u32, self.access)?,
            _ => cpu.store_lin::<u64>(linear, value, self.access)?,
        }
        self.pointer = to;
        Ok(())
    }

    /// Reads `size` bytes at `offset` above the pointer.
    pub(crate) fn peek(&self, cpu: &mut Cpu, size: u64, offset: u64) -> Result<u64, Trap> {
        let from = self.pointer.wrapping_add(offset) & self.mask;
        let linear = self.linear(cpu, from, size)?;
        Ok(match size {
            2 => u64::from(cpu.load_lin::<u16>(linear, self.access)?),
            4 => u64::from(cpu.load_lin::<u32>(linear, self.access)?),
            _ => cpu.load_lin::<u64>(linear, self.access)?,
        })
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Result<u64, Trap> {
        let value = self.peek(cpu, size, 0)?;
        self.release(size);
        Ok(value)
    }

    /// Moves the pointer up.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }

    /// Writes the pointer to RSP: all of it, or the part that the stack's width covers.
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        let rsp = &mut cpu.gpr[usize::from(reg::RSP)];
        *rsp = if self.mask == 0xffff {
            (*rsp & !0xffff) | (self.pointer & 0xffff)
        } else {
            self.pointer & self.mask
        };
    }
}

/// How a program at `cpl` accesses memory.
pub(crate) fn access_at(cpl: u8) -> Access {
    if cpl == 3 {
        Access::User
    } else {
        Access::Kernel
    }
}
