//! MOVS, STOS, LODS, CMPS, SCAS with their repeats (Intel SDM 2B "REP").
//!
//! A repeat works page by page on host memory where it can, updates RCX, RSI and RDI after each
//! piece, and lets interrupts in between: RIP then stays on the instruction. Where memory is not
//! plain RAM, or the direction flag is set, it goes element by element.
#![expect(unsafe_code, reason = "page runs from the TLB become bulk runs")]

use iced_x86::{Instruction, Mnemonic};

use super::alu::compare;
use super::bulk::Run;
use super::operand::{Operand, sized};
use super::{address_mask, string_element};
use crate::code::{Lowering, Op, op_flag};
use crate::cpu::{Cpu, reg};
use crate::flags::rflags;
use crate::trap::Trap;

/// Elements of one piece of a repeat, at most, between looks at pending requests.
const PIECE: u64 = 4096;

fn set_index(cpu: &mut Cpu, op: &Op, register: u8, value: u64) {
    if op.has(op_flag::ADDR16) {
        u16::set(cpu, register, value);
    } else if op.has(op_flag::ADDR32) {
        u32::set(cpu, register, value);
    } else {
        u64::set(cpu, register, value);
    }
}

fn index(cpu: &Cpu, op: &Op, register: u8) -> u64 {
    cpu.gpr[usize::from(register)] & address_mask(op)
}

fn advance(cpu: &mut Cpu, op: &Op, register: u8, bytes: u64) {
    let delta = if cpu.rflags & rflags::DF != 0 {
        bytes.wrapping_neg()
    } else {
        bytes
    };
    let v = cpu.gpr[usize::from(register)].wrapping_add(delta);
    set_index(cpu, op, register, v);
}

/// Elements left from `register` before its address wraps or leaves its page.
fn in_page<T: Operand>(cpu: &Cpu, op: &Op, register: u8) -> u64 {
    let mask = address_mask(op);
    let to_wrap = (mask - index(cpu, op, register)) / T::BYTES;
    to_wrap.min(PIECE)
}

fn run_at<T: Operand>(
    cpu: &mut Cpu,
    op: &Op,
    segment: u8,
    register: u8,
    write: bool,
) -> Result<Option<Run>, Trap> {
    let offset = index(cpu, op, register);
    let linear = cpu.linear_at(segment, offset, T::BYTES as usize, write)?;
    // In legacy modes the limit was checked for one element only.
    if op.has(op_flag::SEGMENTED) && !cpu.segment_is_flat(segment) {
        return Ok(None);
    }
    Ok(cpu.page_run(linear, write)?.map(|(start, len)| {
        // SAFETY: `page_run` gives a host range that is mapped with the asked-for right, and
        // mappings only change between instructions of this processor.
        unsafe { Run::new(start, len) }
    }))
}

/// One piece of a repeat. Returns the number of elements done (at least 1), having moved the index
/// registers, and whether the repeat's condition ended it.
trait StringOp {
    /// Ends on ZF (CMPS, SCAS).
    const CONDITIONAL: bool;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap>;
    /// At most `count` elements, forward; 0 where it can't be done in bulk.
    fn bulk<T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Trap>;
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

/// Bulk pays from a few elements on.
const BULK_FROM: u64 = 4;

impl StringOp for Movs {
    const CONDITIONAL: bool = false;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let v = cpu.load_at::<T>(op.seg, index(cpu, op, reg::RSI))?;
        cpu.store_at::<T>(op.r0, index(cpu, op, reg::RDI), v)?;
        advance(cpu, op, reg::RSI, T::BYTES);
        advance(cpu, op, reg::RDI, T::BYTES);
        Ok(())
    }
    fn bulk<T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Trap> {
        let count = count
            .min(in_page::<T>(cpu, op, reg::RSI))
            .min(in_page::<T>(cpu, op, reg::RDI));
        let Some(source) = run_at::<T>(cpu, op, op.seg, reg::RSI, false)? else {
            return Ok(0);
        };
        let Some(dest) = run_at::<T>(cpu, op, op.r0, reg::RDI, true)? else {
            return Ok(0);
        };
        let size = T::BYTES as usize;
        let fit = count
            .min((source.len() / size) as u64)
            .min((dest.len() / size) as u64);
        let copied = dest.copy_from(source, fit as usize * size, size) / size;
        advance(cpu, op, reg::RSI, copied as u64 * T::BYTES);
        advance(cpu, op, reg::RDI, copied as u64 * T::BYTES);
        Ok(copied as u64)
    }
}

impl StringOp for Stos {
    const CONDITIONAL: bool = false;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let v = T::narrow(T::get(cpu, reg::RAX));
        cpu.store_at::<T>(op.r0, index(cpu, op, reg::RDI), v)?;
        advance(cpu, op, reg::RDI, T::BYTES);
        Ok(())
    }
    fn bulk<T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Trap> {
        let count = count.min(in_page::<T>(cpu, op, reg::RDI));
        let Some(dest) = run_at::<T>(cpu, op, op.r0, reg::RDI, true)? else {
            return Ok(0);
        };
        let size = T::BYTES as usize;
        let fit = count.min((dest.len() / size) as u64);
        dest.fill(cpu.gpr[usize::from(reg::RAX)], fit as usize * size, size);
        advance(cpu, op, reg::RDI, fit * T::BYTES);
        Ok(fit)
    }
}

impl StringOp for Lods {
    const CONDITIONAL: bool = false;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let v = cpu.load_at::<T>(op.seg, index(cpu, op, reg::RSI))?.wide();
        T::set(cpu, reg::RAX, v);
        advance(cpu, op, reg::RSI, T::BYTES);
        Ok(())
    }
    fn bulk<T: Operand>(_: &mut Cpu, _: &Op, _: u64) -> Result<u64, Trap> {
        Ok(0)
    }
}

/// Reads up to 64 elements ahead of `register` into `buffer`; how many, 0 where not plain RAM.
fn peek<T: Operand>(
    cpu: &mut Cpu,
    op: &Op,
    segment: u8,
    register: u8,
    count: u64,
    buffer: &mut [u8; 512],
) -> Result<u64, Trap> {
    let count = count.min(in_page::<T>(cpu, op, register)).min(64);
    let Some(run) = run_at::<T>(cpu, op, segment, register, false)? else {
        return Ok(0);
    };
    let fit = count.min((run.len() / T::BYTES as usize) as u64);
    run.read(0, &mut buffer[..(fit * T::BYTES) as usize]);
    Ok(fit)
}

fn element<T: Operand>(buffer: &[u8; 512], n: u64) -> u64 {
    let size = T::BYTES as usize;
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&buffer[n as usize * size..][..size]);
    u64::from_le_bytes(bytes)
}

/// Whether the repeat goes on after a comparison that left ZF.
fn goes_on(op: &Op, equal: bool) -> bool {
    equal != op.has(op_flag::REPNE)
}

impl StringOp for Cmps {
    const CONDITIONAL: bool = true;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let a = cpu.load_at::<T>(op.seg, index(cpu, op, reg::RSI))?.wide();
        let b = cpu.load_at::<T>(op.r0, index(cpu, op, reg::RDI))?.wide();
        compare::<T>(cpu, a, b);
        advance(cpu, op, reg::RSI, T::BYTES);
        advance(cpu, op, reg::RDI, T::BYTES);
        Ok(())
    }
    fn bulk<T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Trap> {
        let (mut a, mut b) = ([0; 512], [0; 512]);
        let fit = peek::<T>(cpu, op, op.seg, reg::RSI, count, &mut a)?;
        let fit = peek::<T>(cpu, op, op.r0, reg::RDI, fit, &mut b)?;
        scan::<T>(
            cpu,
            op,
            fit,
            |n| (element::<T>(&a, n), element::<T>(&b, n)),
            true,
        )
    }
}

impl StringOp for Scas {
    const CONDITIONAL: bool = true;
    fn one<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let b = cpu.load_at::<T>(op.r0, index(cpu, op, reg::RDI))?.wide();
        let a = T::get(cpu, reg::RAX);
        compare::<T>(cpu, a, b);
        advance(cpu, op, reg::RDI, T::BYTES);
        Ok(())
    }
    fn bulk<T: Operand>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Trap> {
        let mut b = [0; 512];
        let fit = peek::<T>(cpu, op, op.r0, reg::RDI, count, &mut b)?;
        let a = T::get(cpu, reg::RAX);
        scan::<T>(cpu, op, fit, |n| (a, element::<T>(&b, n)), false)
    }
}

/// Compares elements until the condition ends the repeat or `fit` are done; sets flags by the last.
fn scan<T: Operand>(
    cpu: &mut Cpu,
    op: &Op,
    fit: u64,
    pair: impl Fn(u64) -> (u64, u64),
    both: bool,
) -> Result<u64, Trap> {
    if fit == 0 {
        return Ok(0);
    }
    let mut n = 0;
    let (mut a, mut b);
    loop {
        (a, b) = pair(n);
        n += 1;
        if n == fit || !goes_on(op, a == b) {
            break;
        }
    }
    compare::<T>(cpu, a, b);
    if both {
        advance(cpu, op, reg::RSI, n * T::BYTES);
    }
    advance(cpu, op, reg::RDI, n * T::BYTES);
    Ok(n)
}

fn once<O: StringOp, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    O::one::<T>(cpu, op)
}

fn repeat<O: StringOp, T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut left = index(cpu, op, reg::RCX);
    let forward = cpu.rflags & rflags::DF == 0;
    while left != 0 {
        let mut done = 0;
        if forward && left >= BULK_FROM {
            done = O::bulk::<T>(cpu, op, left)?;
        }
        if done == 0 {
            O::one::<T>(cpu, op)?;
            done = 1;
        }
        left -= done;
        set_index(cpu, op, reg::RCX, left);
        // What devices answered so far belongs to elements that are done.
        cpu.commit_devices();
        if O::CONDITIONAL && !goes_on(op, cpu.flags.zf()) {
            return Ok(());
        }
        if left != 0 && cpu.must_leave_block() {
            cpu.rip = cpu.own_rip(op);
            return Err(cpu.resume());
        }
    }
    Ok(())
}

fn string<O: StringOp>(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let Some(size) = string_element(i) else {
        return false;
    };
    l.string_operands(&mut op, i);
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    if i.has_repne_prefix() {
        op.flags |= op_flag::REPNE;
    } else if i.has_rep_prefix() {
        op.flags |= op_flag::REP;
    }
    op.run = if repeated {
        sized!(size, repeat, O)
    } else {
        sized!(size, once, O)
    };
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    if !i.is_string_instruction() {
        return false;
    }
    match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => string::<Movs>(l, i),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => string::<Stos>(l, i),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => string::<Lods>(l, i),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => string::<Cmps>(l, i),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => string::<Scas>(l, i),
        _ => false,
    }
}
