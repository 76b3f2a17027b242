//! Data movement: MOV, MOVZX, MOVSX, MOVSXD, LEA, XCHG, CMOVcc, SETcc, BSWAP, MOVBE, CBW and its
//! family, XLAT (Intel SDM 2A, 2B).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, by_condition, condition, sized, sized_word};
use super::{immediate, is_gpr, is_immediate, operand_size};
use crate::code::{Handler, Lowering, Op, op_flag};
use crate::cpu::{Cpu, reg};
use crate::trap::Trap;

fn mov_rr<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = T::get(cpu, op.r1);
    T::set(cpu, op.r0, v);
    Ok(())
}

fn mov_ri<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    T::set(cpu, op.r0, op.imm);
    Ok(())
}

fn mov_rm<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if let Some(v) = cpu.try_load::<T>(op) {
        T::set(cpu, op.r0, v.wide());
        return Ok(());
    }
    mov_rm_slow::<T>(cpu, op)
}

#[cold]
#[inline(never)]
fn mov_rm_slow<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = cpu.load::<T>(op)?.wide();
    T::set(cpu, op.r0, v);
    Ok(())
}

fn mov_mr<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = T::get(cpu, op.r1);
    if cpu.try_store::<T>(op, T::narrow(v)) {
        return Ok(());
    }
    mov_mr_slow::<T>(cpu, op)
}

#[cold]
#[inline(never)]
fn mov_mr_slow<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = T::get(cpu, op.r1);
    cpu.store::<T>(op, T::narrow(v))
}

fn mov_mi<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.store::<T>(op, T::narrow(op.imm))
}

fn mov(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    op.run = match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            if !is_gpr(i.op0_register()) || !is_gpr(i.op1_register()) {
                return false;
            }
            op.r0 = l.reg(i.op0_register());
            op.r1 = l.reg(i.op1_register());
            sized!(size, mov_rr)
        }
        (OpKind::Register, OpKind::Memory) => {
            if !is_gpr(i.op0_register()) {
                return false;
            }
            op.r0 = l.reg(i.op0_register());
            l.mem(&mut op, i);
            sized!(size, mov_rm)
        }
        (OpKind::Memory, OpKind::Register) => {
            if !is_gpr(i.op1_register()) {
                return false;
            }
            op.r1 = l.reg(i.op1_register());
            l.mem(&mut op, i);
            sized!(size, mov_mr)
        }
        (OpKind::Register, k) if is_immediate(k) => {
            op.r0 = l.reg(i.op0_register());
            op.imm = immediate(i, 1, size);
            sized!(size, mov_ri)
        }
        (OpKind::Memory, k) if is_immediate(k) => {
            op.imm = immediate(i, 1, size);
            l.mem(&mut op, i);
            sized!(size, mov_mi)
        }
        _ => return false,
    };
    l.push(op);
    true
}

/// How MOVZX, MOVSX and MOVSXD widen.
trait Extend {
    fn extend<S: Operand>(value: u64) -> u64;
}

struct Zero;
struct Sign;

impl Extend for Zero {
    #[inline(always)]
    fn extend<S: Operand>(value: u64) -> u64 {
        value
    }
}

impl Extend for Sign {
    #[inline(always)]
    fn extend<S: Operand>(value: u64) -> u64 {
        S::signed(value) as u64
    }
}

fn extend_rr<E: Extend, S: Operand, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = S::get(cpu, op.r1);
    T::set(cpu, op.r0, E::extend::<S>(v));
    Ok(())
}

fn extend_rm<E: Extend, S: Operand, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if let Some(v) = cpu.try_load::<S>(op) {
        T::set(cpu, op.r0, E::extend::<S>(v.wide()));
        return Ok(());
    }
    extend_rm_slow::<E, S, T>(cpu, op)
}

#[cold]
#[inline(never)]
fn extend_rm_slow<E: Extend, S: Operand, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = cpu.load::<S>(op)?.wide();
    T::set(cpu, op.r0, E::extend::<S>(v));
    Ok(())
}

fn widen<E: Extend>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let (to, from) = (operand_size(i, 0), operand_size(i, 1));
    let mut op = l.op();
    op.r0 = l.reg(i.op0_register());
    op.run = if i.op1_kind() == OpKind::Register {
        op.r1 = l.reg(i.op1_register());
        match from {
            1 => sized_word!(to, extend_rr, E, u8),
            2 => sized_word!(to, extend_rr, E, u16),
            _ => sized_word!(to, extend_rr, E, u32),
        }
    } else {
        l.mem(&mut op, i);
        match from {
            1 => sized_word!(to, extend_rm, E, u8),
            2 => sized_word!(to, extend_rm, E, u16),
            _ => sized_word!(to, extend_rm, E, u32),
        }
    };
    l.push(op);
    true
}

fn lea<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = op.offset(cpu);
    T::set(cpu, op.r0, v);
    Ok(())
}

fn xchg_rr<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.r0), T::get(cpu, op.r1));
    T::set(cpu, op.r0, b);
    T::set(cpu, op.r1, a);
    Ok(())
}

fn xchg_m<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let new = T::narrow(T::get(cpu, op.r0));
    let old = cpu.rmw::<T>(op, |_| new)?.wide();
    T::set(cpu, op.r0, old);
    Ok(())
}

fn xchg(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    op.run = match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            op.r0 = l.reg(i.op0_register());
            op.r1 = l.reg(i.op1_register());
            sized!(size, xchg_rr)
        }
        (a, _) => {
            let register = if a == OpKind::Register {
                i.op0_register()
            } else {
                i.op1_register()
            };
            op.r0 = l.reg(register);
            l.mem(&mut op, i);
            // XCHG with memory locks with or without the prefix (SDM 3A §9.1.2.1).
            op.flags |= op_flag::LOCK;
            sized!(size, xchg_m)
        }
    };
    l.push(op);
    true
}

fn cmov_rr<T: Operand, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let source = if condition(&cpu.flags, CC) {
        op.r1
    } else {
        op.r0
    };
    // The 32-bit form clears the upper half either way.
    let v = T::get(cpu, source);
    T::set(cpu, op.r0, v);
    Ok(())
}

fn cmov_rm<T: Operand, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut v = cpu.load::<T>(op)?.wide();
    if !condition(&cpu.flags, CC) {
        v = T::get(cpu, op.r0);
    }
    T::set(cpu, op.r0, v);
    Ok(())
}

fn cmov(l: &mut Lowering<'_>, i: &Instruction, cc: u8) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    op.r0 = l.reg(i.op0_register());
    op.run = if i.op1_kind() == OpKind::Register {
        op.r1 = l.reg(i.op1_register());
        match size {
            2 => by_condition!(cc, cmov_rr, u16),
            4 => by_condition!(cc, cmov_rr, u32),
            _ => by_condition!(cc, cmov_rr, u64),
        }
    } else {
        l.mem(&mut op, i);
        match size {
            2 => by_condition!(cc, cmov_rm, u16),
            4 => by_condition!(cc, cmov_rm, u32),
            _ => by_condition!(cc, cmov_rm, u64),
        }
    };
    l.push(op);
    true
}

fn set_r<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = u64::from(condition(&cpu.flags, CC));
    u8::set(cpu, op.r0, v);
    Ok(())
}

fn set_m<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = u8::from(condition(&cpu.flags, CC));
    cpu.store::<u8>(op, v)
}

fn setcc(l: &mut Lowering<'_>, i: &Instruction, cc: u8) -> bool {
    let mut op = l.op();
    op.run = if i.op0_kind() == OpKind::Register {
        op.r0 = l.reg(i.op0_register());
        by_condition!(cc, set_r)
    } else {
        l.mem(&mut op, i);
        by_condition!(cc, set_m)
    };
    l.push(op);
    true
}

/// BSWAP of 16 bits is undefined; processors of both vendors clear the register's low word.
fn bswap<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = if T::BITS == 16 {
        0
    } else {
        T::get(cpu, op.r0).swap_bytes() >> (64 - T::BITS)
    };
    T::set(cpu, op.r0, v);
    Ok(())
}

fn movbe_rm<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = cpu.load::<T>(op)?.wide().swap_bytes() >> (64 - T::BITS);
    T::set(cpu, op.r0, v);
    Ok(())
}

fn movbe_mr<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = T::get(cpu, op.r1).swap_bytes() >> (64 - T::BITS);
    cpu.store::<T>(op, T::narrow(v))
}

fn movbe(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    op.run = if i.op0_kind() == OpKind::Register {
        op.r0 = l.reg(i.op0_register());
        sized_word!(size, movbe_rm)
    } else {
        op.r1 = l.reg(i.op1_register());
        sized_word!(size, movbe_mr)
    };
    l.mem(&mut op, i);
    l.push(op);
    true
}

/// CBW, CWDE, CDQE: the accumulator's lower half `S` sign-extended to `T`.
fn widen_acc<S: Operand, T: Operand>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let v = S::signed(S::get(cpu, reg::RAX)) as u64;
    T::set(cpu, reg::RAX, v);
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign through the data register.
fn sign_acc<T: Operand>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let sign = T::signed(T::get(cpu, reg::RAX)) >> 63;
    T::set(cpu, reg::RDX, sign as u64);
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let offset = cpu.gpr[usize::from(reg::RBX)].wrapping_add(u8::get(cpu, reg::RAX));
    let v = cpu.load_at::<u8>(op.seg, offset & super::address_mask(op))?;
    u8::set(cpu, reg::RAX, u64::from(v));
    Ok(())
}

fn simple(l: &mut Lowering<'_>, run: Handler) -> bool {
    let mut op = l.op();
    op.run = run;
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Mov => mov(l, i),
        M::Movzx => widen::<Zero>(l, i),
        M::Movsx => widen::<Sign>(l, i),
        M::Movsxd if operand_size(i, 0) == 8 => widen::<Sign>(l, i),
        // Without REX.W MOVSXD moves without extension.
        M::Movsxd => mov(l, i),
        M::Lea => {
            let mut op = l.op();
            op.r0 = l.reg(i.op0_register());
            l.mem(&mut op, i);
            op.run = sized_word!(operand_size(i, 0), lea);
            l.push(op);
            true
        }
        M::Xchg => xchg(l, i),
        M::Bswap => {
            let mut op = l.op();
            op.r0 = l.reg(i.op0_register());
            op.run = sized_word!(operand_size(i, 0), bswap);
            l.push(op);
            true
        }
        M::Movbe => movbe(l, i),
        M::Cbw => simple(l, widen_acc::<u8, u16>),
        M::Cwde => simple(l, widen_acc::<u16, u32>),
        M::Cdqe => simple(l, widen_acc::<u32, u64>),
        M::Cwd => simple(l, sign_acc::<u16>),
        M::Cdq => simple(l, sign_acc::<u32>),
        M::Cqo => simple(l, sign_acc::<u64>),
        M::Xlatb => {
            let mut op = l.op();
            l.mem(&mut op, i);
            op.run = xlat;
            l.push(op);
            true
        }
        _ => {
            let code = i.code();
            let Some(cc) = super::condition_code(i) else {
                return false;
            };
            if super::is_cmov(code) {
                cmov(l, i, cc)
            } else if super::is_setcc(code) {
                setcc(l, i, cc)
            } else {
                false
            }
        }
    }
}
