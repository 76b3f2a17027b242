//! The machine's virtio devices, in the order in which the guest finds them.

use std::sync::Arc;

use skerry_devices::bus::MmioBusBuilder;
use skerry_devices::irq::InterruptRouter;
use skerry_hypervisor::GuestRam;
use skerry_storage::Disk;

use crate::MachineError;
use crate::config::MachineConfig;

/// What a [`VirtioSet`] is built from.
pub(crate) struct VirtioParts<'a> {
    pub(crate) config: &'a MachineConfig,
    pub(crate) ram: &'a GuestRam,
    pub(crate) router: &'a Arc<InterruptRouter>,
    pub(crate) disks: Vec<Arc<dyn Disk>>,
}

/// All virtio devices of one machine.
#[derive(Debug)]
pub struct VirtioSet {}

impl VirtioSet {
    pub(crate) fn new(
        parts: VirtioParts<'_>,
        _mmio: &mut MmioBusBuilder,
    ) -> Result<Self, MachineError> {
        let VirtioParts {
            config,
            ram: _,
            router: _,
            disks,
        } = parts;
        if disks.len() != config.disks.len() {
            return Err(MachineError::DiskCount {
                configured: config.disks.len(),
                attached: disks.len(),
            });
        }
        Ok(Self {})
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        true
    }

    pub(crate) fn pause(&self) {}

    pub(crate) fn resume(&self) {}

    pub(crate) fn reset(&self) {}

    pub(crate) fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    pub(crate) fn restore(&self, _saved: Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }
}
