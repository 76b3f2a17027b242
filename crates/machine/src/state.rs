//! The state of a whole machine but its memory: taken and put back in one fixed order, with every
//! processor parked.

use serde::{Deserialize, Serialize};
use skerry_devices::virtio::VirtioMmioState;
use skerry_hypervisor::state::CpuState;

use crate::chipset::ChipsetState;

/// The version of [`MachineState`]'s fields; raised with every change of them.
pub const MACHINE_STATE_VERSION: u32 = 2;

/// Everything that changes in a machine, guest memory excepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// [`MACHINE_STATE_VERSION`].
    pub version: u32,
    /// The guest's paravirtual clock, in nanoseconds.
    pub clock_ns: u64,
    /// Processors, by id.
    pub cpus: Vec<CpuState>,
    /// Virtio devices, by slot.
    pub virtio: Vec<VirtioMmioState>,
    /// Chipset and serial ports.
    pub chipset: ChipsetState,
}
