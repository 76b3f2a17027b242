//! RDRAND and RDSEED: random numbers from the host's kernel, drawn in batches.

use iced_x86::{Code, Instruction, Register};

use crate::Cpu;
use crate::code::{Handler, Lowering, Op};
use crate::flags::rflags::CF;
use crate::trap::Trap;

use std::cell::RefCell;

/// Random bytes not yet given out. Every byte is used once.
struct Pool {
    bytes: [u8; 256],
    left: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const {
        RefCell::new(Pool { bytes: [0; 256], left: 0 })
    };
}

/// A random number; `None` when the host has none to give.
fn random() -> Option<u64> {
    POOL.with_borrow_mut(|pool| {
        if pool.left < 8 {
            fill(&mut pool.bytes)?;
            pool.left = pool.bytes.len();
        }
        let start = pool.left - 8;
        let chunk = pool.bytes.get_mut(start..pool.left)?;
        let value = u64::from_le_bytes(chunk.try_into().ok()?);
        chunk.fill(0);
        pool.left = start;
        Some(value)
    })
}

#[expect(unsafe_code, reason = "calls getrandom(2)")]
fn fill(bytes: &mut [u8]) -> Option<()> {
    // SAFETY: the kernel writes at most `len` bytes into the slice.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    (n == bytes.len() as isize).then_some(())
}

/// `BYTES` is the destination's size. CF tells of success, and the other flags are cleared
/// (SDM 2B, RDRAND).
fn run<const BYTES: u32>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = random();
    cpu.flags.set_bits(if value.is_some() { CF } else { 0 });
    let value = value.unwrap_or(0);
    let register = &mut cpu.gpr[usize::from(op.r0 & 15)];
    *register = match BYTES {
        2 => *register & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    Ok(())
}

/// Lowers RDRAND and RDSEED.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let handler: Handler = match i.code() {
        Code::Rdrand_r16 | Code::Rdseed_r16 => run::<2>,
        Code::Rdrand_r32 | Code::Rdseed_r32 => run::<4>,
        Code::Rdrand_r64 | Code::Rdseed_r64 => run::<8>,
        _ => return false,
    };
    let register = i.op0_register();
    if register == Register::None {
        return false;
    }
    let mut op = l.op();
    op.run = handler;
    op.r0 = l.reg(register);
    l.push(op);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ() {
        let mut seen: Vec<u64> = (0..100).map(|_| random().unwrap()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 100);
    }
}
