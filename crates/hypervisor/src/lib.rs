//! The hypervisor contract: what every backend (KVM, the software processor, later MSHV, WHP, HVF)
//! gives to the machine above it, and nothing that only one of them could give.
//!
//! ```text
//!   machine ── Hypervisor::create_vm ──► Vm ── map / signal_msi / dirty_pages
//!      │                                  └── create_vcpu ──► Vcpu ── run() ─► Exit
//!      │                                                        ▲        │ PortIn, MmioRead …
//!      └── Canceller (any thread) ── cancel(CallId) ────────────┘        ▼
//!                                                          complete_read(value)
//! ```
//!
//! This crate holds types and traits only: no operating-system code, no device, no policy. The
//! conformance suite that every backend must pass is in the `conformance` module (feature `conformance`).

pub mod cancel;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod cpu_model;
pub mod cpuid;
pub mod error;
pub mod exit;
pub mod memory;
pub mod msr;
pub mod portability;
pub mod probe;
pub mod state;
pub mod statistics;
pub mod traits;
pub mod validate;

pub use cancel::{CallId, CancelOutcome, Canceller, Kick, cancel_all};
pub use cpu_model::{CpuChoice, CpuModel, CpuModelError};
pub use cpuid::{CpuidEntry, CpuidResult, CpuidTable};
pub use error::{
    BudgetError, CreateVcpuError, CreateVmError, DirtyLogError, InterruptError, MapError, RunError,
    StateError, Unusable,
};
pub use exit::Exit;
pub use memory::{Gpa, GuestRam, MemorySlot, PAGE_SIZE, PageTracker, RamRegion};
pub use portability::{Loss, NotPortable};
pub use probe::ProbeReport;
pub use state::{BootRegisters, CpuState};
pub use statistics::Statistics;
pub use traits::{BUDGET_SLACK, Capabilities, Hypervisor, Irqchip, Vcpu, Vm, VmSpec};
