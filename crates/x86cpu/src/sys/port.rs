//! IN, OUT, INS, OUTS and the I/O permission bit map (Intel SDM 1 §19.5; 2A "IN", "INS").

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, reg};
use crate::flags::rflags;
use crate::mem::Access;
use crate::sys::operand::{truncate, write_register};
use crate::trap::Trap;

impl Cpu {
    /// #GP(0) unless IOPL or the TSS's bit map allow the ports.
    fn check_ports(&mut self, port: u16, size: u64) -> Result<(), Trap> {
        if !self.sys.protected() || self.cpl <= self.iopl() && !self.in_v86() {
            return Ok(());
        }
        let tr = self.sys.tr;
        let limit = u64::from(tr.limit);
        let wide = tr.attributes & 8 != 0;
        if tr.unusable || !wide || limit < 0x67 {
            return Err(self.gp0());
        }
        let address = self.table_address(tr.base.wrapping_add(0x66));
        let map = u64::from(self.load_lin::<u16>(address, Access::Supervisor)?);
        let byte = map + u64::from(port / 8);
        // Two bytes are always read, so that ports may straddle.
        if byte + 1 > limit {
            return Err(self.gp0());
        }
        let address = self.table_address(tr.base.wrapping_add(byte));
        let bits = self.load_lin::<u16>(address, Access::Supervisor)?;
        let wanted = ((1u16 << size) - 1) << (port & 7);
        if bits & wanted != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }

    fn element(&self, op: &Op) -> u64 {
        u64::from(op.extra.clamp(1, 4))
    }
}

fn port_of(cpu: &Cpu, op: &Op) -> u16 {
    if op.r1 == reg::RDX {
        cpu.gpr[usize::from(reg::RDX)] as u16
    } else {
        op.imm as u16
    }
}

/// IN: `r1` DX or an immediate port, `extra` bytes.
pub(super) fn input(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = cpu.element(op);
    let port = port_of(cpu, op);
    cpu.check_ports(port, size)?;
    let value = cpu.port_read(port, size as u8)?;
    write_register(cpu, reg::RAX, size, u64::from(value));
    Ok(())
}

/// OUT.
pub(super) fn output(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = cpu.element(op);
    let port = port_of(cpu, op);
    cpu.check_ports(port, size)?;
    let value = cpu.gpr[usize::from(reg::RAX)] as u32;
    cpu.port_write(port, size as u8, value)
}

fn address_mask(op: &Op) -> u64 {
    if op.has(op_flag::ADDR16) {
        0xffff
    } else if op.has(op_flag::ADDR32) {
        0xffff_ffff
    } else {
        u64::MAX
    }
}

/// Writes an index or count register at the address size.
fn set_at_address_size(cpu: &mut Cpu, op: &Op, register: u8, value: u64) {
    let size = match address_mask(op) {
        0xffff => 2,
        0xffff_ffff => 4,
        _ => 8,
    };
    write_register(cpu, register, size, truncate(value, size));
}

fn step(cpu: &Cpu, size: u64) -> u64 {
    if cpu.rflags & rflags::DF != 0 {
        size.wrapping_neg()
    } else {
        size
    }
}

/// Runs `once` for each element of a repeated instruction. Each is complete by itself: the next is
/// a new instruction as far as device answers go, and events are looked at in between.
fn repeat(cpu: &mut Cpu, op: &Op, once: fn(&mut Cpu, &Op) -> Result<(), Trap>) -> Result<(), Trap> {
    if !op.has(op_flag::REP) && !op.has(op_flag::REPNE) {
        return once(cpu, op);
    }
    let mask = address_mask(op);
    loop {
        let count = cpu.gpr[usize::from(reg::RCX)] & mask;
        if count == 0 {
            return Ok(());
        }
        once(cpu, op)?;
        cpu.commit_devices();
        set_at_address_size(cpu, op, reg::RCX, count - 1);
        if count > 1 && cpu.must_leave_block() {
            cpu.rip = cpu.own_rip(op);
            return Err(cpu.resume());
        }
    }
}

fn ins_once(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = cpu.element(op);
    let port = cpu.gpr[usize::from(reg::RDX)] as u16;
    cpu.check_ports(port, size)?;
    let to = cpu.gpr[usize::from(reg::RDI)] & address_mask(op);
    match size {
        1 => cpu.check_write_at::<u8>(op.r0, to)?,
        2 => cpu.check_write_at::<u16>(op.r0, to)?,
        _ => cpu.check_write_at::<u32>(op.r0, to)?,
    }
    let value = cpu.port_read(port, size as u8)?;
    match size {
        1 => cpu.store_at::<u8>(op.r0, to, value as u8)?,
        2 => cpu.store_at::<u16>(op.r0, to, value as u16)?,
        _ => cpu.store_at::<u32>(op.r0, to, value)?,
    }
    let next = to.wrapping_add(step(cpu, size));
    set_at_address_size(cpu, op, reg::RDI, next);
    Ok(())
}

fn outs_once(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = cpu.element(op);
    let port = cpu.gpr[usize::from(reg::RDX)] as u16;
    cpu.check_ports(port, size)?;
    let from = cpu.gpr[usize::from(reg::RSI)] & address_mask(op);
    let value = match size {
        1 => u32::from(cpu.load_at::<u8>(op.seg, from)?),
        2 => u32::from(cpu.load_at::<u16>(op.seg, from)?),
        _ => cpu.load_at::<u32>(op.seg, from)?,
    };
    cpu.port_write(port, size as u8, value)?;
    let next = from.wrapping_add(step(cpu, size));
    set_at_address_size(cpu, op, reg::RSI, next);
    Ok(())
}

/// INS, REP INS: destination segment `r0`.
pub(super) fn ins(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat(cpu, op, ins_once)
}

/// OUTS, REP OUTS.
pub(super) fn outs(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat(cpu, op, outs_once)
}
