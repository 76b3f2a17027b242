//! Machine code in the making: what the compiler emits of its own.

use std::mem::offset_of;

use crate::mem::PAGE_SHIFT;
use crate::mem::area::Frame;

/// A host register, by its number.
pub(super) type Reg = u8;

pub(super) const RAX: Reg = 0;
pub(super) const RCX: Reg = 1;
pub(super) const RDX: Reg = 2;
pub(super) const RBX: Reg = 3;
pub(super) const RSP: Reg = 4;
pub(super) const RBP: Reg = 5;
pub(super) const RSI: Reg = 6;
pub(super) const RDI: Reg = 7;
pub(super) const R10: Reg = 10;
pub(super) const R11: Reg = 11;
pub(super) const R15: Reg = 15;

/// How far behind the frame's start RSP is while compiled code runs: its low six bits are the shift
/// that takes an address to its page's number, for want of a register to keep that in.
pub(super) const BIAS: i32 = PAGE_SHIFT as i32;

const _: () = assert!(BIAS as usize <= size_of::<[u64; 2]>() && offset_of!(Frame, pushed) == 0);

/// A memory operand of emitted code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mem {
    pub base: Option<Reg>,
    /// Index register (never RSP) and log2 of its scale.
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

impl Mem {
    pub(super) fn base(base: Reg, disp: i32) -> Self {
        Self {
            base: Some(base),
            index: None,
            disp,
        }
    }

    pub(super) fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Self {
        Self {
            base: Some(base),
            index: Some((index, scale)),
            disp,
        }
    }

    /// A field of the frame.
    pub(super) fn frame(offset: usize) -> Self {
        Self::base(RSP, offset as i32 - BIAS)
    }

    /// Bits X and B of a REX prefix.
    pub(super) fn rex(&self) -> u8 {
        let x = self.index.is_some_and(|(index, _)| index >= 8);
        let b = self.base.is_some_and(|base| base >= 8);
        u8::from(x) << 1 | u8::from(b)
    }
}

/// Where an operand that ModRM.rm names is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rm {
    Reg(Reg),
    Mem(Mem),
}

impl Rm {
    pub(super) fn rex(&self) -> u8 {
        match self {
            Self::Reg(reg) => reg >> 3,
            Self::Mem(mem) => mem.rex(),
        }
    }
}

/// A jump whose target is not known yet: where its displacement is.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Short(usize);

/// The same with four bytes.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Near(pub usize);

/// ModRM, SIB and displacement.
#[inline(always)]
fn operand(reg: u8, rm: Rm) -> Piece {
    let reg = (reg & 7) << 3;
    let mut piece = Piece::default();
    let mem = match rm {
        Rm::Reg(rm) => {
            piece.add(u64::from(0xc0 | reg | rm & 7), 1);
            return piece;
        }
        Rm::Mem(mem) => mem,
    };
    let (mode, base, size) = match (mem.base, mem.disp) {
        // SIB without a base, and with 32 bits of displacement.
        (None, _) => (0, RBP, 4),
        // RBP and R13 as bases always have a displacement.
        (Some(base), 0) if base & 7 != RBP => (0, base & 7, 0),
        (Some(base), -128..=127) => (0x40, base & 7, 1),
        (Some(base), _) => (0x80, base & 7, 4),
    };
    match mem.index {
        None if base != RSP && mem.base.is_some() => {
            piece.add(u64::from(mode | reg | base), 1);
        }
        index => {
            let (index, scale) = index.unwrap_or((RSP, 0));
            let sib = scale << 6 | (index & 7) << 3 | base;
            piece.add(u64::from(mode | reg | 4) | u64::from(sib) << 8, 2);
        }
    }
    let disp = u64::from(mem.disp as u32);
    piece.add(if size == 1 { disp & 0xff } else { disp }, size);
    piece
}

/// Bytes of machine code that there is room for.
const ROOM: usize = 32 << 10;
/// What is written at a time, however much of it counts.
const WORD: usize = size_of::<u64>();

/// A buffer of machine code.
pub(super) struct Asm {
    bytes: Vec<u8>,
    at: usize,
}

/// Up to eight bytes of code in the making, the first in the lowest bits.
#[derive(Clone, Copy, Default)]
struct Piece {
    bytes: u64,
    len: usize,
}

impl Piece {
    #[inline(always)]
    fn add(&mut self, bytes: u64, len: usize) {
        self.bytes |= bytes << (8 * self.len);
        self.len += len;
    }
}

impl Asm {
    /// With memory that was one's before, if any.
    pub(super) fn new(mut bytes: Vec<u8>) -> Self {
        bytes.resize(ROOM + WORD, 0);
        Self { bytes, at: 0 }
    }

    /// The code; `None` if it has become too long.
    pub(super) fn code(&self) -> Option<&[u8]> {
        self.bytes[..ROOM].get(..self.at)
    }

    /// Its memory.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    #[inline(always)]
    pub(super) fn at(&self) -> usize {
        self.at
    }

    #[inline(always)]
    fn piece(&mut self, piece: Piece) {
        if let Some(to) = self.bytes.get_mut(self.at..self.at + WORD) {
            to.copy_from_slice(&piece.bytes.to_le_bytes());
        }
        self.at += piece.len;
    }

    #[inline(always)]
    pub(super) fn byte(&mut self, byte: u8) {
        self.word(u64::from(byte), 1);
    }

    /// The lowest `len` bytes.
    #[inline(always)]
    pub(super) fn word(&mut self, bytes: u64, len: usize) {
        self.piece(Piece { bytes, len });
    }

    #[inline(always)]
    pub(super) fn put(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks(WORD) {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            self.word(u64::from_le_bytes(word), bytes.len());
        }
    }

    #[inline(always)]
    pub(super) fn dword(&mut self, value: i32) {
        self.word(u64::from(value as u32), 4);
    }

    /// ModRM, SIB and displacement.
    #[inline(always)]
    pub(super) fn modrm(&mut self, reg: u8, rm: Rm) {
        self.piece(operand(reg, rm));
    }

    /// An instruction with REX.W and a one-byte opcode.
    #[inline]
    pub(super) fn op64(&mut self, opcode: u8, reg: Reg, rm: Rm) {
        let rex = 0x48 | (reg >> 3) << 2 | rm.rex();
        self.piece(Piece {
            bytes: u64::from(rex) | u64::from(opcode) << 8,
            len: 2,
        });
        self.modrm(reg, rm);
    }

    /// The same with 32 bits of operand.
    #[inline]
    pub(super) fn op32(&mut self, opcode: u8, reg: Reg, rm: Rm) {
        let rex = (reg >> 3) << 2 | rm.rex();
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.byte(opcode);
        self.modrm(reg, rm);
    }

    pub(super) fn load(&mut self, reg: Reg, mem: Mem) {
        self.op64(0x8b, reg, Rm::Mem(mem));
    }

    pub(super) fn store(&mut self, mem: Mem, reg: Reg) {
        self.op64(0x89, reg, Rm::Mem(mem));
    }

    pub(super) fn load32(&mut self, reg: Reg, mem: Mem) {
        self.op32(0x8b, reg, Rm::Mem(mem));
    }

    pub(super) fn store32(&mut self, mem: Mem, reg: Reg) {
        self.op32(0x89, reg, Rm::Mem(mem));
    }

    /// Loads what lies at a place that is bound like a jump's target.
    pub(super) fn load_relative(&mut self, reg: Reg) -> Near {
        self.put(&[0x48 | (reg >> 3) << 2, 0x8b, (reg & 7) << 3 | 5]);
        self.dword(0);
        Near(self.at())
    }

    /// Stores a sign-extended constant of 64 bits.
    pub(super) fn store_constant(&mut self, mem: Mem, value: i32) {
        self.op64(0xc7, 0, Rm::Mem(mem));
        self.dword(value);
    }

    pub(super) fn store_constant32(&mut self, mem: Mem, value: u32) {
        self.op32(0xc7, 0, Rm::Mem(mem));
        self.dword(value as i32);
    }

    pub(super) fn lea(&mut self, reg: Reg, mem: Mem) {
        match mem {
            Mem {
                base: Some(base),
                index: None,
                disp: 0,
            } if base != RSP => {
                if base != reg {
                    self.mov(reg, base);
                }
            }
            _ => self.op64(0x8d, reg, Rm::Mem(mem)),
        }
    }

    pub(super) fn mov(&mut self, to: Reg, from: Reg) {
        self.op64(0x8b, to, Rm::Reg(from));
    }

    pub(super) fn constant32(&mut self, reg: Reg, value: u32) {
        if reg >= 8 {
            self.byte(0x41);
        }
        self.byte(0xb8 | reg & 7);
        self.dword(value as i32);
    }

    /// Loads a byte, with zeros above.
    pub(super) fn load_byte(&mut self, reg: Reg, mem: Mem) {
        let rex = (reg >> 3) << 2 | mem.rex();
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.put(&[0x0f, 0xb6]);
        self.modrm(reg, Rm::Mem(mem));
    }

    /// Loads two bytes, with zeros above.
    pub(super) fn load_word(&mut self, reg: Reg, mem: Mem) {
        self.two_byte(false, 0xb7, reg, Rm::Mem(mem));
    }

    pub(super) fn store_byte(&mut self, mem: Mem, value: u8) {
        self.op32(0xc6, 0, Rm::Mem(mem));
        self.byte(value);
    }

    /// An instruction of the map that 0x0f opens, with 64 or 32 bits of operand.
    pub(super) fn two_byte(&mut self, wide: bool, opcode: u8, reg: Reg, rm: Rm) {
        let rex = u8::from(wide) << 3 | (reg >> 3) << 2 | rm.rex();
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.put(&[0x0f, opcode]);
        self.modrm(reg, rm);
    }

    /// SARX: shifts right, with the sign, and without a trace in the flags.
    pub(super) fn sarx(&mut self, wide: bool, to: Reg, from: Rm, by: Reg) {
        let inverted = !((to >> 3) << 2 | from.rex()) & 7;
        self.put(&[
            0xc4,
            inverted << 5 | 0x02,
            // pp of F3.
            u8::from(wide) << 7 | (!by & 15) << 3 | 0x02,
            0xf7,
        ]);
        self.modrm(to, from);
    }

    /// PEXT: takes the bits of `from` that the mask in memory has, without a trace in the flags.
    pub(super) fn pext(&mut self, to: Reg, from: Reg, mask: Mem) {
        let rex = mask.rex();
        let inverted = !((to >> 3) << 2 | rex) & 7;
        self.put(&[
            0xc4,
            inverted << 5 | 0x02,
            // W1, pp of F3.
            0x80 | (!from & 15) << 3 | 0x02,
            0xf5,
        ]);
        self.modrm(to, Rm::Mem(mask));
    }

    /// RORX: rotates right without a trace in the flags.
    pub(super) fn rorx(&mut self, to: Reg, from: Reg, by: u8) {
        let inverted = !((to >> 3) << 2 | from >> 3) & 7;
        // Map 0F3A, W1, pp of F2.
        self.put(&[0xc4, inverted << 5 | 0x03, 0xfb, 0xf0]);
        self.modrm(to, Rm::Reg(from));
        self.byte(by);
    }

    /// SHRX by [`BIAS`]: the number of an address's page, without a trace in the flags.
    pub(super) fn page_number(&mut self, to: Reg, from: Reg) {
        let inverted = !((to >> 3) << 2 | from >> 3) & 7;
        // Map 0F38, W1, pp of F2, and RSP as the count.
        self.put(&[
            0xc4,
            inverted << 5 | 0x02,
            0x80 | (!RSP & 15) << 3 | 0x03,
            0xf7,
        ]);
        self.modrm(to, Rm::Reg(from));
    }

    /// A jump if RCX is zero, forward.
    pub(super) fn jrcxz(&mut self) -> Short {
        self.put(&[0xe3, 0]);
        Short(self.at())
    }

    /// Has a short jump come here.
    pub(super) fn here(&mut self, from: Short) {
        let distance = self.at() - from.0;
        debug_assert!(distance < 128, "a short jump over {distance} bytes");
        if let Some(to) = self.bytes.get_mut(from.0 - 1) {
            *to = distance as u8;
        }
    }

    pub(super) fn jmp(&mut self) -> Near {
        self.byte(0xe9);
        self.dword(0);
        Near(self.at())
    }

    /// A call whose target is bound like a jump's.
    pub(super) fn call(&mut self) -> Near {
        self.byte(0xe8);
        self.dword(0);
        Near(self.at())
    }

    /// Makes a call a jump.
    pub(super) fn make_jump(&mut self, call: Near) {
        if let Some(opcode) = self.bytes.get_mut(call.0 - 5) {
            *opcode = 0xe9;
        }
    }

    /// A call if a condition holds.
    pub(super) fn call_if(&mut self, condition: u8) -> Near {
        self.put(&[0x70 | (condition ^ 1) & 15, 5]);
        self.call()
    }

    /// A conditional jump, by its condition's number.
    pub(super) fn jcc(&mut self, condition: u8) -> Near {
        self.put(&[0x0f, 0x80 | condition & 15]);
        self.dword(0);
        Near(self.at())
    }

    /// Has a jump go to a place in this buffer.
    pub(super) fn bind(&mut self, jump: Near, target: usize) {
        let distance = target.wrapping_sub(jump.0) as i32;
        if let Some(to) = self.bytes.get_mut(jump.0 - 4..jump.0) {
            to.copy_from_slice(&distance.to_le_bytes());
        }
    }

    pub(super) fn bind_here(&mut self, jump: Near) {
        self.bind(jump, self.at());
    }

    /// LAHF, SETO AL: the guest's flags as [`Frame::flags`] has them, into RAX.
    pub(super) fn take_flags(&mut self) {
        self.put(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// Stores the guest's flags; RAX is lost.
    pub(super) fn store_flags(&mut self, to: Mem) {
        self.take_flags();
        self.store32(to, RAX);
    }

    /// Loads the guest's flags; RAX is lost.
    pub(super) fn load_flags(&mut self, from: Mem) {
        self.load32(RAX, from);
        // ADD AL, 0x7f overflows if AL is 1; SAHF sets the others.
        self.put(&[0x04, 0x7f, 0x9e]);
    }

    pub(super) fn jmp_memory(&mut self, mem: Mem) {
        self.op32(0xff, 4, Rm::Mem(mem));
    }

    pub(super) fn call_memory(&mut self, mem: Mem) {
        self.op32(0xff, 2, Rm::Mem(mem));
    }
}
