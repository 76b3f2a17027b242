//! From a backend's name to a running machine: the one `match` over backends.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_hypervisor::cpu_model::{CpuChoice, CpuModel};
use skerry_hypervisor::{CpuidTable, Hypervisor};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{Attachments, Machine, MachineConfig, MachineHandle, MachineState};

use crate::confinement::Strictness;
use crate::error::EngineError;
use crate::hypervisor::{Backend, Choice, Selected, open, select};
use crate::resources;
use crate::soft::SoftOptions;

/// What every machine needs to be told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct MachineOptions {
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// How much of the host's they may take, all together, in billionths of one; `None`: as much as there
    /// is.
    pub nano_cpus: Option<u64>,
    /// The cgroup in which its process gets one of its own.
    pub cgroup_parent: Option<String>,
    /// Which backend.
    pub hypervisor: Choice,
    /// How it runs code, if it is the software processor.
    pub soft: SoftOptions,
    /// The processor model, by name and with changes ([`CpuChoice`]); `None` is the best that the
    /// backend can have.
    pub cpu_model: Option<String>,
    /// The longest that it may run.
    #[cfg_attr(feature = "schema", schema(value_type = Option<Object>))]
    pub time_limit: Option<Duration>,
    /// How far the process that runs it is confined, where that process is its own.
    pub confine: Strictness,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self {
            memory: 512 << 20,
            cpus: 1,
            nano_cpus: None,
            cgroup_parent: None,
            hypervisor: Choice::Auto,
            soft: SoftOptions::default(),
            cpu_model: None,
            time_limit: None,
            confine: Strictness::default(),
        }
    }
}

/// The backend and the processors of a machine to be.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) selected: Selected,
    pub(crate) tables: Vec<CpuidTable>,
}

/// How long a machine may run, and how much of the host's processors it may take meanwhile.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    pub(crate) time_limit: Option<Duration>,
    /// In billionths of one.
    pub(crate) nano_cpus: Option<u64>,
}

/// Picks the backend that `options` leads to and makes the processors' CPUID tables. `note` is told
/// what the user should know once (a backend passed over).
pub(crate) fn prepare(
    options: &MachineOptions,
    note: &mut dyn FnMut(&str),
) -> Result<Prepared, EngineError> {
    let selected = select(options.hypervisor, &options.soft)?;
    for text in &selected.notes {
        note(text);
    }
    let tables = cpuid_tables(options, &selected)?;
    Ok(Prepared { selected, tables })
}

/// Builds a machine and starts it: from its kernel, or, paused, from a saved state.
pub(crate) fn start(
    prepared: &Prepared,
    config: MachineConfig,
    attachments: Attachments,
    saved: Option<MachineState>,
    bounds: Bounds,
) -> Result<MachineHandle, EngineError> {
    let Selected { backend, soft, .. } = &prepared.selected;
    let limit = bounds.time_limit;
    let handle = match backend {
        Backend::Kvm => {
            let kvm: Kvm = open(*backend)?;
            start_on(&kvm, prepared, config, attachments, saved, limit)
        }
        Backend::Soft => {
            let soft = open::<Soft>(*backend)?.with_tuning(soft.tuning());
            start_on(&soft, prepared, config, attachments, saved, limit)
        }
    }?;
    if let Some(quota) = resources::own_quota(bounds.nano_cpus) {
        handle.remote().limit_processors(Some(quota));
    }
    Ok(handle)
}

fn cpuid_tables(
    options: &MachineOptions,
    selected: &Selected,
) -> Result<Vec<CpuidTable>, EngineError> {
    let capabilities = &selected.capabilities;
    let model = match &options.cpu_model {
        Some(name) => CpuChoice::from_str(name)?,
        None => CpuModel::best(capabilities).into(),
    };
    Ok((0..options.cpus)
        .map(|id| model.cpuid(capabilities, options.cpus, id))
        .collect::<Result<_, _>>()?)
}

fn start_on<H: Hypervisor>(
    hypervisor: &H,
    prepared: &Prepared,
    config: MachineConfig,
    attachments: Attachments,
    saved: Option<MachineState>,
    time_limit: Option<Duration>,
) -> Result<MachineHandle, EngineError> {
    let cpuid = |id: u32| {
        let table = prepared.tables.get(id as usize);
        table.cloned().unwrap_or_default()
    };
    let machine = Machine::<H>::new(hypervisor, config, attachments, cpuid)?;
    Ok(match saved {
        None => machine.start(time_limit)?,
        Some(state) => machine.restore(state, time_limit)?,
    })
}
