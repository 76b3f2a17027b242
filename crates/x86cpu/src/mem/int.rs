//! Integers as guest memory holds them, each read and written by one host access.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with other threads: only assembly accesses it in a defined way"
)]

use std::arch::asm;
use std::fmt::Debug;

/// An operand in memory.
///
/// Guest memory is written by other virtual processors and devices at any time, so it is never
/// behind a reference: every access is one host instruction of the operand's size, which makes the
/// host's memory order the guest's.
pub trait Int: Copy + Eq + Debug + Default + Send + 'static {
    /// Bytes.
    const SIZE: usize;

    /// From the low bytes of `value`.
    fn from_low(value: u128) -> Self;

    /// Zero-extended.
    fn to_wide(self) -> u128;

    /// Reads at a host address.
    ///
    /// # Safety
    ///
    /// `SIZE` bytes at `at` are mapped and readable.
    unsafe fn read(at: usize) -> Self;

    /// Writes at a host address.
    ///
    /// # Safety
    ///
    /// `SIZE` bytes at `at` are mapped, writable, and guest memory.
    unsafe fn write(at: usize, value: Self);

    /// Compares and exchanges, locked; gives the old value.
    ///
    /// # Safety
    ///
    /// As [`Int::write`]; 16-byte operands are aligned.
    unsafe fn compare_exchange(at: usize, expected: Self, new: Self) -> Self;
}

macro_rules! int {
    ($t:ty, $class:ident, $load:literal, $store:literal, $cas:literal, $acc:tt) => {
        impl Int for $t {
            const SIZE: usize = size_of::<$t>();

            #[inline(always)]
            fn from_low(value: u128) -> Self {
                value as $t
            }

            #[inline(always)]
            fn to_wide(self) -> u128 {
                u128::from(self)
            }

            #[inline(always)]
            unsafe fn read(at: usize) -> Self {
                let value: $t;
                // SAFETY: the caller vouches for the address; the instruction only reads it.
                unsafe {
                    asm!($load, out($class) value, in(reg) at,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }

            #[inline(always)]
            unsafe fn write(at: usize, value: Self) {
                // SAFETY: the caller vouches for the address.
                unsafe {
                    asm!($store, in(reg) at, in($class) value,
                        options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(at: usize, expected: Self, new: Self) -> Self {
                let old: $t;
                // SAFETY: the caller vouches for the address.
                unsafe {
                    asm!($cas, in(reg) at, in($class) new, inout($acc) expected => old,
                        options(nostack));
                }
                old
            }
        }
    };
}

int!(
    u8,
    reg_byte,
    "mov {0}, byte ptr [{1}]",
    "mov byte ptr [{0}], {1}",
    "lock cmpxchg byte ptr [{0}], {1}",
    "al"
);
int!(
    u16,
    reg,
    "mov {0:x}, word ptr [{1}]",
    "mov word ptr [{0}], {1:x}",
    "lock cmpxchg word ptr [{0}], {1:x}",
    "ax"
);
int!(
    u32,
    reg,
    "mov {0:e}, dword ptr [{1}]",
    "mov dword ptr [{0}], {1:e}",
    "lock cmpxchg dword ptr [{0}], {1:e}",
    "eax"
);
int!(
    u64,
    reg,
    "mov {0}, qword ptr [{1}]",
    "mov qword ptr [{0}], {1}",
    "lock cmpxchg qword ptr [{0}], {1}",
    "rax"
);

impl Int for u128 {
    const SIZE: usize = 16;

    #[inline(always)]
    fn from_low(value: u128) -> Self {
        value
    }

    #[inline(always)]
    fn to_wide(self) -> u128 {
        self
    }

    #[inline(always)]
    unsafe fn read(at: usize) -> Self {
        // SAFETY: both halves are within what the caller vouches for.
        let (low, high) = unsafe { (u64::read(at), u64::read(at + 8)) };
        (u128::from(high) << 64) | u128::from(low)
    }

    #[inline(always)]
    unsafe fn write(at: usize, value: Self) {
        // SAFETY: both halves are within what the caller vouches for.
        unsafe {
            u64::write(at, value as u64);
            u64::write(at + 8, (value >> 64) as u64);
        }
    }

    #[inline(always)]
    unsafe fn compare_exchange(at: usize, expected: Self, new: Self) -> Self {
        let (low, high): (u64, u64);
        // SAFETY: the caller vouches for the address and its alignment. RBX, which the compiler
        // keeps for itself, is restored.
        unsafe {
            asm!(
                "xchg {new_low}, rbx",
                "lock cmpxchg16b xmmword ptr [{at}]",
                "mov rbx, {new_low}",
                at = in(reg) at,
                new_low = inout(reg) new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") expected as u64 => low,
                inout("rdx") (expected >> 64) as u64 => high,
                options(nostack),
            );
        }
        (u128::from(high) << 64) | u128::from(low)
    }
}

/// Copies out of guest memory.
///
/// # Safety
///
/// `into.len()` bytes at `at` are mapped and readable.
pub(super) unsafe fn copy_out(at: usize, into: &mut [u8]) {
    // SAFETY: the caller vouches for the source; the destination is ours. The direction flag is
    // clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rcx") into.len() => _, inout("rsi") at => _,
            inout("rdi") into.as_mut_ptr() => _, options(nostack, preserves_flags));
    }
}

/// Copies into guest memory.
///
/// # Safety
///
/// `from.len()` bytes at `at` are mapped, writable, and guest memory.
pub(super) unsafe fn copy_in(at: usize, from: &[u8]) {
    // SAFETY: as in `copy_out`, the other way.
    unsafe {
        asm!("rep movsb", inout("rcx") from.len() => _, inout("rsi") from.as_ptr() => _,
            inout("rdi") at => _, options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_exchange() {
        let mut cell = [0u128; 2];
        let at = cell.as_mut_ptr() as usize;
        // SAFETY: within the array, aligned.
        unsafe {
            u64::write(at + 3, 0x1122_3344_5566_7788);
            assert_eq!(u8::read(at + 3), 0x88);
            assert_eq!(u16::read(at + 4), 0x6677);
            assert_eq!(u32::read(at + 7), 0x1122_3344);
            assert_eq!(u32::compare_exchange(at + 7, 1, 2), 0x1122_3344);
            assert_eq!(u32::compare_exchange(at + 7, 0x1122_3344, 2), 0x1122_3344);
            assert_eq!(u32::read(at + 7), 2);
            u128::write(at, 5 << 100);
            assert_eq!(u128::compare_exchange(at, 5 << 100, 7 << 90 | 3), 5 << 100);
            assert_eq!(u128::read(at), 7 << 90 | 3);
            assert_eq!(u8::compare_exchange(at, 3, 9), 3);
            let mut out = [0; 2];
            copy_out(at, &mut out);
            assert_eq!(out, [9, 0]);
            copy_in(at + 1, &[1, 2]);
            assert_eq!(u32::read(at), 0x0002_0109);
        }
    }
}
