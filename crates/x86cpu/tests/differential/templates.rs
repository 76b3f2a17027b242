//! Cases that need more than random operands: near branches, and instructions that save and restore
//! the vector state.

use iced_x86::{
    Code, Encoder, FlowControl, Instruction, MemoryOperand, OpCodeOperandKind as Kind, OpKind,
    Register,
};

use crate::forms::{BEFORE_BRANCH, ON_STACK};
use crate::generate::{Case, Generator, decode, to_rflags};
use crate::native::Native;
use crate::operands::{Style, target};
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

/// What compilers write at the edges of functions: pushes, pops and moves, or a comparison, and the
/// branch or return behind.
pub fn integer_run(random: &mut Random, generator: &mut Generator, codes: &[Code]) -> Option<Case> {
    let mut start = State::random(random);
    for n in 12..16 {
        start.gpr[n] = target(random, 8);
    }
    start.gpr[5] = target(random, 16);
    start.gpr[4] = target(random, 64);
    let ending = random.below(4);
    // What returns is to find its return address, not a mixture: where that leads is anyone's guess.
    let returns = ending == 1;
    let mut code = Vec::new();
    let add = |code: &mut Vec<u8>,
               form: Code,
               random: &mut Random,
               start: &mut State,
               g: &mut Generator| {
        let ip = CODE + code.len() as u64;
        let bytes = g.instruction(random, form, ip, Style::Sequence, start);
        let bytes = bytes.unwrap_or_default();
        // RSP stays in the data pages, and RBP if LEAVE follows.
        let moves_stack = decode(&bytes, ip).is_some_and(|i| {
            let to = i.op0_register().full_register();
            i.code() != Code::Push_r64 && (to == Register::RSP || returns && to == Register::RBP)
        });
        if !moves_stack {
            code.extend(bytes);
        }
    };
    for _ in 0..random.below(10) {
        let form = if returns {
            Code::Pop_r64
        } else {
            random.pick(&ON_STACK)
        };
        // Prefer runs.
        for _ in 0..1 + random.below(3) {
            add(&mut code, form, random, &mut start, generator);
        }
    }
    match ending {
        0 => {}
        1 => {
            let leave = random.one_in(2);
            if leave {
                add(&mut code, Code::Leaveq, random, &mut start, generator);
            }
            let goal = pad_after(code.len() + 1);
            code.extend(encode(&Instruction::with(Code::Retnq))?);
            if leave {
                start.poke(start.gpr[5].wrapping_add(8), &goal.to_le_bytes());
            } else {
                for n in 0..8 {
                    start.poke(start.gpr[4].wrapping_add(8 * n), &goal.to_le_bytes());
                }
            }
        }
        _ => {
            if random.one_in(4) {
                // mov r, m; test r, r or immediate
                let (load, register) = if random.one_in(2) {
                    (Code::Mov_r64_rm64, Register::RBX)
                } else {
                    (Code::Mov_r32_rm32, Register::EBX)
                };
                let immediate = random.pick(&[1, 0x80, -1, 0x7fff_ff00, 4]);
                let test = match random.below(5) {
                    0 => Instruction::with2(Code::Test_rm64_r64, Register::RBX, Register::RBX),
                    1 => Instruction::with2(Code::Test_rm32_r32, Register::EBX, Register::EBX),
                    2 => Instruction::with2(Code::Test_rm64_imm32, Register::RBX, immediate),
                    3 => Instruction::with2(Code::Test_rm32_imm32, Register::EBX, immediate),
                    _ => Instruction::with2(Code::Test_rm8_imm8, Register::BL, immediate & 0xff),
                };
                let memory = MemoryOperand::with_base(Register::R14);
                code.extend(encode(&Instruction::with2(load, register, memory).ok()?)?);
                code.extend(encode(&test.ok()?)?);
            } else {
                let form = random.pick(&BEFORE_BRANCH);
                add(&mut code, form, random, &mut start, generator);
            }
            let jumps = codes
                .iter()
                .copied()
                .filter(|code| code.is_jcc_short_or_near());
            let mut jump = random.pick(&jumps.collect::<Vec<_>>());
            if random.one_in(6) {
                add(&mut code, Code::Mov_r64_rm64, random, &mut start, generator);
                jump = Code::Call_rel32_64;
            }
            let mut i = Instruction::with_branch(jump, CODE + 16).ok()?;
            let goal = pad_after(code.len() + encode(&i)?.len());
            i.set_near_branch64(goal - code.len() as u64);
            code.extend(encode(&i)?);
        }
    }
    (!code.is_empty()).then(|| Case::of_several(code, start))
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
    /// A case of several instructions.
    fn of_several(code: Vec<u8>, start: State) -> Self {
        let mut case = Self::of(code, start);
        let Some(first) = case.instructions.first() else {
            return case;
        };
        let (mut at, mut undefined) = (first.len(), to_rflags(first.rflags_undefined()));
        case.undefined = vec![undefined];
        while let Some(i) = decode(&case.code[at..], CODE + at as u64) {
            undefined &= !to_rflags(i.rflags_modified());
            undefined |= to_rflags(i.rflags_undefined());
            case.undefined.push(undefined);
            case.instructions.push(i);
            at += i.len();
        }
        case
    }

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
