//! System instructions without a family: CPUID, time stamps, HLT, hypercalls, moves from segment
//! registers.

use crate::code::{Op, op_flag};
use crate::cpu::{Cpu, reg};
use crate::cpuid::KVM_SIGNATURE;
use crate::sys::operand::{size_of_op, truncate, write_register, write_sized};
use crate::sys::stack::Stack;
use crate::sys::state::{Activity, cr4};
use crate::trap::Trap;

/// CPUID.
pub(super) fn cpuid(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let leaf = cpu.gpr[usize::from(reg::RAX)] as u32;
    let subleaf = cpu.gpr[usize::from(reg::RCX)] as u32;
    let r = cpu.cpuid_query(leaf, subleaf);
    write_register(cpu, reg::RAX, 4, u64::from(r.eax));
    write_register(cpu, reg::RBX, 4, u64::from(r.ebx));
    write_register(cpu, reg::RCX, 4, u64::from(r.ecx));
    write_register(cpu, reg::RDX, 4, u64::from(r.edx));
    Ok(())
}

/// RDTSC; with `imm` 1 RDTSCP.
pub(super) fn rdtsc(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.sys.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        return Err(cpu.gp0());
    }
    let tsc = cpu.tsc();
    write_register(cpu, reg::RAX, 4, tsc);
    write_register(cpu, reg::RDX, 4, tsc >> 32);
    if op.imm != 0 {
        let aux = cpu.sys.msr.tsc_aux;
        write_register(cpu, reg::RCX, 4, aux);
    }
    Ok(())
}

/// RDPID: `r0` register.
pub(super) fn rdpid(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = if op.has(op_flag::OPSIZE64) { 8 } else { 4 };
    let aux = cpu.sys.msr.tsc_aux;
    write_register(cpu, op.r0, size, aux);
    Ok(())
}

/// RDPMC: there are no counters.
pub(super) fn rdpmc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Err(cpu.gp0())
}

/// HLT.
pub(super) fn hlt(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    cpu.sys.activity = Activity::Halted;
    cpu.want_events();
    Ok(())
}

/// VMCALL, VMMCALL: the interface of KVM, of which only the call that sends IPIs is there.
pub(super) fn hypercall(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    const SEND_IPI: u64 = 10;
    const NOT_PERMITTED: i64 = -1;
    const NO_SUCH_CALL: i64 = -1000;
    let r = cpu.cpuid.get(0x4000_0000, 0).unwrap_or_default();
    if (r.ebx, r.ecx, r.edx) != KVM_SIGNATURE {
        return Err(cpu.ud());
    }
    let size = if cpu.sys.mode.is64() { 8 } else { 4 };
    let argument = |n: u8| truncate(cpu.gpr[usize::from(n)], size);
    let answer = if cpu.cpl != 0 {
        NOT_PERMITTED
    } else if argument(reg::RAX) == SEND_IPI {
        let low = u128::from(argument(reg::RBX));
        let high = u128::from(argument(reg::RCX));
        let set = low | (high << (8 * size));
        let (first, icr) = (argument(reg::RDX) as u32, argument(reg::RSI));
        i64::from(cpu.apic_send_to_set(set, first, icr))
    } else {
        NO_SUCH_CALL
    };
    write_register(cpu, reg::RAX, size, answer as u64);
    Ok(())
}

/// MOV r/m16, Sreg: `r1` segment; a register gets it zero-extended.
pub(super) fn mov_from_segment(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = cpu.sys.segments[usize::from(op.r1) % 6].selector;
    if op.extra != 0 {
        cpu.store::<u16>(op, selector)
    } else {
        write_sized(cpu, op, op.r0, u64::from(selector));
        Ok(())
    }
}

/// PUSH Sreg: `r0` segment.
pub(super) fn push_segment(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = cpu.sys.segments[usize::from(op.r0) % 6].selector;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size_of_op(op), u64::from(selector))?;
    stack.commit(cpu);
    Ok(())
}

/// POP Sreg: `r0` segment.
pub(super) fn pop_segment(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut stack = Stack::current(cpu);
    let selector = stack.peek(cpu, 2, 0)? as u16;
    stack.release(size_of_op(op));
    cpu.load_segment(op.r0, selector)?;
    stack.commit(cpu);
    if op.r0 == crate::cpu::seg::SS {
        cpu.start_mov_ss_shadow(op);
    }
    Ok(())
}
