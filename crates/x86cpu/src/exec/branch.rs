//! Near branches: JMP, Jcc, CALL, RET, LOOPcc, JCXZ. Each is the last op of its block and sets RIP,
//! taken or not.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, by_condition, condition};
use super::stack::{Stack, Stack16, Stack32, Stack64, peek, push, release};
use crate::code::{Handler, Lowering, Op, op_flag};
use crate::cpu::{Cpu, reg};
use crate::sys::descriptor::canonical;
use crate::trap::Trap;

/// In [`Op::extra`]: operand size of the branch in bytes (2, 4, 8).
const SIZE: u8 = 0xf;
/// In [`Op::extra`]: the target comes from memory.
const FROM_MEMORY: u8 = 0x10;

/// Checks a target: canonical in 64-bit mode, within CS's limit elsewhere (SDM 2A "JMP").
#[inline(always)]
fn checked<T: Operand>(cpu: &mut Cpu, target: u64) -> Result<u64, Trap> {
    if T::BITS == 64 {
        if canonical(target) {
            return Ok(target);
        }
    } else {
        let target = target & T::MASK;
        if target <= u64::from(cpu.cs_limit()) {
            return Ok(target);
        }
    }
    Err(cpu.gp0())
}

#[inline(always)]
fn relative<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let target = cpu.rip.wrapping_add(op.imm);
    checked::<T>(cpu, target)
}

#[inline(always)]
fn not_taken(cpu: &mut Cpu, op: &Op) {
    cpu.rip = cpu.next_rip(op);
}

fn jmp_rel<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.rip = relative::<T>(cpu, op)?;
    Ok(())
}

fn jcc64<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if condition(&cpu.flags, CC) {
        cpu.rip = relative::<u64>(cpu, op)?;
    } else {
        cpu.rip = cpu.rip.wrapping_add(op.next_ip());
    }
    Ok(())
}

fn jcc_legacy<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if condition(&cpu.flags, op.aux as u8) {
        cpu.rip = relative::<T>(cpu, op)?;
    } else {
        not_taken(cpu, op);
    }
    Ok(())
}

fn call_rel<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = relative::<T>(cpu, op)?;
    let back = cpu.next_rip(op);
    push::<S, T>(cpu, back)?;
    cpu.rip = target;
    Ok(())
}

#[inline(always)]
fn indirect<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let target = if op.extra & FROM_MEMORY != 0 {
        cpu.load::<T>(op)?.wide()
    } else {
        T::get(cpu, op.r0)
    };
    checked::<T>(cpu, target)
}

fn jmp_indirect<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.rip = indirect::<T>(cpu, op)?;
    Ok(())
}

fn call_indirect<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = indirect::<T>(cpu, op)?;
    let back = cpu.next_rip(op);
    push::<S, T>(cpu, back)?;
    cpu.rip = target;
    Ok(())
}

/// RET with `imm` bytes of arguments to drop.
fn ret<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = peek::<S, T>(cpu)?;
    let target = checked::<T>(cpu, target)?;
    release::<S>(cpu, T::BYTES.wrapping_add(op.imm));
    cpu.rip = target;
    Ok(())
}

/// The count register of LOOP and JCXZ, by address size.
fn count(cpu: &Cpu, op: &Op) -> u64 {
    cpu.gpr[usize::from(reg::RCX)] & super::address_mask(op)
}

fn set_count(cpu: &mut Cpu, op: &Op, value: u64) {
    if op.has(op_flag::ADDR16) {
        u16::set(cpu, reg::RCX, value);
    } else if op.has(op_flag::ADDR32) {
        u32::set(cpu, reg::RCX, value);
    } else {
        u64::set(cpu, reg::RCX, value);
    }
}

/// LOOP (`aux` 0), LOOPE (1), LOOPNE (2).
fn loop_<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let left = count(cpu, op).wrapping_sub(1) & super::address_mask(op);
    let holds = match op.aux {
        0 => true,
        1 => cpu.flags.zf(),
        _ => !cpu.flags.zf(),
    };
    if left != 0 && holds {
        let target = relative::<T>(cpu, op)?;
        set_count(cpu, op, left);
        cpu.rip = target;
    } else {
        set_count(cpu, op, left);
        not_taken(cpu, op);
    }
    Ok(())
}

fn jcxz<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if count(cpu, op) == 0 {
        cpu.rip = relative::<T>(cpu, op)?;
    } else {
        not_taken(cpu, op);
    }
    Ok(())
}

/// Operand size of a near branch, by its relative operand's kind.
fn relative_size(i: &Instruction) -> Option<usize> {
    match i.op0_kind() {
        OpKind::NearBranch16 => Some(2),
        OpKind::NearBranch32 => Some(4),
        OpKind::NearBranch64 => Some(8),
        _ => None,
    }
}

/// The target as a displacement from the block's start.
fn displacement(op: &Op, i: &Instruction) -> u64 {
    let from_next = i.near_branch_target().wrapping_sub(i.next_ip());
    let from_next = match i.op0_kind() {
        OpKind::NearBranch16 => i64::from(from_next as i16),
        OpKind::NearBranch32 => i64::from(from_next as i32),
        _ => from_next as i64,
    };
    op.next_ip().wrapping_add(from_next as u64)
}

macro_rules! by_size {
    ($size:expr, $handler:ident) => {
        match $size {
            2 => $handler::<u16> as Handler,
            4 => $handler::<u32>,
            _ => $handler::<u64>,
        }
    };
}

macro_rules! by_stack_and_size {
    ($l:expr, $size:expr, $handler:ident) => {
        match ($l.stack_bits(), $size) {
            (64, 2) => $handler::<Stack64, u16> as Handler,
            (64, _) => $handler::<Stack64, u64>,
            (32, 2) => $handler::<Stack32, u16>,
            (32, _) => $handler::<Stack32, u32>,
            (_, 2) => $handler::<Stack16, u16>,
            (_, _) => $handler::<Stack16, u32>,
        }
    };
}

fn lower_relative(l: &mut Lowering<'_>, i: &Instruction, size: usize) -> bool {
    use Mnemonic as M;
    let mut op = l.op();
    op.imm = displacement(&op, i);
    op.run = match i.mnemonic() {
        M::Jmp => by_size!(size, jmp_rel),
        M::Call => by_stack_and_size!(l, size, call_rel),
        M::Loop | M::Loope | M::Loopne => {
            op.aux = match i.mnemonic() {
                M::Loop => 0,
                M::Loope => 1,
                _ => 2,
            };
            op.flags |= super::count_width(i);
            by_size!(size, loop_)
        }
        M::Jcxz | M::Jecxz | M::Jrcxz => {
            op.flags |= super::count_width(i);
            by_size!(size, jcxz)
        }
        _ => {
            let Some(cc) = super::condition_code(i) else {
                return false;
            };
            op.aux = u32::from(cc);
            if size == 8 {
                by_condition!(cc, jcc64)
            } else {
                by_size!(size, jcc_legacy)
            }
        }
    };
    l.push_branch(op);
    true
}

fn lower_indirect(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let size = match i.op0_kind() {
        OpKind::Register => {
            op.r0 = l.reg(i.op0_register());
            i.op0_register().size()
        }
        OpKind::Memory => {
            l.mem(&mut op, i);
            op.extra |= FROM_MEMORY;
            i.memory_size().size()
        }
        _ => return false,
    };
    op.extra |= size as u8 & SIZE;
    op.run = if i.mnemonic() == Mnemonic::Jmp {
        by_size!(size, jmp_indirect)
    } else {
        by_stack_and_size!(l, size, call_indirect)
    };
    l.push_branch(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    if let Some(size) = relative_size(i) {
        return lower_relative(l, i, size);
    }
    match i.mnemonic() {
        Mnemonic::Jmp if i.is_jmp_near_indirect() => lower_indirect(l, i),
        Mnemonic::Call if i.is_call_near_indirect() => lower_indirect(l, i),
        Mnemonic::Ret => {
            let mut op = l.op();
            if i.op_count() > 0 {
                op.imm = u64::from(i.immediate16());
            }
            use iced_x86::Code;
            let size = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            op.run = by_stack_and_size!(l, size, ret);
            l.push_branch(op);
            true
        }
        _ => false,
    }
}
