//! CPUID tables as a backend takes them.

use serde::{Deserialize, Serialize};

/// What CPUID returns in EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// One leaf, or one sub-leaf, of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Input EAX.
    pub leaf: u32,
    /// Input ECX, for leaves that have sub-leaves.
    pub subleaf: Option<u32>,
    /// The answer. Bits that follow from processor state (OSXSAVE, the APIC id of a moved APIC,
    /// the XSAVE size of leaf 0xd) are kept right by the backend.
    pub result: CpuidResult,
}

/// Everything that CPUID answers on one virtual processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    /// The entries, in no particular order; the first that matches counts.
    pub entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// The answer for `leaf` and `subleaf`; `None` where the table has none.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidResult> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map(|e| e.result)
    }

    /// The frequency of the time-stamp counter that the table tells the guest, in kHz: from the
    /// hypervisor leaf 0x4000_0010, or leaf 0x15 (Intel SDM 2A, CPUID).
    pub fn tsc_khz(&self) -> Option<u32> {
        if let Some(leaf) = self.get(0x4000_0010, 0).filter(|leaf| leaf.eax != 0) {
            return Some(leaf.eax);
        }
        let leaf = self.get(0x15, 0)?;
        let hz = u64::from(leaf.ecx)
            .checked_mul(leaf.ebx.into())?
            .checked_div(leaf.eax.into())?;
        u32::try_from(hz / 1000).ok().filter(|khz| *khz != 0)
    }
}
