//! Several instructions as one op.
//!
//! Which ones is the business of [`crate::exec::fuse`] and [`crate::simd::fused`]; here is what they
//! share. A fused op does its work when nothing is in the way: the memory is in the first-level
//! TLB, the units are enabled. Else it changes nothing and runs its parts, the ops of the single
//! instructions, which stay behind the block's end:
//!
//! ```text
//! block ──▶ mov │ fused(3) │ add │ jmp ┃ cmp │ pop │ pop
//!                   └───── aux ────────────▶ parts
//! ```
#![expect(unsafe_code, reason = "finds the parts of an op behind its block")]

use std::ops::Range;

use iced_x86::Instruction;

use crate::code::BlockEnd;
use crate::code::op::Op;
use crate::cpu::Cpu;
use crate::trap::{Trap, TrapKind};

/// An instruction of the block in the making.
pub(super) struct Lowered {
    pub(super) instruction: Instruction,
    /// Its ops.
    pub(super) ops: Range<usize>,
    /// Where it starts in the block, in bytes.
    pub(super) ip: usize,
    /// It is SIMD or x87.
    pub(super) vector: bool,
}

/// Instructions that are one op each, from one of the block on.
#[derive(Clone, Copy)]
pub(crate) struct Window<'a> {
    pub(super) lowered: &'a [Lowered],
    pub(super) ops: &'a [Op],
    pub(super) bytes: &'a [u8],
    pub(super) is64: bool,
}

impl<'a> Window<'a> {
    /// Instruction `n` from here, if it is one op.
    #[inline]
    pub(crate) fn get(&self, n: usize) -> Option<(&'a Instruction, &'a Op)> {
        let lowered = self.lowered.get(n)?;
        if lowered.ops.len() != 1 {
            return None;
        }
        Some((&lowered.instruction, self.ops.get(lowered.ops.start)?))
    }

    /// The same from instruction `count` on.
    pub(crate) fn skip(&self, count: usize) -> Self {
        Self {
            lowered: self.lowered.get(count..).unwrap_or_default(),
            ..*self
        }
    }

    /// The encoding of the first `count` instructions.
    pub(crate) fn bytes(&self, count: usize) -> Option<&'a [u8]> {
        let (first, last) = (
            self.lowered.first()?,
            self.lowered.get(count.checked_sub(1)?)?,
        );
        self.bytes.get(first.ip..last.ip + last.instruction.len())
    }

    /// Where the ops are that `op` stands for.
    pub(super) fn range(&self, op: &Op) -> Option<Range<usize>> {
        let last = usize::from(op.extra).checked_sub(1)?;
        Some(self.lowered.first()?.ops.start..self.lowered.get(last)?.ops.end)
    }

    /// Whether this is 64-bit code.
    pub(crate) fn is64(&self) -> bool {
        self.is64
    }

    /// A fused op for the first `count` instructions, with the operands of `like`: the handler is
    /// still to be set.
    pub(crate) fn op(&self, count: usize, like: &Op) -> Option<Op> {
        let first = self.lowered.first()?;
        let mut op = *like;
        op.ip = first.ip as u16;
        op.len = self.bytes(count)?.len().min(0xff) as u8;
        op.scale |= Op::FUSED;
        op.extra = count as u8;
        Some(op)
    }
}

/// Instructions that an op is.
pub(super) fn instructions_of(op: &Op) -> u64 {
    if op.is_fused() {
        u64::from(op.extra)
    } else {
        1
    }
}

/// Runs the parts of a fused op one by one.
#[cold]
#[inline(never)]
pub(crate) fn apart(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let count = u32::from(op.extra);
    for n in 0..count {
        // SAFETY: `aux` ops on from a fused op of a block there are `extra` parts, says lowering;
        // they were pushed with the block.
        let part = unsafe { &*std::ptr::from_ref(op).add((op.aux + n) as usize) };
        if (part.run)(cpu, part).is_err() {
            // `stopped` takes off as many as the whole op is.
            cpu.instructions += u64::from(n);
            if !matches!(cpu.trap.kind, TrapKind::Resume) {
                cpu.failed_part = BlockEnd(part);
            }
            return Err(Trap);
        }
        if cpu.block_end.0.is_null() && n + 1 < count {
            // SAFETY: as above.
            let next = unsafe { &*std::ptr::from_ref(part).add(1) };
            cpu.rip = cpu.own_rip(next);
            cpu.instructions += u64::from(n) + 1;
            return Err(cpu.resume());
        }
    }
    Ok(())
}

/// Takes note, before it faults, that the last part of `op` is what doesn't complete.
#[cold]
pub(crate) fn last_part_failed(cpu: &mut Cpu, op: &Op) {
    let last = u32::from(op.extra).saturating_sub(1);
    // SAFETY: as in `apart`.
    let part = unsafe { &*std::ptr::from_ref(op).add((op.aux + last) as usize) };
    cpu.instructions += u64::from(last);
    cpu.failed_part = BlockEnd(part);
}
