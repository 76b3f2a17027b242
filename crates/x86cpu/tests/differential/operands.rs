//! Operands: registers, immediates, addressing forms, and where memory operands should be.

use iced_x86::{Instruction, OpCodeOperandKind as Kind, OpKind, Register};

use crate::state::{DATA, DATA_LEN, DATA_WRITABLE, Random, State};

const GPR8: [Register; 20] = {
    use Register as R;
    [
        R::AL,
        R::CL,
        R::DL,
        R::BL,
        R::AH,
        R::CH,
        R::DH,
        R::BH,
        R::SPL,
        R::BPL,
        R::SIL,
        R::DIL,
        R::R8L,
        R::R9L,
        R::R10L,
        R::R11L,
        R::R12L,
        R::R13L,
        R::R14L,
        R::R15L,
    ]
};

fn nth(base: Register, n: u64) -> Register {
    base + n as u32
}

/// How freely registers are chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// One instruction: anything goes.
    Single,
    /// Part of a sequence: R12 to R15 are pointers, which nobody changes.
    Sequence,
}

/// An address for an operand of this size: mostly valid, sometimes across or beyond an edge.
pub fn target(random: &mut Random, size: u64) -> u64 {
    let edge = |page: u64, random: &mut Random| {
        DATA + 4096 * page - 1 - random.below(size.min(64)).min(4000)
    };
    let writable = DATA_WRITABLE as u64;
    match random.below(40) {
        0 | 1 => edge(1, random),
        2 => edge(2, random),
        3 => edge(3, random),
        4 => DATA + writable + random.below(4096),
        5 => DATA + DATA_LEN as u64 + random.below(4096),
        6 => DATA - random.below(64),
        7 => random.pick(&[0x8000_0000_0000, 0xffff_7fff_ffff_fff8, 1 << 63]),
        n => {
            let offset = random.below(writable - size.min(2048));
            let align = size.next_power_of_two().clamp(1, 64);
            DATA + if n & 1 != 0 {
                offset
            } else {
                offset & !(align - 1)
            }
        }
    }
}

/// Fills operand `k`; true if it is memory.
pub fn operand(random: &mut Random, i: &mut Instruction, k: u32, kind: Kind, style: Style) -> bool {
    let gpr_count = if style == Style::Single { 16 } else { 12 };
    let any16 = random.below(gpr_count);
    let vector = random.below(16);
    let small = random.below(8);
    let in_memory = random.one_in(2);
    let register = |i: &mut Instruction, r: Register| {
        i.set_op_kind(k, OpKind::Register);
        i.set_op_register(k, r);
        false
    };
    let memory = |i: &mut Instruction| {
        i.set_op_kind(k, OpKind::Memory);
        true
    };
    match kind {
        Kind::mem
        | Kind::mem_vsib32x
        | Kind::mem_vsib64x
        | Kind::mem_vsib32y
        | Kind::mem_vsib64y => {
            match kind {
                Kind::mem_vsib32x | Kind::mem_vsib64x => {
                    i.set_memory_index(nth(Register::XMM0, vector));
                }
                Kind::mem_vsib32y | Kind::mem_vsib64y => {
                    i.set_memory_index(nth(Register::YMM0, vector));
                }
                _ => {}
            }
            memory(i)
        }
        Kind::r8_or_mem
        | Kind::r16_or_mem
        | Kind::r32_or_mem
        | Kind::r64_or_mem
        | Kind::mm_or_mem
        | Kind::xmm_or_mem
        | Kind::ymm_or_mem
            if in_memory =>
        {
            memory(i)
        }
        Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => {
            let from = if style == Style::Single {
                &GPR8[..]
            } else {
                &GPR8[..8]
            };
            register(i, random.pick(from))
        }
        Kind::r16_or_mem | Kind::r16_reg | Kind::r16_reg_mem | Kind::r16_rm | Kind::r16_opcode => {
            register(i, nth(Register::AX, any16))
        }
        Kind::r32_or_mem
        | Kind::r32_reg
        | Kind::r32_reg_mem
        | Kind::r32_rm
        | Kind::r32_opcode
        | Kind::r32_vvvv => register(i, nth(Register::EAX, any16)),
        Kind::r64_or_mem
        | Kind::r64_reg
        | Kind::r64_reg_mem
        | Kind::r64_rm
        | Kind::r64_opcode
        | Kind::r64_vvvv => register(i, nth(Register::RAX, any16)),
        Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => register(i, nth(Register::MM0, small)),
        Kind::xmm_or_mem
        | Kind::xmm_reg
        | Kind::xmm_rm
        | Kind::xmm_vvvv
        | Kind::xmm_is4
        | Kind::xmm_is5 => register(i, nth(Register::XMM0, vector)),
        Kind::ymm_or_mem
        | Kind::ymm_reg
        | Kind::ymm_rm
        | Kind::ymm_vvvv
        | Kind::ymm_is4
        | Kind::ymm_is5 => register(i, nth(Register::YMM0, vector)),
        Kind::al => register(i, Register::AL),
        Kind::cl => register(i, Register::CL),
        Kind::ax => register(i, Register::AX),
        Kind::dx => register(i, Register::DX),
        Kind::eax => register(i, Register::EAX),
        Kind::rax => register(i, Register::RAX),
        Kind::st0 => register(i, Register::ST0),
        Kind::sti_opcode => register(i, nth(Register::ST0, small)),
        _ => {
            implicit_or_immediate(random, i, k, kind);
            false
        }
    }
}

fn implicit_or_immediate(random: &mut Random, i: &mut Instruction, k: u32, kind: Kind) {
    let value = random.integer();
    let long = !random.one_in(4);
    let either = |a, b| if long { a } else { b };
    let op_kind = match kind {
        Kind::imm8 | Kind::imm4_m2z => OpKind::Immediate8,
        Kind::imm8_const_1 => OpKind::Immediate8,
        Kind::imm8sex16 => OpKind::Immediate8to16,
        Kind::imm8sex32 => OpKind::Immediate8to32,
        Kind::imm8sex64 => OpKind::Immediate8to64,
        Kind::imm16 => OpKind::Immediate16,
        Kind::imm32 => OpKind::Immediate32,
        Kind::imm32sex64 => OpKind::Immediate32to64,
        Kind::imm64 => OpKind::Immediate64,
        Kind::seg_rSI => either(OpKind::MemorySegRSI, OpKind::MemorySegESI),
        Kind::es_rDI => either(OpKind::MemoryESRDI, OpKind::MemoryESEDI),
        Kind::seg_rDI => either(OpKind::MemorySegRDI, OpKind::MemorySegEDI),
        Kind::seg_rBX_al => {
            i.set_op_kind(k, OpKind::Memory);
            i.set_memory_base(either2(long, Register::RBX, Register::EBX));
            i.set_memory_index(Register::AL);
            return;
        }
        _ => return,
    };
    // Both operands of MOVS and CMPS have one address size.
    let op_kind = match (k, i.op0_kind()) {
        (1, OpKind::MemoryESRDI) if op_kind == OpKind::MemorySegESI => OpKind::MemorySegRSI,
        (1, OpKind::MemoryESEDI) if op_kind == OpKind::MemorySegRSI => OpKind::MemorySegESI,
        (1, OpKind::MemorySegRSI) if op_kind == OpKind::MemoryESEDI => OpKind::MemoryESRDI,
        (1, OpKind::MemorySegESI) if op_kind == OpKind::MemoryESRDI => OpKind::MemoryESEDI,
        _ => op_kind,
    };
    // ENTER has two immediates.
    let after_immediate =
        k > 0 && matches!(i.op_kind(k - 1), OpKind::Immediate16 | OpKind::Immediate8);
    let second = after_immediate && op_kind == OpKind::Immediate8;
    let op_kind = if second {
        OpKind::Immediate8_2nd
    } else {
        op_kind
    };
    i.set_op_kind(k, op_kind);
    match op_kind {
        OpKind::Immediate8 if kind == Kind::imm8_const_1 => i.set_immediate8(1),
        OpKind::Immediate8 if kind == Kind::imm4_m2z => i.set_immediate8(value as u8 & 3),
        OpKind::Immediate8 => i.set_immediate8(value as u8),
        OpKind::Immediate8_2nd => i.set_immediate8_2nd(value as u8 & 31),
        OpKind::Immediate8to16 => i.set_immediate8to16(i16::from(value as i8)),
        OpKind::Immediate8to32 => i.set_immediate8to32(i32::from(value as i8)),
        OpKind::Immediate8to64 => i.set_immediate8to64(i64::from(value as i8)),
        OpKind::Immediate16 => i.set_immediate16(value as u16),
        OpKind::Immediate32 => i.set_immediate32(value as u32),
        OpKind::Immediate32to64 => i.set_immediate32to64(i64::from(value as i32)),
        OpKind::Immediate64 => i.set_immediate64(value),
        _ => {}
    }
}

fn either2<T>(first: bool, a: T, b: T) -> T {
    if first { a } else { b }
}

/// Chooses an addressing form for the memory operand.
pub fn address(random: &mut Random, i: &mut Instruction, size: u64, style: Style, state: &State) {
    if i.memory_base() != Register::None {
        return;
    }
    if style == Style::Sequence {
        let n = 12 + random.below(4);
        i.set_memory_base(nth(Register::RAX, n));
        // Within 64 bytes: sometimes unaligned.
        let disp = random.below(64) & if random.one_in(3) { !0 } else { !31 };
        i.set_memory_displ_size(8);
        i.set_memory_displacement64(disp.wrapping_sub(state.gpr[n as usize] & 31 & disp));
        return;
    }
    let vsib = i.memory_index() != Register::None;
    let short = random.one_in(8);
    let any = |random: &mut Random| {
        nth(
            if short { Register::EAX } else { Register::RAX },
            random.below(16),
        )
    };
    if random.one_in(10) {
        i.set_segment_prefix(random.pick(&[Register::FS, Register::GS]));
    }
    if vsib {
        i.set_memory_base(any(random));
        i.set_memory_index_scale(1 << random.below(4));
        i.set_memory_displ_size(1);
        i.set_memory_displacement64(random.below(64));
        return;
    }
    let form = random.below(8);
    if form < 6 {
        i.set_memory_base(any(random));
        if form >= 3 {
            let index = any(random);
            if index.full_register() != Register::RSP {
                i.set_memory_index(index);
                i.set_memory_index_scale(1 << random.below(4));
            }
        }
        match random.below(3) {
            0 => {}
            1 => {
                i.set_memory_displ_size(1);
                i.set_memory_displacement64(i64::from(random.bits() as i8) as u64);
            }
            _ => {
                i.set_memory_displ_size(if short { 4 } else { 8 });
                let disp = i64::from(random.bits() as i32 >> random.below(20)) as u64;
                i.set_memory_displacement64(if short { disp & 0xffff_ffff } else { disp });
            }
        }
        return;
    }
    let segment = match i.segment_prefix() {
        Register::FS => state.fs_base,
        Register::GS => state.gs_base,
        _ => 0,
    };
    let goal = target(random, size.max(1)).wrapping_sub(segment) & 0x7fff_ffff;
    if form == 6 {
        i.set_memory_base(if short { Register::EIP } else { Register::RIP });
        i.set_memory_displ_size(if short { 4 } else { 8 });
    } else {
        i.set_memory_displ_size(if short { 4 } else { 8 });
        if random.one_in(2) {
            i.set_memory_index(nth(Register::RAX, random.pick(&[0, 1, 2, 3, 5, 9, 12])));
            i.set_memory_index_scale(1 << random.below(4));
            i.set_memory_displ_size(8);
        }
    }
    i.set_memory_displacement64(goal);
}
