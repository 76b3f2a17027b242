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

/// A buffer of machine code.
#[derive(Default)]
pub(super) struct Asm {
    pub(super) bytes: Vec<u8>,
}

impl Asm {
    pub(super) fn at(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn dword(&mut self, value: i32) {
        self.put(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement.
    pub(super) fn modrm(&mut self, reg: u8, rm: Rm) {
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(rm) => self.byte(0xc0 | reg | rm & 7),
            Rm::Mem(mem) => self.memory(reg, mem),
        }
    }

    fn memory(&mut self, reg: u8, mem: Mem) {
        let Some(base) = mem.base else {
            // SIB without a base, and with 32 bits of displacement.
            let (index, scale) = mem.index.unwrap_or((RSP, 0));
            self.put(&[reg | 4, scale << 6 | (index & 7) << 3 | 5]);
            self.dword(mem.disp);
            return;
        };
        let size = match mem.disp {
            // RBP and R13 as bases always have a displacement.
            0 if base & 7 != RBP => 0,
            -128..=127 => 0x40,
            _ => 0x80,
        };
        match mem.index {
            None if base & 7 != RSP => self.byte(size | reg | base & 7),
            index => {
                let (index, scale) = index.unwrap_or((RSP, 0));
                self.put(&[size | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
            }
        }
        match size {
            0 => {}
            0x40 => self.byte(mem.disp as u8),
            _ => self.dword(mem.disp),
        }
    }

    /// An instruction with REX.W and a one-byte opcode.
    pub(super) fn op64(&mut self, opcode: u8, reg: Reg, rm: Rm) {
        self.byte(0x48 | (reg >> 3) << 2 | rm.rex());
        self.byte(opcode);
        self.modrm(reg, rm);
    }

    /// The same with 32 bits of operand.
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

    pub(super) fn mov32(&mut self, to: Reg, from: Reg) {
        self.op32(0x8b, to, Rm::Reg(from));
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
        self.bytes[from.0 - 1] = distance as u8;
    }

    pub(super) fn jmp(&mut self) -> Near {
        self.byte(0xe9);
        self.dword(0);
        Near(self.at())
    }

    /// A conditional jump, by its condition's number.
    pub(super) fn jcc(&mut self, condition: u8) -> Near {
        self.put(&[0x0f, 0x80 | condition & 15]);
        self.dword(0);
        Near(self.at())
    }

    /// Has a jump go to a place in this buffer.
    pub(super) fn bind(&mut self, jump: Near, target: usize) {
        let distance = target as i64 - jump.0 as i64;
        self.bytes[jump.0 - 4..jump.0].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    pub(super) fn bind_here(&mut self, jump: Near) {
        self.bind(jump, self.at());
    }

    pub(super) fn jmp_memory(&mut self, mem: Mem) {
        self.op32(0xff, 4, Rm::Mem(mem));
    }

    pub(super) fn call_memory(&mut self, mem: Mem) {
        self.op32(0xff, 2, Rm::Mem(mem));
    }
}
