//! A load, a test of what was loaded, and the branch on it.

use iced_x86::{Mnemonic, OpKind};

use super::branch::{Condition, Test, branch_of};
use crate::code::{Op, Window, apart};
use crate::cpu::Cpu;
use crate::exec::operand::{Operand, by_condition};
use crate::exec::{is_gpr, operand_size};
use crate::trap::Trap;

/// MOV `r0`, memory; TEST `r0`, `r0`; Jcc by `imm` from the block's start.
fn load_test<T: Operand, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let Some(value) = cpu.try_load::<T>(op) else {
        return apart(cpu, op);
    };
    let value = value.wide();
    T::set(cpu, op.r0, value);
    cpu.flags.set_logic(<T as Operand>::BITS, value);
    let taken = Test::holds::<T, CC>(cpu, value, value);
    branch_of(cpu, op, taken, op.imm)
}

pub(super) fn test_branch(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (test, second), (jcc, last)) = (w.get(0)?, w.get(1)?, w.get(2)?);
    let size = operand_size(mov, 0);
    let loads = mov.op0_kind() == OpKind::Register
        && is_gpr(mov.op0_register())
        && mov.op1_kind() == OpKind::Memory;
    let tests = test.mnemonic() == Mnemonic::Test
        && test.op0_kind() == OpKind::Register
        && test.op1_kind() == OpKind::Register
        && second.r0 == first.r0
        && second.r1 == first.r0
        && operand_size(test, 0) == size;
    if !loads || !tests || !jcc.is_jcc_short_or_near() {
        return None;
    }
    let cc = crate::exec::condition_code(jcc)?;
    let mut op = w.op(3, first)?;
    op.imm = last.imm;
    op.run = match size {
        4 => by_condition!(cc, load_test, u32),
        8 => by_condition!(cc, load_test, u64),
        _ => return None,
    };
    Some(op)
}
