//! Prologues and epilogues: runs of PUSH and POP, moves between them, the return behind.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::register_move;
use crate::code::{Handler, Op, Window, apart};
use crate::cpu::{Cpu, reg};
use crate::exec::operand::Operand;
use crate::sys::descriptor::canonical;
use crate::trap::Trap;

/// Registers that an op has room for.
const MOST: usize = 6;

fn registers(op: &Op) -> [u8; MOST] {
    [op.r0, op.r1, op.r2, op.base, op.index, op.seg]
}

fn set_registers(op: &mut Op, registers: [u8; MOST]) {
    [op.r0, op.r1, op.r2, op.base, op.index, op.seg] = registers;
}

#[inline(always)]
fn slot(cpu: &mut Cpu, register: u8) -> &mut u64 {
    &mut cpu.gpr[usize::from(register & 31)]
}

/// Pops, and with `RET` returns by the last of `TOTAL` words.
fn pop_run<const TOTAL: usize, const RET: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let rsp = cpu.gpr[usize::from(reg::RSP)];
    let Some(words) = cpu.try_load_words::<TOTAL>(rsp) else {
        return apart(cpu, op);
    };
    if RET {
        let target = words[TOTAL - 1];
        if !canonical(target) {
            return apart(cpu, op);
        }
        cpu.rip = target;
    }
    let count = TOTAL - usize::from(RET);
    for (&word, register) in words.iter().take(count).zip(registers(op)) {
        *slot(cpu, register) = word;
    }
    cpu.gpr[usize::from(reg::RSP)] = rsp.wrapping_add(8 * TOTAL as u64);
    Ok(())
}

fn push_run<const COUNT: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut words = [0; COUNT];
    for (word, register) in words.iter_mut().rev().zip(registers(op)) {
        *word = *slot(cpu, register);
    }
    let to = cpu.gpr[usize::from(reg::RSP)].wrapping_sub(8 * COUNT as u64);
    if !cpu.try_store_words(to, words) {
        return apart(cpu, op);
    }
    cpu.gpr[usize::from(reg::RSP)] = to;
    Ok(())
}

/// PUSH `r0`; MOV `r1`, `r2`.
fn push_mov<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let to = cpu.gpr[usize::from(reg::RSP)].wrapping_sub(8);
    let value = *slot(cpu, op.r0);
    if !cpu.try_store_flat::<u64>(to, value) {
        return apart(cpu, op);
    }
    cpu.gpr[usize::from(reg::RSP)] = to;
    let value = T::get(cpu, op.r2);
    T::set(cpu, op.r1, value);
    Ok(())
}

/// MOV `r1`, `r2`; PUSH `r0`, which may be `r1`.
fn mov_push<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let to = cpu.gpr[usize::from(reg::RSP)].wrapping_sub(8);
    let moved = T::get(cpu, op.r2);
    let pushed = if op.r0 == op.r1 {
        moved
    } else {
        *slot(cpu, op.r0)
    };
    if !cpu.try_store_flat::<u64>(to, pushed) {
        return apart(cpu, op);
    }
    T::set(cpu, op.r1, moved);
    cpu.gpr[usize::from(reg::RSP)] = to;
    Ok(())
}

/// MOV `r0`, `r1`; MOV `r2`, `base`.
fn mov_mov<T: Operand, U: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::get(cpu, op.r1);
    T::set(cpu, op.r0, value);
    let value = U::get(cpu, op.base);
    U::set(cpu, op.r2, value);
    Ok(())
}

/// MOV `r0`, `r1`; CALL by `imm` from the block's start.
fn mov_call<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = cpu.rip.wrapping_add(op.imm);
    let to = cpu.gpr[usize::from(reg::RSP)].wrapping_sub(8);
    let back = cpu.rip.wrapping_add(op.next_ip());
    if !canonical(target) || !cpu.try_store_flat::<u64>(to, back) {
        return apart(cpu, op);
    }
    cpu.gpr[usize::from(reg::RSP)] = to;
    let value = T::get(cpu, op.r1);
    T::set(cpu, op.r0, value);
    cpu.rip = target;
    Ok(())
}

/// LEAVE; RET.
fn leave_ret(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let frame = cpu.gpr[usize::from(reg::RBP)];
    match cpu.try_load_words::<2>(frame) {
        Some([rbp, target]) if canonical(target) => {
            cpu.gpr[usize::from(reg::RBP)] = rbp;
            cpu.gpr[usize::from(reg::RSP)] = frame.wrapping_add(16);
            cpu.rip = target;
            Ok(())
        }
        _ => apart(cpu, op),
    }
}

/// The register of a PUSH or POP of 8 bytes, but RSP.
fn stacked(i: &Instruction, mnemonic: Mnemonic) -> bool {
    i.mnemonic() == mnemonic
        && i.op0_kind() == OpKind::Register
        && i.op0_register().is_gpr64()
        && i.op0_register() != iced_x86::Register::RSP
}

/// How many such there are at the start of `w`, and their registers.
fn run(w: &Window<'_>, mnemonic: Mnemonic) -> (usize, [u8; MOST]) {
    let mut registers = [0; MOST];
    let mut count = 0;
    for register in &mut registers {
        match w.get(count) {
            Some((i, op)) if stacked(i, mnemonic) => *register = op.r0,
            _ => break,
        }
        count += 1;
    }
    (count, registers)
}

pub(super) fn pops(w: &Window<'_>) -> Option<Op> {
    let (count, registers) = run(w, Mnemonic::Pop);
    let (_, first) = w.get(0)?;
    let returns = matches!(w.get(count), Some((i, _)) if i.code() == Code::Retnq);
    let total = count + usize::from(returns);
    let handler: Handler = match (total, returns) {
        (2, true) => pop_run::<2, true>,
        (3, true) => pop_run::<3, true>,
        (4, true) => pop_run::<4, true>,
        (5, true) => pop_run::<5, true>,
        (6, true) => pop_run::<6, true>,
        (7, true) => pop_run::<7, true>,
        (2, false) => pop_run::<2, false>,
        (3, false) => pop_run::<3, false>,
        (4, false) => pop_run::<4, false>,
        (5, false) => pop_run::<5, false>,
        (6, false) => pop_run::<6, false>,
        _ => return None,
    };
    let mut op = w.op(total, first)?;
    set_registers(&mut op, registers);
    op.run = handler;
    Some(op)
}

pub(super) fn pushes(w: &Window<'_>) -> Option<Op> {
    let (count, registers) = run(w, Mnemonic::Push);
    let (_, first) = w.get(0)?;
    let handler: Handler = match count {
        2 => push_run::<2>,
        3 => push_run::<3>,
        4 => push_run::<4>,
        5 => push_run::<5>,
        6 => push_run::<6>,
        _ => return None,
    };
    let mut op = w.op(count, first)?;
    set_registers(&mut op, registers);
    op.run = handler;
    Some(op)
}

pub(super) fn push_move(w: &Window<'_>) -> Option<Op> {
    let ((push, first), (mov, second)) = (w.get(0)?, w.get(1)?);
    if !stacked(push, Mnemonic::Push) {
        return None;
    }
    let size = register_move(mov)?;
    let mut op = w.op(2, first)?;
    (op.r1, op.r2) = (second.r0, second.r1);
    op.run = if size == 8 {
        push_mov::<u64>
    } else {
        push_mov::<u32>
    };
    Some(op)
}

pub(super) fn move_push(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (push, second)) = (w.get(0)?, w.get(1)?);
    // A run of several is for `pushes`; the stack pointer must be what it was.
    let (count, _) = run(&w.skip(1), Mnemonic::Push);
    if count != 1 || !stacked(push, Mnemonic::Push) || first.r0 == reg::RSP {
        return None;
    }
    let size = register_move(mov)?;
    let mut op = w.op(2, first)?;
    (op.r0, op.r1, op.r2) = (second.r0, first.r0, first.r1);
    op.run = if size == 8 {
        mov_push::<u64>
    } else {
        mov_push::<u32>
    };
    Some(op)
}

pub(super) fn moves(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (second_mov, second)) = (w.get(0)?, w.get(1)?);
    let sizes = (register_move(mov)?, register_move(second_mov)?);
    let mut op = w.op(2, first)?;
    (op.r2, op.base) = (second.r0, second.r1);
    op.run = match sizes {
        (8, 8) => mov_mov::<u64, u64>,
        (8, _) => mov_mov::<u64, u32>,
        (_, 8) => mov_mov::<u32, u64>,
        _ => mov_mov::<u32, u32>,
    };
    Some(op)
}

pub(super) fn move_call(w: &Window<'_>) -> Option<Op> {
    let ((mov, first), (call, second)) = (w.get(0)?, w.get(1)?);
    // The stack pointer must be what it was, before and after.
    if call.code() != Code::Call_rel32_64 || first.r0 == reg::RSP || first.r1 == reg::RSP {
        return None;
    }
    let size = register_move(mov)?;
    let mut op = w.op(2, first)?;
    op.imm = second.imm;
    op.run = if size == 8 {
        mov_call::<u64>
    } else {
        mov_call::<u32>
    };
    Some(op)
}

pub(super) fn leave_return(w: &Window<'_>) -> Option<Op> {
    let ((leave, first), (ret, _)) = (w.get(0)?, w.get(1)?);
    if leave.code() != Code::Leaveq || ret.code() != Code::Retnq {
        return None;
    }
    let mut op = w.op(2, first)?;
    op.run = leave_ret;
    Some(op)
}
