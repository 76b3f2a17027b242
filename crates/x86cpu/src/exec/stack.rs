//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and the stack access that calls and returns share.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized_word};
use super::{immediate, is_gpr, is_immediate};
use crate::code::{Handler, Lowering, Op};
use crate::cpu::{Cpu, reg, seg};
use crate::trap::Trap;

/// How wide the stack pointer is: 64 bits in 64-bit mode, else by SS.B.
pub(super) trait Stack {
    /// Bits of RSP that address.
    const MASK: u64;
    /// Segment to check against.
    const SEG: u8;
}

/// 64-bit mode.
pub(super) struct Stack64;
/// SS.B = 1.
pub(super) struct Stack32;
/// SS.B = 0.
pub(super) struct Stack16;

impl Stack for Stack64 {
    const MASK: u64 = u64::MAX;
    const SEG: u8 = seg::FLAT_SS;
}
impl Stack for Stack32 {
    const MASK: u64 = 0xffff_ffff;
    const SEG: u8 = seg::SS;
}
impl Stack for Stack16 {
    const MASK: u64 = 0xffff;
    const SEG: u8 = seg::SS;
}

#[inline(always)]
fn pointer<S: Stack>(cpu: &Cpu, register: u8) -> u64 {
    cpu.gpr[usize::from(register)] & S::MASK
}

/// Moves the stack pointer; bits past its width stay, except that a 32-bit write clears them.
#[inline(always)]
fn set_pointer<S: Stack>(cpu: &mut Cpu, register: u8, value: u64) {
    let slot = &mut cpu.gpr[usize::from(register)];
    *slot = match S::MASK {
        0xffff => (*slot & !0xffff) | (value & 0xffff),
        mask => value & mask,
    };
}

/// Pushes `value`; RSP moves only if the store went through.
#[inline(always)]
pub(super) fn push<S: Stack, T: Operand>(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    let to = pointer::<S>(cpu, reg::RSP).wrapping_sub(T::BYTES) & S::MASK;
    cpu.store_at::<T>(S::SEG, to, T::narrow(value))?;
    set_pointer::<S>(cpu, reg::RSP, to);
    Ok(())
}

/// Reads the top of the stack without moving RSP.
#[inline(always)]
pub(super) fn peek<S: Stack, T: Operand>(cpu: &mut Cpu) -> Result<u64, Trap> {
    let from = pointer::<S>(cpu, reg::RSP);
    Ok(cpu.load_at::<T>(S::SEG, from)?.wide())
}

/// Moves RSP up by `bytes`.
#[inline(always)]
pub(super) fn release<S: Stack>(cpu: &mut Cpu, bytes: u64) {
    let rsp = pointer::<S>(cpu, reg::RSP).wrapping_add(bytes);
    set_pointer::<S>(cpu, reg::RSP, rsp);
}

fn push_r<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if S::MASK == u64::MAX {
        let to = cpu.gpr[usize::from(reg::RSP)].wrapping_sub(T::BYTES);
        let v = T::get(cpu, op.r0);
        if cpu.try_store_flat::<T>(to, T::narrow(v)) {
            cpu.gpr[usize::from(reg::RSP)] = to;
            return Ok(());
        }
    }
    push_r_slow::<S, T>(cpu, op)
}

#[cold]
#[inline(never)]
fn push_r_slow<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = T::get(cpu, op.r0);
    push::<S, T>(cpu, v)
}

fn push_i<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    push::<S, T>(cpu, op.imm)
}

fn push_m<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = cpu.load::<T>(op)?.wide();
    push::<S, T>(cpu, v)
}

fn pop_r<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if S::MASK == u64::MAX {
        let from = cpu.gpr[usize::from(reg::RSP)];
        if let Some(v) = cpu.try_load_flat::<T>(from) {
            cpu.gpr[usize::from(reg::RSP)] = from.wrapping_add(T::BYTES);
            T::set(cpu, op.r0, v.wide());
            return Ok(());
        }
    }
    pop_r_slow::<S, T>(cpu, op)
}

#[cold]
#[inline(never)]
fn pop_r_slow<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = peek::<S, T>(cpu)?;
    release::<S>(cpu, T::BYTES);
    // After the move, so that POP RSP gets the popped value.
    T::set(cpu, op.r0, v);
    Ok(())
}

fn pop_m<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = peek::<S, T>(cpu)?;
    // An address with RSP in it is computed after RSP moved (SDM 2B "POP").
    let rsp = cpu.gpr[usize::from(reg::RSP)];
    release::<S>(cpu, T::BYTES);
    cpu.store::<T>(op, T::narrow(v)).inspect_err(|_| {
        cpu.gpr[usize::from(reg::RSP)] = rsp;
    })
}

fn pusha<S: Stack, T: Operand>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let top = pointer::<S>(cpu, reg::RSP);
    for r in (0..8u8).rev() {
        let at = top.wrapping_sub(T::BYTES * u64::from(r + 1)) & S::MASK;
        let v = T::get(cpu, r);
        cpu.store_at::<T>(S::SEG, at, T::narrow(v))?;
    }
    set_pointer::<S>(cpu, reg::RSP, top.wrapping_sub(T::BYTES * 8));
    Ok(())
}

fn popa<S: Stack, T: Operand>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let bottom = pointer::<S>(cpu, reg::RSP);
    let mut values = [0u64; 8];
    for (n, value) in values.iter_mut().enumerate() {
        let at = bottom.wrapping_add(T::BYTES * n as u64) & S::MASK;
        *value = cpu.load_at::<T>(S::SEG, at)?.wide();
    }
    for (n, value) in values.into_iter().enumerate() {
        let r = 7 - n as u8;
        if r != reg::RSP {
            T::set(cpu, r, value);
        }
    }
    set_pointer::<S>(cpu, reg::RSP, bottom.wrapping_add(T::BYTES * 8));
    Ok(())
}

fn leave<S: Stack, T: Operand>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let frame = pointer::<S>(cpu, reg::RBP);
    let v = cpu.load_at::<T>(S::SEG, frame)?.wide();
    set_pointer::<S>(cpu, reg::RSP, frame.wrapping_add(T::BYTES));
    T::set(cpu, reg::RBP, v);
    Ok(())
}

/// ENTER: `imm` bytes of locals, `extra` nesting levels (SDM 2A "ENTER").
fn enter<S: Stack, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let level = u64::from(op.extra & 31);
    let top = pointer::<S>(cpu, reg::RSP);
    let mut at = top.wrapping_sub(T::BYTES) & S::MASK;
    let rbp = T::get(cpu, reg::RBP);
    cpu.store_at::<T>(S::SEG, at, T::narrow(rbp))?;
    let frame = at;
    if level > 0 {
        let mut from = pointer::<S>(cpu, reg::RBP);
        for _ in 1..level {
            from = from.wrapping_sub(T::BYTES) & S::MASK;
            let v = cpu.load_at::<T>(S::SEG, from)?;
            at = at.wrapping_sub(T::BYTES) & S::MASK;
            cpu.store_at::<T>(S::SEG, at, v)?;
        }
        at = at.wrapping_sub(T::BYTES) & S::MASK;
        cpu.store_at::<T>(S::SEG, at, T::narrow(frame))?;
    }
    let rsp = at.wrapping_sub(op.imm) & S::MASK;
    // The new top of the stack must be writable, though nothing is written there.
    cpu.check_write_at::<T>(S::SEG, rsp)?;
    T::set(cpu, reg::RBP, frame);
    set_pointer::<S>(cpu, reg::RSP, rsp);
    Ok(())
}

macro_rules! by_stack {
    ($l:expr, $size:expr, $handler:ident) => {
        match $l.stack_bits() {
            64 => sized_word!($size, $handler, Stack64),
            32 => sized_word!($size, $handler, Stack32),
            _ => sized_word!($size, $handler, Stack16),
        }
    };
}

/// What PUSH and POP move, in bytes; their memory form says it, the others by mnemonic and code.
fn push_size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

fn push_pop(l: &mut Lowering<'_>, i: &Instruction, pop: bool) -> bool {
    let size = push_size(i);
    let mut op = l.op();
    let run: Handler = match i.op0_kind() {
        OpKind::Register if is_gpr(i.op0_register()) => {
            op.r0 = l.reg(i.op0_register());
            if pop {
                by_stack!(l, size, pop_r)
            } else {
                by_stack!(l, size, push_r)
            }
        }
        OpKind::Memory => {
            l.mem(&mut op, i);
            if pop {
                by_stack!(l, size, pop_m)
            } else {
                by_stack!(l, size, push_m)
            }
        }
        k if is_immediate(k) && !pop => {
            op.imm = immediate(i, 0, size);
            by_stack!(l, size, push_i)
        }
        _ => return false,
    };
    op.run = run;
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let mut op = l.op();
    op.run = match i.mnemonic() {
        M::Push => return push_pop(l, i, false),
        M::Pop => return push_pop(l, i, true),
        M::Pusha => by_stack!(l, 2, pusha),
        M::Pushad => by_stack!(l, 4, pusha),
        M::Popa => by_stack!(l, 2, popa),
        M::Popad => by_stack!(l, 4, popa),
        M::Leave => by_stack!(l, push_pop_width(i), leave),
        M::Enter => {
            op.imm = u64::from(i.immediate16());
            op.extra = i.immediate8_2nd();
            by_stack!(l, push_pop_width(i), enter)
        }
        _ => return false,
    };
    l.push(op);
    true
}

/// ENTER and LEAVE have their operand size in the code alone.
fn push_pop_width(i: &Instruction) -> usize {
    use iced_x86::Code;
    match i.code() {
        Code::Leavew | Code::Enterw_imm16_imm8 => 2,
        Code::Leaved | Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    }
}
