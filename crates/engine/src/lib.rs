//! What an embedder of Skerry uses, and the command line is made of: images, machines, commands in
//! them.
//!
//! ```text
//!  Paths ── Store ── Image ─┬─ Vm::start(Image, VmSpec) ─► exec, pause, kill
//!  Choice ── select ── Backend ├─ run, vms::host (Image, RunSpec, RunIo) ─► RunOutcome
//!                           └─ boot(BootSpec) ─► MachineHandle ─► Outcome
//!  Clones ─► pools::Pool ── acquire ─► Lease of a Vm ── dropped ─► reset
//!  Paths ── vms::Registry ── find, list ─► vms::exec, pause, stop, kill, wait, remove
//! ```
//!
//! Called by `crates/cli` and by programs that embed virtual machines.

pub mod boot;
mod builtin;
mod cgroup;
pub mod check;
pub mod command;
pub mod confinement;
pub mod dates;
pub mod driver;
mod error;
pub mod events;
pub mod frozen;
pub mod hypervisor;
pub mod images;
pub mod initrd;
mod log;
mod machine;
pub mod mounts;
pub mod network;
pub mod networks;
mod parcel;
mod paths;
pub mod pools;
mod random;
pub mod resources;
pub mod run;
pub mod signals;
pub mod snapshots;
mod soft;
mod statistics;
pub mod tap;
mod transport;
pub mod units;
mod vetting;
pub mod vm;
pub mod vms;
pub mod volumes;
pub mod warm;

pub use error::EngineError;
pub use machine::MachineOptions;
pub use paths::Paths;
pub use skerry_machine::{
    CrashReason, MachineHandle, MachineRemote, Outcome, ProcessorStatistics, Sampler, TimeShares,
};
pub use skerry_oci::{Digest, Image, ImageRef, Name, Progress, Pulled, Pushed, Removed};
pub use skerry_protocol::message::{ExitStatus, FailureKind, WinSize};
pub use soft::{SoftMode, SoftOptions};
pub use statistics::Statistics;
