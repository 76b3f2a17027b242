//! What a machine is: one value, from which cold boot and restore build the same wiring.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use skerry_devices::virtio::net::NetConfig;

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What messages call it and, shortened, what the guest reads as its serial number.
    pub name: String,
    /// The guest may not write.
    pub read_only: bool,
    /// A saved machine goes on with any other disk: it was not in use.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exchangeable: bool,
}

/// A folder that is shared with the guest. Which one is told by
/// [`Attachments::shares`](crate::Attachments::shares).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// What the guest mounts it by.
    pub tag: String,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Bytes of RAM, a multiple of 4 KiB.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// The kernel file, or the name of the one given in [`crate::Attachments::kernel`].
    pub kernel: PathBuf,
    /// The initial RAM disk or multiboot module, likewise.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, complete: nothing is added to it. `None`: what is usual for the kernel's
    /// kind.
    pub command_line: Option<String>,
    /// Which of COM1 to COM4 the machine has.
    pub serial: [bool; 4],
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Virtio console.
    pub console: bool,
    /// Virtio entropy source.
    pub rng: bool,
    /// Virtio balloon, by which free memory goes back to the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// Virtio socket device with this context id.
    pub vsock: Option<u64>,
    /// Virtio network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetConfig>,
    /// Virtio file systems.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// A VM generation id, which [`MachineRemote::new_generation`](crate::MachineRemote::new_generation)
    /// changes.
    #[serde(default)]
    pub generation_id: bool,
    /// A reset ends the run.
    pub no_reboot: bool,
    /// Port of the debug-exit device.
    pub debug_exit: Option<u16>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            cpus: 1,
            kernel: PathBuf::new(),
            initrd: None,
            command_line: None,
            serial: [true, false, false, false],
            disks: Vec::new(),
            console: false,
            rng: false,
            balloon: false,
            vsock: None,
            network: None,
            shares: Vec::new(),
            generation_id: false,
            no_reboot: false,
            debug_exit: None,
        }
    }
}
