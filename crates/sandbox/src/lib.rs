//! Function sandboxes: one untrusted function in a virtual machine of its own, without a kernel.
//!
//! ```no_run
//! use skerry_sandbox::Sandbox;
//!
//! let mut sandbox = Sandbox::builder()
//!     .guest("plugin.elf")
//!     .host_fn("lookup", |key: String| key.len() as u32)
//!     .build()?;
//! let sum: i32 = sandbox.call("add", (1, 2))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```text
//!   Sandbox::call ─▶ area: arguments ─▶ Processor::run ─▶ guest (ring 3) ─▶ OUT: why it leaves
//!        ▲                                    │ (KVM, soft)                     │
//!        │            InterruptHandle, Watchdog ─▶ Canceller                    ▼
//!        └── value, or CallError ◀── exits: return, host function, log, exception
//!
//!   Snapshot (a memory file that all its sandboxes share, copy-on-write) ◀─▶ Sandbox::restore
//! ```
//!
//! | module | job |
//! |---|---|
//! | `layout` | what is where in the guest's memory |
//! | `elf` | the guest's program |
//! | `tables` | page tables, descriptor tables, exception stubs |
//! | `region` | memory: mapped, read and written; all `unsafe` of the crate but for its mapping |
//! | `processor` | a virtual machine of whichever backend |
//! | `mapping` | files and shared regions in a guest's address space |
//! | `exits` | the loop of a call |
//! | `fault` | what an exception means |
//! | `host_fn` | functions of the host |
//! | `interrupt`, `watchdog` | cancelling, from outside and by time |
//! | `debug` | gdb, core dumps, profiles |
//! | `dynamic` | values whose types are known only at run time |
//! | `snapshot`, `disk` | going back, copies, files |
//! | [`wasm`] | WebAssembly modules, by a guest that comes with the crate |
//! | [`component`] | WebAssembly components, by another |
//! | [`script`] | scripts, by another |
//!
//! The guest is hostile: whatever it writes is checked before it is used, and nothing of it indexes
//! memory of the host. What is mapped where is the host's: the guest runs in ring 3 and has no
//! way to its page tables, control, debug or model-specific registers.

mod bare;
mod builder;
pub mod component;
mod debug;
mod disk;
mod dynamic;
mod elf;
mod error;
mod exits;
mod fault;
#[doc(hidden)]
pub mod fuzz;
mod host_fn;
mod interrupt;
mod layout;
mod logs;
mod mapping;
mod processor;
mod region;
mod sandbox;
pub mod script;
mod snapshot;
mod tables;
mod versions;
pub mod wasm;
mod watchdog;

pub use builder::{Builder, Config, Guest};
pub use debug::{AllocationProfile, AllocationSite, CodeAddress, DebugError, DebugListener};
pub use dynamic::{NotAValue, Value};
pub use error::{BuildError, CallError, RestoreError, SnapshotError};
pub use fault::{Access, Fault};
pub use host_fn::{HostFn, HostFunctions};
pub use interrupt::{CallToken, InterruptHandle, Killed};
pub use mapping::{MapFileError, MapMode, Mapped, SharedRegion};
pub use processor::Backend;
pub use sandbox::{Failures, Metrics, Sandbox, Status};
pub use skerry_sandbox_abi::{
    Arguments, Decode, DecodeError, Description, Encode, Function, Parameter, Reader, Returned,
    Tag, Writer, serde_value,
};
pub use snapshot::Snapshot;
