//! Loads and stores with what often comes behind: another of them, a move, a test and its branch.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::branch::{Condition, Test, branch_of};
use super::register_move;
use crate::code::{Handler, Op, Window, apart};
use crate::cpu::{Cpu, reg, seg};
use crate::exec::operand::{Operand, by_condition};
use crate::exec::{is_gpr, is_immediate, operand_size};
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

/// MOV `r0`, memory; TEST `r0`, the lower half of `imm`; Jcc by its upper half.
fn load_test_immediate<T: Operand, U: Operand, const CC: u8>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let Some(value) = cpu.try_load::<T>(op) else {
        return apart(cpu, op);
    };
    let value = value.wide();
    T::set(cpu, op.r0, value);
    let immediate = op.imm as i32 as i64 as u64 & U::MASK;
    cpu.flags
        .set_logic(<U as Operand>::BITS, value & immediate & U::MASK);
    let taken = Test::holds::<U, CC>(cpu, value & U::MASK, immediate);
    branch_of(cpu, op, taken, (op.imm as i64 >> 32) as u64)
}

/// The linear address of the second memory operand: `r2` and the lower half of `imm`.
#[inline(always)]
fn second_address(cpu: &Cpu, op: &Op) -> u64 {
    cpu.gpr[usize::from(op.r2 & 31)].wrapping_add(op.imm as i32 as i64 as u64)
}

/// MOV `r0`, memory; MOV `r1`, second memory.
fn load_load<T: Operand, U: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let Some(first) = cpu.try_load::<T>(op) else {
        return apart(cpu, op);
    };
    // The second address may be what the first has loaded.
    let old = cpu.gpr[usize::from(op.r0 & 31)];
    T::set(cpu, op.r0, first.wide());
    let Some(second) = cpu.try_load_flat::<U>(second_address(cpu, op)) else {
        cpu.gpr[usize::from(op.r0 & 31)] = old;
        return apart(cpu, op);
    };
    U::set(cpu, op.r1, second.wide());
    Ok(())
}

/// MOV `r0`, memory; MOV `r1`, `r2`.
fn load_mov<T: Operand, U: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let Some(value) = cpu.try_load::<T>(op) else {
        return apart(cpu, op);
    };
    T::set(cpu, op.r0, value.wide());
    let value = U::get(cpu, op.r2);
    U::set(cpu, op.r1, value);
    Ok(())
}

/// MOV `r1`, `r2`; MOV `r0`, memory, whose address hasn't `r1` in it.
fn mov_load<T: Operand, U: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let Some(value) = cpu.try_load::<T>(op) else {
        return apart(cpu, op);
    };
    let moved = U::get(cpu, op.r2);
    U::set(cpu, op.r1, moved);
    T::set(cpu, op.r0, value.wide());
    Ok(())
}

/// MOV memory, `r1`; MOV second memory, `r0`.
fn store_store<T: Operand, U: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (first, second) = (T::get(cpu, op.r1), U::get(cpu, op.r0));
    let to = second_address(cpu, op);
    // Nothing is stored unless both can be.
    if !cpu.can_store_flat::<U>(to) || !cpu.try_store::<T>(op, T::narrow(first)) {
        return apart(cpu, op);
    }
    cpu.try_store_flat::<U>(to, U::narrow(second));
    Ok(())
}

macro_rules! by_two_sizes {
    ($sizes:expr, $handler:ident) => {
        match $sizes {
            (8, 8) => $handler::<u64, u64> as Handler,
            (8, 4) => $handler::<u64, u32>,
            (4, 8) => $handler::<u32, u64>,
            (4, 4) => $handler::<u32, u32>,
            _ => return None,
        }
    };
}

fn is_load(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Mov
        && i.op0_kind() == OpKind::Register
        && is_gpr(i.op0_register())
        && i.op1_kind() == OpKind::Memory
}

fn is_store(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Mov
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
        && is_gpr(i.op1_register())
}

/// Whether an op's memory operand is a register and a displacement without more: 64 bits, no segment.
fn is_plain(op: &Op) -> bool {
    op.flags == 0 && op.index == reg::ZERO && matches!(op.seg, seg::FLAT | seg::FLAT_SS)
}

/// A load and another load or a move.
pub(super) fn load_pair(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (next, second)) = (w.get(0)?, w.get(1)?);
    if !is_load(mov) {
        return None;
    }
    let sizes = (operand_size(mov, 0), operand_size(next, 0));
    let mut op = w.op(2, first)?;
    if is_load(next) && is_plain(second) {
        (op.r1, op.r2) = (second.r0, second.base);
        op.imm = u64::from(second.disp as u32);
        op.run = by_two_sizes!(sizes, load_load);
    } else {
        register_move(next)?;
        (op.r1, op.r2) = (second.r0, second.r1);
        op.run = by_two_sizes!(sizes, load_mov);
    }
    Some(op)
}

/// A move and a load that doesn't depend on it.
pub(super) fn move_load(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (next, second)) = (w.get(0)?, w.get(1)?);
    let size = register_move(mov)?;
    if !is_load(next) || second.base == first.r0 || second.index == first.r0 {
        return None;
    }
    let mut op = w.op(2, second)?;
    (op.r1, op.r2) = (first.r0, first.r1);
    op.run = by_two_sizes!((operand_size(next, 0), size), mov_load);
    Some(op)
}

/// Two stores.
pub(super) fn store_pair(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (next, second)) = (w.get(0)?, w.get(1)?);
    if !is_store(mov) || !is_store(next) || !is_plain(second) {
        return None;
    }
    let mut op = w.op(2, first)?;
    (op.r0, op.r2) = (second.r1, second.base);
    op.imm = u64::from(second.disp as u32);
    op.run = by_two_sizes!((operand_size(mov, 0), operand_size(next, 0)), store_store);
    Some(op)
}

/// A load, a test of what was loaded, and the branch on it.
pub(super) fn test_branch(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (test, second), (jcc, last)) = (w.get(0)?, w.get(1)?, w.get(2)?);
    let tests = is_load(mov)
        && test.mnemonic() == Mnemonic::Test
        && test.op0_kind() == OpKind::Register
        && second.r0 == first.r0
        && jcc.is_jcc_short_or_near();
    if !tests {
        return None;
    }
    let cc = crate::exec::condition_code(jcc)?;
    let (size, tested) = (operand_size(mov, 0), operand_size(test, 0));
    let mut op = w.op(3, first)?;
    if test.op1_kind() == OpKind::Register && second.r1 == first.r0 && tested == size {
        op.imm = last.imm;
        op.run = match size {
            4 => by_condition!(cc, load_test, u32),
            8 => by_condition!(cc, load_test, u64),
            _ => return None,
        };
        return Some(op);
    }
    let displacement = i32::try_from(last.imm as i64).ok()?;
    if !is_immediate(test.op1_kind()) || reg::HIGH8 <= first.r0 {
        return None;
    }
    op.imm = u64::from(second.imm as u32) | (displacement as u64) << 32;
    op.run = match (size, tested) {
        (4, 1) => by_condition!(cc, load_test_immediate, u32, u8),
        (4, 4) => by_condition!(cc, load_test_immediate, u32, u32),
        (8, 1) => by_condition!(cc, load_test_immediate, u64, u8),
        (8, 4) => by_condition!(cc, load_test_immediate, u64, u32),
        (8, 8) => by_condition!(cc, load_test_immediate, u64, u64),
        _ => return None,
    };
    Some(op)
}
