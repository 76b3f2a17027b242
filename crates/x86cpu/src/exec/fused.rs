//! CMP or TEST of registers and the conditional branch behind it as one op: the most frequent pair,
//! whose condition is at hand before the flags are.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Operand, by_condition, condition};
use super::{alu, condition_code, immediate, is_gpr, is_immediate, operand_size};
use crate::code::{Handler, Lowering, Op};
use crate::cpu::Cpu;
use crate::trap::Trap;

/// CMP or TEST.
trait Comparison {
    /// Whether it subtracts, rather than ANDs.
    const SUBTRACTS: bool;
}

struct Compare;
struct Test;

impl Comparison for Compare {
    const SUBTRACTS: bool = true;
}

impl Comparison for Test {
    const SUBTRACTS: bool = false;
}

/// The second operand.
trait Second {
    fn get<T: Operand>(cpu: &Cpu, op: &Op) -> u64;
}

struct Register;
struct Immediate;

impl Second for Register {
    #[inline(always)]
    fn get<T: Operand>(cpu: &Cpu, op: &Op) -> u64 {
        T::get(cpu, op.r1)
    }
}

impl Second for Immediate {
    #[inline(always)]
    fn get<T: Operand>(_: &Cpu, op: &Op) -> u64 {
        op.imm
    }
}

/// The condition, from the operands where that is one comparison. Only the low bits of `a` and `b`
/// count, and they are zero-extended.
#[inline(always)]
fn holds<C: Comparison, T: Operand, const CC: u8>(cpu: &Cpu, a: u64, b: u64) -> bool {
    let (a, b) = if C::SUBTRACTS { (a, b) } else { (a & b, 0) };
    let (sa, sb) = (T::signed(a), T::signed(b));
    let result = match CC >> 1 {
        1 => a < b,
        2 => a == b,
        3 => a <= b,
        4 if !C::SUBTRACTS => sa < 0,
        6 => sa < sb,
        7 => sa <= sb,
        _ => return condition(&cpu.flags, CC),
    };
    result ^ (CC & 1 != 0)
}

/// `disp` is the branch's displacement from the block's start; address and length are the branch's,
/// since the comparison can't fault.
fn branch<C: Comparison, S: Second, T: Operand, const CC: u8>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.r0), S::get::<T>(cpu, op));
    if C::SUBTRACTS {
        alu::compare::<T>(cpu, a, b);
    } else {
        cpu.flags.set_logic(<T as Operand>::BITS, a & b);
    }
    if holds::<C, T, CC>(cpu, a, b) {
        let target = cpu.rip.wrapping_add(op.disp as i64 as u64);
        if ((target << 16) as i64 >> 16) as u64 != target {
            return Err(cpu.gp0());
        }
        cpu.rip = target;
    } else {
        cpu.rip = cpu.rip.wrapping_add(op.next_ip());
    }
    Ok(())
}

fn handler<C: Comparison, S: Second>(size: usize, cc: u8) -> Handler {
    match size {
        1 => by_condition!(cc, branch, C, S, u8),
        2 => by_condition!(cc, branch, C, S, u16),
        4 => by_condition!(cc, branch, C, S, u32),
        _ => by_condition!(cc, branch, C, S, u64),
    }
}

/// One op for `first` and the branch `jcc` that follows it in 64-bit code, whose own op is `last`.
pub(crate) fn fuse(
    l: &Lowering<'_>,
    first: &Instruction,
    jcc: &Instruction,
    last: &Op,
) -> Option<Op> {
    if !l.mode.is64() || !jcc.is_jcc_short_or_near() {
        return None;
    }
    let cc = condition_code(jcc)?;
    let subtracts = match first.mnemonic() {
        Mnemonic::Cmp => true,
        Mnemonic::Test => false,
        _ => return None,
    };
    if first.op0_kind() != OpKind::Register || !is_gpr(first.op0_register()) {
        return None;
    }
    let mut op = *last;
    op.disp = i32::try_from(last.imm as i64).ok()?;
    op.r0 = l.reg(first.op0_register());
    let size = operand_size(first, 0);
    let register = first.op1_kind() == OpKind::Register && is_gpr(first.op1_register());
    if register {
        op.r1 = l.reg(first.op1_register());
    } else if is_immediate(first.op1_kind()) {
        op.imm = immediate(first, 1, size);
    } else {
        return None;
    }
    op.run = match (subtracts, register) {
        (true, true) => handler::<Compare, Register>(size, cc),
        (true, false) => handler::<Compare, Immediate>(size, cc),
        (false, true) => handler::<Test, Register>(size, cc),
        (false, false) => handler::<Test, Immediate>(size, cc),
    };
    Some(op)
}

#[cfg(test)]
mod tests {
    use crate::testing::{CODE, TestCpu};

    /// Every condition after CMP and TEST of every size agrees with the two instructions apart.
    #[test]
    fn agrees_with_the_pair() {
        let values = [0u64, 1, 2, 0x7f, 0x80, 0xff, 0x8000_0000, u64::MAX, 1 << 63];
        let forms: [&[u8]; 8] = [
            &[0x38, 0xd8],       // cmp al, bl
            &[0x66, 0x39, 0xd8], // cmp ax, bx
            &[0x39, 0xd8],       // cmp eax, ebx
            &[0x48, 0x39, 0xd8], // cmp rax, rbx
            &[0x48, 0x85, 0xd8], // test rax, rbx
            &[0x84, 0xfc],       // test ah, bh
            &[0x83, 0xf8, 0x80], // cmp eax, -128
            &[0xa8, 0x81],       // test al, 0x81
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
                            t.cpu.rip = CODE;
                            if way == 0 {
                                assert_eq!(t.cpu.step(), Ok(()));
                                assert_eq!(t.cpu.step(), Ok(()));
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
}
