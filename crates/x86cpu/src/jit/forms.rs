//! What is known of an instruction's form: what doesn't depend on which registers, constants and
//! addresses its operands are. It is found out once.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedRegister,
};

use super::classify::{Align, Class, alignment, classify, writes_memory, writes_register};
use super::encoding::{Field, field};
use crate::cpuid::Features;

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub class: Class,
    /// Bytes of its memory operand.
    pub size: u8,
    pub align: Align,
    /// The memory operand is written.
    pub write: bool,
    /// Where in the encoding its operands in general registers are.
    pub fields: [Option<Field>; 4],
    /// Which of them the instruction writes, as it is copied.
    pub writes: u8,
    /// RCX has to hold the guest's, though no operand names it.
    pub count: bool,
    /// Which of its operands in general registers may become others, and which general registers
    /// besides, whatever the operands.
    changes: u8,
    implicit: u16,
}

impl Form {
    /// `None` if the interpreter is to run instructions of this form.
    fn new(
        i: &Instruction,
        features: &Features,
        factory: &mut InstructionInfoFactory,
    ) -> Option<Self> {
        let class = classify(i).filter(|_| features.has_all(i.cpuid_features()))?;
        let size = i.memory_size().size().max(1);
        let mut form = Self {
            class,
            size: u8::try_from(size).unwrap_or(1),
            align: alignment(i, class, size),
            write: writes_memory(i, class),
            fields: [None; 4],
            writes: 0,
            count: matches!(i.mnemonic(), Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b),
            changes: 0,
            implicit: 0,
        };
        let copied = !matches!(
            class,
            Class::Nothing | Class::Strings | Class::Push | Class::Pop | Class::Leave
        ) && !matches!(class, Class::Divide { .. });
        let code = i.op_code();
        for n in registers(i) {
            let register = i.op_register(n);
            let odd = register.is_segment_register() || register.is_cr() || register.is_dr();
            if copied && (odd || n > 3) {
                return None;
            }
            if register.is_gpr() {
                let field = field(code.op_kind(n));
                if copied && field.is_none() {
                    return None;
                }
                form.fields[n as usize & 3] = field;
                form.writes |= u8::from(writes_register(i, n as u8)) << (n & 3);
            }
        }
        form.see_changes(i, factory);
        Some(form)
    }

    /// Finds out what becomes of registers, by an instruction of this form with operands that can be
    /// told from what it uses besides.
    fn see_changes(&mut self, i: &Instruction, factory: &mut InstructionInfoFactory) {
        let mut plain = *i;
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register if self.is_free(i, n) => {
                    plain.set_op_register(n, stranger(i.op_register(n), n));
                }
                OpKind::Memory => {
                    plain.set_memory_base(Register::None);
                    plain.set_memory_index(Register::None);
                }
                // A count of zero changes nothing.
                OpKind::Immediate8 => plain.set_immediate8(1),
                _ => {}
            }
        }
        let info = factory.info(&plain);
        for n in 0..i.op_count() {
            if self.is_free(i, n) && is_write(info.op_access(n)) {
                self.changes |= 1 << (n & 3);
            }
        }
        self.implicit = written(info.used_registers()) & 0xff;
    }

    /// Whether an operand is in a general register of the instruction's choice.
    fn is_free(&self, i: &Instruction, n: u32) -> bool {
        i.op_kind(n) == OpKind::Register
            && i.op_register(n).is_gpr()
            && !matches!(self.fields[n as usize & 3], None | Some(Field::Fixed))
    }

    /// The general registers that an instruction of this form may change, as bits.
    pub(super) fn changed(&self, i: &Instruction) -> u16 {
        let mut changed = self.implicit;
        let mut operands = self.changes;
        while operands != 0 {
            let n = operands.trailing_zeros();
            operands &= operands - 1;
            changed |= bit(i.op_register(n));
        }
        changed
    }
}

/// The operands that are registers.
fn registers(i: &Instruction) -> impl Iterator<Item = u32> {
    (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register)
}

/// A register of the same size that no instruction uses if it isn't an operand.
fn stranger(register: Register, n: u32) -> Register {
    let first = match register.size() {
        1 => Register::R8L,
        2 => Register::R8W,
        4 => Register::R8D,
        _ => Register::R8,
    };
    first + (n & 3)
}

fn is_write(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// General registers that are written, as bits.
fn written(used: &[UsedRegister]) -> u16 {
    used.iter()
        .filter(|used| is_write(used.access()) && used.register().is_gpr())
        .fold(0, |bits, used| bits | bit(used.register()))
}

fn bit(register: Register) -> u16 {
    1 << (register.full_register().number() & 15)
}

/// The forms that have been met.
pub(super) struct Forms {
    features: Features,
    /// By code, with a register or with a memory operand: number plus two in `known`, or
    numbers: Box<[[u16; 2]]>,
    known: Vec<Form>,
    factory: InstructionInfoFactory,
}

/// it hasn't been met yet, or is none that is copied.
const UNKNOWN: u16 = 0;
const REFUSED: u16 = 1;

impl Forms {
    pub(super) fn new(features: Features) -> Self {
        Self {
            features,
            numbers: vec![[UNKNOWN; 2]; Code::values().len()].into_boxed_slice(),
            known: Vec::new(),
            factory: InstructionInfoFactory::new(),
        }
    }

    /// Of the processor that runs them.
    pub(super) fn features(&self) -> &Features {
        &self.features
    }

    /// The form of an instruction; `None` if the interpreter is to run it.
    pub(super) fn of(&mut self, i: &Instruction, memory: bool) -> Option<Form> {
        let number = self
            .numbers
            .get_mut(i.code() as usize)?
            .get_mut(usize::from(memory))?;
        if *number == UNKNOWN {
            *number = match Form::new(i, &self.features, &mut self.factory) {
                Some(form) => {
                    self.known.push(form);
                    u16::try_from(self.known.len() + 1).unwrap_or(REFUSED)
                }
                None => REFUSED,
            };
        }
        self.known
            .get(usize::from(*number).wrapping_sub(2))
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    /// Whatever was met first of a form, what is known of it holds for the others.
    #[test]
    fn a_form_tells_of_all_its_instructions() {
        let mut state = 1u64;
        let mut random = || {
            // Numbers that look random (xorshift64).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let features = Features::all();
        let mut forms = Forms::new(features);
        let mut factory = InstructionInfoFactory::new();
        let mut copied = 0;
        for _ in 0..2_000_000 {
            let mut bytes = [random().to_le_bytes(), random().to_le_bytes()].concat();
            if bytes[15] & 1 != 0 {
                // Else most have opcodes of one byte.
                let starts = [0x0f, 0x48, 0xc5, 0xc4, 0x66, 0xf2, 0xf3, 0x83];
                bytes[0] = starts[usize::from(bytes[14] & 7)];
            }
            let i = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            if i.is_invalid() {
                continue;
            }
            let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
            let class = classify(&i).filter(|_| features.has_all(i.cpuid_features()));
            let Some(form) = forms.of(&i, memory) else {
                continue;
            };
            copied += 1;
            assert_eq!(Some(form.class), class, "{i}");
            if class == Some(Class::Strings) {
                // With a prefix they are others; all is forgotten after them.
                continue;
            }
            let size = i.memory_size().size().max(1);
            assert_eq!(usize::from(form.size), size.min(255), "{i}");
            assert_eq!(form.align, alignment(&i, form.class, size), "{i}");
            assert_eq!(form.write, writes_memory(&i, form.class), "{i}");
            for n in registers(&i).filter(|&n| i.op_register(n).is_gpr()) {
                let writes = form.writes >> n & 1 != 0;
                assert_eq!(writes, writes_register(&i, n as u8), "{i}");
            }
            let written = written(factory.info(&i).used_registers());
            let missing = written & !form.changed(&i);
            assert_eq!(missing, 0, "{i}: {written:x}");
        }
        assert!(copied > 100_000, "{copied}");
    }
}
