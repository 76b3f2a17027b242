//! Cases that need more than random operands: near branches, and instructions that save and restore
//! the vector state.

use iced_x86::{
    Code, Encoder, FlowControl, Instruction, MemoryOperand, OpCodeOperandKind as Kind, OpKind,
    Register,
};

use crate::generate::{Case, decode};
use crate::native::Native;
use crate::operands::target;
use crate::state::{CODE, DATA, DATA_LEN, DATA_WRITABLE, Random, State, XSAVE_LEN, random_xsave};

/// The near branches of 64-bit mode.
pub fn branches() -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let near = matches!(
                code.flow_control(),
                FlowControl::ConditionalBranch
                    | FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Call
                    | FlowControl::IndirectCall
                    | FlowControl::Return
            );
            let kinds = (0..info.op_count()).all(|k| {
                matches!(
                    info.op_kind(k),
                    Kind::br64_1 | Kind::br64_4 | Kind::r64_or_mem | Kind::imm16
                )
            });
            let name = format!("{code:?}");
            let odd = [
                "Retf", "Retnw", "Retnd", "Jmpe", "Jk", "VEX", "Skinit", "Vmrun",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix));
            let narrow = name.contains("_16") || name.contains("Sysexit");
            // What has no operand and isn't RET enters a system of some kind.
            let plain = info.op_count() > 0 || *code == Code::Retnq;
            info.is_instruction() && info.mode64() && near && kinds && plain && !odd && !narrow
        })
        .collect()
}

fn encode(i: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(i, CODE).ok()?;
    Some(encoder.take_buffer())
}

/// Where a branch goes if it goes: the second landing pad.
fn pad_after(len: usize) -> u64 {
    CODE + len as u64 + Native::landing_pad(0).len() as u64
}

/// One near branch.
pub fn branch(random: &mut Random, codes: &[Code]) -> Option<Case> {
    let code = random.pick(codes);
    let info = code.op_code();
    let mut start = State::random(random);
    start.gpr[4] = target(random, 8);
    if random.one_in(2) {
        start.gpr[1] = random.below(3) | random.pick(&[0, 1 << 32]);
    }
    let mut i = Instruction::default();
    i.set_code(code);
    let base = random.pick(&[0u64, 3, 5, 6, 11, 13]) as u32;
    for k in 0..info.op_count() {
        match info.op_kind(k) {
            Kind::imm16 => {
                i.set_op_kind(k, OpKind::Immediate16);
                i.set_immediate16(random.below(64) as u16);
            }
            Kind::r64_or_mem if random.one_in(2) => {
                i.set_op_kind(k, OpKind::Memory);
                i.set_memory_base(Register::RAX + base);
                start.gpr[base as usize] = target(random, 8);
            }
            Kind::r64_or_mem => {
                i.set_op_kind(k, OpKind::Register);
                i.set_op_register(k, Register::RAX + base);
            }
            _ => {
                i.set_op_kind(k, OpKind::NearBranch64);
                i.set_near_branch64(CODE + 16);
            }
        }
    }
    let goal = pad_after(encode(&i)?.len());
    if i.op0_kind() == OpKind::NearBranch64 {
        i.set_near_branch64(goal);
    }
    let goal = if random.one_in(16) {
        0x1234_5678_9abc
    } else {
        goal
    };
    match i.op0_kind() {
        OpKind::Register => start.gpr[base as usize] = goal,
        OpKind::Memory => start.poke(start.gpr[base as usize], &goal.to_le_bytes()),
        _ => {}
    }
    if code.flow_control() == FlowControl::Return {
        start.poke(start.gpr[4], &goal.to_le_bytes());
    }
    Some(Case::of(encode(&i)?, start))
}

const SAVES: [Code; 7] = [
    Code::Fxsave_m512byte,
    Code::Fxsave64_m512byte,
    Code::Xsave_mem,
    Code::Xsave64_mem,
    Code::Xsaveopt64_mem,
    Code::Xsavec_mem,
    Code::Xsavec64_mem,
];
const RESTORES: [Code; 4] = [
    Code::Fxrstor_m512byte,
    Code::Fxrstor64_m512byte,
    Code::Xrstor_mem,
    Code::Xrstor64_mem,
];

/// One instruction that saves or restores the state, with a fitting image. The host enables more
/// components than the guest has, so only those of the guest are asked for.
pub fn save_restore(random: &mut Random) -> Option<Case> {
    let save = random.one_in(2);
    let code = if save {
        random.pick(&SAVES)
    } else {
        random.pick(&RESTORES)
    };
    let mut start = State::random(random);
    let requested = if random.one_in(2) { 7 } else { random.below(8) };
    start.gpr[0] = requested | random.bits() << 32;
    start.gpr[2] = random.bits() << 32;
    let mut at = DATA + 64 * random.below((DATA_WRITABLE - XSAVE_LEN) as u64 / 64);
    match random.below(24) {
        0 => at += 8 * random.below(8),
        // The header is beyond the edge: whether more than it is touched depends on the processor.
        1 => at = DATA + DATA_LEN as u64 - 64 * random.below(9),
        2 => at = DATA + DATA_WRITABLE as u64 - 64 * random.below(9),
        _ => {}
    }
    start.gpr[7] = at;
    let mut image = random_xsave(random);
    image[512..576].fill(0);
    if !save || random.one_in(2) {
        let present = random.below(8);
        image[512] = present as u8;
        if random.one_in(2) && (!save || matches!(code, Code::Xsavec_mem | Code::Xsavec64_mem)) {
            image[520] = (present | random.below(8)) as u8;
            image[527] = 0x80;
        }
        if random.one_in(16) {
            image[512 + random.below(24) as usize] ^= 1 << random.below(8);
            // Neither the host's own components nor bytes that not all processors check.
            image[512] &= 0x1f;
            image[520] &= 0x1f;
            image[513..516].fill(0);
        }
        if random.one_in(16) {
            image[24 + random.below(4) as usize] ^= 1 << random.below(8);
            // The host may have misaligned-SSE mode.
            image[26] &= !2;
        }
        start.poke(at, &image);
    }
    let memory = MemoryOperand::with_base(Register::RDI);
    let i = Instruction::with1(code, memory).ok()?;
    let mut case = Case::of(encode(&i)?, start);
    if save {
        let offset = at.wrapping_sub(DATA).min(DATA_LEN as u64) as usize;
        let range =
            |from: usize, to: usize| (offset + from).min(DATA_LEN)..(offset + to).min(DATA_LEN);
        // Opcode and pointers, which the host has of its own; the mask of its MXCSR.
        case.ignored.push(range(6, 24));
        case.ignored.push(range(28, 32));
    }
    Some(case)
}

impl Case {
    /// A case of one instruction.
    fn of(code: Vec<u8>, start: State) -> Self {
        let instructions = decode(&code, CODE).into_iter().collect();
        Self {
            code,
            instructions,
            start,
            undefined: vec![0],
            ignored: Vec::new(),
        }
    }
}

impl State {
    /// Writes to the data pages, as far as the bytes lie there.
    fn poke(&mut self, address: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let offset = address.wrapping_add(n as u64).wrapping_sub(DATA);
            if let Some(slot) = self.data.get_mut(offset as usize) {
                *slot = *byte;
            }
        }
    }
}
