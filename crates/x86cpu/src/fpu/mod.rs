//! x87, SSE and AVX state.
//!
//! ```text
//! run() enters ── mxcsr: host gets the default ── first x87/MMX op: image ▶ host FPU (live)
//!      │                                                                     │
//!   SIMD ops: register file in memory, host units by thunks       x87 ops run on it
//!      │                                                                     │
//! run() leaves ── host's exception flags ▶ guest MXCSR ────────── host FPU ▶ image
//! ```
//!
//! Rust code uses neither x87 nor MMX on x86-64, so the guest's registers may stay in the host's
//! FPU while [`crate::Cpu::run`] runs. Vector registers can't: they are in [`FpuState::ymm`].
//!
//! The host computes with the default MXCSR. As long as the guest's control bits are the default
//! too, its exception flags gather in the host's register and are collected when somebody looks.

mod control;
mod env;
mod host;
mod image;
#[cfg(test)]
mod tests;
mod x87;
mod xsave;

pub(crate) use image::X87_LEN;
pub use image::{XSAVE_IMAGE_LEN, XsaveImageError};
pub(crate) use x87::{lower, prepare_x87};

use crate::trap::{Trap, vector};
use crate::{Cpu, sys};

/// MXCSR after reset, and the host's while guest code runs.
pub const MXCSR_DEFAULT: u32 = 0x1f80;
/// Bits of MXCSR that exist (no misaligned-SSE mode).
pub const MXCSR_MASK: u32 = 0xffff;
/// Exception flags of MXCSR.
pub const MXCSR_FLAGS: u32 = 0x3f;

/// Bits of [`Cpu::simd_blocked`].
pub mod blocked {
    /// x87 and MMX: CR0.EM or CR0.TS.
    pub const X87: u32 = 1 << 0;
    /// SSE: CR0.EM, CR0.TS or no CR4.OSFXSR.
    pub const SSE: u32 = 1 << 1;
    /// AVX: CR0.TS, no CR4.OSXSAVE or not enabled in XCR0.
    pub const AVX: u32 = 1 << 2;
}

/// Bits of [`FpuState::attention`]: why an instruction can't take the fast path.
pub mod attention {
    /// The x87 registers are in the image, not in the host's FPU.
    pub const X87_IDLE: u32 = 1 << 0;
    /// An x87 exception is unmasked: look for pending ones.
    pub const X87_UNMASKED: u32 = 1 << 1;
    /// MXCSR's control bits aren't the default.
    pub const MXCSR: u32 = 1 << 2;
}

/// One vector register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Ymm(pub [u8; 32]);

impl Ymm {
    /// The upper 128 bits.
    #[inline(always)]
    pub(crate) fn high(&self) -> u128 {
        u128::from_le_bytes(*self.0.last_chunk().unwrap_or(&[0; 16]))
    }

    /// The low 128 bits.
    #[inline(always)]
    pub fn low(&self) -> u128 {
        u128::from_le_bytes(*self.0.first_chunk().unwrap_or(&[0; 16]))
    }

    /// Sets the low 128 bits and keeps the rest.
    #[inline(always)]
    pub fn set_low(&mut self, value: u128) {
        self.0[..16].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets the low 128 bits and clears the rest.
    #[inline(always)]
    pub fn set_low_clear(&mut self, value: u128) {
        self.set_low(value);
        self.0[16..].fill(0);
    }
}

/// XSAVE image of the x87 state alone (legacy region and header).
#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct X87Image([u8; 576]);

/// x87, SSE and AVX registers.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct FpuState {
    /// YMM0–15, XMM in the low halves.
    pub ymm: [Ymm; 16],
    /// Bits of [`attention`].
    pub(crate) attention: u32,
    /// MXCSR without the flags that are still in the host's register.
    mxcsr: u32,
    /// Address of the last x87 instruction that wasn't a control instruction.
    pub(crate) last_ip: u64,
    /// Address of its memory operand.
    pub(crate) last_dp: u64,
    /// Its opcode, 11 bits.
    pub(crate) last_opcode: u16,
    x87: X87Image,
}

impl Default for FpuState {
    fn default() -> Self {
        let mut state = Self {
            ymm: [Ymm::default(); 16],
            attention: attention::X87_IDLE,
            mxcsr: MXCSR_DEFAULT,
            last_ip: 0,
            last_dp: 0,
            last_opcode: 0,
            x87: X87Image([0; 576]),
        };
        state.set_x87_control(image::FCW_FNINIT);
        state
    }
}

impl FpuState {
    /// State after reset: FCW is 0x40, all else as after FNINIT (SDM 3A table 11-1).
    pub fn reset(&mut self) {
        self.release();
        *self = Self::default();
        self.set_x87_control(image::FCW_RESET);
    }

    /// What INIT does: nothing, the registers stay (SDM 3A table 11-1).
    pub fn init(&mut self) {}

    /// MXCSR as the guest sees it.
    pub fn mxcsr(&mut self) -> u32 {
        self.collect_mxcsr();
        self.mxcsr
    }

    /// Sets MXCSR; the caller has checked the reserved bits.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value & MXCSR_MASK;
        host::set_mxcsr(MXCSR_DEFAULT);
        if value & !MXCSR_FLAGS == MXCSR_DEFAULT {
            self.attention &= !attention::MXCSR;
        } else {
            self.attention |= attention::MXCSR;
        }
    }

    /// Takes the flags that the host gathered since the last time.
    fn collect_mxcsr(&mut self) {
        let host = host::mxcsr();
        if host != MXCSR_DEFAULT {
            self.mxcsr |= host & MXCSR_FLAGS;
            host::set_mxcsr(MXCSR_DEFAULT);
        }
    }

    /// Whether the x87 registers are in the host's FPU.
    pub(crate) fn is_live(&self) -> bool {
        self.attention & attention::X87_IDLE == 0
    }

    /// Brings the x87 registers into the host's FPU.
    pub(crate) fn make_live(&mut self) {
        if !self.is_live() {
            host::load_x87(&self.x87);
            self.attention &= !attention::X87_IDLE;
        }
    }

    /// Copies live x87 registers to the image; they stay live.
    fn store_live(&mut self) {
        if self.is_live() {
            host::save_x87(&mut self.x87);
        }
    }

    /// An MMX register (the x87 registers are live).
    pub(crate) fn mmx(&mut self, n: u8) -> [u8; 8] {
        self.store_live();
        let top = usize::from(self.x87.0[image::legacy::FSW + 1] >> 3 & 7);
        let st = (usize::from(n & 7) + 8 - top) & 7;
        image::get(&self.x87.0, image::legacy::ST + 16 * st)
    }

    /// What every MMX instruction does to the x87 state: TOP is 0 and no register is empty.
    pub(crate) fn enter_mmx(&mut self) {
        let mut image = self.x87_image();
        let top = usize::from(image[image::legacy::FSW + 1] >> 3 & 7);
        let old = image;
        image[image::legacy::FSW + 1] &= !0x38;
        image[image::legacy::FTW] = 0xff;
        for st in 0..8 {
            let from = (st + 8 - top) & 7;
            let register: [u8; 16] = image::get(&old, image::legacy::ST + 16 * from);
            image::put(&mut image, image::legacy::ST + 16 * st, &register);
        }
        self.set_x87_image(&image);
    }

    /// Copies live x87 registers to the image and leaves the host's FPU clean.
    pub(crate) fn release(&mut self) {
        if self.is_live() {
            host::save_x87(&mut self.x87);
            host::init_x87();
            self.attention |= attention::X87_IDLE;
        }
    }
}

impl Cpu {
    /// Call at the start of `run()`: gives the host's MXCSR its working value.
    #[inline]
    pub fn fpu_enter(&mut self) {
        host::set_mxcsr(MXCSR_DEFAULT);
    }

    /// Call at the end of `run()` (every return): takes the guest's state out of the host's units.
    #[inline]
    pub fn fpu_sync(&mut self) {
        self.fpu.collect_mxcsr();
        self.fpu.release();
    }

    /// The fault of an x87 instruction that finds [`Cpu::simd_blocked`] set (SDM 2A §2.4 and
    /// 3A §2.5).
    #[cold]
    pub(crate) fn x87_blocked(&mut self) -> Trap {
        self.fault_plain(vector::NM)
    }

    /// The same for MMX.
    #[cold]
    pub(crate) fn mmx_blocked(&mut self) -> Trap {
        if self.sys.cr0 & sys::state::cr0::EM != 0 {
            self.ud()
        } else {
            self.fault_plain(vector::NM)
        }
    }

    /// The same for SSE.
    #[cold]
    pub(crate) fn sse_blocked(&mut self) -> Trap {
        let osfxsr = self.sys.cr4 & sys::state::cr4::OSFXSR != 0;
        if !osfxsr || self.sys.cr0 & sys::state::cr0::EM != 0 {
            self.ud()
        } else {
            self.fault_plain(vector::NM)
        }
    }

    /// The same for AVX.
    #[cold]
    pub(crate) fn avx_blocked(&mut self) -> Trap {
        let osxsave = self.sys.cr4 & sys::state::cr4::OSXSAVE != 0;
        if !osxsave || self.sys.xcr0 & 6 != 6 {
            self.ud()
        } else {
            self.fault_plain(vector::NM)
        }
    }
}
