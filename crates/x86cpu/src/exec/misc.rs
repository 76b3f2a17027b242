//! Flag instructions, hints, fences, and what only 16- and 32-bit code has (BCD, BOUND, SALC).

use iced_x86::{Instruction, Mnemonic};

use super::operand::Operand;
use super::operand_size;
use crate::code::{Handler, Lowering, Op};
use crate::cpu::{Cpu, reg};
use crate::flags::rflags;
use crate::trap::{Trap, vector};

fn nop(_: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Ok(())
}

fn pause(_: &mut Cpu, _: &Op) -> Result<(), Trap> {
    std::hint::spin_loop();
    Ok(())
}

/// LFENCE, SFENCE, MFENCE: the host's order is the guest's, so the host's fence is the guest's.
fn fence(_: &mut Cpu, _: &Op) -> Result<(), Trap> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: permission checks of a byte load (SDM 2A "CLFLUSH").
fn flush_line(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load::<u8>(op)?;
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

fn set_cf<const ON: bool>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.flags.set_cf(ON);
    Ok(())
}

fn set_df<const ON: bool>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if ON {
        cpu.rflags |= rflags::DF;
    } else {
        cpu.rflags &= !rflags::DF;
    }
    Ok(())
}

const AH: u8 = reg::HIGH8;

fn lahf(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let v = cpu.flags.bits() & 0xff | rflags::FIXED;
    u8::set(cpu, AH, v);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    const SET: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;
    let of = cpu.flags.bits() & rflags::OF;
    let v = u8::get(cpu, AH) & SET;
    cpu.flags.set_bits(of | v);
    Ok(())
}

/// DAA and DAS (SDM 2A).
fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let old = u8::get(cpu, reg::RAX) as u8;
    let (old_cf, old_af) = (cpu.flags.cf(), cpu.flags.af());
    let mut al = old;
    let (mut cf, mut af) = (false, false);
    if old & 15 > 9 || old_af {
        let (sum, carry) = if SUBTRACT {
            al.overflowing_sub(6)
        } else {
            al.overflowing_add(6)
        };
        al = sum;
        cf = old_cf || carry;
        af = true;
    }
    if old > 0x99 || old_cf {
        al = if SUBTRACT {
            al.wrapping_sub(0x60)
        } else {
            al.wrapping_add(0x60)
        };
        cf = true;
    }
    set_al(cpu, al, cf, af);
    Ok(())
}

fn set_al(cpu: &mut Cpu, al: u8, cf: bool, af: bool) {
    u8::set(cpu, reg::RAX, u64::from(al));
    cpu.flags.set_logic(8, u64::from(al));
    let mut bits = cpu.flags.bits();
    if cf {
        bits |= rflags::CF;
    }
    if af {
        bits |= rflags::AF;
    }
    cpu.flags.set_bits(bits);
}

/// AAA and AAS.
fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let ax = u16::get(cpu, reg::RAX) as u16;
    let adjust = ax & 15 > 9 || cpu.flags.af();
    let ax = match (adjust, SUBTRACT) {
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
        (false, _) => ax,
    };
    let ax = ax & 0xff0f;
    u16::set(cpu, reg::RAX, u64::from(ax));
    set_al(cpu, ax as u8, adjust, adjust);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let base = op.imm as u8;
    let al = u8::get(cpu, reg::RAX) as u8;
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.fault_plain(vector::DE));
    };
    u8::set(cpu, AH, u64::from(high));
    set_al(cpu, low, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (al, ah) = (u8::get(cpu, reg::RAX) as u8, u8::get(cpu, AH) as u8);
    let al = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    u16::set(cpu, reg::RAX, u64::from(al));
    set_al(cpu, al, false, false);
    Ok(())
}

fn salc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let v = if cpu.flags.cf() { 0xff } else { 0 };
    u8::set(cpu, reg::RAX, v);
    Ok(())
}

/// BOUND: two bounds in memory, the index in `r0` (SDM 2A "BOUND").
fn bound<T: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let index = T::signed(T::get(cpu, op.r0));
    let low = T::signed(cpu.load::<T>(op)?.wide());
    let upper = Op {
        disp: op.disp.wrapping_add(T::BYTES as i32),
        ..*op
    };
    let high = T::signed(cpu.load::<T>(&upper)?.wide());
    if index < low || index > high {
        return Err(cpu.fault_plain(vector::BR));
    }
    Ok(())
}

fn with_memory(l: &mut Lowering<'_>, i: &Instruction, run: Handler) -> bool {
    let mut op = l.op();
    l.mem(&mut op, i);
    op.run = run;
    l.push(op);
    true
}

pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let run: Handler = match i.mnemonic() {
        // Reserved NOPs (0F 19–1F) touch no memory, whatever operand they name. Prefetches neither.
        M::Nop | M::Reservednop => nop,
        M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch => nop,
        M::Pause => pause,
        M::Lfence | M::Sfence | M::Mfence => fence,
        M::Clflush | M::Clflushopt | M::Clwb => return with_memory(l, i, flush_line),
        M::Cmc => cmc,
        M::Clc => set_cf::<false>,
        M::Stc => set_cf::<true>,
        M::Cld => set_df::<false>,
        M::Std => set_df::<true>,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Daa => decimal_adjust::<false>,
        M::Das => decimal_adjust::<true>,
        M::Aaa => ascii_adjust::<false>,
        M::Aas => ascii_adjust::<true>,
        M::Aam => aam,
        M::Aad => aad,
        M::Salc => salc,
        M::Bound => {
            let mut op = l.op();
            op.r0 = l.reg(i.op0_register());
            l.mem(&mut op, i);
            op.run = if operand_size(i, 0) == 2 {
                bound::<u16>
            } else {
                bound::<u32>
            };
            l.push(op);
            return true;
        }
        _ => return false,
    };
    let mut op = l.op();
    if matches!(i.mnemonic(), M::Aam | M::Aad) {
        op.imm = u64::from(i.immediate8());
    }
    op.run = run;
    l.push(op);
    true
}
