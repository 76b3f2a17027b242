//! Moves to or from memory that touch only the elements that a mask selects. With AVX the others
//! can't fault.

use iced_x86::{Code, Instruction, OpKind};

use crate::Cpu;
use crate::code::{Handler, Lowering, Op, op_flag};
use crate::fpu::{attention, blocked, prepare_x87};
use crate::simd::operand::{Operand, operand};
use crate::trap::Trap;

/// Element `n`: its offset is cut to the address size like that of an operand of its own.
fn element(cpu: &Cpu, op: &Op, whole: Operand, n: usize, size: usize) -> Operand {
    let mut element = whole.element(n, size);
    if op.has(op_flag::ADDR32) {
        let base = whole.linear.wrapping_sub(op.offset(cpu));
        let offset = element.linear.wrapping_sub(base) & 0xffff_ffff;
        element.linear = base.wrapping_add(offset);
    }
    element
}

/// Stores the elements of `SIZE` bytes whose top mask bit is set. All of them can be stored before
/// any is.
fn store_selected<const SIZE: usize>(
    cpu: &mut Cpu,
    op: &Op,
    at: Operand,
    data: &[u8],
    mask: &[u8],
) -> Result<(), Trap> {
    let selected = |n: usize| mask.get(n * SIZE + SIZE - 1).is_some_and(|b| b & 0x80 != 0);
    let count = data.len() / SIZE;
    for check_only in [true, false] {
        for n in (0..count).filter(|&n| selected(n)) {
            let element = element(cpu, op, at, n, SIZE);
            if check_only {
                element.check_write(cpu, op)?;
            } else {
                let bytes = data.get(n * SIZE..(n + 1) * SIZE).unwrap_or(&[]);
                element.write(cpu, op, bytes)?;
            }
        }
    }
    Ok(())
}

/// VMASKMOVPS and its kin, loading: r0 destination, r1 mask; `op.extra` bytes in all.
fn load<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_avx(cpu)?;
    let len = usize::from(op.extra);
    let mask = cpu.fpu.ymm[usize::from(op.r1 & 15)].0;
    let whole = operand(cpu, op, len, 1, false)?;
    let mut result = [0; 32];
    for n in 0..len / SIZE {
        let at = n * SIZE..(n + 1) * SIZE;
        let selected = mask.get(at.end - 1).is_some_and(|b| b & 0x80 != 0);
        if let (true, Some(to)) = (selected, result.get_mut(at)) {
            element(cpu, op, whole, n, SIZE).read(cpu, op, to)?;
        }
    }
    cpu.fpu.ymm[usize::from(op.r0 & 15)].0 = result;
    Ok(())
}

/// The same, storing: r1 mask, r2 data.
fn store<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_avx(cpu)?;
    let len = usize::from(op.extra);
    let mask = cpu.fpu.ymm[usize::from(op.r1 & 15)].0;
    let data = cpu.fpu.ymm[usize::from(op.r2 & 15)].0;
    let at = operand(cpu, op, len, 1, true)?;
    let (data, mask) = (
        data.get(..len).unwrap_or(&[]),
        mask.get(..len).unwrap_or(&[]),
    );
    store_selected::<SIZE>(cpu, op, at, data, mask)
}

fn check_avx(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::AVX != 0 {
        return Err(cpu.avx_blocked());
    }
    Ok(())
}

/// MASKMOVDQU: r1 data, r2 mask, at RDI (`base`).
fn bytes128<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if VEX {
        check_avx(cpu)?;
    } else if cpu.simd_blocked & blocked::SSE != 0 {
        return Err(cpu.sse_blocked());
    }
    let data = cpu.fpu.ymm[usize::from(op.r1 & 15)].low().to_le_bytes();
    let mask = cpu.fpu.ymm[usize::from(op.r2 & 15)].low().to_le_bytes();
    let at = operand(cpu, op, 16, 1, true)?;
    // The whole operand must be writable, whatever the mask says.
    at.check_write(cpu, op)?;
    store_selected::<1>(cpu, op, at, &data, &mask)
}

/// MASKMOVQ: the same with MMX registers; like all MMX instructions it leaves the tags valid and
/// TOP 0.
fn bytes64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::X87 != 0 {
        return Err(cpu.mmx_blocked());
    }
    if cpu.fpu.attention & (attention::X87_IDLE | attention::X87_UNMASKED) != 0 {
        prepare_x87(cpu)?;
    }
    let data = cpu.fpu.mmx(op.r1);
    let mask = cpu.fpu.mmx(op.r2);
    let at = operand(cpu, op, 8, 1, true)?;
    // These registers have become MMX registers even if the store faults.
    cpu.fpu.enter_mmx();
    at.check_write(cpu, op)?;
    store_selected::<1>(cpu, op, at, &data, &mask)
}

/// Lowers the masked moves.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    lower_implicit(l, i) || lower_explicit(l, i)
}

fn lower_implicit(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    let run: Handler = match i.code() {
        Code::Maskmovdqu_rDI_xmm_xmm => bytes128::<false>,
        Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => bytes128::<true>,
        Code::Maskmovq_rDI_mm_mm => bytes64,
        _ => return false,
    };
    let mut op = l.op();
    let source = i.memory_segment();
    let mut explicit = *i;
    // As if it were [RDI], [EDI] or [DI].
    let base = match i.op0_kind() {
        OpKind::MemorySegDI => iced_x86::Register::DI,
        OpKind::MemorySegEDI => iced_x86::Register::EDI,
        _ => iced_x86::Register::RDI,
    };
    explicit.set_op0_kind(OpKind::Memory);
    explicit.set_segment_prefix(source);
    explicit.set_memory_base(base);
    l.mem(&mut op, &explicit);
    op.r1 = l.reg(i.op1_register());
    op.r2 = l.reg(i.op2_register());
    op.run = run;
    l.push(op);
    true
}

fn lower_explicit(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Code as C;
    let (run, len): (Handler, u8) = match i.code() {
        C::VEX_Vmaskmovps_xmm_xmm_m128 | C::VEX_Vpmaskmovd_xmm_xmm_m128 => (load::<4>, 16),
        C::VEX_Vmaskmovps_ymm_ymm_m256 | C::VEX_Vpmaskmovd_ymm_ymm_m256 => (load::<4>, 32),
        C::VEX_Vmaskmovpd_xmm_xmm_m128 | C::VEX_Vpmaskmovq_xmm_xmm_m128 => (load::<8>, 16),
        C::VEX_Vmaskmovpd_ymm_ymm_m256 | C::VEX_Vpmaskmovq_ymm_ymm_m256 => (load::<8>, 32),
        C::VEX_Vmaskmovps_m128_xmm_xmm | C::VEX_Vpmaskmovd_m128_xmm_xmm => (store::<4>, 16),
        C::VEX_Vmaskmovps_m256_ymm_ymm | C::VEX_Vpmaskmovd_m256_ymm_ymm => (store::<4>, 32),
        C::VEX_Vmaskmovpd_m128_xmm_xmm | C::VEX_Vpmaskmovq_m128_xmm_xmm => (store::<8>, 16),
        C::VEX_Vmaskmovpd_m256_ymm_ymm | C::VEX_Vpmaskmovq_m256_ymm_ymm => (store::<8>, 32),
        _ => return false,
    };
    let mut op = l.op();
    l.mem(&mut op, i);
    for k in 0..3 {
        if i.op_kind(k) == OpKind::Register {
            let number = l.reg(i.op_register(k));
            match k {
                0 => op.r0 = number,
                1 => op.r1 = number,
                _ => op.r2 = number,
            }
        }
    }
    op.extra = len;
    op.run = run;
    l.push(op);
    true
}
