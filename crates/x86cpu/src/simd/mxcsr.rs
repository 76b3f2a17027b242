//! Arithmetic when the guest's MXCSR isn't the default: rounding, flush-to-zero, denormals as zero,
//! and unmasked exceptions.
//!
//! An unmasked exception must not fire on the host, so the instruction runs with all of them masked;
//! its flags then tell what would have been raised (SDM 1 §11.5.2 and 11.5.3):
//! pre-computation exceptions (IE, DE, ZE) come alone, and no result is stored in either case. One
//! thing differs between masked and unmasked: underflow is flagged for exact tiny results only when
//! unmasked, so the results are looked at.
#![expect(unsafe_code, reason = "calls thunks and sets MXCSR around them")]

use std::arch::asm;

use super::run::{Pointers, is_half, is_mmx, memory_size, pointers};
use crate::Cpu;
use crate::code::Op;
use crate::fpu::{MXCSR_DEFAULT, MXCSR_FLAGS, X87_LEN, Ymm};
use crate::sys::state::cr4;
use crate::trap::{Trap, vector};

const INVALID_DENORMAL_ZERO: u32 = 7;
const UNDERFLOW: u32 = 1 << 4;
const MASKS: u32 = 0x1f80;
const MASKS_SHIFT: u32 = 7;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// Calls the op's thunk under the guest's MXCSR with `memory` as its memory operand (a copy if it is
/// written); returns what the thunk returns.
#[cold]
pub(super) fn call_guarded(cpu: &mut Cpu, op: &Op, memory: *mut u8) -> Result<u64, Trap> {
    let guest = cpu.fpu.mxcsr();
    let unmasked = !(guest >> MASKS_SHIFT) & MXCSR_FLAGS;
    let control = (guest | MASKS) & !MXCSR_FLAGS;
    let before = Before::of(cpu);
    let mut tiny = 0;
    let mut flush = control & FLUSH_TO_ZERO;
    if unmasked & UNDERFLOW != 0 {
        // Flushing flags every tiny result; but results are flushed only while underflow is masked.
        tiny = run(cpu, op, memory, control | FLUSH_TO_ZERO).1 & UNDERFLOW;
        before.restore(cpu);
        flush = 0;
    }
    let (result, raised) = run(cpu, op, memory, control & !FLUSH_TO_ZERO | flush);
    if is_half(op) && unmasked & UNDERFLOW != 0 && has_denormal_half(cpu, op, memory) {
        // These are never flushed.
        tiny = UNDERFLOW;
    }
    let raised = raised | tiny;
    if raised & unmasked == 0 {
        cpu.fpu.set_mxcsr(guest | raised);
        return Ok(result);
    }
    before.restore(cpu);
    if is_mmx(op) {
        // The x87 registers have become MMX registers all the same.
        cpu.fpu.enter_mmx();
    }
    let precomputation = raised & INVALID_DENORMAL_ZERO;
    let reported = if precomputation & unmasked != 0 {
        precomputation
    } else {
        raised
    };
    cpu.fpu.set_mxcsr(guest | reported);
    if cpu.sys.cr4 & cr4::OSXMMEXCPT == 0 {
        return Err(cpu.ud());
    }
    Err(cpu.fault_plain(vector::XM))
}

/// Whether a result of VCVTPS2PH is denormal.
fn has_denormal_half(cpu: &Cpu, op: &Op, memory: *const u8) -> bool {
    let mut bytes = [0; 16];
    if memory.is_null() {
        bytes = cpu.fpu.ymm[usize::from(op.r0 & 15)].low().to_le_bytes();
    } else {
        let size = memory_size(op).min(16);
        // SAFETY: what the thunk has just written: the caller's copy of the memory operand.
        unsafe { memory.copy_to_nonoverlapping(bytes.as_mut_ptr(), size) };
    }
    bytes.chunks_exact(2).any(|half| {
        let half = u16::from_le_bytes([half[0], half[1]]);
        half & 0x7c00 == 0 && half & 0x3ff != 0
    })
}

fn run(cpu: &mut Cpu, op: &Op, memory: *mut u8, control: u32) -> (u64, u32) {
    let processor: *mut Cpu = cpu;
    // SAFETY: the processor is borrowed for the call; `memory` is good for the operand.
    unsafe { call_with(op.imm, pointers(processor, op, memory), control) }
}

/// What an instruction may change before it turns out to fault.
struct Before {
    ymm: [Ymm; 16],
    gpr: [u64; 32],
    x87: Option<[u8; X87_LEN]>,
}

impl Before {
    fn of(cpu: &mut Cpu) -> Self {
        Self {
            ymm: cpu.fpu.ymm,
            gpr: cpu.gpr,
            x87: cpu.fpu.is_live().then(|| cpu.fpu.x87_image()),
        }
    }

    fn restore(&self, cpu: &mut Cpu) {
        cpu.fpu.ymm = self.ymm;
        cpu.gpr = self.gpr;
        if let Some(image) = &self.x87 {
            cpu.fpu.set_x87_image(image);
            cpu.fpu.make_live();
        }
    }
}

/// Calls a thunk with this MXCSR (all exceptions masked); returns its result and the flags raised.
///
/// # Safety
/// As for [`super::run::call`].
unsafe fn call_with(code: u64, p: Pointers, control: u32) -> (u64, u32) {
    let mut mxcsr = control;
    let normal = MXCSR_DEFAULT;
    let result: u64;
    // SAFETY: as for `run::call`; what a function may change under this calling convention is
    // declared, and MXCSR is back at the default at the end.
    unsafe {
        asm!(
            "ldmxcsr [r12]",
            "call r13",
            "stmxcsr [r12]",
            "ldmxcsr [r14]",
            // Registers that the callee keeps.
            in("r12") &raw mut mxcsr,
            in("r13") code,
            in("r14") &raw const normal,
            inlateout("rdi") p[0] => _,
            inlateout("rsi") p[1] => _,
            inlateout("rdx") p[2] => _,
            inlateout("rcx") p[3] => _,
            lateout("rax") result,
            clobber_abi("sysv64"),
        );
    }
    (result, mxcsr & MXCSR_FLAGS)
}
