//! x87 instructions that run on the live host FPU, by thunks.
//!
//! An x87 exception is pending from the instruction that raised it to the next one that waits; the
//! host's FPU keeps exactly that (FSW.ES). What differs is who is told: before each waiting
//! instruction a pending exception is looked for here, if any is unmasked at all, so that the host's
//! never fires.
//!
//! Without CR0.NE a real machine raises IRQ 13 through the PIC; #MF is raised here in that case too.
#![expect(unsafe_code, reason = "calls thunks")]

use iced_x86::{Instruction, OpKind};

use super::{attention, blocked, control, env, host, xsave};
use crate::Cpu;
use crate::code::{Lowering, Op};
use crate::simd::operand::{operand, quick};
use crate::simd::thunk::{self, is_x87};
use crate::trap::{Trap, vector};

/// FSW: an unmasked exception is pending.
pub(super) const FSW_ES: u16 = 1 << 7;
/// Bits of `Op::aux`: operand size, and the opcode.
const AUX_SIZE: u32 = 0xff;
const AUX_OPCODE_SHIFT: u32 = 16;

/// What a waiting x87 or MMX instruction does first when [`super::FpuState::attention`] says so:
/// makes the registers live and raises a pending exception.
#[cold]
pub(crate) fn prepare_x87(cpu: &mut Cpu) -> Result<(), Trap> {
    cpu.fpu.make_live();
    if cpu.fpu.attention & attention::X87_UNMASKED != 0 {
        pending_x87_fault(cpu)?;
    }
    Ok(())
}

/// Raises #MF if an x87 exception is pending (the registers are live).
pub(crate) fn pending_x87_fault(cpu: &mut Cpu) -> Result<(), Trap> {
    if host::status_word() & FSW_ES != 0 {
        return Err(cpu.fault_plain(vector::MF));
    }
    Ok(())
}

/// The checks of a waiting x87 instruction.
#[inline(always)]
pub(super) fn check(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::X87 != 0 {
        return Err(cpu.x87_blocked());
    }
    if cpu.fpu.attention & (attention::X87_IDLE | attention::X87_UNMASKED) != 0 {
        prepare_x87(cpu)?;
    }
    Ok(())
}

#[inline(always)]
fn call(code: u64, operand: *mut u8) {
    // SAFETY: `code` is the address of a thunk, which is kept for ever; it uses the operand within
    // the size that the caller has resolved, and otherwise changes x87 state and caller-saved
    // registers only.
    unsafe {
        let thunk: extern "sysv64" fn(*mut u8) = std::mem::transmute(code as *const ());
        thunk(operand);
    }
}

/// An instruction without memory operand.
fn registers(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu)?;
    call(op.imm, std::ptr::null_mut());
    note_pointers(cpu, op);
    Ok(())
}

/// FCOMI and its kin, FCMOVcc: flags go in and come out.
fn registers_flags(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu)?;
    let flags = cpu.flags.bits();
    // SAFETY: as in `call`; this thunk takes and returns flags.
    let flags = unsafe {
        let thunk: extern "sysv64" fn(u64) -> u64 = std::mem::transmute(op.imm as *const ());
        thunk(flags)
    };
    cpu.flags.set_bits(flags);
    note_pointers(cpu, op);
    Ok(())
}

/// An instruction with a memory operand.
fn memory<const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu)?;
    let size = (op.aux & AUX_SIZE) as usize;
    match quick(cpu, op, size, 1, WRITE) {
        Some(pointer) => call(op.imm, pointer),
        None => memory_slow(cpu, op, size, WRITE)?,
    }
    note_pointers(cpu, op);
    cpu.fpu.last_dp = op.offset(cpu);
    Ok(())
}

/// The operand isn't within one page of RAM that the TLB has.
#[cold]
#[inline(never)]
fn memory_slow(cpu: &mut Cpu, op: &Op, size: usize, write: bool) -> Result<(), Trap> {
    /// Tells whether the instruction stored: with an unmasked exception it doesn't.
    const UNTOUCHED: u8 = 0xa5;
    let at = operand(cpu, op, size, 1, write)?;
    if let Some(pointer) = at.host(cpu, op, write)? {
        call(op.imm, pointer.as_ptr());
        return Ok(());
    }
    let mut bytes = [UNTOUCHED; 16];
    let Some(operand) = bytes.get_mut(..size) else {
        return Err(cpu.ud());
    };
    if !write {
        at.read(cpu, op, operand)?;
        call(op.imm, operand.as_mut_ptr());
        return Ok(());
    }
    at.check_write(cpu, op)?;
    let before = cpu.fpu.x87_image();
    call(op.imm, operand.as_mut_ptr());
    if host::status_word() & FSW_ES != 0 && operand.iter().all(|&b| b == UNTOUCHED) {
        return Ok(());
    }
    let written = at.write(cpu, op, operand);
    if written.is_err() {
        cpu.fpu.set_x87_image(&before);
    }
    written
}

/// FIP, FOP: of every instruction but control instructions (SDM 1 §8.1.8). FDP is its caller's.
#[inline(always)]
fn note_pointers(cpu: &mut Cpu, op: &Op) {
    cpu.fpu.last_ip = cpu.rip.wrapping_add(u64::from(op.ip));
    cpu.fpu.last_opcode = (op.aux >> AUX_OPCODE_SHIFT) as u16;
}

/// The 11 bits of opcode that FOP holds. No prefix looks like an x87 opcode.
fn opcode(bytes: &[u8]) -> u32 {
    let mut rest = bytes.iter().skip_while(|b| !(0xd8..=0xdf).contains(*b));
    match (rest.next(), rest.next()) {
        (Some(&first), Some(&modrm)) => u32::from(first & 7) << 8 | u32::from(modrm),
        _ => 0,
    }
}

/// Lowers x87 and FPU state instructions.
pub(crate) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    control::lower(l, i) || env::lower(l, i) || xsave::lower(l, i) || lower_thunk(l, i)
}

fn lower_thunk(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    if !is_x87(i) {
        return false;
    }
    let Some(thunk) = thunk::thunk(i) else {
        return false;
    };
    let mut op = l.op();
    op.imm = thunk.code;
    op.aux = opcode(l.bytes()) << AUX_OPCODE_SHIFT;
    let has_memory = (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory);
    if has_memory {
        l.mem(&mut op, i);
        op.aux |= u32::from(thunk.memory.size);
        op.run = if thunk.memory.write {
            memory::<true>
        } else {
            memory::<false>
        };
    } else if thunk.flags {
        op.run = registers_flags;
    } else {
        op.run = registers;
    }
    l.push(op);
    true
}
