//! A guest instruction taken apart, so that it can be put together again with other registers and
//! another memory operand.

use iced_x86::{Instruction, OpCodeOperandKind};

use super::asm::{Asm, Rm};

/// What of an encoding stays as it is, and where its operands go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoding {
    /// Up to eight bytes, the first in the lowest bits.
    immediate: u64,
    /// Legacy prefixes but for segments, in their order, like that.
    prefixes: u32,
    /// Up to three bytes, like that.
    opcode: u32,
    vex: Option<Vex>,
    prefix_count: u8,
    opcode_len: u8,
    immediate_len: u8,
    /// 0 for none.
    rex: u8,
    /// The byte itself, if there is one.
    modrm: Option<u8>,
}

/// A VEX prefix of three bytes, without the first.
#[derive(Clone, Copy, Debug)]
struct Vex {
    /// The opcode's map, and above it R, X and B, inverted.
    first: u8,
    /// W, VVVV inverted, L, and PP.
    second: u8,
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

impl Encoding {
    /// Takes the encoding of `i` apart. `None` if it has a form that isn't known here.
    #[inline]
    pub(super) fn new(bytes: &[u8], i: &Instruction) -> Option<Self> {
        let mut e = Self {
            immediate: 0,
            prefixes: 0,
            opcode: 0,
            vex: None,
            prefix_count: 0,
            opcode_len: 0,
            immediate_len: 0,
            rex: 0,
            modrm: None,
        };
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x67 => return None,
                prefix @ (0x66 | 0xf0 | 0xf2 | 0xf3) => {
                    if e.prefix_count == 4 {
                        return None;
                    }
                    e.prefixes |= u32::from(prefix) << (8 * e.prefix_count);
                    e.prefix_count += 1;
                }
                _ => break,
            }
            at += 1;
        }
        if let rex @ 0x40..=0x4f = *bytes.get(at)? {
            e.rex = rex;
            at += 1;
        }
        at = match *bytes.get(at)? {
            0xc4 | 0xc5 => e.read_vex(bytes, at)?,
            _ => e.read_opcode(bytes, at)?,
        };
        let has_modrm = match e.vex {
            // VZEROUPPER has none.
            Some(vex) => !(vex.first & 31 == 1 && e.opcode == 0x77),
            None => legacy_has_modrm(e.opcode, e.opcode_len),
        };
        if has_modrm {
            at = e.read_modrm(bytes, at)?;
        }
        let tail = bytes.get(at..i.len()).filter(|tail| tail.len() <= 8)?;
        e.immediate_len = tail.len() as u8;
        e.immediate = tail.iter().rev().fold(0, |all, &b| all << 8 | u64::from(b));
        Some(e)
    }

    /// ModRM, and past what belongs to it.
    #[inline]
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

    #[inline]
    fn read_vex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let first = *bytes.get(at + 1)?;
        let (vex, at) = if *bytes.get(at)? == 0xc5 {
            // Of two bytes: X, B and W are 0, and the map is the first.
            let vex = Vex {
                first: first & 0x80 | 0x61,
                second: first & 0x7f,
            };
            (vex, at + 2)
        } else {
            let second = *bytes.get(at + 2)?;
            (Vex { first, second }, at + 3)
        };
        self.vex = Some(vex);
        self.opcode = u32::from(*bytes.get(at)?);
        self.opcode_len = 1;
        Some(at + 1)
    }

    #[inline]
    fn read_opcode(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let first = *bytes.get(at)?;
        let len = match (first, bytes.get(at + 1)) {
            (0x0f, Some(0x38 | 0x3a)) => 3,
            (0x0f, Some(_)) => 2,
            _ => 1,
        };
        let opcode = bytes.get(at..at + len)?;
        self.opcode = (0..len).fold(0, |all, n| all | u32::from(opcode[n]) << (8 * n));
        self.opcode_len = len as u8;
        Some(at + len)
    }

    /// R, X and B of the prefix, from bit 2 on.
    fn extensions(&self) -> u8 {
        match self.vex {
            Some(vex) => !vex.first >> 5,
            None => self.rex & 7,
        }
    }

    /// ModRM.reg with its extension bit.
    fn own_reg(&self) -> u8 {
        (self.extensions() & 4) << 1 | self.modrm.unwrap_or(0) >> 3 & 7
    }

    /// ModRM.rm with its extension bit.
    fn own_rm(&self) -> u8 {
        (self.extensions() & 1) << 3 | self.modrm.unwrap_or(0) & 7
    }

    fn own_opcode_register(&self) -> u8 {
        let last = self.opcode >> (8 * (self.opcode_len - 1));
        (self.rex & 1) << 3 | last as u8 & 7
    }

    /// Emits the instruction with other operands: `None` leaves a field as it was. `byte_low` says
    /// that a general byte register is among them whose number needs a REX prefix if it is 4 to 7.
    pub(super) fn emit(&self, asm: &mut Asm, new: &Operands) {
        let reg = new.reg.unwrap_or_else(|| self.own_reg());
        let rm = new.rm.unwrap_or(Rm::Reg(self.own_rm()));
        if self.prefix_count != 0 {
            let prefixes = u64::from(self.prefixes);
            asm.word(prefixes, usize::from(self.prefix_count));
        }
        let opcode = u64::from(self.opcode);
        if let Some(vex) = self.vex {
            let rex = (reg >> 3) << 2 | rm.rex();
            let vvvv = match new.vvvv {
                Some(vvvv) => (!vvvv & 15) << 3,
                None => vex.second & 0x78,
            };
            asm.put(&[
                0xc4,
                (!rex & 7) << 5 | vex.first & 31,
                vex.second & !0x78 | vvvv,
                opcode as u8,
            ]);
        } else {
            let last = 8 * (self.opcode_len - 1);
            let mut rex = self.rex & 8;
            let mut opcode = opcode;
            if self.modrm.is_some() {
                rex |= (reg >> 3) << 2 | rm.rex();
            } else {
                rex |= new.opcode.unwrap_or_else(|| self.own_opcode_register()) >> 3;
            }
            if let Some(register) = new.opcode {
                opcode = opcode & !(7 << last) | u64::from(register & 7) << last;
            }
            if rex != 0 || new.byte_low {
                asm.byte(0x40 | rex);
            }
            asm.word(opcode, usize::from(self.opcode_len));
        }
        if self.modrm.is_some() {
            asm.modrm(reg, rm);
        }
        if self.immediate_len != 0 {
            asm.word(self.immediate, usize::from(self.immediate_len));
        }
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
                || self.rex & 8 != 0)
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
fn legacy_has_modrm(opcode: u32, len: u8) -> bool {
    let op = (opcode >> 8) as u8;
    match len {
        1 => match opcode as u8 {
            op @ 0x00..=0x3f => op & 7 < 4,
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
        2 => {
            !matches!(op, 0x05..=0x0b | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
        }
        _ => true,
    }
}
