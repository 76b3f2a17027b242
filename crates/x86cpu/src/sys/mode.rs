//! The processor's mode, in the form in which the decoder, the memory accesses and the SIMD code
//! ask for it. [`Cpu::update_mode`] runs after every change of what it is computed from.

use crate::cpu::{Cpu, seg};
use crate::flags::rflags;
use crate::sys::state::{Segment, cr0, cr4, efer};

/// How code is decoded: part of the key of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct CodeMode(u8);

impl CodeMode {
    const BITS32: u8 = 1 << 0;
    const BITS64: u8 = 1 << 1;
    const PROTECTED: u8 = 1 << 2;
    const V86: u8 = 1 << 3;
    const STACK32: u8 = 1 << 4;
    const LONG: u8 = 1 << 5;

    /// Default size of code: 16, 32 or 64.
    #[inline]
    pub const fn bits(self) -> u32 {
        if self.0 & Self::BITS64 != 0 {
            64
        } else if self.0 & Self::BITS32 != 0 {
            32
        } else {
            16
        }
    }

    /// 64-bit mode.
    #[inline]
    pub const fn is64(self) -> bool {
        self.0 & Self::BITS64 != 0
    }

    /// CR0.PE, virtual-8086 mode excluded.
    #[inline]
    pub const fn protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }

    /// Virtual-8086 mode.
    #[inline]
    pub const fn v86(self) -> bool {
        self.0 & Self::V86 != 0
    }

    /// SS.B, in legacy and compatibility modes.
    #[inline]
    pub const fn stack32(self) -> bool {
        self.0 & Self::STACK32 != 0
    }

    /// IA-32e mode: 64-bit or compatibility.
    #[inline]
    pub const fn long(self) -> bool {
        self.0 & Self::LONG != 0
    }

    /// As a number, for hashes.
    #[inline]
    pub const fn raw(self) -> u8 {
        self.0
    }

    /// 64-bit mode.
    pub const CODE64: Self = Self(Self::BITS64 | Self::PROTECTED | Self::LONG);
    /// 32-bit protected mode with a 32-bit stack.
    pub const CODE32: Self = Self(Self::BITS32 | Self::PROTECTED | Self::STACK32);
    /// Real-address mode.
    pub const REAL: Self = Self(0);
}

/// Bits of `Cpu::simd_blocked`.
pub mod blocked {
    /// x87 and MMX instructions.
    pub const X87: u32 = 1 << 0;
    /// SSE instructions.
    pub const SSE: u32 = 1 << 1;
    /// AVX instructions.
    pub const AVX: u32 = 1 << 2;
}

impl Cpu {
    /// RFLAGS with all its bits.
    #[inline]
    pub fn rflags_full(&self) -> u64 {
        (self.rflags & !rflags::ARITHMETIC) | self.flags.bits() | rflags::FIXED
    }

    /// Sets RFLAGS as given; the caller has applied the rules. A change of VM, AC or TF takes
    /// effect here.
    pub fn set_rflags(&mut self, value: u64) {
        let changed = self.rflags ^ value;
        self.flags.set_bits(value & rflags::ARITHMETIC);
        self.rflags = (value & !rflags::ARITHMETIC) | rflags::FIXED;
        if changed & (rflags::VM | rflags::AC) != 0 {
            self.update_mode();
        }
        let resume = value & rflags::RF != 0;
        if resume && !self.sys.instruction_breakpoints_armed() {
            // RF has no other effect than to hold those off.
            self.rflags &= !rflags::RF;
        } else if resume || value & rflags::TF != 0 {
            self.want_events();
        }
        if changed & value & rflags::IF != 0 {
            self.want_events_if_pending();
        }
    }

    /// Loads a segment register's visible and hidden parts.
    #[inline]
    pub fn set_segment(&mut self, index: u8, segment: Segment) {
        let i = usize::from(index) % 6;
        self.sys.segments[i] = segment;
        self.seg_base[i] = segment.base;
    }

    /// Whether the processor is in virtual-8086 mode.
    #[inline]
    pub fn in_v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    /// I/O privilege level.
    #[inline]
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> 12) as u8
    }

    /// Recomputes everything that follows from CR0, CR4, EFER, CS, SS, RFLAGS.VM/AC, XCR0 and DR7.
    pub fn update_mode(&mut self) {
        let sys = &self.sys;
        let cs = &sys.segments[usize::from(seg::CS)];
        let ss = &sys.segments[usize::from(seg::SS)];
        let v86 = self.rflags & rflags::VM != 0;
        let protected = sys.protected();
        let long = sys.long_mode();
        let mut mode = 0;
        if long {
            mode |= CodeMode::LONG;
        }
        if long && cs.long() {
            mode |= CodeMode::BITS64;
        } else {
            if cs.big() {
                mode |= CodeMode::BITS32;
            }
            if ss.big() {
                mode |= CodeMode::STACK32;
            }
        }
        if v86 {
            mode |= CodeMode::V86;
        } else if protected {
            mode |= CodeMode::PROTECTED;
        }
        self.cpl = if v86 {
            3
        } else if protected {
            ss.dpl()
        } else {
            0
        };
        self.simd_blocked = Self::blocked_units(sys.cr0, sys.cr4, sys.xcr0);
        self.sys.mode = CodeMode(mode);
        self.update_mmu_mode();
    }

    fn blocked_units(cr0: u64, cr4: u64, xcr0: u64) -> u32 {
        let mut units = 0;
        if cr0 & (cr0::EM | cr0::TS) != 0 {
            units |= blocked::X87;
        }
        if cr0 & (cr0::EM | cr0::TS) != 0 || cr4 & cr4::OSFXSR == 0 {
            units |= blocked::SSE;
        }
        if cr0 & cr0::TS != 0 || cr4 & cr4::OSXSAVE == 0 || xcr0 & 6 != 6 {
            units |= blocked::AVX;
        }
        units
    }

    /// Whether misaligned accesses raise #AC (SDM 3A §7.15, "Alignment Check Exception").
    #[inline]
    pub fn alignment_checked(&self) -> bool {
        self.cpl == 3 && self.rflags & rflags::AC != 0 && self.sys.cr0 & cr0::AM != 0
    }

    /// Bits of EFER that the processor offers.
    pub(crate) fn efer_mask(&self) -> u64 {
        let f = self.cpuid.extended_feature_edx();
        let mut mask = 0;
        for (bit, flags) in [
            (11, efer::SCE),
            (20, efer::NXE),
            (25, efer::FFXSR),
            (29, efer::LME | efer::LMA),
        ] {
            if f & (1 << bit) != 0 {
                mask |= flags;
            }
        }
        if self.cpuid.extended_feature2_eax() & (1 << 8) != 0 {
            mask |= efer::AIBRSE;
        }
        mask
    }
}
