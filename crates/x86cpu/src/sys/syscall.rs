//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the base registers (AMD APM vol. 3 chapter 3 and
//! 4, Intel SDM 2B).
//!
//! SYSCALL works outside of 64-bit mode too, as AMD has it; SYSENTER works in IA-32e mode too, as
//! Intel has it, so that both kinds of 32-bit system calls find their processor.

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, reg, seg};
use crate::flags::rflags;
use crate::sys::descriptor::canonical;
use crate::sys::events::dr6;
use crate::sys::operand::write_register;
use crate::sys::state::{Segment, attr, cr4, efer};
use crate::trap::Trap;

const CODE: u16 = attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED | attr::G;
const DATA: u16 = attr::P | attr::S | attr::RW | attr::ACCESSED | attr::G | attr::DB;

fn flat(selector: u16, attributes: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: attributes | (u16::from(dpl) << 5),
        unusable: false,
    }
}

/// SYSCALL.
pub(super) fn syscall(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.sys.efer & efer::SCE == 0 || !cpu.sys.mode.protected() {
        return Err(cpu.ud());
    }
    let next = cpu.next_rip(op);
    let star = cpu.sys.msr.star;
    let selector = (star >> 32) as u16 & !3;
    write_register(cpu, reg::RCX, 8, next);
    if cpu.sys.long_mode() {
        let flags = cpu.rflags_full() & !rflags::RF;
        cpu.gpr[usize::from(reg::R11)] = flags;
        cpu.rip = if cpu.sys.mode.is64() {
            cpu.sys.msr.lstar
        } else {
            cpu.sys.msr.cstar
        };
        cpu.set_segment(seg::CS, flat(selector, CODE | attr::L, 0));
        cpu.set_segment(seg::SS, flat(selector.wrapping_add(8), DATA, 0));
        cpu.update_mode();
        let masked = flags & !cpu.sys.msr.fmask;
        cpu.set_rflags(masked);
    } else {
        cpu.rip = star & 0xffff_ffff;
        cpu.set_segment(seg::CS, flat(selector, CODE | attr::DB, 0));
        cpu.set_segment(seg::SS, flat(selector.wrapping_add(8), DATA, 0));
        cpu.update_mode();
        let flags = cpu.rflags_full() & !(rflags::IF | rflags::RF | rflags::VM);
        cpu.set_rflags(flags);
    }
    cpu.sys.events.keep_step_if(cpu.rflags & rflags::TF != 0);
    Ok(())
}

/// SYSRET: `OPSIZE64` returns to 64-bit code.
pub(super) fn sysret(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.sys.efer & efer::SCE == 0 || !cpu.sys.mode.protected() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let selector = (cpu.sys.msr.star >> 48) as u16;
    let rcx = cpu.gpr[usize::from(reg::RCX)];
    let to64 = op.has(op_flag::OPSIZE64) && cpu.sys.mode.is64();
    if to64 {
        // AMD loads any RCX, and the fetch faults at CPL 3.
        cpu.rip = rcx;
        cpu.set_segment(
            seg::CS,
            flat(selector.wrapping_add(16) | 3, CODE | attr::L, 3),
        );
    } else {
        cpu.rip = rcx & 0xffff_ffff;
        cpu.set_segment(seg::CS, flat(selector | 3, CODE | attr::DB, 3));
    }
    cpu.set_segment(seg::SS, flat(selector.wrapping_add(8) | 3, DATA, 3));
    let from_long = cpu.sys.long_mode();
    cpu.update_mode();
    if from_long {
        let image = cpu.gpr[usize::from(reg::R11)];
        cpu.set_rflags(image & SYSRET_FLAGS);
    } else {
        let flags = cpu.rflags_full() | rflags::IF;
        cpu.set_rflags(flags);
    }
    // The trap follows SYSRET itself if TF is set when it ends.
    cpu.sys.events.step = None;
    if cpu.rflags & rflags::TF != 0 {
        cpu.sys.events.pending_debug |= dr6::BS;
    }
    Ok(())
}

/// All but RF and VM.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

/// SYSENTER.
pub(super) fn sysenter(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let msr = cpu.sys.msr;
    let selector = msr.sysenter_cs as u16 & !3;
    if !cpu.sys.protected() || selector == 0 {
        return Err(cpu.gp0());
    }
    let long = cpu.sys.long_mode();
    let flags = cpu.rflags_full() & !(rflags::VM | rflags::IF | rflags::RF);
    let code = if long { attr::L } else { attr::DB };
    cpu.set_segment(seg::CS, flat(selector, CODE | code, 0));
    cpu.set_segment(seg::SS, flat(selector.wrapping_add(8), DATA, 0));
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rip = msr.sysenter_eip & mask;
    cpu.gpr[usize::from(reg::RSP)] = msr.sysenter_esp & mask;
    cpu.set_rflags(flags);
    cpu.update_mode();
    Ok(())
}

/// SYSEXIT: `OPSIZE64` returns to 64-bit code.
pub(super) fn sysexit(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = cpu.sys.msr.sysenter_cs as u16 & !3;
    if !cpu.sys.mode.protected() || selector == 0 || cpu.cpl != 0 {
        return Err(cpu.gp0());
    }
    let rip = cpu.gpr[usize::from(reg::RDX)];
    let rsp = cpu.gpr[usize::from(reg::RCX)];
    if op.has(op_flag::OPSIZE64) {
        if !canonical(rip) || !canonical(rsp) {
            return Err(cpu.gp0());
        }
        cpu.set_segment(
            seg::CS,
            flat(selector.wrapping_add(32) | 3, CODE | attr::L, 3),
        );
        cpu.set_segment(seg::SS, flat(selector.wrapping_add(40) | 3, DATA, 3));
        cpu.rip = rip;
        cpu.gpr[usize::from(reg::RSP)] = rsp;
    } else {
        cpu.set_segment(
            seg::CS,
            flat(selector.wrapping_add(16) | 3, CODE | attr::DB, 3),
        );
        cpu.set_segment(seg::SS, flat(selector.wrapping_add(24) | 3, DATA, 3));
        cpu.rip = rip & 0xffff_ffff;
        cpu.gpr[usize::from(reg::RSP)] = rsp & 0xffff_ffff;
    }
    cpu.update_mode();
    Ok(())
}

/// SWAPGS.
pub(super) fn swapgs(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !cpu.sys.mode.is64() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let base = cpu.seg_base[usize::from(seg::GS)];
    let new = std::mem::replace(&mut cpu.sys.msr.kernel_gs_base, base);
    cpu.set_segment_base(seg::GS, new);
    Ok(())
}

/// RDFSBASE, RDGSBASE: `r0` register, `r1` segment.
pub(super) fn read_base(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.sys.cr4 & cr4::FSGSBASE == 0 || !cpu.sys.mode.is64() {
        return Err(cpu.ud());
    }
    let base = cpu.seg_base[usize::from(op.r1 & 7)];
    let size = if op.has(op_flag::OPSIZE64) { 8 } else { 4 };
    write_register(cpu, op.r0, size, base);
    Ok(())
}

/// WRFSBASE, WRGSBASE: `r0` register, `r1` segment.
pub(super) fn write_base(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.sys.cr4 & cr4::FSGSBASE == 0 || !cpu.sys.mode.is64() {
        return Err(cpu.ud());
    }
    let mut value = cpu.gpr[usize::from(op.r0 & 15)];
    if !op.has(op_flag::OPSIZE64) {
        value &= 0xffff_ffff;
    }
    if !canonical(value) {
        return Err(cpu.gp0());
    }
    cpu.set_segment_base(op.r1, value);
    Ok(())
}

impl Cpu {
    /// Changes the hidden base alone.
    pub(crate) fn set_segment_base(&mut self, index: u8, base: u64) {
        let i = usize::from(index) % 6;
        self.sys.segments[i].base = base;
        self.seg_base[i] = base;
    }
}
