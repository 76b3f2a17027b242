//! From a backend's name to a running machine: the one `match` over backends.

use std::str::FromStr;
use std::time::Duration;

use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor::{CpuidTable, Hypervisor};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{Attachments, Machine, MachineConfig, MachineHandle};

use crate::error::EngineError;
use crate::hypervisor::{Backend, Choice, Selected, open, select};

/// What every machine needs to be told.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Which backend.
    pub hypervisor: Choice,
    /// The processor model, by name; `None` is the best that the backend can have.
    pub cpu_model: Option<String>,
    /// The longest that it may run.
    pub time_limit: Option<Duration>,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self {
            memory: 512 << 20,
            cpus: 1,
            hypervisor: Choice::Auto,
            cpu_model: None,
            time_limit: None,
        }
    }
}

/// Builds and starts a machine on the backend that `options` leads to. `note` is told what the
/// user should know once (a backend passed over).
pub(crate) fn start(
    options: &MachineOptions,
    config: MachineConfig,
    attachments: Attachments,
    note: &mut dyn FnMut(&str),
) -> Result<MachineHandle, EngineError> {
    let selected = select(options.hypervisor)?;
    for text in &selected.notes {
        note(text);
    }
    let tables = cpuid_tables(options, &selected)?;
    match selected.backend {
        Backend::Kvm => start_on::<Kvm>(&selected, options, config, attachments, tables),
        Backend::Soft => start_on::<Soft>(&selected, options, config, attachments, tables),
    }
}

fn cpuid_tables(
    options: &MachineOptions,
    selected: &Selected,
) -> Result<Vec<CpuidTable>, EngineError> {
    let capabilities = &selected.capabilities;
    let model = match &options.cpu_model {
        Some(name) => CpuModel::from_str(name)?,
        None => CpuModel::best(capabilities),
    };
    Ok((0..options.cpus)
        .map(|id| model.cpuid(capabilities, options.cpus, id))
        .collect::<Result<_, _>>()?)
}

fn start_on<H: Hypervisor>(
    selected: &Selected,
    options: &MachineOptions,
    config: MachineConfig,
    attachments: Attachments,
    tables: Vec<CpuidTable>,
) -> Result<MachineHandle, EngineError> {
    let hypervisor: H = open(selected.backend)?;
    let cpuid = move |id: u32| tables.get(id as usize).cloned().unwrap_or_default();
    let machine = Machine::<H>::new(&hypervisor, config, attachments, cpuid)?;
    Ok(machine.start(options.time_limit)?)
}
