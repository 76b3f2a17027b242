//! A whole machine on any backend: memory, chipset, virtio, processors, and how its run ends.
//!
//! ```text
//!  engine ── MachineConfig + Attachments ──► Machine::new ──► start() ──► MachineHandle
//!                                                                            │ pause, kill, wait
//!      vCPU threads ── Vcpu::run ─► Exit ─► PortBus / MmioBus ─► devices     ▼
//!           ▲  cancelled, parked, commanded                         │   supervisor thread:
//!           └───────────────── Control ◄── MachineEvents ◄──────────┘   resets, ends, Outcome
//!      devices ─ IrqLine ─► router ─► PIC ─ ExtINT ─► vCPU 0
//!                                └──► I/O APIC ─ message ─► Vm::signal_msi
//! ```
//!
//! Generic over the hypervisor contract and monomorphised per backend; called by `engine`, which
//! chooses the backend. Every device is wired in one place for cold boot and reset alike.

mod chipset;
mod config;
mod control;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handle;
mod interrupts;
mod layers;
pub mod layout;
mod machine;
mod memory;
mod outcome;
mod pages;
mod quota;
mod report;
mod state;
mod statistics;
mod tracking;
mod vcpu;
mod virtio;

pub use chipset::{ChipsetState, SerialSink};
pub use config::{DiskConfig, MachineConfig, ShareConfig};
pub use error::MachineError;
pub use handle::{MachineHandle, MachineRemote, Rewound};
pub use machine::{Attachments, Machine};
pub use memory::{SavedMemory, SavedRun};
pub use outcome::{CrashReason, Outcome};
pub use pages::PageSet;
pub use skerry_devices::serial::SerialInput;
pub use skerry_devices::virtio::console::PortHandle;
pub use skerry_devices::virtio::net::{NetBackend, NetConfig};
pub use state::{MACHINE_STATE_VERSION, MachineState};
pub use statistics::{ProcessorStatistics, Sampler, TimeShares};
pub use tracking::prepare_tracking;
pub use virtio::VirtioSet;
