//! MMX, SSE and AVX instructions.
//!
//! Arithmetic and everything rare runs on the host's units ([`thunk`], [`run`]); moves, which are
//! most of what programs do with vector registers, are plain Rust ([`moves`]); what touches memory in
//! its own way (masked moves, gathers) is in [`masked`] and [`gather`]. Instructions that follow each
//! other and touch no memory become one op in [`fused`].

mod code_buffer;
mod code_slab;
pub(crate) mod fused;
mod gather;
mod masked;
mod moves;
mod mxcsr;
pub(crate) mod operand;
mod random;
mod run;
#[cfg(test)]
mod tests;
pub(crate) mod thunk;

use iced_x86::{EncodingKind, Instruction};

use crate::code::Lowering;

pub(crate) use code_buffer::CodeBuffer;
pub use thunk::prepare_executable_memory;

/// Adds the ops of `i` if it is an x87, MMX, SSE or AVX instruction.
pub(crate) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    // VEX prefixes mean nothing in real and virtual-8086 mode (SDM 2A §2.3.5).
    if i.code().encoding() == EncodingKind::VEX && (!l.mode.protected() || l.mode.v86()) {
        return false;
    }
    moves::lower(l, i)
        || masked::lower(l, i)
        || gather::lower(l, i)
        || random::lower(l, i)
        || crate::fpu::lower(l, i)
        || run::lower(l, i)
}
