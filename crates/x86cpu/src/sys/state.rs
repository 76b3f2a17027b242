//! Control, debug, segment and model-specific registers, and what holds events off.

use crate::sys::events::StepState;
use crate::sys::mode::CodeMode;

/// Bits of CR0 (Intel SDM 3A §2.5).
pub mod cr0 {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// Bits that a write may change; the other low bits are ignored.
    pub const WRITABLE: u64 = PE | MP | EM | TS | NE | WP | AM | NW | CD | PG;
}

/// Bits of CR4 (Intel SDM 3A §2.5).
pub mod cr4 {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// Bits of IA32_EFER.
pub mod efer {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    /// Fast FXSAVE: leaves the XMM registers out at CPL 0 in 64-bit mode.
    pub const FFXSR: u64 = 1 << 14;
    /// Automatic IBRS; without effect.
    pub const AIBRSE: u64 = 1 << 21;
}

/// Bits of [`Segment::attributes`].
pub mod attr {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const ACCESSED: u16 = 1 << 0;
    /// Readable code or writable data.
    pub const RW: u16 = 1 << 1;
    /// Conforming code or expand-down data.
    pub const CE: u16 = 1 << 2;
    pub const CODE: u16 = 1 << 3;
    /// Code or data rather than system.
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 12;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;
    /// All bits that mean something.
    pub const ALL: u16 = 0xf0ff;
}

/// A segment register with its hidden part (Intel SDM 3A §3.4.3), also TR and LDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, scaled by G.
    pub limit: u32,
    /// The second doubleword of the descriptor, shifted right by 8, without limit bits: see
    /// [`attr`].
    pub attributes: u16,
    /// Null, or otherwise not usable for access.
    pub unusable: bool,
}

impl Segment {
    /// A null segment.
    pub const fn null(selector: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0,
            attributes: 0,
            unusable: true,
        }
    }

    /// As a load in real-address mode leaves it, but for the limit and attributes, which stay.
    pub const fn real(selector: u16) -> Self {
        Self {
            selector,
            base: (selector as u64) << 4,
            limit: 0xffff,
            attributes: attr::P | attr::S | attr::RW | attr::ACCESSED,
            unusable: false,
        }
    }

    /// As virtual-8086 mode has them: fixed limit, read-write data at privilege level 3
    /// (SDM 3B §21.2).
    pub const fn v86(selector: u16) -> Self {
        Self {
            attributes: 0xf3,
            ..Self::real(selector)
        }
    }

    /// Type field, with S as bit 4.
    pub const fn kind(&self) -> u16 {
        self.attributes & 0x1f
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }

    /// Requested privilege level of the selector.
    pub const fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }

    /// A code segment.
    pub const fn is_code(&self) -> bool {
        self.attributes & (attr::S | attr::CODE) == attr::S | attr::CODE
    }

    /// A data segment.
    pub const fn is_data(&self) -> bool {
        self.attributes & (attr::S | attr::CODE) == attr::S
    }

    /// A code segment that less privileged callers may run without a gate.
    pub const fn is_conforming(&self) -> bool {
        self.is_code() && self.attributes & attr::CE != 0
    }

    /// A data segment that can be written.
    pub const fn is_writable(&self) -> bool {
        self.is_data() && self.attributes & attr::RW != 0
    }

    /// Data, or readable code.
    pub const fn is_readable(&self) -> bool {
        self.is_data() || self.is_code() && self.attributes & attr::RW != 0
    }

    /// A data segment whose offsets lie above its limit.
    pub const fn is_expand_down(&self) -> bool {
        self.is_data() && self.attributes & attr::CE != 0
    }

    /// D/B.
    pub const fn big(&self) -> bool {
        self.attributes & attr::DB != 0
    }

    /// L: 64-bit code.
    pub const fn long(&self) -> bool {
        self.attributes & attr::L != 0
    }

    /// P.
    pub const fn present(&self) -> bool {
        self.attributes & attr::P != 0
    }

    /// Whether `size` bytes at `offset` lie within the limit (SDM 3A §5.3); `size` at least 1.
    pub const fn contains(&self, offset: u64, size: u64) -> bool {
        let last = offset.wrapping_add(size - 1);
        if last < offset {
            return false;
        }
        if self.is_expand_down() {
            let top = if self.big() { 0xffff_ffff } else { 0xffff };
            offset > self.limit as u64 && last <= top
        } else {
            last <= self.limit as u64
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Whether the processor executes instructions (SDM 3A §9.4.4.1 and "HLT").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// In HLT.
    Halted,
    /// Waiting for INIT after power-up.
    WaitForInit,
    /// Waiting for SIPI after INIT.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// The model-specific registers that are only stored (the rest lives with what it controls).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_DEBUGCTL, of which nothing has an effect.
    pub debugctl: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// MSR_VIRT_SPEC_CTRL of AMD's hypervisor interface.
    pub virt_spec_ctrl: u64,
    /// IA32_ARCH_CAPABILITIES, as the processor had it on which the guest was started.
    pub arch_capabilities: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// The eight pairs of variable-range MTRRs: base, mask.
    pub mtrr_variable: [(u64, u64); 8],
    /// The eleven fixed-range MTRRs, 0x250, 0x258, 0x259, 0x268 to 0x26f.
    pub mtrr_fixed: [u64; 11],
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// AMD SYSCFG.
    pub syscfg: u64,
    /// AMD HWCR.
    pub hwcr: u64,
    /// AMD DE_CFG.
    pub de_cfg: u64,
    /// AMD TOP_MEM and TOP_MEM2.
    pub top_mem: [u64; 2],
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            // Write-back, write-through, uncached-minus, uncached; twice (SDM 3A §13.12.4).
            pat: 0x0007_0406_0007_0406,
            tsc_aux: 0,
            // Fast strings.
            misc_enable: 1,
            debugctl: 0,
            spec_ctrl: 0,
            virt_spec_ctrl: 0,
            arch_capabilities: 0,
            xss: 0,
            // There is no firmware to set them: on, and all memory write-back.
            mtrr_def_type: 0x806,
            mtrr_variable: [(0, 0); 8],
            mtrr_fixed: [0; 11],
            mcg_status: 0,
            syscfg: 0,
            // TscFreqSel: the TSC counts at the P0 frequency.
            hwcr: 1 << 24,
            // LFENCE is serialising.
            de_cfg: 1 << 1,
            top_mem: [0; 2],
        }
    }
}

/// What holds events off, and what waits (SDM 3A §7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventState {
    /// The instruction after STI: no external interrupts before it.
    pub sti_shadow: bool,
    /// The instruction after MOV SS or POP SS: no interrupts, NMIs or debug traps before it.
    pub mov_ss_shadow: bool,
    /// NMIs wait until IRET.
    pub nmi_masked: bool,
    /// NMIs that wait: at most one to be taken and one latched behind it.
    pub nmis_pending: u8,
    /// Bits of DR6 of a debug trap to be taken before the next instruction; 0 for none.
    pub pending_debug: u64,
    /// An exception whose delivery goes on (only after a state was loaded).
    pub exception: Option<PendingException>,
    /// An external interrupt accepted and not yet delivered.
    pub external: Option<u8>,
    /// The caller wants to know when an external interrupt can be taken.
    pub window_wanted: bool,
    /// RIP of the instruction that a shadow covers.
    pub shadow_rip: u64,
    /// What held when the instruction began that runs alone.
    pub step: Option<StepState>,
}

/// An exception on its way into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingException {
    /// Vector 0–31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// CR2 or DR6 to be set by the delivery.
    pub payload: Option<u64>,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct SystemState {
    /// ES, CS, SS, DS, FS, GS in encoding order. Changed by `Cpu::set_segment` only, which keeps
    /// `Cpu::seg_base`.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldt: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdt: DescriptorTable,
    /// IDTR.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0–DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// How code is decoded now: part of the key of blocks.
    pub mode: CodeMode,
    /// Model-specific registers.
    pub msr: Msrs,
    /// Time-stamp counter and paravirtual clock.
    pub time: crate::time::TimeState,
    /// What holds events off.
    pub events: EventState,
    /// Whether instructions are executed.
    pub activity: Activity,
}

impl Default for SystemState {
    fn default() -> Self {
        Self::reset()
    }
}

impl SystemState {
    /// As after power-up (SDM 3A table 10-1).
    pub fn reset() -> Self {
        let mut segments = [Segment::real(0); 6];
        segments[1] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            attributes: attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED,
            unusable: false,
        };
        Self {
            segments,
            ldt: Segment {
                limit: 0xffff,
                attributes: attr::P | 2,
                ..Segment::default()
            },
            tr: Segment {
                limit: 0xffff,
                attributes: attr::P | 11,
                ..Segment::default()
            },
            gdt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            mode: CodeMode::default(),
            msr: Msrs::default(),
            time: crate::time::TimeState::default(),
            events: EventState::default(),
            activity: Activity::Running,
        }
    }

    /// Protected mode, virtual-8086 mode included.
    #[inline]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// IA-32e mode: 64-bit or compatibility mode.
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_directions() {
        let up = Segment {
            limit: 0xfff,
            attributes: 0x93,
            ..Segment::default()
        };
        assert!(up.contains(0xffc, 4));
        assert!(!up.contains(0xffd, 4));
        assert!(!up.contains(u64::MAX, 4));
        let down = Segment {
            attributes: 0x97,
            ..up
        };
        assert!(!down.contains(0xfff, 1));
        assert!(down.contains(0x1000, 4));
        assert!(down.contains(0xfffc, 4));
        assert!(!down.contains(0xfffd, 4));
        let big = Segment {
            attributes: 0x4097,
            ..up
        };
        assert!(big.contains(0xffff_fffc, 4));
        assert!(!big.contains(0xffff_fffd, 4));
    }
}
