//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT (Intel SDM 2A, 2B).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized};
use super::{immediate, is_gpr, is_immediate, operand_size};
use crate::code::{Lowering, Op, op_flag};
use crate::cpu::Cpu;
use crate::flags::LazyFlags;
use crate::trap::Trap;

/// A two-operand operation. `value` is pure, so that it can run inside an atomic update.
pub(super) trait Alu {
    const READS_CF: bool = false;
    const WRITES: bool = true;
    fn value(a: u64, b: u64, cf: u64) -> u64;
    fn flags(flags: &mut LazyFlags, bits: u32, a: u64, b: u64, r: u64);
}

#[inline(always)]
fn add_flags(flags: &mut LazyFlags, bits: u32, a: u64, b: u64, r: u64) {
    flags.set_carries(bits, r, (a & b) | ((a | b) & !r));
}

#[inline(always)]
fn sub_flags(flags: &mut LazyFlags, bits: u32, a: u64, b: u64, r: u64) {
    flags.set_carries(bits, r, (!a & b) | ((!a | b) & r));
}

/// Sets the flags of `a - b`: what CMP, CMPS, SCAS and CMPXCHG share.
#[inline(always)]
pub(super) fn compare<T: Operand>(cpu: &mut Cpu, a: u64, b: u64) {
    sub_flags(&mut cpu.flags, T::BITS, a, b, a.wrapping_sub(b));
}

/// Sets the flags of `a + b`: XADD.
#[inline(always)]
pub(super) fn added<T: Operand>(cpu: &mut Cpu, a: u64, b: u64) {
    add_flags(&mut cpu.flags, T::BITS, a, b, a.wrapping_add(b));
}

macro_rules! alu {
    ($name:ident, cf: $cf:literal, writes: $writes:literal, $value:expr, $flags:expr) => {
        pub(super) struct $name;
        impl Alu for $name {
            const READS_CF: bool = $cf;
            const WRITES: bool = $writes;
            #[inline(always)]
            fn value(a: u64, b: u64, cf: u64) -> u64 {
                $value(a, b, cf)
            }
            #[inline(always)]
            fn flags(flags: &mut LazyFlags, bits: u32, a: u64, b: u64, r: u64) {
                $flags(flags, bits, a, b, r)
            }
        }
    };
}

#[inline(always)]
fn logic_flags(flags: &mut LazyFlags, bits: u32, _a: u64, _b: u64, r: u64) {
    flags.set_logic(bits, r);
}

alu!(Add, cf: false, writes: true, |a: u64, b, _| a.wrapping_add(b), add_flags);
alu!(Adc, cf: true, writes: true, |a: u64, b, c| a.wrapping_add(b).wrapping_add(c), add_flags);
alu!(Sub, cf: false, writes: true, |a: u64, b, _| a.wrapping_sub(b), sub_flags);
alu!(Sbb, cf: true, writes: true, |a: u64, b, c| a.wrapping_sub(b).wrapping_sub(c), sub_flags);
alu!(Cmp, cf: false, writes: false, |a: u64, b, _| a.wrapping_sub(b), sub_flags);
alu!(And, cf: false, writes: true, |a: u64, b: u64, _| a & b, logic_flags);
alu!(Or, cf: false, writes: true, |a: u64, b: u64, _| a | b, logic_flags);
alu!(Xor, cf: false, writes: true, |a: u64, b: u64, _| a ^ b, logic_flags);
alu!(Test, cf: false, writes: false, |a: u64, b: u64, _| a & b, logic_flags);

#[inline(always)]
fn carry_in<O: Alu>(cpu: &Cpu) -> u64 {
    if O::READS_CF {
        u64::from(cpu.flags.cf())
    } else {
        0
    }
}

#[inline(always)]
pub(super) fn to_register<O: Alu, T: Operand>(cpu: &mut Cpu, r0: u8, b: u64) {
    let a = T::get(cpu, r0);
    let r = O::value(a, b, carry_in::<O>(cpu));
    O::flags(&mut cpu.flags, T::BITS, a, b, r);
    if O::WRITES {
        T::set(cpu, r0, r);
    }
}

#[inline(always)]
fn to_memory<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op, b: u64) -> Result<(), Trap> {
    if O::WRITES {
        let a = cpu.load_for_write::<T>(op)?.wide();
        let r = O::value(a, b, carry_in::<O>(cpu));
        cpu.store::<T>(op, T::narrow(r))?;
        O::flags(&mut cpu.flags, T::BITS, a, b, r);
    } else {
        let a = cpu.load::<T>(op)?.wide();
        let r = O::value(a, b, carry_in::<O>(cpu));
        O::flags(&mut cpu.flags, T::BITS, a, b, r);
    }
    Ok(())
}

fn rr<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = T::get(cpu, op.r1);
    to_register::<O, T>(cpu, op.r0, b);
    Ok(())
}

fn ri<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_register::<O, T>(cpu, op.r0, op.imm);
    Ok(())
}

fn rm<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if let Some(b) = cpu.try_load::<T>(op) {
        to_register::<O, T>(cpu, op.r0, b.wide());
        return Ok(());
    }
    rm_slow::<O, T>(cpu, op)
}

#[cold]
#[inline(never)]
fn rm_slow<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = cpu.load::<T>(op)?.wide();
    to_register::<O, T>(cpu, op.r0, b);
    Ok(())
}

fn mr<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = T::get(cpu, op.r1);
    to_memory::<O, T>(cpu, op, b)
}

fn mi<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_memory::<O, T>(cpu, op, op.imm)
}

#[inline(always)]
fn locked<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op, b: u64) -> Result<(), Trap> {
    let cf = carry_in::<O>(cpu);
    let a = cpu
        .rmw::<T>(op, |a| T::narrow(O::value(a.wide(), b, cf)))?
        .wide();
    O::flags(&mut cpu.flags, T::BITS, a, b, O::value(a, b, cf));
    Ok(())
}

fn locked_mr<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = T::get(cpu, op.r1);
    locked::<O, T>(cpu, op, b)
}

fn locked_mi<O: Alu, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    locked::<O, T>(cpu, op, op.imm)
}

fn binary<O: Alu>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    let (k0, k1) = (i.op0_kind(), i.op1_kind());
    op.run = match (k0, k1) {
        (OpKind::Register, OpKind::Register) => {
            op.r0 = l.reg(i.op0_register());
            op.r1 = l.reg(i.op1_register());
            sized!(size, rr, O)
        }
        (OpKind::Register, OpKind::Memory) => {
            op.r0 = l.reg(i.op0_register());
            l.mem(&mut op, i);
            sized!(size, rm, O)
        }
        (OpKind::Memory, OpKind::Register) => {
            op.r1 = l.reg(i.op1_register());
            l.mem(&mut op, i);
            if op.has(op_flag::LOCK) {
                sized!(size, locked_mr, O)
            } else {
                sized!(size, mr, O)
            }
        }
        (OpKind::Register, k) if is_immediate(k) => {
            op.r0 = l.reg(i.op0_register());
            op.imm = immediate(i, 1, size);
            sized!(size, ri, O)
        }
        (OpKind::Memory, k) if is_immediate(k) => {
            op.imm = immediate(i, 1, size);
            l.mem(&mut op, i);
            if op.has(op_flag::LOCK) {
                sized!(size, locked_mi, O)
            } else {
                sized!(size, mi, O)
            }
        }
        _ => return false,
    };
    l.push(op);
    true
}

/// A one-operand operation.
pub(super) trait Unary {
    fn value(a: u64) -> u64;
    fn flags(flags: &mut LazyFlags, bits: u32, a: u64, r: u64);
}

pub(super) struct Inc;
pub(super) struct Dec;
struct Neg;
struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_add(1)
    }
    #[inline(always)]
    fn flags(flags: &mut LazyFlags, bits: u32, a: u64, r: u64) {
        flags.set_carries_keep_cf(bits, r, (a & 1) | ((a | 1) & !r));
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_sub(1)
    }
    #[inline(always)]
    fn flags(flags: &mut LazyFlags, bits: u32, a: u64, r: u64) {
        flags.set_carries_keep_cf(bits, r, (!a & 1) | ((!a | 1) & r));
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_neg()
    }
    #[inline(always)]
    fn flags(flags: &mut LazyFlags, bits: u32, a: u64, r: u64) {
        sub_flags(flags, bits, 0, a, r);
    }
}

impl Unary for Not {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        !a
    }
    #[inline(always)]
    fn flags(_: &mut LazyFlags, _: u32, _: u64, _: u64) {}
}

#[inline(always)]
pub(super) fn unary_register<O: Unary, T: Operand>(cpu: &mut Cpu, r0: u8) {
    let a = T::get(cpu, r0);
    let r = O::value(a);
    O::flags(&mut cpu.flags, T::BITS, a, r);
    T::set(cpu, r0, r);
}

fn unary_r<O: Unary, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    unary_register::<O, T>(cpu, op.r0);
    Ok(())
}

fn unary_m<O: Unary, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = cpu.rmw::<T>(op, |a| T::narrow(O::value(a.wide())))?.wide();
    O::flags(&mut cpu.flags, T::BITS, a, O::value(a));
    Ok(())
}

fn unary<O: Unary>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    op.run = match i.op0_kind() {
        OpKind::Register => {
            op.r0 = l.reg(i.op0_register());
            sized!(size, unary_r, O)
        }
        OpKind::Memory => {
            l.mem(&mut op, i);
            sized!(size, unary_m, O)
        }
        _ => return false,
    };
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    if i.op0_kind() == OpKind::Register && !is_gpr(i.op0_register()) {
        return false;
    }
    match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(l, i),
        Mnemonic::Adc => binary::<Adc>(l, i),
        Mnemonic::Sub => binary::<Sub>(l, i),
        Mnemonic::Sbb => binary::<Sbb>(l, i),
        Mnemonic::Cmp => binary::<Cmp>(l, i),
        Mnemonic::And => binary::<And>(l, i),
        Mnemonic::Or => binary::<Or>(l, i),
        Mnemonic::Xor => binary::<Xor>(l, i),
        Mnemonic::Test => binary::<Test>(l, i),
        Mnemonic::Inc => unary::<Inc>(l, i),
        Mnemonic::Dec => unary::<Dec>(l, i),
        Mnemonic::Neg => unary::<Neg>(l, i),
        Mnemonic::Not => unary::<Not>(l, i),
        _ => false,
    }
}
