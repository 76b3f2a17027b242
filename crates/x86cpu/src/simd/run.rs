//! Runs thunks: resolves the operands, calls, and takes care of what differs from a plain
//! computation.
#![expect(unsafe_code, reason = "calls thunks")]

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::mxcsr;
use super::operand::{Operand, operand, quick};
use super::thunk::{self, MemoryUse, Operands, Place};
use crate::Cpu;
use crate::code::{Handler, Lowering, Op};
use crate::fpu::{Ymm, attention, blocked, prepare_x87};
use crate::trap::Trap;

/// Bits of [`Op::aux`]: the memory operand, by [`MemoryUse`], and the class.
mod aux {
    pub(super) const SIZE: u32 = 0x7f;
    /// Results are halves (VCVTPS2PH).
    pub(super) const HALF: u32 = 1 << 7;
    pub(super) const READ: u32 = 1 << 8;
    pub(super) const WRITE: u32 = 1 << 9;
    pub(super) const ALIGNED: u32 = 1 << 10;
    /// Works on MMX registers.
    pub(super) const MMX: u32 = 1 << 11;
    pub(super) const SSE: u32 = 1 << 12;
    pub(super) const VEX: u32 = 1 << 13;
    /// Floating-point arithmetic.
    pub(super) const ARITHMETIC: u32 = 1 << 14;
    /// Returns flags.
    pub(super) const FLAGS: u32 = 1 << 15;
    /// Kinds of the operands, four bits each.
    pub(super) const KINDS_SHIFT: u32 = 16;
}

/// Kinds of operands, as const parameters and in `aux`.
const NONE: u8 = 0;
const VECTOR: u8 = 1;
const GENERAL: u8 = 2;
const MEMORY: u8 = 3;

/// Pointers to the operands of one instruction.
pub(super) type Pointers = [*mut u8; 4];

/// Calls a thunk.
///
/// # Safety
/// `code` is a thunk's, and the pointers are those that it takes: into the register file of a
/// processor that nobody else uses now, or to as many bytes as its memory operand has.
#[inline(always)]
pub(super) unsafe fn call(code: u64, p: Pointers) -> u64 {
    // SAFETY: thunks have this signature and are kept for ever; the rest is the caller's.
    unsafe {
        let thunk: extern "sysv64" fn(*mut u8, *mut u8, *mut u8, *mut u8) -> u64 =
            std::mem::transmute(code as *const ());
        thunk(p[0], p[1], p[2], p[3])
    }
}

/// # Safety
/// `cpu` is a processor that nobody else uses now.
#[inline(always)]
unsafe fn pointer(cpu: *mut Cpu, kind: u8, number: u8, memory: *mut u8) -> *mut u8 {
    // SAFETY: the indices are within the arrays; no reference is made.
    unsafe {
        match kind {
            VECTOR => (&raw mut (*cpu).fpu.ymm)
                .cast::<Ymm>()
                .add(usize::from(number & 15))
                .cast(),
            GENERAL => (&raw mut (*cpu).gpr)
                .cast::<u64>()
                .add(usize::from(number & 15))
                .cast(),
            MEMORY => memory,
            _ => std::ptr::null_mut(),
        }
    }
}

/// The pointers that the op's thunk takes, with `memory` for the memory operand.
///
/// # Safety
/// As for [`pointer`].
pub(super) unsafe fn pointers(cpu: *mut Cpu, op: &Op, memory: *mut u8) -> Pointers {
    let kinds = op.aux >> aux::KINDS_SHIFT;
    let numbers = [op.r0, op.r1, op.r2, op.extra];
    std::array::from_fn(|n| {
        let kind = (kinds >> (4 * n) & 15) as u8;
        // SAFETY: the caller's.
        unsafe { pointer(cpu, kind, numbers[n], memory) }
    })
}

/// Whether the op converts to half precision.
pub(super) fn is_half(op: &Op) -> bool {
    op.aux & aux::HALF != 0
}

/// Bytes of the memory operand.
pub(super) fn memory_size(op: &Op) -> usize {
    (op.aux & aux::SIZE) as usize
}

/// Whether the op works on MMX registers.
pub(super) fn is_mmx(op: &Op) -> bool {
    op.aux & aux::MMX != 0
}

#[inline(always)]
fn memory(cpu: &mut Cpu, op: &Op) -> Result<Operand, Trap> {
    let size = (op.aux & aux::SIZE) as usize;
    let align = if op.aux & aux::ALIGNED != 0 { size } else { 1 };
    operand(cpu, op, size, align, op.aux & aux::WRITE != 0)
}

/// The common shapes, with their operand kinds known at compile time: no MMX, no flags.
fn fast<const K0: u8, const K1: u8, const K2: u8, const ARITHMETIC: bool, const VEX: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    let bit = if VEX { blocked::AVX } else { blocked::SSE };
    let special = ARITHMETIC && cpu.fpu.attention & attention::MXCSR != 0;
    if cpu.simd_blocked & bit != 0 || special {
        return general(cpu, op);
    }
    let mut at = std::ptr::null_mut();
    if K0 == MEMORY || K1 == MEMORY || K2 == MEMORY {
        let size = (op.aux & aux::SIZE) as usize;
        let align = if op.aux & aux::ALIGNED != 0 { size } else { 1 };
        match quick(cpu, op, size, align, K0 == MEMORY) {
            Some(pointer) => at = pointer,
            None => return general(cpu, op),
        }
    }
    let cpu: *mut Cpu = cpu;
    // SAFETY: lowering has picked the handler that fits the thunk's operands (pointers that it
    // doesn't take needn't be passed); `at` is good for the operand's size, says the TLB; the
    // processor is borrowed for the call.
    unsafe {
        let code = op.imm as *const ();
        let first = pointer(cpu, K0, op.r0, at);
        let second = pointer(cpu, K1, op.r1, at);
        if K2 == NONE {
            let thunk: extern "sysv64" fn(*mut u8, *mut u8) = std::mem::transmute(code);
            thunk(first, second);
        } else {
            let thunk: extern "sysv64" fn(*mut u8, *mut u8, *mut u8) = std::mem::transmute(code);
            thunk(first, second, pointer(cpu, K2, op.r2, at));
        }
    }
    Ok(())
}

fn check(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if op.aux & aux::SSE != 0 {
        if op.aux & aux::VEX != 0 {
            if cpu.simd_blocked & blocked::AVX != 0 {
                return Err(cpu.avx_blocked());
            }
        } else if cpu.simd_blocked & blocked::SSE != 0 {
            return Err(cpu.sse_blocked());
        }
    }
    if op.aux & aux::MMX != 0 {
        if cpu.simd_blocked & blocked::X87 != 0 {
            return Err(cpu.mmx_blocked());
        }
        if cpu.fpu.attention & (attention::X87_IDLE | attention::X87_UNMASKED) != 0 {
            prepare_x87(cpu)?;
        }
    }
    Ok(())
}

/// Any shape, any class, any place of the memory operand.
#[inline(never)]
fn general(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check(cpu, op)?;
    let kinds = op.aux >> aux::KINDS_SHIFT;
    let has_memory = (0..4).any(|n| (kinds >> (4 * n) & 15) as u8 == MEMORY);
    let write = op.aux & aux::WRITE != 0;
    let special = op.aux & aux::ARITHMETIC != 0 && cpu.fpu.attention & attention::MXCSR != 0;
    let mut at = std::ptr::null_mut();
    if has_memory {
        let operand = memory(cpu, op)?;
        // What may turn out to raise an exception must not store in place.
        let in_place = !(special && write);
        match operand.host(cpu, op, write)? {
            Some(pointer) if in_place => at = pointer.as_ptr(),
            _ => return bounced(cpu, op, operand, special),
        }
    }
    let flags = execute(cpu, op, at, special)?;
    if op.aux & aux::FLAGS != 0 {
        cpu.flags.set_bits(flags);
    }
    Ok(())
}

/// Calls the op's thunk with `at` as its memory operand.
fn execute(cpu: &mut Cpu, op: &Op, at: *mut u8, special: bool) -> Result<u64, Trap> {
    if special {
        return mxcsr::call_guarded(cpu, op, at);
    }
    let cpu: *mut Cpu = cpu;
    // SAFETY: as in `fast`; `at` may also be the bounce buffer, which is larger than any operand.
    Ok(unsafe { call(op.imm, pointers(cpu, op, at)) })
}

/// Runs on a copy of the memory operand.
#[cold]
fn bounced(cpu: &mut Cpu, op: &Op, operand: Operand, special: bool) -> Result<(), Trap> {
    let write = op.aux & aux::WRITE != 0;
    let mut buffer = Bounce([0; 64]);
    let Some(bytes) = buffer.0.get_mut(..operand.size) else {
        return Err(cpu.ud());
    };
    if op.aux & aux::READ != 0 {
        operand.read(cpu, op, bytes)?;
    }
    if !write {
        let flags = execute(cpu, op, bytes.as_mut_ptr(), special)?;
        if op.aux & aux::FLAGS != 0 {
            cpu.flags.set_bits(flags);
        }
        return Ok(());
    }
    // A store that faults leaves exception flags and the tags of MMX registers as they were.
    let mxcsr = cpu.fpu.mxcsr();
    let x87 = (op.aux & aux::MMX != 0).then(|| cpu.fpu.x87_image());
    // A page fault comes before the exceptions of the computation.
    operand.check_write(cpu, op)?;
    execute(cpu, op, bytes.as_mut_ptr(), special)?;
    let stored = operand.write(cpu, op, bytes);
    if stored.is_err() {
        cpu.fpu.set_mxcsr(mxcsr);
        if let Some(image) = x87 {
            cpu.fpu.set_x87_image(&image);
        }
    }
    stored
}

/// A memory operand that doesn't lie in one page of RAM is brought here.
#[repr(C, align(64))]
struct Bounce([u8; 64]);

/// Handlers by operand kinds.
macro_rules! shapes {
    ($kinds:expr, $thunk:expr; $(($k0:ident $k1:ident $k2:ident)),* $(,)?) => {
        match $kinds {
            $([$k0, $k1, $k2, NONE] => match ($thunk.arithmetic, $thunk.vex) {
                (false, false) => fast::<$k0, $k1, $k2, false, false>,
                (false, true) => fast::<$k0, $k1, $k2, false, true>,
                (true, false) => fast::<$k0, $k1, $k2, true, false>,
                (true, true) => fast::<$k0, $k1, $k2, true, true>,
            },)*
            _ => general,
        }
    };
}

fn handler(kinds: [u8; 4], thunk: &thunk::Thunk) -> Handler {
    // Fast handlers take a memory operand in the first place for one that is only written.
    let modified =
        kinds[0] == MEMORY && thunk.memory.read || kinds[0] != MEMORY && thunk.memory.write;
    if thunk.flags || thunk.x87 || modified {
        return general;
    }
    shapes!(kinds, thunk;
        (VECTOR NONE NONE),
        (VECTOR VECTOR NONE),
        (VECTOR MEMORY NONE),
        (MEMORY VECTOR NONE),
        (VECTOR GENERAL NONE),
        (GENERAL VECTOR NONE),
        (GENERAL MEMORY NONE),
        (VECTOR VECTOR VECTOR),
        (VECTOR VECTOR MEMORY),
        (VECTOR VECTOR GENERAL),
    )
}

fn memory_bits(memory: &MemoryUse) -> u32 {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    u32::from(memory.size)
        | bit(memory.read, aux::READ)
        | bit(memory.write, aux::WRITE)
        | bit(memory.aligned, aux::ALIGNED)
}

/// Fills registers and operand kinds.
fn fill(op: &mut Op, operands: &Operands) -> [u8; 4] {
    let mut kinds = [NONE; 4];
    let mut numbers = [0; 4];
    for (n, place) in operands.iter().enumerate() {
        (kinds[n], numbers[n]) = match place {
            Place::Vector(number) => (VECTOR, number),
            Place::General(number) => (GENERAL, number),
            Place::Memory => (MEMORY, 0),
        };
        op.aux |= u32::from(kinds[n]) << (aux::KINDS_SHIFT + 4 * n as u32);
    }
    [op.r0, op.r1, op.r2, op.extra] = numbers;
    kinds
}

/// SIMD instructions whose vector operand may be in memory, so that no register tells.
fn has_only_memory(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Emms
            | M::Cvtsd2si
            | M::Cvtss2si
            | M::Cvttsd2si
            | M::Cvttss2si
            | M::Vcvtsd2si
            | M::Vcvtss2si
            | M::Vcvttsd2si
            | M::Vcvttss2si
    )
}

/// Lowers everything that a thunk can do.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let registers = || (0..i.op_count()).map(|k| i.op_register(k));
    let is_simd =
        registers().any(|r| r.is_xmm() || r.is_ymm() || r.is_mm()) || has_only_memory(i.mnemonic());
    if !is_simd {
        return false;
    }
    let (Some(operands), Some(thunk)) = (thunk::operands(i), thunk::thunk(i)) else {
        return false;
    };
    let mut op = l.op();
    op.imm = thunk.code;
    op.aux = memory_bits(&thunk.memory);
    for (on, bit) in [
        (thunk.x87, aux::MMX),
        (!thunk.x87 || thunk.sse, aux::SSE),
        (thunk.vex, aux::VEX),
        (thunk.arithmetic, aux::ARITHMETIC),
        (thunk.flags, aux::FLAGS),
        (i.mnemonic() == Mnemonic::Vcvtps2ph, aux::HALF),
    ] {
        if on {
            op.aux |= bit;
        }
    }
    let kinds = fill(&mut op, &operands);
    if (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        l.mem(&mut op, i);
    }
    op.run = handler(kinds, &thunk);
    l.push(op);
    true
}
