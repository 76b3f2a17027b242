//! What the software processor offers on this host, and how fast it is.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use skerry_hypervisor::probe::{self, GuestSpeed};
use skerry_hypervisor::validate::StateLimits;
use skerry_hypervisor::{Capabilities, CpuidTable, CreateVmError, Hypervisor, Unusable, VmSpec};
use skerry_x86cpu::{HostFeatures, TSC_HZ, Tuning};

use crate::state;
use crate::vm::{MAX_VCPUS, SoftVm};

/// The time-stamp counter counts nanoseconds, unless a guest was told another frequency.
pub(crate) const TSC_KHZ: u32 = TSC_HZ / 1000;

/// Nothing here can hang; this only bounds a measurement on a host that is overloaded.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The software processor.
pub struct Soft {
    supported_cpuid: CpuidTable,
    accepted_cpuid: CpuidTable,
    tuning: Tuning,
}

/// Every CPUID bit that a guest may be shown.
pub(crate) fn supported() -> CpuidTable {
    static TABLE: OnceLock<CpuidTable> = OnceLock::new();
    TABLE
        .get_or_init(|| state::cpuid_from(&skerry_x86cpu::supported(&HostFeatures::detect())))
        .clone()
}

/// Every CPUID bit that a guest from elsewhere may have been shown.
pub(crate) fn accepted() -> &'static CpuidTable {
    static TABLE: OnceLock<CpuidTable> = OnceLock::new();
    TABLE.get_or_init(|| state::cpuid_from(&skerry_x86cpu::accepted(&HostFeatures::detect())))
}

/// What follows from a CPUID table that a processor is made with.
pub(crate) struct Model {
    /// The table itself.
    table: CpuidTable,
    /// The same as the processor has it.
    pub(crate) own: skerry_x86cpu::CpuidTable,
    /// A feature that it offers and that can't be had.
    pub(crate) missing: Option<String>,
    pub(crate) khz: u32,
    /// With and without local APIC.
    limits: [StateLimits; 2],
}

impl Model {
    /// Of a table. Most that are asked for are like the one before, of which this is found out once.
    pub(crate) fn of(table: &CpuidTable) -> Arc<Self> {
        static LAST: Mutex<Option<Arc<Model>>> = Mutex::new(None);
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = last.as_ref().filter(|known| known.table == *table) {
            return known.clone();
        }
        let made = Arc::new(Self {
            table: table.clone(),
            own: state::cpuid_to(table),
            missing: table.missing_from(accepted()).into_iter().next(),
            khz: table.tsc_khz().unwrap_or(TSC_KHZ),
            limits: [false, true].map(|lapic| StateLimits::of(table, lapic)),
        });
        *last = Some(made.clone());
        made
    }

    /// What a state of such a processor can hold.
    pub(crate) fn limits(&self, lapic: bool) -> StateLimits {
        self.limits[usize::from(lapic)]
    }
}

impl Soft {
    /// The same, whose machines run code as `tuning` says.
    #[must_use]
    pub fn with_tuning(self, tuning: Tuning) -> Self {
        Self { tuning, ..self }
    }

    fn capabilities(self, measured_mips: Option<f64>) -> Capabilities {
        let physical_address_bits = self
            .supported_cpuid
            .get(0x8000_0008, 0)
            .map_or(36, |leaf| (leaf.eax & 0xff) as u8);
        Capabilities {
            name: "soft",
            description: "software processor, any x86-64 host".into(),
            measured_mips,
            max_vcpus: MAX_VCPUS,
            supported_cpuid: self.supported_cpuid,
            accepted_cpuid: self.accepted_cpuid,
            tsc_khz: TSC_KHZ,
            tsc_scaling: true,
            native: false,
            physical_address_bits,
        }
    }
}

impl Hypervisor for Soft {
    type Vm = SoftVm;

    fn probe() -> Result<Capabilities, Unusable> {
        let soft = Self::open()?;
        let broken = |why: String| Unusable {
            reason: format!("The software processor does not work here: {why}"),
            remedy: "Please report it with the output of `skerry doctor --format json`".into(),
            measured_mips: None,
        };
        let GuestSpeed { mips, sse } =
            probe::measure_guest(&soft, &soft.supported_cpuid, TIME_LIMIT)
                .map_err(|error| broken(probe::chain(&error)))?;
        if let Some(why) = sse {
            return Err(broken(why));
        }
        Ok(soft.capabilities(Some(mips)))
    }

    fn usable() -> Result<Capabilities, Unusable> {
        Ok(Self::open()?.capabilities(None))
    }

    fn open() -> Result<Self, Unusable> {
        skerry_x86cpu::prepare_executable_memory().map_err(|error| Unusable {
            reason: format!("The software processor gets no memory for code of its own: {error}"),
            remedy: "Let this program map executable memory: a policy of the host forbids it"
                .into(),
            measured_mips: None,
        })?;
        Ok(Self {
            supported_cpuid: supported(),
            accepted_cpuid: accepted().clone(),
            tuning: Tuning::default(),
        })
    }

    fn supported_cpuid(&self) -> &CpuidTable {
        &self.supported_cpuid
    }

    fn accepted_cpuid(&self) -> &CpuidTable {
        &self.accepted_cpuid
    }

    fn create_vm(&self, spec: &VmSpec) -> Result<SoftVm, CreateVmError> {
        SoftVm::new(spec, self.tuning)
    }
}
