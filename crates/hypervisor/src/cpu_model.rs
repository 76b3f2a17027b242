//! Named processor models: which features a guest sees, and the CPUID tables that tell it.
//!
//! ```text
//!   Capabilities.supported_cpuid ──┐
//!   features.rs: what a model has ─┼─► CpuModel::cpuid ─► CpuidTable of one processor
//!   topology.rs: cores, caches ────┘                       (engine ─► machine ─► Vm::create_vcpu)
//! ```
//!
//! A model is a set of *features*. The processor's *identity* (vendor, family, and the bits that
//! say which faults of speculation it is free of) is that of the backend: a guest on real hardware
//! must know what to defend itself against, and one on the software processor need not.
//! Two hosts on which the same model can be had may still differ in features that only kernels
//! use (PCID, RDSEED …). A snapshot therefore keeps its tables, and [`crate::portability`] tells
//! whether another host can run them; a guest that is to travel can be started without what the other
//! host lacks ([`CpuChoice`]).

pub(crate) mod features;
mod topology;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cpuid::{CpuidEntry, CpuidResult, CpuidTable};
use crate::portability::same_frequency;
use crate::traits::Capabilities;
use features::{Allowed, Register};

/// A processor model, as `--cpu-model` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CpuModel {
    /// The level of the x86-64 ABI with SSE4.2 and POPCNT.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The level with AVX2, BMI, FMA and MOVBE.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// All that the backend can do. Its snapshots restore on equal hosts only.
    #[serde(rename = "host")]
    Host,
}

/// A CPUID table could not be made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CpuModelError {
    /// Unknown name.
    #[error("CPU model {0:?} doesn't exist; choose x86-64-v2, x86-64-v3 or host")]
    Unknown(String),
    /// The backend can't do it.
    #[error(
        "CPU model {model} needs {}, which this processor doesn't have; choose a smaller model \
         with --cpu-model",
        .missing.join(", ")
    )]
    Missing {
        /// The model.
        model: CpuModel,
        /// What is missing, by name.
        missing: Vec<&'static str>,
    },
    /// A change that is none.
    #[error(
        "{0:?} is no change of a CPU model; take a feature away with -NAME, or set the time-stamp \
         counter's frequency with tsc-khz=NUMBER"
    )]
    UnknownChange(String),
    /// A feature without which it would be another model.
    #[error("CPU model {model} can't be without {feature}; choose a smaller model")]
    Needed {
        /// The model.
        model: CpuModel,
        /// The feature.
        feature: &'static str,
    },
    /// The backend's counter has one frequency.
    #[error(
        "The time-stamp counter runs at {here} kHz here and can't be scaled to {asked} kHz; leave \
         tsc-khz out of --cpu-model"
    )]
    TscFrequency {
        /// What was asked for, in kHz.
        asked: u32,
        /// What there is.
        here: u32,
    },
    /// More processors than can be told apart, or none.
    #[error("A machine can't have {cpus} processors, or a processor {id} of them")]
    BadTopology {
        /// How many.
        cpus: u32,
        /// Which.
        id: u32,
    },
}

/// Processors of which all have an 8-bit APIC id below the broadcast's.
const MAX_CPUS: u32 = 255;

impl CpuModel {
    /// Every model, the most capable named one first.
    pub const ALL: [Self; 3] = [Self::V3, Self::V2, Self::Host];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::Host => "host",
        }
    }

    /// The most capable named model that the backend can run; [`CpuModel::Host`] if none.
    pub fn best(capabilities: &Capabilities) -> Self {
        let supported = &capabilities.supported_cpuid;
        [Self::V3, Self::V2]
            .into_iter()
            .find(|model| features::missing(*model, supported).is_empty())
            .unwrap_or(Self::Host)
    }

    /// The table of processor `id` in a machine of `cpus`.
    pub fn cpuid(
        self,
        capabilities: &Capabilities,
        cpus: u32,
        id: u32,
    ) -> Result<CpuidTable, CpuModelError> {
        CpuChoice::from(self).cpuid(capabilities, cpus, id)
    }
}

/// A model and changes to it, as `--cpu-model` takes them: `x86-64-v3,-pcid,tsc-khz=2400000` is
/// x86-64-v3 without PCID, the time-stamp counter at 2.4 GHz.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuChoice {
    model: CpuModel,
    without: Vec<&'static str>,
    tsc_khz: Option<u32>,
}

impl From<CpuModel> for CpuChoice {
    fn from(model: CpuModel) -> Self {
        Self {
            model,
            without: Vec::new(),
            tsc_khz: None,
        }
    }
}

impl FromStr for CpuChoice {
    type Err = CpuModelError;

    fn from_str(text: &str) -> Result<Self, CpuModelError> {
        let mut words = text.split(',');
        let model: CpuModel = words.next().unwrap_or_default().parse()?;
        let mut choice = Self::from(model);
        for word in words {
            choice.change(word)?;
        }
        Ok(choice)
    }
}

impl CpuChoice {
    fn change(&mut self, word: &str) -> Result<(), CpuModelError> {
        let unknown = || CpuModelError::UnknownChange(word.to_owned());
        if let Some(number) = word.strip_prefix("tsc-khz=") {
            // What processors have: a frequency is in bounds everywhere, or nowhere.
            let khz = number.parse().ok();
            let khz = khz.filter(|khz| (100_000..=10_000_000).contains(khz));
            self.tsc_khz = Some(khz.ok_or_else(unknown)?);
            return Ok(());
        }
        let name = word.strip_prefix('-').ok_or_else(unknown)?;
        match features::named(name, self.model).ok_or_else(unknown)? {
            (feature, true) => Err(CpuModelError::Needed {
                model: self.model,
                feature,
            }),
            (feature, false) => {
                self.without.push(feature);
                Ok(())
            }
        }
    }

    /// The table of processor `id` in a machine of `cpus`.
    pub fn cpuid(
        &self,
        capabilities: &Capabilities,
        cpus: u32,
        id: u32,
    ) -> Result<CpuidTable, CpuModelError> {
        if id >= cpus || cpus > MAX_CPUS {
            return Err(CpuModelError::BadTopology { cpus, id });
        }
        let supported = &capabilities.supported_cpuid;
        let missing = features::missing(self.model, supported);
        if !missing.is_empty() {
            return Err(CpuModelError::Missing {
                model: self.model,
                missing,
            });
        }
        let here = capabilities.tsc_khz;
        let tsc_khz = self.tsc_khz.unwrap_or(here);
        if !capabilities.tsc_scaling && !same_frequency(here, tsc_khz) {
            let asked = tsc_khz;
            return Err(CpuModelError::TscFrequency { asked, here });
        }
        let mut table = Builder {
            supported,
            choice: self,
            entries: Vec::with_capacity(40),
        };
        table.features(capabilities);
        table.clocks(tsc_khz);
        table.name();
        topology::add(&mut table, cpus, id);
        Ok(CpuidTable {
            entries: table.entries,
        })
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CpuModel {
    type Err = CpuModelError;

    fn from_str(name: &str) -> Result<Self, CpuModelError> {
        Self::ALL
            .into_iter()
            .find(|model| model.name() == name)
            .ok_or_else(|| CpuModelError::Unknown(name.to_owned()))
    }
}

impl CpuidTable {
    /// The features of this table that a guest can't do without and that a backend which accepts
    /// `accepted` does not have, by name (or by leaf and bit where they have none here).
    pub fn missing_from(&self, accepted: &CpuidTable) -> Vec<String> {
        features::missing_of_table(self, accepted)
    }
}

const VENDOR_INTEL: (u32, u32, u32) = (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
const MAX_BASIC_LEAF: u32 = 0x1f;
const MAX_HYPERVISOR_LEAF: u32 = 0x4000_0010;
const MAX_EXTENDED_LEAF: u32 = 0x8000_0021;
/// The local APIC's timer counts nanoseconds, on every backend.
const APIC_KHZ: u32 = 1_000_000;

struct Builder<'a> {
    supported: &'a CpuidTable,
    choice: &'a CpuChoice,
    entries: Vec<CpuidEntry>,
}

impl Builder<'_> {
    fn push(&mut self, leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) {
        self.entries.push(CpuidEntry {
            leaf,
            subleaf,
            result: CpuidResult { eax, ebx, ecx, edx },
        });
    }

    fn supported(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.supported.get(leaf, subleaf).unwrap_or_default()
    }

    fn is_intel(&self) -> bool {
        let CpuidResult { ebx, ecx, edx, .. } = self.supported(0, 0);
        (ebx, edx, ecx) == (VENDOR_INTEL.0, VENDOR_INTEL.1, VENDOR_INTEL.2)
    }

    /// The bits of a register that are supported and that the model has.
    fn allowed(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        let without = features::bits_of(&self.choice.without, leaf, subleaf, register);
        let supported = register.of(&self.supported(leaf, subleaf)) & !without;
        match features::allowed(self.choice.model, leaf, subleaf, register) {
            Allowed::Only(mask) => supported & mask,
            Allowed::AllBut(mask) => supported & !mask,
        }
    }

    fn features(&mut self, capabilities: &Capabilities) {
        use Register::{Eax, Ebx, Ecx, Edx};
        let id = self.supported(0, 0);
        self.push(0, None, [MAX_BASIC_LEAF, id.ebx, id.ecx, id.edx]);
        let signature = self.supported(1, 0).eax;
        let (ecx, edx) = (self.allowed(1, 0, Ecx), self.allowed(1, 0, Edx));
        // 64-byte lines for CLFLUSH; `topology` adds the rest of EBX, and HTT.
        self.push(1, None, [signature, 8 << 8, ecx, edx]);
        let seven = [
            0,
            self.allowed(7, 0, Ebx),
            self.allowed(7, 0, Ecx),
            self.allowed(7, 0, Edx),
        ];
        self.push(7, Some(0), seven);
        self.extended_state();
        let (eax, ebx) = (MAX_EXTENDED_LEAF, id.ebx);
        self.push(0x8000_0000, None, [eax, ebx, id.ecx, id.edx]);
        let (ecx, edx) = (
            self.allowed(0x8000_0001, 0, Ecx),
            self.allowed(0x8000_0001, 0, Edx),
        );
        self.push(
            0x8000_0001,
            None,
            [self.supported(0x8000_0001, 0).eax, 0, ecx, edx],
        );
        let edx = self.allowed(0x8000_0007, 0, Edx);
        self.push(0x8000_0007, None, [0, 0, 0, edx]);
        let bits = self.supported(0x8000_0008, 0).eax & 0xff00
            | u32::from(capabilities.physical_address_bits);
        let ebx = self.allowed(0x8000_0008, 0, Ebx);
        self.push(0x8000_0008, None, [bits, ebx, 0, 0]);
        let (eax, ecx) = (
            self.allowed(0x8000_0021, 0, Eax),
            self.allowed(0x8000_0021, 0, Ecx),
        );
        self.push(0x8000_0021, None, [eax, 0, ecx, 0]);
    }

    fn extended_state(&mut self) {
        let xcr0 = self.allowed(0xd, 0, Register::Eax);
        if self.allowed(1, 0, Register::Ecx) & features::XSAVE == 0 || xcr0 & 1 == 0 {
            return;
        }
        let regions: Vec<_> = (2..32)
            .filter(|bit| xcr0 & (1 << bit) != 0)
            .map(|bit| (bit, self.supported(0xd, bit)))
            .collect();
        let size = regions
            .iter()
            .map(|(_, region)| region.eax.saturating_add(region.ebx))
            .fold(576, u32::max);
        let instructions = self.allowed(0xd, 1, Register::Eax);
        self.push(0xd, Some(0), [xcr0, size, size, 0]);
        self.push(0xd, Some(1), [instructions, size, 0, 0]);
        for (bit, region) in regions {
            // ECX bit 0 would make it supervisor state, bit 1 align it when compacted.
            self.push(0xd, Some(bit), [region.eax, region.ebx, region.ecx & 2, 0]);
        }
    }

    /// The frequency of the time-stamp counter is told in every way that kernels know, so that
    /// none has to measure it.
    fn clocks(&mut self, tsc_khz: u32) {
        let mhz = tsc_khz / 1000;
        if let Some(hz) = tsc_khz.checked_mul(1000) {
            self.push(0x15, None, [1, 1, hz, 0]);
        } else {
            // The crystal as a hundredth of it, so that its frequency fits.
            self.push(0x15, None, [1, 100, tsc_khz.saturating_mul(10), 0]);
        }
        self.push(0x16, None, [mhz & 0xffff, mhz & 0xffff, 100, 0]);
        let hypervisor = self.supported(0x4000_0000, 0);
        if hypervisor.ebx != 0 {
            let CpuidResult { ebx, ecx, edx, .. } = hypervisor;
            self.push(0x4000_0000, None, [MAX_HYPERVISOR_LEAF, ebx, ecx, edx]);
            let features = self.allowed(0x4000_0001, 0, Register::Eax);
            self.push(0x4000_0001, None, [features, 0, 0, 0]);
            self.push(MAX_HYPERVISOR_LEAF, None, [tsc_khz, APIC_KHZ, 0, 0]);
        }
    }

    fn name(&mut self) {
        let mut text = [0; 48];
        let name = format!("Skerry virtual processor ({})", self.choice.model);
        for (to, from) in text.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let mut words = text
            .chunks_exact(4)
            .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        for leaf in 0x8000_0002..=0x8000_0004 {
            let registers = std::array::from_fn(|_| words.next().unwrap_or(0));
            self.push(leaf, None, registers);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
