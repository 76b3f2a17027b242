//! Runtime library of function-sandbox guests.
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! use skerry_sandbox_rt::{HostError, guest_fn, host_fn};
//!
//! #[host_fn]
//! fn lookup(key: &str) -> Result<String, HostError>;
//!
//! #[guest_fn]
//! fn add(a: i32, b: i32) -> i32 { a + b }
//! ```
//!
//! A guest is a freestanding ELF program: the ordinary stable toolchain and target of a Linux host
//! build it, linked with `-nostartfiles -nostdlib -static` (a `build.rs` of one line each, see
//! `docs/src/sandbox.md`) and `panic = "abort"`.
//!
//! ```text
//!   _start ─▶ entry::start ─▶ memory, logger, #[guest_init]s ─▶ OUT ready
//!                 ▲                                                │ host writes a request
//!                 └── serve: exports ─▶ #[guest_fn] ─▶ OUT return ◀┘
//!                                          └─▶ host_call ─▶ OUT host call
//! ```

#![no_std]

extern crate alloc;

mod bytes;
mod calls;
mod entry;
mod logging;
mod memory;
mod panic;
mod profile;
#[cfg(feature = "tracing")]
mod spans;
pub mod wasm;

pub use alloc::string::String;
pub use calls::{Export, Import, Init, Named, Signature, host_call};
pub use calls::{call_by_name, call_by_name_with, control_address, register, seed};
pub use logging::write_log;
pub use skerry_sandbox_abi as abi;
pub use skerry_sandbox_abi::serde_value;
pub use skerry_sandbox_abi::{HostError, HostReturned};
pub use skerry_sandbox_macros::{guest_fn, guest_init, host_fn};
