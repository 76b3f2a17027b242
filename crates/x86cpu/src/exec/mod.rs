//! Integer instructions that any program may use: what they compute and how they are decoded.
//!
//! Each family has a module with its handlers, generic over operand size, and a `lower` that turns
//! a decoded instruction into an op with the right handler.

use iced_x86::{ConditionCode, Instruction, OpKind, Register};

use crate::code::{Family, Op, op_flag};

mod alu;
mod atomic;
mod bits;
mod branch;
mod bulk;
mod fused;
mod misc;
mod mov;
mod muldiv;
mod operand;
mod shift;
mod stack;
mod string;
#[cfg(test)]
mod tests;

pub(crate) use fused::fuse;

/// What adds the ops of an integer instruction, by family: each says whether it is one of its own.
pub(crate) const FAMILIES: [Family; 10] = [
    mov::lower,
    alu::lower,
    branch::lower,
    stack::lower,
    shift::lower,
    bits::lower,
    muldiv::lower,
    atomic::lower,
    string::lower,
    misc::lower,
];

/// Bytes of operand `n`: its register's, or the memory operand's.
fn operand_size(i: &Instruction, n: u32) -> usize {
    if n >= i.op_count() {
        return 0;
    }
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

fn is_gpr(register: Register) -> bool {
    register.is_gpr()
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Immediate operand `n`, truncated to `size` bytes.
fn immediate(i: &Instruction, n: u32, size: usize) -> u64 {
    let mask = match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    i.immediate(n) & mask
}

/// The low four bits of a Jcc, SETcc or CMOVcc opcode.
fn condition_code(i: &Instruction) -> Option<u8> {
    let cc = match i.condition_code() {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    };
    Some(cc)
}

fn is_cmov(code: iced_x86::Code) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

fn is_setcc(code: iced_x86::Code) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

/// The bits of an address or count register that the op's address size uses.
#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    if op.has(op_flag::ADDR16) {
        0xffff
    } else if op.has(op_flag::ADDR32) {
        0xffff_ffff
    } else {
        u64::MAX
    }
}

/// Bytes of a string instruction's element.
fn string_element(i: &Instruction) -> Option<usize> {
    let size = i.memory_size().size();
    matches!(size, 1 | 2 | 4 | 8).then_some(size)
}

/// The address-size flag of LOOP and JCXZ, which have no memory operand to tell.
fn count_width(i: &Instruction) -> u8 {
    use iced_x86::Code as C;
    match i.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => op_flag::ADDR16,
        C::Loop_rel8_64_RCX
        | C::Loop_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Jrcxz_rel8_64
        | C::Jrcxz_rel8_16 => 0,
        _ => op_flag::ADDR32,
    }
}
