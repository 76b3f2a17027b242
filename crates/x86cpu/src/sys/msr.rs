//! RDMSR and WRMSR: what Intel SDM vol. 4 and AMD's BIOS guides list and operating systems read on
//! their way up. What isn't here raises #GP, as on a processor without it.

use crate::code::Op;
use crate::cpu::{Cpu, reg, seg};
use crate::sys::descriptor::canonical;
use crate::sys::operand::write_register;
use crate::sys::state::Msrs;
use crate::time::kvm_msr;
use crate::trap::Trap;

/// Indices, named as in the manuals.
pub(crate) mod index {
    pub(crate) const TSC: u32 = 0x10;
    pub(crate) const APIC_BASE: u32 = 0x1b;
    pub(crate) const TSC_ADJUST: u32 = 0x3b;
    pub(crate) const SPEC_CTRL: u32 = 0x48;
    pub(crate) const PRED_CMD: u32 = 0x49;
    pub(crate) const PATCH_LEVEL: u32 = 0x8b;
    pub(crate) const MTRR_CAP: u32 = 0xfe;
    pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;
    pub(crate) const FLUSH_CMD: u32 = 0x10b;
    pub(crate) const SYSENTER_CS: u32 = 0x174;
    pub(crate) const SYSENTER_ESP: u32 = 0x175;
    pub(crate) const SYSENTER_EIP: u32 = 0x176;
    pub(crate) const MCG_CAP: u32 = 0x179;
    pub(crate) const MCG_STATUS: u32 = 0x17a;
    pub(crate) const MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const DEBUGCTL: u32 = 0x1d9;
    pub(crate) const MTRR_VARIABLE: u32 = 0x200;
    pub(crate) const MTRR_VARIABLE_LAST: u32 = 0x20f;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
    pub(crate) const X2APIC: u32 = 0x800;
    pub(crate) const X2APIC_LAST: u32 = 0x8ff;
    pub(crate) const XSS: u32 = 0xda0;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const FMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
    pub(crate) const SYSCFG: u32 = 0xc001_0010;
    pub(crate) const HWCR: u32 = 0xc001_0015;
    pub(crate) const TOP_MEM: u32 = 0xc001_001a;
    pub(crate) const TOP_MEM2: u32 = 0xc001_001d;
    pub(crate) const VIRT_SPEC_CTRL: u32 = 0xc001_011f;
    pub(crate) const DE_CFG: u32 = 0xc001_1029;
}

/// The fixed-range MTRRs.
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// Registers of AMD processors that read as zero and ignore writes: nothing stands behind them,
/// but kernels read them without expecting a fault.
const AMD_ZERO: &[u32] = &[
    // Event selects and counters: no CPUID bit tells that they are there, and none count.
    0xc001_0000,
    0xc001_0001,
    0xc001_0002,
    0xc001_0003,
    0xc001_0004,
    0xc001_0005,
    0xc001_0006,
    0xc001_0007,
    0xc001_001f, // NB_CFG
    0xc001_0055, // interrupt pending and C1E
    0xc001_0058, // MMIO configuration base
    0xc001_0061, // P-state current limit
    0xc001_0062, // P-state control
    0xc001_0063, // P-state status
    0xc001_0111, // SMM base
    0xc001_0112, // SMM address
    0xc001_0113, // SMM mask
    0xc001_0117, // VM_HSAVE_PA
    0xc001_1020, // LS_CFG
    0xc001_1021, // IC_CFG
    0xc001_1022, // DC_CFG
    0xc001_102a, // BU_CFG2
    0xc001_102c, // EX_CFG
];

/// VM_CR: SVM locked off.
const VM_CR: u32 = 0xc001_0114;

/// What a stored register accepts.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// These bits; others raise #GP.
    Bits(u64),
    /// These bits; others are dropped.
    Drop(u64),
    Canonical,
    /// Eight memory types, each 0, 1, 4, 5, 6 and, in the PAT, 7.
    Types {
        pat: bool,
    },
}

const ANY: Rule = Rule::Bits(u64::MAX);

/// Physical addresses in MTRRs: up to 52 bits, what the guest says is checked no further.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Msrs {
    fn slot(&mut self, index: u32) -> Option<(&mut u64, Rule)> {
        use index::*;
        Some(match index {
            // IBRS, STIBP, SSBD, PSFD: kept, and of no effect.
            SPEC_CTRL => (&mut self.spec_ctrl, Rule::Bits(0x87)),
            VIRT_SPEC_CTRL => (&mut self.virt_spec_ctrl, Rule::Bits(4)),
            ARCH_CAPABILITIES => (&mut self.arch_capabilities, ANY),
            SYSENTER_CS => (&mut self.sysenter_cs, ANY),
            SYSENTER_ESP => (&mut self.sysenter_esp, Rule::Canonical),
            SYSENTER_EIP => (&mut self.sysenter_eip, Rule::Canonical),
            MCG_STATUS => (&mut self.mcg_status, Rule::Bits(7)),
            MISC_ENABLE => (&mut self.misc_enable, ANY),
            DEBUGCTL => (&mut self.debugctl, Rule::Drop(0)),
            MTRR_VARIABLE..=MTRR_VARIABLE_LAST => {
                let pair = &mut self.mtrr_variable[((index - MTRR_VARIABLE) / 2) as usize % 8];
                if index & 1 == 0 {
                    (&mut pair.0, Rule::Bits(ADDRESS | 7))
                } else {
                    (&mut pair.1, Rule::Bits(ADDRESS | 1 << 11))
                }
            }
            PAT => (&mut self.pat, Rule::Types { pat: true }),
            MTRR_DEF_TYPE => (&mut self.mtrr_def_type, Rule::Bits(0xc07)),
            XSS => (&mut self.xss, Rule::Bits(0)),
            STAR => (&mut self.star, ANY),
            LSTAR => (&mut self.lstar, Rule::Canonical),
            CSTAR => (&mut self.cstar, Rule::Canonical),
            FMASK => (&mut self.fmask, Rule::Bits(0xffff_ffff)),
            KERNEL_GS_BASE => (&mut self.kernel_gs_base, Rule::Canonical),
            TSC_AUX => (&mut self.tsc_aux, Rule::Bits(0xffff_ffff)),
            SYSCFG => (&mut self.syscfg, Rule::Drop(0x00fc_0000)),
            HWCR => (&mut self.hwcr, Rule::Drop(0x0300_0008)),
            TOP_MEM => (&mut self.top_mem[0], Rule::Drop(ADDRESS)),
            TOP_MEM2 => (&mut self.top_mem[1], Rule::Drop(ADDRESS)),
            DE_CFG => (&mut self.de_cfg, ANY),
            _ => {
                let n = MTRR_FIXED.iter().position(|i| *i == index)?;
                (&mut self.mtrr_fixed[n], Rule::Types { pat: false })
            }
        })
    }

    /// A register that is only stored.
    fn get(&self, index: u32) -> Option<u64> {
        // Cheaper than a second table, and as rare as RDMSR is.
        let mut copy = *self;
        copy.slot(index).map(|(value, _)| *value)
    }

    /// Stores a value; `None` if there is no such register, `Some(false)` if it can't hold it.
    pub(crate) fn set(&mut self, index: u32, value: u64) -> Option<bool> {
        let (slot, rule) = self.slot(index)?;
        let value = match rule {
            Rule::Bits(mask) if value & !mask != 0 => return Some(false),
            Rule::Bits(_) => value,
            Rule::Drop(mask) => value & mask,
            Rule::Canonical if !canonical(value) => return Some(false),
            Rule::Canonical => value,
            Rule::Types { pat } => {
                let known = |t: &u8| matches!(t, 0 | 1 | 4..=6) || pat && *t == 7;
                if !value.to_le_bytes().iter().all(known) {
                    return Some(false);
                }
                value
            }
        };
        *slot = value;
        Some(true)
    }
}

/// The stored registers that a snapshot holds, besides those that have a field of their own.
pub(crate) const STORED: &[u32] = {
    use index::*;
    &[
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        MCG_STATUS,
        MISC_ENABLE,
        0x200,
        0x201,
        0x202,
        0x203,
        0x204,
        0x205,
        0x206,
        0x207,
        0x208,
        0x209,
        0x20a,
        0x20b,
        0x20c,
        0x20d,
        0x20e,
        0x20f,
        0x250,
        0x258,
        0x259,
        0x268,
        0x269,
        0x26a,
        0x26b,
        0x26c,
        0x26d,
        0x26e,
        0x26f,
        PAT,
        MTRR_DEF_TYPE,
        STAR,
        LSTAR,
        CSTAR,
        FMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
        SYSCFG,
        HWCR,
        TOP_MEM,
        TOP_MEM2,
        DE_CFG,
    ]
};

/// Whether an index is one that a read answers with a constant: other backends put such registers
/// into snapshots.
pub(crate) fn is_constant(index: u32) -> bool {
    AMD_ZERO.contains(&index)
        || matches!(
            index,
            index::MTRR_CAP | index::MCG_CAP | index::PATCH_LEVEL | VM_CR
        )
}

impl Cpu {
    /// Whether CPUID offers the register, for those that depend on it.
    pub(crate) fn msr_offered(&self, index: u32) -> bool {
        let leaf8_ebx = || self.cpuid.get(0x8000_0008, 0).unwrap_or_default().ebx;
        let leaf7_edx = || self.cpuid.get(7, 0).unwrap_or_default().edx;
        let speculation = || leaf7_edx() & (1 << 26) != 0;
        match index {
            index::SPEC_CTRL => speculation() || leaf8_ebx() & 0x0100_c000 != 0,
            index::PRED_CMD => speculation() || leaf8_ebx() & (1 << 12) != 0,
            index::VIRT_SPEC_CTRL => leaf8_ebx() & (1 << 25) != 0,
            index::ARCH_CAPABILITIES => leaf7_edx() & (1 << 29) != 0,
            index::FLUSH_CMD => leaf7_edx() & (1 << 28) != 0,
            index::TSC_ADJUST => self.cpuid.structured_ebx() & 2 != 0,
            index::TSC_DEADLINE => self.cpuid.feature_ecx() & (1 << 24) != 0,
            index::TSC_AUX => {
                self.cpuid.extended_feature_edx() & (1 << 27) != 0
                    || self.cpuid.structured_ecx() & (1 << 22) != 0
            }
            index::XSS => {
                let xsave = self.cpuid.get(0xd, 1).unwrap_or_default().eax;
                xsave & 8 != 0
            }
            kvm_msr::WALL_CLOCK | kvm_msr::SYSTEM_TIME => self.cpuid.kvm_features() & 1 != 0,
            kvm_msr::WALL_CLOCK_NEW | kvm_msr::SYSTEM_TIME_NEW => {
                self.cpuid.kvm_features() & 8 != 0
            }
            _ => true,
        }
    }

    /// RDMSR.
    pub(crate) fn read_msr(&mut self, index: u32) -> Result<u64, Trap> {
        use index::*;
        if !self.msr_offered(index) {
            return Err(self.gp0());
        }
        Ok(match index {
            TSC => self.tsc(),
            TSC_ADJUST => self.sys.time.tsc_adjust,
            APIC_BASE => self.apic.base(),
            TSC_DEADLINE => self.apic_tsc_deadline(),
            X2APIC..=X2APIC_LAST => return self.x2apic_read(index),
            EFER => self.sys.efer,
            FS_BASE => self.seg_base[usize::from(seg::FS)],
            GS_BASE => self.seg_base[usize::from(seg::GS)],
            // Eight variable ranges, fixed ranges, write-combining.
            MTRR_CAP => 0x508,
            MCG_CAP => 0,
            // A revision newer than any that a kernel would want to load.
            PATCH_LEVEL => 0x0fff_ffff,
            VM_CR => 0x18,
            kvm_msr::WALL_CLOCK | kvm_msr::WALL_CLOCK_NEW => self.sys.time.kvm_wall_clock,
            kvm_msr::SYSTEM_TIME | kvm_msr::SYSTEM_TIME_NEW => self.sys.time.kvm_system_time,
            _ if AMD_ZERO.contains(&index) => 0,
            _ => match self.sys.msr.get(index) {
                Some(value) => value,
                None => {
                    tracing::debug!(index = format_args!("{index:#x}"), "unknown MSR read");
                    return Err(self.gp0());
                }
            },
        })
    }

    /// WRMSR.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Trap> {
        use index::*;
        if !self.msr_offered(index) {
            return Err(self.gp0());
        }
        match index {
            TSC => self.set_tsc(value),
            TSC_ADJUST => self.set_tsc_adjust(value),
            APIC_BASE => return self.apic_write_base(value),
            TSC_DEADLINE => self.apic_set_tsc_deadline(value),
            X2APIC..=X2APIC_LAST => return self.x2apic_write(index, value),
            EFER => return self.write_efer(value),
            FS_BASE | GS_BASE => {
                if !canonical(value) {
                    return Err(self.gp0());
                }
                let segment = if index == FS_BASE { seg::FS } else { seg::GS };
                self.set_segment_base(segment, value);
            }
            // IBPB and SBPB; L1D_FLUSH.
            PRED_CMD if value & !0x81 == 0 => {}
            FLUSH_CMD if value & !1 == 0 => {}
            ARCH_CAPABILITIES => return Err(self.gp0()),
            // Microcode and machine-check capability: writes change nothing.
            PATCH_LEVEL | MCG_CAP => {}
            kvm_msr::WALL_CLOCK | kvm_msr::WALL_CLOCK_NEW => {
                return self.kvm_write_wall_clock(value);
            }
            kvm_msr::SYSTEM_TIME | kvm_msr::SYSTEM_TIME_NEW => {
                return self.kvm_write_system_time(value);
            }
            _ if AMD_ZERO.contains(&index) => {}
            _ => match self.sys.msr.set(index, value) {
                Some(true) => {}
                Some(false) => return Err(self.gp0()),
                None => {
                    tracing::debug!(index = format_args!("{index:#x}"), "unknown MSR written");
                    return Err(self.gp0());
                }
            },
        }
        Ok(())
    }
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let index = cpu.gpr[usize::from(reg::RCX)] as u32;
    let value = cpu.read_msr(index)?;
    write_register(cpu, reg::RAX, 4, value);
    write_register(cpu, reg::RDX, 4, value >> 32);
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_cpl0()?;
    let index = cpu.gpr[usize::from(reg::RCX)] as u32;
    let low = cpu.gpr[usize::from(reg::RAX)] & 0xffff_ffff;
    let value = low | (cpu.gpr[usize::from(reg::RDX)] << 32);
    cpu.write_msr(index, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stored_register_has_a_slot() {
        let mut msrs = Msrs::default();
        for index in STORED {
            assert!(msrs.get(*index).is_some(), "{index:#x}");
            let value = msrs.get(*index).unwrap_or_default();
            assert_eq!(msrs.set(*index, value), Some(true), "{index:#x}");
        }
    }

    #[test]
    fn values_are_checked() {
        let mut msrs = Msrs::default();
        assert_eq!(msrs.set(index::LSTAR, 0x8000_0000_0000), Some(false));
        assert_eq!(msrs.set(index::PAT, 0x0200), Some(false));
        assert_eq!(msrs.set(index::PAT, 0x0700_0000_0000_0007), Some(true));
        assert_eq!(msrs.set(0x250, 7), Some(false));
        assert_eq!(msrs.set(0x1234, 7), None);
    }
}
