//! What a machine's processors have done, for `--stats` and `inspect`.

use serde::{Deserialize, Serialize};
use skerry_machine::{MachineRemote, ProcessorStatistics, Sampler};

use crate::error::EngineError;
use crate::hypervisor::{Backend, Selected};
use crate::soft::SoftOptions;

/// What a machine's processors have done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Statistics {
    /// What runs the machine.
    pub hypervisor: Backend,
    /// How its software processors run code, where it has such.
    pub soft: Option<SoftOptions>,
    /// By processor; `None` where the hypervisor counts nothing.
    pub processors: Option<Vec<ProcessorStatistics>>,
}

/// Begins to look at what the processors of `machine` are at, if that is wanted; `None` too where the
/// hypervisor can't tell.
pub(crate) fn sampler(
    machine: &MachineRemote,
    wanted: bool,
) -> Result<Option<Sampler>, EngineError> {
    match wanted {
        true => Ok(machine.sample()?),
        false => Ok(None),
    }
}

impl Statistics {
    /// Those of a machine.
    pub(crate) fn of(
        machine: &MachineRemote,
        selected: &Selected,
        sampler: Option<&Sampler>,
    ) -> Self {
        let soft = selected.backend == Backend::Soft;
        Self {
            hypervisor: selected.backend,
            soft: soft.then(|| selected.soft.in_full()),
            processors: machine.statistics(sampler),
        }
    }
}
