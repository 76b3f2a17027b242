//! CMP, TEST or arithmetic and the conditional branch behind it: the most frequent pair, whose
//! condition is at hand before the flags are.

use iced_x86::{Mnemonic, OpKind};

use crate::code::{Handler, Op, Window, apart, op_flag};
use crate::cpu::Cpu;
use crate::exec::alu::{self, Add, And, Dec, Inc, Sub};
use crate::exec::operand::{Operand, by_condition, condition};
use crate::exec::{condition_code, is_gpr, is_immediate, operand_size};
use crate::sys::descriptor::canonical;
use crate::trap::Trap;

/// CMP or TEST.
pub(super) trait Condition {
    /// Whether it subtracts, rather than ANDs.
    const SUBTRACTS: bool;

    /// The condition, from the operands where that is one comparison, else from the flags that they
    /// have set. Only the low bits of `a` and `b` count, and they are zero-extended.
    #[inline(always)]
    fn holds<T: Operand, const CC: u8>(cpu: &Cpu, a: u64, b: u64) -> bool {
        let (a, b) = if Self::SUBTRACTS { (a, b) } else { (a & b, 0) };
        let (sa, sb) = (T::signed(a), T::signed(b));
        let result = match CC >> 1 {
            1 => a < b,
            2 => a == b,
            3 => a <= b,
            4 if !Self::SUBTRACTS => sa < 0,
            6 => sa < sb,
            7 => sa <= sb,
            _ => return condition(&cpu.flags, CC),
        };
        result ^ (CC & 1 != 0)
    }
}

pub(super) struct Compare;
pub(super) struct Test;

impl Condition for Compare {
    const SUBTRACTS: bool = true;
}

impl Condition for Test {
    const SUBTRACTS: bool = false;
}

/// The two operands, and the branch's displacement from the block's start.
trait Shape {
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)>;
    fn displacement(op: &Op) -> u64;
}

/// `disp` is the branch's.
struct Registers;
/// Register and immediate; `disp` is the branch's.
struct Immediate;
/// Memory and register: the upper half of `imm` is the branch's displacement.
struct MemoryRegister;
/// Memory and immediate, whose lower half is in `imm`.
struct MemoryImmediate;
/// Register and memory.
struct RegisterMemory;

#[inline(always)]
fn from_disp(op: &Op) -> u64 {
    op.disp as i64 as u64
}

#[inline(always)]
fn from_imm(op: &Op) -> u64 {
    (op.imm as i64 >> 32) as u64
}

impl Shape for Registers {
    #[inline(always)]
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
        Some((T::get(cpu, op.r0), T::get(cpu, op.r1)))
    }
    #[inline(always)]
    fn displacement(op: &Op) -> u64 {
        from_disp(op)
    }
}

impl Shape for Immediate {
    #[inline(always)]
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
        Some((T::get(cpu, op.r0), op.imm))
    }
    #[inline(always)]
    fn displacement(op: &Op) -> u64 {
        from_disp(op)
    }
}

impl Shape for MemoryRegister {
    #[inline(always)]
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
        Some((cpu.try_load::<T>(op)?.wide(), T::get(cpu, op.r1)))
    }
    #[inline(always)]
    fn displacement(op: &Op) -> u64 {
        from_imm(op)
    }
}

impl Shape for MemoryImmediate {
    #[inline(always)]
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
        let immediate = op.imm as i32 as i64 as u64 & T::MASK;
        Some((cpu.try_load::<T>(op)?.wide(), immediate))
    }
    #[inline(always)]
    fn displacement(op: &Op) -> u64 {
        from_imm(op)
    }
}

impl Shape for RegisterMemory {
    #[inline(always)]
    fn operands<T: Operand>(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
        Some((T::get(cpu, op.r0), cpu.try_load::<T>(op)?.wide()))
    }
    #[inline(always)]
    fn displacement(op: &Op) -> u64 {
        from_imm(op)
    }
}

/// Goes on behind the op, or at `displacement` from the block's start.
#[inline(always)]
pub(super) fn branch_of(
    cpu: &mut Cpu,
    op: &Op,
    taken: bool,
    displacement: u64,
) -> Result<(), Trap> {
    let by = if taken { displacement } else { op.next_ip() };
    let target = cpu.rip.wrapping_add(by);
    if taken && !canonical(target) {
        return Err(beyond(cpu, op));
    }
    cpu.rip = target;
    Ok(())
}

/// The branch, the last of the op's instructions, leads to a non-canonical address. What is before
/// it has been done.
#[cold]
#[inline(never)]
fn beyond(cpu: &mut Cpu, op: &Op) -> Trap {
    crate::code::last_part_failed(cpu, op);
    cpu.gp0()
}

fn compare_jcc<C: Condition, S: Shape, T: Operand, const CC: u8>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let Some((a, b)) = S::operands::<T>(cpu, op) else {
        return apart(cpu, op);
    };
    if C::SUBTRACTS {
        alu::compare::<T>(cpu, a, b);
    } else {
        cpu.flags.set_logic(<T as Operand>::BITS, a & b);
    }
    let taken = C::holds::<T, CC>(cpu, a, b);
    branch_of(cpu, op, taken, S::displacement(op))
}

fn compare_handler<C: Condition, S: Shape>(size: usize, cc: u8) -> Handler {
    match size {
        1 => by_condition!(cc, compare_jcc, C, S, u8),
        2 => by_condition!(cc, compare_jcc, C, S, u16),
        4 => by_condition!(cc, compare_jcc, C, S, u32),
        _ => by_condition!(cc, compare_jcc, C, S, u64),
    }
}

/// CMP or TEST and the branch behind it.
pub(super) fn compare(w: &Window<'_>) -> Option<Op> {
    let ((first, compare), (jcc, last)) = (w.get(0)?, w.get(1)?);
    if !jcc.is_jcc_short_or_near() {
        return None;
    }
    let cc = condition_code(jcc)?;
    let subtracts = first.mnemonic() == Mnemonic::Cmp;
    let size = operand_size(first, 0);
    let mut op = w.op(2, compare)?;
    let displacement = i32::try_from(last.imm as i64).ok()?;
    op.disp = displacement;
    let kinds = (first.op0_kind(), first.op1_kind());
    if kinds.0 == OpKind::Memory || kinds.1 == OpKind::Memory {
        op.disp = compare.disp;
        op.imm = u64::from(compare.imm as u32) | (displacement as u64) << 32;
        if op.has(op_flag::LOCK) {
            return None;
        }
    }
    op.run = match (subtracts, kinds) {
        (true, (OpKind::Register, OpKind::Register)) => {
            compare_handler::<Compare, Registers>(size, cc)
        }
        (false, (OpKind::Register, OpKind::Register)) => {
            compare_handler::<Test, Registers>(size, cc)
        }
        (true, (OpKind::Register, OpKind::Memory)) => {
            compare_handler::<Compare, RegisterMemory>(size, cc)
        }
        (true, (OpKind::Memory, OpKind::Register)) => {
            compare_handler::<Compare, MemoryRegister>(size, cc)
        }
        (false, (OpKind::Memory, OpKind::Register)) => {
            compare_handler::<Test, MemoryRegister>(size, cc)
        }
        (true, (OpKind::Register, k)) if is_immediate(k) => {
            compare_handler::<Compare, Immediate>(size, cc)
        }
        (false, (OpKind::Register, k)) if is_immediate(k) => {
            compare_handler::<Test, Immediate>(size, cc)
        }
        (true, (OpKind::Memory, k)) if is_immediate(k) => {
            compare_handler::<Compare, MemoryImmediate>(size, cc)
        }
        (false, (OpKind::Memory, k)) if is_immediate(k) => {
            compare_handler::<Test, MemoryImmediate>(size, cc)
        }
        _ => return None,
    };
    Some(op)
}

/// `r0` by `r1` or `imm`.
fn binary_jcc<O: alu::Alu, S: Shape, T: Operand, const CC: u8>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let Some((_, b)) = S::operands::<T>(cpu, op) else {
        return apart(cpu, op);
    };
    alu::to_register::<O, T>(cpu, op.r0, b);
    let taken = condition(&cpu.flags, CC);
    branch_of(cpu, op, taken, S::displacement(op))
}

fn unary_jcc<O: alu::Unary, T: Operand, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    alu::unary_register::<O, T>(cpu, op.r0);
    let taken = condition(&cpu.flags, CC);
    branch_of(cpu, op, taken, from_disp(op))
}

fn binary_handler<O: alu::Alu>(register: bool, wide: bool, cc: u8) -> Handler {
    match (register, wide) {
        (true, true) => by_condition!(cc, binary_jcc, O, Registers, u64),
        (true, false) => by_condition!(cc, binary_jcc, O, Registers, u32),
        (false, true) => by_condition!(cc, binary_jcc, O, Immediate, u64),
        (false, false) => by_condition!(cc, binary_jcc, O, Immediate, u32),
    }
}

fn unary_handler<O: alu::Unary>(wide: bool, cc: u8) -> Handler {
    if wide {
        by_condition!(cc, unary_jcc, O, u64)
    } else {
        by_condition!(cc, unary_jcc, O, u32)
    }
}

/// Arithmetic on a register and the branch on its result.
pub(super) fn compute(w: &Window<'_>) -> Option<Op> {
    let ((first, compute), (jcc, last)) = (w.get(0)?, w.get(1)?);
    let size = operand_size(first, 0);
    let fits = matches!(size, 4 | 8)
        && first.op0_kind() == OpKind::Register
        && is_gpr(first.op0_register())
        && jcc.is_jcc_short_or_near();
    if !fits {
        return None;
    }
    let cc = condition_code(jcc)?;
    let wide = size == 8;
    let mut op = w.op(2, compute)?;
    op.disp = i32::try_from(last.imm as i64).ok()?;
    let unary = first.op_count() == 1;
    let register = !unary && first.op1_kind() == OpKind::Register;
    if !unary && !register && !is_immediate(first.op1_kind()) {
        return None;
    }
    op.run = match first.mnemonic() {
        Mnemonic::And => binary_handler::<And>(register, wide, cc),
        Mnemonic::Add => binary_handler::<Add>(register, wide, cc),
        Mnemonic::Sub => binary_handler::<Sub>(register, wide, cc),
        Mnemonic::Inc => unary_handler::<Inc>(wide, cc),
        Mnemonic::Dec => unary_handler::<Dec>(wide, cc),
        _ => return None,
    };
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::testing::{CODE, DATA, TestCpu};

    /// Every condition after CMP and TEST of every size agrees with the two instructions apart.
    #[test]
    fn agrees_with_the_pair() {
        let values = [0u64, 1, 2, 0x7f, 0x80, 0xff, 0x8000_0000, u64::MAX, 1 << 63];
        let forms: [&[u8]; 20] = [
            &[0x38, 0xd8],                         // cmp al, bl
            &[0x66, 0x39, 0xd8],                   // cmp ax, bx
            &[0x39, 0xd8],                         // cmp eax, ebx
            &[0x48, 0x39, 0xd8],                   // cmp rax, rbx
            &[0x48, 0x85, 0xd8],                   // test rax, rbx
            &[0x84, 0xfc],                         // test ah, bh
            &[0x83, 0xf8, 0x80],                   // cmp eax, -128
            &[0xa8, 0x81],                         // test al, 0x81
            &[0x38, 0x1e],                         // cmp [rsi], bl
            &[0x48, 0x3b, 0x1e],                   // cmp rbx, [rsi]
            &[0x81, 0x3e, 0x80, 0xff, 0xff, 0xff], // cmp dword [rsi], -128
            &[0x66, 0x85, 0x1e],                   // test [rsi], bx
            &[0xf6, 0x06, 0x81],                   // test byte [rsi], 0x81
            &[0x48, 0x21, 0xd8],                   // and rax, rbx
            &[0x83, 0xe8, 0x80],                   // sub eax, -128
            &[0x48, 0x01, 0xd8],                   // add rax, rbx
            &[0xff, 0xc8],                         // dec eax
            &[0x48, 0xff, 0xc0],                   // inc rax
            &[0x48, 0x8b, 0x06, 0x48, 0x85, 0xc0], // mov rax, [rsi]; test rax, rax
            &[0x8b, 0x06, 0x85, 0xc0],             // mov eax, [rsi]; test eax, eax
        ];
        let mut t = TestCpu::new64();
        for form in forms {
            for cc in 0..16u8 {
                // jcc +2 ; out 0xf4, al ; out 0xf5, al
                let mut code = form.to_vec();
                code.extend([0x70 | cc, 0x02, 0xe6, 0xf4, 0xe6, 0xf5]);
                t.write(CODE, &code);
                for a in values {
                    for b in values {
                        let mut outcome = [0; 2];
                        for (way, result) in outcome.iter_mut().enumerate() {
                            t.cpu.forget_devices();
                            t.cpu.gpr[0] = a;
                            t.cpu.gpr[3] = b;
                            t.cpu.gpr[6] = DATA;
                            t.write(DATA, &a.to_le_bytes());
                            t.cpu.rip = CODE;
                            if way == 0 {
                                while t.cpu.rip < CODE + form.len() as u64 + 2 {
                                    assert_eq!(t.cpu.step(), Ok(()));
                                }
                            } else {
                                t.cpu.run();
                            }
                            *result = t.cpu.rip << 16 | t.cpu.flags.bits();
                        }
                        assert_eq!(outcome[0], outcome[1], "{form:x?} cc {cc} {a:#x} {b:#x}");
                    }
                }
            }
        }
    }

    /// A store that changes its own block ends it: what was to run as one op behind it starts with
    /// its first instruction.
    #[test]
    fn starts_over_after_a_store_into_the_block() {
        let mut t = TestCpu::new64();
        // nop; mov byte [rip - 8], 0x90 (the nop); cmp eax, ebx; je +2; out 0xf4, al; out 0xf5, al
        let code = [
            0x90, 0xc6, 0x05, 0xf8, 0xff, 0xff, 0xff, 0x90, 0x39, 0xd8, 0x74, 0x02, 0xe6, 0xf4,
            0xe6, 0xf5,
        ];
        t.write(CODE, &code);
        t.cpu.gpr[0] = 7;
        t.cpu.gpr[3] = 7;
        t.cpu.set_rflags(0x2);
        t.cpu.rip = CODE;
        t.cpu.run();
        assert_eq!(t.cpu.rip, CODE + 14, "the branch was taken");
    }
}
