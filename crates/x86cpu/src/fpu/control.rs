//! x87 control instructions, and MXCSR.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::x87::{FSW_ES, check, prepare_x87};
use super::{MXCSR_MASK, attention, blocked, host, image};
use crate::Cpu;
use crate::code::{Handler, Lowering, Op};
use crate::sys::state::cr0;
use crate::trap::{Trap, vector};

/// The checks of an instruction that doesn't wait.
#[inline(always)]
pub(super) fn check_no_wait(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::X87 != 0 {
        return Err(cpu.x87_blocked());
    }
    cpu.fpu.make_live();
    Ok(())
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu)?;
    let value = cpu.load::<u16>(op)?;
    host::set_control_word(value);
    cpu.fpu.note_control(value);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    cpu.store::<u16>(op, host::control_word())
}

fn fnstsw_memory(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    cpu.store::<u16>(op, host::status_word())
}

fn fnstsw_ax(cpu: &mut Cpu, _op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(host::status_word());
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    host::clear_exceptions();
    Ok(())
}

fn fninit(cpu: &mut Cpu, _op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)?;
    cpu.fpu.fninit();
    Ok(())
}

/// FNENI, FNDISI, FNSETPM: nothing since the 387.
fn ignored(cpu: &mut Cpu, _op: &Op) -> Result<(), Trap> {
    check_no_wait(cpu)
}

fn wait(cpu: &mut Cpu, _op: &Op) -> Result<(), Trap> {
    if cpu.sys.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(cpu.fault_plain(vector::NM));
    }
    if cpu.fpu.attention & attention::X87_UNMASKED != 0 {
        prepare_x87(cpu)?;
    }
    Ok(())
}

/// The waiting form of a control instruction, decoded as one: FWAIT comes first.
fn wait_then<const N: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    wait(cpu, op)?;
    CONTROL[N](cpu, op)
}

/// Control instructions by number, for [`wait_then`].
const CONTROL: [Handler; 6] = [fnstcw, fnstsw_memory, fnstsw_ax, fnclex, fninit, ignored];
const CONTROL_WAITING: [Handler; 6] = [
    wait_then::<0>,
    wait_then::<1>,
    wait_then::<2>,
    wait_then::<3>,
    wait_then::<4>,
    wait_then::<5>,
];

fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_mxcsr(cpu, op)?;
    let value = cpu.load::<u32>(op)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    cpu.fpu.set_mxcsr(value);
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_mxcsr(cpu, op)?;
    let value = cpu.fpu.mxcsr();
    cpu.store::<u32>(op, value)
}

fn check_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let vex = op.extra != 0;
    if vex && cpu.simd_blocked & blocked::AVX != 0 {
        return Err(cpu.avx_blocked());
    }
    if !vex && cpu.simd_blocked & blocked::SSE != 0 {
        return Err(cpu.sse_blocked());
    }
    Ok(())
}

impl super::FpuState {
    /// FNINIT: the control registers; the data registers stay but are marked empty.
    pub(super) fn fninit(&mut self) {
        self.make_live();
        host::init_x87();
        self.last_ip = 0;
        self.last_dp = 0;
        self.last_opcode = 0;
        self.note_control(image::FCW_FNINIT);
    }
}

/// FSW with the summary bits that belong to its flags under control word `fcw`.
pub(super) fn with_summary(fsw: u16, fcw: u16) -> u16 {
    const BUSY: u16 = 1 << 15;
    if fsw & !fcw & 0x3f != 0 {
        fsw | FSW_ES | BUSY
    } else {
        fsw & !(FSW_ES | BUSY)
    }
}

/// Lowers control instructions.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let mut op = l.op();
    let (number, waiting) = match i.mnemonic() {
        M::Fnstcw => (0, false),
        M::Fstcw => (0, true),
        M::Fnstsw if i.op0_kind() == OpKind::Memory => (1, false),
        M::Fstsw if i.op0_kind() == OpKind::Memory => (1, true),
        M::Fnstsw => (2, false),
        M::Fstsw => (2, true),
        M::Fnclex => (3, false),
        M::Fclex => (3, true),
        M::Fninit => (4, false),
        M::Finit => (4, true),
        M::Fneni | M::Fndisi | M::Fnsetpm => (5, false),
        M::Feni | M::Fdisi | M::Fsetpm => (5, true),
        other => {
            op.run = match other {
                M::Fldcw => fldcw,
                M::Wait => wait,
                M::Ldmxcsr | M::Vldmxcsr => ldmxcsr,
                M::Stmxcsr | M::Vstmxcsr => stmxcsr,
                _ => return false,
            };
            op.extra = u8::from(matches!(other, M::Vldmxcsr | M::Vstmxcsr));
            return push(l, op, i);
        }
    };
    op.run = if waiting {
        CONTROL_WAITING[number]
    } else {
        CONTROL[number]
    };
    push(l, op, i)
}

fn push(l: &mut Lowering<'_>, mut op: Op, i: &Instruction) -> bool {
    if i.op_count() > 0 && i.op0_kind() == OpKind::Memory {
        l.mem(&mut op, i);
    }
    l.push(op);
    true
}
