//! What an embedder of Skerry uses, and the command line is made of: images, machines, commands in
//! them.
//!
//! ```text
//!  Paths ── Store ── Image ─┐
//!  Choice ── select ── Backend ├─ run(Image, RunSpec, RunIo) ─► RunOutcome
//!                           └─ boot(BootSpec) ─► MachineHandle ─► Outcome
//! ```
//!
//! Called by `crates/cli` and by programs that embed virtual machines.

pub mod boot;
mod builtin;
mod error;
pub mod hypervisor;
pub mod images;
pub mod initrd;
mod log;
mod machine;
mod paths;
pub mod run;
pub mod snapshots;
mod transport;
mod warm;

pub use error::EngineError;
pub use machine::MachineOptions;
pub use paths::Paths;
pub use skerry_machine::{CrashReason, MachineHandle, MachineRemote, Outcome};
pub use skerry_oci::{Image, ImageRef, Progress, Removed};
pub use skerry_protocol::message::{ExitStatus, FailureKind, WinSize};
