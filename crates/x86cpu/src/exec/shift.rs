//! Shifts and rotates (Intel SDM 2B "RCL/RCR/ROL/ROR", "SAL/SAR/SHL/SHR", "SHLD", "SHRD").

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized, sized_word};
use super::{is_immediate, operand_size};
use crate::code::{Lowering, Op};
use crate::cpu::{Cpu, reg};
use crate::trap::Trap;

/// What a shift computes: the result, and CF and OF; `None` where flags and operand stay.
#[derive(Clone, Copy)]
struct Shifted {
    result: u64,
    cf: bool,
    of: bool,
}

trait Shift {
    /// Rotates leave SF, ZF, AF and PF.
    const ROTATE: bool;
    /// `count` is masked and not zero.
    fn apply<T: Operand>(a: u64, count: u32, cf: bool) -> Shifted;
}

struct Shl;
struct Shr;
struct Sar;
struct Rol;
struct Ror;
struct Rcl;
struct Rcr;

fn top<T: Operand>(v: u64) -> bool {
    v & T::TOP != 0
}

impl Shift for Shl {
    const ROTATE: bool = false;
    #[inline(always)]
    fn apply<T: Operand>(a: u64, count: u32, _: bool) -> Shifted {
        let result = a << count;
        let cf = count <= T::BITS && (a >> (T::BITS - count)) & 1 != 0;
        Shifted {
            result,
            cf,
            of: top::<T>(result) != cf,
        }
    }
}

impl Shift for Shr {
    const ROTATE: bool = false;
    #[inline(always)]
    fn apply<T: Operand>(a: u64, count: u32, _: bool) -> Shifted {
        Shifted {
            result: a >> count,
            cf: (a >> (count - 1)) & 1 != 0,
            of: top::<T>(a),
        }
    }
}

impl Shift for Sar {
    const ROTATE: bool = false;
    #[inline(always)]
    fn apply<T: Operand>(a: u64, count: u32, _: bool) -> Shifted {
        let a = T::signed(a);
        Shifted {
            result: (a >> count) as u64,
            cf: (a >> (count - 1)) & 1 != 0,
            of: false,
        }
    }
}

impl Shift for Rol {
    const ROTATE: bool = true;
    #[inline(always)]
    fn apply<T: Operand>(a: u64, count: u32, _: bool) -> Shifted {
        let n = count % T::BITS;
        let result = if n == 0 {
            a
        } else {
            ((a << n) | (a >> (T::BITS - n))) & T::MASK
        };
        let cf = result & 1 != 0;
        Shifted {
            result,
            cf,
            of: top::<T>(result) != cf,
        }
    }
}

impl Shift for Ror {
    const ROTATE: bool = true;
    #[inline(always)]
    fn apply<T: Operand>(a: u64, count: u32, _: bool) -> Shifted {
        let n = count % T::BITS;
        let result = if n == 0 {
            a
        } else {
            ((a >> n) | (a << (T::BITS - n))) & T::MASK
        };
        Shifted {
            result,
            cf: top::<T>(result),
            of: top::<T>(result) != top::<T>(result << 1),
        }
    }
}

/// Rotates left by `n` of `BITS + 1` positions, CF being the top one.
fn rotate_through<T: Operand>(a: u64, n: u32, cf: bool) -> (u64, bool) {
    let width = T::BITS + 1;
    let all = (u128::from(cf) << T::BITS) | u128::from(a);
    let turned = if n == 0 {
        all
    } else {
        (all << n) | (all >> (width - n))
    };
    (turned as u64 & T::MASK, (turned >> T::BITS) & 1 != 0)
}

impl Shift for Rcl {
    const ROTATE: bool = true;
    fn apply<T: Operand>(a: u64, count: u32, cf: bool) -> Shifted {
        let (result, cf) = rotate_through::<T>(a, count % (T::BITS + 1), cf);
        Shifted {
            result,
            cf,
            of: top::<T>(result) != cf,
        }
    }
}

impl Shift for Rcr {
    const ROTATE: bool = true;
    fn apply<T: Operand>(a: u64, count: u32, cf: bool) -> Shifted {
        let n = count % (T::BITS + 1);
        let left = if n == 0 { 0 } else { T::BITS + 1 - n };
        let (result, cf) = rotate_through::<T>(a, left, cf);
        Shifted {
            result,
            cf,
            of: top::<T>(result) != top::<T>(result << 1),
        }
    }
}

#[inline(always)]
fn count_mask<T: Operand>(count: u64) -> u32 {
    (count & if T::BITS == 64 { 63 } else { 31 }) as u32
}

#[inline(always)]
fn set_flags<S: Shift, T: Operand>(cpu: &mut Cpu, s: Shifted) {
    if S::ROTATE {
        cpu.flags.set_cf_of(s.cf, s.of);
    } else {
        cpu.flags.set_shift(T::BITS, s.result, s.cf, s.of);
    }
}

#[inline(always)]
fn to_register<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) {
    let count = count_mask::<T>(count);
    let a = T::get(cpu, op.r0);
    if count == 0 {
        // The 32-bit form still clears the upper half.
        T::set(cpu, op.r0, a);
        return;
    }
    let s = S::apply::<T>(a, count, cpu.flags.cf());
    set_flags::<S, T>(cpu, s);
    T::set(cpu, op.r0, s.result);
}

#[inline(always)]
fn to_memory<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<(), Trap> {
    let count = count_mask::<T>(count);
    let a = cpu.load_for_write::<T>(op)?;
    if count == 0 {
        return cpu.store::<T>(op, a);
    }
    let s = S::apply::<T>(a.wide(), count, cpu.flags.cf());
    cpu.store::<T>(op, T::narrow(s.result))?;
    set_flags::<S, T>(cpu, s);
    Ok(())
}

fn r_imm<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_register::<S, T>(cpu, op, op.imm);
    Ok(())
}

fn r_cl<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let count = u8::get(cpu, reg::RCX);
    to_register::<S, T>(cpu, op, count);
    Ok(())
}

fn m_imm<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_memory::<S, T>(cpu, op, op.imm)
}

fn m_cl<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let count = u8::get(cpu, reg::RCX);
    to_memory::<S, T>(cpu, op, count)
}

fn shift<S: Shift>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    let by_imm = is_immediate(i.op1_kind());
    if by_imm {
        op.imm = i.immediate(1) & 0xff;
    }
    op.run = if i.op0_kind() == OpKind::Register {
        op.r0 = l.reg(i.op0_register());
        if by_imm {
            sized!(size, r_imm, S)
        } else {
            sized!(size, r_cl, S)
        }
    } else {
        l.mem(&mut op, i);
        if by_imm {
            sized!(size, m_imm, S)
        } else {
            sized!(size, m_cl, S)
        }
    };
    l.push(op);
    true
}

/// SHLD (`LEFT`) and SHRD of `a` with bits from `b`; `count` is masked and not zero.
fn double<T: Operand, const LEFT: bool>(a: u64, b: u64, count: u32) -> Shifted {
    // A 16-bit count above 16 is undefined; three words side by side give what hardware gives.
    let (a, b) = (u128::from(a), u128::from(b));
    let bits = T::BITS;
    let (result, cf) = if LEFT {
        if bits == 64 {
            let wide = (a << 64) | b;
            (((wide << count) >> 64) as u64, (a >> (64 - count)) & 1 != 0)
        } else {
            let wide = (a << (2 * bits)) | (b << bits) | a;
            (
                ((wide << count) >> (2 * bits)) as u64,
                (wide >> (3 * bits - count)) & 1 != 0,
            )
        }
    } else {
        let wide = if bits == 64 {
            (b << 64) | a
        } else {
            (a << (2 * bits)) | (b << bits) | a
        };
        ((wide >> count) as u64, (wide >> (count - 1)) & 1 != 0)
    };
    let result = result & T::MASK;
    Shifted {
        result,
        cf,
        of: (result ^ a as u64) & T::TOP != 0,
    }
}

#[inline(always)]
fn double_count<T: Operand, const CL: bool>(cpu: &Cpu, op: &Op) -> u32 {
    count_mask::<T>(if CL { u8::get(cpu, reg::RCX) } else { op.imm })
}

fn double_r<T: Operand, const LEFT: bool, const CL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let count = double_count::<T, CL>(cpu, op);
    let (a, b) = (T::get(cpu, op.r0), T::get(cpu, op.r1));
    if count == 0 {
        T::set(cpu, op.r0, a);
        return Ok(());
    }
    let s = double::<T, LEFT>(a, b, count);
    cpu.flags.set_shift(T::BITS, s.result, s.cf, s.of);
    T::set(cpu, op.r0, s.result);
    Ok(())
}

fn double_m<T: Operand, const LEFT: bool, const CL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let count = double_count::<T, CL>(cpu, op);
    let a = cpu.load_for_write::<T>(op)?;
    if count == 0 {
        return cpu.store::<T>(op, a);
    }
    let s = double::<T, LEFT>(a.wide(), T::get(cpu, op.r1), count);
    cpu.store::<T>(op, T::narrow(s.result))?;
    cpu.flags.set_shift(T::BITS, s.result, s.cf, s.of);
    Ok(())
}

macro_rules! double_by_size {
    ($size:expr, $handler:ident, $left:literal, $cl:literal) => {
        match $size {
            2 => $handler::<u16, $left, $cl> as crate::code::Handler,
            4 => $handler::<u32, $left, $cl>,
            _ => $handler::<u64, $left, $cl>,
        }
    };
}

fn double_shift(l: &mut Lowering<'_>, i: &Instruction, left: bool) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    let cl = !is_immediate(i.op2_kind());
    if !cl {
        op.imm = i.immediate(2) & 0xff;
    }
    op.r1 = l.reg(i.op1_register());
    let register = i.op0_kind() == OpKind::Register;
    if register {
        op.r0 = l.reg(i.op0_register());
    } else {
        l.mem(&mut op, i);
    }
    op.run = match (register, left, cl) {
        (true, true, true) => double_by_size!(size, double_r, true, true),
        (true, true, false) => double_by_size!(size, double_r, true, false),
        (true, false, true) => double_by_size!(size, double_r, false, true),
        (true, false, false) => double_by_size!(size, double_r, false, false),
        (false, true, true) => double_by_size!(size, double_m, true, true),
        (false, true, false) => double_by_size!(size, double_m, true, false),
        (false, false, true) => double_by_size!(size, double_m, false, true),
        (false, false, false) => double_by_size!(size, double_m, false, false),
    };
    l.push(op);
    true
}

/// SHLX, SHRX, SARX, RORX: no flags; the source may be memory, the count a register or immediate.
fn flagless<S: Shift, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = if op.extra & 1 != 0 {
        cpu.load::<T>(op)?.wide()
    } else {
        T::get(cpu, op.r1)
    };
    let count = if op.extra & 2 != 0 {
        op.imm
    } else {
        T::get(cpu, op.r2)
    };
    let count = count_mask::<T>(count);
    let result = if count == 0 {
        a
    } else {
        S::apply::<T>(a, count, false).result
    };
    T::set(cpu, op.r0, result);
    Ok(())
}

fn bmi_shift<S: Shift>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    op.r0 = l.reg(i.op0_register());
    if i.op1_kind() == OpKind::Register {
        op.r1 = l.reg(i.op1_register());
    } else {
        l.mem(&mut op, i);
        op.extra |= 1;
    }
    if is_immediate(i.op2_kind()) {
        op.imm = i.immediate(2) & 0xff;
        op.extra |= 2;
    } else {
        op.r2 = l.reg(i.op2_register());
    }
    op.run = sized_word!(operand_size(i, 0), flagless, S);
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(l, i),
        Mnemonic::Shr => shift::<Shr>(l, i),
        Mnemonic::Sar => shift::<Sar>(l, i),
        Mnemonic::Rol => shift::<Rol>(l, i),
        Mnemonic::Ror => shift::<Ror>(l, i),
        Mnemonic::Rcl => shift::<Rcl>(l, i),
        Mnemonic::Rcr => shift::<Rcr>(l, i),
        Mnemonic::Shld => double_shift(l, i, true),
        Mnemonic::Shrd => double_shift(l, i, false),
        Mnemonic::Shlx => bmi_shift::<Shl>(l, i),
        Mnemonic::Shrx => bmi_shift::<Shr>(l, i),
        Mnemonic::Sarx => bmi_shift::<Sar>(l, i),
        Mnemonic::Rorx => bmi_shift::<Ror>(l, i),
        _ => false,
    }
}
