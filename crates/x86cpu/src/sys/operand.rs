//! Operands as the system instructions take them: few forms, sizes told by the op's flags.
//!
//! `op.extra` is non-zero for a memory operand. Sizes: `OPSIZE16`, `OPSIZE64`, else 32 bits.

use crate::code::{Op, op_flag};
use crate::cpu::Cpu;
use crate::trap::Trap;

/// Bytes of the operand size.
#[inline]
pub(super) fn size_of_op(op: &Op) -> u64 {
    if op.has(op_flag::OPSIZE16) {
        2
    } else if op.has(op_flag::OPSIZE64) {
        8
    } else {
        4
    }
}

/// The low `size` bytes.
#[inline]
pub(super) fn truncate(value: u64, size: u64) -> u64 {
    match size {
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// A 16-bit source: memory if `extra`, else `register`.
pub(super) fn read_rm16(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u16, Trap> {
    if op.extra != 0 {
        cpu.load::<u16>(op)
    } else {
        Ok(cpu.gpr[usize::from(register & 15)] as u16)
    }
}

/// Writes a register at the op's operand size.
pub(super) fn write_sized(cpu: &mut Cpu, op: &Op, register: u8, value: u64) {
    write_register(cpu, register, size_of_op(op), value);
}

/// Writes the low `size` bytes of a register as instructions do: 32-bit writes clear the upper
/// half.
pub(super) fn write_register(cpu: &mut Cpu, register: u8, size: u64, value: u64) {
    let slot = &mut cpu.gpr[usize::from(register & 15)];
    *slot = match size {
        1 => (*slot & !0xff) | (value & 0xff),
        2 => (*slot & !0xffff) | (value & 0xffff),
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

impl Cpu {
    /// The far pointer at the op's memory operand: offset of operand size, then selector.
    pub(super) fn load_far(&mut self, op: &Op) -> Result<(u64, u16), Trap> {
        let size = size_of_op(op);
        let at = op.offset(self);
        let mask = if op.has(op_flag::ADDR16) {
            0xffff
        } else if op.has(op_flag::ADDR32) {
            0xffff_ffff
        } else {
            u64::MAX
        };
        let offset = match size {
            2 => u64::from(self.load_at::<u16>(op.seg, at)?),
            4 => u64::from(self.load_at::<u32>(op.seg, at)?),
            _ => self.load_at::<u64>(op.seg, at)?,
        };
        let selector = self.load_at::<u16>(op.seg, at.wrapping_add(size) & mask)?;
        Ok((offset, selector))
    }

    /// #GP(0) above privilege level 0.
    #[inline]
    pub(super) fn require_cpl0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp0())
        }
    }
}
