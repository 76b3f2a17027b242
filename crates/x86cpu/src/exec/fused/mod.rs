//! Frequent sequences of integer instructions as one op (see [`crate::code`]): what compilers make
//! at the entry and exit of functions, and comparisons with the branch behind them. 64-bit code only.

mod branch;
mod load;
mod stack;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{is_gpr, operand_size};
use crate::code::{Op, Window};

/// One op for the instructions at the start of `w`, if they are some for which there is one.
pub(crate) fn fuse(w: &Window<'_>) -> Option<Op> {
    if !w.is64() {
        return None;
    }
    let (first, _) = w.get(0)?;
    match first.mnemonic() {
        Mnemonic::Cmp | Mnemonic::Test => branch::compare(w),
        Mnemonic::And | Mnemonic::Add | Mnemonic::Sub | Mnemonic::Inc | Mnemonic::Dec => {
            branch::compute(w)
        }
        Mnemonic::Push => stack::pushes(w).or_else(|| stack::push_move(w)),
        Mnemonic::Pop => stack::pops(w),
        Mnemonic::Leave => stack::leave_return(w),
        Mnemonic::Mov => match (first.op0_kind(), first.op1_kind()) {
            (OpKind::Register, OpKind::Register) => stack::move_push(w)
                .or_else(|| stack::moves(w))
                .or_else(|| stack::move_call(w))
                .or_else(|| load::move_load(w)),
            (OpKind::Register, OpKind::Memory) => {
                load::test_branch(w).or_else(|| load::load_pair(w))
            }
            (OpKind::Memory, OpKind::Register) => load::store_pair(w),
            _ => None,
        },
        _ => None,
    }
}

/// A move between whole registers of 4 or 8 bytes, and how many.
fn register_move(i: &Instruction) -> Option<usize> {
    let registers = i.mnemonic() == Mnemonic::Mov
        && i.op0_kind() == OpKind::Register
        && i.op1_kind() == OpKind::Register
        && is_gpr(i.op0_register())
        && is_gpr(i.op1_register());
    let size = operand_size(i, 0);
    (registers && matches!(size, 4 | 8)).then_some(size)
}
