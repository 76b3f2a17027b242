//! A decoded instruction, compact, and the same for the interpreter and the compiler.

use crate::cpu::{Cpu, reg};
use crate::trap::Trap;

/// Executes one op. On `Err` the reason is in `cpu.trap`, and no architectural state has changed
/// but what the op may change before it faults (accessed bits, completed iterations of `rep`).
pub type Handler = fn(&mut Cpu, &Op) -> Result<(), Trap>;

/// Bits of [`Op::flags`].
pub mod op_flag {
    /// Address size is 32 bits: the offset is truncated.
    pub const ADDR32: u8 = 1 << 0;
    /// Address size is 16 bits.
    pub const ADDR16: u8 = 1 << 1;
    /// Legacy segment: base and limit are checked by the slow path of the memory access.
    pub const SEGMENTED: u8 = 1 << 2;
    /// LOCK prefix (or XCHG with memory).
    pub const LOCK: u8 = 1 << 3;
    /// REP / REPE prefix of a string instruction.
    pub const REP: u8 = 1 << 4;
    /// REPNE prefix of a string instruction.
    pub const REPNE: u8 = 1 << 5;
    /// Operand size override where a handler serves several sizes: 16 bits.
    pub const OPSIZE16: u8 = 1 << 6;
    /// Same: 64 bits.
    pub const OPSIZE64: u8 = 1 << 7;
}

/// One instruction, decoded. 40 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub run: Handler,
    /// Immediate, branch displacement from the block's start, or a full address (moffs).
    pub imm: u64,
    /// Displacement of the memory operand. RIP-relative operands are relative to the block's first
    /// instruction (`base` is [`reg::BLOCK_RIP`]).
    pub disp: i32,
    /// Offset of the instruction from the block's first instruction, in bytes.
    pub ip: u16,
    /// Its length in bytes.
    pub len: u8,
    /// Bits of [`op_flag`].
    pub flags: u8,
    /// First register operand (destination), by [`reg`] (or XMM/MMX/ST/segment/CR/DR number).
    pub r0: u8,
    /// Second register operand.
    pub r1: u8,
    /// Third register operand.
    pub r2: u8,
    /// Base register of the memory operand, or [`reg::ZERO`].
    pub base: u8,
    /// Index register, or [`reg::ZERO`].
    pub index: u8,
    /// Log2 of the scale; the top bit says that the op is several instructions.
    pub scale: u8,
    /// Segment of the memory operand, by [`crate::cpu::seg`].
    pub seg: u8,
    /// Free for the handler.
    pub extra: u8,
    /// Free for the handler: index into a side table (SIMD thunks), condition code, …
    pub aux: u32,
}

impl Op {
    /// Bit of [`Op::scale`]: the op is `extra` instructions, whose own ops are `aux` ops on.
    pub(crate) const FUSED: u8 = 1 << 7;

    /// Whether the op is several instructions.
    pub(crate) fn is_fused(&self) -> bool {
        self.scale & Self::FUSED != 0
    }

    /// The offset that the memory operand names within its segment, truncated to address size.
    #[inline(always)]
    pub fn offset(&self, cpu: &Cpu) -> u64 {
        let offset = self.sum(cpu);
        if self.flags & (op_flag::ADDR32 | op_flag::ADDR16) == 0 {
            offset
        } else if self.flags & op_flag::ADDR32 != 0 {
            offset & 0xffff_ffff
        } else {
            offset & 0xffff
        }
    }

    /// The same before truncation: right as it is for 64-bit addresses.
    #[inline(always)]
    pub fn sum(&self, cpu: &Cpu) -> u64 {
        let base = cpu.gpr[usize::from(self.base & 31)];
        let index = cpu.gpr[usize::from(self.index & 31)];
        base.wrapping_add(index << (self.scale & 3))
            .wrapping_add(self.disp as i64 as u64)
    }

    /// Whether the op has a flag of [`op_flag`].
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Offset of the next instruction from the block's start.
    #[inline(always)]
    pub fn next_ip(&self) -> u64 {
        u64::from(self.ip) + u64::from(self.len)
    }
}

const _: () = assert!(size_of::<Op>() == 40);
const _: () = assert!(reg::TMP < 32);
