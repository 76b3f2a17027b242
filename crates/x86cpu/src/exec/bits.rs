//! Bit tests and scans, BMI1, BMI2, POPCNT, LZCNT, CRC32.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, sized, sized_word};
use super::{is_immediate, operand_size};
use crate::code::{Handler, Lowering, Op};
use crate::cpu::{Cpu, reg};
use crate::trap::Trap;

/// In [`Op::extra`]: the source is memory.
const FROM_MEMORY: u8 = 1;

/// BT, BTS, BTR, BTC.
trait BitOp {
    const WRITES: bool = true;
    fn value(word: u64, bit: u64) -> u64;
}

struct Bt;
struct Bts;
struct Btr;
struct Btc;

impl BitOp for Bt {
    const WRITES: bool = false;
    fn value(word: u64, _: u64) -> u64 {
        word
    }
}
impl BitOp for Bts {
    fn value(word: u64, bit: u64) -> u64 {
        word | bit
    }
}
impl BitOp for Btr {
    fn value(word: u64, bit: u64) -> u64 {
        word & !bit
    }
}
impl BitOp for Btc {
    fn value(word: u64, bit: u64) -> u64 {
        word ^ bit
    }
}

fn bit_r<O: BitOp, T: Operand, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let index = if IMM { op.imm } else { T::get(cpu, op.r1) };
    let bit = 1u64 << (index & u64::from(T::BITS - 1));
    let word = T::get(cpu, op.r0);
    cpu.flags.set_cf(word & bit != 0);
    if O::WRITES {
        T::set(cpu, op.r0, O::value(word, bit));
    }
    Ok(())
}

fn bit_m<O: BitOp, T: Operand, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (index, at) = if IMM {
        (op.imm, *op)
    } else {
        // A register index is signed and reaches past the operand (SDM 2A "BT").
        let index = T::signed(T::get(cpu, op.r1));
        let bytes = (index >> T::BITS.trailing_zeros()).wrapping_mul(T::BYTES as i64);
        let offset = op.offset(cpu).wrapping_add(bytes as u64);
        cpu.gpr[usize::from(reg::TMP)] = offset;
        let at = Op {
            base: reg::TMP,
            index: reg::ZERO,
            disp: 0,
            ..*op
        };
        (index as u64, at)
    };
    let bit = 1u64 << (index & u64::from(T::BITS - 1));
    let word = if O::WRITES {
        cpu.rmw::<T>(&at, |word| T::narrow(O::value(word.wide(), bit)))?
    } else {
        cpu.load::<T>(&at)?
    };
    cpu.flags.set_cf(word.wide() & bit != 0);
    Ok(())
}

macro_rules! bit_handler {
    ($size:expr, $handler:ident, $op:ty, $imm:literal) => {
        match $size {
            2 => $handler::<$op, u16, $imm> as Handler,
            4 => $handler::<$op, u32, $imm>,
            _ => $handler::<$op, u64, $imm>,
        }
    };
}

fn bit_test<O: BitOp>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let size = operand_size(i, 0);
    let mut op = l.op();
    let imm = is_immediate(i.op1_kind());
    if imm {
        op.imm = i.immediate(1) & 0xff;
    } else {
        op.r1 = l.reg(i.op1_register());
    }
    let register = i.op0_kind() == OpKind::Register;
    if register {
        op.r0 = l.reg(i.op0_register());
    } else {
        l.mem(&mut op, i);
    }
    op.run = match (register, imm) {
        (true, true) => bit_handler!(size, bit_r, O, true),
        (true, false) => bit_handler!(size, bit_r, O, false),
        (false, true) => bit_handler!(size, bit_m, O, true),
        (false, false) => bit_handler!(size, bit_m, O, false),
    };
    l.push(op);
    true
}

#[inline(always)]
fn source<T: Operand>(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u64, Trap> {
    if op.extra & FROM_MEMORY != 0 {
        Ok(cpu.load::<T>(op)?.wide())
    } else {
        Ok(T::get(cpu, register))
    }
}

/// BSF and BSR: with a zero source ZF is set and the destination stays as it is.
fn scan<T: Operand, const FORWARD: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    cpu.flags.set_logic(T::BITS, v);
    if v != 0 {
        let n = if FORWARD {
            v.trailing_zeros()
        } else {
            63 - v.leading_zeros()
        };
        T::set(cpu, op.r0, u64::from(n));
    }
    Ok(())
}

fn tzcnt<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    count_result::<T>(cpu, op, u64::from(v.trailing_zeros().min(T::BITS)), v == 0);
    Ok(())
}

fn lzcnt<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    let n = v.leading_zeros() - (64 - T::BITS);
    count_result::<T>(cpu, op, u64::from(n), v == 0);
    Ok(())
}

fn count_result<T: Operand>(cpu: &mut Cpu, op: &Op, n: u64, cf: bool) {
    cpu.flags.set_logic(T::BITS, n);
    cpu.flags.set_cf(cf);
    T::set(cpu, op.r0, n);
}

/// POPCNT clears every flag but ZF.
fn popcnt<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    cpu.flags
        .set_bits(if v == 0 { crate::flags::rflags::ZF } else { 0 });
    T::set(cpu, op.r0, u64::from(v.count_ones()));
    Ok(())
}

fn andn<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = source::<T>(cpu, op, op.r2)?;
    let r = !T::get(cpu, op.r1) & b;
    cpu.flags.set_logic(T::BITS, r);
    T::set(cpu, op.r0, r);
    Ok(())
}

fn bextr<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    let control = T::get(cpu, op.r2);
    let (start, len) = ((control & 0xff) as u32, ((control >> 8) & 0xff) as u32);
    let shifted = v.checked_shr(start).unwrap_or(0);
    let r = shifted & low_bits(len);
    cpu.flags.set_logic(T::BITS, r);
    T::set(cpu, op.r0, r);
    Ok(())
}

/// A mask of the lowest `n` bits.
fn low_bits(n: u32) -> u64 {
    1u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1)
}

fn bzhi<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    let n = (T::get(cpu, op.r2) & 0xff) as u32;
    let r = v & low_bits(n);
    cpu.flags.set_logic(T::BITS, r);
    cpu.flags.set_cf(n >= T::BITS);
    T::set(cpu, op.r0, r);
    Ok(())
}

/// BLSR, BLSMSK, BLSI: `WHICH` 0, 1, 2.
fn lowest<T: Operand, const WHICH: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    let (r, cf) = match WHICH {
        0 => (v & v.wrapping_sub(1), v == 0),
        1 => (v ^ v.wrapping_sub(1), v == 0),
        _ => (v & v.wrapping_neg(), v != 0),
    };
    cpu.flags.set_logic(T::BITS, r);
    cpu.flags.set_cf(cf);
    T::set(cpu, op.r0, r);
    Ok(())
}

fn pdep<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut mask = source::<T>(cpu, op, op.r2)?;
    let mut bits = T::get(cpu, op.r1);
    let mut r = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if bits & 1 != 0 {
            r |= lowest;
        }
        bits >>= 1;
        mask ^= lowest;
    }
    T::set(cpu, op.r0, r);
    Ok(())
}

fn pext<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut mask = source::<T>(cpu, op, op.r2)?;
    let bits = T::get(cpu, op.r1);
    let (mut r, mut n) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if bits & lowest != 0 {
            r |= 1 << n;
        }
        n += 1;
        mask ^= lowest;
    }
    T::set(cpu, op.r0, r);
    Ok(())
}

/// The reflected Castagnoli polynomial, a byte at a time (SDM 2A "CRC32").
const CRC32C: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

fn crc32<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let v = source::<T>(cpu, op, op.r1)?;
    let mut crc = u32::get(cpu, op.r0) as u32;
    for byte in v.to_le_bytes().into_iter().take(T::BYTES as usize) {
        crc = (crc >> 8) ^ CRC32C[usize::from(crc as u8 ^ byte)];
    }
    u32::set(cpu, op.r0, u64::from(crc));
    Ok(())
}

/// Fills up to three register operands; a memory operand is marked in `extra`.
fn operands(l: &mut Lowering<'_>, i: &Instruction) -> Op {
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
            _ => {}
        }
    }
    op
}

macro_rules! scan_handler {
    ($size:expr, $forward:literal) => {
        match $size {
            2 => scan::<u16, $forward> as Handler,
            4 => scan::<u32, $forward>,
            _ => scan::<u64, $forward>,
        }
    };
}

macro_rules! lowest_handler {
    ($size:expr, $which:literal) => {
        match $size {
            4 => lowest::<u32, $which> as Handler,
            _ => lowest::<u64, $which>,
        }
    };
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let size = operand_size(i, 0);
    let run: Handler = match i.mnemonic() {
        M::Bt => return bit_test::<Bt>(l, i),
        M::Bts => return bit_test::<Bts>(l, i),
        M::Btr => return bit_test::<Btr>(l, i),
        M::Btc => return bit_test::<Btc>(l, i),
        M::Bsf => scan_handler!(size, true),
        M::Bsr => scan_handler!(size, false),
        M::Tzcnt => sized_word!(size, tzcnt),
        M::Lzcnt => sized_word!(size, lzcnt),
        M::Popcnt => sized_word!(size, popcnt),
        M::Andn => sized_word!(size, andn),
        M::Bextr if is_bmi1_bextr(i) => sized_word!(size, bextr),
        M::Bzhi => sized_word!(size, bzhi),
        M::Blsr => lowest_handler!(size, 0),
        M::Blsmsk => lowest_handler!(size, 1),
        M::Blsi => lowest_handler!(size, 2),
        M::Pdep => sized_word!(size, pdep),
        M::Pext => sized_word!(size, pext),
        M::Crc32 => sized!(operand_size(i, 1), crc32),
        _ => return false,
    };
    let mut op = operands(l, i);
    op.run = run;
    l.push(op);
    true
}

/// AMD's TBM has a BEXTR with an immediate.
fn is_bmi1_bextr(i: &Instruction) -> bool {
    i.op2_kind() == OpKind::Register
}
