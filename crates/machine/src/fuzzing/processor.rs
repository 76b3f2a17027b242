//! What the processors of guests made for tests tell of themselves.

use skerry_hypervisor::{CpuidEntry, CpuidResult, CpuidTable};

/// A processor with little more than a local APIC.
pub fn cpuid(id: u32) -> CpuidTable {
    let entry = |leaf, eax, ebx, edx| CpuidEntry {
        leaf,
        subleaf: None,
        result: CpuidResult {
            eax,
            ebx,
            ecx: 0,
            edx,
        },
    };
    // FPU, PSE, TSC, MSR, PAE, CX8, APIC, CMOV, FXSR, SSE, SSE2.
    let features = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 15 | 7 << 24;
    CpuidTable {
        entries: vec![entry(0, 1, 0, 0), entry(1, 0x600, id << 24, features)],
    }
}
