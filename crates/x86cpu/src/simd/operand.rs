//! The memory operand of a vector or x87 instruction: where it is, and the fault if it can't be
//! there.

use std::ptr::NonNull;

use crate::Cpu;
use crate::code::{Op, op_flag};
use crate::cpu::seg;
use crate::trap::{Trap, TrapKind, vector};

/// A memory operand that passed the checks of its segment and alignment.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// Linear address.
    pub(crate) linear: u64,
    /// Bytes.
    pub(crate) size: usize,
}

/// The host's address of a memory operand when it is flat, aligned and in the first-level TLB;
/// `None` is for the slow path to judge.
#[inline(always)]
pub(crate) fn quick(cpu: &Cpu, op: &Op, size: usize, align: usize, write: bool) -> Option<*mut u8> {
    if op.flags & (op_flag::ADDR32 | op_flag::ADDR16 | op_flag::SEGMENTED) != 0 {
        return None;
    }
    let linear = cpu.gpr[usize::from(op.base & 31)]
        .wrapping_add(cpu.gpr[usize::from(op.index & 31)] << (op.scale & 3))
        .wrapping_add(op.disp as i64 as u64)
        .wrapping_add(cpu.seg_base[usize::from(op.seg & 7)]);
    if linear & (align as u64 - 1) != 0 {
        return None;
    }
    let host = if write {
        cpu.view.write(linear, size)
    } else {
        cpu.view.read(linear, size)
    };
    host.map(|address| address as *mut u8)
}

#[inline(always)]
pub(crate) fn operand(
    cpu: &mut Cpu,
    op: &Op,
    size: usize,
    align: usize,
    write: bool,
) -> Result<Operand, Trap> {
    let linear = cpu.linear(op, size, write)?;
    if linear & (align as u64).wrapping_sub(1) != 0 {
        return Err(cpu.gp0());
    }
    Ok(Operand { linear, size })
}

fn is_canonical(cpu: &Cpu, linear: u64) -> bool {
    !cpu.sys.mode.is64() || ((linear << 16) as i64 >> 16) as u64 == linear
}

/// Gives a fault the vector that the segment and the whole operand ask for: a non-canonical address
/// is a stack fault when RSP or RBP is its base.
#[cold]
fn refine(cpu: &mut Cpu, op: &Op, at: Operand, trap: Trap) -> Trap {
    let last = at.linear.wrapping_add(at.size as u64).wrapping_sub(1);
    let is_fault = matches!(cpu.trap.kind, TrapKind::Fault { .. });
    if !is_fault || is_canonical(cpu, at.linear) && is_canonical(cpu, last) {
        return trap;
    }
    if op.seg == seg::FLAT_SS {
        cpu.fault(vector::SS, 0)
    } else {
        cpu.gp0()
    }
}

impl Operand {
    /// Element `n` of several.
    pub(crate) fn element(self, n: usize, size: usize) -> Self {
        let linear = self.linear.wrapping_add((n * size) as u64);
        Self { linear, size }
    }

    /// The host's address, or `None` if the operand isn't within a page of RAM.
    #[inline(always)]
    pub(crate) fn host(
        self,
        cpu: &mut Cpu,
        op: &Op,
        write: bool,
    ) -> Result<Option<NonNull<u8>>, Trap> {
        cpu.host_ptr(self.linear, self.size, write)
            .map_err(|trap| refine(cpu, op, self, trap))
    }

    /// Checks that the whole operand (two pages at most) can be written.
    pub(crate) fn check_write(self, cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        const PAGE_MASK: u64 = 0xfff;
        self.check_canonical(cpu, op)?;
        let last = self.linear.wrapping_add(self.size.max(1) as u64 - 1);
        self.element(0, 1).host(cpu, op, true)?;
        if (self.linear ^ last) & !PAGE_MASK != 0 {
            let next = (self.linear | PAGE_MASK).wrapping_add(1);
            let linear = if cpu.sys.mode.is64() {
                next
            } else {
                next & 0xffff_ffff
            };
            Self { linear, size: 1 }.host(cpu, op, true)?;
        }
        Ok(())
    }

    /// Checks that the whole operand has canonical addresses.
    pub(crate) fn check_canonical(self, cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let last = self.linear.wrapping_add(self.size.max(1) as u64 - 1);
        if is_canonical(cpu, self.linear) && is_canonical(cpu, last) {
            return Ok(());
        }
        let trap = cpu.gp0();
        Err(refine(cpu, op, self, trap))
    }

    /// Reads the operand from wherever it is.
    pub(crate) fn read(self, cpu: &mut Cpu, op: &Op, bytes: &mut [u8]) -> Result<(), Trap> {
        cpu.read_bytes(self.linear, bytes)
            .map_err(|trap| refine(cpu, op, self, trap))
    }

    /// Writes the operand to wherever it is.
    pub(crate) fn write(self, cpu: &mut Cpu, op: &Op, bytes: &[u8]) -> Result<(), Trap> {
        cpu.write_bytes(self.linear, bytes)
            .map_err(|trap| refine(cpu, op, self, trap))
    }
}
