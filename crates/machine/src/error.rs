//! Why a machine could not be built or changed.

use std::io;
use std::path::PathBuf;

use skerry_hypervisor as hv;
use thiserror::Error;

/// Building or starting a machine failed.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The memory size is none that a machine can have.
    #[error(
        "Memory of {0} bytes is no machine's: give a multiple of 4 KiB from 2 MiB to 1 TiB with --memory"
    )]
    BadMemorySize(u64),
    /// The host has no room for the guest's memory.
    #[error("Can't reserve {mib} MiB of guest memory on this host: give less with --memory")]
    Memory {
        /// What was asked for.
        mib: u64,
        /// The cause.
        source: io::Error,
    },
    /// More processors than the machine has room for, or none.
    #[error("{0} CPUs can't be had: give between 1 and {max} with --cpus", max = crate::layout::MAX_CPUS)]
    BadCpuCount(u32),
    /// A kernel or initrd can't be read.
    #[error("Can't read {what} {}: check the path and its permissions", path.display())]
    ReadFile {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Kernel, initrd or tables can't be loaded.
    #[error(transparent)]
    Load(#[from] skerry_boot::LoadError),
    /// The backend can't make a virtual machine.
    #[error(transparent)]
    CreateVm(#[from] hv::CreateVmError),
    /// The backend can't map memory.
    #[error(transparent)]
    Map(#[from] hv::MapError),
    /// The backend can't make a processor.
    #[error(transparent)]
    CreateVcpu(#[from] hv::CreateVcpuError),
    /// Registers can't be set or read.
    #[error(transparent)]
    CpuState(#[from] hv::StateError),
    /// Two devices want one address.
    #[error(transparent)]
    Bus(#[from] skerry_devices::bus::BusError),
    /// A network card and what it is plugged into go together.
    #[error("The machine has {} network card and {} it into: give both or none",
        if *configured { "a" } else { "no" }, if *configured { "nothing to plug" } else { "something to plug" })]
    Network {
        /// The configuration has a card.
        configured: bool,
    },
    /// A device refuses a saved state.
    #[error(transparent)]
    DeviceState(#[from] skerry_devices::StateError),
    /// A device or thread can't be made.
    #[error("Can't make the {what}: the host may be out of threads or memory")]
    Resource {
        /// What was to be made.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// More virtio devices than there are slots.
    #[error("The machine has {wanted} virtio devices, and {max} is the most: use fewer disks", max = crate::layout::VIRTIO_SLOTS)]
    TooManyDevices {
        /// How many were asked for.
        wanted: usize,
    },
    /// A context id that no guest can have.
    #[error("The context id {0} is no guest's: give its socket device one from 3 to 4294967294")]
    BadContextId(u64),
    /// A restored machine was reset.
    #[error(
        "The restored machine can't boot again: its kernel {} is not among what it was restored from; start a new one", path.display()
    )]
    NoKernel {
        /// What its configuration names.
        path: PathBuf,
    },
    /// Saved memory is none that the machine can have.
    #[error("The saved memory at {at:#x} can't be mapped: {problem}; take a new snapshot")]
    SavedMemory {
        /// Where it belongs, counted without the holes in the address space.
        at: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A saved clock says what no clock can.
    #[error(
        "The saved clock of {0} ns is none that a machine can have reached: take a new snapshot"
    )]
    BadClock(u64),
    /// Attachments and configuration disagree.
    #[error("The machine's configuration names {configured} disks, and {attached} were opened")]
    DiskCount {
        /// In the configuration.
        configured: usize,
        /// Attached.
        attached: usize,
    },
    /// The same of shared folders.
    #[error(
        "The machine's configuration names {configured} shared folders, and {attached} were opened"
    )]
    ShareCount {
        /// In the configuration.
        configured: usize,
        /// Attached.
        attached: usize,
    },
    /// The state is of another machine or another build.
    #[error(
        "The saved state has version {version} and {cpus} CPUs, which is not what this machine has: use the build and the configuration that it was saved with"
    )]
    OtherMachine {
        /// Its version.
        version: u32,
        /// Its processors.
        cpus: usize,
    },
    /// The backend can't tell what the guest wrote.
    #[error(transparent)]
    DirtyLog(#[from] hv::DirtyLogError),
    /// Nobody asked for the log of writes.
    #[error("The machine's writes are not tracked: track them from its start, or save all of it")]
    NotTracked,
    /// Memory was neither restored nor rebased.
    #[error("The machine has nothing to go back to: save it first")]
    NoBase,
    /// The machine was configured without.
    #[error("The machine has no VM generation id: it was made without one")]
    NoGenerationId,
    /// A processor may be running.
    #[error("The machine is not paused: pause it first")]
    NotPaused,
    /// The run is over.
    #[error("The machine has ended: start a new one")]
    Ended,
}
