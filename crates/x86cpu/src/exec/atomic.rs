//! XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized};
use super::{alu, operand_size};
use crate::code::{Lowering, Op};
use crate::cpu::{Cpu, reg};
use crate::flags::rflags;
use crate::trap::Trap;

fn xadd_r<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.r0), T::get(cpu, op.r1));
    alu::added::<T>(cpu, a, b);
    T::set(cpu, op.r1, a);
    T::set(cpu, op.r0, a.wrapping_add(b));
    Ok(())
}

fn xadd_m<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = T::get(cpu, op.r1);
    let a = cpu
        .rmw::<T>(op, |a| T::narrow(a.wide().wrapping_add(b)))?
        .wide();
    alu::added::<T>(cpu, a, b);
    T::set(cpu, op.r1, a);
    Ok(())
}

fn cmpxchg_r<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (acc, old) = (T::get(cpu, reg::RAX), T::get(cpu, op.r0));
    alu::compare::<T>(cpu, acc, old);
    if acc == old {
        let new = T::get(cpu, op.r1);
        T::set(cpu, op.r0, new);
    } else {
        // The 32-bit form clears the destination's upper half whether it is exchanged or not.
        T::set(cpu, op.r0, old);
        T::set(cpu, reg::RAX, old);
    }
    Ok(())
}

fn cmpxchg_m<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let acc = T::get(cpu, reg::RAX);
    let new = T::narrow(T::get(cpu, op.r1));
    let old = cpu
        .rmw::<T>(op, |old| if old.wide() == acc { new } else { old })?
        .wide();
    alu::compare::<T>(cpu, acc, old);
    if acc != old {
        T::set(cpu, reg::RAX, old);
    }
    Ok(())
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    let bits = cpu.flags.bits() & !rflags::ZF;
    cpu.flags
        .set_bits(if on { bits | rflags::ZF } else { bits });
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let pair = |cpu: &Cpu, high, low| (u32::get(cpu, high) << 32) | u32::get(cpu, low);
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let old = cpu.rmw::<u64>(op, |old| if old == expected { new } else { old })?;
    set_zf(cpu, old == expected);
    if old != expected {
        u32::set(cpu, reg::RAX, old);
        u32::set(cpu, reg::RDX, old >> 32);
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    // The operand must be aligned (SDM 2A "CMPXCHG8B/CMPXCHG16B").
    if cpu.linear(op, 16, true)? & 15 != 0 {
        return Err(cpu.gp0());
    }
    let pair = |cpu: &Cpu, high, low| {
        (u128::from(u64::get(cpu, high)) << 64) | u128::from(u64::get(cpu, low))
    };
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let old = cpu.rmw::<u128>(op, |old| if old == expected { new } else { old })?;
    set_zf(cpu, old == expected);
    if old != expected {
        u64::set(cpu, reg::RAX, old as u64);
        u64::set(cpu, reg::RDX, (old >> 64) as u64);
    }
    Ok(())
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let register = i.op0_kind() == OpKind::Register;
    let size = operand_size(i, 0);
    op.run = match (i.mnemonic(), register) {
        (Mnemonic::Xadd, true) => sized!(size, xadd_r),
        (Mnemonic::Xadd, false) => sized!(size, xadd_m),
        (Mnemonic::Cmpxchg, true) => sized!(size, cmpxchg_r),
        (Mnemonic::Cmpxchg, false) => sized!(size, cmpxchg_m),
        (Mnemonic::Cmpxchg8b, _) => cmpxchg8b,
        (Mnemonic::Cmpxchg16b, _) => cmpxchg16b,
        _ => return false,
    };
    if register {
        op.r0 = l.reg(i.op0_register());
    } else {
        l.mem(&mut op, i);
    }
    if i.op_count() > 1 {
        op.r1 = l.reg(i.op1_register());
    }
    l.push(op);
    true
}
