//! Operand sizes and condition codes, as the handlers are generic over them.

use crate::cpu::{Cpu, reg};
use crate::flags::LazyFlags;
use crate::mem::Int;

/// An integer operand of 1, 2, 4 or 8 bytes. Handlers compute in `u64`, zero-extended.
pub trait Operand: Int {
    /// Operand bits.
    const BITS: u32;
    /// Operand bytes.
    const BYTES: u64;
    /// All bits of the operand.
    const MASK: u64;
    /// The top bit of the operand.
    const TOP: u64;
    /// Zero-extends.
    fn wide(self) -> u64;
    /// Truncates.
    fn narrow(value: u64) -> Self;
    /// Reads register `r`.
    fn get(cpu: &Cpu, r: u8) -> u64;
    /// Writes register `r`: 32-bit writes clear the upper half, shorter ones keep the rest.
    fn set(cpu: &mut Cpu, r: u8, value: u64);
    /// Sign-extends the low bits of `value`.
    #[inline(always)]
    fn signed(value: u64) -> i64 {
        ((value << (64 - Self::BITS)) as i64) >> (64 - Self::BITS)
    }
}

macro_rules! operand {
    ($t:ty, $bits:literal, $get:expr, $set:expr) => {
        impl Operand for $t {
            const BITS: u32 = $bits;
            const BYTES: u64 = $bits / 8;
            const MASK: u64 = <$t>::MAX as u64;
            const TOP: u64 = 1 << ($bits - 1);
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn narrow(value: u64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn get(cpu: &Cpu, r: u8) -> u64 {
                $get(cpu, r)
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, r: u8, value: u64) {
                $set(cpu, r, value)
            }
        }
    };
}

#[inline(always)]
fn full(cpu: &Cpu, r: u8) -> u64 {
    cpu.gpr[usize::from(r & 31)]
}

#[inline(always)]
fn full_mut(cpu: &mut Cpu, r: u8) -> &mut u64 {
    &mut cpu.gpr[usize::from(r & 31)]
}

operand!(
    u8,
    8,
    |cpu, r: u8| {
        if r < reg::HIGH8 {
            full(cpu, r) & 0xff
        } else {
            (full(cpu, r - reg::HIGH8) >> 8) & 0xff
        }
    },
    |cpu, r: u8, v: u64| {
        if r < reg::HIGH8 {
            let slot = full_mut(cpu, r);
            *slot = (*slot & !0xff) | (v & 0xff);
        } else {
            let slot = full_mut(cpu, r - reg::HIGH8);
            *slot = (*slot & !0xff00) | ((v & 0xff) << 8);
        }
    }
);
operand!(u16, 16, |cpu, r| full(cpu, r) & 0xffff, |cpu, r, v: u64| {
    let slot = full_mut(cpu, r);
    *slot = (*slot & !0xffff) | (v & 0xffff);
});
operand!(
    u32,
    32,
    |cpu, r| full(cpu, r) & 0xffff_ffff,
    |cpu, r, v: u64| *full_mut(cpu, r) = v & 0xffff_ffff
);
operand!(u64, 64, full, |cpu, r, v| *full_mut(cpu, r) = v);

/// Evaluates condition code `cc` (0 O, 1 NO, 2 B … 15 G: the low bits of the opcode).
#[inline(always)]
pub fn condition(flags: &LazyFlags, cc: u8) -> bool {
    let holds = match cc >> 1 {
        0 => flags.of(),
        1 => flags.cf(),
        2 => flags.zf(),
        3 => flags.cf() || flags.zf(),
        4 => flags.sf(),
        5 => flags.pf(),
        6 => flags.sf() != flags.of(),
        _ => flags.zf() || flags.sf() != flags.of(),
    };
    holds ^ (cc & 1 != 0)
}

/// `handler::<…, u8|u16|u32|u64>` by operand bytes.
macro_rules! sized {
    ($size:expr, $handler:ident $(, $arg:ty)*) => {
        match $size {
            1 => $handler::<$($arg,)* u8> as $crate::code::Handler,
            2 => $handler::<$($arg,)* u16>,
            4 => $handler::<$($arg,)* u32>,
            _ => $handler::<$($arg,)* u64>,
        }
    };
}

/// The same for instructions that have no byte form.
macro_rules! sized_word {
    ($size:expr, $handler:ident $(, $arg:ty)*) => {
        match $size {
            2 => $handler::<$($arg,)* u16> as $crate::code::Handler,
            4 => $handler::<$($arg,)* u32>,
            _ => $handler::<$($arg,)* u64>,
        }
    };
}

/// `handler::<…, CC>` by condition code.
macro_rules! by_condition {
    ($cc:expr, $handler:ident $(, $arg:ty)*) => {
        match $cc {
            0 => $handler::<$($arg,)* 0> as $crate::code::Handler,
            1 => $handler::<$($arg,)* 1>,
            2 => $handler::<$($arg,)* 2>,
            3 => $handler::<$($arg,)* 3>,
            4 => $handler::<$($arg,)* 4>,
            5 => $handler::<$($arg,)* 5>,
            6 => $handler::<$($arg,)* 6>,
            7 => $handler::<$($arg,)* 7>,
            8 => $handler::<$($arg,)* 8>,
            9 => $handler::<$($arg,)* 9>,
            10 => $handler::<$($arg,)* 10>,
            11 => $handler::<$($arg,)* 11>,
            12 => $handler::<$($arg,)* 12>,
            13 => $handler::<$($arg,)* 13>,
            14 => $handler::<$($arg,)* 14>,
            _ => $handler::<$($arg,)* 15>,
        }
    };
}

pub(super) use {by_condition, sized, sized_word};
