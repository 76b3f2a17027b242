//! FXSAVE, FXRSTOR and the XSAVE family (Intel SDM 1 chapters 10.5 and 13).

use iced_x86::{Instruction, Mnemonic};

use super::image::{COMPONENTS, FCW_FNINIT, HEADER, X87_LEN, YMM_HIGH, get, legacy, put};
use super::{MXCSR_DEFAULT, MXCSR_MASK, blocked};
use crate::Cpu;
use crate::code::{Handler, Lowering, Op};
use crate::cpu::reg;
use crate::simd::operand::{Operand, operand};
use crate::sys::state::{cr0, cr4};
use crate::trap::{Trap, vector};

/// Bits of `Op::extra`: 64-bit pointers (REX.W), 16 vector registers (64-bit mode).
const WIDE: u8 = 1;
const LONG: u8 = 2;

/// State components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// XCOMP_BV: compacted format.
const COMPACT: u64 = 1 << 63;

/// What tells the saving instructions apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    /// Leaves out components in their initial configuration.
    Optimized,
    Compacted,
    Supervisor,
}

fn vector_registers(op: &Op) -> usize {
    if op.extra & LONG != 0 { 16 } else { 8 }
}

/// Cuts the instruction pointers to what the form without REX.W holds.
fn narrow_pointers(op: &Op, image: &mut [u8; X87_LEN]) {
    if op.extra & WIDE == 0 {
        put(image, legacy::FIP + 4, &[0; 4]);
        put(image, legacy::FDP + 4, &[0; 4]);
    }
}

/// The area, checked for alignment, and whether it can be written.
fn area(cpu: &mut Cpu, op: &Op, len: usize, align: usize, write: bool) -> Result<Operand, Trap> {
    // The older instructions look at the address first, the newer ones at its alignment.
    let at = operand(cpu, op, len, if align == 64 { align } else { 1 }, write)?;
    at.check_canonical(cpu, op)?;
    if at.linear & (align as u64 - 1) != 0 {
        return Err(cpu.gp0());
    }
    if write {
        // All or nothing.
        at.check_write(cpu, op)?;
    }
    Ok(at)
}

impl Operand {
    /// Part of the area.
    fn part(self, offset: usize, size: usize) -> Self {
        let linear = self.linear.wrapping_add(offset as u64);
        Self { linear, size }
    }
}

impl Cpu {
    fn vectors_low(&self, count: usize) -> [u8; 256] {
        let mut bytes = [0; 256];
        for (n, register) in self.fpu.ymm.iter().take(count).enumerate() {
            put(&mut bytes, 16 * n, &register.0[..16]);
        }
        bytes
    }

    fn vectors_high(&self, count: usize) -> [u8; 256] {
        let mut bytes = [0; 256];
        for (n, register) in self.fpu.ymm.iter().take(count).enumerate() {
            put(&mut bytes, 16 * n, &register.0[16..]);
        }
        bytes
    }

    fn set_vectors(&mut self, bytes: &[u8; 256], half: usize, count: usize) {
        for (n, register) in self.fpu.ymm.iter_mut().take(count).enumerate() {
            register.0[half..half + 16].copy_from_slice(&get::<16>(bytes, 16 * n));
        }
    }
}

fn check_fx(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::X87 != 0 {
        return Err(cpu.x87_blocked());
    }
    Ok(())
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_fx(cpu)?;
    let count = vector_registers(op);
    let at = area(cpu, op, 512, 16, true)?;
    let mut x87 = cpu.fpu.x87_image();
    narrow_pointers(op, &mut x87);
    put(&mut x87, legacy::MXCSR, &cpu.fpu.mxcsr().to_le_bytes());
    put(&mut x87, legacy::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
    let mut bytes = [0; X87_LEN + 256];
    put(&mut bytes, 0, &x87);
    put(&mut bytes, X87_LEN, &cpu.vectors_low(count));
    let len = X87_LEN + 16 * count;
    at.write(cpu, op, bytes.get(..len).unwrap_or(&[]))
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_fx(cpu)?;
    let at = area(cpu, op, 512, 16, false)?;
    let mut bytes = [0; 512];
    at.read(cpu, op, &mut bytes)?;
    let mxcsr = u32::from_le_bytes(get(&bytes, legacy::MXCSR));
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    let mut x87: [u8; X87_LEN] = get(&bytes, 0);
    narrow_pointers(op, &mut x87);
    cpu.fpu.set_x87_image(&x87);
    cpu.fpu.set_mxcsr(mxcsr);
    cpu.set_vectors(&get(&bytes, legacy::XMM), 0, vector_registers(op));
    Ok(())
}

/// Checks that come before anything else, and the requested components that XCR0 enables.
fn check_xsave(cpu: &mut Cpu, supervisor: bool) -> Result<u64, Trap> {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.sys.cr0 & cr0::TS != 0 {
        return Err(cpu.fault_plain(vector::NM));
    }
    if supervisor && cpu.cpl != 0 {
        return Err(cpu.gp0());
    }
    let low = |r: u8| cpu.gpr[usize::from(r)] & 0xffff_ffff;
    Ok((low(reg::RDX) << 32 | low(reg::RAX)) & cpu.sys.xcr0 & COMPONENTS)
}

impl Cpu {
    /// XINUSE as XGETBV with ECX = 1 and the saving instructions see it; MXCSR counts as SSE state.
    pub(crate) fn xinuse(&mut self) -> u64 {
        let mxcsr = self.fpu.mxcsr() != MXCSR_DEFAULT;
        self.fpu.in_use() | u64::from(mxcsr) << 1
    }
}

fn save(cpu: &mut Cpu, op: &Op, form: Form) -> Result<(), Trap> {
    let requested = check_xsave(cpu, form == Form::Supervisor)?;
    let compact = matches!(form, Form::Compacted | Form::Supervisor);
    let len = if requested & AVX != 0 {
        YMM_HIGH + 256
    } else {
        YMM_HIGH
    };
    let at = area(cpu, op, len, 64, true)?;
    let count = vector_registers(op);
    let in_use = cpu.xinuse();
    let header_at = at.part(HEADER, 16);
    // The header is read first: a save that faults later has changed at most data that a repeated
    // save writes again.
    let mut header = [0; 16];
    header_at.read(cpu, op, &mut header)?;
    let old = u64::from_le_bytes(get(&header, 0));
    let written = if form == Form::Plain {
        requested
    } else {
        requested & in_use
    };
    if requested & AVX != 0 && written & AVX != 0 {
        let bytes = cpu.vectors_high(count);
        let bytes = bytes.get(..16 * count).unwrap_or(&[]);
        at.part(YMM_HIGH, bytes.len()).write(cpu, op, bytes)?;
    }
    if written & X87 != 0 {
        let mut x87 = cpu.fpu.x87_image();
        narrow_pointers(op, &mut x87);
        let (control, registers) = (&x87[..legacy::MXCSR], &x87[legacy::ST..]);
        at.part(0, control.len()).write(cpu, op, control)?;
        at.part(legacy::ST, registers.len())
            .write(cpu, op, registers)?;
    }
    let mxcsr_saved = if compact {
        written & SSE != 0
    } else {
        requested & (SSE | AVX) != 0
    };
    if mxcsr_saved {
        let value = u64::from(cpu.fpu.mxcsr()) | u64::from(MXCSR_MASK) << 32;
        at.part(legacy::MXCSR, 8)
            .write(cpu, op, &value.to_le_bytes())?;
    }
    if written & SSE != 0 {
        let bytes = cpu.vectors_low(count);
        let bytes = bytes.get(..16 * count).unwrap_or(&[]);
        at.part(legacy::XMM, bytes.len()).write(cpu, op, bytes)?;
    }
    if compact {
        put(&mut header, 0, &(requested & in_use).to_le_bytes());
        put(&mut header, 8, &(requested | COMPACT).to_le_bytes());
        header_at.write(cpu, op, &header)
    } else {
        let xstate_bv = old & !requested | requested & in_use;
        header_at.write(cpu, op, &xstate_bv.to_le_bytes())
    }
}

fn xsave(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    save(cpu, op, Form::Plain)
}

fn xsaveopt(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    save(cpu, op, Form::Optimized)
}

fn xsavec(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    save(cpu, op, Form::Compacted)
}

fn xsaves(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    save(cpu, op, Form::Supervisor)
}

/// A header that XRSTOR accepts (SDM 1 §13.8.1, §13.8.2).
struct Header {
    compact: bool,
    xstate_bv: u64,
}

fn header(bytes: &[u8; 64], xcr0: u64, supervisor: bool) -> Option<Header> {
    let xstate_bv = u64::from_le_bytes(get(bytes, 0));
    let xcomp_bv = u64::from_le_bytes(get(bytes, 8));
    let compact = xcomp_bv & COMPACT != 0;
    let valid = if compact {
        let components = xcomp_bv & !COMPACT;
        components & !xcr0 == 0
            && xstate_bv & !components == 0
            && bytes[16..].iter().all(|&b| b == 0)
    } else {
        !supervisor && xstate_bv & !xcr0 == 0 && bytes[8..24].iter().all(|&b| b == 0)
    };
    valid.then_some(Header { compact, xstate_bv })
}

fn restore(cpu: &mut Cpu, op: &Op, supervisor: bool) -> Result<(), Trap> {
    let requested = check_xsave(cpu, supervisor)?;
    let at = area(cpu, op, YMM_HIGH, 64, false)?;
    let mut bytes = [0; YMM_HIGH];
    at.read(cpu, op, &mut bytes)?;
    let Some(Header { compact, xstate_bv }) =
        header(&get(&bytes, HEADER), cpu.sys.xcr0, supervisor)
    else {
        return Err(cpu.gp0());
    };
    let loaded = requested & xstate_bv;
    let mxcsr_loaded = if compact {
        loaded & SSE != 0
    } else {
        requested & (SSE | AVX) != 0
    };
    let mxcsr = u32::from_le_bytes(get(&bytes, legacy::MXCSR));
    if mxcsr_loaded && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    let mut high = [0; 256];
    let count = vector_registers(op);
    if loaded & AVX != 0 {
        let high = high.get_mut(..16 * count).unwrap_or_default();
        at.part(YMM_HIGH, high.len()).read(cpu, op, high)?;
    }
    // Nothing can fault any more.
    if loaded & X87 != 0 {
        let mut x87: [u8; X87_LEN] = get(&bytes, 0);
        narrow_pointers(op, &mut x87);
        cpu.fpu.set_x87_image(&x87);
    } else if requested & X87 != 0 {
        cpu.fpu.set_x87_control(FCW_FNINIT);
    }
    if mxcsr_loaded {
        cpu.fpu.set_mxcsr(mxcsr);
    } else if compact && requested & SSE != 0 {
        cpu.fpu.set_mxcsr(MXCSR_DEFAULT);
    }
    if requested & SSE != 0 {
        let low = match loaded & SSE {
            0 => [0; 256],
            _ => get(&bytes, legacy::XMM),
        };
        cpu.set_vectors(&low, 0, count);
    }
    if requested & AVX != 0 {
        cpu.set_vectors(&high, 16, count);
    }
    Ok(())
}

fn xrstor(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    restore(cpu, op, false)
}

fn xrstors(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    restore(cpu, op, true)
}

/// Lowers these instructions.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let (run, wide): (Handler, bool) = match i.mnemonic() {
        M::Fxsave => (fxsave, false),
        M::Fxsave64 => (fxsave, true),
        M::Fxrstor => (fxrstor, false),
        M::Fxrstor64 => (fxrstor, true),
        M::Xsave => (xsave, false),
        M::Xsave64 => (xsave, true),
        M::Xsaveopt => (xsaveopt, false),
        M::Xsaveopt64 => (xsaveopt, true),
        M::Xsavec => (xsavec, false),
        M::Xsavec64 => (xsavec, true),
        M::Xsaves => (xsaves, false),
        M::Xsaves64 => (xsaves, true),
        M::Xrstor => (xrstor, false),
        M::Xrstor64 => (xrstor, true),
        M::Xrstors => (xrstors, false),
        M::Xrstors64 => (xrstors, true),
        _ => return false,
    };
    let mut op = l.op();
    l.mem(&mut op, i);
    op.run = run;
    op.extra = if wide { WIDE } else { 0 };
    if l.mode.bits() == 64 {
        op.extra |= LONG;
    }
    l.push(op);
    true
}
