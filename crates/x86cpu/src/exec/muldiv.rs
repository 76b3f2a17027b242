//! Multiplication and division, and the carry-chain additions ADCX, ADOX and MULX.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized, sized_word};
use super::{immediate, is_immediate, operand_size};
use crate::code::{Lowering, Op};
use crate::cpu::{Cpu, reg};
use crate::trap::{Trap, vector};

/// In [`Op::extra`]: the (last) source is memory.
const FROM_MEMORY: u8 = 1;

#[inline(always)]
fn source<T: Operand>(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u64, Trap> {
    if op.extra & FROM_MEMORY != 0 {
        Ok(cpu.load::<T>(op)?.wide())
    } else {
        Ok(T::get(cpu, register))
    }
}

/// Writes a double-width product or takes a double-width dividend: AX, or DX:AX and its like.
#[inline(always)]
fn set_wide<T: Operand>(cpu: &mut Cpu, value: u128) {
    if T::BITS == 8 {
        u16::set(cpu, reg::RAX, value as u64);
    } else {
        T::set(cpu, reg::RAX, value as u64);
        T::set(cpu, reg::RDX, (value >> T::BITS) as u64);
    }
}

#[inline(always)]
fn get_wide<T: Operand>(cpu: &Cpu) -> u128 {
    if T::BITS == 8 {
        u128::from(u16::get(cpu, reg::RAX))
    } else {
        (u128::from(T::get(cpu, reg::RDX)) << T::BITS) | u128::from(T::get(cpu, reg::RAX))
    }
}

fn mul<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r0)?;
    let product = u128::from(T::get(cpu, reg::RAX)) * u128::from(b);
    set_wide::<T>(cpu, product);
    let big = product >> T::BITS != 0;
    cpu.flags.set_logic(T::BITS, product as u64);
    cpu.flags.set_cf_of(big, big);
    Ok(())
}

#[inline(always)]
fn signed_product<T: Operand>(cpu: &mut Cpu, a: u64, b: u64) -> i128 {
    let product = i128::from(T::signed(a)) * i128::from(T::signed(b));
    let big = product != i128::from(T::signed(product as u64));
    cpu.flags.set_logic(T::BITS, product as u64);
    cpu.flags.set_cf_of(big, big);
    product
}

fn imul1<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r0)?;
    let a = T::get(cpu, reg::RAX);
    let product = signed_product::<T>(cpu, a, b);
    set_wide::<T>(cpu, product as u128);
    Ok(())
}

fn imul2<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r1)?;
    let a = T::get(cpu, op.r0);
    let product = signed_product::<T>(cpu, a, b);
    T::set(cpu, op.r0, product as u64);
    Ok(())
}

fn imul3<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = source::<T>(cpu, op, op.r1)?;
    let product = signed_product::<T>(cpu, a, op.imm);
    T::set(cpu, op.r0, product as u64);
    Ok(())
}

#[inline(always)]
fn set_quotient<T: Operand>(cpu: &mut Cpu, quotient: u64, remainder: u64) {
    if T::BITS == 8 {
        u16::set(cpu, reg::RAX, (quotient & 0xff) | ((remainder & 0xff) << 8));
    } else {
        T::set(cpu, reg::RAX, quotient);
        T::set(cpu, reg::RDX, remainder);
    }
}

fn div<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let divisor = source::<T>(cpu, op, op.r0)?;
    let dividend = get_wide::<T>(cpu);
    if divisor == 0 {
        return Err(cpu.fault_plain(vector::DE));
    }
    if dividend >> 64 == 0 {
        let dividend = dividend as u64;
        let quotient = dividend / divisor;
        if quotient > T::MASK {
            return Err(cpu.fault_plain(vector::DE));
        }
        set_quotient::<T>(cpu, quotient, dividend % divisor);
    } else {
        let divisor = u128::from(divisor);
        let quotient = dividend / divisor;
        if quotient > u128::from(T::MASK) {
            return Err(cpu.fault_plain(vector::DE));
        }
        set_quotient::<T>(cpu, quotient as u64, (dividend % divisor) as u64);
    }
    Ok(())
}

fn idiv<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let divisor = i128::from(T::signed(source::<T>(cpu, op, op.r0)?));
    let unused = 128 - 2 * T::BITS;
    let dividend = ((get_wide::<T>(cpu) << unused) as i128) >> unused;
    if divisor == 0 {
        return Err(cpu.fault_plain(vector::DE));
    }
    // The one overflow of i128 division, i128::MIN / -1, wraps to a quotient that doesn't fit.
    let quotient = match (i64::try_from(dividend), i64::try_from(divisor)) {
        (Ok(a), Ok(b)) => a.checked_div(b).map_or(i128::MAX, i128::from),
        _ => dividend.checked_div(divisor).unwrap_or(i128::MAX),
    };
    if quotient != i128::from(T::signed(quotient as u64)) {
        return Err(cpu.fault_plain(vector::DE));
    }
    let remainder = dividend.wrapping_sub(quotient.wrapping_mul(divisor));
    set_quotient::<T>(cpu, quotient as u64, remainder as u64);
    Ok(())
}

fn mulx<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r2)?;
    let product = u128::from(T::get(cpu, reg::RDX)) * u128::from(b);
    // The high half is written last: it wins where both name one register.
    T::set(cpu, op.r1, product as u64);
    T::set(cpu, op.r0, (product >> T::BITS) as u64);
    Ok(())
}

fn adcx<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r1)?;
    let sum = u128::from(T::get(cpu, op.r0)) + u128::from(b) + u128::from(cpu.flags.cf());
    cpu.flags.set_cf(sum >> T::BITS != 0);
    T::set(cpu, op.r0, sum as u64);
    Ok(())
}

fn adox<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r1)?;
    let sum = u128::from(T::get(cpu, op.r0)) + u128::from(b) + u128::from(cpu.flags.of());
    let cf = cpu.flags.cf();
    cpu.flags.set_cf_of(cf, sum >> T::BITS != 0);
    T::set(cpu, op.r0, sum as u64);
    Ok(())
}

/// Fills the operands, the last of which may be memory; immediates go to `imm`.
fn operands(l: &mut Lowering<'_>, i: &Instruction, size: usize) -> Op {
    let mut op = l.op();
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = l.reg(i.op_register(n));
                match n {
                    0 => op.r0 = r,
                    1 => op.r1 = r,
                    _ => op.r2 = r,
                }
            }
            OpKind::Memory => {
                l.mem(&mut op, i);
                op.extra |= FROM_MEMORY;
            }
            k if is_immediate(k) => op.imm = immediate(i, n, size),
            _ => {}
        }
    }
    op
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = match i.mnemonic() {
        Mnemonic::Mul
        | Mnemonic::Imul
        | Mnemonic::Div
        | Mnemonic::Idiv
        | Mnemonic::Mulx
        | Mnemonic::Adcx
        | Mnemonic::Adox => operand_size(i, 0),
        _ => return false,
    };
    let mut op = operands(l, i, size);
    op.run = match (i.mnemonic(), i.op_count()) {
        (Mnemonic::Mul, _) => sized!(size, mul),
        (Mnemonic::Imul, 1) => sized!(size, imul1),
        (Mnemonic::Imul, 2) => sized_word!(size, imul2),
        (Mnemonic::Imul, _) => sized_word!(size, imul3),
        (Mnemonic::Div, _) => sized!(size, div),
        (Mnemonic::Idiv, _) => sized!(size, idiv),
        (Mnemonic::Mulx, _) => sized_word!(size, mulx),
        (Mnemonic::Adcx, _) => sized_word!(size, adcx),
        _ => sized_word!(size, adox),
    };
    l.push(op);
    true
}
