//! Model-specific registers: their numbers, and which of them a state may go without.

#![expect(
    missing_docs,
    reason = "the names are those of Intel SDM 4 and AMD APM 2"
)]

pub const IA32_TSC: u32 = 0x10;
pub const IA32_APIC_BASE: u32 = 0x1b;
pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
pub const IA32_TSC_ADJUST: u32 = 0x3b;
pub const IA32_SPEC_CTRL: u32 = 0x48;
pub const IA32_MTRRCAP: u32 = 0xfe;
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
pub const IA32_SYSENTER_CS: u32 = 0x174;
pub const IA32_SYSENTER_ESP: u32 = 0x175;
pub const IA32_SYSENTER_EIP: u32 = 0x176;
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
pub const IA32_PAT: u32 = 0x277;
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub const IA32_XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// Whether `index` has a field of its own in [`crate::CpuState`], and so no place in its list.
pub fn has_own_field(index: u32) -> bool {
    const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
    matches!(
        index,
        IA32_TSC | IA32_APIC_BASE | IA32_TSC_DEADLINE | EFER | FS_BASE | GS_BASE
    ) || X2APIC.contains(&index)
}

/// Why a backend that has no register `index`, or can't set it to the value in a state, may go on
/// without; `None` where it must refuse the state.
///
/// These are registers of facilities that Skerry's CPU models do not offer to guests, which some
/// backends list all the same, and read-only descriptions of the processor. Registers that
/// come with an optional feature can be missed only at their reset value: a guest that has set
/// speculation control relies on it.
pub fn dispensable(index: u32, value: u64) -> Option<&'static str> {
    match index {
        IA32_SPEC_CTRL | IA32_XSS | TSC_AUX | KVM_WALL_CLOCK | KVM_SYSTEM_TIME | 0x11 | 0x12
            if value == 0 =>
        {
            Some("an optional feature that the guest does not use")
        }
        0x17 | 0x8b => Some("platform and microcode identification, read-only"),
        IA32_FEATURE_CONTROL => Some("feature control: virtual machine extensions are not offered"),
        0xc0..=0xc8
        | 0x186..=0x18d
        | 0x309..=0x30c
        | 0x329
        | 0x345
        | 0x38d..=0x395
        | 0x3f1..=0x3f7
        | 0x4c1..=0x4c8
        | 0xc001_0000..=0xc001_0007
        | 0xc001_0200..=0xc001_020f
        | 0x600
        | 0xc000_0300..=0xc000_0302 => Some("performance counters are not offered"),
        0xe7 | 0xe8 => Some("frequency counters tick on their own"),
        0xce | IA32_MTRRCAP | IA32_ARCH_CAPABILITIES | 0xcf => {
            Some("processor description, read-only")
        }
        0x122 => Some("transactional memory is not offered"),
        0x140 | 0x1a0 => Some("miscellaneous features are fixed"),
        0x1c4 | 0x1c5 => Some("extended feature disable is not offered"),
        0x1d9 | 0x1db..=0x1de | 0x680..=0x69f | 0x6c0..=0x6df => {
            Some("last-branch records are not offered")
        }
        0x400..=0x473 | 0x179..=0x17b | 0x280..=0x29f | 0x4d0 => {
            Some("machine checks are not offered")
        }
        0x480..=0x493 => Some("virtual machine extensions are not offered"),
        0x560..=0x587 => Some("processor trace is not offered"),
        0xd90 => Some("bounds registers are not offered"),
        0x1fc => Some("power management is not offered"),
        0x34 | 0x9e => Some("system management mode is not offered"),
        0x4000_0000..=0x4000_10ff => Some("Hyper-V enlightenments are not offered"),
        0x4b56_4d02..=0x4b56_4d08 => Some("optional paravirtual features are not offered"),
        0xc000_0104 => Some("time-stamp counter ratio is the backend's"),
        0xc001_0010
        | 0xc001_0015
        | 0xc001_001a
        | 0xc001_001d
        | 0xc001_001f
        | 0xc001_0055
        | 0xc001_0114
        | 0xc001_0117
        | 0xc001_011f
        | 0xc001_0140
        | 0xc001_0141
        | 0xc001_1020..=0xc001_102f => Some("AMD configuration registers are fixed"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_relies_on_is_not_dispensable() {
        for index in [STAR, LSTAR, KERNEL_GS_BASE, IA32_PAT, IA32_SYSENTER_EIP] {
            assert_eq!(dispensable(index, 0), None, "{index:#x}");
        }
        assert!(dispensable(IA32_SPEC_CTRL, 0).is_some());
        assert_eq!(dispensable(IA32_SPEC_CTRL, 4), None, "SSBD is on");
    }
}
