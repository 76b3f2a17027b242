//! A guest instruction taken apart, so that it can be put together again with other registers and
//! another memory operand.

use iced_x86::{Instruction, OpCodeOperandKind, OpKind, Register};

use super::asm::{Asm, Rm};

/// What of an encoding stays as it is, and where its operands go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoding {
    /// Legacy prefixes but for segments, in their order.
    prefixes: [u8; 4],
    prefix_count: u8,
    rex: Option<u8>,
    vex: Option<Vex>,
    opcode: [u8; 3],
    opcode_len: u8,
    /// The byte itself, if there is one.
    modrm: Option<u8>,
    immediate: [u8; 8],
    immediate_len: u8,
}

/// The payload of a VEX prefix, as in its three-byte form and not inverted.
#[derive(Clone, Copy, Debug)]
struct Vex {
    map: u8,
    w: bool,
    vvvv: u8,
    l: bool,
    pp: u8,
    r: bool,
    xb: u8,
}

/// Which field of the encoding holds a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Reg,
    Rm,
    Vvvv,
    /// The low bits of the opcode.
    Opcode,
    /// None: the instruction has it by itself.
    Fixed,
}

/// An operand in a general register.
#[derive(Clone, Copy, Debug)]
pub(super) struct General {
    pub field: Field,
    /// Number of the guest's register; of AH to BH that of RAX to RBX.
    pub number: u8,
    /// AH, CH, DH or BH.
    pub high: bool,
    /// Bytes.
    pub size: u8,
    /// Which operand it is.
    pub operand: u8,
}

/// The field of an operand, by its kind in the manual's terms.
pub(super) fn field(kind: OpCodeOperandKind) -> Option<Field> {
    use OpCodeOperandKind as K;
    Some(match kind {
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::r16_rm
        | K::r32_rm
        | K::r64_rm => Field::Rm,
        K::r8_reg
        | K::r16_reg
        | K::r16_reg_mem
        | K::r32_reg
        | K::r32_reg_mem
        | K::r64_reg
        | K::r64_reg_mem => Field::Reg,
        K::r32_vvvv | K::r64_vvvv => Field::Vvvv,
        K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => Field::Opcode,
        K::al | K::cl | K::ax | K::dx | K::eax | K::rax => Field::Fixed,
        _ => return None,
    })
}

/// The general registers that are operands of an instruction; `None` if some operand is of a kind
/// that isn't known.
pub(super) fn generals(i: &Instruction) -> Option<([Option<General>; 4], usize)> {
    let mut found = [None; 4];
    let mut count = 0;
    let code = i.op_code();
    for n in 0..i.op_count().min(4) {
        if i.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = i.op_register(n);
        if !register.is_gpr() {
            if register.is_segment_register() || register.is_cr() || register.is_dr() {
                return None;
            }
            continue;
        }
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        found[count] = Some(General {
            field: field(code.op_kind(n))?,
            number: register.full_register().number() as u8,
            high,
            size: register.size() as u8,
            operand: n as u8,
        });
        count += 1;
    }
    Some((found, count))
}

impl Encoding {
    /// Takes the encoding of `i` apart. `None` if it has a form that isn't known here.
    pub(super) fn new(bytes: &[u8], i: &Instruction) -> Option<Self> {
        let mut e = Self {
            prefixes: [0; 4],
            prefix_count: 0,
            rex: None,
            vex: None,
            opcode: [0; 3],
            opcode_len: 0,
            modrm: None,
            immediate: [0; 8],
            immediate_len: 0,
        };
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x67 => return None,
                prefix @ (0x66 | 0xf0 | 0xf2 | 0xf3) => {
                    *e.prefixes.get_mut(usize::from(e.prefix_count))? = prefix;
                    e.prefix_count += 1;
                }
                _ => break,
            }
            at += 1;
        }
        if let rex @ 0x40..=0x4f = *bytes.get(at)? {
            e.rex = Some(rex);
            at += 1;
        }
        at = match *bytes.get(at)? {
            0xc4 | 0xc5 => e.read_vex(bytes, at)?,
            _ => e.read_opcode(bytes, at)?,
        };
        let has_modrm = e
            .vex
            .is_some_and(|vex| !(vex.map == 1 && e.opcode[0] == 0x77))
            || e.vex.is_none() && legacy_has_modrm(&e.opcode[..usize::from(e.opcode_len)]);
        if has_modrm {
            at = e.read_modrm(bytes, at)?;
        }
        let tail = bytes.get(at..i.len())?;
        e.immediate.get_mut(..tail.len())?.copy_from_slice(tail);
        e.immediate_len = tail.len() as u8;
        Some(e)
    }

    /// ModRM, and past what belongs to it.
    fn read_modrm(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let modrm = *bytes.get(at)?;
        self.modrm = Some(modrm);
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let mut end = at + 1;
        if mode == 3 {
            return Some(end);
        }
        let mut base = rm;
        if rm == 4 {
            base = *bytes.get(end)? & 7;
            end += 1;
        }
        Some(match mode {
            1 => end + 1,
            2 => end + 4,
            _ if base == 5 => end + 4,
            _ => end,
        })
    }

    fn read_vex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let two = *bytes.get(at)? == 0xc5;
        let first = *bytes.get(at + 1)?;
        let second = if two {
            first & 0x7f
        } else {
            *bytes.get(at + 2)?
        };
        self.vex = Some(Vex {
            map: if two { 1 } else { first & 31 },
            w: second & 0x80 != 0,
            vvvv: !(second >> 3) & 15,
            l: second & 4 != 0,
            pp: second & 3,
            r: first & 0x80 == 0,
            xb: if two { 0 } else { !(first >> 5) & 3 },
        });
        let at = at + if two { 2 } else { 3 };
        self.opcode[0] = *bytes.get(at)?;
        self.opcode_len = 1;
        Some(at + 1)
    }

    fn read_opcode(&mut self, bytes: &[u8], mut at: usize) -> Option<usize> {
        let first = *bytes.get(at)?;
        let len = match (first, bytes.get(at + 1)) {
            (0x0f, Some(0x38 | 0x3a)) => 3,
            (0x0f, Some(_)) => 2,
            _ => 1,
        };
        for n in 0..len {
            self.opcode[n] = *bytes.get(at)?;
            at += 1;
        }
        self.opcode_len = len as u8;
        Some(at)
    }

    /// ModRM.reg with its extension bit.
    fn own_reg(&self) -> u8 {
        let high = match (self.vex, self.rex) {
            (Some(vex), _) => u8::from(vex.r),
            (None, Some(rex)) => rex >> 2 & 1,
            (None, None) => 0,
        };
        high << 3 | self.modrm.unwrap_or(0) >> 3 & 7
    }

    /// ModRM.rm with its extension bit.
    fn own_rm(&self) -> u8 {
        let high = match (self.vex, self.rex) {
            (Some(vex), _) => vex.xb & 1,
            (None, Some(rex)) => rex & 1,
            (None, None) => 0,
        };
        high << 3 | self.modrm.unwrap_or(0) & 7
    }

    fn own_opcode_register(&self) -> u8 {
        (self.rex.unwrap_or(0) & 1) << 3 | self.opcode[usize::from(self.opcode_len) - 1] & 7
    }

    /// Emits the instruction with other operands: `None` leaves a field as it was. `byte_low` says
    /// that a general byte register is among them whose number needs a REX prefix if it is 4 to 7.
    pub(super) fn emit(&self, asm: &mut Asm, new: &Operands) {
        let reg = new.reg.unwrap_or_else(|| self.own_reg());
        let rm = new.rm.unwrap_or(Rm::Reg(self.own_rm()));
        asm.put(&self.prefixes[..usize::from(self.prefix_count)]);
        if let Some(vex) = self.vex {
            let vvvv = new.vvvv.unwrap_or(vex.vvvv);
            let rex = (reg >> 3) << 2 | rm.rex();
            asm.put(&[
                0xc4,
                (!rex & 7) << 5 | vex.map,
                u8::from(vex.w) << 7 | (!vvvv & 15) << 3 | u8::from(vex.l) << 2 | vex.pp,
                self.opcode[0],
            ]);
        } else {
            let opcode_register = new
                .opcode
                .or_else(|| (self.modrm.is_none()).then(|| self.own_opcode_register()));
            let mut rex = self.rex.unwrap_or(0) & 8;
            if self.modrm.is_some() {
                rex |= (reg >> 3) << 2 | rm.rex();
            } else if let Some(register) = opcode_register {
                rex |= register >> 3;
            }
            if rex != 0 || new.byte_low {
                asm.byte(0x40 | rex);
            }
            let last = usize::from(self.opcode_len) - 1;
            asm.put(&self.opcode[..last]);
            asm.byte(match new.opcode {
                Some(register) => self.opcode[last] & !7 | register & 7,
                None => self.opcode[last],
            });
        }
        if self.modrm.is_some() {
            asm.modrm(reg, rm);
        }
        asm.put(&self.immediate[..usize::from(self.immediate_len)]);
    }

    /// Whether [`Encoding::emit`] would need a REX prefix.
    pub(super) fn needs_rex(&self, new: &Operands) -> bool {
        let reg = new.reg.unwrap_or_else(|| self.own_reg());
        let rm = new.rm.map_or_else(|| self.own_rm() >> 3, |rm| rm.rex());
        let opcode = new.opcode.unwrap_or(0);
        self.vex.is_none()
            && (reg >= 8 && self.modrm.is_some()
                || rm != 0 && self.modrm.is_some()
                || opcode >= 8
                || new.byte_low
                || self.rex.unwrap_or(0) & 8 != 0)
    }
}

/// Operands to be put in the place of an instruction's own.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Operands {
    pub reg: Option<u8>,
    pub rm: Option<Rm>,
    pub vvvv: Option<u8>,
    pub opcode: Option<u8>,
    /// SPL, BPL, SIL or DIL is among the registers.
    pub byte_low: bool,
}

/// Whether an opcode of the legacy maps has a ModRM byte, of those that the compiler takes.
fn legacy_has_modrm(opcode: &[u8]) -> bool {
    match *opcode {
        [0x0f, op] => {
            !matches!(op, 0x05..=0x0b | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
        }
        [op] => match op {
            0x00..=0x3f => op & 7 < 4,
            0x63
            | 0x69
            | 0x6b
            | 0x80..=0x8f
            | 0xc0
            | 0xc1
            | 0xc4..=0xc7
            | 0xd0..=0xd3
            | 0xd8..=0xdf
            | 0xf6
            | 0xf7
            | 0xfe
            | 0xff => true,
            _ => false,
        },
        _ => true,
    }
}
