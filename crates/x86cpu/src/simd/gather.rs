//! VGATHER and VPGATHER: elements come from addresses of their own, in order; a fault leaves the
//! elements before it done and their mask bits cleared (SDM 2C, VPGATHERDD).

use iced_x86::{Code, Instruction};

use crate::Cpu;
use crate::code::{Handler, Lowering, Op, op_flag};
use crate::cpu::reg;
use crate::fpu::{Ymm, blocked};
use crate::simd::operand::Operand;
use crate::trap::{Trap, TrapKind};

/// `INDEX` and `DATA` are the bytes of an index and of an element; `op.extra` says how many
/// elements; r0 is the destination, r1 the mask, r2 the indices.
fn gather<const INDEX: usize, const DATA: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.simd_blocked & blocked::AVX != 0 {
        return Err(cpu.avx_blocked());
    }
    let register = |cpu: &Cpu, n: u8| cpu.fpu.ymm[usize::from(n & 15)].0;
    let mut result = register(cpu, op.r0);
    let mut mask = register(cpu, op.r1);
    let indices = register(cpu, op.r2);
    let mut failed = Ok(());
    for element in 0..usize::from(op.extra) {
        let at = element * DATA..(element + 1) * DATA;
        let (Some(to), Some(bit)) = (result.get_mut(at.clone()), mask.get_mut(at)) else {
            break;
        };
        if bit.last().is_some_and(|b| b & 0x80 != 0) {
            let offset = element_offset::<INDEX>(cpu, op, &indices, element);
            let mut bytes = [0; DATA];
            let loaded = cpu
                .linear_at(op.seg, offset, DATA, false)
                .and_then(|linear| Operand { linear, size: DATA }.read(cpu, op, &mut bytes));
            if loaded.is_err() {
                failed = loaded;
                break;
            }
            to.copy_from_slice(&bytes);
        }
        bit.fill(0);
    }
    if failed.is_err() {
        // What waits for a device is run again from its start.
        if matches!(cpu.trap.kind, TrapKind::Fault { .. }) {
            cpu.fpu.ymm[usize::from(op.r0 & 15)] = Ymm(result);
            cpu.fpu.ymm[usize::from(op.r1 & 15)] = Ymm(mask);
        }
        return failed;
    }
    if let Some(rest) = result.get_mut(usize::from(op.extra) * DATA..) {
        rest.fill(0);
    }
    cpu.fpu.ymm[usize::from(op.r0 & 15)] = Ymm(result);
    cpu.fpu.ymm[usize::from(op.r1 & 15)] = Ymm([0; 32]);
    Ok(())
}

fn element_offset<const INDEX: usize>(
    cpu: &Cpu,
    op: &Op,
    indices: &[u8; 32],
    element: usize,
) -> u64 {
    let start = element * INDEX;
    let index = match INDEX {
        4 => {
            let bytes = indices.get(start..).and_then(|b| b.first_chunk());
            i64::from(i32::from_le_bytes(bytes.copied().unwrap_or_default()))
        }
        _ => {
            let bytes = indices.get(start..).and_then(|b| b.first_chunk());
            i64::from_le_bytes(bytes.copied().unwrap_or_default())
        }
    };
    let offset = op
        .offset(cpu)
        .wrapping_add((index << (op.scale & 3)) as u64);
    if op.has(op_flag::ADDR32) {
        offset & 0xffff_ffff
    } else {
        offset
    }
}

/// Lowers the gathers.
pub(super) fn lower(l: &mut Lowering<'_>, i: &Instruction) -> bool {
    use Code as C;
    let (run, count): (Handler, u8) = match i.code() {
        C::VEX_Vpgatherdd_xmm_vm32x_xmm | C::VEX_Vgatherdps_xmm_vm32x_xmm => (gather::<4, 4>, 4),
        C::VEX_Vpgatherdd_ymm_vm32y_ymm | C::VEX_Vgatherdps_ymm_vm32y_ymm => (gather::<4, 4>, 8),
        C::VEX_Vpgatherdq_xmm_vm32x_xmm | C::VEX_Vgatherdpd_xmm_vm32x_xmm => (gather::<4, 8>, 2),
        C::VEX_Vpgatherdq_ymm_vm32x_ymm | C::VEX_Vgatherdpd_ymm_vm32x_ymm => (gather::<4, 8>, 4),
        C::VEX_Vpgatherqd_xmm_vm64x_xmm | C::VEX_Vgatherqps_xmm_vm64x_xmm => (gather::<8, 4>, 2),
        C::VEX_Vpgatherqd_xmm_vm64y_xmm | C::VEX_Vgatherqps_xmm_vm64y_xmm => (gather::<8, 4>, 4),
        C::VEX_Vpgatherqq_xmm_vm64x_xmm | C::VEX_Vgatherqpd_xmm_vm64x_xmm => (gather::<8, 8>, 2),
        C::VEX_Vpgatherqq_ymm_vm64y_ymm | C::VEX_Vgatherqpd_ymm_vm64y_ymm => (gather::<8, 8>, 4),
        _ => return false,
    };
    let mut op = l.op();
    l.mem(&mut op, i);
    (op.run, op.extra) = (run, count);
    // The index isn't a general register.
    op.index = reg::ZERO;
    op.r0 = l.reg(i.op0_register());
    op.r1 = l.reg(i.op2_register());
    op.r2 = l.reg(i.memory_index());
    // Two of the three registers being one is undefined.
    if op.r0 == op.r1 || op.r0 == op.r2 || op.r1 == op.r2 {
        return false;
    }
    l.push(op);
    true
}
