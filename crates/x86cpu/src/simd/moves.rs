//! Moves between vector registers, memory and general registers.
#![expect(unsafe_code, reason = "reads and writes vectors in guest RAM")]

use std::arch::x86_64::{
    __m128i, _mm_load_si128, _mm_loadu_si128, _mm_setzero_si128, _mm_store_si128, _mm_storeu_si128,
};

use iced_x86::{Code, Instruction, OpKind};

use crate::Cpu;
use crate::code::{Handler, Lowering, Op};
use crate::fpu::blocked;
use crate::simd::operand::{operand, quick};
use crate::trap::Trap;

/// Loads the 16 bytes of the memory operand.
#[inline(always)]
fn load<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<__m128i, Trap> {
    match quick(cpu, op, 16, if ALIGNED { 16 } else { 1 }, false) {
        // SAFETY: the pointer is good for 16 bytes, says the TLB.
        Some(pointer) => Ok(unsafe { _mm_loadu_si128(pointer.cast()) }),
        None => load_slow::<ALIGNED>(cpu, op),
    }
}

#[cold]
#[inline(never)]
fn load_slow<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<__m128i, Trap> {
    let at = operand(cpu, op, 16, if ALIGNED { 16 } else { 1 }, false)?;
    let mut bytes = [0; 16];
    // Fills the TLB.
    if let Some(pointer) = at.host(cpu, op, false)? {
        // SAFETY: the pointer is good for 16 bytes, says `host_ptr`.
        return Ok(unsafe { _mm_loadu_si128(pointer.as_ptr().cast()) });
    }
    at.read(cpu, op, &mut bytes)?;
    // SAFETY: 16 bytes of a local variable.
    Ok(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// Stores 16 bytes to the memory operand.
#[inline(always)]
fn store<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op, value: __m128i) -> Result<(), Trap> {
    match quick(cpu, op, 16, if ALIGNED { 16 } else { 1 }, true) {
        // SAFETY: the pointer is good for 16 bytes, says the TLB.
        Some(pointer) => unsafe { _mm_storeu_si128(pointer.cast(), value) },
        None => return store_slow::<ALIGNED>(cpu, op, value),
    }
    Ok(())
}

#[cold]
#[inline(never)]
fn store_slow<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op, value: __m128i) -> Result<(), Trap> {
    let at = operand(cpu, op, 16, if ALIGNED { 16 } else { 1 }, true)?;
    if let Some(pointer) = at.host(cpu, op, true)? {
        // SAFETY: the pointer is good for 16 bytes, says `host_ptr`.
        unsafe { _mm_storeu_si128(pointer.as_ptr().cast(), value) };
        return Ok(());
    }
    let mut bytes = [0; 16];
    // SAFETY: 16 bytes of a local variable.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) };
    at.write(cpu, op, &bytes)
}

/// The low half of a register.
#[inline(always)]
fn vector(cpu: &Cpu, register: u8) -> __m128i {
    // SAFETY: a register is 32 bytes, aligned.
    unsafe { _mm_load_si128((&raw const cpu.fpu.ymm[usize::from(register & 15)]).cast()) }
}

/// Writes the low half; the VEX form clears the upper one.
#[inline(always)]
fn set_vector<const VEX: bool>(cpu: &mut Cpu, register: u8, value: __m128i) {
    let to: *mut __m128i = (&raw mut cpu.fpu.ymm[usize::from(register & 15)]).cast();
    // SAFETY: as above.
    unsafe {
        _mm_store_si128(to, value);
        if VEX {
            _mm_store_si128(to.add(1), _mm_setzero_si128());
        }
    }
}

#[inline(always)]
fn check<const VEX: bool>(cpu: &mut Cpu) -> Result<(), Trap> {
    let bit = if VEX { blocked::AVX } else { blocked::SSE };
    if cpu.simd_blocked & bit != 0 {
        return Err(if VEX {
            cpu.avx_blocked()
        } else {
            cpu.sse_blocked()
        });
    }
    Ok(())
}

/// Writes `value`; the VEX form clears the upper half.
#[inline(always)]
fn put<const VEX: bool>(cpu: &mut Cpu, register: u8, value: u128) {
    // In one store: the next instruction loads all of it.
    // SAFETY: the same 16 bytes.
    let value = unsafe { std::mem::transmute::<u128, __m128i>(value) };
    set_vector::<VEX>(cpu, register, value);
}

#[inline(always)]
fn low(cpu: &Cpu, register: u8) -> u128 {
    cpu.fpu.ymm[usize::from(register & 15)].low()
}

fn load128<const ALIGNED: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = load::<ALIGNED>(cpu, op)?;
    set_vector::<VEX>(cpu, op.r0, value);
    Ok(())
}

fn store128<const ALIGNED: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = vector(cpu, op.r1);
    store::<ALIGNED>(cpu, op, value)
}

fn copy128<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = vector(cpu, op.r1);
    set_vector::<VEX>(cpu, op.r0, value);
    Ok(())
}

/// MOVSS, MOVD from memory: the rest of the register is cleared.
fn load32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = cpu.load::<u32>(op)?;
    put::<VEX>(cpu, op.r0, u128::from(value));
    Ok(())
}

/// MOVSD, MOVQ from memory.
fn load64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = cpu.load::<u64>(op)?;
    put::<VEX>(cpu, op.r0, u128::from(value));
    Ok(())
}

fn store32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = low(cpu, op.r1) as u32;
    cpu.store::<u32>(op, value)
}

fn store64<const HIGH: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = low(cpu, op.r1) >> if HIGH { 64 } else { 0 };
    cpu.store::<u64>(op, value as u64)
}

/// MOVLPS, MOVHPS from memory: the other half stays.
fn load_half<const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<false>(cpu)?;
    let value = u128::from(cpu.load::<u64>(op)?);
    let shift = if HIGH { 64 } else { 0 };
    let kept = low(cpu, op.r0) & !(u128::from(u64::MAX) << shift);
    put::<false>(cpu, op.r0, kept | value << shift);
    Ok(())
}

/// MOVQ between vector registers.
fn copy64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = low(cpu, op.r1) as u64;
    put::<VEX>(cpu, op.r0, u128::from(value));
    Ok(())
}

fn from_general<const WIDE: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = cpu.gpr[usize::from(op.r1 & 15)];
    let value = if WIDE { value } else { value & 0xffff_ffff };
    put::<VEX>(cpu, op.r0, u128::from(value));
    Ok(())
}

fn to_general<const WIDE: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    let value = low(cpu, op.r1) as u64;
    cpu.gpr[usize::from(op.r0 & 15)] = if WIDE { value } else { value & 0xffff_ffff };
    Ok(())
}

/// PXOR and its kin with one register twice.
fn clear<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<VEX>(cpu)?;
    put::<VEX>(cpu, op.r0, 0);
    Ok(())
}

fn zero_upper(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<true>(cpu)?;
    for register in cpu.fpu.ymm.iter_mut().take(usize::from(op.extra)) {
        register.0[16..].fill(0);
    }
    Ok(())
}

fn zero_all(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check::<true>(cpu)?;
    for register in cpu.fpu.ymm.iter_mut().take(usize::from(op.extra)) {
        register.0.fill(0);
    }
    Ok(())
}

/// MOVNTI: usable whatever the state of the vector units.
fn store_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = cpu.gpr[usize::from(op.r1 & 15)];
    if WIDE {
        cpu.store::<u64>(op, value)
    } else {
        cpu.store::<u32>(op, value as u32)
    }
}

/// Picks the register, load or store handler of a move by its operands' kinds.
fn by_kind(i: &Instruction, copy: Handler, load: Handler, store: Handler) -> Handler {
    if i.op0_kind() == OpKind::Memory {
        store
    } else if i.op1_kind() == OpKind::Memory {
        load
    } else {
        copy
    }
}

#[rustfmt::skip]
fn handler(i: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match i.code() {
        C::Movaps_xmm_xmmm128 | C::Movaps_xmmm128_xmm | C::Movapd_xmm_xmmm128
        | C::Movapd_xmmm128_xmm | C::Movdqa_xmm_xmmm128 | C::Movdqa_xmmm128_xmm
        | C::Movntdqa_xmm_m128 | C::Movntdq_m128_xmm | C::Movntps_m128_xmm | C::Movntpd_m128_xmm => {
            by_kind(i, copy128::<false>, load128::<true, false>, store128::<true, false>)
        }
        C::Movups_xmm_xmmm128 | C::Movups_xmmm128_xmm | C::Movupd_xmm_xmmm128
        | C::Movupd_xmmm128_xmm | C::Movdqu_xmm_xmmm128 | C::Movdqu_xmmm128_xmm
        | C::Lddqu_xmm_m128 => {
            by_kind(i, copy128::<false>, load128::<false, false>, store128::<false, false>)
        }
        C::VEX_Vmovaps_xmm_xmmm128 | C::VEX_Vmovaps_xmmm128_xmm | C::VEX_Vmovapd_xmm_xmmm128
        | C::VEX_Vmovapd_xmmm128_xmm | C::VEX_Vmovdqa_xmm_xmmm128 | C::VEX_Vmovdqa_xmmm128_xmm
        | C::VEX_Vmovntdqa_xmm_m128 | C::VEX_Vmovntdq_m128_xmm | C::VEX_Vmovntps_m128_xmm
        | C::VEX_Vmovntpd_m128_xmm => {
            by_kind(i, copy128::<true>, load128::<true, true>, store128::<true, true>)
        }
        C::VEX_Vmovups_xmm_xmmm128 | C::VEX_Vmovups_xmmm128_xmm | C::VEX_Vmovupd_xmm_xmmm128
        | C::VEX_Vmovupd_xmmm128_xmm | C::VEX_Vmovdqu_xmm_xmmm128 | C::VEX_Vmovdqu_xmmm128_xmm
        | C::VEX_Vlddqu_xmm_m128 => {
            by_kind(i, copy128::<true>, load128::<false, true>, store128::<false, true>)
        }
        C::Movss_xmm_xmmm32 if i.op1_kind() == OpKind::Memory => load32::<false>,
        C::VEX_Vmovss_xmm_m32 => load32::<true>,
        C::Movss_xmmm32_xmm if i.op0_kind() == OpKind::Memory => store32::<false>,
        C::VEX_Vmovss_m32_xmm => store32::<true>,
        C::Movsd_xmm_xmmm64 if i.op1_kind() == OpKind::Memory => load64::<false>,
        C::VEX_Vmovsd_xmm_m64 => load64::<true>,
        C::Movsd_xmmm64_xmm if i.op0_kind() == OpKind::Memory => store64::<false, false>,
        C::VEX_Vmovsd_m64_xmm => store64::<false, true>,
        C::Movq_xmm_xmmm64 | C::Movq_xmmm64_xmm => {
            by_kind(i, copy64::<false>, load64::<false>, store64::<false, false>)
        }
        C::VEX_Vmovq_xmm_xmmm64 | C::VEX_Vmovq_xmmm64_xmm => {
            by_kind(i, copy64::<true>, load64::<true>, store64::<false, true>)
        }
        C::Movlps_m64_xmm | C::Movlpd_m64_xmm => store64::<false, false>,
        C::VEX_Vmovlps_m64_xmm | C::VEX_Vmovlpd_m64_xmm => store64::<false, true>,
        C::Movhps_m64_xmm | C::Movhpd_m64_xmm => store64::<true, false>,
        C::VEX_Vmovhps_m64_xmm | C::VEX_Vmovhpd_m64_xmm => store64::<true, true>,
        C::Movlpd_xmm_m64 => load_half::<false>,
        C::Movlps_xmm_m64 => load_half::<false>,
        C::Movhpd_xmm_m64 => load_half::<true>,
        C::Movhps_xmm_m64 => load_half::<true>,
        C::Movd_xmm_rm32 => by_kind(i, from_general::<false, false>, load32::<false>, store32::<false>),
        C::Movq_xmm_rm64 => by_kind(i, from_general::<true, false>, load64::<false>, store64::<false, false>),
        C::VEX_Vmovd_xmm_rm32 => by_kind(i, from_general::<false, true>, load32::<true>, store32::<true>),
        C::VEX_Vmovq_xmm_rm64 => by_kind(i, from_general::<true, true>, load64::<true>, store64::<false, true>),
        C::Movd_rm32_xmm => by_kind(i, to_general::<false, false>, load32::<false>, store32::<false>),
        C::Movq_rm64_xmm => by_kind(i, to_general::<true, false>, load64::<false>, store64::<false, false>),
        C::VEX_Vmovd_rm32_xmm => by_kind(i, to_general::<false, true>, load32::<true>, store32::<true>),
        C::VEX_Vmovq_rm64_xmm => by_kind(i, to_general::<true, true>, load64::<true>, store64::<false, true>),
        C::Movnti_m32_r32 => store_general::<false>,
        C::Movnti_m64_r64 => store_general::<true>,
        C::Pxor_xmm_xmmm128 | C::Xorps_xmm_xmmm128 | C::Xorpd_xmm_xmmm128
            if i.op1_kind() == OpKind::Register && i.op0_register() == i.op1_register() =>
        {
            clear::<false>
        }
        C::VEX_Vpxor_xmm_xmm_xmmm128 | C::VEX_Vxorps_xmm_xmm_xmmm128
        | C::VEX_Vxorpd_xmm_xmm_xmmm128 | C::VEX_Vpxor_ymm_ymm_ymmm256
            if i.op2_kind() == OpKind::Register && i.op1_register() == i.op2_register() =>
        {
            clear::<true>
        }
        C::VEX_Vzeroupper => zero_upper,
        C::VEX_Vzeroall => zero_all,
        _ => return None,
    })
}

/// Lowers the moves.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let Some(run) = handler(i) else {
        return false;
    };
    let mut op = l.op();
    for k in 0..i.op_count() {
        match (i.op_kind(k), k) {
            (OpKind::Memory, _) => l.mem(&mut op, i),
            (OpKind::Register, 0) => op.r0 = l.reg(i.op0_register()),
            (OpKind::Register, 1) => op.r1 = l.reg(i.op1_register()),
            _ => {}
        }
    }
    // How many registers VZEROUPPER and VZEROALL reach.
    op.extra = if l.mode.bits() == 64 { 16 } else { 8 };
    op.run = run;
    l.push(op);
    true
}
