//! Which CPUID bits a model has.

use super::CpuModel;
use crate::cpuid::{CpuidResult, CpuidTable};

/// A register of a CPUID answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn of(self, result: &CpuidResult) -> u32 {
        match self {
            Self::Eax => result.eax,
            Self::Ebx => result.ebx,
            Self::Ecx => result.ecx,
            Self::Edx => result.edx,
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Where a feature is told.
type Place = (u32, u32, Register);

const LEAF1_ECX: Place = (1, 0, Ecx);
const LEAF1_EDX: Place = (1, 0, Edx);
const LEAF7_EBX: Place = (7, 0, Ebx);
const LEAF7_ECX: Place = (7, 0, Ecx);
const LEAF7_EDX: Place = (7, 0, Edx);
const STATES: Place = (0xd, 0, Eax);
const XSAVES: Place = (0xd, 1, Eax);
const KVM: Place = (0x4000_0001, 0, Eax);
const EXT1_ECX: Place = (0x8000_0001, 0, Ecx);
const EXT1_EDX: Place = (0x8000_0001, 0, Edx);
const EXT7_EDX: Place = (0x8000_0007, 0, Edx);
const EXT8_EBX: Place = (0x8000_0008, 0, Ebx);
const EXT21_EAX: Place = (0x8000_0021, 0, Eax);
const EXT21_ECX: Place = (0x8000_0021, 0, Ecx);

/// XSAVE in ECX of leaf 1.
pub(super) const XSAVE: u32 = 1 << 26;

/// In which models a feature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// All models need it.
    Base,
    /// x86-64-v2 and above need it.
    V2,
    /// x86-64-v3 and above need it.
    V3,
    /// Named models have it where the backend does.
    Where,
    /// As `Where`, from x86-64-v3.
    WhereV3,
    /// No model has it: what it needs of the machine isn't there, or does not travel.
    Never,
}

use Level::{Base, Never, V2, V3, Where, WhereV3};

struct Feature(Place, u32, &'static str, Level);

/// Features by place, bit and name (Intel SDM 2A "CPUID", AMD APM 3 appendix E). The levels are those of
/// the x86-64 psABI §3.1.1.
#[rustfmt::skip]
const FEATURES: &[Feature] = &[
    Feature(LEAF1_EDX, 0, "fpu", Base), Feature(LEAF1_EDX, 4, "tsc", Base),
    Feature(LEAF1_EDX, 5, "msr", Base), Feature(LEAF1_EDX, 6, "pae", Base),
    Feature(LEAF1_EDX, 8, "cx8", Base), Feature(LEAF1_EDX, 9, "apic", Base),
    Feature(LEAF1_EDX, 13, "pge", Base), Feature(LEAF1_EDX, 15, "cmov", Base),
    Feature(LEAF1_EDX, 23, "mmx", Base), Feature(LEAF1_EDX, 24, "fxsr", Base),
    Feature(LEAF1_EDX, 25, "sse", Base), Feature(LEAF1_EDX, 26, "sse2", Base),
    Feature(LEAF1_EDX, 1, "vme", Where), Feature(LEAF1_EDX, 2, "de", Where),
    Feature(LEAF1_EDX, 3, "pse", Where), Feature(LEAF1_EDX, 7, "mce", Where),
    Feature(LEAF1_EDX, 11, "sep", Where), Feature(LEAF1_EDX, 12, "mtrr", Where),
    Feature(LEAF1_EDX, 14, "mca", Where), Feature(LEAF1_EDX, 16, "pat", Where),
    Feature(LEAF1_EDX, 17, "pse36", Where), Feature(LEAF1_EDX, 19, "clflush", Where),
    Feature(LEAF1_EDX, 21, "ds", Never), Feature(LEAF1_EDX, 22, "acpi", Never),
    Feature(LEAF1_EDX, 28, "htt", Never), Feature(LEAF1_EDX, 29, "tm", Never),
    Feature(LEAF1_EDX, 31, "pbe", Never),

    Feature(LEAF1_ECX, 0, "sse3", V2), Feature(LEAF1_ECX, 9, "ssse3", V2),
    Feature(LEAF1_ECX, 13, "cmpxchg16b", V2), Feature(LEAF1_ECX, 19, "sse4.1", V2),
    Feature(LEAF1_ECX, 20, "sse4.2", V2), Feature(LEAF1_ECX, 23, "popcnt", V2),
    Feature(LEAF1_ECX, 12, "fma", V3), Feature(LEAF1_ECX, 22, "movbe", V3),
    Feature(LEAF1_ECX, 26, "xsave", V3), Feature(LEAF1_ECX, 28, "avx", V3),
    Feature(LEAF1_ECX, 29, "f16c", V3),
    Feature(LEAF1_ECX, 1, "pclmulqdq", Where), Feature(LEAF1_ECX, 17, "pcid", Where),
    Feature(LEAF1_ECX, 21, "x2apic", Where), Feature(LEAF1_ECX, 24, "tsc-deadline", Where),
    Feature(LEAF1_ECX, 25, "aes", Where), Feature(LEAF1_ECX, 30, "rdrand", Where),
    Feature(LEAF1_ECX, 31, "hypervisor", Where),
    Feature(LEAF1_ECX, 2, "dtes64", Never), Feature(LEAF1_ECX, 3, "monitor", Never),
    Feature(LEAF1_ECX, 5, "vmx", Never), Feature(LEAF1_ECX, 6, "smx", Never),
    Feature(LEAF1_ECX, 7, "eist", Never), Feature(LEAF1_ECX, 15, "pdcm", Never),
    Feature(LEAF1_ECX, 27, "osxsave", Never),

    Feature(LEAF7_EBX, 3, "bmi1", V3), Feature(LEAF7_EBX, 5, "avx2", V3),
    Feature(LEAF7_EBX, 8, "bmi2", V3),
    Feature(LEAF7_EBX, 0, "fsgsbase", Where), Feature(LEAF7_EBX, 1, "tsc-adjust", Where),
    Feature(LEAF7_EBX, 7, "smep", Where), Feature(LEAF7_EBX, 9, "erms", Where),
    Feature(LEAF7_EBX, 10, "invpcid", Where), Feature(LEAF7_EBX, 18, "rdseed", Where),
    Feature(LEAF7_EBX, 19, "adx", Where), Feature(LEAF7_EBX, 20, "smap", Where),
    Feature(LEAF7_EBX, 23, "clflushopt", Where), Feature(LEAF7_EBX, 24, "clwb", Where),
    Feature(LEAF7_EBX, 29, "sha", Where),
    Feature(LEAF7_EBX, 2, "sgx", Never), Feature(LEAF7_EBX, 12, "cmt", Never),
    Feature(LEAF7_EBX, 14, "mpx", Never), Feature(LEAF7_EBX, 15, "cat", Never),
    Feature(LEAF7_EBX, 25, "processor-trace", Never),

    Feature(LEAF7_ECX, 2, "umip", Where), Feature(LEAF7_ECX, 22, "rdpid", Where),
    Feature(LEAF7_ECX, 5, "waitpkg", Never), Feature(LEAF7_ECX, 7, "shadow-stack", Never),
    Feature(LEAF7_ECX, 13, "tme", Never), Feature(LEAF7_ECX, 16, "la57", Never),
    Feature(LEAF7_ECX, 24, "bus-lock-detect", Never), Feature(LEAF7_ECX, 30, "sgx-lc", Never),

    Feature(LEAF7_EDX, 4, "fsrm", Where), Feature(LEAF7_EDX, 10, "md-clear", Where),
    Feature(LEAF7_EDX, 26, "spec-ctrl", Where), Feature(LEAF7_EDX, 27, "stibp", Where),
    Feature(LEAF7_EDX, 28, "l1d-flush", Where), Feature(LEAF7_EDX, 29, "arch-capabilities", Where),
    Feature(LEAF7_EDX, 31, "ssbd", Where),
    Feature(LEAF7_EDX, 19, "arch-lbr", Never), Feature(LEAF7_EDX, 20, "ibt", Never),
    Feature(LEAF7_EDX, 22, "amx-bf16", Never), Feature(LEAF7_EDX, 24, "amx-tile", Never),
    Feature(LEAF7_EDX, 25, "amx-int8", Never),

    Feature(STATES, 0, "x87-state", Where), Feature(STATES, 1, "sse-state", Where),
    Feature(STATES, 2, "avx-state", WhereV3),
    Feature(STATES, 3, "bound-registers", Never), Feature(STATES, 4, "bound-state", Never),
    Feature(STATES, 9, "pkru-state", Never), Feature(STATES, 17, "tile-configuration", Never),
    Feature(STATES, 18, "tile-data", Never),
    Feature(XSAVES, 0, "xsaveopt", Where), Feature(XSAVES, 1, "xsavec", Where),
    Feature(XSAVES, 2, "xgetbv1", Where),
    // Supervisor state is not in the XSAVE area that a state carries.
    Feature(XSAVES, 3, "xsaves", Never), Feature(XSAVES, 4, "xfd", Never),
    Feature(LEAF7_ECX, 3, "pku", Never),

    // The paravirtual clock; what writes into guest memory by itself does not travel.
    Feature(KVM, 0, "kvmclock", Where), Feature(KVM, 1, "no-io-delay", Where),
    Feature(KVM, 3, "kvmclock2", Where), Feature(KVM, 24, "stable-kvmclock", Where),
    Feature(KVM, 4, "async-page-fault", Never), Feature(KVM, 5, "steal-time", Never),
    Feature(KVM, 6, "paravirtual-EOI", Never), Feature(KVM, 7, "paravirtual-unhalt", Never),
    Feature(KVM, 9, "paravirtual-TLB-flush", Never),
    Feature(KVM, 10, "async-page-fault-vmexit", Never),
    Feature(KVM, 11, "paravirtual-IPI", Never), Feature(KVM, 12, "poll-control", Never),
    Feature(KVM, 13, "paravirtual-yield", Never),
    Feature(KVM, 14, "async-page-fault-interrupt", Never),
    Feature(KVM, 15, "extended-destination-ids", Never),
    Feature(KVM, 16, "map-gpa-range", Never), Feature(KVM, 17, "migration-control", Never),

    Feature(EXT1_ECX, 0, "lahf", V2), Feature(EXT1_ECX, 5, "lzcnt", V3),
    Feature(EXT1_ECX, 8, "prefetchw", Where),
    Feature(EXT1_ECX, 2, "svm", Never), Feature(EXT1_ECX, 3, "extended-apic", Never),
    Feature(EXT1_ECX, 9, "osvw", Never), Feature(EXT1_ECX, 10, "ibs", Never),
    Feature(EXT1_ECX, 12, "skinit", Never), Feature(EXT1_ECX, 13, "watchdog", Never),
    Feature(EXT1_ECX, 15, "lwp", Never), Feature(EXT1_ECX, 19, "node-id", Never),
    Feature(EXT1_ECX, 23, "perfctr-core", Never), Feature(EXT1_ECX, 24, "perfctr-nb", Never),
    Feature(EXT1_ECX, 27, "perftsc", Never), Feature(EXT1_ECX, 28, "perfctr-llc", Never),
    Feature(EXT1_ECX, 29, "monitorx", Never),

    Feature(EXT1_EDX, 11, "syscall", Base), Feature(EXT1_EDX, 20, "nx", Base),
    Feature(EXT1_EDX, 29, "long-mode", Base),
    Feature(EXT1_EDX, 22, "mmxext", Where), Feature(EXT1_EDX, 25, "ffxsr", Never),
    Feature(EXT1_EDX, 26, "1-gib-pages", Where), Feature(EXT1_EDX, 27, "rdtscp", Where),

    Feature(EXT7_EDX, 8, "invariant-tsc", Where),

    Feature(EXT8_EBX, 2, "xsaveerptr", Where), Feature(EXT8_EBX, 12, "ibpb", Where),
    Feature(EXT8_EBX, 14, "ibrs", Where), Feature(EXT8_EBX, 15, "amd-stibp", Where),
    Feature(EXT8_EBX, 16, "ibrs-always-on", Where), Feature(EXT8_EBX, 17, "stibp-always-on", Where),
    Feature(EXT8_EBX, 18, "ibrs-preferred", Where), Feature(EXT8_EBX, 24, "amd-ssbd", Where),
    Feature(EXT8_EBX, 25, "virt-ssbd", Where), Feature(EXT8_EBX, 26, "ssb-no", Where),
    Feature(EXT8_EBX, 28, "psfd", Where), Feature(EXT8_EBX, 29, "btc-no", Where),
    Feature(EXT8_EBX, 1, "irperf", Never), Feature(EXT8_EBX, 27, "cppc", Never),

    Feature(EXT21_EAX, 0, "no-nested-data-breakpoints", Where),
    Feature(EXT21_EAX, 2, "lfence-serialises", Where),
    Feature(EXT21_EAX, 5, "verw-clears", Where),
    Feature(EXT21_EAX, 6, "null-selectors-clear-the-base", Where),
    Feature(EXT21_EAX, 8, "automatic-ibrs", Where), Feature(EXT21_EAX, 27, "sbpb", Where),
    Feature(EXT21_EAX, 28, "ibpb-flushes-branch-types", Where),
    Feature(EXT21_EAX, 29, "srso-no", Where), Feature(EXT21_EAX, 30, "srso-user-kernel-no", Where),
    Feature(EXT21_ECX, 1, "tsa-sq-no", Where), Feature(EXT21_ECX, 2, "tsa-l1-no", Where),
];

/// Bits of EDX of leaf 0x8000_0001 that repeat those of leaf 1 on AMD processors.
const MIRRORED: u32 = 0x0183_f3ff;

/// How a model picks bits of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowed {
    /// These.
    Only(u32),
    /// All but these.
    AllBut(u32),
}

fn at(place: Place) -> impl Iterator<Item = &'static Feature> {
    FEATURES.iter().filter(move |feature| feature.0 == place)
}

fn bits<'a>(features: impl Iterator<Item = &'a Feature>) -> u32 {
    features.fold(0, |mask, feature| mask | 1 << feature.1)
}

/// The bits of a register that a model may have.
pub(super) fn allowed(model: CpuModel, leaf: u32, subleaf: u32, register: Register) -> Allowed {
    let place = (leaf, subleaf, register);
    let mirrored = if place == EXT1_EDX { MIRRORED } else { 0 };
    match model {
        CpuModel::Host => Allowed::AllBut(bits(at(place).filter(|f| f.3 == Never))),
        CpuModel::V2 => Allowed::Only(
            // A processor without AVX may still keep x87 and SSE state by XSAVE.
            mirrored
                | bits(at(place).filter(|f| matches!(f.3, Base | V2 | Where) || f.2 == "xsave")),
        ),
        CpuModel::V3 => Allowed::Only(mirrored | bits(at(place).filter(|f| f.3 != Never))),
    }
}

fn is_needed(model: CpuModel, level: Level) -> bool {
    match model {
        CpuModel::Host => level == Base,
        CpuModel::V2 => matches!(level, Base | V2),
        CpuModel::V3 => matches!(level, Base | V2 | V3),
    }
}

/// What `model` needs and the backend lacks.
pub(super) fn missing(model: CpuModel, supported: &CpuidTable) -> Vec<&'static str> {
    FEATURES
        .iter()
        .filter(|Feature(place, bit, _, level)| {
            is_needed(model, *level) && !has(supported, *place, *bit)
        })
        .map(|feature| feature.2)
        .collect()
}

fn has(table: &CpuidTable, (leaf, subleaf, register): Place, bit: u32) -> bool {
    table
        .get(leaf, subleaf)
        .is_some_and(|result| register.of(&result) & (1 << bit) != 0)
}

/// What it means to a guest that a feature it was shown is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// Instructions fault, registers don't exist, or something does not work as promised.
    Breaks,
    /// A defence does nothing, or a fault that was said not to be there is.
    Exposes,
    /// Nothing: a hint, or what others imply.
    Harmless,
}

fn absence(place: Place, bit: u32) -> Absence {
    match (place, bit) {
        // What we make up ourselves: hyper-threading and topology.
        (LEAF1_EDX, 28) | (EXT1_ECX, 22) => Absence::Harmless,
        (EXT1_EDX, bit) if MIRRORED & (1 << bit) != 0 => Absence::Harmless,
        // How fast string moves are; PREFETCHW runs everywhere; what SSE brings too.
        (LEAF7_EBX, 9) | (LEAF7_EDX, 4) | (EXT1_ECX, 8) | (EXT1_EDX, 22) => Absence::Harmless,
        // Hints for the use of what other bits tell; data breakpoints of nested guests.
        (EXT8_EBX, 16..=18) | (EXT21_EAX, 0) | (KVM, 1) => Absence::Harmless,
        // VERW clears buffers; XRSTOR leaves no pointers of others; no bypass of stores; no branch
        // type confusion; automatic IBRS (a bit of EFER, which is then left out) …
        (LEAF7_EDX, 10) | (EXT8_EBX, 2 | 26 | 29) => Absence::Exposes,
        (EXT21_EAX, 2 | 5 | 6 | 8 | 28 | 29 | 30) | (EXT21_ECX, _) => Absence::Exposes,
        _ => Absence::Breaks,
    }
}

fn absent(table: &CpuidTable, accepted: &CpuidTable, wanted: Absence) -> Vec<String> {
    const PLACES: [Place; 14] = [
        LEAF1_ECX, LEAF1_EDX, LEAF7_EBX, LEAF7_ECX, LEAF7_EDX, STATES, XSAVES, KVM, EXT1_ECX,
        EXT1_EDX, EXT7_EDX, EXT8_EBX, EXT21_EAX, EXT21_ECX,
    ];
    let mut names = Vec::new();
    for place in PLACES {
        for bit in 0..32 {
            if !has(table, place, bit) || has(accepted, place, bit) || absence(place, bit) != wanted
            {
                continue;
            }
            let known = at(place).find(|feature| feature.1 == bit);
            names.push(match known {
                Some(feature) => feature.2.to_owned(),
                None => format!("CPUID {:#x} {:?} bit {bit}", place.0, place.2),
            });
        }
    }
    names
}

/// Features that `table` shows, which are not in `accepted`, and which a guest can't do without.
pub(super) fn missing_of_table(table: &CpuidTable, accepted: &CpuidTable) -> Vec<String> {
    absent(table, accepted, Absence::Breaks)
}

/// Defences that `table` shows, and freedom from faults, which are not in `accepted`.
pub(crate) fn undefended(table: &CpuidTable, accepted: &CpuidTable) -> Vec<String> {
    absent(table, accepted, Absence::Exposes)
}

/// The feature of that name, if a model can have it: its name, and whether `model` needs it.
pub(super) fn named(name: &str, model: CpuModel) -> Option<(&'static str, bool)> {
    let feature = FEATURES
        .iter()
        .find(|feature| feature.2 == name && feature.3 != Never)?;
    Some((feature.2, is_needed(model, feature.3)))
}

/// The bits of a register that these features are.
pub(super) fn bits_of(names: &[&str], leaf: u32, subleaf: u32, register: Register) -> u32 {
    bits(at((leaf, subleaf, register)).filter(|feature| names.contains(&feature.2)))
}
