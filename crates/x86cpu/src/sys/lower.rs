//! From decoded system instructions to ops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::code::{Handler, Lowering, Op, nop, op_flag};
use crate::cpu::{reg, seg};
use crate::sys::{control, far, flag_ops, interrupt, iret, misc, msr, port, segment, syscall};

/// What follows the op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The block goes on.
    No,
    /// The block ends.
    After,
    /// The op sets RIP.
    Branch,
}

fn set_size(op: &mut Op, bytes: usize) {
    match bytes {
        2 => op.flags |= op_flag::OPSIZE16,
        8 => op.flags |= op_flag::OPSIZE64,
        _ => {}
    }
}

fn finish(l: &mut Lowering<'_>, op: Op, end: End) -> bool {
    match end {
        End::No => l.push(op),
        End::After => {
            l.push(op);
            l.end_block_after();
        }
        End::Branch => l.push_branch(op),
    }
    true
}

fn plain(l: &mut Lowering<'_>, run: Handler, imm: u64, end: End) -> bool {
    let mut op = l.op();
    op.run = run;
    op.imm = imm;
    finish(l, op, end)
}

/// Adds the ops of `i` if it is a system instruction.
pub(crate) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    without_operands(l, i)
        || moves(l, i)
        || with_memory(l, i)
        || far_pointers(l, i)
        || transfers(l, i)
        || sized_by_code(l, i)
        || ports(l, i)
}

/// Instructions whose operands, if any, are fixed registers.
fn without_operands(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let (run, imm, end): (Handler, u64, End) = match i.mnemonic() {
        M::Cpuid => (misc::cpuid, 0, End::No),
        M::Rdtsc => (misc::rdtsc, 0, End::No),
        M::Rdtscp => (misc::rdtsc, 1, End::No),
        M::Rdpmc => (misc::rdpmc, 0, End::After),
        M::Rdmsr => (msr::rdmsr, 0, End::No),
        M::Wrmsr => (msr::wrmsr, 0, End::After),
        M::Hlt => (misc::hlt, 0, End::After),
        M::Vmcall | M::Vmmcall => (misc::hypercall, 0, End::After),
        M::Cli => (flag_ops::cli, 0, End::No),
        M::Sti => (flag_ops::sti, 0, End::No),
        M::Clac => (flag_ops::set_ac, 0, End::No),
        M::Stac => (flag_ops::set_ac, 1, End::No),
        M::Clts => (control::clts, 0, End::After),
        M::Invd | M::Wbinvd | M::Wbnoinvd => (control::flush_caches, 0, End::After),
        M::Xgetbv => (control::xgetbv, 0, End::No),
        M::Xsetbv => (control::xsetbv, 0, End::After),
        M::Swapgs => (syscall::swapgs, 0, End::No),
        M::Syscall => (syscall::syscall, 0, End::Branch),
        M::Sysenter => (syscall::sysenter, 0, End::Branch),
        M::Int3 => (interrupt::int3, 0, End::Branch),
        M::Int1 => (interrupt::int1, 0, End::Branch),
        M::Into => (interrupt::into, 0, End::Branch),
        M::Int => (interrupt::int_n, u64::from(i.immediate8()), End::Branch),
        M::Pause
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq => (nop, 0, End::No),
        _ => return false,
    };
    plain(l, run, imm, end)
}

fn is_segment(register: Register) -> bool {
    register.is_segment_register()
}

/// MOV with segment, control and debug registers, PUSH and POP of segment registers.
fn moves(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let (first, second) = (i.op0_register(), i.op1_register());
    let register0 = i.op_count() > 0 && i.op0_kind() == OpKind::Register;
    let register1 = i.op_count() > 1 && i.op1_kind() == OpKind::Register;
    let mut end = End::No;
    match i.mnemonic() {
        Mnemonic::Mov if register0 && is_segment(first) => {
            op.run = segment::mov_to_segment;
            op.r0 = first.number() as u8;
            memory_or_register(l, &mut op, i, 1);
            if op.r0 == seg::SS || !l.mode.is64() {
                end = End::After;
            }
        }
        Mnemonic::Mov if register1 && is_segment(second) => {
            op.run = misc::mov_from_segment;
            op.r1 = second.number() as u8;
            memory_or_register(l, &mut op, i, 0);
        }
        Mnemonic::Mov if register1 && second.is_cr() => {
            op.run = control::mov_from_cr;
            op.r0 = l.reg(first);
            op.r1 = second.number() as u8;
        }
        Mnemonic::Mov if register0 && first.is_cr() => {
            op.run = control::mov_to_cr;
            op.r0 = first.number() as u8;
            op.r1 = l.reg(second);
            end = End::After;
        }
        Mnemonic::Mov if register1 && second.is_dr() => {
            op.run = control::mov_from_dr;
            op.r0 = l.reg(first);
            op.r1 = second.number() as u8;
        }
        Mnemonic::Mov if register0 && first.is_dr() => {
            op.run = control::mov_to_dr;
            op.r0 = first.number() as u8;
            op.r1 = l.reg(second);
            end = End::After;
        }
        Mnemonic::Push if register0 && is_segment(first) => {
            op.run = misc::push_segment;
            op.r0 = first.number() as u8;
            set_size(&mut op, i.stack_pointer_increment().unsigned_abs() as usize);
        }
        Mnemonic::Pop if register0 && is_segment(first) => {
            op.run = misc::pop_segment;
            op.r0 = first.number() as u8;
            set_size(&mut op, i.stack_pointer_increment().unsigned_abs() as usize);
            if op.r0 == seg::SS || !l.mode.is64() {
                end = End::After;
            }
        }
        _ => return false,
    }
    finish(l, op, end)
}

/// Operand `n` into the memory operand (`extra` 1), or into `r0` (n = 0) or `r1`, with its size.
fn memory_or_register(l: &mut Lowering<'_>, op: &mut Op, i: &Instruction, n: u32) {
    if i.op_kind(n) == OpKind::Memory {
        l.mem(op, i);
        op.extra = 1;
        return;
    }
    let register = i.op_register(n);
    if n == 0 {
        op.r0 = l.reg(register);
    } else {
        op.r1 = l.reg(register);
    }
    if n == 0 {
        set_size(op, register.size());
    }
}

/// Instructions with an r/m operand, and what else they need.
fn with_memory(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Mnemonic as M;
    let mut op = l.op();
    let mut end = End::No;
    match i.mnemonic() {
        M::Lar | M::Lsl => {
            op.run = if i.mnemonic() == M::Lar {
                segment::lar
            } else {
                segment::lsl
            };
            memory_or_register(l, &mut op, i, 1);
            op.r0 = l.reg(i.op0_register());
            set_size(&mut op, i.op0_register().size());
        }
        M::Verr | M::Verw | M::Lldt | M::Ltr | M::Lmsw => {
            memory_or_register(l, &mut op, i, 0);
            op.r1 = op.r0;
            op.imm = u64::from(i.mnemonic() == M::Verw);
            op.run = match i.mnemonic() {
                M::Lldt => segment::lldt,
                M::Ltr => segment::ltr,
                M::Lmsw => control::lmsw,
                _ => segment::verify,
            };
            if i.mnemonic() == M::Lmsw {
                end = End::After;
            }
        }
        M::Sldt | M::Str | M::Smsw => {
            memory_or_register(l, &mut op, i, 0);
            op.imm = u64::from(i.mnemonic() == M::Str);
            op.run = if i.mnemonic() == M::Smsw {
                control::smsw
            } else {
                segment::store_system_selector
            };
        }
        M::Arpl => {
            memory_or_register(l, &mut op, i, 0);
            op.r1 = l.reg(i.op1_register());
            op.run = segment::arpl;
        }
        M::Sgdt | M::Sidt => {
            l.mem(&mut op, i);
            op.imm = u64::from(i.mnemonic() == M::Sidt);
            op.run = control::store_table;
        }
        M::Lgdt | M::Lidt => {
            l.mem(&mut op, i);
            op.imm = u64::from(i.mnemonic() == M::Lidt);
            if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
                set_size(&mut op, 2);
            }
            op.run = control::load_table;
        }
        M::Invlpg => {
            l.mem(&mut op, i);
            op.run = control::invlpg;
            end = End::After;
        }
        M::Invpcid => {
            l.mem(&mut op, i);
            op.r0 = l.reg(i.op0_register());
            op.run = control::invpcid;
            end = End::After;
        }
        _ => return false,
    }
    finish(l, op, end)
}

/// LDS, LES, LFS, LGS, LSS.
fn far_pointers(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    op.r0 = match i.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        Mnemonic::Lss => seg::SS,
        _ => return false,
    };
    l.mem(&mut op, i);
    op.r1 = l.reg(i.op0_register());
    set_size(&mut op, i.op0_register().size());
    op.run = segment::load_far_pointer;
    let end = if op.r0 == seg::SS || !l.mode.is64() {
        End::After
    } else {
        End::No
    };
    finish(l, op, end)
}

/// Far jumps, calls and returns, interrupt and system call returns.
fn transfers(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let (run, size): (Handler, usize) = match i.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => (far::jmp, 2),
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => (far::jmp, 4),
        Code::Jmp_m1664 => (far::jmp, 8),
        Code::Call_ptr1616 | Code::Call_m1616 => (far::call, 2),
        Code::Call_ptr1632 | Code::Call_m1632 => (far::call, 4),
        Code::Call_m1664 => (far::call, 8),
        Code::Retfw | Code::Retfw_imm16 => (far::ret, 2),
        Code::Retfd | Code::Retfd_imm16 => (far::ret, 4),
        Code::Retfq | Code::Retfq_imm16 => (far::ret, 8),
        Code::Iretw => (iret::iret, 2),
        Code::Iretd => (iret::iret, 4),
        Code::Iretq => (iret::iret, 8),
        Code::Sysretd => (syscall::sysret, 4),
        Code::Sysretq => (syscall::sysret, 8),
        Code::Sysexitd => (syscall::sysexit, 4),
        Code::Sysexitq => (syscall::sysexit, 8),
        _ => return false,
    };
    op.run = run;
    set_size(&mut op, size);
    if i.op_count() > 0 {
        match i.op0_kind() {
            OpKind::FarBranch16 => {
                op.imm = u64::from(i.far_branch16());
                op.aux = u32::from(i.far_branch_selector());
            }
            OpKind::FarBranch32 => {
                op.imm = u64::from(i.far_branch32());
                op.aux = u32::from(i.far_branch_selector());
            }
            OpKind::Immediate16 => op.imm = u64::from(i.immediate16()),
            OpKind::Memory => {
                l.mem(&mut op, i);
                op.extra = 1;
            }
            _ => return false,
        }
    }
    finish(l, op, End::Branch)
}

/// PUSHF, POPF, FS and GS bases, RDPID.
fn sized_by_code(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    let (run, size): (Handler, usize) = match i.code() {
        Code::Pushfw => (flag_ops::pushf, 2),
        Code::Pushfd => (flag_ops::pushf, 4),
        Code::Pushfq => (flag_ops::pushf, 8),
        Code::Popfw => (flag_ops::popf, 2),
        Code::Popfd => (flag_ops::popf, 4),
        Code::Popfq => (flag_ops::popf, 8),
        _ => {
            let (run, segment): (Handler, u8) = match i.mnemonic() {
                Mnemonic::Rdfsbase => (syscall::read_base, seg::FS),
                Mnemonic::Rdgsbase => (syscall::read_base, seg::GS),
                Mnemonic::Wrfsbase => (syscall::write_base, seg::FS),
                Mnemonic::Wrgsbase => (syscall::write_base, seg::GS),
                Mnemonic::Rdpid => (misc::rdpid, 0),
                _ => return false,
            };
            op.r0 = l.reg(i.op0_register());
            op.r1 = segment;
            (run, i.op0_register().size())
        }
    };
    op.run = run;
    set_size(&mut op, size);
    finish(l, op, End::No)
}

/// IN, OUT, INS, OUTS.
fn ports(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let mut op = l.op();
    match i.mnemonic() {
        Mnemonic::In | Mnemonic::Out => {
            let input = i.mnemonic() == Mnemonic::In;
            let (data, port) = if input { (0, 1) } else { (1, 0) };
            op.run = if input { port::input } else { port::output };
            op.extra = i.op_register(data).size() as u8;
            if i.op_kind(port) == OpKind::Register {
                op.r1 = reg::RDX;
            } else {
                op.imm = u64::from(i.immediate8());
            }
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
            op.run = port::ins;
            op.extra = i.memory_size().size() as u8;
            string(l, &mut op, i);
        }
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            op.run = port::outs;
            op.extra = i.memory_size().size() as u8;
            string(l, &mut op, i);
        }
        _ => return false,
    }
    finish(l, op, End::After)
}

fn string(l: &mut Lowering<'_>, op: &mut Op, i: &Instruction) {
    l.string_operands(op, i);
    if i.has_rep_prefix() || i.has_repne_prefix() {
        op.flags |= op_flag::REP;
    }
}
