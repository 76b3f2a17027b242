//! CPUID: the table that the guest sees, what the decoder makes of it, and what can be offered.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::Arc;

use iced_x86::{CpuidFeature, DecoderOptions};

use crate::cpu::Cpu;
use crate::sys::state::cr4;

/// EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// One leaf, or one sub-leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Input EAX.
    pub leaf: u32,
    /// Input ECX, for leaves that have sub-leaves.
    pub subleaf: Option<u32>,
    /// The answer, without what depends on the processor's state.
    pub result: CpuidResult,
}

/// Everything that CPUID answers.
///
/// Copies of it are one: a processor has one of its own, and there may be many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    /// Sorted by leaf and sub-leaf.
    entries: Arc<[CpuidEntry]>,
    /// What follows from them.
    features: Features,
}

impl Default for CpuidTable {
    fn default() -> Self {
        Self::new([])
    }
}

/// Register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Out {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl CpuidTable {
    /// A table of the given entries; of two for the same leaf and sub-leaf the first counts.
    pub fn new(entries: impl IntoIterator<Item = CpuidEntry>) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by_key(|e| (e.leaf, e.subleaf));
        entries.dedup_by_key(|e| (e.leaf, e.subleaf));
        let mut table = Self {
            entries: entries.into(),
            features: Features::default(),
        };
        table.features = Features::from_table(&table);
        table
    }

    /// The instructions that it offers.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The entries, sorted.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The stored answer; `None` where the table has none (the guest sees zeros then).
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidResult> {
        let from = self.entries.partition_point(|e| e.leaf < leaf);
        self.entries[from..]
            .iter()
            .take_while(|e| e.leaf == leaf)
            .find(|e| e.subleaf.is_none_or(|s| s == subleaf))
            .map(|e| e.result)
    }

    fn bits(&self, leaf: u32, subleaf: u32, out: Out) -> u32 {
        let r = self.get(leaf, subleaf).unwrap_or_default();
        match out {
            Out::Eax => r.eax,
            Out::Ebx => r.ebx,
            Out::Ecx => r.ecx,
            Out::Edx => r.edx,
        }
    }

    /// Leaf 1, EDX.
    pub fn feature_edx(&self) -> u32 {
        self.bits(1, 0, Out::Edx)
    }

    /// Leaf 1, ECX.
    pub fn feature_ecx(&self) -> u32 {
        self.bits(1, 0, Out::Ecx)
    }

    /// Leaf 7, EBX.
    pub fn structured_ebx(&self) -> u32 {
        self.bits(7, 0, Out::Ebx)
    }

    /// Leaf 7, ECX.
    pub fn structured_ecx(&self) -> u32 {
        self.bits(7, 0, Out::Ecx)
    }

    /// Leaf 0x8000_0001, EDX.
    pub fn extended_feature_edx(&self) -> u32 {
        self.bits(0x8000_0001, 0, Out::Edx)
    }

    /// Leaf 0x8000_0021, EAX.
    pub fn extended_feature2_eax(&self) -> u32 {
        self.bits(0x8000_0021, 0, Out::Eax)
    }

    /// The paravirtual features of the KVM leaves; 0 if the table doesn't have their signature.
    pub fn kvm_features(&self) -> u32 {
        let signature = self.get(0x4000_0000, 0).unwrap_or_default();
        if (signature.ebx, signature.ecx, signature.edx) == KVM_SIGNATURE {
            self.bits(0x4000_0001, 0, Out::Eax)
        } else {
            0
        }
    }

    /// Bits of a physical address.
    pub fn physical_address_bits(&self) -> u32 {
        match self.bits(0x8000_0008, 0, Out::Eax) & 0xff {
            0 => 36,
            bits => bits.min(52),
        }
    }

    /// The bits of XCR0 that can be set.
    pub fn xcr0_mask(&self) -> u64 {
        if self.feature_ecx() & (1 << 26) == 0 {
            return 1;
        }
        u64::from(self.bits(0xd, 0, Out::Eax)) & 7 | 1
    }

    /// Length of the XSAVE area in standard format for the given components.
    pub fn xsave_size(&self, xcr0: u64) -> u32 {
        (2..63)
            .filter(|i| xcr0 & (1 << i) != 0)
            .filter_map(|i| self.get(0xd, i))
            .map(|r| r.eax.saturating_add(r.ebx))
            .fold(LEGACY_AND_HEADER, u32::max)
    }

    fn xsave_compact_size(&self, components: u64) -> u32 {
        (2..63)
            .filter(|i| components & (1 << i) != 0)
            .filter_map(|i| self.get(0xd, i))
            .map(|r| r.eax)
            .fold(LEGACY_AND_HEADER, u32::saturating_add)
    }
}

/// Length of the XSAVE area's legacy region and header.
const LEGACY_AND_HEADER: u32 = 576;

/// "KVMKVMKVM\0\0\0" in EBX, ECX, EDX of leaf 0x4000_0000.
pub const KVM_SIGNATURE: (u32, u32, u32) = (0x4b4d_564b, 0x564b_4d56, 0x4d);

/// A set of iced's CPUID features, for the decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features([u64; 4]);

impl Features {
    /// Whether the set has `feature`.
    #[inline]
    pub fn has(&self, feature: CpuidFeature) -> bool {
        let i = feature as usize;
        self.0[(i / 64) & 3] & (1 << (i % 64)) != 0
    }

    /// Whether it has all of them.
    #[inline]
    pub fn has_all(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|f| self.has(*f))
    }

    #[cfg(test)]
    pub(crate) fn all() -> Self {
        Self([u64::MAX; 4])
    }

    fn add(&mut self, feature: CpuidFeature) {
        let i = feature as usize;
        self.0[(i / 64) & 3] |= 1 << (i % 64);
    }

    /// How the decoder is to take bytes. On a processor without TZCNT or LZCNT their prefix means
    /// nothing, and they are BSF and BSR (SDM 2B, "TZCNT"); compilers rely on it.
    pub fn decoder_options(&self) -> u32 {
        let without = |feature, option| if self.has(feature) { 0 } else { option };
        DecoderOptions::FORCE_RESERVED_NOP
            | without(CpuidFeature::BMI1, DecoderOptions::NO_MPFX_0FBC)
            | without(CpuidFeature::LZCNT, DecoderOptions::NO_MPFX_0FBD)
    }

    /// What the decoder may take as valid under a table.
    pub fn from_table(table: &CpuidTable) -> Self {
        let mut set = Self::default();
        for feature in ALWAYS {
            set.add(*feature);
        }
        for (leaf, subleaf, out, bit, feature) in BITS {
            if table.bits(*leaf, *subleaf, *out) & (1 << bit) != 0 {
                set.add(*feature);
            }
        }
        set
    }
}

/// Instructions that need no bit; among them those that run as no-operations where they aren't
/// known (ENDBR, PREFETCHW and its like).
const ALWAYS: &[CpuidFeature] = {
    use CpuidFeature::*;
    &[
        INTEL8086,
        INTEL186,
        INTEL286,
        INTEL386,
        INTEL486,
        CPUID,
        MULTIBYTENOP,
        PAUSE,
        CET_IBT,
        FPU287,
        FPU387,
        PREFETCHW,
        PREFETCHWT1,
        PREFETCHITI,
        CLDEMOTE,
        WBNOINVD,
        RDPMC,
        SMM,
        // For RDSSP, a no-operation, and for the hypercalls; the rest of them is not lowered.
        CET_SS,
        VMX,
        SVM,
    ]
};

const BITS: &[(u32, u32, Out, u32, CpuidFeature)] = {
    use CpuidFeature::*;
    use Out::{Eax, Ebx, Ecx, Edx};
    &[
        (1, 0, Edx, 0, FPU),
        (1, 0, Edx, 4, TSC),
        (1, 0, Edx, 5, MSR),
        (1, 0, Edx, 8, CX8),
        (1, 0, Edx, 11, SEP),
        (1, 0, Edx, 15, CMOV),
        (1, 0, Edx, 19, CLFSH),
        (1, 0, Edx, 23, MMX),
        (1, 0, Edx, 24, FXSR),
        (1, 0, Edx, 25, SSE),
        (1, 0, Edx, 26, SSE2),
        (1, 0, Ecx, 0, SSE3),
        (1, 0, Ecx, 1, PCLMULQDQ),
        (1, 0, Ecx, 3, MONITOR),
        (1, 0, Ecx, 9, SSSE3),
        (1, 0, Ecx, 12, FMA),
        (1, 0, Ecx, 13, CMPXCHG16B),
        (1, 0, Ecx, 19, SSE4_1),
        (1, 0, Ecx, 20, SSE4_2),
        (1, 0, Ecx, 22, MOVBE),
        (1, 0, Ecx, 23, POPCNT),
        (1, 0, Ecx, 25, AES),
        (1, 0, Ecx, 26, XSAVE),
        (1, 0, Ecx, 28, AVX),
        (1, 0, Ecx, 29, F16C),
        (1, 0, Ecx, 30, RDRAND),
        (7, 0, Ebx, 0, FSGSBASE),
        (7, 0, Ebx, 3, BMI1),
        (7, 0, Ebx, 5, AVX2),
        (7, 0, Ebx, 8, BMI2),
        (7, 0, Ebx, 10, INVPCID),
        (7, 0, Ebx, 18, RDSEED),
        (7, 0, Ebx, 19, ADX),
        (7, 0, Ebx, 20, SMAP),
        (7, 0, Ebx, 23, CLFLUSHOPT),
        (7, 0, Ebx, 24, CLWB),
        (7, 0, Ebx, 29, SHA),
        (7, 0, Ecx, 8, GFNI),
        (7, 0, Ecx, 9, VAES),
        (7, 0, Ecx, 10, VPCLMULQDQ),
        (7, 0, Ecx, 22, RDPID),
        (0xd, 1, Eax, 0, XSAVEOPT),
        (0xd, 1, Eax, 1, XSAVEC),
        (0xd, 1, Eax, 3, XSAVES),
        (0x8000_0001, 0, Ecx, 5, LZCNT),
        (0x8000_0001, 0, Ecx, 6, SSE4A),
        (0x8000_0001, 0, Edx, 11, SYSCALL),
        (0x8000_0001, 0, Edx, 27, RDTSCP),
        (0x8000_0001, 0, Edx, 29, X64),
    ]
};

impl Cpu {
    /// CPUID as the guest sees it now (SDM 2A, "CPUID").
    pub fn cpuid_query(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let mut r = self.cpuid.get(leaf, subleaf).unwrap_or_default();
        let apic_id = self.apic.id();
        match leaf {
            1 => {
                r.ebx = (r.ebx & 0x00ff_ffff) | (apic_id << 24);
                r.ecx &= !(1 << 27);
                if self.sys.cr4 & cr4::OSXSAVE != 0 {
                    r.ecx |= 1 << 27;
                }
                if !self.apic.enabled() {
                    r.edx &= !(1 << 9);
                }
            }
            0xb | 0x1f if r != CpuidResult::default() || self.cpuid.get(leaf, 0).is_some() => {
                r.edx = apic_id;
                r.ecx = (r.ecx & !0xff) | (subleaf & 0xff);
            }
            0xd if subleaf == 0 && r.eax != 0 => r.ebx = self.cpuid.xsave_size(self.sys.xcr0),
            0xd if subleaf == 1 && r.eax & 0xa != 0 => {
                r.ebx = self
                    .cpuid
                    .xsave_compact_size(self.sys.xcr0 | self.sys.msr.xss);
            }
            0x8000_001e if r != CpuidResult::default() => r.eax = apic_id,
            _ => {}
        }
        r
    }
}

/// What matters of the host processor: SIMD instructions run on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFeatures {
    /// Leaf 1, ECX.
    pub leaf1_ecx: u32,
    /// Leaf 7, EBX.
    pub leaf7_ebx: u32,
    /// The host's operating system keeps AVX state.
    pub avx_state: bool,
}

impl HostFeatures {
    /// Asks the host processor.
    pub fn detect() -> Self {
        let leaf1_ecx = __cpuid(1).ecx;
        let leaf7_ebx = if __cpuid(0).eax >= 7 {
            __cpuid_count(7, 0).ebx
        } else {
            0
        };
        let avx_state = std::is_x86_feature_detected!("avx");
        Self {
            leaf1_ecx,
            leaf7_ebx,
            avx_state,
        }
    }
}

/// Everything that the processor can offer on the given host: named models are subsets of it.
pub fn supported(host: &HostFeatures) -> CpuidTable {
    const LEAF1_EDX: u32 = 0x078b_fbff;
    // What is done here: SSE3 to SSE4.2 need a host with them too.
    const LEAF1_ECX_OWN: u32 = bits(&[13, 17, 21, 22, 23, 24, 26, 30, 31]);
    const LEAF1_ECX_HOST: u32 = bits(&[0, 1, 9, 19, 20, 25]);
    const LEAF1_ECX_AVX: u32 = bits(&[12, 28, 29]);
    const LEAF7_EBX_OWN: u32 = bits(&[0, 1, 3, 7, 8, 9, 10, 18, 19, 20, 23]);
    let avx = host.avx_state && host.leaf1_ecx & (1 << 28) != 0;
    let mut ecx = LEAF1_ECX_OWN | (host.leaf1_ecx & LEAF1_ECX_HOST);
    let mut ebx7 = LEAF7_EBX_OWN | (host.leaf7_ebx & (1 << 29));
    let mut xcr0 = 3;
    if avx {
        ecx |= host.leaf1_ecx & LEAF1_ECX_AVX;
        ebx7 |= host.leaf7_ebx & (1 << 5);
        xcr0 |= 4;
    }
    let leaf = |leaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        subleaf: None,
        result: CpuidResult { eax, ebx, ecx, edx },
    };
    let sub = |leaf, subleaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        subleaf: Some(subleaf),
        result: CpuidResult { eax, ebx, ecx, edx },
    };
    let xsave_size = if avx { 832 } else { LEGACY_AND_HEADER };
    let mut entries = vec![
        // "AuthenticAMD"
        leaf(0, 0x16, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
        // Family 0x19 model 0x11; CLFLUSH line of 64 bytes.
        leaf(1, 0x00a1_0f10, 0x0000_0800, ecx, LEAF1_EDX),
        // UMIP, RDPID; fast short REP MOVSB.
        sub(7, 0, 0, ebx7, bits(&[2, 22]), bits(&[4])),
        sub(0xd, 0, xcr0, xsave_size, xsave_size, 0),
        // XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
        sub(0xd, 1, 7, xsave_size, 0, 0),
        // TSC: 1 GHz.
        leaf(0x15, 1, 1, TSC_HZ, 0),
        leaf(0x16, 1000, 1000, 100, 0),
        leaf(
            0x4000_0000,
            0x4000_0010,
            KVM_SIGNATURE.0,
            KVM_SIGNATURE.1,
            KVM_SIGNATURE.2,
        ),
        leaf(0x4000_0001, KVM_FEATURES, 0, 0, 0),
        // TSC and APIC timer, in kHz.
        leaf(0x4000_0010, TSC_HZ / 1000, TSC_HZ / 1000, 0, 0),
        leaf(
            0x8000_0000,
            0x8000_0021,
            0x6874_7541,
            0x444d_4163,
            0x6974_6e65,
        ),
        // LAHF in 64-bit mode, LZCNT, PREFETCHW; SYSCALL, NX, MMXEXT, 1 GiB pages, RDTSCP, LM.
        leaf(
            0x8000_0001,
            0x00a1_0f10,
            0,
            bits(&[0, 5, 8]),
            (LEAF1_EDX & 0x0183_f3ff) | bits(&[11, 20, 22, 26, 27, 29]),
        ),
        // TSC at a constant rate.
        leaf(0x8000_0007, 0, 0, 0, 1 << 8),
        // 46 physical and 48 linear bits; no speculative store bypass.
        leaf(0x8000_0008, 0x302e, bits(&[2, 26]), 0, 0),
        // LFENCE serialises, null selectors clear the base, automatic IBRS, neither SRSO nor TSA:
        // guest code is never predicted by addresses of the guest, so that it can do without
        // retpolines and VERW.
        leaf(0x8000_0021, bits(&[2, 6, 8, 29]), 0, bits(&[1, 2]), 0),
    ];
    if avx {
        entries.push(sub(0xd, 2, 256, 576, 0, 0));
    }
    CpuidTable::new(entries)
}

/// Everything that a guest from elsewhere may have been shown and still finds here: what
/// [`supported`] has, and defences against faults that this processor is free of. They are not
/// offered to guests that start here, which would only lose time with them.
pub fn accepted(host: &HostFeatures) -> CpuidTable {
    let mut entries = supported(host).entries.to_vec();
    for entry in &mut entries {
        let result = &mut entry.result;
        match entry.leaf {
            7 => {
                // CLWB: there is nothing to write back.
                result.ebx |= bits(&[24]);
                // VERW clears buffers, speculation control, STIBP, L1 flush, architectural
                // capabilities, SSBD.
                result.edx |= bits(&[10, 26, 27, 28, 29, 31]);
            }
            // IBPB, IBRS, STIBP, the three hints on them, SSBD by either register, predictive
            // store forwarding, no branch type confusion.
            0x8000_0008 => result.ebx |= bits(&[12, 14, 15, 16, 17, 18, 24, 25, 28, 29]),
            // No nested data breakpoints, VERW clears, selective and full branch type flush, no
            // SRSO between user and kernel.
            0x8000_0021 => result.eax |= bits(&[0, 5, 27, 28, 30]),
            _ => {}
        }
    }
    CpuidTable::new(entries)
}

/// Frequency of the time-stamp counter, where a guest was told no other, and of the APIC timer.
pub const TSC_HZ: u32 = 1_000_000_000;

/// Paravirtual clock (old and new MSRs), no delays round port I/O, stable clock.
const KVM_FEATURES: u32 = bits(&[0, 1, 3, 24]);

const fn bits(list: &[u32]) -> u32 {
    let mut value = 0;
    let mut i = 0;
    while i < list.len() {
        value |= 1 << list[i];
        i += 1;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rich_host() -> HostFeatures {
        HostFeatures {
            leaf1_ecx: u32::MAX,
            leaf7_ebx: u32::MAX,
            avx_state: true,
        }
    }

    #[test]
    fn avx_needs_the_host() {
        let with = supported(&rich_host());
        let without = supported(&HostFeatures {
            avx_state: false,
            ..rich_host()
        });
        assert!(Features::from_table(&with).has(CpuidFeature::AVX2));
        assert!(!Features::from_table(&without).has(CpuidFeature::AVX));
        assert_eq!(with.xcr0_mask(), 7);
        assert_eq!(without.xcr0_mask(), 3);
        assert_eq!(with.xsave_size(7), 832);
        assert_eq!(with.xsave_size(3), 576);
    }

    #[test]
    fn sub_leaves_are_told_apart() {
        let table = supported(&rich_host());
        assert_eq!(table.get(0xd, 0).map(|r| r.eax), Some(7));
        assert_eq!(table.get(0xd, 2).map(|r| r.eax), Some(256));
        assert_eq!(table.get(0xd, 5), None);
        assert_eq!(table.get(0x15, 9).map(|r| r.ecx), Some(1_000_000_000));
        assert_eq!(table.kvm_features() & 1, 1);
    }

    #[test]
    fn base_instructions_need_no_bit() {
        let set = Features::from_table(&CpuidTable::default());
        assert!(set.has(CpuidFeature::INTEL386));
        assert!(set.has(CpuidFeature::CET_IBT));
        assert!(!set.has(CpuidFeature::SSE2));
    }
}
