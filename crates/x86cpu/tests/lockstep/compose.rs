//! Random programs: blocks of random instructions, and all ways to get from one to the other.

mod flow;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use crate::forms::ON_STACK;
use crate::generate::{Generator, decode, differs};
use crate::operands::Style;
use crate::program::{
    Behind, END, Element, Item, LOCAL, Label, Program, Setting, undefined_after, undefined_at_joins,
};
use crate::state::{CODE, DATA, Random, State};
use crate::world::{CODE_SPACE, END_PORT, FUEL, STACK_LEN, STACK_SPACE};

use Register as R;

/// Composes programs.
pub struct Composer {
    generator: Generator,
    integers: Vec<Code>,
    conditions: Vec<Code>,
}

/// A program on its way.
struct Draft<'a> {
    composer: &'a mut Composer,
    random: &'a mut Random,
    program: Program,
    undefined: u64,
    locals: Label,
    sites: Label,
    mains: u64,
    subs: u64,
    /// The block in hand.
    block: u64,
}

/// Labels of places whose code is changed.
const SITES: Label = 500;

impl Composer {
    pub fn new(generator: Generator) -> Self {
        let integers = generator
            .families
            .iter()
            .find(|family| family.0 == "integer")
            .map(|family| family.1.clone())
            .unwrap_or_default();
        let conditions = Code::values()
            .filter(|code| code.is_jcc_near() && format!("{code:?}").ends_with("rel32_64"))
            .collect();
        Self {
            generator,
            integers,
            conditions,
        }
    }

    /// A program; of those that can be laid out.
    pub fn program(&mut self, random: &mut Random) -> Option<Program> {
        let mut start = State::random(random);
        for n in 12..16 {
            start.gpr[n] = pointer(random);
        }
        let setting = Setting {
            user: random.one_in(2),
            writable_code: random.one_in(3),
            behind: random.pick(&[Behind::Nothing, Behind::Ram, Behind::Device]),
            loose_af: random.one_in(2),
            offset: match random.below(3) {
                0 => 0,
                1 => 4096 - random.below(300),
                _ => random.below(4096),
            },
            fuel: random.pick(&[5, 40, 200, 1500]),
        };
        let mains = 2 + random.below(8);
        let subs = 1 + random.below(3);
        let any = |random: &mut Random| 1 + random.below(mains) as Label;
        let undefined = undefined_at_joins(&setting);
        let program = Program {
            elements: Vec::new(),
            start,
            setting,
            recovery: std::array::from_fn(|_| any(random)),
            jumps: std::array::from_fn(|_| any(random)),
            calls: std::array::from_fn(|_| (1 + mains + random.below(subs)) as Label),
            stack: STACK_SPACE + STACK_LEN - 8 * random.below(600),
        };
        let mut draft = Draft {
            composer: self,
            random,
            program,
            undefined,
            locals: LOCAL,
            sites: SITES,
            mains,
            subs,
            block: 0,
        };
        draft.compose();
        Some(draft.program)
    }
}

/// Where a pointer register points: mostly well within, sometimes near an edge.
fn pointer(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => DATA + 4096 * (1 + random.below(3)) - random.below(96),
        1 => STACK_SPACE + random.below(STACK_LEN - 128),
        _ => DATA + 64 * random.below(126),
    }
}

fn with2(code: Code, a: Register, b: Register) -> Option<Instruction> {
    Instruction::with2(code, a, b).ok()
}

fn at(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(R::RIP, address as i64, 8)
}

impl Draft<'_> {
    fn compose(&mut self) {
        let blocks = self.mains + self.subs;
        for block in 1..=blocks {
            self.block = block;
            self.label(block as Label);
            for _ in 0..self.random.below(14) {
                self.piece();
            }
            if block > self.mains {
                self.leave_sub();
            } else {
                self.terminator();
            }
            if block == self.mains {
                self.define();
                self.branch(Code::Jmp_rel32_64, END);
            }
        }
        self.label(END);
        let halts = !self.program.setting.user && self.random.one_in(2);
        if halts {
            self.keep(Item::Bytes(vec![0xf4]));
        }
        self.keep(Item::Bytes(vec![0xe6, END_PORT]));
    }

    fn push(&mut self, item: Item) {
        self.program.elements.push(Element { item, keep: false });
    }

    fn keep(&mut self, item: Item) {
        self.program.elements.push(Element { item, keep: true });
    }

    fn label(&mut self, label: Label) {
        self.define();
        self.keep(Item::Label(label));
        self.undefined = undefined_at_joins(&self.program.setting);
    }

    fn local(&mut self) -> Label {
        self.locals += 1;
        self.locals
    }

    /// Adds code if it reads no undefined flag.
    fn add(&mut self, bytes: &[u8]) -> bool {
        let Some(i) = decode(bytes, CODE) else {
            return false;
        };
        let Some(undefined) = undefined_after(self.undefined, &i) else {
            return false;
        };
        self.undefined = undefined;
        // As it is, but for what depends on its place.
        if i.is_ip_rel_memory_operand() {
            self.push(Item::Instruction(i));
        } else {
            self.push(Item::Bytes(bytes.to_vec()));
        }
        true
    }

    fn instruction(&mut self, i: Option<Instruction>) -> bool {
        let Some(i) = i else {
            return false;
        };
        let mut encoder = Encoder::new(64);
        if encoder.encode(&i, CODE).is_err() {
            return false;
        }
        self.add(&encoder.take_buffer())
    }

    /// The same, and not to be left out.
    fn fixed(&mut self, i: Option<Instruction>) {
        if self.instruction(i)
            && let Some(element) = self.program.elements.last_mut()
        {
            element.keep = true;
        }
    }

    fn branch(&mut self, code: Code, to: Label) {
        let short = self.random.one_in(2);
        self.keep(Item::Branch { code, to, short });
    }

    /// Makes all flags defined.
    fn define(&mut self) {
        if self.undefined & !undefined_at_joins(&self.program.setting) == 0 {
            return;
        }
        let (a, b) = (self.register(), self.register());
        let code = self
            .random
            .pick(&[Code::Cmp_rm64_r64, Code::Cmp_r32_rm32, Code::Add_rm32_r32]);
        let narrow = code != Code::Cmp_rm64_r64;
        let of = |r: Register| {
            if narrow {
                r - R::RAX as u32 + R::EAX as u32
            } else {
                r
            }
        };
        let i = with2(code, of(a), of(b));
        self.instruction(i);
    }

    /// One of those that aren't pointers.
    fn register(&mut self) -> Register {
        self.random.pick(&[
            R::RAX,
            R::RCX,
            R::RDX,
            R::RBX,
            R::RBP,
            R::RSI,
            R::RDI,
            R::R8,
            R::R9,
            R::R10,
            R::R11,
        ])
    }

    fn any_block(&mut self) -> Label {
        1 + self.random.below(self.mains) as Label
    }

    /// Code, a few instructions at most.
    fn piece(&mut self) {
        match self.random.below(100) {
            0..30 => {
                let form = self.random.pick(&self.composer.integers);
                self.among_others(form);
            }
            30..45 => {
                if let Some((_, form)) = self.composer.generator.pick_code(self.random) {
                    self.among_others(form);
                }
            }
            45..57 => {
                let form = self.random.pick(&self.composer.integers);
                self.anywhere(form);
            }
            57..63 => {
                if let Some((_, form)) = self.composer.generator.pick_code(self.random) {
                    self.anywhere(form);
                }
            }
            63..72 => self.on_stack(),
            72..78 => self.same_base(),
            78..82 => self.flags_about(),
            82..87 => self.change_code(),
            87..89 => self.system(),
            89..93 => self.set_pointer(),
            93..95 => self.frame(),
            95..97 => self.skip(),
            _ => self.save_restore(),
        }
    }

    /// An instruction that leaves the pointers alone and accesses memory through them.
    fn among_others(&mut self, form: Code) {
        for _ in 0..4 {
            let bytes = self.composer.generator.instruction(
                self.random,
                form,
                CODE,
                Style::Sequence,
                &mut self.program.start,
            );
            let Some(bytes) = bytes else { continue };
            let Some(i) = decode(&bytes, CODE) else {
                continue;
            };
            if self.composer.generator.fits_sequence(&i) && self.add(&bytes) {
                return;
            }
        }
    }

    /// Any instruction, with any addressing form, its registers set for it before.
    fn anywhere(&mut self, form: Code) {
        let mut state = self.program.start.clone();
        let generator = &mut self.composer.generator;
        let bytes = generator.instruction(self.random, form, CODE, Style::Single, &mut state);
        let Some(bytes) = bytes else { return };
        let Some(i) = decode(&bytes, CODE) else {
            return;
        };
        if !generator.usable.contains(&i.code()) || differs(&i) || undefined_result(&i) {
            return;
        }
        if undefined_after(self.undefined, &i).is_none() {
            return;
        }
        let before = state.gpr;
        generator.place(self.random, &i, &mut state);
        for (n, (after, before)) in state.gpr.iter().zip(before).enumerate() {
            if *after != before {
                self.move_value(R::RAX + n as u32, *after);
            }
        }
        if i.is_vsib() {
            let index = i.memory_index();
            let (code, shift) = match (index.is_xmm(), i.is_vsib64()) {
                (true, false) => (Code::VEX_Vpsrld_xmm_xmm_imm8, 24),
                (true, true) => (Code::VEX_Vpsrlq_xmm_xmm_imm8, 56),
                (false, false) => (Code::VEX_Vpsrld_ymm_ymm_imm8, 24),
                (false, true) => (Code::VEX_Vpsrlq_ymm_ymm_imm8, 56),
            };
            self.instruction(Instruction::with3(code, index, index, shift).ok());
        }
        self.add(&bytes);
        if self.random.one_in(2) && i.is_stack_instruction() {
            self.set_stack();
        }
    }

    fn move_value(&mut self, register: Register, value: u64) {
        let i = if i64::from(value as i32) as u64 == value && self.random.one_in(2) {
            Instruction::with2(Code::Mov_rm64_imm32, register, value as i32).ok()
        } else {
            Instruction::with2(Code::Mov_r64_imm64, register, value).ok()
        };
        self.instruction(i);
    }

    fn set_stack(&mut self) {
        let value = match self.random.below(10) {
            0 => STACK_SPACE + self.random.below(64),
            1 => STACK_SPACE + 4096 - 4 + self.random.below(9),
            2 => STACK_SPACE + STACK_LEN,
            _ => STACK_SPACE + STACK_LEN - 8 * self.random.below(500),
        };
        self.move_value(R::RSP, value);
    }

    fn set_pointer(&mut self) {
        if self.random.one_in(3) {
            self.set_stack();
            return;
        }
        let register = R::R12 + self.random.below(4) as u32;
        let value = pointer(self.random);
        self.move_value(register, value);
    }

    /// Pushes and pops, and moves about them.
    fn on_stack(&mut self) {
        for _ in 0..1 + self.random.below(5) {
            let r = self.register();
            let word = R::AX + (r as u32 - R::RAX as u32);
            let i = match self.random.below(12) {
                0..4 => Instruction::with1(Code::Push_r64, r),
                4..7 => Instruction::with1(Code::Pop_r64, r),
                7 => Instruction::with1(Code::Pushq_imm32, self.random.bits() as i32),
                8 => Instruction::with1(Code::Push_r16, word),
                9 => Instruction::with1(Code::Pop_r16, word),
                10 => {
                    Instruction::with1(Code::Push_rm64, MemoryOperand::with_base_displ(R::R14, 8))
                }
                _ => {
                    let form = self.random.pick(&ON_STACK);
                    self.among_others(form);
                    continue;
                }
            };
            self.instruction(i.ok());
        }
    }

    /// A frame, as compilers make them, with accesses in it.
    fn frame(&mut self) {
        self.instruction(Instruction::with1(Code::Push_r64, R::RBP).ok());
        self.instruction(with2(Code::Mov_rm64_r64, R::RBP, R::RSP));
        self.instruction(Instruction::with2(Code::Sub_rm64_imm8, R::RSP, 0x40).ok());
        for _ in 0..self.random.below(6) {
            let r = self.register();
            if r == R::RBP {
                continue;
            }
            let base = self.random.pick(&[R::RBP, R::RSP]);
            let offset = self.random.below(0x40) as i64;
            let offset = if base == R::RBP { -offset } else { offset };
            let memory = MemoryOperand::with_base_displ(base, offset);
            let i = if self.random.one_in(2) {
                Instruction::with2(Code::Mov_rm64_r64, memory, r)
            } else {
                Instruction::with2(Code::Add_r64_rm64, r, memory)
            };
            self.instruction(i.ok());
        }
        self.instruction(Some(Instruction::with(Code::Leaveq)));
    }

    /// Several accesses near one pointer, of which it may change.
    fn same_base(&mut self) {
        let base = R::R12 + self.random.below(4) as u32;
        for _ in 0..2 + self.random.below(5) {
            let offset = self.random.below(4) as i64 * 8 + self.random.pick(&[0, 0, 0, 1, 4, -8]);
            let memory = MemoryOperand::with_base_displ(base, offset);
            let r = self.register();
            let n = r as u32 - R::RAX as u32;
            let i = match self.random.below(9) {
                0 => Instruction::with2(Code::Mov_r64_rm64, r, memory),
                1 => Instruction::with2(Code::Mov_rm64_r64, memory, r),
                2 => Instruction::with2(Code::Mov_rm32_r32, memory, R::EAX + n),
                3 => Instruction::with2(Code::Movzx_r32_rm8, R::EAX + n, memory),
                4 => Instruction::with2(Code::Mov_rm16_r16, memory, R::AX + n),
                5 => Instruction::with2(Code::Add_rm64_r64, memory, r),
                6 => Instruction::with2(Code::Mov_rm8_r8, memory, R::AH),
                7 => Instruction::with2(Code::Lea_r64_m, base, memory),
                _ => Instruction::with2(Code::Cmp_rm8_imm8, memory, 0x40),
            };
            self.instruction(i.ok());
        }
    }

    /// Flags on their way through registers and the stack.
    fn flags_about(&mut self) {
        match self.random.below(5) {
            0 => {
                self.instruction(Some(Instruction::with(Code::Lahf)));
                self.instruction(with2(Code::Xchg_rm8_r8, R::AH, R::BL));
            }
            1 => {
                self.instruction(Some(Instruction::with(Code::Sahf)));
            }
            2 => {
                // RFLAGS without what makes steps, checks or tasks.
                let flags = self.random.bits() as i32 & 0xcd5 | 0x3202;
                self.instruction(Instruction::with1(Code::Pushq_imm32, flags).ok());
                self.instruction(Some(Instruction::with(Code::Popfq)));
            }
            3 => {
                if self.instruction(Some(Instruction::with(Code::Pushfq))) {
                    let r = self.register();
                    self.instruction(Instruction::with1(Code::Pop_r64, r).ok());
                }
            }
            _ => {
                let code = self.random.pick(&[
                    Code::Cld,
                    Code::Stc,
                    Code::Clc,
                    Code::Cmc,
                    Code::Std,
                    Code::Cld,
                ]);
                self.instruction(Some(Instruction::with(code)));
            }
        }
    }

    /// A store into code further on or before, and the code that it changes.
    fn change_code(&mut self) {
        if self.sites + 1 >= LOCAL {
            return;
        }
        self.define();
        let site = if self.sites > SITES && self.random.one_in(2) {
            SITES + 1 + self.random.below((self.sites - SITES) as u64) as Label
        } else {
            self.sites + 1
        };
        let alias = !self.program.setting.writable_code || self.random.one_in(2);
        let memory = MemoryOperand::with_base_displ_size(R::RIP, 0, 8);
        let whole = (site - SITES).is_multiple_of(2);
        let (offset, i) = if whole {
            // Another opcode with the same operands.
            let opcode = self.random.pick(&[0x01, 0x29, 0x31, 0x11, 0x89, 0x85]);
            (0, Instruction::with2(Code::Mov_rm8_imm8, memory, opcode))
        } else {
            let r = self.register();
            let n = r as u32 - R::RAX as u32;
            match self.random.below(3) {
                0 => (
                    1,
                    Instruction::with2(Code::Mov_rm32_r32, memory, R::EAX + n),
                ),
                1 => (1, Instruction::with2(Code::Add_rm8_imm8, memory, 1)),
                _ => (2, Instruction::with2(Code::Mov_rm8_r8, memory, R::CH)),
            }
        };
        let Ok(instruction) = i else { return };
        let Some(undefined) = undefined_after(self.undefined, &instruction) else {
            return;
        };
        self.undefined = undefined;
        self.push(Item::Patch {
            instruction,
            label: site,
            offset,
            alias,
        });
        if site != self.sites + 1 {
            return;
        }
        for _ in 0..self.random.below(3) {
            let form = self.random.pick(&self.composer.integers);
            self.among_others(form);
        }
        self.sites += 1;
        self.label(site);
        if whole {
            // ADD ECX, EDX; then all flags defined, whatever it has become.
            self.keep(Item::Bytes(vec![0x01, 0xd1]));
            self.fixed(with2(Code::Cmp_rm32_r32, R::ECX, R::EDX));
        } else {
            // ADD EAX, immediate.
            self.keep(Item::Bytes(vec![0x05, 1, 2, 3, 4]));
        }
    }

    /// What only the interpreter has, what leaves the processor, and what faults for certain.
    fn system(&mut self) {
        let kernel = !self.program.setting.user;
        match self.random.below(if kernel { 12 } else { 8 }) {
            0 => self.add(&[0xe6, 0x80]),
            1 => self.add(&[0xec]),
            2 => self.add(&[0x0f, 0x0b]),
            3 => {
                self.define();
                let vector = 0x20 + self.random.below(8) as u8;
                self.add(&[0xcd, vector])
            }
            4 => {
                self.define();
                self.add(&[0xcc])
            }
            5 => {
                let i = Instruction::with1(Code::Rdfsbase_r64, R::RSI);
                self.instruction(i.ok())
            }
            6 => {
                let value = DATA + self.random.below(4096);
                self.move_value(R::RDX, value);
                let code =
                    self.random
                        .pick(&[Code::Wrfsbase_r64, Code::Wrgsbase_r64, Code::Wrfsbase_r32]);
                let r = if code == Code::Wrfsbase_r32 {
                    R::EDX
                } else {
                    R::RDX
                };
                self.instruction(Instruction::with1(code, r).ok())
            }
            // CPUID
            7 => self.add(&[0x0f, 0xa2]),
            // CR3 as it is: other translations, the same memory.
            8 => self.add(&[0x0f, 0x20, 0xd8]) && self.add(&[0x0f, 0x22, 0xd8]),
            9 => {
                let i = Instruction::with1(Code::Invlpg_m, at(FUEL));
                self.instruction(i.ok())
            }
            10 => {
                let i = Instruction::with1(
                    Code::Invlpg_m,
                    MemoryOperand::with_base(R::R12 + self.random.below(4) as u32),
                );
                self.instruction(i.ok())
            }
            // CLTS
            _ => self.add(&[0x0f, 0x06]),
        };
    }

    /// A short branch over something.
    fn skip(&mut self) {
        self.define();
        let over = self.local();
        let code = self.random.pick(&self.composer.conditions);
        if !self.condition_fits(code) {
            return;
        }
        self.keep(Item::Branch {
            code,
            to: over,
            short: true,
        });
        for _ in 0..self.random.below(3) {
            let form = self.random.pick(&self.composer.integers);
            self.among_others(form);
        }
        self.define();
        self.keep(Item::Label(over));
        self.undefined = undefined_at_joins(&self.program.setting);
    }

    fn condition_fits(&self, code: Code) -> bool {
        Instruction::with_branch(code, CODE)
            .is_ok_and(|i| undefined_after(self.undefined, &i).is_some())
    }

    /// FXSAVE or XSAVE, and perhaps back.
    fn save_restore(&mut self) {
        let area = STACK_SPACE + 64 * self.random.below(30);
        self.move_value(R::RDI, area);
        self.move_value(R::RAX, 7);
        self.move_value(R::RDX, 0);
        let memory = || MemoryOperand::with_base(R::RDI);
        let (save, restore) = self.random.pick(&[
            (Code::Fxsave64_m512byte, Code::Fxrstor64_m512byte),
            (Code::Xsave64_mem, Code::Xrstor64_mem),
            (Code::Xsavec64_mem, Code::Xrstor64_mem),
            (Code::Fnstenv_m28byte, Code::Fldenv_m28byte),
        ]);
        if save == Code::Xsavec64_mem || save == Code::Xsave64_mem {
            // A header that is one.
            for offset in (512..576).step_by(8) {
                let memory = MemoryOperand::with_base_displ(R::RDI, offset);
                self.instruction(Instruction::with2(Code::Mov_rm64_imm32, memory, 0).ok());
            }
        }
        self.instruction(Instruction::with1(save, memory()).ok());
        if self.random.one_in(2) {
            for _ in 0..self.random.below(4) {
                if let Some((_, form)) = self.composer.generator.pick_code(self.random) {
                    self.among_others(form);
                }
            }
            self.move_value(R::RDI, area);
            self.move_value(R::RAX, 7);
            self.move_value(R::RDX, 0);
            self.instruction(Instruction::with1(restore, memory()).ok());
        }
    }
}

/// Whether what an instruction computes may be anything.
fn undefined_result(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && (i.op0_kind() == OpKind::Memory && i.memory_size().size() == 2
            || i.op1_register().is_gpr16())
        || matches!(
            i.mnemonic(),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
        )
}

const _: () = assert!(CODE_SPACE == CODE);
